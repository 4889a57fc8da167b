"""Checkpoints: adapter, predictor head, siamese, optimizer and cursor, written atomically, in safetensors and JSON.

There is no random state to keep: every draw of a run is a function of the seed and the step (`seeding`).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from popo_lite.errors import CheckpointError
from popo_lite.policy.adapters import load_adapter_weights, save_adapter
from popo_lite.policy.policy import Policy
from popo_lite.policy.siamese import Siamese
from popo_lite.run_folder import write_atomically
from popo_lite.training.history import History, Seen

_PREFIX = "step-"
_OPTIMIZER, _PREDICTOR, _SIAMESE, _CURSOR = (
    "optimizer.safetensors",
    "predictor.safetensors",
    "siamese.safetensors",
    "cursor.json",
)


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands: the next step to take, and what later steps and the summary need from earlier ones.

    `next_problem` is the position in the stream of training problems; `history` is empty unless known problems are
    skipped. `prompts_with_positive`, `rollouts` and the like are sums over all steps. `lowered_budget` is (the recipe's
    token budget of a micro-batch, what it was lowered to when memory ran out), empty where it never did.
    """

    next_step: int
    evaluated: int
    next_problem: int
    history: History
    beta: float
    start_entropy: float | None
    prompts_skipped: int
    prompts_with_positive: int
    rollouts: int
    rollout_tokens: int
    trained_tokens: int
    seconds: dict[str, float]
    before: dict[str, Any] | None
    lowered_budget: tuple[int, ...] = ()


def save_checkpoint(
    parent: Path,
    *,
    policy: Policy,
    siamese: Siamese,
    optimizer: torch.optim.Optimizer,
    cursor: Cursor,
    base_id: str,
    keep: int,
) -> Path:
    """Write `parent/step-NNNNNN` and drop all but the newest `keep`. A folder with that name is always complete."""
    target = parent / f"{_PREFIX}{cursor.next_step:06d}"
    content = {"cursor": cursor.__dict__, "policy_version": policy.version}
    averages, siamese_scalars = siamese.state()
    tensors, plain = _split_optimizer_state(optimizer)
    content |= {"siamese": siamese_scalars, "optimizer": plain}
    if target.is_dir():
        # Weights after a step are a function of the step; only times and evaluations can have moved on.
        write_atomically(target / _CURSOR, json.dumps(content, indent=2) + "\n")
        return target
    for leftover in parent.glob(f".{_PREFIX}*"):  # of a process that was killed while saving
        shutil.rmtree(leftover)
    partial = parent / f".{target.name}.partial"
    partial.mkdir(parents=True)
    save_adapter(policy.model, partial / "adapter", base_id=base_id)
    save_file(_on_cpu(policy.predictor.state_dict()), str(partial / _PREDICTOR))
    save_file(_on_cpu(averages), str(partial / _SIAMESE))
    save_file(_on_cpu(tensors), str(partial / _OPTIMIZER))
    (partial / _CURSOR).write_text(json.dumps(content, indent=2) + "\n")
    for file in partial.rglob("*"):
        if file.is_file():
            _sync_to_disk(file)
    partial.replace(target)
    _sync_to_disk(parent)
    for old in checkpoint_folders(parent)[:-keep]:
        # Renamed first: a folder under a checkpoint's name is whole, also while it is being deleted.
        shutil.rmtree(old.rename(parent / f".{old.name}.old"))
    return target


def load_checkpoint(folder: Path, *, policy: Policy, siamese: Siamese, optimizer: torch.optim.Optimizer) -> Cursor:
    """Restore everything from `folder`. Raises CheckpointError where it is incomplete or of another shape."""
    try:
        content = json.loads((folder / _CURSOR).read_text())
        load_adapter_weights(policy.model, folder / "adapter")
        policy.predictor.load_state_dict(load_file(str(folder / _PREDICTOR)))
        siamese.load_state(load_file(str(folder / _SIAMESE)), content["siamese"])
        _restore_optimizer(optimizer, load_file(str(folder / _OPTIMIZER)), content["optimizer"])
        policy.version = content["policy_version"]
        held = content["cursor"]
        history = {problem: Seen(*last) for problem, last in held["history"].items()}
        return Cursor(**{**held, "history": history, "lowered_budget": tuple(held.get("lowered_budget", ()))})
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be read: {type(error).__name__}: {error}",
            where=str(folder),
            next_step="delete this folder to resume from the one before it",
        ) from error


def checkpoint_folders(parent: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(parent.glob(f"{_PREFIX}*")) if parent.is_dir() else []


def latest_checkpoint(parent: Path) -> Path | None:
    """The newest checkpoint, if there is one."""
    folders = checkpoint_folders(parent)
    return folders[-1] if folders else None


def _split_optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, everything else as plain JSON), both under paths such as `3/exp_avg` into the state."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, dict):  # bitsandbytes nests its quantisation state
            for key, inner in value.items():
                visit(inner, f"{path}/{key}")
        else:
            plain[path] = value

    for number, entries in optimizer.state_dict()["state"].items():
        visit(entries, str(number))
    return tensors, plain


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for path, value in {**tensors, **plain}.items():
        number, *keys, last = path.split("/")
        target = state.setdefault(int(number), {})
        for key in keys:
            target = target.setdefault(key, {})
        target[last] = value
    # Groups hold settings of the recipe, which is the same; only the state travels.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Copies: the 8-bit optimizer shares its quantisation maps between parameters, and safetensors shares nothing.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _sync_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
