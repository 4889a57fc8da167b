"""Problems from files of all four formats, and from folders laid out like the Hub datasets we know by name."""

from __future__ import annotations

import codecs
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset

from popo_lite.errors import DataError
from popo_lite.recipe import DataRecipe, DatasetRecipe, EvalRecipe
from popo_lite.tasks import Task
from popo_lite.tasks.datasets import DatasetTask, changes

Rows = list[dict[str, Any]]

DEEPSCALER: Rows = [
    {
        "problem": "Calculate the sum $\\frac{1}{2}+\\frac{1}{6}$ and give a fraction in lowest terms.",
        "answer": "\\frac{2}{3}",
        "solution": "We have $\\frac{3}{6}+\\frac{1}{6}=\\frac{4}{6}=\\frac{2}{3}$.",
    },
    {"problem": "How many primes are smaller than 12?", "answer": "5", "solution": ""},
]
GSM8K: Rows = [
    {
        "question": "A farmer sells 40 crates at $30 each. How much does she earn?",
        "answer": "She earns 40*30 = $<<40*30=1200>>1200.\n#### 1,200",
    },
    {"question": "Tom owes 8 and pays 3. How far is he below zero?", "answer": "3-8 = <<3-8=-5>>-5\n#### -5"},
]
MATH500: Rows = [
    {
        "problem": f"Convert the point $(0,{n})$ to polar coordinates.",
        "solution": "Draw it. The answer is $\\boxed{...}$.",
        "answer": f"\\left( {n}, \\frac{{\\pi}}{{2}} \\right)",
        "subject": "Precalculus" if n % 2 else "Algebra",
        "level": 1 + n % 5,
        "unique_id": f"test/precalculus/{n}.json",
    }
    for n in range(1, 11)
]
SUMS: Rows = [{"prompt": f"What is {n} + 1?", "answer": n + 1} for n in range(30)]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write(name: str, rows: Rows) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return name


