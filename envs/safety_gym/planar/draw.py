"""A drawn top view of a planar environment: `draw` turns a `Scene` into a frame, `Track` keeps the past.

North is up and a metre is as long everywhere. The robot is a disc with a nose, blue, and red while it pays a
cost; its way of the last seconds fades behind it. Green is what pays (the goal, the circle), violet is a
hazard, red ground lies beyond a boundary, the small amber box is the vase. The strip on top reads the step,
the return and the cost so far. Nothing but Pillow is needed, neither a display nor OpenGL.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont
    from PIL.Image import Image

__all__ = ["HEIGHT", "STRIP", "TRAIL_STEPS", "WIDTH", "Scene", "Track", "draw", "to_pixel"]

WIDTH = 512  # of a frame, px; both sides are multiples of 16, which video codecs like
STRIP = 48  # height of the read-out on top, px
HEIGHT = STRIP + WIDTH
TRAIL_STEPS = 150  # three seconds

_SCALE = 2  # the view is painted this much larger and averaged down: smooth edges
_SIDE = WIDTH * _SCALE
_GRID = 0.5  # m
_EDGE = 0.35  # the robot is kept this far inside the view, m
_AHEAD = 0.9  # Run: so far the view looks ahead of the robot, m

# What is drawn has the size that the engine (and the original) computes with, m.
_GOAL_SIZE = 0.3
_HAZARD_SIZE = 0.2
_CIRCLE_RADIUS = 1.5
_VASE_HALF = 0.1
_BODY_RADIUS = 0.1
_NOSE_AHEAD = 0.1
_NOSE_HALF = 0.05

RGB: TypeAlias = tuple[int, int, int]
_FLOOR: RGB = (248, 248, 245)
_LINE: RGB = (232, 232, 227)
_METRE_LINE: RGB = (214, 214, 208)
_INK: RGB = (31, 35, 43)
_FAINT: RGB = (140, 144, 152)
_BLUE: RGB = (37, 99, 235)
_RED: RGB = (220, 38, 38)
_GREEN: RGB = (22, 163, 74)
_VIOLET: RGB = (124, 58, 237)
_AMBER: RGB = (217, 119, 6)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """All that a frame shows; places in m, angles in rad."""

    title: str
    """Shown at the right of the strip."""
    kind: Literal["goal", "circle", "run"]
    robot: tuple[float, float, float]
    """x, y, heading."""
    paying: bool = False
    """Whether the last step cost anything."""
    trail: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 2)))
    """(T, 2), where the robot was, oldest first, now last."""
    trail_paid: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))
    """(T,), which of the steps that led there cost something."""
    side: float = 0.0
    """Layouts are drawn from [-side, side] squared; 0 where nothing shows that."""
    goal: tuple[float, float] | None = None
    hazards: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 2)))
    """(H, 2), their centres."""
    vase: tuple[float, float, float] | None = None
    """x, y, rotation."""
    x_limit: float = 0.0
    """|x| beyond this costs; 0 for no such limit."""
    y_limit: float = 0.0
    """|y| beyond this costs; 0 for no such limit."""
    step: int = 0
    """Steps since the episode's start."""
    episode_return: float = 0.0
    """Sum of the episode's rewards so far."""
    episode_cost: float = 0.0
    """Sum of the episode's costs so far."""


class Track:
    """What a scene tells of an episode's past: the last places, and the sums so far.

    `trail` and `paid` are the scene's `trail` and `trail_paid`.
    """

    def __init__(self) -> None:
        self._places: deque[tuple[float, float]] = deque(maxlen=TRAIL_STEPS + 1)
        self._paid: deque[bool] = deque(maxlen=TRAIL_STEPS + 1)
        self.total_return = 0.0
        self.total_cost = 0.0

    def start(self, x: float, y: float) -> None:
        """Begin an episode at (x, y), m."""
        self._places.clear()
        self._paid.clear()
        self.total_return = self.total_cost = 0.0
        self.add(x, y, 0.0, 0.0)

    def add(self, x: float, y: float, reward: float, cost: float) -> None:
        """Take in a step that led to (x, y), m."""
        self._places.append((float(x), float(y)))
        self._paid.append(bool(cost > 0))
        self.total_return += float(reward)
        self.total_cost += float(cost)

    @property
    def trail(self) -> NDArray[np.float64]:
        """The last places, (T, 2), oldest first."""
        return np.array(self._places, np.float64).reshape(-1, 2)

    @property
    def paid(self) -> NDArray[np.bool_]:
        """Which of the steps that led there cost something, (T,)."""
        return np.array(self._paid, bool)

    @property
    def paying(self) -> bool:
        """Whether the last step cost something."""
        return bool(self._paid) and self._paid[-1]


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Return the frame of `scene`, (HEIGHT, WIDTH, 3) uint8."""
    from PIL import Image, ImageDraw

    view = _View.of(scene)
    image = _ground(scene.kind, scene.side, scene.x_limit, scene.y_limit, view).copy()
    pen = ImageDraw.Draw(image, "RGBA")
    if scene.goal is not None:
        _disc(pen, view, scene.goal, _GOAL_SIZE, fill=(*_GREEN, 70), outline=_GREEN)
        _disc(pen, view, scene.goal, 0.05, fill=(*_GREEN, 255))
    for place in scene.hazards:
        _disc(pen, view, (place[0], place[1]), _HAZARD_SIZE, fill=(*_VIOLET, 60), outline=_VIOLET)
    _draw_trail(image, view, scene)
    if scene.vase is not None:
        corners = [(a * _VASE_HALF, b * _VASE_HALF) for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
        pen.polygon(_turned(view, scene.vase, corners), fill=(*_AMBER, 210), outline=_AMBER, width=2 * _SCALE)
    _draw_robot(pen, view, scene)

    frame = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    frame.paste(image.reduce(_SCALE), (0, STRIP))
    _write(ImageDraw.Draw(frame), view, scene)
    return np.array(frame)


def to_pixel(scene: Scene, x: float, y: float) -> tuple[int, int]:
    """Return the pixel (row, column) of the scene's frame that shows (x, y), m; it may lie outside."""
    column, row = _View.of(scene).at(x, y)
    return STRIP + math.floor(row / _SCALE), math.floor(column / _SCALE)


