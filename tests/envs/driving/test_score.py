"""Driving scores against worked numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import savgol_filter

from saferl.envs.driving.frame import Boxes, DrivingFrame
from saferl.envs.driving.score import (
    DrivingScore,
    closed_loop_score,
    driving_score_20,
    driving_score_21,
    summarise,
)
from saferl.errors import UsageError

DOUBLE = torch.float64


def counts(**values: float) -> torch.Tensor:
    names = ("pedestrians", "vehicles", "statics", "red_lights", "stop_signs", "scenario_timeouts", "yields")
    return torch.tensor([[float(values.get(n, 0))] for n in names], dtype=DOUBLE)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=DOUBLE)


def speeds(*values: float) -> torch.Tensor:
    return torch.tensor([*values, *[100.0] * (4 - len(values))], dtype=DOUBLE)[:, None]


def test_the_worked_driving_scores() -> None:
    events = counts(vehicles=1, red_lights=1)
    score, penalty = driving_score_20(one(80), events, one(0.05), speeds(80))
    assert float(penalty) == pytest.approx(0.375060)
    assert float(score) == pytest.approx(30.0048)
    score, penalty = driving_score_21(one(80), events, one(0.05), speeds(80))
    assert float(penalty) == pytest.approx(0.435780, abs=1e-6)
    assert float(score) == pytest.approx(34.8624, abs=1e-4)
    events = counts(vehicles=2, stop_signs=1)
    assert float(driving_score_20(one(100), events, one(0), speeds())[0]) == pytest.approx(28.8)
    assert float(driving_score_21(one(100), events, one(0), speeds())[0]) == pytest.approx(37.7358, abs=1e-4)


def test_without_infractions_the_score_is_the_completion() -> None:
    for value in (0.0, 12.5, 100.0):
        for score in (driving_score_20, driving_score_21):
            assert float(score(one(value), counts(), one(0), speeds())[0]) == value


def test_the_worked_closed_loop_scores() -> None:
    parts = dict.fromkeys(("no_at_fault", "drivable", "making_progress", "direction"), one(1))
    base = {"progress": one(0.9), "ttc": one(1), "speed": one(0.95), "comfort": one(0)}
    assert float(closed_loop_score(**base, **parts)) == pytest.approx(0.83125)
    parts["no_at_fault"] = one(0.5)
    assert float(closed_loop_score(**base, **parts)) == pytest.approx(0.415625)


def frame_of(values: dict[str, Any]) -> DrivingFrame:
    frame = DrivingFrame.free_road(1)
    changed: Any = {
        k: torch.as_tensor(v, dtype=getattr(frame, k).dtype).expand(1).clone() for k, v in values.items()
    }
    return replace(frame, **changed)


def drive(steps: list[dict[str, Any]]) -> dict[str, float]:
    judge = DrivingScore()
    state = judge.initial(1, "cpu")
    for values in steps:
        state = judge.update(frame_of(values), state)
    return {k: float(v) for k, v in judge.result(state).items()}


def test_a_clean_drive_scores_everything() -> None:
    length = 150.0
    steps = [
        {"speed": 10.0, "advance": 1.0, "completion": 100.0 * (k + 1) / 150, "route_length": length}
        for k in range(150)
    ]
    found = drive(steps)
    assert found["driving_score"] == found["driving_score_21"] == pytest.approx(100.0)
    assert found["closed_loop_score"] == pytest.approx(1.0, abs=1e-5)
    assert found["km"] == pytest.approx(0.15)


def test_the_order_of_events_does_not_matter() -> None:
    steps: list[dict[str, Any]] = [{"speed": 5.0, "completion": 60.0}] * 20
    early = [{**steps[0], "hit_vehicle": True}, {**steps[0], "ran_red_light": True}, *steps]
    late = [*steps, {**steps[0], "ran_red_light": True}, {**steps[0], "hit_vehicle": True}]
    a, b = drive(early), drive(late)
    assert a == pytest.approx(b)
    assert a["driving_score"] == pytest.approx(60 * 0.6 * 0.7)
    assert a["vehicles"] == 1
    assert a["red_lights"] == 1


def test_over_the_limit_for_two_of_fifteen_seconds() -> None:
    steps = [{"speed": 11.0 if k < 20 else 10.0, "completion": 100.0, "advance": 1.0} for k in range(150)]
    found = drive(steps)
    speed = 1 - 2.0 / (2.23 * 15)
    assert speed == pytest.approx(0.940209, abs=1e-6)
    assert found["closed_loop_score"] == pytest.approx((5 + 5 + 4 * speed + 2) / 16, abs=1e-4)


def test_the_share_outside_the_lanes_is_of_the_route() -> None:
    """Of what was driven of the route, not of time: circles and standing outside the lanes add nothing."""
    steps = [
        {"speed": 10.0, "progress": 1.0, "completion": k + 1.0, "outside_lanes": k < 5} for k in range(100)
    ]
    found = drive(steps)
    assert found["penalty"] == pytest.approx(0.95)
    assert found["outside_lanes_km"] == pytest.approx(0.05)
    standing = [{"speed": 0.0, "completion": 50.0, "outside_lanes": True}] * 10
    assert (
        drive(standing)["penalty"] == drive([*standing, {"speed": 9.0, "completion": 50.0}])["penalty"] == 1.0
    )
    assert drive([{**steps[0], "outside_lanes": True}])["driving_score"] == 0.0


def test_slow_quarters_cost_only_once_they_are_behind() -> None:
    slow = [{"speed": 4.0, "background_speed": 5.0, "completion": 10.0}] * 10
    assert drive(slow)["penalty"] == pytest.approx(1.0)
    passed = [*slow, {"speed": 4.0, "background_speed": 4.0, "completion": 26.0}]
    assert drive(passed)["penalty"] == pytest.approx(1 - 0.3 * 0.2)
    # The step that passes the checkpoint counts after it.
    assert drive([*slow, {"speed": 4.0, "background_speed": 50.0, "completion": 26.0}])["penalty"] == (
        pytest.approx(1 - 0.3 * 0.2)
    )
    fast = [{"speed": 9.0, "background_speed": 5.0, "completion": 10.0}, {"speed": 0.0, "completion": 26.0}]
    assert drive(fast)["penalty"] == 1.0
    alone = [{"speed": 1.0, "completion": 10.0}, {"speed": 1.0, "completion": 26.0}]
    assert drive(alone)["penalty"] == 1.0, "without vehicles around nothing is slow"


def test_four_quarters_are_judged_each_by_its_mean() -> None:
    """A drive of 400 steps at 50, 60, 70 and 80 % of the background; the last counts from 95 % on."""
    steps: list[dict[str, Any]] = []
    for k in range(400):
        share = (0.5, 0.6, 0.7, 0.8)[min(k // 100, 3)]
        background = 4.0 + 4.0 * (k % 2)
        steps.append({"speed": share * background, "background_speed": background, "completion": 0.25 * k})
    found = 1.0
    for share in (0.5, 0.6, 0.7):
        found *= 1 - 0.3 * (1 - share)
    assert drive(steps[:370])["penalty"] == pytest.approx(found, abs=2e-3)
    assert drive(steps)["penalty"] == pytest.approx(found * (1 - 0.3 * 0.2), abs=2e-3)


def test_backwards_and_off_the_road() -> None:
    ahead = [{"speed": 5.0, "advance": 1.0, "completion": 100.0, "route_length": 100.0}] * 110
    back = [*ahead, *[{**ahead[0], "advance": -0.3}] * 10]  # 2 m net in eleven samples
    assert drive([*ahead, *[{**ahead[0], "advance": -0.29}] * 10])["closed_loop_score"] > 0.99
    far = [*ahead, *[{**ahead[0], "advance": -0.6}] * 11]
    assert drive(far)["closed_loop_score"] == 0.0
    assert drive(ahead)["closed_loop_score"] == pytest.approx(1.0, abs=1e-4)
    assert drive(back)["closed_loop_score"] == pytest.approx(0.5, abs=1e-4)
    off = [{**ahead[0], "off_road_depth": 0.31}, *ahead]
    assert drive(off)["closed_loop_score"] == 0.0
    near = [{**ahead[0], "off_road_depth": 0.29}, *ahead]
    assert drive(near)["closed_loop_score"] > 0.9
    fault = [{**ahead[0], "hit_static": True, "at_fault": True}, *ahead]
    # Half for one object; touching is also a time to collision of 0.
    assert drive(fault)["closed_loop_score"] == pytest.approx(0.5 * (5 + 4 + 2) / 16, abs=1e-3)
    blameless = [{**ahead[0], "hit_vehicle": True, "at_fault": False}, *ahead]
    assert drive(blameless)["closed_loop_score"] == pytest.approx(1.0, abs=1e-4)


def whole(score: DrivingScore, lon: np.ndarray, lat: np.ndarray, yaw: np.ndarray) -> torch.Tensor:
    """(B,) what nuPlan's score says of the comfort of traces (T, B)."""
    state = score.initial(lon.shape[1])
    for row in zip(lon, lat, yaw, strict=True):
        values: Any = dict(
            zip(("acceleration_lon", "acceleration_lat", "heading"), map(torch.from_numpy, row), strict=True)
        )
        state = score.update(replace(DrivingFrame.free_road(lon.shape[1]), **values), state)
    return score.nuplan.parts(state)["comfort"]


