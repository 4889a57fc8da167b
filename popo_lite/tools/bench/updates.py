"""One update of a policy by the trainer's own learner, and the longest sequence whose update fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import Tensor, nn

from popo_lite.errors import UserInputError
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.tools.bench.meter import Meter, OutOfMemoryError, longest
from popo_lite.tools.bench.synthetic import random_groups, step_size
from popo_lite.training.credit import nothing_to_learn
from popo_lite.training.learner import Learner
from popo_lite.training.metrics import UpdateFigures
from popo_lite.types import Group

UPDATE_STAGES = ("weights", "siamese", "update", "step")
"""What a step trains in: credit, the siamese pass, forward and backward, and the optimizer with the average."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update's `figures`, and how many tokens, prompts included, it and the pass before it forwarded."""

    figures: UpdateFigures
    siamese_tokens: int
    update_tokens: int


def train_once(learner: Learner, meter: Meter, step: int, groups: Sequence[Group]) -> Update:
    """Everything of a step that trains, metered as `UPDATE_STAGES`, without `siamese` where nothing asks for it.

    Raises UserInputError where the algorithm learns nothing from the groups.
    """
    objective = learner.recipe.objective
    positives = sum(len(list(group.positives(objective.reward_threshold))) for group in groups)
    with meter("weights", sequences=positives):
        plan = learner.credit(groups)
    if plan is None:
        raise UserInputError(
            f"nothing to learn from {positives} positives: {nothing_to_learn(objective)}",
            where="--positives",
            next_step="leave it out: half of the rollouts are positive then",
        )
    count, anchored = len(plan.sequences), len(plan.anchored(objective))
    with meter("siamese", sequences=anchored) if anchored else nullcontext():
        anchors = learner.anchors(step, plan)
    with meter("update", sequences=count):
        figures = learner.backward(plan, anchors, beta=getattr(objective, "entropy_coef", 0.0), advance=lambda _: None)
    with meter("step", sequences=count):
        learner.apply(step, figures, learner.prepare())
        learner.optimizer.zero_grad(set_to_none=True)
    return Update(
        figures=figures,
        siamese_tokens=plan.anchored_tokens(objective),
        update_tokens=sum(sequence.rollout.tokens for sequence in plan.sequences),
    )


def longest_update(
    policy: Policy, recipe_at: Callable[[int], Recipe], *, resolution: int, notify: Callable[[str], None]
) -> int | None:
    """Tokens of the longest sequence whose update fits, in multiples of `resolution`; None where not one does.

    `recipe_at` gives the recipe for a length. Two sequences are trained on: beyond the token budget they pass one at
    a time, and more of them take hardly more memory.
    """

    def fits(tokens: int) -> bool:
        recipe = recipe_at(tokens)
        size = replace(step_size(recipe), prompts=1, num_generations=2, positives=2)
        meter = Meter(device=policy.device)
        learner = Learner(recipe, policy, notify=lambda _: None, relief=meter.exhausted)
        fitted = True
        try:
            train_once(learner, meter, 0, random_groups(size, policy))
        except OutOfMemoryError:
            fitted = False
        policy.model.zero_grad(set_to_none=True)
        del learner
        release_memory()
        notify(f"{tokens:,} tokens: {'fits' if fitted else 'out of memory'}")
        return fitted

    return longest(fits, first=resolution, last=policy.context_tokens, step=resolution)


def tensor_bytes(learner: Learner) -> dict[str, int]:
    """Bytes of what stays in memory, counted tensor by tensor: the same on every machine.

    As in the plan, paged optimizer state is left out: the driver keeps its pages in host memory.
    """
    policy = learner.policy
    state = [value for values in learner.optimizer.state.values() for value in values.values()]
    return {
        "base": frozen_bytes(policy.model),
        "adapters": _bytes(parameter for _, parameter in policy.adapter_parameters()),
        "predictor head": _bytes(policy.predictor.parameters()),
        "siamese average": learner.siamese.extra_bytes,
        "optimizer state": _bytes(
            value for value in state if isinstance(value, Tensor) and not getattr(value, "is_paged", False)
        ),
    }


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of a model's frozen parameters with their quantisation statistics: the base, adapted or not."""
    return _bytes(part for p in model.parameters() if not p.requires_grad for part in _parts(p))


def _parts(parameter: Tensor) -> Iterator[Tensor]:
    """The parameter itself and, of one in 4 bit, its quantisation statistics."""
    yield parameter
    state = getattr(parameter, "quant_state", None)
    for level in (state, getattr(state, "state2", None)):
        parts = (getattr(level, name, None) for name in ("absmax", "code", "offset"))
        yield from (part for part in parts if isinstance(part, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors: what is shared, such as the table of NF4's values, counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
