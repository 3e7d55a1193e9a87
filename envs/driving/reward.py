"""Rewards of driving: CaRL's route completion behind gates, and those it is compared with.

A reward is called with the frame after a step and its own state, and says the reward, what ends the drive as a
failure, its state, and its parts. The end of the route and of the time are the world's to call. All states hold the
history of comfort, so that `costs` can be read beside any reward. Tensors are (B,), the batch last where there is more.

CaRL (Jaeger et al. 2025, arXiv 2504.17838; equations from the published code), per step:

    r = dRC [not outside the lanes] p_speed p_ttc p_comfort p_lane  -  [collision or red light]

with RC the route completion in percent. dRC is multiplied by soft penalties in [0, 1] (`saferl.gates.multiply`)
and hard infractions end the drive (`saferl.gates.terminate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saferl.envs.driving.comfort import (
    CARLA_LIMITS,
    NUPLAN_LIMITS,
    ComfortLimits,
    comfort_violations,
    push,
    start,
)
from saferl.envs.driving.frame import NO_LIGHT, DrivingFrame, LightState
from saferl.envs.driving.geometry import wrap_angle
from saferl.gates import multiply, switch, terminate

__all__ = [
    "COSTS",
    "REWARDS",
    "CarlReward",
    "DrivingReward",
    "MetaDriveReward",
    "NuPlanReward",
    "RewardStep",
    "RoachReward",
    "SparseScoreReward",
    "carl_v11",
    "costs",
    "desired_speed",
    "lane_factor",
    "nuplan_weighted",
    "speed_factor",
    "time_to_collision",
    "ttc_violation",
]

State = dict[str, Tensor]

TTC_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""s ahead at which CaRL looks for an overlap."""
_OVERSPEED = 2.23  # m/s over the limit at which nothing is left (5 mph)


class RewardStep(NamedTuple):
    """What a reward says of a step."""

    reward: Tensor
    """(B,)."""
    terminated: Tensor
    """(B,) bool: the drive failed."""
    state: State
    parts: dict[str, Tensor]
    """Factors and terms by name, each (B,)."""


class DrivingReward(Protocol):
    """What worlds ask of a reward."""

    def initial(self, batch: int, device: torch.device | str) -> State:
        """State at the start of drives, the batch last everywhere."""
        ...

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        """Judge a step; `state` is not changed."""
        ...

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        """What a critic may know besides, (10, B)."""
        ...


# --- parts that several share ----------------------------------------------------------------------------------


def speed_factor(speed: Tensor, limit: Tensor) -> Tensor:
    """max(0, 1 - (v - limit) / 2.23 m/s) above the limit, else 1."""
    return (1.0 - (speed - limit) / _OVERSPEED).clamp(0.0, 1.0)


def lane_factor(
    offset: Tensor, width: Tensor, in_junction: Tensor, free: float = 0.0, strength: float = 1.0
) -> Tensor:
    """1 - strength clip((d - free) / (width / 2 - free), 0, 1); 1 in junctions."""
    share = ((offset - free) / (0.5 * width - free).clamp(min=1e-6)).clamp(0.0, 1.0)
    return torch.where(in_junction, 1.0, 1.0 - strength * share)


def _contact(frame: DrivingFrame) -> tuple[Tensor, Tensor]:
    """From when until when (s, negative for the past) each actor's box would touch the ego's, (N, B).

    Both go on straight at their speed. The projections on the boxes' four axes are linear in time, so that
    each axis gives an interval; the boxes overlap where all four do. Empty intervals end before they begin.
    """
    others = frame.others
    cos, sin = frame.heading.cos(), frame.heading.sin()
    other_cos, other_sin = others.heading.cos(), others.heading.sin()
    dot = (cos * other_cos + sin * other_sin).abs()
    cross = (cos * other_sin - sin * other_cos).abs()
    l1, w1, l2, w2 = 0.5 * frame.length, 0.5 * frame.width, 0.5 * others.length, 0.5 * others.width
    dx, dy = others.x - frame.x, others.y - frame.y
    vx = others.speed * other_cos - frame.speed * cos
    vy = others.speed * other_sin - frame.speed * sin
    first, last = torch.full_like(dx, -math.inf), torch.full_like(dx, math.inf)
    for c, s, half in (
        (cos, sin, l1 + l2 * dot + w2 * cross),
        (-sin, cos, w1 + l2 * cross + w2 * dot),
        (other_cos, other_sin, l2 + l1 * dot + w1 * cross),
        (-other_sin, other_cos, w2 + l1 * cross + w1 * dot),
    ):
        place, rate = dx * c + dy * s, vx * c + vy * s
        # At rest on this axis: a huge time of the right sign, or none if they never meet.
        rate = torch.where(rate.abs() < 1e-6, 1e-6, rate)
        a, b = (-half - place) / rate, (half - place) / rate
        first = torch.maximum(first, torch.minimum(a, b))
        last = torch.minimum(last, torch.maximum(a, b))
    return torch.where(others.valid, first, math.inf), torch.where(others.valid, last, -math.inf)


