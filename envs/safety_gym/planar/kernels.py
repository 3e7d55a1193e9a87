"""The planar engine in compiled loops: one pass over a block of environments does a whole control step.

Everything is a plain function over arrays, compiled by numba on first use and cached on disk. Blocks of rows
release Python's lock, so that threads share the work; each environment's numbers depend on its own row only.

Row layout: `state` (N, STATE) float64 holds x, y, heading, vx, vy, turning rate, the last distance or
potential, and the vase's velocity; `places` (N, things, 2) the layout; `keys` (N, 624) uint32 and `cursor`
(N,) the Mersenne twisters (NumPy's RandomState, which the original uses).
"""

from __future__ import annotations

import math

import numba
import numpy as np

from saferl.envs.safety_gym.planar import equations as eq

STATE = 9
X, Y, HEADING, VX, VY, RATE, LAST, VASE_VX, VASE_VY = range(STATE)

GOAL, CIRCLE, RUN = range(3)
KINDS = {"goal": GOAL, "circle": CIRCLE, "run": RUN}

_accelerations = numba.njit(eq.accelerations, cache=True)
_to_ego = numba.njit(eq.to_ego, cache=True)

_H = eq.SUBSTEP_SECONDS
_BINS = 16
_BIN = 2 * math.pi / _BINS
_GOAL_SIZE = 0.3
_HAZARD_SIZE = 0.2
_CIRCLE_RADIUS = 1.5
_RUN_GOAL_Y = -1e3
_RUN_FACTOR = 60.0
_RETRIES = 100
_LAYOUTS = 10000
_VASE_HALF = 0.1
_BODY_RADIUS = 0.1
_NOSE_RADIUS = 0.05
_NOSE_AHEAD = 0.1
_FRICTION = 1.0

_compile = numba.njit(nogil=True, cache=True, error_model="numpy")


# --- NumPy's RandomState: MT19937 and 53-bit doubles (Matsumoto and Nishimura 1998) ----------------------


@_compile
def seed_row(key, seed):  # type: ignore[no-untyped-def]
    """Initialise a twister's 624 words from a 32-bit seed."""
    word = np.uint64(seed)
    for i in range(624):
        key[i] = np.uint32(word)
        word = (np.uint64(1812433253) * (word ^ (word >> np.uint64(30))) + np.uint64(i + 1)) & np.uint64(
            0xFFFFFFFF
        )


@_compile
def _refill(key):  # type: ignore[no-untyped-def]
    for i in range(624):
        mixed = (key[i] & np.uint32(0x80000000)) | (key[(i + 1) % 624] & np.uint32(0x7FFFFFFF))
        twisted = key[(i + 397) % 624] ^ (mixed >> np.uint32(1))
        if mixed & np.uint32(1):
            twisted ^= np.uint32(0x9908B0DF)
        key[i] = twisted


@_compile
def _word(key, at):  # type: ignore[no-untyped-def]
    y = key[at]
    y ^= y >> np.uint32(11)
    y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
    y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
    y ^= y >> np.uint32(18)
    return y


@_compile
def _uniform(key, cursor, i, low, high):  # type: ignore[no-untyped-def]
    if cursor[i] >= 624:
        _refill(key)
        cursor[i] = 0
    at = cursor[i]
    cursor[i] = at + 2
    a = _word(key, at) >> np.uint32(5)
    b = _word(key, at + 1) >> np.uint32(6)
    return low + (high - low) * ((a * 67108864.0 + b) / 9007199254740992.0)


@_compile
def _skip(key, cursor, i):  # type: ignore[no-untyped-def]
    if cursor[i] >= 624:
        _refill(key)
        cursor[i] = 0
    cursor[i] += 2


# --- layouts ----------------------------------------------------------------------------------------------


