"""Pass the events of a run on to its callback, and write what is said to log.txt. Free of torch."""

from __future__ import annotations

import logging
import logging.handlers
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from popo_lite.callbacks import EVENTS, Callback, CallbackList, TerminalGone
from popo_lite.redaction import redact

LOG_BYTES, OLDER_LOGS = 1_000_000, 2
"""log.txt becomes log.txt.1 at this size, and so on; the oldest is deleted."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class RunEvents(Callback):
    """Pass events on to `callback`, and messages also to the log; `open_log` writes those that came before it.

    A callback that raises gets nothing more, so that the run can be saved (`CallbackList`). While the run is `ending`,
    its error goes no further. TerminalGone never does: `terminal_gone` is called. `said` collects the messages.
    """

    ending = False
    _terminal_is_gone = False

    def __init__(self, callback: Callback, terminal_gone: Callable[[], None]) -> None:
        self._callback = callback if isinstance(callback, CallbackList) else CallbackList([callback])
        self._terminal_gone = terminal_gone
        self.said: list[str] = []
        self._early = logging.handlers.BufferingHandler(capacity=1_000)
        self.log = logging.Logger("popo-lite run")  # of this run alone
        self.log.addHandler(self._early)
        for method in EVENTS:
            setattr(self, method, partial(self._call, method))

    def open_log(self, path: Path) -> None:
        """Write to `path` from now on."""
        file = _LogFile(path, maxBytes=LOG_BYTES, backupCount=OLDER_LOGS, encoding="utf-8", delay=True)
        file.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s"))
        for record in self._early.buffer:
            file.handle(record)
        self.log.handlers = [file]

    def close(self) -> None:
        """Close the log. The callback is closed by the code that made it."""
        for handler in self.log.handlers:
            handler.close()

    def _call(self, method: str, *values: Any, **named: Any) -> None:
        if method == "message":
            self.log.info(*values)
            self.said.append(values[0])
        try:
            getattr(self._callback, method)(*values, **named)
        except TerminalGone as error:
            if not self._terminal_is_gone:
                self._terminal_is_gone = True
                self.log.warning("the terminal is gone, so nothing is shown any more: %s", error)
                self._terminal_gone()
        except Exception:
            self.log.exception("a callback failed, and gets nothing more")
            if not self.ending:
                raise


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log that cannot be written, such as on a full disk, ends no run and prints nothing into its view."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        pass


class _Plain(logging.Formatter):
    """Text without secrets and without control characters: messages quote what models say."""

    def format(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", redact(super().format(record)))
