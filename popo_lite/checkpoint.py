"""Save and load checkpoints: adapter, predictor head, siamese, optimizer and cursor, in safetensors and JSON.

There is no random state to save: every draw of a run is a function of the seed and the step (`seeding`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from popo_lite.curriculum import History
from popo_lite.errors import CheckpointError
from popo_lite.policy.adapters import load_adapter_weights, save_adapter
from popo_lite.run_folder import write_atomically
from popo_lite.update import Learner

_PREFIX = "step-"
_CHECKSUMS = "checksums.json"
_MOMENTS = ({"exp_avg", "exp_avg_sq"}, {"state1", "state2"})  # of torch's AdamW and of bitsandbytes'


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
    if target.is_dir():
        # Weights after a step are a function of the step; only times and evaluations can have changed.
        write_atomically(target / "cursor.json", text)
        return target
    for leftover in parent.glob(f".{_PREFIX}*"):  # from a process that was killed while saving
        shutil.rmtree(leftover)
    partial = parent / f".{target.name}.partial"
    partial.mkdir(parents=True)
    save_adapter(policy.model, partial / "adapter", base_id=base_id)
    files = {"predictor": policy.predictor.state_dict(), "siamese": learner.siamese.average, "optimizer": tensors}
    for name, values in files.items():
        # Copies: the 8-bit optimizer shares its quantisation maps between parameters, which safetensors refuses.
        copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in values.items()}
        save_file(copies, str(partial / f"{name}.safetensors"))
    (partial / "cursor.json").write_text(text, encoding="utf-8")
    (partial / _CHECKSUMS).write_text(json.dumps(_checksums(partial), indent=2) + "\n", encoding="utf-8")
    for path in partial.rglob("*"):
        _sync_to_disk(path)
    partial.replace(target)
    _sync_to_disk(parent)
    for old in checkpoint_folders(parent)[:-keep]:
        # Rename first: a folder with a checkpoint's name must be complete while it is being deleted, too.
        shutil.rmtree(old.rename(parent / f".{old.name}.old"))
    return target


def load_checkpoint(folder: Path, learner: Learner) -> Cursor:
    """Restore `learner` from `folder`; return its cursor. Raises CheckpointError if it is damaged or does not fit."""
    policy = learner.policy
    try:
        # A flipped bit in a tensor is no error to safetensors.
        if (folder / _CHECKSUMS).is_file():
            found, expected = _checksums(folder), json.loads((folder / _CHECKSUMS).read_text("utf-8"))
            if other := [name for name in {**expected, **found} if found.get(name) != expected.get(name)]:
                raise ValueError(f"{other[0]} is not what was saved")
        content = json.loads((folder / "cursor.json").read_text("utf-8"))
        if missing := {entry.name for entry in fields(Cursor)} - content["cursor"].keys():
            raise KeyError(f"the cursor lacks {sorted(missing)}")
        cursor = TypeAdapter(Cursor).validate_python(content["cursor"])
        version, loss_scale = int(content["policy_version"]), float(content["loss_scale"])
        largest_update, average = content["siamese"]["largest_update"], load_file(str(folder / "siamese.safetensors"))
        if average.keys() != learner.siamese.average.keys():
            raise KeyError(
                f"other weights in the siamese: {sorted(average.keys() ^ learner.siamese.average.keys())[0]}"
            )
        state: dict[int, dict[str, Any]] = {}
        for path, value in {**load_file(str(folder / "optimizer.safetensors")), **content["optimizer"]}.items():
            number, *keys, last = path.split("/")
            target = state.setdefault(int(number), {})
            for key in keys:
                target = target.setdefault(key, {})
            target[last] = value
        _check_optimizer_state(state, learner)
        load_adapter_weights(policy.model, folder / "adapter")
        policy.predictor.load_state_dict(load_file(str(folder / "predictor.safetensors")))
        learner.siamese.load_state(average, float(largest_update))
        # Parameter groups hold settings of the recipe, which is the same, so only the state is loaded.
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": state, "param_groups": groups})
        policy.version, learner.loss_scale = version, loss_scale
        return cursor
    # JSON may hold any type at any place, or be nested too deep for the parser.
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, SafetensorError,
            ) as error:  # fmt: skip
        what = f"the checkpoint cannot be read: {textwrap.shorten(f'{type(error).__name__}: {error}', 300)}"
        next_step = "delete this folder to resume from the one before it"
        raise CheckpointError(what, where=str(folder), next_step=next_step) from error


def _checksums(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of the files with weights. Not of cursor.json, which is written again."""
    sums = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _check_optimizer_state(state: dict[int, dict[str, Any]], learner: Learner) -> None:
    """Raise ValueError if the state does not fit the parameters: torch would notice at the next step, or never."""
    shapes = [parameter.shape for group in learner.optimizer.param_groups for parameter in group["params"]]
    for number, entry in state.items():
        entry = entry | entry.get("__bnb_optimizer_quant_state__", {})
        if not 0 <= number < len(shapes) or not any(names <= entry.keys() for names in _MOMENTS):
            raise ValueError(f"the optimizer's state {number} has {sorted(entry)}")
        for name in set().union(*_MOMENTS) & entry.keys():
            if entry[name].shape != shapes[number]:
                raise ValueError(f"{name} of the optimizer's state {number} has the shape {tuple(entry[name].shape)}")


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
