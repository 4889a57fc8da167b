"""Merge, check, describe and upload the model that a run trained."""

EXPORTS = "export"
"""Folder in a run for its exports."""
REPORT_FILE = "export.json"
"""File of an export that says what it is: the content of an `ExportReport`."""
