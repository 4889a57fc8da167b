"""Measuring a policy on problems it was not trained on."""

from popo_lite.evaluation.estimates import pass_at_k
from popo_lite.evaluation.held_out import evaluate, fitting

__all__ = ["evaluate", "fitting", "pass_at_k"]