def write_hub_layout(hub_id: str, config: str, splits: dict[str, Rows]) -> None:
    """A folder that `load_dataset(hub_id)` takes in place of the Hub: parquet files and a card that names them."""
    card = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        write(f"{hub_id}/{config}/{split}-00000-of-00001.parquet", rows)
        card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    Path(hub_id, "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def train(dataset: str, *, held_out: int = 0, **keys: Any) -> DatasetTask:
    return DatasetTask(DataRecipe(dataset=dataset, **keys), section="data", held_out=held_out)


def evaluate(dataset: str, **keys: Any) -> DatasetTask:
    return DatasetTask(EvalRecipe(dataset=dataset, **keys), section="eval")


def run_command(next_step: str, before: str) -> None:
    subprocess.run(["sh", "-c", next_step.removeprefix(before)], check=True)


def refused(dataset: str, **keys: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        train(dataset, **keys)
    assert caught.value.exit_code == 2
    assert caught.value.next_step
    return caught.value


def train_size(task: DatasetTask) -> int:
    return len(list(task.longest_candidates()))


def epoch(task: DatasetTask, seed: int = 0, number: int = 0) -> list[str]:
    size = train_size(task)
    return [task.train_problem(seed, index).id for index in range(number * size, (number + 1) * size)]


class TestFormats:
    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
    def test_every_format_gives_the_same_problems(self, suffix: str) -> None:
        task = train(write(f"sums{suffix}", SUMS))
        problems = {problem.id: problem for problem in (task.train_problem(0, index) for index in range(30))}
        assert task.name == f"sums{suffix}"
        assert set(problems) == {f"sums{suffix}/{row}" for row in range(1, 31)}
        third = problems[f"sums{suffix}/3"]
        assert third.messages == ({"role": "user", "content": "What is 2 + 1?"},)
        assert (third.answer, third.meta.keys()) == ("3", {"answer"})
        assert third.meta["answer"] in (3, "3")  # CSV holds only text

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
    def test_the_shape_of_math500_in_every_format(self, suffix: str) -> None:
        task = evaluate(write(f"math{suffix}", MATH500), filter={"level": (2, 3), "subject": "Precalculus"})
        (problem,) = task.held_out(1)
        assert problem.id == "test/precalculus/1.json"
        assert problem.answer == "\\left( 1, \\frac{\\pi}{2} \\right)"
        assert problem.meta["subject"] == "Precalculus"
        assert str(problem.meta["level"]) == "2"

    def test_json_lines_under_the_name_json(self) -> None:
        write("sums.jsonl", SUMS)
        Path("sums.jsonl").rename("sums.json")
        assert train_size(train("sums.json")) == 30

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        write("sums.jsonl", SUMS)
        assert train_size(train("~/sums.jsonl")) == 30

    def test_a_rewritten_parquet_file_is_read_anew(self) -> None:
        write("x.parquet", [{"prompt": "a", "answer": "1"}])
        assert train("x.parquet").train_problem(0, 0).answer == "1"
        write("x.parquet", [{"prompt": "a", "answer": "2"}])
        assert train("x.parquet").train_problem(0, 0).answer == "2"

    def test_byte_order_mark_blank_lines_and_line_separators_in_strings(self) -> None:
        text = '\ufeff{"prompt": "a\u2028b", "answer": "1"}\n\n{"prompt": "c", "answer": "2"}\r\n'
        Path("x.jsonl").write_text(text, encoding="utf-8")
        found = {problem.question for problem in evaluate("x.jsonl").held_out(2)}
        assert found == {"a\u2028b", "c"}


class TestAnswers:
    @pytest.mark.parametrize(
        ("value", "answer"),
        [
            ("007", "007"),
            ("1e5", "1e5"),
            ("NA", "NA"),
            ("2020-01-02", "2020-01-02"),
            ("  x=3 ", "x=3"),
            ("1,000", "1,000"),
            (7, "7"),
            (-2.5, "-2.5"),
            (3.0, "3"),
            (10**24, "1000000000000000000000000"),
            ("grin \U0001f600", "grin \U0001f600"),
            ("work\n#### 1,234.50", "1234.50"),
            ("work\n#### (1,2)", "(1,2)"),
            ("work\n####5\n", "5"),
            ("A #### B", "A #### B"),
            ("#### Heading\ntext", "#### Heading\ntext"),
        ],
    )
    def test_answer_text(self, value: Any, answer: str) -> None:
        assert train(write("x.jsonl", [{"prompt": "q", "answer": value}])).train_problem(0, 0).answer == answer

    def test_csv_keeps_what_was_written(self) -> None:
        written = ["007", "1e5", "NA", "2020-01-02", "2.50"]
        task = evaluate(write("x.csv", [{"prompt": f"q{n}", "answer": text} for n, text in enumerate(written)]))
        assert {problem.question: problem.answer for problem in task.held_out(5)} == {
            f"q{n}": text for n, text in enumerate(written)
        }

    def test_numbers_and_text_in_one_column(self) -> None:
        values = [3, "x", 2.5, "04", 10**18]
        task = evaluate(write("x.jsonl", [{"prompt": f"q{n}", "answer": value} for n, value in enumerate(values)]))
        found = {problem.question: problem.answer for problem in task.held_out(5)}
        assert found == {"q0": "3", "q1": "x", "q2": "2.5", "q3": "04", "q4": "1000000000000000000"}


class TestMessagesAndMeta:
    def test_chat_messages_and_text_in_one_column(self) -> None:
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
        named = [{"role": "user", "content": "2 + 2?", "name": None}]
        rows = [
            {"prompt": chat, "answer": "2"},
            {"prompt": "3 + 3?", "answer": "6"},
            {"prompt": named, "answer": "4"},
        ]
        problems = {problem.answer: problem for problem in evaluate(write("x.jsonl", rows)).held_out(3)}
        assert problems["2"].messages == tuple(chat)
        assert problems["2"].question == "1 + 1?"
        assert problems["6"].messages == ({"role": "user", "content": "3 + 3?"},)
        assert problems["4"].messages == ({"role": "user", "content": "2 + 2?"},)

    def test_chat_messages_in_parquet(self) -> None:
        chat = [{"role": "user", "content": "1 + 1?"}]
        assert train(write("x.parquet", [{"prompt": chat, "answer": "2"}])).train_problem(0, 0).messages == (*chat,)

    @pytest.mark.parametrize(
        ("prompt", "fault"),
        [
            ([], "is empty"),
            (5, "is 5, neither text nor a list of chat messages"),
            ([{"role": "user"}], "for a message; it takes"),
            ([{"role": "user", "content": "a", "image": "b"}], "for a message; it takes"),
            (["text"], "has 'text' for a message"),
            ([{"role": "teacher", "content": "a"}], "has {'role': 'teacher', 'content': 'a'} for a message"),
            ([{"role": "user", "content": ["a"]}], "has {'role': 'user', 'content': ['a']} for a message"),
            ([{"role": "user", "content": " "}], "is empty"),
            ("half \ud83d", "holds half a surrogate pair"),
            ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], 'message of role "assistant"'),
        ],
    )
    def test_prompts_that_are_none(self, prompt: Any, fault: str) -> None:
        assert fault in refused(write("x.jsonl", [{"prompt": prompt, "answer": "1"}])).what

    def test_meta_is_json_of_bounded_length(self) -> None:
        row = {
            "prompt": "q",
            "answer": "1",
            "short": "s" * 1998,
            "long": "s" * 2001,
            "level": 3,
            "tags": ["a", "b"],
            "nested": {"k": 1.5},
            "nothing": None,
            "not_a_number": float("nan"),
        }
        meta = train(write("x.jsonl", [row])).train_problem(0, 0).meta
        short = {"level": 3, "tags": ["a", "b"], "nested": {"k": 1.5}, "nothing": None}
        assert meta == {"answer": "1", "short": "s" * 1998, **short}
        assert json.loads(json.dumps(meta)) == meta

    def test_it_is_a_task_without_figures(self) -> None:
        task: Task = train(write("x.jsonl", SUMS))
        assert task.figures(["1+1=2, so 2"]) == {}


