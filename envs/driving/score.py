"""Scores of drives: CARLA's driving score, leaderboard 2.0 and 2.1, and nuPlan's closed-loop score.

Definitions are those of the code of carla-simulator's leaderboard and scenario_runner and of nuplan-devkit;
the worlds are others, so that figures do not compare with published ones. Scores accumulate over frames, one
after every step of 0.1 s (`initial`, `update`, `result`), in dictionaries of tensors with the batch last,
without a loop and without waiting for a device.

nuPlan's expert is the human who was recorded. Where there is none, what stands in is the distance at the
speed limit, at most the route.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from saferl.envs.driving.comfort import (
    NUPLAN_LIMITS,
    WHOLE,
    ComfortLimits,
    History,
    open_violations,
    push,
    settled_violations,
)
from saferl.envs.driving.frame import DrivingFrame
from saferl.envs.driving.geometry import REAR_TO_CENTRE
from saferl.errors import UsageError

__all__ = [
    "COEFFICIENTS_20",
    "COEFFICIENTS_21",
    "COUNTED",
    "CarlaScore",
    "DrivingScore",
    "NuPlanScore",
    "closed_loop_score",
    "driving_score_20",
    "driving_score_21",
    "summarise",
    "time_to_collision",
    "ttc_violation",
]

State: TypeAlias = dict[str, Tensor]
Number: TypeAlias = Tensor | float

COUNTED = ("pedestrians", "vehicles", "statics", "red_lights", "stop_signs", "scenario_timeouts", "yields")
"""Infractions that are counted, in the order of the coefficients. A frame shows the first five."""
COEFFICIENTS_20 = (0.50, 0.60, 0.65, 0.70, 0.80, 0.70, 0.70)
"""Factors of the penalty in leaderboard 2.0, which also scores longest6 v2."""
COEFFICIENTS_21 = (1.0, 0.7, 0.6, 0.4, 0.25, 0.4, 0.4)
"""Terms of the denominator in leaderboard 2.1."""
_SEEN = 5
_OVERSPEED = 2.23  # m/s (5 mph) over the limit at which nothing is left of nuPlan's share for speed
_TOLERANCE = 1e-5  # of a step of time: boxes that touch at a step are found to touch, whatever the rounding


# --- formulas ----------------------------------------------------------------------------------------------


def driving_score_20(
    completion: Tensor, counts: Tensor, wrong_share: Number = 0.0, checkpoint_speeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Leaderboard 2.0: penalties multiply.

        P = product of c_k^n_k * (1 - wrong share) * product of (1 - 0.3 (1 - s_i / 100)),   DS = max(RC P, 0)

    Args:
        completion: RC, route completion in percent (...).
        counts: (K, ...) how often each of the first K infractions of `COUNTED` happened.
        wrong_share: share of the distance outside the lanes, in [0, 1] (...).
        checkpoint_speeds: (checkpoints, ...) s, mean speed in percent of the background's since the
            checkpoint before; 100 or more costs nothing, and none is known when None.

    Returns:
        DS and P (...).

    Raises:
        UsageError: there are more counts than kinds of infractions.
    """
    penalty = (_coefficients(COEFFICIENTS_20, counts) ** counts).prod(0) * (1 - wrong_share)
    if checkpoint_speeds is not None:
        penalty = penalty * (1 - 0.3 * _slowness(checkpoint_speeds)).prod(0)
    return (completion * penalty).clamp(min=0.0), penalty


