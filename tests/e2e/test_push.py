"""`popo-lite push` with the real client, to a Hub in this process: `fake_hub`."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from transformers import AutoTokenizer

from fake_hub import TOKEN, Hub, environment, popo_lite, serve
from popo_lite.tools.export.pipeline import export_run
from runs import finished_run

REPO = "somebody/tiny-popo"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export of each kind, which no test changes."""
    run = finished_run(tmp_path_factory.mktemp("push") / "run", "model.quantization=none")
    for options in ({"what": "adapter"}, {}, {"gguf": "q8_0"}):
        export_run(run, prompts=2, problems=0, **options)  # type: ignore[arg-type]
    return run.path / "export"


@pytest.fixture
def adapter(exports: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports / "adapter-policy", tmp_path / "adapter"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as served:
        yield served


def login(hub: Hub, tmp_path: Path, token: str = TOKEN) -> dict[str, str]:
    """As `hf auth login` leaves it: a token in the environment would be masked in all output."""
    path = tmp_path / "token"
    path.write_text(token)
    return {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN_PATH": str(path), "HF_HOME": str(tmp_path / "home")}


def contents(folder: Path, revision: str | None = None) -> dict[str, bytes]:
    """The folder's files as they should arrive: with repository and branch in the card's example."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    card = re.sub(rb'^model_id = ".*"$', f'model_id = "{REPO}"'.encode(), found["README.md"], flags=re.MULTILINE)
    if revision:
        loading, at = (
            (b"Tokenizer.from_pretrained(model_id", b"CausalLM.from_pretrained(model_id"),
            f', revision="{revision}"',
        )
        for call in loading:
            assert card.count(call) == 1
            card = card.replace(call, call + at.encode())
    return {**found, "README.md": card}


def test_a_dry_run_shows_what_a_push_uploads_byte_for_byte(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    card = adapter / "README.md"
    card.write_text(card.read_text() + "\nA line of my own.\n")
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    planned = popo_lite("push", adapter, REPO, "--private", "--dry-run").stdout
    assert "nothing was sent" in planned
    assert "A line of my own." in planned
    for name, data in contents(adapter).items():
        assert re.search(rf"^{re.escape(name)} +{len(data):,}$", planned, re.MULTILINE), name
    assert planned.endswith(f"To upload it:\n  popo-lite push {adapter} {REPO} --private\n")
    assert hub.requests == []
    assert before == {path: path.read_bytes() for path in adapter.iterdir()}

    done = popo_lite("push", adapter, REPO, "--private", "--json", **login(hub, tmp_path))
    report = json.loads(done.stdout)
    assert hub.files(REPO) == contents(adapter)
    assert report["files"] == {name: len(data) for name, data in hub.files(REPO).items()}
    assert (report["url"], report["private"], report["deleted"]) == (f"{hub.endpoint}/{REPO}", True, [])
    assert hub.repos[REPO].private
    assert hub.repos[REPO].commits == [("main", "Upload adapter (policy) with popo-lite")]
    assert report["commit"] == hub.repos[REPO].heads["main"]
    assert TOKEN not in done.stdout + done.stderr

    # The same export again: only what changed is committed, and no weights are sent.
    sent = len(hub.sent)
    card.write_text(card.read_text() + "\nAnother line.\n")
    shown = popo_lite("push", adapter, REPO, **login(hub, tmp_path)).stdout
    assert hub.files(REPO) == contents(adapter)
    assert len(hub.sent) == sent
    assert shown.splitlines()[-2:] == [
        f"{hub.endpoint}/{REPO}",
        f'model = PeftModel.from_pretrained(base, "{REPO}")   (the card loads the base that it belongs to)',
    ]


def test_another_export_replaces_the_first_one_only_if_told_to(exports: Path, tmp_path: Path, hub: Hub) -> None:
    here = login(hub, tmp_path)
    popo_lite("push", exports / "adapter-policy", REPO, **here)
    hub.repos[REPO].branches["main"]["notes.txt"] = b"mine"
    first = hub.files(REPO)
    refused = " ".join(popo_lite("push", exports / "merged-policy", REPO, code=1, **here).stderr.split())
    assert "already holds another export of popo-lite (adapter, policy, of tiny): README.md, adapter_config" in refused
    assert "--overwrite" in refused
    assert hub.files(REPO) == first
    # A branch of its own replaces nothing.
    popo_lite("push", exports / "merged-policy", REPO, "--revision", "merged", **here)
    assert hub.files(REPO) == first
    assert hub.files(REPO, "merged") == {**contents(exports / "merged-policy", "merged"), "notes.txt": b"mine"}

    # An adapter left beside a merged model would be applied twice.
    shown = popo_lite("push", exports / "merged-policy", REPO, "--overwrite", **here).stdout
    assert hub.files(REPO) == {**contents(exports / "merged-policy"), "notes.txt": b"mine"}
    assert re.search(r"^deleted there +adapter_config.json, adapter_model.safetensors$", shown, re.MULTILINE)
    hub.part_bytes = 100_000
    shown = popo_lite("push", exports / "q8_0-policy", REPO, "--overwrite", **here).stdout
    assert hub.files(REPO) == {**contents(exports / "q8_0-policy"), "notes.txt": b"mine"}
    assert f"ollama run hf.co/{REPO}" in shown
    assert sum("/complete" in path for _, path, _ in hub.requests) == 1


def test_nothing_of_an_older_model_changes_how_the_new_one_loads(exports: Path, tmp_path: Path, hub: Hub) -> None:
    here, folder = login(hub, tmp_path), exports / "merged-policy"
    popo_lite("push", exports / "adapter-policy", REPO, **here)
    older = {"special_tokens_map.json": b'{"eos_token": "<|user|>", "pad_token": "<|user|>"}',
             "added_tokens.json": b'{"<other>": 99}'}  # fmt: skip
    weights = ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.safetensors",
               "adapter_model.bin", "quantize_config.json", "hf_quant_config.json", "vocab.json", "merges.txt",
               "spiece.model", "tokenizer.model", "additional_chat_templates/tools.jinja")  # fmt: skip
    hub.repos[REPO].branches["main"] |= {**older, **dict.fromkeys(weights, b"{}"), "docs/figure.json": b"mine"}
    popo_lite("push", folder, REPO, "--overwrite", **here)
    assert hub.files(REPO) == {**contents(folder), "docs/figure.json": b"mine"}
    loaded = tmp_path / "loaded"
    for name, data in hub.files(REPO).items():
        (loaded / name).parent.mkdir(parents=True, exist_ok=True)
        (loaded / name).write_bytes(data)
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder, loaded))
    assert (theirs.eos_token, theirs.pad_token, len(theirs)) == (ours.eos_token, ours.pad_token, len(ours))


def test_files_that_popo_lite_did_not_make_are_not_overwritten(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    popo_lite("push", adapter, REPO, **login(hub, tmp_path))
    for report in (b"[]", b"{", None):
        files = hub.repos[REPO].branches["main"]
        files.clear()
        files |= {"README.md": b"my own"} | ({} if report is None else {"export.json": report})
        hub.repos[REPO].heads["main"] = hashlib.sha1(report or b"").hexdigest()  # noqa: S324
        refused = " ".join(popo_lite("push", adapter, REPO, code=1, **login(hub, tmp_path)).stderr.split())
        assert "already holds files:" in refused
        assert files["README.md"] == b"my own"


def test_a_broken_upload_is_continued(exports: Path, tmp_path: Path, hub: Hub) -> None:
    folder, here = exports / "merged-policy", login(hub, tmp_path)
    largest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.hold = largest
    command = [sys.executable, "-m", "popo_lite", "push", str(folder), REPO]
    with subprocess.Popen(command, env=environment(**here), stderr=subprocess.PIPE) as process:
        assert hub.held.wait(60)
        while len(hub.objects) < 1:
            assert process.poll() is None
        process.kill()
    assert hub.files(REPO) == {}  # no half of a model
    assert list(hub.objects) == [hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()]

    # The client itself sends a file again whose connection broke.
    hub.hold, hub.cuts = "", 1
    sent = len(hub.sent)
    popo_lite("push", folder, REPO, **here)
    assert hub.files(REPO) == contents(folder)
    assert [oid for oid, _ in hub.sent[sent:]] == [largest, largest]
    assert [size for _, size in hub.sent[sent:]] == [
        (weights := len(contents(folder)["model.safetensors"])) // 2,
        weights,
    ]


def test_what_the_hub_refuses_is_explained(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    here = {"HF_ENDPOINT": hub.endpoint}

    def refused(*options: str, code: int = 1, **changes: str) -> str:
        return " ".join(popo_lite("push", adapter, REPO, *options, code=code, **{**here, **changes}).stderr.split())

    assert "nobody is logged in" in refused(code=2)
    assert hub.requests == []
    wrong = refused(**login(hub, tmp_path, "hf_something_else"))
    assert "does not know this login" in wrong
    assert "hf auth login" in wrong
    assert "hf_something_else" not in wrong
    here |= login(hub, tmp_path)
    for path, status, message, says in (
        ("repos/create", 403, "You don't have the rights", "this login may not write there: You don't have the rights"),
        ("repos/create", 429, "Slow down", "too many requests"),
        ("preupload", 403, "read-only token", "this login may not write there: read-only token"),
        ("preupload", 403, "Private repository storage limit reached", "the account's storage is full"),
        ("/commit/", 409, "Conflict", "the repository was changed meanwhile"),
    ):
        hub.refused = {path: (status, message)}
        assert says in refused(), says
    hub.refused = {}
    assert hub.files(REPO) == {}
    assert "everybody can see it" in refused("--private")
    assert hub.files(REPO) == {}
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert "the Hub cannot be reached" in refused(HF_ENDPOINT=nobody)
    assert "HF_HUB_OFFLINE forbids it" in refused(HF_HUB_OFFLINE="1")
    card = adapter / "README.md"
    card.write_text(card.read_text().replace("pipeline_tag: text-generation", "pipeline_tag: [text-generation]"))
    assert 'the Hub refused the card: Invalid metadata in README.md. - "pipeline_tag" must be a string' in refused()
    assert hub.files(REPO) == {}


def test_what_was_not_looked_at_is_not_replaced(adapter: Path, tmp_path: Path, hub: Hub) -> None:
    answer = hub.answer

    def meanwhile(method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        if path.endswith("validate-yaml"):  # after the repository was looked at
            hub.repos[REPO].heads["main"] = f"{9:040x}"
        return answer(method, path, body)

    hub.answer = meanwhile  # type: ignore[method-assign]
    refused = popo_lite("push", adapter, REPO, code=1, **login(hub, tmp_path)).stderr
    assert "the repository was changed meanwhile" in refused
    assert hub.files(REPO) == {}


def test_mistakes_are_refused_without_network(exports: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("no-user", "some body/name", "a/b/c"):
        assert "is not the name of a repository" in popo_lite("push", adapter, name, "--dry-run", code=2).stderr
    several = popo_lite("push", exports.parent, REPO, "--dry-run", code=2).stderr
    assert "the run has 3 exports" in several
    assert f"popo-lite push {exports}/merged-policy" in several
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    (run / "recipe.toml").touch()
    assert f"popo-lite export {run}" in " ".join(popo_lite("push", run, REPO, "--dry-run", code=2).stderr.split())
    shutil.copytree(adapter, run / "export" / "adapter")
    assert json.loads(popo_lite("push", run, REPO, "--dry-run", "--json").stdout)["folder"] == f"{run}/export/adapter"
    assert "export.json is missing" in popo_lite("push", tmp_path / "none", REPO, "--dry-run", code=2).stderr
    shutil.move(run / "export" / "adapter", tmp_path / "other")
    (run / "export" / "adapter").symlink_to(tmp_path / "other")
    assert "it is a link to a folder elsewhere" in popo_lite("push", run, REPO, "--dry-run", code=2).stderr
    shutil.move(run / "export", tmp_path / "exports")
    (tmp_path / "exports" / "adapter").unlink()
    shutil.move(tmp_path / "other", tmp_path / "exports" / "adapter")
    (run / "export").symlink_to(tmp_path / "exports")
    assert "it is a link to a folder elsewhere" in popo_lite("push", run, REPO, "--dry-run", code=2).stderr
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "export.json").write_text("{")
    assert "--output ANOTHER_FOLDER" in popo_lite("push", damaged, REPO, "--dry-run", code=1).stderr
    (adapter / "notes").symlink_to("/etc/hostname")
    assert "it is a link" in popo_lite("push", adapter, REPO, "--dry-run", code=2).stderr
    (adapter / "notes").unlink()
    (adapter / ".secret").write_text("x")
    assert ".secret" not in popo_lite("push", adapter, REPO, "--dry-run").stdout
    (adapter / "README.md").write_text("---\na: b: c\n---\n# Mine\n")
    assert "the card is not valid" in popo_lite("push", adapter, REPO, "--dry-run", code=2).stderr


@pytest.mark.parametrize(
    ("kind", "library"), [("adapter-policy", "peft"), ("merged-policy", "transformers"), ("q8_0-policy", "gguf")]
)
def test_cards_are_what_the_hubs_own_library_reads(exports: Path, kind: str, library: str) -> None:
    data = ModelCard.load(exports / kind / "README.md").data
    assert (data.library_name, data.pipeline_tag) == (library, "text-generation")
    assert data.model_name is not None
    assert data.eval_results is not None
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)
    found = [(each.metric_type, each.metric_name, each.metric_value) for each in data.eval_results]
    assert found == [("pass@1", "pass@1", 0.965), ("pass@1", "pass@1 before training", 0.295)]