class TestIds:
    def test_ids_do_not_move_under_filter_and_limit(self) -> None:
        rows = [{"prompt": f"q{n}", "answer": "1", "level": n % 3} for n in range(9)]
        write("x.jsonl", rows)
        assert set(epoch(train("x.jsonl", filter={"level": 2}))) == {"x.jsonl/3", "x.jsonl/6", "x.jsonl/9"}
        assert set(epoch(train("x.jsonl", filter={"level": 2}, limit=2))) == {"x.jsonl/3", "x.jsonl/6"}

    @pytest.mark.parametrize(
        ("ids", "own"),
        [(["a", "b"], True), ([7, 8], True), (["a", "a"], False), (["a", None], False), ([1.5, 2.5], False)],
    )
    def test_own_ids_where_they_are_unique(self, ids: list[Any], own: bool) -> None:
        rows = [{"id": one, "prompt": "q", "answer": "1"} for one in ids]
        expected = {str(one) for one in ids} if own else {"x.jsonl/1", "x.jsonl/2"}
        assert set(epoch(train(write("x.jsonl", rows)))) == expected


class TestTrainingStream:
    def test_every_epoch_is_another_permutation(self) -> None:
        task = train(write("x.jsonl", SUMS))
        epochs = [epoch(task, number=number) for number in range(6)]
        assert all(sorted(one) == sorted(epochs[0]) for one in epochs)
        assert len(set(epochs[0])) == train_size(task) == 30
        assert len({tuple(one) for one in epochs}) == 6

    def test_seeds_differ_and_calls_are_pure(self) -> None:
        write("x.jsonl", SUMS)
        one, other = train("x.jsonl"), train("x.jsonl")
        assert epoch(one, seed=1) != epoch(one, seed=2)
        # Backwards, from another object, and with more epochs in between than are remembered.
        backwards = [other.train_problem(1, index).id for index in reversed(range(300))]
        assert list(reversed(backwards)) == [one.train_problem(1, index).id for index in range(300)]

    def test_the_order_is_pinned(self) -> None:
        # A resumed run asks for the same indices again: a new order would repeat and skip problems silently.
        rows = [{"prompt": f"q{n}", "answer": "1"} for n in range(8)]
        assert [int(one.split("/")[1]) for one in epoch(train(write("x.jsonl", rows)))] == [3, 6, 8, 2, 5, 1, 7, 4]

    def test_opened_for_evaluation_it_trains_on_nothing(self) -> None:
        task = evaluate(write("x.jsonl", SUMS))
        assert train_size(task) == 0
        with pytest.raises(DataError, match="none of its rows is trained on"):
            task.train_problem(0, 0)


