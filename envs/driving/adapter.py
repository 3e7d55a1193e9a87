"""What highway-env, CARLA and nuPlan share: from what a simulator tells of one drive to a `DrivingFrame`.

A simulator's adapter describes each moment by a `Scene` of plain numbers. `Monitor` remembers what a scene
does not hold (how far the route is done, for how long the ego has stood, which collisions count, whose fault
they were) and gives the frame of one drive (B = 1); `Judge` runs the shared reward, costs and scores on it;
`observe` makes the vector that policies see, the same for every simulator.

Units are m, s, m/s and rad; x, y and headings are right-handed (counter-clockwise, heading 0 along x).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saferl.envs.driving.frame import NO_LIGHT, Boxes, DrivingFrame, LightState
from saferl.envs.driving.geometry import boxes_overlap
from saferl.envs.driving.reward import COSTS, REWARDS, costs
from saferl.envs.driving.score import DrivingScore, time_to_collision
from saferl.errors import UsageError, unknown_name

__all__ = [
    "NEAREST",
    "NO_LIMIT",
    "OBSERVATION_SIZE",
    "PREVIEW",
    "Actor",
    "Judge",
    "Monitor",
    "RoutePath",
    "Scene",
    "Verdict",
    "box_points",
    "boxes",
    "observe",
    "overlaps",
    "touched",
    "wrap",
]

Floats = NDArray[np.float64]

NO_LIMIT = 100.0
"""m/s, the limit of a lane that has none."""
_STANDING = 0.1  # m/s, below which CARLA counts neither collisions nor motion
_STOPPED = 0.05  # m/s, nuPlan's
_FAR, _TOO_FAR, _FAR_SHARE = 15.0, 30.0, 0.3  # CARLA's route deviation: m, m, share of the route
_ARRIVED = 0.5  # m before the end at which a route counts as done
_BEHIND = math.radians(150.0)


@dataclass(frozen=True)
class Actor:
    """A box beside the ego."""

    key: Hashable
    """Tells one actor from another over time."""
    x: float
    """Centre."""
    y: float
    heading: float
    speed: float
    """Along the heading."""
    length: float
    width: float
    kind: int = 0
    """Index into `saferl.envs.driving.frame.KINDS`."""


@dataclass
class Scene:
    """What a simulator tells of one moment of one drive."""

    x: float
    """Centre of the ego's box."""
    y: float
    heading: float
    speed: float
    length: float
    width: float

    speed_limit: float
    lane_offset: float
    """From the centre line of the lane driven in, positive to its left."""
    lane_width: float
    in_junction: bool = False
    outside_lanes: bool = False
    off_road_share: float = 0.0
    off_road_depth: float = -0.5
    multiple_lanes: bool = False

    steer: float = 0.0
    """The last steering action, in [-1, 1]."""
    acceleration: tuple[float, float] | None = None
    """Along the heading and to the left (m/s^2); None takes differences of speed and heading."""

    light: int = LightState.NONE
    light_distance: float = NO_LIGHT
    stop_distance: float = NO_LIGHT
    ran_red_light: bool = False
    ran_stop_sign: bool = False

    arrived: bool = False
    """The simulator says that the route is done."""
    others: Sequence[Actor] = field(default_factory=tuple)
    struck: frozenset[Hashable] | None = None
    """Keys of the actors that the ego touched in this step; None finds them by overlapping boxes."""


