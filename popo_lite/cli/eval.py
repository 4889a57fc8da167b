"""`popo-lite eval`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

WEIGHTS = ("base", "adapter", "siamese")


@click.command("eval", short_help="Measure base, adapter and siamese of a run.")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option(
    "weights",
    "--weights",
    type=click.Choice(WEIGHTS),
    multiple=True,
    help="What to measure; may be repeated. Default: all three.",
)
@click.option("--problems", type=click.IntRange(min=1), help="Held-out problems; default as in the run's recipe.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Sampled answers per problem; pass@k is shown for powers of two up to this.",
)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Default as in the run's recipe.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the sampled answers.")
@click.option("--engine", type=click.Choice(["auto", "hf", "vllm", "server"]), help="Default as in the run's recipe.")
@click.option("as_json", "--json", is_flag=True, help="Print the results as JSON.")
def eval_(
    run: Path,
    weights: tuple[str, ...],
    problems: int | None,
    samples: int,
    temperature: float | None,
    seed: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Measure RUN, a folder that `popo-lite train` left, on held-out problems.

    Compares base, trained adapter and siamese on the same random draws.
    """
    from popo_lite.errors import UserInputError
    from popo_lite.run_folder import RunFolder

    folder = RunFolder(run)
    recipe = folder.recipe()
    if engine is not None:
        recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"engine": engine})})
    wanted = weights or WEIGHTS
    adapters = {name: folder.trained_adapter("siamese" if name == "siamese" else "policy") for name in wanted}
    count = problems or recipe.eval.problems
    if count < 1:
        raise UserInputError(
            "this run's recipe has no held-out problems",
            where="eval.problems = 0",
            next_step=f"popo-lite eval {run} --problems 200",
        )

    import torch

    from popo_lite.console.output import progress
    from popo_lite.console.reports import eval_report
    from popo_lite.evaluation import evaluate, fitting
    from popo_lite.grading import Grader
    from popo_lite.policy.adapters import empty_adapter, load_adapter_weights
    from popo_lite.policy.trained import load_trained_policy
    from popo_lite.samplers import SamplingParams, open_sampler
    from popo_lite.tasks import open_tasks
    from popo_lite.tasks.rendering import Renderer
    from popo_lite.training.sampler_guard import PROBE_PROMPTS, SamplerGuard

    if recipe.train.cpu_threads:
        torch.set_num_threads(recipe.train.cpu_threads)
    task = open_tasks(recipe)[1]
    policy = load_trained_policy(recipe, adapters[wanted[0]])
    renderer = Renderer.of(recipe, policy.tokenizer)
    held_out = fitting(task.held_out(count), renderer, recipe)
    results = []
    sampler = open_sampler(recipe, policy, text=renderer.text, notify=partial(click.echo, err=True))
    with Grader(recipe.reward) as grader, sampler:
        grader.check()
        tried = [renderer.render(problem) for problem in held_out[:PROBE_PROMPTS]]
        SamplerGuard(recipe, policy, sampler).prove(tried, lambda _: None)
        for name in wanted:
            load_adapter_weights(policy.model, adapters[name])
            if name == "base":
                # Emptied and not only switched off: an engine with weights of its own is given the adapter too.
                empty_adapter(policy.model)
            policy.version += 1
            sampler.sync(policy.version)
            with (
                policy.model.disable_adapter() if name == "base" else nullcontext(),
                nullcontext(lambda _: None)
                if as_json
                else progress(f"{name}: answers", len(held_out) * samples) as bar,
            ):
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
                        params=SamplingParams(
                            temperature=temperature or recipe.eval.temperature,
                            max_completion_tokens=recipe.rollout.max_completion_tokens,
                        ),
                        threshold=recipe.objective.reward_threshold,
                        max_ungraded_share=recipe.reward.max_ungraded_share,
                        seed=seed,
                        progress=bar,
                    )
                )
    if as_json:
        click.echo(json.dumps({"run": str(run), "results": [asdict(result) for result in results]}))
    else:
        eval_report(results)
