"""The navigation tasks' worlds: compiled by the original package, stripped, and described by numbers.

A world holds the robot, which comes first, then the things that move (vases, gremlins or the push box: one
kind a task), then the fixed ones. Hazards, goals, circles and walls touch nothing; they are left out of the
models and exist as places alone. So are cameras, lights and the sensors that no observation reads. What
remains moves bit for bit as in the original model (tests/envs/test_simulated.py).

A task has a model for every number of moving things, because those that can touch nothing are left out of a
control step (see `kernels`). Sensors are evaluated once a control step, so every model comes twice: without
sensors for the steps, and with them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from saferl.envs.safety_gym.original import SafetyGymEnv
from saferl.errors import MissingPackageError, SaferlError

__all__ = ["FRAMES", "Models", "World", "world"]

FRAMES = 10
"""Physics steps a control step."""

_ARENA_BYTES = 2**26  # the original reserves half a gigabyte a model; a crowded world uses a few megabytes
_TABLE_STEPS = 1001  # control steps of the longest episode, and the start

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Models:
    """The models of one thread, by the number of moving things in them; None where they are not needed."""

    stepping: tuple[mujoco.MjModel | None, ...]
    reading: tuple[mujoco.MjModel | None, ...]

    def copy(self) -> Models:
        """Return models of their own, which a thread may write."""
        return Models(
            tuple(copy.copy(model) for model in self.stepping),
            tuple(copy.copy(model) for model in self.reading),
        )


@dataclass(frozen=True)
class Table:
    """How a moving thing moves while nothing touches it, from its start: the same for all of its kind."""

    displacement: Floats
    """(T, 3), m, by control steps since the episode's start."""
    velocity: Floats
    """(T, 3), m/s."""
    acceleration: Floats
    """(T, 3), m/s^2, of the last physics step; it starts the solver."""


@dataclass(frozen=True)
class World:
    """What the engine needs to know of a navigation task. T things, K of them moving, F fixed bodies."""

    task_id: str
    family: str
    """Goal, Button, Push, Circle or Run."""
    task: Any
    """The package's task object, for its parameters."""
    observation_space: spaces.Box
    action_space: spaces.Box
    cost_names: tuple[str, ...]
    render_fps: int

    names: tuple[str, ...]
    """Everything that has a place, in the order in which places are drawn; the agent is first."""
    bounds: Floats
    """(T, 4): xmin, ymin, xmax, ymax of where each may be placed, keepouts taken off."""
    keepouts: Floats
    """(T,), m."""
    heights: Floats
    """(T,): z of the bodies at the start, m."""
    moving: NDArray[np.int64]
    """(K,): the things that move, as indices."""
    fixed: NDArray[np.int64]
    """(F,): the things that are fixed bodies."""

    models: Models
    robot: dict[str, int]
    """The robot's `bodies`, `qpos`, `qvel`, `ctrl`, `welds` (equality constraints of its own) and `readings`
    (numbers from its sensors)."""
    mocap: bool
    """Whether every moving thing is welded to a mocap body (gremlins)."""
    touch_moving: bool
    """Whether sensors count the robot's contacts with the moving things,"""
    touch_fixed: bool
    """and with the fixed bodies; they follow the readings in this order."""
    leave_out: bool
    """Whether moving things that can touch nothing may be left out of a control step."""
    reach: tuple[float, float]
    """Radii of the robot (in any posture) and of a moving thing, m."""
    slack: float
    """What both can move in a control step from rest, m, with a margin."""
    table: Table
    targets: Floats
    """(physics steps of an episode, 3): where the gremlins' mocap bodies are before each step, m."""

    direct: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Readings, and the columns of the observation that they fill."""
    angles: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Readings that are angles, and the first of two columns for sine and cosine."""
    quaternions: tuple[NDArray[np.int64], NDArray[np.int64]]
    """First of four readings, and the first of nine columns for the rotation matrix."""
    lidars: tuple[tuple[str, NDArray[np.int64], int], ...]
    """Name, things seen, first of the columns."""
    lidar_range: float


