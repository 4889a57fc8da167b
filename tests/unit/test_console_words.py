"""Figures, foreign text and small drawings."""

import math
from datetime import datetime

import pytest
from rich.cells import cell_len
from rich.console import Console

from popo_lite.tools.console import words
from popo_lite.tools.console.dashboard import chart, fit


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0.0000"),
        (-0.04123, "-0.0412"),
        (12.346, "12.35"),
        (2e-5, "2.0e-05"),
        (-2e-5, "-2.0e-05"),
        (12345.6, "12346"),
        (1.5e7, "1.5e+07"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_figure(value, shown):
    assert words.figure(value) == shown
    assert len(shown) <= 8


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (3.24, "3.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00"),
        (723, "12:03"),
        (3599.6, "1:00:00"),
        (4323, "1:12:03"),
    ],
)
def test_duration(seconds, shown):
    assert words.duration(seconds) == shown


def test_share_and_memory():
    assert words.share(0.4256) == "42.6%"
    assert words.share(None) == "-"
    assert words.memory(2**30 * 3) == "3.00 GiB"
    assert words.memory(2**20 * 90) == "90.0 MiB"


def test_clock_time_names_the_day_only_where_it_is_another():
    now = datetime(2026, 11, 21, 22, 0)
    assert words.clock_time(now, 3600) == "23:00"
    assert words.clock_time(now, 3 * 3600) == "Sun 01:00"
    assert words.clock_time(now, 10 * 86400) == "01 Dec 22:00"


def test_clean_leaves_nothing_that_a_terminal_obeys():
    hostile = "a\x1b[31mb\x07c\x9b2Jd\u202ee\ud800f\ng\th\u2028i\x00j\u200dk\ufe0fl [/red]"
    assert words.clean(hostile) == "a�[31mb�c�2Jde�f g h i�jkl [/red]"
    words.clean(hostile).encode("utf-8")


def test_clean_keeps_ordinary_writing():
    text = r"Δ = \frac{1}{2}, 日本語, café, ≤ × π"
    assert words.clean(text) == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_encodable_keeps_the_number_of_characters(encoding):
    text = "━━── ▁▂▃▄▅▆▇█ ▓░ … ✓ ✗ ± � π日"
    shown = words.encodable(text, encoding)
    assert len(shown) == len(text)
    assert shown.encode(encoding).decode(encoding) == shown
    assert shown.startswith("==-- .:-=+*%# +. ~ v x ")
    assert words.encodable(text, "UTF-8") == text


@pytest.mark.parametrize("text", ["x" * 500, "日" * 300, "one two three " * 50, "a bb ccc", ""])
@pytest.mark.parametrize("width", [3, 7, 40])
@pytest.mark.parametrize("height", [1, 2, 5])
def test_folded_text_fits(text, width, height):
    lines = fit(text, width, height, Console())
    assert 1 <= len(lines) <= height
    assert max(cell_len(line) for line in lines) <= width


def test_folded_text_breaks_between_words_and_keeps_both_ends():
    assert fit("one two three four", 9, 3, Console()) == ["one two", "three", "four"]
    lines = fit("The question is long. " * 20 + "The answer is 17.", 30, 4, Console())
    assert lines[0].startswith("The question")
    assert lines[-1].endswith("17.")
    assert sum(line.startswith("… ") for line in lines) == 1


def test_chart_draws_levels_in_eighths():
    assert chart([0.0, 0.25, 0.5, 1.0], 4, 1, 0, 1, 4) == ["▁▂▄█"]
    assert chart([0.0, 0.25, 0.5, 1.0], 4, 2, 0, 1, 4) == ["   █", "▁▄██"]


def test_chart_shows_what_is_missing_as_a_gap():
    assert chart([1.0, None, None, 1.0], 4, 1, 0, 1, 4) == ["█  █"]


def test_chart_has_a_mean_per_column_for_more_values():
    assert chart([0.0, 0.5, 1.0, 1.0, None, 0.5], 3, 1, 0, 1, 6) == ["▂█▄"]


def test_chart_is_as_wide_as_the_run_will_be_long():
    assert chart([1.0, 0.0], 12, 1, 0, 1, 4) == ["███▁▁▁"]
    assert chart([1.0, 0.0], 12, 1, 0, 1, 100) == ["█▁"]
