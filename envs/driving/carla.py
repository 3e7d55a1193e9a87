"""CARLA under RouteDriving's rewards, costs and scores, through CARLA's own Python API.

`CarlaWorld` reads a running world into `Scene`s, from which come the same `DrivingFrame`s as everywhere else;
`CarlaDrivingEnv` makes a Gymnasium environment of it, in synchronous mode at 10 Hz; `CarlaView` paints CaRL's
picture from above out of the map's waypoints.

**Tested only against a stand-in of the API** (tests/envs/driving/carla_stub.py: a straight road with one
junction), the map's part also against the real `carla.Map` of the client 0.9.16 where that is installed;
never against a running simulator. Compare what it says with the leaderboard's criteria before reporting
scores.

CARLA's world is left-handed (y to the right, yaw clockwise in degrees). Here everything is turned into a
right-handed one once, at the border: y and yaw change their sign.

Source: the CARLA simulator's Python API; the criteria of scenario_runner (MIT); CaRL, arXiv 2504.17838.
"""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from saferl.envs.driving.adapter import (
    OBSERVATION_SIZE,
    Actor,
    Floats,
    Judge,
    Monitor,
    RoutePath,
    Scene,
    box_points,
    observe,
    overlaps,
    wrap,
)
from saferl.envs.driving.frame import NO_LIGHT, LightState
from saferl.errors import MissingPackageError, SaferlError, UsageError

__all__ = ["CarlaDrivingEnv", "CarlaView", "CarlaWorld", "trace_route"]

DT = 0.1
"""s a step."""
_INSTALL = "pip install carla==0.9.16"
_UNKNOWN_LIMIT = 6.0  # m/s, CaRL's, while CARLA has none
_OUTSIDE = 0.5  # m beyond the border of its lane at which a car is outside
_AGAINST = math.radians(120.0)
_SHOWN = 80.0  # m within which actors are read
_TAIL = 0.8  # the red-light test looks at a point this share of half the length behind the centre
_LINE = 0.6  # share of the lane's width to each side that a stop line reaches
_PASSED = -2.0  # m behind a line up to which it is still shown
_STANDING = 0.1


def load(name: str = "carla") -> Any:
    """Import CARLA's client. Raises MissingPackageError when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"CARLA's Python client is not installed ({error}); run: {_INSTALL} (it must be of the "
            "simulator's version, and the simulator itself is a separate download from its releases)"
        ) from error


def _place(location: Any) -> tuple[float, float]:
    return float(location.x), -float(location.y)


def _heading(transform: Any) -> float:
    return wrap(-math.radians(float(transform.rotation.yaw)))


def _shifted(transform: Any, offset: Any) -> tuple[float, float]:
    """Where a place given in a body's own coordinates is."""
    x, y, heading = *_place(transform.location), _heading(transform)
    ahead, left = float(offset.x), -float(offset.y)
    cos, sin = math.cos(heading), math.sin(heading)
    return x + ahead * cos - left * sin, y + ahead * sin + left * cos


def _actor(body: Any, kind: int) -> Actor:
    """The box of one of CARLA's actors."""
    transform, box, velocity = body.get_transform(), body.bounding_box, body.get_velocity()
    x, y = _shifted(transform, box.location)
    heading = _heading(transform)
    return Actor(
        key=body.id,
        x=x,
        y=y,
        heading=heading,
        speed=float(velocity.x) * math.cos(heading) - float(velocity.y) * math.sin(heading),
        # Walkers and props of some releases have boxes without extent.
        length=max(2.0 * float(box.extent.x), 0.3),
        width=max(2.0 * float(box.extent.y), 0.3),
        kind=kind,
    )


def trace_route(start: Any, length: float, generator: np.random.Generator) -> list[Any]:
    """Waypoints 1 m apart from `start` (a `carla.Waypoint`) on, turning at random where the road divides.

    Args:
        start: a waypoint of a driving lane.
        length: m.
        generator: draws the turns.

    Raises UsageError when the road ends before 10 m.
    """
    route = [start]
    while len(route) <= length:
        following = route[-1].next(1.0)
        if not following:
            break
        route.append(following[int(generator.integers(len(following))) if len(following) > 1 else 0])
    if len(route) < 10:
        raise UsageError("the road ends within 10 m of the route's start; start elsewhere")
    return route


