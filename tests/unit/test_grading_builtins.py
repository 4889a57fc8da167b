"""The built-in reward functions: right and wrong answers, references that cannot be read, and hostile text."""

import json
import time

import pytest

from popo_lite.errors import UserInputError
from popo_lite.grading import Grader
from popo_lite.grading.functions import load_functions
from popo_lite.recipe import RewardRecipe
from popo_lite.types import Outcome, Problem

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


def problem_of(answer: str) -> dict:
    return {"id": "p", "question": "?", "messages": [], "answer": answer, "meta": {}}


def load(name: str, thinking_open: bool = False, **options: object):
    reward = RewardRecipe(functions=[{"name": name, **options}])
    return load_functions(reward, thinking_open=thinking_open)[0]


def graded(name: str, text: str, answer: str = "", **options: object) -> float | None:
    """The value, or None if there is no answer in the text."""
    reward = load(name, **options).grade(text, problem_of(answer))
    assert reward.outcome.is_graded, reward
    return None if reward.outcome is Outcome.UNPARSED else reward.value


@pytest.mark.parametrize(
    "text",
    ["(C)", "C.", "C", "c", "**C**", "(c)", "The answer is C", "The answer is **C**.", "Answer: (C)", r"$\boxed{C}$",
     r"\boxed{\text{C}}", "<answer>C</answer>", "A cat? I think it is option C", "Answer: option C", "A\nB\nC",
     "The answer is C, because (B) is too small.", "It is (A). No, it is (C).", "<think>(A) or (B)?</think>(C)",
     "The correct choice is C", "The correct option is: C", "Therefore, C is correct", "The answer is c.",
     "The answer is C, A is too small.", "The answer is C, I think.", "It is (C), not (B)."],
)  # fmt: skip
def test_the_last_choice_that_is_stated_counts(text):
    for reference in ("C", "c", "(C)", "2", "C. Paris", "C) 7"):
        assert graded("choice", text, reference) == 1.0
    assert graded("choice", text, "B") == 0.0


@pytest.mark.parametrize("text", ["", "A cat sat.", "<think>(C)", "The answer is a number", "(F)", "DNA. ",
     "The answer is C or A", "The answer is A or C because both fit", r"\boxed{A, C}", "Answer: A, B, C, D",
     "(C) or (A)", "<answer>A and B</answer>", "C or A is correct", "The answer is not (A)."])  # fmt: skip
def test_text_without_a_choice_has_no_answer(text):
    assert graded("choice", text, "A") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("42", "42"), ("It costs $1,234.50.", "1234.5"), ("10 m/s^2", "10"), ("5 s^{-1}", "5"), ("x = −3", "-3"),
     ("5-3", "3"), ("3/4", "0.75"), (r"\boxed{\frac{3}{4}}", "0.75"), ("1e-5", "0.00001"), ("2 x 10^3", "2000"),
     (r"5 \times 10^{-3} kg", "0.005"), ("50%", "50"), ("-.5", "-0.5"), ("first 1, then 2.", "2"),
     ("1,234,567", "1234567"), ("H_{2}O: 7 m2", "7"), ("1e999999", "1e999999"), ("<think>8</think>9", "9"),
     ("10^5", "100000"), ("2^{10}", "1024"), ("10**5", "100000"), ("3 1/2", "3.5"), (r"3\frac{1}{2}", "3.5"),
     (r"\frac34", "0.75"), ("1{,}234", "1234"), (r"1\,234", "1234"), ("1 234", "1234"), ("2 million", "2000000"),
     ("-$1,234", "-1234"), ("$-$3", "-3"), ("- 3", "-3"), ("5 - 3", "3"), (r"90^{\circ}", "90"), ("**5** kg", "5")],
)  # fmt: skip
def test_the_last_number_counts_and_units_do_not(text, number):
    assert graded("numeric", text, number) == 1.0
    assert graded("numeric", text, f"{number}1 apples") == 0.0


