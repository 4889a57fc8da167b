"""The objective by hand-computed cases, Theorem 3.1 and Lemma 3.2."""

from __future__ import annotations

import math

import pytest
import torch

from popo_lite.objective import (
    LOSSES,
    Tokens,
    effective_sample_size,
    grpo,
    noisy_target,
    popo,
    positive_weights,
    similarity_loss,
    steered_entropy_coef,
)
from popo_lite.policy.siamese import PredictorHead, Siamese
from popo_lite.recipe import GrpoObjective, MixedObjective, PopoObjective, RaftObjective


def test_weights_are_a_softmax_of_mean_logps():
    weights = positive_weights([-0.1, -0.3], [10, 20], [1.0, 1.0], PopoObjective())
    ratio = math.exp(0.2)
    assert weights.tolist() == pytest.approx([ratio / (1 + ratio), 1 / (1 + ratio)], rel=1e-12)


@pytest.mark.parametrize("kind", ["mean_logprob", "uniform", "sequence_logprob"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_weights_of_a_prompt_sum_to_one(kind, temperature):
    recipe = PopoObjective(weights=kind, weight_temperature=temperature)
    weights = positive_weights([-0.1, -2.0, -0.7], [4, 400, 90], [1.0, 1.0, 0.6], recipe)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert bool((weights >= 0).all())


def test_uniform_and_sequence_weights():
    uniform = positive_weights([-0.1, -5.0], [3, 3], [1.0, 1.0], PopoObjective(weights="uniform"))
    assert uniform.tolist() == [0.5, 0.5]
    literal = positive_weights([-0.1, -0.2], [10, 10], [1.0, 1.0], PopoObjective(weights="sequence_logprob"))
    assert float(literal[0] / literal[1]) == pytest.approx(math.exp(1.0))


def test_graded_rewards_scale_the_weights():
    weights = positive_weights([-0.5, -0.5], [3, 3], [1.0, 0.6], PopoObjective())
    assert weights.tolist() == pytest.approx([1 / 1.6, 0.6 / 1.6])


@pytest.mark.parametrize(
    ("settings", "mean_logps", "lengths", "rewards", "expected"),
    [
        # exp(0.2 / 0.5) = 1.491825 to 1
        ({"weight_temperature": 0.5}, (-0.1, -0.3), (10, 20), (1.0, 1.0), (0.598688, 0.401312)),
        # and 1.491825 to 0.5
        ({"weight_temperature": 0.5}, (-0.1, -0.3), (10, 20), (1.0, 0.5), (0.748974, 0.251026)),
        # The mean prefers the long answer, exp(0.4) to 1; the sums are -1 and -2, exp(1) to 1.
        ({}, (-0.5, -0.1), (2, 20), (1.0, 1.0), (0.401312, 0.598688)),
        ({"weights": "sequence_logprob"}, (-0.5, -0.1), (2, 20), (1.0, 1.0), (0.731059, 0.268941)),
        ({"weights": "sequence_logprob", "weight_temperature": 2.0}, (-0.5, -0.1), (2, 20), (1.0, 1.0),
         (0.622459, 0.377541)),
        # Uniform but for the reward: 1 to 0.6, whatever the log-probs and the temperature.
        ({"weights": "uniform", "weight_temperature": 0.1}, (-0.1, -5.0), (3, 30), (1.0, 0.6), (0.625, 0.375)),
    ],
)  # fmt: skip
def test_weights_by_hand(settings, mean_logps, lengths, rewards, expected):
    found = positive_weights(mean_logps, lengths, rewards, PopoObjective(**settings))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_effective_sample_size_by_hand():
    """Means that differ by 0.06 over eight answers: hardly less than 8 by the mean, little more than 1 by the sum."""
    assert effective_sample_size(torch.tensor([0.75, 0.25])) == pytest.approx(1 / (0.5625 + 0.0625))
    means = [-0.40 - 0.06 * index / 7 for index in range(8)]
    mean = positive_weights(means, [300] * 8, [1.0] * 8, PopoObjective())
    assert effective_sample_size(mean) == pytest.approx(7.996916, rel=1e-6)
    literal = positive_weights(means, [300] * 8, [1.0] * 8, PopoObjective(weights="sequence_logprob"))
    # A geometric series with q = exp(-18 / 7): (1 + q) (1 - q^8)^2 / ((1 - q) (1 - q^16)) with q^8 next to nothing.
    assert effective_sample_size(literal) == pytest.approx(1.165501, rel=1e-6)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def tokens_of(weights, divisors, *, sampler=0.0, reference=None, entropy_weights=0.25):
    """Four tokens: two of a first sequence, one each of two others."""
    return Tokens(
        sampler_logps=torch.full((4,), sampler).double(),
        reference_logps=reference,
        weights=tensor(*weights),
        divisors=tensor(*divisors),
        entropy_weights=torch.full((4,), entropy_weights).double(),
    )


LOGPS, ENTROPIES = tensor(-1.0, -2.0, -0.5, -4.0), tensor(0.4, 0.8, 1.2, 1.6)


def test_popo_by_hand():
    """(0.5 * 3 / 6) + 0.5 * 0.5 / 6 + 1 * 4 / 8 = 0.25 + 0.041667 + 0.5, less 0.01 times the mean entropy 1."""
    tokens = tokens_of((0.5, 0.5, 0.5, 1.0), (6.0, 6.0, 6.0, 8.0))
    assert float(popo(LOGPS, ENTROPIES, tokens, PopoObjective(), 0.01)) == pytest.approx(0.7916666667 - 0.01)
    assert float(LOSSES["raft"](LOGPS, ENTROPIES, tokens, RaftObjective(), 0.0)) == pytest.approx(0.7916666667)
    parts = [popo(LOGPS[p], ENTROPIES[p], tokens.at(p), PopoObjective(), 0.01) for p in (slice(0, 3), slice(3, 4))]
    assert float(sum(parts)) == pytest.approx(0.7916666667 - 0.01)


def test_mixed_by_hand():
    """A weight below 0 lowers: 0.25 + 0.041667 - 0.1 * 4 / 8."""
    tokens = tokens_of((0.5, 0.5, 0.5, -0.1), (6.0, 6.0, 6.0, 8.0), entropy_weights=0.0)
    found = LOSSES["mixed"](LOGPS, ENTROPIES, tokens, MixedObjective(), 0.01)
    assert float(found) == pytest.approx(0.25 + 0.5 * 0.5 / 6 - 0.05)


def test_truncated_importance_by_hand():
    """exp(policy - sampler) with the sampler at -1: 1, exp(-1), exp(0.5) capped at 1.2, exp(-3)."""
    tokens = tokens_of((1.0,) * 4, (1.0,) * 4, sampler=-1.0)
    logps = LOGPS.clone().requires_grad_()
    loss = LOSSES["raft"](logps, ENTROPIES, tokens, RaftObjective(importance_sampling_clip_max=1.2), 0.0)
    factors = [1.0, math.exp(-1), 1.2, math.exp(-3)]
    assert float(loss) == pytest.approx(factors[0] + 2 * factors[1] + 0.5 * factors[2] + 4 * factors[3])
    loss.backward()
    assert (-logps.grad).tolist() == pytest.approx(factors)  # the factor is a constant


def test_grpo_by_hand():
    """Ratios 1, exp(-1), exp(0.5), exp(-3) and advantages 1, 1, 2, -1: the third is clipped above, the fourth below."""
    objective = GrpoObjective(epsilon=0.2, epsilon_high=0.3, kl_coef=0.1)
    plain = tokens_of((1.0, 1.0, 2.0, -1.0), (4.0, 4.0, 2.0, 2.0), sampler=-1.0)
    logps = LOGPS.clone().requires_grad_()
    loss = grpo(logps, ENTROPIES, plain, objective, 0.0)
    ratios = [1.0, math.exp(-1), math.exp(0.5), math.exp(-3)]
    assert float(loss) == pytest.approx(-(1 + ratios[1]) / 4 - 2 * 1.3 / 2 + 0.8 / 2)
    loss.backward()
    assert logps.grad.tolist() == pytest.approx([-1 / 4, -ratios[1] / 4, 0.0, 0.0])
    with_kl = plain._replace(reference_logps=LOGPS + tensor(0.0, 0.5, -0.5, 0.0))
    extra = grpo(LOGPS, ENTROPIES, with_kl, objective, 0.0) - loss.detach()
    terms = [ratios[1] * (math.exp(0.5) - 1.5) / 4, ratios[2] * (math.exp(-0.5) - 0.5) / 2]
    assert float(extra) == pytest.approx(0.1 * sum(terms))
    assert float(grpo(LOGPS, ENTROPIES, plain, objective, 0.01) - loss.detach()) == pytest.approx(-0.01)


def test_similarity_by_hand():
    """Weights 1/4, 3/4 and 1 over 2 prompts, cosines 0.6, 0.8 and -1: (0.25 * 0.4 + 0.75 * 0.2 + 1 * 2) / 2."""
    loss, mean_cosine = similarity_loss(
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]).double().requires_grad_(),
        torch.tensor([[3.0, 4.0], [3.0, 4.0], [-1.0, 0.0]]).double(),
        tensor(0.25, 0.75, 1.0) / 2,
    )
    assert float(loss.detach()) == pytest.approx(1.125, rel=1e-12)
    assert float(mean_cosine) == pytest.approx(-0.125, rel=1e-12)
    assert not mean_cosine.requires_grad