class RoutePath:
    """A polyline to be driven along, which may cross or close on itself.

    Args:
        points: (n, 2), n at least 2; repeated points are dropped.

    Raises UsageError for points of another shape, not finite, or all at one place.
    """

    def __init__(self, points: Floats | Sequence[Sequence[float]]) -> None:
        given = np.asarray(points, np.float64)
        if given.ndim != 2 or given.shape[1:] != (2,) or not np.isfinite(given).all():
            raise UsageError(f"a route's points have shape {given.shape}; give (n, 2) finite numbers.")
        apart = np.linalg.norm(np.diff(given, axis=0), axis=1) > 1e-6
        self.points: Floats = given[np.concatenate([[True], apart])]
        if len(self.points) < 2:
            raise UsageError("a route needs at least two different points.")
        steps = np.diff(self.points, axis=0)
        self._lengths: Floats = np.linalg.norm(steps, axis=1)
        self._directions: Floats = steps / self._lengths[:, None]
        self.arc: Floats = np.concatenate([[0.0], np.cumsum(self._lengths)])
        """(n,) m from the start to each point."""

    @property
    def length(self) -> float:
        return float(self.arc[-1])

    def locate(
        self, x: float, y: float, near: float, back: float, ahead: float
    ) -> tuple[float, float, float]:
        """The nearest place whose arc length is within [near - back, near + ahead].

        Returns its arc length, the place's offset from the route (positive to the left) and the route's
        heading.
        """
        first = max(int(np.searchsorted(self.arc, near - back, side="right")) - 1, 0)
        last = max(int(np.searchsorted(self.arc, near + ahead)), first + 1)
        last = min(last, len(self._lengths))
        first = min(first, last - 1)
        starts, directions = self.points[first:last], self._directions[first:last]
        to = np.array([x, y]) - starts
        along = np.clip((to * directions).sum(1), 0.0, self._lengths[first:last])
        gap = to - along[:, None] * directions
        square = (gap * gap).sum(1)
        best = int(square.argmin())
        direction = directions[best]
        side = direction[0] * to[best, 1] - direction[1] * to[best, 0]
        offset = math.copysign(math.sqrt(float(square[best])), float(side))
        heading = math.atan2(float(direction[1]), float(direction[0]))
        return float(self.arc[first + best] + along[best]), offset, heading

    def passes(self, x: float, y: float, heading: float, within: float) -> list[float]:
        """Arc lengths at which the route goes by a place, closer than `within` m, in about its direction.

        One for each time it does; a direction counts up to 60 degrees off.
        """
        to = np.array([x, y]) - self.points[:-1]
        along = np.clip((to * self._directions).sum(1), 0.0, self._lengths)
        gap = np.linalg.norm(to - along[:, None] * self._directions, axis=1)
        agree = self._directions @ np.array([math.cos(heading), math.sin(heading)]) > 0.5
        found: list[float] = []
        best, last = math.inf, -2
        for index in np.flatnonzero((gap < within) & agree):
            arc = float(self.arc[index] + along[index])
            if index != last + 1:
                found.append(arc)
                best = float(gap[index])
            elif gap[index] < best:
                found[-1], best = arc, float(gap[index])
            last = int(index)
        return found

    def at(self, arc: Floats) -> Floats:
        """Points (k, 2) at arc lengths (k,); beyond the end the last segment goes straight on."""
        inside = np.stack([np.interp(arc, self.arc, self.points[:, i]) for i in (0, 1)], -1)
        over = np.clip(arc - self.length, 0.0, None)
        result: Floats = inside + over[:, None] * self._directions[-1]
        return result


