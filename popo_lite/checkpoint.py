"""Save and load checkpoints: adapter, predictor head, siamese, optimizer and cursor, in safetensors and JSON.

There is no random state to save: every draw of a run is a function of the seed and the step (`seeding`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from popo_lite.curriculum import History, Seen
from popo_lite.errors import CheckpointError
from popo_lite.policy.adapters import load_adapter_weights, save_adapter
from popo_lite.run_folder import write_atomically
from popo_lite.update import Learner

_PREFIX = "step-"


@dataclass(kw_only=True)
class Cursor:
    """Hold a run's progress: the next step, and what later steps and the summary need from earlier ones.

    Only the trainer changes it. `evaluated` is the last step after which held-out problems were evaluated, `before` the
    evaluation before the first step. `next_problem` is the position in the stream of problems; `history` is empty
    unless known problems are skipped. `level` is the difficulty of the next step's problems, `level_rates` the pass
    rates since it moved (`data.curriculum`). `totals` sums metrics over all steps, `seconds` times by stage.
    `lowered_budget` is (the recipe's tokens_per_microbatch, what it was lowered to when memory ran out), or empty.
    `start_shapes` counts the first step's answers by shape, `shape_steps` the steps in which a shape took over
    (`shapes`).
    """

    next_step: int = 0
    evaluated: int = 0
    next_problem: int = 0
    history: History = field(default_factory=dict)
    level: int = 0
    level_rates: list[float] = field(default_factory=list)
    entropy_coef: float = 0.0
    start_entropy: float | None = None
    start_shapes: dict[str, int] = field(default_factory=dict)
    shape_steps: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    lowered_budget: tuple[int, ...] = ()

    def add_seconds(self, seconds: dict[str, float]) -> None:
        """Add times by stage."""
        self.seconds |= {stage: self.seconds.get(stage, 0.0) + value for stage, value in seconds.items()}


def save_checkpoint(parent: Path, learner: Learner, cursor: Cursor, *, base_id: str, keep: int) -> Path:
    """Write `parent/step-NNNNNN` and delete all but the newest `keep`. A folder with such a name is always complete."""
    policy = learner.policy
    target = parent / f"{_PREFIX}{cursor.next_step:06d}"
    state = dict(_flat(learner.optimizer.state_dict()["state"]))
    tensors = {path: value for path, value in state.items() if isinstance(value, Tensor)}
    content = {
        "cursor": asdict(cursor),
        "policy_version": policy.version,
        "loss_scale": learner.loss_scale,
        "siamese": {"largest_update": learner.siamese.largest_update},
        "optimizer": {path: value for path, value in state.items() if path not in tensors},
    }
    text = json.dumps(content, indent=2) + "\n"
    for leftover in parent.glob(f".{_PREFIX}*"):  # from a process that was killed while saving or deleting
        shutil.rmtree(leftover)
    if target.is_dir():
        # Weights after a step are a function of the step; only times and evaluations can have changed.
        write_atomically(target / "cursor.json", text)
    else:
        partial = parent / f".{target.name}.partial"
        partial.mkdir(parents=True)
        save_adapter(policy.model, partial / "adapter", base_id=base_id)
        files = {"predictor": policy.predictor.state_dict(), "siamese": learner.siamese.average, "optimizer": tensors}
        for name, values in files.items():
            # Copies: the 8-bit optimizer shares its quantisation maps between parameters, which safetensors refuses.
            copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in values.items()}
            save_file(copies, str(partial / f"{name}.safetensors"))
        (partial / "cursor.json").write_text(text, encoding="utf-8")
        for path in partial.rglob("*"):
            _sync_to_disk(path)
        partial.replace(target)
        _sync_to_disk(parent)
    # Also if the folder was there: a process may have been killed before it deleted the older ones.
    for old in checkpoint_folders(parent)[:-keep]:
        # Rename first: a folder with a checkpoint's name must be complete while it is being deleted, too.
        shutil.rmtree(old.rename(parent / f".{old.name}.old"))
    return target


def load_checkpoint(folder: Path, learner: Learner) -> Cursor:
    """Restore `learner` from `folder`; return its cursor. Raises CheckpointError if it is damaged or does not fit."""
    policy = learner.policy
    try:
        content = json.loads((folder / "cursor.json").read_text("utf-8"))
        load_adapter_weights(policy.model, folder / "adapter")
        policy.predictor.load_state_dict(load_file(str(folder / "predictor.safetensors")))
        learner.siamese.load_state(load_file(str(folder / "siamese.safetensors")), **content["siamese"])
        state: dict[int, dict[str, Any]] = {}
        for path, value in {**load_file(str(folder / "optimizer.safetensors")), **content["optimizer"]}.items():
            number, *keys, last = path.split("/")
            target = state.setdefault(int(number), {})
            for key in keys:
                target = target.setdefault(key, {})
            target[last] = value
        # Parameter groups hold settings of the recipe, which is the same, so only the state is loaded.
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
        policy.version, learner.loss_scale = content["policy_version"], content["loss_scale"]
        if missing := {entry.name for entry in fields(Cursor)} - content["cursor"].keys():
            raise KeyError(f"the cursor lacks {sorted(missing)}")
        cursor = Cursor(**content["cursor"])
        cursor.history = {problem: Seen(*seen) for problem, seen in cursor.history.items()}
        cursor.lowered_budget = tuple(cursor.lowered_budget)
        return cursor
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        what = f"the checkpoint cannot be read: {type(error).__name__}: {error}"
        next_step = "delete this folder to resume from the one before it"
        raise CheckpointError(what, where=str(folder), next_step=next_step) from error


def checkpoint_folders(parent: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(parent.glob(f"{_PREFIX}*"))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path such as `3/exp_avg`, leaf) of nested dicts; bitsandbytes nests its quantisation state."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}/{key}" if path else str(key))
    else:
        yield path, value


def _sync_to_disk(path: Path) -> None:
    if os.name != "posix":  # Windows opens no folders, and writes nothing through a file that is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
