"""The physics of the navigation tasks in compiled loops over environments.

An environment is a row of `state` (N, W) float64; `Columns` says where what starts in it. Every thread has
models and data of its own and lends them to one row after the other: it writes the row's state and the
constants that depend on its layout, steps, and reads the state back. MuJoCo's results depend on nothing else,
so neither the number of rows nor that of threads changes a bit.

Where a world allows it (`World.leave_out`), a control step leaves out the moving things that can touch
nothing: a vase at rest, or a gremlin on its circle, with the robot out of reach. They are far more work for
MuJoCo than the robot. Until then a thing follows the table of its kind, and when it is left alone again it
returns to it, or lies where it came to rest. The solver's roundings are all that this changes: 1e-14 a step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from saferl.envs.safety_gym.planar.kernels import _refill
from saferl.envs.safety_gym.simulated.native import (
    compile_loop,
    doubles,
    mj_forward,
    mj_getState,
    mj_jacBody,
    mj_resetData,
    mj_setConst,
    mj_setState,
    mj_step,
    mju_quat2Mat,
)

__all__ = ["FIELDS", "Columns", "Plan", "bend_joints", "move", "place_bodies", "rotation_matrices"]

#: What a thread's handles hold of each model: addresses of the two models, the data and arrays in them.
FIELDS = (
    *("stepping", "reading", "data", "qpos", "qvel", "warmstart", "ctrl", "mocap_pos", "sensordata"),
    *("xpos", "xmat"),
    # These of the stepping model; the reading one's follow in the same order.
    *("body_pos", "body_quat", "body_invweight0", "dof_invweight0", "dof_M0", "dof_length"),
    *("qpos0", "qpos_spring", "eq_data", "meaninertia"),
    *("body_pos", "body_quat", "body_invweight0", "dof_invweight0", "dof_M0", "dof_length"),
    *("qpos0", "qpos_spring", "eq_data", "meaninertia"),
)
_STEPPING, _READING, _DATA, _QPOS, _QVEL, _WARMSTART, _CTRL, _MOCAP, _SENSORS, _XPOS, _XMAT = range(11)
_BODY_POS, _BODY_QUAT, _BODY_WEIGHT, _DOFS, _QPOS0, _QPOS_SPRING, _EQ_DATA, _INERTIA = (
    *(0, 1, 2, 3, 6, 7, 8, 9),
)
_CONSTANTS = (11, 21)  # where those of the stepping and of the reading model start

_FRAMES = 10
_TIME = 1  # mjSTATE_TIME
# What becomes of a moving thing in the next control step.
_STEPPED, _ON_TABLE, _AT_REST = range(3)

_TABLE_METRES = 1e-10
_TABLE_SPEED = 1e-9
_REST_SPEED = 1e-9  # m/s and rad/s


class Plan(NamedTuple):
    """Sizes and parameters of a world, the same for all rows (see `World`)."""

    bodies: int
    qpos: int
    qvel: int
    ctrl: int
    welds: int
    readings: int
    things: int
    moving: int
    fixed: int
    eq_size: int
    free_robot: bool
    mocap: bool
    comes_to_rest: bool
    touch_moving: bool
    touch_fixed: bool
    jacobian: bool
    leave_out: bool
    robot_reach: float
    moving_reach: float
    slack: float
    timestep: float


class Columns(NamedTuple):
    """First columns of a row's parts (T things, K moving, F fixed, B bodies, D degrees of freedom)."""

    qpos: int  # the robot's coordinates,
    qvel: int  # velocities
    warmstart: int  # and accelerations, from which the solver starts
    time: int  # s since the start of the episode
    tabled: int  # 0 once MuJoCo has restarted a diverged simulation
    travelled: int  # m in the last control step
    moving_qpos: int  # (K, 7)
    moving_qvel: int  # (K, 6)
    moving_warmstart: int  # (K, 6)
    fate: int  # (K,) _STEPPED, _ON_TABLE or _AT_REST
    body_pos: int  # (B, 3), the first of the full model's constants, which depend on the layout
    body_quat: int  # (B, 4)
    body_weight: int  # (B, 2)
    dof_constants: int  # (3, D): inverse weight, inertia, length
    qpos0: int
    qpos_spring: int
    eq_data: int  # (constraints, eq_size)
    inertia: int  # mean of the mass matrix's diagonal, the unit of the solver's tolerance
    xpos: int  # (3,) the robot's place,
    xmat: int  # (3, 3) and rotation
    readings: int  # what its sensors say
    touch_moving: int  # (K,) the robot's contacts
    touch_fixed: int  # (F,)
    jacobian: int  # (3, D) of the robot's place, where the task needs its velocity
    positions: int  # (T, 3) of all things
    places: int  # (T, 2) the layout that a new goal has to respect
    rotations: int  # (T,)
    noise: int  # (ctrl,) what a reset draws for joints
    last: int  # (2,) distances or a potential
    timer: int  # steps until buttons work
    target: int  # the button to be pressed


