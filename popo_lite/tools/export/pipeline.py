"""Export a run folder to a folder that others can load; it appears only when it is complete and checked."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from popo_lite.errors import CheckpointError, ExportError, UserInputError
from popo_lite.policy.adapters import ADAPTER_FILE, adapter_folder
from popo_lite.policy.load import load_tokenizer, pick_device
from popo_lite.policy.trained import load_trained_policy
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.export.card import CARD_FILE, is_local, known_as, model_card
from popo_lite.tools.export.merge import load_merged, load_unmerged, merge, write_merged, write_tokenizer
from popo_lite.tools.export.verify import (
    Answerer,
    Progress,
    Trained,
    Verification,
    ask_trained,
    compare,
    differences,
    refuse_beyond_rounding,
    silent,
)
from popo_lite.types import Problem

NOT_WRITABLE = (errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)
CONFIG_FILE = "adapter_config.json"
REPORT_FILE = "export.json"
UNMERGED_ANSWERS = 4
"""Answers on which the merge itself is checked, on the CPU, where the policy was trained on another base."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What lies in `folder`. `dtype` and `verification` belong to merged models.

    `reused` is True if the folder existed already and was left unchanged.
    """

    folder: Path
    what: str
    weights: str
    base: str
    dtype: str | None
    adapter_sha256: str
    verification: Verification | None = None
    reused: bool = False

    @property
    def files(self) -> dict[str, int]:
        """Bytes of every file in the folder."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}

    def made_from(self) -> dict[str, Any]:
        """What the folder's content follows from, as plain data: equal for two exports of the same thing."""
        return {key: getattr(self, key) for key in ("what", "weights", "base", "dtype", "adapter_sha256")}

    def as_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {**asdict(self), "folder": str(self.folder), "files": self.files}


