"""Mask passwords and tokens in text that is printed or written to a log. Free of torch."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable
from types import TracebackType

MASK = "***"
LOGIN = re.compile(r"(://)[^\s\"'<>]{0,500}@")
"""A URL's login. A password may hold any sign, so everything up to the last @ of the word belongs to it.

The length is bounded because text without end may come from a model.
"""
QUERY = re.compile(r"([?&][\w.-]*(?:token|key|secret|password|signature|credential)=)[^\s\"'<>&#]+", re.IGNORECASE)
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
"""Environment variables that hold a secret: HF_TOKEN, POPO_SERVER_TOKEN, WANDB_API_KEY and the like."""
SHORTEST_SECRET = 6
"""Characters. A shorter value is more likely a switch, and masking it would garble the text."""


def redact(text: str) -> str:
    """Return `text` without the logins of URLs and without the secrets of the environment."""
    for secret in sorted(_secrets(), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, MASK)
    return QUERY.sub(rf"\1{MASK}", LOGIN.sub(rf"\1{MASK}@", text))


def has_login(text: str) -> bool:
    """Check whether `text` holds a URL with a user name or password."""
    return LOGIN.search(text) is not None


def _secrets() -> Iterable[str]:
    """Yield the values of environment variables with a secret's name, and the logins of all others' URLs."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name):
            yield from (part for part in {value, value.strip()} if len(part) >= SHORTEST_SECRET)
        elif login := LOGIN.search(value):  # such as https_proxy
            parts = login[0].removeprefix(login[1]).removesuffix("@").partition(":")
            yield from (part for part in (parts[2],) if len(part) >= SHORTEST_SECRET)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception as Python does, without secrets. For `sys.excepthook`."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