def driving_score_21(
    completion: Tensor, counts: Tensor, wrong_share: Number = 0.0, checkpoint_speeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Leaderboard 2.1, whose penalty falls hyperbolically; arguments and result as for `driving_score_20`.

    P = (1 - wrong share) / (1 + sum of c_k n_k + sum of 0.4 (1 - s_i / 100)),   DS = max(RC P, 0)
    """
    total = 1 + (_coefficients(COEFFICIENTS_21, counts) * counts).sum(0)
    if checkpoint_speeds is not None:
        total = total + 0.4 * _slowness(checkpoint_speeds).sum(0)
    penalty = (1 - wrong_share) / total
    return (completion * penalty).clamp(min=0.0), penalty


def closed_loop_score(
    *,
    progress: Number,
    ttc: Number,
    speed: Number,
    comfort: Number,
    no_at_fault: Number = 1.0,
    drivable: Number = 1.0,
    making_progress: Number = 1.0,
    direction: Number = 1.0,
) -> Tensor:
    """nuPlan's score of parts in [0, 1] (...).

    CLS = no_at_fault drivable making_progress direction (5 progress + 5 ttc + 4 speed + 2 comfort) / 16
    """
    gate = no_at_fault * drivable * making_progress * direction
    return torch.as_tensor(gate * (5 * progress + 5 * ttc + 4 * speed + 2 * comfort) / 16)


def _coefficients(table: tuple[float, ...], counts: Tensor) -> Tensor:
    """(K, 1, ...), to go with counts (K, ...)."""
    kinds = counts.shape[0]
    if kinds > len(table):
        raise UsageError(f"there are {kinds} counts; {len(table)} kinds of infractions are known.")
    key = (table[:kinds], counts.device, counts.dtype)
    if key not in _CONSTANTS:
        _CONSTANTS[key] = torch.tensor(table[:kinds], dtype=counts.dtype, device=counts.device)
    return _CONSTANTS[key].reshape(-1, *[1] * (counts.dim() - 1))


_CONSTANTS: dict[tuple[tuple[float, ...], torch.device, torch.dtype], Tensor] = {}


def _slowness(speeds: Tensor) -> Tensor:
    """(checkpoints, ...) how much slower than the background, in [0, 1]."""
    return (1 - speeds / 100.0).clamp(min=0.0)


# --- when boxes meet ---------------------------------------------------------------------------------------


@dataclass
class _Encounter:
    """The others (N, B) as the ego sees them, if all go on straight at their speeds."""

    forward: Tensor
    """m from the ego's centre, along its heading."""
    left: Tensor
    first: Tensor
    """s from now (negative: before) at which boxes begin to overlap; after `last` if they never do."""
    last: Tensor


def _encounter(frame: DrivingFrame) -> _Encounter:
    """Two boxes overlap where their projections on all four axes do. With headings fixed the distance of the
    projections is linear in time, and each axis leaves an interval: exact for every moment at once."""
    others = frame.others
    cos, sin = frame.heading.cos(), frame.heading.sin()
    turn = others.heading - frame.heading
    c, s = turn.cos(), turn.sin()
    dx, dy = others.x - frame.x, others.y - frame.y
    forward, left = dx * cos + dy * sin, dy * cos - dx * sin
    l1, w1, l2, w2 = 0.5 * frame.length, 0.5 * frame.width, 0.5 * others.length, 0.5 * others.width
    dot, cross = c.abs(), s.abs()
    v, u = frame.speed, others.speed
    axes = (
        (forward, u * c - v, l1 + l2 * dot + w2 * cross),
        (left, u * s, w1 + l2 * cross + w2 * dot),
        (forward * c + left * s, u - v * c, l2 + l1 * dot + w1 * cross),
        (left * c - forward * s, v * s, w2 + l1 * cross + w1 * dot),
    )
    first = torch.full_like(forward, -math.inf)
    last = torch.full_like(forward, math.inf)
    for place, rate, reach in axes:
        # Slower than a micrometre a second is at rest: beyond reach for ever, or within it since long ago.
        speed = rate.abs()
        ahead = torch.where(speed < 1e-6, place.abs(), -place * rate.sign())
        speed = speed.clamp(min=1e-6)
        first = torch.maximum(first, (ahead - reach) / speed)
        last = torch.minimum(last, (ahead + reach) / speed)
    return _Encounter(forward, left, first, last)


def _meeting(encounter: _Encounter, first: float, step: float, count: int) -> tuple[Tensor, Tensor]:
    """The earliest of the times first, first + step, ... at which boxes overlap, and whether one does."""
    index = ((encounter.first - first) / step - _TOLERANCE).ceil().clamp(min=0.0)
    time = first + step * index
    return time, (index < count) & (time <= encounter.last + _TOLERANCE * step)


def ttc_violation(
    frame: DrivingFrame, *, first: float = 0.1, step: float = 0.2, count: int = 5, stopped: float = 0.1
) -> Tensor:
    """CaRL's test: whether the ego would touch any actor at 0.1, 0.3, 0.5, 0.7 or 0.9 s, (B,) bool.

    All go on straight at their speeds. Not for an ego slower than `stopped` (m/s), and not where there are
    neither vehicles nor people.
    """
    others = frame.others
    if others.x.shape[0] == 0:
        return torch.zeros_like(frame.speed, dtype=torch.bool)
    _, meets = _meeting(_encounter(frame), first, step, count)
    hit = (meets & others.valid).any(0)
    return hit & (others.valid & (others.kind < 2)).any(0) & (frame.speed.abs() >= stopped)


def time_to_collision(frame: DrivingFrame, horizon: float = 3.0) -> Tensor:
    """nuPlan's time to collision (s), (B,): 0.1, 0.2, ... below the horizon, inf where nothing is met.

    Of actors within 30 degrees of straight ahead, seen from the rear axle; in junctions, between lanes and
    off the road, of all that are not behind (150 degrees). 0 in a collision that is the ego's fault; inf for
    an ego that stands (5e-3 m/s).

    nuPlan leaves out whom the ego has collided with before; a frame does not name them, and they count here
    while the world keeps them.
    """
    others = frame.others
    nothing = torch.full_like(frame.speed, math.inf)
    if others.x.shape[0] == 0:
        return torch.where(frame.at_fault, 0.0, nothing)
    encounter = _encounter(frame)
    ahead = encounter.forward + REAR_TO_CENTRE
    around = frame.in_junction | frame.multiple_lanes | (frame.off_road_depth > 0)
    cone = math.cos(math.radians(30)) * torch.where(around, -1.0, 1.0)
    time, meets = _meeting(encounter, 0.1, 0.1, math.ceil(horizon / 0.1 - 1e-6) - 1)
    meets = meets & others.valid & (ahead > cone * torch.hypot(ahead, encounter.left))
    least = torch.where(meets, time, math.inf).amin(0)
    least = torch.where(frame.speed.abs() > 5e-3, least, nothing)
    return torch.where(frame.at_fault, 0.0, least)


# --- CARLA -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CarlaScore:
    """CARLA's driving score, see `driving_score_20` and `driving_score_21`.

    * Infractions are counted as the frames show them. Scenario timeouts and emergency vehicles that were not
      let by are not among them.
    * The share outside the lanes is that of the distance along the route.
    * Whenever another quarter of the route lies behind, the ego's mean speed since is held against that of
      the vehicles around, over the moments that had any; the last quarter counts from 95 % of the route on.
      As in scenario_runner a quarter begins where the checkpoint before it was noticed.
    """

    checkpoints: int = 4

    def initial(self, batch: int, device: torch.device | str = "cpu") -> State:
        """State before the first step."""
        zero = torch.zeros(batch, device=device)
        counts = torch.zeros(_SEEN, batch, device=device)
        for table in (COEFFICIENTS_20, COEFFICIENTS_21):
            _coefficients(table, counts)  # so that no step has to carry them to the device
        return {
            "counts": counts,
            "completion": zero,
            "route_length": zero.clone(),
            "driven": zero.clone(),
            "outside": zero.clone(),
            "checkpoint": torch.zeros(batch, dtype=torch.int64, device=device),
            "checkpoint_at": zero.clone(),
            "pace": torch.zeros(2, batch, device=device),
            "speeds": torch.full((self.checkpoints, batch), 100.0, device=device),
        }

    def update(self, frame: DrivingFrame, state: State) -> State:
        """The state with a step more."""
        events = torch.stack(
            [
                frame.hit_pedestrian,
                frame.hit_vehicle,
                frame.hit_static,
                frame.ran_red_light,
                frame.ran_stop_sign,
            ]
        )
        driven = frame.progress * frame.route_length / 100.0
        # As in scenario_runner, the step that passes a checkpoint belongs to what comes after it.
        passed = frame.completion - state["checkpoint_at"] > 100.0 / self.checkpoints
        known = ~frame.background_speed.isnan()
        pace = torch.stack([frame.speed.abs(), frame.background_speed])
        return {
            "counts": state["counts"] + events,
            "completion": frame.completion,
            "route_length": frame.route_length,
            "driven": state["driven"] + driven,
            "outside": state["outside"] + torch.where(frame.outside_lanes, driven, 0.0),
            "checkpoint": state["checkpoint"] + passed,
            "checkpoint_at": torch.where(passed, frame.completion, state["checkpoint_at"]),
            "pace": torch.where(passed, 0.0, state["pace"]) + torch.where(known, pace, 0.0),
            "speeds": self._with(state, passed),
        }

    def _with(self, state: State, passed: Tensor) -> Tensor:
        """Speeds at checkpoints (K, B) with that of the stretch under way where `passed`."""
        slots = torch.arange(self.checkpoints, device=passed.device)[:, None]
        ego, background = state["pace"]
        unknown = background <= 0
        ratio = torch.where(unknown, 1.0, ego / torch.where(unknown, 1.0, background))
        speed = torch.round(100.0 * ratio, decimals=2)
        return torch.where((slots == state["checkpoint"]) & passed, speed, state["speeds"])

    def _penalised(self, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of the driving scores, as if the drive ended now."""
        speeds = self._with(state, state["completion"] > 95.0)
        share = (state["outside"] / state["driven"].clamp(min=1e-6)).clamp(max=1.0)
        return state["completion"], state["counts"], share, speeds

    def driving_score(self, state: State) -> Tensor:
        """Leaderboard 2.0's score as if the drive ended now, (B,)."""
        return driving_score_20(*self._penalised(state))[0]

    def result(self, state: State) -> dict[str, Tensor]:
        """As if the drive ended now, (B,) each.

        "route_completion" (%), "penalty" and "driving_score" (leaderboard 2.0), "penalty_21" and
        "driving_score_21", "km" along the route, "outside_lanes_km", and a count by each of the first five
        names of `COUNTED`.
        """
        given = self._penalised(state)
        score, penalty = driving_score_20(*given)
        later, later_penalty = driving_score_21(*given)
        return {
            "route_completion": state["completion"],
            "penalty": penalty,
            "driving_score": score,
            "penalty_21": later_penalty,
            "driving_score_21": later,
            "km": state["completion"] * state["route_length"] / 1e5,
            "outside_lanes_km": state["outside"] / 1000.0,
            **{name: state["counts"][k] for k, name in enumerate(COUNTED[:_SEEN])},
        }


# --- nuPlan ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NuPlanScore:
    """nuPlan's closed-loop score of a scenario, see `closed_loop_score`.

    * progress: the ego's metres along the route over the expert's (each taken as at least 2), at most 1; 0
      for an ego that ends more than 2 m behind its start, 1 without a route. At least a fifth must be made.
    * ttc: whether `time_to_collision` was always above 0.95 s.
    * speed: 1 less the metres driven above the limit, over 2.23 m/s times the duration. The largest limit of
      the lanes beside a junction is the world's to give.
    * comfort: whether all six tests hold at every sample, filtered over the drive as a whole.
    * no_at_fault: 0 from the first person or vehicle on that was hit by the ego's fault, 1/2 for one object.
    * drivable: whether no corner was ever 0.3 m outside.
    * direction: 1 while less than 2 m were driven backwards within any second (11 samples, as in the code),
      1/2 while less than 6 m.
    """

    dt: float = 0.1
    """s between frames; the filters of comfort assume 0.1."""
    limits: ComfortLimits = NUPLAN_LIMITS

    def initial(self, batch: int, device: torch.device | str = "cpu") -> State:
        """State before the first step."""
        zero = torch.zeros(batch, device=device)
        window = round(1.0 / self.dt) + 1
        return {
            **History.initial(batch, device, samples=WHOLE).named("whole_"),
            "uncomfortable": torch.zeros(batch, dtype=torch.bool, device=device),
            "faults": torch.zeros(3, batch, device=device),
            "least_ttc": zero + math.inf,
            "over": zero,
            "steps": zero.clone(),
            "advance": zero.clone(),
            "expert": zero.clone(),
            "route": zero.clone(),
            "off_road": zero - math.inf,
            "recent": torch.zeros(window, batch, device=device),
            "backward": zero.clone(),
        }

    def update(self, frame: DrivingFrame, state: State, ttc: Tensor | None = None) -> State:
        """The state with a step more; `ttc` is `time_to_collision(frame)`, for who has it."""
        if ttc is None:
            ttc = time_to_collision(frame)
        history = push(
            History.of(state, "whole_"), frame.acceleration_lon, frame.acceleration_lat, frame.heading
        )
        hits = torch.stack([frame.hit_pedestrian, frame.hit_vehicle, frame.hit_static])
        recent = torch.cat([state["recent"][1:], frame.advance[None]])
        return {
            **history.named("whole_"),
            "uncomfortable": state["uncomfortable"] | settled_violations(history, self.limits).any(0),
            "faults": state["faults"] + (hits & frame.at_fault),
            "least_ttc": torch.minimum(state["least_ttc"], ttc),
            "over": state["over"] + (frame.speed - frame.speed_limit).clamp(min=0.0),
            "steps": state["steps"] + 1,
            "advance": state["advance"] + frame.advance,
            "expert": torch.minimum(state["expert"] + frame.speed_limit * self.dt, frame.route_length),
            "route": frame.route_length,
            "off_road": torch.maximum(state["off_road"], frame.off_road_depth),
            "recent": recent,
            "backward": torch.maximum(state["backward"], -recent.sum(0)),
        }

    def parts(self, state: State, expert: Tensor | None = None) -> dict[str, Tensor]:
        """The arguments of `closed_loop_score` as if the drive ended now, (B,) each.

        Args:
            expert: the expert's metres along the route (B,); at the speed limit when None.
        """
        if expert is None:
            expert = state["expert"]
        ratio = (state["advance"].clamp(min=2.0) / expert.clamp(min=2.0)).clamp(max=1.0)
        ratio = torch.where(state["advance"] < -2.0, 0.0, ratio)
        progress = torch.where(state["route"] > 0, ratio, 1.0)
        harsh = state["uncomfortable"] | open_violations(History.of(state, "whole_"), self.limits).any(0)
        people, vehicles, objects = (1 - state["faults"]).clamp(min=0.0).unbind()
        objects = (1 - state["faults"][2] / 2).clamp(min=0.0)
        back = state["backward"]
        return {
            "progress": progress,
            "ttc": (state["least_ttc"] > 0.95).to(ratio),
            "speed": (1 - state["over"] / (_OVERSPEED * state["steps"]).clamp(min=1e-3)).clamp(min=0.0),
            "comfort": (~harsh).to(ratio),
            "no_at_fault": people * vehicles * objects,
            "drivable": (state["off_road"] < 0.3).to(ratio),
            "making_progress": (progress >= 0.2).to(ratio),
            "direction": 1 - 0.5 * (back >= 2.0).to(ratio) - 0.5 * (back >= 6.0).to(ratio),
        }

    def result(self, state: State, expert: Tensor | None = None) -> dict[str, Tensor]:
        """`closed_loop_score` (B,) of `parts`, for the end of drives rather than for every step."""
        return {"closed_loop_score": closed_loop_score(**self.parts(state, expert))}


# --- both --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrivingScore:
    """CARLA's and nuPlan's scores of the same drives."""

    carla: CarlaScore = CarlaScore()
    nuplan: NuPlanScore = NuPlanScore()

    def initial(self, batch: int, device: torch.device | str = "cpu") -> State:
        """State before the first step, the batch last everywhere."""
        return {**self.carla.initial(batch, device), **self.nuplan.initial(batch, device)}

    def update(self, frame: DrivingFrame, state: State, ttc: Tensor | None = None) -> State:
        """The state with a step more; `ttc` is `time_to_collision(frame)` for who has it."""
        return {**self.carla.update(frame, state), **self.nuplan.update(frame, state, ttc)}

    def driving_score(self, state: State) -> Tensor:
        """Leaderboard 2.0's score as if the drive ended now, (B,)."""
        return self.carla.driving_score(state)

    def result(self, state: State, expert: Tensor | None = None) -> dict[str, Tensor]:
        """What `CarlaScore.result` and `NuPlanScore.result` say, (B,) each."""
        return {**self.carla.result(state), **self.nuplan.result(state, expert)}


def summarise(episodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over drives, their deviations, and infractions a kilometre, as CARLA's leaderboard reports them.

    The driving score is the mean of products, which is not the product of the means. Deviations divide by
    n - 1 and are NaN for a single drive. Infractions are divided by the kilometres of route that were
    completed; what was driven outside the lanes stays kilometres.

    Args:
        episodes: results of drives, each of numbers or of arrays (B,) for as many drives. Scores and counts
            that the first lacks are left out.

    Raises:
        UsageError: there is no drive, or one lacks what the first has.
    """
    if not episodes:
        raise UsageError("there are no drives to summarise.")

    def column(name: str) -> np.ndarray:
        missing = [k for k, episode in enumerate(episodes) if name not in episode]
        if missing:
            raise UsageError(f"drive {missing[0]} has no {name!r}, which the first one has.")
        return np.concatenate([np.asarray(episode[name], np.float64).reshape(-1) for episode in episodes])

    columns = {name: column(name) for name in episodes[0]}
    count = len(next(iter(columns.values())))
    report: dict[str, float] = {"episodes": float(count)}
    scores = (
        "driving_score",
        "driving_score_21",
        "closed_loop_score",
        "route_completion",
        "penalty",
        "penalty_21",
    )
    for name in scores:
        if name in columns:
            report[name] = float(columns[name].mean())
            report[f"{name}_std"] = float(columns[name].std(ddof=1)) if count > 1 else math.nan
    if "km" in columns:
        report["km"] = float(columns["km"].sum())
        for name in COUNTED:
            if name in columns:
                report[f"{name}_per_km"] = float(columns[name].sum()) / max(report["km"], 0.001)
    if "outside_lanes_km" in columns:
        report["outside_lanes_km"] = float(columns["outside_lanes_km"].sum())
    return report
