"""Reward functions in the form that TRL and Unsloth take, as they stand in many notebooks. popo-lite runs them as is.

    [reward]
    functions = [
      {name = "trl_rewards:accuracy_reward", weight = 2.0},
      "trl_rewards:soft_format_reward",
      {name = "trl_rewards:box_count_reward", range = [-1, 0.5], weight = 0.5},
    ]

Start popo-lite in this folder, or put the folder on PYTHONPATH. docs/rewards.md says more.
"""

import re


def accuracy_reward(completions, solution, **kwargs):
    """Reward answers whose last box holds the solution; the dataset has a column `solution`."""
    contents = [completion[0]["content"] for completion in completions]
    boxes = [re.findall(r"\\boxed\{([^{}]*)\}", content) for content in contents]
    return [1.0 if box and box[-1].strip() == str(gold) else 0.0 for box, gold in zip(boxes, solution)]


def soft_format_reward(prompts, completions, **kwargs):
    """Reward answers that show an equation before the box."""
    pattern = r".*?=.*?\\boxed\{.*?\}"
    responses = [completion[0]["content"] for completion in completions]
    return [0.5 if re.match(pattern, response, re.DOTALL) else 0.0 for response in responses]


def count_boxes(text) -> float:
    """Return 0.5 for exactly one box, less 0.01 for each character after it, and 0 for any other number of boxes."""
    count = 0.0
    if text.count("\\boxed{") == 1:
        count += 0.5
        count -= min(len(text.split("}")[-1]) * 0.01, 1.5)
    return count


def box_count_reward(completions, **kwargs) -> list[float]:
    """Reward exactly one box with nothing behind it; the values go from -1 to 0.5."""
    contents = [completion[0]["content"] for completion in completions]
    return [count_boxes(content) for content in contents]
