"""Accuracy of a run's weights on its own held-out problems."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch

from popo_lite.errors import UserInputError
from popo_lite.evaluation import evaluate, fitting
from popo_lite.grading import Grader
from popo_lite.policy.adapters import empty_adapter, load_adapter_weights
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers import Sampler, SamplingParams, open_sampler
from popo_lite.samplers.probe import PROBE_PROMPTS, SamplerGuard
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.benchmarks.subject import open_run
from popo_lite.types import EvalResult, Prompt

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(description, total) -> a context that yields a function for each amount done."""


def no_bar(_description: str, _total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show nothing."""
    return nullcontext(lambda _: None)


def evaluate_run(
    run: Path,
    *,
    weights: Sequence[str] = (),
    problems: int | None = None,
    samples: int = 8,
    temperature: float | None = None,
    seed: int = 0,
    engine: str | None = None,
    bar: Bar = no_bar,
) -> list[EvalResult]:
    """Return a result for each of the run's `weights` ("base", "adapter", "siamese"; default: all), on the same draws.

    `problems`, `temperature` and `engine` default to those of the run's recipe; `samples` is per problem.
    """
    subject = open_run(run, weights)
    recipe = subject.recipe
    if engine is not None:
        recipe = recipe.with_values({"rollout.engine": engine})
    count = problems or recipe.eval.problems
    if count < 1:
        raise UserInputError(
            "this run's recipe has no held-out problems",
            where="eval.problems = 0",
            next_step=f"popo-lite eval {run} --problems 200",
        )
    set_threads(recipe)
    task = open_tasks(recipe)[1]
    policy = subject.load(recipe)
    renderer = Renderer.of(recipe, policy.tokenizer)
    held_out = fitting(task.held_out(count), renderer, recipe)
    params = SamplingParams(
        temperature=temperature or recipe.eval.temperature, max_completion_length=recipe.rollout.max_completion_length
    )
    results = []
    with Grader(recipe.reward) as grader, open_quiet_sampler(recipe, policy, renderer) as sampler:
        grader.check()
        prove(recipe, policy, sampler, map(renderer.render, held_out))
        for name, adapter in subject.adapters.items():
            with holding(adapter, policy, sampler), bar(f"{name}: answers", len(held_out) * samples) as progress:
                results.append(
                    evaluate(
                        weights=name,
                        policy=policy,
                        sampler=sampler,
                        renderer=renderer,
                        grader=grader,
                        task=task,
                        problems=held_out,
                        samples_per_problem=samples,
                        params=params,
                        threshold=recipe.objective.reward_threshold,
                        max_ungraded_ratio=recipe.reward.max_ungraded_ratio,
                        seed=seed,
                        progress=progress,
                    )
                )
    return results


def set_threads(recipe: Recipe) -> None:
    """Use the recipe's number of CPU threads."""
    if recipe.train.cpu_threads:
        torch.set_num_threads(recipe.train.cpu_threads)


def open_quiet_sampler(recipe: Recipe, policy: Policy, renderer: Renderer) -> Sampler:
    """Open the recipe's sampler; notices go to standard error."""
    return open_sampler(recipe, policy, text=renderer.text, notify=lambda text: print(text, file=sys.stderr))  # noqa: T201


def prove(recipe: Recipe, policy: Policy, sampler: Sampler, prompts: Iterable[Prompt]) -> None:
    """Check that the sampler samples from the adapter it is given. Raises EngineError if not."""
    SamplerGuard(recipe, policy, sampler).prove(list(islice(prompts, PROBE_PROMPTS)), lambda _: None)


@contextmanager
def holding(adapter: Path | None, policy: Policy, sampler: Sampler) -> Iterator[None]:
    """Let policy and sampler hold the adapter in a folder, or none, within the block."""
    if adapter is None:
        # Emptied, not only switched off: an engine with weights of its own is given the adapter, too.
        empty_adapter(policy.model)
    else:
        load_adapter_weights(policy.model, adapter)
    policy.version += 1
    sampler.sync(policy.version)
    with policy.model.disable_adapter() if adapter is None else nullcontext():
        yield
