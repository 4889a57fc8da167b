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

from safetensors import SafetensorError

from popo_lite.errors import EngineError
from popo_lite.samplers.base import refuse_stale

MEMORY_BACKED = Path("/dev/shm")  # noqa: S108  # a private folder is made in it
"""Where adapters pass from trainer to engine without touching a disk; elsewhere the temporary folder serves."""


PREFIX = "popo-lite-adapter-"


class EngineAdapter:
    """Puts versions of the adapter into `engine` (vLLM's LLMEngine), one at a time.

    `write` writes the trainer's current adapter, of `adapter_bytes`, to a folder in PEFT's format.
    """

    def __init__(self, engine: Any, write: Callable[[Path], None], *, adapter_bytes: int) -> None:
        self._engine = engine
        self._write = write
        self._ids = itertools.count(1)
        # Containers often have only 64 MB there.
        roomy = os.access(MEMORY_BACKED, os.W_OK) and shutil.disk_usage(MEMORY_BACKED).free > 2 * adapter_bytes
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=MEMORY_BACKED if roomy else None))
        self._current: Any = None
        self.version: int | None = None
        self.swap_seconds: list[float] = []

    def swap(self, version: int) -> None:
        """Make the trainer's current weights, which are `version`, the only adapter in the engine."""
        from vllm.lora.request import LoRARequest

        start = time.perf_counter()
        number = next(self._ids)
        folder = self._folder / str(number)
        request = LoRARequest(f"policy-{version}-{number}", number, str(folder))
        self.version = None  # until all of it is done, no version can be sampled
        try:
            self._write(folder)
            if not self._engine.add_lora(request):
                raise EngineError(f"the vLLM engine refused adapter version {version}")
            if self._current is not None:
                self._engine.remove_lora(self._current.lora_int_id)
            held = set(self._engine.list_loras())
            if held != {number}:
                raise EngineError(f"the vLLM engine holds the adapters {sorted(held)} after a swap to {number}")
            if not self._engine.reset_prefix_cache():
                raise EngineError("the vLLM engine did not reset its prefix cache, so it could answer from old weights")
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the adapter could not be handed to the vLLM engine: {error}",
                where=str(self._folder),
                next_step="make room there, or point TMPDIR at a folder with room",
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._current, self.version = request, version
        self.swap_seconds.append(time.perf_counter() - start)

    def request(self, version: int) -> Any:
        """What a generate request carries to be answered by `version`. Raises StalePolicyError for another one."""
        refuse_stale(self.version, version)
        return self._current

    def close(self) -> None:
        """Leave no file behind."""
        shutil.rmtree(self._folder, ignore_errors=True)
