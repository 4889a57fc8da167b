"""Keep what libraries print while the screen is taken: stray lines would be painted over within a second."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast


class LineCatcher(io.TextIOBase):
    """A text stream that hands every finished line to `receive`.

    A line that was rewritten by carriage returns, as progress bars do, counts as it stood last.
    """

    def __init__(self, receive: Callable[[str], None], original: TextIO) -> None:
        self._receive = receive
        self._original = original
        self._pending = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream in whose place this one stands."""
        return self._original.encoding

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """The descriptor of the original: child processes need a real one."""
        return self._original.fileno()

    def write(self, text: str) -> int:
        """Take text; lines that it finishes are handed on."""
        *finished, self._pending = (self._pending + text).split("\n")
        for line in finished:
            self._hand_on(line)
        # Of a bar that never ends its line only the latest state is worth keeping.
        self._pending = self._pending[self._pending.rstrip("\r").rfind("\r") + 1 :]
        return len(text)

    def finish(self) -> None:
        """Hand on a last line that was not ended."""
        self._hand_on(self._pending)
        self._pending = ""

    def _hand_on(self, line: str) -> None:
        line = line.rstrip("\r").rsplit("\r", 1)[-1]
        if line.strip():
            self._receive(line)


@contextmanager
def caught_output(receive: Callable[[str], None]) -> Iterator[None]:
    """Inside, lines printed to stdout and stderr by Python code of this process go to `receive`.

    Log handlers that hold on to the old streams are turned too. C libraries and child processes write past
    Python and are not caught.
    """
    stdout, stderr = sys.stdout, sys.stderr
    catchers = {id(stream): LineCatcher(receive, stream) for stream in (stdout, stderr)}
    turned = [(handler, handler.stream) for handler in _stream_handlers() if id(handler.stream) in catchers]
    for handler, stream in turned:
        handler.setStream(cast(TextIO, catchers[id(stream)]))
    sys.stdout, sys.stderr = catchers[id(stdout)], catchers[id(stderr)]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for handler, stream in turned:
            handler.setStream(stream)
        for catcher in catchers.values():
            catcher.finish()


def _stream_handlers() -> Iterator[logging.StreamHandler[TextIO]]:
    known = logging.root.manager.loggerDict.values()
    for logger in (logging.root, *(each for each in known if isinstance(each, logging.Logger))):
        for handler in logger.handlers:
            # A handler without a stream of its own follows sys.stderr by itself.
            if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler):
                yield handler
