"""The worked values of PAR and the shapers beside it, their invariances, and where each one stops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saferl.errors import NonFiniteError, UsageError
from saferl.rewards.par import (
    RunningShaper,
    average_reward_models,
    ceiling_reward,
    centred_reward,
    kl_regularised_optimum,
    length_penalised_reward,
    lsc_reward,
    par_reward,
    polynomial_reward,
    regularised_preference_loss,
    sgfc_reward,
    sigmoid_reward,
    tanh_reward,
)

scores = st.floats(-8, 8)


def d(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def group_normalised(rewards: Tensor) -> Tensor:
    """GRPO's advantages of groups (P, G)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / rewards.std(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("reward", "references", "k", "shaped"),
    [
        (2, [1], 1, 0.731059),
        (2, [1], 3, 0.952574),
        (2, [1, 3], 1, 0.5),
        (-1, [1], 1, 0.119203),
        (6, [1], 1, 0.993307),
        (1, [1], 1, 0.5),
    ],
)
def test_par(reward: float, references: list[float], k: float, shaped: float) -> None:
    found = par_reward(d(reward), d(*references)[None], k)
    assert found.item() == pytest.approx(shaped, abs=1e-6)


def test_the_other_reference_shapers() -> None:
    assert tanh_reward(d(2), d(1)[None]).item() == pytest.approx(0.761594, abs=1e-6)
    assert sgfc_reward(d(2, 6), d(1, 1)[:, None]).tolist() == pytest.approx([0.002473, 0.997527], abs=1e-6)
    assert centred_reward(d(2), d(1, 4)[None]).item() == -0.5
    assert sigmoid_reward(d(2), 3).item() == pytest.approx(1 / (1 + math.exp(-6)))


def test_lsc_takes_a_normal_quantile_of_the_references() -> None:
    references = d(0, 1, 2, 3)[None]
    found = lsc_reward(d(2), references).item()
    assert found == pytest.approx(-1.197501, abs=1e-6)
    quantile = 1.5 + 1.0364333894937898 * (math.sqrt(5 / 3) + 1e-5)
    assert found == pytest.approx(-math.log1p(math.exp(quantile - 2)), abs=1e-12)
    assert lsc_reward(d(2), d(2)[None]).item() == pytest.approx(-math.log(2), abs=1e-5)


def test_the_polynomial_follows_the_sigmoid_and_is_clamped_outside() -> None:
    grid = torch.linspace(-4.99, 4.99, 999, dtype=torch.float64)
    zero = torch.zeros(999, 1, dtype=torch.float64)
    values = polynomial_reward(grid, zero)
    assert (values - grid.sigmoid()).abs().max() < 0.03
    assert polynomial_reward(d(-9, -5, 5, 9), zero[:4]).tolist() == [0, 0, 1, 1]
    points = np.linspace(-5, 5, 100)
    basis = np.vander(points, 6)
    weights = np.linalg.lstsq(basis, 1 / (1 + np.exp(-points)), rcond=None)[0]
    assert values.numpy() == pytest.approx(np.vander(grid.numpy(), 6) @ weights, abs=1e-9)


def test_the_polynomial_is_not_monotone_and_leaves_the_unit_interval() -> None:
    grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    values = polynomial_reward(grid, torch.zeros(2001, 1, dtype=torch.float64))
    assert (values.diff() < 0).any()
    assert values.max() > 1
    assert values.min() < 0


@given(scores, scores, st.lists(scores, min_size=1, max_size=5), st.floats(0.1, 3))
def test_par_is_bounded_monotone_and_blind_to_offsets(
    reward: float, other: float, references: list[float], k: float
) -> None:
    r, refs = d(reward), d(*references)[None]
    found = par_reward(r, refs, k).item()
    assert 0 < found < 1
    assert par_reward(r + other, refs + other, k).item() == pytest.approx(found, abs=1e-12)
    assert par_reward(d(reward), d(other)[None]).item() + par_reward(d(other), d(reward)[None]).item() == (
        pytest.approx(1.0)
    )
    low, high = sorted([reward, other])
    assert par_reward(d(low), refs, k) <= par_reward(d(high), refs, k)


