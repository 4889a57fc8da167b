"""Check that a merged model is the trained policy, by greedy answers and by log-probs of the policy's answers.

Rounding alone can change a greedy answer when two tokens are nearly tied, more often in long answers.
A merge is therefore judged by log-probs, and by the gap between the two tokens where answers first differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popo_lite.errors import ExportError
from popo_lite.fused import score
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.policy import Policy, head_of
from popo_lite.tools.console.output import paired_interval, points
from popo_lite.types import EvalResult

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""(description, total) -> a context manager; its value is called with each amount done: `console.output.progress`."""
Tokens = tuple[int, ...]
REPORT_IT = "this is a bug: please report it with the model's name"
BATCH = 16
ROUNDING = {"float64": 1e-6, "float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}
"""Mean difference of log-probs in nats that rounding may make: ten times or more what was measured on small models."""
WORST_OVER_MEAN = 50  # a single token may differ by so many times more


class Trained(NamedTuple):
    """What the trained policy did: kept so that it can be freed before the merged model is loaded."""

    prompts: list[Tokens]
    answers: list[Tokens]
    logps: list[Tensor]
    stop_ids: frozenset[int]
    facts: dict[str, Any]


@torch.no_grad()
def greedy(
    model: Any, prompts: Sequence[Tokens], stops: Set[int], limit: int, done: Callable[[int], None] = lambda _: None
) -> list[Tokens]:
    """Return a model's greedy answer to each prompt, at most `limit` tokens long, its stop token included.

    If memory runs out, fewer prompts are answered at once.
    """
    from transformers import GenerationConfig

    # Assigned, not passed: `generate` fills a passed config from the model's own, and a base's
    # repetition penalty would then change the answers.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=sorted(stops), pad_token_id=min(stops)
    )
    answers: list[Tokens] = []
    size = BATCH
    while batch := prompts[len(answers) : len(answers) + size]:
        try:
            answers += _greedy_batch(model, batch, stops)
            done(len(batch))
            continue
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
        release_memory()
        size = (len(batch) + 1) // 2
    return answers


def _greedy_batch(model: Any, prompts: Sequence[Tokens], stops: Set[int]) -> list[Tokens]:
    batch = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(batch, batch_first=True, padding_value=-1, padding_side="left").to(model.device)
    output = model.generate(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long())
    answers = []
    for row in output[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), len(row))  # padding follows
        answers.append(tuple(row[: end + 1]))
    return answers


@torch.no_grad()
def log_probs(model: Any, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[Tensor]:
    """Return the log-probs in nats of each answer's tokens at temperature 1, on the CPU in float64."""
    head, found = head_of(model, temperature=1.0), []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=model.device)
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        # The hidden state before a token is the one that predicts it.
        logps, _ = score(states[len(prompt) - 1 : -1], ids[0, len(prompt) :], head)
        found.append(logps.double().cpu())
    return found


def ask_trained(policy: Policy, prompts: list[Tokens], limit: int, progress: Progress) -> Trained:
    """Return the policy's greedy answers and log-probs. Raises ExportError if they are not finite."""
    base: Any = policy.model.get_base_model()
    with progress("answers of the trained policy", len(prompts)) as done:
        answers = greedy(base, prompts, policy.stop_ids, limit, done)
        logps = log_probs(base, prompts, answers)
        with policy.model.disable_adapter():
            bare = log_probs(base, prompts, answers)
    if not torch.cat(logps).isfinite().all():
        what = "the trained policy's log-probs are not finite, so there is nothing worth exporting"
        raise ExportError(what, next_step="train again with a lower optimizer.learning_rate")
    dtype = "nf4" if policy.quantized_modules else str(policy.head.weight.dtype).removeprefix("torch.")
    facts = {"trained_base": dtype, "adapter_difference": differences(logps, bare)[0]}
    return Trained(prompts, answers, logps, policy.stop_ids, facts)


def compare(model: Any, trained: Trained, limit: int, progress: Progress) -> tuple[dict[str, Any], list[Tensor]]:
    """Compare `model` with the trained policy; return the figures and its log-probs of the policy's answers.

    `greedy_agreement` is the share of prompts with the same greedy answer, `widest_parting` the largest gap between the
    merged model's own token and the policy's when two answers first differ. Differences of log-prob are per token, in
    nats; if the two bases differ, they are mostly the bases' own. `adapter_difference`, what the adapter itself
    changes, is their scale. Raises ExportError if the model stops at other tokens than the policy.
    """
    found = model.generation_config.eos_token_id
    stops = [found] if isinstance(found, int) else sorted(found or ())
    if set(stops) != trained.stop_ids:
        what = f"the merged model stops at the tokens {stops}, the trained policy at {sorted(trained.stop_ids)}"
        raise ExportError(what, next_step=REPORT_IT)
    with progress("answers of the merged model", len(trained.prompts)) as done:
        answers = greedy(model, trained.prompts, trained.stop_ids, limit, done)
        logps = log_probs(model, trained.prompts, trained.answers)
        own = log_probs(model, trained.prompts, answers)
    partings = [gap for gap in map(parting, trained.answers, answers, logps, own) if gap is not None]
    mean, worst = differences(trained.logps, logps)
    figures = {
        **trained.facts,
        "prompts": len(answers),
        "tokens": sum(map(len, trained.logps)),
        "greedy_agreement": 1 - len(partings) / len(answers),
        "widest_parting": max(partings, default=0.0),
        "mean_difference": mean,
        "worst_difference": worst,
    }
    return figures, logps


