"""Find the final mathematical answer and compare it exactly if that decides.

Nothing here needs sympy: the trainer's process settles ordinary answers itself, and leaves the rest to `symbolic`.
"""

from __future__ import annotations

import re
from itertools import accumulate

from popo_lite.types import Outcome, Problem, Reward

THINKING_TAGS = ("<think>", "</think>")
MAX_BOX_CHARACTERS = 1000  # a longer box holds no final answer, and parsing 100,000 characters takes minutes
MAX_NESTING = 20  # of brackets; deeper ones hold none either, and the LaTeX parser is exponential in the depth

# An escaped character is a token of its own, so that the braces of a set, \{1, 2\}, do not count.
_BOX_TOKENS = re.compile(r"(?P<box>\\boxed\s*\{)|(?P<open>\{)|(?P<close>\})|\\.", re.DOTALL)
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+")
_NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])0*+([0-9]*+)(?:\.([0-9]*+))?")


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` whose braces balance, or None. Of nested boxes, the innermost."""
    contents: list[int | None] = []  # for every open brace, where the content of its box starts, if it is a box
    last = (-1, -1)
    for token in _BOX_TOKENS.finditer(text):
        if token.lastgroup in ("box", "open"):
            contents.append(token.end() if token.lastgroup == "box" else None)
        elif token.lastgroup == "close" and contents:
            start = contents.pop()
            if start is not None and start > last[0]:
                last = (start, token.start())
    return text[last[0] : last[1]] if last[0] >= 0 else None


def plain_number(text: str) -> str | None:
    """Return the normal form of a plain integer or decimal, or None for anything else.

    Two plain numbers are equal exactly when these strings are, whatever their number of digits.
    """
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    parts = _NUMBER.fullmatch(text)
    if parts is None:
        return None
    whole, fraction = parts[2] or "0", (parts[3] or "").rstrip("0")
    sign = "-" if parts[1] == "-" and (whole != "0" or fraction) else ""
    return f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"


def normalise(answer: str) -> str:
    """Strip dollar signs and a full stop from `answer`; bring a plain number into normal form."""
    answer = answer.strip().replace("−", "-")
    inner = answer.strip("$")
    if "$" not in inner:  # otherwise several formulas, whose signs belong together
        answer = inner.strip()
    if answer.endswith(".") and not answer.endswith(r"\right."):
        answer = answer[:-1].rstrip()
    return plain_number(answer) or answer


def after_thinking(text: str, tags: tuple[str, str], opened: bool) -> str | None:
    """Return the text behind the last closing tag, or None if thinking was opened and not closed.

    `tags` are the opening and the closing one; `opened` says whether the prompt ends with the opening
    one.
    """
    _, closing, answer = text.rpartition(tags[1])
    if closing:
        return answer
    return None if opened or tags[0] in text else text


def final_answer(text: str) -> str | None:
    """Return the content of the last box of `text` in normal form, or None if nothing is boxed."""
    box = last_box(text)
    return None if box is None else normalise(box)


def unwrap(reference: str) -> str:
    """Return a reference answer in normal form; datasets write it bare, between dollar signs, or in a box."""
    box = last_box(reference)
    return normalise(reference if box is None else box)


def too_complex(expression: str) -> str | None:
    """Return why `expression` is too complex for the LaTeX parser, or None."""
    if len(expression) > MAX_BOX_CHARACTERS:
        return f"{len(expression):,} characters long; the limit is {MAX_BOX_CHARACTERS:,}"
    deepest = max(accumulate((character in "([{") - (character in ")]}") for character in expression), default=0)
    return f"nested {deepest} deep; the limit is {MAX_NESTING}" if deepest > MAX_NESTING else None


def decide_exactly(
    text: str, problem: Problem, *, thinking_tags: tuple[str, str] = THINKING_TAGS, thinking_open: bool = False
) -> Reward | None:
    """Return the verdict on an answer, or None if it needs algebra or nothing is boxed."""
    part = after_thinking(text, thinking_tags, thinking_open)
    if part is None:
        return Reward(value=0.0, outcome=Outcome.UNPARSED, detail=f"no {thinking_tags[1]} ends the thinking")
    answer = final_answer(part)
    if answer is None:
        return None
    if not answer:
        return Reward(value=0.0, outcome=Outcome.UNPARSED, detail="the box is empty")
    reference = unwrap(problem.answer)
    if answer == reference:
        return Reward(value=1.0, outcome=Outcome.CORRECT, answer=answer)
    if reason := too_complex(answer):
        return Reward(value=0.0, outcome=Outcome.UNPARSED, detail=f"the boxed answer is {reason}")
    if plain_number(answer) and plain_number(reference):
        return Reward(value=0.0, outcome=Outcome.INCORRECT, answer=answer)
    return None