class Monitor:
    """Follows one drive along a route and gives its frames.

    Collisions count as in CARLA's criterion: not while the ego stands (below 0.1 m/s), not with the same
    actor within `again_after` seconds, and not within `again_beyond` m of the last one counted. A collision
    is the ego's fault by nuPlan's classes: the other stood, or was met with the front bumper, or with a side
    while the ego was in several lanes or off the road; never while the ego stands or when it is hit from
    behind.

    Args:
        route: the polyline.
        time_limit: s.
        dt: s between scenes.
        again_after, again_beyond: s and m, see above; nuPlan counts an actor once (`math.inf`, 0).
    """

    def __init__(
        self,
        route: RoutePath,
        *,
        time_limit: float,
        dt: float = 0.1,
        again_after: float = 5.0,
        again_beyond: float = 5.0,
    ) -> None:
        self.route = route
        self.time_limit = time_limit
        self.dt = dt
        self.arc = 0.0
        """m along the route at which the ego is."""
        self.offset = 0.0
        """m to the left of the route."""
        self.heading_error = 0.0
        self.time = 0.0
        self._again_after, self._again_beyond = again_after, again_beyond
        self._completion = 0.0
        self._standing = 0.0
        self._far = 0.0
        self._last: Scene | None = None
        self._struck: dict[Hashable, float] = {}
        self._struck_at: tuple[float, float] | None = None

    def start(self, scene: Scene) -> DrivingFrame:
        """The frame before the first step; anywhere on the route may be its beginning."""
        self.arc, self.offset, heading = self.route.locate(
            scene.x, scene.y, 0.0, 0.0, min(20.0, self.route.length)
        )
        self.heading_error = wrap(scene.heading - heading)
        self._completion = 100.0 * self.arc / self.route.length
        self._last = scene
        return self._frame(scene, scene, 0.0, 0.0, [], False)

    def update(self, scene: Scene) -> DrivingFrame:
        """The frame of the step that led to `scene`. Raises UsageError before `start`."""
        before = self._last
        if before is None:
            raise UsageError("a drive is updated before it was started; call start with its first scene.")
        self.time += self.dt
        moved = math.hypot(scene.x - before.x, scene.y - before.y)
        was = self.arc
        self.arc, self.offset, heading = self.route.locate(
            scene.x, scene.y, was, 5.0 + moved, 5.0 + 2 * moved
        )
        self.heading_error = wrap(scene.heading - heading)
        if abs(self.offset) > _FAR:
            self._far += moved
        finished = scene.arrived or self.arc >= self.route.length - _ARRIVED
        completion = 100.0 if finished else max(self._completion, 100.0 * self.arc / self.route.length)
        progress, self._completion = completion - self._completion, completion
        self._standing = self._standing + self.dt if abs(scene.speed) < _STANDING else 0.0
        frame = self._frame(
            scene, before, progress, self.arc - was, self._collisions(scene, before), finished
        )
        self._last = scene
        return frame

    def _collisions(self, scene: Scene, before: Scene) -> list[tuple[Actor, bool]]:
        """Those that count, each with whether it is the ego's fault."""
        struck = touched(scene) if scene.struck is None else scene.struck
        counted = []
        for actor in (a for a in scene.others if a.key in struck):
            last = self._struck.get(actor.key)
            self._struck[actor.key] = self.time  # renewed for as long as they touch
            again = last is not None and self.time - last <= self._again_after
            if again or abs(before.speed) < _STANDING:
                continue
            at = self._struck_at
            if at is not None and math.hypot(scene.x - at[0], scene.y - at[1]) <= self._again_beyond:
                continue
            counted.append((actor, _at_fault(scene, before, actor)))
        if counted:
            self._struck_at = (scene.x, scene.y)
        return counted

    def _frame(
        self,
        scene: Scene,
        before: Scene,
        progress: float,
        advance: float,
        collisions: list[tuple[Actor, bool]],
        finished: bool,
    ) -> DrivingFrame:
        if scene.acceleration is not None:
            lon, lat = scene.acceleration
        else:
            lon = (scene.speed - before.speed) / self.dt
            lat = scene.speed * wrap(scene.heading - before.heading) / self.dt
        speeds = [actor.speed for actor in scene.others if actor.kind == 0]
        kinds = {actor.kind for actor, _ in collisions}

        def number(value: float) -> Tensor:
            return torch.tensor([value], dtype=torch.float32)

        def flag(value: bool) -> Tensor:
            return torch.tensor([bool(value)])

        return DrivingFrame(
            x=number(scene.x),
            y=number(scene.y),
            heading=number(scene.heading),
            speed=number(scene.speed),
            acceleration_lon=number(lon),
            acceleration_lat=number(lat),
            steer=number(scene.steer),
            last_steer=number(before.steer),
            length=number(scene.length),
            width=number(scene.width),
            speed_limit=number(scene.speed_limit),
            lane_offset=number(abs(scene.lane_offset)),
            lane_width=number(scene.lane_width),
            in_junction=flag(scene.in_junction),
            route_offset=number(abs(self.offset)),
            heading_error=number(self.heading_error),
            outside_lanes=flag(scene.outside_lanes),
            off_road_share=number(scene.off_road_share),
            off_road_depth=number(scene.off_road_depth),
            multiple_lanes=flag(scene.multiple_lanes),
            completion=number(self._completion),
            progress=number(progress),
            advance=number(advance),
            route_length=number(self.route.length),
            finished=flag(finished),
            time=number(self.time),
            time_limit=number(self.time_limit),
            standing=number(self._standing),
            deviated=flag(abs(self.offset) > _TOO_FAR or self._far > _FAR_SHARE * self.route.length),
            light=torch.tensor([scene.light], dtype=torch.uint8),
            light_distance=number(scene.light_distance),
            stop_distance=number(scene.stop_distance),
            hit_pedestrian=flag(1 in kinds),
            hit_vehicle=flag(0 in kinds),
            hit_static=flag(2 in kinds),
            at_fault=flag(any(fault for _, fault in collisions)),
            ran_red_light=flag(scene.ran_red_light),
            ran_stop_sign=flag(scene.ran_stop_sign),
            others=boxes(scene.others),
            background_speed=number(float(np.mean(speeds)) if speeds else math.nan),
        )


