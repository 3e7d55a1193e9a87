"""Worlds: nothing teleports or overlaps, rules bite when they should, and a drive depends on its seed
alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saferl.envs.driving.drivers import Driver
from saferl.envs.driving.frame import DrivingFrame
from saferl.envs.driving.geometry import EGO_LENGTH, boxes_overlap
from saferl.envs.driving.observe import VECTOR_SIZE, bird_view, speed_code, vector_observation
from saferl.envs.driving.random import uniform, whole
from saferl.envs.driving.roads import Junction, Lane, RoadBank, RoadNetwork
from saferl.envs.driving.world import DT, Population, State, Worlds, tree_map

PEOPLE = Population()


def start(worlds: Worlds, batch: int, first: int = 0) -> State:
    return worlds.start(torch.arange(first, first + batch), torch.zeros(batch, dtype=torch.int64))


def observe(bank: RoadBank, state: State, frame: DrivingFrame) -> Tensor:
    return vector_observation(bank, state, frame, PEOPLE.vehicles, PEOPLE.pedestrians)


def drive(worlds: Worlds, state: State, steps: int, name: str = "idm"):  # type: ignore[no-untyped-def]
    driver = Driver(name)
    frame = worlds.look(state)
    for _ in range(steps):
        obs = vector_observation(
            worlds.bank, state, frame, worlds.population.vehicles, worlds.population.pedestrians
        )
        action = torch.from_numpy(driver.act(obs.numpy())).T.contiguous()
        before = state
        state, frame = worlds.step(state, action)
        yield before, state, frame


def test_vehicles_never_jump_and_never_overlap(bank: RoadBank) -> None:
    worlds = Worlds(bank, ends_on_collision=False)
    pairs = torch.ones(24, 24).triu(1).bool()[..., None]
    overlaps = moved = 0
    for before, state, _ in drive(worlds, start(worlds, 24), 250):
        a, b = before.cars, state.cars
        step = ((b.x - a.x) ** 2 + (b.y - a.y) ** 2).sqrt()
        same = (b.respawns == a.respawns) & b.valid
        # Along a curve the chord is shorter than the arc; a sample of the polyline adds centimetres.
        assert (step[same] <= b.speed[same] * DT + 0.3).all()
        moved += float(step[same].sum())
        assert (b.speed >= 0).all()
        assert torch.isfinite(b.x).all()
        assert ((b.speed - a.speed)[same & (b.speed > 0)] / DT > -8.01).all()
        hit = boxes_overlap(
            b.x[:, None] - b.x, b.y[:, None] - b.y, b.yaw[None], b.length[None], b.width[None],
            b.yaw[:, None], b.length[:, None], b.width[:, None],
        )  # fmt: skip
        overlaps += int((hit & pairs & b.valid[:, None] & b.valid[None]).sum())
    assert moved > 24 * 24 * 20.0, "traffic stands"
    assert overlaps == 0


def test_vehicles_appear_again_out_of_sight(bank: RoadBank) -> None:
    worlds = Worlds(bank)
    seen = 0
    for before, state, frame in drive(worlds, start(worlds, 16), 200):
        anew = state.cars.respawns > before.cars.respawns
        distance = ((state.cars.x - frame.x) ** 2 + (state.cars.y - frame.y) ** 2).sqrt()
        assert (distance[anew] > 45.0).all()
        seen += int(anew.sum())
    assert seen > 10


def ring(cars: int, length: float = 400.0) -> Worlds:
    """One round lane, without ego or people in the way."""
    angle = np.linspace(0.0, 2 * math.pi, 400)
    radius = length / (2 * math.pi)
    lane = Lane(radius * np.stack([np.cos(angle), np.sin(angle)], 1), speed_limit=14.0, successors=[0])
    lane.points[-1] = lane.points[0]
    return Worlds(RoadBank.build([RoadNetwork([lane])], [[[0]]], 300.0), Population(cars, 0, 0))


def test_a_ring_of_vehicles_runs_for_ten_thousand_steps() -> None:
    worlds = ring(12)
    state = start(worlds, 1)
    cars = state.cars
    # Far from the ego, which stands where the ring is not.
    state.ego = state.ego._replace(x=state.ego.x + 1e4)
    cars.arc = torch.arange(12.0)[:, None] * 33.0
    cars.eagerness, cars.headway, cars.strength = (torch.full_like(cars.arc, v) for v in (1.0, 1.5, 1.0))
    from saferl.envs.driving.traffic import move_traffic

    ego, wall = worlds._seen(state, worlds.bank.route_map[state.route]), worlds._wall(state)
    for k in range(10_000):
        cars, _ = move_traffic(
            worlds.bank, cars, ego, state.people, wall, state.clock, state.step + k, state.seed,
            state.episode,
            worlds.bank.route_map[state.route], DT, False,
        )  # fmt: skip
        if k % 500 == 0:
            order = cars.arc[:, 0].sort().values
            gaps = torch.diff(order, append=order[:1] + worlds.bank.lane_length[0])
            assert gaps.min() > cars.length.max(), f"a collision at step {k}"
    # All equal: they settle at the same speed, at which the model's gap is theirs.
    assert float(cars.speed.std()) < 0.2
    v = float(cars.speed.mean())
    desired = float(worlds.bank.comfortable_speed[0])
    gap = float(worlds.bank.lane_length[0]) / 12 - float(cars.length.mean())
    wanted = (2.0 + 1.5 * v) / math.sqrt(1 - (v / desired) ** 4)
    assert wanted == pytest.approx(gap, rel=0.05)


def test_a_drive_depends_on_its_seed_alone(bank: RoadBank) -> None:
    """Bit for bit the same in a batch of 1 and of 16, in whatever slot."""
    worlds = Worlds(bank)
    action = torch.tensor([[0.6], [0.02]])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    together = worlds.start(order, torch.zeros(16, dtype=torch.int64))
    alone = worlds.start(torch.tensor([5]), torch.zeros(1, dtype=torch.int64))
    at = int((order == 5).nonzero()[0, 0])
    for _ in range(60):
        together, frames = worlds.step(together, action.expand(2, 16))
        alone, frame = worlds.step(alone, action)
    for name in ("x", "y", "speed", "completion", "lane_offset"):
        assert torch.equal(getattr(frames, name)[at : at + 1], getattr(frame, name)), name
    assert torch.equal(together.cars.x[:, at], alone.cars.x[:, 0])
    assert torch.equal(together.people.done[:, at], alone.people.done[:, 0])


def test_episodes_of_a_seed_differ(bank: RoadBank) -> None:
    worlds = Worlds(bank)
    a = worlds.start(torch.tensor([3]), torch.tensor([0]))
    b = worlds.start(torch.tensor([3]), torch.tensor([1]))
    assert a.route != b.route or not torch.equal(a.cars.x, b.cars.x)


def test_random_numbers_are_uniform_and_uncorrelated() -> None:
    seeds = torch.arange(200_000)
    zero = torch.zeros_like(seeds)
    draws = [
        uniform(seeds, zero, 1),
        uniform(seeds, zero + 1, 1),
        uniform(seeds, zero, 2),
        uniform(seeds, zero, 1, 1),
    ]
    for u in draws:
        assert u.min() >= 0
        assert u.max() < 1
        assert float(u.mean()) == pytest.approx(0.5, abs=0.004)
        assert float(u.var()) == pytest.approx(1 / 12, abs=0.002)
    correlation = torch.corrcoef(torch.stack([*draws, draws[0].roll(1)])) - torch.eye(5)
    assert correlation.abs().max() < 0.01
    counts = whole(seeds, zero, 3, 0, 7).bincount()
    assert (counts - 200_000 / 7).abs().max() < 1000


def cross(control: str, greens: tuple[float, ...] = ()) -> RoadNetwork:
    """A road of 100 m, a junction of 20 m, and 80 m beyond."""
    group = {"group": 1} if control == "signal" else {}
    lanes = [
        Lane([[0, 0], [100, 0]], successors=[1]),  # type: ignore[arg-type]
        Lane([[100, 0], [120, 0]], successors=[2], junction=0, stop_sign=control == "stop", **group),  # type: ignore[arg-type]
        Lane([[120, 0], [200, 0]]),  # type: ignore[arg-type]
    ]
    return RoadNetwork(lanes, [Junction(control, greens=greens)])


def alone(control: str, greens: tuple[float, ...] = ()) -> tuple[Worlds, State]:
    """The ego alone before that junction, the lights' clock at 0."""
    bank = RoadBank.build([cross(control, greens)], [[[0, 1, 2]]], 190.0)
    worlds = Worlds(bank, Population(1, 0, 0))
    state = start(worlds, 1)
    state.cars.valid = torch.zeros_like(state.cars.valid)
    state.clock = torch.zeros_like(state.clock)
    return worlds, state


