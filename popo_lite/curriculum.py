"""Choose a step's problems and rollout budgets, and collect graded groups.

The choice of problems is a pure function of (seed, step), the position in the stream of problems, and the level and
history of earlier steps, which the cursor holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

from popo_lite.conversation import RolloutWorker
from popo_lite.grading import refuse_ungraded
from popo_lite.recipe import CurriculumRecipe, Recipe, RolloutRecipe
from popo_lite.samplers import SamplingParams
from popo_lite.seeding import stream_seed
from popo_lite.tasks import Task
from popo_lite.types import FinishReason, Group, Outcome, Problem, Prompt, Reward, Rollout

MIN_ANSWERS = 4
"""Fewer answers that agree prove little: at a pass rate of one half, four agree one time in eight."""

LOOK_AHEAD = 20
"""A step reads at most this many times P problems of the stream, so that it ends even if all of them are known."""

# --------------------------------------------------------------------------- choosing problems


class Seen(NamedTuple):
    """Result of a problem's latest rollouts."""

    rollouts: int
    positives: int
    step: int


History = Mapping[str, Seen]
"""Latest result by problem id."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The distinct problems of a step, how many known ones were skipped, and the next position in the stream.

    `skipped_right` of the skipped ones were always solved.
    """

    problems: tuple[Problem, ...]
    skipped: int
    next_problem: int
    skipped_right: int = 0


def choose_problems(task: Task, recipe: Recipe, step: int, first: int, history: History, level: int = 0) -> Choice:
    """Choose the problems of `step` at `level`, from position `first` of the stream on.

    Without `rollout.skip_known`: the next P, or fewer if one was drawn twice. With it, known problems are skipped,
    except a fraction (`explore_ratio`). If that leaves fewer than P within `LOOK_AHEAD`, the skipped ones that were
    sampled longest ago fill the step.
    """
    count, seed, skipping = recipe.data.prompts_per_step, recipe.train.seed, recipe.rollout.skip_known
    chosen: dict[str, Problem] = {}
    skipped: dict[str, Problem] = {}
    position, end = first, first + count * (LOOK_AHEAD if skipping else 1)
    while position < end and len(chosen) < count:
        problem = task.train_problem(seed, position, level)
        position += 1
        known = skipping and problem.id in history and is_known(history[problem.id], recipe)
        if known and stream_seed("explore", seed, step, problem.id) / 2**63 >= recipe.rollout.explore_ratio:
            skipped[problem.id] = problem
        else:
            chosen[problem.id] = problem
    for problem in sorted(skipped.values(), key=lambda problem: history[problem.id].step)[: count - len(chosen)]:
        chosen[problem.id] = skipped.pop(problem.id)
    right = sum(history[name].positives > 0 for name in skipped)
    return Choice(problems=tuple(chosen.values()), skipped=len(skipped), next_problem=position, skipped_right=right)


def is_known(seen: Seen, recipe: Recipe) -> bool:
    """Return whether enough answers say that a problem is solved always, or never.

    "Never" takes at least G rollouts: with fewer, an adaptive budget only ran out on it.
    """
    rollout = recipe.rollout
    most = rollout.adaptive.max_rollouts if rollout.adaptive.enabled else rollout.num_generations
    if seen.positives == 0:
        return seen.rollouts >= max(MIN_ANSWERS, min(rollout.num_generations, most))
    return seen.positives == seen.rollouts >= MIN_ANSWERS


def remember(history: History, groups: Sequence[Group], recipe: Recipe, step: int) -> dict[str, Seen]:
    """Return a new history with the groups of `step`; empty if the recipe skips nothing.

    A problem with an answer that could not be graded is forgotten: that answer is neither right nor wrong.
    """
    if not recipe.rollout.skip_known:
        return {}
    after = dict(history)
    for group in groups:
        after.pop(group.prompt.problem.id, None)
        if all(rollout.reward.outcome.is_graded for rollout in group.rollouts):
            positives = len(group.positives)
            after[group.prompt.problem.id] = Seen(len(group.rollouts), positives, step)
    return after


# --------------------------------------------------------------------------- difficulty


def level_pass_rate(choice: Choice, pass_rate: float) -> float:
    """Return the pass rate of a step's level from that of its sampled problems, those it skipped included.

    `rollout.skip_known` leaves out what is always or never solved, so the sampled ones alone would hide that a level
    has become too easy or is too hard.
    """
    sampled = len(choice.problems)
    return (sampled * pass_rate + choice.skipped_right) / (sampled + choice.skipped)


def next_level(level: int, rates: Sequence[float], recipe: CurriculumRecipe, levels: int) -> tuple[int, list[float]]:
    """Return (level of the next step, pass rates to keep) from the `rates` of the steps since the level last moved."""
    rates = list(rates[-recipe.window :])
    if len(rates) < recipe.window:
        return level, rates
    mean = statistics.fmean(rates)
    moved = level + 1 if mean > recipe.high else level - 1 if mean < recipe.low else level
    moved = max(0, min(moved, levels - 1))
    return (level, rates) if moved == level else (moved, [])


