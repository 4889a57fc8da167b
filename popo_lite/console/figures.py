"""The figures of the latest step as rows of the live screen, most important first."""

from __future__ import annotations

from rich.text import Text

from popo_lite.console import words
from popo_lite.console.draw import bar, cut_end, sparkline
from popo_lite.console.state import RunState, by_stage
from popo_lite.types import StepRecord

_LABEL = 14
_VALUE = 8
_NOTE = 15
_SHORTEST_TREND = 8


def learning_rows(state: RunState, record: StepRecord, width: int) -> list[Text]:
    """Loss terms, entropy, weights, siamese, gradients."""
    drifted = record.siamese_drift_over_bound
    rows = [
        ("loss", words.figure(record.loss), "", "loss", "bold"),
        ("  nll", words.figure(record.loss_nll), "", "loss_nll", ""),
        ("  similarity", words.figure(record.loss_similarity), "", "loss_similarity", ""),
        ("  entropy", words.figure(record.loss_entropy), f"beta {words.figure(record.beta)}", "loss_entropy", ""),
        ("token entropy", words.figure(record.entropy), _of(record.entropy_over_start, "of start"), "entropy", ""),
        (
            "eff. positives",
            words.decimals(record.effective_sample_size, 2),
            _of(record.effective_sample_ratio, "of them"),
            "effective_sample_size",
            "",
        ),
        ("cosine", words.figure(record.siamese_cosine), "to siamese", "siamese_cosine", ""),
        (
            "drift",
            words.figure(record.siamese_drift),
            _of(drifted, "of bound"),
            "siamese_drift",
            # Above its bound the siamese is not the average that the method says it is.
            "bold red" if drifted is not None and drifted > 1 else "",
        ),
        ("gradient norm", words.figure(record.grad_norm), "", "grad_norm", ""),
        (
            "logp gap",
            words.figure(record.logp_gap_mean),
            f"max {words.figure(record.logp_gap_max)}",
            "logp_gap_mean",
            "",
        ),
    ]
    return [_row(state, width, *row) for row in rows]


def sampling_rows(state: RunState, record: StepRecord, width: int) -> list[Text]:
    """What the answers of the step are like."""
    cut = f"{words.share(record.truncated_ratio)} cut off"
    positives = f"of {words.decimals(record.rollouts, 0)}"
    rows = [
        ("mean tokens", words.decimals(record.completion_tokens_mean, 1), cut, "completion_tokens_mean"),
        ("positives", words.decimals(record.positives, 0), positives, None),
        ("different", words.decimals(record.unique_answers_mean, 1), "per prompt", "unique_answers_mean"),
    ]
    if record.step_by_step_ratio is not None:
        rows.append(("step by step", words.share(record.step_by_step_ratio), "", "step_by_step_ratio"))
    unparsed, late, failed = (record.outcomes.get(name, 0) for name in ("unparsed", "timeout", "error"))
    if unparsed or late or failed:
        rows.append(("no answer", words.decimals(unparsed, 0), "", None))
    if late or failed:
        rows.append(("ungraded", words.decimals(late + failed, 0), f"{late} late {failed} failed", None))
    return [_row(state, width, *row, "") for row in rows]


def time_rows(record: StepRecord, width: int, most: int) -> list[Text]:
    """One row for each stage of the step: seconds, share of the step, tokens per second. The `most` longest."""
    stages, total = by_stage(record.seconds)
    longest = sorted(stages, key=lambda name: stages[name], reverse=True)[:most]
    rows = []
    for name in (name for name in stages if name in longest):
        line = Text.assemble((f"{cut_end(name, 10):<11}", "dim"), f"{words.duration(stages[name]):>7}  ")
        line.append_text(bar(stages[name] / total if total else 0.0, max(width - 33, 0), "cyan"))
        speed = record.tokens_per_second.get(name)
        if speed is not None:
            line.append(f"{words.decimals(speed, 0):>7} tok/s")
        rows.append(line)
    return rows


def _of(value: float | None, whole: str) -> str:
    return "" if value is None else f"{value:.0%} {whole}"


def _row(state: RunState, width: int, label: str, value: str, note: str, trend: str | None, style: str) -> Text:
    line = Text.assemble(
        (f"{label:<{_LABEL}}", "dim"), (f"{value:>{_VALUE}}", style), (f"  {note}" if note else "", "dim")
    )
    room = width - _LABEL - _VALUE - _NOTE - 2
    if trend is not None and room >= _SHORTEST_TREND:
        line.pad_right(width - room - line.cell_len)
        line.append(sparkline(state.trends[trend], room, state.steps_planned_here), "dim cyan")
    return line