def run(worlds: Worlds, state: State, steps: int, acceleration: float = 1.0) -> list[DrivingFrame]:
    frames = []
    for _ in range(steps):
        state, frame = worlds.step(state, torch.tensor([[acceleration], [0.0]]))
        frames.append(frame)
    return frames


def test_a_red_light_is_run_once_when_the_tail_crosses() -> None:
    worlds, state = alone("signal", (200.0, 5.0))
    frames = run(worlds, state, 110)
    ran = [k for k, f in enumerate(frames) if f.ran_red_light]
    assert len(ran) == 1
    assert float(frames[ran[0]].x) - 0.8 * EGO_LENGTH / 2 == pytest.approx(100.0, abs=2.3)
    assert int(frames[5].light) == 3
    assert float(frames[5].light_distance) == pytest.approx(
        100.0 - float(frames[5].x) - EGO_LENGTH / 2, abs=1.1
    )


def test_a_green_light_is_not_run() -> None:
    worlds, state = alone("signal", (0.1, 200.0))
    state.clock += 10.0
    assert not any(bool(f.ran_red_light) for f in run(worlds, state, 110))


def test_a_stop_sign_must_be_served() -> None:
    worlds, state = alone("stop")
    assert sum(bool(f.ran_stop_sign) for f in run(worlds, state, 110)) == 1
    driver = Driver("idm")
    worlds, state = alone("stop")
    frame, stood, ran = worlds.look(state), False, False
    for _ in range(400):
        obs = vector_observation(worlds.bank, state, frame, 1, 0)
        state, frame = worlds.step(state, torch.from_numpy(driver.act(obs.numpy())).T)
        stood |= float(frame.x) > 90 and float(frame.speed) < 0.1
        ran |= bool(frame.ran_stop_sign)
    assert stood
    assert not ran
    assert bool(frame.finished)


