"""Test `popo-lite init`: what it finds out, that its recipes are valid and fit, and that it asks, refuses and keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from httpx import Request, Response
from huggingface_hub.errors import GatedRepoError

from popo_lite.cli import main
from popo_lite.recipe_file import load_recipe
from popo_lite.tasks import open_tasks
from popo_lite.tools.init import command, draft
from popo_lite.tools.init.data import kind_of
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.vram import plan_memory
from popo_lite.trust import refuse_untrusted

GIB = 2**30


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("popo_lite.tools.init.draft.installed_gpu", lambda: None)
    return tmp_path


def init(*arguments: str, answers: str | None = None) -> Result:
    return CliRunner().invoke(main, ["init", *arguments], input=answers)


def written(*arguments: str) -> dict[str, Any]:
    """What was decided, by `--json`."""
    done = init(*arguments, "--yes", "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write_rows(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


@pytest.mark.parametrize(
    ("model", "data", "card"),
    [
        ("tiny", "arithmetic", "cpu"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "comparison", "cpu"),
        ("Qwen/Qwen3-1.7B", "gsm8k", "8GiB"),
        ("Qwen/Qwen3-4B", "gsm8k", "12GiB"),
        ("Qwen/Qwen2.5-7B-Instruct", "math500", "24GiB"),
        ("meta-llama/Llama-3.1-8B-Instruct", "deepscaler", "8GiB"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "deepscaler", "16GiB"),
    ],
)
def test_the_recipe_is_valid_and_fits(model: str, data: str, card: str) -> None:
    found = written("--model", model, "--data", data, "--card", card, "--output", "mine.toml")
    assert CliRunner().invoke(main, ["recipe", "check", "mine.toml"]).exit_code == 0
    planned = CliRunner().invoke(main, ["plan", "mine.toml", *(() if card == "cpu" else ("--vram", card))])
    assert planned.exit_code == 0, planned.output
    recipe = load_recipe("mine.toml")
    assert recipe.model.trust_remote_code is False
    assert plan_memory(recipe, load_shape(recipe.model), vram_bytes=found["card"]["memory_bytes"]).fits
    assert (found["fits"], found["next"][-1]) == (True, "popo-lite train mine.toml")
    assert all(setting["why"] for key, setting in found["settings"].items() if key != "train.device")


def test_a_shipped_answer_length_is_for_the_same_data() -> None:
    model, rows = "HuggingFaceTB/SmolLM2-135M-Instruct", [{"question": f"{n} + 1?", "answer": n + 1} for n in range(40)]
    for data, tokens in (("comparison", 8), (write_rows("sums.jsonl", rows), draft.LONGEST_ON_CPU)):
        found = written("--model", model, "--data", data, "--card", "cpu", "--output", f"{tokens}.toml")
        assert load_recipe(f"{tokens}.toml").rollout.max_completion_length == tokens
        assert found["next"][1:] == [
            f"popo-lite bench {tokens}.toml --prompts 1 --steps 1", f"popo-lite train {tokens}.toml",
        ]  # fmt: skip


def test_what_the_plan_changed_says_why() -> None:
    found = written("--model", "Qwen/Qwen3-4B", "--data", "gsm8k", "--card", "12GiB", "--output", "mine.toml")
    assert found["settings"]["rollout.vllm.base"]["value"] == "nf4"
    assert "vLLM's share lacked" in found["settings"]["rollout.vllm.base"]["why"]
    assert "# so that it fits: vLLM's share lacked" in Path("mine.toml").read_text()


def test_a_model_that_does_not_fit_is_refused_with_one_that_does() -> None:
    done = init("--model", "meta-llama/Llama-3.1-8B-Instruct", "--data", "gsm8k", "--card", "4GiB", "--yes")
    assert done.exit_code == 2
    assert "no setting makes it fit" in done.stderr
    assert not list(Path.cwd().iterdir())
    smaller = done.stderr.partition("--model ")[2].split()[0]
    written("--model", smaller, "--data", "gsm8k", "--card", "4GiB", "--output", "smaller.toml")


def test_a_thinking_model_is_told_not_to_think_or_never_rewarded_for_a_truncated_answer() -> None:
    written("--model", "Qwen/Qwen3-1.7B", "--data", "gsm8k", "--card", "24GiB", "--output", "qwen.toml")
    assert (load_recipe("qwen.toml").data.system_prompt or "").endswith("/no_think")
    distillate = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    written("--model", distillate, "--data", "gsm8k", "--card", "24GiB", "--output", "r1.toml")
    r1 = load_recipe("r1.toml")
    assert (r1.reward.truncated, r1.data.system_prompt) == ("wrong", None)
    assert "<think>" in (r1.data.chat_template or "")


def test_offline_it_goes_on_with_what_is_known() -> None:
    found = written("--model", "someone/unknown", "--data", "gsm8k", "--card", "24GiB", "--output", "mine.toml")
    assert (found["fits"], found["next"]) == (None, ["popo-lite train mine.toml"])
    assert found["notes"][0] == "could not look at the size of someone/unknown: offline"
    assert "could not look at gsm8k: offline" in Path("mine.toml").read_text()


def test_a_gated_model_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object, **__: object) -> None:
        raise GatedRepoError("gated", response=Response(403, request=Request("GET", "https://huggingface.co")))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    done = init("--model", "someone/gated", "--data", "gsm8k", "--card", "24GiB", "--yes")
    assert done.exit_code == 2
    assert "is gated" in done.stderr
    assert "accept its licence at https://huggingface.co/someone/gated" in " ".join(done.stderr.split())


# --------------------------------------------------------------------------- data and reward


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["4", "-3", "1,200", "2.5"], "number"),
        ([r"\frac{1}{2}", "x^2", "7"], "math"),
        (["A", "C", "(B)"], "choice"),
        (["C. Paris", "A. Rome"], "choice"),
        (["A cat", "A dog", "B flat"], "short text"),
        ([*map(str, range(39)), "n/a"], "number"),
        (['{"a": 1}', '{"a": 2}'], "json"),
        (['["assert f(1) == 2"]', "assert f(2) == 3"], "tests"),
        (['[{"input": "1", "output": "2"}]'], "tests"),
        (["Paris", "New York"], "short text"),
        (["Because the sun warms the ground, which in turn warms the air above it."], "free text"),
    ],
)
def test_kinds_of_answers(answers: list[str], kind: str) -> None:
    assert kind_of(answers) == kind


def test_json_references_become_a_schema_and_grade_right() -> None:
    rows = [{"text": f"Ann is {n}.", "record": json.dumps({"name": "Ann", "age": n})} for n in range(30)]
    found = written(
        "--model", "tiny", "--data", write_rows("people.jsonl", rows), "--card", "cpu", "--output", "r.toml"
    )
    recipe = load_recipe("r.toml")
    assert (recipe.data.prompt_column, recipe.data.answer_column) == ("text", "record")
    [function] = found["settings"]["reward.functions"]["value"]
    assert function["schema"]["properties"] == {"name": {"type": "string"}, "age": {"type": "integer"}}
    assert len(found["references"]) == 3
    assert all(trial["is_right"] and not trial["empty_is_right"] for trial in found["references"])
    assert recipe.eval.problems == 6
    assert recipe.rollout.max_prompt_length == 32


def test_choices_and_code() -> None:
    rows: list[dict[str, Any]] = [{"question": f"Which is {n}? A..E", "answer": "ABCDE"[n % 5]} for n in range(20)]
    found = written("--model", "tiny", "--data", write_rows("quiz.jsonl", rows), "--card", "cpu", "--output", "a.toml")
    assert found["settings"]["reward.functions"]["value"] == [{"name": "choice", "choices": 5}]
    rows = [{"prompt": f"Write f(x): x + {n}", "answer": f"assert f(1) == {n + 1}"} for n in range(9)]
    rows = [{**row, "solution": f"def f(x): return x + {n}"} for n, row in enumerate(rows)]
    found = written("--model", "tiny", "--data", write_rows("code.jsonl", rows), "--card", "cpu", "--output", "b.toml")
    assert found["settings"]["reward.functions"]["value"] == "python_tests"
    assert [trial["is_right"] for trial in found["references"]] == [True] * 3


@pytest.mark.parametrize(("rows", "different", "held_out"), [(1, 1, 0), (100, 3, 1), (40, 40, 8)])
def test_what_is_held_out_leaves_a_question_to_train_on(rows: int, different: int, held_out: int) -> None:
    data = write_rows("few.jsonl", [{"question": f"{n % different}+1?", "answer": "2"} for n in range(rows)])
    found = written("--model", "tiny", "--data", data, "--card", "cpu", "--output", "few.toml")
    recipe = load_recipe("few.toml")
    open_tasks(recipe)[1].held_out(recipe.eval.problems)
    assert recipe.eval.problems == held_out
    assert any("questions differ" in note for note in found["notes"]) == (different < rows)


def test_data_that_cannot_be_split_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "_evaluation", lambda *_: {"eval.problems": draft.Setting(9, "too many")})
    data = write_rows("few.jsonl", [{"question": f"{n}+1?", "answer": "2"} for n in range(9)])
    done = init("--model", "tiny", "--data", data, "--card", "cpu", "--yes")
    assert (done.exit_code, "at least one has to stay" in " ".join(done.stderr.split())) == (2, True)
    assert not list(Path.cwd().glob("*.toml"))


@pytest.mark.parametrize(
    ("row", "column"),
    [({"question": "Which?", "choices": ["x", "y"], "answer": "A"}, "choices"),
     ({"instruction": "Add them.", "input": "1 2", "output": "3"}, "input")],
)  # fmt: skip
def test_a_column_that_the_question_may_need_is_named(row: dict[str, Any], column: str) -> None:
    data = write_rows("rows.jsonl", [{**row, next(iter(row)): f"{n}. {row[next(iter(row))]}"} for n in range(9)])
    found = written("--model", "tiny", "--data", data, "--card", "cpu", "--output", "r.toml")
    assert f'column "{column}" is not in the prompts' in found["notes"][0]


def test_a_few_odd_answers_are_named_and_not_tried() -> None:
    rows = [{"question": f"{n}+1?", "answer": "n/a" if n == 0 else str(n + 1)} for n in range(60)]
    found = written("--model", "tiny", "--data", write_rows("s.jsonl", rows), "--card", "cpu", "--output", "s.toml")
    assert found["settings"]["reward.functions"]["value"] == "math"
    assert found["notes"][0] == "1 of the first 60 answers are not numbers (s.jsonl/1: 'n/a')"
    assert all(trial["is_right"] for trial in found["references"])


def test_columns_of_built_in_data_are_refused() -> None:
    done = init("--model", "tiny", "--data", "gsm8k", "--prompt-column", "x", "--card", "cpu", "--yes")
    assert (done.exit_code, "gsm8k has no columns to choose" in done.stderr) == (2, True)


def test_a_reward_that_cannot_grade_the_references_is_refused() -> None:
    rows = [{"question": f"Say {word}", "answer": word} for word in ("one", "two", "three", "four")]
    data = write_rows("words.jsonl", rows)
    done = init("--model", "tiny", "--data", data, "--card", "cpu", "--reward", "numeric", "--yes")
    assert done.exit_code == 2
    assert "given as answer is not right" in " ".join(done.stderr.split())
    assert not list(Path.cwd().glob("*.toml"))


def test_free_text_needs_a_function_of_your_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"question": f"Why {n}?", "answer": "Because of the long and winding road that leads there."} for n in range(4)
    ]
    data = write_rows("why.jsonl", rows)
    done = init("--model", "tiny", "--data", data, "--card", "cpu", "--yes")
    assert done.exit_code == 2
    assert "give --reward" in done.stderr
    Path("my_rewards.py").write_text("def long(text, problem):\n    return len(text) > 5\n")
    Path("lax_rewards.py").write_text("def anything(text, problem):\n    return True\n")
    found = written(
        "--model", "tiny", "--data", data, "--card", "cpu", "--reward", "my_rewards:long", "--output", "o.toml"
    )
    assert found["references"][0]["is_right"] is True
    refuse_untrusted(load_recipe("o.toml"), "o.toml")  # it was typed here, so that training needs no --trust
    done = init("--model", "tiny", "--data", data, "--card", "cpu", "--reward", "lax_rewards:anything", "--yes")
    assert done.exit_code == 2
    assert "an empty answer" in done.stderr
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


def test_names_of_columns_are_shown_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "is_terminal", lambda: True)
    rows = [{"text": f"{n} + 1?", "a\x1b[31mb": n + 1} for n in range(9)]
    write_rows("odd.jsonl", rows)
    done = init("--model", "tiny", "--data", "odd.jsonl", "--card", "cpu", "--reward", "math", "--output", "o.toml",
                answers="text\na\x1b[31mb\n")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "\x1b[31m" not in done.output.replace("a\x1b[31mb\n", "")  # what was typed is echoed
    assert "\x1b" not in Path("o.toml").read_text()


def test_options_of_a_built_in_function() -> None:
    reward = '{name = "numeric", tolerance = 0.5}'
    written("--model", "tiny", "--data", "arithmetic", "--reward", reward, "--card", "cpu", "--output", "r.toml")
    [function] = load_recipe("r.toml").reward.functions or ()
    assert function.model_dump()["tolerance"] == 0.5


# --------------------------------------------------------------------------- the conversation


def test_without_a_terminal_missing_options_are_listed() -> None:
    done = init("--model", "tiny")
    assert done.exit_code == 2
    assert "--data, --reward, --card, --output" in " ".join(done.stderr.split())
    assert not list(Path.cwd().iterdir())


def test_it_never_overwrites() -> None:
    Path("mine.toml").write_text("precious")
    done = init("--model", "tiny", "--data", "arithmetic", "--card", "cpu", "--yes", "--output", "mine.toml")
    assert done.exit_code == 2
    assert "--output mine-2.toml" in done.stderr
    assert Path("mine.toml").read_text() == "precious"
    done = init("--model", "tiny", "--data", "arithmetic", "--card", "cpu", "--yes", "--output", "no/x.toml")
    assert (done.exit_code, "mkdir -p no" in done.stderr) == (2, True)
    first, second = (written("--model", "tiny", "--data", "arithmetic", "--card", "cpu")["recipe"] for _ in range(2))
    assert (first, second) == ("tiny_arithmetic.toml", "tiny_arithmetic-2.toml")


def test_it_asks_again_and_takes_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "is_terminal", lambda: True)
    Path("taken.toml").write_text("precious")
    answers = "./no-such-folder\n\nno-such-data\n\n\n24 cards\ncpu\ntaken.toml\nno/folder/x.toml\nmine.toml\n"
    done = init(answers=answers)
    assert done.exit_code == 0, done.output
    assert "there is no such folder" in done.output
    assert "is neither a known name" in done.output
    assert "'24 cards' is no amount of memory" in done.output
    assert "taken.toml exists and is not overwritten" in done.output
    assert "there is no folder no/folder" in done.output
    assert "popo-lite train mine.toml" in done.output
    recipe = load_recipe("mine.toml")
    assert (recipe.model.id, recipe.data.dataset, recipe.train.device) == ("tiny", "arithmetic", "cpu")
    assert Path("taken.toml").read_text() == "precious"