@_compile
def _free(places, keepouts, x, y, index, last):  # type: ignore[no-untyped-def]
    """Whether (x, y) keeps its distance from the things before `last` other than `index`."""
    for j in range(last):
        if j == index:
            continue
        dx, dy = x - places[j, 0], y - places[j, 1]
        if math.sqrt(dx * dx + dy * dy) < keepouts[j] + 0.0 + keepouts[index]:
            return False
    return True


@_compile
def _place_all(key, cursor, i, places, bounds, keepouts):  # type: ignore[no-untyped-def]
    """Draw a whole layout; False when something found no place."""
    for j in range(len(keepouts)):
        for _ in range(_RETRIES):
            x = _uniform(key, cursor, i, bounds[j, 0], bounds[j, 2])
            y = _uniform(key, cursor, i, bounds[j, 1], bounds[j, 3])
            if _free(places, keepouts, x, y, j, j):
                places[j, 0], places[j, 1] = x, y
                break
        else:
            return False
    return True


@_compile
def _place_goal(key, cursor, i, places, bounds, keepouts):  # type: ignore[no-untyped-def]
    """Draw the goal (thing 1) anew among the others; False when 10000 tries fail."""
    for _ in range(_LAYOUTS):
        x = _uniform(key, cursor, i, bounds[1, 0], bounds[1, 2])
        y = _uniform(key, cursor, i, bounds[1, 1], bounds[1, 3])
        if _free(places, keepouts, x, y, 1, len(keepouts)):
            places[1, 0], places[1, 1] = x, y
            return True
    return False


@_compile
def reset_rows(  # type: ignore[no-untyped-def]
    lo, hi, mask, kind, bounds, keepouts, state, places, rotations, keys, cursor, steps
):
    """Start episodes in the masked rows of [lo, hi); returns the first row without a layout, or -1."""
    for i in range(lo, hi):
        if not mask[i]:
            continue
        key = keys[i]
        for _ in range(_LAYOUTS):
            if _place_all(key, cursor, i, places[i], bounds, keepouts):
                break
        else:
            return i
        for j in range(len(keepouts)):
            rotations[i, j] = _uniform(key, cursor, i, 0.0, 2 * math.pi)
        row = state[i]
        row[:] = 0.0
        row[X], row[Y], row[HEADING] = places[i, 0, 0], places[i, 0, 1], rotations[i, 0]
        if kind == GOAL:
            if not _place_goal(key, cursor, i, places[i], bounds, keepouts):
                return i
            dx, dy = places[i, 1, 0] - row[X], places[i, 1, 1] - row[Y]
            row[LAST] = math.sqrt(dx * dx + dy * dy)
        elif kind == RUN:
            dy = row[Y] - _RUN_GOAL_Y
            row[LAST] = -math.sqrt(row[X] * row[X] + dy * dy) * _RUN_FACTOR
        steps[i] = 0
    return -1


# --- observations -----------------------------------------------------------------------------------------


@_compile
def _see(out, x, y, sin, cos, reach):  # type: ignore[no-untyped-def]
    """Add a thing at the world offset (x, y) to a lidar of 16 bins."""
    distance = math.sqrt(x * x + y * y)
    if distance >= reach:
        return
    ahead, left = _to_ego(x, y, sin, cos)
    angle = math.atan2(left, ahead)
    if angle < 0.0:
        angle += 2 * math.pi
    closeness = (reach - distance) / reach
    index = int(angle / _BIN)
    share = (angle - _BIN * index) / _BIN
    index %= _BINS
    after, before = (index + 1) % _BINS, (index - 1) % _BINS
    out[index] = max(out[index], closeness)
    out[after] = max(out[after], share * closeness)
    out[before] = max(out[before], (1.0 - share) * closeness)


