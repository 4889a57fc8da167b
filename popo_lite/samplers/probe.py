"""Check that a sampler uses the adapter it was given: other trainers sampled their base model unnoticed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from popo_lite.errors import EngineError
from popo_lite.fused import score
from popo_lite.policy.memory import is_out_of_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import Sampler, SamplingParams, not_finite
from popo_lite.types import Completion, Prompt, Rollout

log = logging.getLogger(__name__)

PROBE_VERSION = -1
PROBE_PROMPTS = 4
PROBE_TOKENS = 32
CLEAR_CHANGE_NATS = 0.3
"""The probe's adapter is enlarged until it moves the mean log-prob of the base's own answers by this much."""
LARGEST_RATIO = 0.2
"""Largest gap with the adapter, which is rounding, relative to the gap without it, which is its whole effect."""

MAX_GAP_NATS = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Default of `rollout.max_gap` by dtype, far above what two correct computations of a token's log-prob differ."""
WARN_RATIO = 0.25
"""Part of the limit above which a gap is reported."""
LARGEST_MULTIPLE = 3
"""Without `rollout.max_gap`, a gap may be this many times the run's first one, even above the default."""


class SamplerGuard:
    """Checks that the sampler uses the adapter it is given, at the start and by the log-probs of every step.

    `notify` takes warnings.
    """

    def __init__(
        self, recipe: Recipe, policy: Policy, sampler: Sampler, notify: Callable[[str], None] = log.warning
    ) -> None:
        self._recipe, self._policy, self._sampler, self._notify = recipe, policy, sampler, notify
        vllm, dtype = recipe.rollout.vllm, policy.head.weight.dtype
        # With the original base beside a quantised one the recipe asks for a sampler that is not quite the policy.
        self._another_base = sampler.engine != "hf" and vllm.base == "bf16" and policy.quantized_modules > 0
        coarse = sampler.engine == "vllm" and (vllm.kv_cache_dtype == "fp8" or vllm.base == "bf16")
        self._limit = recipe.rollout.max_gap or MAX_GAP_NATS[torch.bfloat16 if coarse else dtype]
        self._first: float | None = None
        self._reported = WARN_RATIO * self._limit

    def prove(self, prompts: Sequence[Prompt], notify: Callable[[str], None]) -> None:
        """Raise EngineError if the engine does not sample from the adapter it is given, or clearly from another base.

        `notify` takes the proof.
        """
        engine, where = self._sampler.engine, f'rollout.engine = "{self._sampler.engine}"'
        if engine == "hf":
            return  # it has no weights of its own
        prompts = list({prompt.problem.id: prompt for prompt in prompts}.values())
        policy_gap, probe_gap, ignored, answers = self.measure(prompts)
        if not probe_gap < LARGEST_RATIO * ignored:
            what = f"the {engine} sampler does not sample from the adapter it is given: log-probs of its own answers "
            what += f"differ from the trainer's by {probe_gap:.3g} nats on average, and would by {ignored:.3g} "
            what += "if the adapter were ignored"
            next_step = '--set rollout.engine="hf" samples from the trainer\'s own model; please report this'
            if self._recipe.rollout.vllm.kv_cache_dtype == "fp8":
                next_step = f'--set rollout.vllm.kv_cache_dtype="auto", or {next_step}'
            raise EngineError(what, where=where, next_step=next_step)
        if not self._another_base:
            self._judge(policy_gap, "before the first step", prompts, answers)
        if self._first is None:
            self._first = policy_gap
        notify(
            f"sampler proven: log-probs differ from the trainer's by {probe_gap:.2g} nats, and would by {ignored:.2g} "
            "if the adapter were ignored"
        )

    def check(self, step: int, gap_mean: float, rollouts: Sequence[Rollout]) -> None:
        """Raise EngineError if sampler and trainer disagree: then the rollouts come from another policy.

        `gap_mean` is the mean |sampler - policy| log-prob of the step's rollouts that were scored, nats; `rollouts` are
        some of them, with which the reason is found.
        """
        prompts, answers = [rollout.prompt for rollout in rollouts], [rollout.completion for rollout in rollouts]
        self._judge(gap_mean, f"step {step}", prompts, answers)
        if self._first is None:
            self._first = gap_mean

    def _judge(self, gap: float, where: str, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> None:
        """Warn of a gap that is unusual for the dtype, and raise EngineError for one above the limit."""
        limit = self._limit
        if self._recipe.rollout.max_gap is None and self._first is not None:
            limit = max(limit, LARGEST_MULTIPLE * self._first)
        dtype = self._recipe.model.dtype
        what = f"log-probs of the {self._sampler.engine} sampler and of the trainer differ by {gap:.3g} nats on average"
        if not gap <= limit:  # NaN must fail, too
            what += f", and {limit:.3g} is the most in {dtype} (rollout.max_gap): "
            cause, next_step = self._cause(prompts, answers, limit, where)
            raise EngineError(what + cause, where=where, next_step=next_step)
        if gap > self._reported:
            what += f", which is much in {dtype}; above {limit:.3g} (rollout.max_gap) the run stops: "
            self._notify(f"{where}: {what}{self._cause(prompts, answers, self._reported, where)[0]}")
            self._reported = 2 * gap

    def _cause(
        self, prompts: Sequence[Prompt], answers: Sequence[Completion], limit: float, where: str
    ) -> tuple[str, str]:
        """Return why the log-probs of `answers` differ by more than `limit`, and what to do.

        Scoring the answers without packing shows whether packed rows or the engine are the reason. Raises
        NotFiniteError if the trainer's log-probs are not finite.
        """
        packing, self._policy.packing = self._policy.packing, "off"
        try:
            plain = self._gap(prompts, answers)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self._policy.sharded_over.size > 1:
                raise  # other ranks wait in the middle of the same pass
            return "memory is too short to find out why", "lower rollout.vllm.gpu_memory_utilization, then resume"
        finally:
            self._policy.packing = packing
        if not math.isfinite(plain):
            raise not_finite(where, self._recipe.model.dtype)
        if packing != "off" and plain <= limit:
            return "the trainer's packed rows are the reason", "--set train.packing=false, and please report the model"
        if self._sampler.engine == "hf":
            cause = "token by token, with its cache, the model computes another distribution than over whole sequences"
            return cause, "--set model.attn_implementation=eager, or --set rollout.engine=vllm; and please report it"
        if self._another_base:
            cause = 'rollout.vllm.base = "bf16" serves another base than the one that is trained'
            return cause, '--set rollout.vllm.base="dequantized", or a larger rollout.max_gap'
        if self._sampler.engine == "vllm" and self._recipe.rollout.vllm.kv_cache_dtype == "fp8":
            cause = 'rollout.vllm.kv_cache_dtype = "fp8" rounds what the engine attends to'
            return cause, '--set rollout.vllm.kv_cache_dtype="auto", or a larger rollout.max_gap'
        cause = "the engine's adapter, base, cache or attention is not the trainer's"
        next_step = "--set rollout.engine=hf samples from the trainer's own model; servers must serve the trained base"
        return cause, f"{next_step}; if it is rounding, raise rollout.max_gap"

    @torch.no_grad()
    def measure(self, prompts: Sequence[Prompt]) -> tuple[float, float, float, list[Completion]]:
        """Sample with the policy's adapter and with a disturbed one, and score both with the trainer.

        Return the mean |sampler - trainer| log-prob, nats: with the policy's adapter, with the disturbed one, and with
        the disturbed one if the sampler ignored it; and the answers of the policy. Leaves policy and sampler as they
        were, after an error the policy alone. A collective: every rank measures its own sampler, or on its share of the
        prompts if they share the base, whose passes they do together.
        """
        policy, sampler, seed = self._policy, self._sampler, self._recipe.train.seed
        temperature = self._recipe.rollout.temperature
        params = SamplingParams(temperature=temperature, max_completion_length=PROBE_TOKENS)

        def sample(version: int) -> list[Completion]:
            sampler.sync(version)
            mine = policy.sharded_over.share(prompts)
            groups = sampler.sample(mine, count=1, params=params, policy_version=version, stream=("probe", seed))
            return [answer for [answer] in policy.sharded_over.merge(groups)]

        first = answers = sample(policy.version)
        policy_gap, before = self._gap(prompts, answers), self._score(prompts, answers)
        source = torch.Generator().manual_seed(seed)
        parameters = [parameter for _, parameter in policy.adapter_parameters()]
        # On the host: the engine is awake, so that the GPU is as full as it gets.
        kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        try:
            noise = [torch.randn(parameter.shape, generator=source) for parameter in parameters]
            for doubling in range(16):  # until the trainer's log-probs of these answers change clearly
                for parameter, direction in zip(parameters, noise, strict=True):
                    parameter.add_(direction.to(parameter), alpha=1e-3 * 2**doubling)
                change = float((self._score(prompts, answers) - before).abs().mean())
                if sampler.ranks.from_first(change) > CLEAR_CHANGE_NATS:  # all must have the same adapter
                    break
            answers = sample(PROBE_VERSION)
            probe_gap = self._gap(prompts, answers)
            with policy.model.disable_adapter():
                ignored = self._gap(prompts, answers)
        finally:
            for parameter, weights in zip(parameters, kept, strict=True):
                parameter.copy_(weights)
        sampler.sync(policy.version)  # not after an error, of which the other ranks do not know
        return policy_gap, probe_gap, ignored, first

    @torch.no_grad()
    def _gap(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> float:
        """Return the mean |sampler - trainer| log-prob of the answers' tokens, nats."""
        sampled = torch.tensor([logp for answer in answers for logp in answer.sampler_logps], dtype=torch.float64)
        return float((sampled - self._score(prompts, answers)).abs().mean())

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> Tensor:
        """Return the trainer's log-probs of all answers' tokens, one answer after another [N], on the host."""
        policy, parts = self._policy, []
        policy.start_passes()
        policy.model.eval()
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, start = torch.tensor(prompt.token_ids + answer.token_ids, device=policy.device), len(prompt.token_ids)
            with policy.sharded_over.together():
                hidden, targets = policy.hidden_states(ids, [[len(ids)]])[start - 1 : -1], ids[start:]
            if answer.own_positions is not None:
                hidden, targets = hidden[list(answer.own_positions)], targets[list(answer.own_positions)]
            logps, _ = score(hidden, targets, policy.head)
            parts.append(logps.double().cpu())
        return policy.sharded_over.from_first(torch.cat(parts))
