"""Rewards of driving: CaRL's route completion behind gates, and those it is compared with.

A reward is called with the frame after a step and its own state, and says the reward, what ends the drive as
a failure, its state, and its parts. The end of the route and of the time are the world's to call. All states
hold the history of comfort, so that `costs` can be read beside any reward. Tensors are (B,), the batch last
where there is more.

CaRL (Jaeger et al. 2025, arXiv 2504.17838; equations from the published code), per step:

    r = dRC [not outside the lanes] p_speed p_ttc p_comfort p_lane  -  [collision or red light]

with RC the route completion in percent. dRC is multiplied by soft penalties in [0, 1]
(`saferl.gates.multiply`) and hard infractions end the drive (`saferl.gates.terminate`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saferl.envs.driving.comfort import (
    CARLA_LIMITS,
    LEAST_NUPLAN,
    NUPLAN_LIMITS,
    ComfortLimits,
    History,
    push,
    violations,
)
from saferl.envs.driving.frame import NO_LIGHT, DrivingFrame, LightState
from saferl.envs.driving.score import CarlaScore, time_to_collision, ttc_violation
from saferl.errors import unknown_name
from saferl.gates import multiply, switch, terminate

__all__ = [
    "COSTS",
    "REWARDS",
    "CarlReward",
    "CompletionReward",
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


# --- parts that several share ------------------------------------------------------------------------------


def speed_factor(speed: Tensor, limit: Tensor) -> Tensor:
    """max(0, 1 - (v - limit) / 2.23 m/s) above the limit, else 1."""
    return (1.0 - (speed - limit) / _OVERSPEED).clamp(0.0, 1.0)


def lane_factor(
    offset: Tensor, width: Tensor, in_junction: Tensor, free: float = 0.0, strength: float = 1.0
) -> Tensor:
    """1 - strength clip((d - free) / (width / 2 - free), 0, 1); 1 in junctions."""
    share = ((offset - free) / (0.5 * width - free).clamp(min=1e-6)).clamp(0.0, 1.0)
    return torch.where(in_junction, 1.0, 1.0 - strength * share)


def _pushed(frame: DrivingFrame, state: State) -> State:
    history = push(History.of(state), frame.acceleration_lon, frame.acceleration_lat, frame.heading)
    return history.named()


def _hardest(frame: DrivingFrame, blocked: float) -> Tensor:
    """What ends CaRL's drives in CARLA: a collision, a red light, a stop sign, 95 % of the box off the road,
    being lost or blocked."""
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


# --- CaRL, CARLA -------------------------------------------------------------------------------------------


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
    """With a number: steps beyond half a metre after which the reward is halved, instead of the factor above.
    Steps nearer to the centre are taken off again. Whether junctions are exempt is unverified; here they are
    not."""
    penalty: float = 1.0
    """What a collision or a red light costs."""
    blocked: float = 90.0
    """s of standing after which the drive is over."""

    def initial(self, batch: int, device: torch.device | str) -> State:
        zero = torch.zeros(batch, device=device)
        return {
            **History.initial(batch, device).named(),
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
            violations(History.of(history), self.comfort_limits),
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


ACCUMULATIONS = ("regular", "survival", "weighted")


# --- CaRL, nuPlan ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NuPlanReward:
    """CaRL in nuPlan; a collision or any corner off the road ends the drive, whose last progress is lost.

    "regular": 100 dRC times the soft penalties (RC in [0, 1]). "survival" mixes in a share for every step.
    "weighted" is the accumulation named nuplan: nuPlan's own weights of progress, time to collision, speed
    and comfort, each share paid out over `steps` steps. Which of them was published is unknown.

    The share of comfort counts the tests that held at every step so far, each judged at its newest sample;
    that CaRL's filter does the same is unverified. Progress off the route's lanes is lost (`outside_lanes`;
    the source exempts where its human driver was off them too).
    """

    accumulation: str = "regular"
    survival: float = 0.2
    """Share of the reward for being there (the published yaml's; the code defaults to 0.6)."""
    steps: int = 150
    """Of a scenario, 15 s."""
    red_light: bool = False
    """Whether a red light ends the drive (off in the published configuration)."""
    at_fault: bool = False
    """Whether only collisions by the ego's fault end the drive."""
    ttc_first: float = 0.2
    """s ahead of the first of five looks, 0.2 s apart: the code says 0.1 and looks at 0.2, 0.4, ... 1.0."""

    def __post_init__(self) -> None:
        if self.accumulation not in ACCUMULATIONS:
            raise unknown_name("accumulation", self.accumulation, ACCUMULATIONS)

    def initial(self, batch: int, device: torch.device | str) -> State:
        return {
            **History.initial(batch, device).named(),
            "ttc": torch.zeros(batch, device=device),
            "comfort": torch.zeros(6, batch, device=device),
        }

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        history = _pushed(frame, state)
        # Both stay violated to the end of the drive.
        soon = ttc_violation(frame, first=self.ttc_first, stopped=5e-3)
        ttc = torch.maximum(state["ttc"], soon.float())
        failed = violations(History.of(history), NUPLAN_LIMITS, LEAST_NUPLAN)
        comfort = torch.maximum(state["comfort"], failed.float())
        score = self.scores(
            frame.progress / 100.0,
            lane=self.lane(frame.lane_offset, frame.lane_width, frame.in_junction),
            speed=speed_factor(frame.speed, frame.speed_limit),
            route=torch.where(frame.outside_lanes, 0.0, 1.0),
            comfort=1.0 - comfort.sum(0) / 6.0,
            ttc=1.0 - 0.5 * ttc,
        )
        hard = (frame.at_fault if self.at_fault else frame.collided) | (frame.off_road_depth > 0)
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
            paid_out: Tensor = multiply((5 * progress + paid / self.steps) / 16.0, route, lane, check=False)
            return 100.0 * paid_out
        gated: Tensor = multiply(progress, lane, speed, route, comfort, ttc, check=False)
        if self.accumulation == "survival":
            gated = (1 - self.survival) * gated + self.survival / self.steps
        return 100.0 * gated

    @staticmethod
    def lane(offset: Tensor, width: Tensor, in_junction: Tensor) -> Tensor:
        """1 - n / 2 on lanes with n = clip((d - 0.5) / (d + distance of the nearer border - 0.5), 0, 1).

        Beyond the border, where the source would look at another lane, it stays at 1 / 2.
        """
        # Between the borders the two distances sum to half the width.
        share = ((offset - 0.5) / (0.5 * width - 0.5).clamp(min=1e-6)).clamp(0.0, 1.0)
        return torch.where(in_junction, 1.0, 1.0 - 0.5 * share)

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        return _value_measurements(frame, 90.0, state["ttc"], state["comfort"])


def nuplan_weighted() -> NuPlanReward:
    """`NuPlanReward` with nuPlan's weights."""
    return NuPlanReward("weighted")


# --- those it is compared with -----------------------------------------------------------------------------


def desired_speed(distance: Tensor, offset: float, top: float = 6.0) -> Tensor:
    """Roach's speed before a hazard: top * clip(max(0, distance - offset), 0, 5) / 5."""
    return top * (distance - offset).clamp(0.0, 5.0) / 5.0


@dataclass(frozen=True)
class RoachReward:
    """The shaped sum of Roach (Zhang et al. 2021), which CaRL's reward is compared with.

        r = 1 - |v - v_des| / 6 - d / 2 - |angle| - 0.1 [steering moved by more than 0.01] + terminal

    v_des is 6 m/s, less before vehicles, people, lights and stop signs. A car that stands where v_des is 0
    gets as much as one that drives where it is free: waiting beside a hazard is a local optimum.

    Distances to vehicles and people are between centres, those to lights and signs from the ego's centre to
    the line. Of the hazards of a kind the nearest counts (Roach's: the first in its list). A frame does not
    say who is on a pavement; all people count. Being over a person's pixels, which Roach tests in its
    picture, is a collision here. The exploration loss of Roach is the learner's, and not here.
    """

    top_speed: float = 6.0
    reach: float = 9.5
    """m within which vehicles and people are hazards."""
    blocked: float = 90.0

    def initial(self, batch: int, device: torch.device | str) -> State:
        zero = torch.zeros(batch, device=device)
        return {**History.initial(batch, device).named(), "offset": zero}

    def hazard_speed(self, frame: DrivingFrame) -> Tensor:
        """v_des, (B,)."""
        # A light counts up to 18 m ahead of a point 0.8 half lengths behind the centre, until that passes it.
        behind = frame.light_distance + 0.9 * frame.length
        lit = (frame.light >= LightState.YELLOW) & (behind >= 0) & (behind <= 18.0)
        half = 0.5 * frame.length
        light = torch.where(lit, (frame.light_distance + half).abs(), NO_LIGHT)
        line = torch.minimum(light, (frame.stop_distance + half).abs())
        speed = desired_speed(line, 5.0, self.top_speed)
        others = frame.others
        if others.x.shape[0] == 0:
            return speed
        cos, sin = frame.heading.cos(), frame.heading.sin()
        dx, dy = others.x - frame.x, others.y - frame.y
        forward, left = dx * cos + dy * sin, dy * cos - dx * sin
        distance = torch.hypot(forward, left)
        near = others.valid & (distance <= self.reach)
        facing = (others.heading - frame.heading).cos() >= math.cos(math.radians(150))
        vehicle = near & (others.kind == 0) & facing & (forward > left.abs())
        cone = torch.deg2rad(162.0 / (distance.clamp(1.5, 10.5) + 0.3))
        person = near & (others.kind == 1) & (forward > distance * cone.cos())
        for hazard, offset in ((vehicle, 8.0), (person, 6.0)):
            nearest = torch.where(hazard, distance, NO_LIGHT).amin(0)
            speed = torch.minimum(speed, desired_speed(nearest, offset, self.top_speed))
        return speed

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        history = _pushed(frame, state)
        v_des = self.hazard_speed(frame)
        # A route that jumps aside widens what is allowed, or a planner's change of lanes would end the drive.
        jumped = (frame.route_offset - state["offset"]) > 0.8
        allowed = torch.where(jumped, frame.route_offset + 0.5, state["offset"].clamp(min=3.5))
        crashed = frame.collided | frame.ran_red_light | frame.ran_stop_sign
        lost = (frame.route_offset > allowed + 0.01) | frame.deviated
        hard = crashed | lost | (frame.standing >= self.blocked)
        parts = {
            "speed": 1.0 - (frame.speed - v_des).abs() / self.top_speed,
            "position": -0.5 * frame.route_offset,
            "rotation": -frame.heading_error.abs(),
            "action": -0.1 * ((frame.steer - frame.last_steer).abs() > 0.01).float(),
            "terminal": -hard.float() - torch.where(crashed, frame.speed.abs(), 0.0),
        }
        state = {**history, "offset": frame.route_offset}
        return RewardStep(torch.stack(list(parts.values())).sum(0), hard, state, {**parts, "v_des": v_des})

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        return _value_measurements(frame, self.blocked)


@dataclass(frozen=True)
class MetaDriveReward:
    """MetaDrive's: metres along the route and a tenth of the speed's share; in their place +10 at the goal,
    -5 for a failure.

    A collision and leaving the lanes, or those of one's direction, are failures; signs and lights are not.
    """

    top_speed: float = 80.0 / 3.6
    blocked: float = 90.0
    """s of standing, for the critic alone: no drive ends for it."""

    def initial(self, batch: int, device: torch.device | str) -> State:
        return History.initial(batch, device).named()

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        hard = frame.collided | frame.outside_lanes | frame.deviated
        moving = frame.advance + 0.1 * frame.speed / self.top_speed
        # The goal comes first: who reaches it in a collision has reached it.
        ended = torch.where(frame.finished, 10.0, -5.0)
        reward = switch(hard | frame.finished, ended, moving)
        return RewardStep(reward, hard, _pushed(frame, state), {"moving": moving})

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        return _value_measurements(frame, self.blocked)


@dataclass(frozen=True)
class SparseScoreReward:
    """The driving score (leaderboard 2.0) over 100 at the end of the drive, and nothing before.

    What ends CaRL's drives ends these, as in all training here; the leaderboard itself goes on after a
    collision. The end by time is seen in the frame: a world that cuts drives elsewhere leaves them unscored.
    """

    blocked: float = 90.0

    def initial(self, batch: int, device: torch.device | str) -> State:
        return {**History.initial(batch, device).named(), **CarlaScore().initial(batch, device)}

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        judge = CarlaScore()
        hard = _hardest(frame, self.blocked)
        score = judge.update(frame, state)
        over = hard | frame.finished | (frame.time >= frame.time_limit)
        final = judge.driving_score(score) / 100.0
        return RewardStep(
            torch.where(over, final, 0.0), hard, {**score, **_pushed(frame, state)}, {"score": final}
        )

    def value_measurements(self, frame: DrivingFrame, state: State) -> Tensor:
        return _value_measurements(frame, self.blocked)


@dataclass(frozen=True)
class CompletionReward:
    """Route completion (percent) and nothing else: what a learner with limits on its costs is given.

    No infraction takes anything away or ends the drive; being lost or blocked does. Ours. Worlds in the mode
    "eval" let drives go on after infractions.
    """

    blocked: float = 90.0

    def initial(self, batch: int, device: torch.device | str) -> State:
        return History.initial(batch, device).named()

    def __call__(self, frame: DrivingFrame, state: State) -> RewardStep:
        over = frame.deviated | (frame.standing >= self.blocked)
        return RewardStep(frame.progress, over, _pushed(frame, state), {})

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
    "completion": CompletionReward,
}
"""Makers of rewards, by name."""

