"""The drawn view of the planar engine: what is where, in which colour, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from typing import Any

import numpy as np
import pytest

from saferl.envs import make_vec
from saferl.envs.safety_gym.planar.draw import (
    HEIGHT,
    STRIP,
    TRAIL_STEPS,
    WIDTH,
    Scene,
    Track,
    draw,
    to_pixel,
)
from saferl.envs.safety_gym.planar.env import PlanarVectorEnv
from saferl.envs.safety_gym.planar.tasks import TASKS
from saferl.errors import UsageError

GOAL = Scene(
    title="PointGoal1",
    kind="goal",
    robot=(0.0, 0.0, 0.0),
    side=1.5,
    goal=(1.0, 1.0),
    hazards=np.array([[-1.0, 1.0], [-1.0, -1.0]]),
    vase=(1.0, -1.0, math.pi / 4),
)
CIRCLE = Scene(title="PointCircle2", kind="circle", robot=(0.3, 0.2, 0.0), x_limit=1.125, y_limit=1.125)
RUN = Scene(title="PointRun0", kind="run", robot=(0.0, 16.5, -math.pi / 2), x_limit=0.5)


def colour(scene: Scene, x: float, y: float) -> tuple[int, int, int]:
    red, green, blue = draw(scene)[to_pixel(scene, x, y)].tolist()
    return red, green, blue


def kind_of(scene: Scene, x: float, y: float) -> str:
    """Which colour the frame has at a place, by its dominant channels."""
    red, green, blue = colour(scene, x, y)
    if max(red, green, blue) - min(red, green, blue) < 12:
        return "grey"
    if min(red, blue) > green + 8:
        return "violet"
    if red > blue + 60 and green > blue + 30 and red > green + 30:
        return "amber"
    return {red: "red", green: "green", blue: "blue"}[max(red, green, blue)]


def blue_centre(frame: np.ndarray) -> np.ndarray:
    """Row and column of the robot's disc."""
    where = (np.abs(frame.astype(int) - (37, 99, 235)).sum(axis=2) < 30).nonzero()
    return np.array([where[0].mean(), where[1].mean()])


def spawn(task_id: str = "SafetyPointGoal1-v0", num_envs: int = 1, **kwargs: Any) -> PlanarVectorEnv:
    env = make_vec(task_id, num_envs, render_mode="rgb_array", **kwargs)
    assert isinstance(env, PlanarVectorEnv)
    return env


# --- one scene ----------------------------------------------------------------------------------------


def test_everything_stands_where_it_is() -> None:
    frame = draw(GOAL)
    assert frame.shape == (HEIGHT, WIDTH, 3)
    assert frame.dtype == np.uint8
    assert frame.flags.writeable
    assert kind_of(GOAL, 0.0, 0.06) == "blue"
    assert kind_of(GOAL, 1.2, 1.03) == "green"
    assert kind_of(GOAL, -1.1, 1.06) == "violet"
    assert kind_of(GOAL, -1.05, -1.1) == "violet"
    assert kind_of(GOAL, 1.02, -1.03) == "amber"
    assert kind_of(GOAL, 0.3, 0.3) == "grey"
    # Sizes are those that count: a goal of 0.3 m, hazards of 0.2 m; the vase is turned by 45 degrees.
    assert kind_of(GOAL, 1.0 + 0.27, 1.03) == "green"
    assert kind_of(GOAL, 1.0 + 0.34, 1.03) == "grey"
    assert kind_of(GOAL, -1.0 + 0.17, 1.03) == "violet"
    assert kind_of(GOAL, -1.0 + 0.24, 1.03) == "grey"
    assert kind_of(GOAL, 1.12, -0.98) == "amber"
    assert kind_of(GOAL, 1.09, -0.91) == "grey"


@pytest.mark.parametrize("heading", [0.0, 1.0, math.pi / 2, -2.5])
def test_the_nose_points_ahead(heading: float) -> None:
    scene = dataclasses.replace(GOAL, robot=(0.26, 0.24, heading))
    cos, sin = math.cos(heading), math.sin(heading)
    red, green, blue = colour(scene, 0.26 + 0.13 * cos, 0.24 + 0.13 * sin)
    assert blue > 130
    assert red + green < 120
    assert kind_of(scene, 0.26 - 0.145 * cos, 0.24 - 0.145 * sin) == "grey"
    assert kind_of(scene, 0.26 - 0.08 * cos, 0.24 - 0.08 * sin) == "blue"


