"""Write a run's report: one HTML page that opens offline and runs no script but its own."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from popo_lite.errors import PopoError, UserInputError
from popo_lite.formats import reading
from popo_lite.lock import writing
from popo_lite.metrics import METRICS, StepRecord, Unit
from popo_lite.recipe_file import dump_recipe
from popo_lite.run_folder import write_atomically
from popo_lite.tools.console import words
from popo_lite.tools.console.output import measured, noise
from popo_lite.tools.public import hide_places, known_as, private_places, public_changes, public_recipe
from popo_lite.tools.report.charts import charts, rate_text
from popo_lite.tools.report.files import RunFiles, names_in, number_in, read_run
from popo_lite.tools.report.html import render
from popo_lite.tools.report.samples import chosen_samples

PART = 0.1
"""Part of the steps that is averaged as the start and as the end of a run."""
MOST_LINES = 200  # of the log
GENERATOR = b'<meta name="generator" content="popo-lite">'
"""In every report, near its beginning."""
LEARNED: Sequence[str] = ("pass_rate", "completion_tokens_mean", "truncated_ratio", "unique_answers_mean",
                          "sampled_entropy", "top_shape_ratio")  # fmt: skip


class Report(NamedTuple):
    """What was written: the page, and what it says in one sentence."""

    path: Path
    state: str
    steps: int
    verdict: str
    next_command: str


def write_report(run: str | Path, output: str | Path | None = None) -> Report:
    """Write the report of the folder `run` to `output`, by default RUN/report.html, also while the run trains.

    Raises CheckpointError if there is no run, or its files are damaged; PopoError if the page cannot be written.
    """
    files = read_run(Path(run))
    own = files.folder.path / "report.html"
    path = own if output is None else Path(output)
    html = page(files)
    with writing(path):
        if path != own and path.is_file() and GENERATOR not in path.read_bytes()[:1000]:
            what, next_step = "this file is no report, and is not replaced", "name another file with --output"
            raise UserInputError(what, where=str(path), next_step=next_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, html)
    command = next(_next_commands(files, str(files.folder.path)))[0]
    return Report(path, files.state, len(files.steps), verdict(files), command)


def page(files: RunFiles) -> str:
    """Return the report as HTML."""
    # A figure of a stranger's file may have any type.
    with reading(files.folder.path):
        recipe, name = files.recipe, files.folder.path.resolve().name
        return render(
            Path(__file__).with_name("page.html.jinja"),
            partial(hide_places, places=private_places(recipe, files.folder.path)),
            title=f"{known_as(recipe.model.id)}, trained on {known_as(recipe.data.dataset)}",
            state=files.state, verdict=verdict(files), tiles=_tiles(files),
            charts=[chart for chart in charts(files.steps, evaluations(files), recipe) if chart],
            samples=chosen_samples(files.folder.samples_path), learned=_learned(files.steps),
            shapes=_shapes(files.steps), held_out=_held_out(files), cost=_cost(files), memory=_memory(files),
            doubts=list(_doubts(files)), changes=list(public_changes(files.summary)),
            log=files.log.splitlines()[-MOST_LINES:], recipe=dump_recipe(public_recipe(recipe)).strip(),
            environment=list(_environment(files.environment)), commands=list(_next_commands(files, name)),
            folder=name, written=f"{datetime.now():%Y-%m-%d %H:%M}",
        )  # fmt: skip


# ------------------------------------------------------------------------- the result


def evaluations(files: RunFiles) -> list[Mapping[str, Any]]:
    """Return the evaluations on held-out problems, each with its `step`, oldest first."""
    if files.evaluations:
        return list(files.evaluations)
    ends = (("before", 0), ("after", files.summary.get("steps")))
    found = [{**files.summary[when], "step": step} for when, step in ends if files.summary.get(when)]
    return [line for line in found if number_in(line, "pass_at_1") is not None]


def verdict(files: RunFiles) -> str:
    """Return the result of a run in one sentence or two."""
    done = files.steps[-1]["step"] + 1 if files.steps else 0
    planned = files.recipe.train.steps
    seconds = _seconds(files)[1]
    where = f"{words.duration(seconds)} on {_machine(files.environment)}"
    cost = f"{_counted(done, 'step')} and {where}"
    if files.state != "finished":
        cost = f"{done:,} of {_counted(planned, 'step')}, so far {where}"
    measured_at = evaluations(files)
    if not done and len(measured_at) < 2:
        rate = f"; before training pass@1 is {rate_text(measured_at[0])}" if measured_at else ""
        return f"No step is done yet{rate}."
    if len(measured_at) < 2:
        start, end = (words.share(_mean(part, "pass_rate")) for part in _ends(files.steps))
        rate = f"went from {start} to {end} in" if done > 1 else f"is {end} after"
        held_out = "There is one evaluation" if measured_at else "Nothing was measured"
        so_far = " so far" if measured_at else ""
        return f"The pass rate of training answers {rate} {cost}. {held_out} on held-out problems{so_far}."
    before, now = measured_at[0], measured_at[-1]
    first, last = before["pass_at_1"], now["pass_at_1"]
    problems = max(1, min(int(number_in(each, "problems") or 1) for each in (before, now)))
    margin = noise(first, last, problems)
    change = "rose" if last > first else "fell"
    rates = f"from {rate_text(before)} to {rate_text(now)} on {_counted(problems, 'held-out problem')}"
    rates += "" if files.state == "finished" else f" at step {now['step']:,}"
    if abs(last - first) <= margin:
        chance = f"differences within ±{100 * margin:.1f} points may be chance"
        return f"pass@1 did not change measurably: {rates} ({chance}), in {cost}."
    return f"pass@1 {change} {rates}, in {cost}."


def _tiles(files: RunFiles) -> Iterator[tuple[str, str]]:
    found = evaluations(files)
    if found:
        rates = [words.share(line["pass_at_1"]) for line in found[:1] + found[1:][-1:]]
        yield "held-out pass@1", " → ".join(rates)
    done = files.steps[-1]["step"] + 1 if files.steps else 0
    yield "steps", f"{done:,}" if files.state == "finished" else f"{done:,} of {files.recipe.train.steps:,}"
    yield "time", words.duration(_seconds(files)[1])
    yield "answers sampled", f"{_sum(files.steps, 'rollouts'):,.0f}"
    yield "peak memory", words.memory(_peak(files.steps))


def _held_out(files: RunFiles) -> Any:
    """Return the table of evaluations: columns and rows."""
    found = evaluations(files)
    if not found:
        return None
    shown = found[:1] + found[1:][-1:]
    names = ["before", *(["after"] if files.state == "finished" else [f"step {line['step']:,}" for line in shown[1:]])]
    columns = dict(zip(names, shown, strict=False))
    if files.summary.get("siamese"):
        columns["siamese"] = files.summary["siamese"]
    rows = [[label, *(words.quantity(value, unit) for value in values)]
            for (label, unit), values in measured(columns.values()).items() if label != "pass@1"]  # fmt: skip
    return ["", *columns], [["pass@1 [95 % interval]", *map(rate_text, columns.values())], *rows]


# ------------------------------------------------------------------------- what was learned


def _ends(steps: Sequence[StepRecord]) -> tuple[Sequence[StepRecord], Sequence[StepRecord]]:
    """Return the first and the last tenth of the steps."""
    size = max(1, math.ceil(PART * len(steps)))
    return steps[:size], steps[-size:]


def _mean(steps: Sequence[StepRecord], *keys: str) -> float | None:
    known = [value for record in steps if (value := number_in(record, *keys)) is not None]
    return statistics.fmean(known) if known else None


def _sum(steps: Sequence[StepRecord], name: str) -> float:
    return sum(number_in(record, name) or 0 for record in steps)


def _learned(steps: Sequence[StepRecord]) -> list[tuple[str, str, str, str]]:
    """Return label, meaning, and value at the start and at the end of what answers are like."""
    figures: list[tuple[str, str, Unit, tuple[str, ...]]] = [
        (METRICS[name].label, METRICS[name].meaning, METRICS[name].unit, (name,)) for name in LEARNED
    ]
    for metric in ("rewards", "task_figures"):
        for name in names_in(steps, metric)[:20]:
            label = f"reward: {name}" if metric == "rewards" else name.removesuffix("_ratio").replace("_", " ")
            figures.append((label, METRICS[metric].meaning, "ratio", (metric, name)))
    start, end = _ends(steps)
    rows = [(label, meaning, unit, _mean(start, *keys), _mean(end, *keys)) for label, meaning, unit, keys in figures]
    return [(label, meaning, words.quantity(first, unit), words.quantity(last, unit))
            for label, meaning, unit, first, last in rows if first is not None or last is not None]  # fmt: skip


def _shapes(steps: Sequence[StepRecord]) -> list[tuple[str, str, str, str]]:
    """Return when, the most frequent shape of right answers then, its share, and its share of the first answers."""
    third = max(1, len(steps) // 3)
    parts = {"first third": steps[:third], "second third": steps[third : 2 * third], "last third": steps[2 * third :]}
    rows = []
    for when, part in parts.items():
        counts = Counter(str(record["top_shape"]) for record in part if record.get("top_shape") is not None)
        if counts:
            [(shape, _)] = counts.most_common(1)
            same = [record for record in part if str(record.get("top_shape")) == shape]
            shares = (_mean(same, name) for name in ("top_shape_ratio", "top_shape_start_ratio"))
            rows.append((when, shape[:300], *map(words.share, shares)))
    return rows  # type: ignore[return-value]  # two shares


# ------------------------------------------------------------------------- what it took


def _seconds(files: RunFiles) -> tuple[dict[str, float], float]:
    """Return the seconds of each stage and of all: of the whole run, or of its steps if it has not ended."""
    whole = files.summary.get("seconds")
    if isinstance(whole, Mapping):
        return words.by_stage({str(name): number_in(whole, name) or 0.0 for name in whole})
    stages = {name: math.fsum(number_in(record, "seconds", name) or 0.0 for record in files.steps)
              for name in names_in(files.steps, "seconds")}  # fmt: skip
    return words.by_stage(stages)


def _cost(files: RunFiles) -> Any:
    """Return the seconds by stage with their share, and figures of cost."""
    stages, total = _seconds(files)
    if (other := total - sum(stages.values())) > 0.005 * total:
        stages["other"] = other
    longest = sorted(stages.items(), key=lambda item: -item[1])
    summed = ("rollouts", "positives", "prompts_with_positive", "rollout_tokens", "trained_tokens", "shared_tokens")
    tokens = {name: _sum(files.steps, name) for name in summed}
    figures = [
        ("answers sampled", f"{tokens['rollouts']:,.0f}"),
        ("right answers", f"{tokens['positives']:,.0f}"),
        ("answers per prompt with a right one", _ratio(tokens["rollouts"], tokens["prompts_with_positive"])),
        ("tokens sampled", f"{tokens['rollout_tokens']:,.0f}"),
        ("tokens trained on", f"{tokens['trained_tokens']:,.0f}"),
        ("tokens not computed again", f"{tokens['shared_tokens']:,.0f}"),
    ]
    return {
        "stages": [(name, words.duration(took), 100 * took / total if total else 0.0) for name, took in longest[:20]],
        "figures": figures,
        "whole": "seconds" in files.summary,
    }


def _ratio(count: float, of: float) -> str:
    return f"{count / of:,.1f}" if of else words.ABSENT


def _peak(steps: Sequence[StepRecord]) -> int | None:
    return max((int(number_in(record, "peak_memory_bytes") or 0) for record in steps), default=None)


def _memory(files: RunFiles) -> tuple[list[tuple[str, str]], str]:
    """Return the peak beside the plan, and a remark."""
    rows = [("measured peak", words.memory(_peak(files.steps)))]
    card = number_in(files.environment, "gpu", "memory_bytes")
    if card is None:
        return rows, "The memory plan is for GPUs, and this run was on a CPU. The peak is that of the whole process."
    from popo_lite.tools.plan.shapes import load_shape
    from popo_lite.tools.plan.vram import plan_memory

    try:
        plan = plan_memory(files.recipe, load_shape(files.recipe.model, offline=True), vram_bytes=int(card))
    except PopoError as error:
        return rows, f"There is no plan to compare with: {error.what}"
    tensors = max(plan.phases, key=lambda phase: phase.tensor_bytes)
    rows += [
        (f"planned tensors, phase {tensors.name}", words.memory(tensors.tensor_bytes)),
        (f"planned in all, phase {plan.peak.name}", words.memory(plan.peak.total_bytes)),
        ("memory of the card", words.memory(int(card))),
    ]
    remark = "Measured is what torch reserved. The plan in all also counts the CUDA context, and what an engine holds."
    return rows, remark


# ------------------------------------------------------------------------- doubts, environment, next steps


def _doubts(files: RunFiles) -> Iterator[str]:
    """Yield what speaks against a run's result, or what was out of the ordinary."""
    yield from map(str, files.summary.get("doubts") or ())
    yield from files.unreadable
    if files.state == "stopped":
        yield f"The run was stopped before its {files.recipe.train.steps:,} steps were done."
    reasons = Counter(str(record["skipped_reason"]) for record in files.steps if record.get("skipped_reason"))
    for reason, count in reasons.most_common(5):
        yield f"{count:,} of {_counted(len(files.steps), 'step')} changed nothing: {reason}"
    if bad := number_in(files.summary, "not_finite_steps"):
        yield f"{_counted(int(bad), 'update')} skipped for gradients that were not finite, or exploded."
    if back := number_in(files.summary, "rollbacks"):
        scale = number_in(files.summary, "learning_rate_scale") or 1
        yield f"{_counted(int(back), 'rollback')} to a checkpoint; the learning rate was scaled by {scale:g}."
    ungraded = _sum(files.steps, "groups_ungraded")
    if ungraded:
        yield f"{_counted(int(ungraded), 'group')} in which no answer could be graded."


