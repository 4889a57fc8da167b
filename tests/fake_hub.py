"""A Hub in this process that speaks the part of the real one's HTTP interface that huggingface_hub uses to upload."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN = "hf_of_the_test"
RELATIONS = ("adapter", "finetune", "merge", "quantized", None)


@dataclass
class Repo:
    """Files of each branch, commits of all of them, the newest last."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[tuple[str, str]] = field(default_factory=list)  # (branch, message)
    heads: dict[str, str] = field(default_factory=lambda: {"main": f"{1:040x}"})


@dataclass
class Hub:
    """What the Hub holds, what it saw, and how it misbehaves."""

    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: list[tuple[str, int]] = field(default_factory=list)  # (object, bytes received of it), one for each PUT
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)  # part of a path -> status and message
    cuts: int = 0  # so many PUTs end in the middle
    hold: str = ""  # the object whose PUT gets no further than its middle
    held: Event = field(default_factory=Event)
    part_bytes: int | None = None  # objects that are larger are sent in parts
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    answers: Event = field(default_factory=Event)  # PUTs get no answer while it is not set

    def __post_init__(self) -> None:
        self.answers.set()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What people see of a branch."""
        return {name: data for name, data in self.repos[repo].branches[branch].items() if name != ".gitattributes"}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """(status, content, headers) to a request that is logged in."""
        for piece, (status, message) in self.refused.items():
            if piece in path:
                return status, {"error": message}, {}
        match method, *map(unquote, path.strip("/").split("/")):
            case "POST", "api", "repos", "create":
                return self._create(json.loads(body))
            case "POST", "api", "validate-yaml":
                errors = card_errors(json.loads(body)["content"])
                return 400 if errors else 200, {"errors": [{"message": each} for each in errors], "warnings": []}, {}
            case "PUT", "objects", oid, *part:
                self._store(oid, body, int(part[0]) if part else None)
                return 200, {}, {"ETag": hashlib.md5(body).hexdigest()}  # noqa: S324
            case "POST", "objects", oid, "complete":
                self._store(oid, b"".join(data for _, data in sorted(self.parts.pop(oid).items())), None)
                return 200, {}, {}
            case "POST", user, name, "info", "lfs", "objects", "batch":
                wanted = json.loads(body)["objects"]
                return 200, {"transfer": "basic", "objects": [self._place(each) for each in wanted]}, {}
            case _, "api", "models", user, name, *rest:
                return self._model(method, f"{user}/{name}", rest, body)
            case "HEAD" | "GET", user, name, "resolve", revision, *file:
                repo, name = self.repos[f"{user}/{name}"], "/".join(file)
                branch = self._branch(repo, revision)
                if branch is None or name not in repo.branches[branch]:
                    return 404, {}, {"X-Error-Code": "EntryNotFound"}
                data = repo.branches[branch][name]
                return 200, data, {"ETag": hashlib.sha1(data).hexdigest(), "X-Repo-Commit": repo.heads[branch]}  # noqa: S324
        return 404, {"error": f"{method} {path} is not known here"}, {}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{wanted['organization']}/{wanted['name']}"
        exists = name in self.repos
        if not exists:
            self.repos[name] = Repo(wanted.get("visibility") == "private")
        return 409 if exists else 200, {"url": f"{self.endpoint}/{name}"}, {}

    def _branch(self, repo: Repo, revision: str) -> str | None:
        return next((name for name, head in repo.heads.items() if revision in (name, head)), None)

    def _model(self, method: str, name: str, rest: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo = self.repos.get(name)
        if repo is None:
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        branch = self._branch(repo, rest[1] if rest[1:] else "main")
        if [method, *rest[:1]] == ["POST", "branch"]:
            repo.branches[rest[1]], repo.heads[rest[1]] = dict(repo.branches["main"]), repo.heads["main"]
            return 200, {}, {}
        if branch is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        files = repo.branches[branch]
        match method, *rest[:1]:
            case "GET", *_:
                siblings = [{"rfilename": each} for each in files]
                head = repo.heads[branch]
                return 200, {"id": name, "private": repo.private, "siblings": siblings, "sha": head}, {}
            case "POST", "preupload":
                return 200, {"files": [self._mode(each, files) for each in json.loads(body)["files"]]}, {}
            case "POST", "commit":
                return self._commit(repo, branch, name, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"{method} {rest} is not known here"}, {}

    def _mode(self, file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        path = file["path"]
        large = path.endswith((".safetensors", ".gguf", "tokenizer.json"))
        there, oid = files.get(path), None
        if there is not None:
            git = hashlib.sha1(b"blob %d\0" % len(there) + there)  # noqa: S324
            oid = (hashlib.sha256(there) if large else git).hexdigest()
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.objects:
            return wanted
        href: str = f"{self.endpoint}/objects/{oid}"
        if self.part_bytes is None or size <= self.part_bytes:
            return {**wanted, "actions": {"upload": {"href": href}}}
        count = -(-size // self.part_bytes)
        header = {"chunk_size": str(self.part_bytes)} | {str(n): f"{href}/{n}" for n in range(1, count + 1)}
        return {**wanted, "actions": {"upload": {"href": f"{href}/complete", "header": header}}}

    def _store(self, oid: str, body: bytes, part: int | None) -> None:
        if part is not None:
            self.parts.setdefault(oid, {})[part] = body
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body

    def _commit(
        self, repo: Repo, branch: str, name: str, lines: list[dict[str, Any]]
    ) -> tuple[int, Any, dict[str, str]]:
        header, files = lines[0]["value"], repo.branches[branch]
        if header.get("parentCommit", repo.heads[branch]) != repo.heads[branch]:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repo.commits.append((branch, header["summary"]))
        repo.heads[branch] = f"{len(repo.commits) + 1:040x}"
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": repo.heads[branch]}, {}


def card_errors(card: str) -> list[str]:
    """What the Hub's validation would refuse of the metadata, in small."""
    data = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
    errors = [] if data.get("base_model_relation") in RELATIONS else ['"base_model_relation" must be one of ...']
    for key in ("license", "library_name", "pipeline_tag"):
        errors += [f'"{key}" must be a string'] if not isinstance(data.get(key, ""), str) else []
    for model in data.get("model-index", []):
        named = model["name"] and all({"task", "dataset", "metrics"} <= result.keys() for result in model["results"])
        errors += [] if named else ['"model-index" is wrong']
    return errors


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve a new Hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            path, login = self.path.partition("?")[0], self.headers.get("Authorization")
            hub.requests.append((self.command, path, login))
            length, is_object = int(self.headers.get("Content-Length", 0)), path.startswith("/objects/")
            if self.command == "PUT":
                oid = path.split("/")[2]
                if is_stopped := hub.cuts > 0 or hub.hold == oid:
                    length //= 2
                body = self.rfile.read(length)
                hub.sent.append((oid, len(body)))
                if is_stopped:
                    hub.cuts -= hub.cuts > 0
                    if hub.hold == oid:
                        hub.held.set()
                        self.rfile.read(1)  # until the client is gone
                    self.close_connection = True
                    return
                if not hub.answers.is_set():
                    hub.held.set()
                    hub.answers.wait()
            else:
                body = self.rfile.read(length)
            # Objects go to a storage service, which the Hub's token is not sent to.
            if login == f"Bearer {TOKEN}" or is_object:
                status, content, headers = hub.answer(self.command, path, body)
            else:
                status, content, headers = 401, {"error": "Invalid username or password."}, {}
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = respond

        def log_message(self, *_: object) -> None:
            """Requests are kept in the state and not printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.answers.set()
    server.shutdown()
    server.server_close()
    thread.join()


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command that has no login and no network but what `changes` give it. Without Xet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "HF_TOKEN_PATH": os.devnull}
    if "HF_ENDPOINT" not in changes:
        settings["HF_HUB_OFFLINE"] = "1"
    return {**kept, **settings, **changes}


def popo_lite(*arguments: object, code: int = 0, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in `environment`."""
    done = subprocess.run(
        [sys.executable, "-m", "popo_lite", *map(str, arguments)],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    assert code == 0 or "Traceback" not in done.stderr
    return done
