r"""Split a normalised answer into its parts: lists, pairs, intervals, matrices, names, units, words. Needs no sympy.

Whatever the LaTeX parser of math-verify reads as something else, such as `2516_8`, `3 \pmod 7`, `9:30` or a bare
word, becomes literal text here, which equals only itself.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import gcd
from typing import NamedTuple

from popo_lite.grading.normalisation import closing, strip_braces


class Reading(NamedTuple):
    """Hold the kind, parts, name and unit of an answer."""

    kind: str  # value, literal, letter, list, set, union, matrix, equation, chain, or two brackets such as "[)"
    parts: tuple[str, ...]
    name: str = ""
    unit: str = ""


_TIME = re.compile(
    r"(?=.*[:a-z])0?(1?\d|2[0-4])(?::([0-5]\d))?(?:\s*(?:\\text\{)?\s*([ap])\.?\s?m\.?\s*\}?)?", re.IGNORECASE
)
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+")
_BASE = re.compile(
    r"[({]?\s*([0-9][0-9A-Fa-f]*)\s*[)}]?\s*(?:_[{(\s]*(?:\\text\{)?\s*(?:base\s*\}?\s*)?(\w+)|"
    r"(?:\\text\{)?\s*\(?(?:in )?base[\s}]*(\d+))[\s)}]*"
)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_CONGRUENCE = re.compile(r"(?:(?P<name>.*?)\\equiv)?(?P<residues>.*?)[({\s]*\\pmod[\s{]*(?P<modulus>[^{}()]*)[\s})]*")
_LETTER = re.compile(r"\((?:\\text\{)?\s*([A-Za-z])\s*\}?\)(?:\s+(.*)|)|([A-Z])(?:[.:)]\s*(.*))?", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z'.-]+(?:[\s,]+[A-Za-z'.-]+)*")
_DASHES = re.compile(r"\d+(?:--?\d+){1,2}")  # ranges, scores, dates
_BLANKS = re.compile(r"\d+(?: \d+)+")
_CAPITALS = re.compile(r"[A-Z]{2,}'*|(?:[A-Z][a-z]?(?:_?\{?\d+\}?)?){2,}")  # HTH, AB, CO_2
_PRODUCT = re.compile(r"[^aeiouAEIOU]+|[a-dA-D]{2,4}")  # bare letters such as xy or abc, but not a word
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_RELATION = re.compile(r"\\(?:le|ge)(?![a-zA-Z])|[<>]")
_SYMBOL = re.compile(
    r"\s*(?:\\[a-zA-Z]+\s*)?(?:\{?[A-Za-z]\}?|\\text\{[^{}]*\}|[A-Za-z]{3,}|\\[a-zA-Z]+)?'*"
    r"(?:_\{?\w+\}?)?(?:\s*\([A-Za-z0-9, ]*\))?\s*|\s*[A-Z]\s*\([^()+*/^-]*\)\s*|"
    r"\s*\([A-Za-z]\s*(?:,\s*[A-Za-z]\s*)+\)\s*"
)
_MATRIX = re.compile(r"[(\[]?\s*\\begin\{([bp]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.DOTALL)

_UNITS = {
    alias: unit
    for unit, aliases in {
        "m": "meter metre", "in": "inch", "ft": "foot feet", "yd": "yard", "mi": "mile", "s": "second sec",
        "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "", "yr": "year", "g": "gram gm",
        "lb": "pound £", "oz": "ounce", "l": "liter litre", "$": "dollar usd buck", "€": "euro eur", "cent": "¢",
        "yen": "¥", "°": "degree deg", "rad": "radian", "%": "percent pct", "°c": "", "°f": "", "mi/h": "mph",
        "km/h": "kph kmh kmph", "m/s": "mps", "N": "newton", "J": "joule", "W": "watt", "Hz": "hertz", "Pa": "pascal",
        "V": "volt", "A": "ampere amp", "Wh": "", "eV": "", "mol": "mole", "cal": "calorie", "B": "byte", "bit": "",
        "person": "people", "child": "children",
    }.items()
    for alias in (unit, *aliases.split())
}  # fmt: skip
_PREFIXES = {"kilo": "k", "mega": "M", "giga": "G", "tera": "T", "hecto": "h", "deci": "d", "centi": "c", "milli": "m"}
_PREFIXES |= {"micro": "µ", "nano": "n"}
_SYMBOLS = re.compile(r"([TGMkhdcmuµμn]?)(m|g|l|L|s|N|J|W|Hz|Pa|V|A|Wh|eV|mol|cal|B|bit)")
_VARIABLES = re.compile(r"[mnhduTGM][gslLNJWVAB]")  # 2mg may be a product; 2 mg is not
_NAMES = re.compile(rf"({'|'.join(_PREFIXES)})([a-z]+)")
_NUMBER_WORDS = re.compile(
    r"\b(?:squared|cubed|factorial|negative|mil|bn|hundred|thousand|[mbtr]+illion|dozen|score|gross|lakh|crore|pair|couple|hal(?:f|ve)|third|quarter|"
    r"(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)th|one|two|three|four|five|six|seven|eight|nine|ten)"
    r"s?\b",
    re.IGNORECASE,
)
_UNIT_END = re.compile(
    r"(?P<value>.*?[\w})!])\s*"
    r"(?:\\text\{\s*(?P<text>[^{}]+)\}|(?P<sign>°\s*(?:[CF]|\\text\{[CF]\})?|\\?%|\\?\$|[€£¥])|"
    r"(?P<word>(?<![A-Za-z\\])[A-Za-z]{2,}[A-Za-z/. ]*))"
    r"\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?",
    re.DOTALL,
)
_COMPOUND = re.compile(r"(?:\d+\s*(?:\\text\{[^{}\d\\]+\}|[A-Za-z]{2,})\s*){2,}")  # 7 ft 3 in
_NO_UNIT = re.compile(
    r"\b(?:if|for|when|where|is|are|not|no|only|except|mod|or|and|more|less|greater|infinite\w*|base|to|by|sin|cos|tan"
    r"|ln|log|exp)\b"
)


@lru_cache(maxsize=4096)
def read(text: str, times: bool = True) -> Reading:
    """Return the parts of a normalised answer. Without `times`, `9:30` is a ratio."""
    text = strip_braces(text)
    if r"\ldots" in text:
        return Reading("literal", (re.sub(r"[\s{}]", "", text),))
    if times and (match := _TIME.fullmatch(text)):
        hour, half = int(match[1]), (match[3] or "").lower()
        if not half and not 0 < hour < 13:
            half = "p" if 12 < hour < 24 else "a"
        return Reading("literal", (f"{(hour - 1) % 12 + 1}:{match[2] or '00'}",), unit=half)
    if _DASHES.fullmatch(text):
        return Reading("literal", (re.sub(r"\b0+(?=\d)", "", text.replace("--", "-")),))
    if _BLANKS.fullmatch(text):
        return Reading("literal", (text,))
    if _RATIO.fullmatch(text):
        numbers = [int(number) for number in text.split(":")]
        numbers = [number // (gcd(*numbers) or 1) for number in numbers]
        if len(numbers) == 2 and numbers[1] != 1:  # 14:2 is not 7
            return Reading("value", (rf"\frac{{{numbers[0]}}}{{{numbers[1]}}}",))
        return Reading("literal", (":".join(map(str, numbers)),))
    if match := _BASE.fullmatch(text):
        base = match[2] or match[3]
        return Reading("literal", (f"{match[1].upper()}_{_BASES.get(base, base)}",))
    if match := _CONGRUENCE.fullmatch(text):
        residues, modulus = [part.strip() for part in split(match["residues"], ",")], match["modulus"].strip()
        if modulus.isdigit() and int(modulus):
            residues = [str(int(part) % int(modulus)) if re.fullmatch(r"-?\d+", part) else part for part in residues]
        return Reading("literal", (f"{sorted(residues)} mod {modulus}",), name=(match["name"] or "").strip())
    words = _TEXT.sub(r"\1", text).strip()
    if match := _LETTER.fullmatch(words):
        return Reading("letter", (match[1] or match[3], match[2] or match[4] or ""))
    if _CAPITALS.fullmatch(words):
        return Reading("literal", (re.sub("[_{}]", "", words).lower(),))
    if _WORDS.fullmatch(words) and (r"\text" in text or not _PRODUCT.fullmatch(words)):
        together = ",and " in words
        names = (" ".join(re.findall(r"[a-z']+", name)) for name in words.lower().replace(",and ", ",").split(","))
        return Reading("literal", tuple(filter(None, names)), unit="and" if together else "")
    return _read_formula(text)


def _read_formula(text: str) -> Reading:
    is_set = text.startswith(r"\{") and closing(text[1:]) == len(text) - 2
    parts = split(text[2:-2] if is_set else text, ",|;")
    parts = [re.sub(r"^and\b", "", part) for part in parts]
    items = tuple(variant for part in parts if part.strip() for variant in _both_signs(part))
    if is_set:
        return read(items[0]) if len(items) == 1 and re.search(r"\d", items[0]) else Reading("set", items)
    if len(items) > 1:
        return Reading("union" if all(map(_RELATION.search, items)) else "list", items)
    exact, *rounded = split(text, r"\\approx(?![a-zA-Z])")
    if rounded:
        return read(f"{exact} = {rounded[0]}" if _SYMBOL.fullmatch(exact) else exact)
    sides = split(text, r"(?<![\\<>!])=|\\in(?![a-zA-Z])")
    if len(sides) == 2 and _SYMBOL.fullmatch(sides[1]) and sides[1].strip() and not _SYMBOL.fullmatch(sides[0]):
        sides.reverse()  # 5 = x
    if len(sides) > 1:
        if _SYMBOL.fullmatch(sides[0]) and re.search("[A-Za-z]", sides[0]):
            name = re.sub(r"\s|\([a-z](?:,\s*[a-z])*\)$|\\text|[{}]", "", sides[0]) or re.sub(r"\s", "", sides[0])
            return (read(sides[-1]) if len(sides) == 2 else Reading("chain", tuple(sides[1:])))._replace(name=name)
        if len(sides) > 2 or not re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", text):
            return Reading("chain", tuple(sides))  # 2^{10} = 1024
        return Reading("equation", tuple(sides))
    if interval := _as_interval(text):
        return interval
    unions = split(text, r"\\cup(?![a-zA-Z])")
    if len(unions) > 1:
        return Reading("union", tuple(unions))
    if match := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
        cells = tuple(cell for row in rows for cell in row.split("&"))
        return Reading("matrix", cells, unit=f"{len(rows)} rows")
    if text[:1] in tuple("([") and closing(text) == len(text) - 1:
        inner = split(text[1:-1], ",|;")
        if len(inner) > 1:
            return Reading(text[0] + text[-1], tuple(inner))
        return read(text[1:-1]) if text[0] == "(" else Reading("value", (text,))
    return _read_unit(text)


def _read_unit(text: str) -> Reading:
    money = re.match(r"(-?)\s*(?:\\(\$)|([€£¥]))\s*", text)
    sign = money and (money[2] or money[3])
    if money:
        text = money[1] + text[money.end() :]
    if _COMPOUND.fullmatch(text):
        amounts = re.findall(r"(\d+)\s*(\\text)?([^\d\\]+)", text)
        if all(marked or _known_unit(word.strip()) for _, marked, word in amounts):
            return Reading("literal", tuple(f"{number} {_unit_of(word, '')}" for number, _, word in amounts))
    match = _UNIT_END.fullmatch(text)
    if not match or not re.search(r"\d|\\pi|\\sqrt", match["value"]):
        return Reading("value", (text,), unit=_unit_of(sign, "") if sign else "")
    words, bare = match["text"] or match["sign"] or match["word"], match["word"]
    if _NUMBER_WORDS.search(re.sub(r"\([a-z -]+\)", "", words)):  # 7 (seven)
        return Reading("literal", (re.sub(r"\\text|[\s{}]", "", text).lower(),))
    parts = re.findall(r"[A-Za-z]+", re.sub(r"\b(?:sq|square|cu|cubic|per|units?)\b", "", words))
    if bare:
        # Without \text, letters are variables if they can be: 2abc, x^2 + 3 abc, \pi r^2 cm.
        blank = text[match.end("value")] == " "
        known = all(map(_known_unit, parts)) and (blank or not _VARIABLES.fullmatch(bare))
        spelled = blank and any(len(p) > 3 and re.search("[aeiou]", p) for p in parts)
        is_unit = (known or (spelled and min(map(len, parts)) > 1)) and not _LETTERS.search(match["value"])
    else:
        is_unit = bool(match["sign"]) or all(map(_known_unit, parts)) or bool(re.search(r"[\w/]{2}", words))
    if _NO_UNIT.search(words) or not is_unit:
        return Reading("value", (text,))
    return Reading("value", (match["value"],), unit=_unit_of(words, match["power"] or ""))


def _known_unit(word: str) -> str | None:
    """Return the symbol of a unit. Prefixes of symbols keep their case, as mW and MW differ."""
    if match := _SYMBOLS.fullmatch(word) or _SYMBOLS.fullmatch(re.sub("^K", "k", word)):
        return re.sub("[uμ]", "µ", match[1]) + match[2].replace("L", "l")
    if len(word) == 1 and word.isupper():  # 7 M
        return None
    word = word.lower()
    forms = (word, word.removesuffix("s"), word.removesuffix("es"))
    if unit := next((_UNITS[form] for form in forms if form in _UNITS), None):
        return unit
    if (match := _NAMES.fullmatch(word)) and (unit := _known_unit(match[2])):
        return _PREFIXES[match[1]] + unit
    return match[0] if (match := _SYMBOLS.fullmatch(word)) else None  # CM


def _unit_of(words: str, power: str) -> str:
    """Return the symbol of a unit such as `square centimeters`, or else its words in the singular."""
    for word, value in ((r"\b(?i:sq(?:uare)?)\b\.?", "2"), (r"\b(?i:cu(?:bic)?)\b\.?", "3")):
        words, found = re.subn(word, "", words)
        power = value if found else power
    words = re.sub(r"\s*(?:/|\bper\b)\s*", "/", words)
    words = re.sub(r"\b(?i:units?|of|the|an?)\b|[\\{}.^]|text", "", words).replace("° ", "°")
    units = ["/".join(map(_unit_or_singular, word.split("/"))) for word in words.split()]
    return " ".join(units) + power


def _unit_or_singular(word: str) -> str:
    letters, digits = re.fullmatch(r"(.*?)(\d*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
    singular = re.sub("(?:es|e|(?<!s)s)$", "", letters.lower())
    return (_known_unit(letters) or re.sub("y$", "i", singular)) + digits


def _as_interval(text: str) -> Reading | None:
    """Return `2 \\le x < 5` as `[2, 5)`, or None for other texts."""
    signs = [match[0] for match in _RELATION.finditer(text)]
    if not signs:
        return None
    sides = split(text, _RELATION.pattern)
    if len(sides) != len(signs) + 1 or len(signs) > 2:
        return None
    symbols = [bool(side.strip() and _SYMBOL.fullmatch(side)) for side in sides]
    if all(">" in sign or "ge" in sign for sign in signs):  # read it from the other end
        sides, signs, symbols = sides[::-1], signs[::-1], symbols[::-1]
    elif not all("<" in sign or "le" in sign for sign in signs):
        return None
    closed = ["e" in sign for sign in signs]
    if symbols == [False, True, False]:
        return Reading("[("[not closed[0]] + "])"[not closed[1]], (sides[0], sides[2]), name=sides[1].strip())
    if symbols == [True, False]:
        return Reading("(" + "])"[not closed[0]], (r"-\infty", sides[1]), name=sides[0].strip())
    if symbols == [False, True]:
        return Reading("[("[not closed[0]] + ")", (sides[0], r"\infty"), name=sides[1].strip())
    return None


def _both_signs(text: str) -> list[str]:
    if not re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return [text]
    plus = re.sub(r"\\mp(?![a-zA-Z])", "-", re.sub(r"\\pm(?![a-zA-Z])", "+", text))
    minus = re.sub(r"\\mp(?![a-zA-Z])", "+", re.sub(r"\\pm(?![a-zA-Z])", "-", text))
    return [re.sub(r"(^|[=(,])\s*\+", r"\1", plus), minus]


def split(text: str, separators: str) -> list[str]:
    """Return the parts of `text` between `separators`, a regex, that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(
        rf"(?P<open>\\\{{|[({{\[]|\\begin\{{\w+\}})|(?P<close>\\\}}|[)}}\]]|\\end\{{\w+\}})|(?P<cut>{separators})", text
    ):
        depth += (match.lastgroup == "open") - (match.lastgroup == "close")
        if match.lastgroup == "cut" and depth <= 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]