def parting(theirs: Tokens, ours: Tokens, theirs_logps: Tensor, our_logps: Tensor) -> float | None:
    """Return our log-prob minus theirs at the first token that differs, both by the merged model; None if none does."""
    place = next((place for place, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), None)
    return None if place is None else float(our_logps[place] - theirs_logps[place])


def differences(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, float]:
    """Return the mean and the worst |difference| over all tokens."""
    gaps = (torch.cat(list(first)) - torch.cat(list(second))).abs()
    return float(gaps.mean()), float(gaps.max())


def pass_rates(trained: EvalResult, merged: EvalResult) -> dict[str, Any]:
    """Return the pass@1 of the trained policy and of a merged model, with the interval of their paired difference."""
    low, high = paired_interval(trained.pass_rates, merged.pass_rates)
    rates = {"trained": trained.pass_at_1, "merged": merged.pass_at_1}
    return {"problems": trained.problems, **rates, "difference_low": low, "difference_high": high}


def loss_of(found: Mapping[str, Any] | None) -> str | None:
    """Return one sentence if the merged model's pass@1 is lower than the policy's by more than chance, else None."""
    rates = (found or {}).get("pass_at_1")
    if rates is None or rates["difference_high"] >= 0:
        return None
    return f"Merging lost pass@1 by more than chance: {_gap(rates)} on {rates['problems']:,} problems."


def remedy(merged_base: str, dtype: str, gguf: str | None) -> str:
    """Return the options of an export that keeps more of what was learned. The last one is what changes."""
    file = f"--gguf {gguf} " if gguf else ""
    if merged_base == "original":
        return f"--dtype {dtype} {file}--base trained"
    if gguf in ("f16", "bf16"):
        return "--gguf f32"  # without --dtype: a merge in 16 bit would be rounded all the same
    if gguf not in (None, "f32"):
        return f"--dtype {dtype} --gguf {'bf16' if gguf == 'q8_0' else 'q8_0'}"
    return f"{file}--dtype float32" if dtype in ("float16", "bfloat16") else "--what adapter"


def _gap(rates: Mapping[str, Any]) -> str:
    return points(rates["merged"] - rates["trained"], rates["difference_low"], rates["difference_high"])


def refuse_beyond_rounding(dtype: str, mean: float, worst: float, gap: float = 0.0) -> None:
    """Raise ExportError if the figures cannot come from rounding to `dtype`. NaN is refused too."""
    allowed, at_worst = ROUNDING[dtype], WORST_OVER_MEAN * ROUNDING[dtype]
    if not (mean <= allowed and worst <= at_worst and gap <= at_worst):
        raise ExportError(
            f"the merged model is not the trained policy: its log-probs differ by {mean:.2g} a token in the mean and "
            f"{worst:.2g} at worst, its greedy answers part at tokens {gap:.2g} apart; rounding to {dtype} explains "
            f"{allowed:g} in the mean and {at_worst:g} at worst. Nothing was kept",
            next_step="export the adapter instead (--what adapter), and please report the model's name",
        )


def coarser(*dtypes: str) -> str:
    """Return the dtype that rounds most."""
    return max(dtypes, key=lambda name: ROUNDING[name])


def table_of(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a comparison for people to read, with a column for another base if there is one."""
    every = {f"{found['merged_base']} base" if "other_base" in found else "": found}
    if other := found.get("other_base"):
        every[f"{other['merged_base']} base (not kept)"] = other
    measures: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "base": base_of,
        "prompts, answer tokens": lambda found: "{prompts:,}, {tokens:,}".format(**found),
        "same greedy answer": lambda found: "{greedy_agreement:.1%}".format(**found),
        "log-prob per token, mean difference": lambda found: "{mean_difference:.2g}".format(**found),
        "log-prob per token, worst difference": lambda found: "{worst_difference:.2g}".format(**found),
        "for scale: mean difference that the adapter makes": lambda found: "{adapter_difference:.2g}".format(**found),
    }
    if found["pass_at_1"] is not None:
        measures |= {
            "pass@1 before the merge": lambda found: "{trained:.1%}".format(**found["pass_at_1"]),
            "pass@1 of the merged model": lambda found: "{merged:.1%}".format(**found["pass_at_1"]),
            "difference": lambda found: _gap(found["pass_at_1"]),
            "problems": lambda found: "{problems:,}".format(**found["pass_at_1"]),
        }
    rows = [[measure, *(figure(found) for found in every.values())] for measure, figure in measures.items()]
    return ["", *every], rows


def base_of(found: Mapping[str, Any]) -> str:
    """Return the base that the adapter was merged into for people to read."""
    if found["trained_base"] != "nf4":
        return str(found["trained_base"])
    return "NF4, dequantised" if found["merged_base"] == "trained" else "original weights, not NF4"
