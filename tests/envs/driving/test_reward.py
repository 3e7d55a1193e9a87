"""Rewards against worked numbers, and what holds of them in general."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from saferl.envs.driving.comfort import NUPLAN_LIMITS
from saferl.envs.driving.frame import Boxes, DrivingFrame, LightState
from saferl.envs.driving.geometry import REAR_TO_CENTRE, boxes_overlap, wrap_angle
from saferl.envs.driving.reward import (
    COSTS,
    REWARDS,
    CarlReward,
    CompletionReward,
    MetaDriveReward,
    NuPlanReward,
    RoachReward,
    SparseScoreReward,
    carl_v11,
    costs,
    desired_speed,
    lane_factor,
    nuplan_weighted,
    speed_factor,
    time_to_collision,
    ttc_violation,
)
from saferl.envs.driving.world import tree_map
from saferl.errors import UsageError


def frame(batch: int = 1, **values: Any) -> DrivingFrame:
    """An empty road with some fields set, each a number for all or a list."""
    base = DrivingFrame.free_road(batch)
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Boxes):
            changed[name] = value
            continue
        like = getattr(base, name)
        row = torch.as_tensor(value, dtype=like.dtype)
        changed[name] = row.expand(batch).clone()
    return replace(base, **changed)


def boxes(*rows: tuple[float, float, float, float, int]) -> Boxes:
    """Boxes 5 m by 2 m of one world, each (x, y, heading, speed, kind)."""
    table = torch.tensor(rows)[:, :, None]
    size = torch.ones(len(rows), 1)
    x, y, heading, speed = table[:, :4].unbind(1)
    return Boxes(x, y, heading, speed, 5 * size, 2 * size, table[:, 4].to(torch.uint8), size.bool())


def violate(reward: CarlReward, comfort: int, ttc: bool) -> dict[str, torch.Tensor]:
    state = reward.initial(1, "cpu")
    state["comfort"] = state["comfort"].clone()
    state["comfort"][:comfort] = 100.0
    state["ttc"] = state["ttc"] + 100.0 * ttc
    return state


EXAMPLE: dict[str, Any] = {"progress": 0.5, "speed": 11.0, "lane_offset": 0.5}


def test_carl_gives_the_worked_reward() -> None:
    reward = CarlReward()
    step = reward(frame(**EXAMPLE), violate(reward, 2, True))
    assert float(step.reward) == pytest.approx(0.0820788, abs=1e-6)
    assert [float(step.parts[k]) for k in ("speed", "ttc", "comfort", "lane")] == pytest.approx(
        [0.551570, 0.5, 0.833333, 0.714286], abs=1e-6
    )
    hit = reward(frame(**EXAMPLE, hit_vehicle=True), violate(reward, 2, True))
    assert float(hit.reward) == pytest.approx(-0.9179212, abs=1e-6)
    assert bool(hit.terminated)
    later = carl_v11()
    state = violate(later, 2, True)
    state["astray"] = state["astray"] + 32.0
    assert float(later(frame(**EXAMPLE), state).reward) == pytest.approx(
        0.5 * 0.551570 * 0.5 * 0.833333 * 0.5, abs=1e-6
    )
    assert pytest.approx(0.0574552, abs=1e-6) == 0.5 * 0.551570 * 0.5 * 0.833333 * 0.5


def test_lane_factors() -> None:
    d, w, no = torch.tensor([0, 0.5, 1, 1.75, 2]), torch.tensor(3.5), torch.tensor(False)
    assert lane_factor(d, w, no).tolist() == pytest.approx([1, 0.7142857, 0.4285714, 0, 0], abs=1e-6)
    assert (lane_factor(d, w, ~no) == 1).all()
    d = torch.tensor([0.3, 0.5, 1, 1.75, 2.5])
    assert NuPlanReward.lane(d, w, no).tolist() == pytest.approx([1, 1, 0.8, 0.5, 0.5], abs=1e-5)


def test_nuplan_gives_the_worked_rewards() -> None:
    one = torch.ones(1)
    regular = NuPlanReward().scores(
        0.01 * one, lane=0.8 * one, speed=speed_factor(11 * one, 10 * one), route=one, comfort=5 / 6 * one,
        ttc=0.5 * one,
    )  # fmt: skip
    assert float(regular) == pytest.approx(0.1838565, abs=1e-6)
    clean = {"lane": one, "speed": one, "route": one, "comfort": one, "ttc": one}
    assert float(nuplan_weighted().scores(0.01 * one, **clean)) == pytest.approx(0.7708333, abs=1e-6)
    total = sum(float(nuplan_weighted().scores(one / 150, **clean)) for _ in range(150))
    assert total == pytest.approx(100.0, abs=1e-3)
    survival = NuPlanReward("survival")
    assert float(survival.scores(0 * one, **clean)) == pytest.approx(100 * 0.2 / 150, abs=1e-6)
    assert float(survival.scores(0.01 * one, **clean)) == pytest.approx(
        100 * (0.8 * 0.01 + 0.2 / 150), abs=1e-6
    )
    with pytest.raises(UsageError, match="did you mean 'weighted'"):
        NuPlanReward("weigthed")


def test_nuplan_ends_on_collisions_and_corners_and_forgets_the_last_step() -> None:
    reward = NuPlanReward()
    for values in ({"hit_vehicle": True}, {"off_road_depth": 0.01}):
        step = reward(frame(progress=1.0, **values), reward.initial(1, "cpu"))
        assert bool(step.terminated)
        assert float(step.reward) == 0.0
    step = reward(frame(progress=1.0, ran_red_light=True), reward.initial(1, "cpu"))
    assert not step.terminated
    assert float(step.reward) > 0.9
    assert bool(NuPlanReward(red_light=True)(frame(ran_red_light=True), reward.initial(1, "cpu")).terminated)


def roach(**values: Any) -> float:
    reward = RoachReward()
    return float(reward(frame(**values), reward.initial(1, "cpu")).reward)


def test_roach_gives_the_worked_rewards() -> None:
    assert roach(speed=6.0) == pytest.approx(1.0)
    assert roach(speed=0.0) == pytest.approx(0.0)
    assert roach(speed=12.0) == pytest.approx(0.0)
    behind = boxes((7.0, 0.0, 0.0, 0.0, 0))
    assert roach(speed=0.0, others=behind) == pytest.approx(1.0), "parking earns as much as driving"
    assert float(desired_speed(torch.tensor(10.0), 8.0)) == pytest.approx(2.4)
    shaped = 1 - abs(3 - 2.4) / 6 - 0.4 / 2 - math.radians(5) - 0.1
    assert shaped == pytest.approx(0.5127335, abs=1e-6)
    free = 1 - abs(3 - 6) / 6 - 0.4 / 2 - math.radians(5) - 0.1
    found = roach(speed=3.0, route_offset=0.4, heading_error=math.radians(5), steer=0.02)
    assert found == pytest.approx(free, abs=1e-6)
    assert roach(speed=6.0, hit_vehicle=True) == pytest.approx(-6.0)


def test_roach_slows_for_hazards_ahead_only() -> None:
    reward = RoachReward()

    def v_des(**values: Any) -> float:
        return float(reward.hazard_speed(frame(**values)))

    assert v_des(others=boxes((9.0, 0, 0, 0, 0))) == pytest.approx(6 * 1.0 / 5)
    assert v_des(others=boxes((0, 9.0, 0, 0, 0))) == 6.0, "beside"
    assert v_des(others=boxes((9.0, 0, math.pi, 0, 0))) == 6.0, "oncoming"
    assert v_des(others=boxes((9.0, 0, math.pi, 0, 1))) == pytest.approx(6 * 3.0 / 5), "a person, any way"
    red = {"light": LightState.RED, "light_distance": 6.0}
    assert v_des(**red) == pytest.approx(6 * (6.0 + 5.176 / 2 - 5) / 5, abs=1e-5)
    assert v_des(light=LightState.GREEN, light_distance=3.0) == 6.0
    assert v_des(stop_distance=1.0) == pytest.approx(0.0)


def test_standing_for_ever_is_worth_nothing_to_carl_and_everything_to_roach() -> None:
    behind = boxes((7.0, 0.0, 0.0, 0.0, 0))
    totals = {}
    for name in ("carl", "carl-1.1", "roach"):
        reward, total = REWARDS[name](), 0.0
        state = reward.initial(1, "cpu")
        for k in range(800):
            step = reward(frame(others=behind, time=0.1 * k, standing=0.1 * k), state)
            total += 0.99**k * float(step.reward)
            state = step.state
        totals[name] = total
    assert totals["carl"] == totals["carl-1.1"] == 0.0
    assert totals["roach"] == pytest.approx(100.0, abs=0.1)


def test_carl_pays_the_share_of_the_route_and_never_more() -> None:
    reward = CarlReward()
    generator = torch.Generator().manual_seed(0)

    def u(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(500, generator=generator)

    noisy = frame(500, speed=u(0, 15), lane_offset=u(0, 3), progress=u(0, 1))
    state = reward.initial(500, "cpu")
    state["comfort"] = 100.0 * (torch.rand(6, 500, generator=generator) < 0.5)
    step = reward(noisy, state)
    assert (step.reward <= noisy.progress + 1e-6).all()
    assert (step.reward >= 0).all()
    clean = reward(frame(500, progress=u(0, 1)), reward.initial(500, "cpu"))
    assert torch.equal(clean.reward, clean.parts["progress"])


@pytest.mark.parametrize(
    ("name", "values"), [("speed", [9, 10.5, 11, 12, 14]), ("lane_offset", [0, 0.4, 1, 1.6, 3])]
)
def test_carl_falls_with_speed_and_distance_from_the_centre(name: str, values: list[float]) -> None:
    rewards = CarlReward()(frame(5, progress=1.0, **{name: values}), CarlReward().initial(5, "cpu")).reward
    assert (rewards.diff() <= 0).all()
    assert rewards[0] > rewards[-1]


def test_each_failed_test_of_comfort_costs() -> None:
    reward = CarlReward()
    found = [float(reward(frame(progress=1.0), violate(reward, n, False)).reward) for n in range(7)]
    assert found == pytest.approx([1 - 0.5 * n / 6 for n in range(7)])


def test_progress_outside_the_lanes_is_lost() -> None:
    step = CarlReward()(frame(progress=1.0, outside_lanes=True), CarlReward().initial(1, "cpu"))
    assert float(step.reward) == 0.0
    assert not step.terminated


@pytest.mark.parametrize(
    ("values", "penalty"),
    [
        ({"hit_pedestrian": True}, -1),
        ({"hit_static": True}, -1),
        ({"ran_red_light": True}, -1),
        ({"ran_stop_sign": True}, 0),
        ({"off_road_share": 1.0}, 0),
        ({"deviated": True}, 0),
        ({"standing": 90.0}, 0),
    ],
)
def test_what_ends_a_drive_for_carl(values: dict[str, Any], penalty: float) -> None:
    step = CarlReward()(frame(progress=0.25, **values), CarlReward().initial(1, "cpu"))
    assert bool(step.terminated)
    assert float(step.reward) == pytest.approx(0.25 + penalty)


def test_time_to_collision_at_the_edge() -> None:
    """A gap of 5 m: 6 m/s closes 5.4 m in 0.9 s, 5 m/s only 4.5."""
    ahead = boxes((10.0, 0, 0, 0, 0))
    for speed, violated in ((6.0, True), (5.0, False)):
        assert bool(ttc_violation(frame(speed=speed, length=5.0, others=ahead))) is violated
    moving = boxes((10.0, 0, 0, 6.0, 0))
    assert not ttc_violation(frame(speed=6.0, length=5.0, others=moving))
    assert not ttc_violation(frame(speed=0.05, length=5.0, others=boxes((2.0, 0, 0, 0, 0))))
    assert not ttc_violation(frame(speed=9.0, length=5.0, others=boxes((6.0, 0, 0, 0, 2)))), "statics alone"
    assert not ttc_violation(frame(speed=9.0))
    both = boxes((6.0, 0, 0, 0, 2), (50.0, 50.0, 0, 0, 1))
    assert ttc_violation(frame(speed=9.0, length=5.0, others=both))


def traffic(worlds: int, actors: int) -> DrivingFrame:
    """Random actors (N, B) around egos at any place and heading, in double precision."""
    generator = torch.Generator().manual_seed(1)

    def u(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    x, y, shape = u(-500, 500, worlds), u(-500, 500, worlds), (actors, worlds)
    others = Boxes(
        x + u(-30, 30, *shape), y + u(-30, 30, *shape), u(-7, 7, *shape), u(-1, 12, *shape),
        u(0.5, 12, *shape), u(0.5, 3, *shape), torch.zeros(shape, dtype=torch.uint8), u(0, 1, *shape) < 0.9,
    )  # fmt: skip
    return replace(
        DrivingFrame.free_road(worlds), x=x, y=y, heading=u(-7, 7, worlds), speed=u(-3, 15, worlds),
        length=u(3, 6, worlds), width=u(1.5, 2.5, worlds), others=others,
    )  # fmt: skip


def overlaps(drive: DrivingFrame, time: float) -> torch.Tensor:
    """Whose boxes overlap after `time` s, (N, B)."""
    o = drive.others
    dx = o.x - drive.x + time * (o.speed * o.heading.cos() - drive.speed * drive.heading.cos())
    dy = o.y - drive.y + time * (o.speed * o.heading.sin() - drive.speed * drive.heading.sin())
    hit = boxes_overlap(dx, dy, drive.heading, drive.length, drive.width, o.heading, o.length, o.width)
    return hit & o.valid


def test_the_violation_is_that_of_the_five_moments() -> None:
    drive = traffic(3000, 3)
    expected = torch.stack([overlaps(drive, t) for t in (0.1, 0.3, 0.5, 0.7, 0.9)]).any(0).any(0)
    expected &= drive.speed.abs() >= 0.1
    assert torch.equal(ttc_violation(drive), expected)
    assert 0.05 < expected.double().mean() < 0.5
    later = torch.stack([overlaps(drive, t) for t in (0.2, 0.4, 0.6, 0.8, 1.0)]).any(0).any(0)
    assert torch.equal(ttc_violation(drive, first=0.2, stopped=0.0), later)
    assert (later != expected).any()
    # A person among what stands still changes nothing but whether anything is looked at.
    statics = replace(drive.others, kind=torch.full_like(drive.others.kind, 2))
    assert not ttc_violation(replace(drive, others=statics)).any()


@pytest.mark.parametrize("around", [False, True])
def test_the_time_to_collision_is_that_of_small_steps(around: bool) -> None:
    drive = replace(traffic(3000, 3), in_junction=torch.full((3000,), around))
    o = drive.others
    rear_x = drive.x - REAR_TO_CENTRE * drive.heading.cos()
    rear_y = drive.y - REAR_TO_CENTRE * drive.heading.sin()
    bearing = wrap_angle(torch.atan2(o.y - rear_y, o.x - rear_x) - drive.heading).abs()
    seen = bearing < math.radians(150 if around else 30)
    expected = torch.full((3000,), math.inf, dtype=torch.float64)
    for k in reversed(range(1, 30)):
        expected = torch.where((overlaps(drive, 0.1 * k) & seen).any(0), 0.1 * k, expected)
    expected[drive.speed.abs() <= 5e-3] = math.inf
    found = time_to_collision(drive)
    assert torch.equal(found.isinf(), expected.isinf())
    assert 0.03 < (~found.isinf()).double().mean() < 0.9
    assert torch.allclose(found, expected, atol=1e-9)
    assert (time_to_collision(replace(drive, at_fault=torch.ones(3000, dtype=torch.bool))) == 0).all()
    assert time_to_collision(replace(drive, speed=torch.full_like(drive.speed, 4e-3))).isinf().all()


def test_boxes_that_only_just_touch_are_met_left_and_right_alike() -> None:
    for side in (1.0, -1.0):
        beside = boxes((0.0, 2.0 * side, 0.0, 6.0, 0))
        found = frame(speed=6.0, length=5.0, width=2.0, others=beside)
        assert ttc_violation(found)
        away = boxes((0.0, 2.001 * side, 0.0, 6.0, 0))
        assert not ttc_violation(replace(found, others=away))
    # Closes 5.4 m in 0.9 s, to a hair.
    assert ttc_violation(frame(speed=6.0, length=5.0, others=boxes((10.4, 0, 0, 0, 0))))
    assert not ttc_violation(frame(speed=6.0, length=5.0, others=boxes((10.401, 0, 0, 0, 0))))


def test_a_violation_of_time_lasts_500_steps() -> None:
    reward = CarlReward()
    step = reward(frame(speed=6.0, length=5.0, others=boxes((10.0, 0, 0, 0, 0))), reward.initial(1, "cpu"))
    halves = 0
    for _ in range(510):
        step = reward(frame(progress=1.0), step.state)
        halves += float(step.reward) == 0.5
    assert halves == 499, "the step of the violation and 499 more"


def test_a_new_violation_starts_the_500_steps_anew() -> None:
    reward = CarlReward(ttc_penalty_ticks=10)
    near = frame(speed=6.0, length=5.0, others=boxes((10.0, 0, 0, 0, 0)))
    state, active = reward.initial(1, "cpu"), []
    for k in range(30):
        step = reward(near if k in (2, 9) else frame(progress=1.0), state)
        state = step.state
        active.append(float(step.parts["ttc"]) == 0.5)
    assert active == [2 <= k < 19 for k in range(30)]


def test_a_harsh_moment_costs_for_500_steps() -> None:
    """A turn of 2 rad/s is above CaRL's limit; each of its two tests counts for 500 steps."""
    reward, state, factors, ticks = CarlReward(), CarlReward().initial(1, "cpu"), [], []
    for k in range(600):
        step = reward(frame(progress=1.0, heading=0.2 * min(max(k - 20, 0), 3)), state)
        state = step.state
        factors.append(float(step.parts["comfort"]))
        ticks.append(state["comfort"][:, 0].tolist())
    assert factors[20] == 1.0
    assert min(factors) == pytest.approx(1 - 0.5 * 2 / 6)
    assert factors[-1] == 1.0
    for test in (4, 5):
        failed = [k for k in range(600) if ticks[k][test] == 500]
        assert failed
        assert [t[test] > 0 for t in ticks] == [failed[0] <= k < failed[-1] + 500 for k in range(600)]
    assert all(t[:4] == [0.0] * 4 for t in ticks)