class TestLongestCandidates:
    def test_all_training_rows_most_bytes_first(self) -> None:
        chat = [{"role": "system", "content": "x" * 5}, {"role": "user", "content": "x" * 4}]
        prompts: list[Any] = ["x" * 8, "x" * 3, "\U0001f600" * 3, chat]
        task = train(write("x.jsonl", [{"prompt": prompt, "answer": "1"} for prompt in prompts]))
        assert [problem.id for problem in task.longest_candidates()] == [f"x.jsonl/{row}" for row in (3, 4, 1, 2)]

    def test_held_out_rows_are_none_of_them(self) -> None:
        task = train(write("x.jsonl", SUMS), held_out=10)
        assert sorted(problem.id for problem in task.longest_candidates()) == sorted(epoch(task))
        assert list(evaluate("x.jsonl").longest_candidates()) == []


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({"a": "1", "b": "2"}, ""),
        ({"b": "2", "a": "1"}, "the order changed"),
        ({"a": "3", "c": "2", "d": "4"}, "2 new, 1 gone, 1 changed"),
    ],
)
def test_changes_of_rows_are_counted(now: dict[str, str], found: str) -> None:
    assert changes({"a": "1", "b": "2"}, now) == found


class TestHeldOut:
    def test_held_out_and_training_share_no_question(self) -> None:
        rows = [*SUMS, *({"prompt": f"  What is {n} +\t1?\n", "answer": n + 1} for n in range(30))]
        task = train(write("x.jsonl", rows), held_out=10)
        held = task.held_out(10)
        trained = [task.train_problem(0, index) for index in range(train_size(task))]
        held_questions = {" ".join(problem.question.split()) for problem in held}
        assert len(held_questions) == 10
        assert train_size(task) == 40
        assert not held_questions & {" ".join(problem.question.split()) for problem in trained}
        assert len({problem.id for problem in trained}) == 40

    def test_the_choice_depends_on_questions_only(self) -> None:
        one = train(write("x.jsonl", SUMS), held_out=10).held_out(10)
        other = train(write("y.jsonl", SUMS[::-1]), held_out=10).held_out(10)
        assert [problem.question for problem in one] == [problem.question for problem in other]
        more = train("x.jsonl", held_out=20).held_out(20)
        assert more[:10] == one
        assert [problem.question for problem in one] != [row["prompt"] for row in SUMS[:10]]

    def test_chat_messages_are_told_apart_by_all_of_them(self) -> None:
        def chat(system: str) -> list[dict[str, str]]:
            return [{"role": "system", "content": system}, {"role": "user", "content": "q"}]

        rows = [{"prompt": chat(system), "answer": "1"} for system in ("a", "b", "a")]
        task = train(write("x.jsonl", rows), held_out=1)
        assert train_size(task) == (2 if task.held_out(1)[0].messages[0]["content"] == "b" else 1)

    def test_for_evaluation_a_sample_that_grows_with_count(self) -> None:
        task = evaluate(write("x.jsonl", SUMS))
        everything = task.held_out(30)
        assert len({problem.id for problem in everything}) == 30
        assert task.held_out(12) == everything[:12]
        assert [problem.id for problem in everything[:12]] != [f"x.jsonl/{row}" for row in range(1, 13)]

    def test_too_few_for_evaluation(self) -> None:
        with pytest.raises(DataError) as caught:
            evaluate(write("x.jsonl", SUMS)).held_out(31)
        assert str(caught.value) == (
            "eval.problems: 31 held-out problems are asked for; x.jsonl has 30\n  next: set eval.problems to at most 30"
        )

    def test_one_question_has_to_stay_for_training(self) -> None:
        rows = [*SUMS[:5], *SUMS[:5]]
        assert train_size(train(write("x.jsonl", rows), held_out=4)) == 2
        error = refused("x.jsonl", held_out=5)
        assert error.where == "eval.problems"
        assert "5 problems are to be held out of x.jsonl, which has 5 different questions" in error.what
        assert "at most 4" in str(error.next_step)


