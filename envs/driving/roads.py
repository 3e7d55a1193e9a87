"""Road networks: lanes and junctions, drawn by hand or at random, and the tables that worlds look up.

A network is a graph of lanes. A lane is a polyline with a width, a speed limit and successors; one that
lies in a junction (a connector) knows the junction, whom it gives way to and which light it obeys.
`random_network` draws a jittered grid of two-way roads with one or two lanes a direction: straight roads,
curves, junctions with lights, stop signs or priority, roundabouts, and lanes that merge. `RoadBank` packs
networks and routes into flat tensors: lane after lane and point after point, every id global, so that a
position of any world is a gather.

Traffic keeps to the right. Nothing here runs while worlds are stepped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saferl.errors import UsageError

__all__ = [
    "CONTROLS",
    "LANE_WIDTH",
    "Crossing",
    "Junction",
    "Lane",
    "RoadBank",
    "RoadNetwork",
    "random_network",
    "random_route",
]

Floats = NDArray[np.float64]

LANE_WIDTH = 3.5
CONTROLS = ("priority", "stop", "signal", "roundabout", "merge")
SPEED_LIMITS = (8.33, 13.89, 22.22)
"""30, 50 and 80 km/h."""
SHOULDER = 2.0
"""Width (m) of the strip beside the carriageway on which cars park and people wait."""
_CONFLICT = 2.6  # m between centre lines below which two connectors cannot be used at once
_LATERAL = 2.5  # m/s^2 that drivers accept in a bend
_MARGIN = 60.0  # m of ground around a network
CELL = 1.0
"""m, side of a cell of the tables of the ground."""


@dataclass
class Lane:
    """One lane. Indices are positions in the network's list of lanes, -1 for none."""

    points: Floats
    """(n, 2), the centre line in the direction of travel."""
    speed_limit: float = 13.89
    width: float = LANE_WIDTH
    successors: list[int] = field(default_factory=list)
    left: int = -1
    """Neighbour in the same direction."""
    right: int = -1
    junction: int = -1
    """The junction it lies in; a connector."""
    origin: int = -1
    """The lane that leads into it, of a connector with a single predecessor."""
    priority: int = 0
    """Of a connector: who has more goes first."""
    group: int = -1
    """Of a connector: the group of lights that it obeys."""
    stop_sign: bool = False
    """Of a connector: whoever enters it must stand first."""

    def __post_init__(self) -> None:
        self.points = np.asarray(self.points, np.float64)
        if self.points.ndim != 2 or self.points.shape[1] != 2 or len(self.points) < 2:
            raise UsageError(f"a lane's points have shape {self.points.shape}; give (n, 2), n at least 2.")
        if not np.isfinite(self.points).all():
            raise UsageError("a lane's points are not all finite numbers.")
        if not self.width > 0 or not self.speed_limit > 0:
            raise UsageError("a lane's width and speed limit must be positive.")

    @property
    def length(self) -> float:
        return float(np.linalg.norm(np.diff(self.points, axis=0), axis=1).sum())


@dataclass
class Junction:
    """Where lanes cross: how it is controlled and, with lights, their cycle."""

    control: str = "priority"
    polygon: Floats | None = None
    """(n, 2), ground that is drivable besides the lanes."""
    greens: tuple[float, ...] = ()
    """Seconds of green of each group in turn, each followed by `yellow` and `all_red`."""
    yellow: float = 3.0
    all_red: float = 2.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise UsageError(
                f"a junction's control is {self.control!r}; it can be one of {', '.join(CONTROLS)}."
            )
        if self.control == "signal" and not self.greens:
            raise UsageError("a junction with control 'signal' needs its seconds of green, one a group.")


@dataclass
class Crossing:
    """Where people cross: kerb to kerb; with a junction and group, while that group has red."""

    start: tuple[float, float]
    end: tuple[float, float]
    junction: int = -1
    group: int = -1


@dataclass
class RoadNetwork:
    """Lanes, junctions and crossings of one map."""

    lanes: list[Lane]
    junctions: list[Junction] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)

    def check(self) -> None:
        """Raise UsageError, naming the lane, where an index leads nowhere or lanes do not join."""
        if not self.lanes:
            raise UsageError("a road network needs at least one lane.")
        for k, lane in enumerate(self.lanes):
            for other in (*lane.successors, lane.left, lane.right, lane.origin):
                if not -1 <= other < len(self.lanes):
                    raise UsageError(f"lane {k} refers to lane {other}, which does not exist.")
            if not -1 <= lane.junction < len(self.junctions):
                raise UsageError(f"lane {k} refers to junction {lane.junction}, which does not exist.")
            for other in lane.successors:
                gap = float(np.linalg.norm(self.lanes[other].points[0] - lane.points[-1]))
                if gap > 0.5:
                    raise UsageError(f"lane {other} follows lane {k} but starts {gap:.1f} m from its end.")
            if len(lane.successors) > 3:
                raise UsageError(f"lane {k} has {len(lane.successors)} successors; three is the most.")
            if lane.group >= 0:
                greens = self.junctions[lane.junction].greens if lane.junction >= 0 else ()
                if lane.group >= len(greens):
                    raise UsageError(
                        f"lane {k} obeys group {lane.group} of lights, which its junction lacks."
                    )


# --- drawing a network -----------------------------------------------------------------------------------


