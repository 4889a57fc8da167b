"""A trainer over a random base and a made-up task: what `popo-lite bench` measures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from popo_lite.callbacks import Callback
from popo_lite.grading import GradeRequest
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.load import import_unsloth, pick_device
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy, load_policy, wrap_policy
from popo_lite.recipe import Recipe
from popo_lite.samplers import SamplingParams
from popo_lite.tools.bench.random_base import random_base, stand_in_tokenizer, write_random_base
from popo_lite.trainer import Trainer
from popo_lite.types import Completion, FinishReason, Outcome, Problem, Prompt, Reward

Verdict = Callable[[int, int], float]
"""(number of the answer, answers of the step) -> its reward."""


def spread(positives: int) -> Verdict:
    """Return a verdict with `positives` rewards of 1, spread evenly over the answers of a step."""
    return lambda number, total: float((number + 1) * positives // total > number * positives // total)


class BenchTrainer(Trainer):
    """The trainer with random weights, prompts of random tokens, and a fixed verdict.

    All prompts and answers are as long as the recipe allows. `policy` reuses one that is loaded; with
    `random_answers` nothing is sampled.
    """

    def __init__(
        self,
        recipe: Recipe,
        callback: Callback,
        *,
        verdict: Verdict,
        memory_advice: Callable[[], str],
        policy: Policy | None = None,
        random_answers: bool = False,
    ) -> None:
        self._verdict, self._given_policy, self._random_answers = verdict, policy, random_answers
        # Off: every setting by which a step's size depends on the answers.
        fixed = {"rollout.skip_known": False, "rollout.adaptive.enabled": False, "reward.truncated": "grade"}
        recipe = recipe.with_values({**fixed, "output.samples_per_step": 0})
        super().__init__(recipe, callback, memory_advice=memory_advice)
        self.guard = SimpleNamespace(check=lambda *_: None)  # type: ignore[assignment]  # made-up answers have any gap

    def _open_task(self, _stack: ExitStack) -> None:
        self.policy = self._given_policy or random_policy(self.recipe)
        vocabulary, length = self.policy.head.weight.shape[0], self.recipe.rollout.max_prompt_length
        self.grader: Any = SimpleNamespace(grade=self._grade)
        self.train_task: Any = SimpleNamespace(train_problem=_problem, figures=lambda _: {}, name="random tokens")
        self.renderer: Any = SimpleNamespace(
            render=lambda problem: random_prompt(problem.meta["index"], vocabulary, length), text=lambda _: ""
        )
        self.held_out = []

    def _open_sampler(self, stack: ExitStack) -> None:
        self.callback.stage("engine")
        if self._random_answers:
            self.sampler: Any = RandomSampler(self.policy.head.weight.shape[0])
        else:
            super()._open_sampler(stack)

    def _grade(self, requests: Sequence[GradeRequest]) -> list[Reward]:
        values = [self._verdict(number, len(requests)) for number in range(len(requests))]
        return [Reward(value=value, outcome=Outcome.CORRECT if value else Outcome.INCORRECT) for value in values]


class RandomSampler:
    """Answers of random tokens at full length, with log-probs as of a nearly uniform policy."""

    engine, swap_seconds = "hf", ()

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def sample(
        self, prompts: Sequence[Prompt], *, count: int, params: SamplingParams, **_: Any
    ) -> list[list[Completion]]:
        """Make up `count` answers for each prompt."""

        def answer(prompt: Prompt, index: int) -> Completion:
            source = torch.Generator().manual_seed(prompt.problem.meta["index"] * 10_007 + index)
            length = params.max_completion_length
            return Completion(
                token_ids=tuple(torch.randint(self._vocabulary, (length,), generator=source).tolist()),
                sampler_logps=tuple((-torch.rand(length, generator=source) - 5.0).tolist()),
                finish_reason=FinishReason.LENGTH,
                text="",
            )

        return [[answer(prompt, index) for index in range(count)] for prompt in prompts]

    def sync(self, _: int) -> None:
        """Hold no weights, so there is nothing to swap."""


def random_policy(recipe: Recipe) -> Policy:
    """Return the policy that `load_policy` would, but over a random base and without stop ids.

    The unsloth backend only builds models from files, so it reads the base from a temporary folder.
    """
    device = pick_device(recipe.train.device)
    recipe = recipe.with_values({"lora.init_from": None})
    if recipe.model.backend == "unsloth":
        import_unsloth()
        with tempfile.TemporaryDirectory(prefix="popo-lite-bench-") as folder:
            write_random_base(recipe.model, device, Path(folder))
            release_memory()
            policy = load_policy(recipe.with_values({"model.id": folder, "model.revision": None}))
    else:
        base = random_base(recipe.model, device)
        adapted = add_adapters(base, recipe.lora, recipe.train.seed)
        if recipe.train.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        policy = wrap_policy(adapted, stand_in_tokenizer(), recipe, device)
    policy.stop_ids = frozenset()
    return policy


def random_prompt(index: int, vocabulary: int, tokens: int) -> Prompt:
    """Return problem `index` as a prompt of random tokens."""
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(index))
    return Prompt(problem=_problem(0, index), token_ids=tuple(ids.tolist()))


def _problem(_seed: int, index: int) -> Problem:
    return Problem(id=f"bench/{index}", messages=({"role": "user", "content": ""},), answer="", meta={"index": index})
