"""Tables, closing report, errors and one-off progress, on terminals and in files."""

import dataclasses
import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from popo_lite.errors import RecipeError
from popo_lite.tools.console.output import (
    closing_report,
    eval_report,
    noise,
    open_console,
    paired_interval,
    print_error,
    progress,
    table,
)
from popo_lite.types import EvalResult

WIDTHS = [80, 100, 140]


def evaluation(rate: float, tokens: float) -> dict:
    return {
        "pass_at_1": rate,
        "pass_at_k": {"1": rate, "8": rate + 0.3, "16": rate + 0.4},
        "problems": 200,
        "samples_per_problem": 16,
        "task_figures": {"step_by_step_ratio": 0.34},
        "truncated_ratio": 0.01,
        "completion_tokens_mean": tokens,
    }


SUMMARY = {
    "before": evaluation(0.315, 143.2),
    "after": evaluation(0.462, 120.9),
    "steps": 60,
    "seconds": {"evaluate": 120.0, "rollout": 480.0, "grade": 12.0, "update": 190.0, "total": 860.0},
    "rollout_tokens": 2_200_123,
    "trained_tokens": 712_345,
    "shared_tokens": 101_010,
    "peak_memory_bytes": int(9.37 * 2**30),
    "siamese_extra_bytes": 90 * 2**20,
    "quantized_modules": 196,
    "output": "runs/2026-11-21_" + "long-name-" * 12,
}
COMMANDS = ["popo-lite eval runs/x", "popo-lite export runs/x --out merged " + "--and-so-on " * 12]


def result(weights: str, rate: float, problems: int = 200) -> EvalResult:
    return EvalResult(
        unreadable=0,
        weights=weights,
        problems=problems,
        samples_per_problem=8,
        pass_at_1=rate,
        pass_at_k={1: rate, 8: rate + 0.2},
        task_figures={},
        truncated_ratio=0.015,
        ungraded_ratio=0.005,
        completion_tokens_mean=120.25,
        rollout_tokens=123_456,
        seconds=61.0,
        pass_rates=(rate,) * problems,
    )


def printed(show, **options) -> str:
    """What `show(console)` prints; to a file unless `options` describe a terminal."""
    stream = io.StringIO()
    show(Console(file=stream, _environ={}, **options) if options else open_console(stream))
    return stream.getvalue()


def rows(text: str) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in text.splitlines() if line.strip()]


def test_closing_report_compares_before_and_after():
    text = printed(lambda console: closing_report(SUMMARY, COMMANDS, console))
    found = rows(text)
    assert ["before", "after", "difference"] in found
    for row in (
        ["pass@1", "31.5%", "46.2%", "+14.7"],
        ["pass@8", "61.5%", "76.2%", "+14.7"],
        ["pass@16", "71.5%", "86.2%", "+14.7"],
        ["step by step", "34.0%", "34.0%", "+0.0"],
        ["truncated", "1.0%", "1.0%", "+0.0"],
        ["mean tokens", "143.2", "120.9", "-22.3"],
        ["problems", "200", "200"],
        ["Time: 14:20"],
        ["steps", "60"],
        ["tokens sampled", "2,200,123"],
        ["tokens trained on", "712,345 (101,010 more not computed again)"],
        ["peak memory", "9.37 GiB"],
        ["siamese", "90.0 MiB beside the policy"],
        ["4-bit modules", "196"],
        ["saved to", SUMMARY["output"]],
    ):
        assert row in found, row
    assert next(row for row in found if row[0] == "rollout")[:3] == ["rollout", "8:00", "56%"]
    # 860 seconds in all, 802 of them in stages: the rest is told as well.
    assert next(row for row in found if row[0] == "other")[:3] == ["other", "58.0 s", "7%"]
    assert "With 200 problems, a difference of pass@1 within ±9.4 points may be chance (95%)." in text
    assert text.index("pass@8") < text.index("pass@16")
    assert "ungraded" not in text  # the summary does not say


def test_closing_report_takes_a_summary_that_never_was_json():
    after = SUMMARY["after"] | {"pass_at_k": {1: 0.462, 8: 0.762, 16: 0.862}}
    text = printed(lambda console: closing_report(SUMMARY | {"after": after}, [], console))
    assert ["pass@8", "61.5%", "76.2%", "+14.7"] in rows(text)


