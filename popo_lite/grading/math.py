"""Find the final mathematical answer and compare it exactly if that decides.

Nothing here needs sympy: the trainer's process settles ordinary answers itself, and leaves the rest to `symbolic`.
"""

from __future__ import annotations

import re
from itertools import accumulate

from popo_lite.grading.normalisation import canonical
from popo_lite.types import Outcome, Problem, Reward

MAX_BOX_CHARACTERS = 1000  # a longer box holds no final answer, and parsing 100,000 characters takes minutes
MAX_NESTING = 20  # of brackets; deeper answers are not final answers, and the LaTeX parser is exponential in the depth

# An escaped character is a token of its own, so that the braces of a set, \{1, 2\}, do not count.
_BOX_TOKENS = re.compile(r"(?P<box>(?<!\\)\\+(?:boxed|fbox|framebox)\s*\{)|(?P<open>\{)|(?P<close>\})|\\.", re.DOTALL)
_LAST_BOX = re.compile(r".*\\(?:boxed|fbox|framebox)\s*\{", re.DOTALL)
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+")
ANSWER_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
THINKING_TAGS = ("<think>", "</think>")
_NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])0*+([0-9]*+)(?:\.([0-9]*+))?")


def after_thinking(text: str, tags: tuple[str, str] = THINKING_TAGS, opened: bool = False) -> str | None:
    """Return what follows the last closing tag, or all of a text without tags; None if the thinking is not closed.

    `opened` says that the prompt ends with the opening tag. A closing tag at the end of a text that never opened
    its thinking closes nothing.
    """
    opening, closing = tags
    before, closed, after = text.rpartition(closing)
    if not closed:
        return None if opened or opening in text else text
    if opening in after:
        return None
    return before if not (after.strip() or opened or opening in before or closing in before) else after


def thinking_open_at(start: int, text: str, tags: tuple[str, str], opened: bool) -> bool:
    """Return whether the thinking is open at `start`, from where on the text is graded. `opened`: it was at 0."""
    last_open, last_closed = (text.rfind(tag, 0, start + len(tag) - 1) for tag in tags)
    return last_open > last_closed or (opened and last_closed < 0)


def last_box(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` whose braces balance, or None. Of nested boxes, the innermost.

    An empty box counts only if there is no other.
    """
    if opened := _LAST_BOX.match(text):  # usually it balances, and what stands before it need not be read
        depth = 1
        for token in _BOX_TOKENS.finditer(text, opened.end()):
            depth += (token.lastgroup in ("box", "open")) - (token.lastgroup == "close")
            if not depth:
                content = text[opened.end() : token.start()]
                if content.strip():
                    return content
                break
    contents: list[int | None] = []  # for every open brace, where the content of its box starts, if it is a box
    last = (-1, -1)
    for token in _BOX_TOKENS.finditer(text):
        if token.lastgroup in ("box", "open"):
            contents.append(token.end() if token.lastgroup == "box" else None)
        elif token.lastgroup == "close" and contents:
            start = contents.pop()
            if start is not None and start > last[0] and (last[0] < 0 or text[start : token.start()].strip()):
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
    if answer.endswith(".") and not answer.endswith((r"\right.", "..")):
        answer = answer[:-1].rstrip()
    return plain_number(answer) or answer


def final_answer(text: str) -> str | None:
    """Return the content of the last box of `text`, or else of its last `<answer>` tags, in normal form; or None."""
    box = last_box(text)
    if box is None:
        box = next(reversed(ANSWER_TAGS.findall(text)), None)
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
    """Return the verdict on an answer, or None if it needs algebra or no final answer is marked."""
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
    if not (plain_number(answer) and plain_number(reference)):
        if too_complex(reference):
            return None
        found, gold = canonical(answer), canonical(reference)
        if found and found == gold:
            return Reward(value=1.0, outcome=Outcome.CORRECT, answer=answer)
        if not (plain_number(found) and plain_number(gold)):
            return None
    return Reward(value=0.0, outcome=Outcome.INCORRECT, answer=answer)
