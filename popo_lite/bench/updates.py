"""One update of a policy by the trainer's own learner, and the longest sequence whose update fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from popo_lite.bench.meter import Meter, OutOfMemoryError, longest
from popo_lite.bench.synthetic import random_groups, step_size
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.training.learner import Learner
from popo_lite.training.metrics import UpdateFigures
from popo_lite.types import Group

UPDATE_STAGES = ("weights", "siamese", "update", "step")
"""What a step trains in: credit, the siamese pass, forward and backward, and the optimizer with the average."""


def train_once(learner: Learner, meter: Meter, step: int, groups: Sequence[Group]) -> UpdateFigures:
    """Everything of a step that trains, metered as `UPDATE_STAGES`."""
    with meter("weights"):
        plan = learner.credit(groups)
    assert plan is not None  # noqa: S101  # every step has a positive
    with meter("siamese"):
        anchors = learner.anchors(step, plan)
    with meter("update"):
        figures = learner.backward(plan, anchors, beta=learner.recipe.objective.beta, advance=lambda _: None)
    with meter("step"):
        learner.apply(step, figures, learner.prepare())
        learner.optimizer.zero_grad(set_to_none=True)
    return figures


def longest_update(
    policy: Policy, recipe_at: Callable[[int], Recipe], *, resolution: int, notify: Callable[[str], None]
) -> int | None:
    """Tokens of the longest sequence whose update fits, in multiples of `resolution`; None where not one does.

    `recipe_at` gives the recipe for a length. Two sequences are trained on: beyond the token budget they pass one at
    a time, and more of them take hardly more memory.
    """

    def fits(tokens: int) -> bool:
        recipe = recipe_at(tokens)
        size = replace(step_size(recipe), prompts=1, group_size=2, positives=2)
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
    """Bytes of what stays in memory, counted tensor by tensor: the same on every machine."""
    policy = learner.policy
    adapters = [parameter for _, parameter in policy.adapter_parameters()]
    trained = {id(parameter) for parameter in adapters}
    base = [part for p in policy.model.parameters() if id(p) not in trained for part in _parts(p)]
    state = [value for values in learner.optimizer.state.values() for value in values.values()]
    return {
        "base": _bytes(base),
        "adapters": _bytes(adapters),
        "predictor head": _bytes(policy.predictor.parameters()),
        "siamese average": learner.siamese.extra_bytes,
        "optimizer state": _bytes(value for value in state if isinstance(value, Tensor)),
    }


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