def test_a_row_that_starts_anew_forgets_the_drive_before() -> None:
    """What worlds do: reset some rows of the state. A jump of the yaw between two drives must not count."""
    reward, generator = CarlReward(), torch.Generator().manual_seed(3)

    def wild(k: int) -> DrivingFrame:
        push = 30 * torch.rand(2, generator=generator)
        return frame(2, progress=1.0, acceleration_lon=push.tolist(), heading=[float(k), float(-k)])

    state = reward.initial(2, "cpu")
    for k in range(20):
        state = reward(wild(k), state).state
    assert (state["comfort"] > 0).any(0).all()
    fresh, mask = reward.initial(2, "cpu"), torch.tensor([True, False])
    state = {name: torch.where(mask, fresh[name], value) for name, value in state.items()}
    calm = frame(2, progress=1.0)
    for _ in range(30):
        step = reward(calm, state)
        state = step.state
    assert (state["comfort"][:, 0] == 0).all()
    assert float(step.reward[0]) == 1.0
    assert (state["comfort"][:, 1] > 0).any()
    assert float(step.reward[1]) < 1.0


def test_the_lane_of_the_later_reward_is_free_for_three_seconds() -> None:
    reward = carl_v11()
    state, factors = reward.initial(1, "cpu"), []
    for k in range(80):
        step = reward(frame(progress=1.0, lane_offset=1.5 if k < 40 else 0.1), state)
        state = step.state
        factors.append(float(step.parts["lane"]))
    assert factors == [1.0] * 30 + [0.5] * 19 + [1.0] * 31, "31 to 40 steps astray, then back to 30"
    assert reward.comfort_limits == NUPLAN_LIMITS


