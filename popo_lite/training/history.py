"""Which problems a step takes, and what earlier steps found out about them.

A pure function of (seed, step), the position in the stream of problems and the history, which the cursor holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from popo_lite.recipe import Recipe
from popo_lite.seeding import stream_seed
from popo_lite.tasks import Task
from popo_lite.types import Group, Problem

EVIDENCE = 4
"""Fewer answers that agree say little: at a pass rate of one half, four agree one time in eight."""

LOOK_AHEAD = 20
"""A step reads at most this many times P problems of the stream, so that it ends where all of them are known."""


class Seen(NamedTuple):
    """How a problem fared when it was last sampled."""

    rollouts: int
    positives: int
    step: int


History = Mapping[str, Seen]
"""By problem id."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The distinct problems of a step, how many known ones were left out, and where in the stream to go on."""

    problems: tuple[Problem, ...]
    skipped: int
    next_problem: int


def choose_problems(task: Task, recipe: Recipe, *, step: int, first: int, history: History) -> Choice:
    """The problems of `step`, from position `first` of the stream on.

    Without `rollout.skip_known` the next P, fewer where one was drawn twice. With it known ones are left out, apart
    from a share that is explored all the same. Where that leaves fewer than P within `LOOK_AHEAD`, those of the
    left out that were sampled longest ago make up the number.
    """
    count, seed, skipping = recipe.data.prompts_per_step, recipe.train.seed, recipe.rollout.skip_known
    chosen: dict[str, Problem] = {}
    left_out: dict[str, Problem] = {}
    position, end = first, first + count * (LOOK_AHEAD if skipping else 1)
    while position < end and len(chosen) < count:
        problem = task.train_problem(seed, position)
        position += 1
        known = skipping and problem.id in history and is_known(history[problem.id], recipe)
        if known and not _is_explored(recipe, step, problem):
            left_out[problem.id] = problem
        else:
            chosen[problem.id] = problem
    for problem in sorted(left_out.values(), key=lambda problem: history[problem.id].step)[: count - len(chosen)]:
        chosen[problem.id] = left_out.pop(problem.id)
    return Choice(problems=tuple(chosen.values()), skipped=len(left_out), next_problem=position)


def is_known(seen: Seen, recipe: Recipe) -> bool:
    """Whether a problem was all right or hopeless, by enough answers to say so.

    Hopeless takes G rollouts at least: with fewer, an adaptive budget only ran out on it.
    """
    rollout = recipe.rollout
    most = rollout.adaptive.max_rollouts if rollout.adaptive.enabled else rollout.num_generations
    if seen.positives == 0:
        return seen.rollouts >= max(EVIDENCE, min(rollout.num_generations, most))
    return seen.positives == seen.rollouts >= EVIDENCE


def remember(history: History, groups: Sequence[Group], recipe: Recipe, step: int) -> dict[str, Seen]:
    """`history` after `step`; `history` itself stays as it is. Empty where the recipe skips nothing.

    A problem with an answer that could not be graded is forgotten: that answer is neither right nor wrong.
    """
    if not recipe.rollout.skip_known:
        return {}
    after = dict(history)
    for group in groups:
        after.pop(group.prompt.problem.id, None)
        if all(rollout.reward.outcome.is_graded for rollout in group.rollouts):
            positives = len(group.positives(recipe.objective.reward_threshold))
            after[group.prompt.problem.id] = Seen(len(group.rollouts), positives, step)
    return after


def _is_explored(recipe: Recipe, step: int, problem: Problem) -> bool:
    draw = stream_seed("explore", recipe.train.seed, step, problem.id) / 2**63
    return draw < recipe.rollout.explore_ratio
