"""Write the model card: what the model is, how it was trained, its results, and how to load it. No local paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment

from popo_lite.policy.load import model_source
from popo_lite.recipe import OutputRecipe, Recipe
from popo_lite.recipe_file import dump_recipe, flatten
from popo_lite.tools.console import words
from popo_lite.tools.export.verify import table_of

Facts = Mapping[str, Any]
TABLE_FILES = (".jsonl", ".json", ".csv", ".parquet")
MEASURES = (
    ("cut off", "truncated_ratio", "{:.1%}"),
    ("mean tokens", "completion_tokens_mean", "{:.1f}"),
    ("problems", "problems", "{:,}"),
    ("answers each", "samples_per_problem", "{:,}"),
)


def model_card(recipe: Recipe, summary: Facts, *, weights: str, dtype: str | None, verification: Facts | None) -> str:
    """Return the README.md of an export. `summary` is the run's summary.json, `dtype` is None for an adapter."""
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # noqa: S701 - not HTML
    results = {name: summary[name] for name in ("before", "after", "siamese") if summary.get(name)}
    measured = results.get("siamese" if weights == "siamese" else "after", {})
    on_hub = recipe.model.id != "tiny" and not is_local(recipe.model.id)
    system = [{"role": "system", "content": text}] if (text := recipe.data.system_prompt) is not None else []
    return environment.from_string(template).render(
        front_matter=_front_matter(recipe, on_hub, dtype, measured),
        model=recipe.model,
        known_as=known_as(recipe.model.id),
        on_hub=on_hub,
        algorithm=recipe.objective.algorithm,
        summary=summary,
        weights=weights,
        dtype=dtype,
        messages=[*system, {"role": "user", "content": "What is 17 + 25?"}],
        max_tokens=recipe.rollout.max_completion_length,
        results=results,
        rows=_rows(list(results.values())),
        verified=verification,
        verified_rows=table_of(verification) if verification else (),
        recipe=dump_recipe(_without_paths(recipe)).strip(),
    )


def is_local(source: str) -> bool:
    """Return True if a setting names a local file or folder and not something on the Hub."""
    path = Path(source).expanduser()
    return path.exists() or path.is_absolute() or source.startswith(".") or path.suffix in TABLE_FILES


def known_as(source: str) -> str:
    """Return the public name of a model or dataset: its Hub id, or the last part of a local path."""
    return Path(source).expanduser().name if is_local(source) else source


def _without_paths(recipe: Recipe) -> Recipe:
    # Servers' addresses may hold a login, and their shared folder is a local path.
    changes: dict[str, Any] = {"output": OutputRecipe(), "rollout.server": type(recipe.rollout.server)()}
    for key in ("model.id", "lora.init_from", "data.dataset", "eval.dataset"):
        if (value := flatten(recipe).get(key)) is not None:
            changes[key] = known_as(value)
    return recipe.with_values(changes)


def _front_matter(recipe: Recipe, on_hub: bool, dtype: str | None, result: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    dataset = known_as(recipe.eval.dataset or recipe.data.dataset)
    task: dict[str, Any] = {"task_type": "text-generation", "dataset_type": dataset, "dataset_name": dataset}
    rates = result.get("pass_at_k", {}).items()
    measured = [EvalResult(**task, metric_type=f"pass@{k}", metric_value=rate) for k, rate in rates] or None
    data = ModelCardData(
        base_model=recipe.model.id if on_hub else None,
        library_name="peft" if dtype is None else "transformers",
        pipeline_tag="text-generation",
        tags=[recipe.objective.algorithm, "popo-lite", "rlvr", "reinforcement-learning", "lora"],
        model_name=known_as(recipe.model.id).rpartition("/")[2] if measured else None,
        eval_results=measured,
        **_licence(recipe),
    )
    return data.to_yaml().strip()


def _licence(recipe: Recipe) -> dict[str, Any]:
    """Return the licence that the base's own model card names; empty if it names none or cannot be read."""
    from httpx import HTTPError
    from huggingface_hub import ModelCard, hf_hub_download

    path = Path(model_source(recipe.model)) / "README.md"
    try:
        if not path.parent.is_dir():
            path = Path(hf_hub_download(recipe.model.id, "README.md", revision=recipe.model.revision))
        found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, HTTPError, ValueError):
        # No card, no network or an unreadable card: the licence is unknown, so none is stated.
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: value for key in keys if isinstance(value := getattr(found, key, None), str)}


def _rows(results: list[Facts]) -> list[list[str]]:
    """Return the lines of the table of results: a measure, and its value in each of them."""
    found = [{**result, **result["pass_at_k"], **(result.get("task_figures") or {})} for result in results]
    rates = sorted({k for result in results for k in result["pass_at_k"]}, key=int)
    figures = sorted({key for result in results for key in result.get("task_figures") or {}})
    measures = [(f"pass@{k}", k, "{:.1%}") for k in rates]
    measures += [(words.spoken(key), key, "{:.1%}" if key.endswith("_ratio") else "{:.3g}") for key in figures]
    rows = []
    for name, key, form in (*measures, *MEASURES):
        values = [result.get(key) for result in found]
        if any(value is not None for value in values):
            rows.append([name, *("" if value is None else form.format(value) for value in values)])
    return rows