# --------------------------------------------------------------------------- budget of rollouts


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Rollout limits of a step's prompts. `mean_rollouts` is G: a step of P prompts makes at most P * G in all.

    Under the adaptive budget a prompt is sampled in rounds until it has `positives_wanted`. Whether it goes on depends
    on verdicts alone; given these, a prompt's positives are independent draws from the policy's right answers. So
    stopping early decides how many positives there are, never which (docs/method.md, Adaptive budget).
    """

    round_size: int
    positives_wanted: int
    max_rollouts: int
    mean_rollouts: int

    @classmethod
    def of(cls, recipe: RolloutRecipe) -> Budget:
        """Return the recipe's budget; a fixed one is a single round of G, however many positives it finds."""
        size, adaptive = recipe.num_generations, recipe.adaptive
        names = ("round_size", "positives_wanted", "max_rollouts")
        limits = {name: getattr(adaptive, name) if adaptive.enabled else size for name in names}
        return cls(**limits, mean_rollouts=size)

    def next_round(self, positives: Sequence[int | None], *, made: int, total: int) -> tuple[list[int], int]:
        """Return (prompts of the next round, rollouts for each of them); no prompts if sampling is over.

        `positives` counts those of each prompt, None for one that has stopped; `made` is how many rollouts each of
        the others has, `total` how many the step has. If the rest of the budget is too small for all, prompts with
        the fewest positives come first, then the order of the prompts decides; a rest smaller than a round is not
        spent.
        """
        count = min(self.round_size, self.max_rollouts - made)
        unfinished = sorted((n, i) for i, n in enumerate(positives) if n is not None and n < self.positives_wanted)
        affordable = (len(positives) * self.mean_rollouts - total) // count if count else 0
        return sorted(index for _, index in unfinished[:affordable]), count


Clock = Callable[..., AbstractContextManager[None]]
"""(stage, total=amount of work) -> a context that times the stage."""


def collect(
    prompts: Sequence[Prompt],
    worker: RolloutWorker,
    policy_version: int,
    step: int,
    clock: Clock,
    progress: Callable[[int], None],
) -> list[Group]:
    """Sample and grade a group of rollouts for every prompt, in order, round by round. A collective.

    In each round every rank does its share of the prompts, and gets the answers and rewards of all.

    Raises GradingError if more than `reward.max_ungraded_ratio` of the rollouts so far could not be graded.
    """
    recipe, ranks = worker.recipe, worker.ranks
    budget, settings = Budget.of(recipe.rollout), recipe.rollout
    params = SamplingParams(temperature=settings.temperature, max_completion_length=settings.max_completion_length)
    made: list[list[Rollout]] = [[] for _ in prompts]
    positives: list[int | None] = [0] * len(prompts)
    first = 0
    while True:
        going, count = budget.next_round(positives, made=first, total=sum(map(len, made)))
        if not going:
            return [Group(rollouts=tuple(rollouts)) for rollouts in made]
        mine = ranks.share(going)
        with clock("rollout", total=len(mine) * count), worker.sampler.drawing():
            completions = worker.sample(
                [prompts[index] for index in mine],
                count=count,
                first_index=first,
                params=params,
                policy_version=policy_version,
                stream=("rollout", recipe.train.seed, step),
                finished=progress,
            )
        with clock("grade"):
            answered = [
                (answer, prompts[index].problem)
                for index, group in zip(mine, completions, strict=True)
                for answer in group
            ]
            rewards = worker.grade(answered, step=step)
            verdicts = iter(
                _cut_off(reward)
                if recipe.reward.truncated == "wrong" and answer.finish_reason is FinishReason.LENGTH
                else reward
                for (answer, _), reward in zip(answered, rewards, strict=True)
            )
            graded = [[(answer, next(verdicts)) for answer in group] for group in completions]
        with clock("gather") if ranks.size > 1 else nullcontext():
            graded = ranks.merge(graded)
        for index, group in zip(going, graded, strict=True):
            made[index] += [
                Rollout(prompt=prompts[index], completion=answer, reward=reward, policy_version=policy_version, index=i)
                for i, (answer, reward) in enumerate(group, start=len(made[index]))
            ]
        so_far = [rollout.reward for rollouts in made for rollout in rollouts]
        refuse_ungraded(so_far, recipe.reward.max_ungraded_ratio, f"step {step}")
        first += count
        # A prompt left out of this round has fewer rollouts than the others from now on, so it stays out.
        positives = [None] * len(prompts)
        for index in going:
            positives[index] = sum(rollout.reward.positive for rollout in made[index])


def _cut_off(reward: Reward) -> Reward:
    """Return the reward of an answer that counts as wrong because it was cut off."""
    detail = "cut off at rollout.max_completion_length"
    return replace(reward, value=0.0, positive=False, outcome=Outcome.INCORRECT, detail=detail)
