"""Hold the data of a run, from problems to results. Frozen, keyword-only, free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from popo_lite.errors import PopoError


class FinishReason(StrEnum):
    """Why a completion ended: an end-of-sequence token, or the token limit."""

    STOP = "stop"
    LENGTH = "length"


class Outcome(StrEnum):
    """Result of grading. Only `CORRECT` and `INCORRECT` say anything about the answer."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    UNPARSED = "unparsed"
    TIMEOUT = "timeout"
    ERROR = "error"

    @property
    def is_graded(self) -> bool:
        """True if the grader reached a verdict. `UNPARSED`, no answer in the text, is one: not correct."""
        return self not in (Outcome.TIMEOUT, Outcome.ERROR)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question with a checkable answer. `messages` are chat messages (`role`, `content`)."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """Text of the last message: what a person reads as the question."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem rendered to token ids, generation prompt included."""

    problem: Problem
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer.

    `sampler_logps` are the log-probs in nats of the model's own tokens under the sampling temperature, as the
    sampler computed them. The end-of-sequence token is one of them; `text` is without special tokens.

    A conversation with an environment is one completion. `loss_mask` tells the model's own tokens (True) from those of
    the environment, `messages` are all that followed the prompt, and `text` is the model's last one. `failed` is the
    reward, without a verdict, of a conversation that the environment could not go on with.
    """

    token_ids: tuple[int, ...]
    sampler_logps: tuple[float, ...]
    finish_reason: FinishReason
    text: str
    loss_mask: tuple[bool, ...] | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    failed: Reward | None = None

    def __post_init__(self) -> None:
        own = len(self.token_ids) if self.loss_mask is None else sum(self.loss_mask)
        if not own or own != len(self.sampler_logps):
            sizes = f"{own} tokens came with {len(self.sampler_logps)} log-probs"
            raise PopoError(f"a completion of {sizes}; a sampler must return a token or more, and a log-prob for each")

    @property
    def own_positions(self) -> tuple[int, ...] | None:
        """Positions in `token_ids` of the model's own tokens, or None if all are."""
        return None if self.loss_mask is None else tuple(i for i, own in enumerate(self.loss_mask) if own)

    @property
    def own_token_ids(self) -> tuple[int, ...]:
        """The model's own tokens: those that are trained."""
        positions = self.own_positions
        return self.token_ids if positions is None else tuple(self.token_ids[i] for i in positions)

    @property
    def mean_logp(self) -> float:
        """Mean log-prob per token of the model's own, nats."""
        return sum(self.sampler_logps) / len(self.sampler_logps)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A verdict: `value` in [0, 1], the outcome of grading, and the final answer found in the text, if any.

    `positive` says whether the answer counts as right, by `reward.positive_if`. `parts` holds the value in [0, 1] of
    each reward function that applies to the answer.
    """

    value: float
    outcome: Outcome
    positive: bool = False
    answer: str | None = None
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One completion of one prompt with its reward. `index` numbers the samples of the prompt from 0."""

    prompt: Prompt
    completion: Completion
    reward: Reward
    policy_version: int
    index: int

    @property
    def tokens(self) -> int:
        """Length of prompt and completion, in tokens."""
        return len(self.prompt.token_ids) + len(self.completion.token_ids)


@dataclass(frozen=True, kw_only=True)
class Group:
    """All rollouts of one prompt, sampled from one version of the policy."""

    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        origins = {(rollout.prompt.problem.id, rollout.policy_version) for rollout in self.rollouts}
        if len(origins) != 1:
            raise PopoError(f"a group needs rollouts of one prompt and one policy version, not of {sorted(origins)}")

    @property
    def prompt(self) -> Prompt:
        """The prompt that all rollouts answer."""
        return self.rollouts[0].prompt

    @property
    def positives(self) -> tuple[Rollout, ...]:
        """S+: the rollouts whose reward is positive."""
        return tuple(rollout for rollout in self.rollouts if rollout.reward.positive)


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Sampled accuracy on held-out problems. `pass_at_k` maps k to the unbiased estimate.

    `pass_rates` holds the share of right answers to each problem, for paired comparisons. `unreadable` of the problems
    have a reference answer that cannot be read: they count as not solved.
    """

    weights: str
    problems: int
    unreadable: int
    samples_per_problem: int
    pass_at_1: float
    pass_at_k: Mapping[int, float]
    task_figures: Mapping[str, float]
    truncated_ratio: float
    ungraded_ratio: float
    completion_tokens_mean: float
    rollout_tokens: int
    seconds: float
    pass_rates: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """Return what a run's files keep: all but the pass rates, which would be most of summary.json."""
        return {key: value for key, value in asdict(self).items() if key != "pass_rates"}


def count_outcomes(rewards: Sequence[Reward]) -> dict[str, int]:
    """Return how often each outcome occurred, those that did not included."""
    counts = Counter(reward.outcome for reward in rewards)
    return {outcome.value: counts[outcome] for outcome in Outcome}
