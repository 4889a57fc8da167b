"""The process of `Simulator`: a job per line of its input, a result per line of its output, both in JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from typing import Any

from popo_lite.errors import PopoError
from popo_lite.recipe import Recipe


def main() -> None:
    """Answer jobs until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    from popo_lite.tools.simulate.device import SimulatedDevice
    from popo_lite.tools.simulate.run import simulate

    # Modules are tried for tiles, and torch would log a traceback for each that is no such module.
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True
    device = SimulatedDevice()
    with device.installed():
        for line in sys.stdin:
            job = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = simulate(device, Recipe.model_validate_json(job["recipe"]), **job["options"])
            except PopoError as error:
                answer = {"error": [type(error).__name__, error.what, error.where, error.next_step]}
            except Exception:
                answer = {"bug": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)
        answers.flush()
        # torch would call the hooks' Python functions while the interpreter is taken apart.
        os._exit(0)


if __name__ == "__main__":
    main()