def _resample(points: Floats, spacing: float) -> Floats:
    """The polyline with equal steps of about `spacing`, both ends kept."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    keep = np.concatenate([[True], steps > 1e-9])
    points, steps = points[keep], steps[keep[1:]]
    arc = np.concatenate([[0.0], steps.cumsum()])
    count = max(round(arc[-1] / spacing), 1)
    wanted = np.linspace(0.0, arc[-1], count + 1)
    return np.stack([np.interp(wanted, arc, points[:, k]) for k in range(2)], axis=1)


def _offset(points: Floats, distance: float) -> Floats:
    """The polyline moved to the right by `distance`."""
    tangents = np.gradient(points, axis=0)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    return points + distance * np.stack([tangents[:, 1], -tangents[:, 0]], axis=1)


def _fillet(corners: Floats, radius: float) -> Floats:
    """The polyline through `corners` with its bends rounded."""
    pieces = [corners[:1]]
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        a, b = before - corner, after - corner
        la, lb = np.linalg.norm(a), np.linalg.norm(b)
        a, b = a / la, b / lb
        angle = math.acos(float(np.clip(a @ b, -1.0, 1.0)))
        if angle > math.pi - 0.02:
            pieces.append(corner[None])
            continue
        cut = min(radius / math.tan(angle / 2), 0.45 * min(la, lb))
        # A quadratic curve between the two cuts: tangent to both, bent most in the middle.
        t = np.linspace(0.0, 1.0, 24)[:, None]
        start, end = corner + cut * a, corner + cut * b
        pieces.append((1 - t) ** 2 * start + 2 * t * (1 - t) * corner + t**2 * end)
    pieces.append(corners[-1:])
    return np.concatenate(pieces)


def _connect(start: Floats, start_yaw: float, end: Floats, end_yaw: float) -> Floats:
    """A cubic Hermite curve whose tangents are as long as its chord."""
    chord = float(np.linalg.norm(end - start))
    t = np.linspace(0.0, 1.0, max(int(chord / 0.25), 8))[:, None]
    tangents = [chord * np.array([math.cos(yaw), math.sin(yaw)]) for yaw in (start_yaw, end_yaw)]
    return (
        (2 * t**3 - 3 * t**2 + 1) * start
        + (t**3 - 2 * t**2 + t) * tangents[0]
        + (3 * t**2 - 2 * t**3) * end
        + (t**3 - t**2) * tangents[1]
    )


def _yaw(points: Floats, at: int) -> float:
    """Direction of the polyline's first (0) or last (-1) segment."""
    step = points[1] - points[0] if at == 0 else points[-1] - points[-2]
    return math.atan2(step[1], step[0])


def _turn(a: float, b: float) -> float:
    return (b - a + math.pi) % (2 * math.pi) - math.pi


@dataclass
class _Leg:
    """One road where it meets a junction."""

    angle: float
    """Direction away from the junction."""
    incoming: list[int]
    """Lanes that end here, from the middle of the road to its edge."""
    outgoing: list[int]
    half_width: float
    group: int = 0


def _grid(generator: np.random.Generator) -> tuple[Floats, list[set[int]]]:
    """Nodes (n, 2) and their neighbours: a grid without some inner edges."""
    k = int(generator.integers(3, 5))
    pitch = generator.uniform(85.0, 140.0)
    index = np.arange(k * k).reshape(k, k)
    nodes = np.stack(np.meshgrid(np.arange(k), np.arange(k), indexing="xy"), -1).reshape(-1, 2) * pitch
    nodes = nodes + generator.uniform(-10.0, 10.0, nodes.shape)
    edges = [(index[r, c], index[r, c + 1]) for r in range(k) for c in range(k - 1)]
    edges += [(index[r, c], index[r + 1, c]) for r in range(k - 1) for c in range(k)]
    near: list[set[int]] = [set() for _ in nodes]
    for a, b in edges:
        near[a].add(int(b))
        near[b].add(int(a))
    rim = {*index[0], *index[-1], *index[:, 0], *index[:, -1]}
    for e in generator.permutation(len(edges)):
        a, b = (int(x) for x in edges[e])
        if (a in rim and b in rim) or generator.random() > 0.15:
            continue
        # At least two roads at every node, three at four of them, or there is nothing to choose.
        if min(len(near[a]), len(near[b])) > 2 and sum(len(n) > 2 for n in near) > 5:
            near[a].discard(b)
            near[b].discard(a)
    return nodes, near


def _chains(near: Sequence[set[int]]) -> list[list[int]]:
    """Roads: paths from junction to junction through nodes of two neighbours."""
    found = []
    for start in range(len(near)):
        if len(near[start]) < 3:
            continue
        for step in sorted(near[start]):
            path, before = [start, step], start
            while len(near[path[-1]]) == 2:
                following = next(n for n in near[path[-1]] if n != before)
                before = path[-1]
                path.append(following)
            if path[0] < path[-1] or (path[0] == path[-1] and path[1] < path[-2]):
                found.append(path)
    return found


def random_network(seed: int) -> RoadNetwork:
    """A network drawn from `seed`; the same at every call."""
    for attempt in range(100):
        network = _try_network(np.random.default_rng([seed, attempt]))
        if network is not None:
            network.check()
            return network
    raise AssertionError("no network in a hundred attempts")  # pragma: no cover


