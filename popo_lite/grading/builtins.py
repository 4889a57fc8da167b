"""Grade by the built-in functions that need no module of their own. Only workers import it.

`grade_NAME(text, problem, ...)` returns a reward, a number from 0 to 1, or None if there is no answer in the text.
`check_NAME(problem, ...)` returns why the problem's reference cannot be read, or None. `prepare_NAME(...)` returns
further options when the function is loaded, or raises ValueError with what is wrong. Their keyword arguments are the
recipe's options. `text` is what follows the thinking, but for the functions in `WHOLE_TEXT`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, DecimalException, localcontext
from pathlib import Path
from typing import Any

from popo_lite.types import Outcome, Reward

Problem = Mapping[str, Any]


def grade_exact(text: str, problem: Problem) -> Reward | None:
    """Return CORRECT if the answer is the reference, but for white space around them."""
    answer = text.strip()
    return _verdict(answer == problem["answer"].strip(), answer) if answer else None


# --------------------------------------------------------------------------- choices

# A statement counts before a letter that merely looks like one: "The answer is C, because (B) is too small".
_STATED = re.compile(
    r"(?:\b(?:[Aa]nswer|[Cc]orrect (?:choice|option|one))(?:\s+is|\s*[:=])|\bANSWER(?:\s+IS|\s*:)|\\boxed|<answer>)"
    r"(?:[\s:*_$()\[\]{\"'`]|[Oo]ption\b|[Cc]hoice\b|\\(?:text|textbf|mathrm|boxed)\b)*+"
    r"([A-Z](?![\w'’])|[a-z](?=[.)\]}*$\"'` ]*+(?:$|<)))|\b([A-Z])\)?\s+is\s+(?:the\s+)?(?:correct|right)\b",
    re.MULTILINE,
)
_MARKED = re.compile(
    r"\(([A-Za-z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+([A-Z])(?![\w'’])|(?<![\w.'’])([A-Z])(?:[.):]|\*\*)(?!\w)|^\s*([A-Z])\s*$",
    re.MULTILINE,
)
_LINK = r"[\s)\]}*$.]*+(?:,?\s*\b(?:or|and)\b|[,/&])[\s(\[{*$]*+(?:(?:[Oo]ption|[Cc]hoice)\s+)?[({*$]*+"
# "C or D", "C, D" and "C and D", but neither "C, A is too small" nor "C, I think".
_NEXT = re.compile(rf"{_LINK}(?!I [a-z])[A-Z](?![\w'’])(?!\s+(?:is|are|was|were|has|does|can|would)\b)")
_BEFORE = re.compile(rf"(?<![\w'’])[A-Z]{_LINK}\Z")
_DENIED = re.compile(r"(?:\bnot|n['’]t)[\s(*]+(?:(?:[Oo]ption|[Cc]hoice)\s+)?[(*]*\Z")
_ONLY = re.compile(r"[\s(\"'*$]*([A-Za-z])[\s).:\"'*$]*")


def grade_choice(text: str, problem: Problem, *, choices: int) -> Reward | None:
    """Return CORRECT if the last choice that the answer states is the reference's. Several at once are no choice."""
    only = _ONLY.fullmatch(text)
    found = [only] if only else [*_STATED.finditer(text)] or [*_MARKED.finditer(text)]
    for match in reversed(found):
        start, end = match.span(match.lastindex or 0)
        letter, before = text[start:end].upper(), text[max(0, start - 40) : start]
        if _index(letter) >= choices or _DENIED.search(before):
            continue
        if _BEFORE.search(before) or _NEXT.match(text, end):
            return None
        return _verdict(letter == _letter(problem["answer"], choices), letter)
    return None


def check_choice(problem: Problem, *, choices: int) -> str | None:
    """Return why the reference is no choice, or None."""
    if _letter(problem["answer"], choices):
        return None
    last = chr(ord("A") + choices - 1)
    return f"{problem['answer']!r:.80} is neither a letter from A to {last} nor an index from 0 to {choices - 1}"


def _letter(reference: str, choices: int) -> str | None:
    """Return the letter of a reference: "C", "(c)", "C. Paris", or its index from 0."""
    reference = reference.strip()
    if re.fullmatch("[0-9]{1,2}", reference):
        return chr(ord("A") + int(reference)) if int(reference) < choices else None
    found = _ONLY.fullmatch(reference) or re.match(r"\(?([A-Z])[).:]", reference)
    return found[1].upper() if found and _index(found[1]) < choices else None


def _index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


# --------------------------------------------------------------------------- numbers