def boxes(actors: Sequence[Actor]) -> Boxes:
    """The actors as tensors (N, 1), all of them valid."""

    def column(name: str) -> Tensor:
        return torch.tensor([[float(getattr(a, name))] for a in actors], dtype=torch.float32).reshape(-1, 1)

    return Boxes(
        **{name: column(name) for name in ("x", "y", "heading", "speed", "length", "width")},
        kind=torch.tensor([a.kind for a in actors], dtype=torch.uint8).reshape(-1, 1),
        valid=torch.ones(len(actors), 1, dtype=torch.bool),
    )


def box_points(x: float, y: float, heading: float, length: float, width: float) -> tuple[Floats, Floats]:
    """The corners (4, 2) of a box, front before rear and left before right, and 15 points of it (15, 2)."""
    forward, left = np.meshgrid(np.linspace(0.5, -0.5, 5), np.linspace(0.5, -0.5, 3), indexing="ij")
    along, aside = length * forward.ravel(), width * left.ravel()
    cos, sin = math.cos(heading), math.sin(heading)
    points: Floats = np.stack([x + along * cos - aside * sin, y + along * sin + aside * cos], -1)
    return points[[0, 2, 12, 14]], points


def wrap(angle: float) -> float:
    """The angle in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def touched(scene: Scene) -> frozenset[Hashable]:
    """Keys of the actors whose boxes overlap the ego's."""
    box = (scene.x, scene.y, scene.heading, scene.length, scene.width)
    return frozenset(actor.key for actor in scene.others if overlaps(*box, actor))


def overlaps(x: float, y: float, heading: float, length: float, width: float, actor: Actor) -> bool:
    """Whether a box with its centre at (x, y) touches the actor's."""
    if math.hypot(actor.x - x, actor.y - y) > 0.5 * (length + width + actor.length + actor.width):
        return False
    numbers = (actor.x - x, actor.y - y, heading, length, width)
    tensors = [
        torch.tensor(v, dtype=torch.float64) for v in (*numbers, actor.heading, actor.length, actor.width)
    ]
    return bool(boxes_overlap(*tensors))


