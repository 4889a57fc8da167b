"""Turning a run into a model that others can load: merging, checking, describing and uploading it."""

from popo_lite.tools.export.pipeline import ExportReport, export_run
from popo_lite.tools.export.verify import Verification

__all__ = ["ExportReport", "Verification", "export_run"]
