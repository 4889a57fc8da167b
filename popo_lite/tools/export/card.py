"""Write the model card: what the model is, how it was trained, its results, and how to load it. No local paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from popo_lite.policy.load import model_source
from popo_lite.recipe import OutputRecipe, Recipe
from popo_lite.recipe_file import dump_recipe, flatten
from popo_lite.tools.export.verify import Verification

CARD_FILE = "README.md"
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

CITATION = """\
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
    recipe: Recipe,
    summary: Mapping[str, Any],
    *,
    weights: str,
    dtype: str | None,
    verification: Verification | None,
) -> str:
    """Return the README.md of an export. `summary` is the run's summary.json, `dtype` is None for an adapter."""
    base = known_as(recipe.model.id)
    algorithm = recipe.objective.algorithm
    what = "adapter" if dtype is None else "merged"
    kept_as = "a LoRA adapter (PEFT)" if dtype is None else f"merged into the base in {dtype}"
    of = "the siamese, the running average of the trained adapters" if weights == "siamese" else "the trained policy"
    parts = [
        f"---\n{_front_matter(recipe, what, summary.get('siamese' if weights == 'siamese' else 'after'))}\n---",
        f"# {base.rpartition('/')[2]}, trained with {algorithm.upper()}",
        f"{_base_link(recipe)} after {summary['steps']:,} steps of reinforcement learning with verifiable rewards. "
        f"These weights are {of}, {kept_as}.",
        f"## Loading it\n\n```python\n{_example(recipe, what)}\n```",
        f"## Results\n\n{_results(summary, weights)}",
    ]
    if verification is not None:
        parts.append(f"## Merged against trained\n\n{_verified(verification)}")
    method = f"{METHODS[algorithm]} The base stayed frozen; popo-lite trained LoRA adapters on it."
    parts.append(f"## Method\n\n{method}")
    if algorithm in ("popo", "mixed"):
        parts += ["Source: Xu and Fang, [arXiv 2605.06650](https://arxiv.org/abs/2605.06650).", CITATION]
    parts.append(f"## Recipe\n\n```toml\n{dump_recipe(_without_paths(recipe)).strip()}\n```")
    return "\n\n".join(parts) + "\n"


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


def _front_matter(recipe: Recipe, what: str, result: Mapping[str, Any] | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    dataset = known_as(recipe.eval.dataset or recipe.data.dataset)
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=f"pass@{k}",
            metric_value=value,
        )
        for k, value in (result or {}).get("pass_at_k", {}).items()
    ]
    data = ModelCardData(
        base_model=recipe.model.id if _on_hub(recipe) else None,
        library_name="transformers" if what == "merged" else "peft",
        pipeline_tag="text-generation",
        tags=[recipe.objective.algorithm, "popo-lite", "rlvr", "reinforcement-learning", "lora"],
        model_name=known_as(recipe.model.id).rpartition("/")[2] if measured else None,
        eval_results=measured or None,
    )
    for key, value in _licence(recipe).items():
        setattr(data, key, value)
    return data.to_yaml().strip()


def _licence(recipe: Recipe) -> dict[str, str]:
    """Return the licence that the base's own model card names; empty if it names none or cannot be read."""
    from httpx import HTTPError
    from huggingface_hub import ModelCard, hf_hub_download

    source = Path(model_source(recipe.model))
    try:
        if source.is_dir():
            path = source / "README.md"
        else:
            path = Path(hf_hub_download(recipe.model.id, "README.md", revision=recipe.model.revision))
        found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, HTTPError, ValueError):
        # No card, no network or an unreadable card: the licence is unknown, so none is stated.
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: value for key in keys if isinstance(value := getattr(found, key, None), str)}


def _base_link(recipe: Recipe) -> str:
    if _on_hub(recipe):
        at = f" at revision `{recipe.model.revision}`" if recipe.model.revision else ""
        return f"[{recipe.model.id}](https://huggingface.co/{recipe.model.id}){at}"
    return "`tiny`, the model that popo-lite ships," if recipe.model.id == "tiny" else known_as(recipe.model.id)


def _example(recipe: Recipe, what: str) -> str:
    """Return Python that asks the model; the line with `model_id` is what an upload changes."""
    trust = ", trust_remote_code=True" if recipe.model.trust_remote_code else ""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    load = [f'model = AutoModelForCausalLM.from_pretrained(model_id, device_map="auto"{trust})']
    if what == "adapter":
        lines.insert(0, "from peft import PeftModel")
        base = f'"{recipe.model.id}"' if _on_hub(recipe) else f'"path/to/{known_as(recipe.model.id)}"'
        if recipe.model.id == "tiny":
            lines.insert(1, "from popo_lite.tools.tiny_model import TINY_FOLDER")
            base = "TINY_FOLDER"
        at = f', revision="{recipe.model.revision}"' if recipe.model.revision else ""
        load = [
            f'base = AutoModelForCausalLM.from_pretrained({base}{at}, device_map="auto"{trust})',
            "model = PeftModel.from_pretrained(base, model_id)",
        ]
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    if recipe.data.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": recipe.data.system_prompt})
    lines += [
        "",
        'model_id = "path/to/this/folder"',
        f"tokenizer = AutoTokenizer.from_pretrained(model_id{trust})",
        *load,
        f"messages = {messages!r}",
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
        f"output = model.generate(**inputs, max_new_tokens={recipe.rollout.max_completion_length})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _results(summary: Mapping[str, Any], weights: str) -> str:
    results = {name: summary[name] for name in ("before", "after", "siamese") if summary.get(name)}
    if not results:
        return "Nothing was measured on held-out problems."
    ks = sorted({int(k) for result in results.values() for k in result["pass_at_k"]})
    rows = [[f"pass@{k}", *(f"{result['pass_at_k'][str(k)]:.1%}" for result in results.values())] for k in ks]
    figures = sorted({key for result in results.values() for key in result.get("task_figures") or {}})
    task = [
        (key.removesuffix("_ratio").replace("_", " "), key, "{:.1%}" if key.endswith("_ratio") else "{:.3g}")
        for key in figures
    ]
    for name, key, form in (*task, *MEASURES):
        values = [{**result, **(result.get("task_figures") or {})}.get(key) for result in results.values()]
        if any(value is not None for value in values):
            rows.append([name, *("" if value is None else form.format(value) for value in values)])
    text = f"Sampled answers to problems held out from training.\n\n{_table(['', *results], rows)}"
    if weights == "siamese" and "siamese" not in results:
        text += "\n\nMeasured with the trained policy; the siamese, which these weights are, was not measured."
    return text


def _verified(found: Verification) -> str:
    trained_on = "the 4-bit (NF4) base" if found.trained_base == "nf4" else f"the base in {found.trained_base}"
    return (
        f"The policy was trained on {trained_on}. This model was loaded again and compared with it on real prompts of "
        f"the task; differences are of log-probs in nats.\n\n{_table(['', ''], found.rows())}"
    )


def _table(columns: list[str], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
