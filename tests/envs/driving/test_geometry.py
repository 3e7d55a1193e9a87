"""Kernels against worked numbers and shapely."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saferl.envs.driving.geometry import (
    Bicycle,
    boxes_overlap,
    drive_bicycle,
    idm_acceleration,
    wrap_angle,
)


def test_the_bicycle_follows_the_worked_trace() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    state = Bicycle(zero, zero, zero, zero + 10, zero, zero)
    expected = [
        (1.0, 0, 0, 10.08, 0.8, 0.055851),
        (2.008, 0, 0.018244, 10.213333, 1.333333, 0.074467),
        (3.029163, 0.018632, 0.042911, 10.382222, 1.688889, 0.080673),
    ]
    for row in expected:
        state = drive_bicycle(state, zero + 1, zero + 0.1)
        assert [float(v) for v in state] == pytest.approx(row, abs=1e-6)


def test_the_bicycle_mirrors_and_does_not_roll_back() -> None:
    zero = torch.zeros(1)
    left = right = Bicycle(zero, zero, zero, zero + 5, zero, zero)
    for _ in range(30):
        left = drive_bicycle(left, zero + 0.3, zero + 0.4)
        right = drive_bicycle(right, zero + 0.3, zero - 0.4)
    assert float(left.x) == pytest.approx(float(right.x))
    assert float(left.y) == pytest.approx(-float(right.y))
    assert float(left.heading) == pytest.approx(-float(right.heading))
    state = Bicycle(zero, zero, zero, zero + 4, zero, zero)
    slowest = 4.0
    for _ in range(100):
        state = drive_bicycle(state, zero - 1, zero)
        slowest = min(slowest, float(state.speed))
    assert slowest > -0.3
    assert abs(float(state.speed)) < 0.01


def test_idm_has_the_worked_values() -> None:
    one = torch.ones(1, dtype=torch.float64)
    value = idm_acceleration(8 * one, 10 * one, 20 * one, 6 * one)
    assert float(value) == pytest.approx(-0.279796, abs=1e-6)
    at_rest = idm_acceleration(8 * one, 10 * one, 16.918824 * one, 8 * one)
    assert float(at_rest) == pytest.approx(0.0, abs=1e-6)
    assert float(idm_acceleration(10 * one, 10 * one, 1e9 * one, 10 * one)) == pytest.approx(0.0, abs=1e-9)
    assert float(idm_acceleration(8 * one, 10 * one, 1 * one, 0 * one)) == -2.0
    assert float(idm_acceleration(8 * one, 10 * one, 1 * one, 0 * one, hardest=8.0)) == -8.0
    # A leader that pulls away is no reason to brake.
    assert float(idm_acceleration(1 * one, 10 * one, 1 * one, 30 * one)) > 0.9


def test_the_bicycle_goes_straight_without_steering() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    state = Bicycle(zero, zero, zero + 0.6, zero + 3, zero, zero)
    for _ in range(50):
        state = drive_bicycle(state, zero + 0.5, zero)
    assert float(state.heading) == 0.6
    assert float(state.y / state.x) == pytest.approx(math.tan(0.6), abs=1e-9)
    # The low pass has settled at half of 2.4 m/s^2.
    assert float(state.acceleration) == pytest.approx(1.2, abs=1e-6)


def test_drivers_on_a_ring_never_touch() -> None:
    """Twenty of them on 400 m, started anyhow, for 10^4 steps of 0.1 s; at the end all keep one gap."""
    generator = torch.Generator().manual_seed(0)
    place = 20.0 * torch.arange(20) + 8.0 * torch.rand(20, generator=generator)
    speed, least = 10.0 * torch.rand(20, generator=generator), math.inf
    for _ in range(10_000):
        gap = (place.roll(-1) - place) % 400.0 - 4.5
        least = min(least, float(gap.min()))
        pull = idm_acceleration(speed, torch.tensor(10.0), gap, speed.roll(-1), hardest=8.0)
        speed = (speed + 0.1 * pull).clamp(min=0.0)
        place = (place + 0.1 * speed) % 400.0
    assert least > 0
    assert gap.std() < 0.05
    # The speed at which the model wants the gap that there is: 400 / 20 - 4.5 m.
    assert float(speed.mean()) == pytest.approx(7.679, abs=0.01)
    assert float(speed.std()) < 0.02


def test_boxes_overlap_as_shapely_says() -> None:
    shapely = pytest.importorskip("shapely")
    generator = np.random.default_rng(0)
    n = 4000
    dx, dy = generator.uniform(-6, 6, (2, n))
    heading, other = generator.uniform(-math.pi, math.pi, (2, n))
    sizes = generator.uniform(0.3, 6.0, (4, n))

    def box(x: float, y: float, angle: float, length: float, width: float):  # type: ignore[no-untyped-def]
        corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * [length / 2, width / 2]
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return shapely.Polygon(corners @ turn.T + [x, y])

    tensors = [torch.from_numpy(a) for a in (dx, dy, heading, sizes[0], sizes[1], other, sizes[2], sizes[3])]
    ours = boxes_overlap(*tensors).numpy()
    theirs = np.array([
        box(0, 0, heading[k], sizes[0, k], sizes[1, k]).intersects(
            box(dx[k], dy[k], other[k], sizes[2, k], sizes[3, k])
        )
        for k in range(n)
    ])  # fmt: skip
    assert 0.2 < ours.mean() < 0.8
    assert (ours == theirs).all()


def test_angles_wrap() -> None:
    angles = torch.linspace(-20, 20, 401, dtype=torch.float64)
    wrapped = wrap_angle(angles)
    assert (wrapped >= -math.pi).all()
    assert (wrapped < math.pi).all()
    assert torch.allclose(wrapped.sin(), angles.sin(), atol=1e-12)