@pytest.mark.parametrize("text", ["12:30", "10^x", "(-2)^2", "9^999999999", "x^2", "1/0"])
def test_a_part_of_what_cannot_be_read_is_no_number(text):
    assert graded("numeric", text, "30") is None


def test_a_number_is_right_within_the_larger_tolerance():
    assert graded("numeric", "3.14", "3.14159") == 0.0
    assert graded("numeric", "3.14", "3.14159", tolerance=0.01) == 1.0
    assert graded("numeric", "0.3", "0.1", tolerance=0.2) == 1.0  # a float difference is more than 0.2
    assert graded("numeric", "990", "1000", relative_tolerance=0.01, tolerance=1.0) == 1.0
    assert graded("numeric", "989", "1000", relative_tolerance=0.01) == 0.0
    assert graded("numeric", "9" * 60, "9" * 59 + "8") == 0.0  # equal as floats
    assert graded("numeric", "1e999999", "1", tolerance=1.0) == 0.0
    assert graded("numeric", "no number", "1") is None


def test_a_regular_expression_is_searched_in_the_whole_text():
    pattern = r"(?s)^<think>.+</think>.+$"
    assert graded("regex", "<think>\nso\n</think> 4", pattern=pattern) == 1.0
    assert graded("regex", "well <think>so</think> 4", pattern=pattern) == 0.0


@pytest.mark.parametrize(
    ("words", "value"), [(0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0), (25, 0.75), (40, 0.0), (100, 0.0)]
)
def test_length_falls_off_linearly(words, value):
    assert graded("length", "word " * words, min=10, max=20) == value
    assert graded("length", "x" * words, min=10, max=20, unit="characters") == value


def test_the_share_of_letters_of_a_script():
    assert graded("language", "Привет, мир! 123", script="Cyrillic") == 1.0
    assert graded("language", r"答案是 \frac{1}{2}，ok", script="Han") == 0.6
    assert graded("language", "これは日本語です", script="Japanese") == 1.0
    assert graded("language", "123 + 4", script="Latin") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"name": "Ann", "age": 7}', 1.0), ('Here:\n```json\n{"name": "Ann", "age": 7}\n```\nDone {x}.', 1.0),
     ('{"name": 1} or rather {"name": "Ann", "age": 7.0}', 1.0), ('{"name": "Ann"}', 0.0),
     (r'\frac{1}{2}, [1, {"name": "Ann", "age": true}', 0.0),
     ('<think>{"name": "Ann", "age": 7}</think>{}', 0.0), ("none", None),
     ('{"name": NaN}', None), ("{'name': 'Ann'}", None)],
)  # fmt: skip
def test_the_last_json_value_is_held_against_the_schema(text, value, tmp_path):
    assert graded("json_schema", text, schema=PERSON) == value
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    assert graded("json_schema", text, schema_file=str(tmp_path / "person.json")) == value
    right, wrong = '{"age": 7, "name": "Ann"}', '{"age": 8, "name": "Ann"}'
    assert graded("json_schema", text, right, schema=PERSON, equals_reference=True) == value
    assert graded("json_schema", text, wrong, schema=PERSON, equals_reference=True) == (value and 0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"schema": {"type": "thing"}}, "$.type"), ({"schema_file": "nowhere.json"}, "nowhere.json")],
)
def test_a_wrong_schema_is_refused_when_it_is_loaded(options, said):
    with pytest.raises(UserInputError) as caught:
        load("json_schema", **options)
    assert said in caught.value.what


@pytest.mark.parametrize("reference", ["http://localhost:9/schema.json", "#/$defs/nothing"])
def test_a_reference_to_no_part_of_the_schema_is_refused(reference):
    with pytest.raises(UserInputError) as caught:
        load("json_schema", schema={"properties": {"name": {"$ref": reference}}})
    assert f'"$ref" = "{reference}"' in caught.value.what