def _machine(environment: Mapping[str, Any]) -> str:
    gpu = environment.get("gpu")
    if isinstance(gpu, Mapping):
        return words.clean(str(gpu.get("name", "a GPU")))
    processor = str(environment.get("processor", "an unknown machine"))
    cpus = environment.get("cpu_count")
    return words.clean(f"{processor} ({_counted(cpus, 'core')})" if isinstance(cpus, int) else processor)


def _environment(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    names = {"name": "GPU", "memory_bytes": "GPU memory", "cuda": "CUDA"}
    for key, value in environment.items():
        if isinstance(value, Mapping):
            for name, item in value.items():
                shown = words.memory(item) if name == "memory_bytes" and isinstance(item, int) else item
                if shown is not None:
                    yield names.get(name, str(name)), str(shown)
        elif value is not None:
            yield str(key).replace("_", " "), str(value)


def _next_commands(files: RunFiles, path: str) -> Iterator[tuple[str, str]]:
    """Yield commands that make sense now for the run at `path`, with what they do."""
    run = shlex.quote(path)
    if files.state == "unknown":
        yield f"popo-lite watch {run}", "follow the run, if it still trains on another machine"
        yield f"popo-lite resume {run}", "go on from the newest checkpoint, if it was stopped"
        return
    if files.state == "running":
        yield f"popo-lite watch {run}", "follow the run"
        yield f"popo-lite report {run}", "write this page again"
        return
    if files.state == "stopped":
        yield f"popo-lite resume {run}", "go on from the newest checkpoint"
        return
    yield f"popo-lite chat {run}", "talk to the model"
    yield f"popo-lite eval {run}", "measure base, trained adapter and its average on the same draws"
    yield f"popo-lite export {run} --gguf q8_0", "make a file for llama.cpp and Ollama"
    yield f"popo-lite compare {run} OTHER_RUN", "compare it with another run"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
