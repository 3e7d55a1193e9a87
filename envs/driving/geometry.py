"""Kernels of driving: angles, oriented boxes, the kinematic bicycle, the intelligent driver model.

Elementwise torch on tensors that broadcast; nothing here waits for a device or looks at values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ACCELERATION",
    "BRAKING",
    "EGO_LENGTH",
    "EGO_WIDTH",
    "MAX_STEERING",
    "REAR_TO_CENTRE",
    "WHEELBASE",
    "Bicycle",
    "boxes_overlap",
    "drive_bicycle",
    "idm_acceleration",
    "wrap_angle",
]

WHEELBASE = 3.089
"""m; this and the next three are nuPlan's Pacifica."""
EGO_LENGTH = 5.176
EGO_WIDTH = 2.297
REAR_TO_CENTRE = 1.461
"""From the rear axle to the centre of the box."""
ACCELERATION = 2.4
"""m/s^2 at action 1 (CaRL's nuPlan action)."""
BRAKING = 3.2
"""m/s^2 at action -1."""
MAX_STEERING = 0.83775804096
"""rad (48 degrees) at steering action 1."""
_ACCELERATION_LAG = 0.2  # s, time constant of the engine's low pass
_STEERING_LAG = 0.05
_STEERING_STOP = math.pi / 3


def wrap_angle(angle: Tensor) -> Tensor:
    """The angle in [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def boxes_overlap(
    dx: Tensor,
    dy: Tensor,
    heading: Tensor,
    length: Tensor,
    width: Tensor,
    other_heading: Tensor,
    other_length: Tensor,
    other_width: Tensor,
) -> Tensor:
    """Whether two oriented boxes share a point, by separating axes; touching counts.

    Args:
        dx, dy: centre of the second minus centre of the first (m).
        heading, length, width: of the first.
        other_heading, other_length, other_width: of the second.

    Returns:
        bool, of the common shape.
    """
    cos, sin = heading.cos(), heading.sin()
    other_cos, other_sin = other_heading.cos(), other_heading.sin()
    # The cosine and sine of the angle between the boxes project one's half extents on the other's axes.
    dot = (cos * other_cos + sin * other_sin).abs()
    cross = (cos * other_sin - sin * other_cos).abs()
    l1, w1, l2, w2 = length / 2, width / 2, other_length / 2, other_width / 2
    forward, left = (dx * cos + dy * sin).abs(), (dy * cos - dx * sin).abs()
    other_forward = (dx * other_cos + dy * other_sin).abs()
    other_left = (dy * other_cos - dx * other_sin).abs()
    return (
        (forward <= l1 + l2 * dot + w2 * cross)
        & (left <= w1 + l2 * cross + w2 * dot)
        & (other_forward <= l2 + l1 * dot + w1 * cross)
        & (other_left <= w2 + l1 * cross + w1 * dot)
    )


class Bicycle(NamedTuple):
    """State of kinematic bicycles; x and y are those of the rear axle."""

    x: Tensor
    y: Tensor
    heading: Tensor
    speed: Tensor
    acceleration: Tensor
    steering: Tensor
    """Angle of the front wheel (rad)."""


def drive_bicycle(state: Bicycle, acceleration: Tensor, steering: Tensor, dt: float = 0.1) -> Bicycle:
    """One step under actions in [-1, 1] (clipped), as CaRL's nuPlan agent acts on nuPlan's bicycle.

    Positive acceleration is 2.4 m/s^2 at 1, negative 3.2 m/s^2 at -1, steering aims at 0.838 rad at 1. Both
    pass a low pass (0.2 s and 0.05 s), position and heading move by the speed and angle before the step. A
    car that would roll backwards is held: the command becomes -v - 0.75 a.
    """
    x, y, heading, v, a, angle = state
    acceleration, steering = acceleration.clamp(-1.0, 1.0), steering.clamp(-1.0, 1.0)
    command = torch.where(acceleration >= 0, ACCELERATION * acceleration, BRAKING * acceleration)
    command = torch.where(v + dt * command < 0, -v - 0.75 * a, command).clamp(-BRAKING, ACCELERATION)
    rate = (MAX_STEERING * steering - angle) / dt
    a = a + dt / (dt + _ACCELERATION_LAG) * (command - a)
    ideal = angle + dt * rate
    lagged = angle + dt / (dt + _STEERING_LAG) * (ideal - angle)
    return Bicycle(
        x + v * heading.cos() * dt,
        y + v * heading.sin() * dt,
        heading + v * angle.tan() / WHEELBASE * dt,
        v + a * dt,
        a,
        lagged.clamp(-_STEERING_STOP, _STEERING_STOP),
    )


def idm_acceleration(
    speed: Tensor,
    desired_speed: Tensor,
    gap: Tensor,
    leader_speed: Tensor,
    *,
    min_gap: Tensor | float = 1.0,
    headway: Tensor | float = 1.5,
    acceleration: Tensor | float = 1.0,
    deceleration: Tensor | float = 2.0,
    hardest: float | None = None,
) -> Tensor:
    """The intelligent driver model (Treiber 2000) with exponent 4, nuPlan's numbers as defaults.

        s* = s0 + v T + v (v - v_l) / (2 sqrt(a b))        dv = a (1 - (v/v0)^4 - (s*/s)^2)

    Args:
        speed, desired_speed, leader_speed: m/s.
        gap: bumper to bumper (m); taken as at least `min_gap`, as nuPlan does.
        hardest: braking (m/s^2) at which the answer is cut; `deceleration` itself as in nuPlan when None.

    Returns:
        m/s^2, in [-hardest, acceleration].
    """
    a = torch.as_tensor(acceleration, dtype=speed.dtype, device=speed.device)
    b = torch.as_tensor(deceleration, dtype=speed.dtype, device=speed.device)
    s0 = torch.as_tensor(min_gap, dtype=speed.dtype, device=speed.device)
    wanted = s0 + speed * headway + speed * (speed - leader_speed) / (2 * (a * b).sqrt())
    ratio = speed / desired_speed
    square = ratio * ratio
    close = wanted.clamp(min=0.0) / torch.maximum(gap, s0)
    answer = a * (1 - square * square - close * close)
    lowest = -b if hardest is None else torch.full_like(b, -hardest)
    return torch.minimum(torch.maximum(answer, lowest), a)
