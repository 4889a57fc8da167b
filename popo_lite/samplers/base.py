"""What a sampler is: the one thing that makes rollouts, and that says which policy it made them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from popo_lite.errors import StalePolicyError
from popo_lite.types import Completion, Prompt


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw. Positives must come from the policy itself, so training never sets `top_p`, and there is no top-k.

    Evaluation may cut the distribution to the fewest likeliest tokens whose probabilities sum to `top_p`. Log-probs of
    such draws are for no loss: `hf` gives those of the whole distribution, vLLM those of the cut one.
    """

    temperature: float
    max_completion_length: int
    top_p: float = 1.0


class Sampler(Protocol):
    """Draws completions. Every implementation passes the suite in tests/contract."""

    @property
    def engine(self) -> str:
        """The engine's name in the recipe."""

    @property
    def policy_version(self) -> int | None:
        """Version of the policy that this sampler's adapter is; None where it holds none."""

    def sync(self, policy_version: int) -> None:
        """Take over the trainer's current adapter, which is `policy_version`."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        count: int,
        params: SamplingParams,
        policy_version: int,
        stream: tuple[int | str, ...],
        first_index: int = 0,
        finished: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """`count` completions for each prompt, in order: samples `first_index` and on of each.

        Sample i of a prompt draws from the random stream of (*stream, problem id, i) alone, so what else is in the
        batch changes nothing beyond rounding, and 4 samples and 4 more are those of one call for 8. `finished` is
        told, often and also when it is none, how many sequences have just ended; it may raise.
        Raises StalePolicyError where `policy_version` is not the sampler's.
        """

    @property
    def swap_seconds(self) -> Sequence[float]:
        """Seconds of every adapter swap so far; empty where weights are shared."""

    @property
    def can_sleep(self) -> bool:
        """True if the engine can give GPU memory back."""

    def sleep(self) -> None:
        """Give GPU memory back until the next `sync`. Only for engines that `can_sleep`."""

    def close(self) -> None:
        """Give back what the engine holds."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def refuse_stale(held: int | None, wanted: int) -> None:
    """Raise StalePolicyError where a sampler holds another version than the one asked for, or none."""
    if held != wanted:
        holds = "no policy" if held is None else f"policy version {held}"
        raise StalePolicyError(
            f"the sampler holds {holds} and version {wanted} was asked for; its rollouts would be another policy's",
            next_step="this is a bug in the order of a step: sync the sampler after every update",
        )
