"""The real command, from a run of `popo-lite train` to a model that loads without PEFT, and to the Hub.

The Hub is a server in this process that speaks the part of the real one's HTTP interface that uploads need.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

TOKEN = "hf_of_the_test"
REPO = "somebody/tiny-popo"


@dataclass
class Hub:
    """What the Hub holds: repositories by name, uploaded objects by SHA-256, and every request it saw."""

    repos: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    read_only: bool = False
    endpoint: str = ""

    def files(self, repo: str = REPO) -> dict[str, bytes]:
        return self.repos[repo]["files"]

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON) to a request that is logged in."""
        match method, *path.strip("/").split("/"):
            case "POST", "api", "repos", "create":
                wanted = json.loads(body)
                name = f"{wanted['organization']}/{wanted['name']}"
                exists = name in self.repos
                if not exists:
                    self.repos[name] = {"private": wanted.get("visibility") == "private", "files": {}, "commits": 0}
                return 409 if exists else 200, {"url": f"{self.endpoint}/{name}"}
            case "POST", "api", "validate-yaml":
                return 200, {"errors": [], "warnings": []}
            case "PUT", "objects", oid:
                assert hashlib.sha256(body).hexdigest() == oid
                self.objects[oid] = body
                return 200, {}
            case "GET", "api", "models", user, name:
                repo = self.repos[f"{user}/{name}"]
                return 200, {"id": f"{user}/{name}", "private": repo["private"], "siblings": [], "sha": "0" * 40}
            case "GET", "api", "models", user, name, "tree", "main":
                found = self.files(f"{user}/{name}")
                return 200, [{"type": "file", "path": file, "size": len(found[file]), "oid": "0"} for file in found]
            case "POST", "api", "models", _, _, "preupload", "main":
                if self.read_only:
                    return 403, {"error": "read-only token"}
                files = [
                    {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                    for file in json.loads(body)["files"]
                ]
                return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
            case "POST", _, _, "info", "lfs", "objects", "batch":
                return 200, {"transfer": "basic", "objects": [self._place(obj) for obj in json.loads(body)["objects"]]}
            case "POST", "api", "models", user, name, "commit", "main":
                self._commit(self.repos[f"{user}/{name}"], [json.loads(line) for line in body.splitlines()])
                return 200, {"commitUrl": f"{self.endpoint}/{user}/{name}/commit/1", "commitOid": "1" * 40}
        return 404, {"error": f"{method} {path} is not known here"}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.endpoint}/objects/{wanted['oid']}"}}}

    def _commit(self, repo: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        repo["commits"] += 1
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    repo["files"][value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repo["files"][value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del repo["files"][value["path"]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            login = self.headers.get("Authorization")
            state.requests.append((self.command, path, login))
            # Objects go to a storage service, which the Hub's token is not sent to.
            if login == f"Bearer {TOKEN}" or path.startswith("/objects/"):
                status, content = state.answer(self.command, path, body)
            else:
                status, content = 401, {"error": "Invalid username or password."}
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = respond

        def log_message(self, *_: object) -> None:
            """Requests are kept in the state and not printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = ("train.steps=4", "data.prompts_per_step=8", "eval.problems=40")
    overrides = [part for setting in settings for part in ("--set", setting)]
    popo_lite("train", "tiny_cpu", *overrides, "--output", str(folder), "--view", "silent")
    return folder


def popo_lite(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real command; without `HF_ENDPOINT` it has no network to use."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    hub_settings = {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    if "HF_ENDPOINT" not in environment:
        hub_settings["HF_HUB_OFFLINE"] = "1"
    result = subprocess.run(
        [sys.executable, "-m", "popo_lite", *arguments],
        env={**kept, **hub_settings, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == code, result.stderr
    assert code == 0 or "Traceback" not in result.stderr
    return result


def example(folder: Path) -> str:
    """The Python of the folder's model card."""
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def test_a_run_becomes_a_model_that_loads_without_peft(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    printed = popo_lite("export", str(run), "--output", str(folder), "--prompts", "40", "--json").stdout
    report = json.loads(printed)
    assert report["folder"] == str(folder)
    assert (report["what"], report["weights"], report["dtype"]) == ("merged", "policy", "float32")
    assert report["files"] == {file.name: file.stat().st_size for file in folder.iterdir()}
    assert report["verification"]["prompts"] == 40
    assert report["verification"]["greedy_agreement"] == 1.0
    assert report["verification"]["pass_at_1"]["problems"] == 40
    # The card's own example, in a process that has neither PEFT nor this package.
    code = 'import sys; sys.modules["peft"] = sys.modules["popo_lite"] = None\n' + example(folder)
    code = code.replace("path/to/this/folder", str(folder))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "\\boxed{" in ran.stdout


def test_the_example_of_an_adapter_runs(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    out = popo_lite("export", str(run), "--what", "adapter", "--weights", "siamese", "--output", str(folder)).stdout
    assert "adapter_model.safetensors" in out
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        run / "siamese" / "adapter_model.safetensors"
    ).read_bytes()
    code = example(folder).replace("path/to/this/folder", str(folder))
    code += "assert base.is_loaded_in_4bit and base.config.quantization_config.bnb_4bit_use_double_quant\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "\\boxed{" in ran.stdout


def test_a_push_uploads_every_byte_and_a_second_one_replaces_it(run: Path, tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "model"
    merged = (
        "export",
        str(run),
        "--output",
        str(folder),
        "--prompts",
        "8",
        "--problems",
        "0",
        "--push-to-hub",
        REPO,
        "--private",
    )
    planned = popo_lite(*merged, "--dry-run").stdout
    assert hub.requests == []
    assert f"Would be uploaded to {REPO}, private" in planned
    assert "model.safetensors" in planned
    assert f'model_id = "{REPO}"' in planned
    assert "library_name: transformers" in planned

    # The card may be edited before the folder is uploaded as it lies there.
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nA line of my own.\n")
    login = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    report = json.loads(popo_lite(*merged, "--json", **login).stdout)
    assert report["reused"]
    assert report["upload"] == {
        "repo_id": REPO,
        "private": True,
        "url": f"{hub.endpoint}/{REPO}",
        "commit": "1" * 40,
    }
    assert hub.files() == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert hub.repos[REPO]["private"]
    assert b"A line of my own." in hub.files()["README.md"]
    assert f'model_id = "{REPO}"'.encode() in hub.files()["README.md"]

    uploads = sum(method == "PUT" for method, _, _ in hub.requests)
    card.write_text(card.read_text() + "\nAnother line.\n")
    popo_lite(*merged, **login)
    assert hub.files() == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert sum(method == "PUT" for method, _, _ in hub.requests) == uploads  # the weights are there already
    assert hub.repos[REPO]["commits"] == 2

    # An adapter left beside a merged model, or the other way round, would be loaded on top of it.
    # So would what belongs to a GGUF file.
    hub.files().update({"Modelfile": b"FROM ./model-q8_0.gguf", "model-q8_0.gguf": b"GGUF"})
    adapter = tmp_path / "adapter"
    popo_lite("export", str(run), "--what", "adapter", "--output", str(adapter), "--push-to-hub", REPO, **login)
    assert hub.files() == {file.name: file.read_bytes() for file in adapter.iterdir()}


def test_what_the_hub_refuses_is_explained_and_the_export_kept(run: Path, tmp_path: Path, hub: Hub) -> None:
    folder = tmp_path / "adapter"
    command = ("export", str(run), "--what", "adapter", "--output", str(folder), "--push-to-hub", REPO)
    here = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}

    refused = popo_lite(*command, code=1, **here).stderr
    assert "hf auth login" in refused
    assert f"the export is kept in {folder}" in " ".join(refused.split())
    assert (folder / "adapter_model.safetensors").is_file()
    assert {login for _, _, login in hub.requests} == {None}

    hub.read_only = True
    refused = popo_lite(*command, code=1, **here, HF_TOKEN=TOKEN).stderr
    assert "this login may not write there" in refused
    assert hub.files() == {}

    hub.read_only = False
    refused = popo_lite(*command, "--private", code=1, **here, HF_TOKEN=TOKEN).stderr
    assert "everybody can see it" in refused
    assert hub.files() == {}

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        refused = popo_lite(*command, code=1, HF_ENDPOINT=nobody, HF_TOKEN=TOKEN).stderr
    assert "the Hub cannot be reached" in refused
    assert "HF_HUB_OFFLINE forbids it" in popo_lite(*command, code=1).stderr


def test_mistakes_are_refused_before_anything_is_loaded(run: Path, tmp_path: Path) -> None:
    assert "--push-to-hub" in popo_lite("export", str(run), "--private", code=2).stderr
    assert "--push-to-hub" in popo_lite("export", str(run), "--dry-run", code=2).stderr
    assert "--dtype" in popo_lite("export", str(run), "--what", "adapter", "--dtype", "float16", code=2).stderr
    assert "--base" in popo_lite("export", str(run), "--what", "adapter", "--base", "original", code=2).stderr
    for name in ("no-user", "some body/name", "a/b/c"):
        refused = popo_lite("export", str(run), "--push-to-hub", name, code=2).stderr
        assert "not the name of a repository" in refused
    assert "there is no run here" in popo_lite("export", str(tmp_path), code=2).stderr
    assert not (run / "export").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from popo_lite.tools.export.command import export\n"
        "result = CliRunner().invoke(export, ['--help'])\n"
        "assert result.exit_code == 0 and '--push-to-hub' in result.output\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
