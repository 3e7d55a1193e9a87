"""CaRL's six tests of comfort, as dot products with the last samples.

Accelerations are smoothed, jerks and yaw rates differentiated by Savitzky-Golay filters (scipy's, mode
"interp", 0.1 s between samples), over the whole history of n samples:

    a_lon, a_lat, |a|         window min(8, n), order 2
    jerk of |a|, of a_lon     of the smoothed values, window min(15, n), order 2
    yaw rate, acceleration    window min(5, n), order 2 and 3

All of that is linear in the history, so that every filtered value is a dot product whose weights come from
filtering the identity once. The even window shifts inner samples by half a step: a ramp of 2 m/s^3 counts as
1.6516 m/s^3, as in CaRL's release and nuPlan's metric, and is kept.

* `violations` judges the newest value of a history of 15 samples, as CaRL does on the way. The history starts
  anew with every drive; in CaRL's release it does not, by mistake.
* `settled_violations` and `open_violations` judge every value of a drive as nuPlan's metric does after it,
  with the samples before and after each, from a history of 33 samples: the first gives one more value a step,
  the second those that later samples would still change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saferl.envs.driving.geometry import wrap_angle

__all__ = [
    "CARLA_LIMITS",
    "LEAST",
    "LEAST_NUPLAN",
    "NUPLAN_LIMITS",
    "SAMPLES",
    "TESTS",
    "WHOLE",
    "ComfortLimits",
    "History",
    "measures",
    "open_violations",
    "push",
    "settled_violations",
    "violations",
]

SAMPLES = 15
"""Length of CaRL's history."""
LEAST = 8
"""Samples below which CaRL tests nothing in CARLA."""
LEAST_NUPLAN = 4
"""The same in nuPlan; fewer do not carry the filters."""
WHOLE = 33
"""Length of the history that `settled_violations` and `open_violations` need."""
TESTS = ("lon_acceleration", "lat_acceleration", "jerk", "lon_jerk", "yaw_rate", "yaw_acceleration")

_DT = 0.1  # s
_SMOOTHING = 8
_TURNING = 5
# A value no longer changes when 11 samples follow it: 7 that jerk looks ahead, 4 of the smoothing. Values are
# read 21 back, so that the first ones, which look up to 21 ahead, can be read one a step like all others.
_LAG = 21
_INNER = 11

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ComfortLimits:
    """Greatest magnitudes, in m/s^2, m/s^3, rad/s and rad/s^2; braking has its own."""

    braking: float
    acceleration: float
    lat_acceleration: float
    jerk: float
    """Of the acceleration's magnitude."""
    lon_jerk: float
    yaw_rate: float
    yaw_acceleration: float


CARLA_LIMITS = ComfortLimits(20.0, 10.0, 9.0, 30.0, 30.0, 1.0, 3.0)
"""CaRL's release 1.0 for CARLA."""
NUPLAN_LIMITS = ComfortLimits(4.05, 2.40, 4.89, 8.37, 4.13, 0.95, 1.93)
"""nuPlan's metric, and CaRL's later training."""


