"""Drive each family from its config to a merged model: plan, 4 bits, packing, sampling, a step, export, reload.

What is exported is held against transformers with eager attention, without the policy but for longrope's factors:
the log-probs of the trained policy's own samples must be those of the exported model. The table in docs/models.md is
what the runs found; POPO_WRITE_TABLE=1 writes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import json_lines
from popo_lite import opening
from popo_lite.callbacks import Callback
from popo_lite.errors import ModelError
from popo_lite.grading import Grader
from popo_lite.policy.parts import decoder_of
from popo_lite.policy.policy import Policy, fix_longrope
from popo_lite.recipe import ModelRecipe, Recipe, RewardRecipe
from popo_lite.recipe_file import dump_recipe, load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.samplers import SamplingParams
from popo_lite.tools.export import pipeline
from popo_lite.tools.plan.shapes import UnknownArchitectureError, load_shape
from popo_lite.trainer import Trainer
from popo_lite.types import Problem, Prompt
from small_models import FAMILIES, Family, write_family

pytestmark = pytest.mark.families
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
VERDICTS: dict[str, str] = {}

SHORT = {
    "attention is": "eager attention",
    "sequences run one at a time, because the model's window": "one sequence at a time if longer than the window",
    "sequences run one at a time": "one sequence at a time",
    "prompts are computed": "each answer with its prompt",
    "prompt and answer may exceed": "longrope's long factors beyond the original context",
    "all-linear leaves out": "",  # has a column of its own
}
"""Beginning of a notice -> how the table says it."""


@pytest.fixture(scope="module")
def grader(tmp_path_factory) -> Iterator[Grader]:
    """One pool of grading processes for all runs, with a reward that is 1 for most random texts."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "matrix_rewards.py").write_text("def even(text, problem):\n    return float(len(text) % 3 != 0)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with Grader(RewardRecipe(functions="matrix_rewards:even", workers=1)) as shared:

            @contextmanager
            def borrowed(*_: Any, **__: Any) -> Iterator[Grader]:
                yield shared

            patch.setattr(pipeline, "release_memory", lambda: None)  # small models need no collection
            patch.setattr(pipeline, "OTHER_BASE_BYTES", 0)  # else it also merges into the weights before NF4
            for module in (opening, pipeline):
                patch.setattr(module, "Grader", borrowed)
            yield shared