def ttc_violation(frame: DrivingFrame) -> Tensor:
    """Whether the ego would touch any actor 0.1, 0.3, 0.5, 0.7 or 0.9 s from now, (B,) bool.

    Not below 0.1 m/s, and not where there are neither vehicles nor people.
    """
    if not len(frame.others.x):
        return torch.zeros_like(frame.speed, dtype=torch.bool)
    first, last = _contact(frame)
    touching = torch.zeros_like(first, dtype=torch.bool)
    for time in TTC_TIMES:
        touching = touching | ((first <= time) & (time <= last))
    moving_kinds = (frame.others.valid & (frame.others.kind < 2)).any(0)
    return touching.any(0) & (frame.speed >= 0.1) & moving_kinds


def time_to_collision(frame: DrivingFrame, horizon: float = 3.0) -> Tensor:
    """nuPlan's time to collision (s), (B,): inf for none within the horizon, on its grid of 0.1 s.

    Of what lies within 30 degrees of straight ahead; in junctions and across lanes also of what is not behind
    (150 degrees). Not for an ego that stands (5e-3 m/s).
    """
    if not len(frame.others.x):
        return torch.full_like(frame.speed, math.inf)
    first, last = _contact(frame)
    others = frame.others
    bearing = wrap_angle(torch.atan2(others.y - frame.y, others.x - frame.x) - frame.heading).abs()
    relevant = (bearing < math.radians(30)) | (frame.multiple_lanes & (bearing < math.radians(150)))
    time = (first.clamp(min=0.0) * 10.0 - 1e-4).ceil() / 10.0
    meets = relevant & (time <= last + 1e-4) & (time <= horizon)
    least = torch.where(meets, time, math.inf).amin(0)
    return torch.where(frame.speed > 5e-3, least, math.inf)


def _pushed(frame: DrivingFrame, state: State) -> State:
    return push(state, frame.acceleration_lon, frame.acceleration_lat, frame.heading)


def _hardest(frame: DrivingFrame, blocked: float) -> Tensor:
    """What ends CaRL's drives in CARLA (table 2.4): collision, red light, stop sign, off the road, lost, blocked."""
    return (
        frame.collided
        | frame.ran_red_light
        | frame.ran_stop_sign
        | (frame.off_road_share > 0.95)
        | frame.deviated
        | (frame.standing >= blocked)
    )


def _value_measurements(
    frame: DrivingFrame, blocked: float, ttc: Tensor | None = None, comfort: Tensor | None = None
) -> Tensor:
    zero = torch.zeros_like(frame.speed)
    remaining = (1.0 - frame.completion / 100.0) * frame.route_length / 100.0
    flags = [zero] * 6 if comfort is None else list(comfort)
    return torch.stack([
        (frame.time_limit - frame.time) / 1200.0, (blocked - frame.standing) / blocked, remaining,
        zero if ttc is None else ttc, *flags,
    ])  # fmt: skip


