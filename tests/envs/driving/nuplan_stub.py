"""A stand-in for nuPlan: the part of nuplan-devkit 1.2 that `saferl.envs.driving.nuplan` speaks.

A straight road along x with two lanes of 3.5 m (centres at y = 0 and 3.5): roadblock "in" (x 0 to 100), a
connector in an intersection (100 to 120), roadblock "out" (120 to 300). `install` puts the modules where
imports find them.
"""

from __future__ import annotations

import abc
import enum
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

WIDTH = 3.5


@dataclass
class Point2D:
    x: float
    y: float


@dataclass
class StateSE2:
    x: float
    y: float
    heading: float


@dataclass
class StateVector2D:
    x: float
    y: float


@dataclass
class TimePoint:
    time_us: int


class SemanticMapLayer(enum.IntEnum):
    LANE = 0
    INTERSECTION = 1
    DRIVABLE_AREA = 5
    LANE_CONNECTOR = 11
    ROADBLOCK = 17
    ROADBLOCK_CONNECTOR = 18


class TrafficLightStatusType(enum.IntEnum):
    GREEN, YELLOW, RED, UNKNOWN = range(4)


class TrackedObjectType(enum.Enum):
    VEHICLE, PEDESTRIAN, BICYCLE, TRAFFIC_CONE, BARRIER, CZONE_SIGN, GENERIC_OBJECT, EGO = range(8)


PACIFICA = SimpleNamespace(wheel_base=3.089, rear_axle_to_center=1.461, length=5.176, width=2.297)


class EgoState:
    """Everything of the rear axle moves with it; accelerations of the centre as nuPlan shifts them."""

    @classmethod
    def build_from_rear_axle(
        cls,
        rear_axle_pose: StateSE2,
        rear_axle_velocity_2d: StateVector2D,
        rear_axle_acceleration_2d: StateVector2D,
        tire_steering_angle: float,
        time_point: TimePoint,
        vehicle_parameters: Any,
        is_in_auto_mode: bool = True,
        angular_vel: float = 0.0,
        angular_accel: float = 0.0,
    ) -> EgoState:
        self = cls()
        reach = vehicle_parameters.rear_axle_to_center
        pose = rear_axle_pose
        self.rear_axle = pose
        self.center = StateSE2(
            pose.x + reach * math.cos(pose.heading), pose.y + reach * math.sin(pose.heading), pose.heading
        )
        box = SimpleNamespace(
            center=self.center, length=vehicle_parameters.length, width=vehicle_parameters.width
        )
        self.car_footprint = SimpleNamespace(oriented_box=box, vehicle_parameters=vehicle_parameters)
        v, a = rear_axle_velocity_2d, rear_axle_acceleration_2d
        push = reach * (angular_vel**2 + angular_accel)
        self.dynamic_car_state = SimpleNamespace(
            rear_axle_velocity_2d=v,
            rear_axle_acceleration_2d=a,
            center_velocity_2d=StateVector2D(v.x, v.y + reach * angular_vel),
            center_acceleration_2d=StateVector2D(a.x + push, a.y),
            angular_velocity=angular_vel,
        )
        self.tire_steering_angle, self.time_point = tire_steering_angle, time_point
        self.time_us = time_point.time_us
        return self


class InterpolatedTrajectory:
    def __init__(self, trajectory: Sequence[EgoState]) -> None:
        if len(trajectory) < 2:
            raise ValueError("a trajectory needs two states")
        self.states = list(trajectory)


class DetectionsTracks:
    def __init__(self, tracked_objects: Sequence[Any]) -> None:
        self.tracked_objects = list(tracked_objects)


class AbstractPlanner(abc.ABC):
    requires_scenario = False

    def __new__(cls, *args: Any, **kwargs: Any) -> AbstractPlanner:
        instance = super().__new__(cls)
        instance._compute_trajectory_runtimes = []  # type: ignore[attr-defined]
        return instance

    @abc.abstractmethod
    def name(self) -> str: ...

    @abc.abstractmethod
    def initialize(self, initialization: Any) -> None: ...

    @abc.abstractmethod
    def observation_type(self) -> Any: ...

    @abc.abstractmethod
    def compute_planner_trajectory(self, current_input: Any) -> Any: ...

    def compute_trajectory(self, current_input: Any) -> Any:
        return self.compute_planner_trajectory(current_input)


class _Straight:
    """A baseline path along x."""

    def __init__(self, start: float, end: float, y: float) -> None:
        self.start, self.end, self.y = start, end, y
        count = round(end - start)
        self.discrete_path = [StateSE2(start + i * (end - start) / count, y, 0.0) for i in range(count + 1)]

    def get_nearest_pose_from_position(self, point: Point2D) -> StateSE2:
        return StateSE2(min(max(point.x, self.start), self.end), self.y, 0.0)


class Lane:
    def __init__(self, name: str, start: float, end: float, y: float, limit: float | None) -> None:
        self.id, self.baseline_path, self.speed_limit_mps = name, _Straight(start, end, y), limit
        self.incoming_edges: list[Lane] = []
        self.outgoing_edges: list[Lane] = []

    def contains_point(self, point: Point2D) -> bool:
        path = self.baseline_path
        return path.start <= point.x < path.end and abs(point.y - path.y) <= 0.5 * WIDTH

    def get_width_left_right(self, point: Point2D, include_outside: bool = False) -> tuple[float, float]:
        aside = point.y - self.baseline_path.y
        return 0.5 * WIDTH - aside, 0.5 * WIDTH + aside


class LaneConnector(Lane):
    pass


