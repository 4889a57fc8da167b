"""`popo-lite eval`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from popo_lite.errors import EngineError, UserInputError

if TYPE_CHECKING:
    from popo_lite.recipe import Recipe
    from popo_lite.tasks.rendering import Renderer
    from popo_lite.tools.benchmarks.answer_file import EvaluationFolder
    from popo_lite.tools.benchmarks.choices import Choices
    from popo_lite.tools.benchmarks.run import Chunk, PreparedBenchmark
    from popo_lite.tools.benchmarks.subject import Subject

WEIGHTS = ("base", "adapter", "siamese")
ONLY_HELD_OUT = ("problems",)
ONLY_BENCHMARKS = (
    "data", "preset", "k", "top_p", "max_tokens", "max_prompt_length", "skip_overlong", "seeds", "system_prompt",
    "chat_template", "output",
)  # fmt: skip


@click.command("eval", short_help="Measure a run or any model, on held-out problems or benchmarks.")
@click.argument("model_or_run")
@click.option(
    "weights",
    "--weights",
    type=click.Choice(WEIGHTS),
    multiple=True,
    help="What of a run to measure; may be repeated. Default: all three.",
)
@click.option("--problems", type=click.IntRange(min=1), help="Held-out problems; default as in the run's recipe.")
@click.option("--samples", type=click.IntRange(min=1), help="Sampled answers per problem.  [default: 8]")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Default as in the run's recipe.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the sampled answers.  [default: 0]")
@click.option("--engine", type=click.Choice(["auto", "hf", "vllm", "server"]), help="Default as in the run's recipe.")
@click.option("as_json", "--json", is_flag=True, help="Print the results as JSON.")
@click.option("--benchmarks", metavar="paper|NAME,...", help="Measure on these instead of held-out problems.")
@click.option("--data", multiple=True, metavar="NAME=FILE", help="Read a benchmark from a file; may be repeated.")
@click.option(
    "--preset",
    type=click.Choice(["paper"]),
    help="Published settings: 128 samples, k = 8, temperature 0.7, top-p 0.95, 4,096 tokens, the \\boxed{} prompt.",
)
@click.option("--k", type=click.IntRange(min=1), help="k of pass@k and of the vote.  [default: 8, at most the samples]")
@click.option("--top-p", type=click.FloatRange(min=0, min_open=True, max=1), help="Nucleus sampling.  [default: 1]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer; default as in the recipe.")
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), help="Longest prompt.  [default: 2048]")
@click.option("--skip-overlong", is_flag=True, help="Leave longer prompts out, and count them; else they are an error.")
@click.option("--seeds", metavar="0,1,2", help="Evaluate under each of these seeds; reported pooled and one by one.")
@click.option("--system-prompt", help='Default as in the recipe; "" for none.')
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Jinja file, for a model without one.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder for answers and results, to go on in as well.")
def eval_(model_or_run: str, *, benchmarks: str | None, weights: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure MODEL_OR_RUN.

    A run, the folder that `popo-lite train` left, is measured on its held-out problems: base, trained adapter and
    siamese on the same random draws. With --benchmarks it, an exported model or any model of the Hub is measured on
    published benchmarks, whose answers are kept: a killed evaluation goes on where it was.
    """
    misplaced = [
        name
        for name in (ONLY_BENCHMARKS if benchmarks is None else ONLY_HELD_OUT)
        if given[name] not in (None, (), False)
    ]
    if misplaced:
        raise UserInputError(
            "does not go with --benchmarks" if benchmarks else "is for benchmarks, and none is named",
            where=f"--{misplaced[0].replace('_', '-')}",
            next_step="leave it out" if benchmarks else "name them, for instance --benchmarks paper, or leave it out",
        )
    with _advice_for_eval():
        if benchmarks is None:
            _held_out(Path(model_or_run), weights, as_json, **{name: given[name] for name in _HELD_OUT_OPTIONS})
        else:
            from popo_lite.tools.benchmarks.choices import choices_of

            _benchmarks(model_or_run, weights, as_json, choices_of(benchmarks, given))