class TestKnownDatasets:
    def test_deepscaler(self) -> None:
        write_hub_layout("agentica-org/DeepScaleR-Preview-Dataset", "default", {"train": DEEPSCALER})
        task = train("deepscaler")
        problems = {problem.id: problem for problem in (task.train_problem(3, index) for index in range(2))}
        assert task.name == "deepscaler/train"
        assert problems["deepscaler/train/1"].answer == "\\frac{2}{3}"
        assert problems["deepscaler/train/1"].question == DEEPSCALER[0]["problem"]
        assert problems["deepscaler/train/2"].meta == {"answer": "5", "solution": ""}

    def test_deepscaler_has_nothing_for_evaluation(self) -> None:
        with pytest.raises(DataError, match="has no split for evaluation"):
            evaluate("deepscaler")

    def test_gsm8k_trains_on_train_and_evaluates_on_test(self) -> None:
        write_hub_layout("openai/gsm8k", "main", {"train": GSM8K[:1], "test": GSM8K[1:]})
        problem = train("gsm8k").train_problem(0, 0)
        assert (problem.id, problem.question, problem.answer) == ("gsm8k/train/1", GSM8K[0]["question"], "1200")
        (problem,) = evaluate("gsm8k").held_out(1)
        assert (problem.id, problem.question, problem.answer) == ("gsm8k/test/1", GSM8K[1]["question"], "-5")
        assert evaluate("gsm8k", split="train").held_out(1)[0].answer == "1200"

    def test_gsm8k_downloaded_as_a_file(self) -> None:
        assert train(write("train.parquet", GSM8K[:1])).train_problem(0, 0).answer == "1200"

    def test_math500(self) -> None:
        write_hub_layout("HuggingFaceH4/MATH-500", "default", {"test": MATH500})
        problems = evaluate("math500", filter={"level": (4, 5)}).held_out(4)
        assert {problem.id for problem in problems} == {f"test/precalculus/{n}.json" for n in (3, 4, 8, 9)}
        assert {problem.meta["level"] for problem in problems} == {4, 5}

    def test_a_known_name_with_another_column(self) -> None:
        write_hub_layout("agentica-org/DeepScaleR-Preview-Dataset", "default", {"train": DEEPSCALER[:1]})
        assert train("deepscaler", answer_column="solution").train_problem(0, 0).answer == DEEPSCALER[0]["solution"]

    def test_a_downloaded_folder(self) -> None:
        write_hub_layout("downloads/2026/sums", "default", {"train": SUMS[:20], "test": SUMS[20:]})
        task = train("downloads/2026/sums")
        assert (task.name, train_size(task)) == ("sums/train", 20)

    def test_a_hub_id_trains_on_train_and_evaluates_on_test(self) -> None:
        write_hub_layout("someone/sums", "default", {"train": SUMS[:20], "test": SUMS[20:]})
        assert train("someone/sums").name == "someone/sums/train"
        assert train_size(train("someone/sums")) == 20
        assert len(evaluate("someone/sums").held_out(10)) == 10


class TestColumns:
    @pytest.mark.parametrize("column", ["prompt", "problem", "question"])
    def test_usual_names_need_no_keys(self, column: str) -> None:
        assert train(write("x.jsonl", [{column: "q", "answer": "1"}])).train_problem(0, 0).question == "q"

    def test_named_columns(self) -> None:
        rows = [{"prompt": "not this", "input": "q", "answer": "not this", "gold": 4}]
        problem = train(write("x.jsonl", rows), prompt_column="input", answer_column="gold").train_problem(0, 0)
        assert (problem.question, problem.answer) == ("q", "4")
        assert problem.meta == {"prompt": "not this", "answer": "not this", "gold": 4}

    def test_a_missing_column_names_those_there_and_the_nearest(self) -> None:
        write("x.jsonl", [{"promt": "q", "answers": "1"}])
        error = refused("x.jsonl", prompt_column="prompt")
        assert str(error) == (
            'data.dataset "x.jsonl": has no column "prompt"; its columns are "promt", "answers"\n'
            '  next: name one of them in data.prompt_column, perhaps "promt"'
        )
        assert "data.answer_column" in str(refused("x.jsonl", prompt_column="promt").next_step)
        assert 'perhaps "promt"' in str(refused("x.jsonl").next_step)

    def test_no_usual_name(self) -> None:
        error = refused(write("x.jsonl", [{"input": "q", "output": "1"}]))
        assert "no prompt or problem or question for the column with the question" in error.what
        assert '"input", "output"' in error.what
        assert "data.prompt_column" in str(error.next_step)

    def test_two_usual_names_are_not_guessed_between(self) -> None:
        error = refused(write("x.jsonl", [{"prompt": "a", "question": "b", "answer": "1"}]))
        assert '"prompt", "question" for the column with the question' in error.what

    def test_the_section_is_named(self) -> None:
        with pytest.raises(DataError) as caught:
            evaluate(write("x.jsonl", SUMS), answer_column="gold")
        assert caught.value.where == 'eval.dataset "x.jsonl"'
        assert "eval.answer_column" in str(caught.value.next_step)


