"""RouteDriving's worlds: B drives at once, their state and their step.

A drive is a route through a random network among A vehicles, P people and S parked or broken-down cars. The
ego is nuPlan's kinematic bicycle in a Pacifica's box. `Worlds.step` does, in this order: ego, clock and
lights, vehicles, people, place on road and route, collisions, rules, route completion; what comes out is the
`DrivingFrame` that rewards and scores read.

Everything that a world does depends on its seed, its episode's number and its actions alone (see
`saferl.envs.driving.random`), not on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from saferl.envs.driving.frame import NO_LIGHT, Boxes, DrivingFrame, LightState
from saferl.envs.driving.geometry import (
    EGO_LENGTH,
    EGO_WIDTH,
    REAR_TO_CENTRE,
    Bicycle,
    boxes_overlap,
    drive_bicycle,
    wrap_angle,
)
from saferl.envs.driving.random import uniform, whole
from saferl.envs.driving.roads import CELL, LANE_WIDTH, SHOULDER, RoadBank
from saferl.envs.driving.scenario import Cast
from saferl.envs.driving.traffic import (
    S_LIGHT,
    S_MAP,
    S_PARK,
    S_ROUTE,
    Ego,
    Pedestrians,
    Traffic,
    Wall,
    choose_lane,
    lights_of,
    move_pedestrians,
    move_traffic,
    pose,
    start_traffic,
)

__all__ = ["DT", "State", "Worlds", "border_distance"]

DT = 0.1
"""s a step (10 Hz, as CaRL trains)."""
_WINDOW = 5  # points of the route that the ego may pass in a step: 50 m/s
_IGNORED = 5.0  # s for which an actor that was hit is not counted again, and m within which nothing is
_STANDING = 0.1  # m/s
_TAIL = 0.8  # CARLA's red-light test looks at a point this share of half the length behind the centre

T = TypeVar("T")


@dataclass
class State:
    """State of B worlds; every tensor has the batch last."""

    seed: Tensor
    """(B,) int64."""
    episode: Tensor
    step: Tensor
    route: Tensor
    index: Tensor
    """The route's point last passed."""
    time_limit: Tensor
    clock: Tensor
    """(B,) s, of the lights: it starts anywhere in their cycle."""

    ego: Bicycle
    """Each (B,), rear axle."""
    acceleration_lat: Tensor
    steer: Tensor
    last_steer: Tensor
    action: Tensor
    """(2, B), the last."""
    yaw_rate: Tensor
    yaw_acceleration: Tensor
    standing: Tensor
    far_from_route: Tensor
    """m of the route driven more than 15 m away from it."""
    tail_x: Tensor
    """Where the point was that red lights look at."""
    tail_y: Tensor
    tail_lane: Tensor
    served_lane: Tensor
    """The lane at whose stop sign the ego has stood, -1 for none."""
    hit_x: Tensor
    """Where the last collision was counted."""
    hit_y: Tensor

    cars: Traffic
    people: Pedestrians
    parked_x: Tensor
    """(S, B); the first may stand on the route, the others beside the road."""
    parked_y: Tensor
    parked_heading: Tensor
    parked_valid: Tensor
    ignored: Tensor
    """(A + P + S, B) s for which a collision with that actor does not count."""


@dataclass(frozen=True)
class Population:
    """How many others a world has."""

    vehicles: int = 24
    pedestrians: int = 8
    parked: int = 8


def tree_map(function: Any, first: T, *others: T) -> T:
    """`function` of every tensor of dataclasses, tuples and dicts of one structure."""
    if isinstance(first, Tensor):
        return function(first, *others)  # type: ignore[no-any-return]
    if isinstance(first, Mapping):
        return {k: tree_map(function, v, *(o[k] for o in others)) for k, v in first.items()}  # type: ignore
    if isinstance(first, tuple):
        return type(first)(*(tree_map(function, *values) for values in zip(first, *others, strict=True)))
    names = [f.name for f in fields(first)]  # type: ignore[arg-type]
    return type(first)(
        **{n: tree_map(function, getattr(first, n), *(getattr(o, n) for o in others)) for n in names}
    )


