"""Grade answers in processes that can be killed."""

from popo_lite.grading.grader import Grader, GradeRequest, refuse_ungraded, ungraded_ratio

__all__ = ["GradeRequest", "Grader", "refuse_ungraded", "ungraded_ratio"]