def test_closing_report_shows_the_siamese_where_it_was_evaluated():
    text = printed(lambda console: closing_report(SUMMARY | {"siamese": evaluation(0.45, 122.0)}, [], console))
    assert ["before", "after", "difference", "siamese"] in rows(text)
    assert ["pass@1", "31.5%", "46.2%", "+14.7", "45.0%"] in rows(text)
    assert "Next" not in text


def test_closing_report_of_a_run_without_evaluation():
    summary = SUMMARY | {"before": None, "after": None, "quantized_modules": 0}
    text = printed(lambda console: closing_report(summary, COMMANDS, console))
    assert "Nothing was measured on held-out problems." in text
    assert "pass@1" not in text
    assert ["4-bit modules", "none: not quantised"] in rows(text)


def test_closing_report_with_only_one_evaluation_has_no_difference():
    text = printed(lambda console: closing_report(SUMMARY | {"before": None}, COMMANDS, console))
    assert ["pass@1", "46.2%"] in rows(text)
    assert "difference" not in text
    assert "may be chance" not in text


@pytest.mark.parametrize("width", WIDTHS)
def test_reports_fit_the_terminal_and_leave_copied_lines_whole(width):
    def show(console):
        closing_report(SUMMARY | {"siamese": evaluation(0.45, 122.0)}, COMMANDS, console)
        eval_report([result(name, 0.3) for name in ("base", "adapter", "siamese")], console)

    lines = printed(show, force_terminal=True, width=width, color_system=None).splitlines()
    long = [line for line in lines if cell_len(line) > width]
    assert all(line.strip() in (f"saved to           {SUMMARY['output']}", COMMANDS[1].strip()) for line in long)
    # One line of ours each, whatever the terminal's width: it can be copied whole.
    assert sum(COMMANDS[1].strip() in line for line in lines) == 1
    assert sum(SUMMARY["output"] in line for line in lines) == 1


def test_eval_report_has_a_column_for_each_of_the_weights():
    weights = [result("base", 0.3), result("adapter", 0.5), result("siamese", 0.48)]
    found = rows(printed(lambda console: eval_report(weights, console)))
    for row in (
        ["base", "adapter", "difference", "siamese"],
        ["pass@1", "30.0%", "50.0%", "+20.0", "48.0%"],
        ["pass@8", "50.0%", "70.0%", "+20.0", "68.0%"],
        ["truncated", "1.5%", "1.5%", "+0.0", "1.5%"],
        ["ungraded", "0.5%", "0.5%", "+0.0", "0.5%"],
        ["mean tokens", "120.2", "120.2", "+0.0", "120.2"],
        ["tokens sampled", "123,456", "123,456", "123,456"],
        ["time", "1:01", "1:01", "1:01"],
        ["answers each", "8", "8", "8"],
    ):
        assert row in found, row
    assert not any(row[0] == "step by step" for row in found)


def test_eval_report_pairs_the_problems():
    first, second = result("base", 0.5, problems=4), result("adapter", 1.0, problems=4)
    text = printed(lambda console: eval_report([first, second], console))
    # By hand: the mean of six is 2 / 6, the mean of squares (4 * 0.25 + 1) / 6.
    low, high = (1 / 3 + sign * 1.96 * ((1 / 3 - 1 / 9) / 6) ** 0.5 for sign in (-1, 1))
    line = f"adapter - base: +50.0 points, 95% interval {100 * low:+.1f} to {100 * high:+.1f}, so it may be chance"
    assert f"pass@1, {line} (4 problems, same draws)." in text
    many = [dataclasses.replace(one, pass_rates=one.pass_rates * 25) for one in (first, second)]
    assert "chance" not in printed(lambda console: eval_report(many, console))
    assert "95%" not in printed(lambda console: eval_report([first], console))


def test_paired_interval_is_agresti_and_mins():
    # Their form for single answers: (c - b) / N +- 1.96 sqrt(b + c - (b - c)^2 / N) / N with half a problem added to
    # each of the four cells, N = n + 2.
    first, second = [1] * 12 + [0] * 30 + [1] * 40 + [0] * 18, [0] * 12 + [1] * 30 + [1] * 40 + [0] * 18
    b, c, n = 12.5, 30.5, 102
    middle, margin = (c - b) / n, 1.96 * (b + c - (b - c) ** 2 / n) ** 0.5 / n
    assert paired_interval(first, second) == pytest.approx((middle - margin, middle + margin), rel=1e-12)
    low, high = paired_interval([1.0] * 200, [1.0] * 200)
    assert -low == high == pytest.approx(1.96 / 202)
    assert paired_interval([0.25, 0.5], [0.5, 1.0]) == pytest.approx(
        (0.1875 - 1.96 * ((1.3125 / 4 - 0.1875**2) / 4) ** 0.5, 0.1875 + 1.96 * ((1.3125 / 4 - 0.1875**2) / 4) ** 0.5)
    )