@functools.cache
def world(task_id: str, exact: bool) -> World:
    """Build a task's world with the original package (see `compat`); `exact` leaves nothing out.

    Raises MissingPackageError when safety-gymnasium is not installed or MuJoCo is too old.
    """
    if not hasattr(mujoco.mjtSensor, "mjSENS_CONTACT"):
        raise MissingPackageError("the batched engine needs newer MuJoCo; run: pip install 'mujoco>=3.3.6'")
    template = SafetyGymEnv(task_id)
    template.reset(seed=0)
    task = template._task
    assert task is not None
    assert task.lidar_conf.type == "pseudo"
    assert task.lidar_conf.num_bins == 16
    assert task.agent.rot is None
    assert isinstance(template.observation_space, spaces.Box)
    assert isinstance(template.action_space, spaces.Box)

    placements = task.placements_conf.placements
    names, keepouts = tuple(placements), [keepout for _, keepout in placements.values()]
    bounds = []
    for areas, keepout in placements.values():
        (area,) = [task.placements_conf.extents] if areas is None else areas
        bounds.append(task.random_generator.constrain_placement(area, keepout))
    body_names = [f"{name}obj" if name.startswith("gremlin") else name for name in names]
    heights = [float(task.model.body(name).pos[2]) for name in body_names]

    source = _Source(task, body_names)
    moving = source.indices(source.moving)
    fixed = source.indices(source.fixed)
    robot_name = type(task.agent).__name__
    # The legs of Ants and Doggos and the Racecar's wheels are so chaotic that the roundings of a solver with
    # fewer things in it change a step visibly; and with these robots most of the work is the robot's.
    leave_out = bool(len(moving)) and not exact and robot_name in ("Point", "Car")
    counts = range(len(moving) + 1) if leave_out else [len(moving)]
    models = source.compile_all(counts)
    full = models.reading[-1]
    assert full is not None
    assert full.na == 0
    seconds = full.opt.timestep * FRAMES
    return World(
        task_id=task_id,
        family=type(task).__name__.partition("Level")[0],
        task=task,
        observation_space=template.observation_space,
        action_space=template.action_space,
        cost_names=template.metadata["cost_names"],
        render_fps=template.metadata["render_fps"],
        names=names,
        bounds=np.array(bounds, np.float64),
        keepouts=np.array(keepouts, np.float64),
        heights=np.array(heights),
        moving=moving,
        fixed=fixed,
        models=models,
        robot=source.robot(full),
        mocap=source.mocap,
        touch_moving=source.touch_moving,
        touch_fixed=source.touch_fixed,
        leave_out=leave_out,
        reach=(_reach(full, "agent"), _reach(full, source.moving[0]) if leave_out else 0.0),
        slack=0.02 + 20.0 * seconds**2,  # 20 m/s^2 is twice what friction gives
        table=_table(task, models, source) if leave_out else Table(*[np.zeros((1, 3))] * 3),
        targets=_mocap_targets(task, full) if source.mocap else np.zeros((1, 3)),
        **_columns(task, names, source.observed(task)),
    )


