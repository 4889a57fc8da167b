"""What people see of hostile text: on a terminal no control sequence but our own, in a file no padding."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from corpus import corpus

from helpers import record
from popo_lite.errors import DataError
from popo_lite.tools.console import words
from popo_lite.tools.console.output import closing_report, eval_report, open_console, print_error, table
from popo_lite.tools.console.views import PlainView
from popo_lite.types import Completion, EvalResult, FinishReason

TEXTS = [text[:5000] for case in corpus() for text in (case.text, case.reference)]
OWN = re.compile(r"\x1b\[(?:[0-9;]*m|\?(?:25|7|1049)[hl]|[0-9;]*[HJKA])")
"""Colours and styles; cursor, line wrapping and alternate screen on and off; moving and clearing. Nothing else."""
CONTROL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\ufe00-\ufe0f\U000e0000-\U000e0fff]"
)


def assert_harmless(shown: str) -> None:
    found = CONTROL.search(OWN.sub("", shown))
    assert not found, repr(shown[max(found.start() - 40, 0) : found.end() + 40])


@pytest.mark.parametrize("show", [words.clean, words.printable])
def test_nothing_is_painted_by_text(show):
    for text in TEXTS:
        assert_harmless(show(text))


def test_accents_do_not_climb_over_other_lines():
    assert words.clean("e" + "\u0301" * 500 + "x") == "e" + "\u0301" * 3 + "x"


def test_code_keeps_its_lines_and_blanks():
    code = "def f(x):\n    return  x\n\n\tpass"
    assert words.printable(code) == "def f(x):\n    return  x\n\n        pass"


REPORTS = """
import sys
sys.path[:0] = [{hostile!r}, {tests!r}]
from corpus import corpus
from helpers import record
from popo_lite.errors import DataError
from popo_lite.tools.console.output import *
from popo_lite.tools.console.views import open_view
from popo_lite.types import EvalResult
texts = [text[:3000] for case in corpus() for text in (case.text, case.reference)][{start}::{stride}]
view = open_view({mode!r})
with view:
    view.start(title=texts[0], facts=dict(zip(texts, texts[1:])), total_steps=len(texts), first_step=0)
    for step, text in enumerate(texts[:60]):
        view.stage(text[:200])
        view.message(text)
        view.samples([{{"step": step, "question": text, "reference": text, "right": text, "wrong": texts[step - 1]}}])
        view.step(record(step, skipped_reason=text, top_shape=text, rewards={{text[:100]: 0.5, "b": 0.1}},
                         task_figures={{text[:100]: 0.5}}))
        print(text, flush=True)
        if hasattr(view, "render"):
            view.render()
for text in texts:
    print_error(DataError(text, where=text, next_step=text))
    notify(text)
    write(text, sys.stdout)
    table(text[:100], [text[:100], "b"], [[text[:100], text[:100]]])
facts = dict(problems=1, samples_per_problem=1, pass_at_1=0.5, pass_at_k={{1: 0.5}}, truncated_ratio=0.0,
             completion_tokens_mean=1.0)
for text in texts[:20]:
    weights = [text[:200], text[200:400] + "other"]
    eval_report([EvalResult(weights=name, unreadable=1, ungraded_ratio=0.0, rollout_tokens=1, seconds=1.0,
                            pass_rates=(0.5,), task_figures={{text[:100]: 0.5}}, **facts) for name in weights])
    closing_report(dict(before=None, after={{**facts, "task_figures": {{text[:100]: 0.5}}}}, siamese=None, steps=1,
                        seconds={{text[:100]: 1.0}}, rollout_tokens=1, trained_tokens=1, shared_tokens=1,
                        peak_memory_bytes=1, siamese_extra_bytes=1, quantized_modules=1, output=text), [text])
"""


def on_a_terminal(code: str) -> str:
    """What a process writes to a terminal of 100 x 40."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as run:
        os.close(slave)
        received = b""
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # the terminal is closed
                break
            if not data:
                break
            received += data
    os.close(master)
    assert run.returncode == 0, received[-2000:].decode(errors="replace")
    return received.decode(errors="surrogateescape").replace("\r\n", "\n")


@pytest.mark.parametrize("mode", ["live", "plain"])
def test_views_errors_tables_and_reports_on_a_terminal(mode):
    hostile = Path(__file__).parent
    # What other code prints goes straight to the terminal in the plain view: it is not ours.
    code = REPORTS if mode == "live" else REPORTS.replace("        print(text, flush=True)\n", "")
    shown = on_a_terminal(code.format(hostile=str(hostile), tests=str(hostile.parent), start=0, stride=3, mode=mode))
    assert "\u2713 right" in shown if mode == "live" else "SKIPPED:" in shown
    assert_harmless(shown)


