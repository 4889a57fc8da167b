"""Lay out the folder of a run and write to it; a file is replaced whole or not at all, also by a killed process."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.formats import FORMAT, KEY, checked, read_json, reading, stamped
from popo_lite.lock import locked, writing
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import dump_recipe, load_recipe

if TYPE_CHECKING:
    import torch


CHECKSUMS = "checksums.json"
_temporary: list[TemporaryDirectory[str]] = []
"""Adapters of checkpoints, copied: a run that goes on deletes its old checkpoints. They go when the process ends."""


def checkpoint_folders(parent: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first. Folders with any other name, such as a user's copy, are not ours.

    The name is `step-` and the number of steps done, in at least six digits.
    """
    found = [path for path in parent.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name, re.ASCII)]
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """Return the number of steps that were done when the checkpoint was written."""
    return int(folder.name.removeprefix("step-"))


class RunFolder:
    """Name the paths inside a run's folder, lock it, and find the weights in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_path = path / ".lock"  # held by the process that trains
        self.recipe_path = path / "recipe.toml"  # resolved: every key
        self.environment_path = path / "environment.json"  # hardware and versions at the start
        self.metrics_path = path / "metrics.jsonl"  # one line per step
        self.samples_path = path / "samples.jsonl"  # a few whole groups per step
        self.evaluations_path = path / "evaluations.jsonl"  # one line per evaluation on held-out problems
        self.trackers_path = path / "trackers.json"  # the run's id in trackers; a resumed run has the same
        self.data_path = path / "data.json"  # hashes of the training rows and held-out problems
        self.summary_path = path / "summary.json"  # written at the end
        self.log_path = path / "log.txt"  # messages, warnings and errors
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"  # trained adapter, PEFT format
        self.siamese = path / "siamese"  # averaged adapter, PEFT format
        self.resume_command = f"popo-lite resume {shlex.quote(str(path))}"

    def locked(self) -> AbstractContextManager[int]:
        """Lock the folder for a trainer. Raises UserInputError with owner and age if another one has it."""
        next_step = "wait for it, or stop it: Ctrl-C or SIGTERM saves the last step"
        return locked(self.lock_path, "another process trains in this folder", next_step)

    def recipe(self) -> Recipe:
        """Return the recipe that the run was started with, with what was changed when it was resumed."""
        if not self.recipe_path.is_file():
            next_step = "give the folder that `popo-lite train` printed, for instance runs/tiny_cpu-seed0"
            what = "there is no run here: recipe.toml is missing"
            raise CheckpointError(what, where=str(self.path), next_step=next_step)
        return load_recipe(self.recipe_path, stored=True)

    @property
    def ended(self) -> bool:
        """True if all steps are done. A run that ended is not, while it trains on for more steps."""
        return self.summary_path.is_file() and self.summary()["steps"] >= self.recipe().train.steps

    def find_checkpoint(self, which: int | str | None = None) -> Path | None:
        """Return the checkpoint after `which` steps, or the "best" one; None is the end, or else the newest one.

        Returns None for the end. Raises CheckpointError, which lists the checkpoints, if it is not there.
        """
        if which is None and self.ended:
            return None
        folders = {checkpoint_step(folder): folder for folder in checkpoint_folders(self.checkpoints)}
        if not folders:
            what = "there is no checkpoint" if self.ended else "the run has not ended and has no checkpoint yet"
            next_step = "leave --checkpoint out" if self.ended else self.resume_command
            raise CheckpointError(what, where=str(self.checkpoints), next_step=next_step)
        newest = folders[max(folders)]
        step, there = max(folders) if which is None else which, f"there are {', '.join(map(str, folders))}"
        if which == "best":
            with reading(newest / "cursor.json"):
                best = self._cursor(newest).get("best")
                step = int(best["step"]) if best else 0
            if not best:
                what = f"no evaluation during training has found a best checkpoint; {there}"
                next_step = f"--checkpoint {max(folders)}; eval.every makes such evaluations"
                raise CheckpointError(what, where=str(self.checkpoints), next_step=next_step)
        if step not in folders:
            what = f"there is no checkpoint after {step} steps; {there}"
            raise CheckpointError(what, where=str(self.checkpoints), next_step=f"--checkpoint {max(folders)}")
        return folders[int(step)]

    def summary(self, checkpoint: Path | None = None) -> dict[str, Any]:
        """Return summary.json, or what there is of it in a checkpoint: `after` is None, `of_steps` the recipe's."""
        if checkpoint is None:
            with reading(self.summary_path):
                summary = read_json(self.summary_path)
                return {**summary, "steps": int(summary["steps"])}
        cursor = self._cursor(checkpoint)
        return {
            "steps": checkpoint_step(checkpoint),
            "of_steps": self.recipe().train.steps,
            "before": cursor.get("before"),
            "after": None,
            "changes": cursor.get("changes", []),
            "doubts": cursor.get("doubts", []),
        }

    def notices(self, which: int | str | None, checkpoint: Path | None) -> list[str]:
        """Return what a user must know of the weights: which ones were taken unasked, and what speaks against them."""
        summary = self.summary(checkpoint)
        unasked = f"the run has not ended; these weights are of its newest checkpoint, after {summary['steps']:,}"
        first = [f"{unasked} of {summary['of_steps']:,} steps"] if which is None and checkpoint is not None else []
        with reading(self.summary_path if checkpoint is None else checkpoint / "cursor.json"):
            return [*first, *map(str, summary.get("doubts", []))]

    def trained_adapter(self, weights: str, checkpoint: Path | None = None) -> Path:
        """Return a folder with the adapter in PEFT's format; `weights` is "policy" or "siamese".

        That of a checkpoint is copied to a temporary folder; None is the end.
        """
        end = {"policy": self.adapter, "siamese": self.siamese}.get(weights)
        if end is None:
            what, next_step = f'a run has no weights "{weights}"', 'use "policy" or "siamese"'
            raise UserInputError(what, where=str(self.path), next_step=next_step)
        if checkpoint is None:
            return end
        _temporary.append(TemporaryDirectory(prefix="popo-lite-"))
        return copy_adapter(checkpoint, weights, Path(_temporary[-1].name) / f"{checkpoint.name}-{weights}")

    def _cursor(self, checkpoint: Path) -> dict[str, Any]:
        path = checkpoint / "cursor.json"
        with reading(path):
            return dict(read_json(path)["cursor"])


