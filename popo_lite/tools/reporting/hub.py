"""Upload the adapter of every checkpoint to the Hugging Face Hub while the run goes on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from popo_lite.errors import PopoError
from popo_lite.formats import read_json, reading
from popo_lite.metrics import StepRecord
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder, checkpoint_step, copy_adapter, write_json
from popo_lite.tools.export import EXPORTS, adapter_hash
from popo_lite.tools.export.upload import check_login, check_repo_id
from popo_lite.tools.reporting.child import Child
from popo_lite.tools.reporting.reporter import Reporter

UPLOADED_FILE = "hub.json"
"""File of a run with the hashes of the adapters that it sent, and the repositories that took one.

A repository with one of these adapters is the run's own.
"""
WHERE = "output.hub_model_id"


@dataclass(frozen=True)
class _Snapshot:
    """Hold what is uploaded of a checkpoint, which the run may delete meanwhile."""

    step: int
    folder: TemporaryDirectory[str]
    call: Mapping[str, Any]


class HubUploads(Reporter):
    """Upload checkpoints in a process, one at a time; while one is sent, only the newest of the others waits.

    A failure is said once, and the next checkpoint is tried again. Nothing here ends the run.
    """

    patience = 60.0

    def __init__(self, run: RunFolder, recipe: Recipe) -> None:
        """Raise UserInputError if the name is invalid or there is no login. Nothing is asked over the network."""
        super().__init__()
        self._run, self._recipe, self._repo_id = run, recipe, str(recipe.output.hub_model_id)
        check_repo_id(self._repo_id, WHERE)
        check_login(WHERE)
        self.name = f"the upload to {self._repo_id}"
        self._path = run.path / UPLOADED_FILE
        self._known = {"adapters": [], "repositories": []} if not self._path.is_file() else _read(self._path)
        self._folder = TemporaryDirectory(prefix="popo-lite-hub-")
        self._child: Child | None = None
        self._sending: _Snapshot | None = None
        self._waiting: _Snapshot | None = None
        self._has_uploaded = False
        self._failure: str | None = None  # of the last try
        self._newest: Path | None = None
        self._evaluation: Mapping[str, Any] = {}

    def step(self, record: StepRecord) -> None:  # noqa: ARG002
        """Say what has become of uploads, and begin the next."""
        self._go_on()

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Keep the figures for the card. Those of the end come after the last checkpoint, whose card is sent again."""
        self._evaluation = record
        if record["when"] == "after" and self._newest is not None:
            self.saved(self._newest)

    def saved(self, checkpoint: Path) -> None:
        """Copy the checkpoint's adapter, and let the process upload it."""
        self._newest, step = checkpoint, checkpoint_step(checkpoint)
        is_evaluated = self._evaluation.get("step") == step and self._evaluation["when"] != "before"
        try:
            summary = self._run.summary(checkpoint) | ({"after": self._evaluation} if is_evaluated else {})
            folder = TemporaryDirectory(prefix="popo-lite-hub-")
            adapter = copy_adapter(checkpoint, "policy", Path(folder.name) / "adapter")
            found = adapter_hash(adapter)
            # Before it is sent: a killed process would otherwise not know its own upload when it is resumed.
            self._note("adapters", found)
        except (OSError, PopoError) as error:  # a full disk, for instance
            self._failed(step, f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            call = {"step": step, "adapter": str(adapter), "adapter_sha256": found, "summary": summary,
                    "own": self._known["adapters"]}  # fmt: skip
            if self._waiting is not None:  # newer ones replace it
                self._waiting.folder.cleanup()
            self._waiting = _Snapshot(step, folder, call)
        self._go_on()

    def is_done(self) -> bool:
        self._go_on()
        return self._sending is None and self._waiting is None

    def give_up(self, why: str) -> None:
        self._failure = why
        for snapshot in filter(None, (self._sending, self._waiting)):
            snapshot.folder.cleanup()
        self._sending = self._waiting = None

    def close(self) -> None:
        """End the process, and say how to upload the newest checkpoint if it is not on the Hub."""
        if self._child is not None:
            self._child.kill()
        self._folder.cleanup()
        if self._newest is not None and self._failure is not None:
            step, self._newest = checkpoint_step(self._newest), None
            self.say(
                f"the checkpoint after step {step} is not on the Hub: {self._failure}. To upload it:\n"
                f"{self._by_hand(step)}"
            )

    def _go_on(self) -> None:
        """Take the result of the upload in progress, if there is one, and begin the next."""
        if (sent := self._sending) is not None:
            assert self._child is not None  # noqa: S101
            is_alive = self._child.is_alive
            reply = self._child.reply()
            if reply is None and is_alive:
                return
            self._sending = None
            sent.folder.cleanup()
            if reply is None:
                self._failed(sent.step, self._child.last_error() or "its process ended")
                self._child = None
            elif "failure" in reply:
                self._failed(sent.step, reply["failure"])
            else:
                self._succeeded(sent.step, reply["url"])
        if (snapshot := self._waiting) is not None:
            self._waiting = None
            try:
                self._child = self._child or self._start()
            except OSError as error:  # no memory for another process
                snapshot.folder.cleanup()
                self._failed(snapshot.step, str(error))
            else:
                self._sending = snapshot
                self._child.send("upload", **snapshot.call)

    def _start(self) -> Child:
        from huggingface_hub import get_token

        # A notebook's token is only found in its own process. The uploads need no GPU.
        child = Child("uploads", HF_TOKEN=get_token() or "", CUDA_VISIBLE_DEVICES="")
        recipe = self._recipe.to_dict()
        child.send("open", recipe=recipe, folder=self._folder.name, repo_id=self._repo_id, where=WHERE)
        return child

    def _succeeded(self, step: int, url: str) -> None:
        """Note an upload; say the first one, and the first after a failure."""
        if not self._has_uploaded or self._failure is not None:
            self.say(f"the checkpoint after step {step} is at {url}")
        self._has_uploaded, self._failure = True, None
        with suppress(OSError):  # a full disk: only the commands of `_by_hand` depend on it
            self._note("repositories", self._repo_id)

    def _note(self, kind: str, value: str) -> None:
        """Add a value to hub.json."""
        if value not in self._known[kind]:
            self._known[kind].append(value)
            write_json(self._path, self._known)

    def _failed(self, step: int, reason: str) -> None:
        """Note a failure; say it if the try before did not fail."""
        if self._failure is None:
            self.say(
                f"the checkpoint after step {step} could not be uploaded to {self._repo_id}: {reason}; "
                "the next one is tried again, and the run goes on"
            )
        self._failure = reason

    def _by_hand(self, step: int) -> str:
        """Return the commands that upload a checkpoint."""
        run = shlex.quote(str(self._run.path))
        options = " --private" if self._recipe.output.hub_private_repo else ""
        # A repository that never took an upload of this run may hold somebody else's model.
        options += " --overwrite" if self._repo_id in self._known["repositories"] else ""
        folder = shlex.quote(str(self._run.path / EXPORTS / f"adapter-policy-step-{step}"))
        return (
            f"  popo-lite export {run} --what adapter --checkpoint {step}\n"
            f"  popo-lite push {folder} {self._repo_id}{options}"
        )


def _read(path: Path) -> dict[str, list[str]]:
    with reading(path):
        content = read_json(path)
        return {name: list(content[name]) for name in ("adapters", "repositories")}
