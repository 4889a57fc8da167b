"""The HTML report of a run: what it says, of which runs, and that hostile texts stay text."""

from __future__ import annotations

import html
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from helpers import record
from popo_lite.cli import main
from popo_lite.errors import CheckpointError
from popo_lite.recipe_file import dump_recipe, load_recipe
from popo_lite.run_folder import RunFolder, write_json
from popo_lite.tools.report.charts import BUCKETS, smoothed, thinned
from popo_lite.tools.report.page import write_report
from popo_lite.tools.report.samples import ROWS, chosen_samples
from runs import EVALUATION, SUMMARY

ATTACKS = [
    "<script>document.title='owned'</script>",
    '"><img src="https://evil.invalid/x.png" onerror="document.title=\'owned\'">',
    "</pre></style></script><svg onload=\"document.title='owned'\">",
    "<link rel=stylesheet href=//evil.invalid/a.css><iframe src=https://evil.invalid></iframe>",
    "{{ 7 * 7 }} {% raw %} javascript:alert(1)",
    "\x1b[2J\x00\u202egnp.exe\u2066 \ud800 e" + "\u0301" * 500,
    "<meta http-equiv=refresh content='0;url=https://evil.invalid'><base href=https://evil.invalid>",
    "x" * 3000,
]
TAGS = """html head meta title style body header main footer nav span h1 h2 h3 h4 p a b i small ul li dl dt dd div
figure figcaption svg path details summary table thead tbody tr th td pre code article meter-bar script"""
CHROMIUM = Path("/usr/bin/chromium")
EMPTIED = ("loss", "loss_policy", "loss_similarity", "loss_entropy", "entropy", "effective_sample_size", "grad_norm",
           "siamese_cosine", "siamese_drift", "logp_gap_mean", "logp_gap_p99", "logp_gap_max")  # fmt: skip


def make_run(path: Path, steps: int, *, of: int = 60, recipe: list[str] | None = None) -> RunFolder:
    """Write a run folder of so many steps, ended if they are all."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.recipe_path.write_text(dump_recipe(load_recipe("tiny_cpu", [f"train.steps={of}", *(recipe or [])])))
    write_lines(run.metrics_path, [record(step) for step in range(steps)])
    write_lines(run.samples_path, [group(step, f"problem/{step % 7}") for step in range(steps)])
    write_lines(run.evaluations_path, [{**EVALUATION, "when": "before", "step": 0}])
    write_json(run.environment_path, {"python": "3.12", "processor": "a CPU", "cpu_count": 2, "gpu": None})
    if steps == of:
        seconds = {"rollout": 50.0, "update": 10.0, "total": 61.0}
        write_json(run.summary_path, {**SUMMARY, "steps": steps, "seconds": seconds})
        after = {**SUMMARY["after"], "when": "after", "step": steps}
        write_lines(run.evaluations_path, [{**EVALUATION, "when": "before", "step": 0}, after])
    return run


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))


def group(step: int, problem: str, text: str = "so \\boxed{3}") -> dict:
    answers = [
        {"text": f"{text} {positive}", "tokens": 8, "finish_reason": "stop", "reward": float(positive),
         "positive": positive, "rewards": {"math": 1.0}, "outcome": "correct", "detail": ""}
        for positive in (True, False)
    ]  # fmt: skip
    return {
        "step": step,
        "problem": problem,
        "question": f"What is 1 + {problem}?",
        "reference": "3",
        "answers": answers,
    }


class Parsed(HTMLParser):
    """Elements, their attributes, and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run whose every text is an attack; its page."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    texts = [*ATTACKS, *(f"{text} again" for text in ATTACKS)]
    run = make_run(path, 12, of=12, recipe=[f"data.system_prompt={json.dumps(ATTACKS[0])}"])
    steps = [
        record(step, skipped_reason=text, top_shape=text, rewards={text: 0.5}, task_figures={text: 0.2},
               seconds={"rollout": 1.0, text: 2.0}, tokens_per_second={text: 3.0}, loss=text, grad_norm=[text])
        for step, text in enumerate(texts[:12])
    ]  # fmt: skip
    write_lines(run.metrics_path, steps)
    write_lines(
        run.samples_path,
        [group(i % 12, text, text) | {"question": text, "reference": text} for i, text in enumerate(texts)],
    )
    run.log_path.write_text("\n".join(texts), encoding="utf-8", errors="replace")
    write_json(run.environment_path, {text: text for text in ATTACKS if text.isascii()} | {"gpu": {"name": ATTACKS[1]}})
    summary = json.loads(run.summary_path.read_text())
    summary["after"]["task_figures"] = dict.fromkeys(ATTACKS[:4], 0.5)
    changes = [{"step": 1, "key": "optimizer.schedule", "before": ATTACKS[0], "now": ATTACKS[1]}]
    run.summary_path.write_text(json.dumps({**summary, "doubts": ATTACKS, "changes": changes}))
    return write_report(path).path


