"""A server that speaks vLLM's protocol over real HTTP, without vLLM."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

END = 1
"""A stop token of the tiny model, with which every answer ends."""


class Script(ThreadingHTTPServer):
    """Speaks vLLM's protocol. `answer(path, body)` may return (status, text) to answer otherwise, or None."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.adapters, self.seeds, self.asked = {}, [], Counter()
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.connections, self.headers = [], []
        self.room, self.token, self.processed = 512, None, True
        self.location = ""  # where redirects lead
        self.answer = lambda path, body: None
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        """Clients that go away are part of the tests."""

    def close(self):
        """Stop listening, and end the connections that are open as the end of a process would."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def reply(self, path, body):
        """(status, text) as vLLM has it."""
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            base = {"id": "base", "parent": None, "max_model_len": self.room}
            return 200, json.dumps({"data": [base, *({"id": name, "parent": "base"} for name in self.adapters)]})
        name = body.get("lora_name")
        if path == "/v1/load_lora_adapter":
            if not (Path(body["lora_path"]) / "adapter_model.safetensors").is_file():
                return 404, error(f"Loading lora {name} failed: No adapter found for {body['lora_path']}")
            self.adapters[name] = body["lora_path"]
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            return (200, "Success") if self.adapters.pop(name, None) else (404, error("cannot be found"))
        if body["model"] != "base" and body["model"] not in self.adapters:
            return 404, error(f"The model `{body['model']}` does not exist.")
        self.seeds.append(body["seed"])
        heat = 1 / body["temperature"] if self.processed else 1.0
        return 200, completion([2, 3, END], [-0.5, -0.25, -0.125], top={"a": -1.0 * heat, "b": -3.0 * heat})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.connections.append(self.connection)

    def do_GET(self):
        self.respond({})

    def do_POST(self):
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body):
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.in_flight += self.path == "/v1/completions"
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        allowed = server.token is None or self.headers["Authorization"] == f"Bearer {server.token}"
        if self.path != "/health" and not allowed:
            status, text = 401, json.dumps({"error": "Unauthorized"})
        else:
            status, text = server.answer(self.path, body) or server.reply(self.path, body)
        with server.lock:
            server.in_flight -= self.path == "/v1/completions"
        self.send_response(status)
        if server.location and status // 100 == 3:
            self.send_header("Location", server.location)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def error(message):
    return json.dumps({"error": {"message": message, "code": 0}})


def completion(ids, logps, *, top=None, reason="stop"):
    logprobs = {"token_logprobs": logps, "top_logprobs": [top or {}]}
    return json.dumps({"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": reason}]})


def sampling(answer):
    """An `answer` for completions by an adapter alone, which start-up does not ask for."""
    return lambda path, body: answer(body) if path == "/v1/completions" and body["model"] != "base" else None