def test_nuplan_keeps_its_violations_to_the_end() -> None:
    reward = NuPlanReward()
    near = frame(progress=1.0, speed=6.0, length=5.0, others=boxes((10.0, 0, 0, 0, 0)))
    state, rewards = reward.initial(1, "cpu"), []
    for k in range(1200):
        step = reward(near if k == 1 else frame(progress=1.0), state)
        state = step.state
        rewards.append(float(step.reward))
    assert rewards[0] == pytest.approx(1.0)
    assert rewards[1:] == pytest.approx([0.5] * 1199)
    # Five metres in a second: only the code's last look, at 1.0 s, sees it.
    late = frame(speed=5.0, length=5.0, others=boxes((10.0, 0, 0, 0, 0)))
    assert bool(reward(late, reward.initial(1, "cpu")).state["ttc"])
    assert not bool(NuPlanReward(ttc_first=0.1)(late, reward.initial(1, "cpu")).state["ttc"])
    # nuPlan's limit of 2.4 m/s^2 from the fourth sample on; CaRL's tests in CARLA need eight, and 10 m/s^2.
    state, held = reward.initial(1, "cpu"), []
    for _ in range(6):
        step = reward(frame(progress=1.0, acceleration_lon=3.0), state)
        state = step.state
        held.append(float(step.reward))
    assert held == pytest.approx([1.0] * 3 + [5 / 6] * 3)


