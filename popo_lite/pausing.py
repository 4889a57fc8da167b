"""Pause a run: give the GPU back to other programs, and take it again."""

from __future__ import annotations

import torch

from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.parking import move_back, move_to_host
from popo_lite.samplers import Sampler
from popo_lite.update import Learner

GIB = 2**30


class Pause:
    """A pause, from its creation to `end`: the engine sleeps, and weights and optimizer are in host memory.

    On a CPU nothing is moved. `freed` says what a GPU gave back. Nothing may compute meanwhile; saving works.
    """

    def __init__(self, learner: Learner, sampler: Sampler) -> None:
        policy = learner.policy
        self._policy, self._sampler, self._device = policy, sampler, policy.device
        self._holders = (
            *(policy.model, policy.predictor, policy.head.weight, policy.head.bias),
            *(learner.siamese.average, learner.optimizer.state, vars(learner.optimizer)),
        )
        learner.optimizer.zero_grad(set_to_none=True)
        before = self._free_bytes()
        sampler.sleep()
        self._parked = move_to_host(*self._holders)
        release_memory()
        self._taken, self.freed = self._free_bytes() - before, ""
        if self._device.type == "cuda":
            # CUDA's own memory goes only with the process.
            left = torch.cuda.memory_reserved(self._device)
            self.freed = f": {self._taken / GIB:.2f} GiB of the GPU are free again, {left / GIB:.2f} GiB stay in use"

    def end(self) -> str | None:
        """Take the GPU again, all but the engine's part. Return why that is not possible now, or None."""
        if (free := self._free_bytes()) < self._taken:
            return (
                f"to continue, the run needs {self._taken / GIB:.2f} GiB of the GPU, and {free / GIB:.2f} GiB are "
                "free: it stays paused; end other programs on the GPU, then ask it again to continue"
            )
        try:
            move_back(self._parked, self._device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if self._parked:  # another program was faster
            self._parked += move_to_host(*self._holders)
            release_memory()
            return "another program took the GPU's memory: the run stays paused"
        return None

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else 0
