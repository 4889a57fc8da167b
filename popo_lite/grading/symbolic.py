"""Compare answers that need algebra by math-verify. Only workers import it, as it can hang or exhaust memory."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.parser import NormalizationConfig
from sympy import Basic, Eq, Expr, I, Pow, Rational, Symbol, exp, factorial, log, nan, oo, zoo
from sympy.core.function import AppliedUndef

from popo_lite.grading.math import (
    MAX_NESTING,
    final_answer,
    plain_number,
    too_complex,
    unwrap,
)
from popo_lite.grading.normalisation import canonical
from popo_lite.grading.reading import Reading, read
from popo_lite.types import Outcome, Reward

# Its one warning says that its timeouts are off. They are signal.alarm, whole seconds and main thread only;
# the parent's deadline takes their place.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_BITS = 10**5  # of an exact number; 9^(9^9) would have 10^9
DIGITS = 50  # to which irrational numbers are compared, relative to their terms
_POINTS = ((7, 3, "+"), (11, 29, "+"), (13, 5, "-"), (13, 5, "+-"), (17, 7, "-+++++++"))
"""Points at which formulas are compared: p/q for the first variable, and the signs, which repeat; see `_at`."""

_ANSWER_LINE = re.compile(r"\banswer(?:\s+is\b|\s*:)\s*:?[ \t]*([^\n]{1,100})$", re.IGNORECASE | re.MULTILINE)
_FORMULA = LatexExtractionConfig(
    try_extract_without_anchor=False,  # otherwise it takes any part that can be read, if the whole cannot
    # its units are the last letters of a formula: 3t would be 3
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    ),
)
_GENERIC = re.compile("area|total|answer|ans|result|value|solution|sum|number|probability", re.IGNORECASE)
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
_FRACTION = r"\\frac\{\d+\}\{\d+\}"
_OPERATOR = r"[\s)}]*(?:[+*-]|\\(?:times|cdot|div)(?![a-zA-Z]))[\s({-]*"
_CALCULATION = re.compile(r"\\(?:sum|prod|i*int|lim)(?![a-zA-Z])|\\frac\{d\}" + rf"|{_FRACTION}{_OPERATOR}{_FRACTION}")
# 2^5 - 1 is an answer, and so is 3 \cdot 10^8
_INTEGER_CALCULATION = re.compile(
    rf"(?<![\^_\d])(?<!\^\{{)(?:(?:\d+|{_FRACTION}){_OPERATOR}(?:\d+(?!\s*[\^!\d])|{_FRACTION})|[1-9]\d*\s*/\s*\d)"
)
_PRIMED = re.compile("([A-Za-z])('+)")
_DANGLING = re.compile(r"[+\-*/^_=,]\s*$|\{\s*\}|[([{]\s*[*/^]|[+*/^]\s*[*/^]")


def prepare_math(**_: object) -> dict[str, Any]:
    """Grade one answer, to fill the caches of sympy and the parser.

    Otherwise the first answer after a hanging one, in a new worker, would pay for that and might be a TIMEOUT itself.
    """
    grade_math(r"\boxed{\sqrt{a}\sqrt{b}+1}", {"id": "", "answer": r"1+\sqrt{ab}"})
    return {}


def grade_math(text: str, problem: Mapping[str, Any]) -> Reward:
    """Check whether the final answer of `text` equals `problem["answer"]`.

    The final answer is the last box, or else the last `<answer>...</answer>`, or else the expression or number that
    math-verify takes for it. A reference answer that cannot be read is an ERROR: it says nothing about the text.
    """
    if reason := check_math(problem):
        return Reward(value=0.0, outcome=Outcome.ERROR, detail=f"problem {problem['id']!r}: {reason}")
    answer = final_answer(text) or _extract(text)
    if not answer or too_complex(answer):
        return Reward(value=0.0, outcome=Outcome.UNPARSED, answer=answer)
    if _equal(canonical(unwrap(problem["answer"])), canonical(answer)):
        return Reward(value=1.0, outcome=Outcome.CORRECT, answer=answer)
    outcome = Outcome.INCORRECT if _readable(canonical(answer)) else Outcome.UNPARSED
    return Reward(value=0.0, outcome=outcome, answer=answer)


def check_math(problem: Mapping[str, Any]) -> str | None:
    """Return why the reference answer `problem["answer"]` cannot be read, or None if it can."""
    reference = unwrap(problem["answer"])
    if plain_number(reference):
        return None
    reason = too_complex(reference)
    # With all digits the same, most references of a dataset have the shape of one that was read before.
    if reason is None and not _readable(re.sub(r"\d", "1", canonical(reference))):
        reason = "not an expression that math-verify can parse"
    return reason and f"the reference answer is {reason}: {reference[:80]!r}"


def _extract(text: str) -> str | None:
    """Return what math-verify takes for the final answer of a text without a box, or else what follows "answer:"."""
    text = re.sub(r"\*\*|__|`|\\text(?:bf|it|rm)?\{([^{}]*)\}", r"\1", text)
    # math-verify takes time in proportion to the square of a run of blanks. Short runs stay: 1<tab>000 is not 1 000.
    text = re.sub(r"[^\S\n]{3,}", " " * 3, text)
    found = parse(text, parsing_timeout=None, raise_on_error=False)
    lines: list[str] = _ANSWER_LINE.findall(text)
    return next((item for item in found if isinstance(item, str)), lines[-1] if lines else None)


def _readable(text: str) -> bool:
    """Say whether all parts of a normalised answer are words, literals or formulas that can be parsed."""
    reading = read(text)
    if reading.kind in ("literal", "letter"):
        return bool(re.search(r"\w", reading.parts[0].replace(r"\ldots", "")))
    if reading.kind == "value":
        return _parse_formula(reading.parts[0]) is not None or _is_symbolic_text(reading.parts[0])
    return all(map(_readable, reading.parts))


def _is_symbolic_text(text: str) -> bool:
    """Say whether `text` is a whole formula with commands that the parser does not know. It equals only itself."""
    balanced = all(text.count(pair[0]) == text.count(pair[1]) for pair in ("{}", "()"))
    return balanced and bool(re.search(r"\\[a-zA-Z]{2,}|°|\\\|", text)) and not _DANGLING.search(text)


def _squeeze(text: str) -> str:
    """Return `text` without blanks, but for those between digits."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _equal(gold: str, found: str, depth: int = 0) -> bool:
    """Compare two normalised answers part by part."""
    if _squeeze(gold) == _squeeze(found):
        return True
    x, y = read(gold), read(found)
    if {x.kind, y.kind} == {"literal", "value"}:
        x, y = read(gold, times=False), read(found, times=False)
    if depth > MAX_NESTING:
        return False
    if "chain" in (x.kind, y.kind):
        return _equal_chains(x, y, gold, found, depth)
    names = {x.name, y.name} - {""}
    if len(names) == 2 and sum(bool(_GENERIC.match(name)) for name in names) != 1:
        return _equal_equations(gold, found)
    if "letter" in (x.kind, y.kind):
        return _equal_letters(x, y, gold, found, depth)
    if "equation" in (x.kind, y.kind):
        return _equal_equations(gold, found)
    if x.kind == y.kind == "value":
        return _equal_values(x, y)
    if x.kind == y.kind and x.unit != y.unit and x.unit and y.unit:  # a.m. and p.m., or a matrix of other rows
        return False
    kinds = {x.kind, y.kind}
    if x.kind == y.kind == "literal":
        return x.parts == y.parts or ("and" in (x.unit, y.unit) and sorted(x.parts) == sorted(y.parts))
    if len(x.parts) != len(y.parts):
        return False
    x, y = (_in_order(one, other) for one, other in ((x, y), (y, x)))
    kinds = {x.kind, y.kind}
    if kinds <= {"list", "set"} or kinds == {"union"}:
        remaining = list(y.parts)
        for part in x.parts:
            match = next((other for other in remaining if _equal(part, other, depth + 1)), None)
            if match is None:
                return False
            remaining.remove(match)
        return True
    # A pair may lack its brackets; but not an interval that was an inequality, which has a name.
    if len(kinds) == 2 and (kinds not in ({"list", "()"}, {"list", "[]"}) or any("(" not in name for name in names)):
        return False
    return all(_equal(part, other, depth + 1) for part, other in zip(x.parts, y.parts, strict=True))


