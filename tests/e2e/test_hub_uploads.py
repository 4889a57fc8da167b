"""`output.hub_model_id`: checkpoints reach the Hub while a run trains, and a Hub that fails hurts no run."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

import popo_lite as popo_lite_
from fake_hub import TOKEN, Hub, popo_lite, serve
from popo_lite.callbacks import Callback
from popo_lite.controls import Controls
from popo_lite.errors import UserInputError
from popo_lite.policy.adapters import ADAPTER_FILE
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, checkpoint_folders, write_json
from popo_lite.tools.reporting.hub import HubUploads
from popo_lite.tools.reporting.reporter import Reporters
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
def use_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Turn the processes that this one starts to a Hub."""

    def use(endpoint: str) -> None:
        values = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                  "HF_HOME": str(tmp_path / "home")}  # fmt: skip
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return use


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


# ------------------------------------------------------------------------------------ without the time of training


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


def opened(run: RunFolder) -> tuple[HubUploads, list[str]]:
    """Uploads, and what they say."""
    said: list[str] = []
    sender = HubUploads(run, run.recipe())
    sender.attach(Controls(print, said.append))
    return sender, said


def wait(sender: HubUploads) -> None:
    """Wait until all is sent or has failed."""
    end = time.monotonic() + 120
    while not sender.is_done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_while_one_is_sent_only_the_newest_waits(run: RunFolder, hub: Hub, use_hub: Callable[[str], None]) -> None:
    use_hub(hub.endpoint)
    hub.answers.clear()
    sender, said = opened(run)
    first, second, third = checkpoint_folders(run.checkpoints)
    sender.saved(first)
    assert hub.held.wait(120)
    assert sender._child is not None
    assert TOKEN not in Path(f"/proc/{sender._child._process.pid}/cmdline").read_text()
    shutil.rmtree(first)  # as a run deletes old checkpoints
    sender.saved(second)
    sender.saved(third)
    shutil.rmtree(second)
    hub.answers.set()
    wait(sender)
    assert [message for _, message in hub.repos[REPO].commits] == [
        "Checkpoint after step 1 of 60",
        "Checkpoint after step 3 of 60",
    ]
    # A card has the evaluation of its own checkpoint alone.
    assert "| pass@1 | 29.5% |\n" in hub.files(REPO)["README.md"].decode()
    sender.evaluated({**EVALUATION, "when": "asked", "step": 3, "pass_at_1": 0.5, "pass_at_k": {1: 0.5}})
    sender.saved(third)
    wait(sender)
    assert "| pass@1 | 29.5% | 50.0% |" in hub.files(REPO)["README.md"].decode()
    sender.close()
    sender.close()
    assert said == [f"the checkpoint after step 1 is at {hub.endpoint}/{REPO}"]


def test_a_failure_is_said_once_and_so_is_its_end(run: RunFolder, hub: Hub, use_hub: Callable[[str], None]) -> None:
    use_hub(hub.endpoint)
    sender, said = opened(run)
    hub.refused["/commit/"] = (403, "not today")
    first, second, third = checkpoint_folders(run.checkpoints)
    sender.saved(first)
    wait(sender)
    sender.saved(second)
    assert sender._child is not None
    sender._child.kill()  # as the kernel does if memory runs out
    wait(sender)
    hub.refused.clear()
    sender.saved(third)
    wait(sender)
    sender.close()
    assert [line.partition(":")[0] for line in said] == [
        "the checkpoint after step 1 could not be uploaded to somebody/run",
        f"the checkpoint after step 3 is at {hub.endpoint.partition(':')[0]}",
    ]

    # A resumed run knows that the repository has its model, so that its advice is not refused.
    sender, said = opened(run)
    sender.saved(third)
    assert sender._child is not None
    sender._child.kill()
    wait(sender)
    sender.close()
    assert said[-1].endswith(f"adapter-policy-step-3 {REPO} --private --overwrite")


def test_ctrl_c_ends_the_wait(run: RunFolder) -> None:
    sender, said = opened(run)
    timer = threading.Timer(1, signal.raise_signal, [signal.SIGINT])
    with Reporters([sender]):
        sender.saved(checkpoint_folders(run.checkpoints)[-1])
        assert sender._child is not None
        process = sender._child._process
        timer.start()
    assert process.poll() is not None
    assert said[0] == f"waiting at most 60 s for the upload to {REPO}; Ctrl-C ends the wait"
    assert said[1].startswith("the checkpoint after step 3 is not on the Hub: Ctrl-C ended the wait. To upload it:\n")
    assert said[1].endswith(f"  popo-lite push {run.path}/export/adapter-policy-step-3 {REPO} --private")


CLOSING = """
import sys
from pathlib import Path
from popo_lite.run_folder import RunFolder, checkpoint_folders
from popo_lite.tools.reporting import hub
from popo_lite.tools.reporting.reporter import Reporters
run = RunFolder(Path(sys.argv[1]))
hub.HubUploads.patience = 1.0
uploads = Reporters([hub.HubUploads(run, run.recipe())])
with uploads:
    uploads.saved(checkpoint_folders(run.checkpoints)[-1])
    sys.stdin.readline()
"""


def test_a_hub_that_hangs_does_not_hold_the_end(run: RunFolder, hub: Hub, use_hub: Callable[[str], None]) -> None:
    """The whole process ends, although the client's threads wait for the Hub."""
    use_hub(hub.endpoint)
    hub.answers.clear()
    with subprocess.Popen(
        [sys.executable, "-c", CLOSING, str(run.path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        assert hub.held.wait(120)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(15) == 0
        assert not hub.answers.is_set()
        said = process.stderr.read()
    assert said.startswith(f"waiting at most 1 s for the upload to {REPO}; Ctrl-C ends the wait\n")
    assert "the checkpoint after step 3 is not on the Hub: it was not finished in 1 s. To upload it:\n" in said


def test_a_checkpoint_that_cannot_be_copied_is_said(run: RunFolder) -> None:
    sender, said = opened(run)
    folder = checkpoint_folders(run.checkpoints)[0]
    shutil.rmtree(folder / "adapter")
    sender.saved(folder)
    assert sender.is_done()
    sender.close()
    assert "could not be uploaded" in said[0]


def test_nothing_is_asked_over_the_network_at_the_start(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it wants the network"))
    HubUploads(run, run.recipe())
    bad: Recipe = load_recipe("tiny_cpu", ["output.hub_model_id=a/b--c"])
    with pytest.raises(UserInputError, match="is not the name of a repository") as caught:
        HubUploads(run, bad)
    assert caught.value.where == "output.hub_model_id"