def test_collisions_of_others_fault_can_be_let_pass() -> None:
    hit = frame(progress=1.0, hit_vehicle=True)
    assert bool(NuPlanReward()(hit, NuPlanReward().initial(1, "cpu")).terminated)
    lenient = NuPlanReward(at_fault=True)
    assert not lenient(hit, lenient.initial(1, "cpu")).terminated
    assert lenient(frame(hit_vehicle=True, at_fault=True), lenient.initial(1, "cpu")).terminated


def test_roach_gives_the_worked_reward_near_a_vehicle() -> None:
    reward = RoachReward(reach=10.5)
    drive = frame(
        speed=3.0,
        route_offset=0.4,
        heading_error=math.radians(5),
        steer=0.02,
        others=boxes((10.0, 0, 0, 0, 0)),
    )
    step = reward(drive, reward.initial(1, "cpu"))
    assert float(step.parts["v_des"]) == pytest.approx(2.4)
    assert float(step.reward) == pytest.approx(0.5127335, abs=1e-6)


def test_what_ends_a_drive_for_roach() -> None:
    reward = RoachReward()

    def run(*offsets: float) -> list[bool]:
        state, ended = reward.initial(1, "cpu"), []
        for offset in offsets:
            step = reward(frame(speed=6.0, route_offset=offset), state)
            state = step.state
            ended.append(bool(step.terminated))
        return ended

    assert run(3.0, 3.5, 3.6) == [False, False, True]
    followed = run(0.0, 4.0, 4.0, 4.1)
    assert followed == [False, False, False, True], "a route that jumps aside is followed"
    done = reward(frame(speed=6.0, standing=90.0), reward.initial(1, "cpu"))
    assert done.terminated
    assert float(done.reward) == pytest.approx(0.0), "-1 without the speed"
    for what in ("ran_red_light", "ran_stop_sign", "hit_pedestrian"):
        step = reward(frame(speed=4.0, **{what: True}), reward.initial(1, "cpu"))
        assert step.terminated
        assert float(step.reward) == pytest.approx(1 - 2 / 6 - 1 - 4)
    assert not reward(frame(finished=True, time=1200.0), reward.initial(1, "cpu")).terminated


