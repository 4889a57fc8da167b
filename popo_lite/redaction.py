"""Mask passwords and tokens in text that is printed or written to a log. Free of torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

MASK = "***"
LOGIN = re.compile(r"(?<=://)[^\s\"'<>\[\]/?#]+@")
"""A URL's login. It ends at the first /, ? or #, as URLs define it, so that matching stays linear."""
QUERY = re.compile(
    r"([?&](?:[\w.-]*(?:token|secret|password|signature|credential)|(?:[\w.-]*(?:access|api|auth|private|secret)[_.-]?)?key)=)"
    r"[^\s\"'<>&#]+",
    re.IGNORECASE,
)
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASS|PASSWORD|PASSWD|CREDENTIAL|(?<=_)(PAT|PWD))S?(_\d+)?$", re.IGNORECASE)
"""Environment variables that hold a secret: HF_TOKEN, POPO_SERVER_TOKEN, WANDB_API_KEY and the like."""
SHORTEST_SECRET = 8
"""Characters. A shorter value is more likely a switch or a word, and masking it would corrupt the text."""


def redact(text: str) -> str:
    """Return `text` without the logins of URLs and without the secrets of the environment."""
    for secret in sorted(secrets(), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, MASK)
    return QUERY.sub(rf"\1{MASK}", LOGIN.sub(f"{MASK}@", text))


def redacted(value: Any) -> Any:
    """Return `value`, as JSON reads it, with `redact` applied to its texts, before `json.dumps` escapes them."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return {key: redacted(item) for key, item in value.items()} if isinstance(value, dict) else value


def without_home(text: str) -> str:
    """Return `text` with ~ for the home folder."""
    home = str(Path.home())
    return re.sub(rf"(?<![\w.]){re.escape(home)}(?![\w.-])", "~", text) if home != "/" else text


def has_login(text: str) -> bool:
    """Check whether `text` holds a URL with a user name or password."""
    return LOGIN.search(text) is not None


def secrets() -> Iterator[str]:
    """Yield the values of environment variables with a secret's name, and the passwords in the URLs of all others.

    Each as it is, and as `repr` and JSON write it.
    """
    for name, value in os.environ.items():
        logins = LOGIN.findall(value)  # such as https_proxy
        found = [value] if SECRET_NAME.search(name) else [login[:-1].partition(":")[2] for login in logins]
        for secret in {form.strip() for each in found for form in (each, unquote(each))}:
            if len(secret) >= SHORTEST_SECRET:
                yield from (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1])
