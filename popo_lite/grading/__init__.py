"""Grade answers in processes that can be killed."""

from popo_lite.grading.grader import Grader, refuse_ungraded, ungraded_ratio

__all__ = ["Grader", "refuse_ungraded", "ungraded_ratio"]