def _at_fault(scene: Scene, before: Scene, actor: Actor) -> bool:
    """nuPlan's collision classes (nuplan-devkit, metrics/no_ego_at_fault_collisions), in their order."""
    if abs(before.speed) <= _STOPPED:
        return False
    if abs(actor.speed) <= _STOPPED:
        return True
    bearing = wrap(math.atan2(actor.y - scene.y, actor.x - scene.x) - scene.heading)
    if abs(bearing) > _BEHIND:
        return False
    forward = 0.5 * scene.length
    front = (scene.x + forward * math.cos(scene.heading), scene.y + forward * math.sin(scene.heading))
    if overlaps(*front, scene.heading, 0.0, scene.width, actor):
        return True
    return scene.multiple_lanes or scene.off_road_depth > 0


# --- judgement ----------------------------------------------------------------------------------------------

MODES = ("train", "eval")
_BLOCKED = 180.0  # s, CARLA's leaderboard
_COUNTED = 4  # of the costs are what "cost" counts, see `saferl.envs.driving.reward.COSTS`


@dataclass(frozen=True)
class Verdict:
    """What reward, costs and termination say of one step."""

    reward: float
    terminated: bool
    cost: float
    """Collision, red light, stop sign and off the road, as in RouteDriving."""
    costs: dict[str, float]


class Judge:
    """The shared reward, costs and scores on the frames of one drive.

    Args:
        reward: a name of `saferl.envs.driving.reward.REWARDS`, or an instance of such a class.
        mode: "train" ends a drive where the reward says so, "eval" only far off the route and after 180 s of
            standing, as CARLA's leaderboard.

    Raises UsageError for an unknown reward or mode.
    """

    def __init__(self, reward: Any = "carl", mode: str = "train") -> None:
        if mode not in MODES:
            raise unknown_name("mode", mode, MODES)
        if isinstance(reward, str):
            if reward not in REWARDS:
                raise unknown_name("reward", reward, REWARDS)
            reward = REWARDS[reward]()
        self.reward, self._mode = reward, mode
        self._score = DrivingScore()
        self._reward_state: dict[str, Tensor] = {}
        self._score_state: dict[str, Tensor] = {}

    @property
    def cost_names(self) -> tuple[str, ...]:
        return tuple(COSTS)

    def start(self) -> None:
        """Begin a drive."""
        self._reward_state = self.reward.initial(1, torch.device("cpu"))
        self._score_state = self._score.initial(1, torch.device("cpu"))

    @torch.no_grad()
    def step(self, frame: DrivingFrame) -> Verdict:
        """Judge the step that led to `frame`."""
        step = self.reward(frame, self._reward_state)
        self._reward_state = step.state
        ttc = time_to_collision(frame)
        self._score_state = self._score.update(frame, self._score_state, ttc)
        parts = costs(frame, step.state, ttc)
        terminated = step.terminated
        if self._mode == "eval":
            terminated = frame.deviated | (frame.standing >= _BLOCKED)
        named = {name: float(parts[name]) for name in COSTS}
        cost = sum(named[name] for name in COSTS[:_COUNTED])
        return Verdict(float(step.reward), bool(terminated), cost, named)

    def value_measurements(self, frame: DrivingFrame) -> NDArray[np.float32]:
        """What CaRL's critic is told beside the observation, (10,) float32."""
        values: Tensor = self.reward.value_measurements(frame, self._reward_state)
        return values[:, 0].numpy().astype(np.float32)

    def result(self, expert: float | None = None) -> dict[str, float]:
        """The scores of the drive so far, those of `saferl.envs.driving.score.DrivingScore.result`.

        `expert` is how far nuPlan's expert came along the route (m); None takes the way at the speed limit.
        """
        metres = None if expert is None else torch.tensor([expert])
        return {name: float(v) for name, v in self._score.result(self._score_state, metres).items()}


# --- what policies see --------------------------------------------------------------------------------------

