"""A stand-in for CARLA: the part of its Python API (0.9.16) that `saferl.envs.driving.carla` speaks.

One straight road along x, 300 m, a lane of 3.5 m each way (the one along x at y = +1.75, CARLA's y being to
the right) and 2 m of shoulder, a junction at x in [100, 120] with a traffic light before it, and whatever the
test spawns. The car is a point with a wheel; what it touches is told to its collision sensor.
"""

from __future__ import annotations

import enum
import fnmatch
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

LENGTH, JUNCTION, WIDTH, SHOULDER = 300.0, (100.0, 120.0), 3.5, 2.0


class Vector3D:
    def __init__(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> None:
        self.x, self.y, self.z = x, y, z


class Location(Vector3D):
    pass


class Rotation:
    def __init__(self, pitch: float = 0.0, yaw: float = 0.0, roll: float = 0.0) -> None:
        self.pitch, self.yaw, self.roll = pitch, yaw, roll


class Transform:
    def __init__(self, location: Location | None = None, rotation: Rotation | None = None) -> None:
        self.location, self.rotation = location or Location(), rotation or Rotation()


class BoundingBox:
    def __init__(self, location: Location, extent: Vector3D) -> None:
        self.location, self.extent = location, extent


class LaneType(enum.IntFlag):
    NONE, Driving, Shoulder, Parking, Bidirectional = 1, 2, 8, 256, 512


class LaneMarkingType(enum.Enum):
    NONE, Broken, Solid = 10, 1, 2


class TrafficLightState(enum.Enum):
    Red, Yellow, Green, Off = range(4)


class VehicleControl:
    def __init__(self, throttle: float = 0.0, steer: float = 0.0, brake: float = 0.0) -> None:
        self.throttle, self.steer, self.brake, self.gear = throttle, steer, brake, 1


class Waypoint:
    """Of the lane along x (lane_id -1) or the one back (1), or of a shoulder (-2, 2)."""

    def __init__(self, x: float, lane_id: int) -> None:
        side = 1 if lane_id < 0 else -1
        shoulder = abs(lane_id) == 2
        self.lane_id, self.lane_width = lane_id, SHOULDER if shoulder else WIDTH
        self.lane_type = LaneType.Shoulder if shoulder else LaneType.Driving
        y = side * (WIDTH + 0.5 * SHOULDER if shoulder else 0.5 * WIDTH)
        self.transform = Transform(Location(x, y), Rotation(yaw=0.0 if side > 0 else 180.0))
        self.is_junction = JUNCTION[0] <= x < JUNCTION[1]
        self.left_lane_marking = SimpleNamespace(type=LaneMarkingType.Broken)
        self.right_lane_marking = SimpleNamespace(type=LaneMarkingType.Solid)

    def next(self, distance: float) -> list[Waypoint]:
        x = self.transform.location.x + (distance if self.lane_id < 0 else -distance)
        return [Waypoint(x, self.lane_id)] if 0.0 <= x <= LENGTH else []

    def get_right_lane(self) -> Waypoint | None:
        if self.is_junction or abs(self.lane_id) == 2:
            return None
        return Waypoint(self.transform.location.x, 2 * self.lane_id)

    def get_junction(self) -> Any:
        middle = 0.5 * sum(JUNCTION)
        return SimpleNamespace(bounding_box=BoundingBox(Location(middle, 0.0), Vector3D(10.0, 10.0, 1.0)))


class Map:
    def get_waypoint(
        self, location: Location, project_to_road: bool = True, lane_type: int = LaneType.Driving
    ) -> Waypoint | None:
        ids: list[int] = [-1, 1] if lane_type & LaneType.Driving else []
        if lane_type & LaneType.Shoulder and not JUNCTION[0] <= location.x < JUNCTION[1]:
            ids += [-2, 2]
        x = min(max(location.x, 0.0), LENGTH)
        ways = [Waypoint(x, lane) for lane in ids]
        if not ways:
            return None
        # As CARLA does: the nearest centre line, even where a wider lane beside it holds the place.
        best = min(ways, key=lambda w: abs(w.transform.location.y - location.y))
        outside = abs(best.transform.location.y - location.y) > 0.5 * best.lane_width or x != location.x
        return None if outside and not project_to_road else best

    def generate_waypoints(self, distance: float) -> list[Waypoint]:
        count = int(LENGTH / distance)
        return [Waypoint(i * distance, lane) for lane in (-1, 1) for i in range(count)]

    def get_spawn_points(self) -> list[Transform]:
        return [Waypoint(x, -1).transform for x in (10.0, 40.0, 70.0, 140.0)]


class ActorList(list[Any]):
    def filter(self, pattern: str) -> ActorList:
        return ActorList(actor for actor in self if fnmatch.fnmatch(actor.type_id, pattern))


class Actor:
    def __init__(self, world: World, type_id: str, transform: Transform, extent: Vector3D) -> None:
        self.world, self.type_id, self.id = world, type_id, world.take_number()
        self.transform, self.bounding_box = transform, BoundingBox(Location(0, 0, 0.7), extent)
        self.speed, self.alive, self.autopilot = 0.0, True, False

    def get_transform(self) -> Transform:
        return self.transform

    def get_location(self) -> Location:
        return self.transform.location

    def get_velocity(self) -> Vector3D:
        yaw = math.radians(self.transform.rotation.yaw)
        return Vector3D(self.speed * math.cos(yaw), self.speed * math.sin(yaw))

    def move(self, dt: float) -> None:
        yaw = math.radians(self.transform.rotation.yaw)
        place = self.transform.location
        place.x += self.speed * math.cos(yaw) * dt
        place.y += self.speed * math.sin(yaw) * dt

    def destroy(self) -> bool:
        self.alive = False
        self.world.actors.remove(self)
        return True


class Vehicle(Actor):
    """The wheel turns the car on the spot's circle; full throttle is 3 m/s^2, full brake 8."""

    limit = 36.0  # km/h

    def __init__(self, world: World, type_id: str, transform: Transform) -> None:
        super().__init__(world, type_id, transform, Vector3D(2.45, 1.06, 0.75))
        self.control = VehicleControl()

    def apply_control(self, control: VehicleControl) -> None:
        self.control = control

    def get_control(self) -> VehicleControl:
        return SimpleNamespace(gear=1)  # type: ignore[return-value]

    def get_speed_limit(self) -> float:
        return self.limit

    def set_autopilot(self, enabled: bool = True, port: int = 8000) -> None:
        self.autopilot = enabled

    def move(self, dt: float) -> None:
        self.transform.rotation.yaw += math.degrees(
            self.speed * math.tan(0.6 * self.control.steer) / 2.9 * dt
        )
        super().move(dt)
        self.speed += (3.0 * self.control.throttle - 8.0 * self.control.brake) * dt
        if self.control.brake:
            self.speed = max(self.speed, 0.0)


class TrafficLight(Actor):
    def __init__(self, world: World, stops: Iterable[Waypoint]) -> None:
        super().__init__(world, "traffic.traffic_light", Transform(Location(125, 6)), Vector3D(0.2, 0.2, 2))
        self.state, self.stops = TrafficLightState.Green, list(stops)

    def get_stop_waypoints(self) -> list[Waypoint]:
        return self.stops


class StopSign(Actor):
    """Beside the road, its trigger volume (4 m by 3 m) in the lane."""

    def __init__(self, world: World, x: float) -> None:
        super().__init__(world, "traffic.stop", Transform(Location(x, 5.0)), Vector3D(0.1, 0.1, 1))
        self.trigger_volume = BoundingBox(Location(0.0, -3.25), Vector3D(2.0, 1.5, 1.0))


class CollisionSensor(Actor):
    def __init__(self, world: World, parent: Actor) -> None:
        super().__init__(world, "sensor.other.collision", parent.transform, Vector3D(0, 0, 0))
        self.parent, self.callback = parent, None

    def listen(self, callback: Callable[[Any], None]) -> None:
        self.callback = callback  # type: ignore[assignment]

    def stop(self) -> None:
        self.callback = None

    def look(self) -> None:
        """Axis-aligned boxes, which is what a straight road needs."""
        for other in list(self.world.actors):
            if other is self.parent or other.type_id.startswith(("sensor", "traffic")):
                continue
            a, b = self.parent.transform.location, other.transform.location
            e, f = self.parent.bounding_box.extent, other.bounding_box.extent
            if abs(a.x - b.x) <= e.x + f.x and abs(a.y - b.y) <= e.y + f.y:
                self.callback(SimpleNamespace(actor=self.parent, other_actor=other))  # type: ignore[misc]


class Library:
    def __init__(self) -> None:
        names = ("vehicle.lincoln.mkz_2017", "vehicle.small.car", "sensor.other.collision")
        attributes = {"number_of_wheels": "4"}
        self.entries = [SimpleNamespace(id=n, get_attribute=attributes.__getitem__) for n in names]

    def find(self, name: str) -> Any:
        for entry in self.entries:
            if entry.id == name:
                return entry
        raise IndexError(f"blueprint '{name}' not found")

    def filter(self, pattern: str) -> list[Any]:
        return [entry for entry in self.entries if fnmatch.fnmatch(entry.id, pattern)]


class World:
    def __init__(self, road: Any = None) -> None:
        self.road = road or Map()
        self.actors: list[Any] = []
        self.number, self.ticks = 0, 0
        self.settings = SimpleNamespace(synchronous_mode=False, fixed_delta_seconds=0.0)
        self.light = TrafficLight(self, [Waypoint(98.0, -1)])
        self.actors.append(self.light)

    def take_number(self) -> int:
        self.number += 1
        return self.number

    def get_map(self) -> Any:
        return self.road

    def get_settings(self) -> Any:
        return SimpleNamespace(**vars(self.settings))

    def apply_settings(self, settings: Any) -> int:
        self.settings = SimpleNamespace(**vars(settings))
        return 0

    def get_actors(self) -> ActorList:
        return ActorList(self.actors)

    def get_blueprint_library(self) -> Library:
        return Library()

    def spawn_actor(self, blueprint: Any, transform: Any, attach_to: Any = None) -> Any:
        place, turn = transform.location, transform.rotation
        transform = Transform(Location(place.x, place.y, place.z), Rotation(yaw=turn.yaw))
        made: Any
        if blueprint.id == "sensor.other.collision":
            made = CollisionSensor(self, attach_to)
        else:
            made = Vehicle(self, blueprint.id, transform)
        self.actors.append(made)
        return made

    def try_spawn_actor(self, blueprint: Any, transform: Any, attach_to: Any = None) -> Any:
        near = [a for a in self.actors if a.type_id.startswith("vehicle")
                and abs(a.transform.location.x - transform.location.x) < 5]  # fmt: skip
        return None if near else self.spawn_actor(blueprint, transform, attach_to)

    def add(self, kind: str, x: float, y: float, speed: float = 0.0, yaw: float = 0.0) -> Any:
        """Put a car ("vehicle"), a person ("walker") or a thing ("prop", "wall") on the road."""
        place = Transform(Location(x, y), Rotation(yaw=yaw))
        made: Any
        if kind == "vehicle":
            made = Vehicle(self, "vehicle.small.car", place)
        else:
            names = {"walker": "walker.pedestrian.0001", "prop": "static.prop.box", "wall": "static.building"}
            made = Actor(self, names[kind], place, Vector3D(0.3, 0.3, 0.9))
        made.speed = speed
        self.actors.append(made)
        return made

    def tick(self, seconds: float = 10.0) -> int:
        assert self.settings.synchronous_mode, "the world is not in synchronous mode"
        self.ticks += 1
        for actor in self.actors:
            if actor.type_id.startswith(("vehicle", "walker")):
                actor.move(self.settings.fixed_delta_seconds)
        for actor in list(self.actors):
            if isinstance(actor, CollisionSensor) and actor.callback is not None:
                actor.look()
        return self.ticks


class Client:
    def __init__(self, host: str = "localhost", port: int = 2000, world: World | None = None) -> None:
        self.world = world or World()
        self.manager = SimpleNamespace(synchronous=None, seed=None)
        self.manager.set_synchronous_mode = lambda on: setattr(self.manager, "synchronous", on)
        self.manager.set_random_device_seed = lambda seed: setattr(self.manager, "seed", seed)

    def set_timeout(self, seconds: float) -> None:
        if seconds <= 0:
            raise RuntimeError("time-out of 0ms while waiting for the simulator")

    def get_world(self) -> World:
        return self.world

    def load_world(self, town: str) -> World:
        return self.world

    def get_trafficmanager(self, port: int = 8000) -> Any:
        return self.manager


def module(**replaced: Any) -> SimpleNamespace:
    """What `import carla` would give, with some names replaced."""
    names = (
        *(Vector3D, Location, Rotation, Transform, BoundingBox, LaneType, LaneMarkingType),
        *(TrafficLightState, VehicleControl, Client),
    )
    return SimpleNamespace(**{cls.__name__: cls for cls in names} | replaced)
