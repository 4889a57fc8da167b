"""Write problems.jsonl, and teach a tiny model to answer such problems, mostly with a slip.

    python make.py

Without Hub and network, `tiny/` stands for a model that knows the form and is often wrong. A real model needs no
`tiny/`: see smollm2.toml.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana")
CITIES = ("Accra", "Bern", "Delhi", "Essen", "Izmir", "Kyoto", "Lima", "Oslo")
TEXTS = (
    "{name} is {age} and lives in {city}.",
    "In {city} lives {name}, who is {age}.",
    "{name}, {age}, works in {city}.",
)


def problem(source: random.Random) -> tuple[str, dict[str, str | int]]:
    """Return a text and the record in it."""
    person = {"name": source.choice(NAMES), "age": source.randint(18, 89), "city": source.choice(CITIES)}
    return source.choice(TEXTS).format(**person), person


def taught(source: random.Random) -> tuple[str, str]:
    """Return a text and an answer, of which one in four is right; the others have a slip of a usual kind."""
    text, person = problem(source)
    slip = source.choice(("none", "age as text", "wrong city", "no age"))
    if slip == "age as text":
        person["age"] = str(person["age"])
    if slip == "wrong city":
        person["city"] = source.choice(CITIES)
    if slip == "no age":
        del person["age"]
    return text, json.dumps(person)


def problems() -> list[dict[str, str]]:
    """Return the rows of problems.jsonl."""
    source = random.Random(1)  # noqa: S311
    found = dict(problem(source) for _ in range(400))
    return [{"text": text, "record": json.dumps(record)} for text, record in found.items()]


def write_problems() -> None:
    """Write problems.jsonl, the same each time."""
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems()), encoding="utf-8")


def main() -> None:
    """Write the problems and the model."""
    import torch

    from popo_lite.tools.tiny_model import teach

    write_problems()
    torch.set_num_threads(1)  # more are slower at this size
    teach(Path("tiny"), pair=taught, tokens=448, steps=400, batch=64)


if __name__ == "__main__":
    main()
