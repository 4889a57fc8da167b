"""A game of several turns: guess a number, and hear after each guess whether it is larger or smaller.

    cd examples/guessing_game
    popo-lite train recipe.toml --trust

It trains the built-in toy model on a CPU in minutes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


class GuessingGame:
    """Knows the number, which is the problem's reference answer."""

    def reset(self, problem: Mapping[str, Any]) -> None:
        """Begin a game."""
        self.number = int(problem["answer"])
        self.found = False

    def step(self, text: str) -> tuple[str, bool]:
        """Take a guess, the last number of the answer."""
        numbers = re.findall(r"\d+", text)
        if not numbers:
            return "Say a number.", False
        guess = int(numbers[-1][:6])
        self.found = guess == self.number
        return "larger" if guess < self.number else "smaller", self.found

    def reward(self) -> float:
        """Return 1 if the last guess was right."""
        return float(self.found)
