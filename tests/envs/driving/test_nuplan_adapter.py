"""nuPlan's adapter against a stand-in of its API."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saferl.envs.driving import nuplan
from saferl.envs.driving.adapter import OBSERVATION_SIZE
from saferl.envs.driving.frame import NO_LIGHT, LightState
from saferl.envs.driving.geometry import Bicycle, drive_bicycle
from saferl.envs.driving.nuplan import NuPlanDrive, PlannerCore, plan_route
from saferl.errors import MissingPackageError, SaferlError, UsageError


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


stub = _load("nuplan_stub")
BLOCKS = ["in", "over", "out"]


@pytest.fixture(autouse=True)
def devkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """nuPlan, whether or not the real one is there."""
    for name in [n for n in sys.modules if n == "nuplan" or n.startswith("nuplan.")]:
        monkeypatch.delitem(sys.modules, name)
    stub.install(monkeypatch.setitem)
    nuplan._planner_class.cache_clear()


class Steady:
    """The same action always."""

    def __init__(self, acceleration: float = 0.0, steer: float = 0.0) -> None:
        self.action = np.array([[acceleration, steer]], np.float32)
        self.seen: list[np.ndarray] = []

    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        assert deterministic
        self.seen.append(obs)
        return self.action


def begin(x: float = 20.0, speed: float = 5.0, **given: Any) -> tuple[NuPlanDrive, Any]:
    drive = NuPlanDrive(stub.Map(), BLOCKS, **given)
    return drive, drive.start(stub.planner_input(stub.ego_at(x, speed=speed)))[1]


def after(drive: NuPlanDrive, *args: Any, **given: Any) -> Any:
    """The frame of the next input."""
    tracks, lights = given.pop("tracks", ()), given.pop("lights", None)
    return drive.update(stub.planner_input(stub.ego_at(*args, **given), tracks, lights), 0.0)[1]


# --- missing, and wrong -------------------------------------------------------------------------------------


def test_what_is_missing_is_told_with_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.startswith("nuplan"):
            raise ModuleNotFoundError("No module named 'nuplan'", name="nuplan")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingPackageError, match=r"nuPlan cannot be imported.*clone motional/nuplan-devkit"):
        _ = nuplan.SaferlPlanner
    with pytest.raises(MissingPackageError, match="pip cannot get it by name"):
        begin()


def test_impossible_arguments() -> None:
    with pytest.raises(UsageError, match="horizon is 0"):
        PlannerCore(Steady(), horizon=0.0)
    policy = SimpleNamespace(observation_space=SimpleNamespace(shape=(7,)), action_space=None)
    with pytest.raises(UsageError, match=r"observations have shape \(7,\)"):
        PlannerCore(policy)
    with pytest.raises(UsageError, match="unknown reward"):
        begin(reward="carll")
    with pytest.raises(UsageError, match="was not initialised"):
        PlannerCore(Steady()).compute_planner_trajectory(None)
    with pytest.raises(UsageError, match="was not initialised"):
        PlannerCore(Steady()).result()
    with pytest.raises(UsageError, match="before it was started"):
        NuPlanDrive(stub.Map(), BLOCKS).update(None, 0.0)
    with pytest.raises(SaferlError, match="none of the route's roadblocks"):
        NuPlanDrive(stub.Map(), ["nowhere"]).start(stub.planner_input(stub.ego_at(0.0)))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = nuplan.Nothing


# --- routes -------------------------------------------------------------------------------------------------


def test_routes_keep_to_the_lane_that_leads_through() -> None:
    def lanes(y: float, x: float = 20.0, **given: Any) -> list[str]:
        return [edge.id for edge in plan_route(stub.Map(**given), BLOCKS, x, y, 0.0)]

    assert lanes(0.0) == ["in0", "over0", "out0"]
    assert lanes(3.5) == ["in1", "over1", "out1"]
    assert lanes(3.5, through=False) == ["in0", "over0", "out0"]
    assert lanes(0.0, x=150.0) == ["out0"]
    assert [e.id for e in plan_route(stub.Map(), ["in", "out"], 20.0, 0.0, 0.0)] == [
        "in0"
    ]  # a gap in the route


# --- frames -------------------------------------------------------------------------------------------------


def test_the_first_frame() -> None:
    drive, frame = begin()
    assert (float(frame.x), float(frame.y), float(frame.speed)) == (20.0, 0.0, 5.0)
    assert float(frame.length) == pytest.approx(5.176)
    assert (float(frame.speed_limit), float(frame.lane_width), float(frame.lane_offset)) == (10.0, 3.5, 0.0)
    for flag in ("in_junction", "outside_lanes", "multiple_lanes", "finished", "hit_vehicle"):
        assert not bool(getattr(frame, flag))
    assert float(frame.route_length) == pytest.approx(300.0)
    assert float(frame.completion) == pytest.approx(100 * 20 / 300)
    assert float(frame.off_road_depth) == pytest.approx(-(1.75 - 2.297 / 2))
    frame = after(drive, 20.5, speed=5.2)
    assert float(frame.progress) == pytest.approx(100 * 0.5 / 300, rel=1e-4)
    assert float(frame.acceleration_lon) == 0.0  # nuPlan's word, not the difference of speeds


def test_what_is_done_of_the_experts_path() -> None:
    expert = np.array([[0.0, 0.0], [100.0, 0.0]])
    drive, frame = begin(expert=expert)
    assert float(frame.route_length) == 100.0
    assert float(after(drive, 21.0).completion) == pytest.approx(21.0)
    assert drive.result()["closed_loop_score"] == 0.0  # the expert has made 100 m


def test_connectors_take_the_larger_limit_of_their_neighbours() -> None:
    drive, frame = begin(x=110.0)
    assert bool(frame.in_junction)
    assert bool(frame.multiple_lanes)
    assert float(frame.speed_limit) == 15.0
    assert float(after(drive, 121.0).speed_limit) == 15.0


def test_lanes_and_the_edge_of_the_road() -> None:
    drive, _ = begin()
    frame = after(drive, 21.0, 1.0)
    assert float(frame.lane_offset) == pytest.approx(1.0)
    assert bool(frame.multiple_lanes)
    frame = after(drive, 22.0, -1.5)
    assert float(frame.off_road_depth) == pytest.approx(1.5 + 2.297 / 2 - 1.75)
    assert 0.0 < float(frame.off_road_share) < 0.5
    assert not bool(frame.outside_lanes)
    frame = after(drive, 23.0, -6.0)
    assert (float(frame.off_road_share), bool(frame.outside_lanes)) == (1.0, True)


def test_tracked_objects_by_kind() -> None:
    drive, _ = begin()
    tracks = [
        stub.track("EGO", 21.0, 0.0, token="ego"),
        stub.track("VEHICLE", 41.0, 3.5, -3.0, 0.0, heading=math.pi, token="v"),
        stub.track("PEDESTRIAN", 31.0, -5.0, 0.0, 1.2, heading=0.3, token="p"),
        stub.track("BICYCLE", 31.0, 5.0, 3.0, 0.0, token="b"),
        stub.track("TRAFFIC_CONE", 35.0, -1.0, token="c"),
    ]
    others = after(drive, 21.0, speed=5.0, tracks=tracks).others
    assert others.kind[:, 0].tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(others.speed[:, 0], [3.0, 1.2, 3.0, 0.0], atol=1e-6)
    assert float(others.heading[1]) == pytest.approx(math.pi / 2)  # where it goes, not where it looks


@pytest.mark.parametrize(
    ("name", "field", "place"),
    [("VEHICLE", "hit_vehicle", 4.5), ("PEDESTRIAN", "hit_pedestrian", 2.7), ("BARRIER", "hit_static", 2.7)],
)
def test_a_track_counts_as_hit_once(name: str, field: str, place: float) -> None:
    drive, _ = begin()
    hit = stub.track(name, 21.0 + place, 0.0)
    current = stub.planner_input(stub.ego_at(21.0, speed=5.0), [hit])
    _, frame, verdict = drive.update(current, 0.0)
    assert bool(getattr(frame, field))
    assert bool(frame.at_fault)
    assert verdict.terminated
    assert (verdict.reward, verdict.cost) == (0.0, 1.0)  # the last step's progress is lost
    for _ in range(100):
        frame = after(drive, 21.0, speed=5.0, tracks=[hit])
        assert not bool(frame.collided)
    other = stub.track(name, 22.0 + place, 0.0, token="another")
    assert bool(after(drive, 22.0, speed=5.0, tracks=[other]).collided)  # 1 m on, but another one


def test_carls_reward_for_nuplan_by_hand() -> None:
    drive, _ = begin(speed=11.0)
    verdict = drive.update(stub.planner_input(stub.ego_at(21.1, speed=11.0)), 0.0)[2]
    assert verdict.reward == pytest.approx(100 * 1.1 / 300 * (1 - 1 / 2.23), rel=1e-4)
    assert not verdict.terminated
    verdict = drive.update(stub.planner_input(stub.ego_at(22.0, -1.5, speed=5.0)), 0.0)[2]
    assert (verdict.reward, verdict.terminated) == (0.0, True)  # a corner off the road
    assert drive.result()["route_completion"] == pytest.approx(100 * 22 / 300, rel=1e-4)


def test_lights_of_the_route() -> None:
    drive, frame = begin(x=80.0)
    assert (int(frame.light), float(frame.light_distance)) == (LightState.NONE, NO_LIGHT)
    for state, number in (("GREEN", 1), ("YELLOW", 2), ("RED", 3)):
        frame = after(drive, 80.0, lights={"over0": state, "over1": "RED"})
        assert int(frame.light) == number
        assert float(frame.light_distance) == pytest.approx(20.0 - 5.176 / 2, rel=1e-5)
    assert int(after(drive, 80.0, lights={"over0": "UNKNOWN"}).light) == LightState.NONE
    assert int(after(drive, 80.0, lights={"over1": "RED"}).light) == LightState.NONE  # another lane's
    red = {"over0": "RED"}
    assert not bool(after(drive, 99.0, speed=5.0, lights=red).ran_red_light)
    assert bool(after(drive, 100.5, speed=5.0, lights=red).ran_red_light)
    assert not bool(after(drive, 101.0, speed=5.0, lights=red).ran_red_light)  # once
    drive, _ = begin(x=99.0)
    assert not bool(after(drive, 100.5, speed=5.0, lights={"over0": "GREEN"}).ran_red_light)
    assert not bool(after(drive, 101.0, speed=5.0, lights=red).ran_red_light)  # it turned red behind us
    drive, _ = begin(x=99.0)
    assert not bool(after(drive, 100.5, speed=0.0, lights=red).ran_red_light)


# --- the planner --------------------------------------------------------------------------------------------


def planner_for(policy: Any, **given: Any) -> Any:
    planner = nuplan.SaferlPlanner(policy, **given)
    planner.initialize(SimpleNamespace(route_roadblock_ids=BLOCKS, mission_goal=None, map_api=stub.Map()))
    return planner


def test_the_planner_is_one_of_nuplans() -> None:
    planner = planner_for(Steady())
    assert isinstance(planner, stub.AbstractPlanner)
    assert nuplan.SaferlPlanner is type(planner)
    assert planner.name() == "SaferlPlanner"
    assert planner.observation_type() is stub.DetectionsTracks
    assert not type(planner).requires_scenario


def test_trajectories_are_those_of_the_bicycle() -> None:
    planner = planner_for(Steady(1.0, 0.1), horizon=2.0)
    ego = stub.ego_at(11.461, speed=10.0, time_us=5_000_000)
    states = planner.compute_trajectory(stub.planner_input(ego)).states
    assert len(states) == 21
    assert states[0] is ego
    # The specification's worked example, from the rear axle at (10, 0).
    expected = [
        (1.0, 0.0, 0.0, 10.08),
        (2.008, 0.0, 0.018244, 10.213333),
        (3.029163, 0.018632, 0.042911, 10.382222),
    ]
    for state, (x, y, heading, speed) in zip(states[1:], expected, strict=False):
        pose = state.rear_axle
        assert (pose.x - 10.0, pose.y, pose.heading) == pytest.approx((x, y, heading), abs=1e-5)
        assert state.dynamic_car_state.rear_axle_velocity_2d.x == pytest.approx(speed, abs=1e-5)
    assert [s.time_us for s in states[:3]] == [5_000_000, 5_100_000, 5_200_000]
    state = Bicycle(*(torch.tensor(v, dtype=torch.float64) for v in (10.0, 0.0, 0.0, 10.0, 0.0, 0.0)))
    for _ in range(20):
        state = drive_bicycle(state, torch.tensor(1.0), torch.tensor(0.1))
    assert states[-1].rear_axle.x == pytest.approx(float(state.x))
    assert states[-1].tire_steering_angle == pytest.approx(float(state.steering))


def test_a_closed_loop_with_perfect_tracking() -> None:
    """nuPlan's loop: the first state of each trajectory is the next one of the ego."""
    policy = Steady(0.2)
    planner = planner_for(policy, reward="carl")
    ego = stub.ego_at(20.0, speed=4.0)
    completion, rewards = [], []
    for _ in range(150):
        ego = planner.compute_trajectory(stub.planner_input(ego)).states[1]
        completion.append(float(planner.frame.completion))
        if planner.verdict is not None:
            rewards.append(planner.verdict.reward)
    assert len(rewards) == 149
    assert (np.diff(completion) >= 0).all()
    assert policy.seen[0].shape == (1, OBSERVATION_SIZE)
    assert policy.seen[0].dtype == np.float32
    gained = completion[-1] - completion[0]
    assert 0.9 * gained < sum(rewards) <= gained + 1e-3
    assert planner.result()["route_completion"] == pytest.approx(completion[-1])
    planner.initialize(SimpleNamespace(route_roadblock_ids=BLOCKS, mission_goal=None, map_api=stub.Map()))
    planner.compute_trajectory(stub.planner_input(stub.ego_at(20.0)))
    assert planner.verdict is None
    assert planner.result()["driving_score"] == 0.0


def test_a_run_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def load_policy(path: str) -> Steady:
        opened.append(str(path))
        return Steady()

    monkeypatch.setattr("saferl.policies.load_policy", load_policy)
    planner = nuplan.SaferlPlanner(policy=str(tmp_path))
    assert opened == [str(tmp_path)]
    assert isinstance(planner, PlannerCore)