def test_a_paying_robot_is_red() -> None:
    scene = dataclasses.replace(GOAL, paying=True)
    assert kind_of(scene, 0.0, 0.06) == "red"
    assert kind_of(scene, 0.13, 0.0) == "red"
    assert kind_of(scene, -0.15, 0.05) == "red"  # its halo


def test_forbidden_ground_is_red() -> None:
    for x, y in ((1.3, 0.2), (-1.3, 0.2), (0.2, 1.3), (0.2, -1.3), (1.3, 1.7), (-1.3, -1.7)):
        assert kind_of(CIRCLE, x, y) == "red", (x, y)
    first = dataclasses.replace(CIRCLE, y_limit=0.0)
    assert kind_of(first, 0.2, 1.7) == "grey"
    assert kind_of(first, 1.7, 0.2) == "red"
    assert kind_of(CIRCLE, 0.2, 0.7) == "green"  # inside the circle
    assert kind_of(RUN, 0.2, 16.2) == "grey"
    assert kind_of(RUN, 0.7, 16.2) == "red"
    red, green, _ = colour(RUN, 0.5, 16.2)  # the boundary itself
    assert red - green > 100


def test_the_trail_fades_and_remembers_costs() -> None:
    x = np.linspace(-1.0, 0.0, TRAIL_STEPS)
    trail, paid = np.stack([x, np.full_like(x, 0.3)], 1), (x > -0.6) & (x < -0.4)
    scene = dataclasses.replace(
        GOAL, robot=(0.0, 0.3, 0.0), trail=trail, trail_paid=paid, hazards=np.empty((0, 2))
    )
    assert kind_of(scene, -0.5, 0.3) == "red"
    assert kind_of(scene, -0.27, 0.3) == "blue"
    recent, old, older = (colour(scene, x, 0.3)[0] for x in (-0.27, -0.75, -0.9))
    assert recent < old < older < 248


def test_the_view_goes_along() -> None:
    for x, y in ((0.0, 0.0), (3.0, 0.2), (-40.0, 7.0)):
        scene = dataclasses.replace(GOAL, robot=(x, y, 0.0))
        row, column = to_pixel(scene, x, y)
        assert STRIP <= row < HEIGHT
        assert 0 <= column < WIDTH
        assert np.abs(blue_centre(draw(scene)) - (row, column)).max() < 4
    rows = {to_pixel(dataclasses.replace(RUN, robot=(0.1, y, 0.0)), 0.1, y)[0] for y in (16.5, 3.0, -50.0)}
    assert len(rows) == 1
    moved = dataclasses.replace(RUN, robot=(0.0, 16.3, -math.pi / 2))
    assert (draw(RUN)[STRIP:] != draw(moved)[STRIP:]).any()  # the grid shows that it moves


def test_the_read_out_tells_the_sums() -> None:
    plain = draw(GOAL)
    for change in ({"step": 7}, {"episode_return": 1.5}, {"episode_cost": 3.0}, {"title": "other"}):
        changed = draw(dataclasses.replace(GOAL, **change)) != plain
        assert changed[:STRIP].any(), change
        assert not changed[STRIP:].any(), change
    strip = draw(dataclasses.replace(GOAL, episode_cost=3.0))[:STRIP].astype(int)
    assert (strip[..., 0] - strip[..., 1] > 100).any()
    assert not (plain[:STRIP, :, 0].astype(int) - plain[:STRIP, :, 1] > 100).any()


def test_a_robot_that_went_astray_is_left_out() -> None:
    nan = float("nan")
    scene = dataclasses.replace(
        GOAL, robot=(nan, nan, nan), trail=np.full((3, 2), nan), trail_paid=np.zeros(3, bool)
    )
    assert kind_of(scene, 1.2, 1.03) == "green"


def test_track() -> None:
    track = Track()
    assert track.trail.shape == (0, 2)
    assert not track.paying
    track.start(1.0, 2.0)
    for k in range(TRAIL_STEPS + 20):
        track.add(k, 0.0, 0.5, float(k % 2))
    assert track.trail.shape == (TRAIL_STEPS + 1, 2)
    assert track.paid.shape == (TRAIL_STEPS + 1,)
    assert track.trail[-1].tolist() == [TRAIL_STEPS + 19, 0]
    assert track.paying
    assert track.total_return == 0.5 * (TRAIL_STEPS + 20)
    assert track.total_cost == (TRAIL_STEPS + 20) // 2
    track.start(3.0, 4.0)
    assert track.trail.tolist() == [[3, 4]]
    assert (track.total_return, track.total_cost, track.paying) == (0.0, 0.0, False)