def test_par_depends_on_the_scale_and_its_slope_is_at_most_k_over_4() -> None:
    assert par_reward(d(4), d(2)[None]) != par_reward(d(2), d(1)[None])
    rewards = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    shaped = par_reward(rewards, torch.zeros(101, 1, dtype=torch.float64), 3.0)
    (slope,) = torch.autograd.grad(shaped.sum(), rewards)
    assert slope.max().item() == pytest.approx(0.75)
    assert slope.detach().numpy() == pytest.approx((3 * shaped * (1 - shaped)).detach().numpy())


def test_any_leading_shape() -> None:
    rewards, references = torch.randn(4, 3), torch.randn(4, 3, 10)
    for shaper in (par_reward, sgfc_reward, centred_reward, tanh_reward, polynomial_reward, lsc_reward):
        shaped = shaper(rewards, references)
        assert shaped.shape == (4, 3)
        assert torch.allclose(shaped[2:3, 1], shaper(rewards[2:3, 1], references[2:3, 1]))
        with pytest.raises(UsageError, match="one more axis"):
            shaper(rewards, references[:, :1])
        with pytest.raises(UsageError, match="at least one reference"):
            shaper(rewards, references[..., :0])


def test_ceiling_and_length_penalty() -> None:
    assert ceiling_reward(d(-7, 3, 6), 4).tolist() == [-7, 3, 4]
    lengths = torch.tensor([350, 300, 12])
    assert length_penalised_reward(d(1, 1, 1), lengths).tolist() == pytest.approx([0.5, 1, 1])
    with pytest.raises(UsageError, match="equal"):
        length_penalised_reward(d(1, 1), lengths)


def test_running_moments_take_the_batch_first() -> None:
    shaper = RunningShaper()
    assert shaper.mean_std(d(3)).tolist() == [0]  # sigma 0 divides by 1
    assert shaper.mean_std(d(5)).tolist() == [1]  # mean 4, population deviation 1
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, generator=generator, dtype=torch.float64) + n for n in (1, 7, 32)]
    for batch in batches:
        shaper.mean_std(batch)
    everything = torch.cat([d(3, 5), *batches])
    assert shaper.mean == pytest.approx(everything.mean().item(), abs=1e-12)
    assert shaper.std == pytest.approx(everything.std(correction=0).item(), abs=1e-12)


def test_clip_and_min_max() -> None:
    clip = RunningShaper()
    assert clip.clip(d(0, 4, 2)).tolist() == pytest.approx([2 - math.sqrt(8 / 3), 2 + math.sqrt(8 / 3), 2])
    min_max = RunningShaper()
    assert min_max.min_max(d(2, 2, 2)).tolist() == [0, 0, 0]  # 0/0 in the published code
    assert min_max.min_max(d(4, 6)).tolist() == [0.5, 1]
    assert min_max.min_max(d(3)).tolist() == [0.25]


def test_equal_rewards_are_never_blown_up() -> None:
    shaper = RunningShaper()
    for _ in range(3):
        assert shaper.mean_std(torch.full((7,), 0.1)).abs().max() < 1e-6


def test_the_running_state_survives_json_and_refuses_bad_batches() -> None:
    shaper, copy = RunningShaper(), RunningShaper()
    shaper.min_max(d(1, 5, 2))
    copy.load_state_dict(json.loads(json.dumps(shaper.state_dict())))
    batch = d(7, 0.5)
    assert copy.mean_std(batch).tolist() == shaper.mean_std(batch).tolist()
    before = shaper.state_dict()
    with pytest.raises(NonFiniteError, match="not finite"):
        shaper.clip(d(1, math.nan))
    with pytest.raises(UsageError, match="empty"):
        shaper.clip(d())
    assert shaper.state_dict() == before


def test_affine_shapers_do_nothing_under_group_normalisation() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    references = torch.randn(6, 1, 3, generator=generator, dtype=torch.float64).expand(6, 8, 3)
    plain = group_normalised(rewards)
    affine = (
        centred_reward(rewards, references),
        RunningShaper().mean_std(rewards),
        RunningShaper().min_max(rewards),
        2.5 * rewards + torch.arange(6)[:, None],  # an offset of each prompt's own
    )
    for shaped in affine:
        assert group_normalised(shaped).numpy() == pytest.approx(plain.numpy(), abs=1e-12)
    nonlinear = (
        par_reward(rewards, references),
        tanh_reward(rewards, references),
        lsc_reward(rewards, references),
        RunningShaper().clip(rewards),
    )
    for shaped in nonlinear:
        assert (group_normalised(shaped) - plain).abs().max() > 0.01


