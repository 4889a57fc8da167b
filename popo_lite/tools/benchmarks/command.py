"""`popo-lite eval`."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from popo_lite.errors import EngineError, UserInputError
from popo_lite.recipe import EnvironmentRecipe, MathFunction, Recipe
from popo_lite.tools.checkpoint_option import checkpoint_option
from popo_lite.tools.completion import complete_run
from popo_lite.trust import EVALUATION_CODE, refuse_untrusted, trust_option

PAPER_PRESET = {"samples": 128, "temperature": 0.7, "top_p": 0.95, "max_tokens": 4096, "system_prompt":
                r"Please reason step by step, and put your final answer within \boxed{}."}  # fmt: skip
"""How the published evaluation sampled. Its k is 8, the default."""
HELD_OUT = ("task", "weights", "problems", "samples", "temperature", "seed", "engine", "checkpoint",
            "trust")  # fmt: skip
"""Options for held-out problems."""
WEIGHTS = click.Choice(["base", "adapter", "siamese"])
JINJA_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
POSITIVE = click.IntRange(min=1)


def _use_preset(ctx: click.Context, _parameter: click.Parameter, preset: str | None) -> None:
    if preset:
        ctx.default_map = PAPER_PRESET


@click.command("eval",
               context_settings={"show_default": True})  # fmt: skip
@click.argument("models", metavar="MODEL_OR_RUN...", nargs=-1, required=True, shell_complete=complete_run)
@click.option("--task", metavar="RUN_OR_RECIPE", help="Whose held-out problems, prompts, reward and sampling are used; "
              "default: the first run, or the run of an exported model.")  # fmt: skip
@click.option("--weights", type=WEIGHTS, multiple=True, help="Weights of runs; may be repeated. Default: all three.")
@checkpoint_option
@click.option("--problems", type=POSITIVE, help="Held-out problems; default as in the run's recipe.")
@click.option("--samples", type=POSITIVE, default=8, help="Sampled answers per problem.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Default as in the run's recipe.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the sampled answers.")
@click.option("--engine", type=click.Choice(["auto", "hf", "vllm", "server"]), help="Default as in the run's recipe.")
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print the results as JSON.")
@click.option("--benchmarks", metavar="paper|NAME,...", help="Measure on these instead of held-out problems.")
@click.option("--data", multiple=True, metavar="NAME=FILE", help="Read a benchmark from a file; may be repeated.")
@click.option("--preset", type=click.Choice(["paper"]), is_eager=True, expose_value=False, callback=_use_preset,
              help="Published settings: 128 samples, k = 8, temperature 0.7, top-p 0.95, 4,096 tokens, the \\boxed{} "
              "prompt.")  # fmt: skip
@click.option("--k", type=POSITIVE, help="k of pass@k and of the majority vote.  [default: 8, at most the samples]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Nucleus sampling.")
@click.option("--max-tokens", type=POSITIVE, help="Longest answer; default as in the recipe.")
@click.option("max_prompt_length", "--max-prompt-tokens", type=POSITIVE, default=2048, help="Longest prompt.")
@click.option("--skip-overlong", is_flag=True, help="Skip and count longer prompts; without it they are an error.")
@click.option("--seeds", metavar="0-2,5", help="Evaluate under each of these seeds; reported pooled and one by one.")
@click.option("--system-prompt", help='Default as in the recipe; "" for none.')
@click.option("--chat-template", type=JINJA_FILE, help="Jinja file, for a model without one.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for answers and results, also to resume in.")
@click.pass_context
def eval_(
    ctx: click.Context, /, models: tuple[str, ...], benchmarks: str | None, as_json: bool, **options: Any
) -> None:
    """Measure runs and models on a run's held-out problems, or one of them on benchmarks.

    Each MODEL_OR_RUN is a run, the folder that `popo-lite train` wrote (measured as base, trained adapter and siamese),
    a model's folder, such as an export, a GGUF file, or a Hub id. All answer the same problems on the same random
    draws. With --benchmarks one of them is measured on published benchmarks; answers are kept, so the same command
    resumes a killed evaluation.

    \b
    Example:
      popo-lite eval runs/tiny_cpu-seed0 --problems 8
    """
    given = [p for p in ctx.command.params if ctx.get_parameter_source(p.name or "") is ParameterSource.COMMANDLINE]
    options_given = {param.name: param.opts[0] for param in given}
    for name, rival in {"problems": "benchmarks", "task": "benchmarks", "seed": "seeds"}.items():
        if name in options_given and ctx.params[rival] is not None:
            raise UserInputError(f"does not go with --{rival}", where=f"--{name}", next_step="leave one of the two out")
    wrong = [option for name, option in options_given.items() if name not in (*HELD_OUT, "models", "as_json")]
    if benchmarks is None and wrong:
        next_step = "add for instance --benchmarks paper, or leave it out"
        raise UserInputError("is for benchmarks, and none is named", where=wrong[0], next_step=next_step)
    if benchmarks is not None and models[1:]:
        commands = [shlex.join(["popo-lite", "eval", model, "--benchmarks", benchmarks]) for model in models]
        what = "benchmarks are measured on one model at a time"
        raise UserInputError(what, where=models[1], next_step=" && ".join(commands))
    try:
        if benchmarks is None:
            from popo_lite.tools.benchmarks.subject import evaluate_models, no_bar
            from popo_lite.tools.console.output import eval_report, progress

            used = {name: options[name] for name in HELD_OUT}
            results = evaluate_models(models, **used, bar=no_bar if as_json else progress)
            if as_json:
                click.echo(json.dumps({"models": models, "results": [asdict(result) for result in results]}))
            else:
                eval_report(results)
        else:
            _benchmarks(models[0], benchmarks, as_json=as_json, **options)
    except EngineError as error:
        if "--set rollout" in (error.next_step or ""):  # this command has no --set
            error.next_step = "--engine hf samples from the loaded model itself, slower"
        raise


def _benchmarks(model_or_run: str, benchmarks: str, *, weights: tuple[str, ...], checkpoint: int | str | None,
                as_json: bool, **options: Any) -> None:  # fmt: skip
    from popo_lite.run_folder import write_json
    from popo_lite.tools.benchmarks import run, scores, subject
    from popo_lite.tools.benchmarks.datasets import benchmark_names
    from popo_lite.tools.console.output import progress
    from popo_lite.tools.sweep.folder import seeds_in

    files: dict[str, Path | None] = dict.fromkeys(benchmark_names(benchmarks))  # None: from the Hub
    for item in options["data"]:
        name, _, file = item.partition("=")
        if not file or files.get(name, "") is not None:
            what = "names a benchmark twice" if files.get(name) else "is not NAME=FILE of a benchmark in --benchmarks"
            first = next(iter(files))
            raise UserInputError(what, where=f"--data {item}", next_step=f"for instance --data {first}={first}.jsonl")
        files[name] = Path(file).expanduser()
    samples, k = options["samples"], pick_k(options["k"], options["samples"])
    written = options["seeds"] or str(options["seed"])
    if not (seeds := seeds_in(written)):
        raise UserInputError("needs different whole numbers", where=f"--seeds {written}", next_step="--seeds 0,1,2")
    path = Path(model_or_run).expanduser()
    is_run = (path / "recipe.toml").is_file()
    opened = subject.open_run(path, weights, checkpoint) if is_run else None
    model = opened or subject.open_model(model_or_run, weights, checkpoint=checkpoint)
    default = path / "benchmarks" if is_run else Path("benchmarks") / Path(model_or_run).name
    if model.checkpoint is not None:
        default = default.with_name(f"{default.name}-step-{model.checkpoint}")
    folder = run.EvaluationFolder(options["output"] or default)
    model = replace(model, recipe=with_options(model.recipe, {**options, "date": folder.date()}))
    refuse_untrusted(model.recipe, model_or_run, options["trust"], only=EVALUATION_CODE)
    prepared = run.prepare_all(model.recipe, files, skip_overlong=options["skip_overlong"])
    settings = run.settings_of(model, prepared, {"seeds": seeds, "samples": samples, "top_p": options["top_p"]})
    with folder.locked():
        folder.start(settings)
        answers = run.answer_all(model, prepared, folder, settings, subject.no_bar if as_json else progress)
        results = scores.summarise(answers, k)
        contents = {benchmark.name: benchmark.contents for benchmark in prepared}
        content = {"k": k, "benchmarks": contents, "settings": settings, "results": results}
        write_json(folder.path / "results.json", content)
    if as_json:
        click.echo(json.dumps({"model": model_or_run, "output": str(folder.path), **content}))
    else:
        scores.benchmark_report(results, k=k, output=str(folder.path))


def with_options(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    """Return `recipe` with the command's options applied; None keeps the recipe's value, "" removes it."""
    values = {
        "rollout.engine": options["engine"],
        "rollout.max_prompt_length": options["max_prompt_length"],
        "rollout.max_completion_length": options["max_tokens"],
        "eval.temperature": options["temperature"],
        "data.system_prompt": options["system_prompt"],
        "data.date": recipe.data.date or options.get("date"),
        "rollout.environment": EnvironmentRecipe(),
        "reward.functions": (MathFunction(),),
        "reward.positive_if": "total",
    }
    if file := options["chat_template"]:
        try:
            values["data.chat_template"] = file.read_text(encoding="utf-8") or None
        except (OSError, UnicodeDecodeError) as error:
            what, where = f"cannot be read: {error}", f"--chat-template {file}"
            raise UserInputError(what, where=where, next_step="save the file as UTF-8") from error
    return recipe.with_values({key: value or None for key, value in values.items() if value is not None})


def pick_k(k: int | None, samples: int) -> int:
    """Return k of pass@k and of the majority vote."""
    if k is not None and k > samples:
        what = f"pass@{k} cannot be estimated from {samples} samples"
        raise UserInputError(what, where="--k", next_step=f"--samples {k}")
    return k or min(8, samples)