class History(NamedTuple):
    """The last K samples of B drives, newest last. A drive begins anew when its `filled` is set to 0."""

    samples: Tensor
    """(4, K, B): magnitude of the acceleration, a_lon, a_lat (m/s^2), turn since the sample before (rad)."""
    yaw: Tensor
    """(B,), of the newest sample."""
    filled: Tensor
    """(B,) int64, samples so far, at most K."""

    @classmethod
    def initial(
        cls,
        batch: int,
        device: torch.device | str = "cpu",
        *,
        samples: int = SAMPLES,
        dtype: torch.dtype = torch.float32,
    ) -> History:
        """Before the first sample. `samples` is `SAMPLES`, or `WHOLE`; each has its functions."""
        empty = torch.zeros(4, samples, batch, dtype=dtype, device=device)
        # Here and not when they are first asked for, which a compiled step could not do.
        for make in (_newest_table,) if samples == SAMPLES else (_settled_table, _open_table):
            _constant(make, empty.device, dtype)
        return cls(
            empty,
            torch.zeros(batch, dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @classmethod
    def of(cls, state: dict[str, Tensor], prefix: str = "comfort_") -> History:
        """The history in a state, see `named`."""
        return cls(*(state[prefix + name] for name in cls._fields))

    def named(self, prefix: str = "comfort_") -> dict[str, Tensor]:
        """Its tensors for a state."""
        return {prefix + name: value for name, value in zip(self._fields, self, strict=True)}


def push(history: History, acceleration_lon: Tensor, acceleration_lat: Tensor, yaw: Tensor) -> History:
    """The history with a sample more, each (B,); the yaw may be wrapped or not."""
    # Turns instead of angles: nothing grows with the number of rounds driven, so that nothing loses digits.
    # The first sample's turn is meaningless; no filter gives the oldest turn of its window a weight.
    turn = wrap_angle(yaw - history.yaw)
    magnitude = torch.hypot(acceleration_lon, acceleration_lat)
    newest = torch.stack([magnitude, acceleration_lon, acceleration_lat, turn])
    length = history.samples.shape[1]
    return History(
        torch.cat([history.samples[:, 1:], newest[:, None]], 1), yaw, (history.filled + 1).clamp(max=length)
    )


def measures(history: History) -> Tensor:
    """The newest values that `TESTS` judge, (6, B); meaningless below `LEAST_NUPLAN` samples."""
    samples = history.samples
    table = _constant(_newest_table, samples.device, samples.dtype)
    weights = table.index_select(1, history.filled)
    smoothing, jerk, turning = weights[:8], weights[8:23], weights[23:].unflatten(0, (2, 4))
    return torch.cat(
        [
            (smoothing * samples[1:3, SAMPLES - 8 :]).sum(1),
            (jerk * samples[:2]).sum(1),
            (turning * samples[3, SAMPLES - 4 :]).sum(1),
        ]
    )


def violations(history: History, limits: ComfortLimits, least: int = LEAST) -> Tensor:
    """Which of `TESTS` the newest sample fails, (6, B) bool; none before `least` samples (4 or more).

    Args:
        history: of `SAMPLES` samples.
    """
    return _beyond(measures(history), limits) & (history.filled >= max(least, LEAST_NUPLAN))


def settled_violations(history: History, limits: ComfortLimits) -> Tensor:
    """Which of `TESTS` the sample 21 before the newest fails, the drive looked at as a whole, (6, B) bool.

    To be asked after every `push`; none before 22 samples.

    Args:
        history: of `WHOLE` samples.
    """
    samples = history.samples
    table = _constant(_settled_table, samples.device, samples.dtype)
    smoothing, jerk, rate, change = table.index_select(1, history.filled).unflatten(0, (4, WHOLE))
    values = torch.cat(
        [
            (smoothing * samples[1:3]).sum(1),
            (jerk * samples[:2]).sum(1),
            (rate * samples[3]).sum(0, keepdim=True),
            (change * samples[3]).sum(0, keepdim=True),
        ]
    )
    return _beyond(values, limits) & (history.filled > _LAG)


def open_violations(history: History, limits: ComfortLimits) -> Tensor:
    """Which of `TESTS` fails at any sample that `settled_violations` has not judged, (6, B) bool.

    As if the drive ended now: with those that were found settled, it is nuPlan's verdict of the drive so far.
    Some 10^4 products a drive, for the end of drives rather than for every step.

    Args:
        history: of `WHOLE` samples.
    """
    samples = history.samples
    table = _constant(_open_table, samples.device, samples.dtype)  # (4, values, samples, counts)
    found = []
    for operator, source in ((0, 1), (0, 2), (1, 0), (1, 1), (2, 3), (3, 3)):
        weights = table[operator].index_select(-1, history.filled)
        found.append((weights * samples[source]).sum(1))
    beyond = _beyond(torch.stack(found), limits)  # (6, values, B)
    # What is before the first sample has weights of 0, and 0 is within all limits.
    return beyond.any(1) & (history.filled >= LEAST_NUPLAN)


def _beyond(values: Tensor, limits: ComfortLimits) -> Tensor:
    """Values (6, ...) that are not within the limits, bool."""
    lon, lat, jerk, lon_jerk, rate, change = values.unbind()
    return torch.stack(
        [
            (lon < -limits.braking) | (lon > limits.acceleration),
            lat.abs() > limits.lat_acceleration,
            jerk.abs() > limits.jerk,
            lon_jerk.abs() > limits.lon_jerk,
            rate.abs() > limits.yaw_rate,
            change.abs() > limits.yaw_acceleration,
        ]
    )


# --- the filters as matrices -------------------------------------------------------------------------------


def filters(samples: int) -> Floats:
    """(4, n, n): smoothing, jerk, yaw rate and yaw acceleration of n samples as matrices; n is 4 or more.

    Row i, column j holds what sample j adds to value i. The last two act on the turns since the sample
    before.
    """
    from scipy.signal import savgol_filter

    def filtered(values: Floats, window: int, order: int, derivative: int) -> Floats:
        window = min(window, samples)
        result: Floats = savgol_filter(values, window, order, derivative, _DT, axis=0, mode="interp")
        return result

    unit = np.eye(samples)
    smoothing = filtered(unit, _SMOOTHING, 2, 0)
    jerk = filtered(smoothing, SAMPLES, 2, 1)
    rate, change = filtered(unit, _TURNING, 2, 1), filtered(unit, _TURNING, 3, 2)
    # Weights of a derivative sum to 0, so that the yaws in it may count from the newest, whose distance to an
    # older one is the sum of the turns since: a turn weighs what all yaws before it do, negated.
    turning = [np.cumsum(weights, axis=1) - weights for weights in (rate, change)]
    return np.stack([smoothing, jerk, -turning[0], -turning[1]])


def _newest_table() -> Floats:
    """(8 + 15 + 4 + 4, 16): weights of the newest value, by the count of samples."""
    table = np.zeros((31, SAMPLES + 1))
    for n in range(LEAST_NUPLAN, SAMPLES + 1):
        rows = np.zeros((4, SAMPLES))
        rows[:, SAMPLES - n :] = filters(n)[:, -1]
        smoothing, jerk, rate, change = rows
        table[:, n] = np.concatenate([smoothing[-8:], jerk, rate[-4:], change[-4:]])
    return table


def _settled_table() -> Floats:
    """(4 * 33, 34): weights of the value `_LAG` before the newest, by the count of samples."""
    table = np.zeros((4, WHOLE, WHOLE + 1))
    for n in range(_LAG + 1, WHOLE + 1):
        table[:, WHOLE - n :, n] = filters(n)[:, n - 1 - _LAG]
    return table.reshape(4 * WHOLE, WHOLE + 1)


def _open_table() -> Floats:
    """(4, 33, 33, 34): weights of all values that are not settled, by the count of samples."""
    table = np.zeros((4, WHOLE, WHOLE, WHOLE + 1))
    for n in range(LEAST_NUPLAN, WHOLE + 1):
        first = WHOLE - n
        table[:, first:, first:, n] = filters(n)
    # A full history may have lost the drive's beginning: its first values are another filter's, and settled.
    table[:, :_INNER, :, WHOLE] = 0.0
    return table


_TABLES: dict[tuple[str, str, torch.dtype], Tensor] = {}


def _constant(make: Callable[[], Floats], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The table, made once for a device and a type of number."""
    key = (make.__name__, str(device), dtype)
    if key not in _TABLES:
        _TABLES[key] = torch.from_numpy(make()).to(device=device, dtype=dtype)
    return _TABLES[key]