@compile_loop
def _choose(row, plan, cols, table, chosen):  # type: ignore[no-untyped-def]
    """Write the moving things to be stepped into `chosen`, ascending; return their number."""
    count = plan.moving
    if not plan.leave_out or row[cols.tabled] == 0.0:
        for j in range(count):
            chosen[j] = j
        return count
    slack = plan.slack + 2.0 * row[cols.travelled]
    step = round(row[cols.time] / (_FRAMES * plan.timestep))
    if plan.mocap and step + 1 < len(table):
        dx, dy = table[step + 1, 0] - table[step, 0], table[step + 1, 1] - table[step, 1]
        slack += 2.0 * math.sqrt(dx * dx + dy * dy)
    x, y = row[cols.xpos], row[cols.xpos + 1]
    near = plan.robot_reach + plan.moving_reach + slack
    beside = 2.0 * plan.moving_reach + slack
    number = 0
    for j in range(count):
        at = cols.moving_qpos + 7 * j
        dx, dy = row[at] - x, row[at + 1] - y
        inside = row[cols.fate + j] == _STEPPED or dx * dx + dy * dy < near * near
        chosen[j] = 1 if inside else 0
        number += chosen[j]
    # What they can push is stepped with them.
    grown = 0 < number < count
    while grown:
        grown = False
        for j in range(count):
            for k in range(count):
                if chosen[j] == 1 or chosen[k] == 0:
                    continue
                at, other = cols.moving_qpos + 7 * j, cols.moving_qpos + 7 * k
                dx, dy = row[at] - row[other], row[at + 1] - row[other + 1]
                if dx * dx + dy * dy < beside * beside:
                    chosen[j] = 1
                    grown = True
    number = 0
    for j in range(count):
        if chosen[j] == 1:
            chosen[number] = j  # number <= j: what it overwrites has been read
            number += 1
    return number


@compile_loop
def _write(address, row, first, size):  # type: ignore[no-untyped-def]
    """Copy columns to an address; return the address behind them."""
    to = doubles(address, size)
    for n in range(size):
        to[n] = row[first + n]
    return address + 8 * size


@compile_loop
def _read(address, row, first, size):  # type: ignore[no-untyped-def]
    """Copy doubles from an address to columns; return the address behind them."""
    source = doubles(address, size)
    for n in range(size):
        row[first + n] = source[n]
    return address + 8 * size


@compile_loop
def _write_bodies(address, row, first, size, plan, chosen, number):  # type: ignore[no-untyped-def]
    """Write the values (`size` a body) of the bodies that are in a model with some of the moving things."""
    address = _write(address, row, first, size * (1 + plan.bodies))
    first += size * (1 + plan.bodies)
    for _ in range(2 if plan.mocap else 1):
        for n in range(number):
            address = _write(address, row, first + size * chosen[n], size)
        first += size * plan.moving
    _write(address, row, first, size * plan.fixed)