def copy_adapter(checkpoint: Path, weights: str, target: Path) -> Path:
    """Write the policy or siamese of a checkpoint to `target` in PEFT's format; return `target`.

    A checkpoint has the siamese's tensors by the names of parameters, and the policy's as PEFT names them in files.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file  # adapters have no 16-bit tensors, which numpy lacks

    # Parameters also have the adapter's name, and DoRA's magnitudes a weight.
    def stem(name: str) -> str:
        return name.replace(".default", "").removesuffix(".weight")

    file = "adapter_model.safetensors"
    try:
        shutil.copytree(checkpoint / "adapter", target)
        if weights == "siamese":
            average = {stem(name): value for name, value in load_file(checkpoint / "siamese.safetensors").items()}
            named = {name: average[stem(name)] for name in load_file(target / file)}
            save_file(named, target / file, metadata={"format": "pt"})
    except (OSError, KeyError, SafetensorError) as error:
        raise damaged_checkpoint(checkpoint, f"{type(error).__name__}: {error}") from error
    return target


def damaged_checkpoint(checkpoint: Path, reason: str) -> CheckpointError:
    """Return the error of a checkpoint that cannot be read; its next step is the newest older one that can."""
    if not checkpoint.is_dir():
        what = "the run that trains here has deleted this checkpoint meanwhile"
        next_step = "rerun the command, or choose another --checkpoint; train.save_total_limit keeps more"
        return CheckpointError(what, where=str(checkpoint), next_step=next_step)
    run = RunFolder(checkpoint.parent.parent)
    folders = checkpoint_folders(checkpoint.parent)
    older = folders[: folders.index(checkpoint)] if checkpoint in folders else []
    sound = next(filter(is_sound, reversed(older)), None)
    what = f"the checkpoint cannot be read: {reason}"
    if sound is None:
        next_step = f"restore it from a backup, or start again: popo-lite train {shlex.quote(str(run.recipe_path))}"
    else:
        next_step = f"go on from an older one: {run.resume_command} --checkpoint {checkpoint_step(sound)}"
    return CheckpointError(what, where=str(checkpoint), next_step=next_step)


def is_sound(checkpoint: Path) -> bool:
    """Check that the cursor of a checkpoint can be read, and that its other files are as they were saved."""
    try:
        with reading(checkpoint):
            cursor = read_json(checkpoint / "cursor.json")["cursor"]
            return isinstance(cursor, dict) and not changed_files(checkpoint)
    except CheckpointError:
        return False


def checksums(checkpoint: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of the files with weights. Not of cursor.json, which is written again."""
    sums = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        with path.open("rb") as file:
            sums[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def changed_files(checkpoint: Path) -> list[str]:
    """Return the files of a checkpoint that are not as they were saved; none if it was saved without checksums."""
    path = checkpoint / CHECKSUMS
    if not path.is_file():
        return []
    return changed_keys(read_json(path)["files"], checksums(checkpoint))


def go_back(run: RunFolder, step: int) -> None:
    """Make the checkpoint after `step` steps the newest one; the run has not ended any more.

    Later ones are renamed, and not used any more.
    """
    for folder in checkpoint_folders(run.checkpoints):
        if checkpoint_step(folder) > step:
            aside = folder.with_name(f"{folder.name}-set-aside")
            number = 2
            while aside.exists():
                aside, number = folder.with_name(f"{folder.name}-set-aside-{number}"), number + 1
            folder.rename(aside)
    run.summary_path.unlink(missing_ok=True)


@contextmanager
def new_run(recipe: Recipe, name: str, output: Path | None) -> Iterator[RunFolder]:
    """Create and lock `output`, or `<output.dir>/<name>-seed<N>` with a number appended if that exists.

    Before anything is loaded, so that a second trainer on `output` ends at once. If nothing was written when the block
    ends, the folder is removed. A folder that a killed process left without a run is used.
    """
    parent, stem = Path(recipe.output.dir).expanduser(), f"{name}-seed{recipe.train.seed}"
    named = (parent / (stem if number == 1 else f"{stem}-{number}") for number in range(1, 10_000))
    for path in named if output is None else (output,):
        run = RunFolder(path)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        with ExitStack() as stack:
            try:
                _refuse_occupied(run)
                stack.enter_context(run.locked())
                _refuse_occupied(run)  # again: another process may have started and ended meanwhile
            except UserInputError:
                if output is not None:
                    raise
                continue
            with writing(path):
                path.chmod(0o700)  # also of a folder that was there
            try:
                yield run
            finally:
                if _is_free(path):
                    _remove(run, made)
        return
    raise UserInputError(f"{parent} holds 9,999 runs of {name} already", where="output.dir")


def _is_free(path: Path) -> bool:
    """Return whether a run can start at `path`: nothing is there, or only what a killed process left."""
    lock = RunFolder(path).lock_path
    return not path.exists() or (path.is_dir() and all(is_leftover(each) or each == lock for each in path.iterdir()))


def _refuse_occupied(run: RunFolder) -> None:
    if _is_free(run.path):
        return
    what, next_step = "the folder is not empty, and no run is ever overwritten", "name another folder"
    if run.recipe_path.is_file():
        what, next_step = "there is a run in it, and no run is ever overwritten", f"{run.resume_command} continues it"
        next_step += "; for a new run name another folder"
    raise UserInputError(what, where=f"--output {run.path}", next_step=next_step)


def _remove(run: RunFolder, made: Iterable[Path]) -> None:
    """Remove what `new_run` made, inner folders first, and nothing that something else has been put in."""
    with suppress(OSError):  # Windows removes no open file; what is left is no hindrance
        for path in run.path.iterdir():  # the lock, and what `write_atomically` left
            path.unlink()
        for folder in made:
            folder.rmdir()


def dated(recipe: Recipe) -> Recipe:
    """Return `recipe` with `data.date`, by default today.

    It is part of a run's recipe so that the prompts are the same ones when the run is resumed, evaluated or exported.
    """
    return recipe.with_values({"data.date": recipe.data.date or datetime.date.today()})


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys with another value, sorted; a missing key has the value None."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def flat(table: Mapping[Any, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return path -> value for every value of nested tables; a path is the keys, joined by `separator`."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        path = f"{prefix}{key}"
        found |= flat(value, separator, path + separator) if isinstance(value, Mapping) else {path: value}
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Set[str] = frozenset()) -> list[str]:
    """Return `KEY was VALUE and is VALUE` for each key with another value, sorted by key."""
    keys = [key for key in changed_keys(before, now) if key not in ignored]
    return [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys]


