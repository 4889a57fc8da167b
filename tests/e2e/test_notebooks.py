"""Execute the notebooks on the tiny model, and check that none is committed with outputs."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORT = '["train.steps=4", "eval.problems=20"]'


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_a_gpu_and_a_network(path, tmp_path, monkeypatch):
    command = tmp_path / "bin" / "popo-lite"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m popo_lite "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("SETTINGS = []", f"SETTINGS = {SHORT}")
    assert SHORT in "".join(cell.source for cell in notebook.cells)
    work = tmp_path / "work"
    work.mkdir()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(work)}}).execute()
    # A shell command that fails raises nothing.
    outputs = [json.dumps(cell.get("outputs", [])) for cell in notebook.cells]
    failed = [text for text in outputs if re.search(r"No such command|Traceback|error(?:\\u001b\[0m)? {2}", text)]
    assert failed == []
    assert (work / "runs" / "run-seed0" / "report.html").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []
