"""nuPlan under RouteDriving's rewards, costs and scores, and a saferl policy as a planner of nuPlan.

`NuPlanDrive` turns what nuPlan gives a planner at each iteration (its history, tracked objects, traffic
lights and map) into `Scene`s and the same `DrivingFrame`s as everywhere else. `SaferlPlanner` is an
`AbstractPlanner` of nuPlan that asks a policy for (acceleration, steering) and answers with the trajectory of
nuPlan's kinematic bicycle; in a planner's configuration it is `_target_:
saferl.envs.driving.nuplan.SaferlPlanner` with `policy: RUN`.

**Tested only against a stand-in of the API** (tests/envs/driving/nuplan_stub.py), written after nuplan-devkit
1.2; never with nuPlan's data or simulation. Closed-loop scores for publication come from nuPlan's own
metrics.

The planner's trajectory is meant for perfect tracking (`perfect_tracking_controller`), as CaRL is run:
nuPlan's LQR tracker would drive another one.

Source: nuplan-devkit (Apache-2.0); CaRL, arXiv 2504.17838.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saferl.envs.driving.adapter import (
    NO_LIMIT,
    OBSERVATION_SIZE,
    Actor,
    Floats,
    Judge,
    Monitor,
    RoutePath,
    Scene,
    Verdict,
    box_points,
    observe,
    wrap,
)
from saferl.envs.driving.frame import NO_LIGHT, DrivingFrame, LightState
from saferl.envs.driving.geometry import WHEELBASE, Bicycle, drive_bicycle
from saferl.errors import MissingPackageError, SaferlError, UsageError

__all__ = ["NuPlanDrive", "PlannerCore", "SaferlPlanner", "plan_route"]  # noqa: F822

DT = 0.1
"""s an iteration."""
_MISSING = (
    "not installed (adapter for nuPlan); pip cannot get it by name: clone motional/nuplan-devkit and run "
    "pip install -e nuplan-devkit, which leaves out what it imports; its requirements.txt pins numpy 1.23, "
    "which saferl cannot use: install those packages one by one; data and maps are a download of their own"
)
_WIDTH = 3.5  # m, of lanes whose borders the map cannot tell
_STOPPED = 0.05  # m/s
_PASSED = -2.0  # m behind a line up to which it is still shown
_PEDESTRIANS = ("PEDESTRIAN", "BICYCLE")
"""Who nuPlan's scores protect as road users without a car around them."""
_STATIC = ("TRAFFIC_CONE", "BARRIER", "CZONE_SIGN", "GENERIC_OBJECT")


def _load(module: str, *names: str) -> Any:
    """Names of a module of nuPlan. Raises MissingPackageError when it is not installed."""
    try:
        found = importlib.import_module(f"nuplan.{module}")
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"nuPlan cannot be imported ({error}); it is {_MISSING}") from error
    values = [getattr(found, name) for name in names]
    return values[0] if len(values) == 1 else values


# --- the route ----------------------------------------------------------------------------------------------


def plan_route(map_api: Any, roadblocks: Sequence[str], x: float, y: float, heading: float) -> list[Any]:
    """The lanes and connectors to be driven, from the one that the ego is in to the last roadblock.

    A lane that leads through all remaining roadblocks is taken where there is one in the ego's roadblock, the
    ego's own before others; else the way goes as far as it can.

    Args:
        map_api: nuPlan's `AbstractMap`.
        roadblocks: ids, as `PlannerInitialization.route_roadblock_ids`.
        x, y, heading: the ego's centre.

    Raises SaferlError when the map knows none of the roadblocks.
    """
    layers = _load("common.maps.maps_datatypes", "SemanticMapLayer")
    blocks = []
    for name in roadblocks:
        block = map_api.get_map_object(name, layers.ROADBLOCK)
        block = block or map_api.get_map_object(name, layers.ROADBLOCK_CONNECTOR)
        if block is not None and block.interior_edges:
            blocks.append(list(block.interior_edges))
    if not blocks:
        raise SaferlError(
            "the map knows none of the route's roadblocks; do map and scenario belong together?"
        )
    depth = [{edge.id: 0 for edge in block} for block in blocks]  # roadblocks that can still be reached
    for i in range(len(blocks) - 2, -1, -1):
        for edge in blocks[i]:
            reached = [depth[i + 1][o.id] + 1 for o in edge.outgoing_edges if o.id in depth[i + 1]]
            depth[i][edge.id] = max(reached, default=0)
    here = min(range(len(blocks)), key=lambda i: min(_misfit(edge, x, y, heading) for edge in blocks[i]))
    edge = min(blocks[here], key=lambda e: (-depth[here][e.id], _misfit(e, x, y, heading)))
    route = [edge]
    for i in range(here + 1, len(blocks)):
        ways = [o for o in edge.outgoing_edges if o.id in depth[i]]
        if not ways:
            break
        edge = max(ways, key=lambda o: depth[i][o.id])
        route.append(edge)
    return route


def _misfit(edge: Any, x: float, y: float, heading: float) -> float:
    """m from a lane's centre line, a radian of difference counting as one."""
    pose = edge.baseline_path.get_nearest_pose_from_position(_point(x, y))
    return math.hypot(pose.x - x, pose.y - y) + abs(wrap(heading - pose.heading))


def _point(x: float, y: float) -> Any:
    return _load("common.actor_state.state_representation", "Point2D")(x, y)


def _centre_line(edges: Iterable[Any]) -> tuple[Floats, list[float]]:
    """Points (n, 2) of the lanes one after the other, and the arc length at which each begins."""
    points: list[tuple[float, float]] = []
    arcs, arc = [], 0.0
    for edge in edges:
        arcs.append(arc)
        for pose in edge.baseline_path.discrete_path:
            place = (float(pose.x), float(pose.y))
            if points:
                step = math.hypot(place[0] - points[-1][0], place[1] - points[-1][1])
                if step < 1e-3:
                    continue
                arc += step
            points.append(place)
    return np.array(points), arcs


# --- a drive ------------------------------------------------------------------------------------------------


class NuPlanDrive:
    """One scenario as nuPlan shows it to a planner: scenes, frames, observations, rewards and scores.

    Frames are filled as CaRL's nuPlan port and nuPlan's metrics define their parts: accelerations are those
    of the ego's centre as nuPlan gives them; a track counts as hit once; bicycles count as pedestrians
    (nuPlan's vulnerable road users); `outside_lanes` means outside the route's roadblocks; within connectors
    the largest limit of the adjoining lanes counts; a red light is run by entering a lane connector of the
    route whose light is red. nuPlan knows no state of stop signs: there is none.

    Args:
        map_api: nuPlan's `AbstractMap`.
        roadblocks: ids of the route.
        reward: a name of `saferl.envs.driving.reward.REWARDS`.
        time_limit: s of a scenario.
        expert: (n, 2) m, what the logged driver drove: completion is then measured along it, as CaRL does;
            None takes the centre lines of the route.
    """

    def __init__(
        self,
        map_api: Any,
        roadblocks: Sequence[str],
        *,
        reward: str = "carl-nuplan",
        time_limit: float = 15.0,
        expert: Floats | None = None,
    ) -> None:
        self._map, self._roadblocks = map_api, list(roadblocks)
        self._time_limit, self._expert = time_limit, expert
        self._judge = Judge(reward)
        self._monitor: Monitor | None = None
        self._inside: str | None = None
        self._limit = NO_LIMIT

    def start(self, current: Any) -> tuple[NDArray[np.float32], DrivingFrame]:
        """Begin with a `PlannerInput`; returns the first observation and frame."""
        ego = current.history.ego_states[-1]
        centre = ego.center
        self._edges = plan_route(self._map, self._roadblocks, centre.x, centre.y, centre.heading)
        points, arcs = _centre_line(self._edges)
        self._centre_line = RoutePath(points)
        self._connectors = [
            (arc, edge) for arc, edge in zip(arcs, self._edges, strict=True) if _is_connector(edge)
        ]
        route = self._centre_line if self._expert is None else RoutePath(self._expert)
        self._expert_length = route.length
        self._monitor = monitor = Monitor(
            route, time_limit=self._time_limit, dt=DT, again_after=math.inf, again_beyond=0.0
        )
        self._along = self._centre_line.locate(centre.x, centre.y, 0.0, 0.0, self._centre_line.length)[0]
        scene = self.look(current, 0.0)
        frame = monitor.start(scene)
        self._judge.start()
        return observe(frame, scene, monitor), frame

    def update(self, current: Any, steer: float) -> tuple[NDArray[np.float32], DrivingFrame, Verdict]:
        """Go on with the next `PlannerInput`, to which the steering action `steer` led.

        Returns the observation, the frame, and what reward, costs and termination say of it. Raises
        UsageError before `start`.
        """
        if self._monitor is None:
            raise UsageError("a drive is updated before it was started; call start with its first input")
        scene = self.look(current, steer)
        frame = self._monitor.update(scene)
        return observe(frame, scene, self._monitor), frame, self._judge.step(frame)

    def result(self) -> dict[str, float]:
        """The scores so far (`Judge.result`), against the expert's whole path where there is one."""
        return self._judge.result(None if self._expert is None else self._expert_length)

    def look(self, current: Any, steer: float) -> Scene:
        """The scene of a `PlannerInput`, to which the steering action `steer` led."""
        layers = _load("common.maps.maps_datatypes", "SemanticMapLayer")
        ego = current.history.ego_states[-1]
        tracks = current.history.observations[-1].tracked_objects
        x, y, heading = float(ego.center.x), float(ego.center.y), float(ego.center.heading)
        box = ego.car_footprint.oriented_box
        length, width = float(box.length), float(box.width)
        velocity = ego.dynamic_car_state.center_velocity_2d
        acceleration = ego.dynamic_car_state.center_acceleration_2d
        corners, points = box_points(x, y, heading, length, width)

        lane = self._lane(x, y, heading, layers)
        pose = lane.baseline_path.get_nearest_pose_from_position(_point(x, y))
        left, right = (float(v) for v in lane.get_width_left_right(_point(x, y), include_outside=True))
        known = math.isfinite(left) and math.isfinite(right)
        lane_width = left + right if known else _WIDTH
        connector = _is_connector(lane)
        at_corners = [self._map.is_in_layer(_point(*c), layers.DRIVABLE_AREA) for c in corners]
        if all(at_corners):
            depth = -max(min(left, right) - 0.5 * width, 0.0) if known else -0.1
        else:
            depth = max(self._to_road(c, layers) for c in corners)
        here = set()
        for corner in corners:
            here |= {edge.id for edge in self._map.get_all_map_objects(_point(*corner), layers.LANE)}
        self._along = self._centre_line.locate(x, y, self._along, 15.0, 25.0)[0]
        light, light_distance, ran_red = self._light(current, x, y, float(velocity.x), length)
        return Scene(
            x=x,
            y=y,
            heading=heading,
            speed=float(velocity.x),
            length=length,
            width=width,
            speed_limit=self._speed_limit(lane),
            lane_offset=math.cos(pose.heading) * (y - pose.y) - math.sin(pose.heading) * (x - pose.x),
            lane_width=lane_width,
            in_junction=connector,
            outside_lanes=not self._on_route(x, y, layers),
            off_road_share=1.0
            - float(np.mean([self._map.is_in_layer(_point(*p), layers.DRIVABLE_AREA) for p in points])),
            off_road_depth=depth,
            multiple_lanes=connector or len(here) > 1,
            steer=steer,
            acceleration=(float(acceleration.x), float(acceleration.y)),
            light=light,
            light_distance=light_distance,
            ran_red_light=ran_red,
            others=[actor for track in tracks for actor in _actors(track)],
        )

    def _lane(self, x: float, y: float, heading: float, layers: Any) -> Any:
        """The lane or connector that the ego is in: one of the route where it can be, else the best fit."""
        found = [
            edge
            for layer in (layers.LANE, layers.LANE_CONNECTOR)
            for edge in self._map.get_all_map_objects(_point(x, y), layer)
        ]
        meant = {edge.id for edge in self._edges}
        own = [edge for edge in found if edge.id in meant]
        return min(own or found or self._edges, key=lambda edge: _misfit(edge, x, y, heading))

    def _speed_limit(self, lane: Any) -> float:
        limits = [lane.speed_limit_mps]
        if _is_connector(lane):
            limits = [edge.speed_limit_mps for edge in (*lane.incoming_edges, *lane.outgoing_edges)] + limits
        known = [float(limit) for limit in limits if limit is not None]
        return max(known, default=NO_LIMIT)

    def _on_route(self, x: float, y: float, layers: Any) -> bool:
        blocks = [
            block.id
            for layer in (layers.ROADBLOCK, layers.ROADBLOCK_CONNECTOR)
            for block in self._map.get_all_map_objects(_point(x, y), layer)
        ]
        return any(name in self._roadblocks for name in blocks)

    def _to_road(self, corner: Floats, layers: Any) -> float:
        """m from a corner to the drivable area, 0 in it."""
        _, distance = self._map.get_distance_to_nearest_map_object(_point(*corner), layers.DRIVABLE_AREA)
        return 100.0 if distance is None or math.isnan(distance) else float(distance)

    def _light(
        self, current: Any, x: float, y: float, speed: float, length: float
    ) -> tuple[int, float, bool]:
        """State and distance of the route's next light, and whether a red one was run in this step."""
        states = _load("common.maps.maps_datatypes", "TrafficLightStatusType")
        numbers = {
            states.GREEN: LightState.GREEN,
            states.YELLOW: LightState.YELLOW,
            states.RED: LightState.RED,
        }
        told = {str(d.lane_connector_id): numbers.get(d.status) for d in current.traffic_light_data or ()}
        front = self._along + 0.5 * length
        state, distance = LightState.NONE, NO_LIGHT
        for arc, edge in self._connectors:
            number = told.get(str(edge.id))
            if number is not None and arc - front > _PASSED:
                state, distance = number, arc - front
                break
        inside = next((str(e.id) for _, e in self._connectors if e.contains_point(_point(x, y))), None)
        entered, self._inside = inside is not None and inside != self._inside, inside
        red = inside is not None and told.get(inside) == LightState.RED
        return state, distance, entered and red and abs(speed) > _STOPPED


def _is_connector(edge: Any) -> bool:
    """Whether a lane of the map lies in an intersection."""
    kind = _load("common.maps.abstract_map_objects", "LaneConnector")
    return isinstance(edge, kind)


def _actors(track: Any) -> Iterable[Actor]:
    """The box of a tracked object; nothing for the ego's own."""
    name = track.tracked_object_type.name
    if name == "EGO":
        return
    centre, velocity = track.box.center, getattr(track, "velocity", None)
    heading = float(centre.heading)
    speed = 0.0
    if velocity is not None:
        speed = float(velocity.x) * math.cos(heading) + float(velocity.y) * math.sin(heading)
        if name in _PEDESTRIANS:
            # People face any way; what counts is how fast they go.
            total = math.hypot(float(velocity.x), float(velocity.y))
            heading, speed = (
                (math.atan2(float(velocity.y), float(velocity.x)), total) if total > 0.1 else (heading, total)
            )
    yield Actor(
        key=track.track_token,
        x=float(centre.x),
        y=float(centre.y),
        heading=heading,
        speed=speed,
        length=float(track.box.length),
        width=float(track.box.width),
        kind=1 if name in _PEDESTRIANS else 2 if name in _STATIC else 0,
    )


# --- the planner --------------------------------------------------------------------------------------------


