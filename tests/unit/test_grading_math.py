"""Finding and comparing mathematical answers, without any process."""

import json
import sys
import time
from pathlib import Path

import pytest

from popo_lite.grading.functions import load_functions
from popo_lite.grading.math import (
    MAX_BOX_CHARACTERS,
    MAX_NESTING,
    after_thinking,
    decide_exactly,
    last_box,
    normalise,
    plain_number,
    too_complex,
    unwrap,
)
from popo_lite.grading.normalisation import canonical
from popo_lite.grading.symbolic import check_math
from popo_lite.recipe import RewardRecipe
from popo_lite.types import Outcome, Problem, Reward

[MATH] = load_functions(RewardRecipe(functions="math"), thinking_open=False)


def problem(answer: str) -> Problem:
    return Problem(id="p-7", messages=({"role": "user", "content": "How many?"},), answer=answer)


def exact(text: str, answer: str) -> Outcome | None:
    reward = decide_exactly(text, problem(answer))
    return None if reward is None else reward.outcome


def symbolic(text: str, answer: str) -> Reward:
    return MATH.grade(text, {"id": "p-7", "answer": answer})


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"{ \boxed{5} and } \boxed{6 \{", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{5} and cut off: \boxed{12", "5"),
        (r"{ a stray brace \boxed{7}", "7"),
        (r"a } stray one \boxed{7} }", "7"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"\boxed{}", ""),
        (r"\boxed{12", None),
        ("no box, 42", None),
        (r"\boxedtext{5}", None),
        (r"\\boxed{5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{5}\boxed{ }", "5"),
        (r"\boxed{5}\boxed{6}\boxed{}", "6"),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_found(text, content):
    assert last_box(text) == content


def test_finding_a_box_takes_linear_time():
    started = time.perf_counter()
    assert last_box("\\boxed{" * 200_000) is None
    assert last_box("{" * 200_000 + "\\boxed{5}") == "5"
    assert last_box("\\" * 200_000) is None
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
        (r"\boxed{\frac12}", "0.5", Outcome.CORRECT),  # by one spelling
        (r"\boxed{1{,}234}", "1235", Outcome.INCORRECT),
        (r"\boxed{\frac24}", "0.5", None),
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


@pytest.mark.parametrize("blank", ["\t", "  ", "   ", "\u3000", "\t" * 30])
def test_blanks_that_part_numbers_do_not_join_them(blank):
    assert symbolic(f"The final answer is 1{blank}000", "1000").outcome == Outcome.INCORRECT
    assert symbolic(f"The final answer is{blank}1 000", "1000").outcome == Outcome.CORRECT


def test_text_without_an_answer_is_unparsed():
    assert symbolic("I give up.", "42") == Reward(value=0.0, outcome=Outcome.UNPARSED)
    garbled = symbolic(r"\boxed{\frac{}}", "42")
    assert (garbled.outcome, garbled.answer) == (Outcome.UNPARSED, r"\frac{}")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("((((", "not an expression that math-verify can parse: '(((('"),
        ("", "not an expression"),
        ("x" * 1001, "1,001 characters long"),
        ("(" * 21 + "1" + ")" * 21, "nested 21 deep"),
    ],
)
def test_a_reference_that_cannot_be_read_is_an_error_of_the_data(answer, fault):
    reward = symbolic(r"\boxed{42}", answer)
    assert (reward.outcome, reward.value) == (Outcome.ERROR, 0.0)
    assert "problem 'p-7'" in reward.detail
    assert fault in reward.detail
    assert fault in check_math({"id": "p-7", "answer": answer})


def test_the_extracted_answer_is_reported():
    assert symbolic("She has 41 apples.", "42").answer == "41"
    assert symbolic(r"\boxed{ \frac12 }", "0.5").answer == r"\frac12"


def test_the_exact_part_does_not_import_sympy():
    import subprocess

    code = "import sys, popo_lite.grading; print([m for m in ('sympy', 'math_verify', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CASES = [json.loads(line) for line in Path(__file__).with_name("grading_cases.jsonl").read_text("utf-8").splitlines()]


def verdict(text: str, answer: str) -> Outcome:
    """Return what `Grader` returns, without its processes."""
    return (decide_exactly(text, problem(answer)) or symbolic(text, answer)).outcome


