"""Accuracy on the problems of a run's own task that were held out from training."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any

from popo_lite.conversation import RolloutWorker
from popo_lite.errors import DataError
from popo_lite.grading import Grader, refuse_ungraded, ungraded_ratio
from popo_lite.recipe import Recipe
from popo_lite.samplers import SamplingParams
from popo_lite.tasks import Task
from popo_lite.tasks.datasets import first
from popo_lite.tasks.rendering import Renderer
from popo_lite.types import Completion, EvalResult, FinishReason, Problem, Reward


def held_out(task: Task, recipe: Recipe, problems: int | None) -> list[Problem]:
    """Return `problems` held-out problems, by default as many as the recipe says. Raises DataError for too many."""
    if problems is None:
        return task.held_out(recipe.eval.problems)
    try:
        return task.held_out(problems)
    except DataError as error:
        next_step = (error.next_step or "").replace("set eval.problems to", "ask for")
        raise DataError(error.what, where=f"--problems {problems}", next_step=next_step) from error


def fitting(problems: Sequence[Problem], renderer: Renderer, recipe: Recipe) -> list[Problem]:
    """Return `problems` without those that `data.overlong_prompts = "skip"` skips."""
    if recipe.data.overlong_prompts == "error":
        return list(problems)
    return [problem for problem in problems if renderer.fits(problem)]


def check_references(problems: Sequence[Problem], grader: Grader, what: str, where: str) -> dict[str, str]:
    """Return problem id -> why nothing can be graded against its answer, for each of `problems` that cannot be graded.

    Raises DataError if that is more than half of them; `what` names them, such as "training rows".
    """
    unreadable = grader.unreadable(problems)
    if 2 * len(unreadable) > len(problems):
        reasons = first([f"problem {problem}: {reason}" for problem, reason in unreadable.items()])
        next_step = f"set {where.partition('.')[0]}.answer_column to the column with the final answer, or "
        next_step += "reward.functions to one that reads these (docs/rewards.md)"
        counted = f"{len(unreadable):,} of {len(problems):,} {what} cannot be graded"
        raise DataError(counted + reasons, where=where, next_step=next_step)
    return unreadable


def not_solved(unreadable: Mapping[str, str], problems: int, what: str) -> str:
    """Return a notice of the `unreadable` of some `problems`."""
    reasons = first([f"problem {problem}: {reason}" for problem, reason in unreadable.items()])
    return f"{len(unreadable)} of {problems:,} {what} cannot be graded and count as not solved{reasons}"


def evaluate(
    weights: str,
    worker: RolloutWorker,
    policy_version: int,
    task: Task,
    problems: Sequence[Problem],
    *,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> EvalResult:
    """Sample `eval.samples_per_problem` answers to every problem at `eval.temperature`, and grade them.

    A collective: each rank answers its share of the problems, and all get the whole result. The random streams depend
    on `seed` and the problem alone, so two policies are compared on the same draws. Problems whose reference answers
    cannot be read count as not solved.
    `weights` names what is measured in the result. Raises GradingError if more than `reward.max_ungraded_ratio` of
    the answers cannot be graded: counted as wrong, a broken grader would look like a bad model.
    """
    start, recipe = time.perf_counter(), worker.recipe
    samples_per_problem = recipe.eval.samples_per_problem
    answered, rewards = _answer(
        worker, policy_version, problems, count=samples_per_problem, stream=("eval", seed), progress=progress
    )
    flat = [completion for completion, _ in answered]
    unreadable = worker.grader.unreadable(problems)
    readable = [problem.id not in unreadable for _, problem in answered]
    limit = recipe.reward.max_ungraded_ratio
    refuse_ungraded([*compress(rewards, readable)], limit, f"evaluation of the {weights}")
    correct = [known and reward.positive for known, reward in zip(readable, rewards, strict=True)]
    right = [sum(correct[i : i + samples_per_problem]) for i in range(0, len(correct), samples_per_problem)]
    ks = [2**power for power in range(samples_per_problem.bit_length())]
    estimates = {k: statistics.fmean(pass_at_k(samples_per_problem, count, k) for count in right) for k in ks}
    return EvalResult(
        weights=weights,
        problems=len(problems),
        unreadable=len(unreadable),
        samples_per_problem=samples_per_problem,
        pass_at_1=estimates[1],
        pass_at_k=estimates,
        task_figures=dict(task.figures([completion.text for completion in flat])),
        truncated_ratio=statistics.fmean(completion.finish_reason is FinishReason.LENGTH for completion in flat),
        ungraded_ratio=ungraded_ratio(rewards),
        completion_tokens_mean=statistics.fmean(len(completion.sampler_logps) for completion in flat),
        rollout_tokens=sum(len(completion.sampler_logps) for completion in flat),
        seconds=time.perf_counter() - start,
        pass_rates=tuple(count / samples_per_problem for count in right),
    )


def draw_samples(
    worker: RolloutWorker,
    policy_version: int,
    problems: Sequence[Problem],
    *,
    stream: tuple[int | str, ...],
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Sample an answer to each problem, and grade it; return views of them: see `Callback.samples`. A collective."""
    answered, rewards = _answer(worker, policy_version, problems, count=1, stream=stream, progress=progress)
    return [
        {
            "question": problem.question,
            "reference": problem.answer,
            "right": answer.text if reward.positive else None,
            "wrong": None if reward.positive else answer.text,
        }
        for (answer, problem), reward in zip(answered, rewards, strict=True)
    ]


def _answer(
    worker: RolloutWorker,
    policy_version: int,
    problems: Sequence[Problem],
    *,
    count: int,
    stream: tuple[int | str, ...],
    progress: Callable[[int], None],
) -> tuple[list[tuple[Completion, Problem]], list[Reward]]:
    """Sample `count` answers to each problem at `eval.temperature`; return them with their problems, and rewards."""
    recipe, mine = worker.recipe, worker.ranks.share(problems)
    longest = recipe.rollout.max_completion_length
    with worker.sampler.drawing():
        answers = worker.sample(
            [worker.renderer.render(problem) for problem in mine],
            count=count,
            params=SamplingParams(temperature=recipe.eval.temperature, max_completion_length=longest),
            policy_version=policy_version,
            stream=stream,
            finished=progress,
        )
    answered = [(answer, problem) for problem, group in zip(mine, answers, strict=True) for answer in group]
    # A reward that changes in the course of training is here that of its end, for all weights alike.
    rewards = iter(worker.grade(answered, step=recipe.train.steps))
    groups = worker.ranks.merge([[(answer, next(rewards)) for answer in group] for group in answers])
    graded = [
        (answer, problem, reward) for problem, group in zip(problems, groups, strict=True) for answer, reward in group
    ]
    return [(answer, problem) for answer, problem, _ in graded], [reward for *_, reward in graded]


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimate without bias the chance that one of k answers is right, from `right` of `samples` (Chen et al. 2021)."""
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples and 0 <= right <= samples, not {right} of {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
