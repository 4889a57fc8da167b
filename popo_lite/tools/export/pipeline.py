"""Export a run folder to a folder that others can load; it appears only when it is complete and checked.

An adapter is merged into the base that it was trained on. If that was quantised, the adapter also learned to correct
the rounding of its weights, and would shift the original weights by as much.
"""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from popo_lite.conversation import RolloutWorker
from popo_lite.errors import ExportError, ModelError, UserInputError
from popo_lite.evaluation import evaluate, fitting, held_out
from popo_lite.grading import Grader
from popo_lite.policy.adapters import adapter_folder
from popo_lite.policy.gguf import convert_gguf
from popo_lite.policy.load import load_config, load_tokenizer, write_dequantized_base
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy, load_policy, load_trained_policy
from popo_lite.policy.tokens import open_renderer
from popo_lite.recipe import LoraRecipe, ModelRecipe, Recipe
from popo_lite.run_folder import RunFolder, checkpoint_step
from popo_lite.samplers.hf import HFSampler
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.console.output import notify
from popo_lite.tools.export import EXPORTS, REPORT_FILE, adapter_hash, verify
from popo_lite.tools.export.folder import (
    ExportReport,
    complete_folder,
    describe,
    save_tokenizer,
    write_adapter,
)
from popo_lite.tools.export.gguf import BLOCK_KINDS, EXACT_KINDS, GGUF_KINDS, check_gguf, modelfile, write_gguf
from popo_lite.tools.export.merge import BASES, load_unmerged, merge, write_model
from popo_lite.tools.public import known_as
from popo_lite.trust import GRADING_CODE, MODEL_CODE, refuse_untrusted
from popo_lite.types import EvalResult

UNMERGED_ANSWERS = 4
"""Answers on which the merge itself is checked, on the CPU, if the policy was trained on another base."""
OTHER_BASE_BYTES = 2**30
"""Size of the written weights up to which an export also measures a merge into the other base."""


def export_run(
    run: RunFolder,
    *,
    what: str = "merged",
    weights: str = "policy",
    output: Path | None = None,
    base: str = "trained",
    dtype: str | None = None,
    gguf: str | None = None,
    prompts: int = 32,
    problems: int | None = None,
    checkpoint: int | str | None = None,
    trust: bool = False,
    progress: verify.Progress = lambda *_: nullcontext(lambda _: None),
) -> ExportReport:
    """Write the run's model to `output` and describe it in its card; `popo_lite.export` has the same options.

    A merged model is loaded again and compared with the trained policy: greedily on `prompts` prompts of the run's
    task, at most `eval.problems`, and in pass@1 on `problems` held-out problems (default: `eval.problems`).

    Raises CheckpointError if there is no such checkpoint, UserInputError for code that is not trusted, for an unknown
    option or one that does not go with `what`, or if `output` is not empty, and ExportError if the merged model is not
    the trained policy; nothing is left behind then. An ExportError of the card alone leaves the complete export.
    """
    _check_options(what, base, dtype, gguf, prompts, problems)
    recipe = run.recipe()
    refuse_untrusted(recipe, run.path, trust, only=MODEL_CODE if what == "adapter" else GRADING_CODE)
    found = run.find_checkpoint(checkpoint)
    for notice in run.notices(checkpoint, found):
        notify(notice)
    step, summary = None if found is None else checkpoint_step(found), run.summary(found)
    adapter = adapter_folder(run.trained_adapter(weights, found), key="run folder")
    name = f"{gguf or what}-{weights}{'' if step is None else f'-step-{step}'}"
    report = ExportReport(
        folder=output if output is not None else run.path / EXPORTS / name,
        checkpoint=step,
        of_steps=None if step is None else recipe.train.steps,
        what=what,
        gguf=gguf,
        weights=weights,
        base=known_as(recipe.model.id),
        dtype=(dtype or ("float32" if gguf else recipe.model.dtype)) if what == "merged" else None,
        merged_into=_merged_into(base, recipe.model) if what == "merged" else None,
        adapter_sha256=adapter_hash(adapter),
    )
    if report.folder.is_file() or (report.folder.is_dir() and any(report.folder.iterdir())):
        next_step = "remove it, or name another one with --output"
        if (report.folder / REPORT_FILE).is_file():
            next_step += (
                f"; or upload the export that is in it: popo-lite push {shlex.quote(str(report.folder))} USER/NAME"
            )
        raise UserInputError("the folder is not empty", where=str(report.folder), next_step=next_step)
    with complete_folder(report.folder) as folder:
        if report.dtype is None:
            save_tokenizer(recipe, folder)
            write_adapter(recipe, adapter, folder)
        else:
            verification = _export_merged(recipe, adapter, folder, report, prompts, problems, progress)
            report = replace(report, verification=verification)
        failure = describe(folder, report, recipe, summary)
    if failure is not None:
        what = f"the model is exported, but its card could not be written: {type(failure).__name__}: {failure}"
        where = str(report.folder / "README.md")
        raise ExportError(what, where=where, next_step=f"write it yourself; {verify.REPORT_IT}") from failure
    return report


