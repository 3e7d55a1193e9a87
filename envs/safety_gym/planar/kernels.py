"""The planar engine in compiled loops: one pass over a block of environments does a whole control step.

Everything is a plain function over arrays, compiled by numba on first use and cached on disk. Blocks of rows
release Python's lock, so that threads share the work; each environment's numbers depend on its own row only.

Row layout: `state` (N, STATE) float64 holds x, y, heading, vx, vy, turning rate, the last distance or
potential, and the vase's velocity and spin; `places` (N, things, 2) the layout; `keys` (N, 624) uint32 and
`cursor` (N,) the Mersenne twisters (NumPy's RandomState, which the original uses).
"""

from __future__ import annotations

import math

import numba
import numpy as np

from saferl.envs.safety_gym.planar import equations as eq

STATE = 10
X, Y, HEADING, VX, VY, RATE, LAST, VASE_VX, VASE_VY, VASE_SPIN = range(STATE)

GOAL, CIRCLE, RUN = range(3)
KINDS = {"goal": GOAL, "circle": CIRCLE, "run": RUN}

_accelerations = numba.njit(eq.accelerations, cache=True)
_to_ego = numba.njit(eq.to_ego, cache=True)

_H = eq.SUBSTEP_SECONDS
BINS = 16
BIN = 2 * math.pi / BINS
GOAL_SIZE = 0.3
HAZARD_SIZE = 0.2
CIRCLE_RADIUS = 1.5
RUN_GOAL_Y = -1e3
RUN_FACTOR = 60.0
_RETRIES = 100
_LAYOUTS = 10000
VASE_HALF = 0.1
BODY_RADIUS = 0.1
NOSE_RADIUS = 0.05
NOSE_AHEAD = 0.1
FRICTION = 1.0  # of a vase on the floor
# Chosen after episodes of the original (benchmarks/planar_parity.py holds them to others).
PUSH_FRICTION = 0.5  # of the robot on a vase
VASE_TURNING = 0.03  # m^2, a vase's resistance to turning over that to sliding

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
def place_goal(key, cursor, i, places, bounds, keepouts):  # type: ignore[no-untyped-def]
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
            if not place_goal(key, cursor, i, places[i], bounds, keepouts):
                return i
            dx, dy = places[i, 1, 0] - row[X], places[i, 1, 1] - row[Y]
            row[LAST] = math.sqrt(dx * dx + dy * dy)
        elif kind == RUN:
            dy = row[Y] - RUN_GOAL_Y
            row[LAST] = -math.sqrt(row[X] * row[X] + dy * dy) * RUN_FACTOR
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
    index = int(angle / BIN)
    share = (angle - BIN * index) / BIN
    index %= BINS
    after, before = (index + 1) % BINS, (index - 1) % BINS
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
def move_vase(row, place, turned, x0, y0, sin0, cos0, sin, cos):  # type: ignore[no-untyped-def]
    """Slide the vase for one control step and let it give way to the robot; returns its new rotation.

    The robot came from (x0, y0) with the heading (sin0, cos0) and is now where `row` says, with (sin, cos).
    It touches the box by two discs, body and nose. A contact moves the box's point that is nearest to the
    disc out of it, and along with the robot as far as friction goes; the box follows by moving and turning,
    like a body of inertia `VASE_TURNING` (position-based dynamics, Mueller et al. 2020). The robot does not
    feel it.
    """
    old_x, old_y, old_turned = place[0], place[1], turned
    speed = math.sqrt(row[VASE_VX] * row[VASE_VX] + row[VASE_VY] * row[VASE_VY])
    if speed > 0.0:
        loss = FRICTION * eq.GRAVITY * eq.CONTROL_SECONDS
        # Braked to a stop within the step, or braked all through it.
        way = (speed - loss / 2) * eq.CONTROL_SECONDS if speed > loss else speed * speed / (2 * eq.GRAVITY)
        place[0] += row[VASE_VX] / speed * way
        place[1] += row[VASE_VY] / speed * way
        turned += row[VASE_SPIN] * eq.CONTROL_SECONDS
        kept = max(0.0, speed - loss) / speed
        row[VASE_VX] *= kept
        row[VASE_VY] *= kept
        row[VASE_SPIN] *= kept
    x, y = row[X], row[Y]
    dx, dy = place[0] - x, place[1] - y
    if dx * dx + dy * dy >= 0.09:  # further away than 0.3 m nothing touches
        return turned
    old_sin, old_cos = math.sin(old_turned), math.cos(old_turned)
    touched = False
    for disc in range(2):
        radius = NOSE_RADIUS if disc else BODY_RADIUS
        disc_x, disc_y = (x + NOSE_AHEAD * cos, y + NOSE_AHEAD * sin) if disc else (x, y)
        box_sin, box_cos = math.sin(turned), math.cos(turned)
        # In the box's frame: the disc's centre, the box's point nearest to it, and the way between.
        ahead, left = _to_ego(disc_x - place[0], disc_y - place[1], box_sin, box_cos)
        near_x = min(max(ahead, -VASE_HALF), VASE_HALF)
        near_y = min(max(left, -VASE_HALF), VASE_HALF)
        out_x, out_y = near_x - ahead, near_y - left
        distance = math.sqrt(out_x * out_x + out_y * out_y)
        if distance >= radius or distance == 0.0:
            continue
        touched = True
        normal_x = (box_cos * out_x - box_sin * out_y) / distance
        normal_y = (box_sin * out_x + box_cos * out_y) / distance
        lever_x, lever_y = box_cos * near_x - box_sin * near_y, box_sin * near_x + box_cos * near_y
        point_x, point_y = place[0] + lever_x, place[1] + lever_y
        turning = lever_x * normal_y - lever_y * normal_x
        push = (radius - distance) / (1.0 + turning * turning / VASE_TURNING)
        # Where the robot's and the box's matter at this point were a step ago, and how far one slipped.
        at_x, at_y = _to_ego(point_x - x, point_y - y, sin, cos)
        from_x, from_y = x0 + cos0 * at_x - sin0 * at_y, y0 + sin0 * at_x + cos0 * at_y
        was_x = old_x + old_cos * near_x - old_sin * near_y
        was_y = old_y + old_sin * near_x + old_cos * near_y
        slip = (was_y - from_y) * normal_x - (was_x - from_x) * normal_y
        across = lever_x * normal_x + lever_y * normal_y
        drag = slip / (1.0 + across * across / VASE_TURNING)
        drag = min(max(drag, -PUSH_FRICTION * push), PUSH_FRICTION * push)
        place[0] += push * normal_x - drag * normal_y
        place[1] += push * normal_y + drag * normal_x
        turned += (push * turning + drag * across) / VASE_TURNING
    if touched:
        row[VASE_VX] = (place[0] - old_x) / eq.CONTROL_SECONDS
        row[VASE_VY] = (place[1] - old_y) / eq.CONTROL_SECONDS
        row[VASE_SPIN] = (turned - old_turned) / eq.CONTROL_SECONDS
    return turned


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
        sin0, cos0 = sin, cos
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
        x0, y0 = row[X], row[Y]
        row[X], row[Y], row[HEADING] = x, y, heading
        row[VX], row[VY], row[RATE] = vx, vy, w
        torque = eq.GEAR * min(max(a1 - eq.GEAR * w, -eq.FORCE_LIMIT), eq.FORCE_LIMIT)
        ax, ay, alpha = _accelerations(vx, vy, w, sin, cos, force, torque, 0.0)
        if vase > 0:
            rotations[i, vase] = move_vase(row, place[vase], rotations[i, vase], x0, y0, sin0, cos0, sin, cos)

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
                if math.sqrt(dx * dx + dy * dy) < HAZARD_SIZE:
                    cost = 1.0
            met = distance <= GOAL_SIZE
            if met:
                reward += 1.0
                place[0, 0], place[0, 1] = x, y
                failed = not place_goal(keys[i], cursor, i, place, bounds, keepouts)
                dx, dy = place[1, 0] - x, place[1, 1] - y
                row[LAST] = math.sqrt(dx * dx + dy * dy)
            reward = min(max(reward, -10.0), 10.0)
        elif kind == CIRCLE:
            radius = math.sqrt(x * x + y * y)
            reward = 0.1 * ((-vx * y + vy * x) / radius) / (1.0 + abs(radius - CIRCLE_RADIUS))
            reward = min(max(reward, -10.0), 10.0)
        else:
            dy = y - RUN_GOAL_Y
            potential = -math.sqrt(x * x + dy * dy) * RUN_FACTOR
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
