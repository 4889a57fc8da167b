"""Grade answers with the verifiers of reasoning-gym."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from popo_lite.grading.math import ANSWER_TAGS


def grade_reasoning_gym(text: str, problem: Mapping[str, Any]) -> float | None:
    """Return 1 if reasoning-gym's verifier gives the whole score, else 0; None if there is no answer in the text.

    The answer is the content of the last `<answer>` tags, without tags all of the text. Partial scores count as 0,
    because they would teach wrong answers: most reward the form, and a wrong answer that contains the right one gets
    up to 0.99.
    """
    meta = problem["meta"]
    if not {"task", "settings", "entry"} <= meta.keys():
        raise ValueError('the problem is not from reasoning-gym; set data.dataset = "reasoning-gym:TASK"')
    answer = (ANSWER_TAGS.findall(text) or [text])[-1].strip()
    if not answer:
        return None
    dataset = _dataset(meta["task"], json.dumps(meta["settings"]))
    return float(dataset.score_answer(answer, ast.literal_eval(meta["entry"])) >= 1)


@lru_cache(maxsize=256)
def _dataset(task: str, settings: str) -> Any:
    """Return the task's dataset, whose verifier depends on the settings but not on the seed."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, seed=0, size=1, **json.loads(settings))
