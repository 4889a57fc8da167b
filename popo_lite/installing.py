"""Say how to install packages for this Python. Free of torch."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1]
CHECKOUT = FOLDER if (FOLDER / "pyproject.toml").is_file() else None
"""The checkout that this package is imported from; None for an installed wheel."""


def pip(command: str, *words: str) -> str:
    """Return a command of pip for this Python. Environments of uv have no pip, and uv asks for no confirmation."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is not None:
        start = [python, "-m", "pip", command, *(["-y"] if command == "uninstall" else [])]
    else:
        start = ["uv", "pip", command, "--python", python]
    return " ".join([*start, *map(shlex.quote, words)])


def install_extra(name: str) -> str:
    """Return the command that installs an extra. popo-lite is not on PyPI yet, so that takes its checkout."""
    if CHECKOUT is None:
        return f"{pip('install', f'.[{name}]')}, in a checkout of popo-lite"
    return pip("install", "-e", f"{CHECKOUT}[{name}]")