@compile_loop
def _write_constants(handle, row, plan, cols, chosen, number):  # type: ignore[no-untyped-def]
    """Write a row's constants into both models of a handle."""
    dofs, size = plan.qvel + 6 * plan.moving, plan.eq_size
    share = dofs / (plan.qvel + 6.0 * number)
    for model in range(2):
        at = handle[_CONSTANTS[model] :]
        doubles(at[_INERTIA], 1)[0] = row[cols.inertia] * share
        _write_bodies(at[_BODY_POS], row, cols.body_pos, 3, plan, chosen, number)
        _write_bodies(at[_BODY_QUAT], row, cols.body_quat, 4, plan, chosen, number)
        _write_bodies(at[_BODY_WEIGHT], row, cols.body_weight, 2, plan, chosen, number)
        for kind in range(3):
            first = cols.dof_constants + kind * dofs
            to = _write(at[_DOFS + kind], row, first, plan.qvel)
            for n in range(number):
                to = _write(to, row, first + plan.qvel + 6 * chosen[n], 6)
        qpos0 = _write(at[_QPOS0], row, cols.qpos0, plan.qpos)
        spring = _write(at[_QPOS_SPRING], row, cols.qpos_spring, plan.qpos)
        weld = at[_EQ_DATA] + 8 * size * plan.welds
        for n in range(number):
            at_thing = plan.qpos + 7 * chosen[n]
            qpos0 = _write(qpos0, row, cols.qpos0 + at_thing, 7)
            spring = _write(spring, row, cols.qpos_spring + at_thing, 7)
            if plan.mocap:
                weld = _write(weld, row, cols.eq_data + size * (plan.welds + chosen[n]), size)


@compile_loop
def _write_state(handle, row, plan, cols, chosen, number):  # type: ignore[no-untyped-def]
    qpos = _write(handle[_QPOS], row, cols.qpos, plan.qpos)
    qvel = _write(handle[_QVEL], row, cols.qvel, plan.qvel)
    warmstart = _write(handle[_WARMSTART], row, cols.warmstart, plan.qvel)
    for n in range(number):
        qpos = _write(qpos, row, cols.moving_qpos + 7 * chosen[n], 7)
        qvel = _write(qvel, row, cols.moving_qvel + 6 * chosen[n], 6)
        warmstart = _write(warmstart, row, cols.moving_warmstart + 6 * chosen[n], 6)


@compile_loop
def _read_state(handle, row, plan, cols, chosen, number):  # type: ignore[no-untyped-def]
    qpos = _read(handle[_QPOS], row, cols.qpos, plan.qpos)
    qvel = _read(handle[_QVEL], row, cols.qvel, plan.qvel)
    warmstart = _read(handle[_WARMSTART], row, cols.warmstart, plan.qvel)
    for n in range(number):
        qpos = _read(qpos, row, cols.moving_qpos + 7 * chosen[n], 7)
        qvel = _read(qvel, row, cols.moving_qvel + 6 * chosen[n], 6)
        warmstart = _read(warmstart, row, cols.moving_warmstart + 6 * chosen[n], 6)


@compile_loop
def _report(handle, row, plan, cols, moving, chosen, number):  # type: ignore[no-untyped-def]
    """Read what the task sees of the state just evaluated."""
    x, y = row[cols.xpos], row[cols.xpos + 1]
    _read(handle[_XPOS] + 8 * 3, row, cols.xpos, 3)  # body 1, behind the world
    _read(handle[_XMAT] + 8 * 9, row, cols.xmat, 9)
    dx, dy = row[cols.xpos] - x, row[cols.xpos + 1] - y
    row[cols.travelled] = math.sqrt(dx * dx + dy * dy)
    sensors = _read(handle[_SENSORS], row, cols.readings, plan.readings)
    if plan.touch_moving:
        for j in range(plan.moving):
            row[cols.touch_moving + j] = 0.0
        for n in range(number):
            sensors = _read(sensors, row, cols.touch_moving + chosen[n], 1)
    if plan.touch_fixed:
        _read(sensors, row, cols.touch_fixed, plan.fixed)
    for j in range(plan.moving):
        for n in range(3):
            row[cols.positions + 3 * moving[j] + n] = row[cols.moving_qpos + 7 * j + n]
    if plan.jacobian:
        mj_jacBody(handle[_READING], handle[_DATA], row[cols.jacobian :].ctypes.data, 0, 1)


