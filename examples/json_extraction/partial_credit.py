"""Partial credit for a record that is nearly right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def fields(text: str, problem: Mapping[str, Any]) -> float | None:
    """Return the fraction of the reference's fields that the answer has; None if the answer is no JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    wanted = json.loads(problem["answer"])
    right = sum(type(found.get(key)) is type(value) and found[key] == value for key, value in wanted.items())
    return right / max(len(wanted), len(found))
