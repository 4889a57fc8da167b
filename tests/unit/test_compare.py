"""Comparing runs: intervals, figures worked out by hand, grouping, and pages that hold what they should."""

from __future__ import annotations

import html.parser
import io
import json
import math
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from popo_lite.cli import main
from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.recipe_file import dump_recipe, load_recipe
from popo_lite.run_folder import RunFolder, append_line
from popo_lite.tools.sweep import report
from popo_lite.tools.sweep.compare import compare, mean_interval, ratio_interval, read_run, smoothed, t_quantile
from popo_lite.tools.sweep.folder import SweepFolder, load_sweep
from popo_lite.tools.sweep.report import html_page, print_report

MakeRun = Callable[..., Path]

# Intervals.


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062047364), (2, 4.3026527297), (3, 3.1824463053), (4, 2.7764451052), (9, 2.2621571628),
     (30, 2.0422724563), (100, 1.9839715185)],
)  # fmt: skip
def test_quantiles_of_students_t(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=1e-9)


def test_the_interval_of_a_mean() -> None:
    found = mean_interval([1.0, 2.0, 6.0])
    margin = 4.3026527297 * math.sqrt(7 / 3)  # the variance of these is 7
    assert (found["mean"], found["count"]) == (3.0, 3)
    assert (found["low"], found["high"]) == pytest.approx((3 - margin, 3 + margin), abs=1e-9)
    alone = mean_interval([4.0])
    assert alone == {"mean": 4.0, "low": None, "high": None, "count": 1}


def test_the_interval_of_a_ratio() -> None:
    found = ratio_interval(0.8, 10)
    assert (found["low"], found["high"]) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    none, every = ratio_interval(0.0, 10), ratio_interval(1.0, 10)
    assert (none["low"], none["high"]) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert (every["low"], every["high"]) == pytest.approx((0.722467, 1.0), abs=1e-6)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = random.Random(1)
    found = [mean_interval([draw.gauss(3, 2) for _ in range(4)]) for _ in range(4000)]
    held = statistics.fmean(each["low"] <= 3 <= each["high"] for each in found)
    assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


