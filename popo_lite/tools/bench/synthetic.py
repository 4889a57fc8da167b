"""A policy of random weights and rollouts out of nothing, of the sizes that a recipe's step has."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from popo_lite.errors import UserInputError
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.load import import_unsloth, pick_device
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy, load_policy, wrap_policy
from popo_lite.recipe import Recipe
from popo_lite.tools.bench.random_base import architecture, random_base, stand_in_tokenizer, write_random_base
from popo_lite.types import Completion, FinishReason, Group, Outcome, Problem, Prompt, Reward, Rollout


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """How much one step is: P prompts of G rollouts each, all of the same length, `positives` of them rewarded."""

    prompts: int
    num_generations: int
    prompt_tokens: int
    completion_tokens: int
    positives: int

    @property
    def sequence_tokens(self) -> int:
        """Tokens of a prompt with its answer."""
        return self.prompt_tokens + self.completion_tokens


def step_size(recipe: Recipe, positives: int | None = None) -> StepSize:
    """The recipe's step with every prompt and answer at its longest; half of the rollouts are positive if not told.

    Raises UserInputError where more positives are asked for than there are rollouts.
    """
    rollouts = recipe.data.prompts_per_step * recipe.rollout.num_generations
    if positives is not None and positives > rollouts:
        raise UserInputError(
            f"{positives} positives are asked for, and a step has {recipe.data.prompts_per_step} x "
            f"{recipe.rollout.num_generations} = {rollouts} rollouts",
            where="--positives",
            next_step=f"--positives {rollouts}",
        )
    return StepSize(
        prompts=recipe.data.prompts_per_step,
        num_generations=recipe.rollout.num_generations,
        prompt_tokens=recipe.rollout.max_prompt_length,
        completion_tokens=recipe.rollout.max_completion_length,
        positives=positives or (rollouts + 1) // 2,
    )


def context_tokens(recipe: Recipe) -> int | None:
    """The longest sequence that the model is made for; None where its config sets no limit. Builds nothing."""
    return getattr(architecture(recipe.model), "max_position_embeddings", None)


def random_policy(recipe: Recipe, *, seed: int = 0) -> Policy:
    """The policy that `load_policy` would give, over a random base with fresh adapters, and without stop ids.

    A warm start (`lora.init_from`) is left out: it changes no shape. The unsloth backend reads the base from a
    temporary folder, as it builds models from files alone.
    """
    device = pick_device(recipe.train.device)
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"init_from": None})})
    if recipe.model.backend == "unsloth":
        import_unsloth()
        with tempfile.TemporaryDirectory(prefix="popo-lite-bench-") as folder:
            write_random_base(recipe.model, device, Path(folder), seed=seed)
            release_memory()
            model = recipe.model.model_copy(update={"id": folder, "revision": None})
            policy = load_policy(recipe.model_copy(update={"model": model}))
    else:
        base = random_base(recipe.model, device, seed=seed)
        adapted = add_adapters(base, recipe.lora, recipe.train.seed)
        if recipe.train.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        policy = wrap_policy(adapted, stand_in_tokenizer(), recipe, device)
    policy.stop_ids = frozenset()
    return policy


def random_prompts(size: StepSize, vocabulary: int, *, seed: int = 0) -> list[Prompt]:
    """`size.prompts` prompts of `size.prompt_tokens` random token ids each."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (size.prompts, size.prompt_tokens), generator=source).tolist()
    return [
        Prompt(
            problem=Problem(id=f"bench/{index}", messages=({"role": "user", "content": ""},), answer=""),
            token_ids=tuple(row),
        )
        for index, row in enumerate(ids)
    ]


def random_completions(size: StepSize, vocabulary: int, *, seed: int = 0) -> list[list[Completion]]:
    """Random answers for each prompt where none are sampled; log-probs as of a nearly uniform policy."""
    source = torch.Generator().manual_seed(seed + 1)
    shape = (size.prompts, size.num_generations, size.completion_tokens)
    ids = torch.randint(vocabulary, shape, generator=source).tolist()
    logps = (-torch.rand(shape, generator=source) - 5.0).tolist()
    return [
        [
            Completion(token_ids=tuple(tokens), sampler_logps=tuple(values), finish_reason=FinishReason.LENGTH, text="")
            for tokens, values in zip(*pair, strict=True)
        ]
        for pair in zip(ids, logps, strict=True)
    ]


def rewarded(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], positives: int, *, policy_version: int = 0
) -> list[Group]:
    """Groups in which `positives` rollouts, spread evenly over the step, have reward 1 and all others 0."""
    total = sum(len(group) for group in completions)
    groups, place = [], 0
    for prompt, answers in zip(prompts, completions, strict=True):
        rollouts = []
        for index, completion in enumerate(answers):
            right = (place + 1) * positives // total > place * positives // total
            place += 1
            reward = Reward(value=float(right), outcome=Outcome.CORRECT if right else Outcome.INCORRECT)
            rollouts.append(
                Rollout(prompt=prompt, completion=completion, reward=reward, policy_version=policy_version, index=index)
            )
        groups.append(Group(rollouts=tuple(rollouts)))
    return groups


def random_groups(size: StepSize, policy: Policy, *, seed: int = 0) -> list[Group]:
    """A step's groups where nothing is sampled, as of the policy's current version."""
    vocabulary = policy.head.weight.shape[0]
    prompts = random_prompts(size, vocabulary, seed=seed)
    completions = random_completions(size, vocabulary, seed=seed)
    return rewarded(prompts, completions, size.positives, policy_version=policy.version)
