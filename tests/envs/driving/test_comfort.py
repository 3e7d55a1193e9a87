"""The filters of comfort against scipy and worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import savgol_filter

from saferl.envs.driving.comfort import (
    CARLA_LIMITS,
    LEAST_NUPLAN,
    NUPLAN_LIMITS,
    SAMPLES,
    TESTS,
    History,
    filters,
    measures,
    push,
    violations,
)

DOUBLE = torch.float64


def run(lon: np.ndarray, lat: np.ndarray, yaw: np.ndarray) -> History:
    """The history after samples (T, B)."""
    history = History.initial(lon.shape[1], dtype=DOUBLE)
    for row in zip(lon, lat, yaw, strict=True):
        history = push(history, *(torch.from_numpy(np.ascontiguousarray(v)) for v in row))
    return history


def scipys(lon: np.ndarray, lat: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """(6, B) of `TESTS`, filtered as CaRL does over the last 15 samples (T, B)."""
    lon, lat, yaw = lon[-SAMPLES:], lat[-SAMPLES:], np.unwrap(yaw[-SAMPLES:], axis=0)
    n = len(lon)

    def sg(values: np.ndarray, window: int, order: int, derivative: int) -> np.ndarray:
        result: np.ndarray = savgol_filter(values, min(window, n), order, derivative, 0.1, axis=0)
        return result

    a_lon, a_lat, magnitude = (sg(v, 8, 2, 0) for v in (lon, lat, np.hypot(lon, lat)))
    jerk, lon_jerk = sg(magnitude, 15, 2, 1), sg(a_lon, 15, 2, 1)
    rows = (a_lon, a_lat, jerk, lon_jerk, sg(yaw, 5, 2, 1), sg(yaw, 5, 3, 2))
    return np.stack([row[-1] for row in rows])


@pytest.mark.parametrize("count", [*range(LEAST_NUPLAN, SAMPLES + 1), 16, 40])
def test_the_filters_are_scipys(count: int) -> None:
    rng = np.random.default_rng(count)
    lon, lat = rng.normal(0, 5, (2, count, 200))
    yaw = rng.uniform(-3, 3, 200) + np.cumsum(rng.normal(0, 0.8, (count, 200)), axis=0)
    wrapped = (yaw + np.pi) % (2 * np.pi) - np.pi
    assert count < 8 or (np.abs(np.diff(wrapped, axis=0)) > np.pi).any(), "some yaws jump"
    found = measures(run(lon, lat, wrapped)).numpy()
    assert np.allclose(found, scipys(lon, lat, wrapped), atol=1e-9)
    assert np.allclose(found, measures(run(lon, lat, yaw)).numpy(), atol=1e-9), "wrapped or not"


def test_the_published_taps() -> None:
    smoothing, jerk, rate, change = filters(SAMPLES)[:, -1]
    smooth = [0.125, -0.041667, -0.125, -0.125, -0.041667, 0.125, 0.375, 0.708333]
    assert smoothing.tolist() == pytest.approx([0] * 7 + smooth, abs=1e-6)
    fifteen = [
        0.706583, 0.415669, 0.137710, -0.131578, -0.375376, -0.560012, -0.639195, -0.487509, -0.659419,
        -0.557696, -0.321263, 0.004147, 0.385637, 0.807391, 1.274912,
    ]  # fmt: skip
    assert jerk.tolist() == pytest.approx(fifteen, abs=1e-6)
    assert jerk.sum() == pytest.approx(0, abs=1e-12)
    # The yaw's taps act on turns: one of a yaw is what its turn weighs more than the next one.
    for turns, yaws in (
        (rate, [3.714286, -3.857143, -5.714286, -1.857143, 7.714286]),
        (change, [-71.428571, 185.714286, -28.571429, -214.285714, 128.571429]),
    ):
        assert (turns - np.append(turns[1:], 0)).tolist() == pytest.approx([0] * 10 + yaws, abs=1e-6)


@pytest.mark.parametrize("count", [15, 30])
def test_ramps(count: int) -> None:
    t = 0.1 * np.arange(count)[:, None]
    still = np.zeros((count, 1))
    found = measures(run(2.0 * t, still, 0.3 * t)).numpy()[:, 0]
    # The even window delays what is inside by half a sample, so that a jerk of 2 counts as 1.65.
    assert found[2:5].tolist() == pytest.approx([1.6515837, 1.6515837, 0.3], abs=1e-6)
    assert found[0] == pytest.approx(2.0 * t[-1, 0], abs=1e-9)
    assert abs(found[5]) < 1e-9
    assert measures(run(still, still, 0.4 * t**2)).numpy()[5, 0] == pytest.approx(0.8, abs=1e-9)
    assert measures(run(still, -3 + still, still)).numpy()[:, 0].tolist() == pytest.approx(
        [0, -3, 0, 0, 0, 0], abs=1e-9
    )


def test_the_limits() -> None:
    """Each test fails just beyond its limit, alone; braking and accelerating have their own."""
    t = 0.1 * np.arange(15)[:, None]
    still = np.zeros((15, 1))
    for limits in (CARLA_LIMITS, NUPLAN_LIMITS):
        for share, failing in ((0.999, False), (1.001, True)):

            def failed(lon: np.ndarray, lat: np.ndarray, yaw: np.ndarray, limits=limits) -> list[str]:  # type: ignore[no-untyped-def]
                found = violations(run(lon, lat, yaw), limits)[:, 0].tolist()
                return [name for name, fails in zip(TESTS, found, strict=True) if fails]

            def only(name: str, failing=failing) -> list[str]:  # type: ignore[no-untyped-def]
                return [name] if failing else []

            assert failed(still + share * limits.acceleration, still, still) == only(TESTS[0])
            assert failed(still - share * limits.braking, still, still) == only(TESTS[0])
            for sign in (1, -1):
                assert failed(still, still + sign * share * limits.lat_acceleration, still) == only(TESTS[1])
                assert failed(still, still, sign * share * limits.yaw_rate * t) == only(TESTS[4])
                turn = sign * share * limits.yaw_acceleration / 2 * (t - t[-1]) ** 2
                assert failed(still, still, turn) == only(TESTS[5])
            # The even window makes 1.65 of a ramp of 2. A ramp of a_lon is one of |a| as well.
            ramp = share * 2 / 1.6515837 * t
            found = failed(limits.lon_jerk * ramp, still, still)
            assert (TESTS[3] in found) is failing
            assert (TESTS[2] in found) is (failing and limits.jerk == limits.lon_jerk)
            found = failed(still, limits.jerk * ramp, still)
            assert (TESTS[2] in found) is failing
            assert TESTS[3] not in found


def test_nothing_is_tested_before_there_are_enough_samples() -> None:
    rng = np.random.default_rng(0)
    history = History.initial(1, dtype=DOUBLE)
    for k in range(1, 20):
        lon, lat, yaw = (torch.from_numpy(v) for v in rng.normal(0, 40, (3, 1)))
        history = push(history, lon, lat, yaw)
        assert bool(violations(history, CARLA_LIMITS).any()) is (k >= 8)
        assert bool(violations(history, NUPLAN_LIMITS, LEAST_NUPLAN).any()) is (k >= 4)
        assert bool(violations(history, NUPLAN_LIMITS, 0).any()) is (k >= 4), "the filters need four"


def test_a_new_drive_knows_nothing_of_the_one_before() -> None:
    rng = np.random.default_rng(1)
    lon, lat, yaw = rng.normal(0, 9, (3, 30, 2))
    history = run(lon, lat, yaw)
    mask = torch.tensor([True, False])
    fresh = History.initial(2, dtype=DOUBLE)
    state = {name: torch.where(mask, fresh.named()[name], value) for name, value in history.named().items()}
    after = History.of(state)
    cleared = history._replace(filled=torch.where(mask, 0, history.filled))
    lon, lat, yaw = rng.normal(0, 9, (3, 12, 2))
    for row in zip(lon, lat, yaw, strict=True):
        after = push(after, *(torch.from_numpy(v) for v in row))
        cleared = push(cleared, *(torch.from_numpy(v) for v in row))
    expected = scipys(lon, lat, yaw)[:, 0]
    assert np.allclose(measures(after)[:, 0].numpy(), expected)
    assert np.allclose(measures(cleared)[:, 0].numpy(), expected), "the count alone is enough"
    assert not np.allclose(measures(after)[:, 1].numpy(), scipys(lon, lat, yaw)[:, 1])


def test_many_rounds_lose_no_digits() -> None:
    """In single precision, after 60 rounds at 0.5 rad/s: angles near 400 rad have steps of 3e-5, and the yaw
    acceleration's taps of 200 would make 1e-2 of them."""
    history = History.initial(1)
    for k in range(7600):
        yaw = torch.tensor([0.05 * k], dtype=DOUBLE)
        history = push(history, torch.zeros(1), torch.zeros(1), torch.remainder(yaw, 2 * np.pi).float())
    values = measures(history)[:, 0]
    assert float(values[4]) == pytest.approx(0.5, abs=1e-4)
    assert abs(float(values[5])) < 1e-3


@given(st.integers(0, 10_000), st.integers(8, 20))
def test_worlds_do_not_touch_each_other(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    lon, lat, yaw = rng.normal(0, 4, (3, count, 5))
    order = rng.permutation(5)
    found = measures(run(lon, lat, yaw))
    assert torch.equal(measures(run(lon[:, order], lat[:, order], yaw[:, order])), found[:, order])
    assert torch.allclose(measures(run(lon[:, :1], lat[:, :1], yaw[:, :1])), found[:, :1], atol=1e-12)
    turned = measures(run(lon, lat, yaw + 1.7))
    assert torch.allclose(turned, found, atol=1e-9), "where north lies is nobody's comfort"


def test_it_compiles_to_one_graph() -> None:
    history = History.initial(3)

    def step(history: History, lon: torch.Tensor) -> tuple[History, torch.Tensor]:
        history = push(history, lon, lon, lon)
        return history, violations(history, NUPLAN_LIMITS)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    other = history
    for k in range(12):
        lon = torch.tensor([1.0, -3.0, 0.7]) * k
        history, ours = compiled(history, lon)
        other, theirs = step(other, lon)
        assert torch.equal(ours, theirs)
    assert ours.any()
    assert not ours.all()
