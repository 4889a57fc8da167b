"""Run vLLM's server in a process that ends with the one that started it. `python -m` takes its pid and the options."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

WATCH_SECONDS = 1.0
GRACE_SECONDS = 20.0
"""Time for a server to shut down after SIGTERM, before it is killed."""


def end_with(parent: int) -> None:
    """End this process soon after its parent `parent` has ended, however that ended."""

    def watch() -> None:
        # Not prctl(PR_SET_PDEATHSIG): that looks at the thread that started a process, and libraries use many.
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(parent: int, options: list[str]) -> None:
    """Run the server with vLLM's `options`."""
    end_with(parent)
    # The engine runs in a process of its own and holds the memory. It is forked, or spawned, which runs this file.
    os.register_at_fork(after_in_child=lambda: end_with(os.getppid()))
    if "--trust-remote-code" in options:
        from popo_lite.policy.load import allow_code_of

        allow_code_of(options[options.index("--model") + 1])
    sys.argv = ["vllm", *options]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
elif __name__ == "__mp_main__":
    end_with(os.getppid())
