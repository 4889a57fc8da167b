"""The one owner of which adapter a vLLM engine holds. Everything known to go wrong in a swap is settled here.

- Reloading a path under an id that is loaded keeps the old adapter, so every version gets a new name and id.
- Blocks of the prefix cache outlive their adapter, so the cache is reset as well.
- `load_inplace` on a generate request would reload the adapter at every token, so it is never used.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from popo_lite.errors import EngineError
from popo_lite.samplers.base import refuse_stale

MEMORY_BACKED = Path("/dev/shm")  # noqa: S108  # a private folder is made in it
"""Where adapters pass from trainer to engine without touching a disk; elsewhere the temporary folder serves."""


_PREFIX = "popo-lite-adapter-"


class EngineAdapter:
    """Puts versions of the adapter into `engine` (vLLM's LLMEngine), one at a time.

    `write` writes the trainer's current adapter to a folder in PEFT's format.
    """

    def __init__(self, engine: Any, write: Callable[[Path], None]) -> None:
        self._engine = engine
        self._write = write
        self._ids = itertools.count(1)
        parent = MEMORY_BACKED if os.access(MEMORY_BACKED, os.W_OK) else Path(tempfile.gettempdir())
        _remove_orphans(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        self._current: Any = None
        self.version: int | None = None
        self.swap_seconds: list[float] = []

    def swap(self, version: int) -> None:
        """Make the trainer's current weights, which are `version`, the only adapter in the engine."""
        from vllm.lora.request import LoRARequest

        start = time.perf_counter()
        number = next(self._ids)
        folder = self._folder / str(number)
        self._write(folder)
        request = LoRARequest(f"policy-{version}-{number}", number, str(folder))
        self.version = None  # until all of it is done, no version can be sampled
        try:
            if not self._engine.add_lora(request):
                raise EngineError(f"the vLLM engine refused adapter version {version}")
            if self._current is not None:
                self._engine.remove_lora(self._current.lora_int_id)
            held = set(self._engine.list_loras())
            if held != {number}:
                raise EngineError(f"the vLLM engine holds the adapters {sorted(held)} after a swap to {number}")
            if not self._engine.reset_prefix_cache():
                raise EngineError("the vLLM engine did not reset its prefix cache, so it could answer from old weights")
        finally:
            shutil.rmtree(folder)
        self._current, self.version = request, version
        self.swap_seconds.append(time.perf_counter() - start)

    def request(self, version: int) -> Any:
        """What a generate request carries to be answered by `version`. Raises StalePolicyError for another one."""
        refuse_stale(self.version, version)
        return self._current

    def close(self) -> None:
        """Leave no file behind."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _remove_orphans(parent: Path) -> None:
    """Delete what runs that were killed have left in memory."""
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc", str(os.getpid())).exists():
            shutil.rmtree(folder, ignore_errors=True)
