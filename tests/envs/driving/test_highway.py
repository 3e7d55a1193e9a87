"""highway-env's roads under the shared rewards: situations made by hand, and whole episodes."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from saferl.cli import main
from saferl.envs import list_envs, make_vec
from saferl.envs.driving import highway
from saferl.envs.driving.adapter import (
    NEAREST,
    OBSERVATION_SIZE,
    Actor,
    Judge,
    Monitor,
    RoutePath,
    Scene,
    wrap,
)
from saferl.envs.driving.highway import TASKS, HighwayDrivingEnv
from saferl.envs.driving.reward import COSTS
from saferl.errors import MissingPackageError, UsageError

needs_highway = pytest.mark.skipif(
    importlib.util.find_spec("highway_env") is None, reason="needs highway-env (extra driving)"
)
IDS = {task: f"Highway{task.title()}-v0" for task in TASKS}


def scene(**given: Any) -> Scene:
    """An ego on an empty road along x."""
    numbers: dict[str, Any] = {"x": 0.0, "y": 0.0, "heading": 0.0, "speed": 5.0, "length": 5.0, "width": 2.0}
    return Scene(**(numbers | {"speed_limit": 10.0, "lane_offset": 0.0, "lane_width": 4.0} | given))


def car(x: float, y: float = 0.0, speed: float = 0.0, heading: float = 0.0, **given: Any) -> Actor:
    shape: dict[str, Any] = {"key": "car", "length": 5.0, "width": 2.0}
    return Actor(**(shape | given), x=x, y=y, heading=heading, speed=speed)


def monitor(length: float = 100.0) -> Monitor:
    return Monitor(RoutePath([[0.0, 0.0], [length, 0.0]]), time_limit=60.0)


# --- what the adapters share, without any simulator ---------------------------------------------------------


def test_places_on_a_route() -> None:
    route = RoutePath([[0.0, 0.0], [10.0, 0.0], [10.0, 0.0], [10.0, 10.0]])
    assert route.length == 20.0
    assert route.locate(4.0, 1.0, 0.0, 5.0, 20.0) == (4.0, 1.0, 0.0)
    assert route.locate(11.0, 5.0, 10.0, 5.0, 20.0) == (15.0, -1.0, math.pi / 2)
    assert route.locate(11.0, 5.0, 2.0, 2.0, 2.0)[0] == 10.0  # what is too far along is not looked at
    np.testing.assert_allclose(route.at(np.array([0.0, 12.0, 25.0])), [[0, 0], [10, 2], [10, 15]])


def test_a_route_that_closes_is_driven_once_round() -> None:
    corners = [[0, 0], [40, 0], [40, 40], [0, 40], [0, 0]]
    drive = Monitor(RoutePath(corners), time_limit=60.0)
    drive.start(scene())
    places = [p for a, b in itertools.pairwise(corners) for p in np.linspace(a, b, 41)[1:]]
    done = [float(drive.update(scene(x=float(p[0]), y=float(p[1]))).completion) for p in places]
    np.testing.assert_allclose(done[:-1], 100 * np.arange(1, 160) / 160, atol=1e-4)
    assert done[-1] == 100.0


def test_lines_are_found_wherever_a_route_passes_them() -> None:
    route = RoutePath([[0, 0], [20, 0], [20, 20], [10, 20], [10, -20]])
    assert route.passes(10.0, 0.0, 0.0, 1.0) == [10.0]
    assert route.passes(10.0, 0.0, -math.pi / 2, 1.0) == [70.0]
    assert route.passes(10.0, 0.0, math.pi, 1.0) == []
    assert route.passes(50.0, 0.0, 0.0, 1.0) == []


@pytest.mark.parametrize(
    "points", [[[0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]], [[0.0, math.nan], [1.0, 0.0]], [1.0]]
)
def test_routes_that_are_none(points: Any) -> None:
    with pytest.raises(UsageError, match="route"):
        RoutePath(points)


def test_progress_advance_and_the_end() -> None:
    drive = monitor()
    drive.start(scene())
    frames = [drive.update(scene(x=x)) for x in (1.0, 2.0, 1.5, 2.5, 99.6)]
    for frame, progress, advance in zip(frames, (1, 1, 0, 0.5), (1, 1, -0.5, 1.0), strict=False):
        assert float(frame.progress) == pytest.approx(progress)
        assert float(frame.advance) == pytest.approx(advance)
    assert not bool(frames[3].finished)
    assert float(frames[3].completion) == pytest.approx(2.5)


def test_a_drive_is_over_within_half_a_metre_of_the_end() -> None:
    drive = monitor()
    drive.start(scene())
    for x in range(5, 100, 5):
        frame = drive.update(scene(x=float(x)))
    assert (float(frame.completion), bool(frame.finished)) == (95.0, False)
    frame = drive.update(scene(x=99.6))
    assert (float(frame.completion), bool(frame.finished)) == (100.0, True)


def test_standing_and_leaving_the_route() -> None:
    drive = monitor()
    drive.start(scene())
    for _ in range(5):
        frame = drive.update(scene(speed=0.05))
    assert float(frame.standing) == pytest.approx(0.5)
    assert float(drive.update(scene(speed=0.2)).standing) == 0.0
    assert not bool(drive.update(scene(x=1.0, y=29.0)).deviated)
    assert bool(drive.update(scene(x=1.0, y=31.0)).deviated)
    # More than 30 % of the route driven more than 15 m beside it.
    drive = monitor()
    drive.start(scene(y=16.0))
    deviated = [bool(drive.update(scene(x=float(x), y=16.0)).deviated) for x in range(1, 40)]
    assert deviated.index(True) == 30


def test_accelerations_are_those_of_the_centre() -> None:
    drive = monitor()
    drive.start(scene(speed=5.0, steer=0.0))
    frame = drive.update(scene(speed=5.2, heading=0.02, steer=0.3))
    assert float(frame.acceleration_lon) == pytest.approx(2.0)
    assert float(frame.acceleration_lat) == pytest.approx(5.2 * 0.2)
    assert (float(frame.steer), float(frame.last_steer)) == (pytest.approx(0.3), 0.0)
    frame = drive.update(scene(acceleration=(1.0, -2.0)))
    assert (float(frame.acceleration_lon), float(frame.acceleration_lat)) == (1.0, -2.0)
    assert float(frame.last_steer) == pytest.approx(0.3)


def test_which_collisions_count() -> None:
    drive = monitor(1000.0)
    drive.start(scene())
    assert bool(drive.update(scene(x=1.0, others=[car(5.0)])).hit_vehicle)
    assert not bool(drive.update(scene(x=2.0, others=[car(5.0)])).collided)  # the same again
    assert not bool(drive.update(scene(x=3.0, others=[car(7.0, key="another")])).collided)  # within 5 m
    person = car(12.0, kind=1, length=0.6, width=0.6, key="person")
    frame = drive.update(scene(x=10.0, others=[person]))
    assert (bool(frame.hit_pedestrian), bool(frame.hit_vehicle)) == (True, False)
    drive.update(scene(x=10.0, speed=0.0))
    assert not bool(drive.update(scene(x=10.0, others=[car(12.0, speed=3.0, key="c")])).collided)  # it stood
    far = drive.update(scene(x=30.0, others=[car(50.0, key="d")], struck=frozenset(["d"])))
    assert bool(far.hit_vehicle)  # the simulator's word, whatever the boxes


@pytest.mark.parametrize(
    ("actor", "given", "fault"),
    [
        (car(4.0, speed=3.0), {}, True),  # front bumper
        (car(-1.0, 1.5, speed=3.0), {}, False),  # side by side
        (car(-1.0, 1.5, speed=3.0), {"multiple_lanes": True}, True),
        (car(-1.0, 1.5, speed=0.0), {}, True),  # it stood
        (car(-4.5, speed=9.0), {"multiple_lanes": True}, False),  # from behind
        (car(4.0, speed=3.0), {"speed": 0.0}, False),  # the ego stands: it does not even count
    ],
)
def test_whose_fault_a_collision_is(actor: Actor, given: dict[str, Any], fault: bool) -> None:
    drive = monitor()
    drive.start(scene(**given))
    frame = drive.update(scene(others=[actor], **given))
    assert bool(frame.at_fault) == fault
    assert bool(frame.collided) == (given.get("speed") != 0.0)


def test_carls_reward_of_situations_made_by_hand() -> None:
    """Worked by hand: dRC times the factors, -1 for a collision."""

    def reward(**given: Any) -> float:
        judge, drive = Judge("carl"), monitor()
        drive.start(scene())
        judge.start()
        return judge.step(drive.update(scene(**({"x": 0.5} | given)))).reward

    assert reward() == pytest.approx(0.5)
    assert reward(speed=11.0) == pytest.approx(0.5 * (1 - 1 / 2.23))
    assert reward(speed=13.0) == 0.0
    assert reward(lane_offset=-0.5) == pytest.approx(0.5 * 0.75)
    assert reward(lane_offset=-0.5, in_junction=True) == pytest.approx(0.5)
    assert reward(outside_lanes=True) == 0.0
    # 4 m of gap at 5 m/s: touched within 0.9 s, so a time-to-collision penalty.
    assert reward(others=[car(9.5)]) == pytest.approx(0.5 * 0.5)
    assert reward(others=[car(5.0)]) == pytest.approx(0.5 * 0.5 - 1.0)
    assert reward(ran_red_light=True) == pytest.approx(0.5 - 1.0)
    assert reward(x=0.0, speed=0.0) == 0.0


def test_costs_and_scores_of_a_drive() -> None:
    judge, drive = Judge("roach"), monitor()
    drive.start(scene())
    judge.start()
    verdict = judge.step(drive.update(scene(x=0.5, speed=12.0, others=[car(4.0)])))
    assert verdict.terminated
    assert tuple(verdict.costs) == judge.cost_names == COSTS
    assert (verdict.costs["collision"], verdict.costs["overspeed"]) == (1.0, pytest.approx(2.0))
    assert verdict.cost == 1.0  # overspeed is told, but not counted
    score = judge.result()
    assert score["route_completion"] == pytest.approx(0.5)
    assert score["driving_score"] == pytest.approx(0.5 * 0.6)
    # Nothing of a drive is left in the next one.
    drive = monitor()
    drive.start(scene())
    judge.start()
    judge.step(drive.update(scene(x=1.0)))
    assert judge.result()["driving_score"] == pytest.approx(1.0)


def test_what_ends_a_drive_by_mode() -> None:
    drive = monitor()
    drive.start(scene())
    frame = drive.update(scene(ran_red_light=True))
    for mode, ends in (("train", True), ("eval", False)):
        judge = Judge("carl", mode)
        judge.start()
        assert judge.step(frame).terminated == ends
    with pytest.raises(UsageError, match="unknown reward 'carll'; did you mean 'carl'"):
        Judge("carll")
    with pytest.raises(UsageError, match="unknown mode"):
        Judge("carl", "test")


def test_what_is_missing_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.startswith("highway_env"):
            raise ModuleNotFoundError("No module named 'highway_env'", name="highway_env")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    highway._world.cache_clear()
    with pytest.raises(
        MissingPackageError, match=r"need the package highway-env.*pip install 'saferl\[driving\]'"
    ):
        make_vec("HighwayRacetrack-v0", 2)
    highway._world.cache_clear()


def test_the_tasks_are_listed() -> None:
    names = dict(list_envs())
    for task, name in IDS.items():
        assert names[name].startswith("highway-env: ")
        spec = gym.spec(f"saferl/{name}")
        assert spec.max_episode_steps == round(TASKS[task].time_limit / 0.1)


def test_impossible_arguments() -> None:
    with pytest.raises(UsageError, match="unknown highway-env task 'racetrak'; did you mean 'racetrack'"):
        HighwayDrivingEnv("racetrak")
    with pytest.raises(UsageError, match="render_mode is 'human'"):
        HighwayDrivingEnv(render_mode="human")
    with pytest.raises(UsageError, match="config sets 'action'"):
        HighwayDrivingEnv(config={"action": {}})
    with pytest.raises(UsageError, match="time_limit is 0"):
        HighwayDrivingEnv(time_limit=0)


# --- with the package ---------------------------------------------------------------------------------------


def follow(env: HighwayDrivingEnv, speed: float) -> np.ndarray:
    """Pure pursuit of the route at a speed."""
    here, drive = env._scene, env._monitor
    assert here is not None
    reach = max(6.0, here.speed)
    aim = drive.route.at(np.array([drive.arc + reach]))[0]
    bearing = wrap(math.atan2(aim[1] - here.y, aim[0] - here.x) - here.heading)
    wheel = math.atan(2 * math.tan(math.atan(5.0 * math.sin(bearing) / reach)))
    action = np.array([(speed - here.speed) / 2, wheel / TASKS[env.task].steering])
    return np.clip(action, -1, 1).astype(np.float32)


def drive_to_the_end(
    env: HighwayDrivingEnv, speed: float
) -> tuple[list[dict[str, Any]], list[float], bool, bool]:
    infos, rewards = [], []
    while True:
        _, reward, terminated, truncated, info = env.step(follow(env, speed))
        infos.append(info)
        rewards.append(reward)
        if terminated or truncated:
            return infos, rewards, terminated, truncated


@needs_highway
@pytest.mark.parametrize("task", TASKS)
def test_gymnasium_finds_nothing_wrong(task: str) -> None:
    check_env(gym.make(f"saferl/{IDS[task]}", render_mode="rgb_array").unwrapped, skip_render_check=True)


@needs_highway
@pytest.mark.parametrize("task", TASKS)
def test_seeds_decide_everything(task: str) -> None:
    def episode(env: HighwayDrivingEnv, seed: int | None) -> np.ndarray:
        obs, _ = env.reset(seed=seed)
        seen = [obs]
        for k in range(25):
            obs, reward, terminated, _, _ = env.step(np.array([0.3, 0.02 * (k % 3 - 1)], np.float32))
            seen.append(np.append(obs, reward)[:OBSERVATION_SIZE])
            if terminated:
                break
        return np.array(seen)

    one, other = HighwayDrivingEnv(task), HighwayDrivingEnv(task)
    first = episode(one, 3)
    second = episode(one, None)  # goes on with the numbers of the seed
    np.testing.assert_array_equal(first, episode(other, 3))
    np.testing.assert_array_equal(second, episode(other, None))
    np.testing.assert_array_equal(first, episode(one, 3))
    assert not np.array_equal(first[0], second[0])


@needs_highway
@pytest.mark.parametrize(("task", "speed"), [("racetrack", 9.0), ("merge", 18.0)])
def test_a_route_driven_to_its_end(task: str, speed: float) -> None:
    env = HighwayDrivingEnv(task, config={"other_vehicles": 0} if task == "racetrack" else None)
    for seed in (0, 2):  # the inner and the outer lane of the racetrack
        env.reset(seed=seed)
        infos, rewards, terminated, truncated = drive_to_the_end(env, speed)
        completion = [info["completion"] for info in infos]
        assert (np.diff(completion) >= 0).all()
        assert completion[-1] == 100.0
        assert (terminated, truncated) == (False, True)
        final = infos[-1]
        assert final["route_completion"] == 100.0
        assert 0.0 < final["driving_score"] <= 100.0
        assert final["outside_lanes_km"] == 0.0
        assert sum(info["cost"] for info in infos) == 0.0
        # Progress times factors in [0, 1].
        assert 0.0 < sum(rewards) < 100.001
        # Two lanes: nothing of the racetrack's bends counts as off the road.
        assert final["closed_loop_score"] > 0.5


@needs_highway
@pytest.mark.parametrize("way", [1, 2, 3])
def test_exits_of_the_intersection(way: int) -> None:
    env = HighwayDrivingEnv("intersection", config={"initial_vehicle_count": 1, "spawn_probability": 0.0})
    env.reset(seed=1, options={"exit": way})
    for vehicle in list(env._world.road.vehicles):
        if vehicle is not env._ego:
            env._world.road.vehicles.remove(vehicle)
    _, _, terminated, truncated = drive_to_the_end(env, 7.0)
    assert (terminated, truncated) == (False, True)
    assert env._ego.lane_index[1] == f"o{way}"
    assert env._world.has_arrived(env._ego, exit_distance=24.0)
    with pytest.raises(UsageError, match="exit is 4"):
        env.reset(options={"exit": 4})


@needs_highway
def test_a_collision_ends_the_drive_and_costs() -> None:
    env = HighwayDrivingEnv("straight", config={"vehicles_count": 1})
    env.reset(seed=0)
    (other,) = [v for v in env._world.road.vehicles if v is not env._ego]
    other.position = env._ego.position + np.array([9.0, 0.0])
    other.speed = other.target_speed = 5.0
    step = 0
    while True:
        _, reward, terminated, truncated, info = env.step(np.array([1.0, 0.0], np.float32))
        step += 1
        if terminated or truncated:
            break
    assert step < 10
    assert terminated
    assert reward < 0
    assert info["costs"]["collision"] == info["cost"] == info["vehicles"] == 1.0
    # 0.6 for a vehicle, and nothing else: it was over within the first quarter, in its lane.
    assert info["driving_score"] == pytest.approx(0.6 * info["route_completion"], rel=1e-5)
    assert info["closed_loop_score"] == 0.0  # its fault: the front bumper


@needs_highway
def test_being_hit_while_standing_is_no_collision_but_the_end() -> None:
    env = HighwayDrivingEnv("straight", config={"vehicles_count": 1})
    env.reset(seed=0)
    env._ego.speed = 0.0
    (other,) = [v for v in env._world.road.vehicles if v is not env._ego]
    env.step(np.zeros(2, np.float32))
    other.position = env._ego.position + np.array([-5.5, 0.0])
    other.speed = 20.0
    _, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
    assert env._ego.crashed
    assert (terminated, truncated) == (False, True)
    assert (reward, info["cost"], info["vehicles"]) == (0.0, 0.0, 0.0)


@needs_highway
def test_obstacles_are_static() -> None:
    env = HighwayDrivingEnv("merge")
    env.reset(seed=0)
    (block,) = env._world.road.objects
    env._world.road.vehicles = [env._ego]
    env._ego.position = block.position - np.array([4.0, 0.0])
    env._monitor.arc = 240.0
    info: dict[str, Any] = {}
    for _ in range(5):
        _, _, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        if terminated or truncated:
            break
    assert terminated
    assert (info["statics"], info["vehicles"]) == (1.0, 0.0)


@needs_highway
def test_speed_limits_lanes_and_the_edge_of_the_road() -> None:
    env = HighwayDrivingEnv("racetrack", config={"other_vehicles": 0})
    env.reset(seed=0)
    env._ego.position = np.array([60.0, 0.0])  # on the lane between y = -2.5 and 2.5; another up to 7.5
    env._ego.lane_index = ("a", "b", 0)
    env._ego.speed = 12.0
    _, _, _, _, info = env.step(np.zeros(2, np.float32))
    assert info["costs"]["overspeed"] == pytest.approx(2.0)
    here = env._look(0.0)
    assert (here.speed_limit, here.lane_width, here.lane_offset) == (10.0, 5.0, 0.0)
    assert (here.multiple_lanes, here.outside_lanes, here.off_road_share) == (False, False, 0.0)
    assert here.off_road_depth == pytest.approx(1.0 - 2.5)
    for y, offset, lanes, outside, depth in (
        (2.0, 2.0, True, False, None),
        (-2.0, -2.0, False, False, 0.5),
        (-3.4, -3.4, False, True, 1.9),
    ):
        env._ego.position = np.array([60.0, y])
        env._ego.on_state_update()
        here = env._look(0.0)
        assert here.lane_offset == pytest.approx(offset)
        assert (here.multiple_lanes, here.outside_lanes) == (lanes, outside)
        if depth is not None:
            assert here.off_road_depth == pytest.approx(depth)
    assert here.off_road_share == pytest.approx(2 / 3)
    env._ego.position, env._ego.heading = np.array([60.0, 0.0]), math.pi
    env._ego.on_state_update()
    assert env._look(0.0).outside_lanes  # against the traffic


@needs_highway
def test_brakes_hold() -> None:
    env = HighwayDrivingEnv("racetrack", config={"other_vehicles": 0})
    env.reset(seed=0)
    rewards = []
    for _ in range(40):
        _, reward, _, _, info = env.step(np.array([-1.0, 0.0], np.float32))
        rewards.append(reward)
    assert info["speed"] == 0.0
    assert rewards[-1] == 0.0
    assert env._ego.speed == 0.0


@needs_highway
def test_the_prediction_equals_the_packages() -> None:
    """What decides who waits at the intersection is what the package computes, only faster."""
    from highway_env.vehicle.kinematics import Vehicle

    env = HighwayDrivingEnv("intersection")
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.array([0.5, 0.1], np.float32))
    times = np.arange(0.25, 3, 0.25)
    ours = env._ego.predict_trajectory_constant_speed(times)
    theirs = Vehicle.predict_trajectory_constant_speed(env._ego, times)
    np.testing.assert_array_equal(np.array(ours[0]), np.array(theirs[0]))
    assert ours[1] == theirs[1]


@needs_highway
def test_the_intersection_leaves_other_roads_cars_alone() -> None:
    from highway_env.vehicle.behavior import IDMVehicle

    before = IDMVehicle.DISTANCE_WANTED, IDMVehicle.COMFORT_ACC_MAX
    HighwayDrivingEnv("intersection").reset(seed=0)
    assert before == (IDMVehicle.DISTANCE_WANTED, IDMVehicle.COMFORT_ACC_MAX)
    assert highway.IntersectionDriver.DISTANCE_WANTED == 7


@needs_highway
def test_observations_and_wrong_actions() -> None:
    env = HighwayDrivingEnv("straight")
    with pytest.raises(UsageError, match="before it was reset"):
        env.step(np.zeros(2))
    obs, info = env.reset(seed=0)
    assert obs.shape == (OBSERVATION_SIZE,)
    assert obs.dtype == np.float32
    assert np.isfinite(obs).all()
    assert info["completion"] == 0.0
    assert obs[0] == pytest.approx(25 / 20)
    assert obs[1] == pytest.approx(30 / 20)
    np.testing.assert_allclose(obs[14:34].reshape(10, 2)[:, 0], np.arange(4, 41, 4) / 50, rtol=1e-5)
    actors = obs[-10 * NEAREST :].reshape(NEAREST, 10)
    distance = np.hypot(actors[:, 1], actors[:, 2])[actors[:, 0] == 1]
    assert (np.diff(distance) >= 0).all()
    for wrong in (np.zeros(3), np.array([0.0, np.nan])):
        with pytest.raises(UsageError, match="2 finite numbers"):
            env.step(wrong)
    with pytest.raises(UsageError, match="without render_mode"):
        env.render()


@needs_highway
def test_a_vector_with_random_actions() -> None:
    """Costs of every step, and scores where an episode ended."""
    env = make_vec("HighwayIntersection-v0", 2, reward="carl-1.1", config={"initial_vehicle_count": 4})
    env.action_space.seed(0)
    env.reset(seed=0)
    assert env.metadata["cost_names"] == COSTS
    finals = []
    for _ in range(120):
        obs, rewards, terminated, truncated, info = env.step(env.action_space.sample())
        assert set(info["costs"]) == set(COSTS)
        assert (info["cost"] == sum(info["costs"][name] for name in COSTS[:4])).all()
        assert np.isfinite(obs).all()
        assert np.isfinite(rewards).all()
        if (terminated | truncated).any():
            ended = terminated | truncated
            finals += list(info["final_info"]["driving_score"][ended])
    env.close()
    assert finals
    assert all(0.0 <= score <= 100.0 for score in finals)


@needs_highway
def test_pictures() -> None:
    env = HighwayDrivingEnv("racetrack", render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (600, 600, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 2
    env.close()


@needs_highway
def test_training_by_the_command_line(tmp_path: Path) -> None:
    words = [
        *("train", "ppo", "--env", "HighwayRacetrack-v0", "--quiet", "--run", str(tmp_path / "run")),
        *("--total-steps", "512", "--num-envs", "2", "--steps-per-iteration", "256", "--epochs", "2"),
    ]
    assert main(words) == 0
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