def _try_network(generator: np.random.Generator) -> RoadNetwork | None:
    nodes, near = _grid(generator)
    network = RoadNetwork([])
    legs: dict[int, list[_Leg]] = {n: [] for n in range(len(nodes)) if len(near[n]) > 2}
    chains = _chains(near)
    counts = {k: int(generator.integers(1, 3)) for k in range(len(chains))}
    round_nodes = {
        n
        for n in legs
        if generator.random() < 0.5
        and all(counts[k] == 1 for k, path in enumerate(chains) if n in (path[0], path[-1]))
    }
    widest = {
        n: max(counts[k] for k, path in enumerate(chains) if n in (path[0], path[-1])) * LANE_WIDTH
        for n in legs
    }
    radius = {n: 23.0 if n in round_nodes else widest[n] + 9.0 for n in legs}
    for k, path in enumerate(chains):
        if path[0] == path[-1]:
            return None  # a road from a junction to itself
        _lay_road(network, nodes[path], path[0], path[-1], counts[k], radius, legs, generator)
        if network.lanes[-1].length < 15.0:
            return None
    for n, roads in legs.items():
        roads.sort(key=lambda leg: leg.angle)
        gaps = [
            (b.angle - a.angle) % (2 * math.pi) for a, b in zip(roads, roads[1:] + roads[:1], strict=True)
        ]
        if min(gaps) < 0.85:
            return None  # two roads that leave in nearly the same direction
        if n in round_nodes:
            _lay_roundabout(network, nodes[n], roads)
        else:
            _lay_junction(network, nodes[n], roads, generator)
    if any(not lane.successors for lane in network.lanes):
        return None
    return network


