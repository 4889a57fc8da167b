"""Lay out the folder of a run and write to it; a file is replaced whole or not at all, also by a killed process."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popo_lite.damage import as_object, reading
from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import dump_recipe, flatten, load_recipe

if TYPE_CHECKING:
    import torch


class RunFolder:
    """Name the paths inside a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_path = path / "recipe.toml"  # resolved: every key
        self.metrics_path = path / "metrics.jsonl"  # one line per step
        self.samples_path = path / "samples.jsonl"  # a few whole groups per step
        self.evaluations_path = path / "evaluations.jsonl"  # one line per evaluation on held-out problems
        self.data_path = path / "data.json"  # hashes of the training rows and held-out problems
        self.summary_path = path / "summary.json"  # written at the end
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"  # trained adapter, PEFT format
        self.siamese = path / "siamese"  # averaged adapter, PEFT format
        self.resume_command = f"popo-lite train {self.recipe_path} --resume --output {path}"

    def trained_adapter(self, weights: str) -> Path:
        """Return the adapter's folder; `weights` is "policy" or "siamese". Raises CheckpointError before the end."""
        folder = {"policy": self.adapter, "siamese": self.siamese}.get(weights)
        if folder is None:
            what, next_step = f'a run has no weights "{weights}"', 'use "policy" or "siamese"'
            raise UserInputError(what, where=str(self.path), next_step=next_step)
        if not self.summary_path.is_file():
            what = f"the run has not ended, so its {folder.name}/ is not there yet"
            raise CheckpointError(what, where=str(self.path), next_step=self.resume_command)
        return folder

    def recipe(self) -> Recipe:
        """Return the recipe that the run was started with."""
        if not self.recipe_path.is_file():
            next_step = "give the folder that `popo-lite train` printed, for instance runs/tiny_cpu-seed0"
            what = "there is no run here: recipe.toml is missing"
            raise CheckpointError(what, where=str(self.path), next_step=next_step)
        return load_recipe(self.recipe_path)


def new_run_folder(recipe: Recipe, name: str, output: Path | None) -> RunFolder:
    """Create `output`, or `<output.dir>/<name>-seed<N>` with a number appended if that exists."""
    if output is not None:
        if output.exists() and (not output.is_dir() or not all(map(is_leftover, output.iterdir()))):
            what = "the folder is not empty, and no run is ever overwritten"
            next_step = "add --resume to continue the run in it, or name another folder"
            raise UserInputError(what, where=f"--output {output}", next_step=next_step)
        output.mkdir(parents=True, exist_ok=True)
        return RunFolder(output)
    parent, stem = Path(recipe.output.dir).expanduser(), f"{name}-seed{recipe.train.seed}"
    for number in range(1, 10_000):
        candidate = parent / (stem if number == 1 else f"{stem}-{number}")
        with suppress(FileExistsError):
            candidate.mkdir(parents=True)
            return RunFolder(candidate)
    raise UserInputError(f"{parent} holds 9,999 runs of {name} already", where="output.dir")


def find_run_folder(recipe: Recipe, name: str, output: Path | None) -> RunFolder:
    """Return the run to resume: the one in `output`, or the newest unfinished one of this recipe and seed.

    Raises CheckpointError if there is none, it has ended, or it was started with another recipe.
    """
    if output is None:
        parent, stem = Path(recipe.output.dir).expanduser(), f"{name}-seed{recipe.train.seed}"
        folders = [file.parent for file in parent.glob("*/recipe.toml")]
        runs = [path for path in folders if re.fullmatch(rf"{re.escape(stem)}(-\d+)?", path.name)]
        unfinished = [path for path in runs if not RunFolder(path).summary_path.is_file()]
        if not unfinished:
            what = f"no unfinished run of {name} with seed {recipe.train.seed} is in {parent}"
            next_step = "name its folder with --output, or omit --resume to start a run"
            raise CheckpointError(what, where="--resume", next_step=next_step)
        output = max(unfinished, key=lambda path: path.stat().st_mtime)
    run = RunFolder(output)
    refuse_other_recipe(run, recipe)
    return run


