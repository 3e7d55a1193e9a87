"""The others on the road: vehicles that follow lanes, people who cross, cars that are parked.

Vehicles move along centre lines by the intelligent driver model behind the nearest of: the vehicle ahead on
the way, the ego and people in their corridor, a line at which they must wait (red light, stop sign, crossing
traffic that goes first, no room behind the junction), and bends. Everything is elementwise or a reduction
over actors, (A, B) or (A, A, B), batch last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saferl.envs.driving.geometry import idm_acceleration
from saferl.envs.driving.random import uniform, whole
from saferl.envs.driving.roads import SLOTS, RoadBank

__all__ = [
    "Ego",
    "Lights",
    "Pedestrians",
    "Traffic",
    "Wall",
    "choose_lane",
    "lights_of",
    "move_pedestrians",
    "move_traffic",
    "pose",
]

FAR = 120.0
"""m from the ego beyond which a vehicle is set anew elsewhere."""
_NEAR, _OUTER = 50.0, 112.0  # m from the ego between which it appears again
_SIGHT = 60.0  # m that drivers look ahead
_HARDEST = 8.0  # m/s^2
_PATIENCE = 8.0  # s of standing after which those who stand are not waited for
_LOOK = 5.0  # s before the line from which a vehicle that goes first is waited for
_STUCK = 45.0  # s of standing after which a vehicle far from the ego is set anew
_DIVERGE = 11.0  # m behind a fork within which the other branch still blocks
_SECOND_SPEED = 1.0  # m/s below which a vehicle behind a junction keeps others from entering

# Streams of random numbers.
S_MAP, S_ROUTE, S_SPAWN, S_DRIVER, S_CHOICE, S_RESPAWN, S_WALK, S_PARK, S_LIGHT, S_EVENT = range(10)


@dataclass
class Ego:
    """What others see of the ego, (B,): its box, and where on its route it is."""

    x: Tensor
    y: Tensor
    heading: Tensor
    speed: Tensor
    length: float
    width: float
    connector: Tensor
    """The connector it is on, or comes to next; -1 for none."""
    to_connector: Tensor
    """m from its front to that connector's start, negative on it."""


@dataclass
class Wall:
    """A car that may stand in a lane, (B,)."""

    x: Tensor
    y: Tensor
    valid: Tensor


@dataclass
class Lights:
    """State of the light that a lane obeys, each of the lanes' shape."""

    exists: Tensor
    green: Tensor
    yellow: Tensor
    red: Tensor
    to_green: Tensor
    """s until it is green again (0 while it is); what is not red or yellow may hold anything."""


def lights_of(bank: RoadBank, lane: Tensor, time: Tensor) -> Lights:
    """Lights of lanes (..., B) at times (B,); a lane of -1 has none."""
    known = lane >= 0
    index = lane.clamp(min=0)
    cycle = bank.light_cycle[index]
    exists = known & (cycle > 0)
    phase = torch.remainder(time + bank.light_offset[index], cycle.clamp(min=1.0))
    start, end = bank.green_start[index], bank.green_end[index]
    green = exists & (phase >= start) & (phase < end)
    yellow = exists & (phase >= end) & (phase < end + bank.yellow[index])
    to_green = torch.remainder(start - phase, cycle.clamp(min=1.0))
    return Lights(exists, green, yellow, exists & ~green & ~yellow, torch.where(green, 0.0, to_green))


