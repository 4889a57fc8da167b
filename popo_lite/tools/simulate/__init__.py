"""Run a recipe's step at real size on a GPU that computes nothing, to count its memory: `Simulator`. Free of torch.

The simulated device changes torch for its whole process, so it has a process of its own: `__main__`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Self

from popo_lite import errors
from popo_lite.recipe import Recipe


class Simulator:
    """A process with a simulated CUDA device, started on entry and ended on exit."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-P", "-m", __name__]
        no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the hooks would mix a real one with the simulated one
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=no_gpu, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()  # every job is answered, or its answer is not wanted any more
        self._process.communicate()

    def run(self, recipe: Recipe, **options: Any) -> dict[str, Any]:
        """Return the result of `popo_lite.tools.simulate.run.simulate`; `options` are its keywords.

        Raises PopoError for a recipe that cannot be simulated, one that fails as it would on a GPU, or a process that
        ended.
        """
        refuse(recipe)
        given, taken = self._process.stdin, self._process.stdout
        assert given is not None  # noqa: S101
        assert taken is not None  # noqa: S101
        try:
            given.write(json.dumps({"recipe": recipe.model_dump_json(), "options": options}) + "\n")
            given.flush()
            line = taken.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise errors.PopoError("the simulation's process ended; its output above says why")
        answer: dict[str, Any] = json.loads(line)
        if "bug" in answer:
            raise RuntimeError(answer["bug"])
        if "error" in answer:
            kind, what, where, next_step = answer["error"]
            raise getattr(errors, kind, errors.PopoError)(what, where=where, next_step=next_step)
        return answer


def refuse(recipe: Recipe) -> None:
    """Raise UserInputError for what cannot be simulated."""
    model = recipe.model
    refused = [
        (recipe.train.device == "cpu", "the recipe trains on a CPU", "train.device", "auto"),
        (model.backend == "unsloth", "unsloth's own kernels are not known to it", "model.backend", "transformers"),
        (model.attn_implementation == "flash_attention_2", "the package flash-attn needs a GPU",
         "model.attn_implementation", "sdpa"),
    ]  # fmt: skip
    for is_refused, reason, key, instead in refused:
        if is_refused:
            next_step = f"--set {key}={instead}"
            raise errors.UserInputError(f"it cannot be simulated: {reason}", where=key, next_step=next_step)
    if model.id.endswith(".gguf"):
        next_step = "set model.id to the model that the file was made from"
        raise errors.UserInputError("a GGUF file cannot be simulated", where="model.id", next_step=next_step)