# Not the 2 of "m/s^2", "s^{-2}", "m2" or "x_{2}"; "5-3" has no minus. Possessive: a long run of digits is read once.
_NUMBER = re.compile(
    r"(?<!\w\*\*)(?:(?<![\w)\]}^])(?<!\^\{)(?P<sign>[-+])|(?<![\w.^])(?<![0-9]:)(?<![\^_]\{)(?<!\^-)(?<!\^\{-))"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)?(?:\.[0-9]++)?)(?<=[0-9])"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,9})(?!\w)"
    r"|\s?(?:[x×*]|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{?(?P<tens>[-+]?[0-9]{1,9})(?![0-9]|\.[0-9])\}?"
    r"|(?:\s?\^\s?|\*\*)\{?(?P<power>[-+]?[0-9]{1,9})(?![0-9]|\.[0-9])\}?)?"
    r"(?:\s?/\s?(?P<divisor>[0-9]++)(?![0-9.]))?(?:\s(?P<word>hundred|thousand|million|billion|trillion)\b)?"
    r"(?P<more>\s?[)}]?\s?\^(?!\s?\{?\s?(?:\\circ|°))|:[0-9])?"  # 10^x, (-2)^2 and 12:30 are not read
)
_ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def _add_whole(match: re.Match[str]) -> str:
    whole, numerator, denominator = map(int, match.groups())
    return f"{whole * denominator + numerator}/{denominator}" if numerator < denominator else match[0]


_SPELLINGS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile("−"), "-"),
    # 1{,}234, 1\,234 and 1 234
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\[,;:! ]|[ \u2009\u202f\u00a0])(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"([-+]?)\\[dt]?frac ?(?:\{([0-9]++)\}|([0-9])) ?(?:\{([0-9]++)\}|([0-9]))"), r" \1\2\3/\4\5 "),
    (re.compile(r"(?<![\w.,^}/])([0-9]{1,15})\s{1,2}([0-9]{1,15})/([0-9]{1,15})(?![0-9])"), _add_whole),
    # "- 3", "= - 3", "$-$3", "-$3", but not "5 - 3"
    (re.compile(r"((?:^|[=:({]|(?<![\w)}])\$|\bis\b)\s*+)-\s*+(?:\\?\$)?(?=\.?[0-9])"), r"\1-"),
    (re.compile(r"(?<![\w)\]}$])-\\?\$(?=\.?[0-9])"), "-"),
)


def grade_numeric(text: str, problem: Problem, *, tolerance: float, relative_tolerance: float) -> Reward | None:
    """Return CORRECT if the answer's last number is the reference's, within the larger of the two tolerances."""
    number, reference = last_number(text), last_number(problem["answer"])
    if reference is None:
        detail = f"problem {problem['id']!r}: {check_numeric(problem)}"
        return Reward(value=0.0, outcome=Outcome.ERROR, detail=detail)
    if number is None:
        return None
    try:
        # Decimals, so that 0.1 + 0.2 is within 0 of 0.3 and digits beyond those of a float count.
        allowed = max(Decimal(str(tolerance)), Decimal(str(relative_tolerance)) * abs(reference))
        right = number == reference or (allowed > 0 and abs(number - reference) <= allowed)
    except DecimalException:  # beyond 10^999999
        right = number == reference
    return _verdict(right, f"{number:.20g}")


def check_numeric(problem: Problem) -> str | None:
    """Return why the reference is no number, or None."""
    return None if last_number(problem["answer"]) is not None else f"{problem['answer']!r:.80} holds no number"


def last_number(text: str) -> Decimal | None:
    """Return the last number of `text`, or None if there is none or it cannot be read.

    Forms: 1,234.5, -3, 1e-5, 2 x 10^3, 2^10, 2 million, 3/4, 3 1/2, or a LaTeX fraction of integers.
    """
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    if last is None or last["more"]:
        return None
    shift = int(last["exponent"] or last["tens"] or 0) + _ZEROS.get(last["word"], 0)
    try:
        with localcontext(prec=100):
            number = Decimal(f"{last['digits'].replace(',', '')}e{shift}")
            number = number ** int(last["power"]) if last["power"] else number
            number = number / Decimal(last["divisor"]) if last["divisor"] else number
    except DecimalException:  # such as a division by 0
        return None
    return number.copy_negate() if last["sign"] == "-" else number


# --------------------------------------------------------------------------- form


def grade_regex(text: str, problem: Problem, *, pattern: str) -> bool:  # noqa: ARG001
    """Return whether `pattern` occurs in the text."""
    return re.search(pattern, text) is not None


def grade_length(text: str, problem: Problem, *, min: int | None, max: int | None, unit: str) -> float:  # noqa: ARG001
    """Return 1 for a length from `min` to `max`, and less outside: 0 for no text and at twice `max`."""
    length = len(text.split()) if unit == "words" else len(text)
    if min is not None and length < min:
        return length / min
    return 1.0 if max is None or length <= max else 1 - (length - max) / max if length < 2 * max else 0.0


SCRIPTS = {"Han": ("CJK",), "Japanese": ("CJK", "HIRAGANA", "KATAKANA")}
"""Script -> the first words of its letters' names in Unicode, if that is not the script's own name."""