def test_noise_is_the_error_of_a_difference():
    # By hand: (0.5 * 200 + 2) / 204 = 0.5, variance 2 * 0.25 / 204.
    assert noise(0.5, 0.5, 200) == pytest.approx(1.96 * (0.5 / 204) ** 0.5, rel=1e-12)
    assert noise(0.0, 0.0, 200) > 0.01
    assert noise(0.3, 0.5, 100) == noise(0.5, 0.3, 100)


def test_table_keeps_text_as_it_is():
    cells = [["tiny", "a [bold]demo[/] \x1b[31m", 30], ["qwen", "word " * 60, None], ["日本", "", 1500]]
    text = printed(lambda console: table("Recipes [x]", ["name", "what for", "steps"], cells, console))
    lines = text.splitlines()
    assert lines[0] == "Recipes [x]"
    assert "a [bold]demo[/] �[31m" in text
    # Into a file nothing is wrapped, and columns of numbers are flush right.
    assert len(lines) == 7
    assert lines[3].endswith("   30")
    assert lines[5].endswith(" 1500")
    assert "\x1b" not in text


@pytest.mark.parametrize("width", WIDTHS)
def test_table_folds_on_a_terminal(width):
    cells = [["x" * 200, "word " * 60, 30]]
    text = printed(lambda console: table("T", ["a", "b", "c"], cells, console), force_terminal=True, width=width)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    assert max(cell_len(line) for line in lines) <= width
    assert "".join(lines).count("x") == 200


def test_reports_without_unicode():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    closing_report(SUMMARY, COMMANDS, open_console(stream))
    table("Tä", ["ö"], [["日本"]], open_console(stream))
    stream.flush()
    assert b"within ~9.4 points" in raw.getvalue()
    assert b"T?" in raw.getvalue()


ERROR = RecipeError(
    "objective.similarity_coef = -1: must be at least 0\nrollout.top_p = 0.9 [/red]\x1b[2J",
    where="recipes/x.toml",
    next_step="popo-lite recipe show",
)


def test_error_says_what_where_and_next(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_error(ERROR)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error  objective.similarity_coef = -1: must be at least 0",
        "       rollout.top_p = 0.9 [/red]�[2J",
        "where  recipes/x.toml",
        "next   popo-lite recipe show",
    ]
    print_error(RecipeError("only this"))
    assert capsys.readouterr().err.strip() == "error  only this"


@pytest.mark.parametrize("width", WIDTHS)
def test_error_folds_beside_its_label(width):
    text = printed(
        lambda console: print_error(RecipeError("word " * 60), console),
        force_terminal=True,
        width=width,
        color_system=None,
    )
    lines = text.splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert lines[0].startswith("error  word")
    assert all(line.startswith("       word") for line in lines[1:])


def test_progress_is_plain_without_a_terminal(capsys):
    with progress("building [the] tiny model", total=10) as advance:
        for _ in range(10):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert first == "building [the] tiny model ..."
    assert re.fullmatch(r"building \[the\] tiny model: done in \d+\.\d s", last)


def test_progress_tells_how_far_it_is_when_it_takes_long(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("popo_lite.tools.console.output._PLAIN_SECONDS", 0.0)
    with progress("exporting", total=1200, console=open_console(stream)) as advance:
        advance(500)
        advance(600)
    assert stream.getvalue().splitlines()[1:3] == ["exporting: 500 of 1,200", "exporting: 1,100 of 1,200"]


def test_progress_that_fails_does_not_say_done():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), progress("exporting", console=open_console(stream)):
        raise RuntimeError
    assert "done" not in stream.getvalue()


def test_progress_on_a_terminal_leaves_it_in_order():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, _environ={})
    with pytest.raises(RuntimeError), progress("exporting [/red]", total=3, console=console) as advance:
        advance(2)
        raise RuntimeError
    text = stream.getvalue()
    assert "exporting [/red]" in text
    assert "2/3" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