@pytest.mark.parametrize("steps", [3, 4, 9, 15, 21, 22, 23, 33, 34, 60])
def test_comfort_is_judged_over_the_drive_as_a_whole(steps: int) -> None:
    """As nuPlan's metric: Savitzky-Golay over all samples, every one of them within the limits."""
    rng = np.random.default_rng(steps)
    worlds = 300
    scale = rng.uniform(0, 1, worlds)
    lon = rng.normal(0, 1.5, (steps, worlds)) * scale
    lat = rng.normal(0, 1.5, (steps, worlds)) * scale
    yaw = np.cumsum(rng.normal(0, 0.02, (steps, worlds)) * scale, axis=0)
    # Half of them fail nowhere but at one place.
    at, quiet = rng.integers(0, steps, worlds), np.arange(worlds) % 2 == 0
    lon[:, quiet], lat[:, quiet], yaw[:, quiet] = 0, 0, 0
    lon[at[quiet], np.flatnonzero(quiet)] = rng.uniform(0, 9, quiet.sum())
    found = whole(DrivingScore(), lon, lat, (yaw + 3 + np.pi) % (2 * np.pi) - np.pi).numpy()
    if steps < 4:
        assert (found == 1).all()
        return

    def sg(values: np.ndarray, window: int, order: int, derivative: int) -> np.ndarray:
        result: np.ndarray = savgol_filter(values, min(window, steps), order, derivative, 0.1, axis=0)
        return result

    smooth = {name: sg(v, 8, 2, 0) for name, v in (("lon", lon), ("lat", lat), ("mag", np.hypot(lon, lat)))}
    held = (smooth["lon"] >= -4.05) & (smooth["lon"] <= 2.40) & (np.abs(smooth["lat"]) <= 4.89)
    held &= (np.abs(sg(smooth["mag"], 15, 2, 1)) <= 8.37) & (np.abs(sg(smooth["lon"], 15, 2, 1)) <= 4.13)
    held &= (np.abs(sg(yaw, 5, 2, 1)) <= 0.95) & (np.abs(sg(yaw, 5, 3, 2)) <= 1.93)
    expected = held.all(0)
    assert 0.02 < expected.mean() < 0.98
    assert (found == expected).all()


