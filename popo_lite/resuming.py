"""Decide which keys of the recipe may change when a run is resumed. Free of torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from popo_lite.errors import CheckpointError, PopoError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import flatten, load_recipe, to_toml
from popo_lite.run_folder import RunFolder, changed_keys, checkpoint_folders
from popo_lite.trust import refuse_untrusted

Change = dict[str, Any]
"""`key`, its value `before` and `now`; None is unset. The trainer adds the `step` from which it holds."""

FREE = "free"
"""Changes speed, bookkeeping and rounding, but not what is learned."""
NOTED = "noted"
"""Changes what is learned from here on: allowed, and recorded in the log, the checkpoints and summary.json."""

_BASE = "the adapter belongs to the base as it was"
_WEIGHTS = "the saved weights would not fit, or would mean something else"
_START = "it is read only at the start of a run"
_PROMPTS = "answers from before and after the change could not be compared, because the prompts differ"
_GRADES = "answers from before and after the change could not be compared, because they are graded differently"
_MEASURE = "the evaluations before and after training could not be compared"
_LEVELS = "the saved level belongs to these levels"


def _keys(rule: str, section: str, names: str) -> dict[str, str]:
    return dict.fromkeys((f"{section}.{name}" for name in names.split()), rule)


RULES: Mapping[str, str] = {
    **_keys(_BASE, "model", "id revision quantization double_quantization dtype"),
    **_keys(NOTED, "model", "backend attn_implementation trust_remote_code"),
    **_keys(_WEIGHTS, "lora", "rank alpha target_modules rslora dora"),
    **_keys(NOTED, "lora", "dropout"),
    **_keys(_START, "lora", "init_from"),
    **_keys(_WEIGHTS, "siamese", "head_width"),
    **_keys(NOTED, "siamese", "tau"),
    **_keys("the losses of before and after belong to different methods", "objective", "algorithm"),
    **_keys(NOTED, "objective", "normalizer importance_sampling_clip_max skip_all_right similarity_coef weights "
            "weight_temperature weights_from target noise_sigma entropy_over entropy_coef target_entropy "
            "entropy_coef_gain negative_weight scale_rewards loss_type epsilon epsilon_high kl_coef "
            "use_bias_correction_kl"),
    **_keys(NOTED, "rollout", "engine num_generations temperature max_prompt_length max_gap async_level skip_known "
            "explore_ratio"),
    **_keys(FREE, "rollout", "max_num_seqs"),
    **_keys(_MEASURE, "rollout", "max_completion_length"),
    **_keys(NOTED, "rollout.vllm", "base kv_cache_dtype enforce_eager"),
    **_keys(FREE, "rollout.vllm", "gpu_memory_utilization enable_sleep_mode"),
    **_keys(NOTED, "rollout.server", "base_urls urls_file"),
    **_keys(FREE, "rollout.server", "shared_dir allow_http"),
    **_keys(NOTED, "rollout.adaptive", "enabled positives_wanted round_size max_rollouts"),
    **_keys(_PROMPTS, "rollout.environment", "name options max_turns role"),
    # Hashes are compared: changed held-out problems are refused, and changed rows are reported.
    **_keys(NOTED, "data", "dataset config split prompt_column answer_column filter limit tasks digits "
            "overlong_prompts prompts_per_step"),
    **_keys(_PROMPTS, "data", "system_prompt chat_template date"),
    **_keys(_LEVELS, "data.curriculum", "enabled levels column"),
    **_keys(NOTED, "data.curriculum", "low high window"),
    **_keys(_GRADES, "reward", "functions positive_if threshold thinking_tags keep_special_tokens truncated"),
    **_keys(NOTED, "reward", "timeout_seconds max_answer_characters max_ungraded_ratio"),
    **_keys(FREE, "reward", "workers"),
    **_keys("the saved state of the optimizer would not fit", "optimizer", "name"),
    **_keys(NOTED, "optimizer", "learning_rate head_learning_rate schedule warmup_ratio weight_decay max_grad_norm"),
    **_keys("every later draw would be another one", "train", "seed"),
    **_keys(NOTED, "train", "steps device"),
    **_keys(FREE, "train", "cpu_threads tokens_per_microbatch packing shared_prefix logits_mib compile_loss "
            "gradient_checkpointing offload_activations save_steps save_total_limit"),
    **_keys(FREE, "distributed", "strategy"),
    **_keys(_MEASURE, "eval", "dataset config split prompt_column answer_column filter limit tasks problems "
            "samples_per_problem temperature"),
    **_keys(FREE, "eval", "every"),
    **_keys(FREE, "output", "dir samples_per_step report_to project hub_model_id hub_private_repo"),
}  # fmt: skip
"""`section.key` -> FREE, NOTED, or the reason for which it cannot change."""


def free_keys(recipe: Recipe) -> set[str]:
    """Return the keys that change nothing of what is learned."""
    # Dropout masks depend on how the step is split and packed.
    splitting = {"train.tokens_per_microbatch", "train.packing", "train.shared_prefix"}
    # The step after a checkpoint or an evaluation is never sampled ahead.
    boundaries = {"train.save_steps", "eval.every"}
    bound = (splitting if recipe.lora.dropout else set()) | (boundaries if recipe.rollout.async_level else set())
    return {key for key, rule in RULES.items() if rule == FREE} - bound


def resumed_recipe(
    run: RunFolder, overrides: Sequence[str] = (), checkpoint: int | None = None
) -> tuple[Recipe, list[Change]]:
    """Return the run's recipe with `overrides`, as for `load_recipe`, and the changes to record.

    `checkpoint` is the number of steps to go back to. Raises CheckpointError if there is no such checkpoint, a key
    cannot change in a run, or nothing is left to train or to go on from.
    """
    recipe = run.recipe()
    before = flatten(recipe)
    for key, _, value in (override.partition("=") for override in overrides):
        if key.strip() == "objective.algorithm":  # first: the other keys of [objective] depend on it
            refuse_changes(run, before, before | {"objective.algorithm": value.strip(" \"'")})
    recipe = load_recipe(run.recipe_path, overrides, stored=True)
    now = flatten(recipe)
    refuse_changes(run, before, now)
    _refuse_without_steps(run, recipe, checkpoint)
    noted = [key for key in changed_keys(before, now) if key not in free_keys(recipe)]
    return recipe, [{"key": key, "before": before.get(key), "now": now.get(key)} for key in noted]


def refuse_changes(run: RunFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a key has another value that cannot change in a run; it says why."""
    changed = changed_keys(before, now)
    refused = [key for key in changed if RULES[key] not in (FREE, NOTED)]
    if refused:
        reasons = [f"{key} was {before.get(key)!r} and cannot become {now.get(key)!r}: {RULES[key]}" for key in refused]
        options = [word for key in changed for word in ("--set", f"{key}={to_toml(now[key]) if key in now else ''}")]
        command = shlex.join(["popo-lite", "train", str(run.recipe_path), *options])
        if "objective.algorithm" in refused:  # the other keys of [objective] are none of its
            command = "write a recipe for this algorithm; popo-lite recipe list has some"
        raise CheckpointError("; ".join(reasons), where=str(run.recipe_path), next_step=f"start a new run: {command}")


