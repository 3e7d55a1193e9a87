"""Drivers to compare with: functions of the 262-number observation that follow the protocol of policies.

`stop` brakes, `random` acts at random, `follow` keeps to the route at a constant speed whatever is there, and
`idm` follows it behind the vehicle ahead by the intelligent driver model, stops at red lights and signs, and
lets people cross: the part that PDM-Lite plays for CARLA.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferl.envs.driving.geometry import ACCELERATION, BRAKING, EGO_LENGTH, EGO_WIDTH, MAX_STEERING, WHEELBASE
from saferl.errors import unknown_name

__all__ = ["DRIVERS", "Driver"]

Floats = NDArray[np.floating[Any]]

DRIVERS = ("stop", "random", "follow", "idm")
_METRES, _SPEED = 50.0, 20.0


class Driver:
    """A policy by name, one of `DRIVERS`.

    Args:
        name: which.
        speed: what `follow` keeps (m/s).
        seed: of `random`.

    Raises:
        UsageError: no such driver.
    """

    def __init__(self, name: str, *, speed: float = 6.0, seed: int = 0) -> None:
        if name not in DRIVERS:
            raise unknown_name("driver", name, DRIVERS)
        self.name, self.speed = name, speed
        self._generator = np.random.default_rng(seed)

    def act(self, obs: ArrayLike, *, deterministic: bool = False) -> Floats:
        """Acceleration and steering (B, 2) in [-1, 1] for observations (B, 262)."""
        obs = np.asarray(obs, np.float32)
        batch = len(obs)
        if self.name == "stop":
            return np.tile(np.array([-1.0, 0.0], np.float32), (batch, 1))
        if self.name == "random":
            return self._generator.uniform(-1.0, 1.0, (batch, 2)).astype(np.float32)
        speed = obs[:, 2] * _SPEED
        wanted = 1.0 * (self.speed - speed) if self.name == "follow" else _idm(obs, speed)
        scale = np.where(wanted >= 0, ACCELERATION, BRAKING)
        action = np.empty((batch, 2), np.float32)
        action[:, 0], action[:, 1] = np.clip(wanted / scale, -1.0, 1.0), _pursuit(obs, speed)
        return action


def _route(obs: Floats) -> tuple[Floats, Floats]:
    """The route ahead in the ego's frame, x and y (B, 20)."""
    points = obs[:, 13:93].reshape(-1, 20, 4)
    return points[..., 0] * _METRES, points[..., 1] * _METRES


def _pursuit(obs: Floats, speed: Floats) -> Floats:
    """Steering towards a point of the route, farther ahead the faster the ego is (pure pursuit)."""
    x, y = _route(obs)
    rear = EGO_LENGTH / 2 - 1.127
    reach = np.hypot(x + rear, y)
    wanted = np.clip(0.6 * speed + 3.0, 4.0, 18.0)[:, None]
    at = np.argmax(reach >= wanted, axis=1)
    rows = np.arange(len(obs))
    tx, ty = x[rows, at] + rear, y[rows, at]
    curvature = 2 * ty / np.maximum(tx * tx + ty * ty, 1.0)
    result: Floats = np.clip(np.arctan(WHEELBASE * curvature) / MAX_STEERING, -1.0, 1.0)
    return result


