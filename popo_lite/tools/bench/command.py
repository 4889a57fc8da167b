"""Define `popo-lite bench`."""

from __future__ import annotations

import json
import shlex

import click

from popo_lite.errors import UserInputError
from popo_lite.tools.completion import complete_recipe
from popo_lite.tools.plan.command import parse_size
from popo_lite.trust import MODEL_CODE, refuse_untrusted, trust_option

POSITIVE = click.IntRange(min=1)
SIZES = {  # option -> the recipe's key that it overrides
    "prompts": "data.prompts_per_step",
    "prompt_tokens": "rollout.max_prompt_length",
    "completion_tokens": "rollout.max_completion_length",
}


@click.command()
@click.argument("recipe", metavar="RECIPE", shell_complete=complete_recipe)
@click.option("--steps", type=POSITIVE, default=3, show_default=True, help="Measured steps, after one more.")
@click.option("--prompts", type=POSITIVE, help="Same as --set data.prompts_per_step=N.")
@click.option("--prompt-tokens", type=POSITIVE, help="Same as --set rollout.max_prompt_length=N.")
@click.option("--completion-tokens", type=POSITIVE, help="Same as --set rollout.max_completion_length=N.")
@click.option("--positives", type=POSITIVE, help="Rewarded rollouts of a step; default half of them.")
@click.option("--memory-cap", metavar="SIZE", help="Use a larger GPU as if it had this, such as 24GiB; not with vLLM.")
@click.option("--longest", is_flag=True, help="Find the longest sequence that can be trained on instead.")
@click.option(
    "overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; no value unsets it."
)
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print the result as JSON and nothing else.")
def bench(
    recipe: str, steps: int, positives: int | None, memory_cap: str | None, longest: bool, overrides: tuple[str, ...],
    trust: bool, as_json: bool, **sizes: int | None,
) -> None:  # fmt: skip
    """Measure a step of RECIPE on this machine before anything is downloaded.

    Builds the architecture with random weights, samples answers of full length, calls half of them right, and trains
    on those. Prints seconds and tokens per second by stage, peak memory beside the plan's, and what the whole run
    would take.

    Exit code 0: measured; 1: memory ran out (the result says in which stage), or an engine failed or is missing; 2:
    error in the recipe or the command line.

    \b
    Example:
      popo-lite bench tiny_cpu --steps 1
    """
    from popo_lite.recipe_file import load_recipe

    # Before --set, so that a --set which an error advises takes effect.
    overrides = (*(f"{SIZES[name]}={size}" for name, size in sizes.items() if size is not None), *overrides)
    settings = load_recipe(recipe, overrides)
    refuse_untrusted(settings, recipe, trust, overrides=overrides, only=MODEL_CODE)

    import torch

    from popo_lite.policy.device import pick_device
    from popo_lite.policy.load import import_unsloth
    from popo_lite.tools.bench import measure, report
    from popo_lite.tools.console.output import notify

    if settings.model.backend == "unsloth":
        import_unsloth()
    if settings.train.cpu_threads:
        torch.set_num_threads(settings.train.cpu_threads)

    try:
        cap = None if memory_cap is None else parse_size(memory_cap, "--memory-cap")
        if (cap or longest) and pick_device(settings.train.device).type == "cpu":
            plan = ["popo-lite", "plan", recipe, *(("--vram", memory_cap) if memory_cap else ())]
            plan += [word for override in overrides for word in ("--set", override)]
            what = "this runs on a CPU, whose memory cannot be capped and does not run out: the machine swaps"
            option = "--memory-cap" if cap else "--longest"
            raise UserInputError(what, where=option, next_step=f"{shlex.join(plan)} predicts it")
        if longest:
            result = measure.bench_longest(settings, memory_cap_bytes=cap, notify=notify)
            failed, show = result["longest_tokens"] is None, report.longest_report
        else:
            result = measure.bench(settings, steps=steps, positives=positives, memory_cap_bytes=cap, notify=notify)
            failed, show = result["out_of_memory"] is not None, report.bench_report
    except UserInputError as error:
        raise error.within(recipe) from error
    if as_json:
        click.echo(json.dumps(result))
    else:
        show(result)
    if failed:
        raise SystemExit(1)
