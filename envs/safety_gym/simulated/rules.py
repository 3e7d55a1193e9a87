"""The navigation tasks' rules in compiled loops: layouts, goals, rewards and costs, row by row.

Every formula keeps the original's order of operations, so that results are its bits.

Source: safety-gymnasium 1.0.0, its tasks, assets and random generator.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from saferl.envs.safety_gym.planar.kernels import _refill, _word, seed_row
from saferl.envs.safety_gym.simulated.native import compile_loop

__all__ = [
    "BUTTON",
    "CIRCLE",
    "COSTS",
    "GOAL",
    "KINDS",
    "PUSH",
    "RUN",
    "Rules",
    "begin",
    "draw_layouts",
    "judge",
    "see",
    "seed_row",
]

GOAL, BUTTON, PUSH, CIRCLE, RUN = range(5)
KINDS = {"Goal": GOAL, "Button": BUTTON, "Push": PUSH, "Circle": CIRCLE, "Run": RUN}
COSTS = (
    *("cost", "hazards", "vases_contact", "vases_velocity", "buttons", "gremlins", "pillars"),
    "out_of_boundary",
)
_NONE, _HAZARDS, _VASES_CONTACT, _VASES_VELOCITY, _BUTTONS, _GREMLINS, _PILLARS, _BOUNDARY = range(8)

_RETRIES = 100
_LAYOUTS = 10000
_BINS = 16
_BIN = 2 * math.pi / _BINS


class Rules(NamedTuple):
    """A task's parameters (indices are of things)."""

    kind: int
    goal: int  # the goal, -1 for none
    goal_size: float
    goal_reward: float
    reward_clip: float  # 0 for none
    first_hazard: int
    hazards: int
    hazard_size: float
    box: int
    moving: int
    fixed: int
    gremlins: int  # the first of them, which a new goal sees where they started; -1 for none
    buttons: int
    first_button: int
    button_delay: int
    vase_speed: float
    x_limit: float
    y_limit: float
    ant: bool  # dies when it falls
    joints: int  # coordinates that a reset draws


# --- random numbers: NumPy's RandomState ------------------------------------------------------------------


@compile_loop
def _next(key, cursor, i):  # type: ignore[no-untyped-def]
    if cursor[i] >= 624:
        _refill(key)
        cursor[i] = 0
    cursor[i] += 1
    return _word(key, cursor[i] - 1)


@compile_loop
def _uniform(key, cursor, i, low, high):  # type: ignore[no-untyped-def]
    a = _next(key, cursor, i) >> np.uint32(5)
    b = _next(key, cursor, i) >> np.uint32(6)
    return low + (high - low) * ((a * 67108864.0 + b) / 9007199254740992.0)


@compile_loop
def _choice(key, cursor, i, number):  # type: ignore[no-untyped-def]
    """RandomState.choice(number): masked words until one is small enough; none for a single thing."""
    if number == 1:
        return 0
    mask = np.uint32(1)
    while mask < np.uint32(number - 1):
        mask = (mask << np.uint32(1)) | np.uint32(1)
    while True:
        value = _next(key, cursor, i) & mask
        if value <= np.uint32(number - 1):
            return np.int64(value)


# --- layouts and goals ------------------------------------------------------------------------------------


@compile_loop
def _free(row, cols, keepouts, x, y, index, last):  # type: ignore[no-untyped-def]
    """Whether (x, y) keeps its distance from the things before `last` other than `index`."""
    for j in range(last):
        if j == index:
            continue
        dx, dy = x - row[cols.places + 2 * j], y - row[cols.places + 2 * j + 1]
        if math.sqrt(dx * dx + dy * dy) < keepouts[j] + 0.0 + keepouts[index]:
            return False
    return True


@compile_loop
def _draw_place(key, cursor, i, row, cols, bounds, keepouts, index, last, tries):  # type: ignore[no-untyped-def]
    """Place a thing among those before `last`; False when all tries fail."""
    for _ in range(tries):
        x = _uniform(key, cursor, i, bounds[index, 0], bounds[index, 2])
        y = _uniform(key, cursor, i, bounds[index, 1], bounds[index, 3])
        if _free(row, cols, keepouts, x, y, index, last):
            row[cols.places + 2 * index], row[cols.places + 2 * index + 1] = x, y
            return True
    return False