@_compile
def _observe(out, row, places, kind, hazards, vase, reach, sin, cos, ax, ay):  # type: ignore[no-untyped-def]
    """Fill one observation: 12 sensor readings, then the lidars."""
    out[0], out[1] = _to_ego(ax, ay, sin, cos)
    out[2] = eq.GRAVITY
    out[3], out[4] = _to_ego(row[VX], row[VY], sin, cos)
    out[5] = 0.0
    out[6] = 0.0
    out[7] = 0.0
    out[8] = row[RATE]
    out[9], out[10] = _to_ego(0.0, eq.MAGNETIC_FIELD, sin, cos)
    out[11] = 0.0
    out[12:] = 0.0
    x, y = row[X], row[Y]
    if kind == GOAL:
        _see(out[12:28], places[1, 0] - x, places[1, 1] - y, sin, cos, reach)
        if vase > 0:
            for j in range(hazards[0], hazards[1]):
                _see(out[28:44], places[j, 0] - x, places[j, 1] - y, sin, cos, reach)
            _see(out[44:60], places[vase, 0] - x, places[vase, 1] - y, sin, cos, reach)
    elif kind == CIRCLE:
        _see(out[12:28], -x, -y, sin, cos, reach)


@_compile
def observe_rows(lo, hi, mask, kind, hazards, vase, reach, state, places, obs):  # type: ignore[no-untyped-def]
    """Observations of just started episodes (nothing moves) in the masked rows of [lo, hi)."""
    for i in range(lo, hi):
        if mask[i]:
            sin, cos = math.sin(state[i, HEADING]), math.cos(state[i, HEADING])
            _observe(obs[i], state[i], places[i], kind, hazards, vase, reach, sin, cos, 0.0, 0.0)


# --- the control step -------------------------------------------------------------------------------------


@_compile
def _push(place, x, y, radius, sin, cos):  # type: ignore[no-untyped-def]
    """Move a box of heading (sin, cos) at `place` out of a disc at (x, y), by the shortest way."""
    ahead, left = _to_ego(place[0] - x, place[1] - y, sin, cos)
    # The point of the box that is nearest to the disc's centre, seen from there, in the box's frame.
    near_x = ahead - min(max(ahead, -_VASE_HALF), _VASE_HALF)
    near_y = left - min(max(left, -_VASE_HALF), _VASE_HALF)
    distance = math.sqrt(near_x * near_x + near_y * near_y)
    if distance >= radius or distance == 0.0:
        return
    depth = (radius - distance) / distance
    place[0] += depth * (cos * near_x - sin * near_y)
    place[1] += depth * (sin * near_x + cos * near_y)


@_compile
def _move_vase(row, place, rotation, sin, cos):  # type: ignore[no-untyped-def]
    """Slide the vase for one control step and push it out of the robot's body and nose."""
    old_x, old_y = place[0], place[1]
    speed = math.sqrt(row[VASE_VX] * row[VASE_VX] + row[VASE_VY] * row[VASE_VY])
    if speed > 0.0:
        loss = _FRICTION * eq.GRAVITY * eq.CONTROL_SECONDS
        # Braked to a stop within the step, or braked all through it.
        way = (speed - loss / 2) * eq.CONTROL_SECONDS if speed > loss else speed * speed / (2 * eq.GRAVITY)
        place[0] += row[VASE_VX] / speed * way
        place[1] += row[VASE_VY] / speed * way
        kept = max(0.0, speed - loss) / speed
        row[VASE_VX] *= kept
        row[VASE_VY] *= kept
    x, y = row[X], row[Y]
    dx, dy = place[0] - x, place[1] - y
    if dx * dx + dy * dy < 0.09:  # further away than 0.3 m nothing touches
        slid_x, slid_y = place[0], place[1]
        box_sin, box_cos = math.sin(rotation), math.cos(rotation)
        _push(place, x, y, _BODY_RADIUS, box_sin, box_cos)
        _push(place, x + _NOSE_AHEAD * cos, y + _NOSE_AHEAD * sin, _NOSE_RADIUS, box_sin, box_cos)
        if place[0] != slid_x or place[1] != slid_y:
            row[VASE_VX] = (place[0] - old_x) / eq.CONTROL_SECONDS
            row[VASE_VY] = (place[1] - old_y) / eq.CONTROL_SECONDS