def _check_options(
    what: str, base: str, dtype: str | None, gguf: str | None, prompts: int, problems: int | None
) -> None:
    """Raise UserInputError for an unknown value, or one that does not go with `what`."""
    if prompts < 1 or (problems or 0) < 0:
        where = f"prompts = {prompts}, problems = {problems}"
        raise UserInputError("is too small", where=where, next_step="use at least 1 prompt and 0 problems")
    for name, noun, value, known in (
        ("what", "export", what, ("merged", "adapter")),
        ("base", "base", base, BASES),
        ("dtype", "precision", dtype or "float32", verify.ROUNDING),
        ("gguf", "GGUF type", gguf or "f32", GGUF_KINDS),
    ):
        if value not in known:
            next_step = f"use one of {', '.join(known)}"
            raise UserInputError(f'there is no {noun} "{value}"', where=name, next_step=next_step)
    merged_only = {
        "dtype": (dtype, "an adapter is copied as it was trained"),
        "gguf": (gguf, "a GGUF file of an adapter alone would not be checked"),
        "base original": (base == "original", "an adapter is loaded on the base that it was trained on"),
    }
    for name, (given, why) in merged_only.items():
        if what == "adapter" and given:
            error = f"--{name} is for merged models; {why}"
            raise UserInputError(error, where="--what adapter", next_step=f"leave --{name} out")


def _merged_into(base: str, model: ModelRecipe) -> str:
    """Return `base`, or "trained" if there is only one. Raises ExportError if there is no original one."""
    stored = is_stored_quantized(model)
    if stored and base == "original":
        what = f"{model.id} is stored in 4 bits and has no original weights to merge into"
        raise ExportError(what, where="--base original", next_step="--base trained merges into these, dequantised")
    return base if stored or model.quantization != "none" else "trained"


