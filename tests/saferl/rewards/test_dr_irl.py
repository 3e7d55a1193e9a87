"""The worked values of the multipliers, their bounds and edge cases, and the groups they scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saferl.errors import UsageError
from saferl.rewards.dr_irl import (
    data_hardness,
    difficulty_multiplier,
    hardness_multiplier,
    irl_loss,
    responsiveness_multiplier,
    scaled_group_advantages,
)


def d(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def test_hardness_multiplier() -> None:
    found = hardness_multiplier(d(0.1, 0.5, 0.9), ids(0, 0, 0))
    assert found.tolist() == pytest.approx([0.843395, 1, 1.142162], abs=1e-6)
    assert hardness_multiplier(d(0.7, 0.7), ids(3, 3)).tolist() == [1, 1]


def test_responsiveness_multiplier() -> None:
    gaps, one = d(1, 1.5, 2, 8), ids(0, 0, 0, 0)
    assert responsiveness_multiplier(gaps, one, 10.0).tolist() == pytest.approx([0.853496] * 4, abs=1e-6)
    assert responsiveness_multiplier(gaps, one, 24.0).tolist() == [1] * 4
    assert responsiveness_multiplier(gaps, one, 1.0).tolist() == [1] * 4  # all are masked
    assert responsiveness_multiplier(d(3, 3, 3), ids(0, 0, 0), 0.0).tolist() == [1] * 3
    # The boundary is kept: squared deviations are (1, 1).
    assert responsiveness_multiplier(d(0, 2), ids(0, 0), 1.0).tolist() == [1, 1]


def test_the_product_and_its_direction() -> None:
    hardness, gaps = d(0.1, 0.5, 0.9, 0.5), d(1, 1.5, 2, 8)
    alpha = difficulty_multiplier(hardness, gaps, ids(0, 0, 0, 0), 10.0)
    assert alpha[2].item() == pytest.approx(0.974831, abs=1e-6)
    back = difficulty_multiplier(hardness, gaps, ids(0, 0, 0, 0), 10.0, direction="reversed")
    assert (alpha * back).tolist() == pytest.approx([1] * 4)
    assert alpha[0] < alpha[1] < alpha[2]
    assert back[0] > back[1] > back[2]


def test_statistics_stay_within_a_category_and_unknown_ones_get_1() -> None:
    generator = torch.Generator().manual_seed(0)
    hardness = 2 * torch.rand(40, generator=generator, dtype=torch.float64)
    gaps = 4 * torch.randn(40, generator=generator, dtype=torch.float64)
    categories = torch.randint(-1, 5, (40,), generator=generator)
    alpha = difficulty_multiplier(hardness, gaps, categories, 9.0)
    for category in range(5):
        own = categories == category
        alone = difficulty_multiplier(hardness[own], gaps[own], categories[own] * 1000, 9.0)
        assert alpha[own].tolist() == pytest.approx(alone.tolist())
        mean = gaps[own].mean()
        kept = gaps[own][(gaps[own] - mean) ** 2 <= 9]
        by_hand = hardness[own].sigmoid() / hardness[own].mean().sigmoid()
        by_hand = by_hand * kept.mean().sigmoid() / mean.sigmoid()
        assert alone.tolist() == pytest.approx(by_hand.tolist())
    assert (categories < 0).any()
    assert (alpha[categories < 0] == 1).all()


@given(
    st.lists(st.tuples(st.floats(0, 2), st.floats(-6, 6), st.integers(-1, 2)), min_size=1, max_size=12),
    st.floats(0, 30),
)
def test_bounds(rows: list[tuple[float, float, int]], tolerance: float) -> None:
    hardness, gaps = d(*(r[0] for r in rows)), d(*(r[1] for r in rows))
    categories = ids(*(r[2] for r in rows))
    alpha_d = hardness_multiplier(hardness, categories)
    assert alpha_d.min() > 0.5676
    assert alpha_d.max() < 1.7617
    alpha_m = responsiveness_multiplier(gaps, categories, tolerance)
    assert (alpha_m > 0).all()
    for category in categories.unique():
        own = categories == category
        if gaps[own].mean() >= 0:
            assert (alpha_m[own] < 2).all()


def test_the_bounds_are_approached() -> None:
    crowd = ids(*[0] * 10001)
    hard, easy = torch.zeros(10001).double(), torch.full((10001,), 2.0).double()
    hard[0], easy[0] = 2, 0
    assert hardness_multiplier(hard, crowd)[0].item() == pytest.approx(1.7616, abs=1e-3)
    assert hardness_multiplier(easy, crowd)[0].item() == pytest.approx(0.5677, abs=1e-3)


def test_very_negative_gaps_stay_finite() -> None:
    found = responsiveness_multiplier(torch.tensor([-300.0, -301.0, -250.0]), ids(0, 0, 0), 400.0)
    assert found.isfinite().all()


def test_data_hardness() -> None:
    # Clauses of prompt 0: demo e0 and e1, sample e0 and (e0 + e1)/sqrt 2; W = (1 + 1/sqrt 2) / 2.
    demos = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [9, 9]], [[1, 0], [0, 1]], [[1, 0], [0, 1]]]).double()
    samples = torch.tensor(
        [[[5.0, 0], [1, 1]], [[-1, 0], [9, 9]], [[1, 0], [1, 0]], [[0, 0], [0, 0]]]
    ).double()
    demo_mask = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    sample_mask = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    found = data_hardness(demos, samples, demo_mask, sample_mask)
    assert found.tolist() == pytest.approx([1 - (1 + math.sqrt(0.5)) / 2, 2, 1, 1], abs=1e-12)
    assert data_hardness(demos, samples[:, :0], demo_mask, sample_mask[:, :0]).tolist() == [1] * 4
    assert data_hardness(demos[:, :0], samples, demo_mask[:, :0], sample_mask).tolist() == [1] * 4


def test_data_hardness_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    demos = torch.randn(6, 4, 8, generator=generator, dtype=torch.float64)
    samples = torch.randn(6, 5, 8, generator=generator, dtype=torch.float64)
    demo_mask = torch.rand(6, 4, generator=generator) < 0.7
    sample_mask = torch.rand(6, 5, generator=generator) < 0.7
    found = data_hardness(demos, samples, demo_mask, sample_mask)
    for n in range(6):
        best = [
            max(torch.cosine_similarity(x, y, dim=0).item() for y in samples[n][sample_mask[n]])
            for x in demos[n][demo_mask[n]]
        ]
        assert found[n].item() == pytest.approx(1 - sum(best) / len(best))
    same = data_hardness(demos, demos, demo_mask, demo_mask)
    assert same.tolist() == pytest.approx([0] * 6, abs=1e-12)


def test_group_advantages() -> None:
    rewards, one = d(1, 2, 3, 4)[None], d(1)
    population = scaled_group_advantages(rewards, one)[0]
    assert population.tolist() == pytest.approx([-1.3416, -0.4472, 0.4472, 1.3416], abs=1e-4)
    sample = scaled_group_advantages(rewards, one, std="sample")[0]
    assert sample.tolist() == pytest.approx([-1.1619, -0.3873, 0.3873, 1.1619], abs=1e-4)
    both = scaled_group_advantages(torch.cat([rewards, rewards.flip(1)]), d(2, 0.5))
    assert both[0].tolist() == pytest.approx((2 * population).tolist())
    assert both[1].tolist() == pytest.approx((0.5 * population.flip(0)).tolist())


@pytest.mark.parametrize("std", ["population", "sample"])
def test_equal_rewards_have_no_advantage(std: str) -> None:
    rewards = torch.full((1, 7), 0.1)
    assert scaled_group_advantages(rewards, torch.ones(1), std=std).tolist() == [[0] * 7]  # type: ignore[arg-type]


def test_the_irl_loss_raises_demonstrations_above_samples() -> None:
    demos, samples = d(1, 3).requires_grad_(), d(0, 1, 2, 5).requires_grad_()
    loss = irl_loss(demos, samples, beta=0.5)
    assert loss.item() == pytest.approx((2 - 2) / 0.5)
    loss.backward()
    assert demos.grad is not None
    assert samples.grad is not None
    assert demos.grad.tolist() == [-1, -1]  # 1 / (beta N)
    assert samples.grad.tolist() == [0.5] * 4


def test_the_irl_gradient_is_that_of_the_demonstrations_likelihood() -> None:
    reference, demonstration, beta = d(0.1, 0.2, 0.7), 1, 0.5
    rewards = d(0.3, -0.4, 0.2).requires_grad_()
    log_policy = (reference.log() + rewards / beta).log_softmax(0)
    (likelihood,) = torch.autograd.grad(-log_policy[demonstration], rewards)
    policy = log_policy.detach().exp()
    # The expectation over the policy, as weights on a sample of every response.
    (gradient,) = torch.autograd.grad(
        irl_loss(rewards[demonstration][None], 3 * policy * rewards, beta), rewards
    )
    assert gradient.tolist() == pytest.approx(likelihood.tolist())


def test_refusals() -> None:
    two = d(0.1, 0.2)
    with pytest.raises(UsageError, match="both must be"):
        hardness_multiplier(two, ids(0))
    with pytest.raises(UsageError, match="integers"):
        hardness_multiplier(two, two)
    with pytest.raises(UsageError, match="tolerance"):
        responsiveness_multiplier(two, ids(0, 0), -1.0)
    with pytest.raises(UsageError, match="direction"):
        difficulty_multiplier(two, two, ids(0, 0), 1.0, direction="up")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="masks"):
        data_hardness(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.ones(2, 3) > 0, torch.ones(2, 3) > 0)
    with pytest.raises(UsageError, match="group of at least 2"):
        scaled_group_advantages(torch.zeros(2, 1), torch.ones(2), std="sample")
    with pytest.raises(UsageError, match="std is"):
        scaled_group_advantages(torch.zeros(2, 4), torch.ones(2), std="unbiased")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="beta"):
        irl_loss(two, two, 0.0)
    with pytest.raises(UsageError, match="no samples"):
        irl_loss(two, two[:0], 1.0)