def test_roach_knows_its_cones() -> None:
    reward = RoachReward()

    def v_des(x: float, y: float, kind: int, turn: float = 0.0) -> float:
        return float(reward.hazard_speed(frame(others=boxes((x, y, turn, 0, kind)))))

    assert v_des(6.0, 5.9, 0) < 6.0 == v_des(6.0, 6.1, 0), "45 degrees"
    assert v_des(9.4, 0, 0) < 6.0 == v_des(9.6, 0, 0)
    assert v_des(8.0, 0, 0, math.radians(149)) < 6.0 == v_des(8.0, 0, 0, math.radians(151))
    assert v_des(7.0, 0, 2) == 6.0, "what is no vehicle"
    wide = math.radians(162 / 6.3)
    for angle, seen in ((0.99 * wide, True), (1.01 * wide, False)):
        assert (v_des(6.0 * math.cos(angle), 6.0 * math.sin(angle), 1) == 0.0) is seen
    nearest = boxes((9.0, 0, 0, 0, 0), (8.5, 0, 0, 0, 0))
    assert float(reward.hazard_speed(frame(others=nearest))) == pytest.approx(0.6)
    for ahead, seen in ((13.3, True), (13.5, False), (-4.6, True), (-4.7, False)):
        # 18 m are counted from 0.9 lengths behind the front.
        slow = reward.hazard_speed(frame(light=LightState.YELLOW, light_distance=ahead))
        known = frame(light=LightState.YELLOW, light_distance=ahead, length=5.176)
        assert (float(slow) < 6.0) is (seen and ahead < 7.4), ahead
        assert torch.equal(slow, reward.hazard_speed(known))