class _Source:
    """The package's XML of a world, and how to take from it what a model needs."""

    def __init__(self, task: Any, body_names: Sequence[str]) -> None:
        self.xml = task.world.xml_string
        self.body_names = body_names
        model = task.model
        top = [model.body(i).name for i in range(1, model.nbody) if model.body(i).parentid[0] == 0]
        others = [name for name in top if name != "agent" and not name.endswith("mocap")]
        free = {name for name in others if model.body(name).jntnum[0]}
        solid = {model.body(geom.bodyid[0]).name for geom in map(model.geom, range(model.ngeom)) if
                 geom.contype[0] or geom.conaffinity[0]}  # fmt: skip
        self.moving = [name for name in body_names if name in free]
        self.fixed = [name for name in body_names[1:] if name in solid - free]
        self.places = [name for name in others if name not in free | solid]
        self.mocap = model.nmocap > 0
        assert self.moving == [name for name in others if name in free]
        assert self.fixed == [name for name in others if name in solid - free]
        assert model.nmocap in (0, len(self.moving))
        costly = {obstacle.name for obstacle in task._obstacles if obstacle.is_constrained}
        self.touch_moving = bool(costly & {"vases", "gremlins"})
        # Buttons are to be touched at every level.
        self.touch_fixed = "pillars" in costly or hasattr(task, "buttons")
        self.readings = self.observed(task)

    @staticmethod
    def observed(task: Any) -> list[str]:
        """Names of the sensors that observations read."""
        agent = task.agent.sensor_info
        names = [*task.agent.sensor_conf.sensors, *agent.hinge_vel_names, *agent.ballangvel_names]
        names += [name for name in (agent.freejoint_pos_name, agent.freejoint_qvel_name) if name]
        return [*names, *agent.hinge_pos_names, *agent.ballquat_names]

    def indices(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Where the bodies stand among the things."""
        return np.array([self.body_names.index(name) for name in names], np.int64)

    def compile_all(self, counts: Sequence[int]) -> Models:
        """Compile the models with these numbers of moving things."""
        stepping: list[Any] = [None] * (len(self.moving) + 1)
        reading: list[Any] = [None] * (len(self.moving) + 1)
        for count in counts:
            reading[count] = self._compile(count)
            if count == 0 and self.moving:  # a single body: no islands to look for
                reading[count].opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ISLAND)
            stepping[count] = copy.copy(reading[count])
            stepping[count].opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        return Models(tuple(stepping), tuple(reading))

    def _compile(self, count: int) -> mujoco.MjModel:
        """Compile the world with its first `count` moving things."""
        spec = mujoco.MjSpec.from_string(self.xml)
        spec.memory, spec.nconmax, spec.njmax = _ARENA_BYTES, -1, -1
        out = {*self.places, *self.moving[count:]}
        out |= {name.removesuffix("obj") + "mocap" for name in self.moving[count:] if self.mocap}
        for weld in list(spec.equalities):
            if weld.name in out:
                spec.delete(weld)
        for body in list(spec.worldbody.bodies):
            if body.name in out:
                spec.delete(body)
        readings = set(self.readings)
        for part in [*spec.cameras, *spec.lights, *(s for s in spec.sensors if s.name not in readings)]:
            spec.delete(part)
        touched = [*self.moving[:count]] if self.touch_moving else []
        touched += self.fixed if self.touch_fixed else []
        for name in touched:
            sensor = spec.add_sensor(
                name=f"touch {name}",
                type=mujoco.mjtSensor.mjSENS_CONTACT,
                objtype=mujoco.mjtObj.mjOBJ_XBODY,  # the robot with all its parts
                objname="agent",
                reftype=mujoco.mjtObj.mjOBJ_BODY,
                refname=name,
            )
            sensor.intprm[:3] = [1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND), 0, 1]
        return spec.compile()

    def robot(self, model: mujoco.MjModel) -> dict[str, int]:
        """Sizes of the robot, which comes first in every array of the model."""
        count = len(self.moving)
        mocaps = count if self.mocap else 0
        bodies = model.nbody - 1 - count - mocaps - len(self.fixed)
        expected = ["agent", *self.moving]
        expected += [name.removesuffix("obj") + "mocap" for name in self.moving] if self.mocap else []
        expected += self.fixed
        seen = [model.body(i).name for i in (1, *range(1 + bodies, model.nbody))]
        if seen != expected:
            raise SaferlError(f"the package's model has the bodies {seen}, not {expected}")
        touches = count * self.touch_moving + len(self.fixed) * self.touch_fixed
        return {
            "bodies": bodies,
            "qpos": model.nq - 7 * count,
            "qvel": model.nv - 6 * count,
            "ctrl": model.nu,
            "welds": model.neq - mocaps,
            "readings": model.nsensordata - touches,
        }


def _reach(model: mujoco.MjModel, name: str) -> float:
    """Return the radius around a top body's origin that its geoms cannot leave, whatever its joints do."""
    top = model.body(name).id
    distance = {top: 0.0}
    farthest = 0.0
    for body in range(top, model.nbody):
        parent = int(model.body_parentid[body])
        if body != top and parent in distance:
            distance[body] = distance[parent] + float(np.linalg.norm(model.body_pos[body]))
        if body in distance:
            first, number = int(model.body_geomadr[body]), int(model.body_geomnum[body])
            for geom in range(first, first + number):
                away = float(np.linalg.norm(model.geom_pos[geom])) + float(model.geom_rbound[geom])
                farthest = max(farthest, distance[body] + away)
    return farthest


def _mocap_targets(task: Any, model: mujoco.MjModel) -> Floats:
    """Where the gremlins' mocap bodies are before every physics step of an episode."""
    # Time is a sum of steps, with its roundings.
    steps = np.full(_TABLE_STEPS * FRAMES, model.opt.timestep)
    steps[0] = 0.0
    phase = np.add.accumulate(steps)
    gremlins = task.gremlins
    x, y = np.sin(phase) * gremlins.travel, np.cos(phase) * gremlins.travel
    return np.stack([x, y, np.full(len(phase), gremlins.size)], axis=1)


def _table(task: Any, models: Models, source: _Source) -> Table:
    """Let one moving thing move by itself, away from everything else."""
    model = copy.copy(models.stepping[1])
    assert model is not None
    height = float(task.model.body(source.moving[0]).pos[2])
    for index, name in enumerate(["agent", *source.fixed]):
        model.body(name).pos[:2] = [20.0, 3.0 * index]
    model.body(source.moving[0]).pos[:] = [0.0, 0.0, height]
    model.body(source.moving[0]).quat[:] = [1.0, 0.0, 0.0, 0.0]
    start = model.jnt_qposadr[model.body(source.moving[0]).jntadr[0]]
    model.qpos0[start : start + 7] = [0.0, 0.0, height, 1.0, 0.0, 0.0, 0.0]
    if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE:
        model.qpos0[:7] = [*model.body("agent").pos, *model.body("agent").quat]
    data = mujoco.MjData(model)
    mujoco.mj_setConst(model, data)
    targets = np.zeros((0, 3))
    if source.mocap:
        targets = _mocap_targets(task, model)
        body = model.body(source.moving[0]).id
        model.body_invweight0[body, 1] = model.body_invweight0[body, 0]  # as in `compat`
    mujoco.mj_resetData(model, data)
    steps = _TABLE_STEPS if source.mocap else 150  # the others have come to rest
    displacement, velocity, acceleration = np.zeros((3, steps, 3))
    dof = model.body(source.moving[0]).dofadr[0]
    for step in range(1, steps):
        if source.mocap:
            for frame in range(FRAMES):
                data.mocap_pos[0] = targets[(step - 1) * FRAMES + frame]
                mujoco.mj_step(model, data)
        else:
            mujoco.mj_step(model, data, FRAMES)
        displacement[step] = data.qpos[start : start + 3] - [0.0, 0.0, height]
        velocity[step] = data.qvel[dof : dof + 3]
        acceleration[step] = data.qacc_warmstart[dof : dof + 3]
    return Table(displacement, velocity, acceleration)


def _columns(task: Any, names: tuple[str, ...], readings: Sequence[str]) -> dict[str, Any]:
    """Which reading or lidar fills which columns of the observation."""
    agent, info = task.agent, task.agent.sensor_info
    # Readings keep the model's order of sensors.
    address, first = {}, 0
    for sensor in map(task.model.sensor, range(task.model.nsensor)):
        if sensor.name in readings:
            address[sensor.name] = first
            first += int(sensor.dim[0])
    direct: tuple[list[int], list[int]] = ([], [])
    angles: tuple[list[int], list[int]] = ([], [])
    quaternions: tuple[list[int], list[int]] = ([], [])
    lidars = []
    column = 0
    for name, part in task.obs_info.obs_space_dict.spaces.items():
        size = int(np.prod(part.shape))
        if name in address:
            if name in info.hinge_pos_names:
                angles[0].append(address[name])
                angles[1].append(column)
            elif name in info.ballquat_names:
                quaternions[0].append(address[name])
                quaternions[1].append(column)
            else:
                skip = 2 if name == info.freejoint_pos_name else 0  # of a place, its height alone
                direct[0].extend(range(address[name] + skip, address[name] + skip + size))
                direct[1].extend(range(column, column + size))
        else:
            kind = name.removesuffix("_lidar")
            seen = [i for i, thing in enumerate(names) if thing.rstrip("0123456789") == kind.rstrip("s")]
            lidars.append((kind, np.array(seen, np.int64), column))
        column += size
    assert agent.sensor_conf.sensors_angle_components

    def indices(pair: tuple[list[int], list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.array(pair[0], np.int64), np.array(pair[1], np.int64)

    return {
        "direct": indices(direct),
        "angles": indices(angles),
        "quaternions": indices(quaternions),
        "lidars": tuple(lidars),
        "lidar_range": float(task.lidar_conf.max_dist),
    }
