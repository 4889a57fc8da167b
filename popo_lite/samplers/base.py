"""The interface of rollout engines, and the checks that all of them share."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from popo_lite.distributed import Ranks
from popo_lite.errors import NotFiniteError, StalePolicyError
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.seeding import stream_seed
from popo_lite.types import Completion, FinishReason, Prompt

log = logging.getLogger(__name__)


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
    """A completion to sample. `seed` is that of a random stream that nothing else in the batch changes."""

    prompt: Prompt
    seed: int
    max_tokens: int


Requests = Sequence[Request]
Answers = Sequence[tuple[Sequence[int], Sequence[float]]]
"""Token ids and their log-probs in nats. What ended an answer is its last token."""
Progress = Callable[[int], None]
"""Called often with how many sequences have just ended, also if none has; may raise."""


class Sampler(AbstractContextManager["Sampler"]):
    """Samples completions from one version of the policy. Every engine passes the suite in tests/contract.

    `policy_version` is that of the adapter it holds, None if none; `swap_seconds` are those of every adapter swap. Each
    of the `ranks` has a sampler and draws its own requests. Opening and `sync` are collectives of the ranks.
    """

    engine: str

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        *,
        text: Callable[[Sequence[int]], str],
        notify: Callable[[str], None] = log.warning,
        ranks: Ranks | None = None,
    ) -> None:
        """Open the engine with the current version of `policy`.

        `text` decodes token ids; `notify` takes notices that must not be lost: a server that died, memory that ran out.
        """
        self._policy, self._recipe, self._text, self._notify = policy, recipe, text, notify
        self.ranks = ranks or Ranks()
        self.policy_version: int | None = None
        self.swap_seconds: list[float] = []
        self._open()
        try:
            self.sync(policy.version)
        except BaseException:
            self.close()
            raise

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
        those of one call for 8, beyond rounding. Raises what `draw` raises.
        """
        indices = range(first_index, first_index + count)
        wanted = [(prompt, index, params.max_completion_length) for prompt in prompts for index in indices]
        drawn = self.draw(wanted, params=params, policy_version=policy_version, stream=stream, finished=finished)
        return [drawn[row * count : (row + 1) * count] for row in range(len(prompts))]

    def draw(
        self,
        wanted: Sequence[tuple[Prompt, int, int]],
        *,
        params: SamplingParams,
        policy_version: int,
        stream: tuple[int | str, ...],
        finished: Progress | None = None,
    ) -> list[Completion]:
        """Return a completion for each of `wanted`: prompt, which of its samples, most tokens.

        Raises StalePolicyError if `policy_version` is not the sampler's, and EngineError if a log-prob is not finite.
        """
        if self.policy_version != policy_version:
            holds = "no policy" if self.policy_version is None else f"policy version {self.policy_version}"
            what = f"the sampler holds {holds}, and version {policy_version} was asked for"
            next_step = "this is a bug in the order of a step: sync the sampler after every update"
            raise StalePolicyError(what, next_step=next_step)
        requests = [
            Request(prompt, stream_seed(*stream, prompt.problem.id, index), max_tokens)
            for prompt, index, max_tokens in wanted
        ]
        answers = self._complete(requests, params, finished or (lambda _: None))
        completions = []
        for request, (token_ids, logps) in zip(requests, answers, strict=True):
            if not all(map(math.isfinite, logps)):
                raise not_finite(f"problem {request.prompt.problem.id}", self._recipe.model.dtype)
            reason = FinishReason.LENGTH if self._policy.stop_ids.isdisjoint(token_ids[-1:]) else FinishReason.STOP
            ids, text = tuple(token_ids), self._text(token_ids)
            completions.append(Completion(token_ids=ids, sampler_logps=tuple(logps), finish_reason=reason, text=text))
        return completions

    def drawing(self) -> AbstractContextManager[None]:
        """Return a context for rollouts, which all ranks enter together. In it each draws as often as it needs."""
        return nullcontext()

    def sync(self, policy_version: int) -> None:
        """Take over the trainer's current adapter, which is `policy_version`."""
        self.policy_version = None  # until all of it is done, no version can be sampled
        self._load(policy_version)
        self.policy_version = policy_version

    def reopen(self) -> None:
        """Close an engine that failed and open it again with the trainer's current adapter."""
        self.policy_version = None
        try:
            self.close()
        except Exception:  # of an engine that is dead: what counts is whether a new one starts
            log.warning("the engine that failed could not be closed", exc_info=True)
        release_memory()
        self._open()
        self.sync(self._policy.version)

    def sleep(self) -> None:
        """Give GPU memory back until the next `sync`, if the engine can."""

    def close(self) -> None:
        """Give back what the engine holds."""

    @abstractmethod
    def _open(self) -> None:
        """Start what the first `sync` needs."""

    def _load(self, version: int) -> None:
        """Load the trainer's current adapter, which is `version`, if the engine has weights of its own."""

    @abstractmethod
    def _complete(self, requests: Requests, params: SamplingParams, finished: Progress) -> Answers:
        """Return the answers to the requests, in order."""

    def __exit__(self, *_: object) -> None:
        self.close()


def not_finite(where: str, dtype: str = "") -> NotFiniteError:
    """Return the error of log-probs that are not finite, in a model of `dtype`."""
    what = "the model's log-probs are not finite, so its weights or activations are not either"
    if dtype == "float16":
        what += " (float16 ends at 65,504; a new run in model.dtype = bfloat16 or float32 goes further)"
    next_step = "resume from an earlier --checkpoint with a lower --set optimizer.learning_rate; "
    next_step += "restart servers, whose caches keep such values"
    return NotFiniteError(what, where=where, next_step=next_step)