@dataclass(frozen=True)
class _View:
    """The square of the world that is seen."""

    x: float
    y: float
    half: float

    @classmethod
    def of(cls, scene: Scene) -> _View:
        x, y, _ = scene.robot
        if not (math.isfinite(x) and math.isfinite(y)):
            x, y = 0.0, 0.0
        half = scene.side + 0.5 if scene.kind == "goal" else 2.0
        centre_y = y - _AHEAD if scene.kind == "run" else _pull(y, half)
        return cls(_pull(x, half), centre_y, half)

    @property
    def per_metre(self) -> float:
        """Pixels of the large picture."""
        return _SIDE / (2 * self.half)

    def at(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Column and row in the large picture of a place, or of many."""
        scale = self.per_metre
        return (x - self.x + self.half) * scale, (self.y + self.half - y) * scale


def _pull(position: float, half: float) -> float:
    """Centre of a view that stays at 0 until the robot comes too near to its edge, then goes with it."""
    reach = half - _EDGE
    return position - min(max(position, -reach), reach)


@functools.lru_cache(maxsize=4)  # the view mostly stands still
def _ground(kind: str, side: float, x_limit: float, y_limit: float, view: _View) -> Image:
    """All that does not move: grid, arena, circle, forbidden ground and its boundary."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_SIDE, _SIDE), _FLOOR)
    pen = ImageDraw.Draw(image, "RGBA")
    for metre in (False, True):  # the darker lines over the lighter ones
        colour = _METRE_LINE if metre else _LINE
        for k in _lines(view.x - view.half, view.x + view.half):
            if (k % 2 == 0) == metre:
                column, _ = view.at(k * _GRID, 0.0)
                pen.line([(column, 0), (column, _SIDE)], fill=colour, width=_SCALE)
        for k in _lines(view.y - view.half, view.y + view.half):
            if (k % 2 == 0) == metre:
                _, row = view.at(0.0, k * _GRID)
                pen.line([(0, row), (_SIDE, row)], fill=colour, width=_SCALE)
    if kind == "goal" and side > 0:
        left, top = view.at(-side, side)
        right, bottom = view.at(side, -side)
        pen.rounded_rectangle(
            [left, top, right, bottom], radius=0.08 * view.per_metre, outline=(*_FAINT, 110), width=2 * _SCALE
        )
    if kind == "circle":
        _disc(pen, view, (0.0, 0.0), _CIRCLE_RADIUS, fill=(*_GREEN, 22), outline=_GREEN)
        _disc(pen, view, (0.0, 0.0), 0.03, fill=(*_GREEN, 150))
    left, top = view.at(-x_limit, y_limit)
    right, bottom = view.at(x_limit, -y_limit)
    beyond = []
    if x_limit:
        beyond += [(0.0, 0.0, left, _SIDE), (right, 0.0, _SIDE, _SIDE)]
    if y_limit:  # without the corners, which are painted already
        inner = (max(left, 0.0), min(right, _SIDE)) if x_limit else (0.0, _SIDE)
        beyond += [(inner[0], 0.0, inner[1], top), (inner[0], bottom, inner[1], _SIDE)]
    for x0, y0, x1, y1 in beyond:
        if x1 > x0 and y1 > y0:
            pen.rectangle([x0, y0, x1, y1], fill=(*_RED, 26))
    ends = (top, bottom) if y_limit else (0.0, float(_SIDE))
    if x_limit:
        for column in (left, right):
            pen.line([(column, ends[0]), (column, ends[1])], fill=(*_RED, 200), width=3 * _SCALE)
    if y_limit:
        for row in (top, bottom):
            pen.line([(left, row), (right, row)], fill=(*_RED, 200), width=3 * _SCALE)
    return image


def _lines(low: float, high: float) -> range:
    return range(math.ceil(low / _GRID), math.floor(high / _GRID) + 1)


def _disc(
    pen: ImageDraw.ImageDraw,
    view: _View,
    centre: tuple[float, float],
    radius: float,
    *,
    fill: tuple[int, int, int, int],
    outline: RGB | None = None,
) -> None:
    column, row = view.at(*centre)
    r = radius * view.per_metre
    box = [column - r, row - r, column + r, row + r]
    pen.ellipse(box, fill=fill)
    if outline is not None:
        pen.ellipse(box, outline=(*outline, 190), width=2 * _SCALE)


def _turned(
    view: _View, pose: tuple[float, float, float], points: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Points (ahead, left) of a body at `pose`, in the large picture."""
    x, y, angle = pose
    sin, cos = math.sin(angle), math.cos(angle)
    return [view.at(x + cos * ahead - sin * left, y + sin * ahead + cos * left) for ahead, left in points]


def _draw_trail(image: Image, view: _View, scene: Scene) -> None:
    """A line that fades with age, red where the step cost something."""
    from PIL import Image, ImageDraw

    count = len(scene.trail)
    if count < 2 or not np.isfinite(scene.trail).all():
        return
    width = 3 * _SCALE
    way = np.stack(view.at(scene.trail[:, 0], scene.trail[:, 1]), axis=1)
    low = np.clip(np.floor(way.min(axis=0) - width), 0, _SIDE).astype(int)
    high = np.clip(np.ceil(way.max(axis=0) + width), 0, _SIDE).astype(int)
    size = (int(high[0] - low[0]), int(high[1] - low[1]))
    if min(size) <= 0:
        return
    points = [(column, row) for column, row in (way - low).tolist()]
    # Painted on a sheet of its own: where segments overlap, the newer one's fading counts, not the sum.
    colours, fading = Image.new("RGB", size, _BLUE), Image.new("L", size)
    colour_pen, fading_pen = ImageDraw.Draw(colours), ImageDraw.Draw(fading)
    for k in range(1, count):
        ends = points[k - 1 : k + 1]
        if scene.trail_paid[k]:
            colour_pen.line(ends, fill=_RED, width=width + 2)
        fading_pen.line(ends, fill=int(190 * (1 - (count - 1 - k) / TRAIL_STEPS)), width=width)
    image.paste(colours, (int(low[0]), int(low[1])), fading)


def _draw_robot(pen: ImageDraw.ImageDraw, view: _View, scene: Scene) -> None:
    x, y, _ = scene.robot
    if not all(map(math.isfinite, scene.robot)):
        return
    colour = _RED if scene.paying else _BLUE
    dark = (int(0.7 * colour[0]), int(0.7 * colour[1]), int(0.7 * colour[2]))
    if scene.paying:
        _disc(pen, view, (x, y), 2.1 * _BODY_RADIUS, fill=(*_RED, 50))
    _disc(pen, view, (x + 0.012, y - 0.018), 1.12 * _BODY_RADIUS, fill=(0, 0, 0, 40))  # its shadow
    near, far, half = _NOSE_AHEAD - _NOSE_HALF, _NOSE_AHEAD + _NOSE_HALF, _NOSE_HALF
    nose = _turned(view, scene.robot, [(near, half), (far, half), (far, -half), (near, -half)])
    pen.polygon(nose, fill=(*dark, 255))
    _disc(pen, view, (x, y), _BODY_RADIUS, fill=(*colour, 255))
    arrow = _turned(view, scene.robot, [(0.07, 0.0), (-0.04, 0.045), (-0.015, 0.0), (-0.04, -0.045)])
    pen.polygon(arrow, fill=(255, 255, 255, 235))


@functools.cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _write(pen: ImageDraw.ImageDraw, view: _View, scene: Scene) -> None:
    """The strip on top, and, where the view goes along, how far it has come."""
    pen.line([(0, STRIP - 1), (WIDTH, STRIP - 1)], fill=_METRE_LINE)
    read_outs = (
        (16, "step", f"{scene.step}", _INK),
        (96, "return", f"{scene.episode_return:.2f}", _INK),
        (206, "cost", f"{scene.episode_cost:g}", _RED if scene.episode_cost > 0 else _INK),
    )
    for column, label, value, colour in read_outs:
        pen.text((column, 15), label, font=_font(11), fill=_FAINT, anchor="ls")
        pen.text((column, 37), value, font=_font(19), fill=colour, anchor="ls")
    pen.text((WIDTH - 16, 37), scene.title, font=_font(13), fill=_FAINT, anchor="rs")
    if scene.kind == "run":
        for k in _lines(view.y - view.half, view.y + view.half):
            row = STRIP + view.at(0.0, k * _GRID)[1] / _SCALE
            if k % 2 == 0 and row > STRIP + 16:
                pen.text((8, row - 3), f"y = {k * _GRID:g} m", font=_font(11), fill=_FAINT, anchor="ls")
