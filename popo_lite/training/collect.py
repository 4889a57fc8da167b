"""Gathering the groups of a step: rounds of sampling and grading. The fixed budget is one round of G.

Under the adaptive budget a prompt is sampled until it has the positives that are wanted. Whether it goes on depends
on verdicts alone, and given these the positives of a prompt are independent draws from the policy's right answers:
stopping early decides how many of them there are, never which (docs/method.md, Adaptive budget).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

from popo_lite.grading import Grader, GradeRequest, refuse_ungraded
from popo_lite.recipe import Recipe, RewardRecipe, RolloutRecipe
from popo_lite.samplers import Sampler, SamplingParams
from popo_lite.training.metrics import StageClock
from popo_lite.types import Completion, FinishReason, Group, Outcome, Prompt, Reward, Rollout


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How rollouts are dealt out. `mean_rollouts` is G: a step of P prompts makes at most P * G in all."""

    round_size: int
    positives_wanted: int
    max_rollouts: int
    mean_rollouts: int

    @classmethod
    def of(cls, recipe: RolloutRecipe) -> Self:
        """The recipe's budget; for a fixed one a single round of G, wherever positives are found."""
        size = recipe.num_generations
        if not recipe.adaptive.enabled:
            return cls(round_size=size, positives_wanted=size, max_rollouts=size, mean_rollouts=size)
        return cls(
            round_size=recipe.adaptive.round_size,
            positives_wanted=recipe.adaptive.positives_wanted,
            max_rollouts=recipe.adaptive.max_rollouts,
            mean_rollouts=size,
        )

    def next_round(self, positives: Sequence[int | None], *, made: int, total: int) -> tuple[list[int], int]:
        """(prompts of the next round, rollouts for each of them); no prompts where sampling is over.

        `positives` counts those of each prompt, None for one that has stopped; `made` is how many rollouts each of
        the others has, `total` how many the step has. Where what is left does not reach all who need more, those
        with the fewest positives come first, then the order of the prompts decides; what is left and smaller than a
        round is not spent.
        """
        count = min(self.round_size, self.max_rollouts - made)
        needy = sorted(
            (found, index)
            for index, found in enumerate(positives)
            if found is not None and found < self.positives_wanted
        )
        affordable = (len(positives) * self.mean_rollouts - total) // count if count else 0
        return sorted(index for _, index in needy[:affordable]), count


def collect(
    prompts: Sequence[Prompt],
    recipe: Recipe,
    *,
    sampler: Sampler,
    grader: Grader,
    policy_version: int,
    step: int,
    clock: StageClock,
    finished: Callable[[int], None],
) -> list[Group]:
    """A group of rollouts for every prompt, in order; the stages "rollout" and "grade" of `clock`, round by round.

    Raises GradingError where more than `reward.max_ungraded_ratio` of the rollouts so far could not be graded.
    """
    budget, threshold = Budget.of(recipe.rollout), recipe.objective.reward_threshold
    params = SamplingParams(
        temperature=recipe.rollout.temperature, max_completion_length=recipe.rollout.max_completion_length
    )
    made: list[list[Rollout]] = [[] for _ in prompts]
    positives: list[int | None] = [0] * len(prompts)
    first = 0
    while True:
        going, count = budget.next_round(positives, made=first, total=sum(map(len, made)))
        if not going:
            return [Group(rollouts=tuple(rollouts)) for rollouts in made]
        with clock("rollout", total=len(going) * count):
            completions = sampler.sample(
                [prompts[index] for index in going],
                count=count,
                first_index=first,
                params=params,
                policy_version=policy_version,
                stream=("rollout", recipe.train.seed, step),
                finished=finished,
            )
        with clock("grade"):
            drawn = [
                (index, first + number, completion)
                for index, answers in zip(going, completions, strict=True)
                for number, completion in enumerate(answers)
            ]
            rewards = grader.grade(
                [GradeRequest(text=completion.text, problem=prompts[index].problem) for index, _, completion in drawn]
            )
            for (index, sample, completion), reward in zip(drawn, rewards, strict=True):
                made[index].append(
                    Rollout(
                        prompt=prompts[index],
                        completion=completion,
                        reward=_verdict(reward, completion, recipe.reward),
                        policy_version=policy_version,
                        index=sample,
                    )
                )
            refuse_ungraded(
                [rollout.reward for rollouts in made for rollout in rollouts],
                recipe.reward.max_ungraded_ratio,
                f"step {step}",
            )
        first += count
        # A prompt that this round left out has fewer rollouts than the others from now on, so it stays out.
        positives = [None] * len(prompts)
        for index in going:
            positives[index] = sum(rollout.reward.value > threshold for rollout in made[index])


def _verdict(reward: Reward, completion: Completion, recipe: RewardRecipe) -> Reward:
    """The grader's verdict, or that the answer is wrong because it was cut off."""
    if recipe.truncated == "grade" or completion.finish_reason is not FinishReason.LENGTH:
        return reward
    return replace(reward, value=0.0, outcome=Outcome.INCORRECT, detail="cut off at rollout.max_completion_length")