def _in_order(x: Reading, other: Reading) -> Reading:
    """Return `y = 1, x = 2` as the pair (2, 1), if `other` does not name its values; else `x` unchanged."""
    if x.kind != "list":
        return x
    named = {one.name: part.split("=") for part in x.parts if "=" in part and (one := read(part)).name}
    if len(named) < len(x.parts) or not named or any(read(part).name for part in other.parts):
        return x
    if other.kind in ("list", "set") and len({name.partition("_")[0] for name in named}) == 1:  # the roots x_1, x_2
        return x
    order = other.name.strip("()").split(",") if other.name else sorted(named)
    if set(order) != set(named):
        return x
    sides = ((name, named[name][0], named[name][-1]) for name in order)
    return Reading("()", tuple(first if last.strip() == name else last for name, first, last in sides), name=other.name)


def _equal_chains(x: Reading, y: Reading, gold: str, found: str, depth: int) -> bool:
    """Compare `a = b = c` by any of its sides if these are equal; of those with letters, only the last counts."""
    texts = []
    for side, text in ((x, gold), (y, found)):
        if side.kind != "chain":
            texts.append([text])
            continue
        *others, last = side.parts
        others = [part for part in others if not _LETTERS.search(part)]
        if not all(_equal(part, last, depth + 1) or _equal(last, part, depth + 1) for part in others):
            return False
        name = f"{side.name} = " if side.name else ""
        texts.append([name + part for part in [last, *others]])
    return any(_equal(one, other, depth + 1) for one in texts[0] for other in texts[1])