@dataclass
class _Line:
    """A line across the road: a light's, or that of a stop sign."""

    key: Any
    x: float
    y: float
    heading: float
    width: float
    arcs: list[float]
    """m along the route at which it is crossed."""
    body: Any


class CarlaWorld:
    """Reads a world of CARLA, as seen by an ego on its route.

    The criteria follow CARLA's own (scenario_runner's atomic_criteria), with these differences: a car is held
    to be in a wrong lane where it heads more than 120 degrees away from its lane's direction outside
    junctions (CARLA remembers how the lane was entered); a red light is run when a point 0.8 half lengths
    behind the centre passes a light's stop line while it is red; a stop sign is served by standing while the
    ego's box overlaps the sign's trigger volume, and run when the box has passed its centre.

    Collisions come from CARLA's sensor, whose events arrive with the tick or the one after. Accelerations are
    differences of speed and heading: those that CARLA reports were found unreliable (CaRL 1.1). Places are
    looked up at the ego's height, so that roads above and below it stay out.

    Args:
        client: the module `carla`.
        world: a `carla.World` in synchronous mode.
        ego: the ego's `carla.Vehicle`.
        route: what the drive is along.
    """

    def __init__(self, client: Any, world: Any, ego: Any, route: RoutePath) -> None:
        self.carla, self.world, self.ego, self.route = client, world, ego, route
        self.map = world.get_map()
        lanes = client.LaneType
        self._driving = lanes.Driving
        self._paved = (lanes.Driving, lanes.Bidirectional, lanes.Parking)
        self._ground = (*self._paved, lanes.Shoulder)
        self._height = float(ego.get_transform().location.z)
        self._events: deque[Any] = deque()
        self._sensor: Any = None
        self._before: tuple[float, float] | None = None
        self._last_light: Any = None
        self._served: set[Any] = set()
        self._approached: set[Any] = set()
        actors = world.get_actors()
        self.lights = [
            line for light in actors.filter("traffic.traffic_light*") for line in self._lines(light)
        ]
        self.signs = [line for sign in actors.filter("traffic.stop*") for line in self._sign_line(sign)]

    # --- what stands beside the road ------------------------------------------------------------------------

    def _lines(self, light: Any) -> Iterable[_Line]:
        """The stop lines of a light, one a lane."""
        for waypoint in light.get_stop_waypoints():
            x, y = _place(waypoint.transform.location)
            heading, width = _heading(waypoint.transform), float(waypoint.lane_width)
            arcs = self.route.passes(x, y, heading, 0.5 * width)
            yield _Line((light.id, x, y), x, y, heading, width, arcs, light)

    def _sign_line(self, sign: Any) -> Iterable[_Line]:
        """Where a stop sign's trigger volume is."""
        transform, volume = sign.get_transform(), sign.trigger_volume
        x, y = _shifted(transform, volume.location)
        waypoint = self._at(x, y, self._driving, nearest=True)
        heading, width = _heading(waypoint.transform), float(waypoint.lane_width)
        yield _Line(sign.id, x, y, heading, width, self.route.passes(x, y, heading, 0.5 * width), sign)

    def watch_collisions(self) -> None:
        """Attach a collision sensor to the ego; `close` takes it away."""
        blueprint = self.world.get_blueprint_library().find("sensor.other.collision")
        self._sensor = self.world.spawn_actor(blueprint, self.carla.Transform(), attach_to=self.ego)
        self._sensor.listen(self._events.append)

    def close(self) -> None:
        """Take the collision sensor away."""
        if self._sensor is not None:
            self._sensor.stop()
            self._sensor.destroy()
            self._sensor = None

    # --- a moment -------------------------------------------------------------------------------------------

    def look(self, steer: float, arc: float) -> Scene:
        """The scene after a tick.

        Args:
            steer: the steering action that led to it.
            arc: m along the route at which the ego is known to be, or was a step before.
        """
        me = _actor(self.ego, 0)
        self._height = float(self.ego.get_transform().location.z)
        corners, points = box_points(me.x, me.y, me.heading, me.length, me.width)
        waypoint = self.lane_at(me.x, me.y)
        lane_heading, width = _heading(waypoint.transform), float(waypoint.lane_width)
        offset = _aside(waypoint, me.x, me.y)
        junction = bool(waypoint.is_junction)
        here = self.route.locate(me.x, me.y, arc, 15.0, 25.0)
        if junction:
            # Lanes cross here; the one meant is that of the route.
            offset = min(offset, here[1], key=abs)
        gap = math.hypot(
            *(a - b for a, b in zip((me.x, me.y), _place(waypoint.transform.location), strict=True))
        )
        against = abs(wrap(me.heading - lane_heading)) > _AGAINST and not junction
        limit = float(self.ego.get_speed_limit() or 0.0) / 3.6
        others = [*self._others(me), *self._scenery(me)]
        light, light_distance, ran_red = self._traffic_light(me, here[0])
        stop_distance, ran_stop = self._stop_sign(me, here[0])
        self._before = _tail(me)
        return Scene(
            x=me.x,
            y=me.y,
            heading=me.heading,
            speed=me.speed,
            length=me.length,
            width=me.width,
            speed_limit=limit if limit > 0 else _UNKNOWN_LIMIT,
            lane_offset=offset,
            lane_width=width,
            in_junction=junction,
            outside_lanes=gap > 0.5 * width + _OUTSIDE or against,
            off_road_share=float(np.mean([not self._on_ground(x, y, junction) for x, y in points])),
            off_road_depth=max(self._depth(x, y) for x, y in corners),
            multiple_lanes=junction or any(self._other_lane(waypoint, x, y) for x, y in corners),
            steer=steer,
            light=light,
            light_distance=light_distance,
            stop_distance=stop_distance,
            ran_red_light=ran_red,
            ran_stop_sign=ran_stop,
            others=others,
            struck=self._collisions(),
        )

    def _at(self, x: float, y: float, lanes: Any, *, nearest: bool) -> Any:
        """The waypoint of a place on one type of lane, or the nearest one; None where there is none.

        One type at a time: of several, CARLA takes the nearest centre line, even where a wider lane beside it
        holds the place.
        """
        return self.map.get_waypoint(self.carla.Location(x=x, y=-y, z=self._height), nearest, lanes)

    def lane_at(self, x: float, y: float) -> Any:
        """That of the lane which holds a place, driving lanes first, or of the nearest driving lane."""
        holding = (self._at(x, y, kind, nearest=False) for kind in self._paved)
        found = next((w for w in holding if w is not None), None) or self._at(
            x, y, self._driving, nearest=True
        )
        if found is None:
            raise SaferlError(f"the map has no lane near x = {x:.1f}, y = {-y:.1f}; is the ego in the world?")
        return found

    def _on_ground(self, x: float, y: float, junction: bool) -> bool:
        """Whether a place is on the road, its shoulder or a parking lane."""
        if any(self._at(x, y, kind, nearest=False) is not None for kind in self._ground):
            return True
        if not junction:
            return False
        # Between the lanes that cross a junction there is road, too.
        near = self.lane_at(x, y)
        if not near.is_junction:
            return False
        box = near.get_junction().bounding_box
        inside = abs(x - box.location.x) <= box.extent.x and abs(-y - box.location.y) <= box.extent.y
        return bool(inside)

    def _depth(self, x: float, y: float) -> float:
        """m outside the nearest lane, negative inside."""
        waypoint = self.lane_at(x, y)
        place = _place(waypoint.transform.location)
        return math.hypot(x - place[0], y - place[1]) - 0.5 * float(waypoint.lane_width)

    def _other_lane(self, own: Any, x: float, y: float) -> bool:
        if abs(_aside(own, x, y)) <= 0.5 * float(own.lane_width):
            return False
        return self._at(x, y, self._driving, nearest=False) is not None

    def _others(self, me: Actor) -> Iterable[Actor]:
        actors = self.world.get_actors()
        for pattern, kind in (("vehicle.*", 0), ("walker.*", 1), ("static.prop.*", 2)):
            for body in actors.filter(pattern):
                if body.id == self.ego.id or (kind == 1 and "controller" in body.type_id):
                    continue
                actor = _actor(body, kind)
                if math.hypot(actor.x - me.x, actor.y - me.y) <= _SHOWN:
                    yield actor

    def _scenery(self, me: Actor) -> Iterable[Actor]:
        """Walls, poles and signs exist for us only when they are hit: small boxes at the bumper."""
        for event in self._events:
            kind = event.other_actor.type_id
            if not kind.startswith(("vehicle.", "walker.", "static.prop.")):
                reach = 0.5 * me.length
                x, y = me.x + reach * math.cos(me.heading), me.y + reach * math.sin(me.heading)
                yield Actor(event.other_actor.id, x, y, me.heading, 0.0, 0.3, 0.3, 2)

    def _collisions(self) -> frozenset[Any]:
        keys = set()
        while self._events:
            keys.add(self._events.popleft().other_actor.id)
        return frozenset(keys)

    def _traffic_light(self, me: Actor, arc: float) -> tuple[int, float, bool]:
        """State and distance of the route's next light, and whether a red one was run."""
        states = self.carla.TrafficLightState
        numbers = {
            states.Green: LightState.GREEN,
            states.Yellow: LightState.YELLOW,
            states.Red: LightState.RED,
        }
        front = arc + 0.5 * me.length
        ahead = [(a - front, line) for line in self.lights for a in line.arcs if a - front > _PASSED]
        state, distance = LightState.NONE, NO_LIGHT
        if ahead:
            distance, line = min(ahead, key=lambda pair: pair[0])
            state = numbers.get(line.body.state, LightState.NONE)
            distance = distance if state != LightState.NONE else NO_LIGHT
        ran = False
        for line in self.lights:
            if (
                line.body.state != states.Red
                or not self._crossed(line, me)
                or self._last_light == line.body.id
            ):
                continue
            ran, self._last_light = True, line.body.id
        return state, distance, ran

    def _crossed(self, line: _Line, me: Actor) -> bool:
        """Whether the point behind the centre passed a line in this step, in its direction."""
        if self._before is None or math.cos(me.heading - line.heading) <= 0:
            return False
        cos, sin = math.cos(line.heading), math.sin(line.heading)
        now = _tail(me)
        past, was = (cos * (x - line.x) + sin * (y - line.y) for x, y in (now, self._before))
        aside = cos * (now[1] - line.y) - sin * (now[0] - line.x)
        return was < 0 <= past and abs(aside) <= _LINE * line.width

    def _stop_sign(self, me: Actor, arc: float) -> tuple[float, bool]:
        """Distance of the next stop sign's line that was not served, and whether one was run."""
        distance, ran = NO_LIGHT, False
        for sign in self.signs:
            for at in sign.arcs:
                key, gap = (sign.key, at), at - arc - 0.5 * me.length
                if gap > _SHOWN or key in self._served:
                    continue
                if gap > -me.length:
                    self._approached.add(key)
                extent = sign.body.trigger_volume.extent
                volume = Actor(
                    key, sign.x, sign.y, sign.heading, 0.0, max(2 * extent.x, 1.0), max(2 * extent.y, 1.0)
                )
                if abs(me.speed) < _STANDING and overlaps(
                    me.x, me.y, me.heading, me.length, me.width, volume
                ):
                    self._served.add(key)
                elif gap < -me.length:
                    self._served.add(key)
                    ran = ran or key in self._approached
                else:
                    distance = min(distance, max(gap, 0.0))
        return distance, ran

    def pending_signs(self) -> list[_Line]:
        """Stop signs of the route that are still to be served."""
        return [s for s in self.signs if any((s.key, at) not in self._served for at in s.arcs)]