def test_noise_by_hand():
    """The root mean square of (3, 4, 0, 0) is 2.5, so sigma 0.02 moves by 0.05 a unit of noise."""
    found = noisy_target(torch.tensor([[3.0, 4.0, 0.0, 0.0]]).double(), torch.tensor([[1.0, -2.0, 0.5, 0.0]]), 0.02)
    assert found.tolist() == [pytest.approx([3.05, 3.9, 0.025, 0.0], rel=1e-12)]


def test_the_predictor_head_by_hand():
    """Linear, LayerNorm, ReLU, Linear: (1, 3) has mean 2 and deviation 1, and ReLU drops what is below the mean."""
    head = PredictorHead(2, 2).double()
    with torch.no_grad():
        for layer in (part for part in head.modules() if isinstance(part, torch.nn.Linear)):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    assert head(torch.tensor([[1.0, 3.0]]).double()).tolist() == [pytest.approx([0.0, 0.999995], abs=1e-6)]


def test_noise_is_relative_to_the_features_and_detached():
    features = torch.randn(3, 1000, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 1000, dtype=torch.float64)
    once = noisy_target(features, noise, 0.02)
    assert not once.requires_grad
    torch.testing.assert_close(noisy_target(1000 * features, noise, 0.02), 1000 * once)
    rms = features.square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close((once - features) / rms, 0.02 * noise)
    assert float(torch.cosine_similarity(features, once).detach().min()) > 0.999


