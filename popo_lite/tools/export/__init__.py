"""Merge, check, describe and upload the model that a run trained."""
