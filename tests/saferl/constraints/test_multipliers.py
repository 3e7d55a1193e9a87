"""Multipliers: every worked number, agreement with torch's Adam, and the invariances."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saferl.constraints import (
    AdditiveMultiplier,
    AugmentedLagrangianMultiplier,
    FixedMultiplier,
    LogMultiplier,
    Multiplier,
    PIDMultiplier,
    ProportionalMultiplier,
    SoftplusMultiplier,
)
from saferl.errors import UsageError

LIMIT = 25.0


def fsrl() -> PIDMultiplier:
    return PIDMultiplier(0.05, 0.0005, 0.1, ema_p=0, ema_d=0, delay=1, init=0.0, derivative="violation")


MAKERS: dict[str, Callable[[], Multiplier]] = {
    "additive-adam": AdditiveMultiplier,
    "additive-sgd": lambda: AdditiveMultiplier(lr=0.01, init=0.1, maximum=2.0, optimizer="sgd"),
    "softplus": SoftplusMultiplier,
    "log": lambda: LogMultiplier(lr=0.01, init=0.5, maximum=5.0),
    "pid": PIDMultiplier,
    "pid-fsrl": fsrl,
    "pid-convex": lambda: PIDMultiplier(norm="convex"),
    "pid-none": lambda: PIDMultiplier(norm="none", maximum=3.0),
    "augmented": lambda: AugmentedLagrangianMultiplier(penalty_coef=0.1),
    "proportional": lambda: ProportionalMultiplier(0.1, horizon=10.0),
    "fixed": lambda: FixedMultiplier(0.3),
}
MAXIMA = {"additive-sgd": 2.0, "log": 5.0, "pid-convex": 1.0, "pid-none": 3.0, "augmented": 100.0}


def run(multiplier: Multiplier, costs: list[float], limit: float = LIMIT) -> list[float]:
    return [multiplier.update(cost, limit) for cost in costs]


# --- worked numbers ----------------------------------------------------------------------------------


def test_adam_numbers() -> None:
    assert run(AdditiveMultiplier(), [35, 30, 20, 24]) == pytest.approx(
        [0.036, 0.0686263, 0.0825110, 0.0921894], abs=5e-8
    )


def test_adam_forgets_how_large_a_violation_is() -> None:
    small, large = run(AdditiveMultiplier(), [26] * 3), run(AdditiveMultiplier(), [100] * 3)
    assert small == pytest.approx([0.036, 0.071, 0.106], abs=1e-7)
    assert large == pytest.approx(small, abs=1e-8)
    sgd = [run(AdditiveMultiplier(optimizer="sgd"), [cost] * 3)[-1] for cost in (26, 100)]
    assert sgd == pytest.approx([0.001 + 0.035 * 3, 0.001 + 0.035 * 225])


def test_adams_momentum_holds_the_multiplier_down_where_projected_gradient_rises() -> None:
    assert run(AdditiveMultiplier(), [10, 10, 40]) == [0, 0, 0]
    assert run(AdditiveMultiplier(optimizer="sgd"), [10, 10, 40])[-1] == pytest.approx(0.035 * 15)


def test_projected_gradient_numbers() -> None:
    got = run(AdditiveMultiplier(optimizer="sgd"), [35, 30, 20, 24])
    assert got == pytest.approx([0.351, 0.526, 0.351, 0.316])


def test_adam_is_torchs_adam() -> None:
    """To the last bit or two in float64, on a stream that crosses the clamp many times."""
    costs = (
        torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20 + 25
    ).tolist()
    parameter = torch.nn.Parameter(torch.tensor(0.001, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=0.035)
    expected = []
    for cost in costs:
        optimizer.zero_grad()
        (-parameter * (cost - LIMIT)).backward()
        optimizer.step()
        parameter.data.clamp_(0.0)
        expected.append(parameter.item())
    assert run(AdditiveMultiplier(), costs) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_softplus_numbers() -> None:
    multiplier = SoftplusMultiplier()
    assert multiplier.parameter == pytest.approx(0.541325, abs=1e-6)
    values = []
    for cost, parameter in ((35, 0.5913249), (20, 0.6046417)):
        values.append(multiplier.update(cost, LIMIT))
        assert multiplier.parameter == pytest.approx(parameter, abs=1e-6)
    assert values == pytest.approx([1.0318954, 1.0404874], abs=1e-6)


def test_stooke_pid_numbers() -> None:
    multiplier = PIDMultiplier()
    expected = [
        (0.101, 0.5, 1.75, 0.1685),
        (0.301, 1.475, 3.9125, 0.487625),
        (0.201, 0.90125, 4.466875, 0.33579375),
        (0.201, 0.8561875, 5.49353125, 0.34155406),
    ]
    for cost, (integral, proportional, smoothed, value) in zip((35, 45, 15, 25), expected, strict=True):
        assert multiplier.update(cost, LIMIT) == pytest.approx(value, abs=1e-8)
        assert multiplier.terms == pytest.approx(
            {"integral": integral, "proportional": proportional, "smoothed": smoothed}
        )


def test_pid_numbers_of_the_language_side() -> None:
    got = run(PIDMultiplier(), [35, 35, 30, 25, 20])
    assert got == pytest.approx([0.1685, 0.332625, 0.416044, 0.420292, 0.346827], abs=1e-6)


def test_pid_delay_line() -> None:
    """D looks `delay` updates back; before that it compares with the single 0 the line starts with."""
    multiplier = PIDMultiplier(kp=0, ki=0, kd=1, ema_d=0, delay=2, init=0)
    # C = 3, 4, 9, 9; the line holds [0], [0, 3], [3, 4], [4, 9] before each update.
    assert run(multiplier, [3, 4, 9, 9], limit=0) == [3, 4, 6, 5]


def test_pid_derivative_answers_rising_costs_alone() -> None:
    multiplier = PIDMultiplier(kp=0, ki=1, kd=1, ema_d=0, delay=1, init=5)
    # I = 9, 10 and D = 4, then 0 rather than -3.
    assert run(multiplier, [4, 1], limit=0) == [13, 10]


def test_pid_caps_depend_on_the_norm() -> None:
    for norm, value in (("sum", 1000.0), ("convex", 1.0), ("none", 100.0)):
        assert PIDMultiplier(kp=1000, ema_p=0, kd=0, ki=0, norm=norm).update(26, LIMIT) == pytest.approx(
            value
        )


def test_fsrl_pid_numbers() -> None:
    assert run(fsrl(), [35, 45, 15, 25]) == pytest.approx([1.505, 2.015, 0, 1.01])


def test_augmented_lagrangian_numbers() -> None:
    for value, coef, violation, psi, after in (
        (1, 2, 0.5, 0.75, 2),
        (1, 2, -0.4, -0.24, 0.2),
        (1, 2, -1, -0.25, 0),
        (0, 2, 0.5, 0.25, 1),
    ):
        multiplier = AugmentedLagrangianMultiplier(penalty_coef=coef, init=value)
        assert multiplier.penalty(violation) == pytest.approx(psi)
        assert multiplier.update(violation, 0.0) == pytest.approx(after)


@given(st.floats(0, 10), st.floats(0.01, 5))
def test_augmented_penalty_is_smooth_at_the_seam(value: float, coef: float) -> None:
    multiplier = AugmentedLagrangianMultiplier(penalty_coef=coef, init=value)
    seam, step = -value / coef, 1e-4
    left, middle, right = (multiplier.penalty(seam + s) for s in (-step, 0, step))
    assert left == pytest.approx(middle, abs=1e-6)
    assert right == pytest.approx(middle, abs=1e-6)


def test_augmented_coefficient_grows_to_its_bound_and_not_beyond() -> None:
    multiplier = AugmentedLagrangianMultiplier(penalty_coef=0.5, growth=1.0, max_penalty=1.5)
    seen = []
    for _ in range(3):
        multiplier.update(0, 1)
        seen.append(multiplier.penalty_coef)
    assert seen == [1.0, 1.5, 1.5]
    large = AugmentedLagrangianMultiplier(penalty_coef=2.0)
    large.update(0, 1)
    assert large.penalty_coef == 2.0


def test_log_numbers() -> None:
    grown = run(LogMultiplier(), [1.0] * 12, limit=0)
    expected = [1.1052, 1.2343, 1.3965, 1.6058, 1.8855, 2.2767, 2.8588, 3.8048, 5.5664, 9.7121, 25.65, 333.5]
    assert grown == pytest.approx(expected, rel=2e-4)
    capped = run(LogMultiplier(maximum=5), [1.0] * 12, limit=0)
    assert capped[8:] == [5.0] * 4
    slack = run(LogMultiplier(), [-1.0] * 100, limit=0)
    assert [slack[i - 1] for i in (1, 10, 50, 100)] == pytest.approx(
        [0.9048, 0.4910, 0.1642, 0.0899], abs=5e-5
    )
    assert LogMultiplier().update(2, 0) == pytest.approx(1.221403, abs=1e-6)
    assert LogMultiplier(init=0.5).update(2, 0) == pytest.approx(0.552585, abs=1e-6)
    assert LogMultiplier(init=10).update(1, 0) == pytest.approx(27.18, abs=5e-3)
    assert LogMultiplier(init=10, maximum=20).update(1, 0) == 20
    assert LogMultiplier(init=10).update(-1, 0) == pytest.approx(3.68, abs=5e-3)


def test_log_is_sticky_near_zero_where_additive_is_not() -> None:
    def updates_to_one(multiplier: Multiplier) -> int:
        count = 0
        while multiplier.value < 1 - 1e-9:
            multiplier.update(1, 0)
            count += 1
        return count

    tired = LogMultiplier()
    run(tired, [-1.0] * 100, limit=0)
    assert updates_to_one(tired) == 103
    assert updates_to_one(LogMultiplier(init=0.01)) == 993
    assert updates_to_one(AdditiveMultiplier(lr=0.1, init=0, optimizer="sgd")) == 10


def test_log_is_the_reference_codes_sgd() -> None:
    """SGD on nu = log lambda with loss -(J - d) exp(nu), clamped at log lambda_max."""
    nu = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    optimizer = torch.optim.SGD([nu], lr=0.1)
    ours = LogMultiplier(lr=0.1, init=1.0, maximum=5.0)
    for cost in (1.0, 2.0, -0.5, 3.0, 3.0, 3.0, -2.0):
        optimizer.zero_grad()
        (-cost * nu.exp()).backward()
        optimizer.step()
        nu.data.clamp_(max=math.log(5.0))
        assert ours.update(cost, 0.0) == pytest.approx(nu.exp().item(), rel=1e-12)


def test_proportional_numbers() -> None:
    multiplier = ProportionalMultiplier(0.2, horizon=10_000, samples=256)
    assert multiplier.update(12, 6) == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000))
    assert multiplier.update(6.6, 6) == pytest.approx(0.2 * (1 + 0.2 * 0.0256) * (1 + 0.1 * 0.0256))


# --- properties --------------------------------------------------------------------------------------

streams = st.lists(st.floats(-200, 200), min_size=1, max_size=30)


@pytest.mark.parametrize("name", MAKERS)
@given(costs=streams)
def test_never_negative_nor_above_its_maximum(name: str, costs: list[float]) -> None:
    multiplier = MAKERS[name]()
    for cost in costs:
        value = multiplier.update(cost, LIMIT)
        assert 0 <= value <= MAXIMA.get(name, math.inf)
        assert value == multiplier.value


# Adam divides by the root of the second moment, which the larger violation also raises: not monotone.
@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"additive-adam", "softplus"}))
@given(past=streams, low=st.floats(-200, 200), gap=st.floats(0, 100))
def test_a_larger_cost_never_gives_a_smaller_multiplier(
    name: str, past: list[float], low: float, gap: float
) -> None:
    values = []
    for cost in (low, low + gap):
        multiplier = MAKERS[name]()
        run(multiplier, past)
        values.append(multiplier.update(cost, LIMIT))
    assert values[0] <= values[1] + 1e-12


@pytest.mark.parametrize("name", MAKERS)
@given(past=streams, future=streams)
def test_state_round_trips_through_json_to_the_bit(name: str, past: list[float], future: list[float]) -> None:
    multiplier, copy = MAKERS[name](), MAKERS[name]()
    run(multiplier, past)
    copy.load_state_dict(json.loads(json.dumps(multiplier.state_dict())))
    assert copy.value == multiplier.value
    assert run(copy, future) == run(multiplier, future)


@given(st.floats(0.01, 4))
def test_no_violation_leaves_log_and_projected_gradient_alone(init: float) -> None:
    for multiplier in (LogMultiplier(init=init), AdditiveMultiplier(init=init, optimizer="sgd")):
        before = multiplier.value
        assert multiplier.update(LIMIT, LIMIT) == before


@given(streams, st.floats(0.1, 10))
def test_log_stays_within_its_bounds(costs: list[float], factor: float) -> None:
    low, high = 0.3 / factor if factor > 1 else 0.3 * factor, 0.3
    for value in run(LogMultiplier(init=0.3, minimum=low, maximum=high), costs):
        assert low <= value <= high


@given(streams)
def test_log_never_reaches_zero(costs: list[float]) -> None:
    assert min(run(LogMultiplier(lr=1.0), costs, limit=0)) > 0


def test_log_survives_a_lasting_violation_without_overflow() -> None:
    multiplier = LogMultiplier(lr=1e9)
    assert all(math.isfinite(v) and v > 0 for v in run(multiplier, [1e9, 1e9, 0.0, -1.0, 0.0, 1.0], limit=0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdditiveMultiplier(init=-1),
        lambda: AdditiveMultiplier(init=3, maximum=2),
        lambda: AdditiveMultiplier(optimizer="rmsprop"),  # type: ignore[arg-type]
        lambda: AdditiveMultiplier(init=math.inf),
        lambda: AdditiveMultiplier(lr=-0.1),
        lambda: SoftplusMultiplier(lr=math.nan),
        lambda: LogMultiplier(lr=0),
        lambda: LogMultiplier(minimum=0),
        lambda: LogMultiplier(init=1, maximum=0.5),
        lambda: LogMultiplier(init=0),
        lambda: SoftplusMultiplier(init=0),
        lambda: PIDMultiplier(kp=-1),
        lambda: PIDMultiplier(delay=0),
        lambda: PIDMultiplier(ema_p=1.0),
        lambda: PIDMultiplier(init=2.0, norm="convex"),
        lambda: PIDMultiplier(norm="difference"),  # type: ignore[arg-type]
        lambda: PIDMultiplier(derivative="error"),  # type: ignore[arg-type]
        lambda: AugmentedLagrangianMultiplier(penalty_coef=0),
        lambda: ProportionalMultiplier(0, 10),
        lambda: ProportionalMultiplier(0.1, 10, clip=0),
        lambda: ProportionalMultiplier(0.1, 10, samples=50),
        lambda: FixedMultiplier(-0.1),
        lambda: ProportionalMultiplier(0.1, 10).update(1, 0),
    ],
)
def test_impossible_values_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize("name", MAKERS)
def test_nan_never_enters_the_state(name: str) -> None:
    multiplier = MAKERS[name]()
    before = multiplier.state_dict()
    with pytest.raises(UsageError, match="finite"):
        multiplier.update(float("nan"), LIMIT)
    assert multiplier.state_dict() == before