def test_the_regularised_loss() -> None:
    found = regularised_preference_loss(d(2, 0), d(1, 0))
    expected = (math.log1p(math.exp(-1)) + 0.005 * 5 + math.log(2)) / 2
    assert found.item() == pytest.approx(expected, abs=1e-12)
    # Without the term an offset is free, with it the smallest scores win.
    assert regularised_preference_loss(d(2), d(1), 0.0) == regularised_preference_loss(d(9), d(8), 0.0)
    assert regularised_preference_loss(d(0.5), d(-0.5)) < regularised_preference_loss(d(2), d(1))
    with pytest.raises(UsageError, match="equal"):
        regularised_preference_loss(d(1, 2), d(1))


def test_warm_averages_parameters() -> None:
    models = [torch.nn.Linear(3, 2) for _ in range(5)]
    merged = average_reward_models([model.state_dict() for model in models])
    assert torch.allclose(merged["weight"], sum(m.weight for m in models) / 5)  # type: ignore[arg-type]
    # The mean of linear models is the model of the mean.
    x = torch.randn(4, 3)
    mean = torch.stack([m(x) for m in models]).mean(0)
    assert torch.allclose(torch.nn.functional.linear(x, merged["weight"], merged["bias"]), mean, atol=1e-6)


def test_warm_refuses_models_that_do_not_match() -> None:
    count = torch.tensor(3)
    merged = average_reward_models([{"w": d(1), "n": count}, {"w": d(3), "n": count.clone()}])
    assert merged["w"].item() == 2
    assert merged["n"].item() == 3
    with pytest.raises(UsageError, match="differs"):
        average_reward_models([{"n": count}, {"n": count + 1}])
    with pytest.raises(UsageError, match="shapes"):
        average_reward_models([{"w": d(1)}, {"w": d(1, 2)}])
    with pytest.raises(UsageError, match="names"):
        average_reward_models([{"w": d(1)}, {"v": d(1)}])
    with pytest.raises(UsageError, match="at least one"):
        average_reward_models([])


def par_at(k: float) -> Callable[[Tensor], Tensor]:
    return lambda mu: par_reward(mu, torch.zeros(1, dtype=torch.float64), k)


@pytest.mark.parametrize(
    ("beta", "vanilla", "par", "steep", "tanh"),
    [
        (0.005, 200, 3.898, 1.914, 2.820),
        (0.01, 100, 3.332, 1.717, 2.526),
        (0.05, 20, 2.039, 1.270, 1.857),
        (0.1, 10, 1.496, 1.082, 1.575),
    ],
)
def test_shaping_bounds_the_optimum(
    beta: float, vanilla: float, par: float, steep: float, tanh: float
) -> None:
    far = kl_regularised_optimum(lambda mu: mu.clone(), beta)
    near = kl_regularised_optimum(par_at(1.0), beta)
    assert far == pytest.approx(vanilla, rel=1e-9)
    assert near == pytest.approx(par, abs=5e-4)
    assert kl_regularised_optimum(par_at(3.0), beta) == pytest.approx(steep, abs=5e-4)
    assert kl_regularised_optimum(torch.tanh, beta) == pytest.approx(tanh, abs=5e-4)

    def gold(mu: float) -> float:  # what the reward model stands for turns down beyond 4
        return min(mu, 8 - mu)

    assert gold(near) > 1 > 0 > gold(far)


def test_where_there_is_no_optimum() -> None:
    assert kl_regularised_optimum(lambda mu: -mu, 0.1) == 0
    with pytest.raises(UsageError, match="outgrows"):
        kl_regularised_optimum(lambda mu: mu + mu.square(), 0.1)
    with pytest.raises(UsageError, match="beta"):
        kl_regularised_optimum(torch.tanh, 0.0)
    with pytest.raises(UsageError, match="slope k"):
        par_reward(d(1), d(1)[None], -1.0)
