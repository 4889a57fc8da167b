"""Export a run folder to a folder that others can load; it appears only when it is complete and checked.

An adapter is merged into its base in 16 or 32 bit: quantising the sum to 4 bits would lose part of what was learned.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from popo_lite.errors import ExportError, UserInputError
from popo_lite.policy.adapters import ADAPTER_FILE, adapter_folder
from popo_lite.policy.load import load_base, load_tokenizer, pick_device
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import load_trained_policy
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.export import verify
from popo_lite.tools.export.card import is_local, known_as, model_card

NOT_WRITABLE = (errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)
REPORT_FILE = "export.json"
UNMERGED_ANSWERS = 4
"""Answers on which the merge itself is checked, on the CPU, where the policy was trained on another base."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Describe an export. `dtype` and `verification` are None for an adapter; `reused` says that it existed before."""

    folder: Path
    what: str
    weights: str
    base: str
    dtype: str | None
    adapter_sha256: str
    verification: dict[str, Any] | None = None
    reused: bool = False

    @property
    def files(self) -> dict[str, int]:
        """Bytes of every file in the folder."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}

    def content(self) -> dict[str, Any]:
        """Return the content of export.json."""
        return {key: value for key, value in asdict(self).items() if key not in ("folder", "reused")}


def export_run(
    run: RunFolder,
    *,
    what: str = "merged",
    weights: str = "policy",
    output: Path | None = None,
    dtype: str | None = None,
    prompts: int = 32,
    reuse: bool = False,
    progress: verify.Progress = lambda *_: nullcontext(lambda _: None),
) -> ExportReport:
    """Write the run's model to `output` (default `RUN/export/<what>-<weights>`) and describe it in a model card.

    `what` is "merged" or "adapter", `weights` "policy" or "siamese", `dtype` the precision of a merged model (default:
    the recipe's). A merged model is loaded again and compared with the trained policy on `prompts` prompts of the
    run's task, at most `eval.problems`. With `reuse`, an earlier export of the same adapter in `output` is returned.

    Raises CheckpointError for a run that has not ended, UserInputError for an unknown `what` or `weights` or if
    `output` is not empty, and ExportError if the merged model is not the trained policy; nothing is left behind then.
    """
    if what not in ("merged", "adapter"):
        raise UserInputError(f'there is no export "{what}"', where="what", next_step='use "merged" or "adapter"')
    recipe = run.recipe()
    adapter = adapter_folder(run.trained_adapter(weights), key="run folder")
    report = ExportReport(
        folder=output if output is not None else run.path / "export" / f"{what}-{weights}",
        what=what,
        weights=weights,
        base=known_as(recipe.model.id),
        dtype=(dtype or recipe.model.dtype) if what == "merged" else None,
        adapter_sha256=hashlib.sha256((adapter / ADAPTER_FILE).read_bytes()).hexdigest(),
    )
    if report.folder.is_file() or (report.folder.is_dir() and any(report.folder.iterdir())):
        path = report.folder / REPORT_FILE
        earlier = json.loads(path.read_text(encoding="utf-8")) if reuse and path.is_file() else {}
        if report.content() != earlier | {"verification": None}:
            what, instead = "the folder is not empty", "remove it, or name another one with --output"
            raise UserInputError(what, where=str(report.folder), next_step=instead)
        return replace(report, verification=earlier["verification"], reused=True)

    with _complete_folder(report.folder) as folder:
        tokenizer: Any = load_tokenizer(recipe.model)
        tokenizer.chat_template = recipe.data.chat_template or tokenizer.chat_template
        tokenizer.save_pretrained(str(folder))
        if report.dtype is None:
            shutil.copyfile(adapter / ADAPTER_FILE, folder / ADAPTER_FILE)
            config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = None if is_local(recipe.model.id) else recipe.model.id
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        else:
            verification = _export_merged(recipe, adapter, folder, report.dtype, prompts, progress)
            report = replace(report, verification=verification)
        summary = json.loads(run.summary_path.read_text(encoding="utf-8"))
        card = model_card(recipe, summary, weights=weights, dtype=report.dtype, verification=report.verification)
        (folder / "README.md").write_text(card, encoding="utf-8")
        content = json.dumps(report.content(), indent=2, allow_nan=False) + "\n"
        (folder / REPORT_FILE).write_text(content, encoding="utf-8")
    return report


def _export_merged(
    recipe: Recipe, adapter: Path, folder: Path, dtype: str, prompts: int, progress: verify.Progress
) -> dict[str, Any]:
    """Write the merged model beside its tokenizer and compare it with the policy. Only one model is in memory."""
    # Without what only training needs. unsloth's adapters are PEFT's, and are compared as plain transformers runs them.
    device = "cpu" if recipe.train.device == "cpu" else "auto"
    plain = {"model.backend": "transformers", "train.device": device, "train.gradient_checkpointing": False}
    recipe = recipe.with_values(plain)
    train, held_out = open_tasks(recipe)
    problems = held_out.held_out(min(prompts, recipe.eval.problems))
    problems = problems or [train.train_problem(recipe.train.seed, index) for index in range(prompts)]
    with progress("loading the trained policy", None):
        policy = load_trained_policy(recipe, adapter)
    renderer, limit = Renderer(recipe, policy.tokenizer), recipe.rollout.max_completion_length
    trained = verify.ask_trained(policy, list(map(renderer.token_ids, problems)), limit, progress)
    del policy
    release_memory()
    same_base = recipe.model.quantization == "none" and recipe.model.dtype == dtype
    checked = slice(0 if same_base else UNMERGED_ANSWERS)
    with progress("merging on the CPU", None):
        model = load_unmerged(recipe, adapter, dtype)
        unmerged = verify.log_probs(model.get_base_model(), trained.prompts[checked], trained.answers[checked])
        write_merged(model, folder, trained.stop_ids)
    del model
    release_memory()
    written = recipe.model.with_values({"id": str(folder), "revision": None, "quantization": "none", "dtype": dtype})
    renderer = Renderer(recipe.with_values({"data.chat_template": None}), load_tokenizer(written))
    for problem, prompt in zip(problems, trained.prompts, strict=True):
        if renderer.token_ids(problem) != prompt:
            what = "the exported tokenizer makes other tokens of a prompt than the trained policy's"
            raise ExportError(what, where=f"problem {problem.id}", next_step=verify.REPORT_IT)
    found, logps = verify.compare(load_base(written, pick_device(device)), trained, limit, progress)
    figures: Any = (found[key] for key in ("mean_difference", "worst_difference", "widest_parting"))
    # On other base weights than the trained ones a difference is expected. Compare the merge with the same base and
    # an unmerged adapter instead.
    verify.refuse_beyond_rounding(dtype, *(figures if same_base else verify.differences(unmerged, logps[checked])))
    return found


def load_unmerged(recipe: Recipe, adapter: Path, dtype: str) -> Any:
    """Return the base in `dtype` with an unmerged adapter, on the CPU. Raises ExportError if it is stored quantised."""
    plain = {"model.quantization": "none", "model.dtype": dtype, "train.device": "cpu", "train.packing": False}
    if recipe.model.attn_implementation == "flash_attention_2":
        plain["model.attn_implementation"] = "sdpa"
    model = load_trained_policy(recipe.with_values(plain), adapter).model
    if getattr(model.config, "quantization_config", None) is not None:
        what = f"{recipe.model.id} is stored quantised, so there is no 16-bit base to merge into"
        next_step = "export the adapter (--what adapter), or train on the base that it was quantised from"
        raise ExportError(what, where="model.id", next_step=next_step)
    return model


def write_merged(adapted: Any, folder: Path, stop_ids: frozenset[int]) -> None:
    """Merge the adapter in place and write the model with these stop ids. Raises ExportError if a sum is not finite."""
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        next_step = "try --dtype float32, or --weights siamese if training diverged at its end"
        raise ExportError(f"the adapter cannot be merged: {error}", next_step=next_step) from error
    config = model.generation_config
    config.eos_token_id = sorted(stop_ids) if len(stop_ids) > 1 else min(stop_ids)
    try:
        config.validate(strict=True)
    except ValueError:
        # Some bases name a temperature and not do_sample. transformers reads such a file and refuses to write it.
        config.do_sample = True
    try:
        model.save_pretrained(str(folder), max_shard_size="5GB")
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, str(error)) from error


@contextmanager
def _complete_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill. It becomes `target` when the block ends, and is removed if the block raises."""
    target = target.absolute()
    parent = next(parent for parent in target.parents if parent.exists())
    partial = parent / f".{'-'.join(target.relative_to(parent).parts)}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        yield partial
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(target)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        what = f"the export could not be written: {error.strerror}"
        next_step = "name a folder with enough space that can be written to with --output"
        raise ExportError(what, where=str(target), next_step=next_step) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