def dated(recipe: Recipe, run: RunFolder | None = None) -> Recipe:
    """Return `recipe` with `data.date`: by default that of `run`, or today.

    It is part of a run's recipe so that the prompts are the same ones when the run is resumed, evaluated or exported.
    """
    date = recipe.data.date or (run and run.recipe().data.date) or datetime.date.today()
    return recipe.with_values({"data.date": date})


def refuse_other_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Raise CheckpointError if the run has ended, or if `recipe` would make it another experiment."""
    if run.summary_path.is_file():
        what = "the run has ended, there is nothing to resume"
        next_step = "train on from it in a new run with lora.init_from, or omit --resume"
        raise CheckpointError(what, where=str(run.path), next_step=next_step)
    before = run.recipe()
    recipe = recipe.with_values({"data.date": recipe.data.date or before.data.date})
    if changed := differences(flatten(before), flatten(recipe), may_change_on_resume(recipe)):
        what = f"the recipe differs from the one this run was started with: {'; '.join(changed[:5])}"
        raise CheckpointError(what, where=str(run.recipe_path), next_step=run.resume_command)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Set[str] = frozenset()) -> list[str]:
    """Return `KEY was VALUE and is VALUE` for each key with another value, sorted by key."""
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys if key not in ignored]


def may_change_on_resume(recipe: Recipe) -> set[str]:
    """Return the settings that change speed, bookkeeping and rounding, but not what is learned."""
    # Dropout masks depend on how the step is split and packed.
    splitting = (
        set() if recipe.lora.dropout else {"train.tokens_per_microbatch", "train.packing", "train.shared_prefix"}
    )
    return splitting | {
        "output.dir", "output.samples_per_step", "reward.workers", "rollout.max_num_seqs",
        "rollout.vllm.gpu_memory_utilization", "train.compile_loss", "train.cpu_threads",
        "train.gradient_checkpointing", "train.logits_mib", "train.offload_activations", "train.save_steps",
        "train.save_total_limit",
    }  # fmt: skip


def is_leftover(path: Path) -> bool:
    """Return whether `path` is left over from a `write_atomically` that was killed or found the disk full."""
    return path.name.startswith(".") and path.name.endswith(".partial") and path.is_file()


def start_files(run: RunFolder, recipe: Recipe, device: torch.device) -> None:
    """Write recipe.toml and environment.json."""
    write_atomically(run.recipe_path, dump_recipe(recipe))
    write_atomically(run.path / "environment.json", json.dumps(environment(device), indent=2) + "\n")


def environment(device: torch.device) -> dict[str, Any]:
    """Return the hardware and versions that a figure was measured with."""
    import torch

    packages = ("torch", "transformers", "peft", "bitsandbytes", "vllm", "unsloth", "math-verify", "popo-lite")
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    info = Path("/proc/cpuinfo")  # Linux only
    processor = re.search(r"^model name\s*:\s*(.*\S)", info.read_text("utf-8") if info.is_file() else "", re.MULTILINE)
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor[1] if processor else platform.processor() or "unknown",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "packages": versions,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes that torch reserved (CUDA), or the most resident bytes of this process (CPU)."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved(device))
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line."""
    # A server may send half a surrogate pair, which UTF-8 cannot hold; written as \ud800 it is JSON's escape for it.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return every line of a JSONL file. Raises CheckpointError for a line that is not a JSON object."""
    with reading(path):
        # Not str.splitlines: it also splits at separators that answers may contain.
        lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if line:
            with reading(path, f"line {number}"):
                records.append(as_object(json.loads(line.decode())))
    return records


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Delete the lines of a JSONL file that `keep` refuses: a resumed run writes them again.

    An incomplete last line, which a kill leaves, is deleted too. Raises CheckpointError for any other line that is not
    a JSON object: a kill cannot explain it, so more of the file may be lost.
    """
    if not path.is_file():
        return
    kept, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode()) if line else None
        except (ValueError, RecursionError):  # not JSON, or half a character, or nested too deep
            record = None
        if isinstance(record, dict):
            kept += [line.decode() + "\n"] if keep(record) else []
        elif line and number < len(lines):
            next_step = "restore the file, or start a new run in another folder"
            raise CheckpointError(f"line {number} is damaged", where=str(path), next_step=next_step)
    write_atomically(path, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`; after a crash it holds either the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