@compile_loop
def _draw_layout(key, cursor, i, row, cols, bounds, keepouts):  # type: ignore[no-untyped-def]
    for j in range(len(keepouts)):
        if not _draw_place(key, cursor, i, row, cols, bounds, keepouts, j, j, _RETRIES):
            return False
    return True


@compile_loop
def draw_layouts(lo, hi, mask, state, keys, cursor, cols, bounds, keepouts):  # type: ignore[no-untyped-def]
    """Draw the masked rows' layouts; returns the first row for which there is none, or -1."""
    for i in range(lo, hi):
        if not mask[i]:
            continue
        found = False
        for _ in range(_LAYOUTS):
            if _draw_layout(keys[i], cursor, i, state[i], cols, bounds, keepouts):
                found = True
                break
        if not found:
            return i
        for j in range(len(keepouts)):
            state[i, cols.rotations + j] = _uniform(keys[i], cursor, i, 0.0, 2 * math.pi)
    return -1


@compile_loop
def _distance(row, a, b, size):  # type: ignore[no-untyped-def]
    """How far the points at two columns are from each other."""
    total = 0.0
    for n in range(size):
        total += (row[a + n] - row[b + n]) * (row[a + n] - row[b + n])
    return math.sqrt(total)


@compile_loop
def _measure(row, rules, cols):  # type: ignore[no-untyped-def]
    """Write the distances that the reward is made of."""
    goal, box = cols.positions + 3 * rules.goal, cols.positions + 3 * rules.box
    if rules.kind == PUSH:
        row[cols.last] = _distance(row, box, cols.xpos, 3)
        row[cols.last + 1] = _distance(row, box, goal, 3)
    else:
        row[cols.last] = _distance(row, goal, cols.xpos, 2)


@compile_loop
def _set_goal(key, cursor, i, row, rules, cols, bounds, keepouts):  # type: ignore[no-untyped-def]
    """Draw a new goal and measure the distances to it; False when there is no place for one."""
    if rules.kind == BUTTON:
        target = _choice(key, cursor, i, rules.buttons)
        row[cols.target], row[cols.timer] = target, rules.button_delay
        source = cols.positions + 3 * (rules.first_button + target)
    else:
        last = len(keepouts)
        if not _draw_place(key, cursor, i, row, cols, bounds, keepouts, rules.goal, last, _LAYOUTS):
            return False
        source = cols.places + 2 * rules.goal
    for n in range(2):
        row[cols.positions + 3 * rules.goal + n] = row[source + n]
    _measure(row, rules, cols)
    return True


@compile_loop
def begin(lo, hi, mask, state, keys, cursor, rules, cols, bounds, keepouts):  # type: ignore[no-untyped-def]
    """Set the masked rows' first goals and draw what the robots draw; a row without a goal, or -1."""
    for i in range(lo, hi):
        if not mask[i]:
            continue
        row = state[i]
        if rules.goal >= 0 and not _set_goal(keys[i], cursor, i, row, rules, cols, bounds, keepouts):
            return i
        row[cols.timer] = 0.0
        for n in range(rules.joints):
            row[cols.noise + n] = _uniform(keys[i], cursor, i, -0.1, 0.1)
    return -1


# --- rewards and costs ------------------------------------------------------------------------------------


@compile_loop
def _reward(row, rules, cols, speed):  # type: ignore[no-untyped-def]
    """The step's reward, and whether it reached the goal; `speed` is what Circle and Run reward."""
    first, second = row[cols.last], row[cols.last + 1]
    reward, met = speed, False
    if rules.kind == GOAL or rules.kind == BUTTON:
        _measure(row, rules, cols)
        reward = first - row[cols.last]
        if rules.kind == GOAL:
            met = row[cols.last] <= rules.goal_size
        else:
            met = row[cols.touch_fixed + int(row[cols.target])] > 0.0
    elif rules.kind == PUSH:
        _measure(row, rules, cols)
        reward = (first - row[cols.last]) if first > 0.0 else 0.0
        reward += second - row[cols.last + 1]
        met = row[cols.last + 1] <= rules.goal_size
    elif rules.kind == RUN:
        reward = speed - first
        row[cols.last] = speed
    if met:
        reward += rules.goal_reward
    if rules.reward_clip > 0.0 and not -rules.reward_clip < reward < rules.reward_clip:
        reward = min(max(reward, -rules.reward_clip), rules.reward_clip)
    return reward, met


