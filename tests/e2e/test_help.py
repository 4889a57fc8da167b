"""`--help` of every command is quick and imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from popo_lite.cli import COMMANDS

HEAVY = ("torch", "transformers", "matplotlib", "huggingface_hub", "datasets")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_heavy(command):
    program = (
        "import sys\nfrom popo_lite.cli import main\n"
        f"try:\n    main([*{command.split()!r}, '--help'])\n"
        f"finally:\n    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage: " in done.stdout
    assert done.stderr.strip() == "[]"
