"""What only a CUDA GPU can show: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from popo_lite.callbacks import Callback
from popo_lite.fused import Head, fused_loss, naive_logprobs
from popo_lite.run_folder import RunFolder
from popo_lite.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def fused(hidden, targets, head, a, b, compile_rows):
    def token_loss(logps, entropies, part):
        return (a[part] * logps).sum() + (b[part] * entropies).sum()

    output = fused_loss(hidden, targets, head, token_loss, compile_rows=compile_rows)
    output.loss.backward()
    return output.logps, output.entropies


def naive(hidden, targets, head, a, b, _):
    logps, entropies = naive_logprobs(hidden, targets, head)
    ((a * logps).sum() + (b * entropies).sum()).backward()
    return logps.detach(), entropies.detach()


@pytest.mark.parametrize("compile_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5000, 151936])
def test_fused_log_probs_are_no_further_from_float64_than_naive(vocabulary, dtype, compile_rows):
    """The large vocabulary is where a product over it might be summed in 16 bit."""
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, 256, device="cuda").to(dtype) / 8
    hidden = torch.randn(300, 256, device="cuda").to(dtype)
    targets = torch.randint(vocabulary, (300,), device="cuda")
    a, b = torch.randn(2, 300, device="cuda", dtype=torch.float64)

    def run(function, h, head):
        h = h.clone().requires_grad_()
        return (*function(h, targets, head, a, b, compile_rows), h.grad)

    exact = run(naive, hidden.double(), Head(weight=weight.double()))
    ours = run(fused, hidden, Head(weight=weight))
    theirs = run(naive, hidden, Head(weight=weight))
    assert ours[0].dtype is torch.float32
    for found, other, reference in zip(ours, theirs, exact, strict=True):
        error = (found.double() - reference).norm() / reference.norm()
        assert error <= 1.5 * (other.double() - reference).norm() / reference.norm() + 1e-7


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw8bit"])
def test_a_run_in_nf4_and_bfloat16_goes_on_from_its_checkpoint(tiny_recipe, tmp_path, optimizer):
    recipe = tiny_recipe(
        'train.device="cuda"', 'model.dtype="bfloat16"', f'optimizer.name="{optimizer}"', "train.steps=3",
        "train.save_steps=1", "data.prompts_per_step=8", "eval.problems=16", "train.gradient_checkpointing=true",
    )  # fmt: skip
    with Trainer(recipe, Callback()) as trainer:
        bytes_before = torch.cuda.memory_allocated()
        outcome = trainer.run(RunFolder(tmp_path))
        assert outcome.summary is not None
        weights = {name: p.detach().cpu() for name, p in trainer.policy.trainable_parameters()}
        waiting = [value for state in trainer.learner.optimizer.state.values() for value in state.values()]
        tensors = [
            value
            for value in waiting
            if isinstance(value, torch.Tensor) and not hasattr(value, "is_paged") and value.numel() > 1
        ]
        assert optimizer == "paged_adamw8bit" or {value.device.type for value in tensors} == {"cpu"}
        assert trainer.learner.siamese.drift() <= trainer.learner.siamese.drift_bound()
        state = 8 * sum(p.numel() for p in weights.values())
        assert torch.cuda.memory_allocated() - bytes_before < state + 2**24
    with Trainer(recipe, Callback()) as resumed:
        resumed.folder = RunFolder(tmp_path)
        resumed._restore()
        assert resumed.cursor.next_step == 3
        for name, parameter in resumed.policy.trainable_parameters():
            assert torch.equal(parameter.detach().cpu(), weights[name])


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_varlen_attention_equals_length_by_length(heads, monkeypatch):
    """FlashAttention over a packed row against SDPA, in bfloat16, forward and backward."""
    from popo_lite.policy import attention

    assert attention.kernel_of(torch.device("cuda"), torch.bfloat16, 64) == "varlen"
    torch.manual_seed(0)
    row = [(3,), (200, 1, 77), (130, 40), (51, 13, 13, 77)]
    lengths = [sum(block) for block in row]
    shapes = [(1, heads[0], sum(lengths), 64), *[(1, heads[1], sum(lengths), 64)] * 2]
    parts = [torch.randn(shape, device="cuda") for shape in shapes]
    direction = torch.randn(1, sum(lengths), heads[0], 64, device="cuda")

    def run(dtype, kernel):
        monkeypatch.setattr(attention, "kernel_of", lambda *_: kernel)
        inputs = [part.to(dtype).requires_grad_() for part in parts]
        mask = attention.layout(row)
        output, _ = attention._attention(torch.nn.Identity(), *inputs, mask, scaling=0.1)
        grads = torch.autograd.grad((output * direction.to(dtype)).sum(), inputs)
        return [tensor.double() for tensor in (output, *grads)]

    exact = run(torch.float64, "sdpa")
    for found, twin, reference in zip(run(torch.bfloat16, "varlen"), run(torch.bfloat16, "sdpa"), exact, strict=True):
        error, theirs = ((one - reference).norm() / reference.norm() for one in (found, twin))
        assert error < 1.5 * theirs + 1e-3
        assert error < 2e-2


def test_checkpoints_on_the_host_take_less_of_the_gpu_and_change_no_gradient(tiny_recipe):
    from popo_lite.policy.policy import load_policy

    def run(flag):
        policy = load_policy(
            tiny_recipe(
                'train.device="cuda"',
                'model.dtype="bfloat16"',
                "train.gradient_checkpointing=true",
                f"train.offload_activations={flag}",
            )
        )
        policy.model.train()
        row = [(4096,)] * 8
        ids = torch.randint(5, 300, (8 * 4096,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        torch.cuda.reset_peak_memory_stats()
        policy.hidden_states(ids, row).float().square().mean().backward()
        return torch.cuda.max_memory_allocated(), [p.grad for _, p in policy.adapter_parameters()]

    (kept, expected), (offloaded, found) = run("false"), run("true")
    for one, other in zip(found, expected, strict=True):  # attention's backward pass adds in no fixed order
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))
    assert offloaded < kept


def test_a_run_that_really_runs_out_of_memory_goes_on_with_smaller_micro_batches(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        'train.device="cuda"', 'model.dtype="bfloat16"', "train.steps=2", "eval.problems=0", "train.packing=false",
        "data.prompts_per_step=64", "rollout.num_generations=16", "train.tokens_per_microbatch=1000000",
    )  # fmt: skip
    with Trainer(recipe, Callback()) as trainer:
        fits = torch.cuda.memory_reserved() + 48 * 2**20
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(fits / torch.cuda.get_device_properties(0).total_memory)
        try:
            outcome = trainer.run(RunFolder(tmp_path))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert outcome.summary is not None
        assert trainer.learner.micro_batches.budget_tokens < 1000000
