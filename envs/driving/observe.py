"""What the ego sees: 262 numbers, or a picture from above.

`vector_observation` (262,), all in the ego's frame, distances over 50 m and speeds over 20 m/s:

    0:10     last action (2), velocity (2), acceleration (2), steering angle and rate, yaw rate and
    acceleration 10:13    speed limit, signed offset from the route (over 3.5 m), heading against the route's
    13:93    the route ahead, 20 points 3 m apart: x, y, cos, sin
    93:221   the 16 nearest vehicles, parked ones too: x, y, cos, sin, velocity (2), length, width
    221:241  the 4 nearest people: x, y, velocity (2), 1
    241:246  distance to the line ahead, red, yellow, time until green (over 3 s), stop sign to serve
    246:262  distance to the edge of the road in 16 directions

What is not there is 0. `bird_view` paints CaRL's ten channels (its section 3.1), `measurements` and
`value_measurements` go with it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from saferl.envs.driving.frame import NO_LIGHT, Boxes, DrivingFrame, LightState
from saferl.envs.driving.geometry import MAX_STEERING, REAR_TO_CENTRE
from saferl.envs.driving.roads import (
    PAINT_CELL,
    RoadBank,
)
from saferl.envs.driving.traffic import lights_of
from saferl.envs.driving.world import State, cell_of

__all__ = ["VECTOR_SIZE", "bird_view", "measurements", "vector_observation"]

VECTOR_SIZE = 262
_METRES, _SPEED = 50.0, 20.0
_ROUTE_POINTS, _ROUTE_STEP = 20, 3
_VEHICLES, _PEOPLE, _RAYS = 16, 4, 16
_SIGHT = 80.0


def vector_observation(
    bank: RoadBank, state: State, frame: DrivingFrame, vehicles: int, people: int
) -> Tensor:
    """(B, 262) float32; `vehicles` and `people` are the numbers of those in `frame.others`."""
    ego = state.ego
    cos, sin = frame.heading.cos(), frame.heading.sin()
    sideways = state.yaw_rate * REAR_TO_CENTRE
    route, index = state.route, state.index
    here = bank.points[bank.route_points[route, index]]
    signed = (frame.y - here[:, 1]) * here[:, 2].cos() - (frame.x - here[:, 0]) * here[:, 2].sin()
    parts = [
        state.action,
        torch.stack([
            frame.speed / _SPEED, sideways / _SPEED, frame.acceleration_lon / 5.0,
            frame.acceleration_lat / 5.0, ego.steering, state.action[1] * MAX_STEERING - ego.steering,
            state.yaw_rate, state.yaw_acceleration / 5.0,
            frame.speed_limit / _SPEED, (signed / 3.5).clamp(-5.0, 5.0), frame.heading_error,
        ]),
        _route(bank, state, frame, cos, sin),
        _vehicles(frame, vehicles, people, cos, sin),
        _people(frame, vehicles, people, cos, sin),
        _lights(bank, state, frame),
        _rays(bank, state, frame),
    ]  # fmt: skip
    return torch.cat(parts).T.contiguous()


def _route(bank: RoadBank, state: State, frame: DrivingFrame, cos: Tensor, sin: Tensor) -> Tensor:
    """(80, B)."""
    ahead = torch.arange(1, _ROUTE_POINTS + 1, device=cos.device)[:, None] * _ROUTE_STEP
    last = bank.route_count[state.route] - 1
    at = bank.points[bank.route_points[state.route, torch.minimum(state.index + ahead, last)]]
    dx, dy = at[..., 0] - frame.x, at[..., 1] - frame.y
    turn = at[..., 2] - frame.heading
    x, y = (dx * cos + dy * sin) / _METRES, (dy * cos - dx * sin) / _METRES
    return torch.stack([x, y, turn.cos(), turn.sin()], 1).flatten(0, 1)


def _nearest(square: Tensor, features: Tensor, count: int) -> Tensor:
    """Features (N, F, B) of the `count` with the smallest `square` (N, B), in order; (count * F, B)."""
    n = len(square)
    order = torch.arange(n, device=square.device)
    tie = (square[None] == square[:, None]) & (order[None, :, None] < order[:, None, None])
    rank = ((square[None] < square[:, None]) | tie).sum(1)
    out = torch.zeros_like(features)
    out.scatter_(0, rank[:, None].expand_as(features), features)
    return out[:count].flatten(0, 1)


def _vehicles(frame: DrivingFrame, vehicles: int, people: int, cos: Tensor, sin: Tensor) -> Tensor:
    """(128, B)."""
    others = frame.others

    def pick(values: Tensor) -> Tensor:
        return torch.cat([values[:vehicles], values[vehicles + people :]])

    dx, dy = pick(others.x) - frame.x, pick(others.y) - frame.y
    turn = pick(others.heading) - frame.heading
    speed = pick(others.speed) / _SPEED
    turn_cos, turn_sin = turn.cos(), turn.sin()
    square = dx * dx + dy * dy
    seen = pick(others.valid) & (square < _SIGHT * _SIGHT)
    features = torch.stack([
        (dx * cos + dy * sin) / _METRES, (dy * cos - dx * sin) / _METRES, turn_cos, turn_sin,
        speed * turn_cos, speed * turn_sin, pick(others.length) / 5.0, pick(others.width) / 2.0,
    ], 1)  # fmt: skip
    square = torch.where(seen, square, 1e9)
    found = _nearest(square, torch.where(seen[:, None], features, 0.0), _VEHICLES)
    missing = _VEHICLES * 8 - len(found)
    return torch.nn.functional.pad(found, (0, 0, 0, missing)) if missing > 0 else found


def _people(frame: DrivingFrame, vehicles: int, people: int, cos: Tensor, sin: Tensor) -> Tensor:
    """(20, B)."""
    others, rows = frame.others, slice(vehicles, vehicles + people)
    dx, dy = others.x[rows] - frame.x, others.y[rows] - frame.y
    turn = others.heading[rows] - frame.heading
    speed = others.speed[rows] / _SPEED
    square = dx * dx + dy * dy
    seen = others.valid[rows] & (square < _SIGHT * _SIGHT)
    features = torch.stack([
        (dx * cos + dy * sin) / _METRES, (dy * cos - dx * sin) / _METRES, speed * turn.cos(),
        speed * turn.sin(),
        torch.ones_like(dx),
    ], 1)  # fmt: skip
    found = _nearest(torch.where(seen, square, 1e9), torch.where(seen[:, None], features, 0.0), _PEOPLE)
    missing = _PEOPLE * 5 - len(found)
    return torch.nn.functional.pad(found, (0, 0, 0, missing)) if missing > 0 else found


def _lights(bank: RoadBank, state: State, frame: DrivingFrame) -> Tensor:
    """(5, B)."""
    connector = bank.route_next[state.route, state.index]
    lights = lights_of(bank, connector, state.clock)
    faced = frame.light != LightState.NONE
    red = (frame.light == LightState.RED).float()
    yellow = (frame.light == LightState.YELLOW).float()
    line = torch.minimum(frame.light_distance, frame.stop_distance)
    shown = torch.where(line < NO_LIGHT, (line / _METRES).clamp(-1.0, 2.0), 0.0)
    wait = torch.where(faced & (frame.light != LightState.GREEN), (lights.to_green / 3.0).clamp(max=5.0), 0.0)
    return torch.stack([shown, red, yellow, wait, (frame.stop_distance < NO_LIGHT).float()])


def _rays(bank: RoadBank, state: State, frame: DrivingFrame) -> Tensor:
    """(16, B): how far the road goes on in each direction, over 50 m, by steps as long as the way is
    clear."""
    maps = bank.route_map[state.route]
    angle = frame.heading + torch.arange(_RAYS, device=frame.x.device)[:, None] * (2 * math.pi / _RAYS)
    cos, sin = angle.cos(), angle.sin()
    far = torch.zeros_like(cos)
    for _ in range(8):
        border = bank.border[cell_of(bank, maps, frame.x + far * cos, frame.y + far * sin)]
        far = (far + (-border).clamp(min=0.0)).clamp(max=_METRES)
    return far / _METRES


def measurements(state: State, frame: DrivingFrame) -> Tensor:
    """(B, 8), CaRL's: last steering, throttle, brake, gear, velocity (2), forward speed, speed limit
    (m/s)."""
    throttle, brake = state.action[0].clamp(min=0.0), (-state.action[0]).clamp(min=0.0)
    gear = torch.ones_like(throttle)
    sideways = state.yaw_rate * REAR_TO_CENTRE
    values = [state.action[1], throttle, brake, gear, frame.speed, sideways, frame.speed, frame.speed_limit]
    return torch.stack(values, 1)


# --- the picture from above ------------------------------------------------------------------------------

CHANNELS = (
    "road", "route", "marking", "vehicles", "pedestrians", "lights", "stop_signs", "speed_limit", "static",
    "shoulder",
)  # fmt: skip
_BEHIND = 100 / 256
"""Share of the picture behind the ego (CaRL: 100 of 256 pixels)."""
_SLOWEST, _FASTEST = -2.67, 33.33
_YELLOW, _GREEN = 170, 80


def speed_code(speed: Tensor) -> Tensor:
    """CaRL's grey of a speed (m/s): 127 + int(128 clip(v + 2.67, 0, 36) / 36), float."""
    reach = _FASTEST - _SLOWEST
    return 127 + (128 * (speed - _SLOWEST).clamp(0.0, reach) / reach).floor()