class TestRows:
    @pytest.mark.parametrize("count", [70, 69])
    def test_up_to_a_tenth_of_the_rows_is_left_out_and_more_are_refused(self, count: int) -> None:
        rows: Rows = [{"prompt": f"q{n}", "answer": "1"} for n in range(count)]
        rows[1] = {"prompt": "  ", "answer": ""}
        rows[2]["answer"] = ""
        rows[4]["answer"] = None
        rows[6]["answer"] = ["1"]
        rows[7]["answer"] = True
        rows[9]["prompt"] = 5
        rows[11] = {"prompt": "q"}
        write("x.jsonl", rows)
        listed = [
            '    row 2: column "prompt" is empty, column "answer" is empty',
            '    row 3: column "answer" is empty',
            '    row 5: column "answer" is empty',
            "    row 7: column \"answer\" is ['1'], neither text nor a number",
            '    row 8: column "answer" is True, neither text nor a number',
            "    and 2 more",
        ]
        if count == 69:
            error = refused("x.jsonl")
            assert error.what.splitlines() == ["7 of 69 rows cannot be used:", *listed]
            assert error.where == 'data.dataset "x.jsonl"'
            assert "data.filter" in str(error.next_step)
            return
        task = train("x.jsonl", held_out=20)
        (notice,) = task.notices
        assert notice.splitlines() == ["x.jsonl: 7 of 70 rows cannot be used and are left out:", *listed]
        used = {problem.id for problem in (*task.training(), *task.held_out(20))}
        assert used == {f"x.jsonl/{row}" for row in range(1, 71)} - {
            f"x.jsonl/{row}" for row in (2, 3, 5, 7, 8, 10, 12)
        }
        assert len(evaluate("x.jsonl").held_out(63)) == 63

    def test_training_rows_with_a_reason_are_dropped_and_named(self) -> None:
        task = train(write("x.jsonl", SUMS), held_out=10)
        held, size = task.held_out(10), train_size(task)
        third = task.training()[2]
        (line,) = task.drop_training(lambda problem: "is odd" if problem.id == third.id else None)
        assert line == f"row {third.id.removeprefix('x.jsonl/')}: is odd"
        assert (third not in task.training(), train_size(task), task.held_out(10)) == (True, size - 1, held)
        with pytest.raises(DataError, match="none of the 19 training rows of x.jsonl can be used"):
            task.drop_training(lambda _: "is long")

    def test_filtered_rows_may_be_bad(self) -> None:
        rows = [{"prompt": "q", "answer": "1", "good": True}, {"prompt": "", "answer": None, "good": False}]
        assert train_size(train(write("x.jsonl", rows), filter={"good": True})) == 1

    def test_a_row_without_the_result_line_that_others_have(self) -> None:
        error = refused(write("x.jsonl", [*GSM8K, {"question": "q", "answer": "She earns 5."}]))
        assert 'row 3: column "answer" does not end in a line "#### result", as it does in other rows' in error.what

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
    def test_numbers_that_equal_nothing(self, value: str) -> None:
        Path("x.jsonl").write_text(f'{{"prompt": "q", "answer": {value}}}\n')
        assert "which no answer equals" in refused("x.jsonl").what

    def test_bad_json_lines_are_all_named(self) -> None:
        Path("x.jsonl").write_text('{"prompt": "q", "answer": "1"}\n\n{"prompt": "q", "answer":\n[1]\n{"a": 1} x\n')
        error = refused("x.jsonl")
        assert error.where == 'data.dataset "x.jsonl"'
        assert error.what.splitlines() == [
            "cannot be read, errors: 3:",
            "    line 3: Expecting value (column 26)",
            "    line 4: not a JSON object",
            "    line 5: Extra data (column 10)",
        ]

    def test_bad_json_array(self) -> None:
        Path("x.json").write_text('[{"prompt": "q", "answer": "1"},\n {"prompt" "q"}]')
        assert "cannot be read: Expecting ':' delimiter: line 2 column 12" in refused("x.json").what
        Path("x.json").write_text('[{"prompt": "q", "answer": "1"}, 5]')
        assert "row 2: not a JSON object" in refused("x.json").what

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("prompt,answer\nq,1\nq,1,2\n", "line 3: does not have the 2 cells of the header"),
            ("prompt,answer\nq\n", "line 2: does not have the 2 cells of the header"),
            ("prompt,prompt\nq,1\n", "line 1: names a column twice"),
            ('"a"b,c\nq,1\n', "line 1: ',' expected after '\"'"),
            ('prompt,answer\n"q,1\n', "line 2: unexpected end of data"),
        ],
    )
    def test_bad_csv(self, text: str, fault: str) -> None:
        Path("x.csv").write_text(text)
        assert fault in refused("x.csv").what

    @pytest.mark.parametrize(("name", "content"), [("x.jsonl", b"\x81"), ("x.csv", b"a\x9d"), ("x.parquet", b"x")])
    def test_files_that_are_something_else(self, name: str, content: bytes) -> None:
        Path(name).write_bytes(content)
        assert refused(name).what.startswith("cannot be read: ")

    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
    @pytest.mark.parametrize(
        ("encoding", "called"),
        [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("cp1252", "CP1252")],
    )
    def test_another_encoding_is_named_with_the_command_that_changes_it(
        self, suffix: str, encoding: str, called: str
    ) -> None:
        path = Path(write(f"my sums{suffix}", [{"prompt": "Größe 1 + 1?", "answer": "2"}]))
        text = path.read_text().replace("\\u00f6", "ö").replace("\\u00df", "ß")
        path.write_bytes(text.encode(encoding))
        error = refused(path.name)
        assert error.what == f"is {called}, not UTF-8"
        run_command(str(error.next_step), "save it as UTF-8: ")
        assert train(f"my sums-utf8{suffix}").train_problem(0, 0).question == "Größe 1 + 1?"
        path.write_bytes(codecs.BOM_UTF8 + text.encode())
        assert train(path.name).train_problem(0, 0).question == "Größe 1 + 1?"

    @pytest.mark.parametrize(("sign", "name"), [(";", "semicolons"), ("\t", "tabs")])
    def test_another_separator_is_named_with_the_command_that_changes_it(self, sign: str, name: str) -> None:
        text = f'\ufeff"prompt"{sign}answer\r\n"a, ""b""{sign} c\nd"{sign}1,5\r\n'
        Path("my sums.csv").write_text(text, encoding="utf-8", newline="")
        error = refused("my sums.csv")
        assert error.what.startswith('has one column named \'"prompt"')
        assert error.what.endswith(f": its fields are separated by {name}, not by commas")
        run_command(str(error.next_step), "save it with commas: ")
        problem = train("my sums-commas.csv").train_problem(0, 0)
        assert (problem.question, problem.answer) == (f'a, "b"{sign} c\nd', "1,5")

    @pytest.mark.parametrize(
        ("name", "content"), [("x.jsonl", ""), ("x.json", "[]"), ("x.csv", ""), ("x.csv", "prompt,answer\n")]
    )
    def test_no_rows(self, name: str, content: str) -> None:
        Path(name).write_text(content)
        assert refused(name).what == "holds no rows"


