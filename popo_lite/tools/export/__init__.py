"""Merge, check, describe and upload the model that a run trained."""

from popo_lite.tools.export.pipeline import ExportReport, export_run
from popo_lite.tools.export.verify import Verification

__all__ = ["ExportReport", "Verification", "export_run"]