@functools.lru_cache(maxsize=8)
def _pixels(size: int, per_metre: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Forward of every row's middle and left of every column's (m), (size,) each: row 0 is farthest ahead."""
    ego_row = size - round(_BEHIND * size)
    forward = (ego_row - 0.5 - torch.arange(size)) / per_metre
    left = (0.5 * size - 0.5 - torch.arange(size)) / per_metre
    return forward.float().to(device), left.float().to(device)


def bird_view(
    bank: RoadBank, state: State, frame: DrivingFrame, size: int = 256, per_metre: float = 2.0
) -> Tensor:
    """(B, 10, size, size) uint8, `CHANNELS` in CaRL's codes, the ego's heading up, `size` pixels a side."""
    device, batch = frame.x.device, len(frame.x)
    maps = bank.route_map[state.route]
    picture = torch.zeros(batch, len(CHANNELS), size * size, dtype=torch.uint8, device=device)
    _paint_ground(bank, maps, picture, frame, _pixels(size, per_metre, device))
    canvas = _Canvas(picture, frame, size, per_metre)
    _paint_route(bank, state, canvas)
    _paint_lines(bank, state, canvas)
    canvas.actors(frame.others)
    return picture.view(batch, len(CHANNELS), size, size)


def _paint_ground(
    bank: RoadBank, maps: Tensor, picture: Tensor, frame: DrivingFrame, pixels: tuple[Tensor, Tensor]
) -> None:
    """What lies still: every pixel looks up its cell. Beyond the ground is what its empty rim shows.

    A place is what its row adds and what its column adds. (A matrix product would round by the number of
    worlds, and a world must not depend on its neighbours.)
    """
    forward, left = pixels
    cos, sin = frame.heading.cos()[:, None] / PAINT_CELL, frame.heading.sin()[:, None] / PAINT_CELL
    origin = (torch.stack([frame.x, frame.y], 1) - bank.ground_origin[maps]) / PAINT_CELL
    column = ((cos * forward + origin[:, :1])[:, :, None] - (sin * left)[:, None]).flatten(1)
    row = ((sin * forward + origin[:, 1:])[:, :, None] + (cos * left)[:, None]).flatten(1)
    width, height = 2 * bank.ground_width[maps][:, None], 2 * bank.ground_height[maps][:, None]
    column = torch.minimum(column.clamp_(min=0.0), (width - 1).float()).long()
    row = torch.minimum(row.clamp_(min=0.0), (height - 1).float()).long()
    at = row.mul_(width).add_(column).add_(4 * bank.ground_start[maps][:, None])
    bits = bank.paint[at]
    # Bits to greys without leaving bytes: road is bit 0, markings 1, broken ones 2, shoulder 3.
    picture[:, 0] = (bits & 1) * 255
    picture[:, 2] = ((bits >> 1) & 1) * 255 | ((bits >> 2) & 1) * 127
    picture[:, 9] = ((bits >> 3) & 1) * 255
    picture[:, 7] = bank.painted_limit[at]


class _Canvas:
    """Splats points given in the world into channels of pictures (B, C, size * size)."""

    def __init__(self, picture: Tensor, frame: DrivingFrame, size: int, per_metre: float) -> None:
        self.picture, self.frame, self.size, self.per_metre = picture, frame, size, per_metre
        self.cos, self.sin = frame.heading.cos(), frame.heading.sin()

    def points(self, channel: int | Tensor, x: Tensor, y: Tensor, valid: Tensor, value: Tensor) -> None:
        """Places (N, B) with greys (N, B), in one channel or each in its own (N, B); the brightest wins."""
        frame, size = self.frame, self.size
        dx, dy = x - frame.x, y - frame.y
        forward, left = dx * self.cos + dy * self.sin, dy * self.cos - dx * self.sin
        row = (size - round(_BEHIND * size) - forward * self.per_metre).floor().long()
        column = (0.5 * size - left * self.per_metre).floor().long()
        inside = valid & (row >= 0) & (row < size) & (column >= 0) & (column < size)
        target = torch.where(inside, channel * size * size + row * size + column, 0).T
        grey = torch.where(inside, value, 0.0).T.to(torch.uint8)
        self.picture.flatten(1).scatter_reduce_(1, target, grey, "amax")

    def actors(self, others: Boxes) -> None:
        """Filled boxes, at least 0.8 m to each side of the centre, and a line ahead of what moves: the way of
        one second, at least 0.5 m."""
        step = 1.0 / self.per_metre
        along = torch.linspace(-1.0, 1.0, math.ceil(5.4 / step) + 1, device=self.cos.device)
        across = torch.linspace(-1.0, 1.0, math.ceil(2.4 / step) + 1, device=self.cos.device)
        # One grid for all boxes, squeezed into each: a point on every pixel of the largest.
        u, v = (g.flatten()[:, None, None] for g in torch.meshgrid(along, across, indexing="ij"))
        half_length = (0.5 * others.length).clamp(min=0.8)
        half_width = (0.5 * others.width).clamp(min=0.8)
        moves = others.kind < 2
        reach = torch.where(moves, 0.5 * others.length + others.speed.clamp(0.5, 36.0), 0.0)
        ahead = torch.linspace(0.0, 1.0, math.ceil(20.0 / step) + 1, device=self.cos.device)[:, None, None]
        forward = torch.cat([u * half_length, ahead * reach])
        left = torch.cat([v * half_width, torch.zeros_like(ahead * reach)])
        cos, sin = others.heading.cos(), others.heading.sin()
        x, y = others.x + forward * cos - left * sin, others.y + forward * sin + left * cos
        code = torch.where(moves, speed_code(others.speed), 255.0)
        channel = torch.where(others.kind == 0, 3, torch.where(others.kind == 1, 4, 8))
        self.points(
            channel.expand_as(x).flatten(0, 1),
            x.flatten(0, 1),
            y.flatten(0, 1),
            others.valid.expand_as(x).flatten(0, 1),
            code.expand_as(x).flatten(0, 1),
        )


def _paint_route(bank: RoadBank, state: State, canvas: _Canvas) -> None:
    """The next 150 m of the route within junctions, 1.5 m to each side."""
    ahead = torch.arange(150, device=state.index.device)[:, None]
    last = bank.route_count[state.route] - 1
    index = state.index + ahead
    ids = bank.route_points[state.route, torch.minimum(index, last)]
    valid = (index <= last) & (bank.junction[bank.point_lane[ids]] >= 0)
    at = bank.points[ids]
    cos, sin = at[..., 2].cos(), at[..., 2].sin()
    offsets = torch.arange(-1.5, 1.51, 0.5, device=ids.device)
    along = torch.tensor([0.0, 0.5], device=ids.device)
    for step in along:
        x = (at[..., 0] + step * cos)[None] - offsets[:, None, None] * sin
        y = (at[..., 1] + step * sin)[None] + offsets[:, None, None] * cos
        white = torch.full_like(x, 255.0).flatten(0, 1)
        canvas.points(1, x.flatten(0, 1), y.flatten(0, 1), valid.repeat(len(offsets), 1), white)


def _paint_lines(bank: RoadBank, state: State, canvas: _Canvas) -> None:
    """The stop line of the next light of the route, and the box before a stop sign that is to be served."""
    frame = canvas.frame
    connector = bank.route_next[state.route, state.index]
    lane = bank.origin[connector.clamp(min=0)].clamp(min=0)
    at = bank.points[bank.lane_start[lane] + bank.lane_segments[lane]]
    cos, sin = at[:, 2].cos(), at[:, 2].sin()
    across = torch.arange(-1.75, 1.76, 0.25, device=cos.device)[:, None]
    lights = lights_of(bank, connector, state.clock)
    left_of_yellow = (bank.yellow[connector.clamp(min=0)] - _since_green(bank, connector, state.clock)).clamp(
        min=0.0
    )
    yellow = 255.0 * (1 - (left_of_yellow / 3.0).clamp(max=1.0) * (1 - 0.67))
    code = torch.where(lights.red, 255.0, torch.where(lights.yellow, yellow, float(_GREEN)))
    shown = frame.light != LightState.NONE
    for back in (0.0, 0.5, 1.0):
        x, y = at[:, 0] - back * cos - across * sin, at[:, 1] - back * sin + across * cos
        canvas.points(5, x, y, shown.expand_as(x), code.expand_as(x))
    pending = frame.stop_distance < NO_LIGHT
    for back in torch.arange(0.0, 4.01, 0.5).tolist():
        x, y = at[:, 0] - back * cos - across * sin, at[:, 1] - back * sin + across * cos
        canvas.points(6, x, y, pending.expand_as(x), torch.full_like(x, 255.0))


def _since_green(bank: RoadBank, connector: Tensor, time: Tensor) -> Tensor:
    """s since the green of a lane's light ended."""
    index = connector.clamp(min=0)
    cycle = bank.light_cycle[index].clamp(min=1.0)
    return torch.remainder(time + bank.light_offset[index] - bank.green_end[index], cycle)