def test_the_entropy_coefficient_is_constant_or_steered():
    assert steered_entropy_coef(0.01, 0.2, PopoObjective()) == 0.01
    steered = PopoObjective(target_entropy=0.4, entropy_coef_gain=0.1)
    assert steered_entropy_coef(0.01, 0.2, steered) == pytest.approx(0.01 * math.exp(0.05))
    assert steered_entropy_coef(0.01, 0.4, steered) == pytest.approx(0.01)
    beta = 0.01
    for _ in range(1000):
        beta = steered_entropy_coef(beta, 0.0, steered)
    assert beta == pytest.approx(1.0)  # a hundred times the recipe's
    assert steered_entropy_coef(0.01, 40.0, steered) == pytest.approx(0.01 * math.exp(-0.1))


def test_theorem_3_1():
    """For a softmax policy over outcomes, L = -sum_S+ w_i log pi_i + beta sum pi log pi, and any y' not in S+:
    dL/dz_y' = pi(y') * [1 + beta * (log pi(y') + H)], positive exactly when log pi(y') > -(1/beta + H)."""
    generator = torch.Generator().manual_seed(3)
    for beta in (0.0, 0.01, 0.5, 3.0):
        logits = (4 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
        positives = torch.tensor([2, 7, 11])
        logp = torch.log_softmax(logits, dim=0)
        weights = torch.softmax(logp[positives].detach(), dim=0)
        # The loss of training: a divisor of 1, and the entropy of the distribution counted once.
        tokens = Tokens(
            sampler_logps=logp[positives].detach(),
            reference_logps=None,
            weights=weights,
            divisors=torch.ones(3).double(),
            entropy_weights=tensor(1.0, 0.0, 0.0),
        )
        entropy = -(logp.exp() * logp).sum()
        loss = popo(logp[positives], entropy.expand(3), tokens, PopoObjective(), beta)
        assert float(loss.detach()) == pytest.approx(float(-(weights * logp[positives]).sum() - beta * entropy))
        (gradient,) = torch.autograd.grad(loss, logits)
        logp = logp.detach()
        pi, entropy = logp.exp(), -(logp.exp() * logp).sum()
        others = torch.ones(50, dtype=torch.bool)
        others[positives] = False
        expected = pi * (1 + beta * (logp + entropy))
        torch.testing.assert_close(gradient[others], expected[others], rtol=1e-10, atol=1e-10)
        if beta > 0:
            pushed_down = logp > -(1 / beta + entropy)
            assert torch.equal(gradient[others] > 0, pushed_down[others])


@pytest.mark.parametrize("tau", [0.0, 0.9, 0.995])
def test_lemma_3_2_and_the_closed_form(tau):
    """Drift stays within tau * (largest update) / (1 - tau), and the average is the exponential sum it should be."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(20, dtype=torch.float64))
    siamese = Siamese([("theta", parameter)], tau)
    expected = parameter.detach().clone()
    for _ in range(300):
        move = torch.randn(20, dtype=torch.float64) * torch.rand(1, dtype=torch.float64)
        with torch.no_grad():
            parameter += move
        siamese.update(float(move.norm()))
        expected = tau * expected + (1 - tau) * parameter.detach()
        assert siamese.drift() <= siamese.drift_bound() + 1e-12
        assert siamese.drift() == pytest.approx(float((parameter.detach() - expected).norm()), rel=1e-9, abs=1e-12)


def test_lemma_3_2_is_tight_for_a_constant_direction():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    siamese = Siamese([("theta", parameter)], 0.9)
    for _ in range(400):
        with torch.no_grad():
            parameter += torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64)
        siamese.update(0.1)
    assert siamese.drift() / siamese.drift_bound() == pytest.approx(1.0, abs=1e-9)


def test_a_clipped_token_has_no_gradient_however_far_the_sampler_is():
    logps = tensor(0.0, 0.0, 0.0, 0.0).float().requires_grad_()
    tokens = Tokens(*(None if values is None else values.float() for values in tokens_of((1.0,) * 4, (1.0,) * 4)))
    far = tokens._replace(sampler_logps=torch.tensor([-200.0, 0.0, 0.0, 0.0]))
    grpo(logps, ENTROPIES.float(), far, GrpoObjective(), 0.0).backward()
    assert logps.grad.tolist() == [0.0, -1.0, -1.0, -1.0]
