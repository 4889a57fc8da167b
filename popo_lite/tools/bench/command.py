"""`popo-lite bench`."""

from __future__ import annotations

import json
import shlex

import click

from popo_lite.errors import UserInputError
from popo_lite.tools.plan.command import parse_size

OUT_OF_MEMORY = 1
"""Exit code if memory does not suffice; also that of an engine that fails."""


@click.command(short_help="Measure a recipe's step with random weights.")
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Measured steps, after one more."
)
@click.option("--prompts", type=click.IntRange(min=1), help="Same as --set data.prompts_per_step=N.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Same as --set rollout.max_prompt_length=N.")
@click.option("--completion-tokens", type=click.IntRange(min=1), help="Same as --set rollout.max_completion_length=N.")
@click.option("--positives", type=click.IntRange(min=1), help="Rewarded rollouts of a step; default half of them.")
@click.option("--memory-cap", metavar="SIZE", help="Use a larger GPU as if it had this, such as 24GiB; not with vLLM.")
@click.option("--longest", is_flag=True, help="Find the longest sequence that can be trained on instead.")
@click.option("overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated.")
@click.option("as_json", "--json", is_flag=True, help="Print the result as JSON and nothing else.")
def bench(
    recipe: str, overrides: tuple[str, ...], memory_cap: str | None, longest: bool, as_json: bool, **given: int | None
) -> None:
    """Measure a step of RECIPE on this machine before anything is downloaded.

    Builds the architecture with random weights, samples answers of full length, calls half of them right, and trains
    on those. Prints seconds and tokens per second by stage, peak memory beside the plan's, and what the whole run
    would take.

    Exit code 0: measured; 1: memory ran out (the result says in which stage), or an engine failed or is missing; 2:
    error in the recipe or the command line.
    """
    from popo_lite.recipe_file import load_recipe

    keys = {
        "prompts": "data.prompts_per_step",
        "prompt_tokens": "rollout.max_prompt_length",
        "completion_tokens": "rollout.max_completion_length",
    }
    overrides += tuple(f"{key}={given[name]}" for name, key in keys.items() if given[name] is not None)
    settings = load_recipe(recipe, overrides)

    import torch

    from popo_lite.policy.load import import_unsloth, pick_device
    from popo_lite.tools.bench.measure import bench as measure
    from popo_lite.tools.bench.measure import bench_longest
    from popo_lite.tools.bench.report import bench_report, longest_report

    if settings.model.backend == "unsloth":
        import_unsloth()
    if settings.train.cpu_threads:
        torch.set_num_threads(settings.train.cpu_threads)

    def notify(text: str) -> None:
        click.echo(text, err=True)

    try:
        cap = None if memory_cap is None else parse_size(memory_cap, "--memory-cap")
        if pick_device(settings.train.device).type == "cpu":
            _refuse_on_a_cpu(recipe, overrides, memory_cap, longest)
        if longest:
            result = bench_longest(settings, memory_cap_bytes=cap, notify=notify)
            report, failed = longest_report, result["longest_tokens"] is None
        else:
            steps, positives = given["steps"] or 1, given["positives"]
            result = measure(settings, steps=steps, positives=positives, memory_cap_bytes=cap, notify=notify)
            report, failed = bench_report, result["out_of_memory"] is not None
    except UserInputError as error:
        raise error.within(recipe) from error
    if as_json:
        click.echo(json.dumps(result))
    else:
        report(result)
    if failed:
        raise SystemExit(OUT_OF_MEMORY)


def _refuse_on_a_cpu(recipe: str, overrides: tuple[str, ...], memory_cap: str | None, longest: bool) -> None:
    """Raise UserInputError for what only a GPU can show; the plan predicts it on any machine."""
    if memory_cap is None and not longest:
        return
    plan = ["popo-lite", "plan", recipe, *(("--vram", memory_cap) if memory_cap else ())]
    plan += [word for override in overrides for word in ("--set", override)]
    capped = "only a GPU's memory can be capped, and this runs on a CPU"
    raise UserInputError(
        capped if memory_cap else "a CPU does not run out of memory, it swaps",
        where="--memory-cap" if memory_cap else "--longest",
        next_step=f"{shlex.join(plan)} predicts it",
    )
