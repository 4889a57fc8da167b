"""Say what to do about a run that ran out of memory or disk."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

from safetensors import SafetensorError

from popo_lite.distributed import RankLostError
from popo_lite.errors import EngineError, PopoError
from popo_lite.policy.memory import is_out_of_memory
from popo_lite.run_folder import RunFolder

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def explained(error: BaseException, run: RunFolder, memory_advice: Callable[[], str]) -> BaseException:
    """Return a PopoError with the next step if memory or disk ran out; return any other error as it is."""
    resume = f"continue: {run.resume_command}"
    if is_out_of_memory(error):
        advice = "if it was the engine's memory, resume with a smaller rollout.vllm.gpu_memory_utilization or "
        advice += f"rollout.max_num_seqs; else {memory_advice()}"
        return EngineError("the GPU ran out of memory", next_step=advice)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        advice = f"close other programs or lower train.tokens_per_microbatch, then {resume}"
        return PopoError("the computer ran out of memory", next_step=advice)
    if isinstance(error, RankLostError):
        if run.resume_command not in (error.next_step or ""):  # else another rank has added it
            mend = error.next_step or "fix the cause"
            error.next_step = f"{mend}; then resume on any number N of ranks: {run.resume_command}"
        return error
    code: object = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    if code in DISK_FULL:
        place = getattr(error, "filename", None) or run.path
        return PopoError("the disk is full", where=str(place), next_step=f"free some space there, then {resume}")
    return error
