"""Run reasoning-gym's generators: JSON requests from standard input, one a line, and one line with a reply for each.

`reasoning_gym` runs this file as it is. The first line has the path to import from (see grading/worker.py) and the
process that asks.
"""

from __future__ import annotations

import ast
import dataclasses
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

ATTEMPTS = 100
"""Entries tried for one problem: about one in four is held out, and a generator may fail."""
BLOCK = 64
"""Positions of one seed, as in `reasoning_gym`; an attempt is this many entries after the one before it."""
HELD_OUT_ONE_IN = 4
"""One in ten would make a held-out problem cost ten drawn ones, and some tasks take 0.2 s for one."""
SECONDS_PER_ENTRY = 60.0


def main() -> None:
    """Answer requests until the parent ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what generators and verifiers print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where a session does not keep Ctrl-C away, as on Windows
    first = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with, args=(first["parent"],), daemon=True).start()
    sys.path[:] = first["path"]
    for line in sys.stdin:
        request = json.loads(line)
        if "open" in request:
            reply: object = ladder(*request["open"], climb=request["climb"])
        else:
            reply = list(problems(request["problems"], held_out=request["held_out"]))
        print(json.dumps(reply), file=replies, flush=True)


def end_with(parent: int) -> None:
    """End this process when the one that asks has ended; the end of the input comes only after a request is done."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def ladder(task: str, settings: dict[str, Any], *, climb: bool) -> dict[str, Any]:
    """Return {"levels": settings of each level}, {"unknown": key, "known": keys}, or {"error": message}."""
    from reasoning_gym.factory import CURRICULA, DATASETS, create_dataset

    known = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    if unknown := next((key for key in settings if key not in known), None):
        return {"unknown": unknown, "known": known}
    levels: list[dict[str, Any]] = []
    curriculum = CURRICULA[task]() if climb and task in CURRICULA else None
    steps = [] if curriculum is None else [len(one.levels) for one in curriculum.attributes.values()]
    for level in range(max(steps, default=1)):
        moved: dict[str, Any] = {}
        if curriculum is not None and steps:
            curriculum.set_global_level(level)
            moved = dataclasses.asdict(curriculum.generate_configuration())
            names = {
                getattr(attribute, name)
                for attribute in curriculum.attributes.values()
                for name in ("field_name", "lower_field_name", "upper_field_name")
                if hasattr(attribute, name)
            }
            moved = {key: moved[key] for key in known if key in names}
        try:
            create_dataset(task, seed=0, size=1, **moved | settings)
        except Exception as error:
            # Some curricula go beyond what their task takes: the levels end there.
            return {"levels": levels} if levels else {"error": f"{type(error).__name__}: {error}".removesuffix(": ")}
        levels.append(moved | settings)
    return {"levels": levels}


def problems(jobs: list[tuple[str, dict[str, Any], int, int]], *, held_out: bool) -> Iterator[dict[str, str]]:
    """Yield {"question", "answer", "entry"}, or {"error": message}, for each (task, settings, seed, place)."""
    from reasoning_gym.factory import create_dataset

    @cache
    def opened(task: str, settings: str, seed: int) -> Any:
        return create_dataset(task, seed=seed, size=BLOCK * ATTEMPTS, **json.loads(settings))

    for task, settings, seed, place in jobs:
        failure = ""
        for attempt in range(ATTEMPTS):
            faulthandler.dump_traceback_later(SECONDS_PER_ENTRY, exit=True)
            try:
                dataset = opened(task, json.dumps(settings), seed)
                entry = plain(dataset[place + attempt * BLOCK])
                right = dataset.score_answer(entry["answer"].strip(), ast.literal_eval(repr(entry))) >= 1
            except Exception as error:
                failure = f"; the last of its errors is {type(error).__name__}: {error}".removesuffix(": ")
                continue
            finally:
                faulthandler.cancel_dump_traceback_later()
            if not right:
                failure = "; its verifier refuses its own answer"
            elif is_held_out(entry["question"]) == held_out:
                yield {"question": entry["question"], "answer": entry["answer"], "entry": repr(entry)}
                break
        else:
            which = "held-out" if held_out else "training"
            yield {
                "error": f"none of {ATTEMPTS} entries is a {which} problem{failure or '; its questions are too few'}"
            }


def is_held_out(question: str) -> bool:
    """Check whether a question is held out, as one in `HELD_OUT_ONE_IN` is; white space is ignored."""
    from popo_lite.seeding import stream_seed

    return stream_seed("reasoning-gym/split", " ".join(question.split())) % HELD_OUT_ONE_IN == 0


def plain(value: Any) -> Any:
    """Return a copy whose text is `str`: numpy's own kind of text would not come back from `repr`."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return str(value) if isinstance(value, str) else value


if __name__ == "__main__":
    main()
