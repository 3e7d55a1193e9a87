"""highway-env's roads as driving tasks, judged by the rewards, costs and scores that RouteDriving uses.

The package gives roads, traffic and a kinematic ego; its own rewards, observations and terminations are not
used. At each step (10 Hz) the state is put into a `DrivingFrame`, and everything else follows from that.

Source: Leurent, "An Environment for Autonomous Driving Decision-Making", 2018 (highway-env, MIT licence).
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from saferl.envs.driving.adapter import (
    NO_LIMIT,
    OBSERVATION_SIZE,
    Actor,
    Judge,
    Monitor,
    RoutePath,
    Scene,
    box_points,
    observe,
    touched,
)
from saferl.errors import MissingPackageError, UsageError, unknown_name

__all__ = ["TASKS", "HighwayDrivingEnv", "Task"]

DT = 0.1
"""s a step; also the package's own time step."""
_MARGIN = 1.0  # m by which lanes are taken to reach beyond their ends: the racetrack's do not quite meet
_JOINT = 0.2  # m of the route between the end of a lane and the first point taken from the next
_NEAR = 15.0  # m from the ego within which lanes are looked at
_OUTSIDE = 0.5  # m beyond its lane's border at which CARLA holds a car to be outside
_AGAINST = math.radians(120.0)
_ACCELERATION = 5.0  # m/s^2 at action 1, the package's default
_INSTALL = "pip install 'saferl[driving]'"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """A road of highway-env and the route on it."""

    world: str
    """The package's class, in `highway_env.envs`."""
    time_limit: float
    """s after which an episode is truncated."""
    steering: float
    """rad at steering action 1."""
    config: dict[str, Any] = field(default_factory=dict)
    """What differs from the package's defaults."""


TASKS = {
    "racetrack": Task("RacetrackEnv", 100.0, math.pi / 4),
    "intersection": Task("ContinuousIntersectionEnv", 30.0, math.pi / 3),
    "merge": Task("MergeEnv", 60.0, 0.1),
    "straight": Task("HighwayEnvFast", 60.0, 0.1),
}
_CORNERS, _CENTRE = [0, 2, 12, 14], 7
"""Of the points of the ego's box."""
_STRAIGHT = 800.0  # m of the route in "straight"
_EXIT = 25.0  # m behind the junction, and the x (m) behind the merge, at which the package's routes end
_MERGED = 370.0


class HighwayDrivingEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A task of highway-env under RouteDriving's rewards, costs and scores.

    * "racetrack": one lap of racetrack-v0 (two lanes, limit 10 m/s), from a random place of its straight.
    * "intersection": intersection-v1's unsignalised crossing from the south, to a random exit (or
      `options={"exit": 1}` at reset: 1, 2 or 3 turn left, go straight, turn right in the picture that the
      package draws); cross traffic. Its car is kinematic here: the package's dynamic one is unstable below
      2 m/s at any step of its own.
    * "merge": merge-v0's motorway with a car on the ramp, 340 m.
    * "straight": 800 m of highway-fast-v0's motorway (three lanes, 20 cars).

    Where the package has cars start faster than the limit of their lane (merge-v0), they start at the limit.

    * Observation: `saferl.envs.driving.adapter.observe`'s vector, float32.
    * Action: (acceleration, steering), in [-1, 1] and clipped to it. Acceleration is 5 m/s^2 at 1, the
      package's; there is no driving backwards. Steering at 1 is 45 degrees on the racetrack and 60 at the
      intersection, the package's, and 0.1 rad on motorways, where more would leave the road within half a
      second; the wheel turns at once.
    * Reward, termination and costs: those of the shared rewards, see `saferl.envs.driving.reward`. There are
      neither lights nor stop signs, and nobody is on foot.
    * Route completion is the arc length driven along the centre line of the lane of the start; a neighbouring
      lane counts as much. The route is done within half a metre of its end.
    * Truncation: when the route is done, after the task's time, and when the car was hit without that
      being a termination (the package's cars cannot drive on after a crash).
    * `info` holds "completion" (%), "speed", "cost", "costs", and in an episode's last step the scores
      (`Judge.result`).

    Every random number comes from the seed of `reset`, that of the last one going on where it has none.

    Args:
        task: a key of `TASKS`.
        reward: a name of `saferl.envs.driving.reward.REWARDS`.
        config: entries of the package's configuration to replace, e.g. {"other_vehicles": 4}; frequencies and
            the action are fixed.
        time_limit: s; None takes the task's.
        render_mode: None or "rgb_array", drawn by the package.

    Raises MissingPackageError when highway-env is not installed and UsageError for impossible arguments.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        task: str = "racetrack",
        *,
        reward: str = "carl",
        config: dict[str, Any] | None = None,
        time_limit: float | None = None,
        render_mode: str | None = None,
    ) -> None:
        if task not in TASKS:
            raise unknown_name("highway-env task", task, list(TASKS))
        if render_mode not in (None, "rgb_array"):
            raise UsageError(f"render_mode is {render_mode!r}; this environment has 'rgb_array'")
        if time_limit is not None and not time_limit > 0:
            raise UsageError(f"time_limit is {time_limit}; give a positive number of seconds")
        self.render_mode = render_mode
        self.task = task
        self._task = TASKS[task]
        self._time_limit = time_limit or self._task.time_limit
        self._judge = Judge(reward)
        self.metadata = {**type(self).metadata, "cost_names": self._judge.cost_names}
        self.observation_space = spaces.Box(-np.inf, np.inf, (OBSERVATION_SIZE,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        fixed = {
            "action": {
                "type": "ContinuousAction",
                "acceleration_range": (-_ACCELERATION, _ACCELERATION),
                "steering_range": (-self._task.steering, self._task.steering),
            },
            "observation": {"type": "AttributesObservation", "attributes": []},  # none: most of a step's time
            "simulation_frequency": round(1 / DT),
            "policy_frequency": round(1 / DT),
            "offscreen_rendering": True,
        }
        if task == "intersection":
            # The package tunes the class of the cars for this road; ours leaves the others' as they are.
            fixed["other_vehicles_type"] = f"{__name__}.IntersectionDriver"
        if clash := sorted(fixed.keys() & (config or {})):
            raise UsageError(f"config sets {clash[0]!r}, which this environment fixes; leave it out")
        self._world = _world(self._task.world)(
            config={**self._task.config, **(config or {}), **fixed}, render_mode=render_mode
        )
        self._scene: Scene | None = None

    # --- episodes -------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start a new episode; `options["exit"]` names the exit of the intersection."""
        super().reset(seed=seed)
        self._world.reset(seed=int(self.np_random.integers(2**31)))
        for vehicle in self._world.road.vehicles:
            limit = vehicle.lane.speed_limit
            if limit is not None and vehicle.speed > limit:
                vehicle.speed = limit
        ego = self._ego
        # The package's own copies the whole road for it, at every decision of who has to wait.
        ego.predict_trajectory_constant_speed = functools.partial(_predict, ego)
        way = (options or {}).get("exit")
        if way is None:
            way = int(self.np_random.integers(1, 4))
        elif self.task != "intersection" or way not in (1, 2, 3):
            raise UsageError(f"exit is {way!r}; the intersection has the exits 1, 2 and 3, other tasks none")
        self._lanes = list(self._world.road.network.lanes_list())
        self._route = RoutePath(self._plan(way))
        self._monitor = Monitor(self._route, time_limit=self._time_limit, dt=DT)
        self._crashed = False
        self._scene = scene = self._look(0.0)
        frame = self._monitor.start(scene)
        self._judge.start()
        return observe(frame, scene, self._monitor), {"completion": float(frame.completion)}

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Drive 0.1 s with `action` (2,). Raises UsageError before `reset` and for another shape."""
        if self._scene is None:
            raise UsageError("the environment is stepped before it was reset; call reset first")
        given = np.asarray(action, np.float64)
        if given.shape != (2,) or not np.isfinite(given).all():
            raise UsageError(f"the action has shape {given.shape}; give 2 finite numbers")
        acceleration, steer = (float(v) for v in np.clip(given, -1.0, 1.0))
        # Brakes hold a standing car; they do not push it backwards.
        acceleration = max(acceleration, -max(self._ego.speed, 0.0) / (DT * _ACCELERATION))
        self._world.step(np.array([acceleration, steer]))
        self._scene = scene = self._look(steer)
        frame = self._monitor.update(scene)
        verdict = self._judge.step(frame)
        late = self._monitor.time > self._time_limit - 0.5 * DT
        truncated = not verdict.terminated and (bool(frame.finished) or late or self._crashed)
        info: dict[str, Any] = {
            "completion": float(frame.completion),
            "speed": scene.speed,
            "cost": verdict.cost,
            "costs": verdict.costs,
        }
        if verdict.terminated or truncated:
            info |= self._judge.result()
        return observe(frame, scene, self._monitor), verdict.reward, verdict.terminated, truncated, info

    def render(self) -> NDArray[np.uint8]:
        """Return a picture (height, width, 3) uint8."""
        if self.render_mode is None:
            raise UsageError("this environment was made without render_mode; pass render_mode='rgb_array'")
        picture: NDArray[np.uint8] = np.asarray(self._world.render(), np.uint8)
        return picture

    def close(self) -> None:
        """Close the package's viewer."""
        self._world.close()

    # --- the road -------------------------------------------------------------------------------------------

    @property
    def _ego(self) -> Any:
        return self._world.vehicle

    def _plan(self, way: int) -> Floats:
        """The route's points (n, 2), about 1 m apart."""
        network, ego = self._world.road.network, self._ego
        first, then, number = ego.lane_index
        start = network.get_lane(ego.lane_index).local_coordinates(ego.position)[0]
        if self.task == "straight":
            return _sample([(network.get_lane(ego.lane_index), start, start + _STRAIGHT)])
        nodes = [first, then]
        if self.task == "intersection":
            nodes = [first, *network.shortest_path(then, f"o{way}")]
        else:
            while nodes[-1] != first and nodes[-1] in network.graph:
                nodes.append(next(iter(network.graph[nodes[-1]])))
        pieces: list[tuple[Any, float, float]] = []
        for here, there in itertools.pairwise(nodes):
            lanes = network.graph[here][there]
            lane = lanes[min(number, len(lanes) - 1)]
            pieces.append((lane, 0.0, float(lane.length)))
        pieces[0] = (pieces[0][0], start, pieces[0][2])
        if self.task == "intersection":
            pieces[-1] = (pieces[-1][0], 0.0, _EXIT)
        elif self.task == "merge":
            last = pieces[-1][0]
            pieces[-1] = (last, 0.0, float(last.local_coordinates(np.array([_MERGED, 0.0]))[0]))
        else:
            pieces.append((pieces[0][0], 0.0, start))
        return _sample(pieces)

    def _look(self, steer: float) -> Scene:
        """What there is to see now, after a step with steering action `steer`."""
        ego, road = self._ego, self._world.road
        lane = ego.lane
        along, offset = lane.local_coordinates(ego.position)
        width = float(lane.width_at(along))
        junction = self.task == "intersection" and ego.lane_index[0].startswith("ir")
        x, y = float(ego.position[0]), float(ego.position[1])
        _, box = box_points(x, y, float(ego.heading), float(ego.LENGTH), float(ego.WIDTH))
        near = [other for other in self._lanes if _outside(other, ego.position) < _NEAR]
        # (lanes, points), m outside each lane.
        depths = np.array([[_outside(other, point) for point in box] for other in near])
        depth = depths.min(0) if near else np.full(len(box), _NEAR)
        here = [other for other, outside in zip(near, depths, strict=True) if outside[_CENTRE] <= _OUTSIDE]
        against = all(
            abs(other.local_angle(ego.heading, other.local_coordinates(ego.position)[0])) > _AGAINST
            for other in here
        )
        own = np.array([_outside(lane, point) for point in box])
        if junction:
            # Many lanes cross here; the one meant is that of the route.
            aside = self._route.locate(x, y, self._monitor.arc, 10.0, 10.0)[1]
            offset = min(offset, aside, key=abs)
        scene = Scene(
            x=x,
            y=y,
            heading=float(ego.heading),
            speed=float(ego.speed),
            length=float(ego.LENGTH),
            width=float(ego.WIDTH),
            speed_limit=float(NO_LIMIT if lane.speed_limit is None else lane.speed_limit),
            lane_offset=float(offset),
            lane_width=width,
            in_junction=junction,
            outside_lanes=not here or (against and not junction),
            off_road_share=float((depth > 0).mean()),
            off_road_depth=float(depth[_CORNERS].max()),
            # Where the box sticks out of its lane and is on the road still, it is on another.
            multiple_lanes=junction or bool(((own > 0) & (depth <= 0)).any()),
            steer=steer,
            others=self._actors(road),
        )
        struck: frozenset[Any] = frozenset()
        if ego.crashed and not self._crashed:
            # The package tests the same boxes; where rounding parts the two, its word counts.
            struck = touched(scene)
            if not struck and scene.others:
                nearest = min(scene.others, key=lambda a: math.hypot(a.x - scene.x, a.y - scene.y))
                struck = frozenset([nearest.key])
        scene.struck = struck
        self._crashed = bool(ego.crashed)
        return scene

    def _actors(self, road: Any) -> Sequence[Actor]:
        solid = [other for other in road.objects if other.solid]
        return [
            Actor(
                key=other,
                x=float(other.position[0]),
                y=float(other.position[1]),
                heading=float(other.heading),
                speed=float(other.speed),
                length=float(other.LENGTH),
                width=float(other.WIDTH),
                kind=kind,
            )
            for kind, group in ((0, road.vehicles), (2, solid))
            for other in group
            if other is not self._ego
        ]


def _outside(lane: Any, point: Floats) -> float:
    """m by which a point is outside the lane, negative inside."""
    along, aside = (float(v) for v in lane.local_coordinates(point))
    radius = getattr(lane, "radius", None)
    if radius is not None and along < -0.5 * math.pi * radius:
        along += 2 * math.pi * radius  # the package loses arcs of more than half a circle behind their start
    return max(
        abs(aside) - 0.5 * float(lane.width_at(along)),
        -along - _MARGIN,
        along - float(lane.length) - _MARGIN,
    )


def _sample(pieces: Sequence[tuple[Any, float, float]]) -> Floats:
    """Points (n, 2) about 1 m apart on the centre lines of (lane, from, to), one after the other.

    Where a lane begins before the end of the last one, its points up to there are left out.
    """
    points: list[Floats] = []
    heading = 0.0
    for lane, start, end in pieces:
        piece = [np.asarray(lane.position(s, 0.0), np.float64)
                 for s in np.linspace(start, end, max(2, math.ceil(end - start) + 1))]  # fmt: skip
        if points:
            last = points[-1]
            forward = np.array([math.cos(heading), math.sin(heading)])
            while len(piece) > 1 and (piece[0] - last) @ forward < _JOINT:
                piece.pop(0)
        points += piece
        heading = float(lane.heading_at(end))
    return np.array(points)


def _predict(vehicle: Any, times: Floats) -> tuple[list[Floats], list[float]]:
    """Where the package's kinematic car is at `times` (s) if speed and steering stay: positions, headings."""
    ghost = copy.copy(vehicle)
    ghost.road, ghost.position = None, vehicle.position.copy()
    ghost.action = {"acceleration": 0.0, "steering": vehicle.action["steering"]}
    positions, headings = [], []
    for dt in np.diff(times, prepend=0.0):
        ghost.step(dt)
        positions.append(ghost.position.copy())
        headings.append(ghost.heading)
    return positions, headings


# --- the package --------------------------------------------------------------------------------------------


@functools.cache
def _world(name: str) -> Any:
    """The package's class `name` without its own reward, which not every one can tell for our actions."""
    try:
        module = importlib.import_module("highway_env.envs")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the highway-env tasks need the package highway-env ({error}); run: {_INSTALL}"
        ) from error

    def nothing(self: Any, action: Any) -> float:
        return 0.0

    def no_parts(self: Any, action: Any) -> dict[str, float]:
        return {}

    return type(f"Bare{name}", (getattr(module, name),), {"_reward": nothing, "_rewards": no_parts})


@functools.cache
def _intersection_driver() -> Any:
    module = importlib.import_module("highway_env.vehicle.behavior")
    return type("IntersectionDriver", (module.IDMVehicle,), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """`IntersectionDriver`: the package asks for it by name."""
    if name == "IntersectionDriver":
        return _intersection_driver()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