def is_leftover(path: Path) -> bool:
    """Return whether `path` is left over from a `write_atomically` that was killed or found the disk full."""
    return path.name.startswith(".") and path.name.endswith(".partial") and path.is_file()


def start_files(run: RunFolder, recipe: Recipe, device: torch.device) -> list[str]:
    """Write recipe.toml and, once, environment.json; return how this environment differs from the one there."""
    write_atomically(run.recipe_path, f"{KEY} = {FORMAT}\n\n{dump_recipe(recipe)}")
    now = environment(device)
    if not run.environment_path.is_file():
        write_json(run.environment_path, now)
    return differences(flat(read_json(run.environment_path)), flat(now))


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
    """Append one JSON line, with the version of its format.

    Appends nothing if the disk is full: half a line would spoil the one after it.
    """
    # A server may send half a surrogate pair, which UTF-8 cannot hold; written as \\ud800 it is JSON's escape for it.
    line = json.dumps(stamped(record), ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace") + b"\n"
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(line) != len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_lines(path: Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """Return every line of a JSONL file. Raises CheckpointError for a line that is not a JSON object.

    If the file is `growing`, a last line without its end is left out: a run is writing it, or was killed meanwhile.
    """
    with reading(path):
        # Not str.splitlines: it also splits at separators that answers may contain.
        *lines, last = path.read_bytes().split(b"\n")
    lines += [] if growing else [last]
    records = []
    for number, line in enumerate(lines, 1):
        if line:
            with reading(path, f"line {number}"):
                records.append(checked(json.loads(line.decode()), path))
    return records


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, with the version of its format."""
    write_atomically(path, json.dumps(stamped(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_files(folder: Path, pattern: str) -> dict[str, bytes]:
    """Return the content of the files that match `pattern` by their path in `folder`, without hidden ones."""
    files = [path for path in folder.glob(pattern) if path.is_file() and path.name[0] != "."]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `read_files` returned to another folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


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
            with reading(path, f"line {number}"):
                kept += [line.decode() + "\n"] if keep(checked(record, path)) else []
        elif line and number < len(lines):
            next_step = "restore the file, or start a new run in another folder"
            raise CheckpointError(f"line {number} is damaged", where=str(path), next_step=next_step)
    write_atomically(path, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`; after a crash it holds either the old content or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # in a stranger's run folder it may be a link to another file
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
