"""Finding and comparing mathematical answers, without any process."""

import sys
import time

import pytest

from popo_lite.grading import symbolic as symbolic_module
from popo_lite.grading.math import (
    MAX_BOX_CHARACTERS,
    MAX_NESTING,
    decide_exactly,
    last_box,
    normalise,
    plain_number,
    too_complex,
    unwrap,
)
from popo_lite.grading.symbolic import check_math, grade_math
from popo_lite.types import Outcome, Problem, Reward


def problem(answer: str) -> Problem:
    return Problem(id="p-7", messages=({"role": "user", "content": "How many?"},), answer=answer)


def exact(text: str, answer: str) -> Outcome | None:
    reward = decide_exactly(text, problem(answer))
    return None if reward is None else reward.outcome


def symbolic(text: str, answer: str) -> Reward:
    return grade_math(text, {"id": "p-7", "answer": answer})


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{5} and cut off: \boxed{12", "5"),
        (r"{ a stray brace \boxed{7}", "7"),
        (r"a } stray one \boxed{7} }", "7"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"\boxed{}", ""),
        (r"\boxed{12", None),
        ("no box, 42", None),
        (r"\boxedtext{5}", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_found(text, content):
    assert last_box(text) == content


def test_finding_a_box_takes_linear_time():
    started = time.perf_counter()
    assert last_box("\\boxed{" * 200_000) is None
    assert last_box("{" * 200_000 + "\\boxed{5}") == "5"
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("+42", "42"),
        ("007", "7"),
        ("-0", "0"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-.50", "-0.5"),
        ("5.", "5"),
        ("5.000", "5"),
        ("10.010", "10.01"),
        ("-00.0", "0"),
        ("000", "0"),
        ("1,234", "1234"),
        ("-12,345,678", "-12345678"),
        ("9" * 5000, "9" * 5000),  # more digits than int() takes
        ("1,23", None),
        ("0,123", None),
        ("1,2345", None),
        ("", None),
        (".", None),
        ("-", None),
        ("1e5", None),
        ("1/2", None),
        ("٣", None),
        ("1 2", None),
    ],
)
def test_plain_numbers_have_one_spelling(text, number):
    assert plain_number(text) == number


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  $ 5 $ ", "5"),
        ("$$x$$", "x"),
        ("5.", "5"),
        ("−3", "-3"),
        (r"\left\{x \right.", r"\left\{x \right."),
        (r"\$18.90", r"\$18.90"),
        ("$3$ and $5$", "$3$ and $5$"),
        ("$", ""),
    ],
)
def test_normal_form(text, normal):
    assert normalise(text) == normal
    assert normalise(normal) == normal


def test_normal_form_takes_linear_time():
    started = time.perf_counter()
    for text in ("0" * 200_000 + "x", "." + "0" * 200_000 + "x", "1" + ",000" * 50_000 + "x", "$" * 200_000 + "x"):
        normalise(text)
    assert time.perf_counter() - started < 2


def test_references_come_bare_boxed_or_between_dollars():
    assert [unwrap(text) for text in ("1,000", "$1000$", r"so $\boxed{1000}$", r"\boxed{1{,}000}")] == [
        "1000",
        "1000",
        "1000",
        "1{,}000",
    ]


@pytest.mark.parametrize(
    ("text", "answer", "outcome"),
    [
        (r"\boxed{42}", "42", Outcome.CORRECT),
        (r"$\boxed{042.0}$", "42", Outcome.CORRECT),
        (r"\boxed{1,234}", "1234", Outcome.CORRECT),
        (r"\boxed{0.1}", "0.10", Outcome.CORRECT),
        (r"\boxed{\frac12}", r"$\frac12$", Outcome.CORRECT),
        (r"\boxed{Monday}", "Monday", Outcome.CORRECT),
        (r"\boxed{41}", "42", Outcome.INCORRECT),
        (r"\boxed{42} no, \boxed{41}", "42", Outcome.INCORRECT),
        (r"\boxed{-42}", "42", Outcome.INCORRECT),
        # equal as floats and to math-verify's six decimals
        (r"\boxed{9007199254740993}", "9007199254740992", Outcome.INCORRECT),
        (r"\boxed{0.33333331}", "0.33333332", Outcome.INCORRECT),
        (r"\boxed{}", "42", Outcome.UNPARSED),
        (r"\boxed{}", "", Outcome.UNPARSED),
        (r"\boxed{$ $}", "42", Outcome.UNPARSED),
        (r"\boxed{\frac12}", "0.5", None),
        (r"\boxed{42 cm}", "42", None),
        (r"\boxed{3}", r"\sqrt 9", None),
        (r"\boxed{42}", "", None),
        ("42", "42", None),
    ],
)
def test_exact_comparison_decides_plain_answers_and_leaves_the_rest(text, answer, outcome):
    assert exact(text, answer) == outcome


def test_the_answer_is_kept_for_counting_different_ones():
    answers = [decide_exactly(text, problem("7")) for text in (r"\boxed{ 7 }", r"\boxed{$7.0$}", r"\boxed{8}")]
    assert [reward.answer for reward in answers] == ["7", "7", "8"]
    assert [reward.value for reward in answers] == [1.0, 1.0, 0.0]


