"""Grade answers with the verifiers of reasoning-gym."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from popo_lite.grading.math import THINKING_TAGS, after_thinking

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def grade_reasoning_gym(
    text: str,
    problem: Mapping[str, Any],
    *,
    thinking_tags: tuple[str, str] = THINKING_TAGS,
    thinking_open: bool = False,
) -> float | None:
    """Return 1 if reasoning-gym's verifier gives the whole score, else 0; None if there is no answer in the text.

    The answer is what follows the thinking, and of that the content of the last `<answer>` tags, if there are any.
    Partial scores count as 0: most are for the form, or for a wrong answer that contains the right one, which gets 0.99
    and more if it is long. A policy that is trained on its positives would learn wrong answers.
    """
    meta = problem["meta"]
    if not {"task", "settings", "entry"} <= meta.keys():
        raise ValueError('the problem is not from reasoning-gym; set data.dataset = "reasoning-gym:TASK"')
    answer = after_thinking(text, thinking_tags, thinking_open) or ""
    answer = (ANSWER.findall(answer) or [answer])[-1].strip()
    if not answer:
        return None
    dataset = _dataset(meta["task"], json.dumps(meta["settings"]))
    return float(dataset.score_answer(answer, ast.literal_eval(meta["entry"])) >= 1)


@lru_cache(maxsize=256)
def _dataset(task: str, settings: str) -> Any:
    """Return the task's dataset, whose verifier depends on the settings but not on the seed."""
    from reasoning_gym.factory import create_dataset

    return create_dataset(task, seed=0, size=1, **json.loads(settings))
