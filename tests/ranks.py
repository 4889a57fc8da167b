"""Runs on one or several ranks, to be held against each other; as a script, one rank of them.

`results(...)` starts the ranks; each trains all cases with the real trainer, and writes what it has at the end.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers import json_lines
from popo_lite import distributed
from popo_lite.callbacks import Callback
from popo_lite.controls import Action
from popo_lite.errors import EngineError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.trainer import Trainer
from popo_lite.types import Completion
from popo_lite.update import UpdateResult

ROOT = Path(__file__).parents[1]


def results(folder: Path, size: int, cases: Mapping[str, Sequence[str]], **environment: str) -> list[dict[str, Any]]:
    """Train all cases, overrides of the tiny recipe by name, on `size` ranks; return what each rank has at the end."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(dict(cases)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(folder.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment,
    }  # fmt: skip
    processes = []
    for rank in range(size):
        with (folder / f"output-{rank}").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(folder)],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    codes = [process.wait(timeout=900) for process in processes]
    assert codes == [0] * size, "\n".join((folder / f"output-{rank}").read_text() for rank in range(size))
    return [torch.load(folder / f"result-{rank}") for rank in range(size)]


# --------------------------------------------------------------------------- one rank


ASKED = "asked"
"""A case with this name is asked for things while it trains, on rank 0."""
REQUESTS: dict[int, tuple[Action, ...]] = {0: ("sample", "checkpoint", "pause"), 1: ("evaluate", "sample")}
"""Step -> what is asked for after it; a pause is continued soon."""


BAD_GRADIENTS = "bad gradients"
"""In a case with this name the gradients of steps 2 to 4 go wrong, at the full learning rate."""


class Kept(Callback):
    """Keeps the trained weights after every step, and the bytes that went into all_reduce until then."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.weights: list[dict[str, torch.Tensor]] = []
        self.reduced: list[int] = []
        self.bytes = 0

    def step(self, record):
        self.weights.append({n: p.detach().clone() for n, p in self.trainer.policy.trainable_parameters()})
        self.reduced.append(self.bytes)
        self.bytes = 0


class Asking(Kept):
    """Asks for `REQUESTS`, too, and keeps what is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.answers: list[dict[str, Any]] = []

    def attach(self, controls):
        self.controls = controls

    def step(self, record):
        super().step(record)
        if self.trainer.ranks.first:
            for action in REQUESTS.get(record["step"], ()):
                self.controls.request(action)

    def sampled(self, samples):
        self.answers += samples

    def message(self, text):
        self.messages.append(text)
        if text.startswith("paused") and self.trainer.ranks.first:
            threading.Timer(0.2, self.controls.request, ["continue"]).start()


def divergence(trainer: Trainer) -> str:
    """Change one weight of the last rank by the least, and return how the learner refuses that."""
    _, parameter = next(iter(trainer.policy.trainable_parameters()))
    if trainer.ranks.rank == trainer.ranks.size - 1:
        with torch.no_grad():
            parameter.flatten()[0] = parameter.flatten()[0].nextafter(torch.tensor(9.0, dtype=parameter.dtype))
    try:
        trainer.learner.refuse_divergence()
    except EngineError as error:
        return str(error)
    return ""


def coarse(draw: Callable[..., list[Completion]]) -> Callable[..., list[Completion]]:
    """Return `draw` with other log-probs for rollouts: each off by a part of its own that its token decides."""

    def drawn(wanted: Sequence[Any], **options: Any) -> list[Completion]:
        completions = draw(wanted, **options)
        if options["stream"][0] != "rollout":
            return completions
        return [
            replace(
                one,
                sampler_logps=tuple(
                    logp * (1 + 0.05 * (token % 5))
                    for token, logp in zip(one.token_ids, one.sampler_logps, strict=True)
                ),
            )
            for one in completions
        ]

    return drawn


def broken(trainer: Trainer) -> Callable[..., UpdateResult]:
    """Return the trainer's `backward` with the bad gradients of `BAD_GRADIENTS`."""
    backward = trainer.learner.backward

    def backward_or_bad(*arguments: Any, **options: Any) -> UpdateResult:
        result = backward(*arguments, **options)
        bad = trainer.cursor.next_step in (2, 3, 4) and trainer.cursor.learning_rate_scale == 1.0
        return replace(result, grad_norm=math.nan) if bad else result

    return backward_or_bad


def train(recipe: Recipe, folder: RunFolder, ranks: distributed.Ranks) -> dict[str, Any]:
    """Train as the command does; return all that the run is judged by."""
    kept = Asking() if folder.path.name == ASKED else Kept()
    with Trainer(recipe, kept, ranks=ranks) as trainer:
        kept.trainer = trainer
        torch.manual_seed(4)
        with torch.no_grad():  # as if training had gone on for a while: the siamese and the base are elsewhere
            for _, parameter in trainer.policy.adapter_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
            for average in trainer.learner.siamese.average.values():
                average.add_(0.05 * torch.randn(average.shape, dtype=average.dtype))
        if folder.path.name == BAD_GRADIENTS:
            trainer.learner.backward = broken(trainer)
        if recipe.rollout.max_gap:
            trainer.sampler.draw = coarse(trainer.sampler.draw)
        # The file system is a rank's own: no rank may need what another writes.
        folder.path.mkdir(parents=True)
        start = {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters()}
        all_reduce = distributed.distributed.all_reduce

        def counted(tensor, *arguments, **options):
            kept.bytes += tensor.nbytes
            return all_reduce(tensor, *arguments, **options)

        distributed.distributed.all_reduce = counted
        try:
            trainer.run(folder)
        finally:
            distributed.distributed.all_reduce = all_reduce
        learner = trainer.learner
        found = {
            "weights": [start, *kept.weights],
            "siamese": {name: average.clone() for name, average in learner.siamese.average.items()},
            "optimizer": {
                f"{number}/{name}": value
                for number, state in learner.optimizer.state_dict()["state"].items()
                for name, value in state.items()
            },
            "bytes": {
                "adapters": sum(p.nbytes for _, p in trainer.policy.adapter_parameters()),
                "head": sum(p.nbytes for p in trainer.policy.predictor.parameters()),
            },
            "reduced": kept.reduced,
            "cursor": {
                name: getattr(trainer.cursor, name)
                for name in ("next_step", "next_problem", "level", "level_rates", "totals", "entropy_coef")
            }
            | {"history": {name: list(seen) for name, seen in trainer.cursor.history.items()}},
            "metrics": json_lines(folder.metrics_path),
            "samples": json_lines(folder.samples_path) if ranks.first else [],
            "evaluations": json_lines(folder.evaluations_path),
            "checkpoints": sorted(path.name for path in folder.checkpoints.glob("*")),
            "rollbacks": trainer.cursor.rollbacks,
        }
        if isinstance(kept, Asking):
            found |= {"messages": kept.messages, "answers": kept.answers, "divergence": divergence(trainer)}
        return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    with distributed.join() as ranks:
        found = {
            name: train(
                load_recipe(ROOT / "recipes" / "tiny_cpu.toml", overrides),
                RunFolder(folder / f"rank-{ranks.rank}" / name),
                ranks,
            )
            for name, overrides in cases.items()
        }
        torch.save(found, folder / f"result-{ranks.rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