def test_metadrive() -> None:
    reward = MetaDriveReward()
    step = reward(frame(advance=0.8, speed=80 / 3.6), reward.initial(1, "cpu"))
    assert float(step.reward) == pytest.approx(0.9)
    assert not step.terminated
    goal = reward(frame(advance=0.8, finished=True), reward.initial(1, "cpu"))
    assert float(goal.reward) == 10.0
    assert not goal.terminated
    both = reward(frame(finished=True, hit_vehicle=True), reward.initial(1, "cpu"))
    assert float(both.reward) == 10.0, "the goal comes first"
    for what in ("hit_vehicle", "hit_static", "outside_lanes"):
        failed = reward(frame(advance=0.8, speed=9.0, **{what: True}), reward.initial(1, "cpu"))
        assert float(failed.reward) == -5.0
        assert failed.terminated
    assert not reward(frame(ran_red_light=True, standing=200.0), reward.initial(1, "cpu")).terminated


def test_completion_alone_knows_no_infractions() -> None:
    reward = CompletionReward()
    worst = frame(
        5, progress=0.7, speed=30.0, ran_red_light=[1, 0, 0, 0, 0], ran_stop_sign=[0, 1, 0, 0, 0],
        off_road_share=1.0, deviated=[0, 0, 0, 1, 0], standing=[0, 0, 0, 0, 90.0],
    )  # fmt: skip
    step = reward(worst, reward.initial(5, "cpu"))
    assert step.reward.tolist() == pytest.approx([0.7] * 5)
    assert step.terminated.tolist() == [False, False, False, True, True]


