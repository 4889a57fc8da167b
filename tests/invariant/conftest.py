"""A trainer in float64 from end to end, on a Phi: its norms keep float64; Llama's and Qwen's pass through float32."""

from __future__ import annotations

import pytest
import torch
import transformers

from popo_lite.policy.load import TINY_FOLDER
from popo_lite.trainer import Trainer
from updates import trainer_of


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi")
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(
        transformers.PhiConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    for parameter in model.parameters():
        parameter.data *= 4  # distributions far from uniform
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)
    return folder


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