def pose(bank: RoadBank, lane: Tensor, arc: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, yaw and curvature at `arc` m along lanes; beyond either end the end is taken."""
    segments = bank.lane_segments[lane]
    at = (arc / bank.lane_spacing[lane]).clamp(min=0.0)
    first = torch.minimum(at.long(), segments - 1)
    share = (at - first).clamp(max=1.0)
    index = bank.lane_start[lane] + first
    a, b = bank.points[index], bank.points[index + 1]
    blend = a + share[..., None] * (b - a)
    return blend[..., 0], blend[..., 1], blend[..., 2], blend[..., 3]


@dataclass
class Traffic:
    """A vehicles of B worlds, every field (A, B)."""

    lane: Tensor
    arc: Tensor
    """m along the lane, of the vehicle's centre."""
    speed: Tensor
    following: Tensor
    """The lane that it takes next, and the one after."""
    second: Tensor
    choices: Tensor
    """Decisions taken so far; the index of the next one's random number."""
    respawns: Tensor
    eagerness: Tensor
    """Desired speed as a share of the limit."""
    headway: Tensor
    strength: Tensor
    """m/s^2, greatest acceleration."""
    length: Tensor
    width: Tensor
    served: Tensor
    """bool: it has stood at the stop sign ahead."""
    standing: Tensor
    """s."""
    valid: Tensor
    x: Tensor
    y: Tensor
    yaw: Tensor
    curvature: Tensor


def _drivers(seed: Tensor, episode: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Eagerness, headway, strength, length and width of vehicles."""
    draws = [uniform(seed, episode, S_DRIVER, 5 * index + k) for k in range(4)]
    return (
        0.8 + 0.3 * draws[0],
        1.0 + 0.8 * draws[1],
        1.0 + draws[2],
        4.2 + 1.0 * draws[3],
        1.8 + 0.3 * draws[3],
    )


def choose_lane(bank: RoadBank, lane: Tensor, seed: Tensor, episode: Tensor, index: Tensor) -> Tensor:
    """A successor of each lane."""
    pick = whole(seed, episode, S_CHOICE, index, bank.successor_count[lane].clamp(min=1))
    return bank.successors[lane, pick]


def start_traffic(bank: RoadBank, count: int, seed: Tensor, episode: Tensor, route: Tensor) -> Traffic:
    """Vehicles around the start of routes (B,), no two at one place."""
    number = torch.arange(count, device=seed.device)[:, None].expand(count, len(seed))
    places = bank.route_slot_count[route]
    # With all places at hand (a prime number) any stride visits each once.
    stride = torch.where(places == SLOTS, 1 + whole(seed, episode, S_SPAWN, 0, SLOTS - 1), 1)
    place = (number * stride + whole(seed, episode, S_SPAWN, 1, places)) % places
    slot = bank.route_slots[route, place]
    lane, arc = bank.slot_lane[slot], bank.slot_arc[slot]
    eagerness, headway, strength, length, width = _drivers(seed, episode, number)
    following = choose_lane(bank, lane, seed, episode, number * 1000)
    second = choose_lane(bank, following, seed, episode, number * 1000 + 1)
    x, y, yaw, curvature = pose(bank, lane, arc)
    zero = torch.zeros_like(arc)
    return Traffic(
        lane=lane,
        arc=arc,
        # Slow enough to stop at the line ahead.
        speed=torch.minimum(
            0.5 * eagerness * bank.comfortable_speed[lane],
            (4.0 * (bank.lane_length[lane] - arc - 0.5 * length - 3.0).clamp(min=0.0)).sqrt(),
        ),
        following=following,
        second=second,
        choices=torch.full_like(lane, 2),
        respawns=torch.zeros_like(lane),
        eagerness=eagerness,
        headway=headway,
        strength=strength,
        length=length,
        width=width,
        served=torch.zeros_like(lane, dtype=torch.bool),
        standing=zero,
        valid=number < places,
        x=x,
        y=y,
        yaw=yaw,
        curvature=curvature,
    )


def move_traffic(
    bank: RoadBank,
    cars: Traffic,
    ego: Ego,
    walkers: Pedestrians,
    wall: Wall,
    time: Tensor,
    step: Tensor,
    seed: Tensor,
    episode: Tensor,
    maps: Tensor,
    dt: float,
    respawn: bool = True,
) -> tuple[Traffic, Tensor]:
    """One step of all vehicles, from the states before it. Also returns their accelerations (A, B)."""
    lane, arc, speed = cars.lane, cars.arc, cars.speed
    half = 0.5 * cars.length
    remaining = bank.lane_length[lane] - arc
    following_length = bank.lane_length[cars.following]
    front = remaining - half

    # --- who is ahead on the way (leader j of i): own lane, the next two, and forks from the same lane ---
    def row(values: Tensor) -> Tensor:
        return values[:, None]

    def column(values: Tensor) -> Tensor:
        return values[None]

    origin = bank.origin[lane]
    ahead = column(arc) - row(arc)
    order = torch.arange(len(lane), device=lane.device)
    after = (ahead > 0) | ((ahead == 0) & (order[None, :, None] > order[:, None, None]))
    fork = column(arc) < _DIVERGE
    same = (row(lane) == column(lane)) | (row(origin) == column(origin)) & (row(origin) >= 0) & fork
    branch = (column(origin) == row(lane)) & fork
    onto_next = (row(cars.following) == column(lane)) | branch
    onto_second = row(cars.second) == column(lane)
    beyond = row(remaining) + column(arc)
    distance = torch.where(onto_second, beyond + row(following_length), _SIGHT)
    distance = torch.where(onto_next, beyond, distance)
    # Whoever is nearer to the end of a connector that leads to the same lane is ahead, too.
    on = bank.junction[lane] >= 0
    left_over = column(torch.where(on, remaining, -1e3))
    merging = on & (cars.following != lane)
    merging = column(merging) & (row(lane) != column(lane))
    to_go = row(remaining) - left_over
    zipper = merging & row(on) & (row(cars.following) == column(cars.following)) & (to_go > 0)
    distance = torch.where(zipper, to_go, distance)
    to_go = to_go + row(following_length)
    zipper = merging & ~row(on) & (row(cars.second) == column(cars.following)) & (to_go > 0) & ~onto_next
    distance = torch.where(zipper, to_go, distance)
    distance = torch.where(same & after, ahead, distance)
    distance = torch.where(column(cars.valid), distance - column(half), _SIGHT)
    distance, leader = distance.min(1)
    gap = distance - half
    leader_speed = speed.gather(0, leader)
    pull = idm_acceleration(
        speed,
        (cars.eagerness * bank.comfortable_speed[lane]).clamp(min=1.0),
        torch.where(distance < _SIGHT - 10.0, gap, 1e3).clamp(min=0.1),
        leader_speed,
        min_gap=2.0,
        headway=cars.headway,
        acceleration=cars.strength,
        hardest=_HARDEST,
    )

    # --- the ego, people and parked cars in the corridor ahead, which bends as the lane does -------------
    cos, sin = cars.yaw.cos(), cars.yaw.sin()
    dx, dy = ego.x - cars.x, ego.y - cars.y
    along = dx * cos + dy * sin
    aside = dy * cos - dx * sin - 0.5 * cars.curvature * along * along
    turn = ego.heading - cars.yaw
    turn_cos, turn_sin = turn.cos(), turn.sin().abs()
    reach = 0.5 * (ego.length * turn_cos.abs() + ego.width * turn_sin)
    span = 0.5 * (ego.length * turn_sin + ego.width * turn_cos.abs() + cars.width) + 0.25
    blocked = (along > 0) & (along < 45.0) & (aside.abs() < span)
    ego_gap = torch.where(blocked, along - half - reach, 1e3).clamp(min=0.1)
    pull = torch.minimum(
        pull,
        _behind(cars, ego_gap, (ego.speed * turn_cos).clamp(min=0.0)),
    )
    dx, dy = wall.x - cars.x, wall.y - cars.y
    along, aside = dx * cos + dy * sin, (dy * cos - dx * sin).abs()
    walled = wall.valid & (along > 0) & (along < 40.0) & (aside < 0.5 * cars.width + 1.0)
    people_gap = torch.minimum(
        _people_gap(cars, walkers, cos, sin, half), torch.where(walled, along - half - 2.3, 1e3)
    )

    # --- whether to wait at the line of the junction ahead -----------------------------------------------
    nearest_wall = torch.minimum(people_gap, _line_gap(bank, cars, ego, time, front, half))
    pull = torch.minimum(pull, _behind(cars, nearest_wall, torch.zeros_like(speed)))

    # --- bends: brake early enough for the lanes to come ----------------------------------------------------
    slow = bank.comfortable_speed[cars.following] * cars.eagerness
    allowed = (slow * slow + 2 * 1.5 * remaining.clamp(min=0.0)).sqrt()
    pull = torch.minimum(pull, torch.where(speed > allowed, (allowed - speed) / 0.5, cars.strength))

    acceleration = torch.maximum(pull.clamp(min=-_HARDEST), -speed / dt)
    speed = (speed + acceleration * dt).clamp(min=0.0)
    arc = arc + speed * dt

    # --- onto the next lane ------------------------------------------------------------------------------
    length = bank.lane_length[lane]
    passed = arc >= length
    ended = passed & (bank.successor_count[lane] == 0)
    number = order[:, None]
    fresh = choose_lane(bank, cars.second, seed, episode, number * 1000 + cars.choices)
    moved = Traffic(
        lane=torch.where(passed, cars.following, lane),
        arc=torch.where(passed, arc - length, arc),
        speed=speed,
        following=torch.where(passed, cars.second, cars.following),
        second=torch.where(passed, fresh, cars.second),
        choices=cars.choices + passed,
        respawns=cars.respawns,
        eagerness=cars.eagerness,
        headway=cars.headway,
        strength=cars.strength,
        length=cars.length,
        width=cars.width,
        served=(cars.served | ((speed < 0.1) & (front < 4.0))) & ~passed,
        standing=torch.where(speed < 0.1, cars.standing + dt, 0.0),
        valid=cars.valid,
        x=cars.x,
        y=cars.y,
        yaw=cars.yaw,
        curvature=cars.curvature,
    )
    if respawn:
        _set_anew(bank, moved, ego, step, seed, episode, maps, ended)
    else:
        moved.valid = moved.valid & ~ended
    moved.x, moved.y, moved.yaw, moved.curvature = pose(bank, moved.lane, moved.arc)
    return moved, acceleration


def _behind(cars: Traffic, gap: Tensor, leader_speed: Tensor) -> Tensor:
    """Acceleration behind something at `gap` m (bumper to bumper)."""
    return idm_acceleration(
        cars.speed,
        torch.full_like(cars.speed, 1e3),
        gap.clamp(min=0.1),
        leader_speed,
        min_gap=1.5,
        headway=0.5 * cars.headway,
        acceleration=cars.strength,
        hardest=_HARDEST,
    )


def _people_gap(cars: Traffic, walkers: Pedestrians, cos: Tensor, sin: Tensor, half: Tensor) -> Tensor:
    """m to the nearest person who is, or within 2 s will be, in a vehicle's corridor; (A, B)."""
    if not len(walkers.done):
        return torch.full_like(half, 1e3)
    dx, dy = walkers.x[:, None] - cars.x, walkers.y[:, None] - cars.y
    along = dx * cos + dy * sin
    aside = dy * cos - dx * sin - 0.5 * cars.curvature * along * along
    step = walkers.speed_y()[:, None] * cos - walkers.speed_x()[:, None] * sin
    later = aside + 2.0 * step
    span = 0.5 * cars.width + 0.8
    inside = (torch.minimum(aside, later) < span) & (torch.maximum(aside, later) > -span)
    inside = inside & (along > 0) & (along < 40.0) & walkers.walking[:, None]
    return torch.where(inside, along - half - 1.0, 1e3).amin(0)


def _line_gap(bank: RoadBank, cars: Traffic, ego: Ego, time: Tensor, front: Tensor, half: Tensor) -> Tensor:
    """m to the line at which a vehicle has to wait, 1000 where it need not; (A, B)."""
    speed = cars.speed
    on = bank.junction[cars.lane] >= 0
    # What a vehicle lays claim to: the connector it is on, or else the one it comes to.
    claim = torch.where(on, cars.lane, cars.following)
    claims = torch.cat([claim, ego.connector[None].clamp(min=0)])
    known = torch.cat([cars.valid, (ego.connector >= 0)[None]])
    junction = torch.where(known, bank.junction[claims], -2)
    bit, _conflicts = bank.bit[claims], bank.conflicts[claims]
    # A vehicle that goes from connector to connector (in a roundabout) waits for what crosses the next one.
    entering = bank.junction[cars.following] >= 0
    wanted_conflicts = torch.where(entering, bank.conflicts[cars.following], 0)
    wanted_junction = torch.where(entering, bank.junction[cars.following], -1)
    wanted_priority = bank.priority[cars.following]

    to_line = torch.cat([torch.where(on, front - bank.lane_length[cars.lane], front), ego.to_connector[None]])
    inside = torch.cat([on | (front < -0.3), (ego.to_connector < -0.3)[None]])
    speeds = torch.cat([speed, ego.speed[None]])
    lights = lights_of(bank, claims, time)
    free = ~(lights.red | (lights.yellow & (to_line > 6.0)))
    served = torch.cat([cars.served, torch.ones_like(ego.speed, dtype=torch.bool)[None]])
    free = free & (served | ~bank.stop_sign[claims])
    near = (to_line < 6.0) | (to_line < _LOOK * speeds)
    # No room behind the junction: whoever waits for that is not waited for.
    exit_lane = torch.where(on, cars.following, cars.second)
    tail = torch.where(
        (exit_lane[:, None] == cars.lane) & (speed < _SECOND_SPEED) & cars.valid,
        cars.arc - half,
        1e3,
    ).amin(1)
    full = entering & (tail < cars.length + 2.0)
    crowded = torch.cat([full, torch.zeros_like(full[:1])])

    crosses = (wanted_junction[:, None] == junction) & ((wanted_conflicts[:, None] & bit) != 0)
    order = torch.arange(len(claims), device=claims.device)
    rank = bank.priority[claims]
    closer = (to_line < front[:, None]) | (
        (to_line == front[:, None]) & (order[:, None] < order[: len(on), None, None])
    )
    first = (rank > wanted_priority[:, None]) | ((rank == wanted_priority[:, None]) & closer)
    impatient = cars.standing > _PATIENCE
    coming = near & free & ~crowded & ~inside & (speeds > 0.1)
    standing_first = near & free & ~crowded & ~inside & (speeds <= 0.1)
    blocks = inside | (first & (coming | (standing_first & ~impatient[:, None])))
    myself = order[: len(on), None, None] == order[None, :, None]
    give_way = (crosses & blocks & ~myself).any(1)

    ahead = lights_of(bank, cars.following, time)
    stopping = speed * speed / (2.0 * front.clamp(min=0.1))
    wait = ahead.red & (stopping < 6.0) | (ahead.yellow & (stopping < 3.0))
    wait = wait | (bank.stop_sign[cars.following] & ~cars.served & (stopping < 6.0))
    wait = wait | (give_way & (stopping < 4.0)) | (full & (stopping < 4.0) & (wanted_conflicts != 0))
    return torch.where(wait & entering & (front > -0.3), front, 1e3)


def _set_anew(
    bank: RoadBank,
    cars: Traffic,
    ego: Ego,
    step: Tensor,
    seed: Tensor,
    episode: Tensor,
    maps: Tensor,
    ended: Tensor,
) -> None:
    """Place the first vehicle of each world that is far away, stuck or at a dead end somewhere else."""
    number = torch.arange(len(cars.lane), device=cars.lane.device)[:, None]
    dx, dy = cars.x - ego.x, cars.y - ego.y
    square = dx * dx + dy * dy
    away = (square > FAR * FAR) | ended | ((cars.standing > _STUCK) & (square > 45.0**2))
    away = away & cars.valid
    first = away & (away.cumsum(0) == 1)
    # One try a step and world, at a place that is out of the ego's sight and free.
    slot = bank.slot_start[maps] + whole(seed, episode, S_RESPAWN, step, bank.slot_count[maps])
    lane, arc = bank.slot_lane[slot], bank.slot_arc[slot]
    x, y, _, _ = pose(bank, lane, arc)
    apart = (x - ego.x) * (x - ego.x) + (y - ego.y) * (y - ego.y)
    taken = ((cars.x - x) * (cars.x - x) + (cars.y - y) * (cars.y - y) < 16.0**2).any(0)
    good = (apart > _NEAR**2) & (apart < _OUTER**2) & ~taken
    place = first & good
    cars.lane = torch.where(place, lane, cars.lane)
    cars.arc = torch.where(place, arc, cars.arc)
    room = bank.lane_length[lane] - arc - 6.0
    start = torch.minimum(0.5 * bank.comfortable_speed[lane], (4.0 * room.clamp(min=0.0)).sqrt())
    cars.speed = torch.where(place, start, cars.speed)
    cars.choices = cars.choices + 2 * place
    following = choose_lane(bank, cars.lane, seed, episode, number * 1000 + cars.choices)
    cars.following = torch.where(place, following, cars.following)
    second = choose_lane(bank, cars.following, seed, episode, number * 1000 + cars.choices + 1)
    cars.second = torch.where(place, second, cars.second)
    cars.choices = cars.choices + 2 * place
    cars.respawns = cars.respawns + place
    cars.served = cars.served & ~place
    cars.standing = torch.where(place, 0.0, cars.standing)
    # At a dead end, with nowhere to go yet, it waits at the end.
    cars.speed = torch.where(ended & ~place, 0.0, cars.speed)


@dataclass
class Pedestrians:
    """P people of B worlds, every field (P, B)."""

    start_x: Tensor
    start_y: Tensor
    towards_x: Tensor
    """Unit vector of the way across."""
    towards_y: Tensor
    span: Tensor
    """m from kerb to kerb."""
    light: Tensor
    """Lane whose red lets them walk, -1 for none."""
    done: Tensor
    """m walked."""
    pace: Tensor
    """m/s while walking."""
    patience: Tensor
    """s left to wait."""
    bold: Tensor
    """bool: steps out just before the ego comes."""
    walking: Tensor
    tries: Tensor
    """Places looked at so far; the index of the next random number."""
    valid: Tensor

    @property
    def x(self) -> Tensor:
        return self.start_x + self.done * self.towards_x

    @property
    def y(self) -> Tensor:
        return self.start_y + self.done * self.towards_y

    def speed_x(self) -> Tensor:
        return self.walking * self.pace * self.towards_x

    def speed_y(self) -> Tensor:
        return self.walking * self.pace * self.towards_y

    @classmethod
    def nobody(cls, count: int, batch: int, device: torch.device) -> Pedestrians:
        """P people who are still to appear."""

        def zeros() -> Tensor:
            return torch.zeros(count, batch, device=device)

        whole_zeros = torch.zeros(count, batch, dtype=torch.int64, device=device)
        false = torch.zeros(count, batch, dtype=torch.bool, device=device)
        return cls(
            start_x=zeros(), start_y=zeros(), towards_x=zeros() + 1.0, towards_y=zeros(), span=zeros() + 1.0,
            light=whole_zeros - 1, done=zeros(), pace=zeros() + 1.0, patience=zeros(), bold=false,
            walking=false.clone(), tries=whole_zeros.clone(), valid=false.clone(),
        )  # fmt: skip


def move_pedestrians(
    bank: RoadBank,
    people: Pedestrians,
    ego: Ego,
    time: Tensor,
    seed: Tensor,
    episode: Tensor,
    maps: Tensor,
    dt: float,
    appear: bool = True,
) -> Pedestrians:
    """One step of all people: appear at a kerb near the ego, wait, walk across, and go."""
    number = torch.arange(len(people.done), device=people.done.device)[:, None]
    # --- appear ------------------------------------------------------------------------------------------
    index = number * 100_003 + 8 * people.tries
    count = bank.crossing_count[maps]
    which = bank.crossing_start[maps] + whole(seed, episode, S_WALK, index, count.clamp(min=1))
    place = bank.crossing[which.clamp(max=len(bank.crossing) - 1)]
    other_way = uniform(seed, episode, S_WALK, index + 1) < 0.5
    x0, y0 = (
        torch.where(other_way, place[..., 2], place[..., 0]),
        torch.where(other_way, place[..., 3], place[..., 1]),
    )
    x1, y1 = (
        torch.where(other_way, place[..., 0], place[..., 2]),
        torch.where(other_way, place[..., 1], place[..., 3]),
    )
    mx, my = 0.5 * (x0 + x1) - ego.x, 0.5 * (y0 + y1) - ego.y
    square = mx * mx + my * my
    new = ~people.valid & (count > 0) & (square > 25.0**2) & (square < 90.0**2) & appear
    span = ((x1 - x0) * (x1 - x0) + (y1 - y0) * (y1 - y0)).sqrt().clamp(min=1.0)
    light = bank.crossing_light[which.clamp(max=len(bank.crossing) - 1)]
    start_x, start_y = torch.where(new, x0, people.start_x), torch.where(new, y0, people.start_y)
    towards_x = torch.where(new, (x1 - x0) / span, people.towards_x)
    towards_y = torch.where(new, (y1 - y0) / span, people.towards_y)
    span = torch.where(new, span, people.span)
    light = torch.where(new, light, people.light)
    pace = torch.where(new, 0.8 + uniform(seed, episode, S_WALK, index + 2), people.pace)
    patience = torch.where(new, 10.0 * uniform(seed, episode, S_WALK, index + 3), people.patience)
    bold = torch.where(new, (uniform(seed, episode, S_WALK, index + 4) < 0.2) & (light < 0), people.bold)
    done = torch.where(new, 0.0, people.done)
    walking = people.walking & ~new
    valid = people.valid | new

    # --- decide to walk ----------------------------------------------------------------------------------
    dx, dy = start_x - ego.x, start_y - ego.y
    along = dx * ego.heading.cos() + dy * ego.heading.sin()
    eta = along / ego.speed.clamp(min=0.1)
    coming = (along > 0) & (dx * dx + dy * dy < 60.0**2)
    lights = lights_of(bank, light, time)
    by_light = lights.red & (lights.to_green > span / pace)
    # Without a light most look first; the bold step out while the ego is 1.5 to 3 s away.
    by_gap = torch.where(bold, coming & (eta > 1.5) & (eta < 3.0), ~coming | (eta > 6.0) | (ego.speed < 0.5))
    may = torch.where(lights.exists, by_light, by_gap) & (patience <= 0)
    walking = walking | (valid & may)
    done = done + torch.where(walking, pace * dt, 0.0)
    across = done >= span
    gone = valid & (across | (dx * dx + dy * dy > 110.0**2))
    return Pedestrians(
        start_x=start_x, start_y=start_y, towards_x=towards_x, towards_y=towards_y, span=span, light=light,
        done=torch.minimum(done, span), pace=pace, patience=patience - dt, bold=bold, walking=walking & ~gone,
        tries=people.tries + 1, valid=valid & ~gone,
    )  # fmt: skip
