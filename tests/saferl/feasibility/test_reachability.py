"""The worked examples of the safety operator, the regressions, the weights and the choices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import tensor

from saferl.constraints import discounted_limit
from saferl.feasibility import (
    constraint_signal,
    cost_targets,
    expectile_loss,
    feasibility_weights,
    feasible_first,
    horizon_of_signal,
    least_risk,
    safety_targets,
    signal_for_horizon,
)

DOUBLE = torch.float64
finite = st.floats(-50, 50, width=32)


def d(*values: float) -> torch.Tensor:
    return tensor(values, dtype=DOUBLE)


def test_costs_become_a_signed_constraint() -> None:
    costs = tensor([0.0, 1e-9, 1.0, 0.3])
    assert constraint_signal(costs).tolist() == [-1, 25, 25, 25]
    assert constraint_signal(costs, 1.0, threshold=0.5).tolist() == [-1, -1, 1, -1]
    assert constraint_signal(costs).dtype == torch.float32
    with pytest.raises(ValueError, match="h > 0"):
        constraint_signal(costs, 0.0)


@pytest.mark.parametrize(
    ("signal", "following", "mask", "target"),
    [
        (-1, -1, 1, -1),
        (-1, 0.5, 1, 0.485),
        (25, -1, 1, 25),
        (-1, 25, 1, 24.74),
        (-1, 0.5, 0, -1),
        (25, 3, 0, 25),
    ],
)
def test_the_safety_operator(signal: float, following: float, mask: float, target: float) -> None:
    found = safety_targets(d(signal), d(following), d(mask), 0.99)
    assert found.item() == pytest.approx(target, abs=1e-12)


@given(finite, finite, finite, st.floats(0.01, 0.999))
def test_targets_bound_the_constraint_and_contract(h: float, a: float, b: float, discount: float) -> None:
    first, second = (safety_targets(d(h), d(v), d(1), discount).item() for v in (a, b))
    assert min(first, second) >= h - 1e-9
    assert abs(first - second) <= discount * abs(a - b) + 1e-9
    assert (first <= second + 1e-9) or a > b


def test_an_episode_that_ends_bootstraps_from_nothing() -> None:
    assert safety_targets(d(-1), d(math.nan), d(0), 0.99).item() == -1


def test_the_horizon_of_a_violation() -> None:
    assert signal_for_horizon(324, 0.99) == pytest.approx(24.95, abs=0.01)
    assert math.floor(horizon_of_signal(25.0, 0.99)) == 324
    assert math.floor(horizon_of_signal(1.0, 0.99)) == 68
    assert horizon_of_signal(signal_for_horizon(50, 0.9), 0.9) == pytest.approx(50)
    value = 25.0
    for step in range(1, 326):  # a chain that runs into an absorbing violation
        value = safety_targets(d(-1), d(value), d(1), 0.99).item()
        assert value == pytest.approx(-1 + 26 * 0.99**step)
        assert (value > 0) == (step <= 324)
    for call in (signal_for_horizon, horizon_of_signal):
        with pytest.raises(ValueError, match="discount"):
            call(10, 1.0)
        with pytest.raises(ValueError, match=r"positive|h > 0"):
            call(0, 0.99)


@pytest.mark.parametrize(("error", "reverse", "loss"), [(2, 0, 3.6), (-2, 0, 0.4), (2, 1, 0.4), (-2, 1, 3.6)])
def test_expectile_losses(error: float, reverse: int, loss: float) -> None:
    found = expectile_loss(d(0), d(error), 0.9, reverse=bool(reverse))
    assert found.item() == pytest.approx(loss)


@pytest.mark.parametrize(
    ("targets", "reverse", "optimum"),
    [((0, 10), True, 1.0), ((0, 10), False, 9.0), ((-1, 25), True, 1.6), ((-1, -1, -1, 25), True, -1 / 14)],
)
def test_what_the_regressions_converge_to(targets: tuple[float, ...], reverse: bool, optimum: float) -> None:
    def loss(value: float) -> float:
        return expectile_loss(
            torch.full((len(targets),), value, dtype=DOUBLE), d(*targets), 0.9, reverse=reverse
        ).item()

    assert minimize_scalar(
        loss, bounds=(-2, 26), method="bounded", options={"xatol": 1e-9}
    ).x == pytest.approx(optimum, abs=1e-6)


@pytest.mark.parametrize(
    ("v_h", "q_h", "q", "v", "weight"),
    [
        (-0.5, -0.4, 1.2, 1, math.exp(0.6)),
        (-0.5, -0.4, 3, 1, 100),
        (-0.5, 0.1, 5, 1, 0),
        (0.5, 0.2, 9, 1, math.exp(1.5)),
        (0.5, 0.9, 9, 1, math.exp(-2)),
        (2, 0.5, 0, 0, 150),
        (0, 0, 1, 1, 1),
        (0, 1e-9, 1, 1, 0),
        (900, -900, 0, 0, 150),
        (-1, -1, 900, 0, 100),
    ],
)
def test_weights(v_h: float, q_h: float, q: float, v: float, weight: float) -> None:
    assert feasibility_weights(d(v_h), d(q_h), d(q - v)).item() == pytest.approx(weight, rel=1e-12)


def test_the_floor_concerns_the_infeasible_region_alone() -> None:
    weights = feasibility_weights(d(0.5, -0.5), d(0.9, 0.1), d(0, 0), floor=1.0)
    assert weights.tolist() == [1, 0]


def test_no_gradient_flows_into_weights() -> None:
    risk = d(0.5).requires_grad_()
    assert not feasibility_weights(risk, d(0.2), d(0)).requires_grad


@given(finite, finite, st.floats(-3, 3))
def test_infeasible_weights_ignore_rewards_and_shifts(v_h: float, q_h: float, shift: float) -> None:
    if v_h > 0 and v_h + shift > 0:
        one = feasibility_weights(d(v_h), d(q_h), d(0))
        other = feasibility_weights(d(v_h + shift), d(q_h + shift), d(7))
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_choices_among_candidates() -> None:
    risk = d(0.3, -0.2, -0.9, 0.8, 0.5, 0.7).view(2, 3)
    values = d(9, 2, 1, 5, 1, 9).view(2, 3)
    assert least_risk(risk).tolist() == [2, 1]
    assert feasible_first(risk, values).tolist() == [1, 1]  # the best safe one; the least risky where none is
    turned = torch.tensor([2, 0, 1])
    assert turned[feasible_first(risk[:, turned], values[:, turned])].tolist() == [1, 1]
    assert feasible_first(risk[:, :1], values[:, :1]).tolist() == [0, 0]


def test_summed_costs() -> None:
    assert cost_targets(d(1, 1), d(2, 2), d(1, 0), 0.5).tolist() == [2, 1]
    for length, limit in (
        (100, 6.339677),
        (200, 4.330102),
        (300, 3.169864),
        (500, 1.986859),
        (1000, 0.999957),
    ):
        assert discounted_limit(10.0, 0.99, length) == pytest.approx(limit, abs=1e-6)
    assert discounted_limit(10.0, 1.0, 7) == 10


@pytest.mark.parametrize("call", [safety_targets, cost_targets])
def test_shapes_must_agree(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="one shape"):
        call(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3), 0.99)
