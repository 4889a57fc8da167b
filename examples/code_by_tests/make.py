"""Write problems.jsonl, and teach a tiny model to answer such problems, mostly with a slip.

    python make.py

Without Hub and network, `tiny/` stands for a model that knows some Python and is often wrong. A real model needs no
`tiny/`: see smollm2.toml.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

KINDS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "x plus {n}": ("x + {n}", lambda x, n: x + n),
    "x minus {n}": ("x - {n}", lambda x, n: x - n),
    "{n} minus x": ("{n} - x", lambda x, n: n - x),
    "x times {n}": ("x * {n}", lambda x, n: x * n),
    "the larger of x and {n}": ("max(x, {n})", max),
    "the smaller of x and {n}": ("min(x, {n})", min),
}
"""Words of a question -> code that answers it, and what the code must return for x and n."""


def question(words: str, n: int) -> str:
    """Return the question."""
    return f"Write a function f(x) that returns {words.format(n=n)}."


def taught(source: random.Random) -> tuple[str, str]:
    """Return a question and an answer, of which one in four is right; the others are the code of another question."""
    words, n = source.choice(list(KINDS)), source.randint(2, 40)
    code = KINDS[words if source.random() < 0.25 else source.choice(list(KINDS))][0]
    return question(words, n), f"def f(x):\n    return {code.format(n=n)}"


def problems() -> list[dict[str, str]]:
    """Return the rows of problems.jsonl."""
    rows = []
    for words, (_, value) in KINDS.items():
        for n in range(2, 41):
            # On both sides of n: with large numbers alone, `return x` would pass for the larger one.
            tests = [f"assert f({x}) == {value(x, n)}" for x in (-3, 0, n - 1, n + 5)]
            rows.append({"question": question(words, n), "answer": json.dumps(tests)})
    random.Random(0).shuffle(rows)  # noqa: S311
    return rows


def write_problems() -> None:
    """Write problems.jsonl, the same each time."""
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems()), encoding="utf-8")


def main() -> None:
    """Write the problems and the model."""
    import torch

    from popo_lite.tools.tiny_model import teach

    write_problems()
    torch.set_num_threads(1)  # more are slower at this size
    teach(Path("tiny"), pair=taught, tokens=448, steps=300, batch=64)


if __name__ == "__main__":
    main()
