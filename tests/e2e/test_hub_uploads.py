"""`output.hub_model_id`: checkpoints reach the Hub while a run trains, and a Hub that fails hurts no run."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils.logging import set_verbosity_warning

import popo_lite as popo_lite_
from fake_hub import TOKEN, Hub, popo_lite, serve
from popo_lite.callbacks import Callback
from popo_lite.controls import Controls
from popo_lite.errors import ExportError, UserInputError
from popo_lite.policy.adapters import ADAPTER_FILE
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, checkpoint_folders, write_json
from popo_lite.tools.reporting import hub as uploads
from popo_lite.tools.reporting.hub import HubUploads
from runs import EVALUATION, finished_run

REPO = "somebody/run"
SETTINGS = [f"output.hub_model_id={REPO}", "train.steps=3", "train.save_steps=1", "data.prompts_per_step=2",
            "rollout.num_generations=2", "rollout.max_completion_length=24", "model.quantization=none",
            "eval.problems=4"]  # fmt: skip


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as served:
        yield served


class Said(Callback):
    """What a run said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def use_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Turn the client in this process to a Hub."""

    def use(endpoint: str) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        values = {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)

    yield use
    enable_progress_bars()
    set_verbosity_warning()


def test_the_checkpoints_of_a_run_arrive(tmp_path: Path, hub: Hub, use_hub: Callable[[str], None]) -> None:
    output = tmp_path / "run"
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    here = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    done = popo_lite("train", "tiny_cpu", *options, "--output", output, "--view", "plain", **here)
    assert f"is at {hub.endpoint}/{REPO}" in done.stdout
    assert "not on the Hub" not in done.stdout
    assert TOKEN not in done.stdout + done.stderr + (output / "log.txt").read_text()
    assert hub.repos[REPO].private
    files, commits = hub.files(REPO), hub.repos[REPO].commits
    assert files[ADAPTER_FILE] == (output / "adapter" / ADAPTER_FILE).read_bytes()
    assert {"adapter_config.json", "tokenizer.json", "README.md", "export.json"} <= files.keys()
    assert json.loads(files["export.json"])["checkpoint"] == 3
    assert commits[-1] == ("main", "Checkpoint after step 3 of 3")
    card = ModelCard(files["README.md"].decode())
    assert "| before | after |" in card.text  # the evaluation at the end came after the last checkpoint
    assert f'model_id = "{REPO}"' in card.text

    # The same run goes on in the same repository; another one does not.
    use_hub(hub.endpoint)
    popo_lite_.resume(output, ["train.steps=4"])
    assert hub.repos[REPO].commits[-1] == ("main", "Checkpoint after step 4 of 4")
    before, said, other = hub.files(REPO), Said(), tmp_path / "other"
    popo_lite_.train(load_recipe("tiny_cpu", [*SETTINGS, "train.seed=1"]), output=other, callbacks=[said])
    refused = [line for line in said.lines if "already holds another export of popo-lite" in line]
    assert len(refused) == 2  # once when it happened, and at the end
    assert refused[1].endswith(f"  popo-lite push {other}/export/adapter-policy-step-3 {REPO} --private")
    assert hub.files(REPO) == before
    assert (other / "summary.json").is_file()


def test_a_dead_hub_does_not_hurt_a_run(
    tmp_path: Path, use_hub: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    said, output = Said(), tmp_path / "run"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_hub(f"http://127.0.0.1:{unused.getsockname()[1]}")
        popo_lite_.train(load_recipe("tiny_cpu", SETTINGS), output=output, callbacks=[said])
    failed = [line for line in said.lines if "could not be uploaded" in line]
    assert len(failed) == 1
    assert "the Hub cannot be reached" in failed[0]
    assert f"  popo-lite export {output} --what adapter --checkpoint 3\n" in said.lines[-1]
    assert failed[0] in (output / "log.txt").read_text()
    assert (output / "summary.json").is_file()
    assert capfd.readouterr().err == ""  # no bars, no warnings of the client


def test_a_run_without_a_login_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserInputError, match="nobody is logged in to the Hugging Face Hub") as caught:
        popo_lite_.train(load_recipe("tiny_cpu", SETTINGS), output=tmp_path / "run")
    assert "hf auth login" in str(caught.value.next_step)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------- in this process


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with checkpoints after 1, 2 and 3 steps."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = finished_run(tmp_path / "run", f"output.hub_model_id={REPO}")
    for step in (1, 2, 3):
        folder = run.checkpoints / f"step-{step:06d}"
        shutil.copytree(run.adapter, folder / "adapter")
        write_json(folder / "cursor.json", {"cursor": {"before": {**EVALUATION, "when": "before"}}})
    return run


Try = Callable[[dict[str, Any]], dict[str, Any]]


def opened(run: RunFolder, monkeypatch: pytest.MonkeyPatch, upload: Try) -> tuple[HubUploads, list[str]]:
    """Uploads that call `upload` with the content of export.json, and what they say."""

    def send(plan: Any, **options: Any) -> Mapping[str, Any]:
        return upload(json.loads((plan.folder / "export.json").read_text()) | {"card": plan.card, **options})

    monkeypatch.setattr(uploads, "upload", send)
    said: list[str] = []
    sender = HubUploads(run, run.recipe())
    sender.attach(Controls(print, said.append))
    return sender, said


def test_while_one_is_sent_only_the_newest_waits(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def upload(report: dict[str, Any]) -> dict[str, Any]:
        started.set()
        assert go_on.wait(30)
        sent.append(report["checkpoint"])
        return {"url": "there"}

    sender, said = opened(run, monkeypatch, upload)
    first, second, third = checkpoint_folders(run.checkpoints)
    sender.saved(first)
    assert started.wait(30)
    shutil.rmtree(first)  # as a run deletes old checkpoints
    sender.saved(second)
    sender.saved(third)
    shutil.rmtree(second)
    go_on.set()
    sender.close()
    sender.close()
    assert sent == [1, 3]
    assert said == ["the checkpoint after step 1 is at there"]


def test_a_failure_is_said_once_and_so_is_its_end(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Exception | None] = [ExportError("it is down"), RuntimeError("odd"), None]

    def upload(_: dict[str, Any]) -> dict[str, Any]:
        if (error := results.pop(0)) is not None:
            raise error
        return {"url": "there"}

    sender, said = opened(run, monkeypatch, upload)
    for left, checkpoint in zip((2, 1, 0), checkpoint_folders(run.checkpoints), strict=True):
        sender.saved(checkpoint)
        assert sender._wait(30)
        assert len(results) == left
    sender.close()
    assert [line.partition(":")[0] for line in said] == [
        "the checkpoint after step 1 could not be uploaded to somebody/run",
        "the checkpoint after step 3 is at there",
    ]


def test_the_end_does_not_wait_for_ever(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def upload(_: dict[str, Any]) -> dict[str, Any]:
        assert go_on.wait(30)
        return {"url": "there"}

    monkeypatch.setattr(uploads, "PATIENCE", 0.2)
    monkeypatch.setattr(uploads, "QUIET", 0.1)
    sender, said = opened(run, monkeypatch, upload)
    sender.saved(checkpoint_folders(run.checkpoints)[-1])
    sender.close()
    go_on.set()
    assert "the checkpoint after step 3 is not on the Hub: it was not finished in 0 s. To upload it:" in said[-1]


def test_a_checkpoint_that_cannot_be_copied_is_said(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, said = opened(run, monkeypatch, lambda _: pytest.fail("there is nothing to upload"))
    folder = checkpoint_folders(run.checkpoints)[0]
    shutil.rmtree(folder / "adapter")
    sender.saved(folder)
    sender.close()
    assert "could not be uploaded" in said[0]


def test_the_card_has_the_evaluation_of_the_checkpoint_alone(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    cards: list[str] = []

    def upload(report: dict[str, Any]) -> dict[str, Any]:
        cards.append(report["card"])
        return {"url": "there"}

    sender, _ = opened(run, monkeypatch, upload)
    sender.evaluated({**EVALUATION, "when": "step 2", "step": 2, "pass_at_1": 0.5, "pass_at_k": {1: 0.5}})
    for checkpoint in checkpoint_folders(run.checkpoints)[1:]:
        sender.saved(checkpoint)
        assert sender._wait(30)
    sender.close()
    assert "| pass@1 | 29.5% | 50.0% |" in cards[0]
    assert "| pass@1 | 29.5% |\n" in cards[1]


def test_nothing_is_asked_over_the_network_at_the_start(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it wants the network"))
    HubUploads(run, run.recipe())
    bad: Recipe = load_recipe("tiny_cpu", ["output.hub_model_id=a/b--c"])
    with pytest.raises(UserInputError, match="is not the name of a repository") as caught:
        HubUploads(run, bad)
    assert caught.value.where == "output.hub_model_id"
