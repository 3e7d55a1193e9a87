"""CARLA's adapter against a stand-in of its API; the map's part also against the real client, where it is."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from saferl.envs.driving.adapter import OBSERVATION_SIZE, RoutePath
from saferl.envs.driving.carla import CarlaDrivingEnv, CarlaView, CarlaWorld, trace_route
from saferl.envs.driving.frame import NO_LIGHT, LightState
from saferl.envs.driving.observe import speed_code
from saferl.errors import MissingPackageError, SaferlError, UsageError


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


stub = _load("carla_stub")
#: The lane along x lies at y = +1.75 in CARLA, so at -1.75 here.
LANE = -1.75
ROUTE = [[float(x), 1.75] for x in range(10, 291)]


def make(world: Any = None, **given: Any) -> CarlaDrivingEnv:
    client = stub.Client(world=world)
    return CarlaDrivingEnv(**({"client": client, "module": stub.module(), "route": ROUTE} | given))


def world_of(env: CarlaDrivingEnv) -> Any:
    return env._world


GO = np.array([0.0, 0.5], np.float32)
#: What the map tells of a place.
SEEN = (
    *("speed_limit", "lane_offset", "lane_width", "in_junction", "outside_lanes", "multiple_lanes"),
    *("off_road_depth", "off_road_share"),
)
Driven = tuple[list[float], list[dict[str, Any]], bool, bool]
"""Rewards, infos, terminated, truncated."""


def drive(env: CarlaDrivingEnv, steps: int, action: Any = GO) -> Driven:
    """Up to some steps of one action."""
    rewards, infos = [], []
    terminated = truncated = False
    for _ in range(steps):
        _, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        infos.append(info)
        if terminated or truncated:
            break
    return rewards, infos, terminated, truncated


def cruise(env: CarlaDrivingEnv, speed: float, until: float) -> Driven:
    """Keep a speed until a place (m along x), or the end."""
    rewards, infos = [], []
    terminated = truncated = False
    while env._ego.transform.location.x < until and not (terminated or truncated):
        pedal = np.clip((speed - env._ego.speed) / (0.3 if env._ego.speed < speed else 0.8), -1, 1)
        _, reward, terminated, truncated, info = env.step(np.array([0.0, pedal], np.float32))
        rewards.append(reward)
        infos.append(info)
        assert len(infos) < 2000
    return rewards, infos, terminated, truncated


# --- without a world ----------------------------------------------------------------------------------------


def test_what_is_missing_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name == "carla":
            raise ModuleNotFoundError("No module named 'carla'", name="carla")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingPackageError, match=r"run: pip install carla==0\.9\.16.*simulator itself"):
        CarlaDrivingEnv()


def test_a_server_that_does_not_answer() -> None:
    with pytest.raises(SaferlError, match=r"no CARLA server answered at localhost:2000"):
        CarlaDrivingEnv(module=stub.module(), timeout=0.0)


def test_a_server_that_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make()
    env.reset(seed=0)

    def silent(seconds: float = 10.0) -> int:
        raise RuntimeError("time-out of 10000ms while waiting for the simulator")

    monkeypatch.setattr(world_of(env), "tick", silent)
    with pytest.raises(SaferlError, match="does not answer any more"):
        env.step(GO)


def test_impossible_arguments() -> None:
    for given, said in (
        ({"route": [[0.0, 0.0]]}, "route"),
        ({"route": [[0.0, 0.0, 0.0]] * 3}, "route"),
        ({"route": None, "route_length": 5.0}, "route_length is 5"),
        ({"traffic": -1}, "traffic is -1"),
        ({"reward": "carll"}, "did you mean 'carl'"),
        ({"mode": "test"}, "unknown mode"),
    ):
        with pytest.raises(UsageError, match=said):
            make(**given)
    with pytest.raises(UsageError, match=r"no blueprint 'vehicle\.none'"):
        make(vehicle="vehicle.none").reset(seed=0)
    env = make()
    with pytest.raises(UsageError, match="before it was reset"):
        env.step(GO)


def test_routes_are_traced_along_the_lanes() -> None:
    route = trace_route(stub.Waypoint(50.0, -1), 100.0, np.random.default_rng(0))
    assert [w.transform.location.x for w in route] == [50.0 + i for i in range(101)]
    with pytest.raises(UsageError, match="ends within 10 m"):
        trace_route(stub.Waypoint(295.0, -1), 100.0, np.random.default_rng(0))


# --- a drive ------------------------------------------------------------------------------------------------


def test_gymnasium_finds_nothing_wrong() -> None:
    check_env(make(route=None, route_length=100.0), skip_render_check=True)


def test_the_world_is_synchronous_while_it_is_used() -> None:
    env = make(traffic=2)
    world = world_of(env)
    assert (world.settings.synchronous_mode, world.settings.fixed_delta_seconds) == (True, 0.1)
    assert env._manager.synchronous
    env.reset(seed=0)
    kinds = [actor.type_id for actor in world.actors]
    assert kinds.count("sensor.other.collision") == 1
    assert sum(kind.startswith("vehicle") for kind in kinds) == 3
    assert sum(getattr(actor, "autopilot", False) for actor in world.actors) == 2
    env.reset()
    assert len(world.actors) == len(kinds)  # those of the first episode are gone
    env.close()
    assert [actor.type_id for actor in world.actors] == ["traffic.traffic_light"]
    assert not world.settings.synchronous_mode
    assert not env._manager.synchronous


def test_the_first_scene_is_right_handed() -> None:
    env = make()
    world = world_of(env)
    env.reset(seed=0)
    world.add("vehicle", 30.0, -1.75, speed=4.0, yaw=180.0)  # coming towards us on the left
    world.add("walker", 20.0, 5.0, speed=1.0, yaw=-90.0)  # stepping onto the road from the right
    world.add("prop", 40.0, 1.75)
    scene = env._reader.look(0.0, 0.0)
    assert (scene.x, scene.y, scene.heading, scene.speed) == (10.0, LANE, 0.0, 0.0)
    assert (scene.length, scene.width) == (pytest.approx(4.9), pytest.approx(2.12))
    assert (scene.speed_limit, scene.lane_width, scene.lane_offset) == (10.0, 3.5, 0.0)
    assert not (scene.in_junction)
    assert not (scene.outside_lanes)
    assert not (scene.multiple_lanes)
    oncoming, walker, prop = scene.others
    assert (oncoming.x, oncoming.y, oncoming.kind) == (30.0, 1.75, 0)
    assert oncoming.speed == pytest.approx(4.0)
    assert abs(oncoming.heading) == pytest.approx(math.pi)
    assert (walker.y, walker.kind) == (-5.0, 1)
    assert walker.heading == pytest.approx(math.pi / 2)
    assert walker.speed == pytest.approx(1.0)
    assert prop.kind == 2
    obs, _ = env.reset(seed=0)
    assert obs.shape == (OBSERVATION_SIZE,)
    # The route is straight ahead; turning right (CARLA's positive steering) brings it to the left.
    np.testing.assert_allclose(obs[14:34].reshape(10, 2)[:, 1], 0.0, atol=1e-6)
    env._ego.speed = 5.0
    for _ in range(5):
        obs, *_ = env.step(np.array([0.5, 0.0], np.float32))
    assert env._ego.transform.rotation.yaw > 0
    assert (obs[14:34].reshape(10, 2)[:, 1] > 0).all()


def test_a_drive_to_the_end() -> None:
    env = make()
    env.reset(seed=0)
    rewards, infos, terminated, truncated = cruise(env, 8.0, 400.0)
    completion = [info["completion"] for info in infos]
    assert (np.diff(completion) >= 0).all()
    assert (terminated, truncated) == (False, True)
    final = infos[-1]
    assert (final["route_completion"], final["driving_score"], final["penalty"]) == (100.0, 100.0, 1.0)
    assert sum(info["cost"] for info in infos) == 0.0
    assert 50.0 < sum(rewards) < 100.001


def test_progress_and_overspeed_pay_what_carl_says() -> None:
    env = make()
    env.reset(seed=0)
    rewards, infos, *_ = drive(env, 10)
    gained = np.diff([0.0, *(info["completion"] for info in infos)])
    np.testing.assert_allclose(rewards[:5], gained[:5], rtol=1e-4)  # nothing is violated yet
    env = make()
    env.reset(seed=0)
    env._ego.speed = 11.0
    reward, info = drive(env, 1, np.zeros(2, np.float32))[:2]
    assert info[0]["completion"] == pytest.approx(100 * 1.1 / 280)
    assert reward[0] == pytest.approx(info[0]["completion"] * (1 - 1 / 2.23), rel=1e-4)
    assert info[0]["costs"]["overspeed"] == pytest.approx(1.0)
    env._ego.limit = 0.0
    assert env._reader.look(0.0, 1.0).speed_limit == 6.0  # CaRL's, while CARLA has none


@pytest.mark.parametrize(
    ("kind", "y", "counted", "factor"),
    [
        ("vehicle", 1.75, "vehicles", 0.6),
        ("walker", 1.75, "pedestrians", 0.5),
        ("prop", 1.75, "statics", 0.65),
        ("wall", 1.75, "statics", 0.65),
    ],
)
def test_collisions(kind: str, y: float, counted: str, factor: float) -> None:
    env = make()
    env.reset(seed=0)
    world_of(env).add(kind, 40.0, y)
    rewards, infos, terminated, _ = cruise(env, 6.0, 60.0)
    assert terminated
    assert rewards[-1] < -0.5
    assert infos[-1][counted] == infos[-1]["cost"] == infos[-1]["costs"]["collision"] == 1.0
    assert infos[-1]["driving_score"] == pytest.approx(factor * infos[-1]["route_completion"], rel=1e-5)


def test_collisions_of_a_standing_ego_do_not_count() -> None:
    env = make()
    env.reset(seed=0)
    world_of(env).add("vehicle", 16.0, 1.75, speed=-5.0)
    rewards, infos, terminated, _ = drive(env, 10, np.array([0.0, -1.0], np.float32))
    assert not terminated
    assert not any(rewards)
    assert not any(info["cost"] for info in infos)


def test_evaluation_goes_on_after_a_collision() -> None:
    env = make(mode="eval")
    env.reset(seed=0)
    world_of(env).add("prop", 40.0, 1.75)
    _, infos, terminated, truncated = cruise(env, 8.0, 400.0)
    assert (terminated, truncated) == (False, True)
    assert infos[-1]["statics"] == 1.0  # not again for as long as they touch
    assert infos[-1]["driving_score"] == pytest.approx(65.0)


def test_lights() -> None:
    env = make()
    world = world_of(env)
    env.reset(seed=0)
    states = stub.TrafficLightState
    for state, number in ((states.Green, 1), (states.Yellow, 2), (states.Red, 3)):
        world.light.state = state
        scene = env._reader.look(0.0, 0.0)
        assert scene.light == number
        assert scene.light_distance == pytest.approx(88.0 - 2.45)
    world.light.state = states.Off
    scene = env._reader.look(0.0, 0.0)
    assert (scene.light, scene.light_distance) == (LightState.NONE, NO_LIGHT)

    world.light.state = states.Green
    _, infos, terminated, _ = cruise(env, 8.0, 90.0)
    assert env._reader.look(0.0, 80.0).light_distance < 6.0
    assert not terminated
    world.light.state = states.Red
    rewards, infos, terminated, _ = cruise(env, 8.0, 130.0)
    assert terminated
    assert rewards[-1] < -0.5
    # The tail's point, 0.8 half lengths behind the centre, has passed the line at x = 98.
    assert env._ego.transform.location.x == pytest.approx(98.0 + 0.8 * 2.45, abs=0.9)
    assert infos[-1]["red_lights"] == infos[-1]["costs"]["red_light"] == 1.0
    assert infos[-1]["driving_score"] == pytest.approx(0.7 * infos[-1]["route_completion"], rel=1e-5)


def test_a_green_light_may_be_passed_and_one_of_the_other_lane_is_not_ours() -> None:
    env = make()
    world = world_of(env)
    other = stub.TrafficLight(world, [stub.Waypoint(122.0, 1)])
    other.state = stub.TrafficLightState.Red
    world.actors.append(other)
    env.reset(seed=0)
    _, infos, terminated, _ = cruise(env, 8.0, 140.0)
    assert not terminated
    assert sum(info["cost"] for info in infos) == 0.0
    assert env._reader.look(0.0, 130.0).light == LightState.NONE


@pytest.mark.parametrize("stands", [True, False])
def test_stop_signs(stands: bool) -> None:
    env = make()
    world = world_of(env)
    world.actors.append(stub.StopSign(world, 60.0))
    env.reset(seed=0)
    scene = env._reader.look(0.0, 0.0)
    assert scene.stop_distance == pytest.approx(50.0 - 2.45)
    cruise(env, 6.0, 57.0)
    if stands:
        drive(env, 20, np.array([0.0, -1.0], np.float32))
        assert env._ego.speed == 0.0
        assert env._reader.look(0.0, 48.0).stop_distance == NO_LIGHT
    _, infos, terminated, _ = cruise(env, 6.0, 80.0)
    assert terminated != stands
    assert infos[-1]["costs"]["stop_sign"] == float(not stands)


def test_lanes_junctions_and_the_edge_of_the_road() -> None:
    env = make()
    env.reset(seed=0)
    ego, reader = env._ego, env._reader

    def look(x: float, y: float, yaw: float = 0.0) -> Any:
        ego.transform = stub.Transform(stub.Location(x, y), stub.Rotation(yaw=yaw))
        return reader.look(0.0, x - 10.0)

    here = look(50.0, 2.25)  # half a metre to the right
    assert here.lane_offset == pytest.approx(-0.5)
    assert not here.multiple_lanes
    here = look(50.0, 0.5)
    assert (here.multiple_lanes, here.outside_lanes) == (True, False)
    here = look(50.0, -1.75)  # in the lane of those who come towards us
    assert here.outside_lanes
    assert not look(50.0, -1.75, 180.0).outside_lanes
    here = look(50.0, 4.3)  # on the shoulder
    assert (here.outside_lanes, here.off_road_share) == (True, 0.0)
    assert here.off_road_depth == pytest.approx(4.3 + 1.06 - 3.5)
    here = look(50.0, 8.0)
    assert (here.outside_lanes, here.off_road_share) == (True, 1.0)
    here = look(110.0, -1.75)
    assert (here.in_junction, here.multiple_lanes, here.outside_lanes) == (True, True, False)
    assert look(110.0, 5.0).off_road_share == 0.0  # the ground of a junction is road


def test_seeds_decide_routes_and_traffic() -> None:
    def start(seed: int) -> tuple[float, ...]:
        env = make(route=None, route_length=100.0, traffic=1)
        env.reset(seed=seed)
        return tuple(a.transform.location.x for a in world_of(env).actors if a.type_id.startswith("vehicle"))

    assert start(1) == start(1)
    assert len({start(seed) for seed in range(8)}) > 2


def test_the_hook_for_scenarios() -> None:
    def populate(world: Any, ego: Any, generator: np.random.Generator) -> list[Any]:
        return [world.add("walker", 30.0 + generator.uniform(), 1.75)]

    env = make(populate=populate)
    env.reset(seed=0)
    env.reset()
    assert [a.type_id for a in world_of(env).actors].count("walker.pedestrian.0001") == 1


# --- the picture --------------------------------------------------------------------------------------------


def test_the_picture_from_above() -> None:
    env = make(view=True)
    world = world_of(env)
    world.actors.append(stub.StopSign(world, 60.0))
    world.light.state = stub.TrafficLightState.Red
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    env._ego.transform.location.x = 40.0
    world.add("vehicle", 60.0, 1.75, speed=10.0)
    world.add("walker", 50.0, 6.75)
    world.add("prop", 40.0, -6.25)
    scene = env._reader.look(0.0, 30.0)
    picture = env._view.paint(scene, 30.0)
    assert picture.shape == (10, 256, 256)
    road, route, marking, cars, people, lights, stops, limits, static, shoulder = picture

    def at(ahead: float, left: float) -> tuple[int, int]:
        """Pixel of a place in the ego's frame: it stands 100 pixels above the bottom, 2 a metre."""
        return round(156 - 2 * ahead), round(128 - 2 * left)

    assert road[at(0, 0)] == road[at(30, 3.0)] == road[at(-30, 0)] == 255
    assert road[at(0, -4.0)] == road[at(0, 7.0)] == 0
    assert shoulder[at(0, -2.75)] == shoulder[at(0, 6.25)] == 255
    assert shoulder[at(0, 0)] == 0
    assert marking[136, 123:127].max() == 127  # the broken line in the middle of the road
    assert marking[136, 130:134].max() == 255
    assert cars[at(20, 0)] == int(speed_code(torch.tensor(10.0)))
    assert cars[at(20 + 2.45 + 9, 0)] > 0  # the line ahead, one second long
    assert cars[at(0, 0)] == 0  # the ego is not drawn
    assert people[at(10, -5.0)] == 136
    assert static[at(0, 8.0)] == 255
    assert lights[at(58, 0)] == 255
    assert stops[at(20, 0)] == 255
    # The route shows within the junction alone, 60 to 80 m ahead.
    assert route[at(70, 0)] == 255
    assert route[at(50, 0)] == 0
    assert not limits.any()