def test_completion_is_the_share_of_the_route() -> None:
    worlds, state = alone("priority")
    frames = run(worlds, state, 140)
    completions = torch.stack([f.completion for f in frames])[:, 0]
    assert (completions.diff() >= 0).all()
    assert float(sum(f.progress for f in frames)) == pytest.approx(float(completions[-1]), abs=1e-3)
    assert bool(frames[-1].finished)
    assert float(completions[-1]) == 100.0
    at = next(k for k, f in enumerate(frames) if f.completion > 50)
    assert float(frames[at].x - frames[0].x) == pytest.approx(94.0, abs=3.0)


def test_leaving_the_road_is_seen() -> None:
    worlds, state = alone("priority")
    for k in range(120):
        state, frame = worlds.step(state, torch.tensor([[0.5], [0.15 if k < 60 else 0.0]]))
        if frame.off_road_share > 0.99:
            break
    assert float(frame.off_road_share) == 1.0
    assert bool(frame.outside_lanes)
    assert float(frame.off_road_depth) > 2.0
    # The distance from the lane's centre is the ego's y.
    assert float(frame.route_offset) == pytest.approx(abs(float(frame.y)), abs=0.1)
    for _ in range(200):
        state, frame = worlds.step(state, torch.tensor([[0.5], [0.0]]))
    assert bool(frame.deviated)


def test_a_collision_counts_once_and_not_for_one_who_stands() -> None:
    worlds, state = alone("priority")
    state.cars.valid = torch.ones_like(state.cars.valid)
    state.cars.arc = torch.full_like(state.cars.arc, 40.0)
    state.cars.speed = torch.zeros_like(state.cars.arc)
    state.cars.eagerness = state.cars.eagerness * 0.0
    from saferl.envs.driving.traffic import pose

    cars = state.cars
    cars.lane = torch.zeros_like(cars.lane)
    cars.x, cars.y, cars.yaw, cars.curvature = pose(worlds.bank, cars.lane, cars.arc)
    hits, fault = 0, False
    for _ in range(75):
        state.cars.speed = torch.zeros_like(state.cars.speed)
        state.cars.arc = torch.full_like(state.cars.arc, 40.0)
        state, frame = worlds.step(state, torch.tensor([[1.0], [0.0]]))
        hits += int(frame.hit_vehicle)
        fault |= bool(frame.at_fault)
    assert hits == 1
    assert fault
    assert not frame.hit_pedestrian.any()
    assert not frame.hit_static.any()


