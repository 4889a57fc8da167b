"""Real vLLM servers on this CPU, for tests."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from popo_lite.samplers.server import serve_command

TOKEN = "a-token-of-the-tests"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_API_KEY": TOKEN,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
START_SECONDS = 900


class Server:
    """A vLLM server as the printed command starts it, in a process group of its own."""

    def __init__(self, recipe, url, base, log):
        self.recipe, self.url, self.base, self.log = recipe, url, base, log
        self.process = None

    def start(self, *changes):
        words = shlex.split(serve_command(self.recipe, self.url))
        setting, options = words[0], words[4:]
        assert words[1:4] == ["vllm", "serve", "DEQUANTIZED_BASE"]
        name, value = setting.split("=")
        # The module that `vllm serve` runs; the command itself does not start where vLLM is called vllm-cpu.
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.base), *options,
                 "--enforce-eager", *changes],
                env={**os.environ, **ENVIRONMENT, name: value},
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def wait(self):
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        pytest.fail(f"no server at {self.url}:\n{self.log.read_text()[-3000:]}")

    def kill(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def adapters(self):
        cards = httpx.get(f"{self.url}/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
        return [card["id"] for card in cards.json()["data"] if card["parent"] is not None]


def free_urls(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    urls = [f"http://127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return urls