# Figures of one run.


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run("name", "objective.entropy_coef=0", seed=1, rates=[...], after=0.5)`: a finished run's folder."""

    def make(
        name: str,
        *overrides: str,
        seed: int = 0,
        rates: Sequence[float] = (0.2,) * 20,
        after: float | None = 0.5,
        factor: float = 1.0,
    ) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        run = RunFolder(path)
        run.recipe_path.write_text(dump_recipe(load_recipe("tiny_cpu", [*overrides, f"train.seed={seed}"])))
        for step, rate in enumerate(rates):
            append_line(run.metrics_path, line(step, rate, seed, factor))
        evaluation = {"pass_at_1": after, "pass_at_k": {"1": after, "4": 0.9}, "completion_tokens_mean": 20.0 + seed,
                      "problems": 10}  # fmt: skip
        steps = run.recipe().train.steps
        run.summary_path.write_text(json.dumps({"steps": steps, "after": None if after is None else evaluation}))
        return path

    return make


def line(step: int, rate: float, seed: int, factor: float) -> dict[str, Any]:
    skipped = rate == 0
    return {
        "step": step,
        "pass_rate": rate,
        "completion_tokens_mean": factor * (30.0 + step),
        "unique_answers_mean": 3.0,
        "sampled_entropy": (0.5 if step else 0.8) * factor,
        "entropy": None if skipped else 0.4 * factor,
        "effective_sample_ratio": None if skipped else 0.99 * factor,
        "siamese_drift": 0.01 * step * factor,
        "rollout_tokens": 1000 + seed,
        "tokens_of_all": 2000 + seed,
        "tokens_of_positives": 0 if skipped else 400,
        "tokens_of_mixed_groups": 0 if skipped else 1000,
        "trained_tokens": 0 if skipped else int(400 * factor),
        "shared_tokens": 0,
        "seconds": {"rollout": 1.5, "update": 0.5},
    }


def test_figures_of_a_run(make_run: MakeRun) -> None:
    run = read_run(make_run("a", seed=3, rates=[0.0, *[0.5] * 9, *[0.9] * 10]), reach=0.8)
    figures = run.figures
    assert figures["pass_at_1"] == 0.5
    assert figures["pass_at_4"] == 0.9
    assert "pass_at_k" not in figures
    assert figures["held_out_tokens"] == 23.0
    # The last tenth of 20 steps is steps 18 and 19.
    assert figures["pass_rate"] == pytest.approx(0.9)
    assert figures["completion_tokens_mean"] == 48.5
    assert figures["siamese_drift"] == pytest.approx(0.19)
    assert (figures["rollout_tokens"], figures["trained_tokens"], figures["seconds"]) == (20060, 7600, 40.0)
    assert (figures["sampled_entropy"], figures["sampled_entropy_over_start"]) == (0.5, 0.625)
    assert (figures["tokens_of_all"], figures["tokens_of_positives"]) == (40060, 7600)
    assert (figures["tokens_of_mixed_groups"], figures["trained_ratio"]) == (19000, 7600 / 40060)
    # Of five steps four must be at 0.9, the fifth at 0.5, for a mean of 0.82; three give 0.74.
    assert figures["reach_steps"] == 14
    assert (figures["reach_seconds"], figures["reach_rollout_tokens"]) == (28.0, 14 * 1003)
    assert figures["reach_trained_tokens"] == 13 * 400
    assert run.curves["trained_tokens"][:3] == [0, 400, 800]
    assert run.curves["effective_sample_ratio"][:2] == [None, pytest.approx(0.99)]
    assert run.curves["pass_rate"][5] == pytest.approx(0.5)


def test_a_lucky_first_step_reaches_nothing(make_run: MakeRun) -> None:
    figures = read_run(make_run("a", rates=[1.0, 0.1, 0.1, 0.1, 0.1, 0.1]), reach=0.8).figures
    assert figures["reach_steps"] is figures["reach_seconds"] is figures["reach_trained_tokens"] is None


def test_smoothing_takes_what_is_there() -> None:
    assert smoothed([1.0, None, 3.0]) == [1.0, 1.0, 2.0]
    assert smoothed([None, 2.0]) == [None, 2.0]
    assert smoothed([6.0, 0.0, 0.0, 0.0, 0.0, 0.0])[-2:] == [pytest.approx(1.2), 0.0]


def test_a_run_that_has_not_ended_is_refused_with_how_to_go_on(make_run: MakeRun) -> None:
    path = make_run("a")
    (path / "summary.json").unlink()
    with pytest.raises(CheckpointError, match="popo-lite resume"):
        compare([path], reach=0.8)


# Groups.


def test_runs_that_differ_in_the_seed_alone_are_one_group_named_by_what_differs(make_run: MakeRun) -> None:
    runs = [
        make_run("a0", seed=0, after=0.4),
        make_run("b0", "objective.entropy_coef=0.0", "output.dir=elsewhere", "data.date=2026-01-31", seed=0, after=0.5),
        make_run("a1", seed=1, after=0.6),
        make_run("b1", "objective.entropy_coef=0.0", seed=1, after=0.8),
        make_run("a2", seed=2, after=0.5),
    ]
    found = compare(runs, reach=0.8)
    first, second = found["groups"]
    assert (first["name"], first["seeds"]) == ("entropy_coef=0.01", [0, 1, 2])
    assert (second["name"], second["seeds"]) == ("entropy_coef=0.0", [0, 1])
    assert first["figures"]["pass_at_1"]["mean"] == pytest.approx(0.5)
    assert first["figures"]["pass_at_1"]["high"] == pytest.approx(0.5 + 4.3026527297 * 0.1 / math.sqrt(3))
    assert first["differences"] == {}
    # Seeds 0 and 1 are in both: differences 0.1 and 0.2.
    gap = second["differences"]["pass_at_1"]
    assert (gap["mean"], gap["count"]) == (pytest.approx(0.15), 2)
    assert gap["low"] == pytest.approx(0.15 - 12.7062047364 * 0.05)


def test_a_single_run_has_the_interval_over_its_problems(make_run: MakeRun) -> None:
    (group,) = compare([make_run("only", after=0.8)], reach=0.8)["groups"]
    assert group["name"].endswith("only")
    assert group["figures"]["pass_at_1"]["low"] == pytest.approx(0.490162, abs=1e-6)
    assert group["figures"]["held_out_tokens"]["low"] is None


def test_a_pass_rate_that_some_reach_is_not_compared_by_the_lucky_ones(make_run: MakeRun) -> None:
    quick, slow = [0.9] * 20, [0.1] * 20
    runs = [make_run("a0", rates=quick), make_run("a1", seed=1, rates=quick),
            make_run("b0", "lora.rank=4", rates=quick), make_run("b1", "lora.rank=4", seed=1, rates=slow)]  # fmt: skip
    first, second = compare(runs, reach=0.8)["groups"]
    assert first["values"]["reach_steps"] == [5.0, 5.0]
    assert second["values"]["reach_steps"] == [5.0, None]
    assert second["figures"]["reach_steps"] == {"mean": 5.0, "low": None, "high": None, "count": 1}
    assert second["differences"]["reach_steps"] is None
    assert second["differences"]["pass_rate"]["mean"] == pytest.approx(-0.4)


def test_seeds_that_agree_do_not_make_a_mean_certain(make_run: MakeRun) -> None:
    runs = [make_run("a0", after=0.1 + 0.2), make_run("a1", seed=1, after=0.3), make_run("a2", seed=2, after=0.3),
            make_run("b0", "lora.rank=4", after=0.5), make_run("b1", "lora.rank=4", seed=1, after=0.5)]  # fmt: skip
    first, second = compare(runs, reach=0.8)["groups"]
    assert first["figures"]["pass_at_1"] == {"mean": pytest.approx(0.3), "low": None, "high": None, "count": 3}
    assert second["differences"]["pass_at_1"] == {"mean": pytest.approx(0.2), "low": None, "high": None, "count": 2}
    assert first["curves"]["pass_rate"]["low"] == [None] * 20
    assert first["figures"]["held_out_tokens"]["low"] is not None
    report.draw(compare(runs, reach=0.8))


def test_what_it_took_to_get_there_has_no_interval_where_some_did_not(make_run: MakeRun) -> None:
    slow, quicker, quick = [0.1] * 20, [*[0.1] * 4, *[0.9] * 16], [0.9] * 20
    runs = [make_run("a", rates=quick), make_run("b", seed=1, rates=quicker), make_run("c", seed=2, rates=slow)]
    (all_but_one,) = compare(runs, reach=0.8)["groups"]
    assert all_but_one["figures"]["reach_steps"] == {"mean": 7.0, "low": None, "high": None, "count": 2}
    (every,) = compare(runs[:2], reach=0.8)["groups"]
    assert every["figures"]["reach_steps"]["low"] == 0.0


def test_steps_of_an_older_version_are_refused_by_name(make_run: MakeRun) -> None:
    path = make_run("a")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (path / "metrics.jsonl").unlink()
    for one in lines:
        del one["sampled_entropy"]
        append_line(path / "metrics.jsonl", one)
    with pytest.raises(CheckpointError, match="lack the metric sampled_entropy") as caught:
        compare([path], reach=0.8)
    assert caught.value.where == str(path / "metrics.jsonl")


def test_a_seed_twice_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserInputError, match="are both seed 0 of"):
        compare([make_run("a"), make_run("b")], reach=0.8)


@pytest.fixture
def a_sweep(tmp_path: Path, make_run: MakeRun) -> Path:
    """Variants popo and no-entropy with three seeds; one run of the second is missing."""
    asked = tmp_path / "asked.toml"
    asked.write_text(
        'recipe = "tiny_cpu"\nseeds = [0, 1, 2]\n[variants.popo]\n[variants.no-entropy]\nobjective.entropy_coef = 0.0\n'
    )
    SweepFolder(tmp_path / "sweep").start_files(load_sweep(asked))
    for seed in range(3):
        rising = [min(0.95, 0.2 + 0.04 * step + 0.02 * seed) for step in range(30)]
        make_run(f"sweep/popo/seed-{seed}", seed=seed, rates=rising, after=0.8 + 0.02 * seed)
        if seed:
            falling = [max(0.1, 0.7 - 0.02 * step) for step in range(30)]
            overrides, path = "objective.entropy_coef=0.0", f"sweep/no-entropy/seed-{seed}"
            make_run(path, overrides, seed=seed, rates=falling, after=0.3 + 0.1 * seed, factor=0.9)
    return tmp_path / "sweep"


def test_a_sweep_brings_its_variants_and_tells_what_is_missing(a_sweep: Path, make_run: MakeRun) -> None:
    found = compare([a_sweep], reach=0.8)
    assert [(group["name"], group["seeds"]) for group in found["groups"]] == [
        ("popo", [0, 1, 2]), ("no-entropy", [1, 2]),
    ]  # fmt: skip
    assert found["left_out"] == ["no-entropy seed 0: not finished"]
    assert found["groups"][0]["figures"]["pass_at_4"] == {"mean": 0.9, "low": None, "high": None, "count": 3}
    with_run = compare([a_sweep, make_run("other", "lora.rank=4")], reach=0.8)
    assert [group["seeds"] for group in with_run["groups"]] == [[0, 1, 2], [1, 2], [0]]


def test_groups_of_like_named_sweeps_and_runs_can_be_told_apart(
    a_sweep: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("one", "two", "three/other"):
        shutil.copytree(a_sweep, tmp_path / place if "/" in place else tmp_path / place / "sweep")
    sweeps = [Path("one/sweep"), Path("two/sweep"), Path("three/other")]
    found = compare(sweeps, reach=0.8)
    assert [group["name"] for group in found["groups"]] == [
        f"{prefix}/{name}" for prefix in ("one/sweep", "two/sweep", "other") for name in ("popo", "no-entropy")
    ]
    page = html_page(found, b"")
    for index in range(6):
        assert page.count(report.COLOURS[index]) == (4 if index == 0 else 5)
    with pytest.raises(UserInputError, match="one/sweep and .* are both the folder"):
        compare([Path("one/sweep"), tmp_path / "two" / ".." / "one" / "sweep"], reach=0.8)
    # A single run's group would be named as the sweep's variant.
    sweep_path = Path("one/sweep/sweep.toml")
    sweep_path.write_text(sweep_path.read_text().replace('variants."popo"', 'variants."rank=4"'))
    Path("one/sweep/popo").rename("one/sweep/rank=4")
    runs = [make_run("r4", "lora.rank=4"), make_run("r8", "lora.rank=8")]
    names = [group["name"] for group in compare([Path("one/sweep"), *runs], reach=0.8)["groups"]]
    assert names == ["rank=4", "no-entropy", *map(str, runs)]
    # The path of a single run is the name of the sweep's variant.
    run = make_run("no-entropy").relative_to(tmp_path)
    names = [group["name"] for group in compare([Path("one/sweep"), run], reach=0.8)["groups"]]
    assert names == ["rank=4", "no-entropy", str(run.resolve())]


# Pages.


def test_the_report_holds_figures_intervals_and_who_did_not_get_there(a_sweep: Path) -> None:
    stream = io.StringIO()
    print_report(compare([a_sweep], reach=0.8), Console(file=stream, width=400))
    text = stream.getvalue()
    rows = [row.split("  ") for row in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    margin = 4.3026527297 * 2 / math.sqrt(3)
    assert ["popo", "3", f"82.0 [{82 - margin:.1f}, {82 + margin:.1f}]", "90.0"] in [c[:4] for c in cells]
    assert ["no-entropy", "not reached", "-", "-", "-", "-"] in cells
    assert "Left out: no-entropy seed 0: not finished." in text
    gap = 12.7062047364 * 4  # differences -42 and -34 points
    assert f"-38.0 [{-38 - gap:.1f}, {-38 + gap:+.1f}]" in text
    assert "paired)" not in text
    assert "To a training pass rate of 80%" in text


def test_reports_say_how_many_runs_a_figure_is_of(make_run: MakeRun) -> None:
    runs = [make_run("a0", after=0.5), make_run("a1", seed=1, after=0.7), make_run("a2", seed=2, rates=[0.0] * 20),
            make_run("b0", "lora.rank=4"), make_run("b1", "lora.rank=4", seed=3)]  # fmt: skip
    found = compare(runs, reach=0.995)
    stream = io.StringIO()
    print_report(found, Console(file=stream, width=400))
    lines = stream.getvalue().splitlines()
    entropies = [line for line in lines if line.strip().startswith("rank=16")][1]
    assert "0.400 (n = 2)" in entropies
    assert entropies.count("(n = 2)") == 2  # entropy and effective sample size of the runs that trained
    difference = next(line for line in reversed(lines) if line.strip().startswith("rank=4"))
    assert "+0.0 (1 of 2 paired)" in difference
    assert "To a training pass rate of 99.5%" in stream.getvalue()
    titles = [axis.get_title(loc="left") for axis in report.draw(found).axes]
    assert "Trained tokens until 99.5%" in titles


class Page(html.parser.HTMLParser):
    """What a page is made of, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_compare_writes_one_page_that_needs_nothing_else(a_sweep: Path) -> None:
    done = CliRunner().invoke(main, ["compare", str(a_sweep), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    folder = a_sweep / "comparison"
    assert {path.name for path in folder.iterdir()} == {"comparison.png", "comparison.html", "comparison.json"}
    written = json.loads((folder / "comparison.json").read_text())
    printed = json.loads(done.output)
    assert all("curves" in group for group in written["groups"])
    for group in written["groups"]:
        del group["curves"]
    assert printed == written
    text = (folder / "comparison.html").read_text()
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert page.tags.count("table") == 5
    (source,) = page.links
    assert source.startswith("data:image/png;base64,")
    assert "://" not in text.replace(source, "")
    # Going on with the sweep and comparing again are both possible with the page in its folder.
    assert CliRunner().invoke(main, ["compare", str(a_sweep)], catch_exceptions=False).exit_code == 0


def test_names_of_variants_are_text_in_the_page(make_run: MakeRun) -> None:
    runs = [make_run("a"), make_run("b", "model.id=<script>$x_1$")]
    found = compare(runs, reach=0.8)
    text = html_page(found, b"")
    assert found["groups"][1]["name"] == "id=<script>$x_1$"
    assert "<script" not in text
    assert "id=&lt;script&gt;$x_1$" in text


@pytest.mark.parametrize("name", ["BODY", "TITLE"])
def test_names_are_no_places_in_the_page(make_run: MakeRun, name: str) -> None:
    text = html_page(compare([make_run("a"), make_run("b", f"model.id={name}")], reach=0.8), b"")
    title = f"Comparison of id=tiny, id={name}"
    assert f"<title>{title}</title>" in text
    assert f"<body>\n<h1>{title}</h1>" in text
    assert text.count("<h1>") == 1


def test_every_panel_shows_every_group_in_its_colour(a_sweep: Path, tmp_path: Path) -> None:
    import numpy as np
    from matplotlib.image import imread

    path = tmp_path / "page.png"
    report.draw(compare([a_sweep], reach=0.8)).savefig(path)
    pixels = imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert width == report.WIDTH_INCHES * report.DOTS_PER_INCH
    assert pixels.mean() > 0.9
    shows = []
    for row in range(2):
        top, bottom = height * (0.06 + 0.34 * row), height * (0.06 + 0.34 * (row + 1))
        for column in range(3):
            panel = pixels[int(top) : int(bottom), int(width * column / 3) : int(width * (column + 1) / 3)]
            for index in range(2):
                wanted = [int(report.COLOURS[index][at : at + 2], 16) / 255 for at in (1, 3, 5)]
                shows.append(int((np.abs(panel - wanted).max(-1) < 0.02).sum()) > 100)
    assert shows == [True] * 12


def test_more_groups_than_colours_differ_in_their_lines(make_run: MakeRun) -> None:
    runs = [make_run(f"r{rank}", f"lora.rank={rank}") for rank in range(1, 10)]
    figure = report.draw(compare(runs, reach=0.8))
    lines = figure.axes[0].lines
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len({color for color, _ in looks}) == len(report.COLOURS) == 7
    assert len(looks) == len(lines) == 9
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"rank={rank}" for rank in range(1, 10)]


@pytest.mark.parametrize(("groups", "bands"), [(7, 7), (8, 1)])
def test_many_groups_are_told_apart_by_lines_and_not_hidden_by_bands(
    make_run: MakeRun, groups: int, bands: int
) -> None:
    runs = [make_run(f"r{rank}", f"lora.rank={rank}") for rank in range(1, groups + 1)]
    found = compare(runs, reach=0.8)
    axis = report.draw(found).axes[0]
    assert (len(axis.lines), len(axis.collections)) == (groups, bands)
    page = html_page(found, b"")
    assert ("the band (of rank=1 alone) 95" in page) == (bands == 1)
    first = report.COLOURS[0]
    assert f"border-top: .2em solid {first}" in page
    assert (f"border-top: .2em dashed {first}" in page) == (groups == 8)


def test_runs_without_evaluation_or_a_trained_step_are_shown_as_not_measured(make_run: MakeRun, tmp_path: Path) -> None:
    found = compare([make_run("a", rates=[0.0] * 6, after=None)], reach=0.8)
    assert found["groups"][0]["figures"]["pass_at_1"] is None
    assert found["groups"][0]["curves"]["effective_sample_ratio"]["mean"] == [None] * 6
    report.draw(found).savefig(tmp_path / "page.png")
    stream = io.StringIO()
    print_report(found, Console(file=stream, width=300))
    assert "not reached" in stream.getvalue()