def test_what_a_finished_run_says(tmp_path):
    run = make_run(tmp_path / "run", 60)
    done = CliRunner().invoke(main, ["report", str(run.path)], catch_exceptions=False)
    verdict = "pass@1 rose from 29.5% [23.6%, 36.2%] to 96.5% [93.0%, 98.3%] on 200 held-out problems, in 60 steps"
    assert done.stdout.startswith(verdict)
    assert done.stdout.endswith(f"Next\n  popo-lite chat {run.path}\n")
    text = Parsed((run.path / "report.html").read_text()).text
    for part in (verdict, "a CPU (2 cores)", "popo-lite export", "The memory plan is for GPUs", "[objective]",
                 "The same prompt at steps 1, ", "reward: math", "_ is larger than _."):  # fmt: skip
        assert part in text, part


def test_json_and_another_place(tmp_path):
    run, path = make_run(tmp_path / "run", 3), tmp_path / "new" / "page.html"
    done = CliRunner().invoke(main, ["report", str(run.path), "--output", str(path), "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found["path"] == str(path)
    assert (found["state"], found["steps"]) == ("stopped", 3)
    assert path.is_file()
    assert not (run.path / "report.html").exists()


def test_a_run_without_a_step(tmp_path):
    run = make_run(tmp_path / "run", 0)
    assert write_report(run.path).verdict == "No step is done yet; before training pass@1 is 29.5% [23.6%, 36.2%]."
    for name in (run.metrics_path, run.samples_path, run.evaluations_path):
        name.unlink()
    assert write_report(str(run.path)).verdict == "No step is done yet."


def test_a_folder_with_a_recipe_alone_is_no_run(tmp_path):
    (tmp_path / "recipe.toml").write_text(dump_recipe(load_recipe("tiny_cpu")))
    with pytest.raises(CheckpointError, match="there is no run here"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_run_that_trains_and_is_in_the_middle_of_a_line(tmp_path):
    run = make_run(tmp_path / "run", 20)
    for path in (run.metrics_path, run.samples_path, run.evaluations_path):
        with path.open("ab") as file:
            file.write('{"format": 1, "step": 20, "question": "ä'.encode()[:-1])
    with run.locked():
        report = write_report(run.path)
    assert (report.state, report.steps) == ("running", 20)
    assert report.next_command == f"popo-lite watch {run.path}"
    assert "20 of 60 steps, so far" in report.verdict
    assert write_report(run.path).state == "stopped"


def test_a_run_that_may_train_on_another_machine_is_not_called_stopped(tmp_path):
    run = make_run(tmp_path / "run", 20)
    owner = {"pid": os.getpid(), "host": "somewhere-else", "since": "2999-01-01T00:00:00+00:00"}
    run.lock_path.write_text(f"\n{json.dumps(owner)}\n")
    report = write_report(run.path)
    assert (report.state, report.next_command) == ("unknown", f"popo-lite watch {run.path}")
    text = Parsed(report.path.read_text()).text
    assert "running on another machine, or stopped" in text
    assert "if it was stopped" in text
    assert "was stopped before" not in text


def test_a_base_that_is_gone_costs_only_the_memory_plan(tmp_path):
    run = make_run(tmp_path / "run", 3, recipe=["model.id=/srv/acme/bases/model"])
    write_json(run.environment_path, {"gpu": {"name": "a GPU", "memory_bytes": 2**34}})
    page = write_report(run.path).path.read_text()
    assert "There is no plan to compare with: the config of model is not on this machine" in html.unescape(page)
    assert "acme" not in page


def test_places_are_masked_in_commands_messages_and_doubts(tmp_path, monkeypatch):
    """Also of paths that are relative to another folder than the working folder."""
    private = tmp_path / "acme place"
    private.mkdir()
    (private / "urls.txt").write_text("http://acme-other:8000\n")
    run = make_run(private / "run", 2, of=2, recipe=[
        "data.dataset=acme/sets/rows.jsonl", f"model.id={private}/model", "output.dir=acme/all",
        'rollout.server.base_urls=["http://acme-host:8000/v1"]', "rollout.server.allow_http=true",
        "rollout.engine=server", f"rollout.server.shared_dir={private}/shared",
        f"rollout.server.urls_file={private}/urls.txt",
    ])  # fmt: skip
    doubts = [f"{private}/model is odd", "/old/acme/sets/rows.jsonl: line 3 is odd", f"see {run.log_path}"]
    write_json(run.summary_path, {**json.loads(run.summary_path.read_text()), "doubts": doubts})
    run.log_path.write_text(
        f"/old/acme/all/run: acme-host:8000 is gone, and acme-other:8000 too\nsynced to '{private}/shared'\n"
    )
    monkeypatch.chdir(private)
    for path in (run.path, Path("run"), Path("../acme place/run")):
        text = Parsed(write_report(path).path.read_text()).text
        assert "acme" not in text
        for part in (
            "model is odd",
            "rows.jsonl: line 3 is odd",
            "see run/log.txt",
            "popo-lite chat run",
            "run: ... is",
        ):
            assert part in text, part
        (run.path / "report.html").unlink()


def test_only_a_report_is_replaced(tmp_path):
    run, mine = make_run(tmp_path / "run", 3), tmp_path / "notes.html"
    mine.write_text("<p>mine</p>")
    refused = CliRunner().invoke(main, ["report", str(run.path), "--output", str(mine)])
    assert refused.exit_code == 2
    assert mine.read_text() == "<p>mine</p>"
    for _ in range(2):
        write_report(run.path, tmp_path / "new.html")


def test_steps_that_changed_nothing_leave_gaps(tmp_path):
    run = make_run(tmp_path / "run", 9)
    skipped = dict.fromkeys(EMPTIED) | {"skipped_reason": "no prompt has a positive"}
    write_lines(run.metrics_path, [record(step, **(skipped if step % 3 else {})) for step in range(9)])
    page = Parsed(write_report(run.path).path.read_text())
    assert "6 of 9 steps changed nothing: no prompt has a positive" in page.text
    write_lines(run.metrics_path, [record(step, **skipped) for step in range(9)])
    page = Parsed(write_report(run.path).path.read_text())
    titles = {
        json.loads(attributes["data-chart"])["series"][0]["label"] for tag, attributes in page.tags if tag == "figure"
    }
    assert "training" in titles
    assert not titles & {"loss", "gradient norm", "cosine"}


def test_long_runs_have_small_pages(tmp_path):
    run = make_run(tmp_path / "run", 5000, of=5000)
    write_lines(run.samples_path, [group(step, f"problem/{step % 700}", "word " * 3000) for step in range(300)])
    path = write_report(run.path).path
    assert path.stat().st_size < 1_000_000


def test_thinning_keeps_the_least_and_the_largest():
    points = [(float(x), 1.0) for x in range(5000)]
    points[1234], points[3210], points[4000] = (1234.0, 9.0), (3210.0, -9.0), (4000.0, None)
    kept = thinned(points)
    assert len(kept) <= 2 * BUCKETS
    assert {points[1234], points[3210]} <= set(kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thinned([(float(x), None) for x in range(5000)])[0] == (0.0, None)
    assert smoothed([1.0, None, 3.0, 8.0], 3) == [1.0, None, 5.5, 5.5]


def test_prompts_that_come_again_are_shown_first(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_lines(path, [group(step, "again" if step in (2, 50, 90) else f"problem/{step}") for step in range(100)])
    rows = chosen_samples(path)
    assert len(rows) == ROWS
    assert [card["step"] for card in rows[0]["cards"]] == [3, 51, 91]
    early, middle, late = (card["step"] for card in rows[1]["cards"])
    assert early < 20 < 40 < middle < 60 < 80 < late


def test_damaged_metrics_are_refused(tmp_path):
    run = make_run(tmp_path / "run", 3)
    for line in ("nonsense", '{"step": "1"}', '{"step": 1e300}', '{"format": 99, "step": 1}', "[1]"):
        run.metrics_path.write_text(f"{json.dumps(record(0))}\n{line}\n")
        with pytest.raises(CheckpointError):
            write_report(run.path)


def test_a_run_of_the_first_format(tmp_path):
    report = write_report(Path(__file__).parent.parent / "fixtures" / "run-version-0", tmp_path / "page.html")
    assert report.verdict.startswith("pass@1 did not change measurably: from 25.0%")


def test_a_strangers_link_is_not_followed(tmp_path):
    run, precious = make_run(tmp_path / "run", 1), tmp_path / "precious"
    precious.write_text("mine")
    for name in ("report.html", ".report.html.partial"):
        (run.path / name).symlink_to(precious)
    write_report(run.path)
    assert precious.read_text() == "mine"
    assert (run.path / "report.html").is_file()


def test_secrets_and_folders_are_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", 'a<b>&"secret-of-mine')
    monkeypatch.setenv("HOME", str(tmp_path))
    run = make_run(tmp_path / "run", 2, recipe=["output.dir=/srv/private-place", f"data.dataset={tmp_path}/rows.jsonl"])
    secret = 'a<b>&"secret-of-mine'
    write_lines(run.samples_path, [group(0, "p", f"{secret} https://me:hunter22@host.invalid {tmp_path}/file")])
    run.log_path.write_text(f"token {secret}\n")
    page = write_report(run.path).path.read_text()
    shown = html.unescape(page)
    for private in ("secret-of-mine", "hunter22", "private-place", str(tmp_path)):
        assert private not in shown
    assert "~/file" in page


def test_hostile_texts_stay_text(hostile):
    page = hostile.read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert {tag for tag, _ in parsed.tags} <= set(TAGS.split())
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    for _, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert "<script>document.title='owned'</script>" in parsed.text  # an answer, shown as text
    assert "{{ 7 * 7 }}" in parsed.text


@pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs chromium")
def test_in_a_browser(hostile, tmp_path):
    """No request, no foreign script, nothing wider than the window, dark and light, with and without JavaScript."""
    playwright = pytest.importorskip("playwright.sync_api")
    pages = {"hostile": hostile, "running": write_report(make_run(tmp_path / "a", 20).path).path,
             "no step": write_report(make_run(tmp_path / "b", 0).path).path,
             "finished": write_report(make_run(tmp_path / "c", 60).path).path}  # fmt: skip
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        for name, path in pages.items():
            screens = ((390, "dark", True), (1280, "light", True), (390, "light", False))
            for width, scheme, scripts in screens if name == "hostile" else screens[:1]:
                context = browser.new_context(
                    viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts
                )
                page, requests, errors = context.new_page(), [], []
                page.on("request", lambda request, seen=requests: seen.append(request.url))
                page.on("console", lambda message, seen=errors: seen.append(message.text))
                page.on("pageerror", lambda error, seen=errors: seen.append(str(error)))
                page.goto(path.as_uri())
                assert requests == [path.as_uri()], name
                assert errors == [], name
                assert page.title() != "owned"
                sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
                assert sizes == [width, width], name
                background = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 21, 23)"}[scheme]
                if name == "finished" and scripts:
                    page.hover(".plot >> nth=0")
                    assert "training" in page.inner_text(".tip >> nth=0")
                context.close()
        browser.close()