class TestFilter:
    def test_one_value_several_values_and_several_columns(self) -> None:
        write("x.jsonl", MATH500)
        assert train_size(train("x.jsonl", filter={"level": 2})) == 2
        assert train_size(train("x.jsonl", filter={"level": (2, 3)})) == 4
        assert train_size(train("x.jsonl", filter={"level": (2, 3), "subject": "Algebra"})) == 2
        assert train_size(train("x.jsonl", filter={"level": (2, 3)}, limit=3)) == 3

    def test_csv_cells_compare_as_numbers_are_written(self) -> None:
        rows = [{"prompt": "q", "answer": "1", "level": level} for level in (4, 5, 4)]
        assert train_size(train(write("x.csv", rows), filter={"level": 4})) == 2
        assert train_size(train("x.csv", filter={"level": 4.0})) == 2

    def test_an_absent_column(self) -> None:
        error = refused(write("x.jsonl", MATH500), filter={"levels": 4})
        assert 'has no column "levels"; its columns are "problem", "solution"' in error.what
        assert error.next_step == 'name one of them in data.filter, perhaps "level"'

    def test_nothing_left_names_the_values_that_occur(self) -> None:
        write("x.jsonl", MATH500)
        error = refused("x.jsonl", filter={"subject": "Algebra", "level": 9})
        assert error.what == (
            'no row is left by the filter level = 9; the values of "level" and their rows: '
            "'3' (1), '5' (1), '2' (1), '4' (1), '1' (1)"
        )
        many = refused("x.jsonl", filter={"unique_id": "none"}).what
        assert many.count("(1)") == 10
        write("y.jsonl", [{**MATH500[0], "unique_id": n} for n in range(13)])
        assert refused("y.jsonl", filter={"unique_id": 99}).what.endswith("'9' (1) and 3 more")