def _export_merged(
    recipe: Recipe,
    adapter: Path,
    folder: Path,
    report: ExportReport,
    prompts: int,
    problems: int | None,
    progress: verify.Progress,
) -> dict[str, Any]:
    """Write the merged model and compare it with the policy. Only one model is in memory."""
    # Without what only training needs. unsloth's adapters are PEFT's, and are compared as plain transformers runs them.
    device = "cpu" if recipe.train.device == "cpu" else "auto"
    plain = {"model.backend": "transformers", "train.device": device, "train.gradient_checkpointing": False}
    batch = min(verify.BATCH, recipe.rollout.max_num_seqs)  # the memory plan counts on it
    plain |= {"train.packing": False, "rollout.max_num_seqs": batch}
    recipe = recipe.with_values(plain | {"eval.samples_per_problem": 1})
    opened = open_renderer(recipe).opens_thinking
    with (
        Grader(recipe.grading, thinking_open=opened) as grader,
        TemporaryDirectory(dir=folder, prefix=".") as temporary,
    ):
        check, scratch = _Check(recipe, prompts, problems, grader, progress), Path(temporary)
        if report.gguf:
            save_tokenizer(recipe, scratch)
            check_gguf(load_config(recipe.model).to_dict(), scratch, report.gguf)
        with progress("loading the trained policy", None):
            policy = load_trained_policy(recipe, adapter)
        generation = policy.model.get_base_model().generation_config  # the check replaces it
        bases = _bases(recipe.model, policy, report, scratch / "base")
        if policy.quantized_modules and "trained" in bases:
            write_dequantized_base(policy, scratch / "base")
        check.ask(policy)
        del policy
        release_memory()
        found: list[dict[str, Any]] = []
        dtype = str(report.dtype)
        for name, base in bases.items():
            target = scratch / "merged" if found or report.gguf else folder
            with progress(f"merging into the {name} base on the CPU", None):
                unmerged = _merge(check, base, adapter, target, dtype, generation)
            if report.gguf:
                with progress(f"writing and reading the {report.gguf} file", None):
                    target = _through_gguf(check, report, target, folder, scratch / "read")
            figures, logps = check.compare(target, dtype)
            if not found and report.gguf not in BLOCK_KINDS:  # the one that is kept, if only rounding changes it
                stored = EXACT_KINDS.get(report.gguf or "", dtype)
                _refuse_other_model(name, figures, verify.coarser(stored, dtype), recipe.model.dtype, unmerged, logps)
            found.append(figures | {"merged_base": name})
    return found[0] | ({"other_base": found[1]} if found[1:] else {})


def _bases(model: ModelRecipe, policy: Policy, report: ExportReport, dequantized: Path) -> dict[str, ModelRecipe]:
    """Return the base to merge into by name and, if the base was quantised and is small, after it the other one."""
    if not policy.quantized_modules:
        return {"trained": model}
    bases = {
        "trained": model.with_values({"id": str(dequantized), "revision": None, "quantization": "none"}),
        "original": model.with_values({"quantization": "none", "dtype": report.dtype}),
    }
    wanted = str(report.merged_into)
    base: Any = policy.model.get_base_model()
    size = base.num_parameters() * getattr(torch, str(report.dtype)).itemsize
    if report.gguf or size > OTHER_BASE_BYTES or is_stored_quantized(model):
        return {wanted: bases[wanted]}
    return {wanted: bases.pop(wanted)} | bases


def _through_gguf(check: _Check, report: ExportReport, merged: Path, folder: Path, read: Path) -> Path:
    """Write the model in `merged` to `folder` as a GGUF file with a Modelfile; return `read`, made from that file."""
    recipe, file = check.recipe, folder / f"model-{report.gguf}.gguf"
    write_gguf(merged, file, str(report.gguf), name=f"{report.base}, {recipe.objective.algorithm}")
    tokenizer = load_tokenizer(recipe.model.with_values({"id": str(merged), "revision": None}))
    text = modelfile(tokenizer, file.name, recipe, check.trained.stop_ids)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    try:
        convert_gguf(file, read, str(report.dtype))
    except ModelError as error:
        raise ExportError(f"the written file cannot be read: {error.what}", next_step=verify.REPORT_IT) from error
    return read


def is_stored_quantized(model: ModelRecipe) -> bool:
    """Return True if the base's own files are in 4 bits."""
    return getattr(load_config(model), "quantization_config", None) is not None


