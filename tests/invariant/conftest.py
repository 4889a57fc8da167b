"""A trainer in float64 from end to end, on a Phi: its norms keep float64; Llama's and Qwen's pass through float32."""

from __future__ import annotations

import pytest
import torch

from popo_lite.trainer import Trainer
from small_models import save_phi
from updates import trainer_of


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    return save_phi(tmp_path_factory.mktemp("phi"))


@pytest.fixture
def trainer(phi, tiny_recipe):
    opened = []

    def make(*overrides: str) -> Trainer:
        entropy = [] if "objective.algorithm=raft" in overrides else ["objective.entropy_coef=0.05"]
        recipe = tiny_recipe(
            f'model.id="{phi}"', 'model.quantization="none"', 'model.dtype="float64"', "eval.problems=0",
            *entropy, "train.tokens_per_microbatch=1000000", *overrides,
        )  # fmt: skip
        found = trainer_of(recipe)
        opened.append(found)
        torch.manual_seed(4)
        with torch.no_grad():
            for _, parameter in found.policy.adapter_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
            # As if training had gone on for a while: the siamese is elsewhere.
            for average in found.learner.siamese.average.values():
                average.add_(0.05 * torch.randn(average.shape, dtype=average.dtype))
        return found

    yield make
    for one in opened:
        one.__exit__()
