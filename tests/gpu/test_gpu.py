"""What only a CUDA GPU can show: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from popo_lite.objective.logprobs import Head, naive_token_logprobs, token_logprobs
from popo_lite.run_folder import RunFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_log_probs_are_no_further_from_float64_than_naive(dtype):
    torch.manual_seed(0)
    weight = torch.randn(5000, 256, device="cuda").to(dtype) / 8
    hidden = torch.randn(700, 256, device="cuda").to(dtype)
    targets = torch.randint(5000, (700,), device="cuda")
    a, b = torch.randn(2, 700, device="cuda", dtype=torch.float64)

    def run(function, h, head):
        h = h.clone().requires_grad_()
        logps, entropies = function(h, targets, head)
        ((a * logps).sum() + (b * entropies).sum()).backward()
        return logps.detach(), entropies.detach(), h.grad

    exact = run(naive_token_logprobs, hidden.double(), Head(weight=weight.double()))
    ours = run(token_logprobs, hidden, Head(weight=weight))
    naive = run(naive_token_logprobs, hidden, Head(weight=weight))
    assert ours[0].dtype is torch.float32
    for found, twin, reference in zip(ours, naive, exact, strict=True):
        error = (found.double() - reference).norm() / reference.norm()
        assert error <= 1.5 * (twin.double() - reference).norm() / reference.norm() + 1e-7


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_a_run_in_nf4_and_bfloat16_goes_on_from_its_checkpoint(tiny_recipe, tmp_path, optimizer):
    from popo_lite.console.views import SilentView
    from popo_lite.training.loop import Trainer

    recipe = tiny_recipe(
        'train.device="cuda"', 'model.dtype="bfloat16"', f'optimizer.name="{optimizer}"', "train.steps=3",
        "train.checkpoint_every=1", "data.prompts_per_step=8", "eval.problems=16", "train.gradient_checkpointing=true",
    )  # fmt: skip
    with Trainer(recipe, SilentView()) as trainer:
        bytes_before = torch.cuda.memory_allocated()
        outcome = trainer.run(RunFolder(tmp_path))
        assert outcome.summary is not None
        weights = {name: p.detach().cpu() for name, p in trainer.policy.trainable_parameters()}
        waiting = [value for state in trainer.learner.optimizer.state.values() for value in state.values()]
        tensors = [value for value in waiting if isinstance(value, torch.Tensor) and not hasattr(value, "is_paged")]
        assert optimizer == "paged_adamw8bit" or {value.device.type for value in tensors} == {"cpu"}
        assert trainer.learner.siamese.drift() <= trainer.learner.siamese.drift_bound()
        state = 8 * sum(p.numel() for p in weights.values())
        assert torch.cuda.memory_allocated() - bytes_before < state + 2**24
    with Trainer(recipe, SilentView()) as resumed:
        resumed.run_folder = RunFolder(tmp_path)
        resumed._restore()
        assert resumed.cursor.next_step == 3
        for name, parameter in resumed.policy.trainable_parameters():
            assert torch.equal(parameter.detach().cpu(), weights[name])
