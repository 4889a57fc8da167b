"""Run vLLM's server in a process that ends with the one that started it.

`python -m` is that process: it takes the parent's pid and vLLM's options.
"""

from __future__ import annotations

import collections
import os
import runpy
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any

from popo_lite.errors import EngineError, PopoError

SHOWN_LINES = 20
"""Last lines of a server that failed."""

WATCH_SECONDS = 1.0
GRACE_SECONDS = 20.0
"""Time for a server to shut down after SIGTERM, before it is killed."""
MIDDLEWARE = "popo_lite.tools.serve_process.OpenAIOnly"
NONCE = "POPO_LITE_SERVE_NONCE"
"""Environment variable with a path by which the parent knows its own server."""


class OpenAIOnly:
    """Answer 404 outside /v1/ and /health: vLLM asks for VLLM_API_KEY in /v1 alone, and serves much outside it."""

    def __init__(self, app: Any) -> None:
        self._app, self._nonce = app, os.environ[NONCE]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle an ASGI event."""
        path = scope.get("path", "")
        if path == f"/{self._nonce}":
            scope = {**scope, "path": "/health"}
        elif scope["type"] in ("http", "websocket") and path != "/health" and not path.startswith("/v1/"):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("Not Found", 404)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class Server:
    """A running server. Its lines are kept, and from then on given to `forward` if that is set."""

    def __init__(self, process: subprocess.Popen[str], nonce: str) -> None:
        self.process, self._nonce = process, nonce
        self.forward: Callable[[str], None] | None = None
        self._lines: collections.deque[str] = collections.deque(maxlen=SHOWN_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self._lines.append(line.rstrip())
            if self.forward is not None:
                self.forward(line.rstrip())

    def wait(self, url: str) -> None:
        """Return once this server, and no other, answers at `url`. Raises EngineError if it ends before."""
        import httpx

        while self.process.poll() is None:
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/{self._nonce}", trust_env=False, timeout=10).status_code == 200:
                    return
            time.sleep(0.5)
        raise self.failure("the server did not start")

    def failure(self, what: str) -> EngineError:
        """Return the error that shows the server's last lines."""
        self._reader.join(1.0)
        last = "\n".join(line for line in self._lines if line.strip()) or "it printed nothing"
        next_step = "lower --gpu-memory-utilization or --max-model-len if memory ran out; else see docs/chat.md"
        return EngineError(f"{what}; its last lines:\n{last}", where="vLLM", next_step=next_step)


@contextmanager
def running_server(flags: Sequence[str], environment: Mapping[str, str]) -> Iterator[Server]:
    """Run the server for the block. However that ends, no process of it is left."""
    nonce = secrets.token_hex(16)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "popo_lite.tools.serve_process", str(os.getpid()), *flags],
        env={**environment, NONCE: nonce}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
        start_new_session=True,  # Ctrl-C is for this process, which then ends the server in order
    )  # fmt: skip
    try:
        yield Server(process, nonce)
    finally:
        try:
            process.terminate()
            process.wait(GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # it hangs, or a second Ctrl-C
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block like Ctrl-C, which is how a server is stopped."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` returns in another process, whose memory, also of the GPU, is then free for the server."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError as error:
        process.join()
        what = f"the process that reads the run ended with exit code {process.exitcode}"
        next_step = (
            "free some memory and rerun the command" if process.exitcode == -9 else "please report what it printed"
        )
        raise EngineError(what, next_step=next_step) from error
    finally:
        process.kill()
        process.join()
    if isinstance(outcome, PopoError):
        raise outcome
    return outcome


def _send(sender: Any, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        sender.send(work(*arguments))
    except PopoError as error:
        sender.send(error)


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