def test_the_sparse_score_is_paid_at_the_end() -> None:
    sparse = SparseScoreReward()
    state = sparse.initial(1, "cpu")
    step = sparse(frame(completion=50.0, speed=5.0), state)
    assert float(step.reward) == 0.0
    end = sparse(frame(completion=100.0, finished=True, speed=5.0, hit_vehicle=True), step.state)
    assert float(end.reward) == pytest.approx(0.6)
    late = sparse(frame(completion=70.0, time=1200.0), step.state)
    assert float(late.reward) == pytest.approx(0.7)
    assert not late.terminated


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_compile_to_one_graph(name: str) -> None:
    reward = REWARDS[name]()
    state = reward.initial(4, "cpu")
    drive = tree_map(lambda t: t.float() if t.is_floating_point() else t, traffic(4, 3))

    def step(drive: DrivingFrame, state: dict[str, torch.Tensor]) -> Any:
        found = reward(drive, state)
        return found.reward, found.terminated, costs(drive, found.state)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(drive, state)[:2], step(drive, state)[:2], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_keeps_the_batch_last_and_apart(name: str) -> None:
    reward = REWARDS[name]()
    state = reward.initial(3, "cpu")
    assert all(v.shape[-1] == 3 for v in state.values())
    mixed = frame(3, progress=[0.1, 0.2, 0.3], speed=[3.0, 12.0, 7.0], hit_vehicle=[False, True, False])
    step = reward(mixed, state)
    assert step.reward.shape == (3,)
    assert torch.isfinite(step.reward).all()
    assert step.terminated.tolist() == [False, name != "completion", False]
    assert step.state.keys() == state.keys()
    assert all(v.shape == state[k].shape and v.dtype == state[k].dtype for k, v in step.state.items())
    assert reward.value_measurements(mixed, step.state).shape == (10, 3)
    order = [2, 0, 1]
    turned = reward(
        frame(3, progress=[0.3, 0.1, 0.2], speed=[7.0, 3.0, 12.0], hit_vehicle=[False, False, True]), state
    )
    assert torch.equal(turned.reward, step.reward[order])
    assert set(costs(mixed, step.state)) == set(COSTS)


def test_costs_have_their_units() -> None:
    reward = CarlReward()
    state = reward.initial(1, "cpu")
    found = costs(frame(speed=12.5, ran_red_light=True, off_road_share=0.5), state)
    assert float(found["overspeed"]) == 2.5
    assert float(found["red_light"]) == 1.0
    assert float(found["off_road"]) == 0.0
    assert float(found["ttc"]) == 0.0
    near = costs(frame(speed=6.0, length=5.0, others=boxes((10.0, 0, 0, 0, 0))), state)
    assert float(near["ttc"]) == 1.0


def test_what_the_critic_knows() -> None:
    reward = CarlReward()
    state = violate(reward, 3, True)
    known = reward.value_measurements(
        frame(time=120.0, standing=45.0, completion=40.0, route_length=500.0), state
    )[:, 0]
    assert known.tolist() == pytest.approx([0.9, 0.5, 3.0, 0.2, 0.2, 0.2, 0.2, 0, 0, 0])