def _equal_letters(x: Reading, y: Reading, gold: str, found: str, depth: int) -> bool:
    """Compare `(C)`, `C` and `(C) 17`; the value counts only if both have one, or the other has no letter."""
    if x.kind == y.kind:
        same_letter = x.parts[0] == y.parts[0] or (x.parts[0].upper() == y.parts[0].upper() and "(" in gold + found)
        return same_letter and (not x.parts[1] or not y.parts[1] or _equal(x.parts[1], y.parts[1], depth + 1))
    letter, other = (x, found) if x.kind == "letter" else (y, gold)
    if not letter.parts[1]:
        return _equal_formulas(letter.parts[0], other)
    return _equal(*((other, letter.parts[1]) if letter is y else (letter.parts[1], other)), depth + 1)


def _equal_values(x: Reading, y: Reading) -> bool:
    """Compare two values with their units; 3 + 4 is no answer if the reference is 7."""
    gold, found = x.parts[0], y.parts[0]
    if _is_calculation(found, gold):
        return False
    if x.unit and y.unit and not _same_unit(x.unit, y.unit):
        return False
    if "%" in (x.unit, y.unit) and x.unit != y.unit:
        percent, other = (gold, found) if x.unit == "%" else (found, gold)
        return _equal_formulas(percent, other) or _equal_formulas(rf"\frac{{{percent}}}{{100}}", other)
    return _equal_formulas(gold, found)


def _is_calculation(found: str, gold: str) -> bool:
    """Say whether `found` is a calculation such as 3 + 4, which may repeat the question, and `gold` its result."""
    if plain_number(gold):
        return bool(_CALCULATION.search(found) or _INTEGER_CALCULATION.search(found))
    return bool(re.fullmatch(f"-?{_FRACTION}", gold) and _CALCULATION.search(found))


def _same_unit(x: str, y: str) -> bool:
    """Say whether two units are equal, or one has more words, such as "red apple" and "apple"."""
    return x == y or (
        f"{x} {y}".replace(" ", "").isalpha() and bool({*x.split()} <= {*y.split()} or {*y.split()} <= {*x.split()})
    )


def _equal_formulas(gold: str, found: str) -> bool:
    exact = plain_number(gold), plain_number(found)
    if all(exact):
        return exact[0] == exact[1]
    if _squeeze(gold) == _squeeze(found):
        return True
    letters = [set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]", text)) for text in (gold, found)]
    if letters[0] != letters[1] and {c.lower() for c in letters[0]} == {c.lower() for c in letters[1]}:
        return False  # the parser takes X for x
    x, y = _parse_formula(gold), _parse_formula(found)
    if x is None or y is None:
        return False
    try:
        if isinstance(x, Expr) and isinstance(y, Expr):
            return _identical(x, y)
        return type(x) is type(y) and verify([x], [y], timeout_seconds=None)
    except MemoryError:
        raise
    except Exception:  # sympy raises many kinds on what a model writes
        return False


def _prime(match: re.Match[str]) -> str:
    """Return y'' as y_{902}, because the parser ignores primes."""
    return f"{match[1]}_{{{900 + len(match[2])}}}"


@lru_cache(maxsize=4096)
def _parse_formula(text: str) -> Basic | None:
    """Return what math-verify parses a formula to, all of it; None if it cannot."""
    if too_complex(text) or not text.strip():
        return None
    try:
        found = parse(
            rf"\boxed{{{_PRIMED.sub(_prime, text)}}}",
            [_FORMULA],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,
            raise_on_error=True,
        )
    except MemoryError:
        raise
    except Exception:
        return None
    return found[0] if found and isinstance(found[0], Basic) else None