# --- CaRL, CARLA ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CarlReward:
    """CaRL in CARLA, release 1.0. `carl_v11` is the later one."""

    ttc_penalty_ticks: int = 500
    """Steps for which a violation halves the reward; the C++ trainer's default is 100."""
    comfort_penalty_ticks: int = 500
    comfort_limits: ComfortLimits = CARLA_LIMITS
    lane_free: float = 0.0
    """m from the centre of the lane that cost nothing."""
    lane_strength: float = 1.0
    lane_patience: int | None = None
    """With a number: steps beyond half a metre after which the reward is halved, instead of `lane_strength`."""
    penalty: float = 1.0
    """What a collision or a red light costs."""
    blocked: float = 90.0
    """s of standing after which the drive is over."""

    def initial(self, batch: int, device: torch.device | str) -> State:
        zero = torch.zeros(batch, device=device)
        return {
            **start(batch, device),
            "ttc": zero,
            "comfort": torch.zeros(6, batch, device=device),
            "astray": zero.clone(),
        }

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        history = _pushed(frame, state)
        ttc = torch.where(
            ttc_violation(frame), float(self.ttc_penalty_ticks), (state["ttc"] - 1.0).clamp(min=0.0)
        )
        comfort = torch.where(
            comfort_violations(history, self.comfort_limits),
            float(self.comfort_penalty_ticks),
            (state["comfort"] - 1.0).clamp(min=0.0),
        )
        astray = torch.where(
            frame.lane_offset > 0.5, state["astray"] + 1.0, (state["astray"] - 1.0).clamp(min=0.0)
        )
        if self.lane_patience is None:
            lane = lane_factor(
                frame.lane_offset, frame.lane_width, frame.in_junction, self.lane_free, self.lane_strength
            )
        else:
            lane = switch(astray > self.lane_patience, 0.5 * torch.ones_like(astray), 1.0)
        parts = {
            "speed": speed_factor(frame.speed, frame.speed_limit),
            "ttc": torch.where(ttc > 0, 0.5, 1.0),
            "comfort": 1.0 - 0.5 * (comfort > 0).sum(0) / 6.0,
            "lane": lane,
        }
        base = switch(frame.outside_lanes, torch.zeros_like(frame.progress), frame.progress)
        reward = multiply(base, *parts.values(), check=False)
        hard = _hardest(frame, self.blocked)
        penalty = -self.penalty * (frame.collided | frame.ran_red_light).float()
        reward, _ = terminate(reward[:, None], hard[:, None], penalty=penalty[:, None])
        state = {**history, "ttc": ttc, "comfort": comfort, "astray": astray}
        return RewardStep(reward[:, 0], hard, state, {"progress": base, **parts})

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        ticks = max(self.ttc_penalty_ticks, 1), max(self.comfort_penalty_ticks, 1)
        return _value_measurements(frame, self.blocked, state["ttc"] / ticks[0], state["comfort"] / ticks[1])


def carl_v11() -> CarlReward:
    """CaRL's later reward: nuPlan's limits of comfort, and lane changes that are free for 3 s."""
    return CarlReward(comfort_limits=NUPLAN_LIMITS, lane_patience=30)


# --- CaRL, nuPlan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NuPlanReward:
    """CaRL in nuPlan; a collision or any corner off the road ends the drive, whose last progress is lost.

    "regular": 100 dRC times the soft penalties (RC in [0, 1]). "survival" mixes in a share for every step.
    "weighted" is the accumulation named nuplan: nuPlan's own weights of progress, time to collision, speed and
    comfort, each share paid out over `steps` steps. Which of them was published is unknown.
    """

    accumulation: str = "regular"
    survival: float = 0.6
    steps: int = 150
    """Of a scenario, 15 s."""
    red_light: bool = False
    """Whether a red light ends the drive (off in the published configuration)."""

    def initial(self, batch: int, device: torch.device | str) -> State:
        return {
            **start(batch, device),
            "ttc": torch.zeros(batch, device=device),
            "comfort": torch.zeros(6, batch, device=device),
        }

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        history = _pushed(frame, state)
        # Both stay violated to the end of the drive.
        ttc = torch.maximum(state["ttc"], ttc_violation(frame).float())
        comfort = torch.maximum(state["comfort"], comfort_violations(history, NUPLAN_LIMITS, 4).float())
        score = self.scores(
            frame.progress / 100.0,
            lane=self.lane(frame.lane_offset, frame.lane_width, frame.in_junction),
            speed=speed_factor(frame.speed, frame.speed_limit),
            route=torch.where(frame.outside_lanes, 0.0, 1.0),
            comfort=1.0 - comfort.sum(0) / 6.0,
            ttc=1.0 - 0.5 * ttc,
        )
        hard = frame.collided | (frame.off_road_depth > 0)
        if self.red_light:
            hard = hard | frame.ran_red_light
        reward, _ = terminate(score[:, None], hard[:, None], keep_last=False)
        return RewardStep(reward[:, 0], hard, {**history, "ttc": ttc, "comfort": comfort}, {"score": score})

    def scores(
        self, progress: Tensor, *, lane: Tensor, speed: Tensor, route: Tensor, comfort: Tensor, ttc: Tensor
    ) -> Tensor:
        """Reward of a step that ends nothing; progress as a share of the route, the others in [0, 1]."""
        if self.accumulation == "weighted":
            paid = 5 * (ttc == 1) + 4 * speed + 2 * (comfort == 1)
            return 100.0 * multiply((5 * progress + paid / self.steps) / 16.0, route, lane, check=False)
        gated = multiply(progress, lane, speed, route, comfort, ttc, check=False)
        if self.accumulation == "survival":
            gated = (1 - self.survival) * gated + self.survival / self.steps
        return 100.0 * gated

    @staticmethod
    def lane(offset: Tensor, width: Tensor, in_junction: Tensor) -> Tensor:
        """1 - n / 2 on lanes, n = clip((d - 0.5) / (d + border - 0.5), 0, 1) with the nearer border's distance."""
        border = (0.5 * width - offset).abs()
        share = ((offset - 0.5) / (offset + border - 0.5 + 1e-6)).clamp(0.0, 1.0)
        return torch.where(in_junction, 1.0, 1.0 - 0.5 * torch.where(offset > 0.5, share, 0.0))

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        return _value_measurements(frame, 90.0, state["ttc"], state["comfort"])