def _aside(waypoint: Any, x: float, y: float) -> float:
    """m to the left of a waypoint's lane."""
    place, heading = _place(waypoint.transform.location), _heading(waypoint.transform)
    return math.cos(heading) * (y - place[1]) - math.sin(heading) * (x - place[0])


def _tail(me: Actor) -> tuple[float, float]:
    back = _TAIL * 0.5 * me.length
    return me.x - back * math.cos(me.heading), me.y - back * math.sin(me.heading)


# --- the picture from above ---------------------------------------------------------------------------------


class CarlaView:
    """CaRL's picture (10, size, size) uint8 out of the map's waypoints, the ego's heading up.

    Channels and codes are `saferl.envs.driving.observe.CHANNELS`; at 256 pixels and 2 a metre it shows 78 m
    ahead, 50 m behind and 64 m to each side. Drawn are driving lanes, lane markings, shoulders, the route
    within junctions, actors with their lines ahead, the stop lines of lights on the route, and the trigger
    boxes of stop signs not yet served. Parking lanes, speed-limit signs, blinkers, brake lights and doors are
    not; nor is the last of yellow told from the first.

    Args:
        world: what to draw.
        size: pixels a side.
        per_metre: pixels a metre.
    """

    _STEP = 2.0  # m between the waypoints that are drawn

    def __init__(self, world: CarlaWorld, *, size: int = 256, per_metre: float = 2.0) -> None:
        self._world, self.size, self.per_metre = world, size, per_metre
        names = world.carla.LaneType
        marks = world.carla.LaneMarkingType
        ways = world.map.generate_waypoints(self._STEP)
        rows, shoulders = [], []
        for way in ways:
            rows.append([*_place(way.transform.location), _heading(way.transform), float(way.lane_width),
                         float(way.is_junction), *(_mark(m, marks) for m in
                         (way.left_lane_marking, way.right_lane_marking))])  # fmt: skip
            beside = way.get_right_lane()
            if beside is not None and beside.lane_type == names.Shoulder:
                shoulders.append([*_place(beside.transform.location), _heading(beside.transform),
                                  float(beside.lane_width)])  # fmt: skip
        self._lanes = np.array(rows).reshape(-1, 7)
        self._shoulders = np.array(shoulders).reshape(-1, 4)
        points = world.route.at(np.arange(0.0, world.route.length, 1.0))
        crossing = [world.lane_at(float(x), float(y)).is_junction for x, y in points]
        self._route = points
        self._crossing = np.array(crossing, bool)

    def paint(self, scene: Scene, arc: float) -> NDArray[np.uint8]:
        """The picture of a scene whose ego is `arc` m along the route."""
        import torch
        from PIL import Image, ImageDraw

        from saferl.envs.driving.observe import CHANNELS, speed_code

        pictures = [Image.new("L", (self.size, self.size), 0) for _ in CHANNELS]
        draws = [ImageDraw.Draw(picture) for picture in pictures]
        draw = dict(zip(CHANNELS, draws, strict=True))
        reach = self.size / self.per_metre
        for lane in self._near(self._lanes, scene, reach):
            x, y, heading, width, _, left, right = lane.tolist()
            draw["road"].polygon(self._box(scene, x, y, heading, self._STEP + 0.5, width), fill=255)
            for side, grey in ((0.5 * width, left), (-0.5 * width, right)):
                if grey:
                    sx, sy = x - side * math.sin(heading), y + side * math.cos(heading)
                    ends = [(sx + s * math.cos(heading), sy + s * math.sin(heading)) for s in (-1.0, 1.0)]
                    draw["marking"].line([self._pixel(scene, *end) for end in ends], fill=int(grey), width=1)
        for x, y, heading, width in self._near(self._shoulders, scene, reach).tolist():
            draw["shoulder"].polygon(self._box(scene, x, y, heading, self._STEP + 0.5, width), fill=255)
        first = int(arc)
        for (x, y), crossing in zip(
            self._route[first : first + 150], self._crossing[first : first + 150], strict=True
        ):
            if crossing:
                column, row = self._pixel(scene, x, y)
                radius = 1.5 * self.per_metre
                draw["route"].ellipse(
                    [column - radius, row - radius, column + radius, row + radius], fill=255
                )
        for actor in scene.others:
            name = ("vehicles", "pedestrians", "static")[actor.kind]
            grey = 255 if actor.kind == 2 else int(speed_code(torch.tensor(actor.speed)))
            size = max(actor.length, 1.6), max(actor.width, 1.6)
            draw[name].polygon(self._box(scene, actor.x, actor.y, actor.heading, *size), fill=grey)
            if actor.kind < 2:
                ahead = 0.5 * actor.length + max(0.5, actor.speed)
                tip = actor.x + ahead * math.cos(actor.heading), actor.y + ahead * math.sin(actor.heading)
                draw[name].line([self._pixel(scene, actor.x, actor.y), self._pixel(scene, *tip)], fill=grey)
        states = self._world.carla.TrafficLightState
        greys = {states.Green: 80, states.Yellow: 170, states.Red: 255}
        for line in self._world.lights:
            if line.arcs and line.body.state in greys:
                half = 0.5 * line.width
                ends = [(line.x - s * math.sin(line.heading), line.y + s * math.cos(line.heading))
                        for s in (-half, half)]  # fmt: skip
                draw["lights"].line(
                    [self._pixel(scene, *end) for end in ends], fill=greys[line.body.state], width=3
                )
        for sign in self._world.pending_signs():
            extent = sign.body.trigger_volume.extent
            corners = self._box(scene, sign.x, sign.y, sign.heading, 2 * extent.x, 2 * extent.y)
            draw["stop_signs"].polygon(corners, fill=255)
        return np.stack([np.asarray(picture, np.uint8) for picture in pictures])

    def _near(self, rows: Floats, scene: Scene, reach: float) -> Floats:
        near: Floats = rows[np.hypot(rows[:, 0] - scene.x, rows[:, 1] - scene.y) < reach]
        return near

    def _pixel(self, scene: Scene, x: float, y: float) -> tuple[float, float]:
        """(column, row)."""
        dx, dy = x - scene.x, y - scene.y
        cos, sin = math.cos(scene.heading), math.sin(scene.heading)
        behind = round(100 / 256 * self.size)
        forward, left = dx * cos + dy * sin, dy * cos - dx * sin
        return 0.5 * self.size - left * self.per_metre, self.size - behind - forward * self.per_metre

    def _box(
        self, scene: Scene, x: float, y: float, heading: float, length: float, width: float
    ) -> list[tuple[float, float]]:
        corners, _ = box_points(x, y, heading, length, width)
        a, b, c, d = (self._pixel(scene, *corner) for corner in corners)
        return [a, b, d, c]