class Roadblock:
    def __init__(self, name: str, lanes: list[Lane]) -> None:
        self.id, self.interior_edges = name, lanes

    def contains_point(self, point: Point2D) -> bool:
        return any(lane.contains_point(point) for lane in self.interior_edges)


class Map:
    """Both lanes lead on; only the right one (y = 0) leads through when `through` is False."""

    def __init__(self, *, through: bool = True) -> None:
        make: list[tuple[str, type[Lane], float, float, float | None]] = [
            ("in", Lane, 0.0, 100.0, 10.0),
            ("over", LaneConnector, 100.0, 120.0, None),
            ("out", Lane, 120.0, 300.0, 15.0),
        ]
        self.blocks = {}
        for name, kind, start, end, limit in make:
            lanes = [kind(f"{name}{i}", start, end, WIDTH * i, limit) for i in range(2)]
            self.blocks[name] = Roadblock(name, lanes)
        for first, then in (("in", "over"), ("over", "out")):
            pairs = zip(self.blocks[first].interior_edges, self.blocks[then].interior_edges, strict=True)
            for i, (a, b) in enumerate(pairs):
                if through or i == 0:
                    a.outgoing_edges.append(b)
                    b.incoming_edges.append(a)

    def get_map_object(self, name: str, layer: SemanticMapLayer) -> Any:
        wanted = SemanticMapLayer.ROADBLOCK_CONNECTOR if name == "over" else SemanticMapLayer.ROADBLOCK
        return self.blocks.get(name) if layer == wanted else None

    def get_all_map_objects(self, point: Point2D, layer: SemanticMapLayer) -> list[Any]:
        connecting = layer in (SemanticMapLayer.LANE_CONNECTOR, SemanticMapLayer.ROADBLOCK_CONNECTOR)
        blocks = [block for name, block in self.blocks.items() if (name == "over") == connecting]
        if layer in (SemanticMapLayer.ROADBLOCK, SemanticMapLayer.ROADBLOCK_CONNECTOR):
            return [block for block in blocks if block.contains_point(point)]
        return [lane for block in blocks for lane in block.interior_edges if lane.contains_point(point)]

    def is_in_layer(self, point: Point2D, layer: SemanticMapLayer) -> bool:
        assert layer == SemanticMapLayer.DRIVABLE_AREA
        return self.get_distance_to_nearest_map_object(point, layer)[1] <= 0

    def get_distance_to_nearest_map_object(
        self, point: Point2D, layer: SemanticMapLayer
    ) -> tuple[str, float]:
        return "area", max(-0.5 * WIDTH - point.y, point.y - 1.5 * WIDTH, 0.0)


def ego_at(x: float, y: float = 0.0, speed: float = 0.0, heading: float = 0.0, time_us: int = 0) -> EgoState:
    """An ego whose centre is at (x, y)."""
    reach = PACIFICA.rear_axle_to_center
    return EgoState.build_from_rear_axle(
        StateSE2(x - reach * math.cos(heading), y - reach * math.sin(heading), heading),
        StateVector2D(speed, 0.0),
        StateVector2D(0.0, 0.0),
        0.0,
        TimePoint(time_us),
        PACIFICA,
    )


def track(
    name: str, x: float, y: float, vx: float = 0.0, vy: float = 0.0, heading: float = 0.0, token: str = "a"
) -> Any:
    """A tracked object; velocities are nuPlan's, in the world."""
    sizes = {"VEHICLE": (4.6, 1.9), "EGO": (5.176, 2.297)}
    length, width = sizes.get(name, (0.6, 0.6))
    made = SimpleNamespace(
        tracked_object_type=TrackedObjectType[name],
        box=SimpleNamespace(center=StateSE2(x, y, heading), length=length, width=width),
        track_token=token,
    )
    if name in ("VEHICLE", "PEDESTRIAN", "BICYCLE", "EGO"):
        made.velocity = StateVector2D(vx, vy)
    return made


def planner_input(ego: EgoState, tracks: Sequence[Any] = (), lights: dict[str, str] | None = None) -> Any:
    """A `PlannerInput`; `lights` names the states of connectors."""
    data = None
    if lights is not None:
        data = [
            SimpleNamespace(status=TrafficLightStatusType[state], lane_connector_id=name, timestamp=0)
            for name, state in lights.items()
        ]
    history = SimpleNamespace(ego_states=[ego], observations=[DetectionsTracks(tracks)])
    return SimpleNamespace(iteration=SimpleNamespace(index=0), history=history, traffic_light_data=data)


def install(setitem: Callable[[dict[str, ModuleType], str, ModuleType], None]) -> None:
    """Make `import nuplan...` find this; `setitem` is monkeypatch's."""
    contents: dict[str, list[Any]] = {
        "common.actor_state.state_representation": [Point2D, StateSE2, StateVector2D, TimePoint],
        "common.actor_state.ego_state": [EgoState],
        "common.maps.maps_datatypes": [SemanticMapLayer, TrafficLightStatusType],
        "common.maps.abstract_map_objects": [Lane, LaneConnector],
        "planning.simulation.observation.observation_type": [DetectionsTracks],
        "planning.simulation.planner.abstract_planner": [AbstractPlanner],
        "planning.simulation.trajectory.interpolated_trajectory": [InterpolatedTrajectory],
    }
    for name, members in contents.items():
        parts = ["nuplan", *name.split(".")]
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                setitem(sys.modules, path, ModuleType(path))  # type: ignore[arg-type]
        for member in members:
            setattr(sys.modules[".".join(parts)], member.__name__, member)