PREVIEW: Floats = 4.0 * np.arange(1.0, 11.0)
"""m ahead of the ego at which the route is shown."""
NEAREST = 8
"""Actors that are shown, nearest first."""
_EGO, _ROUTE, _SIGNS, _ACTOR = 14, 2 * len(PREVIEW), 4, 10
OBSERVATION_SIZE = _EGO + _ROUTE + _SIGNS + NEAREST * _ACTOR
_METRES, _SPEED, _ACCELERATION, _REACH = 50.0, 20.0, 5.0, 100.0


def observe(frame: DrivingFrame, scene: Scene, monitor: Monitor) -> NDArray[np.float32]:
    """The vector (`OBSERVATION_SIZE`,) float32 that policies see, in the ego's frame (x ahead, y to the
    left).

    * ego, 14 numbers: speed and limit (by 20 m/s), longitudinal and lateral acceleration (by 5 m/s^2),
      steering action, offset from the lane's centre (by half its width, left positive), offset from the route
      (by 50 m, left positive), cosine and sine of the heading against the route, depth off the road (by 50
      m), in a junction, route done, time left, both as shares, and time stood (by 90 s).
    * route, 20: x and y (by 50 m) of the points 4, 8, .. 40 m ahead.
    * signs, 4: distance of the light's stop line (by 50 m, 1 where there is none), red, yellow, and distance
      of a stop sign's line.
    * the 8 nearest actors within 100 m, 10 each: present, x, y (by 50 m), cosine and sine of the relative
      heading, velocity relative to the ego's (x, y, by 20 m/s), length and width (by 10 m), and its kind
      (0 vehicle, 0.5 pedestrian, 1 static). Zeros where there are fewer.
    """
    cos, sin = math.cos(scene.heading), math.sin(scene.heading)
    out = np.zeros(OBSERVATION_SIZE, np.float32)
    out[:_EGO] = [
        scene.speed / _SPEED,
        scene.speed_limit / _SPEED,
        float(frame.acceleration_lon) / _ACCELERATION,
        float(frame.acceleration_lat) / _ACCELERATION,
        scene.steer,
        scene.lane_offset / (0.5 * scene.lane_width),
        monitor.offset / _METRES,
        math.cos(monitor.heading_error),
        math.sin(monitor.heading_error),
        scene.off_road_depth / _METRES,
        float(scene.in_junction),
        float(frame.completion) / 100.0,
        1.0 - monitor.time / monitor.time_limit,
        float(frame.standing) / 90.0,
    ]
    to = monitor.route.at(monitor.arc + PREVIEW) - np.array([scene.x, scene.y])
    ahead = np.stack([to[:, 0] * cos + to[:, 1] * sin, to[:, 1] * cos - to[:, 0] * sin], -1)
    out[_EGO : _EGO + _ROUTE] = ahead.ravel() / _METRES
    out[_EGO + _ROUTE : _EGO + _ROUTE + _SIGNS] = [
        min(scene.light_distance / _METRES, 1.0),
        scene.light == LightState.RED,
        scene.light == LightState.YELLOW,
        min(scene.stop_distance / _METRES, 1.0),
    ]
    near = [(math.hypot(a.x - scene.x, a.y - scene.y), i) for i, a in enumerate(scene.others)]
    place = _EGO + _ROUTE + _SIGNS
    for _, index in sorted(pair for pair in near if pair[0] <= _REACH)[:NEAREST]:
        actor = scene.others[index]
        dx, dy = actor.x - scene.x, actor.y - scene.y
        turn = actor.heading - scene.heading
        out[place : place + _ACTOR] = [
            1.0,
            (dx * cos + dy * sin) / _METRES,
            (dy * cos - dx * sin) / _METRES,
            math.cos(turn),
            math.sin(turn),
            (actor.speed * math.cos(turn) - scene.speed) / _SPEED,
            actor.speed * math.sin(turn) / _SPEED,
            actor.length / 10.0,
            actor.width / 10.0,
            actor.kind / 2.0,
        ]
        place += _ACTOR
    return out
