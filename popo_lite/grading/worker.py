"""Run a grading process: JSON requests, one a line, from the inherited socket; one line with a reply back for each.

`grader` runs this file as it is, with the interpreter's `-P`, and sends the path to import from as the first line.
So workers import what their parent would, and nothing of popo_lite is imported before that line. A `-m` would
search the working directory first, and without `-P` this folder would come first: a `random.py` of the user or
our own `math.py` would then take the place of the standard library's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys

MEMORY_LIMIT_BYTES = 4 * 2**30  # of address space: an answer such as 9^(9^(9^9)) cannot exhaust memory
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Read the settings, load the reward functions, then grade until the parent closes the socket."""
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        connection.set_inheritable(False)
        requests, replies = connection.makefile("r", encoding="utf-8"), connection.makefile("w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints
    limit_memory()
    if sys.platform == "linux":
        # The kernel kills this process when its parent is gone. An idle worker ends at the end of its requests anyway,
        # but one inside a long computation does not read them, and no thread of ours would get the interpreter lock.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    settings = json.loads(requests.readline())
    sys.path[:] = settings["path"]

    from popo_lite.errors import UserInputError
    from popo_lite.grading import functions
    from popo_lite.recipe import RewardRecipe
    from popo_lite.types import Outcome, Reward

    def reply(**content: object) -> None:
        print(json.dumps(content), file=replies, flush=True)

    recipe = RewardRecipe.model_validate(settings["reward"])
    try:
        loaded = functions.load_functions(recipe, thinking_open=settings["thinking_open"])
    except UserInputError as error:
        reply(refused=error.what, next_step=error.next_step)
        return
    reply(ready=True)
    for line in requests:
        request = json.loads(line)
        if "check" in request:
            reply(reasons=[functions.unreadable(loaded, problem) for problem in request["check"]])
        elif "try" in request:
            try:
                functions.try_functions(loaded, *request["try"])
            except UserInputError as error:
                reply(refused=error.what, next_step=error.next_step)
            else:
                reply(forms={one.settings.key: one.trl.form for one in loaded if one.trl})
        elif "observe" in request:
            observation = functions.observe(loaded, request["observe"])
            if isinstance(observation, Reward):
                reply(reward=dataclasses.asdict(observation))
            else:
                reply(observation=observation)
        else:
            try:
                text, problem = request["grade"]
                reward, leaving = functions.grade_by_all(loaded, text, problem, recipe), False
            except MemoryError as error:
                detail = functions.describe_exception(error)
                reward, leaving = Reward(value=0.0, outcome=Outcome.ERROR, detail=detail), True
            reply(reward=dataclasses.asdict(reward), leaving=leaving)
            if leaving:
                return


def limit_memory() -> None:
    """Limit this process's address space, on Linux: macOS accepts no such limit, and Windows has none."""
    if sys.platform != "linux":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