class PlannerCore:
    """What `SaferlPlanner` does, without nuPlan's base class.

    Each trajectory holds the policy's action for its whole length; nuPlan takes the first step of it and asks
    again.

    Args:
        policy: a `saferl.policies.Policy` whose observations are `saferl.envs.driving.adapter.observe`'s and
            whose actions are (acceleration, steering) in [-1, 1], or what `saferl.load_policy` opens.
        horizon: s of a trajectory.
        deterministic: take the mode of the policy's distribution.
        reward: a name of `saferl.envs.driving.reward.REWARDS`, whose verdict on each step `verdict` holds.
        time_limit: s of a scenario.

    Raises UsageError for a horizon below a step and for a policy of other sizes.
    """

    requires_scenario = False

    def __init__(
        self,
        policy: Any,
        *,
        horizon: float = 8.0,
        deterministic: bool = True,
        reward: str = "carl-nuplan",
        time_limit: float = 15.0,
    ) -> None:
        if not horizon >= DT:
            raise UsageError(f"horizon is {horizon} s; a trajectory needs at least {DT} s")
        if isinstance(policy, str | Path):
            from saferl.policies import load_policy

            policy = load_policy(policy)
        for kind, size in (("observation", OBSERVATION_SIZE), ("action", 2)):
            space = getattr(policy, f"{kind}_space", None)
            if space is not None and space.shape != (size,):
                raise UsageError(f"the policy's {kind}s have shape {space.shape}; nuPlan's have ({size},)")
        self._policy, self._deterministic = policy, deterministic
        self._steps = round(horizon / DT)
        self._reward, self._time_limit = reward, time_limit
        self._drive: NuPlanDrive | None = None
        self._begun = False
        self._steer = 0.0
        self.frame: DrivingFrame | None = None
        """The last frame."""
        self.verdict: Verdict | None = None
        """What reward, costs and termination say of the last step; None after the first input."""

    def name(self) -> str:
        """The planner's name in nuPlan's reports."""
        return "SaferlPlanner"

    def observation_type(self) -> Any:
        """What nuPlan shows: tracked objects."""
        return _load("planning.simulation.observation.observation_type", "DetectionsTracks")

    def initialize(self, initialization: Any) -> None:
        """Begin a scenario with nuPlan's `PlannerInitialization`."""
        self._drive = NuPlanDrive(
            initialization.map_api,
            initialization.route_roadblock_ids,
            reward=self._reward,
            time_limit=self._time_limit,
        )
        self._begun, self._steer, self.verdict = False, 0.0, None

    def result(self) -> dict[str, float]:
        """The scores so far, by the shared definitions. Raises UsageError before `initialize`."""
        if self._drive is None:
            raise UsageError("the planner was not initialised; nuPlan calls initialize before the first step")
        return self._drive.result()

    def compute_planner_trajectory(self, current_input: Any) -> Any:
        """Answer a `PlannerInput` with an `InterpolatedTrajectory`. Raises UsageError before `initialize`."""
        drive = self._drive
        if drive is None:
            raise UsageError("the planner was not initialised; nuPlan calls initialize before the first step")
        if self._begun:
            observation, self.frame, self.verdict = drive.update(current_input, self._steer)
        else:
            observation, self.frame = drive.start(current_input)
            self._begun = True
        action = np.asarray(self._policy.act(observation[None], deterministic=self._deterministic))[0]
        acceleration, steer = (float(v) for v in np.clip(action, -1.0, 1.0))
        self._steer = steer
        return self._trajectory(current_input.history.ego_states[-1], acceleration, steer)

    def _trajectory(self, ego: Any, acceleration: float, steer: float) -> Any:
        """nuPlan's bicycle under one action, from the ego's state on."""
        build = _load("common.actor_state.ego_state", "EgoState").build_from_rear_axle
        pose, vector, time_point = _load(
            "common.actor_state.state_representation", "StateSE2", "StateVector2D", "TimePoint"
        )
        interpolated = _load(
            "planning.simulation.trajectory.interpolated_trajectory", "InterpolatedTrajectory"
        )
        car = ego.dynamic_car_state
        numbers = [
            ego.rear_axle.x,
            ego.rear_axle.y,
            ego.rear_axle.heading,
            car.rear_axle_velocity_2d.x,
            car.rear_axle_acceleration_2d.x,
            ego.tire_steering_angle,
        ]
        state = Bicycle(*(torch.tensor(float(v), dtype=torch.float64) for v in numbers))
        actions = torch.tensor([acceleration, steer], dtype=torch.float64)
        states, rate = [ego], float(car.angular_velocity)
        for step in range(1, self._steps + 1):
            state = drive_bicycle(state, actions[0], actions[1], DT)
            x, y, heading, speed, pull, angle = (float(v) for v in state)
            turning = speed * math.tan(angle) / WHEELBASE
            states.append(
                build(
                    rear_axle_pose=pose(x, y, wrap(heading)),
                    rear_axle_velocity_2d=vector(speed, 0.0),
                    rear_axle_acceleration_2d=vector(pull, 0.0),
                    tire_steering_angle=angle,
                    time_point=time_point(int(ego.time_us + round(step * DT * 1e6))),
                    vehicle_parameters=ego.car_footprint.vehicle_parameters,
                    is_in_auto_mode=True,
                    angular_vel=turning,
                    angular_accel=(turning - rate) / DT,
                )
            )
            rate = turning
        return interpolated(states)


@functools.cache
def _planner_class() -> Any:
    base = _load("planning.simulation.planner.abstract_planner", "AbstractPlanner")
    return type(
        "SaferlPlanner", (PlannerCore, base), {"__module__": __name__, "__doc__": PlannerCore.__doc__}
    )


def __getattr__(name: str) -> Any:
    """`SaferlPlanner`: made on first use, since its base class is nuPlan's."""
    if name == "SaferlPlanner":
        return _planner_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