@contextmanager
def _advice_for_eval() -> Iterator[None]:
    """This command takes no --set: where an engine's error names it, --engine is the way out here."""
    try:
        yield
    except EngineError as error:
        if "--set rollout" not in (error.next_step or ""):
            raise
        advice = "--engine hf samples from the loaded model itself, slower"
        raise EngineError(error.what, where=error.where, next_step=advice) from error


_HELD_OUT_OPTIONS = ("problems", "samples", "temperature", "seed", "engine")


def _held_out(run: Path, weights: tuple[str, ...], as_json: bool, **options: Any) -> None:
    from popo_lite.tools.benchmarks.held_out import evaluate_run
    from popo_lite.tools.console.reports import eval_report

    results = evaluate_run(
        run,
        weights=weights,
        **{name: value for name, value in options.items() if value is not None},
        bar=partial(_bar, as_json=as_json),
    )
    if as_json:
        click.echo(json.dumps({"run": str(run), "results": [asdict(result) for result in results]}))
    else:
        eval_report(results)


def _benchmarks(model_or_run: str, weights: tuple[str, ...], as_json: bool, choices: Choices) -> None:
    from popo_lite.tools.benchmarks.answer_file import EvaluationFolder
    from popo_lite.tools.benchmarks.choices import settings_of
    from popo_lite.tools.benchmarks.held_out import set_threads
    from popo_lite.tools.benchmarks.run import chunks_of, summarise
    from popo_lite.tools.benchmarks.subject import open_model, open_run

    is_run = (Path(model_or_run).expanduser() / "recipe.toml").is_file()
    path = Path(model_or_run).expanduser()
    subject = open_run(path, weights) if is_run else open_model(model_or_run, weights)
    recipe = choices.applied_to(subject.recipe)
    set_threads(recipe)
    prepared, renderer = _prepared(subject, recipe, choices)
    settings = settings_of(subject, recipe, prepared, choices)
    folder = EvaluationFolder(
        choices.output or (path / "benchmarks" if is_run else Path("benchmarks") / Path(model_or_run).name)
    )
    chunks = list(
        chunks_of(
            prepared,
            weights=list(subject.adapters),
            seeds=choices.seeds,
            samples=choices.samples,
            batch_size=recipe.rollout.max_num_seqs,
        )
    )
    with folder.locked():
        folder.open(settings)
        done = folder.keep_whole(chunks)
        if done:
            click.echo(f"{done} of {len(chunks)} parts are in {folder.path} already", err=True)
        if done < len(chunks):
            _sample(subject, _with_room(recipe, prepared), prepared, renderer, chunks[done:], folder, choices, as_json)
        results = summarise(folder.all_answers(chunks), choices.k)
        content = folder.close(results, k=choices.k, benchmarks={one.name: one.contents for one in prepared})
    if as_json:
        click.echo(json.dumps({"model": model_or_run, "output": str(folder.path), **content}))
        return
    from popo_lite.tools.benchmarks.datasets import BENCHMARKS
    from popo_lite.tools.benchmarks.report import benchmark_report

    benchmark_report(
        results,
        k=choices.k,
        titles={name: benchmark.title for name, benchmark in BENCHMARKS.items()},
        published={name: BENCHMARKS[name].problems for name in choices.benchmarks},
        output=str(folder.path),
    )


def _prepared(subject: Subject, recipe: Recipe, choices: Choices) -> tuple[list[PreparedBenchmark], Renderer]:
    """Every benchmark, read, checked and rendered, before any model is loaded."""
    from popo_lite.grading import Grader
    from popo_lite.policy.load import load_tokenizer
    from popo_lite.tasks.rendering import Renderer
    from popo_lite.tools.benchmarks.datasets import open_benchmark
    from popo_lite.tools.benchmarks.run import prepare, reference_faults

    renderer = Renderer.of(recipe, load_tokenizer(recipe.model))
    with Grader(recipe.reward) as grader:
        problems = {
            name: open_benchmark(
                name, choices.files.get(name), reference_faults=partial(reference_faults, grader=grader)
            )
            for name in choices.benchmarks
        }
    prepared = [
        prepare(
            name,
            found,
            renderer,
            max_completion_length=recipe.rollout.max_completion_length,
            context_tokens=subject.context_tokens,
            skip_overlong=choices.skip_overlong,
        )
        for name, found in problems.items()
    ]
    for one in prepared:
        for notice in _notices(one, recipe.rollout.max_completion_length, subject.context_tokens):
            click.echo(f"{one.name}: {notice}", err=True)
    return prepared, renderer


