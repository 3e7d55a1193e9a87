"""`DrivingFrame`: what rewards, costs and scores read of one moment of B drives.

The seam between worlds and judgement. RouteDriving, highway-env, CARLA and nuPlan each fill it, and the
rewards and scores in `saferl.envs.driving.reward` and `.score` read nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["KINDS", "NO_LIGHT", "Boxes", "DrivingFrame", "LightState"]

KINDS = ("vehicle", "pedestrian", "static")
"""What an actor is, by its number in `Boxes.kind`."""
NO_LIGHT = 1e3
"""Distance (m) to a light or a stop sign where there is none ahead."""


class LightState:
    """Numbers of `DrivingFrame.light`."""

    NONE, GREEN, YELLOW, RED = range(4)


@dataclass
class Boxes:
    """N oriented boxes in each of B worlds, every field (N, B); rows that are not valid may hold anything
    finite."""

    x: Tensor
    """Centre."""
    y: Tensor
    heading: Tensor
    speed: Tensor
    """Along the heading."""
    length: Tensor
    width: Tensor
    kind: Tensor
    """uint8, index into `KINDS`."""
    valid: Tensor
    """bool."""


@dataclass
class DrivingFrame:
    """State of B drives after a step, and what happened in it. Every field is (B,) unless said."""

    # --- the ego -----------------------------------------------------------------------------------------
    x: Tensor
    """Centre of the ego's box (not its rear axle)."""
    y: Tensor
    heading: Tensor
    speed: Tensor
    """Along the heading; negative backwards."""
    acceleration_lon: Tensor
    """m/s^2, of the centre, along the heading."""
    acceleration_lat: Tensor
    """m/s^2, to the left."""
    steer: Tensor
    """Last steering action, in [-1, 1]."""
    last_steer: Tensor
    """The one before."""
    length: Tensor
    width: Tensor

    # --- the road ----------------------------------------------------------------------------------------
    speed_limit: Tensor
    lane_offset: Tensor
    """Absolute distance from the centre line of the lane driven in."""
    lane_width: Tensor
    in_junction: Tensor
    """bool."""
    route_offset: Tensor
    """Absolute distance from the route."""
    heading_error: Tensor
    """Heading minus the route's, in [-pi, pi]."""
    outside_lanes: Tensor
    """bool: outside the lanes, or in one of the other direction (CARLA's OutsideRouteLanes)."""
    off_road_share: Tensor
    """Share of the box that is off road and shoulder, in [0, 1]."""
    off_road_depth: Tensor
    """How far the outermost corner is outside the drivable area; negative inside."""
    multiple_lanes: Tensor
    """bool: the box touches more than one lane, or a junction."""

    # --- the route ---------------------------------------------------------------------------------------
    completion: Tensor
    """Route completed, in percent."""
    progress: Tensor
    """Percent completed in this step, not negative."""
    advance: Tensor
    """Metres along the route in this step; negative backwards."""
    route_length: Tensor
    finished: Tensor
    """bool."""
    time: Tensor
    """Since the start of the episode."""
    time_limit: Tensor
    standing: Tensor
    """For how long the ego has been slower than 0.1 m/s."""
    deviated: Tensor
    """bool: too far from the route (more than 30 m, or more than 15 m on 30 % of it)."""

    # --- lights and signs --------------------------------------------------------------------------------
    light: Tensor
    """`LightState` of the next light on the route, uint8."""
    light_distance: Tensor
    """From the ego's front to its stop line; `NO_LIGHT` where there is none."""
    stop_distance: Tensor
    """From the ego's front to the line of the next stop sign not yet served; `NO_LIGHT` where there is
    none."""

    # --- what happened in this step, bool ----------------------------------------------------------------
    hit_pedestrian: Tensor
    """A collision that counts (8.2 of CARLA's criteria: not while standing, not the same actor again)."""
    hit_vehicle: Tensor
    hit_static: Tensor
    at_fault: Tensor
    """The collision was the ego's fault by nuPlan's classes."""
    ran_red_light: Tensor
    ran_stop_sign: Tensor

    # --- the others --------------------------------------------------------------------------------------
    others: Boxes
    """(N, B)."""
    background_speed: Tensor
    """Mean speed of the vehicles around, NaN where there is none."""

    @property
    def collided(self) -> Tensor:
        """Any collision that counts, bool."""
        return self.hit_pedestrian | self.hit_vehicle | self.hit_static

    @classmethod
    def free_road(cls, batch: int = 1, *, device: torch.device | str = "cpu") -> DrivingFrame:
        """An ego standing on the centre line of an empty road (width 3.5 m, limit 10 m/s, route of 1 km).

        For adapters and tests, which replace what they know.
        """

        def number(value: float) -> Tensor:
            return torch.full((batch,), value, device=device)

        defaults = {"length": 5.176, "width": 2.297, "speed_limit": 10.0, "lane_width": 3.5}
        defaults |= {"route_length": 1000.0, "time_limit": 1200.0, "off_road_depth": -0.5}
        defaults |= {"light_distance": NO_LIGHT, "stop_distance": NO_LIGHT, "background_speed": torch.nan}
        values = {f.name: number(defaults.get(f.name, 0.0)) for f in fields(cls)}
        for name in _FLAGS:
            values[name] = torch.zeros(batch, dtype=torch.bool, device=device)
        values["light"] = torch.zeros(batch, dtype=torch.uint8, device=device)
        empty = torch.zeros(0, batch, device=device)
        x, y, heading, speed, length, width = (empty.clone() for _ in range(6))
        boxes = Boxes(x, y, heading, speed, length, width, empty.to(torch.uint8), empty.bool())
        return cls(**{**values, "others": boxes})  # type: ignore[arg-type]


_FLAGS = (
    "in_junction",
    "outside_lanes",
    "multiple_lanes",
    "finished",
    "deviated",
    "hit_pedestrian",
    "hit_vehicle",
    "hit_static",
    "at_fault",
    "ran_red_light",
    "ran_stop_sign",
)
