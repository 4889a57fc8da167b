"""Measuring a recipe with random weights: a step by stage, and the longest sequence that fits."""