COSTS = (
    "collision", "red_light", "stop_sign", "off_road", "outside_lanes", "overspeed", "ttc", "comfort",
)  # fmt: skip
"""Costs of a step; the first four are what "cost" counts."""


def costs(frame: DrivingFrame, state: State, ttc: Tensor | None = None) -> dict[str, Tensor]:
    """The costs of a step by name, (B,) each; `state` is that of any reward after the step, `ttc` is
    `time_to_collision(frame)`, for who has it.

    1 for a collision, a red light or a stop sign that was run, more than 95 % of the box off the road, being
    outside the lanes, and less than 0.95 s to a collision; m/s above the limit; and the share of the six
    tests of comfort (nuPlan's limits) that the newest sample fails.
    """
    comfort = violations(History.of(state), NUPLAN_LIMITS).float().mean(0)
    return {
        "collision": frame.collided.float(),
        "red_light": frame.ran_red_light.float(),
        "stop_sign": frame.ran_stop_sign.float(),
        "off_road": (frame.off_road_share > 0.95).float(),
        "outside_lanes": frame.outside_lanes.float(),
        "overspeed": (frame.speed - frame.speed_limit).clamp(min=0.0),
        "ttc": ((time_to_collision(frame) if ttc is None else ttc) < 0.95).float(),
        "comfort": comfort,
    }