def _lay_road(
    network: RoadNetwork,
    corners: Floats,
    first: int,
    last: int,
    count: int,
    radius: dict[int, float],
    legs: dict[int, list[_Leg]],
    generator: np.random.Generator,
) -> None:
    """Lanes of both directions of a road of `count` lanes each, and its two legs."""
    bent = len(corners) > 2
    centre = _resample(_fillet(corners, 28.0), 0.25)
    cut = [int(radius[n] / 0.25) for n in (first, last)]
    centre = centre[cut[0] : len(centre) - cut[1]]
    limit = float(generator.choice(SPEED_LIMITS[:2] if bent else SPEED_LIMITS))
    ends: list[tuple[list[int], list[int]]] = []
    for line in (centre, centre[::-1]):
        drops = count == 2 and not bent and len(line) > 300 and generator.random() < 0.3
        if drops:
            ends.append(_lay_merge(network, line, limit))
            continue
        ids = []
        for k in range(count):
            network.lanes.append(Lane(_offset(line, (k + 0.5) * LANE_WIDTH), limit))
            ids.append(len(network.lanes) - 1)
        _side_by_side(network, ids)
        ends.append((ids, ids))
    (there_start, there_end), (back_start, back_end) = ends
    angles = _yaw(centre, 0), _yaw(centre, -1) + math.pi
    legs[first].append(_Leg(angles[0] % (2 * math.pi), back_end, there_start, count * LANE_WIDTH))
    legs[last].append(_Leg(angles[1] % (2 * math.pi), there_end, back_start, count * LANE_WIDTH))
    # Places where people cross without a light, whether drivers expect it or not.
    for share in generator.uniform(0.2, 0.8, size=max(len(centre) // 240, 1)):
        at = int(share * (len(centre) - 2)) + 1
        normal = _offset(centre[at - 1 : at + 2], count * LANE_WIDTH + 1.0)[1] - centre[at]
        network.crossings.append(
            Crossing(tuple((centre[at] + normal).tolist()), tuple((centre[at] - normal).tolist()))
        )


def _side_by_side(network: RoadNetwork, ids: Sequence[int]) -> None:
    for left, right in itertools.pairwise(ids):
        network.lanes[left].right, network.lanes[right].left = right, left


def _lay_merge(network: RoadNetwork, line: Floats, limit: float) -> tuple[list[int], list[int]]:
    """Two lanes of which the right one ends half-way; returns the lanes at the start and at the end."""
    lanes = network.lanes
    half, run = len(line) // 2, 100  # 25 m in which to merge
    network.junctions.append(Junction("merge"))
    junction, first = len(network.junctions) - 1, len(lanes)
    kept, ending = (_offset(line, (k + 0.5) * LANE_WIDTH) for k in range(2))
    after = kept[half + run :]
    merge = _connect(ending[half], _yaw(line[half:], 0), after[0], _yaw(after, 0))
    lanes.append(Lane(kept[: half + 1], limit, successors=[first + 2]))
    lanes.append(Lane(ending[: half + 1], limit, successors=[first + 3]))
    through = kept[half : half + run + 1]
    lanes.append(Lane(through, limit, successors=[first + 4], junction=junction, origin=first, priority=1))
    lanes.append(Lane(merge, limit, successors=[first + 4], junction=junction, origin=first + 1))
    lanes.append(Lane(after, limit))
    _side_by_side(network, [first, first + 1])
    return [first, first + 1], [first + 4]


def _lay_junction(
    network: RoadNetwork, centre: Floats, legs: list[_Leg], generator: np.random.Generator
) -> None:
    """Connectors of every legal turn, who gives way, and lights, signs and crossings."""
    lanes = network.lanes
    control = str(generator.choice(("signal", "stop", "priority"), p=(0.6, 0.2, 0.2)))
    # The two legs nearest to opposite are the main road, group 0.
    pairs = [
        (abs(abs(_turn(a.angle, b.angle)) - math.pi), i, j)
        for i, a in enumerate(legs)
        for j, b in enumerate(legs)
        if i < j
    ]
    _, i, j = min(pairs)
    for k, leg in enumerate(legs):
        leg.group = 0 if k in (i, j) else 1
    greens = tuple(float(g) for g in generator.uniform(10.0, 25.0, 2)) if control == "signal" else ()
    corners = []
    for leg in legs:
        end = centre + _edge(lanes, leg, centre)
        side = leg.half_width * np.array([-math.sin(leg.angle), math.cos(leg.angle)])
        corners += [end + side, end - side]
    network.junctions.append(
        Junction(control, _hull(np.array(corners)), greens, offset=float(generator.uniform(0.0, 60.0)))
    )
    junction = len(network.junctions) - 1
    for leg in legs:
        if control == "signal":
            along = np.array([math.cos(leg.angle), math.sin(leg.angle)])
            middle = centre + _edge(lanes, leg, centre) - 2.0 * along
            side = (leg.half_width + 1.0) * np.array([-along[1], along[0]])
            network.crossings.append(
                Crossing(
                    tuple((middle + side).tolist()), tuple((middle - side).tolist()), junction, leg.group
                )
            )
        turns: dict[str, list[_Leg]] = {"left": [], "straight": [], "right": []}
        for other in legs:
            if other is not leg:
                turns[_direction(_turn(leg.angle + math.pi, other.angle))].append(other)
        for k, start in enumerate(leg.incoming):
            ways = ["left", "straight", "right"]
            if len(leg.incoming) == 2:
                ways = ["left", "straight"] if k == 0 else ["right", "straight"]
                if not any(turns[way] for way in ways):
                    ways = ["left", "straight", "right"]
            for way in ways:
                for other in turns[way]:
                    if len(lanes[start].successors) == 3:
                        continue
                    last = len(other.outgoing) - 1
                    goal = other.outgoing[{"left": 0, "straight": min(k, last), "right": last}[way]]
                    a, b = lanes[start].points, lanes[goal].points
                    curve = _connect(a[-1], _yaw(a, -1), b[0], _yaw(b, 0))
                    main = 10 * (leg.group == 0 and control != "signal")
                    lanes.append(
                        Lane(
                            curve,
                            lanes[start].speed_limit,
                            successors=[goal],
                            junction=junction,
                            origin=start,
                            priority=main + {"left": 1, "right": 2, "straight": 3}[way],
                            group=leg.group if control == "signal" else -1,
                            stop_sign=control == "stop" and leg.group == 1,
                        )
                    )
                    lanes[start].successors.append(len(lanes) - 1)


def _direction(turn: float) -> str:
    if turn > math.radians(35):
        return "left"
    return "right" if turn < -math.radians(35) else "straight"


def _edge(lanes: Sequence[Lane], leg: _Leg, centre: Floats) -> Floats:
    """From the junction's centre to the middle of the road's end."""
    along = np.array([math.cos(leg.angle), math.sin(leg.angle)])
    return along * float((lanes[leg.outgoing[0]].points[0] - centre) @ along)


def _hull(points: Floats) -> Floats:
    """The convex hull of a few points, counter-clockwise."""
    from scipy.spatial import ConvexHull

    return np.asarray(points[ConvexHull(points).vertices], np.float64)


def _lay_roundabout(network: RoadNetwork, centre: Floats, legs: list[_Leg]) -> None:
    """A ring, counter-clockwise, in which those inside go first."""
    lanes, radius, spread = network.lanes, 13.0, 0.42
    network.junctions.append(Junction("roundabout"))
    junction, first, n = len(network.junctions) - 1, len(lanes), len(legs)
    # Lane 4k + 0 enters from leg k, + 1 leaves to it, + 2 goes past it, + 3 goes on to leg k + 1.
    ring = [leg.angle for leg in legs]

    def at(angle: float) -> Floats:
        return centre + radius * np.array([math.cos(angle), math.sin(angle)])

    def arc(start: float, end: float) -> Floats:
        angles = np.linspace(start, start + (end - start) % (2 * math.pi), 40)
        return centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)

    for k, leg in enumerate(legs):
        entry, leave = leg.angle + spread, leg.angle - spread
        come, go = lanes[leg.incoming[0]], lanes[leg.outgoing[0]]
        own, following = first + 4 * k, first + 4 * ((k + 1) % n)
        enter = _connect(come.points[-1], _yaw(come.points, -1), at(entry), entry + math.pi / 2)
        out = _connect(at(leave), leave + math.pi / 2, go.points[0], _yaw(go.points, 0))
        limit = min(come.speed_limit, 8.33)
        shared: dict[str, Any] = {"junction": junction}
        lanes.append(Lane(enter, limit, successors=[own + 3], origin=leg.incoming[0], priority=1, **shared))
        lanes.append(Lane(out, limit, successors=[leg.outgoing[0]], priority=5, **shared))
        lanes.append(Lane(arc(leave, entry), limit, successors=[own + 3], priority=5, **shared))
        onward = arc(entry, ring[(k + 1) % n] - spread)
        lanes.append(Lane(onward, limit, successors=[following + 1, following + 2], priority=5, **shared))
        come.successors.append(own)
    for k in range(n):
        # Leaving and going past both come from the same piece of ring.
        following = first + 4 * ((k + 1) % n)
        lanes[following + 1].origin = lanes[following + 2].origin = first + 4 * k + 3


def random_route(network: RoadNetwork, generator: np.random.Generator, length: float) -> list[int]:
    """Lanes of a legal walk of at least `length` metres through a junction, begun on a road of 25 m or
    more."""
    lanes = network.lanes
    starts = [k for k, lane in enumerate(lanes) if lane.junction < 0 and lane.length >= 25.0]
    starts = starts or list(range(len(lanes)))
    for _ in range(50):
        route, total, turns = [int(generator.choice(starts))], 0.0, 0
        while True:
            lane = lanes[route[-1]]
            total += lane.length
            turns += lane.junction >= 0
            if total >= length or not lane.successors:
                break
            route.append(int(generator.choice(lane.successors)))
        if total >= length and turns:
            return route
    return route


# --- tables ----------------------------------------------------------------------------------------------

ROAD, MARKING, BROKEN, SHOULDER_BIT, IN_JUNCTION = (1 << k for k in range(5))
"""Bits of `RoadBank.paint`."""
PAINT_CELL = 0.5
SLOTS = 61
"""Places for vehicles near a route's start; prime, so that any stride visits all."""


@dataclass
class RoadBank:
    """Networks and routes as flat tensors; lanes, points, slots and cells have global numbers.

    P points, L lanes, M maps, R routes of at most T points, S slots, X crossings, C cells, D cells of paint.
    """

    points: Tensor
    """(P, 4): x, y, yaw (continuous along a lane), curvature (1/m)."""
    point_lane: Tensor
    """(P,)."""
    lane_start: Tensor
    """(L,) first point; the lane has `lane_segments` + 1."""
    lane_segments: Tensor
    lane_spacing: Tensor
    """(L,) m between its points, about 1."""
    lane_length: Tensor
    lane_width: Tensor
    speed_limit: Tensor
    comfortable_speed: Tensor
    """(L,) what drivers choose in its bends, at most the limit."""
    left: Tensor
    right: Tensor
    lanes_right: Tensor
    """(L,) lanes between it and the edge of the road."""
    oncoming: Tensor
    """(L,) bool: the lane to its left is for the other direction."""
    junction: Tensor
    """(L,) global junction, -1 on roads."""
    bit: Tensor
    """(L,) int64, a connector's own bit in its junction's masks, 0 on roads."""
    conflicts: Tensor
    """(L,) int64, bits of the connectors that cross it."""
    origin: Tensor
    priority: Tensor
    stop_sign: Tensor
    successors: Tensor
    """(L, 3)."""
    successor_count: Tensor
    light_cycle: Tensor
    """(L,) s, 0 without a light."""
    light_offset: Tensor
    green_start: Tensor
    green_end: Tensor
    yellow: Tensor
    slot_lane: Tensor
    slot_arc: Tensor
    slot_start: Tensor
    """(M,) first slot of a map."""
    slot_count: Tensor
    crossing: Tensor
    """(X, 4): from x, y to x, y."""
    crossing_light: Tensor
    """(X,) lane whose red lets people walk, -1 without a light."""
    crossing_start: Tensor
    crossing_count: Tensor
    ground_start: Tensor
    """(M,) first cell; rows of `ground_width` cells of 1 m from `ground_origin`."""
    ground_width: Tensor
    ground_height: Tensor
    ground_origin: Tensor
    """(M, 2)."""
    border: Tensor
    """(C,) m to the edge of the carriageway, negative on it."""
    near_point: Tensor
    """(C,) the nearest point of any lane."""
    paint: Tensor
    """(D,) uint8, cells of 0.5 m on the same ground, twice as many a side."""
    painted_limit: Tensor
    """(D,) uint8, CaRL's grey of the speed limit on centre lines, 0 elsewhere."""
    route_points: Tensor
    """(R, T) points; after its last a route repeats it."""
    route_arc: Tensor
    """(R, T) m from its start."""
    route_next: Tensor
    """(R, T) the connector driven on, or else the next one ahead; -1 for none."""
    route_next_arc: Tensor
    """(R, T) where that begins."""
    route_count: Tensor
    route_length: Tensor
    route_map: Tensor
    route_slots: Tensor
    """(R, SLOTS) slots around its start."""
    route_slot_count: Tensor
    """(R,) of those, different ones."""
    map_routes: Tensor
    """(M, 2): a map's first route and their number."""

    def to(self, device: torch.device | str) -> RoadBank:
        """The same on `device`."""
        return RoadBank(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @classmethod
    def build(
        cls,
        networks: Sequence[RoadNetwork],
        routes: Sequence[Sequence[Sequence[int]]],
        lengths: Sequence[Sequence[float]] | float,
    ) -> RoadBank:
        """Pack networks with their routes.

        Args:
            networks: M maps.
            routes: for each map, its routes as lists of lanes.
            lengths: where each route ends (m from the start of its first lane), or one length for all.

        Raises:
            UsageError: a network does not hold together, or a route's lanes do not follow one another.
        """
        parts: dict[str, list[Any]] = {f.name: [] for f in fields(cls)}
        offset = dict.fromkeys(("points", "lanes", "junctions", "slots", "crossings", "cells", "routes"), 0)
        for m, network in enumerate(networks):
            network.check()
            arrays = _LaneTables(network)
            wanted = lengths if isinstance(lengths, float) else lengths[m]
            ground = _ground(network, arrays)
            slots = _slots(network)
            paths = [
                _route(network, arrays, route, wanted if isinstance(wanted, float) else wanted[r])
                for r, route in enumerate(routes[m])
            ]
            parts["points"].append(arrays.points)
            parts["point_lane"].append(arrays.point_lane + offset["lanes"])
            parts["lane_start"].append(arrays.start + offset["points"])
            for name in (
                "lane_segments",
                "lane_spacing",
                "lane_length",
                "comfortable_speed",
                "conflicts",
                "bit",
                "lanes_right",
                "oncoming",
                "light_cycle",
                "light_offset",
                "green_start",
                "green_end",
                "yellow",
            ):
                parts[name].append(getattr(arrays, name))
            for name, values in (
                ("lane_width", [lane.width for lane in network.lanes]),
                ("speed_limit", [lane.speed_limit for lane in network.lanes]),
                ("priority", [lane.priority for lane in network.lanes]),
                ("stop_sign", [lane.stop_sign for lane in network.lanes]),
                ("successor_count", [len(lane.successors) for lane in network.lanes]),
            ):
                parts[name].append(np.array(values))
            for name in ("left", "right", "origin"):
                parts[name].append(_shift([getattr(lane, name) for lane in network.lanes], offset["lanes"]))
            parts["junction"].append(_shift([lane.junction for lane in network.lanes], offset["junctions"]))
            # A lane without a successor leads into itself; vehicles at its end are taken away.
            following = [
                [*lane.successors, *[lane.successors[0] if lane.successors else k] * 3][:3]
                for k, lane in enumerate(network.lanes)
            ]
            parts["successors"].append(np.array(following) + offset["lanes"])
            parts["slot_lane"].append(slots[0] + offset["lanes"])
            parts["slot_arc"].append(slots[1])
            parts["slot_start"].append([offset["slots"]])
            parts["slot_count"].append([len(slots[0])])
            parts["crossing"].append(np.array([[*c.start, *c.end] for c in network.crossings]).reshape(-1, 4))
            parts["crossing_light"].append(_shift(_walk_lights(network), offset["lanes"]))
            parts["crossing_start"].append([offset["crossings"]])
            parts["crossing_count"].append([len(network.crossings)])
            parts["ground_start"].append([offset["cells"]])
            parts["ground_width"].append([ground.shape[1]])
            parts["ground_height"].append([ground.shape[0]])
            parts["ground_origin"].append(ground.origin[None])
            parts["border"].append(ground.border.ravel())
            parts["near_point"].append(ground.near_point.ravel() + offset["points"])
            parts["paint"].append(ground.paint.ravel())
            parts["painted_limit"].append(ground.limit.ravel())
            for path in paths:
                parts["route_points"].append(path.points + offset["points"])
                parts["route_arc"].append(path.arc)
                parts["route_next"].append(_shift(path.following, offset["lanes"]))
                parts["route_next_arc"].append(path.following_arc)
                parts["route_count"].append([len(path.points)])
                parts["route_length"].append([path.arc[-1]])
                parts["route_map"].append([m])
                start = arrays.points[path.points[0], :2]
                near = _near_slots(slots[2], start)
                parts["route_slots"].append(near + offset["slots"])
                parts["route_slot_count"].append([len(np.unique(near))])
            parts["map_routes"].append(np.array([[offset["routes"], len(paths)]]))
            for name, count in (
                ("points", len(arrays.points)), ("lanes", len(network.lanes)),
                ("junctions", len(network.junctions)), ("slots", len(slots[0])),
                ("crossings", len(network.crossings)), ("cells", ground.border.size), ("routes", len(paths)),
            ):  # fmt: skip
                offset[name] += count
        if not offset["crossings"]:  # nobody looks at it, but there must be a row to gather
            parts["crossing"], parts["crossing_light"] = [np.zeros((1, 4))], [np.array([-1])]
        longest = max(len(points) for points in parts["route_points"])
        for name in ("route_points", "route_arc", "route_next", "route_next_arc"):
            parts[name] = [np.pad(row, (0, longest - len(row)), mode="edge")[None] for row in parts[name]]
        parts["route_slots"] = [row[None] for row in parts["route_slots"]]
        return cls(**{name: _tensor(np.concatenate(values)) for name, values in parts.items()})


def _tensor(values: NDArray[Any]) -> Tensor:
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(values if values.dtype in (np.bool_, np.uint8) else values.astype(np.int64))


def _shift(values: Sequence[int] | NDArray[Any], by: int) -> NDArray[np.int64]:
    array = np.asarray(values, np.int64)
    return np.where(array >= 0, array + by, -1)


class _LaneTables:
    """A network's lanes as arrays, ids local to the network."""

    def __init__(self, network: RoadNetwork) -> None:
        lanes = network.lanes
        sampled = [_resample(lane.points, 1.0) for lane in lanes]
        self.lane_segments = np.array([len(points) - 1 for points in sampled])
        self.start = np.concatenate([[0], (self.lane_segments + 1).cumsum()[:-1]])
        self.lane_length = np.array([lane.length for lane in lanes])
        self.lane_spacing = self.lane_length / self.lane_segments
        self.point_lane = np.repeat(np.arange(len(lanes)), self.lane_segments + 1)
        yaws = []
        for points in sampled:
            step = np.gradient(points, axis=0)
            yaws.append(np.unwrap(np.arctan2(step[:, 1], step[:, 0])))
        bends = [
            np.gradient(yaw) / spacing if len(yaw) > 2 else np.zeros(len(yaw))
            for yaw, spacing in zip(yaws, self.lane_spacing, strict=True)
        ]
        self.points = np.column_stack([np.concatenate(sampled), np.concatenate(yaws), np.concatenate(bends)])
        sharpest = np.array([np.abs(bend).max() for bend in bends])
        limits = np.array([lane.speed_limit for lane in lanes])
        self.comfortable_speed = np.minimum(limits, np.sqrt(_LATERAL / np.maximum(sharpest, 1e-4)))
        self.lanes_right = np.array([self._steps_right(lanes, k) for k in range(len(lanes))])
        self.oncoming = np.array([self._faces_traffic(lanes, sampled, k) for k in range(len(lanes))])
        self.bit, self.conflicts = _conflicts(lanes, sampled)
        self._lights(network)

    @staticmethod
    def _steps_right(lanes: Sequence[Lane], k: int) -> int:
        steps = 0
        while lanes[k].right >= 0 and steps < 8:
            k, steps = lanes[k].right, steps + 1
        return steps

    @staticmethod
    def _faces_traffic(lanes: Sequence[Lane], sampled: Sequence[Floats], k: int) -> bool:
        """Whether a lane of the other direction lies right beside the middle of lane k, on its left."""
        if lanes[k].junction >= 0 or lanes[k].left >= 0:
            return False
        line = sampled[k]
        middle, yaw = line[len(line) // 2], _yaw(line[len(line) // 2 - 1 :], 0)
        beside = middle + lanes[k].width * np.array([-math.sin(yaw), math.cos(yaw)])
        for other, points in enumerate(sampled):
            if lanes[other].junction < 0 and other != k:
                near = int(np.linalg.norm(points - beside, axis=1).argmin())
                if np.linalg.norm(points[near] - beside) < 1.0:
                    at = min(near, len(points) - 2)
                    return abs(_turn(yaw, _yaw(points[at:], 0))) > math.pi / 2
        return False

    def _lights(self, network: RoadNetwork) -> None:
        count = len(network.lanes)
        self.light_cycle, self.light_offset = np.zeros(count), np.zeros(count)
        self.green_start, self.green_end, self.yellow = np.zeros(count), np.zeros(count), np.zeros(count)
        for k, lane in enumerate(network.lanes):
            if lane.group < 0:
                continue
            junction = network.junctions[lane.junction]
            pause = junction.yellow + junction.all_red
            self.light_cycle[k] = sum(junction.greens) + pause * len(junction.greens)
            self.light_offset[k] = junction.offset
            self.green_start[k] = sum(junction.greens[: lane.group]) + pause * lane.group
            self.green_end[k] = self.green_start[k] + junction.greens[lane.group]
            self.yellow[k] = junction.yellow


def _conflicts(
    lanes: Sequence[Lane], sampled: Sequence[Floats]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Bits of connectors and of those they cross; lanes from one origin follow, and do not cross."""
    bit, conflicts = np.zeros(len(lanes), np.int64), np.zeros(len(lanes), np.int64)
    members: dict[int, list[int]] = {}
    for k, lane in enumerate(lanes):
        if lane.junction >= 0:
            members.setdefault(lane.junction, []).append(k)
    for ids in members.values():
        if len(ids) > 62:
            raise UsageError(f"a junction has {len(ids)} connecting lanes; 62 is the most.")
        for position, k in enumerate(ids):
            bit[k] = 1 << position
        for a in ids:
            for b in ids:
                same = lanes[a].origin >= 0 and lanes[a].origin == lanes[b].origin
                chained = a in lanes[b].successors or b in lanes[a].successors
                if a == b or same or chained:
                    continue
                apart = np.linalg.norm(sampled[a][:, None] - sampled[b][None], axis=-1).min()
                if apart < _CONFLICT:
                    conflicts[a] |= bit[b]
    return bit, conflicts


def _walk_lights(network: RoadNetwork) -> list[int]:
    """For each crossing, a lane of its group, whose red is the walkers' green."""
    found = []
    for crossing in network.crossings:
        lane = -1
        if crossing.group >= 0:
            lane = next(
                (
                    k
                    for k, other in enumerate(network.lanes)
                    if other.junction == crossing.junction and other.group == crossing.group
                ),
                -1,
            )
        found.append(lane)
    return found


def _slots(network: RoadNetwork) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Places for vehicles every 9 m on roads: lane, arc and position (S, 2)."""
    ids, arcs, places = [], [], []
    for k, lane in enumerate(network.lanes):
        if lane.junction >= 0:
            continue
        points = _resample(lane.points, 1.0)
        for arc in np.arange(4.0, lane.length - 8.0, 9.0):
            ids.append(k)
            arcs.append(arc)
            places.append(points[min(int(arc), len(points) - 1)])
    if not ids:
        ids, arcs, places = [0], [0.0], [network.lanes[0].points[0]]
    return np.array(ids), np.array(arcs), np.array(places)


def _near_slots(places: Floats, start: Floats) -> NDArray[np.int64]:
    """The slots nearest to a route's start but for those within 14 m of it; farther ones again if few."""
    apart = np.linalg.norm(places - start, axis=1)
    order = np.argsort(np.where(apart < 14.0, np.inf, apart), kind="stable")
    order = order[: max(int((apart >= 14.0).sum()), 1)]
    return np.resize(order, SLOTS)


@dataclass
class _Path:
    points: NDArray[np.int64]
    arc: Floats
    following: NDArray[np.int64]
    following_arc: Floats


def _route(network: RoadNetwork, tables: _LaneTables, route: Sequence[int], length: float) -> _Path:
    """The points of a route, from 2 m into its first lane to `length`."""
    lanes = network.lanes
    for a, b in itertools.pairwise(route):
        if b not in lanes[a].successors:
            raise UsageError(f"the route goes from lane {a} to lane {b}, which does not follow it.")
    points, arcs, begin, total = [], [], [], 0.0
    for k in route:
        count = int(tables.lane_segments[k])
        begin.append(total)
        points.append(tables.start[k] + np.arange(count))
        arcs.append(total + tables.lane_spacing[k] * np.arange(count))
        total += float(tables.lane_length[k])
    ids, arc = np.concatenate(points), np.concatenate(arcs)
    keep = (arc >= 2.0) & (arc <= max(length, 10.0))
    following = np.full(len(ids), -1, np.int64)
    following_arc = np.full(len(ids), 1e4)
    upcoming, upcoming_arc = -1, 1e4
    position = len(ids)
    for k, start, own in zip(reversed(route), reversed(begin), reversed(points), strict=True):
        if lanes[k].junction >= 0:
            upcoming, upcoming_arc = k, start
        following[position - len(own) : position] = upcoming
        following_arc[position - len(own) : position] = upcoming_arc
        position -= len(own)
    origin = arc[keep][0]
    return _Path(ids[keep], arc[keep] - origin, following[keep], following_arc[keep] - origin)


@dataclass
class _Ground:
    origin: Floats
    shape: tuple[int, int]
    border: Floats
    near_point: NDArray[np.int64]
    paint: NDArray[np.uint8]
    limit: NDArray[np.uint8]


def _ground(network: RoadNetwork, tables: _LaneTables) -> _Ground:
    """Distance to the edge of the carriageway, nearest point, and paint, of every cell."""
    from scipy.ndimage import distance_transform_edt
    from scipy.spatial import cKDTree

    low = tables.points[:, :2].min(0) - _MARGIN
    columns, rows = (int(n) for n in np.ceil((tables.points[:, :2].max(0) + _MARGIN - low) / CELL))
    xs, ys = (low[k] + (np.arange(n) + 0.5) * CELL for k, n in enumerate((columns, rows)))
    cells = np.stack(np.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2)
    apart, nearest = cKDTree(tables.points[:, :2]).query(cells)
    border = apart - 0.5 * np.array([lane.width for lane in network.lanes])[tables.point_lane[nearest]]
    # Points 1 m apart will do in the fields; near the road the distance to the line itself is wanted.
    close = np.flatnonzero(apart < 8.0)
    exact = np.full(len(close), np.inf)
    for width in {lane.width for lane in network.lanes}:
        fine = np.concatenate([_resample(lane.points, 0.25) for lane in network.lanes if lane.width == width])
        exact = np.minimum(exact, cKDTree(fine).query(cells[close])[0] - width / 2)
    border[close] = exact
    for junction in network.junctions:
        if junction.polygon is not None:
            window = (np.abs(cells - junction.polygon.mean(0)) < 40.0).all(1)
            border[window] = np.minimum(border[window], _polygon_distance(cells[window], junction.polygon))
    border = border.reshape(rows, columns)
    # Between lanes side by side the minimum is 0: inside, count cells to the nearest one outside.
    depth = distance_transform_edt(border <= 0.05) - 0.5
    border = np.where(border <= 0.05, np.minimum(-CELL * np.maximum(depth, 0.1), 0.0), border)
    shape = (rows, columns)
    return _Ground(low, shape, border, nearest.reshape(shape), *_paint(network, low, shape))


def _polygon_distance(places: Floats, corners: Floats) -> Floats:
    """Distance to a convex polygon, negative inside; a lower bound beyond its corners."""
    edge = np.roll(corners, -1, axis=0) - corners
    normal = np.stack([edge[:, 1], -edge[:, 0]], axis=1) / np.linalg.norm(edge, axis=1, keepdims=True)
    result: Floats = (places @ normal.T - (corners * normal).sum(1)).max(1)
    return result


def _paint(
    network: RoadNetwork, low: Floats, shape: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Road, markings and shoulder as bits, and speed limits on centre lines, in cells of 0.5 m."""
    height, width = (2 * n for n in shape)
    paint = np.zeros((height, width), np.uint8)
    limit = np.zeros((height, width), np.uint8)

    def mark(places: Floats, bit: int) -> None:
        column, row = (((places[..., k] - low[k]) / PAINT_CELL).astype(int) for k in range(2))
        np.bitwise_or.at(paint, (row.clip(0, height - 1), column.clip(0, width - 1)), bit)

    for lane in network.lanes:
        line = _resample(lane.points, 0.25)
        tangent = np.gradient(line, axis=0)
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        right = np.stack([tangent[:, 1], -tangent[:, 0]], axis=1)
        half = lane.width / 2
        across = np.arange(-half, half + 0.01, 0.25)
        column, row = (((line[:, k] - low[k]) / PAINT_CELL).astype(int) for k in range(2))
        limit[row, column] = _limit_code(lane.speed_limit)
        bits = ROAD if lane.junction < 0 else ROAD | IN_JUNCTION
        mark(line[:, None] + across[:, None] * right[:, None], bits)
        if lane.junction < 0:
            for side, neighbour in ((-half, lane.left), (half, lane.right)):
                mark(line + side * right, BROKEN if neighbour >= 0 else MARKING)
            if lane.right < 0:
                beyond = half + np.arange(0.25, SHOULDER, 0.25)
                mark(line[:, None] + beyond[:, None] * right[:, None], SHOULDER_BIT)
    for junction in network.junctions:
        if junction.polygon is None:
            continue
        a, b = junction.polygon.min(0), junction.polygon.max(0)
        xs, ys = (np.arange(a[k], b[k], PAINT_CELL) for k in range(2))
        places = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
        mark(places[_polygon_distance(places, junction.polygon) <= 0], ROAD | IN_JUNCTION)
    paint[(paint & ROAD) > 0] &= ~np.uint8(SHOULDER_BIT)
    return paint, limit


def _limit_code(speed: float) -> int:
    """CaRL's grey of a speed (m/s): 127 + int(128 clip(v + 2.67, 0, 36) / 36)."""
    return 127 + int(128 * min(max(speed + 2.67, 0.0), 36.0) / 36.0)
