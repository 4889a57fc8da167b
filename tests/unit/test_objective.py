"""The objective by hand-computed cases, Theorem 3.1 and Lemma 3.2."""

from __future__ import annotations

import math

import pytest
import torch

from popo_lite.errors import PopoError
from popo_lite.objective.credit import effective_sample_size, positive_weights
from popo_lite.objective.losses import (
    StepNormalizers,
    cosine,
    entropy_coefficient,
    nll_coefficients,
    noisy_target,
    popo_loss,
    steered_beta,
)
from popo_lite.policy.predictor import PredictorHead
from popo_lite.policy.siamese import Siamese
from popo_lite.recipe import AnyObjective

NORMALIZERS = StepNormalizers(prompts=2, positives=3, positive_tokens=12, entropy_tokens=12, max_completion_length=10)


def test_weights_are_a_softmax_of_mean_logps():
    weights = positive_weights([-0.1, -0.3], [10, 20], [1.0, 1.0], AnyObjective())
    ratio = math.exp(0.2)
    assert weights.tolist() == pytest.approx([ratio / (1 + ratio), 1 / (1 + ratio)], rel=1e-12)


@pytest.mark.parametrize("kind", ["mean_logprob", "uniform", "sequence_logprob"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_weights_of_a_prompt_sum_to_one(kind, temperature):
    recipe = AnyObjective(weights=kind, weight_temperature=temperature)
    weights = positive_weights([-0.1, -2.0, -0.7], [4, 400, 90], [1.0, 1.0, 0.6], recipe)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert bool((weights >= 0).all())


def test_uniform_and_sequence_weights():
    uniform = positive_weights([-0.1, -5.0], [3, 3], [1.0, 1.0], AnyObjective(weights="uniform"))
    assert uniform.tolist() == [0.5, 0.5]
    literal = positive_weights([-0.1, -0.2], [10, 10], [1.0, 1.0], AnyObjective(weights="sequence_logprob"))
    assert float(literal[0] / literal[1]) == pytest.approx(math.exp(1.0))


def test_graded_rewards_scale_the_weights():
    weights = positive_weights([-0.5, -0.5], [3, 3], [1.0, 0.6], AnyObjective())
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
    found = positive_weights(mean_logps, lengths, rewards, AnyObjective(**settings))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_effective_sample_size_by_hand():
    """Means that differ by 0.06 over eight answers: hardly less than 8 by the mean, little more than 1 by the sum."""
    assert effective_sample_size(torch.tensor([0.75, 0.25])) == pytest.approx(1 / (0.5625 + 0.0625))
    means = [-0.40 - 0.06 * index / 7 for index in range(8)]
    mean = positive_weights(means, [300] * 8, [1.0] * 8, AnyObjective())
    assert effective_sample_size(mean) == pytest.approx(7.996916, rel=1e-6)
    literal = positive_weights(means, [300] * 8, [1.0] * 8, AnyObjective(weights="sequence_logprob"))
    # A geometric series with q = exp(-18 / 7): (1 + q) (1 - q^8)^2 / ((1 - q) (1 - q^16)) with q^8 next to nothing.
    assert effective_sample_size(literal) == pytest.approx(1.165501, rel=1e-6)


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        # Sum of w log pi: (-2 - 1) / 2 - 6 = -7.5; by 2 prompts x mean length 4, 12 tokens, 2 x 10.
        ("token_mean", 0.9375),
        ("reference", 0.625),
        ("sequence_sum", 0.375),
        # (1 + 0.25) / 2 + 1 = 1.625, by 2 prompts
        ("sequence_mean", 0.8125),
    ],
)
def test_nll_by_hand(normalizer, expected):
    recipe = AnyObjective(normalizer=normalizer)
    weights, log_pi = torch.tensor([0.5, 0.5, 1.0]).double(), torch.tensor([-2.0, -1.0, -6.0]).double()
    coefficients = nll_coefficients(weights, [2, 4, 6], NORMALIZERS, recipe)
    assert float(-(coefficients * log_pi).sum()) == pytest.approx(expected, rel=1e-12)


def test_similarity_by_hand():
    """Weights 1/4, 3/4 and 1 over 2 prompts, cosines 0.6, 0.8 and -1: (0.25 * 0.4 + 0.75 * 0.2 + 1 * 2) / 2."""
    terms = hand_case(
        weights=torch.tensor([0.25, 0.75, 1.0]).double(),
        predictions=torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]).double(),
        targets=torch.tensor([[3.0, 4.0], [3.0, 4.0], [-1.0, 0.0]]).double(),
    )
    assert float(terms.similarity) == pytest.approx(1.125, rel=1e-12)
    assert float(terms.similarity_cosine) == pytest.approx(-0.125, rel=1e-12)


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


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        ("token_mean", [0.5 / 8, 0.5 / 8, 1 / 8]),  # 2 prompts x mean length 4
        ("reference", [0.5 / 12, 0.5 / 12, 1 / 12]),
        ("sequence_sum", [0.5 / 20, 0.5 / 20, 1 / 20]),
        ("sequence_mean", [0.5 / (2 * 2), 0.5 / (2 * 4), 1 / (2 * 6)]),
    ],
)
def test_normalizers(normalizer, expected):
    weights = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
    found = nll_coefficients(weights, [2, 4, 6], NORMALIZERS, AnyObjective(normalizer=normalizer))
    assert found.tolist() == pytest.approx(expected)