# --- the environment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", TASKS)
def test_every_task_is_drawn_and_moves(task_id: str) -> None:
    env = spawn(task_id)
    assert "rgb_array" in env.metadata["render_modes"]
    env.reset(seed=3)
    (before,) = env.render()
    for _ in range(30):
        env.step(np.array([[1.0, 0.0]]))
    (after,) = env.render()
    assert before.shape == after.shape == (HEIGHT, WIDTH, 3)
    assert (before[STRIP:] != after[STRIP:]).sum() > 300
    (again,) = env.render()
    np.testing.assert_array_equal(after, again)


def test_the_robot_moves_along_its_heading() -> None:
    env = spawn("SafetyPointGoal0-v0")
    env.reset(seed=0)
    first = blue_centre(env.render()[0])
    x, y = env._state[0, :2].tolist()
    for _ in range(40):
        env.step(np.array([[1.0, 0.0]]))
    down, right = blue_centre(env.render()[0]) - first
    assert math.hypot(down, right) > 20
    dx, dy = env._state[0, 0] - x, env._state[0, 1] - y
    assert math.cos(math.atan2(-down, right) - math.atan2(dy, dx)) > 0.97


def test_costs_are_shown() -> None:
    env = spawn("SafetyPointRun0-v0")
    env.reset(seed=0)
    env._state[0, :3] = 0.45, 16.0, 0.0
    paid = 0.0
    for _ in range(20):
        paid += env.step(np.array([[1.0, 0.0]]))[4]["cost"][0]
    scene = env._scene(0)
    assert paid > 0
    assert scene.paying
    assert scene.episode_cost == paid
    assert kind_of(scene, scene.robot[0], scene.robot[1] + 0.07) == "red"


def test_an_episode_begins_without_a_past() -> None:
    env = spawn("SafetyPointCircle1-v0", 2)
    env.reset(seed=0)
    for _ in range(5):
        env.step(np.ones((2, 2)))
    env.reset(options={"reset_mask": np.array([True, False])})
    assert [len(env._scene(row).trail) for row in (0, 1)] == [1, 6]
    env._steps[1] = env.task.max_episode_steps - 1
    _, _, _, truncated, _ = env.step(np.ones((2, 2)))
    assert truncated.tolist() == [False, True]
    ended = env._scene(1)
    assert (ended.step, ended.episode_return, len(ended.trail)) == (0, 0.0, 1)
    state = env.get_state()
    env.set_state(state)
    assert [len(env._scene(row).trail) for row in (0, 1)] == [1, 1]
    assert len(env.render()) == 2


def test_drawing_changes_no_number() -> None:
    drawn, plain = spawn(), make_vec("SafetyPointGoal1-v0", 1)
    drawn.reset(seed=5)
    plain.reset(seed=5)
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 1, 2)):
        drawn.render()
        a, b = drawn.step(action), plain.step(action)
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1] == b[1]


def test_impossible_requests() -> None:
    with pytest.raises(UsageError, match="made without render_mode; pass render_mode='rgb_array'"):
        PlanarVectorEnv("SafetyPointGoal1-v0").render()
    with pytest.raises(UsageError, match="call reset first"):
        spawn().render()
    with pytest.raises(UsageError, match="65 environments are too many to draw; make at most 64"):
        make_vec("SafetyPointGoal1-v0", 65, render_mode="rgb_array")
    with pytest.raises(UsageError, match="render_mode is 'human'"):
        PlanarVectorEnv("SafetyPointGoal1-v0", render_mode="human")


@pytest.mark.skipif(importlib.util.find_spec("safety_gymnasium") is None, reason="needs safety-gymnasium")
def test_cameras_are_the_originals() -> None:
    for kwargs in ({"camera_name": "track"}, {"width": 64}):
        env = make_vec("SafetyPointGoal0-v0", 1, render_mode="rgb_array", **kwargs)
        assert env.metadata["backend"] == "original"
        env.close()
    depth = make_vec("SafetyPointGoal0-v0", 1, render_mode="depth_array")
    assert depth.metadata["backend"] == "original"
    depth.close()
