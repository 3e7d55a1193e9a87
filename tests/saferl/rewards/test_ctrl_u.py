"""The worked values of the disagreements and the loss, their gradients, and what the weighting buys."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saferl.errors import UsageError
from saferl.rewards.ctrl_u import (
    absolute_disagreement,
    classification_disagreement,
    ensemble_disagreement,
    stationary_uncertainty,
    uncertainty_loss,
    uncertainty_weighted_reward,
)


def d(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PRIMARY, AUXILIARY = d(0.7, 0.2, 0.1).log()[None], d(0.5, 0.3, 0.2).log()[None]


def test_the_direction_of_the_divergence() -> None:
    uncertainty = classification_disagreement(PRIMARY, AUXILIARY)
    assert uncertainty.item() == pytest.approx(0.092033, abs=1e-6)
    assert classification_disagreement(AUXILIARY, PRIMARY).item() == pytest.approx(0.085123, abs=1e-6)
    assert uncertainty_loss(d(1), uncertainty, 0.0).item() == pytest.approx(0.912075, abs=1e-6)


def test_the_divergence_of_maps_of_logits() -> None:
    primary, auxiliary = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    uncertainty = classification_disagreement(primary, auxiliary)
    assert uncertainty.shape == (2, 3, 4)
    assert (uncertainty >= 0).all()
    one = classification_disagreement(primary[1, :, 2, 3], auxiliary[1, :, 2, 3], dim=0)
    assert one.item() == pytest.approx(uncertainty[1, 2, 3].item(), abs=1e-6)
    # Logits are known up to a constant.
    shifted = classification_disagreement(primary + 7, auxiliary - 3)
    assert torch.allclose(shifted, uncertainty, atol=1e-5)
    assert classification_disagreement(primary, primary).abs().max() == 0


def test_confident_predictions_that_contradict_each_other_stay_finite() -> None:
    primary, auxiliary = d(2000, 0)[None], d(0, 2000)[None]
    assert classification_disagreement(primary, auxiliary).item() == pytest.approx(2000)


def test_detach_leaves_the_weight_and_cuts_the_gradient() -> None:
    for measure, shape in ((classification_disagreement, (3, 4)), (absolute_disagreement, (3,))):
        primary = torch.randn(shape, requires_grad=True)
        auxiliary = torch.randn(shape, requires_grad=True)
        attached, cut = measure(primary, auxiliary), measure(primary, auxiliary, detach=True)
        assert torch.equal(attached, cut)
        assert not cut.requires_grad
        pull = torch.autograd.grad(attached.sum(), auxiliary)[0]
        # The penalty pulls the predictions together.
        closer = measure(primary, auxiliary - 1e-2 * pull).sum()
        assert closer < attached.sum()


def test_absolute_differences() -> None:
    assert absolute_disagreement(d(1, -2, 3), d(0.5, 2, 3)).tolist() == [0.5, 4, 0]


def test_the_stationary_uncertainty() -> None:
    found = stationary_uncertainty(d(2, 0.5, 0.1), 0.5)
    assert found.tolist() == pytest.approx([1.386294, 0, 0], abs=1e-6)
    assert uncertainty_loss(d(2), found[:1], 0.5).item() == pytest.approx(1.193147, abs=1e-6)
    assert uncertainty_loss(d(2), d(0), 0.5).item() == 2


@given(st.floats(0.01, 50), st.floats(0.01, 5), st.floats(0, 10))
def test_no_other_uncertainty_is_better(loss: float, penalty: float, other: float) -> None:
    best = stationary_uncertainty(d(loss), penalty)
    least = uncertainty_loss(d(loss), best, penalty)
    assert least <= uncertainty_loss(d(loss), d(other), penalty) + 1e-12
    assert best >= 0


def test_a_deterministic_reward_model_is_certain() -> None:
    readings = torch.randn(6).expand(4, 6)
    assert ensemble_disagreement(readings).tolist() == [0] * 6
    rewards = readings[0]
    assert torch.equal(uncertainty_weighted_reward(rewards, torch.zeros(6), 0.5), rewards - 0.5)


def test_the_ensemble_axis() -> None:
    readings = torch.randn(6, 5, requires_grad=True)
    uncertainty = ensemble_disagreement(readings, dim=1)
    assert uncertainty.shape == (6,)
    assert not uncertainty.requires_grad
    centred = readings[2] - readings[2].mean()
    assert uncertainty[2].item() == pytest.approx((centred.square().sum() / 4).item(), abs=1e-6)


def test_an_uncertain_reward_counts_as_its_baseline() -> None:
    rewards = d(3, 5, -1)
    weighted = uncertainty_weighted_reward(rewards, d(0, math.log(2), 60), rewards.mean())
    assert weighted.tolist() == pytest.approx([3 - 7 / 3, (5 - 7 / 3) / 2, 0], abs=1e-12)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="equal"):
        classification_disagreement(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(UsageError, match="equal"):
        absolute_disagreement(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(UsageError, match="equal"):
        uncertainty_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(UsageError, match="at least 0"):
        uncertainty_loss(d(1), d(1), -0.1)
    with pytest.raises(UsageError, match="positive"):
        stationary_uncertainty(d(1), 0.0)
    with pytest.raises(UsageError, match="2 readings"):
        ensemble_disagreement(torch.zeros(1, 4))
    with pytest.raises(UsageError, match="broadcast"):
        uncertainty_weighted_reward(torch.zeros(2), torch.zeros(2), torch.zeros(3, 1))


def gold_reward(noise: float, weighted: bool, seed: int) -> float:
    """Mean gold reward of a linear policy learnt from a noisy reward model, at most 0.

    Contexts x in R^4; the policy acts a ~ N(W x, 0.3^2), the gold reward of its mean is -(W x - w* x)^2, and
    the reward model adds noise of deviation 0.5 where x_0 < 0 and `noise` times that elsewhere, which
    outweighs what exploration adds. U is the variance of 4 readings; weights are scaled to mean 1, so that
    both learners take steps of one expected size.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target, weights, tail = d(1, -1, 0.5, 2), torch.zeros(4, dtype=torch.float64), []
    for update in range(400):
        contexts, exploration = normal(64, 4), 0.3 * normal(64)
        gold = -(contexts @ (weights - target) + exploration).square()
        readings = gold + 0.5 * torch.where(contexts[:, 0] < 0, 1.0, noise) * normal(4, 64)
        rewards = readings.mean(0)
        uncertainty = ensemble_disagreement(readings) if weighted else torch.zeros_like(rewards)
        signal = uncertainty_weighted_reward(rewards, uncertainty, rewards.mean())
        signal = signal / torch.exp(-uncertainty).mean()
        weights = weights + 0.02 * (signal * exploration / 0.3**2) @ contexts / 64
        if update >= 200:
            tail.append(-(weights - target).square().sum().item())
    return sum(tail) / len(tail)


def test_weighting_helps_where_the_noise_is_uneven_and_only_there() -> None:
    uneven, even = (
        d(*(gold_reward(noise, True, seed) - gold_reward(noise, False, seed) for seed in range(8)))
        for noise in (5.0, 1.0)
    )
    unweighted = d(*(gold_reward(5.0, False, seed) for seed in range(8))).mean()
    assert (uneven > 0).all()
    assert uneven.mean() > 0.3 * -unweighted  # a good part of the shortfall
    assert even.mean().abs() < 3 * even.std() / math.sqrt(8)
    assert even.mean().abs() < 0.05 * uneven.mean()
