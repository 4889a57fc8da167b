"""Merge, check, describe and upload the model that a run trained."""

from __future__ import annotations

import hashlib
from pathlib import Path

EXPORTS = "export"
"""Folder in a run for its exports."""
REPORT_FILE = "export.json"
"""File of an export that says what it is: the content of an `ExportReport`."""


def adapter_hash(adapter: Path) -> str:
    """Return the SHA-256 of an adapter's weights."""
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
