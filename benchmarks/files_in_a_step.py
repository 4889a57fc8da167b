"""Count the files of popo_lite that a step of `tiny_cpu` enters between the sampler's result and the optimizer's step.

    python benchmarks/files_in_a_step.py

This is what a reader opens to follow a rollout from sampling to the update.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import popo_lite
from popo_lite.callbacks import Callback
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.trainer import Trainer

PACKAGE = str(Path(popo_lite.__file__).parent)


class Recorder:
    """Notes in which file of the package each call lands, while it is on; order of first entry."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def start(self) -> None:
        """Note from the next call on."""
        sys.setprofile(self._note)

    def stop(self) -> None:
        """Stop noting."""
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            file = os.path.relpath(name, PACKAGE)
            self.files[file] = self.files.get(file, 0) + 1


def main() -> None:
    """Run two steps, so that nothing of the first-time set-up counts, and print the files of the second."""
    recorder = Recorder()
    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(load_recipe("tiny_cpu", ("eval.problems=0",)), Callback()) as trainer,
    ):
        trainer.folder = RunFolder(Path(folder))
        trainer.train_step(0)
        sample, optimizer_step = trainer.sampler.sample, trainer.learner.optimizer.step

        def sample_then_note(*args: Any, **kwargs: Any) -> Any:
            result = sample(*args, **kwargs)
            recorder.start()
            return result

        def stop_then_step(*args: Any, **kwargs: Any) -> Any:
            recorder.stop()
            return optimizer_step(*args, **kwargs)

        trainer.sampler.sample = sample_then_note  # type: ignore[method-assign]
        trainer.learner.optimizer.step = stop_then_step  # type: ignore[method-assign]
        trainer.train_step(1)
    for file, calls in recorder.files.items():
        print(f"{calls:6d} calls  {file}")
    print(f"{len(recorder.files)} files")


if __name__ == "__main__":
    main()
