"""Without a working compiler a run is refused before its first rollout."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import torch
from popo_lite.errors import ModelError
from popo_lite.fused import Head, refuse_without_compiler
try:
    refuse_without_compiler(Head(weight=torch.randn(50, 8)))
except ModelError as error:
    print(error)
"""


def test_a_missing_compiler_is_named_with_what_to_do(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={
            **os.environ,
            "CXX": str(tmp_path / "none"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.stdout.startswith("train.compile_loss = true: torch.compile does not work here: "), found
    assert "--set train.compile_loss=false" in found.stdout
