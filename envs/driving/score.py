"""Scores of drives: CARLA's driving score, leaderboard 2.0 and 2.1, and nuPlan's closed-loop score.

Formulas are those of carla-simulator/leaderboard, scenario_runner and nuplan-devkit. Two things are the world's: the
speed of the background, and nuPlan's expert, for which the distance at the speed limit stands, at most the route.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saferl.envs.driving.comfort import NUPLAN_LIMITS, comfort_violations, push, start
from saferl.envs.driving.frame import DrivingFrame
from saferl.envs.driving.reward import time_to_collision
from saferl.errors import UsageError

__all__ = [
    "COEFFICIENTS_20",
    "COEFFICIENTS_21",
    "DrivingScore",
    "closed_loop_score",
    "driving_score_20",
    "driving_score_21",
    "summarise",
]

State = dict[str, Tensor]

COUNTED = ("pedestrians", "vehicles", "statics", "red_lights", "stop_signs", "scenario_timeouts", "yields")
"""Infractions that are counted, in the order of the coefficients."""
COEFFICIENTS_20 = (0.50, 0.60, 0.65, 0.70, 0.80, 0.70, 0.70)
"""Factors of the penalty in leaderboard 2.0, which also scores longest6 v2."""
COEFFICIENTS_21 = (1.0, 0.7, 0.6, 0.4, 0.25, 0.4, 0.4)
"""Terms of the denominator in leaderboard 2.1."""
_CHECKPOINTS = 4
_DT = 0.1


def driving_score_20(
    completion: Tensor, counts: Tensor, wrong_share: Tensor, speeds: Tensor
) -> tuple[Tensor, Tensor]:
    """Leaderboard 2.0: penalties multiply.

    Args:
        completion: route completion in percent (...).
        counts: (7, ...) of `COUNTED`.
        wrong_share: share of the distance outside the lanes, in [0, 1].
        speeds: (4, ...) mean speed in percent of the background's between checkpoints; 100 where unknown.

    Returns:
        score and penalty P: DS = max(RC P, 0).
    """
    factors = torch.tensor(COEFFICIENTS_20, dtype=completion.dtype, device=completion.device)
    factors = factors.reshape(-1, *[1] * completion.dim())
    penalty = (factors**counts).prod(0) * (1 - wrong_share)
    penalty = penalty * (1 - 0.3 * (1 - speeds.clamp(max=100.0) / 100.0)).prod(0)
    return (completion * penalty).clamp(min=0.0), penalty


def driving_score_21(
    completion: Tensor, counts: Tensor, wrong_share: Tensor, speeds: Tensor
) -> tuple[Tensor, Tensor]:
    """Leaderboard 2.1, whose penalty falls hyperbolically; arguments as for `driving_score_20`."""
    terms = torch.tensor(COEFFICIENTS_21, dtype=completion.dtype, device=completion.device)
    terms = terms.reshape(-1, *[1] * completion.dim())
    slow = 0.4 * (1 - speeds.clamp(max=100.0) / 100.0)
    penalty = (1 - wrong_share) / (1 + (terms * counts).sum(0) + slow.sum(0))
    return (completion * penalty).clamp(min=0.0), penalty


def closed_loop_score(
    *,
    progress: Tensor,
    ttc: Tensor,
    speed: Tensor,
    comfort: Tensor,
    no_at_fault: Tensor,
    drivable: Tensor,
    making_progress: Tensor,
    direction: Tensor,
) -> Tensor:
    """nuPlan's score in [0, 1]: the four last multiply (5 progress + 5 ttc + 4 speed + 2 comfort) / 16."""
    gate = no_at_fault * drivable * making_progress * direction
    return gate * (5 * progress + 5 * ttc + 4 * speed + 2 * comfort) / 16