def hand_case(**changes):
    case = {
        "token_gradient": torch.tensor(-7.0, dtype=torch.float64, requires_grad=True),  # only its gradient counts
        "policy": torch.tensor(2.25, dtype=torch.float64),
        "entropy": torch.tensor(0.7, dtype=torch.float64),
        "weights": torch.tensor([0.5, 1.5], dtype=torch.float64),
        "predictions": torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64),
        "targets": torch.tensor([[0.0, 2.0], [3.0, 3.0]], dtype=torch.float64),
        "normalizers": StepNormalizers(
            prompts=2, positives=2, positive_tokens=3, entropy_tokens=3, max_completion_length=9
        ),
        "alpha": 0.1,
        "beta": 0.01,
    }
    return popo_loss(**{**case, **changes})


def test_loss_by_hand():
    terms = hand_case()
    assert float(terms.nll) == pytest.approx(2.25)
    assert float(terms.similarity) == pytest.approx(0.5 / 2 * 1 + 1.5 / 2 * 0, abs=1e-12)
    assert float(terms.entropy) == pytest.approx(-0.7)
    assert float(terms.similarity_cosine) == pytest.approx(0.75)
    assert float(terms.total) == pytest.approx(2.25 + 0.1 * 0.25 - 0.01 * 0.7)


def test_similarity_is_bounded_and_off_when_asked():
    opposite = hand_case(targets=torch.tensor([[-1.0, 0.0], [-1.0, -1.0]], dtype=torch.float64))
    assert float(opposite.similarity) == pytest.approx(2.0)
    off = hand_case(predictions=None, targets=None)
    assert float(off.similarity) == 0.0
    assert float(off.total) == pytest.approx(float(off.nll) + 0.01 * float(off.entropy))


def test_noise_is_relative_to_the_features_and_detached():
    features = torch.randn(3, 1000, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 1000, dtype=torch.float64)
    once = noisy_target(features, noise, 0.02)
    assert not once.requires_grad
    torch.testing.assert_close(noisy_target(1000 * features, noise, 0.02), 1000 * once)
    rms = features.square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close((once - features) / rms, 0.02 * noise)
    assert float(cosine(features, once).detach().min()) > 0.999


def test_a_step_without_positives_has_no_normalizers():
    with pytest.raises(PopoError, match="without a positive"):
        StepNormalizers(prompts=0, positives=0, positive_tokens=0, entropy_tokens=0, max_completion_length=8)


def test_beta_is_constant_or_steered():
    assert steered_beta(0.01, 0.2, AnyObjective()) == 0.01
    steered = AnyObjective(target_entropy=0.4, entropy_coef_gain=0.1)
    assert steered_beta(0.01, 0.2, steered) == pytest.approx(0.01 * math.exp(0.05))
    assert steered_beta(0.01, 0.4, steered) == pytest.approx(0.01)
    beta = 0.01
    for _ in range(1000):
        beta = steered_beta(beta, 0.0, steered)
    assert beta == pytest.approx(1.0)  # a hundred times the recipe's
    assert steered_beta(0.01, 40.0, steered) == pytest.approx(0.01 * math.exp(-0.1))


def test_theorem_3_1():
    """For a softmax policy over outcomes, L = -sum_S+ w_i log pi_i + beta sum pi log pi, and any y' not in S+:
    dL/dz_y' = pi(y') * [1 + beta * (log pi(y') + H)], positive exactly when log pi(y') > -(1/beta + H)."""
    generator = torch.Generator().manual_seed(3)
    for beta in (0.0, 0.01, 0.5, 3.0):
        logits = (4 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
        positives = torch.tensor([2, 7, 11])
        logp = torch.log_softmax(logits, dim=0)
        weights = torch.softmax(logp[positives].detach(), dim=0)
        # The same functions as in training.
        normalizers = StepNormalizers(
            prompts=1, positives=3, positive_tokens=3, entropy_tokens=1, max_completion_length=1
        )
        entropy = -(logp.exp() * logp).sum()
        policy = -(weights * logp[positives]).sum()
        terms = popo_loss(
            token_gradient=policy + entropy_coefficient(normalizers, beta) * entropy,
            policy=policy,
            entropy=entropy,
            weights=weights,
            predictions=None,
            targets=None,
            normalizers=normalizers,
            alpha=0.0,
            beta=beta,
        )
        assert float(terms.total.detach()) == pytest.approx(float(terms.nll) + beta * float(terms.entropy))
        (gradient,) = torch.autograd.grad(terms.total, logits)
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
