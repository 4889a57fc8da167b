"""Evaluate a run on published benchmarks."""