def _unify(expression: Expr) -> Expr:
    """Return `expression` with symbols without assumptions, i for the imaginary unit, and f(2) as one symbol."""
    expression = expression.replace(lambda e: isinstance(e, AppliedUndef), lambda e: Symbol(str(e)))
    return expression.subs(
        {symbol: I if symbol.name == "i" else Symbol(symbol.name) for symbol in expression.free_symbols}
    )


def _identical(x: Expr, y: Expr) -> bool:
    """Say whether two expressions are equal: exactly for rational numbers, to `DIGITS` digits for others.

    Formulas are compared at the points of `_POINTS`. One with a negative number counts only if all roots and
    logarithms are real there, so that 1/sqrt(n) is sqrt(1/n), but sqrt(x^2) is not x.
    """
    x, y = _unify(x), _unify(y)
    if x == y:
        return not x.has(nan, zoo)
    if max(_bits(x), _bits(y)) > MAX_BITS:
        return False
    x, y = x.doit(), y.doit()
    if x.has(oo, -oo, zoo, nan) or y.has(oo, -oo, zoo, nan):
        return bool(x == y) and not x.has(nan, zoo)
    symbols = x.free_symbols | y.free_symbols
    if not symbols:
        return _is_zero(x - y)
    for point in _POINTS:
        if "-" in point[2] and not all(_is_real(point, side, symbols) for side in (x, y)):
            continue
        if not _is_zero(_at(point, x, symbols) - _at(point, y, symbols)):
            return False
    return True


def _is_real(point: tuple[int, int, str], expression: Expr, symbols: set[Symbol]) -> bool:
    """Say whether `expression` has no root or logarithm of a negative number at a point."""
    bases = [power.base for power in expression.atoms(Pow) if not power.exp.is_integer]
    bases += [logarithm.args[0] for logarithm in expression.atoms(log)]
    return not any(_at(point, base, symbols).is_negative for base in bases)


def _at(point: tuple[int, int, str], expression: Expr, symbols: set[Symbol]) -> Expr:
    """Return the value of `expression` with rational numbers for the symbols, in the order of their names."""
    numerator, denominator, signs = point
    values = (
        Rational(numerator * (k + 1) + k, denominator + k) * (-1 if signs[k % len(signs)] == "-" else 1)
        for k in range(len(symbols))
    )
    return expression.subs(dict(zip(sorted(symbols, key=str), values, strict=True)))


def _is_zero(difference: Expr) -> bool:
    if difference.is_Rational:
        return bool(difference == 0)
    # A difference whose sign evalf cannot find to 4 DIGITS digits has the precision 1.
    value = difference.evalf(DIGITS, maxn=4 * DIGITS)
    parts = value.as_real_imag()
    if not all(part.is_Number for part in parts):
        return bool(difference.equals(0))
    return all(part == 0 or getattr(part, "_prec", 0) == 1 for part in parts)


def _bits(expression: Basic) -> float:
    """Return a bound on the bits of an expression's exact value, so that 9^(9^9) is not computed."""
    if isinstance(expression, Rational):
        return float(expression.p.bit_length() + expression.q.bit_length())
    inner = [_bits(argument) for argument in expression.args]
    if expression.is_Pow or isinstance(expression, factorial | exp):
        exponent = expression.args[-1]
        if inner[-1] > 64:
            return math.inf
        times = abs(complex(exponent.doit().evalf())) if exponent.is_number else 1.0
        return (inner[0] + 1) * max(times, 1.0)
    return sum(inner, 8.0)


def _equal_equations(gold: str, found: str) -> bool:
    """Compare equations up to a constant factor."""
    x, y = _parse_formula(gold), _parse_formula(found)
    if x is None or y is None:
        return False
    try:
        if not (isinstance(x, Eq) and isinstance(y, Eq)):
            return False
        sides = [_unify(equation.lhs - equation.rhs) for equation in (x, y)]
        if max(map(_bits, sides)) > MAX_BITS:
            return False
        symbols = sides[0].free_symbols | sides[1].free_symbols
        first, *others = [[_at(point, side, symbols) for side in sides] for point in _POINTS]
        same_ratio = (_is_zero(first[0] * other[1] - first[1] * other[0]) for other in others)
        return not any(map(_is_zero, first)) and all(same_ratio)
    except MemoryError:
        raise
    except Exception:
        return False
