"""Write the model card: what the model is, how it was trained, its results, and how to load it. No local paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from popo_lite.policy.load import model_source
from popo_lite.recipe import OutputRecipe, Recipe
from popo_lite.recipe_file import dump_recipe, flatten
from popo_lite.tools.console import words
from popo_lite.tools.export.verify import Verification

TABLE_FILES = (".jsonl", ".json", ".csv", ".parquet")

POPO = """\
Positive-Only Policy Optimization (POPO) samples several answers to each prompt, grades them with a program, and raises
the likelihood of the right ones, weighted within each prompt. An average of the trained weights (the siamese) keeps
the representation from drifting, and an entropy term keeps the answers varied."""
METHODS = {
    "popo": f"{POPO} Wrong answers are never trained on.",
    "mixed": f"{POPO} A further term lowers the likelihood of wrong answers.",
    "raft": "RAFT samples several answers to each prompt, grades them with a program, and minimizes the mean negative "
    "log-likelihood of the right ones.",
    "grpo": "GRPO samples several answers to each prompt, grades them with a program, and trains on all of them with "
    "clipped importance ratios times group-relative advantages.",
}
SOURCE = """

Source: Xu and Fang, [arXiv 2605.06650](https://arxiv.org/abs/2605.06650).

```bibtex
@article{xu2026popo,
  title   = {Beyond Negative Rollouts: Positive-Only Policy Optimization with Implicit Negative Gradients},
  author  = {Xu and Fang},
  journal = {arXiv preprint arXiv:2605.06650},
  year    = {2026}
}
```"""
MEASURES = (
    ("cut off", "truncated_ratio", "{:.1%}"),
    ("mean tokens", "completion_tokens_mean", "{:.1f}"),
    ("problems", "problems", "{:,}"),
    ("answers each", "samples_per_problem", "{:,}"),
)


def model_card(
    recipe: Recipe, summary: Mapping[str, Any], *, weights: str, dtype: str | None, verification: Verification | None
) -> str:
    """Return the README.md of an export. `summary` is the run's summary.json, `dtype` is None for an adapter."""
    name, algorithm = known_as(recipe.model.id), recipe.objective.algorithm
    base = "`tiny`, the model that popo-lite ships," if recipe.model.id == "tiny" else name
    if _on_hub(recipe):
        at = f" at revision `{recipe.model.revision}`" if recipe.model.revision else ""
        base = f"[{recipe.model.id}](https://huggingface.co/{recipe.model.id}){at}"
    kept_as = "a LoRA adapter (PEFT)" if dtype is None else f"merged into the base in {dtype}"
    of = "the siamese, the running average of the trained adapters" if weights == "siamese" else "the trained policy"
    verified = ""
    if verification is not None:
        trained_on = verification.trained_base
        verified = f"""## Merged against trained

The policy was trained on {"the 4-bit (NF4) base" if trained_on == "nf4" else f"the base in {trained_on}"}. \
This model was loaded again and compared with it on real prompts of the task; differences are of log-probs in nats.

{_table(["", ""], verification.rows())}

"""
    return f"""---
{_front_matter(recipe, dtype, summary.get("siamese" if weights == "siamese" else "after") or {})}
---

# {name.rpartition("/")[2]}, trained with {algorithm.upper()}

{base} after {summary["steps"]:,} steps of reinforcement learning with verifiable rewards. \
These weights are {of}, {kept_as}.

## Loading it

```python
{_example(recipe, adapter=dtype is None)}
```

## Results

{_results(summary, weights)}

{verified}## Method

{METHODS[algorithm]} The base stayed frozen; popo-lite trained LoRA adapters on it.\
{SOURCE if algorithm in ("popo", "mixed") else ""}

## Recipe

```toml
{dump_recipe(_without_paths(recipe)).strip()}
```
"""


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


def _on_hub(recipe: Recipe) -> bool:
    return recipe.model.id != "tiny" and not is_local(recipe.model.id)


def _front_matter(recipe: Recipe, dtype: str | None, result: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    dataset = known_as(recipe.eval.dataset or recipe.data.dataset)
    task: dict[str, Any] = {"task_type": "text-generation", "dataset_type": dataset, "dataset_name": dataset}
    rates = result.get("pass_at_k", {}).items()
    measured = [EvalResult(**task, metric_type=f"pass@{k}", metric_value=rate) for k, rate in rates] or None
    data = ModelCardData(
        base_model=recipe.model.id if _on_hub(recipe) else None,
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


def _example(recipe: Recipe, *, adapter: bool) -> str:
    """Return Python that asks the model; the line with `model_id` is what an upload changes."""
    model, system = recipe.model, recipe.data.system_prompt
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    imports, source, load = "", "model_id", ""
    if adapter:
        imports, load = "from peft import PeftModel\n", "\nmodel = PeftModel.from_pretrained(base, model_id)"
        source = f'"{model.id}"' if _on_hub(recipe) else f'"path/to/{known_as(model.id)}"'
        if model.id == "tiny":
            imports, source = f"{imports}from popo_lite.policy.load import TINY_FOLDER\n", "TINY_FOLDER"
        source += f', revision="{model.revision}"' if model.revision else ""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return f"""{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(model_id{trust})
{"base" if adapter else "model"} = AutoModelForCausalLM.from_pretrained({source}, device_map="auto"{trust}){load}
messages = {[*messages, {"role": "user", "content": "What is 17 + 25?"}]!r}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens={recipe.rollout.max_completion_length})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def _results(summary: Mapping[str, Any], weights: str) -> str:
    results = {name: summary[name] for name in ("before", "after", "siamese") if summary.get(name)}
    if not results:
        return "Nothing was measured on held-out problems."
    found = [{**result, **result["pass_at_k"], **(result.get("task_figures") or {})} for result in results.values()]
    rates = sorted({k for result in results.values() for k in result["pass_at_k"]}, key=int)
    figures = sorted({key for result in results.values() for key in result.get("task_figures") or {}})
    measures = [(f"pass@{k}", k, "{:.1%}") for k in rates]
    measures += [(words.spoken(key), key, "{:.1%}" if key.endswith("_ratio") else "{:.3g}") for key in figures]
    rows = []
    for name, key, form in (*measures, *MEASURES):
        values = [result.get(key) for result in found]
        if any(value is not None for value in values):
            rows.append([name, *("" if value is None else form.format(value) for value in values)])
    text = f"Sampled answers to problems held out from training.\n\n{_table(['', *results], rows)}"
    if weights == "siamese" and "siamese" not in results:
        text += "\n\nMeasured with the trained policy; the siamese, which these weights are, was not measured."
    return text


def _table(columns: list[str], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