def recipe_of(folder: Path, family: Family) -> Recipe:
    return load_recipe(
        "tiny_cpu",
        (
            f"model.id={folder}", "lora.rank=4", "siamese.head_width=16", "train.steps=1",
            "train.gradient_checkpointing=true", "rollout.num_generations=4", "rollout.max_prompt_length=48",
            "rollout.max_completion_length=24", "train.tokens_per_microbatch=512", "data.prompts_per_step=2",
            "reward.functions=matrix_rewards:even", "optimizer.warmup_ratio=0.0", "eval.problems=2", *family.overrides,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_exports_or_is_refused_by_name(name, grader, tmp_path):
    family, folder = FAMILIES[name], tmp_path / name
    write_family(family, folder)
    with suppress(UnknownArchitectureError):  # which the run simulates
        load_shape(ModelRecipe(id=str(folder)))
    if family.refused:
        with pytest.raises(ModelError, match=re.escape(family.refused)) as caught:
            Trainer(recipe_of(folder, Family(family.model_type)), Callback())
        assert caught.value.next_step.startswith(f"--set {family.overrides[0]}" if family.overrides else "use a model")
        VERDICTS[name] = f"refused: {family.refused} | "
        if not family.overrides:
            return
    recipe, run = recipe_of(folder, family), RunFolder(tmp_path / "run")
    run.path.mkdir()
    with Trainer(recipe.with_values({"eval.problems": 0}), Callback()) as trainer:
        policy = trainer.policy
        assert trainer.run(run).summary is not None
        [line] = json_lines(run.metrics_path)
        assert line["skipped_reason"] is None
        assert 0 < line["positives"] <= line["rollouts"] == 8
        assert line["grad_norm"] > 0
        assert line["logp_gap_max"] < 1e-4
        outside = [key for key, _ in policy.adapter_parameters() if not in_decoder(policy, key)]
        assert not outside, "only the text model gets adapters"
        checkpointing_changes_nothing(policy)
        sampled = sample(trainer)
    run.recipe_path.write_text(dump_recipe(recipe))  # with problems to check the export on
    target = pipeline.export_run(run, prompts=1, problems=0, output=tmp_path / "merged", trust=True).folder
    for tokens, start, logps in sampled:
        found = plain_logps(target, family, recipe, tokens)[start - 1 :]
        torch.testing.assert_close(found, torch.tensor(logps), rtol=0, atol=1e-3)
    VERDICTS[name] = verdict(family, policy)


def in_decoder(policy: Policy, key: str) -> bool:
    base: Any = policy.model.get_base_model()
    parameter = dict(policy.model.named_parameters())[key]
    return any(parameter is one for one in decoder_of(base).parameters())


def checkpointing_changes_nothing(policy: Policy) -> None:
    """Gradients must not depend on what is computed again in the backward pass."""
    ids, base = torch.arange(5, 45), policy.model.get_base_model()
    weights = [parameter for _, parameter in policy.adapter_parameters()]
    policy.model.train()
    direction = torch.randn(len(ids), policy.head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    found = []
    for switch in (None, base.gradient_checkpointing_disable):
        if switch:
            switch()
        loss = (policy.hidden_states(ids, [(len(ids),)]) * direction).sum()
        found.append(torch.autograd.grad(loss, weights, allow_unused=True))
    for with_it, without in zip(*found, strict=True):
        assert (with_it is None) == (without is None)
        if without is not None:
            torch.testing.assert_close(with_it, without, rtol=1e-3, atol=1e-4 * float(without.abs().max() + 1e-6))


def sample(trainer: Trainer) -> list[tuple[tuple[int, ...], int, tuple[float, ...]]]:
    """Sample from the trained policy after prompts of unequal lengths: (all tokens, where the answer starts, logps)."""
    prompts = [
        Prompt(problem=Problem(id=str(n), messages=(), answer=""), token_ids=tuple(range(5, 5 + n))) for n in (3, 40)
    ]
    version = trainer.policy.version
    params = SamplingParams(temperature=1.0, max_completion_length=24)
    groups = trainer.sampler.sample(prompts, count=3, params=params, policy_version=version, stream=("matrix",))
    return [
        (prompt.token_ids + answer.token_ids, len(prompt.token_ids), answer.sampler_logps)
        for prompt, group in zip(prompts, groups, strict=True)
        for answer in group
    ]


_PLAIN: dict[Path, Any] = {}


def plain_logps(folder: Path, family: Family, recipe: Recipe, tokens: tuple[int, ...]) -> torch.Tensor:
    """Return log-probs [T - 1] of the tokens after the first, by transformers alone with eager attention."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if folder not in _PLAIN:
        _PLAIN.clear()
        kind = AutoModelForImageTextToText if family.own_class else AutoModelForCausalLM
        assert "quantization_config" not in AutoConfig.from_pretrained(folder).to_dict()
        _PLAIN[folder] = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        fix_longrope(_PLAIN[folder], recipe.rollout.sequence_tokens)
    with torch.no_grad():
        logits = _PLAIN[folder](input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(dim=-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].float()


def verdict(family: Family, policy: Policy) -> str:
    """Return the row of the table without its first two columns."""
    left_out = next((n for n in policy.notices if n.startswith("all-linear")), "")
    parts = left_out.removeprefix("all-linear leaves out ").partition(":")[0]
    chosen = [short for n in policy.notices if (short := next(v for k, v in SHORT.items() if n.startswith(k)))]
    words = f"works with {', '.join(chosen)}" if chosen else "works"
    if family.refused:
        words = f"refused: {family.refused} (`--set {family.overrides[0]}` {words})"
    return f"{words} | {parts}"


def test_the_table_in_the_documents_is_what_was_found():
    if VERDICTS.keys() != FAMILIES.keys():
        pytest.skip("needs all families in one run")
    rows = [f"| {FAMILIES[name].like} | `{FAMILIES[name].model_type}` | {VERDICTS[name]} |" for name in FAMILIES]
    kinds = [VERDICTS[name].partition(" | ")[0] for name in FAMILIES]
    works, refused = kinds.count("works"), sum(kind.startswith("refused") for kind in kinds)
    head = [
        f"{len(rows)} families: {works} work as they are, {len(rows) - works - refused} with settings that are chosen "
        f"by themselves, {refused} are refused.", "",
        "| for example | `model_type` | result | without adapters by `all-linear` |", "|---|---|---|---|",
    ]  # fmt: skip
    text, table = DOCUMENT.read_text(encoding="utf-8"), "\n".join([*head, *rows])
    before, start, rest = text.partition("<!-- families -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert start
    assert end
    new = f"{before}{start}{table}\n{end}{after}"
    if os.environ.get("POPO_WRITE_TABLE"):
        DOCUMENT.write_text(new, encoding="utf-8")
    else:
        assert new == text, "docs/models.md is out of date: POPO_WRITE_TABLE=1 pytest tests/families"