class DrivingScore:
    """Accumulates frames of drives; states are dictionaries of tensors with the batch last."""

    def initial(self, batch: int, device: torch.device | str) -> State:
        """State before the first step."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, batch, device=device)

        comfort = {f"score_{name}": value for name, value in start(batch, device).items()}
        return {
            **comfort, "counts": zeros(len(COUNTED)), "outside": zeros(), "driven": zeros(), "ego": zeros(4),
            "background": zeros(4), "samples": zeros(4), "completion": zeros(), "route": zeros() + 1.0,
            "collisions": zeros(3), "uncomfortable": zeros(), "least_ttc": zeros() + 1e3, "over": zeros(),
            "time": zeros(), "expert": zeros(), "travelled": zeros(), "off": zeros() - 1e3,
            "recent": zeros(10), "worst_backward": zeros(),
        } | {"slot_samples": zeros(4)}  # fmt: skip

    def update(self, frame: DrivingFrame, state: State) -> State:
        """The state with a step more."""
        counts = state["counts"] + torch.stack([
            frame.hit_pedestrian, frame.hit_vehicle, frame.hit_static, frame.ran_red_light, frame.ran_stop_sign,
            torch.zeros_like(frame.finished), torch.zeros_like(frame.finished),
        ]).float()  # fmt: skip
        step = (frame.speed * _DT).clamp(min=0.0)
        known = ~frame.background_speed.isnan()
        quarter = (frame.completion / 25.0).long().clamp(max=_CHECKPOINTS - 1)
        slots = torch.arange(_CHECKPOINTS, device=quarter.device)[:, None]
        here = ((slots == quarter) & known).float()
        history = push(
            {"history": state["score_history"], "samples": state["score_samples"]},
            frame.acceleration_lon, frame.acceleration_lat, frame.heading,
        )  # fmt: skip
        failed = comfort_violations(history, NUPLAN_LIMITS).any(0).float()
        recent = torch.cat([state["recent"][1:], frame.advance[None]])
        fault = frame.at_fault
        blame = torch.stack([frame.hit_pedestrian & fault, frame.hit_vehicle & fault, frame.hit_static & fault])
        ttc = torch.where(fault, 0.0, time_to_collision(frame))
        return {
            "score_history": history["history"],
            "score_samples": history["samples"],
            "counts": counts,
            "outside": state["outside"] + torch.where(frame.outside_lanes, step, 0.0),
            "driven": state["driven"] + step,
            "ego": state["ego"] + here * frame.speed.clamp(min=0.0),
            "background": state["background"] + here * torch.where(known, frame.background_speed, 0.0),
            "samples": state["samples"] + here,
            "slot_samples": state["slot_samples"] + (slots == quarter).float(),
            "completion": frame.completion,
            "route": frame.route_length,
            "collisions": state["collisions"] + blame.float(),
            "uncomfortable": torch.maximum(state["uncomfortable"], failed),
            "least_ttc": torch.minimum(state["least_ttc"], ttc),
            "over": state["over"] + (frame.speed - frame.speed_limit).clamp(min=0.0) * _DT,
            "time": state["time"] + _DT,
            "expert": torch.minimum(state["expert"] + frame.speed_limit * _DT, frame.route_length),
            "travelled": state["travelled"] + frame.advance,
            "off": torch.maximum(state["off"], frame.off_road_depth),
            "recent": recent,
            "worst_backward": torch.minimum(state["worst_backward"], recent.sum(0)),
        }

    @staticmethod
    def _background(state: State) -> Tensor:
        """(4, B) the ego's mean speed in percent of the background's, for quarters that are behind the ego."""
        quarter = torch.arange(1, _CHECKPOINTS + 1, device=state["completion"].device)[:, None]
        passed = (state["completion"] >= 25.0 * quarter) & (state["samples"] > 0)
        ratio = 100.0 * state["ego"] / state["background"].clamp(min=1e-3)
        return torch.where(passed & (state["background"] > 1e-3), ratio.clamp(max=100.0), 100.0)

    def driving_score(self, state: State) -> Tensor:
        """Leaderboard 2.0's score of the drive so far, (B,)."""
        share = (state["outside"] / state["driven"].clamp(min=1e-3)).clamp(max=1.0)
        return driving_score_20(state["completion"], state["counts"], share, self._background(state))[0]

    def result(self, state: State) -> dict[str, Tensor]:
        """Scores and counts of the drive so far, (B,) each."""
        share = (state["outside"] / state["driven"].clamp(min=1e-3)).clamp(max=1.0)
        speeds = self._background(state)
        score, penalty = driving_score_20(state["completion"], state["counts"], share, speeds)
        later, _ = driving_score_21(state["completion"], state["counts"], share, speeds)
        people, vehicles, objects = state["collisions"]
        blame = (people == 0).float() * (vehicles == 0).float() * (1 - objects / 2.0).clamp(min=0.0)
        along = torch.maximum(state["completion"] * state["route"] / 100.0, torch.zeros_like(score))
        ratio = (along.clamp(min=2.0) / state["expert"].clamp(min=2.0)).clamp(max=1.0)
        progress = torch.where(state["travelled"] < -2.0, 0.0, ratio)
        backward = -state["worst_backward"]
        closed = closed_loop_score(
            progress=progress,
            ttc=(state["least_ttc"] > 0.95).float(),
            speed=(1 - state["over"] / (2.23 * state["time"]).clamp(min=1e-6)).clamp(0.0, 1.0),
            comfort=1 - state["uncomfortable"],
            no_at_fault=blame,
            drivable=(state["off"] < 0.3).float(),
            making_progress=(progress >= 0.2).float(),
            direction=torch.where(backward < 2.0, 1.0, torch.where(backward < 6.0, 0.5, 0.0)),
        )
        counts = {name: state["counts"][k] for k, name in enumerate(COUNTED[:5])}
        return {
            "route_completion": state["completion"],
            "penalty": penalty,
            "driving_score": score,
            "driving_score_21": later,
            "closed_loop_score": closed,
            "km": along / 1000.0,
            "outside_lanes_km": state["outside"] / 1000.0,
            **counts,
        }


def summarise(episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over drives, their deviations, and infractions a kilometre, as CARLA's leaderboard reports them.

    The driving score is the mean of products, which is not the product of the means. Deviations divide by n - 1 and
    are NaN for a single drive.

    Raises:
        UsageError: there is no drive.
    """
    if not episodes:
        raise UsageError("there are no drives to summarise.")
    report: dict[str, float] = {"episodes": float(len(episodes))}
    names = ("driving_score", "driving_score_21", "closed_loop_score", "route_completion", "penalty")
    for name in names:
        values = [float(e[name]) for e in episodes]
        mean = sum(values) / len(values)
        report[name] = mean
        spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else math.nan
        report[f"{name}_std"] = math.sqrt(spread) if spread == spread else math.nan
    kilometres = max(0.001, sum(float(e["km"]) for e in episodes))
    report["km"] = kilometres
    for name in COUNTED[:5]:
        report[f"{name}_per_km"] = sum(float(e[name]) for e in episodes) / kilometres
    report["outside_lanes_km"] = sum(float(e["outside_lanes_km"]) for e in episodes)
    return report
