"""Micro-batches under a token budget that is lowered, and stays lowered, when the GPU runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from popo_lite.errors import EngineError
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.training.batching import MicroBatch, collate, cut
from popo_lite.types import Rollout


class MicroBatches:
    """Cuts rollouts into micro-batches of at most `budget_tokens`, and cuts again where one does not fit.

    `relief` says what else would make a single sequence fit; it ends the error of one that does not.
    """

    def __init__(
        self, budget_tokens: int, device: torch.device, *, notify: Callable[[str], None], relief: Callable[[], str]
    ) -> None:
        self.budget_tokens = budget_tokens
        self._device = device
        self._notify, self._relief = notify, relief

    def run(self, rollouts: Sequence[Rollout], work: Callable[[MicroBatch], None], *, stage: str) -> int:
        """Call `work` with micro-batches that hold every rollout once; returns how many they were.

        `work` must leave no trace where it raises an out-of-memory error: its micro-batch is cut in two and tried
        again, and what waits behind it is cut anew. Raises EngineError where a sequence alone does not fit.
        """
        waiting = cut(rollouts, range(len(rollouts)), budget_tokens=self.budget_tokens)
        done = 0
        while waiting:
            if self._fits(rollouts, waiting[0], work):
                waiting.pop(0)
                done += 1
                continue
            failed = sum(rollouts[member].tokens for member in waiting[0])
            if len(waiting[0]) == 1:
                prompt = rollouts[waiting[0][0]].prompt
                raise EngineError(
                    f"the GPU ran out of memory in the {stage} pass of a single sequence of {failed} tokens",
                    where=f"problem {prompt.problem.id}",
                    next_step=self._relief(),
                )
            self.budget_tokens = (failed + 1) // 2
            self._notify(
                f"memory ran out in the {stage} pass of {failed:,} tokens; the step goes on, with micro-batches of at "
                f"most {self.budget_tokens:,} from now on"
            )
            left = [member for batch in waiting for member in batch]
            waiting = cut(rollouts, left, budget_tokens=self.budget_tokens)
        return done

    def _fits(self, rollouts: Sequence[Rollout], members: Sequence[int], work: Callable[[MicroBatch], None]) -> bool:
        try:
            work(collate(rollouts, members, device=self._device))
            return True
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
        release_memory()
        return False