@compile_loop
def _follow_tables(row, plan, cols, table, speeds, accelerations):  # type: ignore[no-untyped-def]
    """Move what was left out, and see which things have come back to where nothing touches them."""
    step = round(row[cols.time] / (_FRAMES * plan.timestep))
    at = min(step, len(table) - 1)
    for j in range(plan.moving):
        qpos, qvel = row[cols.moving_qpos + 7 * j :], row[cols.moving_qvel + 6 * j :]
        start = row[cols.qpos0 + plan.qpos + 7 * j :]
        if row[cols.fate + j] == _STEPPED:
            back = step < len(table) or not plan.mocap
            fastest = 0.0
            for n in range(3):
                back = back and abs(qpos[n] - (start[n] + table[at, n])) < _TABLE_METRES
                back = back and abs(qvel[n] - speeds[at, n]) < _TABLE_SPEED
                back = back and abs(qvel[3 + n]) < _TABLE_SPEED
                fastest = max(fastest, abs(qvel[n]), abs(qvel[3 + n]))
            for n in range(3, 7):
                back = back and abs(qpos[n] - start[n]) < _TABLE_METRES
            if back:
                row[cols.fate + j] = _ON_TABLE
            elif plan.comes_to_rest and fastest < _REST_SPEED:
                row[cols.fate + j] = _AT_REST
        if row[cols.fate + j] == _ON_TABLE:
            for n in range(3):
                qpos[n] = start[n] + table[at, n]
                qvel[n] = speeds[at, n]
                row[cols.moving_warmstart + 6 * j + n] = accelerations[at, n]


@compile_loop
def move(  # type: ignore[no-untyped-def]
    lo,
    hi,
    state,
    keys,
    cursor,
    handles,
    plan,
    cols,
    moving,
    table,
    speeds,
    accelerations,
    targets,
    controls,
):
    """One control step of the rows [lo, hi): ten physics steps, then the sensors at the new state.

    `keys` (N, 624) and `cursor` (N,) are Mersenne twisters; `handles` (K + 1, FIELDS) the thread's models by
    the number of moving things in them; `controls` (N, ctrl) the clipped actions; the rest is as in `World`.
    A control step draws one double: the original's number of physics steps, which is always 10.
    """
    chosen = np.zeros(plan.moving + 1, np.int64)
    clock = np.zeros(1)
    for i in range(lo, hi):
        row = state[i]
        for _ in range(2):
            if cursor[i] >= 624:
                _refill(keys[i])
                cursor[i] = 0
            cursor[i] += 1
        number = _choose(row, plan, cols, table, chosen)
        handle = handles[number]
        stepping, data = handle[_STEPPING], handle[_DATA]
        _write_constants(handle, row, plan, cols, chosen, number)
        _write_state(handle, row, plan, cols, chosen, number)
        _write(handle[_CTRL], controls[i], 0, plan.ctrl)
        clock[0] = row[cols.time]
        mj_setState(stepping, data, clock.ctypes.data, _TIME)
        for _ in range(_FRAMES):
            if plan.mocap:
                target = targets[min(round(clock[0] / plan.timestep), len(targets) - 1)]
                for n in range(number):
                    _write(handle[_MOCAP] + 8 * 3 * n, target, 0, 3)
            mj_step(stepping, data)
            before = clock[0]
            mj_getState(stepping, data, clock.ctypes.data, _TIME)
            if clock[0] < before:
                row[cols.tabled] = 0.0
        row[cols.time] = clock[0]
        mj_forward(handle[_READING], data)
        _read_state(handle, row, plan, cols, chosen, number)
        if plan.leave_out:
            for n in range(number):
                row[cols.fate + chosen[n]] = _STEPPED
            if row[cols.tabled] != 0.0:
                _follow_tables(row, plan, cols, table, speeds, accelerations)
        _report(handle, row, plan, cols, moving, chosen, number)


@compile_loop
def _place(row, at, body, thing, plan, cols, heights, quaternions, free, first):  # type: ignore[no-untyped-def]
    """Write a body's place into the model; `free` bodies' also into their coordinates from `first` on."""
    pos, quat = doubles(at[_BODY_POS] + 8 * 3 * body, 3), doubles(at[_BODY_QUAT] + 8 * 4 * body, 4)
    pos[0], pos[1] = row[cols.places + 2 * thing], row[cols.places + 2 * thing + 1]
    pos[2] = heights[thing]
    quat[:] = quaternions[thing]
    if free:
        for field in (_QPOS0, _QPOS_SPRING):
            qpos = doubles(at[field] + 8 * first, 7)
            qpos[:3], qpos[3:] = pos, quat