def test_huge_or_deep_boxes_are_unparsed_without_sympy():
    latex = "+".join(rf"\frac{{1}}{{{i}}}" for i in range(2, 9000))
    deep = "{" * 5000 + "1" + "}" * 5000
    assert len(latex) > 100_000
    started = time.perf_counter()
    for box in (latex, deep, "(" * 21 + "1" + ")" * 21):
        reward = decide_exactly(rf"\boxed{{{box}}}", problem("1"))
        assert (reward.value, reward.outcome) == (0.0, Outcome.UNPARSED)
        assert "the limit is" in reward.detail
    assert time.perf_counter() - started < 0.5


def test_a_huge_answer_that_repeats_the_reference_is_correct():
    latex = "+".join(rf"\frac{{1}}{{{i}}}" for i in range(2, 200))
    assert exact(rf"\boxed{{{latex}}}", latex) == Outcome.CORRECT


def test_limits_are_inclusive():
    assert too_complex("1" * MAX_BOX_CHARACTERS) is None
    assert too_complex("1" * (MAX_BOX_CHARACTERS + 1)) == "1,001 characters long; the limit is 1,000"
    assert too_complex("(" * MAX_NESTING + ")" * MAX_NESTING) is None
    assert too_complex("(" * (MAX_NESTING + 1)) == "nested 21 deep; the limit is 20"
    assert too_complex("(a)" * 100) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac12}", "0.5"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\dfrac{2}{4}}", r"$\frac12$"),
        (r"\boxed{3/4}", r"\boxed{\frac34}"),
        (r"\boxed{\{2, 1\}}", "1, 2"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{12,345 \text{ cm}}", "12345"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{\text{Monday}}", "Monday"),
        (r"\boxed{[3,5)\cup(-\infty,2)}", r"(-\infty,2)\cup[3,5)"),
        (r"\boxed{18.9}", r"\$18.90"),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\boxed{3, 5}", "$3$ and $5$"),
        ("So she has 42 apples.", "42"),
        (r"Therefore the answer is $\frac{3}{4}$.", "0.75"),
    ],
)
def test_algebra_finds_equal_answers_equal(text, answer):
    reward = symbolic(text, answer)
    assert (reward.outcome, reward.value) == (Outcome.CORRECT, 1.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac13}", "0.5"),
        (r"\boxed{\{1, 3\}}", "1, 2"),
        (r"\boxed{2\sqrt3}", r"3\sqrt2"),
        (r"\boxed{\frac{1}{0}}", "1"),
        (r"\boxed{I don't know}", "12"),
        ("So she has 41 apples.", "42"),
        (r"\boxed{3} or \boxed{\frac{10}{2}}", r"\{3, 5\}"),  # only the last box counts
    ],
)
def test_algebra_finds_different_answers_different(text, answer):
    reward = symbolic(text, answer)
    assert (reward.outcome, reward.value) == (Outcome.INCORRECT, 0.0)


def test_text_without_an_answer_is_unparsed():
    assert symbolic("I give up.", "42") == Reward(value=0.0, outcome=Outcome.UNPARSED)
    garbled = symbolic(r"\boxed{\frac{}}", "42")
    assert (garbled.outcome, garbled.answer) == (Outcome.UNPARSED, r"\frac{}")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("((((", "not an expression that math-verify can parse: '(((('"),
        ("", "not an expression"),
        ("1" * 1001, "1,001 characters long"),
        ("(" * 21 + "1" + ")" * 21, "nested 21 deep"),
    ],
)
def test_a_reference_that_cannot_be_read_is_an_error_of_the_data(answer, fault):
    reward = symbolic(r"\boxed{42}", answer)
    assert (reward.outcome, reward.value) == (Outcome.ERROR, 0.0)
    assert "problem 'p-7'" in reward.detail
    assert fault in reward.detail


def test_the_extracted_answer_is_reported():
    assert symbolic("She has 41 apples.", "42").answer == "41"
    assert symbolic(r"\boxed{ \frac12 }", "0.5").answer == r"\frac12"


def test_the_exact_part_does_not_import_sympy():
    import subprocess

    code = "import sys, popo_lite.grading; print([m for m in ('sympy', 'math_verify', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_references_are_checked_without_an_answer_and_those_with_other_digits_only_once(monkeypatch):
    parsed = []
    parse = symbolic_module._parse_expression.__wrapped__
    monkeypatch.setattr(symbolic_module, "_parse_expression", lambda text: parsed.append(text) or parse(text))
    symbolic_module._unreadable.cache_clear()
    for reference in ("1,234", r"\frac{3}{7}", r"\frac{25}{31}", r"\frac{98}{76}", "2^{11}", "3^{11}"):
        assert check_math({"id": "p", "answer": reference}) is None
    assert parsed == [r"\frac{1}{1}", r"\frac{11}{11}", "2^{11}", "3^{11}"]
    for reference, reason in ((r"\frac{2}{", "not an expression"), ("x" * 2000, "2,000 characters long")):
        assert reason in check_math({"id": "p", "answer": reference})
        assert reason in symbolic("5", reference).detail
