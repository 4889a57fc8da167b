"""Write the model card: what the model is, how it was trained, its results, and how to load it.

It shows only the last part of the name of a model, adapter, dataset or schema that is a local file or a URL, and leaves
out the output folder, servers and the options of an environment. In all other text it masks only secrets and the home
folder.
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
from popo_lite.recipe import OutputRecipe, Recipe
from popo_lite.recipe_file import dump_recipe, to_toml
from popo_lite.redaction import redact, without_home
from popo_lite.resuming import RULES
from popo_lite.tools.console import words
from popo_lite.tools.console.output import measured
from popo_lite.tools.console.words import quantity
from popo_lite.tools.export.verify import base_of, loss_of, remedy, table_of

Facts = Mapping[str, Any]
LOCAL_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gguf")
SOURCES = ("model.id", "lora.init_from", "data.dataset", "eval.dataset")  # local, or on the Hub
HIDDEN = ("output.", "rollout.server.", "rollout.environment.options")
MARKUP = re.compile(r"[\\`*<>\[\]&|#!]")
ALGORITHMS = {"popo": "POPO", "raft": "RAFT", "grpo": "GRPO", "mixed": "POPO and a term against wrong answers"}


def model_card(recipe: Recipe, summary: Facts, *, weights: str, dtype: str | None, verification: Facts | None,
               gguf: str | None = None) -> str:  # fmt: skip
    """Return the README.md of an export. `summary` is the run's summary.json, `dtype` is None for an adapter."""
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # noqa: S701 - not HTML
    results = {name: summary[name] for name in ("before", "after", "siamese") if summary.get(name)}
    figures = measured(results.values()).items()
    system_prompt = recipe.data.system_prompt
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    environment.filters["inert"] = inert
    card = environment.from_string(template).render(
        front_matter=_front_matter(
            recipe,
            "gguf" if gguf else "transformers" if dtype else "peft",
            results.get("siamese" if weights == "siamese" else "after", {}),
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
        # How long the measurement took says nothing about the model.
        rows=[
            [inert(label), *(quantity(v, unit) for v in values)]
            for (label, unit), values in figures
            if unit != "seconds"
        ],
        verified=verification,
        verified_table=table_of(verification) if verification else (),
        merged_into=base_of(verification) if verification else None,
        loss=loss_of(verification),
        remedy=remedy(verification["merged_base"], dtype, gguf) if verification and dtype else None,
        recipe=dump_recipe(public_recipe(recipe)).strip(),
    )
    return redact(without_home(card))


def public_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe without private settings, and with the last part of a local path or URL in place of it."""
    hidden = {
        "output": OutputRecipe(), "rollout.server": type(recipe.rollout.server)(), "rollout.environment.options": {},
    }  # fmt: skip
    public = recipe.with_values(hidden).to_dict()
    for section, name in (key.split(".") for key in (*SOURCES, "reward.functions")):
        if name in public.get(section, {}):
            public[section][name] = _public(f"{section}.{name}", public[section][name])
    return Recipe.model_validate(public)


def inert(text: str) -> str:
    """Return untrusted text on one line of Markdown that shows it as it is: no markup, HTML or control characters."""
    return MARKUP.sub(r"\\\g<0>", words.clean(text))


def _public(key: str, value: Any) -> Any:
    """Return the value of a recipe's key with the last part of a local path or URL in place of the whole."""
    if key in SOURCES and isinstance(value, str):
        return known_as(value)
    if key == "reward.functions" and isinstance(value, list | tuple):
        return [_public_function(function) if isinstance(function, Mapping) else function for function in value]
    return value


def _public_function(function: Facts) -> Facts:
    file = function.get("schema_file")
    return function if file is None else {**function, "schema_file": Path(str(file)).name}


def _changes(summary: Facts) -> list[str]:
    """Return what changed when the run was resumed, without settings that are private."""
    lines = []
    for change in summary.get("changes") or ():
        if (key := change["key"]) in RULES and not key.startswith(HIDDEN):
            before, now = (
                "unset" if change[at] is None else inert(to_toml(_public(key, change[at]))) for at in ("before", "now")
            )
            lines.append(f"from step {change['step']:,} `{key}` was {now}, before {before}")
    return lines


def is_local(source: str) -> bool:
    """Return True if a setting names a local file or folder, or a URL, and not something on the Hub."""
    path = Path(source).expanduser()
    return (
        path.exists() or path.is_absolute() or source.startswith(".") or "://" in source or path.suffix in LOCAL_FILES
    )


def known_as(source: str) -> str:
    """Return the public name of a model or dataset: its Hub id, or the last part of a local path."""
    return Path(source).expanduser().name if is_local(source) else source


def _front_matter(recipe: Recipe, library: str, result: Facts) -> str:
    """Return the card's YAML. The licence is the one that the base's own card names; unknown if it cannot be read."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

    path = Path(model_source(recipe.model)) / "README.md"
    licence: dict[str, Any] = {}
    with suppress(Exception):  # no card, no network, or a card that cannot be read, such as one with wrong YAML
        if not path.parent.is_dir():
            path = Path(hf_hub_download(recipe.model.id, "README.md", revision=recipe.model.revision))
        found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        values = {key: getattr(found, key, None) for key in ("license", "license_name", "license_link")}
        licence = {key: value for key, value in values.items() if isinstance(value, str)}
    dataset = known_as(recipe.eval.dataset or recipe.data.dataset)
    task: dict[str, Any] = {"task_type": "text-generation", "dataset_type": dataset, "dataset_name": dataset}
    rates = result.get("pass_at_k", {}).items()
    results = [EvalResult(**task, metric_type=f"pass@{k}", metric_value=rate) for k, rate in rates] or None
    algorithms = {"mixed": ["popo", "mixed"]}.get(recipe.objective.algorithm, [recipe.objective.algorithm])
    data = ModelCardData(
        base_model=None if recipe.model.id == "tiny" or is_local(recipe.model.id) else recipe.model.id,
        library_name=library,
        pipeline_tag="text-generation",
        tags=[*algorithms, "popo-lite", "rlvr", "reinforcement-learning", "lora"],
        model_name=known_as(recipe.model.id).rpartition("/")[2] if results else None,
        eval_results=results,
        **licence,
    )
    return data.to_yaml().strip()