def test_the_parts_of_the_closed_loop_score() -> None:
    ahead: dict[str, Any] = {"speed": 5.0, "advance": 1.0, "route_length": 100.0, "completion": 50.0}

    def parts(steps: list[dict[str, Any]], expert: float | None = None) -> dict[str, float]:
        judge = DrivingScore()
        state = judge.initial(1)
        for values in steps:
            state = judge.update(frame_of(values), state)
        given = None if expert is None else torch.tensor([expert])
        return {k: float(v) for k, v in judge.nuplan.parts(state, given).items()}

    assert set(parts([ahead]).values()) == {1.0}
    assert parts([ahead] * 30, expert=60.0)["progress"] == 0.5
    assert parts([{**ahead, "advance": 0.5}] * 60)["progress"] == 0.5, "at the limit it would be 60 m"
    assert parts([ahead] * 90, expert=60.0)["progress"] == 1.0
    assert parts([ahead], expert=4.0)["progress"] == 0.5, "at least 2 m are taken"
    assert parts([ahead], expert=0.0)["progress"] == 1.0
    crawling = parts([{**ahead, "advance": 0.1}] * 100, expert=100.0)
    assert crawling["progress"] == pytest.approx(0.1)
    assert crawling["making_progress"] == 0.0
    assert parts([{**ahead, "advance": -0.1}] * 25)["progress"] == 0.0
    assert parts([{**ahead, "route_length": 0.0, "advance": 0.0}] * 25)["progress"] == 1.0
    for what, factor in (("hit_pedestrian", 0.0), ("hit_vehicle", 0.0), ("hit_static", 0.5)):
        hit = {**ahead, what: True, "at_fault": True}
        assert parts([hit])["no_at_fault"] == factor
        assert parts([hit])["ttc"] == 0.0
        assert parts([{**ahead, what: True}])["no_at_fault"] == 1.0
    assert parts([{**ahead, "hit_static": True, "at_fault": True}] * 2)["no_at_fault"] == 0.0
    assert parts([{**ahead, "advance": -2.0}])["direction"] == 0.5