@compile_loop
def place_bodies(  # type: ignore[no-untyped-def]
    lo, hi, mask, state, handles, plan, cols, moving, fixed, heights, quaternions
):
    """Put the masked rows of [lo, hi) into their layouts, at rest: what compiling the world anew would give.

    `heights` (T,), `quaternions` (N, T, 4).
    """
    chosen = np.arange(plan.moving + 1)
    number = plan.moving
    handle = handles[number]
    model, data = handle[_READING], handle[_DATA]
    at = handle[_CONSTANTS[1] :]
    mocaps = plan.moving if plan.mocap else 0
    bodies = 1 + plan.bodies + plan.moving + mocaps + plan.fixed
    dofs, size = plan.qvel + 6 * plan.moving, plan.qpos + 7 * plan.moving
    for i in range(lo, hi):
        if not mask[i]:
            continue
        row = state[i]
        _place(row, at, 1, 0, plan, cols, heights, quaternions[i], plan.free_robot, 0)
        for j in range(plan.moving):
            body, first = 1 + plan.bodies + j, plan.qpos + 7 * j
            _place(row, at, body, moving[j], plan, cols, heights, quaternions[i], True, first)
        for f in range(plan.fixed):
            body = bodies - plan.fixed + f
            _place(row, at, body, fixed[f], plan, cols, heights, quaternions[i], False, 0)
        for j in range(mocaps):
            # The compiler works the relative pose of a weld out where it finds zeros.
            doubles(at[_EQ_DATA] + 8 * plan.eq_size * (plan.welds + j), plan.eq_size)[3:10] = 0.0
        mj_setConst(model, data)
        for j in range(mocaps):
            weights = doubles(at[_BODY_WEIGHT] + 8 * 2 * (1 + plan.bodies + j), 2)
            weights[1] = weights[0]  # as `compat` sets it
        _read(at[_BODY_POS], row, cols.body_pos, 3 * bodies)
        _read(at[_BODY_QUAT], row, cols.body_quat, 4 * bodies)
        _read(at[_BODY_WEIGHT], row, cols.body_weight, 2 * bodies)
        for kind in range(3):
            _read(at[_DOFS + kind], row, cols.dof_constants + kind * dofs, dofs)
        _read(at[_QPOS0], row, cols.qpos0, size)
        _read(at[_QPOS_SPRING], row, cols.qpos_spring, size)
        _read(at[_EQ_DATA], row, cols.eq_data, plan.eq_size * (plan.welds + mocaps))
        total = 0.0
        for n in range(dofs):  # mj_setConst leaves the mean to the compiler
            total += row[cols.dof_constants + dofs + n]
        row[cols.inertia] = total / dofs
        _write(at[_INERTIA], row, cols.inertia, 1)
        mj_resetData(model, data)
        mj_forward(model, data)
        _read_state(handle, row, plan, cols, chosen, number)
        row[cols.time] = 0.0
        row[cols.tabled] = 1.0
        for j in range(plan.moving):
            row[cols.fate + j] = _STEPPED
        for t in range(plan.things):
            row[cols.positions + 3 * t] = row[cols.places + 2 * t]
            row[cols.positions + 3 * t + 1] = row[cols.places + 2 * t + 1]
            row[cols.positions + 3 * t + 2] = heights[t]
        _report(handle, row, plan, cols, moving, chosen, number)
        row[cols.travelled] = 0.0


@compile_loop
def bend_joints(lo, hi, mask, state, handles, plan, cols, moving, joints, angles):  # type: ignore[no-untyped-def]
    """Set the robot's coordinates `joints` (J,) of the masked rows of [lo, hi) to `angles` (N, J)."""
    chosen = np.arange(plan.moving + 1)
    number = plan.moving
    handle = handles[number]
    for i in range(lo, hi):
        if mask[i]:
            row = state[i]
            for n in range(len(joints)):
                row[cols.qpos + joints[n]] = angles[i, n]
            _write_constants(handle, row, plan, cols, chosen, number)
            mj_resetData(handle[_READING], handle[_DATA])
            _write_state(handle, row, plan, cols, chosen, number)
            mj_forward(handle[_READING], handle[_DATA])
            _report(handle, row, plan, cols, moving, chosen, number)


@compile_loop
def rotation_matrices(readings, first, column, obs):  # type: ignore[no-untyped-def]
    """Turn the quaternions in four columns of `readings` into nine columns of `obs`."""
    quaternion, matrix = np.zeros(4), np.zeros(9)
    for i in range(len(obs)):
        quaternion[:] = readings[i, first : first + 4]
        mju_quat2Mat(matrix.ctypes.data, quaternion.ctypes.data)
        obs[i, column : column + 9] = matrix