class TestNamesThatLeadNowhere:
    def test_a_missing_file(self) -> None:
        write("data/train.jsonl", SUMS)
        error = refused("data/trian.jsonl")
        assert (
            str(error) == 'data.dataset "data/trian.jsonl": there is no such file\n  next: did you mean "train.jsonl"?'
        )
        assert refused("nowhere/x.csv").next_step == "correct the path"

    def test_names(self) -> None:
        assert refused("gsm9k").next_step == 'did you mean "gsm8k"?'
        assert "one of arithmetic, deepscaler, gsm8k, math500" in str(refused("???").next_step)
        Path("notes.txt").write_text("x")
        assert "not a file of a known kind (.jsonl, .json, .csv, .parquet)" in refused("notes.txt").what
        with pytest.raises(DataError, match="names no dataset"):
            DatasetTask(DatasetRecipe(), section="eval")

    @pytest.mark.parametrize("key", ["config", "split"])
    def test_hub_keys_with_a_file(self, key: str) -> None:
        error = refused(write("x.jsonl", SUMS), **{key: "test"})
        assert f'data.{key} = "test" is for datasets of the Hub' in error.what
        assert error.next_step == f"remove data.{key}"

    @pytest.mark.usefixtures("_offline")
    def test_no_network(self) -> None:
        error = refused("deepscaler")
        assert error.where == 'data.dataset "deepscaler"'
        assert error.what.startswith(
            'split "train" of agentica-org/DeepScaleR-Preview-Dataset cannot be loaded: Couldn\'t'
        )
        assert "\n" not in error.what
        for advice in ("hf auth login", "HF_HUB_OFFLINE", "name the file in data.dataset"):
            assert advice in str(error.next_step)
        with pytest.raises(DataError, match='config "main" cannot be loaded'):
            evaluate("gsm8k")

    def test_an_unknown_split_or_config_names_those_there(self) -> None:
        write_hub_layout("openai/gsm8k", "main", {"train": GSM8K, "test": GSM8K})
        error = refused("gsm8k", split="dev")
        assert "Unknown split \"dev\". Should be one of ['train', 'test']" in error.what
        assert "data.split" in str(error.next_step)
        assert "Available: ['main']" in refused("gsm8k", config="socratic").what

    def test_whatever_the_library_raises_is_about_the_dataset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            try:
                raise ConnectionResetError("peer\nclosed the connection")
            except ConnectionResetError as error:
                raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

        monkeypatch.setattr(datasets, "load_dataset", interrupted)
        assert refused("someone/sums").what.endswith("cannot be loaded: peer closed the connection")

    def test_code_that_comes_with_a_dataset_does_not_run(self) -> None:
        Path("someone/sums").mkdir(parents=True)
        Path("someone/sums/sums.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
        assert "scripts are no longer supported" in refused("someone/sums").what
        assert not Path("ran").exists()


def test_forty_thousand_rows_open_in_seconds() -> None:
    rows = [{"problem": f"problem {n} " * 20, "answer": str(n), "solution": "so " * 200} for n in range(40_000)]
    write("x.jsonl", rows)
    start = time.perf_counter()
    task = train("x.jsonl", held_out=500)
    assert time.perf_counter() - start < 10
    start = time.perf_counter()
    assert len({task.train_problem(0, index).id for index in range(2000)}) == 2000
    assert time.perf_counter() - start < 5


def test_importing_the_module_is_cheap() -> None:
    code = (
        "import sys, popo_lite.tasks.datasets\n"
        "print([name for name in ('datasets', 'pyarrow', 'pandas', 'torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