def test_verdicts_on_the_collected_cases():
    verdicts = [(case, verdict(case["answer"], case["reference"])) for case in CASES]
    wrong = [(case, outcome) for case, outcome in verdicts if (outcome == Outcome.CORRECT) != case["right"]]
    listed = "\n".join(f"{case['kind']}: {case['reference']} <- {case['answer']}: {o}" for case, o in wrong)
    assert len(wrong) <= 0.03 * len(CASES), listed
    assert sum(not case["right"] for case, _ in wrong) <= 1, listed
    assert not [case for case, outcome in verdicts if outcome == Outcome.ERROR]


RIGHT = [
    (r"1-\frac{1}{2^{50}}", r"\frac{2^{50}-1}{2^{50}}"),
    (r"\binom{100}{50}", r"\frac{100!}{50!\cdot 50!}"),
    ("2^{64}", "18446744073709551616"),
    (r"\operatorname{W}(2) + 3", r"3 + \operatorname{W}(2)"),
    (r"x = 2 \pm i", "2+i, 2-i"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"),
    (r"3:00\text{ p.m.}", r"3\!:\!00 \text{ PM}"),
    ("16:25", r"\frac{16}{25}"),
    ("1:2:3", "2 : 4 : 6"),
    (r"-2\frac{1}{3}", r"-\frac{7}{3}"),
    ("3 1/4", "3.25"),
    ("x^2 + y^2 = 25", "y^2 + x^2 - 25 = 0"),
    ("4x + 3y - 12 = 0", r"y = 4 - \frac{4}{3}x"),
    ("x = 1, y = 2", "y = 2, x = 1"),
    ("15", "|AB| = 15"),
    ("(x,y)=(4,3)", "(4,3)"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"x < -1 \text{ or } x > 1", r"(-\infty,-1)\cup(1,\infty)"),
    (r"5 > x \ge 2", "[2,5)"),
    ("]1,4[", "(1,4)"),
    (r"\begin{pmatrix} 0.5 & 2 \\ 3 & 4 \end{pmatrix}", r"\left[\begin{array}{cc}\frac12&2\\3&4\end{array}\right]"),
    ("312_4", r"312_{\text{four}}"),
    ("201_3", r"201 \text{ (base 3)}"),
    ("D", "(D) 3/4"),
    ("12", r"\textbf{(B)}\ 12"),
    (r"\text{Alice and Bob}", "Bob and Alice"),
    ("xy", "yx"),
    ("6, 8", r"6 \quad \text{and} \quad 8"),
    (r"e^{i\pi}", "-1"),
    ("2^{n+1}", r"2\cdot 2^n"),
    (r"12.5\%", r"\frac{1}{8}"),
    ("12{,}345.5", "12345.5"),
    (r"\frac{1}{2}", r"\sin 30^\circ"),
    (r"\$1{,}250.50", "1250.5"),
    ("9.8", r"9.8\,\mathrm{m/s^2}"),
    (r"36\pi \text{ cm}^3", r"36\pi"),
    (r"12 \text{ cm}^2", "12 square centimeters"),
    ("x", "(x)"),
    (r"\frac{\pi^2}{6}", r"\sum_{n=1}^{\infty}\frac{1}{n^2}"),
    (r"9 \text{ mi/h}", r"9\text{ mph}"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    ("2⁻³", r"\frac18"),
    ("α+1", r"\alpha + 1"),
    ("∠A = 30°", "30"),
    (r"2.5\mathrm{e}3", "2500"),
    ("42", r"\textcolor{red}{\textbf{42}}"),
    ("42", r"\text{The answer is } 42"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    ("35", "C_7^3"),
    (r"0.\overline{12}", r"0.\overline{1212}"),
    (r"\frac{5}{11}", "0.4545..."),
    (r"x \equiv 10 \pmod 7", r"x \equiv 3\ (\mathrm{mod}\ 7)"),
    (r"\$2\text{ million}", "2000000"),
    ("2(3)", "6"),
    ("2abc", "2cba"),
    (r"\sqrt{ab}", r"\sqrt{a}\sqrt{b}"),
    ("3:00 p.m.", "3 pm"),
    ("3:00 pm", "15:00"),
    ("1, 2", "[1, 2]"),
    ("5", "5th"),
    ("0.3", "P(X=2) = 0.3"),
    ("(x,y)=(1,2)", r"x=1,\ y=2"),
    (r"\emptyset", r"\text{No solution}"),
    ("12", "3 + 9 = 12"),
    ("5", "5 apples"),
    ("5 apples", r"5 \text{ red apples}"),
    ("12 boxes", r"12\text{ box}"),
    (r"5 \text{ kJ}", r"5\ \mathrm{kJ}"),
    (r"5 \text{ kilojoules}", "5 kJ"),
    ("5 KM", "5 km"),
    ("2.5 m", r"2.5 \text{ m}"),
    ("9.8 m/s^2", r"9.8\,\mathrm{m/s^2}"),
    ("500", "5 hundred"),
    ("2^{64}-1", "18446744073709551615"),
    ("1023", "2^{10}-1"),
    ("2432902008176640000", "20!"),
    ("300000", r"3 \times 10^5"),
    ("31", "2^5 - 1"),
    ("2", r"\sqrt{4}"),
    ("3", r"\frac{12}{4}"),
    ("0.5", "1/2"),
    ("1.5", r"1+\frac12"),
    ("1.5", r"\frac{3}{2}"),
    ("y''+y=0", "y+y''=0"),
    ("f'(x) = 2x", "2x"),
    (r"f^{\prime}(x)", "f'(x)"),
    ("2024-05-01", "2024-5-1"),
    ("3–5", "3-5"),
    ("HTH", r"\text{HTH}"),
    ("CO_2", r"\mathrm{CO_2}"),
    ("1 2 3", r"1\ 2\ 3"),
    ("5", r"\text{Total} = 5"),
    ("x = 5", r"\text{Answer} = 5"),
    ("(1,2)", "x=1, y=2"),
    ("(2,1)", "y=1, x=2"),
    ("1, 2", "x=1, y=2"),
    (r"\text{Alice}=5, \text{Bob}=3", r"\text{Bob}=3, \text{Alice}=5"),
    ("f(2)=3", "3"),
    ("yes, no", r"\text{yes}, \text{no}"),
    ("€5", r"5 \text{ euros}"),
    ("5", "€5"),
    ("£5", "5 pounds"),
    ("|xy|", "|x||y|"),
    (r"\sqrt{x^2y^2}", "|xy|"),
    ("|ab|", "|a||b|"),
    (r"\text{red and blue}", "blue, red"),
    (r"\text{Alice} \text{ and } \text{Bob}", "Bob, Alice"),
    (r"\ln(ab)", r"\ln a + \ln b"),
    ("x^{a+b}", "x^a x^b"),
    ("x = 6 + 1 = 7", "7"),
    ("7", "x = 6 + 1 = 7"),
    ("6", r"A = lw = 2 \cdot 3 = 6"),
    ("180", r"3 \text{ hours} = 180 \text{ minutes}"),
    (r"50\%", r"\frac12 = 50\%"),
    ("5 June", "5 June"),
    ("12 cm", r"12 \text{ centimeters}"),
    ("5 feet", r"5 \text{ foot}"),
    ("12 sq. ft", r"12\text{ ft}^2"),
    ("60", "60 miles per hour"),
    ("60 mph", r"60 \text{ miles per hour}"),
    (r"3 \text{ dozen}", r"3\text{ dozen}"),
    ("4", r"4 \text{ units}^2"),
    ("5kg", "5"),
    ("5", "5cm"),
    (r"\frac{1}{2} \text{ m}", r"\frac12"),
    ("3", r"\text{Area} = 3"),
    ("17", r"\textbf{(C) }17"),
    (r"4 \text{ dollars}", r"\$4"),
    ("AB", "AB"),
    (r"\triangle ABC", r"\triangle ABC"),
    ("12 people", "12 persons"),
    ("5", r"5^{\text{th}}"),
    (r"\text{No real solutions}", "no solution"),
    ("(1,2)", "(x, y) = (1, 2)"),
    ("-2", "3 - 5 = -2"),
    ("5 hours", r"5 \text{ hr}"),
    ("1024", "n = 2^{10}"),
    ("24", "4!"),
    ("x=3", "3 = x"),
    ("10", r"10\text{ cm/s}"),
    ("12", "12 = 3 + 9"),
    ("5", "5 in."),
    ("5 ft", "5"),
    ("5", "5 °C"),
    ("15", "15 minutes"),
    ("12", "12 square cm"),
    ("5", "5 cups of tea"),
    ("5", "5 sq units"),
    ("10 m", "10"),
    ("10", "10 km/h"),
    ("2, 3", "x_1 = 3, x_2 = 2"),
    ("7", r"7 \text{ (seven)}"),
    ("5", r"5\text{ N}"),
    ("A = 5", "5"),
    ("(3, 4)", "3, 4"),
    ("x^2y", "yx^2"),
    ("-3", "x=-3"),
    (r"\sqrt[3]{x^3}", "x"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\frac{\sqrt{a}}{\sqrt{b}}", r"\sqrt{\frac{a}{b}}"),
    (r"\ln(xy)", r"\ln x+\ln y"),
    (r"2\ln x", r"\ln x^2"),
    ("5:30", "5:30 pm"),
    ("0.5", "2^{-1}"),
    ("1/2", "0.5"),
    ("3:4", "3/4"),
    ("x=1 or x=2", "2, 1"),
    ("3 hours", "3"),
    (r"45^\circ", "45"),
    ("$5$", "5 dollars"),
    (r"\{HH, TT\}", r"\{TT, HH\}"),
    ("ABCD", "ABCD"),
    (r"\overline{AB}", r"\overline{AB}"),
    ("6", r"\binom{4}{2}"),
    ("8", "2^3"),
    ("6", "3!"),
    ("0", "0/5"),
    ("x=5", "x = 5 cm"),
    ("y = 3x", "y=3x"),
    ("f(x)=2x", "f(x) = x+x"),
    ("P = 0.3", "0.3"),
    (r"P(A)=\frac13", r"\frac13"),
    ("n = 12", r"\text{number of ways} = 12"),
    (r"x \in \{1,2\}", "1, 2"),
    ("5", r"5 \text{ (approximately)}"),
    ("3.14", r"3.14 \text{ cm}"),
    ("0.25", r"\frac14"),
    ("105", "105 dm"),
    ("2.5", "2.5 kg"),
    ("100", "100 students"),
    ("y'=2x", "y' = x+x"),
    (r"7 \text{ ft } 3 \text{ in}", "7 feet 3 inches"),
    ("14:2", "7:1"),
    ("24", r"\text{Total cost: } 24"),
    ("(5, 6)", "5 = x, 6 = y"),
]

WRONG = [
    (r"\pi\cdot 10^{-20}", r"2\pi\cdot 10^{-20}"),
    (r"\frac{1}{50!}", r"\frac{1}{49!}"),
    ("e^{-50}", "e^{-51}"),
    (r"\sqrt{2}+10^{-18}", r"\sqrt{2}"),
    ("10^{50}", "10^{50}+1"),
    (r"\sqrt{10^{30}+1}", "10^{15}"),
    (r"A\oplus B", r"A\ominus B"),
    (r"\gcd(a,b)+1", "2"),
    (r"\frac{1 \pm \sqrt{5}}{2}", r"\frac{1+\sqrt5}{2}"),
    ("10:15 a.m.", "10:15 p.m."),
    ("1:2:3", "1:3:2"),
    ("2x + 4y = 6", "9 = 9"),
    ("x = 2y", "y = 2x"),
    ("x = 1, y = 2", "x = 2, y = 1"),
    ("1 < x < 4", "1, 4"),
    ("(1,234)", "1234"),
    ("2516_8", "2516"),
    ("32_5", "17"),
    ("listen", "silent"),
    ("B", r"\textbf{(C) }12"),
    ("x", "X"),
    ("1,2,2", "1,2"),
    (r"\emptyset", r"\{\emptyset\}"),
    ("3t", "3"),
    ("|x|", "x"),
    (r"\sqrt{x^2}", "x"),
    (r"\frac{1}{7}", "0.142857"),
    (r"\sin 30^\circ", r"\sin 30"),
    (r"7 \text{ cm}", r"7 \text{ m}"),
    (r"0.\overline{3}", "0.3"),
    (r"3 \pmod 7", "3"),
    (r"\angle ABC", r"\angle ACB"),
    ("9", "9 = 3 + 7 = 10"),
    (r"n \text{ is even}", "n"),
    ("12", "1 2"),
    ("5", r"5\text{x}"),
    ("2abc", "2"),
    ("2", "2abc"),
    ("6", "6abc"),
    ("6abc", "6"),
    ("x^2+3", "x^2+3abc"),
    (r"\frac{4}{3}\pi abc", r"\frac43\pi"),
    (r"\pi r^2", r"\pi r^2 h"),
    (r"\frac12", r"\frac12 m"),
    ("2mg", "2"),
    (r"5 \text{ kJ}", r"5 \text{ J}"),
    (r"5 \text{ MW}", r"5 \text{ mW}"),
    ("5 kJ", "5 J"),
    ("5 MW", "5 mW"),
    ("5 apples and 3 oranges", "3 apples and 5 oranges"),
    ("5 June", "5 July"),
    ("5", "5 hundred"),
    ("5", "5 dozen"),
    ("5", r"5 \text{ thousandths}"),
    ("5", r"5 \text{ lakh}"),
    ("5", r"5 \text{ dozen}"),
    ("3", "3 halves"),
    ("3", r"3 \text{ halves}"),
    (r"10\%", "10 apples"),
    ("7", "3 + 4"),
    ("3", "12 / 4"),
    ("6", r"2 \times 3"),
    ("6", r"\sum_{k=1}^{3} k"),
    ("7.7", "3.5 + 4.2"),
    ("7", r"\left(3+4\right)"),
    ("7", "x = 3 + 4"),
    ("(7, 5)", "(3+4, 2+3)"),
    ("6", r"\int_0^6 1\,dx"),
    ("21", "(3+4)(3)"),
    ("3", r"12 \div 4"),
    ("3", "12 ÷ 4"),
    ("6", r"2 \cdot 3"),
    ("6", "2 * 3"),
    ("-1", "3 - 4"),
    ("12", "3 + 4 + 5"),
    ("7", "$3 + 4$"),
    ("2", r"\frac{1}{2} \cdot 4"),
    ("1", r"\frac12+\frac12"),
    ("y'", "y"),
    ("y''+y=0", "y'+y=0"),
    ("f'(x) = 2x", "f(x) = 2x"),
    ("y''", "y'"),
    (r"y^{\prime}", "y"),
    ("3-5", "5-7"),
    ("2024-05-01", "2024-01-05"),
    ("2024-01-05", "2018"),
    ("3-2", "2-1"),
    ("2018", "2024-01-05"),
    ("-2", "3-5"),
    ("1", "3-2"),
    ("3--5", "5--7"),
    ("HTH", "HHT"),
    ("BCA", "ABC"),
    ("CO_2", "O_2C"),
    ("1 2 3", "3 2 1"),
    ("6", "1 2 3"),
    ("1 2 3", "6"),
    (r"\text{HTH}", "HHT"),
    ("H_2O", "OH_2"),
    ("Alice = 5", "Bob = 5"),
    (r"\text{Alice}=5, \text{Bob}=3", r"\text{Alice}=3, \text{Bob}=5"),
    ("(1,2)", "y=1, x=2"),
    ("f(2)=3", "f(3)=3"),
    ("P(X=2)=0.3", "P(X=3)=0.3"),
    ("(x,y)=(1,2)", "x=2, y=1"),
    (r"\text{Alice} = 5", r"\text{Bob} = 5"),
    ("xy", "|xy|"),
    ("|xy|", "xy"),
    ("xy", r"\sqrt{x^2y^2}"),
    ("|a|b", "a|b|"),
    ("a|b|", "|a|b"),
    ("5", "7=5"),
    ("5", "2+2=5"),
    ("yes, no", "no, yes"),
    (r"\$5", "€5"),
    ("€5", r"\$5"),
    ("£5", "€5"),
    (r"\text{yes}, \text{no}", r"\text{no}, \text{yes}"),
    ("5", "x = 2 + 2 = 5"),
    ("7 = 5", "7"),
    ("9", "4+5=10"),
    ("5 apples", "5 oranges"),
    (r"5 \text{ km}", r"5 \text{ m}"),
    (r"5 \text{ kilojoules}", "5 J"),
    ("3 pm", "3 am"),
    ("15:00", "3:00 am"),
    ("1, 2", "[2, 1]"),
    ("[1, 2]", "(1, 2)"),
    ("0", r"\text{No solution}"),
    ("P(A)=0.3", "P(B)=0.3"),
    ("TRUE, FALSE", "FALSE, TRUE"),
    (r"x\sqrt{x^2}", "x^2"),
    ("5", "5 pairs"),
    ("5", "5x"),
    ("5x", "5"),
    ("3ab", "3"),
    ("3ab", "3a"),
    ("6", "(1+2)!"),
    ("3", "6 / 2"),
    (r"\frac{x}{2}", "x"),
    ("2^5", "5^2"),
    ("12 cm", "12 cm^2"),
    ("5 hundred", "5"),
    ("500", "5 thousand"),
    ("1/2", r"1/2 \text{ dozen}"),
    ("x^3", "|x|^3"),
    (r"\sqrt{x^4y^2}", "x^2y"),
    ("|x-y|", "x-y"),
    ("|x-y|", "y-x"),
    ("x-y", "|x-y|"),
    ("|x|+|y|", "|x+y|"),
    (r"\{(1,2)\}", r"\{(2,1)\}"),
    ("y = 1, x = 2", "x = 1, y = 2"),
    ("AB", "CD"),
    ("12:30", "1:30"),
    ("12 am", "12 pm"),
    ("00:30", "12:30 pm"),
    ("May 5", "May 6"),
    ("5 May 2020", "5 May 2021"),
    ("3-5", "3-6"),
    ("1-0", "0-1"),
    ("x'", "x"),
    ("f'(2)", "f(2)"),
    ("2f'(x)", "2f(x)"),
    ("sin 30", "30"),
    ("5", r"5 \text{ and } 5 \text{ more}"),
    ("True", "False"),
    (r"\text{(A), (B)}", "A, C"),
    ("5 red apples", "5 green apples"),
    ("5 mm", "5 Mm"),
    ("5 mg", "5 kg"),
    ("5 km/h", "5 mph"),
    ("5 m/s", "5 m/s^2"),
    ("5", r"5 \text{ times } 3"),
    ("2, 3", "2 = 3"),
    ("1", "2 = 1 + 1 = 1"),
    (r"\text{Cost} = 5", r"\text{Profit} = 5"),
    ("a = 5, b = 3", "a = 3, b = 5"),
    ("a=5, b=3", "b=5, a=3"),
    ("7", r"\lim_{x \to 7} x"),
    ("7", r"\frac{d}{dx} 7x"),
    ("7", "14:2"),
    ("7", r"7 \text{ squared}"),
    ("7", r"7 \text{ M}"),
    ("7", r"7 \text{ mil}"),
    (r"7 \text{ feet } 3 \text{ inches}", r"3 \text{ feet } 7 \text{ inches}"),
    ("7 hours 30 minutes", "30 hours 7 minutes"),
    (r"\text{Boys: } 5", r"\text{Girls: } 5"),
    ("|abcd|", "abcd"),
    (r"\text{Total}=5, \text{Area}=3", r"\text{Total}=3, \text{Area}=5"),
    ("(1,2)", "(1,3) = (1,2)"),
    ("1, 2", r"x \equiv 1, y \le 2"),
]


@pytest.mark.parametrize(
    ("reference", "answer", "right"), [(*pair, True) for pair in RIGHT] + [(*pair, False) for pair in WRONG]
)
def test_verdicts_on_pairs_of_the_same_kinds(reference, answer, right):
    outcome = verdict(rf"Thus \boxed{{{answer}}}.", reference)
    assert (outcome == Outcome.CORRECT) == right
    assert outcome != Outcome.ERROR


@pytest.mark.parametrize(
    ("text", "opened", "answer"),
    [
        (r"<think>\boxed{7}</think> so \boxed{8}", False, r" so \boxed{8}"),
        (r"\boxed{7}</think>8", True, "8"),
        (r"<think>a</think><think>b</think>c", False, "c"),
        (r"<think>\boxed{7}", False, None),
        (r"<think>a</think>\boxed{7}<think>b", False, None),
        (r"\boxed{7}", True, None),
        (r"\boxed{7}", False, r"\boxed{7}"),
        (r"<think>\boxed{7}</think>", False, ""),
        (r"\boxed{7}</think>", True, ""),
        (r"\boxed{7}</think>", False, r"\boxed{7}"),  # nothing was opened
    ],
)
def test_only_what_follows_the_thinking_is_the_answer(text, opened, answer):
    assert after_thinking(text, opened=opened) == answer
    other = text.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
    assert after_thinking(other, ("[THINK]", "[/THINK]"), opened) == answer


@pytest.mark.parametrize(
    ("text", "opened", "outcome"),
    [
        (r"<think>the answer is \boxed{42}</think>So \boxed{41}", False, Outcome.INCORRECT),
        (r"<think>the answer is 42</think>I cannot say.", False, Outcome.UNPARSED),
        (r"<think>the answer is \boxed{42}", False, Outcome.UNPARSED),
        (r"the answer is \boxed{42}", True, Outcome.UNPARSED),
        (r"41?</think>\boxed{42}", True, Outcome.CORRECT),
        (r"<think>41</think><answer>42</answer>", False, Outcome.CORRECT),
        (r"<answer>41</answer><answer>$42$</answer>", False, Outcome.CORRECT),
        (r"<answer>41, or \boxed{42}</answer>", False, Outcome.CORRECT),  # the box goes first
        (r"<answer>42</answer><answer>41</answer>", False, Outcome.INCORRECT),
    ],
)
def test_thoughts_are_not_graded(text, opened, outcome):
    for answer in ("42", r"\frac{84}{2}"):  # decided exactly, and by algebra
        row = problem(answer)
        decided = decide_exactly(text, row, thinking_open=opened)
        assert decided is None or decided.outcome == outcome
        [function] = load_functions(RewardRecipe(functions="math"), thinking_open=opened)
        assert function.grade(text, {"id": "p-7", "answer": answer}).outcome == outcome


@pytest.mark.parametrize(
    "answer",
    ["42", "1,234", r"\frac12", r"90^\circ", "Nadia", r"\text{(C)}", r"x \ne 3", r"A \oplus B", r"2516_8", "9:30"],
)
def test_references_that_can_be_read(answer):
    assert check_math({"id": "p-7", "answer": answer}) is None


@pytest.mark.parametrize("answer", ["?", "...", r"\frac{}", r"\frac{1}{", "3 +", "3 +* 4", r"\sqrt{2"])
def test_references_that_cannot_be_read(answer):
    assert "not an expression" in check_math({"id": "p-7", "answer": answer})


def test_checking_a_plain_reference_takes_microseconds():
    started = time.perf_counter()
    assert not any(check_math({"id": "p-7", "answer": str(number)}) for number in range(10_000))
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "text", [r"x \ne 3", r"\begin{pmatrix}", r"3\!:\!00", r"\frac{1}{0}", r"\lim", r"\{,\}", "9^{9^{9^9}}", "(10^6)!"]
)
def test_an_answer_that_cannot_be_compared_is_no_error(text):
    started = time.perf_counter()
    for reference in ("5", r"x \ne 4", r"\sqrt{2}", r"y = 2x", "4 = 2 + 2"):
        assert symbolic(rf"\boxed{{{text}}}", reference).outcome in (Outcome.INCORRECT, Outcome.UNPARSED)
    assert time.perf_counter() - started < 10


def test_normalising_hostile_answers_takes_no_time():
    pieces = [
        "*",
        "~",
        "1 000 ",
        "1,000,",
        "0.1",
        r"\frac",
        r"\text{a}/",
        "(since ",
        "[1,2",
        r"{a\over b}",
        "1°",
        r"\sin1°",
        "$1",
        "^{1}",
    ]
    started = time.perf_counter()
    for piece in pieces:
        for end in ("", "x"):
            canonical((piece * MAX_BOX_CHARACTERS)[: MAX_BOX_CHARACTERS - 1] + end)
    assert time.perf_counter() - started < 2