@pytest.mark.parametrize("name", ["error", "table", "eval", "closing", "plain"])
def test_a_file_has_no_padding(name):
    stream, long = io.StringIO(), "word " * 100
    console = open_console(stream)
    if name == "error":
        print_error(DataError(f"{long}\nmore", where=long, next_step=long), console)
    elif name == "table":
        table("title", ["a", "b"], [["x", long], ["y", "z"]], console)
    elif name == "eval":
        shared = dict.fromkeys(
            ("truncated_ratio", "ungraded_ratio", "completion_tokens_mean", "seconds", "pass_at_1"), 0.5
        )
        shared |= dict.fromkeys(("problems", "unreadable", "samples_per_problem"), 1)
        shared |= {"pass_at_k": {1: 0.5}, "task_figures": {}}
        eval_report([EvalResult(weights=w, rollout_tokens=1, pass_rates=(0.5,), **shared) for w in ("a", "b")], console)
    elif name == "closing":
        sizes = ("trained_tokens", "shared_tokens", "peak_memory_bytes", "siamese_extra_bytes", "quantized_modules")
        counts = dict.fromkeys(("steps", "rollout_tokens", *sizes), 1)
        closing_report({"seconds": {"update": 1.0, "rollout": 9.0}, "output": long, **counts}, [long], console)
    else:
        with PlainView(stream) as view:
            view.start(title=long, facts={"a": long, "b": "x"}, total_steps=3, first_step=0)
            view.message(f"{long}\nmore")
            view.step(record(0))
    lines = stream.getvalue().split("\n")
    assert len(lines) > 3
    assert [line for line in lines if line != line.rstrip()] == []


def test_generate_paints_nothing_and_its_json_is_exact(monkeypatch, tmp_path):
    """The command itself, with a sampler that answers with the corpus."""
    from popo_lite.samplers import hf
    from popo_lite.tools import generate

    def sample(self, prompts, *, count, **_):
        return [
            [Completion(token_ids=(1,), sampler_logps=(0.0,), finish_reason=FinishReason.STOP, text=t) for t in TEXTS]
        ]

    monkeypatch.setattr(hf.HFSampler, "sample", sample)
    run = finished(tmp_path)
    shown = CliRunner().invoke(generate.generate, [str(run), "\x1b[2J\u202e?"], catch_exceptions=False).output
    assert_harmless(shown)
    assert "\\boxed{42}" in shown
    printed = CliRunner().invoke(generate.generate, [str(run), "\x1b[2J?", "--json"], catch_exceptions=False).output
    assert re.fullmatch(r"[\x20-\x7e]+\n", printed)
    assert [answer["text"] for answer in json.loads(printed)["answers"]] == TEXTS


@pytest.mark.parametrize("as_json", [False, True])
def test_export_paints_nothing_and_neither_does_its_card(as_json, monkeypatch, tmp_path):
    """The command itself, of a stranger's run: its doubts, changes and figures are the corpus."""
    from popo_lite.tools.export.command import export
    from popo_lite.tools.push import push

    run = finished(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    texts = [text[:300] for text in TEXTS]
    summary["doubts"] = texts
    summary["changes"] = [{"step": 1, "key": t, "before": None, "now": t} for t in texts]
    summary["changes"] += [{"step": 1, "key": "optimizer.schedule", "before": t, "now": t} for t in texts]
    summary["after"]["task_figures"] = dict.fromkeys(texts, 0.5)
    (run / "summary.json").write_text(json.dumps(summary))
    options = ["--json"] if as_json else []
    found = CliRunner().invoke(export, [str(run), "--what", "adapter", *options], catch_exceptions=False)
    assert found.exit_code == 0
    assert "boxed{42}" in found.stderr  # the notices
    assert_harmless(found.stderr)
    assert_harmless(found.stdout)
    planned = CliRunner().invoke(push, [str(run), "me/it", "--dry-run", *options], catch_exceptions=False)
    assert planned.exit_code == 0
    assert "boxed{42}" in planned.stdout
    assert_harmless(planned.stdout)
    card = (run / "export" / "adapter-policy" / "README.md").read_text()
    assert_harmless(card)
    assert "boxed{42}" in card.partition("## Doubts")[2].partition("## Method")[0]
    assert re.search(r"(?<!\\)<[a-zA-Z/!]", re.sub("```.*?```", "", card, flags=re.DOTALL)) is None


def test_an_uncaught_error_paints_nothing():
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from corpus import corpus
from popo_lite.cli import main
from popo_lite.tools import recipe_docs
def fail():
    raise RuntimeError("".join(text[:2000] for case in corpus() for text in (case.text, case.reference)))
recipe_docs.template_toml = fail
main(["recipe", "show"], standalone_mode=False)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert shown.returncode == 1
    text = shown.stderr.decode()
    assert "Traceback" in text
    assert "boxed{42}" in text
    assert_harmless(text)


def finished(folder: Path) -> Path:
    from runs import finished_run

    return finished_run(folder / "run").path
