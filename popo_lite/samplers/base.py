"""The interface of rollout engines, and the checks that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, runtime_checkable

from popo_lite.errors import StalePolicyError
from popo_lite.types import Completion, FinishReason, Prompt


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample. Positives must come from the policy itself, so training never sets `top_p`; there is no top-k.

    Evaluation may sample from the fewest likeliest tokens whose probabilities sum to `top_p`. Such log-probs are
    not for any loss: `hf` gives those of the whole distribution, vLLM those of the nucleus.
    """

    temperature: float
    max_completion_length: int
    top_p: float = 1.0


class Request(NamedTuple):
    """One completion to sample. `key` names its random stream: what else is in the batch does not change it."""

    prompt: Prompt
    key: tuple[int | str, ...]


Progress = Callable[[int], None]
"""Called often with how many sequences have just ended, also if none has; may raise."""


class Sampler(ABC):
    """Samples completions from one version of the policy. Every engine passes the suite in tests/contract.

    `policy_version` is that of the adapter it holds, None if none; `swap_seconds` are those of every adapter swap.
    """

    engine: str
    policy_version: int | None = None
    swap_seconds: Sequence[float] = ()

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        count: int,
        params: SamplingParams,
        policy_version: int,
        stream: tuple[int | str, ...],
        first_index: int = 0,
        finished: Progress | None = None,
    ) -> list[list[Completion]]:
        """Return `count` completions for each prompt, in order: its samples `first_index` and on.

        Sample i of a prompt draws from the random stream of (*stream, problem id, i) alone, so 4 samples and 4 more are
        those of one call for 8, beyond rounding. Raises StalePolicyError if `policy_version` is not the sampler's.
        """
        refuse_stale(self.policy_version, policy_version)
        requests = [
            Request(prompt, (*stream, prompt.problem.id, index))
            for prompt in prompts
            for index in range(first_index, first_index + count)
        ]
        completions = self._complete(requests, params, finished or (lambda _: None))
        return [completions[row * count : (row + 1) * count] for row in range(len(prompts))]

    @abstractmethod
    def sync(self, policy_version: int) -> None:
        """Take over the trainer's current adapter, which is `policy_version`."""

    @abstractmethod
    def _complete(self, requests: Sequence[Request], params: SamplingParams, finished: Progress) -> list[Completion]:
        """Return a completion for each request, in order."""

    def close(self) -> None:  # noqa: B027  # most engines hold nothing
        """Give back what the engine holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@runtime_checkable
class CanSleep(Protocol):
    """A sampler that can give GPU memory back while it is not needed."""

    def sleep(self) -> None:
        """Give GPU memory back until the next `sync`."""


def make_completion(
    token_ids: Sequence[int],
    logps: Sequence[float],
    stop_ids: frozenset[int],
    text: Callable[[Sequence[int]], str],
) -> Completion:
    """Return the completion of these tokens; it stopped if the last of them ends answers."""
    return Completion(
        token_ids=tuple(token_ids),
        sampler_logps=tuple(logps),
        finish_reason=FinishReason.STOP if token_ids[-1] in stop_ids else FinishReason.LENGTH,
        text=text(token_ids),
    )


def refuse_stale(held: int | None, wanted: int) -> None:
    """Raise StalePolicyError if a sampler holds another version than `wanted`, or none."""
    if held != wanted:
        holds = "no policy" if held is None else f"policy version {held}"
        raise StalePolicyError(
            f"the sampler holds {holds} and version {wanted} was asked for; its rollouts would be another policy's",
            next_step="this is a bug in the order of a step: sync the sampler after every update",
        )