@compile_loop
def _any_touch(row, first, number):  # type: ignore[no-untyped-def]
    touches = 0
    for n in range(number):
        touches += row[first + n] > 0.0
    return touches > 0


@compile_loop
def _costs(row, rules, cols, code):  # type: ignore[no-untyped-def]
    """Whether the part `code` of `COSTS` is violated."""
    if code == _HAZARDS:
        for j in range(rules.first_hazard, rules.first_hazard + rules.hazards):
            if _distance(row, cols.positions + 3 * j, cols.xpos, 2) < rules.hazard_size:
                return True
    elif code in (_VASES_CONTACT, _GREMLINS):
        return _any_touch(row, cols.touch_moving, rules.moving)
    elif code == _VASES_VELOCITY:
        for j in range(rules.moving):
            at = cols.moving_qvel + 6 * j
            if math.sqrt(row[at] ** 2 + row[at + 1] ** 2 + row[at + 2] ** 2) >= rules.vase_speed:
                return True
    elif code == _BUTTONS:
        for j in range(rules.buttons):
            if row[cols.timer] == 0.0 and j != int(row[cols.target]) and row[cols.touch_fixed + j] > 0.0:
                return True
    elif code == _PILLARS:
        return _any_touch(row, cols.touch_fixed, rules.fixed)
    elif code == _BOUNDARY:
        x, y = abs(row[cols.xpos]), abs(row[cols.xpos + 1])
        return x > rules.x_limit or (rules.y_limit > 0.0 and y > rules.y_limit)
    return False


@compile_loop
def judge(  # type: ignore[no-untyped-def]
    lo,
    hi,
    state,
    keys,
    cursor,
    rules,
    cols,
    bounds,
    keepouts,
    speeds,
    codes,
    rewards,
    costs,
    goal_met,
    terminated,
):
    """Reward and cost the step just taken, then set new goals, in the original's order.

    `speeds` (N,) as in `_reward`, `codes` (C,) the parts of the cost; `rewards` (N,), `costs` (C, N),
    `goal_met` and `terminated` (N,) are written.
    """
    for i in range(lo, hi):
        row = state[i]
        rewards[i], goal_met[i] = _reward(row, rules, cols, speeds[i])
        for c in range(len(codes)):
            costs[c, i] = 1.0 if _costs(row, rules, cols, codes[c]) else 0.0
        if row[cols.timer] > 0.0:
            row[cols.timer] -= 1.0
        terminated[i] = rules.ant and not row[cols.xpos + 2] > 0.08
        if goal_met[i]:
            # Things are where they are now, but gremlins count where they started.
            for j in range(len(keepouts) if rules.gremlins < 0 else rules.gremlins):
                source = cols.xpos if j == 0 else cols.positions + 3 * j
                row[cols.places + 2 * j], row[cols.places + 2 * j + 1] = row[source], row[source + 1]
            if not _set_goal(keys[i], cursor, i, row, rules, cols, bounds, keepouts):
                terminated[i] = True


@compile_loop
def see(distances, angles, columns, reach, obs):  # type: ignore[no-untyped-def]
    """Fill the lidars of `obs` (n, ...) from the things' distances and angles (n, L).

    `columns` (L,) are the first columns of the lidars that see the things.
    """
    for i in range(len(obs)):
        row = obs[i]
        for j in range(len(columns)):
            row[columns[j] : columns[j] + _BINS] = 0.0
        for j in range(len(columns)):
            distance, angle = distances[i, j], angles[i, j]
            closeness = max(0.0, reach - distance) / reach
            index = int(angle / _BIN)
            share = (angle - _BIN * index) / _BIN
            first = columns[j]
            at, after, before = index % _BINS, (index + 1) % _BINS, (index - 1) % _BINS
            row[first + at] = max(row[first + at], closeness)
            row[first + after] = max(row[first + after], share * closeness)
            row[first + before] = max(row[first + before], (1 - share) * closeness)
