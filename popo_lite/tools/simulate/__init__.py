"""Run a recipe's step at real size on a GPU that computes nothing, to count its memory: `Simulator`. Free of torch.

The simulated device changes torch for its whole process, so it has a process of its own: `__main__`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any, Self

from popo_lite.errors import PopoError, UserInputError
from popo_lite.recipe import Recipe


class Simulator:
    """A process with a simulated CUDA device, started on entry and ended on exit."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-P", "-m", __name__]
        no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the hooks would mix a real one with the simulated one
        self._process = subprocess.Popen(command, env=no_gpu, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()  # every job is answered, or its answer is not wanted any more
        self._process.communicate()

    def run(self, recipe: Recipe, **options: Any) -> dict[str, Any]:
        """Return the result of `popo_lite.tools.simulate.run.simulate`; `options` are its keywords.

        Raises PopoError for a recipe that cannot be simulated, one that fails as it would on a GPU, or a process that
        ended, and RuntimeError for a bug.
        """
        refuse(recipe)
        jobs: Any = self._process.stdin
        answers: Any = self._process.stdout
        try:
            pickle.dump((recipe, options), jobs)
            jobs.flush()
            answer: dict[str, Any] | Exception = pickle.load(answers)  # noqa: S301 - our own process wrote it
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            raise PopoError("the simulation's process ended; its output above says why") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def refuse(recipe: Recipe, ranks: int = 1) -> None:
    """Raise UserInputError for what cannot be simulated."""
    model = recipe.model
    for is_refused, reason, key, next_step in (
        (recipe.train.device == "cpu", "the recipe trains on a CPU", "train.device", "--set train.device=auto"),
        (model.backend == "unsloth", "unsloth's own kernels are not known to it", "model.backend",
         "--set model.backend=transformers"),
        (model.attn_implementation == "flash_attention_2", "the package flash-attn needs a GPU",
         "model.attn_implementation", "--set model.attn_implementation=sdpa"),
        (model.id.endswith(".gguf"), "its model is a GGUF file", "model.id",
         "set model.id to the model that the file was made from"),
        (ranks > 1 and recipe.distributed.strategy == "fsdp2", "its base is divided over ranks (fsdp2)",
         "distributed.strategy", "leave out --ranks"),
    ):  # fmt: skip
        if is_refused:
            raise UserInputError(f"it cannot be simulated: {reason}", where=key, next_step=next_step)