def nuplan_weighted() -> NuPlanReward:
    """`NuPlanReward` with nuPlan's weights."""
    return NuPlanReward("weighted")


# --- those it is compared with ---------------------------------------------------------------------------------------


def desired_speed(distance: Tensor, offset: float, top: float = 6.0) -> Tensor:
    """Roach's speed before a hazard: top * clip(max(0, distance - offset), 0, 5) / 5."""
    return top * (distance - offset).clamp(0.0, 5.0) / 5.0


@dataclass(frozen=True)
class RoachReward:
    """The shaped sum of Roach (Zhang et al. 2021), which CaRL's reward is compared with.

        r = 1 - |v - v_des| / 6 - d / 2 - |angle| - 0.1 [steering moved by more than 0.01] + terminal

    v_des is 6 m/s, less before vehicles, people, lights and stop signs. A car that stands where v_des is 0 gets
    as much as one that drives where it is free: waiting beside a hazard is a local optimum.

    Distances to vehicles and people are between centres, those to lights and signs from the ego's centre to the
    line. The exploration loss of Roach is the learner's, and not here.
    """

    top_speed: float = 6.0
    blocked: float = 90.0

    def initial(self, batch: int, device: torch.device | str) -> State:
        zero = torch.zeros(batch, device=device)
        return {**start(batch, device), "offset": zero, "allowed": zero + 3.5}

    def hazard_speed(self, frame: DrivingFrame) -> Tensor:
        """v_des, (B,)."""
        top = torch.full_like(frame.speed, self.top_speed)
        line = torch.minimum(
            torch.where(frame.light >= LightState.YELLOW, frame.light_distance, NO_LIGHT), frame.stop_distance
        )
        to_line = line + 0.5 * frame.length
        speed = torch.where(to_line < 18.0, desired_speed(to_line.clamp(min=0.0), 5.0, self.top_speed), top)
        others = frame.others
        if not len(others.x):
            return speed
        dx, dy = others.x - frame.x, others.y - frame.y
        distance = (dx * dx + dy * dy).sqrt()
        bearing = wrap_angle(torch.atan2(dy, dx) - frame.heading).abs()
        facing = wrap_angle(others.heading - frame.heading).abs() <= math.radians(150)
        vehicle = others.valid & (others.kind != 1) & facing & (distance <= 9.5) & (bearing < math.pi / 4)
        cone = torch.deg2rad(162.0 / (distance.clamp(1.5, 10.5) + 0.3))
        person = others.valid & (others.kind == 1) & (distance <= 9.5) & (bearing < cone)
        for hazard, offset in ((vehicle, 8.0), (person, 6.0)):
            nearest = torch.where(hazard, distance, 1e3).amin(0)
            speed = torch.minimum(speed, desired_speed(nearest, offset, self.top_speed))
        return speed

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        history = _pushed(frame, state)
        v_des = self.hazard_speed(frame)
        # A route that jumps aside widens what is allowed, or a lane change of the planner would end the drive.
        jumped = (frame.route_offset - state["offset"]) > 0.8
        allowed = torch.where(jumped, frame.route_offset + 0.5, state["offset"].clamp(min=3.5))
        crashed = frame.collided | frame.ran_red_light | frame.ran_stop_sign
        hard = crashed | (frame.standing >= self.blocked) | (frame.route_offset > allowed) | frame.deviated
        done = hard | frame.finished | (frame.time >= frame.time_limit)
        parts = {
            "speed": 1.0 - (frame.speed - v_des).abs() / self.top_speed,
            "position": -0.5 * frame.route_offset,
            "rotation": -frame.heading_error.abs(),
            "action": -0.1 * ((frame.steer - frame.last_steer).abs() > 0.01).float(),
            "terminal": -(hard & done).float() - torch.where(crashed, frame.speed.clamp(min=0.0), 0.0),
        }
        state = {**history, "offset": frame.route_offset, "allowed": allowed}
        return RewardStep(torch.stack(list(parts.values())).sum(0), hard, state, {**parts, "v_des": v_des})

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        return _value_measurements(frame, self.blocked)


