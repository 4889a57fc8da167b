"""Folders with converted models in the Hub's cache, each made once."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from popo_lite.errors import ModelError


def cached_folder(name: str, identity: object, write: Callable[[Path], None]) -> Path:
    """Return the folder `name`-HASH, HASH that of `identity`, which `write` has filled now or in an earlier process.

    A folder with such a name is complete; a second process waits until the first has written it. Raises ModelError if
    it cannot be written.
    """
    from huggingface_hub.constants import HF_HOME

    cache = Path(HF_HOME) / "popo-lite"
    name = f"{name}-{hashlib.sha256(str(identity).encode()).hexdigest()[:16]}"
    folder, partial = cache / name, cache / f"{name}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                try:
                    write(partial)
                    partial.replace(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        what = f"the dequantised model cannot be written: {error}"
        next_step = "set HF_HOME to a folder with enough space"
        raise ModelError(what, where=str(cache), next_step=next_step) from error
    return folder