def _idm(obs: Floats, speed: Floats) -> Floats:
    """m/s^2, the least of what the leader, the line ahead, people, and bends allow."""
    x, y = _route(obs)
    desired = obs[:, 10] * _SPEED
    # Bends: the yaw between points of the route 3 m apart.
    yaw = np.unwrap(
        np.arctan2(obs[:, 13:93].reshape(-1, 20, 4)[..., 3], obs[:, 13:93].reshape(-1, 20, 4)[..., 2])
    )
    bend = np.abs(np.diff(yaw, axis=1, prepend=0.0)) / 3.0
    bend = np.maximum.reduce([bend, np.roll(bend, 1, 1)])
    comfortable = np.sqrt(2.0 / np.maximum(bend, 1e-3))
    ahead = 3.0 * np.arange(1, 21)
    allowed = np.sqrt(comfortable**2 + 2 * 1.2 * np.maximum(ahead - 3.0, 0.0)).min(1)
    desired = np.minimum(desired, allowed)
    answer = _follow(speed, np.maximum(desired, 0.5), np.full_like(speed, 1e3), np.zeros_like(speed))

    vehicles = obs[:, 93:221].reshape(-1, 16, 8)
    vx, vy = vehicles[..., 0] * _METRES, vehicles[..., 1] * _METRES
    length, width = vehicles[..., 6] * 5.0, vehicles[..., 7] * 2.0
    gap, aside = _along(x, y, vx, vy)
    # The part of the other's box across the route: sideways it is as wide as it is long.
    across = 0.5 * (width * np.abs(vehicles[..., 2]) + length * np.abs(vehicles[..., 3]))
    seen = length > 0
    in_way = seen & (gap > 0) & (np.abs(aside) < 0.5 * EGO_WIDTH + across + 0.3)
    ahead_gap = np.where(in_way, gap - 0.5 * EGO_LENGTH - 0.5 * length, 1e3)
    rows, nearest = np.arange(len(obs)), ahead_gap.argmin(1)
    leader = np.maximum(vehicles[rows, nearest, 4] * _SPEED, 0.0)
    answer = np.minimum(answer, _follow(speed, desired, ahead_gap[rows, nearest], leader))
    # Vehicles that will be on the route: where they are 1 and 2 s from now.
    for seconds in (1.0, 2.0):
        later_gap, later_aside = _along(
            x, y, vx + seconds * _SPEED * vehicles[..., 4], vy + seconds * _SPEED * vehicles[..., 5]
        )
        crossing = seen & ~in_way & (np.abs(vehicles[..., 3]) > 0.5) & (later_gap > 0)
        crossing &= np.abs(later_aside) < 0.5 * EGO_WIDTH + across
        room = np.where(crossing, later_gap - 0.5 * EGO_LENGTH - 2.5, 1e3).min(1)
        near = room < speed * (seconds + 1.0) + 4.0
        answer = np.minimum(answer, np.where(near, _follow(speed, desired, room, np.zeros_like(speed)), 9.0))

    people = obs[:, 221:241].reshape(-1, 4, 5)
    px, py = people[..., 0] * _METRES, people[..., 1] * _METRES
    step = people[..., 3] * _SPEED
    for seconds in (0.0, 2.0):
        gap, aside = _along(x, y, px, py + seconds * step)
        close = (people[..., 4] > 0) & (gap > 0) & (np.abs(aside) < 0.5 * EGO_WIDTH + 1.0)
        room = np.where(close, gap - 0.5 * EGO_LENGTH - 1.5, 1e3).min(1)
        answer = np.minimum(answer, _follow(speed, desired, room, np.zeros_like(speed)))

    line = obs[:, 241] * _METRES
    stopping = speed**2 / (2 * np.maximum(line, 0.1))
    wait = ((obs[:, 242] > 0) | ((obs[:, 243] > 0) & (stopping < 3.0)) | (obs[:, 245] > 0)) & (line > 0.0)
    room = np.where(wait, line, 1e3)
    return np.minimum(answer, _follow(speed, desired, room, np.zeros_like(speed)))


def _along(x: Floats, y: Floats, px: Floats, py: Floats) -> tuple[Floats, Floats]:
    """Distance along the route, and from it, of places (B, N); what lies behind gets a negative distance."""
    square = (px[:, :, None] - x[:, None]) ** 2 + (py[:, :, None] - y[:, None]) ** 2
    nearest = square.argmin(-1)
    rows = np.arange(len(x))[:, None]
    before = np.maximum(nearest - 1, 0)
    first = nearest == 0
    dx = np.where(first, x[rows, 0], x[rows, nearest] - x[rows, before])
    dy = np.where(first, y[rows, 0], y[rows, nearest] - y[rows, before])
    scale = np.maximum(np.hypot(dx, dy), 1e-6)
    ox, oy = px - x[rows, nearest], py - y[rows, nearest]
    along = (ox * dx + oy * dy) / scale
    aside = (oy * dx - ox * dy) / scale
    return 3.0 * (nearest + 1) + along, aside


def _follow(speed: Floats, desired: Floats, gap: Floats, leader: Floats) -> Floats:
    """The intelligent driver model, a = 1.5, b = 2, s0 = 2 m, T = 1.2 s; brakes as hard as it must."""
    wanted = 2.0 + 1.2 * speed + speed * (speed - leader) / (2 * math.sqrt(1.5 * 2.0))
    close = np.maximum(wanted, 0.0) / np.maximum(gap, 0.3)
    result: Floats = 1.5 * (1 - (speed / np.maximum(desired, 0.5)) ** 4 - close**2)
    return result