@dataclass(frozen=True)
class MetaDriveReward:
    """MetaDrive's: metres along the route, a tenth of the speed's share, +10 at the goal, -5 for failure."""

    top_speed: float = 80.0 / 3.6
    blocked: float = 90.0

    def initial(self, batch: int, device: torch.device | str) -> State:
        return start(batch, device)

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        hard = _hardest(frame, self.blocked)
        parts = {
            "driving": frame.advance,
            "speed": 0.1 * frame.speed / self.top_speed,
            "terminal": torch.where(hard, -5.0, torch.where(frame.finished, 10.0, 0.0)),
        }
        return RewardStep(torch.stack(list(parts.values())).sum(0), hard, _pushed(frame, state), parts)

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        return _value_measurements(frame, self.blocked)


@dataclass(frozen=True)
class SparseScoreReward:
    """The driving score (leaderboard 2.0) over 100 at the end of the drive, and nothing before."""

    blocked: float = 90.0
    score: Any = field(default=None, repr=False)

    def initial(self, batch: int, device: torch.device | str) -> State:
        from saferl.envs.driving.score import DrivingScore

        return {**start(batch, device), **DrivingScore().initial(batch, device)}

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        from saferl.envs.driving.score import DrivingScore

        judge = DrivingScore()
        hard = _hardest(frame, self.blocked)
        history = _pushed(frame, state)
        score = judge.update(frame, {k: v for k, v in state.items() if k not in history})
        over = hard | frame.finished | (frame.time >= frame.time_limit)
        final = judge.driving_score(score) / 100.0
        return RewardStep(torch.where(over, final, 0.0), hard, {**score, **history}, {"score": final})

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        return _value_measurements(frame, self.blocked)


REWARDS: dict[str, Any] = {
    "carl": CarlReward,
    "carl-1.1": carl_v11,
    "carl-nuplan": NuPlanReward,
    "nuplan-weighted": nuplan_weighted,
    "roach": RoachReward,
    "metadrive": MetaDriveReward,
    "driving-score": SparseScoreReward,
}
"""Makers of rewards, by name."""

COSTS = (
    "collision", "red_light", "stop_sign", "off_road", "outside_lanes", "overspeed", "ttc", "comfort",
)  # fmt: skip
"""Costs of a step; the first four are what "cost" counts."""


def costs(frame: DrivingFrame, state: State) -> dict[str, Tensor]:
    """The costs of a step by name, (B,) each; `state` is that of any reward after the step.

    1 for a collision, a red light or a stop sign that was run, more than 95 % of the box off the road, being outside
    the lanes, and less than 0.95 s to a collision; m/s above the limit; and the share of the six tests of comfort
    (nuPlan's limits) that fail.
    """
    comfort = comfort_violations(state, NUPLAN_LIMITS).float().mean(0)
    return {
        "collision": frame.collided.float(),
        "red_light": frame.ran_red_light.float(),
        "stop_sign": frame.ran_stop_sign.float(),
        "off_road": (frame.off_road_share > 0.95).float(),
        "outside_lanes": frame.outside_lanes.float(),
        "overspeed": (frame.speed - frame.speed_limit).clamp(min=0.0),
        "ttc": (time_to_collision(frame) < 0.95).float(),
        "comfort": comfort,
    }