def border_distance(bank: RoadBank, maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """m from places (..., B) to the edge of the carriageway, negative on it; interpolated between cells."""
    origin = bank.ground_origin[maps]
    column = (x - origin[:, 0]) / CELL - 0.5
    row = (y - origin[:, 1]) / CELL - 0.5
    width, height = bank.ground_width[maps], bank.ground_height[maps]
    left = torch.minimum(column.floor().clamp(min=0.0).long(), width - 2)
    low = torch.minimum(row.floor().clamp(min=0.0).long(), height - 2)
    u, v = (column - left).clamp(0.0, 1.0), (row - low).clamp(0.0, 1.0)
    at = bank.ground_start[maps] + low * width + left
    border = bank.border
    bottom = border[at] + u * (border[at + 1] - border[at])
    top = border[at + width] + u * (border[at + width + 1] - border[at + width])
    return bottom + v * (top - bottom)


def cell_of(bank: RoadBank, maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Global number of the ground's cell at places (..., B); the nearest one outside the ground."""
    origin = bank.ground_origin[maps]
    width, height = bank.ground_width[maps], bank.ground_height[maps]
    column = torch.minimum(((x - origin[:, 0]) / CELL).clamp(min=0.0).long(), width - 1)
    row = torch.minimum(((y - origin[:, 1]) / CELL).clamp(min=0.0).long(), height - 1)
    return bank.ground_start[maps] + row * width + column


class Worlds:
    """The rules of B drives on a bank of maps; the state is passed in and out.

    Args:
        bank: maps and routes.
        population: how many others there are.
        blocked: share of routes on which a car stands in the way.
        ends_on_collision: whether a collision ends the drive, so that no thought is given to what follows;
            where it does not, the ego is stopped and what it struck is taken away after 5 s.
        cast: who is there at the start, of scenarios; chance where it says nothing.
    """

    def __init__(
        self, bank: RoadBank, population: Population | None = None, *, blocked: float = 0.15,
        ends_on_collision: bool = True, cast: Cast | None = None,
    ) -> None:  # fmt: skip
        self.bank = bank
        population = population or Population()
        if cast is not None:
            counts = {
                name: table[1].shape[1]
                for name in ("vehicles", "pedestrians", "parked")
                if (table := getattr(cast, name)) is not None
            }
            population = replace(population, **counts)
        self.cast = cast or Cast(None, None, None)
        self.population = population
        self.blocked = blocked
        self.ends_on_collision = ends_on_collision
        self.actors = self.population.vehicles + self.population.pedestrians + self.population.parked

    # --- the beginning of a drive ------------------------------------------------------------------------

    def start(self, seed: Tensor, episode: Tensor) -> State:
        """States of new drives; `seed` and `episode` are (B,) int64."""
        bank, _device, _batch = self.bank, seed.device, len(seed)
        maps = whole(seed, episode, S_MAP, 0, len(bank.map_routes))
        own = bank.map_routes[maps]
        route = own[:, 0] + whole(seed, episode, S_ROUTE, 0, own[:, 1])
        return self.start_on(route, seed, episode)

    def start_on(self, route: Tensor, seed: Tensor, episode: Tensor) -> State:
        """States at the start of given routes (B,)."""
        bank, device, batch = self.bank, seed.device, len(seed)
        point = bank.points[bank.route_points[route, 0]]
        heading = point[:, 2]
        x, y = (point[:, 0] - REAR_TO_CENTRE * heading.cos(), point[:, 1] - REAR_TO_CENTRE * heading.sin())

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, batch, device=device)

        people = Pedestrians.nobody(self.population.pedestrians, batch, device)
        parked = self._park(route, seed, episode)
        state = State(
            seed=seed, episode=episode, step=torch.zeros_like(seed), route=route,
            index=torch.zeros_like(seed), time_limit=self._time_limit(route),
            clock=100.0 * uniform(seed, episode, S_LIGHT),
            ego=Bicycle(x, y, heading.clone(), zeros(), zeros(), zeros()),
            acceleration_lat=zeros(), steer=zeros(), last_steer=zeros(), action=zeros(2), yaw_rate=zeros(),
            yaw_acceleration=zeros(), standing=zeros(), far_from_route=zeros(), tail_x=x.clone(),
            tail_y=y.clone(), tail_lane=bank.point_lane[bank.route_points[route, 0]],
            served_lane=torch.full_like(seed, -1), hit_x=zeros() + 1e6, hit_y=zeros() + 1e6,
            cars=start_traffic(bank, self.population.vehicles, seed, episode, route), people=people,
            parked_x=parked[0], parked_y=parked[1], parked_heading=parked[2], parked_valid=parked[3],
            ignored=zeros(self.actors),
        )  # fmt: skip
        maps = bank.route_map[route]
        self._take_places(state, maps)
        # People are there from the start: a few places are tried for each.
        ego = self._seen(state, maps)
        for _ in range(4 if self.cast.pedestrians is None else 0):
            state.people = move_pedestrians(bank, state.people, ego, state.clock, seed, episode, maps, 0.0)
        return state

    def _take_places(self, state: State, maps: Tensor) -> None:
        """Put those that a scenario names where it says."""
        bank, cars, people = self.bank, state.cars, state.people
        if self.cast.vehicles is not None:
            table, valid = (t[maps].movedim(0, -1) for t in self.cast.vehicles)
            cars.lane, cars.valid = table[:, 0].long(), valid
            cars.arc, cars.speed, cars.eagerness = (table[:, k].float() for k in (1, 2, 3))
            number = torch.arange(len(cars.lane), device=maps.device)[:, None]
            cars.following = choose_lane(bank, cars.lane, state.seed, state.episode, number * 1000)
            cars.second = choose_lane(bank, cars.following, state.seed, state.episode, number * 1000 + 1)
            cars.x, cars.y, cars.yaw, cars.curvature = pose(bank, cars.lane, cars.arc)
        if self.cast.pedestrians is not None:
            table, valid = (t[maps].movedim(0, -1) for t in self.cast.pedestrians)
            crossing = table[:, 0].long().clamp(max=len(bank.crossing) - 1)
            x0, y0, x1, y1 = bank.crossing[crossing].unbind(-1)
            span = ((x1 - x0) * (x1 - x0) + (y1 - y0) * (y1 - y0)).sqrt().clamp(min=1.0)
            people.start_x, people.start_y, people.span = x0, y0, span
            people.towards_x, people.towards_y = (x1 - x0) / span, (y1 - y0) / span
            people.light, people.valid = bank.crossing_light[crossing], valid
            people.patience, people.pace = table[:, 1].float(), table[:, 2].float()
            people.bold = table[:, 3] > 0
        if self.cast.parked is not None:
            table, valid = (t[maps].movedim(0, -1) for t in self.cast.parked)
            state.parked_x, state.parked_y, state.parked_heading = (table[:, k].float() for k in range(3))
            state.parked_valid = valid

    def _time_limit(self, route: Tensor) -> Tensor:
        """CARLA's: 300 s and ten times what the limit allows, at most 1200 s."""
        bank = self.bank
        last = bank.route_points[route]
        limits = bank.speed_limit[bank.point_lane[last]]
        count = bank.route_count[route]
        steps = torch.arange(last.shape[1], device=route.device)
        slow = torch.where(steps < count[:, None], 1.0 / (0.1 * limits), 0.0).sum(1)
        return (300.0 + slow).clamp(max=1200.0)

    def _park(self, route: Tensor, seed: Tensor, episode: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cars beside the road along the route, and maybe one in the way: x, y, heading, validity (S, B)."""
        bank, count = self.bank, self.population.parked
        number = torch.arange(count, device=route.device)[:, None]
        length = bank.route_length[route]
        share = (number + uniform(seed, episode, S_PARK, 2 * number)) / max(count, 1)
        at = (25.0 + share * (length - 35.0)).clamp(min=0.0)
        index = torch.minimum(at.long(), bank.route_count[route] - 1)
        point = bank.route_points[route, index]
        lane = bank.point_lane[point]
        x, y, yaw, _ = bank.points[point].unbind(-1)
        aside = LANE_WIDTH * bank.lanes_right[lane] + 0.5 * bank.lane_width[lane] + 1.15
        chance = uniform(seed, episode, S_PARK, 2 * number + 1)
        # Room to pass: the lane beside, in the same direction or the other.
        room = (bank.left[lane] >= 0) | (bank.right[lane] >= 0) | bank.oncoming[lane]
        in_the_way = (number == count // 2) & (chance < self.blocked) & room & (length > 100.0)
        aside = torch.where(in_the_way, 0.3, aside)
        to_line = bank.route_next_arc[route, index] - bank.route_arc[route, index]
        clear = (bank.junction[lane] < 0) & (to_line > 12.0)
        valid = clear & (in_the_way | (chance > 0.35)) & (at > 20.0)
        return x + aside * yaw.sin(), y - aside * yaw.cos(), yaw, valid

    # --- a step ------------------------------------------------------------------------------------------

    def _seen(self, state: State, maps: Tensor) -> Ego:
        bank, ego = self.bank, state.ego
        arc = bank.route_arc[state.route, state.index]
        connector = bank.route_next[state.route, state.index]
        begin = bank.route_next_arc[state.route, state.index]
        return Ego(
            x=ego.x + REAR_TO_CENTRE * ego.heading.cos(),
            y=ego.y + REAR_TO_CENTRE * ego.heading.sin(),
            heading=ego.heading,
            speed=ego.speed,
            length=EGO_LENGTH,
            width=EGO_WIDTH,
            connector=connector,
            to_connector=begin - arc - 0.5 * EGO_LENGTH,
        )

    def step(self, state: State, action: Tensor) -> tuple[State, DrivingFrame]:
        """Drive 0.1 s with `action` (2, B): acceleration and steering in [-1, 1].

        Returns the next state and the frame after it. Nothing is written to `state`.
        """
        bank, seed, episode = self.bank, state.seed, state.episode
        maps = bank.route_map[state.route]
        before = self._seen(state, maps)
        # 1, 2: the ego. The frame holds the acceleration of the centre, v dot and v times yaw rate.
        action = action.clamp(-1.0, 1.0)
        ego = drive_bicycle(state.ego, action[0], action[1], DT)
        yaw_rate = wrap_angle(ego.heading - state.ego.heading) / DT
        clock = state.clock + DT
        # 5, 6: the others, all from the states before.
        cars, _ = move_traffic(
            bank,
            state.cars,
            before,
            state.people,
            self._wall(state),
            clock,
            state.step,
            seed,
            episode,
            maps,
            DT,
            self.cast.vehicles is None,
        )
        people = move_pedestrians(
            bank, state.people, before, clock, seed, episode, maps, DT, self.cast.pedestrians is None
        )
        moved = State(
            **{f.name: getattr(state, f.name) for f in fields(state)}
            | {
                "ego": ego, "clock": clock, "cars": cars, "people": people, "step": state.step + 1,
                "last_steer": state.steer, "steer": action[1], "action": action, "yaw_rate": yaw_rate,
                "yaw_acceleration": (yaw_rate - state.yaw_rate) / DT,
                "acceleration_lat": ego.speed * yaw_rate,
                "ignored": (state.ignored - DT).clamp(min=0.0),
                "standing": torch.where(ego.speed.abs() < _STANDING, state.standing + DT, 0.0),
            }
        )  # fmt: skip
        return self._judge(state, moved, maps)

    def look(self, state: State) -> DrivingFrame:
        """The frame of states as they are, without a step."""
        same = State(**{f.name: getattr(state, f.name) for f in fields(state)})
        return self._judge(state, same, self.bank.route_map[state.route])[1]

    def _judge(self, before: State, state: State, maps: Tensor) -> tuple[State, DrivingFrame]:
        """Where the ego is and what it did: steps 7 to 10."""
        bank, ego = self.bank, state.ego
        cos, sin = ego.heading.cos(), ego.heading.sin()
        x, y = ego.x + REAR_TO_CENTRE * cos, ego.y + REAR_TO_CENTRE * sin

        # 7: the route's point, CARLA's way: go on while the next ones lie behind the ego.
        route, index, last = state.route, state.index, bank.route_count[state.route] - 1
        passing = torch.ones_like(x, dtype=torch.bool)
        steps = torch.zeros_like(index)
        for k in range(1, _WINDOW + 1):
            at = bank.points[bank.route_points[route, torch.minimum(index + k, last)]]
            behind = (x - at[:, 0]) * at[:, 2].cos() + (y - at[:, 1]) * at[:, 2].sin() > 0
            passing = passing & behind & (index + k <= last)
            steps = steps + passing
        state.index = index = index + steps
        here = bank.points[bank.route_points[route, index]]
        route_cos, route_sin = here[:, 2].cos(), here[:, 2].sin()
        dx, dy = x - here[:, 0], y - here[:, 1]
        route_offset = (dy * route_cos - dx * route_sin).abs()
        to_route = (dx * dx + dy * dy).sqrt()
        arc, was = bank.route_arc[route, index], bank.route_arc[route, before.index]
        length = bank.route_length[route]
        finished = index >= last
        completion = torch.where(finished, 100.0, 100.0 * arc / length)
        gained = completion - 100.0 * was / length
        previous = bank.points[bank.route_points[route, before.index]]
        advance = (x - before.ego.x - REAR_TO_CENTRE * before.ego.heading.cos()) * previous[:, 2].cos()
        advance = (
            advance + (y - before.ego.y - REAR_TO_CENTRE * before.ego.heading.sin()) * previous[:, 2].sin()
        )

        # The lane: that of the nearest point, or the one beside where the offset says so.
        near = bank.near_point[cell_of(bank, maps, x, y)]
        lane = bank.point_lane[near]
        spot = bank.points[near]
        lane_cos, lane_sin = spot[:, 2].cos(), spot[:, 2].sin()
        width = bank.lane_width[lane]
        aside = (y - spot[:, 1]) * lane_cos - (x - spot[:, 0]) * lane_sin
        in_junction = bank.junction[lane] >= 0
        to_left, to_right = aside > 0.5 * width, aside < -0.5 * width
        opposite = to_left & bank.oncoming[lane]
        beside = opposite | (to_left & (bank.left[lane] >= 0)) | (to_right & (bank.right[lane] >= 0))
        offset = torch.where(beside, (width - aside.abs()).abs(), aside.abs())
        offset = torch.where(in_junction, torch.minimum(offset, route_offset), offset)
        along = cos * lane_cos + sin * lane_sin
        against = (
            torch.where(opposite, -along, along) < -0.5
        )  # more than 120 degrees from the lane's direction
        # In a junction nothing is wrong, nor within 20 m of a car that blocks the way.
        blocking = self._blocking(state, x, y)
        outside = ((offset > 0.5 * width + 0.5) | (against & ~in_junction)) & ~blocking
        state.far_from_route = state.far_from_route + torch.where(
            to_route > 15.0, (arc - was).clamp(min=0.0), 0.0
        )
        deviated = (to_route > 30.0) | (state.far_from_route > 0.3 * length)

        corners = self._corners(x, y, cos, sin)
        depth = border_distance(bank, maps, *corners)
        off_share = (depth > SHOULDER).float().mean(0)
        touches = 0.5 * EGO_WIDTH * along.abs() + 0.5 * EGO_LENGTH * (1 - along * along).clamp(min=0.0).sqrt()
        multiple = in_junction | (offset + touches > 0.5 * width)

        # 8: collisions.
        others = self._boxes(state)
        overlap = others.valid & boxes_overlap(
            others.x - x, others.y - y, ego.heading, torch.full_like(x, EGO_LENGTH),
            torch.full_like(x, EGO_WIDTH),
            others.heading, others.length, others.width,
        )  # fmt: skip
        # CARLA counts none while the ego stands, none with the same actor for 5 s, and none within 5 m.
        moving = before.ego.speed.abs() >= _STANDING
        hx, hy = x - state.hit_x, y - state.hit_y
        fresh = overlap & (state.ignored <= 0) & moving & (hx * hx + hy * hy > _IGNORED**2)
        hit_any = fresh.any(0)
        state.hit_x, state.hit_y = torch.where(hit_any, x, state.hit_x), torch.where(hit_any, y, state.hit_y)
        state.ignored = torch.where(overlap, _IGNORED, state.ignored)
        kinds = [(fresh & (others.kind == k)).any(0) for k in range(3)]
        ahead = (others.x - x) * cos + (others.y - y) * sin
        lateral = ahead.abs() <= 0.5 * EGO_LENGTH
        fault = fresh & (
            (others.speed.abs() <= 0.05)
            | (ahead > 0.5 * EGO_LENGTH)
            | (lateral & (multiple | (depth.amax(0) > 0)))
        )
        if not self.ends_on_collision:
            self._stop_and_clear(state, hit_any)

        # 9: the line at the end of the lane that a point behind the centre was on: red light, stop sign.
        tail_x, tail_y = x - _TAIL * 0.5 * EGO_LENGTH * cos, y - _TAIL * 0.5 * EGO_LENGTH * sin
        tail_near = bank.near_point[cell_of(bank, maps, tail_x, tail_y)]
        from_lane = before.tail_lane
        end = bank.points[bank.lane_start[from_lane] + bank.lane_segments[from_lane]]
        end_cos, end_sin = end[:, 2].cos(), end[:, 2].sin()
        now_past = (tail_x - end[:, 0]) * end_cos + (tail_y - end[:, 1]) * end_sin
        was_past = (before.tail_x - end[:, 0]) * end_cos + (before.tail_y - end[:, 1]) * end_sin
        on_line = ((tail_y - end[:, 1]) * end_cos - (tail_x - end[:, 0]) * end_sin).abs() <= 0.6 * LANE_WIDTH
        crossed = (was_past < 0) & (now_past >= 0) & on_line & (bank.junction[from_lane] < 0)
        onto = bank.successors[from_lane, 0]
        ran_red = crossed & lights_of(bank, onto, state.clock).red
        sign = bank.stop_sign[onto]
        front_gap = -(now_past + 0.9 * EGO_LENGTH)
        serves = (ego.speed.abs() < _STANDING) & sign & (front_gap < 4.0)
        state.served_lane = torch.where(serves, from_lane, state.served_lane)
        ran_stop = crossed & sign & (state.served_lane != from_lane)
        state.served_lane = torch.where(crossed, -1, state.served_lane)
        state.tail_x, state.tail_y = tail_x, tail_y
        # The lane stays remembered within a junction until another road is reached.
        tail_lane = bank.point_lane[tail_near]
        straight = (bank.points[tail_near][:, 2] - ego.heading).cos() > 0
        state.tail_lane = torch.where((bank.junction[tail_lane] < 0) & straight, tail_lane, from_lane)

        connector = bank.route_next[route, index]
        line = bank.route_next_arc[route, index] - arc - 0.5 * EGO_LENGTH
        lights = lights_of(bank, connector, state.clock)
        light = torch.where(
            lights.red, LightState.RED, torch.where(lights.yellow, LightState.YELLOW, LightState.GREEN)
        )
        facing = lights.exists & (line > -2.0)
        approach = bank.point_lane[bank.route_points[route, index]]
        pending = (connector >= 0) & bank.stop_sign[connector.clamp(min=0)] & (line > -2.0)
        pending = pending & (state.served_lane != approach)
        cars = state.cars
        driving = cars.valid.float().sum(0)
        background = torch.where(driving > 0, (cars.speed * cars.valid).sum(0) / driving, torch.nan)
        frame = DrivingFrame(
            x=x, y=y, heading=ego.heading, speed=ego.speed, acceleration_lon=ego.acceleration,
            acceleration_lat=state.acceleration_lat, steer=state.steer, last_steer=state.last_steer,
            length=torch.full_like(x, EGO_LENGTH), width=torch.full_like(x, EGO_WIDTH),
            speed_limit=bank.speed_limit[lane], lane_offset=offset, lane_width=width, in_junction=in_junction,
            route_offset=route_offset, heading_error=wrap_angle(ego.heading - here[:, 2]),
            outside_lanes=outside,
            off_road_share=off_share, off_road_depth=depth.amax(0), multiple_lanes=multiple,
            completion=completion, progress=gained.clamp(min=0.0), advance=advance, route_length=length,
            finished=finished, time=state.step * DT, time_limit=state.time_limit, standing=state.standing,
            deviated=deviated, light=torch.where(facing, light, LightState.NONE).to(torch.uint8),
            light_distance=torch.where(facing, line, NO_LIGHT),
            stop_distance=torch.where(pending, line, NO_LIGHT), hit_vehicle=kinds[0], hit_pedestrian=kinds[1],
            hit_static=kinds[2], at_fault=fault.any(0), ran_red_light=ran_red, ran_stop_sign=ran_stop,
            others=others, background_speed=background,
        )  # fmt: skip
        return state, frame

    def _wall(self, state: State) -> Wall:
        """The car that may stand in a lane: the middle one of those parked."""
        zero = torch.zeros_like(state.ego.x)
        if not self.population.parked:
            return Wall(zero, zero, zero.bool())
        middle = self.population.parked // 2
        x, y = state.parked_x[middle], state.parked_y[middle]
        on_road = border_distance(self.bank, self.bank.route_map[state.route], x, y) < -0.5
        return Wall(x, y, state.parked_valid[middle] & on_road)

    def _blocking(self, state: State, x: Tensor, y: Tensor) -> Tensor:
        """Whether a car that stands in a lane is within 20 m."""
        wall = self._wall(state)
        return wall.valid & ((wall.x - x) * (wall.x - x) + (wall.y - y) * (wall.y - y) < 400.0)

    @staticmethod
    def _corners(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Corners, middles of the sides and centre of the ego's box, (9, B) each."""
        forward = torch.tensor([1.0, 1, 1, 0, 0, 0, -1, -1, -1], device=x.device)[:, None] * (
            0.5 * EGO_LENGTH
        )
        left = torch.tensor([1.0, 0, -1, 1, 0, -1, 1, 0, -1], device=x.device)[:, None] * (0.5 * EGO_WIDTH)
        return x + forward * cos - left * sin, y + forward * sin + left * cos

    def _boxes(self, state: State) -> Boxes:
        cars, people = state.cars, state.people
        heading = torch.atan2(people.towards_y, people.towards_x)
        still = torch.zeros_like(state.parked_x)
        kind = torch.zeros_like(state.ignored, dtype=torch.uint8)
        a, p = self.population.vehicles, self.population.pedestrians
        kind[a : a + p] = 1
        kind[a + p :] = 2
        person = torch.full_like(people.done, 0.6)
        return Boxes(
            x=torch.cat([cars.x, people.x, state.parked_x]),
            y=torch.cat([cars.y, people.y, state.parked_y]),
            heading=torch.cat([cars.yaw, heading, state.parked_heading]),
            speed=torch.cat([cars.speed, people.walking * people.pace, still]),
            length=torch.cat([cars.length, person, still + 4.6]),
            width=torch.cat([cars.width, person, still + 1.9]),
            kind=kind,
            valid=torch.cat([cars.valid, people.valid, state.parked_valid]),
        )

    def _stop_and_clear(self, state: State, hit: Tensor) -> None:
        """After a counted collision the ego stands, and what it touches is gone once 5 s have passed."""
        zero = torch.zeros_like(state.ego.speed)
        state.ego = state.ego._replace(
            speed=torch.where(hit, zero, state.ego.speed),
            acceleration=torch.where(hit, zero, state.ego.acceleration),
        )
        # `ignored` is renewed while boxes overlap: an actor that has stood in the ego's way for 5 s is
        # taken out.
        a, p = self.population.vehicles, self.population.pedestrians
        stuck = (state.ignored > 0) & (state.standing > _IGNORED)
        state.cars.valid = state.cars.valid & ~stuck[:a]
        state.people.valid = state.people.valid & ~stuck[a : a + p]
        state.parked_valid = state.parked_valid & ~stuck[a + p :]
