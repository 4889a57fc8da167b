"""Upload the adapter of every checkpoint to the Hugging Face Hub while the run goes on."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from popo_lite.callbacks import Callback
from popo_lite.controls import Controls
from popo_lite.errors import PopoError
from popo_lite.formats import read_json, reading
from popo_lite.metrics import StepRecord
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder, checkpoint_step, copy_adapter, write_json
from popo_lite.tools.console.output import notify
from popo_lite.tools.export import EXPORTS, adapter_hash
from popo_lite.tools.export.upload import check_login, check_repo_id, plan_upload, upload

UPLOADED_FILE = "hub.json"
"""File of a run with the hashes of the adapters that it uploaded: a repository with one of them is its own."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for uploads."""
QUIET = 1.0
"""Seconds after which that wait is said."""
WHERE = "output.hub_model_id"


@dataclass(frozen=True)
class _Snapshot:
    """Hold what is uploaded of a checkpoint, which the run may delete meanwhile."""

    step: int
    folder: TemporaryDirectory[str]
    summary: Mapping[str, Any]
    adapter_sha256: str
    own: Sequence[str]  # hashes of the adapters that the run has uploaded


class HubUploads(Callback):
    """Upload checkpoints in a thread, one at a time; while one is sent, only the newest of the others waits.

    A failure is said once, and the next checkpoint is tried again. Nothing here ends the run or makes it wait, except
    its end, for at most `PATIENCE` seconds.
    """

    def __init__(self, run: RunFolder, recipe: Recipe) -> None:
        """Raise UserInputError if the name is none or nobody is logged in. Nothing is asked over the network."""
        self._run, self._recipe, self._repo_id = run, recipe, str(recipe.output.hub_model_id)
        check_repo_id(self._repo_id, WHERE)
        check_login(WHERE)
        self._say: Callable[[str], None] = notify
        self._folder = TemporaryDirectory(prefix="popo-lite-hub-")
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: _Snapshot | None = None
        self._is_busy = self._is_closed = False
        self._uploaded: int | None = None  # steps of the newest checkpoint on the Hub
        self._failure: str | None = None  # of the last try
        self._notices: list[str] = []  # for the run's thread to say
        self._thread: threading.Thread | None = None
        self._newest: Path | None = None
        self._evaluation: Mapping[str, Any] = {}

    def attach(self, controls: Controls) -> None:  # noqa: D102
        self._say = controls.say

    def step(self, record: StepRecord) -> None:  # noqa: ARG002
        """Say what the thread has to say."""
        self._tell()

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Keep the figures for the card. Those of the end come after the last checkpoint, whose card is sent again."""
        self._evaluation = record
        if record["when"] == "after" and self._newest is not None:
            self.saved(self._newest)

    def saved(self, checkpoint: Path) -> None:
        """Copy the checkpoint's adapter, and let the thread upload it."""
        self._newest, step = checkpoint, checkpoint_step(checkpoint)
        is_evaluated = self._evaluation.get("step") == step and self._evaluation["when"] != "before"
        try:
            summary = self._run.summary(checkpoint) | ({"after": self._evaluation} if is_evaluated else {})
            folder = TemporaryDirectory(prefix="popo-lite-hub-")
            found = adapter_hash(copy_adapter(checkpoint, "policy", Path(folder.name) / "adapter"))
            # Before it is sent: a killed process would otherwise not know its own upload when it is resumed. Not in the
            # thread: the run looks through its folder to sync it to the disk, where no file may come and go.
            own = [*dict.fromkeys([*self._own_uploads(), found])]
            write_json(self._run.path / UPLOADED_FILE, {"adapters": own})
        except (OSError, PopoError) as error:  # a full disk, for instance
            self._failed(step, f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            with self._changed:
                if self._waiting is not None:  # newer ones replace it
                    self._waiting.folder.cleanup()
                self._waiting = _Snapshot(step, folder, summary, found, own)
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="popo-lite uploads", daemon=True)
                self._thread.start()
        self._tell()

    def close(self) -> None:
        """Wait for the newest checkpoint's upload, and say how to make it up if it is not there."""
        if self._newest is None or self._is_closed:
            return
        step = checkpoint_step(self._newest)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if not self._wait(QUIET):
            self._say(f"waiting at most {PATIENCE:.0f} s for the upload to {self._repo_id}")
            self._wait(PATIENCE)
        is_late = self._is_pending()
        self._tell()
        if is_late or self._failure is not None:
            reason = f"it was not finished in {PATIENCE:.0f} s" if is_late else self._failure
            self._say(
                f"the checkpoint after step {step} is not on the Hub: {reason}. To upload it:\n{self._by_hand(step)}"
            )

    def _wait(self, seconds: float) -> bool:
        """Wait for the thread; return True if all is sent or has failed."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_pending(), timeout=seconds)

    def _is_pending(self) -> bool:
        return self._is_busy or self._waiting is not None

    def _tell(self) -> None:
        with self._changed:
            notices, self._notices = self._notices, []
        for notice in notices:
            self._say(notice)

    def _failed(self, step: int, reason: str) -> None:
        """Note a failure; say it if the try before was none."""
        with self._changed:
            if self._failure is None:
                self._notices.append(
                    f"the checkpoint after step {step} could not be uploaded to {self._repo_id}: {reason}; "
                    "the next one is tried again, and the run goes on"
                )
            self._failure = reason

    def _by_hand(self, step: int) -> str:
        """Return the commands that upload a checkpoint."""
        run = shlex.quote(str(self._run.path))
        options = " --private" if self._recipe.output.hub_private_repo else ""
        options += " --overwrite" if self._uploaded is not None else ""
        folder = shlex.quote(str(self._run.path / EXPORTS / f"adapter-policy-step-{step}"))
        return (
            f"  popo-lite export {run} --what adapter --checkpoint {step}\n"
            f"  popo-lite push {folder} {self._repo_id}{options}"
        )

    def _own_uploads(self) -> list[str]:
        path = self._run.path / UPLOADED_FILE
        if not path.is_file():
            return []
        with reading(path):
            return list(read_json(path)["adapters"])

    # ------------------------------------------------------------------------- in the thread

    def _work(self) -> None:
        from huggingface_hub.utils.logging import set_verbosity_error
        from huggingface_hub.utils.tqdm import disable_progress_bars

        # Bars and warnings about retries would be drawn into the view; what failed in the end is said.
        disable_progress_bars()
        set_verbosity_error()  # type: ignore[no-untyped-call]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._is_closed)
                if (snapshot := self._waiting) is None:
                    return
                self._waiting, self._is_busy = None, True
            try:
                url = self._upload(snapshot)
            except PopoError as error:
                self._failed(snapshot.step, error.what)
            except Exception as error:  # of a library: an upload must never end the run
                self._failed(snapshot.step, f"{type(error).__name__}: {error}")
            else:
                with self._changed:
                    if self._uploaded is None or self._failure is not None:
                        self._notices.append(f"the checkpoint after step {snapshot.step} is at {url}")
                    self._uploaded, self._failure = snapshot.step, None
            snapshot.folder.cleanup()
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _upload(self, snapshot: _Snapshot) -> str:
        """Write what an exported adapter has, and upload it; return the repository's address."""
        from popo_lite.tools.export.folder import ExportReport, describe, save_tokenizer, write_adapter
        from popo_lite.tools.public import known_as

        folder, adapter = Path(self._folder.name), Path(snapshot.folder.name) / "adapter"
        if not any(folder.iterdir()):
            save_tokenizer(self._recipe, folder)  # the same for every checkpoint
        write_adapter(self._recipe, adapter, folder)
        report = ExportReport(
            folder=folder,
            checkpoint=snapshot.step,
            of_steps=self._recipe.train.steps,
            what="adapter",
            weights="policy",
            base=known_as(self._recipe.model.id),
            dtype=None,
            merged_into=None,
            adapter_sha256=snapshot.adapter_sha256,
        )
        if (failure := describe(folder, report, self._recipe, snapshot.summary)) is not None:
            raise failure
        done = upload(
            plan_upload(folder, self._repo_id),
            message=f"Checkpoint after step {snapshot.step} of {report.of_steps}",
            private=self._recipe.output.hub_private_repo,
            may_replace=lambda there: there.get("what") == "adapter" and there.get("adapter_sha256") in snapshot.own,
            where=WHERE,
        )
        return str(done["url"])
