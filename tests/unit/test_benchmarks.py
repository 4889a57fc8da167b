"""Read benchmarks in the form of the Hub's rows, and refuse others with their lines."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset

from popo_lite.errors import DataError, UserInputError
from popo_lite.tools.benchmarks.datasets import BENCHMARKS, PAPER, benchmark_names, open_benchmark

OLYMPIAD = {
    "id": 1606,
    "subfield": "Number Theory",
    "context": None,
    "question": "Find all $n$ with $n^2 = 4$.",
    "solution": ["Try them."],
    "final_answer": ["$2,-2$"],
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
}
ROWS = {
    "math500": (
        {
            "problem": "Convert $(0,3)$ to polar coordinates.",
            "solution": "The answer is $\\boxed{...}$.",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        "\\left( 3, \\frac{\\pi}{2} \\right)",
    ),
    "amc23": ({"id": 0, "answer": 27.0, "question": "How many miles?", "url": "https://example.org"}, "27"),
    "aime24": (
        {
            "id": 60,
            "problem": "Find it.",
            "solution": "...",
            "answer": "033",
            "url": "https://example.org",
            "year": "2024",
        },
        "33",
    ),
    "aime25": ({"problem": "Find the sum of all bases.", "answer": "70", "id": "0"}, "70"),
    "olympiadbench": (OLYMPIAD, "$2,-2$"),
    "gsm8k": ({"question": "What is left?", "answer": "1300-100 = <<1300-100=1200>>1200\n#### 1,200"}, "1200"),
}


@pytest.fixture(autouse=True)
def _workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def jsonl(name, *rows):
    """Rows as lines; text goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Path(name)


def refused(name, file):
    with pytest.raises(DataError) as caught:
        open_benchmark(name, file)
    assert caught.value.exit_code == 2
    assert caught.value.next_step
    return caught.value


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_row_of_the_published_form_becomes_a_problem(name):
    row, answer = ROWS[name]
    (problem,) = open_benchmark(name, jsonl("x.jsonl", row))
    assert problem.id == f"{name}/1"
    assert problem.messages == ({"role": "user", "content": row[BENCHMARKS[name].prompt_column]},)
    assert problem.answer == answer
    assert problem.meta == {}


