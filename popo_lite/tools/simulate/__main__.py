"""The process of `Simulator`: jobs come in on its input, results or errors go out on its output, all pickled."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import traceback
import warnings
from contextlib import suppress
from typing import Any

from popo_lite.errors import PopoError


def main() -> None:
    """Answer jobs until the input ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # libraries print
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    from popo_lite.tools.simulate.device import SimulatedDevice
    from popo_lite.tools.simulate.run import simulate

    # Modules are tried for tiles, and torch would log a traceback for each that is no such module.
    logging.getLogger("torch._subclasses.fake_tensor").disabled = True
    device = SimulatedDevice()
    with device.installed(), suppress(EOFError):
        while True:
            recipe, options = pickle.load(sys.stdin.buffer)  # noqa: S301 - `Simulator` wrote it
            answer: dict[str, Any] | Exception
            try:
                answer = simulate(device, recipe, **options)
            except PopoError as error:
                answer = error
            except Exception:
                answer = RuntimeError(traceback.format_exc())
            pickle.dump(answer, answers)
            answers.flush()
    # torch would call the hooks' Python functions while the interpreter is taken apart.
    os._exit(0)


if __name__ == "__main__":
    main()
