"""Cut a growing answer into pieces that are safe to print. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from popo_lite.redaction import secrets
from popo_lite.tools.console import words

_WORD = "".join(map(chr, range(0x21, 0x7F))) + "\ufffd"
"""A run of these at the end of a text may still change: a URL's login or a character may be incomplete."""


class Pieces:
    """Yield what is new in a growing text, without control characters and secrets, and whether it is thinking.

    `tags` are those around the model's thinking; `thinking` says that the text begins inside them.
    """

    def __init__(self, tags: tuple[str, str], *, thinking: bool = False) -> None:
        self._tags, self._thinking, self._shown = tags, thinking, ""
        # Secrets and tags may hold blanks and letters of other scripts.
        self._whole = {*tags, *secrets()}
        self._split = re.compile("(" + "|".join(map(re.escape, tags)) + ")")

    def push(self, text: str, *, final: bool = False) -> Iterator[tuple[str, bool]]:
        """Yield the new pieces of the whole `text` so far. An end that may still change is held back until `final`."""
        # The whole text again: what a character may show as depends on those before it.
        shown = words.printable(text if final else self._complete(text))
        new, self._shown = shown[len(self._shown) :], shown
        opening, closing = self._tags
        for part in filter(None, self._split.split(new)):
            if part == opening:
                self._thinking = True
            yield part, self._thinking or part == closing
            if part == closing:
                self._thinking = False

    def _complete(self, text: str) -> str:
        before = ""
        while before != text:  # what is held back may cut another secret in two
            before, text = text, text.rstrip(_WORD)
            for whole in self._whole:
                cut = next((size for size in range(len(whole) - 1, 0, -1) if text.endswith(whole[:size])), 0)
                text = text[: len(text) - cut]
        return text