# --- the real client's map ----------------------------------------------------------------------------------


def open_drive() -> str:
    """The stand-in's road in OpenDRIVE; the way back has no lane in the junction."""

    def lane(number: int, kind: str, width: float, linked: bool) -> str:
        link = f'<link><predecessor id="{number}"/><successor id="{number}"/></link>' if linked else "<link/>"
        mark = '<roadMark sOffset="0" type="solid" color="standard" width="0.1" laneChange="none"/>'
        return (
            f'<lane id="{number}" type="{kind}" level="false">{link}<width sOffset="0" a="{width}" b="0" '
            f'c="0" d="0"/>{mark}</lane>'
        )

    def road(number: int, start: float, length: float, links: str, junction: int = -1) -> str:
        sides = [lane(-1, "driving", 3.5, True)]
        left = ""
        if junction < 0:
            sides.append(lane(-2, "shoulder", 2.0, False))
            left = f"<left>{lane(2, 'shoulder', 2.0, False)}{lane(1, 'driving', 3.5, True)}</left>"
        return (
            f'<road name="" length="{length}" id="{number}" junction="{junction}"><link>{links}</link>'
            f'<planView><geometry s="0" x="{start}" y="0" hdg="0" length="{length}"><line/></geometry>'
            "</planView>"
            f'<elevationProfile/><lateralProfile/><lanes><laneSection s="0">{left}<center>'
            f'<lane id="0" type="none" level="false"/></center><right>{"".join(sides)}</right>'
            "</laneSection></lanes></road>"
        )

    into = '<successor elementType="junction" elementId="10"/>'
    out = '<predecessor elementType="junction" elementId="10"/>'
    through = (
        '<predecessor elementType="road" elementId="1" contactPoint="end"/>'
        '<successor elementType="road" elementId="2" contactPoint="start"/>'
    )
    return (
        '<?xml version="1.0"?><OpenDRIVE><header revMajor="1" revMinor="4" name="" version="1"/>'
        + road(1, 0.0, 100.0, into)
        + road(2, 120.0, 180.0, out)
        + road(5, 100.0, 20.0, through, 10)
        + '<junction id="10" name=""><connection id="0" incomingRoad="1" connectingRoad="5" '
        'contactPoint="start"><laneLink from="-1" to="-1"/></connection></junction></OpenDRIVE>'
    )


