"""Grade answers in processes that can be killed."""

from popo_lite.grading.grader import TRIED_PROBLEMS, Grader, refuse_ungraded, ungraded_ratio

__all__ = ["TRIED_PROBLEMS", "Grader", "refuse_ungraded", "ungraded_ratio"]