def test_references_to_parts_of_the_schema_are_followed():
    schema = {
        "$defs": {"one": {"const": 1}, "two": {"$id": "http://x/two", "$defs": {"in": {"const": 2}},
                                                  "$ref": "#/$defs/in"}},
        "items": {"anyOf": [{"$ref": "#/$defs/one"}, {"$ref": "http://x/two"}]},
    }  # fmt: skip
    assert graded("json_schema", "[1, 2]", schema=schema) == 1.0
    assert graded("json_schema", "[3]", schema=schema) == 0.0


@pytest.mark.parametrize("name", ["exact", "choice", "numeric", "math"])
def test_an_answer_inside_unfinished_thinking_does_not_count(name):
    right, wrong = "CB" if name == "choice" else "21"
    for text, opened in ((f"<think>{right}", False), (right, True), (rf"\boxed{{{right}}}", True)):
        assert load(name, thinking_open=opened).grade(text, problem_of(right)).outcome is Outcome.UNPARSED
    assert load(name, thinking_open=True).grade(f"{wrong}</think>\n{right}", problem_of(right)).value == 1.0


# --- references ---


@pytest.mark.parametrize(
    ("name", "options", "good", "bad"),
    [
        ("choice", {"choices": 4}, ("A", "d", "3", "(B)", "C. Paris"), ("E", "4", "Paris", "")),
        ("numeric", {}, ("7", "1,000 km", "3/4"), ("seven", "", "x^2", "1/0")),
        (
            "json_schema",
            {"schema": PERSON, "equals_reference": True},
            ('{"name": "A", "age": 1}',),
            ("{", '{"name": 1}'),
        ),
    ],
)
def test_references_that_cannot_be_read_are_named(name, options, good, bad):
    problems = [
        Problem(id=answer, messages=({"role": "user", "content": "?"},), answer=answer) for answer in good + bad
    ]
    with Grader(RewardRecipe(functions=[{"name": name, **options}])) as grader:
        found = grader.unreadable(problems)
    assert tuple(found) == bad
    assert all(found.values())


# --- hostile text ---

HOSTILE = {
    "digits": "9" * 10**6, "commas": "1,1" * 330_000, "fractions": "1/" * 500_000, "exponents": "1e" * 500_000,
    "powers": "1 x 10^" * 140_000, "spaces": "answer is" + " " * 10**6, "answers": "answer: option " * 66_000,
    "letters": "(A" * 500_000, "null": "\0" * 10**6, "control": "\x1b[2J\r\x07" * 150_000, "open": "{" * 10**6,
    "arrays": "[1," * 330_000, "objects": '{"a":' * 200_000, "fences": "```json" * 140_000, "tags": "<think>" * 140_000,
    "surrogates": "\ud800" * 10**6, "frac": r"\frac{1" * 140_000, "quotes": '["' * 500_000,
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_million_hostile_characters_are_graded(text):
    functions = [
        "exact", "choice", "numeric", {"name": "length", "max": 9},
        {"name": "regex", "pattern": "(?s)^<think>.*</think>"}, {"name": "language", "script": "Latin"},
        {"name": "json_schema", "schema": PERSON},
    ]  # fmt: skip
    problem = Problem(id="p", messages=({"role": "user", "content": "?"},), answer="2")
    reward = RewardRecipe(functions=functions, max_answer_characters=10**6, workers=1, timeout_seconds=60)
    with Grader(reward) as grader:
        (found,) = grader.grade([(text, problem)])
    assert found.outcome.is_graded, found
    assert not found.positive


def test_a_regular_expression_that_backtracks_without_end_is_a_timeout_and_no_more():
    functions = ["exact", {"name": "regex", "pattern": "^(a+)+$"}]
    problem = Problem(id="p", messages=({"role": "user", "content": "?"},), answer="2")
    with Grader(RewardRecipe(functions=functions, workers=1, timeout_seconds=1.0)) as grader:
        grader.check()
        started = time.monotonic()
        rewards = grader.grade([("a" * 50 + "!", problem), ("2", problem)])
        assert time.monotonic() - started < 30
    assert [reward.outcome for reward in rewards] == [Outcome.TIMEOUT, Outcome.INCORRECT]
    assert rewards[1].parts == {"exact": 1.0, "regex": 0.0}