class _Check:
    """The trained policy's answers to problems of its task, to compare merged models with."""

    trained: verify.Trained
    result: EvalResult | None

    def __init__(
        self, recipe: Recipe, prompts: int, problems: int | None, grader: Grader, progress: verify.Progress
    ) -> None:
        """Choose the problems to ask and to measure pass@1 on. Raises DataError if fewer are held out."""
        self.recipe, self.grader, self.progress = recipe, grader, progress
        train, self.task = open_tasks(recipe)
        asked = self.task.held_out(min(prompts, recipe.eval.problems))
        self.asked = asked or [train.train_problem(recipe.train.seed, index) for index in range(prompts)]
        self.held_out = held_out(self.task, recipe, problems)
        grader.check(self.held_out)

    def ask(self, policy: Policy) -> None:
        """Let the trained policy answer: greedily, and once to each held-out problem."""
        renderer, limit = Renderer(self.recipe, policy.tokenizer), self.recipe.rollout.max_completion_length
        self.trained = verify.ask_trained(policy, list(map(renderer.token_ids, self.asked)), limit, self.progress)
        self.held_out = fitting(self.held_out, renderer, self.recipe)
        self.result = self.measure("trained policy", self.recipe, policy)

    def measure(self, name: str, recipe: Recipe, policy: Policy) -> EvalResult | None:
        """Return pass@1 on the held-out problems, if there are any. Draws depend on the recipe's seed and problem."""
        if not self.held_out:
            return None
        renderer = Renderer(recipe, policy.tokenizer, stop_ids=policy.stop_ids)
        with (
            HFSampler(policy, recipe, text=renderer.text) as sampler,
            self.progress(f"pass@1 of the {name}", len(self.held_out)) as done,
        ):
            worker = RolloutWorker(recipe=recipe, renderer=renderer, sampler=sampler, grader=self.grader)
            seed = recipe.train.seed
            return evaluate(name, worker, policy.version, self.task, self.held_out, seed=seed, progress=done)

    def compare(self, folder: Path, dtype: str) -> tuple[dict[str, Any], list[Tensor]]:
        """Load the model in `folder`; return the figures and its log-probs of the policy's answers."""
        written = {"id": str(folder), "revision": None, "quantization": "none", "dtype": dtype}
        values = {"model": self.recipe.model.with_values(written), "data.chat_template": None, "lora": LoraRecipe()}
        recipe = self.recipe.with_values(values)
        renderer = Renderer(recipe, load_tokenizer(recipe.model))
        for problem, prompt in zip(self.asked, self.trained.prompts, strict=True):
            if renderer.token_ids(problem) != prompt:
                what = "the exported tokenizer makes other tokens of a prompt than the trained policy's"
                raise ExportError(what, where=f"problem {problem.id}", next_step=verify.REPORT_IT)
        policy = load_policy(recipe)
        policy.model.eval()
        base: Any = policy.model.get_base_model()
        with policy.model.disable_adapter():
            found, logps = verify.compare(base, self.trained, recipe.rollout.max_completion_length, self.progress)
            result = self.measure("merged model", recipe, policy)
            found["pass_at_1"] = verify.pass_rates(self.result, result) if self.result and result else None
        del policy, base
        release_memory()
        return found, logps


def _merge(check: _Check, base: ModelRecipe, adapter: Path, folder: Path, dtype: str, generation: Any) -> list[Tensor]:
    """Write the merged model and its tokenizer; return the log-probs of a few answers before the merge."""
    trained, checked = check.trained, slice(UNMERGED_ANSWERS)
    adapted = load_unmerged(check.recipe, base, adapter)
    unmerged = verify.log_probs(adapted.get_base_model(), trained.prompts[checked], trained.answers[checked])
    save_tokenizer(check.recipe, folder)
    write_model(merge(adapted, dtype), folder, generation, trained.stop_ids)
    return unmerged


def _refuse_other_model(
    base: str, figures: dict[str, Any], dtype: str, trained_dtype: str, unmerged: list[Tensor], logps: list[Tensor]
) -> None:
    """Raise ExportError if merging changed more than rounding explains."""
    if base == "trained":
        coarser = verify.coarser(dtype, trained_dtype)
        differences = (figures[key] for key in ("mean_difference", "worst_difference", "widest_parting"))
        verify.refuse_beyond_rounding(coarser, *differences)
    else:
        # From the policy, other base weights differ. Compare with the same base and an unmerged adapter instead.
        verify.refuse_beyond_rounding(dtype, *verify.differences(unmerged, logps[:UNMERGED_ANSWERS]))