HUB = {
    "math500": ("HuggingFaceH4/MATH-500", "default", "test", "problem", 500),
    "amc23": ("math-ai/amc23", "default", "test", "question", 40),
    "aime24": ("HuggingFaceH4/aime_2024", "default", "train", "problem", 30),
    "aime25": ("math-ai/aime25", "default", "test", "problem", 30),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", 674),
    "gsm8k": ("openai/gsm8k", "main", "test", "question", 1319),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_hub_id_config_and_split_are_asked_for(name):
    """A folder laid out like the Hub's repository, with other configurations and splits beside the right one."""
    row, answer = ROWS[name]
    hub_id, config, known_split, column, problems = HUB[name]
    assert BENCHMARKS[name].problems == problems
    card = ["---", "configs:"]
    for other in {config, "other"}:
        card += [f"- config_name: {other}", "  data_files:"]
        for split in ("train", "test"):
            wanted = other == config and split == known_split
            folder = Path(hub_id, other)
            folder.mkdir(parents=True, exist_ok=True)
            rows = [row if wanted else row | {column: "not this one"}]
            Dataset.from_list(rows).to_parquet(str(folder / f"{split}.parquet"))
            card += [f"  - split: {split}", f"    path: {other}/{split}.parquet"]
    Path(hub_id, "README.md").write_text("\n".join([*card, "---", ""]))
    found = [(problem.id, problem.question, problem.answer) for problem in open_benchmark(name)]
    assert found == [(f"{name}/1", row[column], answer)]


def test_what_is_not_there_says_how_to_give_a_file():
    error = refused("amc23", None)
    assert error.where == "amc23 (math-ai/amc23)"
    assert "--data amc23=FILE" in error.next_step
    error = refused("amc23", Path("amc.jsonl"))
    assert error.where == "--data amc23=amc.jsonl"
    assert "there is no such file" in error.what


@pytest.mark.parametrize("file", ["math500", "openai/gsm8k", "amc.txt", "."])
def test_what_is_given_as_a_file_is_never_looked_for_on_the_hub(file):
    Path("amc.txt").touch()
    error = refused("math500", Path(file))
    assert error.where == f"--data math500={file}"
    assert "is not a file of a known kind (.jsonl, .json, .csv, .parquet)" in error.what


@pytest.mark.parametrize(
    ("name", "cell", "answer"),
    [
        ("amc23", "27", "27"), ("amc23", 27, "27"), ("amc23", 0.5, "0.5"), ("amc23", "3,159.50", "3159.5"),
        ("amc23", "-7.0", "-7"), ("amc23", 10**400, "1" + "0" * 400),
        ("aime24", "000", "0"), ("aime25", 588, "588"), ("aime25", 588.0, "588"),
        ("math500", " \\text{(C)} ", "\\text{(C)}"), ("gsm8k", "#### $1,200", "1200"), ("gsm8k", "x\n#### -5", "-5"),
        ("olympiadbench", ["$2$"], "$2$"), ("olympiadbench", ["$2$", "$-2$"], "$2$, $-2$"),
    ],
)  # fmt: skip
def test_answers_are_read_as_the_benchmark_means_them(name, cell, answer):
    row = ROWS[name][0] | {BENCHMARKS[name].answer_column: cell}
    assert open_benchmark(name, jsonl("x.jsonl", row))[0].answer == answer


@pytest.mark.parametrize(
    ("name", "cell", "message"),
    [
        ("math500", 42, "is 42, not text"), ("math500", "  ", "is empty"), ("math500", None, "is missing"),
        ("math500", "\ud800", "half a surrogate pair"),
        ("amc23", "27 miles", "is '27 miles', not a number"), ("amc23", True, "is True, not a number"),
        ("amc23", float("nan"), "is nan, not a number"), ("amc23", "1,2345", "not a number"),
        ("aime24", 10**400, "not an integer from 0 to 999"), ("amc23", "NaN", "'NaN', not a number"),
        ("aime24", "1000", "not an integer from 0 to 999"), ("aime24", "-1", "not an integer"),
        ("aime25", 70.5, "not an integer"),
        ("olympiadbench", "$2$", "not a list of answers"), ("olympiadbench", [], "not a list of answers"),
        ("olympiadbench", ["$2$", None], "is None, not text"),
        ("gsm8k", "The answer is 5.", 'does not end in a line "#### result"'), ("gsm8k", "#### five", "not a number"),
    ],
)  # fmt: skip
def test_answers_of_another_form_are_refused(name, cell, message):
    column = BENCHMARKS[name].answer_column
    error = refused(name, jsonl("x.jsonl", ROWS[name][0], ROWS[name][0] | {column: cell}))
    assert f'line 2: column "{column}"' in error.what
    assert message in error.what
    assert f"1 of 2 rows are not {BENCHMARKS[name].title}'s" in error.what


@pytest.mark.parametrize("name", BENCHMARKS)
def test_three_percent_of_malformed_rows_are_all_listed_by_line(name):
    row, _ = ROWS[name]
    known = BENCHMARKS[name]
    rows = [row] * 300
    wrong = {
        17: '{"torn',
        40: "[]",
        41: "5",
        99: {**row, known.prompt_column: ""},
        150: {**row, known.prompt_column: 5},
    }
    wrong |= {number: {**row, known.answer_column: None} for number in (151, 152)}
    wrong |= {300: {key: cell for key, cell in row.items() if key != known.answer_column}, 250: "not JSON"}
    for number, row_ in wrong.items():
        rows[number - 1] = row_
    assert len(wrong) == 9
    error = refused(name, jsonl("x.jsonl", *rows))
    assert f"9 of 300 rows are not {known.title}'s" in error.what
    listed = [line.strip() for line in error.what.splitlines()[1:]]
    assert [line.partition(":")[0] for line in listed] == [f"line {number}" for number in sorted(wrong)]


def test_empty_lines_count_as_lines_and_not_as_rows():
    row, _ = ROWS["aime25"]
    error = refused("aime25", jsonl("x.jsonl", row, "", "  ", {**row, "answer": "x"}))
    assert "line 4:" in error.what
    assert "1 of 2 rows" in error.what
    assert [problem.id for problem in open_benchmark("aime25", jsonl("x.jsonl", row, "", row))] == [
        "aime25/1", "aime25/2",
    ]  # fmt: skip


def test_other_kinds_of_files_are_read_too():
    row, answer = ROWS["olympiadbench"]
    Path("x.json").write_text(json.dumps([row, row]))
    Dataset.from_list([row]).to_parquet("x.parquet")
    with Path("x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["How many?", "27.0"], ["How many?", "many"]])
    assert [problem.answer for problem in open_benchmark("olympiadbench", Path("x.json"))] == [answer, answer]
    assert open_benchmark("olympiadbench", Path("x.parquet"))[0].answer == answer
    assert "line 3: column \"answer\" is 'many', not a number" in refused("amc23", Path("x.csv")).what


def errors(error):
    return [line.strip() for line in error.what.splitlines()[1:]]


def test_an_integer_beyond_python_is_an_error_of_its_row():
    good = '{"question": "?", "answer": 1}'
    found = refused("amc23", jsonl("x.jsonl", good, '{"question": "?", "answer": ' + "9" * 5001 + "}"))
    assert errors(found) == ["line 2: an integer has more digits than can be read"]
    Path("x.json").write_text(f"[{good[:-2]}{'9' * 5001}}}]")
    assert "cannot be read" in refused("amc23", Path("x.json")).what


def test_every_error_of_a_csv_file_is_listed_by_line():
    Path("x.csv").write_text(
        'question,answer\n"two\nlines",27.0\nonly one cell\n\n?,\n"no"comma,1\n?,many\n?,1,2\n,3\n"no end,4\n'
    )
    found = refused("amc23", Path("x.csv"))
    assert "7 of 8 rows are not AMC23's" in found.what
    assert errors(found) == [
        "line 4: does not have the 2 cells of the header",
        "line 6: column \"answer\" is '', not a number",
        "line 7: ',' expected after '\"'",
        "line 8: column \"answer\" is 'many', not a number",
        "line 9: does not have the 2 cells of the header",
        'line 10: column "question" is empty',
        "line 11: unexpected end of data",
    ]


def test_every_error_of_a_json_array_is_listed_by_row():
    row, _ = ROWS["aime25"]
    Path("x.json").write_text(json.dumps([row, 5, row | {"answer": None}, [], row | {"answer": "x"}]))
    assert errors(refused("aime25", Path("x.json"))) == [
        "row 2: not a JSON object",
        'row 3: column "answer" is missing',
        "row 4: not a JSON object",
        "row 5: column \"answer\" is 'x', not an integer from 0 to 999",
    ]


def test_a_missing_column_is_named_with_the_nearest():
    error = refused("amc23", jsonl("x.jsonl", {"questions": "?", "answer": 1}))
    assert 'no column "question"; its columns are questions, answer' in error.what
    assert 'rename "questions"' in error.next_step


def test_an_empty_file_and_one_in_another_encoding_are_refused():
    assert "holds no rows" in refused("amc23", jsonl("x.jsonl")).what
    Path("y.jsonl").write_bytes(b'{"question": "\xff"}\n')
    error = refused("amc23", Path("y.jsonl"))
    assert (error.what, "iconv -f CP1252" in error.next_step) == ("is CP1252, not UTF-8", True)


def test_context_goes_before_the_question_and_the_tolerance_into_the_problem():
    (problem,) = open_benchmark(
        "olympiadbench", jsonl("x.jsonl", OLYMPIAD | {"context": "Let $k=1$.", "error": "1e-2"})
    )
    assert problem.question == "Let $k=1$.\nFind all $n$ with $n^2 = 4$."
    assert problem.meta == {"tolerance": ("1e-2",)}


@pytest.mark.parametrize(
    ("cell", "tolerances"),
    [
        ("1e-2", ("1e-2",)), ("1e-1,1e-2", ("1e-1", "1e-2")), ("1e-1, ,.5", ("1e-1", "0", ".5")), (0.01, ("0.01",)),
        (1e-7, ("1e-07",)), ("", None), (None, None),
    ],
)  # fmt: skip
def test_tolerances(cell, tolerances):
    (problem,) = open_benchmark("olympiadbench", jsonl("x.jsonl", OLYMPIAD | {"error": cell}))
    assert problem.meta.get("tolerance") == tolerances


@pytest.mark.parametrize("cell", ["some", "-1e-2", "nan", "inf", "1e-1;1e-2", "1e9999"])
def test_what_is_no_tolerance_is_refused(cell):
    assert 'column "error"' in refused("olympiadbench", jsonl("x.jsonl", OLYMPIAD | {"error": cell})).what


def test_names():
    assert benchmark_names("paper") == PAPER == ("math500", "amc23", "aime24", "aime25", "olympiadbench")
    assert benchmark_names("gsm8k, amc23,gsm8k") == ("gsm8k", "amc23")
    assert benchmark_names("aime25,paper")[0] == "aime25"
    with pytest.raises(UserInputError, match='no benchmark "amc24"') as caught:
        benchmark_names("amc24")
    assert caught.value.next_step == 'did you mean "amc23"?'