def export_run(
    run: RunFolder,
    *,
    what: str = "merged",
    weights: str = "policy",
    output: Path | None = None,
    dtype: str | None = None,
    prompts: int = 32,
    reuse: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """Write the run's model to `output` (default `RUN/export/<what>-<weights>`) and describe it in a model card.

    `what` is "merged" or "adapter", `weights` "policy" or "siamese", `dtype` the precision of a merged model (default:
    the recipe's). A merged model is loaded again and compared with the trained policy on `prompts` prompts of the
    run's task, at most `eval.problems`. With `reuse`, an earlier export of the same adapter in `output` is returned.

    Raises CheckpointError for a run that has not ended, UserInputError if `output` is not empty, and ExportError
    if the merged model is not the trained policy; nothing is left behind then.
    """
    recipe = run.recipe()
    if not run.summary_path.is_file():
        raise CheckpointError(
            "the run has not ended, so there is nothing to export yet",
            where=str(run.path),
            next_step=f"popo-lite train {run.recipe_path} --resume --output {run.path}",
        )
    adapter = adapter_folder(run.trained_adapter(weights), key="run folder")
    precision = (dtype or recipe.model.dtype) if what == "merged" else None
    report = ExportReport(
        folder=output if output is not None else run.path / "export" / f"{what}-{weights}",
        what=what,
        weights=weights,
        base=known_as(recipe.model.id),
        dtype=precision,
        adapter_sha256=_sha256(adapter / ADAPTER_FILE),
    )
    if report.folder.exists() and not (report.folder.is_dir() and not any(report.folder.iterdir())):
        found = _earlier(report) if reuse else None
        if found is None:
            raise UserInputError(
                "the folder is not empty, and no export is ever overwritten",
                where=str(report.folder),
                next_step="remove it, or name another one with --output",
            )
        return found

    with _complete_folder(report.folder) as folder:
        if precision is None:
            _export_adapter(recipe, adapter, folder)
        else:
            verification = _export_merged(_for_export(recipe, adapter), adapter, folder, precision, prompts, progress)
            report = replace(report, verification=verification)
        summary = json.loads(run.summary_path.read_text(encoding="utf-8"))
        card = model_card(recipe, summary, weights=weights, dtype=precision, verification=report.verification)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        content = report.made_from() | {"verification": asdict(report)["verification"]}
        (folder / REPORT_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


def _for_export(recipe: Recipe, adapter: Path) -> Recipe:
    """Return the recipe without what only training needs.

    The adapter that training started from need not exist any more. unsloth is not
    needed: its adapters are PEFT's, and the merged model is compared as plain transformers runs it.
    """
    return recipe.with_values(
        {
            "model.backend": "transformers",
            "lora.init_from": str(adapter),
            "train.device": "cpu" if recipe.train.device == "cpu" else "auto",
            "train.gradient_checkpointing": False,
        }
    )


def _export_merged(
    recipe: Recipe, adapter: Path, folder: Path, dtype: str, prompts: int, progress: Progress
) -> Verification:
    """Run policy, merge and merged model one after the other, so that only one of them is in memory."""
    problems = _problems(recipe, prompts)
    trained = _ask_trained(recipe, adapter, problems, progress)
    _free_memory()
    same_base = recipe.model.quantization == "none" and recipe.model.dtype == dtype
    checked = slice(0 if same_base else UNMERGED_ANSWERS)
    with progress("merging on the CPU", None):
        model = load_unmerged(recipe.model, adapter, dtype)
        beside = Answerer.of_model(model.get_base_model(), pad_id=trained.pad_id)
        unmerged = beside.logps(trained.prompts[checked], trained.answers[checked])
        write_merged(merge(model), folder, trained.stop_ids)
        write_tokenizer(load_tokenizer(recipe.model), folder, recipe.data.chat_template)
    del model, beside
    _free_memory()
    _refuse_other_tokens(recipe, folder, problems, trained)
    found, logps = compare(load_merged(folder, recipe.model, pick_device(recipe.train.device)), trained, progress)
    if same_base:
        mean, worst, parting = found.mean_difference, found.worst_difference, found.widest_parting
    else:
        # The policy was trained on other base weights, so a difference is expected. Compare the merge with
        # the same base and an unmerged adapter instead.
        (mean, worst), parting = differences(unmerged, logps[checked]), 0.0
    refuse_beyond_rounding(dtype, mean=mean, worst=worst, parting=parting)
    return found


def _problems(recipe: Recipe, count: int) -> list[Problem]:
    """Return problems held out from training, or training problems if the run held none out."""
    train, evaluation = open_tasks(recipe)
    if recipe.eval.problems:
        return evaluation.held_out(min(count, recipe.eval.problems))
    return [train.train_problem(recipe.train.seed, index) for index in range(count)]


def _ask_trained(recipe: Recipe, adapter: Path, problems: Sequence[Problem], progress: Progress) -> Trained:
    with progress("loading the trained policy", None):
        policy = load_trained_policy(recipe, adapter)
    renderer = Renderer.of(recipe, policy.tokenizer)
    prompts = [renderer.token_ids(problem) for problem in problems]
    return ask_trained(policy, prompts, recipe.rollout.max_completion_length, progress)


def _refuse_other_tokens(recipe: Recipe, folder: Path, problems: Sequence[Problem], trained: Trained) -> None:
    """Raise ExportError if the folder's tokenizer and chat template make other prompts than in training."""
    tokenizer = load_tokenizer(recipe.model.with_values({"id": str(folder), "revision": None}))
    renderer = replace(Renderer.of(recipe, tokenizer), chat_template=None)
    for problem, prompt in zip(problems, trained.prompts, strict=True):
        if renderer.token_ids(problem) != prompt:
            raise ExportError(
                "the exported tokenizer makes other tokens of a prompt than the trained policy's",
                where=f"problem {problem.id}",
                next_step="this is a bug: please report it with the model's name",
            )


def _export_adapter(recipe: Recipe, adapter: Path, folder: Path) -> None:
    """Copy the adapter and write the tokenizer; its config names no local folder."""
    shutil.copyfile(adapter / ADAPTER_FILE, folder / ADAPTER_FILE)
    config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None if is_local(recipe.model.id) else recipe.model.id
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tokenizer(load_tokenizer(recipe.model), folder, recipe.data.chat_template)


@contextmanager
def _complete_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill. It becomes `target` when the block ends, and is removed if the block raises."""
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it was never made, or somebody else put something into it
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            raise ExportError(
                f"the export could not be written: {error.strerror}",
                where=str(target),
                next_step="name a folder with enough space that can be written to with --output",
            ) from error
        raise


def _earlier(wanted: ExportReport) -> ExportReport | None:
    """Return the finished export of the same adapter in the folder, or None."""
    path = wanted.folder / REPORT_FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if {key: content.get(key) for key in wanted.made_from()} != wanted.made_from():
        return None
    verification = content["verification"]
    return replace(wanted, verification=Verification(**verification) if verification else None, reused=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_memory() -> None:
    """Free the last model's memory; modules and hooks refer to one another, so the collector is needed."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
