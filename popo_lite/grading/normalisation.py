r"""Bring references and answers into one spelling: decoration, Unicode, numbers, separators. Needs no sympy.

Every rule serves both sides alike, so none of them can favour an answer. What is left is what the LaTeX parser of
math-verify understands, with `°` for degrees and `\text{...}` for all words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache

_Replacement = str | Callable[[re.Match[str]], str]

# Characters that NFKC leaves alone, or takes for something else than LaTeX does.
_CHARACTERS = str.maketrans(
    dict.fromkeys("−–—‒‑‐﹣－", "-")
    | {"×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "∶": ":", "∞": r"\infty "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≡": r"\equiv ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp "}
    | {"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "…": r"\ldots "}
    | {"｛": r"\{", "｝": r"\}", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "º": "°"}
    | {
        "∠": r"\angle ",
        "△": r"\triangle ",
        "⟨": "(",
        "⟩": ")",
        "。": ".",
        "、": ",",
        "\u200b": None,
        "✓": None,
        "✅": None,
    }
)
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_ROOT = re.compile(r"([√∛])\s*(\d+|[A-Za-z]|π|\([^()]*\))")
_WORD = re.compile(r"\s*(?:\\text\{\s*)?[A-Za-z]{2}")
_GREEK = re.compile("[\u0370-\u03ff]")


def _ascii(text: str) -> str:
    def greek(match: re.Match[str]) -> str:
        name = unicodedata.name(match[0], "").split()
        command = name[-1].lower().replace("lamda", "lambda") if "LETTER" in name else match[0]
        return rf"\{command.capitalize() if 'CAPITAL' in name else command} "

    def nfkc(match: re.Match[str]) -> str:
        return unicodedata.normalize("NFKC", match[0]).replace("−", "-")

    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{nfkc(match)}}}", text)
    text = _SUBSCRIPTS.sub(lambda match: f"_{{{nfkc(match)}}}", text)
    text = _VULGAR.sub(lambda match: "\\frac{{{}}}{{{}}}".format(*nfkc(match).split("⁄")), text)
    # The sign reaches over a whole number, but \sqrt only over its first digit.
    text = _ROOT.sub(lambda match: f"{match[1]}{{{match[2].strip('()')}}}", text)
    text = _GREEK.sub(greek, text)
    return unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)


def _fraction(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    return rf"\frac{{{number.numerator}}}{{{number.denominator}}}"


def _decimal(match: re.Match[str]) -> str:
    """Return a decimal as an exact fraction: the parser would make a float of it."""
    return _fraction(Fraction(int(match[1] + match[2] or "0"), 10 ** len(match[2])))


def _repeating(match: re.Match[str]) -> str:
    r"""Return 4.1\overline{6} or 4.166\ldots as a fraction."""
    whole, once, repeated = match[1] or "0", match[2], match[3]
    period = int(whole + once + repeated) - int(whole + once)
    return _fraction(Fraction(period, 10 ** len(once) * (10 ** len(repeated) - 1)))


def _radians(match: re.Match[str]) -> str:
    """Replace the degrees in a text with trigonometric functions, which take radians."""
    return re.sub(r"(\d+)\s*°", r"(\\frac{\1\\pi}{180})", match[0])


def _mixed(match: re.Match[str]) -> str:
    whole, numerator, denominator = int(match[1]), int(match[2]), int(match[3])
    if not numerator < denominator:  # then it is a product
        return match[0]
    return rf"\frac{{{whole * denominator + numerator}}}{{{denominator}}}"


def _conjunction(match: re.Match[str]) -> str:
    """Return a comma; between words, the "and" stays, as these have no order, and words with commas do."""
    before, after = match.string[max(match.start() - 20, 0) : match.start()], match.string[match.end() :][:20]
    return ",and " if re.search(r"[A-Za-z]{2}[\s}]*$", before) and _WORD.match(after) else ","


def _power_of_ten(match: re.Match[str]) -> str:
    exponent = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}[match[2]]
    return rf"{match[1]}\cdot 10^{{{exponent}}}\text{{{match[3]}}}"


_COMMANDS = {
    name: replacement
    for names, replacement in (
        ("left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr limits therefore", ""),
        ("displaystyle textstyle scriptstyle small large Large LARGE huge Huge bf rm it sf tt bfseries", " "),
        ("quad qquad enspace thinspace", " "),
        ("boldsymbol bm pmb mathbf mathit mathsf mathtt mathnormal mathop underline boxed fbox framebox ce emph", ""),
        ("text textbf textit textrm textsf texttt textsc textnormal mathrm mbox hbox operatorname", r"\text"),
        ("dfrac tfrac cfrac", r"\frac"), ("dbinom tbinom", r"\binom"), ("mod bmod pmod", r"\pmod "),
        ("leq leqslant leqq", r"\le "), ("geq geqslant geqq", r"\ge "), ("neq", r"\ne "), ("lt", "<"), ("gt", ">"),
        ("dots cdots dotsc dotsb", r"\ldots "), ("varnothing", r"\emptyset "), ("degree", "°"), ("colon", ":"),
        ("lbrace", r"\{"), ("rbrace", r"\}"), ("lbrack", "["), ("rbrack", "]"), ("langle", "("), ("rangle", ")"),
        ("dollar textdollar", r"\$"), ("euro texteuro", "€"), ("pounds textsterling", "£"), ("prime", "'"),
        ("imath", "i"), ("infin", r"\infty "),
    )
    for name in names.split()
}  # fmt: skip
_RULES: tuple[tuple[str, _Replacement], ...] = (
    # -- decoration
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:text)?color(?:box)?\s*(?:\[\w*\])?\{[^{}]*\}|\\[hv]?phantom\{[^{}]*\}|\\[hv]space\{[^{}]*\}", ""),
    (r"\\([a-zA-Z]+)", lambda match: _COMMANDS.get(match[1], match[0])),
    (r"^\s*+\*++(.*?)\*++\s*$", r"\1"),  # **5**
    (r"\*\*", "^"),  # 2**3
    (r"`|\\!\s*|(?<=.)\\checkmark|(?<!\\)\\\s*$|(?<!\\)\\[()\[\]]", ""),
    (r"(?<!\\)\$(?!\d)|(?<!\\)(?<=[\w})\s])\$", ""),  # delimiters of formulas
    (r"(?<!\\)\$", r"\$"),  # $18.90 is money
    (r"(?:(?<!\\)\\[,;:> \n]|~|\s)+", " "),
    (r"\\mathbb\s*\{?R\}?(?![a-zA-Z])|\\text\{\s*all real numbers\s*\}", r"(-\\infty,\\infty)"),
    (r"\\mathbb\s*(?=\{[^A-Z])", ""),  # \mathbb{5}; \mathbb{Z} is a set
    # -- words
    (r"\\text\s+([A-Za-z])(?![a-zA-Z])", r"\\text{\1}"),  # \mathrm e
    (r"\\(gcd|lcm)(?=\s*\(?[^()]*[a-zA-Z])", r"\\text{\1}"),  # the parser takes any two letters for coprime
    (r"\\(angle|triangle)\s*\{?([A-Z]{2,4})(?![A-Za-z])\}?", r"\\text{\1 \2}"),  # not a product of letters
    (r"\(?(?:\\pmod|\s*(?:\\text\{|\b)\s*\(?\s*mod(?:ulo)?\b\s*(?:\}|(?=\d)))", r"\\pmod "),  # (\text{mod } 7)
    (r"^(\s*(?:\\text\{)?)\s*(?i:(?:the )?(?:final )?answer(?: is)?|option|choice)\s*:?(?![a-zA-Z])", r"\1"),
    (r"\\text\s*\{([^{}a-zA-Z]*)\}", r"\1"),  # \text{ 1234 }
    (r"\\text\s*\{\s*(\([A-Z]\))\s*([^{}a-zA-Z]*)\}", r"\1 \2"),  # \text{(C) }17
    (r"\\text\s*\{([0-9A-F]+)\}(?=\s*_)", r"\1"),  # 1\text{A}_{16}
    (r"_\s*\\text\s*(\{\w+\})", r"_\1"),
    (r"^\s*\\text\{\s*([A-Za-z][^{}]*?)\s*[:=]\s*\}", r"\\text{\1}="),  # \text{Boys: } 5
    (r"^\s*(?:\\text\{[^{}]*[:=]\s*\}|=|\\approx|\\text\{(?:approximately|about)\s*\})", ""),
    # 7 \text{ (since } 14/2 = 7)
    (r"(?<=[\w})])\s*(?:\\text\{\s*)?\((?:\\text\{\s*)?(?:since|because|as|approx\w*)\b.*$", ""),
    (r",?\s*(?:\\text\{\s*,?\s*(?:and|or)\s*\}|(?<=[\s,])(?:and|or)(?=\s))", _conjunction),
    (r"^\s*(?:\\text\{)?\s*(?i:no (?:real )?solutions?)\s*\}?[\s.]*$", r"\\emptyset "),
    (r"(?<=\d)(?:\^\{\\text\{%s\}\}|\^?\{%s\}|\\text\{%s\}|%s(?![a-zA-Z]))" % (("(?:st|nd|rd|th)",) * 4), ""),  # 5th
    # 2.5 m; after a fraction or a letter, m is a variable
    (r"^(\s*(?:[A-Za-z]\s*=\s*)?-?[\d.,]+) ([mgshlL](?:/[a-z]+)?)(?=(?:\^\{?[23]\}?)?\s*$)", r"\1\\text{ \2}"),
    (r"\^\s*\{\s*('+)\s*\}|\^\s*('+)", r"\1\2"),  # f^{\prime}
    (r"(\d)\s*(?:\\text\{\s*to\s*\}|\bto\b|\{\s*:\s*\})\s*(?=\d)", r"\1:"),
    (r"\\text\{\s*([ei])\s*\}", r"\1"),  # Euler's number and the imaginary unit
    (r"\\text\{([^{}]*)\}\s*(/|\\cdot)\s*\\text\{([^{}]*)\}", r"\\text{\1\2\3}"),  # \text{m}/\text{s}
    (r"\\frac\s*\{\s*\\text\{([^{}]*)\}\s*\}\s*\{\s*\\text\{([^{}]*)\}(\^\{?\d\}?)?\s*\}", r"\\text{\1/\2}\3"),
    (r"(\d)\s*(?:\\text\{\s*)?(hundred|thousand|million|billion|trillion)\b([^{}]*)\}?", _power_of_ten),
    (r"\\text\{\s*\}", ""),
    # -- signs
    (r"(?<=\d)\s*\\deg(?![a-zA-Z])|\^\s*(?:\{\s*\\circ\s*\}|\\circ|°)|(?<=[\d\s])degrees?\b", "°"),
    (r"\\text\{\s*degrees?\s*\}", "°"),
    (r"^.*\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z]).*°.*$", _radians),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=", r"\\ne "),
    (r"\.\.\.+", r"\\ldots "),
    (r"\\\{\s*\\\}|\\text\{\s*empty set\s*\}", r"\\emptyset "),
    (r"(?<![\\a-zA-Z])pi\b", r"\\pi "),
    (r"\+\s*\\infty|(?<![\\a-zA-Z])[Ii]nfinity\b", r"\\infty "),
    (r"\\log(?![a-zA-Z])\s*(?:_\{?\s*e\s*\}?(?![a-zA-Z]))?(?!\s*_)", r"\\ln "),  # the parser's \log is decadic
    # -- fractions, roots, binomials
    (r"\\frac\s*([^\s{\\]|\\[a-zA-Z]+)", r"\\frac{\1}"),
    (r"(\\frac\s*\{(?:[^{}]|\{[^{}]*\})*\})\s*([^\s{\\]|\\[a-zA-Z]+)", r"\1{\2}"),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"(?:\{\s*\})?[\^_]\{?(\d+)\}?\s*C\s*_\{?(\d+)\}?", r"\\binom{\1}{\2}"),  # ^{10}C_3
    (r"(?<![\w\\])C(?:\((\d+),\s*(\d+)\)|\s*_\{?(\d+)\}?\^\{?(\d+)\}?)", r"\\binom{\1\3}{\2\4}"),  # C(10,3), C_{10}^3
    (r"(?:\\|(?<![\\a-zA-Z]))sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*([^\s{\\\[]|\\[a-zA-Z]+)", r"\\sqrt{\1}"),
    # -- numbers
    (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ""),  # 1{,}234
    (r"(?<=\d)\{,\}(?=\d)", "."),  # 0{,}5
    (r"(?<![\w.,}])(\d{1,3}(?: \d{3})+)(?![\d/]| ?\\frac)", lambda match: match[1].replace(" ", "")),
    # 1,234, but not in brackets: (1,234) is a pair
    (r"(?<![\w.,])([1-9]\d{0,2}(?:,\d{3})+)(?!\d|,\d)(?!.*(?:[)\]]|\\\}))", lambda match: match[1].replace(",", "")),
    (r"(?<![\d.])(\d*)\.(\d*?)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating),
    (r"(?<![\d.])(\d*)\.(\d*)\((\d+)\)", _repeating),  # 0.(3)
    (r"(?<![\d.])(\d*)\.(\d{0,40}?)(\d{1,40}?)\3+\s*\\ldots", _repeating),  # 0.1666\ldots
    (r"(\d)[eE]([+-]?\d+)(?![\d.])", r"\1\\cdot 10^{\2}"),
    (r"(?<![\d.])(\d*)\.(\d+)(?![\d.])(?!\s*\\ldots)", _decimal),
    (r"(?<=\d)\.(?![\d.])", ""),  # 5.
    (r"(?<![\w.^_}\\])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}", _mixed),
    (r"(?<![\w.^_}\\])(\d+) +(\d+)/(\d+)(?![\w.])", _mixed),
    # the parser takes 2(3) for a mixed number
    (r"((?<![\w^_])\d+|\))\s*(?=\()|(?<!\([A-Z])\)\s*(?=\d)", lambda match: rf"{match[1] or ')'}\cdot "),
    # -- intervals: ]2, 5[ and its kin
    (r"\](\s*[^\[\](),]+,[^\[\](),]+)\[", r"(\1)"),
    (r"\[(\s*[^\[\](),]+,[^\[\](),]+)\[", r"[\1)"),
    (r"\](\s*[^\[\](),]+,[^\[\](),]+)\]", r"(\1]"),
    (r"\s+", " "),
)  # fmt: skip


@cache
def _compiled() -> list[tuple[re.Pattern[str], _Replacement]]:
    """Return the rules compiled: not at import, as that takes longer than grading a hundred plain answers."""
    return [(re.compile(pattern, re.DOTALL), replacement) for pattern, replacement in _RULES]


@lru_cache(maxsize=4096)
def canonical(answer: str) -> str:
    """Return `answer` in the spelling in which answers are compared."""
    if not answer.isascii():
        answer = _ascii(answer)
    for pattern, replacement in _compiled():
        answer = pattern.sub(replacement, answer)
    return strip_braces(answer)


def strip_braces(text: str) -> str:
    """Return `text` without braces, blanks and a full stop around all of it."""
    text = text.strip().rstrip(".").rstrip()
    while text.startswith("{") and closing(text) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def closing(text: str) -> int:
    """Return where the bracket that opens `text` closes, or -1."""
    depth = 0
    for match in re.finditer(r"\\[{}]|[\[({})\]]", text):
        depth += 1 if match[0][-1] in "[({" else -1
        if depth == 0:
            return match.end() - 1
    return -1