def _notices(one: PreparedBenchmark, wanted_tokens: int, context_tokens: int) -> Iterator[str]:
    """What is unusual about a benchmark."""
    rows = len(one.prompts) + one.skipped
    if rows != one.contents["published"]:
        yield f"has {one.contents['published']:,} problems where it was published, and {rows:,} here"
    if one.repeats:
        pairs = ", ".join(f"{later} is {earlier}" for later, earlier in islice(one.repeats.items(), 5))
        yield f"{len(one.repeats)} of {rows} questions stand there before, and count each time: {pairs}"
    if one.skipped:
        yield f"{one.skipped} of {rows} prompts are left out"
    if one.max_completion_length < wanted_tokens:
        yield (
            f"answers end at {one.max_completion_length:,} tokens instead of {wanted_tokens:,}, as the longest prompt "
            f"takes {one.longest_prompt_tokens:,} of the context of {context_tokens:,}"
        )


def _sample(
    subject: Subject,
    recipe: Recipe,
    prepared: list[PreparedBenchmark],
    renderer: Renderer,
    chunks: list[Chunk],
    folder: EvaluationFolder,
    choices: Choices,
    as_json: bool,
) -> None:
    """Sample, grade and write `chunks`, one after another."""
    from popo_lite.grading import Grader
    from popo_lite.tools.benchmarks.held_out import holding, open_quiet_sampler, prove
    from popo_lite.tools.benchmarks.run import refuse_ungradable, sample_chunk

    policy = subject.load(recipe)
    folder.note_environment(policy.device)
    lines = folder.answers()
    with Grader(recipe.reward) as grader, open_quiet_sampler(recipe, policy, renderer) as sampler:
        grader.check()
        prove(recipe, policy, sampler, prepared[0].prompts)
        for name, adapter in subject.adapters.items():
            todo = [chunk for chunk in chunks if chunk.weights == name]
            if not todo:
                continue
            total = choices.samples * sum(len(chunk.prompts) for chunk in todo)
            with holding(adapter, policy, sampler), _bar(f"{name}: answers", total, as_json) as bar:
                for chunk in todo:
                    new = sample_chunk(
                        chunk,
                        sampler=sampler,
                        grader=grader,
                        policy_version=policy.version,
                        samples=choices.samples,
                        temperature=recipe.eval.temperature,
                        top_p=choices.top_p,
                        progress=bar,
                    )
                    lines += new
                    # Before they are kept, so that they are graded again when the command is repeated.
                    refuse_ungradable(
                        [line for line in lines if (line.weights, line.benchmark) == (name, chunk.benchmark.name)],
                        planned=len(chunk.benchmark.prompts) * len(choices.seeds),
                        limit=recipe.reward.max_ungraded_ratio,
                    )
                    folder.add(new)


def _with_room(recipe: Recipe, prepared: list[PreparedBenchmark]) -> Recipe:
    """`recipe` with room for the longest prompt and, together with it, for the longest prompt with its answer."""
    prompt = max(one.longest_prompt_tokens for one in prepared)
    both = max(one.longest_prompt_tokens + one.max_completion_length for one in prepared)
    return recipe.with_values({"rollout.max_prompt_length": prompt, "rollout.max_completion_length": both - prompt})


def _bar(description: str, total: int, as_json: bool) -> Any:
    from popo_lite.tools.console.output import progress

    return nullcontext(lambda _: None) if as_json else progress(description, total)