@_compile
def step_rows(  # type: ignore[no-untyped-def]
    lo, hi, kind, bounds, keepouts, hazards, vase, reach, x_limit, y_limit, horizon,
    actions, state, places, rotations, keys, cursor, steps,
    obs, rewards, costs, goal_met, terminated, truncated,
):  # fmt: skip
    """One control step of the rows [lo, hi), up to the observation that ends it; returns how many ended."""
    ended = 0
    for i in range(lo, hi):
        row, place = state[i], places[i]
        a0 = min(max(actions[i, 0], -1.0), 1.0)
        a1 = min(max(actions[i, 1], -1.0), 1.0)
        force = eq.GEAR * min(max(a0, -eq.FORCE_LIMIT), eq.FORCE_LIMIT)
        x, y, heading = row[X], row[Y], row[HEADING]
        vx, vy, w = row[VX], row[VY], row[RATE]
        # The original draws the number of substeps from a binomial with p = 1: one double, always ten.
        _skip(keys[i], cursor, i)
        sin, cos = math.sin(heading), math.cos(heading)
        for _ in range(eq.SUBSTEPS):
            torque = eq.GEAR * min(max(a1 - eq.GEAR * w, -eq.FORCE_LIMIT), eq.FORCE_LIMIT)
            ax, ay, alpha = _accelerations(vx, vy, w, sin, cos, force, torque, _H)
            vx += _H * ax
            vy += _H * ay
            w += _H * alpha
            x += _H * vx
            y += _H * vy
            heading += _H * w
            sin, cos = math.sin(heading), math.cos(heading)
        row[X], row[Y], row[HEADING] = x, y, heading
        row[VX], row[VY], row[RATE] = vx, vy, w
        torque = eq.GEAR * min(max(a1 - eq.GEAR * w, -eq.FORCE_LIMIT), eq.FORCE_LIMIT)
        ax, ay, alpha = _accelerations(vx, vy, w, sin, cos, force, torque, 0.0)
        if vase > 0:
            _move_vase(row, place[vase], rotations[i, vase], sin, cos)

        cost = 0.0
        failed = False
        met = False
        if kind == GOAL:
            dx, dy = place[1, 0] - x, place[1, 1] - y
            distance = math.sqrt(dx * dx + dy * dy)
            reward = row[LAST] - distance
            row[LAST] = distance
            for j in range(hazards[0], hazards[1]):
                dx, dy = place[j, 0] - x, place[j, 1] - y
                if math.sqrt(dx * dx + dy * dy) < _HAZARD_SIZE:
                    cost = 1.0
            met = distance <= _GOAL_SIZE
            if met:
                reward += 1.0
                place[0, 0], place[0, 1] = x, y
                failed = not _place_goal(keys[i], cursor, i, place, bounds, keepouts)
                dx, dy = place[1, 0] - x, place[1, 1] - y
                row[LAST] = math.sqrt(dx * dx + dy * dy)
            reward = min(max(reward, -10.0), 10.0)
        elif kind == CIRCLE:
            radius = math.sqrt(x * x + y * y)
            reward = 0.1 * ((-vx * y + vy * x) / radius) / (1.0 + abs(radius - _CIRCLE_RADIUS))
            reward = min(max(reward, -10.0), 10.0)
        else:
            dy = y - _RUN_GOAL_Y
            potential = -math.sqrt(x * x + dy * dy) * _RUN_FACTOR
            reward = potential - row[LAST]
            row[LAST] = potential
        if (x_limit > 0.0 and abs(x) > x_limit) or (y_limit > 0.0 and abs(y) > y_limit):
            cost = 1.0

        steps[i] += 1
        rewards[i] = reward
        costs[i] = cost
        goal_met[i] = met
        terminated[i] = failed
        truncated[i] = steps[i] >= horizon
        if terminated[i] or truncated[i]:
            ended += 1
        _observe(obs[i], row, place, kind, hazards, vase, reach, sin, cos, ax, ay)
    return ended
