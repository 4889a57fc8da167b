"""Write the model card: what the model is, how it was trained, its results, and how to load it.

Private settings are left out (tools/public.py). In all other text it masks only secrets and the home folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment

from popo_lite.policy.gguf import GGUF_SUFFIX
from popo_lite.policy.load import model_source
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import dump_recipe
from popo_lite.redaction import redact, without_home
from popo_lite.tasks.datasets import KNOWN
from popo_lite.tools.console import words
from popo_lite.tools.console.output import measured, noise, points
from popo_lite.tools.console.words import quantity
from popo_lite.tools.export.verify import base_of, loss_of, remedy, table_of
from popo_lite.tools.public import is_local, known_as, public_changes, public_recipe
from popo_lite.tools.sweep.compare import ratio_interval

Facts = Mapping[str, Any]
MARKUP = re.compile(r"[\\`*<>\[\]&|#!]")
LIBRARIES = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}
RELATIONS = {"merged": "finetune", "adapter": "adapter", "gguf": "finetune"}
"""The Hub's words for how a model derives from its base. A GGUF file, too, has trained weights: the Hub lists a
"quantized" one among files of the base's own weights."""
ALGORITHMS = {"popo": "POPO", "raft": "RAFT", "grpo": "GRPO", "mixed": "POPO and a term against wrong answers"}


def model_card(recipe: Recipe, summary: Facts, *, weights: str, dtype: str | None, verification: Facts | None,
               gguf: str | None = None) -> str:  # fmt: skip
    """Return the README.md of an export. `summary` is the run's summary.json, `dtype` is None for an adapter."""
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # noqa: S701 - not HTML
    results = {name: summary[name] for name in ("before", "after", "siamese") if summary.get(name)}
    measured_as = "siamese" if weights == "siamese" else "after"
    system_prompt = recipe.data.system_prompt
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    environment.filters["inert"] = inert
    card = environment.from_string(template).render(
        front_matter=_front_matter(
            recipe,
            "gguf" if gguf else "merged" if dtype else "adapter",
            results.get("before"),
            results.get(measured_as),
        ),
        model=recipe.model,
        known_as=known_as(recipe.model.id),
        base_file=recipe.model.id.endswith(GGUF_SUFFIX),
        on_hub=recipe.model.id != "tiny" and not is_local(recipe.model.id),
        algorithm=recipe.objective.algorithm,
        trained_with=ALGORITHMS[recipe.objective.algorithm],
        planned_steps=recipe.train.steps,
        changes=_changes(summary),
        summary=summary,
        weights=weights,
        dtype=dtype,
        gguf=gguf,
        messages=[*system, {"role": "user", "content": "What is 17 + 25?"}],
        max_tokens=recipe.rollout.max_completion_length,
        results=results,
        rows=_rows(results),
        gain=_gain(results.get("before"), results.get(measured_as)),
        verified=verification,
        verified_table=table_of(verification) if verification else (),
        merged_into=base_of(verification) if verification else None,
        loss=loss_of(verification),
        remedy=remedy(verification["merged_base"], dtype, gguf) if verification and dtype else None,
        recipe=dump_recipe(public_recipe(recipe)).strip(),
    )
    return redact(without_home(card))


def inert(text: str) -> str:
    """Return untrusted text on one line of Markdown that shows it as it is: no markup, HTML or control characters."""
    return MARKUP.sub(r"\\\g<0>", words.clean(text))


def _changes(summary: Facts) -> list[str]:
    """Return what changed when the run was resumed, without settings that are private."""
    changes = ((step, key, inert(before), inert(now)) for step, key, before, now in public_changes(summary))
    return [f"from step {step:,} `{key}` was {now}, before {before}" for step, key, before, now in changes]


def _rows(results: Facts) -> list[list[str]]:
    """Return the rows of the table of results; under pass@1, its interval."""
    rows = []
    for (label, unit), values in measured(results.values()).items():
        if unit == "seconds":  # how long the measurement took says nothing about the model
            continue
        rows.append([inert(label), *(quantity(value, unit) for value in values)])
        if label == "pass@1":
            intervals = [ratio_interval(result["pass_at_1"], result["problems"]) for result in results.values()]
            rows.append(["pass@1, 95% interval", *(f"{each['low']:.1%} to {each['high']:.1%}" for each in intervals)])
    return rows


def _gain(before: Facts | None, after: Facts | None) -> str | None:
    """Return one sentence that says by how much pass@1 changed, with its interval."""
    if before is None or after is None:
        return None
    gap, problems = after["pass_at_1"] - before["pass_at_1"], min(before["problems"], after["problems"])
    margin = noise(before["pass_at_1"], after["pass_at_1"], problems)
    return f"pass@1 changed by {points(gap, gap - margin, gap + margin)}, on {problems:,} problems."


def _front_matter(recipe: Recipe, kind: str, before: Facts | None, result: Facts | None) -> str:
    """Return the card's YAML for a `kind` of export: "merged", "adapter" or "gguf".

    The licence is the one that the base's own card names; unknown if it cannot be read. `before` and `result` are the
    evaluations before training and of these weights, if they were measured.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

    path = Path(model_source(recipe.model)) / "README.md"
    licence: dict[str, Any] = {}
    with suppress(Exception):  # no card, no network, or a card that cannot be read, such as one with wrong YAML
        if not path.parent.is_dir():
            path = Path(hf_hub_download(recipe.model.id, "README.md", revision=recipe.model.revision))
        found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        values = {key: getattr(found, key, None) for key in ("license", "license_name", "license_link")}
        licence = {key: value for key, value in values.items() if isinstance(value, str)}
    dataset = recipe.eval.dataset or recipe.data.dataset
    task: dict[str, Any] = {
        "task_type": "text-generation", "dataset_type": _hub_dataset(dataset) or known_as(dataset),
        "dataset_name": known_as(dataset),
    }  # fmt: skip
    results = [
        EvalResult(
            **task,
            metric_type=f"pass@{k}",
            metric_name=f"pass@{k}{of}",
            metric_value=rate,
            metric_args={"problems": each["problems"], "samples_per_problem": each["samples_per_problem"]},
        )
        for each, of in ((result, ""), (before, " before training"))
        if result and each  # those of before alone say nothing about this model
        for k, rate in each["pass_at_k"].items()
    ]
    on_hub, trained_on = not (recipe.model.id == "tiny" or is_local(recipe.model.id)), _hub_dataset(recipe.data.dataset)
    algorithms = {"mixed": ["popo", "mixed"]}.get(recipe.objective.algorithm, [recipe.objective.algorithm])
    data = ModelCardData(
        base_model=recipe.model.id if on_hub else None,
        base_model_relation=RELATIONS[kind] if on_hub else None,
        datasets=[trained_on] if trained_on else None,
        library_name=LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=[*algorithms, "popo-lite", "rlvr", "reinforcement-learning", "lora"],
        model_name=known_as(recipe.model.id).rpartition("/")[2] if results else None,
        eval_results=results or None,
        **licence,
    )
    return data.to_yaml().strip()


def _hub_dataset(name: str) -> str | None:
    """Return a dataset's id on the Hub; None for a local file and for problems that are generated."""
    name = KNOWN[name][0] if name in KNOWN else name
    return None if is_local(name) else name
