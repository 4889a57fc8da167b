"""What an evaluation on benchmarks is asked to do: from the command line, the preset and the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lite.errors import UserInputError
from popo_lite.recipe import Recipe
from popo_lite.samplers import pick_engine
from popo_lite.tools.benchmarks.datasets import benchmark_names
from popo_lite.tools.benchmarks.run import PreparedBenchmark
from popo_lite.tools.benchmarks.subject import Subject

PAPER_PRESET: Mapping[str, Any] = {
    "samples": 128,
    "k": 8,
    "temperature": 0.7,
    "top_p": 0.95,
    "max_tokens": 4096,
    "system_prompt": r"Please reason step by step, and put your final answer within \boxed{}.",
}
"""How the published evaluation sampled."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the command line says about benchmarks; None is left to the recipe."""

    benchmarks: tuple[str, ...]
    files: Mapping[str, Path]
    seeds: tuple[int, ...]
    samples: int
    k: int
    temperature: float | None
    top_p: float
    max_tokens: int | None
    max_prompt_length: int
    skip_overlong: bool
    system_prompt: str | None
    chat_template: str | None
    engine: str | None
    output: Path | None

    def applied_to(self, recipe: Recipe) -> Recipe:
        """`recipe` with what the command line says instead. An empty system prompt is none."""
        system_prompt = recipe.data.system_prompt if self.system_prompt is None else self.system_prompt
        return recipe.with_values(
            {
                "data.system_prompt": system_prompt or None,
                "data.chat_template": self.chat_template or recipe.data.chat_template,
                "rollout.engine": self.engine or recipe.rollout.engine,
                "rollout.max_prompt_length": self.max_prompt_length,
                "rollout.max_completion_length": self.max_tokens or recipe.rollout.max_completion_length,
                "eval.temperature": self.temperature or recipe.eval.temperature,
                "reward.function": "math",
            }
        )


def choices_of(benchmarks: str, given: Mapping[str, Any]) -> Choices:
    """What `given`, the command's options by name, comes to: defaults, over them the preset, over it the options.

    Raises UserInputError for options that contradict one another or name no benchmark.
    """
    names = benchmark_names(benchmarks)
    preset = PAPER_PRESET if given["preset"] else {}
    settled = {key: given[key] if given[key] is not None else preset.get(key) for key in PAPER_PRESET}
    samples = settled["samples"] or 8
    k: int = given["k"] or min(settled["k"] or 8, samples)
    if k > samples:
        raise UserInputError(
            f"pass@{k} cannot be estimated from {samples} samples", where="--k", next_step=f"--samples {k}"
        )
    return Choices(
        benchmarks=names,
        files=_files(given["data"], names),
        seeds=_seeds(given["seeds"], given["seed"]),
        samples=samples,
        k=k,
        temperature=settled["temperature"],
        top_p=settled["top_p"] or 1.0,
        max_tokens=settled["max_tokens"],
        max_prompt_length=given["max_prompt_length"] or 2048,
        skip_overlong=given["skip_overlong"],
        system_prompt=settled["system_prompt"],
        chat_template=_template(given["chat_template"]),
        engine=given["engine"],
        output=given["output"],
    )


def _files(data: tuple[str, ...], names: tuple[str, ...]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for item in data:
        name, _, file = item.partition("=")
        if name not in names or not file or name in files:
            raise UserInputError(
                "names one of the benchmarks twice" if name in files else "is not NAME=FILE of a benchmark asked for",
                where=f"--data {item}",
                next_step=f"for instance --data {names[0]}={names[0]}.jsonl",
            )
        files[name] = Path(file).expanduser()
    return files


def _template(file: Path | None) -> str | None:
    try:
        return file.read_text(encoding="utf-8") if file else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(
            f"cannot be read: {error}", where=f"--chat-template {file}", next_step="write the file anew, in UTF-8"
        ) from error


def _seeds(several: str | None, one: int | None) -> tuple[int, ...]:
    if several is None:
        return (one or 0,)
    parts = [part.strip() for part in several.split(",")]
    if one is not None or not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserInputError(
            "is not different whole numbers parted by commas, or --seed is given as well",
            where=f"--seeds {several}",
            next_step="--seeds 0,1,2",
        )
    return tuple(map(int, parts))


def settings_of(
    subject: Subject, recipe: Recipe, prepared: Sequence[PreparedBenchmark], choices: Choices
) -> dict[str, Any]:
    """All that the answers follow from, as plain data; `choices` have been applied to `recipe`."""
    return {
        "model": subject.name,
        "base": recipe.model.model_dump(),
        "weights": list(subject.adapters),
        "digests": subject.digests,
        "benchmarks": {
            one.name: {
                "problems": len(one.prompts),
                "skipped": one.skipped,
                "max_completion_length": one.max_completion_length,
                "digest": one.digest,
            }
            for one in prepared
        },
        "seeds": list(choices.seeds),
        "samples": choices.samples,
        "temperature": recipe.eval.temperature,
        "top_p": choices.top_p,
        "system_prompt": recipe.data.system_prompt,
        "chat_template": recipe.data.chat_template,
        "max_prompt_length": recipe.rollout.max_prompt_length,
        "engine": pick_engine(recipe)[0],
        "engine_base": recipe.rollout.vllm.base,
        "batch_size": recipe.rollout.max_num_seqs,
        "max_answer_characters": recipe.reward.max_answer_characters,
        "timeout_seconds": recipe.reward.timeout_seconds,
    }