@pytest.mark.parametrize("gap", [4.5, 4.8])
def test_time_to_collision_within_the_bound(gap: float) -> None:
    """At 5 m/s the bumpers meet after 0.9 and 0.96 s, which the grid sees at 0.9 and 1.0."""
    one_car = torch.ones(1, 1)
    leader = Boxes(
        (5 + gap) * one_car, 0 * one_car, 0 * one_car, 0 * one_car, 5 * one_car, 2 * one_car,
        torch.zeros(1, 1, dtype=torch.uint8), one_car.bool(),
    )  # fmt: skip
    judge = DrivingScore()
    frame = replace(frame_of({"speed": 5.0, "length": 5.0}), others=leader)
    state = judge.update(frame, judge.initial(1))
    clear = judge.update(frame_of({"speed": 5.0}), state)
    assert float(judge.nuplan.parts(clear)["ttc"]) == float(gap > 4.75), "once is enough"
    given = judge.update(frame, judge.initial(1), ttc=torch.tensor([0.2]))
    assert float(given["least_ttc"]) == pytest.approx(0.2)


def test_drives_are_scored_apart_and_anew() -> None:
    judge, generator = DrivingScore(), torch.Generator().manual_seed(0)

    def u(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(3, generator=generator)

    frames = []
    for k in range(60):
        values: dict[str, Any] = {
            "speed": u(0, 12),
            "progress": u(0, 3),
            "advance": u(-0.5, 1),
            "acceleration_lon": u(-3, 3),
        }
        values |= {
            "background_speed": u(2, 9),
            "completion": torch.full((3,), 1.7 * k),
            "heading": u(-0.1, 0.1),
        }
        flags: dict[str, Any] = {
            name: u(0, 1) < 0.05 for name in ("hit_vehicle", "hit_static", "at_fault", "outside_lanes")
        }
        frames.append(replace(DrivingFrame.free_road(3), **values, **flags))

    def run(frames: list[DrivingFrame], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for frame in frames:
            state = judge.update(frame, state)
        return judge.result(state)

    def rows(frame: DrivingFrame, order: list[int]) -> DrivingFrame:
        picked = {n: getattr(frame, n)[order] for n in frame.__dataclass_fields__ if n != "others"}
        return DrivingFrame(**picked, others=DrivingFrame.free_road(len(order)).others)

    all_three = run(frames, judge.initial(3))
    assert len(set(all_three["driving_score"].tolist())) == 3
    for order in ([2, 0, 1], [1]):
        alone = run([rows(f, order) for f in frames], judge.initial(len(order)))
        assert all(torch.equal(alone[name], all_three[name][order]) for name in alone)
    state = judge.initial(3)
    for frame in reversed(frames):
        state = judge.update(frame, state)
    mask, fresh = torch.tensor([False, True, False]), judge.initial(3)
    state = {name: torch.where(mask, fresh[name], value) for name, value in state.items()}
    again = run(frames, state)
    assert all(again[name][1] == all_three[name][1] for name in again)
    assert again["driving_score"][0] != all_three["driving_score"][0]


def test_scores_compile_to_one_graph() -> None:
    judge = DrivingScore()
    torch._dynamo.reset()
    step = torch.compile(judge.update, fullgraph=True, backend="eager")
    result = torch.compile(judge.result, fullgraph=True, backend="eager")
    frame = frame_of({"speed": 5.0, "background_speed": 7.0, "completion": 99.0})
    state = judge.initial(1)
    assert result(step(frame, state)) == judge.result(judge.update(frame, state))


@given(
    st.lists(st.integers(0, 3), min_size=7, max_size=7),
    st.floats(0, 1),
    st.lists(st.floats(0, 150), min_size=4, max_size=4),
    st.floats(0, 100),
)
def test_penalties_only_take_away(
    events: list[int], wrong: float, pace: list[float], completion: float
) -> None:
    n, s = torch.tensor(events, dtype=DOUBLE), torch.tensor(pace, dtype=DOUBLE)
    for score in (driving_score_20, driving_score_21):
        value, penalty = score(torch.tensor(completion, dtype=DOUBLE), n, wrong, s)
        assert 0 <= float(value) <= completion + 1e-9
        assert 0 <= float(penalty) <= 1 + 1e-12
        more = n + torch.eye(7, dtype=DOUBLE)
        worse = score(torch.full((7,), completion, dtype=DOUBLE), more.T, wrong, s[:, None].expand(4, 7))[0]
        assert (worse <= value).all()
        assert value == 0 or (worse < value).all()


def test_more_counts_than_kinds() -> None:
    with pytest.raises(UsageError, match="8 counts"):
        driving_score_20(one(80), torch.zeros(8, 1))


def test_means_are_of_products() -> None:
    base = {"driving_score_21": 0.0, "closed_loop_score": 0.0, "outside_lanes_km": 0.0, "statics": 0.0}
    base |= {"red_lights": 0.0, "stop_signs": 0.0, "pedestrians": 0.0}
    episodes = [
        {
            **base,
            "driving_score": 50.0,
            "route_completion": 100.0,
            "penalty": 0.5,
            "km": 1.0,
            "vehicles": 1.0,
        },
        {**base, "driving_score": 50.0, "route_completion": 50.0, "penalty": 1.0, "km": 0.5, "vehicles": 0.0},
    ]
    report = summarise(episodes)
    assert report["driving_score"] == 50.0 != report["route_completion"] * report["penalty"]
    assert report["route_completion_std"] == pytest.approx(35.3553, abs=1e-3)
    assert report["vehicles_per_km"] == pytest.approx(1 / 1.5)
    with pytest.raises(UsageError, match="no drives"):
        summarise([])


def test_summaries_take_batches_and_say_what_is_missing() -> None:
    judge = DrivingScore()
    state = judge.initial(3)
    completion = torch.tensor([100.0, 50.0, 0.0])
    frame = replace(
        DrivingFrame.free_road(3), completion=completion, hit_vehicle=torch.tensor([True, False, False])
    )
    found = judge.result(judge.update(frame, state))
    report = summarise([found])
    assert report["episodes"] == 3
    assert report["driving_score"] == pytest.approx((60 + 50 + 0) / 3)
    split = summarise([{k: v[:1] for k, v in found.items()}, {k: v[1:] for k, v in found.items()}])
    assert split == pytest.approx(report)
    assert report["vehicles_per_km"] == pytest.approx(1 / 1.5)
    assert report["km"] == pytest.approx(1.5)
    still = summarise([{"km": 0.0, "vehicles": 1.0, "driving_score": 0.0}])
    assert still["vehicles_per_km"] == 1000.0
    assert math.isnan(still["driving_score_std"])
    with pytest.raises(UsageError, match="drive 1 has no 'penalty'"):
        summarise([{"penalty": 1.0}, {"km": 1.0}])