def _mark(marking: Any, kinds: Any) -> float:
    """Grey of a lane marking: 0 none, 127 broken, 255 any other."""
    if marking is None or marking.type == kinds.NONE:
        return 0.0
    return 127.0 if marking.type == kinds.Broken else 255.0


# --- the environment ----------------------------------------------------------------------------------------


class CarlaDrivingEnv(gym.Env[Any, NDArray[np.float32]]):
    """Route driving in a running CARLA server: synchronous, 10 Hz, CaRL's action.

    **Tested only against a stand-in of the API**, see the module.

    * Observation: `saferl.envs.driving.adapter.observe`'s vector, float32; with `view` what RouteDriving
      gives with observation="bev" and privileged=True, so that one policy drives both: a dict of "bev" (10,
      256, 256) uint8 (`CarlaView`), "measurements" (8,) (CaRL's: last steering, throttle, brake, gear,
      velocity along x and y of the ego, forward speed, speed limit) and "value_measurements" (10,), for the
      critic alone.
    * Action: **(steer, acceleration)** in [-1, 1], CaRL's order in CARLA, the other way round than in
      RouteDriving and nuPlan. Steering is CARLA's, positive to the right; acceleration is throttle where
      positive, else brake.
    * Reward, termination and costs: those of the shared rewards. `info` holds "completion" (%), "speed",
      "cost", "costs", and in an episode's last step the scores (`Judge.result`).
    * Truncation: when the route is done, and at the time limit (CARLA's: 300 s and ten times what the speed
      limit allows, at most 1200 s).

    Args:
        host, port: of the server.
        town: a map to load, e.g. "Town01"; None takes the one that is loaded.
        route: (n, 2) CARLA coordinates (x, y) in m, dense (as the leaderboard's interpolated routes); None
            draws one of `route_length` m from a random spawn point.
        route_length: m.
        vehicle: the ego's blueprint.
        traffic: number of cars that CARLA's traffic manager drives.
        reward: a name of `saferl.envs.driving.reward.REWARDS`.
        mode: "train" ends a drive where the reward says so; "eval" goes on after infractions (see `Judge`).
        view: whether to paint the picture from above.
        populate: called with (world, ego, generator) once the ego stands; returns actors that are destroyed
            with the episode: scenarios and walkers go here.
        timeout: s to wait for the server.
        client: a connected `carla.Client` in place of host and port.
        module: the module to use as `carla`; None imports it.

    Raises MissingPackageError without CARLA's client, and SaferlError when no server answers, here or later.
    """

    metadata: dict[str, Any] = {"render_modes": [], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        *,
        host: str = "localhost",
        port: int = 2000,
        town: str | None = None,
        route: Sequence[Sequence[float]] | Floats | None = None,
        route_length: float = 1000.0,
        vehicle: str = "vehicle.lincoln.mkz_2017",
        traffic: int = 0,
        traffic_port: int = 8000,
        reward: str = "carl",
        mode: str = "train",
        view: bool = False,
        populate: Callable[[Any, Any, np.random.Generator], Iterable[Any]] | None = None,
        timeout: float = 60.0,
        client: Any = None,
        module: Any = None,
    ) -> None:
        self._carla = load() if module is None else module
        if not route_length >= 10:
            raise UsageError(f"route_length is {route_length}; give at least 10 m")
        if traffic < 0:
            raise UsageError(f"traffic is {traffic}; give the number of cars, 0 for none")
        self._given = None
        if route is not None:
            given = np.asarray(route, np.float64)
            self._given = given * np.array([1.0, -1.0]) if given.ndim == 2 and given.shape[1] == 2 else given
            RoutePath(self._given)  # says what is wrong with it
        self._length, self._blueprint = route_length, vehicle
        self._traffic, self._traffic_port, self._populate = traffic, traffic_port, populate
        self._judge = Judge(reward, mode)
        self.metadata = {**type(self).metadata, "cost_names": self._judge.cost_names}
        self.observation_space: spaces.Space[Any] = spaces.Box(
            -np.inf, np.inf, (OBSERVATION_SIZE,), np.float32
        )
        if view:
            self.observation_space = spaces.Dict(
                {
                    "bev": spaces.Box(0, 255, (10, 256, 256), np.uint8),
                    "measurements": spaces.Box(-np.inf, np.inf, (8,), np.float32),
                    "value_measurements": spaces.Box(-np.inf, np.inf, (10,), np.float32),
                }
            )
        self._wants_view = view
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._actors: list[Any] = []
        self._reader: CarlaWorld | None = None
        try:
            self._client = client if client is not None else self._carla.Client(host, port)
            self._client.set_timeout(timeout)
            self._world = self._client.load_world(town) if town is not None else self._client.get_world()
        except RuntimeError as error:
            raise SaferlError(
                f"no CARLA server answered at {host}:{port} ({error}); start the simulator first"
            ) from error
        self._settings = self._world.get_settings()
        settings = self._world.get_settings()
        settings.synchronous_mode, settings.fixed_delta_seconds = True, DT
        self._world.apply_settings(settings)
        self._manager = self._client.get_trafficmanager(traffic_port) if traffic else None
        if self._manager is not None:
            self._manager.set_synchronous_mode(True)

    # --- episodes -------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start a new episode: a new ego at the start of a route, two seconds of standing. No options."""
        super().reset(seed=seed)
        self._clear()
        world, carla = self._world, self._carla
        town = world.get_map()
        if self._given is not None:
            points = self._given
            x, y = points[0]
            start = town.get_waypoint(carla.Location(x=float(x), y=-float(y), z=0.0))
        else:
            spawns = town.get_spawn_points()
            if not spawns:
                raise SaferlError("the map has no spawn points; give the environment a route")
            spawn = spawns[int(self.np_random.integers(len(spawns)))]
            start = town.get_waypoint(spawn.location)
            ways = trace_route(start, self._length, self.np_random)
            points = np.array([_place(way.transform.location) for way in ways])
        self._route = RoutePath(points)
        self._ego = self._spawn(self._blueprint, start.transform)
        if self._manager is not None:
            self._manager.set_random_device_seed(int(self.np_random.integers(2**31)))
            self._spawn_traffic(town)
        reader = CarlaWorld(carla, world, self._ego, self._route)
        self._reader = reader
        reader.watch_collisions()
        if self._populate is not None:
            self._actors += list(self._populate(world, self._ego, self.np_random))
        for _ in range(20):
            self._drive(0.0, -1.0)
        self._view = CarlaView(reader) if self._wants_view else None
        limit = float(self._ego.get_speed_limit() or 0.0) / 3.6 or _UNKNOWN_LIMIT
        time_limit = min(300.0 + self._route.length / (0.1 * limit), 1200.0)
        self._monitor = Monitor(self._route, time_limit=time_limit, dt=DT)
        scene = reader.look(0.0, 0.0)
        frame = self._monitor.start(scene)
        self._judge.start()
        self._action = (0.0, 0.0)
        return self._see(frame, scene), {"completion": float(frame.completion)}

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Drive 0.1 s with `action` (2,): (steer, acceleration). Raises UsageError before `reset`."""
        reader = self._reader
        if reader is None:
            raise UsageError("the environment is stepped before it was reset; call reset first")
        given = np.asarray(action, np.float64)
        if given.shape != (2,) or not np.isfinite(given).all():
            raise UsageError(f"the action has shape {given.shape}; give 2 finite numbers")
        steer, acceleration = (float(v) for v in np.clip(given, -1.0, 1.0))
        self._drive(steer, acceleration)
        self._action = (steer, acceleration)
        scene = reader.look(steer, self._monitor.arc)
        frame = self._monitor.update(scene)
        verdict = self._judge.step(frame)
        late = self._monitor.time > self._monitor.time_limit - 0.5 * DT
        truncated = not verdict.terminated and (bool(frame.finished) or late)
        info: dict[str, Any] = {
            "completion": float(frame.completion),
            "speed": scene.speed,
            "cost": verdict.cost,
            "costs": verdict.costs,
        }
        if verdict.terminated or truncated:
            info |= self._judge.result()
        return self._see(frame, scene), verdict.reward, verdict.terminated, truncated, info

    def close(self) -> None:
        """Destroy this environment's actors and give the world its settings back."""
        self._clear()
        if self._manager is not None:
            self._manager.set_synchronous_mode(False)
        self._world.apply_settings(self._settings)

    def _see(self, frame: Any, scene: Scene) -> Any:
        if self._view is None:
            return observe(frame, scene, self._monitor)
        steer, acceleration = self._action
        velocity = self._ego.get_velocity()
        cos, sin = math.cos(scene.heading), math.sin(scene.heading)
        vx, vy = float(velocity.x), -float(velocity.y)
        gear = float(self._ego.get_control().gear)
        along, aside = vx * cos + vy * sin, vy * cos - vx * sin
        values = [steer, max(acceleration, 0.0), max(-acceleration, 0.0), gear, along, aside, along]
        return {
            "bev": self._view.paint(scene, self._monitor.arc),
            "measurements": np.array([*values, scene.speed_limit], np.float32),
            "value_measurements": self._judge.value_measurements(frame),
        }

    def _drive(self, steer: float, acceleration: float) -> None:
        control = self._carla.VehicleControl(
            throttle=max(acceleration, 0.0), steer=steer, brake=max(-acceleration, 0.0)
        )
        self._ego.apply_control(control)
        try:
            self._world.tick()
        except RuntimeError as error:
            raise SaferlError(
                f"the CARLA server does not answer any more ({error}); restart it and resume the run"
            ) from error

    def _spawn(self, name: str, transform: Any) -> Any:
        carla = self._carla
        try:
            blueprint = self._world.get_blueprint_library().find(name)
        except (IndexError, RuntimeError) as error:
            raise UsageError(f"this CARLA has no blueprint {name!r}; name another with vehicle=") from error
        place = transform.location
        raised = carla.Transform(carla.Location(x=place.x, y=place.y, z=place.z + 0.5), transform.rotation)
        body = self._world.try_spawn_actor(blueprint, raised)
        if body is None:
            raise SaferlError(f"the ego cannot be set at x = {place.x:.1f}, y = {place.y:.1f}: it is taken")
        self._actors.append(body)
        return body

    def _spawn_traffic(self, town: Any) -> None:
        """Cars at random spawn points, as many as find room."""
        cars = [b for b in self._world.get_blueprint_library().filter("vehicle.*")
                if int(b.get_attribute("number_of_wheels")) == 4]  # fmt: skip
        spawns, left = list(town.get_spawn_points()), self._traffic
        for index in self.np_random.permutation(len(spawns)):
            if not left:
                break
            blueprint = cars[int(self.np_random.integers(len(cars)))]
            body = self._world.try_spawn_actor(blueprint, spawns[int(index)])
            if body is not None:
                body.set_autopilot(True, self._traffic_port)
                self._actors.append(body)
                left -= 1

    def _clear(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        for actor in self._actors:
            actor.destroy()
        self._actors = []
