"""Road networks hold together, and the tables say what the lanes say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saferl.envs.driving.roads import Crossing, Junction, Lane, RoadBank, RoadNetwork, random_network
from saferl.envs.driving.traffic import lights_of, pose
from saferl.envs.driving.world import border_distance
from saferl.errors import UsageError


def straight(length: float = 100.0, **kwargs: object) -> Lane:
    return Lane(np.array([[0.0, 0.0], [length, 0.0]]), **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_join_and_go_on(seed: int) -> None:
    network = random_network(seed)
    network.check()
    for lane in network.lanes:
        assert 1 <= len(lane.successors) <= 3
        for k in lane.successors:
            other = network.lanes[k]
            a, b = lane.points[-1] - lane.points[-2], other.points[1] - other.points[0]
            turn = math.atan2(a[0] * b[1] - a[1] * b[0], a @ b)
            assert abs(turn) < 0.2, "a kink between two lanes"
        if lane.junction < 0:
            assert lane.length > 3.0
    # Lanes beside one another are one width apart and go the same way.
    for lane in network.lanes:
        if lane.left >= 0:
            other = network.lanes[lane.left]
            assert np.linalg.norm(other.points[0] - lane.points[0]) == pytest.approx(3.5, abs=0.2)


def test_the_same_seed_gives_the_same_network() -> None:
    a, b = random_network(7), random_network(7)
    assert all(np.array_equal(x.points, y.points) for x, y in zip(a.lanes, b.lanes, strict=True))
    assert len(random_network(8).lanes) != len(a.lanes) or not np.array_equal(
        random_network(8).lanes[0].points, a.lanes[0].points
    )


def test_all_kinds_of_junctions_occur() -> None:
    kinds = {j.control for seed in range(40) for j in random_network(seed).junctions}
    assert kinds == {"priority", "stop", "signal", "roundabout", "merge"}


def test_traffic_keeps_to_the_right(bank: RoadBank) -> None:
    """The oncoming lane is to the left of each leftmost lane of a two-way road."""
    roads = (bank.junction < 0) & (bank.left < 0)
    assert bank.oncoming[roads].float().mean() > 0.9


def test_points_are_a_metre_apart_and_follow_the_yaw(bank: RoadBank) -> None:
    steps = bank.points[1:, :2] - bank.points[:-1, :2]
    same = bank.point_lane[1:] == bank.point_lane[:-1]
    lengths = steps.norm(dim=1)[same]
    assert lengths.min() > 0.4
    assert lengths.max() < 1.6
    yaw = torch.atan2(steps[:, 1], steps[:, 0])[same]
    turn = (yaw - bank.points[:-1, 2][same] + math.pi) % (2 * math.pi) - math.pi
    assert turn.abs().max() < 0.3


def test_pose_meets_the_ends_of_lanes(bank: RoadBank, networks: list[RoadNetwork]) -> None:
    lanes = torch.arange(len(networks[0].lanes))
    x, y, _, _ = pose(bank, lanes, bank.lane_length[lanes])
    ends = np.array([lane.points[-1] for lane in networks[0].lanes])
    assert np.abs(np.stack([x, y], 1) - ends).max() < 1e-3
    x, y, _, _ = pose(bank, lanes, torch.zeros(len(lanes)))
    starts = np.array([lane.points[0] for lane in networks[0].lanes])
    assert np.abs(np.stack([x, y], 1) - starts).max() < 1e-3


def test_conflicts_are_symmetric_and_spare_followers(bank: RoadBank) -> None:
    connectors = (bank.junction >= 0).nonzero()[:, 0].tolist()
    found = 0
    for a in connectors[:150]:
        for b in connectors[:150]:
            if bank.junction[a] == bank.junction[b]:
                ab = bool(bank.conflicts[a] & bank.bit[b])
                assert ab == bool(bank.conflicts[b] & bank.bit[a])
                found += ab
                if bank.origin[a] == bank.origin[b] >= 0:
                    assert not ab
    assert found > 20


def test_lights_go_round_and_never_let_two_groups_go() -> None:
    lanes = [
        straight(successors=[2]),
        straight(successors=[3]),
        Lane([[100, 0], [120, 0]], junction=0, group=0),  # type: ignore[arg-type]
        Lane([[100, 0], [120, 1]], junction=0, group=1),  # type: ignore[arg-type]
    ]
    network = RoadNetwork(lanes, [Junction("signal", greens=(10.0, 7.0), offset=3.0)])
    bank = RoadBank.build([network], [[[0, 2]]], 110.0)
    times = torch.arange(0.0, 100.0, 0.1)
    lights = [lights_of(bank, torch.full_like(times, k).long(), times) for k in (2, 3)]
    assert not (lights[0].green & lights[1].green).any()
    for light, seconds in zip(lights, (10.0, 7.0), strict=True):
        assert (light.green.int() + light.yellow.int() + light.red.int() == 1).all()
        # A cycle is 10 + 7 and twice 3 s of yellow and 2 s of all red.
        assert light.green.float().mean() == pytest.approx(seconds / 27.0, abs=0.03)
        assert light.yellow.float().mean() == pytest.approx(3.0 / 27.0, abs=0.03)
        waiting = ~light.green
        for k in waiting.nonzero()[:20, 0].tolist():
            ahead = round(float(light.to_green[k]) / 0.1)
            assert bool(light.green[k + ahead + 1 : k + ahead + 2].all())
    # The offset: at time 7 the first group's 10 s of green are over.
    assert bool(lights[0].green[69])
    assert not bool(lights[0].green[71])
    none = lights_of(bank, torch.tensor([0, -1]), torch.zeros(2))
    assert not none.exists.any()


def test_the_border_is_measured_from_the_carriageway() -> None:
    network = RoadNetwork([straight(80.0), Lane([[80, 3.5], [0, 3.5]])])  # type: ignore[arg-type]
    bank = RoadBank.build([network], [[[0]]], 60.0)
    y = torch.tensor([-1.75, -2.75, -4.0, 5.25, 9.25, 0.0, 1.75])
    distance = border_distance(bank, torch.zeros(7, dtype=torch.int64), torch.full((7,), 40.0), y)
    assert distance[1:5].tolist() == pytest.approx([1.0, 2.25, 0.0, 4.0], abs=0.35)
    assert distance[2] == pytest.approx(2.25, abs=0.05)
    assert (distance[5:] < -0.5).all(), "between two lanes is on the road"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda n: n.lanes[0].successors.append(9), "lane 0 refers to lane 9"),
        (lambda n: n.lanes[0].successors.append(2), "starts 50.0 m from its end"),
        (lambda n: setattr(n.lanes[1], "junction", 3), "refers to junction 3"),
        (lambda n: setattr(n.lanes[1], "group", 0), "obeys group 0"),
        (lambda n: n.lanes.clear(), "at least one lane"),
    ],
)
def test_a_broken_network_is_named(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    lanes = [straight(successors=[1]), Lane([[100, 0], [150, 0]]), Lane([[150, 0], [180, 0]])]  # type: ignore[arg-type]
    network = RoadNetwork(lanes, [Junction()], [Crossing((0, 0), (1, 1))])
    network.check()
    change(network)
    with pytest.raises(UsageError, match=sentence):
        network.check()


@pytest.mark.parametrize("points", [[[0, 0]], [[0, 0, 0], [1, 1, 1]], [[0, 0], [np.nan, 1]]])
def test_a_lane_needs_points(points: list[list[float]]) -> None:
    with pytest.raises(UsageError, match="points"):
        Lane(np.array(points))