def test_reactive_drivers_beat_blind_ones(bank: RoadBank) -> None:
    rates = {}
    for name in ("idm", "follow"):
        worlds = Worlds(bank, ends_on_collision=False)
        hits, last = 0, None
        for _, _, frame in drive(worlds, start(worlds, 24), 300, name):
            hits += int(frame.collided.sum()) + int(frame.ran_red_light.sum())
            last = frame
        assert last is not None
        kilometres = float((last.completion * last.route_length).sum()) / 1e5
        rates[name] = hits / kilometres
    assert rates["idm"] < 0.25 * rates["follow"]


def test_observations_are_finite_and_turn_with_the_world(bank: RoadBank) -> None:
    """The same drive in a map that is turned and moved gives the same observations."""
    angle, shift = 0.7, np.array([300.0, -120.0])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def moved(network: RoadNetwork) -> RoadNetwork:
        lanes = [Lane(**{**vars(lane), "points": lane.points @ turn.T + shift}) for lane in network.lanes]
        return RoadNetwork(lanes, network.junctions)

    found = []
    for network in (cross("signal", (5.0, 5.0)), moved(cross("signal", (5.0, 5.0)))):
        worlds = Worlds(RoadBank.build([network], [[[0, 1, 2]]], 190.0), Population(6, 0, 0))
        state = start(worlds, 4)
        for _ in range(50):
            state, frame = worlds.step(state, torch.tensor([[0.5], [0.01]]).expand(2, 4))
        obs = vector_observation(worlds.bank, state, frame, 6, 0)
        assert obs.shape == (4, VECTOR_SIZE)
        assert torch.isfinite(obs).all()
        found.append(obs)
    # Rays are read off cells of 1 m, which do not turn.
    assert (found[0][:, :246] - found[1][:, :246]).abs().max() < 2e-3
    assert (found[0][:, 246:] - found[1][:, 246:]).abs().max() < 0.15


def test_the_picture_shows_what_is_there(bank: RoadBank) -> None:
    worlds = Worlds(bank)
    state = start(worlds, 4)
    for _ in range(20):
        state, frame = worlds.step(state, torch.tensor([[0.5], [0.0]]).expand(2, 4))
    picture = bird_view(bank, state, frame, 256, 2.0)
    assert picture.shape == (4, 10, 256, 256)
    assert picture.dtype == torch.uint8
    # The ego stands on the road, 100 pixels above the lower edge.
    assert (picture[:, 0, 154:158, 126:130] == 255).all()
    others = frame.others
    for b in range(4):
        dx, dy = others.x[:24, b] - frame.x[b], others.y[:24, b] - frame.y[b]
        cos, sin = frame.heading[b].cos(), frame.heading[b].sin()
        forward, left = dx * cos + dy * sin, dy * cos - dx * sin
        for k in range(24):
            if others.valid[k, b] and -45 < forward[k] < 70 and left[k].abs() < 60:
                row, column = int(156 - 2 * forward[k]), int(128 - 2 * left[k])
                grey = int(picture[b, 3, row, column])
                expected = 127 + int(128 * min(max(float(others.speed[k, b]) + 2.67, 0.0), 36.0) / 36.0)
                assert grey >= expected > 127


def test_the_codes_of_speeds_are_the_published_ones(bank: RoadBank) -> None:
    speeds = torch.tensor([0.0, 5.0, 10.0, 20.0, 33.34, 40.0])
    assert speed_code(speeds).tolist() == [136, 154, 172, 207, 255, 255]
    assert set(bank.painted_limit.unique().tolist()) <= {0, *speed_code(bank.speed_limit).int().tolist()}


def test_tree_map_keeps_structures(bank: RoadBank) -> None:
    state = start(Worlds(bank), 3)
    copy = tree_map(lambda t: t + 0 if t.dtype != torch.bool else t.clone(), state)
    assert torch.equal(copy.cars.x, state.cars.x)
    assert type(copy.ego) is type(state.ego)