def test_the_real_map_says_what_the_stand_in_says() -> None:
    client = pytest.importorskip("carla")
    if not hasattr(client, "Map"):
        pytest.skip("this package named carla is not the simulator's client")
    real = client.Map("straight", open_drive())
    names = ("Location", "LaneType", "LaneMarkingType", "VehicleControl", "TrafficLightState", "Transform")
    module = stub.module(**{name: getattr(client, name) for name in names})

    def reader(road: Any, module: Any) -> tuple[Any, Any]:
        world = stub.World(road)
        ego = world.add("vehicle", 50.0, 1.75)
        route = RoutePath(np.array(ROUTE) * [1.0, -1.0])
        return CarlaWorld(module, world, ego, route), ego

    (theirs, one), (ours, two) = reader(real, module), reader(None, stub.module())
    for x, y, yaw in (
        *((50.0, 1.75, 0.0), (50.0, 2.25, 10.0), (50.0, 0.5, -5.0), (50.0, -1.75, 0.0), (50.0, -1.75, 180.0)),
        *((50.0, 4.3, 0.0), (50.0, 8.0, 0.0), (110.0, 1.75, 0.0), (110.0, 1.4, 0.0), (200.0, 1.0, 0.0)),
    ):
        scenes = []
        for looker, ego in ((theirs, one), (ours, two)):
            ego.transform = stub.Transform(stub.Location(x, y), stub.Rotation(yaw=yaw))
            scenes.append(looker.look(0.0, x - 10.0))
        a, b = scenes
        for name in SEEN:
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-4), (name, x, y, yaw)
    start = real.get_waypoint(client.Location(x=20.0, y=1.75, z=0.0))
    route = trace_route(start, 200.0, np.random.default_rng(0))
    places = np.array([[w.transform.location.x, w.transform.location.y] for w in route])
    np.testing.assert_allclose(places[:, 0], np.arange(20.0, 221.0), atol=1e-3)
    np.testing.assert_allclose(places[:, 1], 1.75, atol=1e-3)
    one.transform = stub.Transform(stub.Location(40.0, 1.75), stub.Rotation())
    picture = CarlaView(theirs).paint(theirs.look(0.0, 30.0), 30.0)
    assert picture[0, 156, 128] == 255
    assert picture[1, 156 - 140, 128] == 255
    assert picture[9, 156, 128 + 6] == 255