def grade_language(text: str, problem: Problem, *, script: str) -> float | None:  # noqa: ARG001
    """Return the fraction of letters that belong to `script`; None without letters. LaTeX commands do not count."""
    letters = [character for character in re.sub(r"\\[A-Za-z]+", "", text) if character.isalpha()]
    names = SCRIPTS.get(script, (script.upper(),))
    own = sum(unicodedata.name(letter, "").startswith(names) for letter in letters)
    return own / len(letters) if letters else None


# --------------------------------------------------------------------------- JSON


SEARCHED = 100_000  # last characters; a start that fails costs time in proportion to the text
MAX_FAILED = 1000  # starts; more are no answer, and each may be nested deep
_VALUE_START = re.compile(r"\{(?=\s{0,99}[\"}])|\[(?=\s{0,99}[]\[{\"0-9tfn-])")  # unlike the braces of LaTeX


def prepare_json_schema(
    *, json_schema: Mapping[str, Any] | None, schema_file: str | None, **_: object
) -> dict[str, Any]:
    """Return the validator. Raises ValueError if the file cannot be read or the schema is not valid."""
    import jsonschema
    import referencing.jsonschema

    schema: Any = json_schema
    if schema_file is not None:
        try:
            schema = json.loads(Path(schema_file).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"schema_file = {schema_file!r} cannot be read: {error}") from error
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"the schema is not valid at {error.json_path}: {error.message:.200}") from error
    # An empty registry: without it, a `$ref` to a URL would be fetched.
    registry: referencing.Registry[Any] = referencing.Registry()
    standard = referencing.jsonschema.specification_with(kind.META_SCHEMA.get("$id") or kind.META_SCHEMA["id"])
    _resolve(schema, standard, registry.resolver_with_root(standard.create_resource(schema)))
    return {"validator": kind(schema, registry=registry)}


def _resolve(schema: Any, standard: Any, resolver: Any) -> None:
    """Look up all references of a schema. Raises ValueError for one to no part of the schema."""
    from referencing.exceptions import Unresolvable

    if isinstance(schema, dict):
        if isinstance(schema.get("$id"), str):
            resolver = resolver.in_subresource(standard.create_resource(schema))
        if isinstance(schema.get("$ref"), str):
            try:
                resolver.lookup(schema["$ref"])
            except Unresolvable as error:
                raise ValueError(f'"$ref" = "{schema["$ref"]}" is in no part of the schema itself') from error
    if isinstance(schema, dict | list):
        for part in schema.values() if isinstance(schema, dict) else schema:
            _resolve(part, standard, resolver)


def grade_json_schema(text: str, problem: Problem, *, validator: Any, equals_reference: bool) -> Reward | None:
    """Return CORRECT if the answer's last JSON value is valid and, if asked, equals the reference."""
    found = last_json(text)
    if not found:
        return None
    try:
        right = validator.is_valid(found[0])
        if right and equals_reference:
            right = _equal(found[0], json.loads(problem["answer"]))
    except RecursionError:
        return Reward(value=0.0, outcome=Outcome.UNPARSED, detail="the JSON is nested too deep")
    return _verdict(right, json.dumps(found[0], ensure_ascii=False, sort_keys=True)[:1000])


def check_json_schema(problem: Problem, *, validator: Any, equals_reference: bool) -> str | None:
    """Return why the reference is not valid JSON, or None; no reference is needed without `equals_reference`."""
    if not equals_reference:
        return None
    try:
        error = next(validator.iter_errors(json.loads(problem["answer"])), None)
    except ValueError as wrong:
        return f"{problem['answer']!r:.80} is not JSON: {wrong}"
    return f"it does not follow the schema at {error.json_path}: {error.message:.200}" if error else None


def last_json(text: str) -> list[Any]:
    """Return a list with the last JSON value of `text`, or an empty one.

    That is the last in a code fence, else the whole text, else the last object or array in it.
    """
    fenced = [part.removeprefix("json") for part in text.split("```")[1::2]]
    for whole in (*reversed(fenced), text):
        try:
            return [json.loads(whole, parse_constant=_refuse_constant)]
        except (ValueError, RecursionError):
            continue
    return list(_values(text[-SEARCHED:]))[-1:]


def _values(text: str) -> Iterator[Any]:
    """Yield the objects and arrays in `text` that are in no other."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    end = failed = 0
    for start in _VALUE_START.finditer(text):
        if start.start() >= end:
            try:
                value, end = decoder.raw_decode(text, start.start())
                yield value
            except (ValueError, RecursionError):
                failed += 1
                if failed > MAX_FAILED:
                    return


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _equal(first: object, second: object) -> bool:
    """Compare as JSON does: 1 is 1.0, and is not true."""
    import jsonschema

    return bool(jsonschema.Draft202012Validator({"const": second}).is_valid(first))


def _verdict(right: bool, answer: str) -> Reward:
    outcome = Outcome.CORRECT if right else Outcome.INCORRECT
    return Reward(value=float(right), outcome=outcome, answer=answer)