@contextmanager
def resumed_run(
    path: Path, overrides: Sequence[str] = (), checkpoint: int | None = None, *, trust: bool = False
) -> Iterator[tuple[RunFolder, Recipe, dict[str, Any]]]:
    """Lock the run at `path`; yield it, its recipe with `overrides`, and the options of `Trainer.run`.

    Raises CheckpointError if there is no such run, and as `resumed_recipe` does, and UserInputError if another process
    trains it or its code is not trusted. A PopoError of the block says which advice is only for a new run.
    """
    run = RunFolder(path)
    run.recipe()  # before the lock makes a folder
    with run.locked():
        recipe, changes = resumed_recipe(run, overrides, checkpoint)
        refuse_untrusted(recipe, path, trust, overrides=overrides)
        try:
            yield run, recipe, {"resume": True, "changes": changes, "checkpoint": checkpoint}
        except PopoError as error:
            error.next_step = _possible(error.next_step)
            raise


def _possible(next_step: str | None) -> str | None:
    """Return the next step of an error; it says so if it advises what cannot change in a run that has started."""
    advised = re.findall(r"--set ['\"]?([a-z_.]+)=", next_step or "")
    fixed = sorted({key for key in advised if RULES.get(key, FREE) not in (FREE, NOTED)})
    if not fixed or "new run" in (next_step or ""):
        return next_step
    return f"{next_step}\n({', '.join(fixed)}: only in a new run)"


def _refuse_without_steps(run: RunFolder, recipe: Recipe, checkpoint: int | None) -> None:
    """Raise CheckpointError if there is nothing left to train, or nothing to go on from."""
    has_ended = run.summary_path.is_file()
    if checkpoint is not None:
        run.find_checkpoint(checkpoint)
    if has_ended and recipe.train.steps <= (done := run.summary()["steps"] if checkpoint is None else checkpoint):
        next_step = f"{run.resume_command} --set train.steps={2 * done} trains on, to that step"
        raise CheckpointError(f"the run has ended after {done:,} steps", where=str(run.path), next_step=next_step)
    steps = run.metrics_path.read_bytes().count(b"\n") if run.metrics_path.is_file() else 0
    must_have_some = has_ended or steps > run.recipe().train.save_steps
    if must_have_some and not checkpoint_folders(run.checkpoints):
        start = ["popo-lite", "train", str(run.recipe_path)]
        start += ["--set", f"lora.init_from={run.adapter}"] if has_ended else []
        next_step = f"restore them from a backup, or start a new run: {shlex.join(start)}"
        what = "the checkpoints are gone, so the run cannot go on"
        raise CheckpointError(what, where=str(run.checkpoints), next_step=next_step)
