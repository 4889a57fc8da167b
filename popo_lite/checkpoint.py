"""Save and load checkpoints: adapter, predictor head, siamese, optimizer and cursor, in safetensors and JSON.

There is no random state to save: every draw of a run is a function of the seed and the step (`seeding`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from popo_lite.curriculum import History
from popo_lite.errors import ModelError
from popo_lite.formats import checked, stamped
from popo_lite.policy.adapters import load_adapter_weights, save_adapter
from popo_lite.run_folder import (
    CHECKSUMS,
    changed_files,
    checkpoint_folders,
    checkpoint_step,
    checksums,
    damaged_checkpoint,
    flat,
    write_atomically,
    write_json,
)
from popo_lite.update import Learner

_OURS = re.compile(r"\.step-\d{6,}\.(partial|old)")
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
    (`shapes`). `changes` are the keys of the recipe that were changed when the run was resumed: key, before, now, step.
    `best` is the step and pass@1 of the best evaluation during training. The sampler was last proven to use the adapter
    after `proven_step` steps; `doubts` say what of the run cannot be trusted. `recent_grad_norms` are those of the
    last updates. `not_finite_steps` were skipped for their gradient, the last `not_finite_in_a_row` of them without an
    update in between; `learning_rate_scale` was halved at each of the `rollbacks`.
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
    changes: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    proven_step: int = 0
    doubts: list[str] = field(default_factory=list)
    recent_grad_norms: list[float] = field(default_factory=list)
    not_finite_steps: int = 0
    not_finite_in_a_row: int = 0
    learning_rate_scale: float = 1.0
    rollbacks: int = 0

    def add_seconds(self, seconds: dict[str, float]) -> None:
        """Add times by stage."""
        self.seconds |= {stage: self.seconds.get(stage, 0.0) + value for stage, value in seconds.items()}


REQUIRED = {"next_step", "next_problem", "history", "level", "level_rates", "entropy_coef", "totals", "seconds"}
"""Fields without which a run would silently go on differently. All others, and those of later versions, have defaults
for a run that was started without them."""


def save_checkpoint(
    parent: Path, learner: Learner, cursor: Cursor, *, base_id: str, keep: int, keep_too: Path | None = None
) -> Path:
    """Write `parent/step-NNNNNN` and delete all but the newest `keep`, the best, and `keep_too`.

    A folder with such a name is always complete. Raises NotFiniteError for weights that are not finite, and OSError or
    SafetensorError if the disk is full; then nothing has changed.
    """
    policy = learner.policy
    learner.refuse_not_finite()
    target = parent / f"step-{cursor.next_step:06d}"
    state = flat(learner.optimizer.state_dict()["state"], "/")
    tensors = {path: value for path, value in state.items() if isinstance(value, Tensor)}
    content = {
        "cursor": asdict(cursor),
        "policy_version": policy.version,
        "loss_scale": learner.loss_scale,
        "siamese": {"largest_update": learner.siamese.largest_update},
        "optimizer": {path: value for path, value in state.items() if path not in tensors},
    }
    text = json.dumps(stamped(content), indent=2) + "\n"
    for leftover in parent.glob(".step-*"):  # from a process that was killed while saving or deleting
        if _OURS.fullmatch(leftover.name):
            shutil.rmtree(leftover)
    if target.is_dir():
        # Weights after a step are a function of the step; only times and evaluations can have changed.
        write_atomically(target / "cursor.json", text)
    else:
        partial = parent / f".{target.name}.partial"
        try:
            partial.mkdir(parents=True)
            _write(partial, learner, tensors, text, base_id=base_id)
            partial.replace(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space
            raise
        for folder in (parent, parent.parent):
            _sync_to_disk(folder)
    # Also if the folder was there: a process may have been killed before it deleted the older ones.
    best = cursor.best and cursor.best["step"]
    for old in checkpoint_folders(parent)[:-keep]:
        if checkpoint_step(old) != best and old != keep_too:
            # Rename first: a folder with a checkpoint's name must be complete while it is being deleted, too.
            shutil.rmtree(old.rename(parent / f".{old.name}.old"), ignore_errors=True)
    return target


def _write(partial: Path, learner: Learner, optimizer: dict[str, Tensor], text: str, *, base_id: str) -> None:
    """Write all files of a checkpoint to disk; `text` is that of cursor.json."""
    policy = learner.policy
    save_adapter(policy.model, partial / "adapter", base_id=base_id)
    files = {"predictor": policy.predictor.state_dict(), "siamese": learner.siamese.average, "optimizer": optimizer}
    for name, values in files.items():
        # Copies: the 8-bit optimizer shares its quantisation maps between parameters, which safetensors refuses.
        copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in values.items()}
        save_file(copies, str(partial / f"{name}.safetensors"))
    (partial / "cursor.json").write_text(text, encoding="utf-8")
    write_json(partial / CHECKSUMS, {"files": checksums(partial)})
    sync_folder(partial)


def load_checkpoint(folder: Path, learner: Learner) -> Cursor:
    """Restore `learner` from `folder`; return its cursor.

    Raises CheckpointError if it is damaged, too new or does not fit.
    """
    policy = learner.policy
    try:
        # A flipped bit in a tensor is no error to safetensors.
        if changed := changed_files(folder):
            raise ValueError(f"{changed[0]} is not what was saved")
        content = checked(json.loads((folder / "cursor.json").read_text("utf-8")), folder / "cursor.json")
        if missing := REQUIRED - content["cursor"].keys():
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
            ModelError) as error:  # fmt: skip
        detail = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise damaged_checkpoint(folder, detail) from error


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


def sync_folder(folder: Path) -> None:
    """Write a folder with all that it holds through to the disk.

    A report or an export may write there, too: what it has renamed or removed meanwhile is skipped.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for path in (*(Path(place, name) for name in names), Path(place)):
            with suppress(FileNotFoundError):
                _sync_to_disk(path)


def _sync_to_disk(path: Path) -> None:
    if os.name != "posix":  # Windows opens no folders, and writes nothing through a file that is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
