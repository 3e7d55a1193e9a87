"""The navigation tasks (Goal, Button, Push, Circle, Run; five robots) in batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from saferl.envs.safety_gym.simulated import kernels, rules
from saferl.envs.safety_gym.simulated.engine import Blocks, Engine, Outcome
from saferl.envs.safety_gym.simulated.native import address_of, doubles
from saferl.envs.safety_gym.simulated.world import Models, World, world
from saferl.errors import SaferlError

__all__ = ["Navigation"]

Floats = NDArray[np.float64]

_RUN_GOAL = np.array([0.0, -1e3])


class _Worker:
    """One thread's models and data, and their addresses for the compiled loops."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._data: list[mujoco.MjData] = []
        self.handles = np.zeros((len(models.reading), len(kernels.FIELDS)), np.int64)
        for count, (stepping, reading) in enumerate(zip(models.stepping, models.reading, strict=True)):
            if stepping is not None and reading is not None:
                data = mujoco.MjData(reading)
                self._data.append(data)
                arrays = [data.qpos, data.qvel, data.qacc_warmstart, data.ctrl, data.mocap_pos]
                arrays += [data.sensordata, data.xpos, data.xmat]
                addresses = [stepping._address, reading._address, data._address]
                addresses += [address_of(array) for array in arrays]
                for model in (stepping, reading):
                    arrays = [model.body_pos, model.body_quat, model.body_invweight0]
                    arrays += [model.dof_invweight0, model.dof_M0, model.dof_length]
                    arrays += [model.qpos0, model.qpos_spring, model.eq_data]
                    addresses += [*(address_of(array) for array in arrays), _mean_inertia(model)]
                self.handles[count] = addresses


def _mean_inertia(model: mujoco.MjModel) -> int:
    """Return the address of a model's mean inertia, the first of the numbers before the centre."""
    address = address_of(model.stat.center) - 4 * 8
    assert doubles(address, 1)[0] == model.stat.meaninertia
    return address


class Navigation(Engine):
    """N environments of a navigation task (see `SimulatedVectorEnv` for the arguments)."""

    def __init__(self, task_id: str, num_envs: int, threads: int, exact: bool) -> None:
        self.world = w = world(task_id, exact)
        self.observation_space, self.action_space = w.observation_space, w.action_space
        self.cost_names, self.render_fps = w.cost_names, w.render_fps
        self._blocks = Blocks(num_envs, threads)
        self._workers = [_Worker(w.models.copy()) for _ in self._blocks.bounds]
        model = w.models.reading[-1]
        assert model is not None
        self._control_range = model.actuator_ctrlrange.copy()
        self._plan = _plan(w, model)
        self._rules = _rules(w)
        self._codes = np.array([rules.COSTS.index(name) for name in w.cost_names], np.int64)
        self._joints = _ant_joints(w, model)
        self._seen = np.concatenate([np.zeros(0, np.int64), *(seen for _, seen, _ in w.lidars)])
        self._seen_columns = np.concatenate(
            [np.zeros(0, np.int64), *(np.full(len(seen), column) for _, seen, column in w.lidars)]
        )
        self._allocate(num_envs, model)

    def _allocate(self, n: int, model: mujoco.MjModel) -> None:
        plan = self._plan
        self._columns, width = _columns(plan, model)
        self._state = np.zeros((n, width))
        self._keys = np.zeros((n, 624), np.uint32)
        self._cursor = np.full(n, 624, np.int64)
        self._seeded = np.zeros(n, bool)
        assert self.observation_space.shape is not None
        self.obs = np.zeros((n, *self.observation_space.shape))

    def _view(self, name: str, *shape: int) -> Floats:
        """The part `name` of all rows as an array (N, *shape) on the same memory."""
        first = getattr(self._columns, name)
        return self._state[:, first : first + int(np.prod(shape))].reshape(-1, *shape)

    # --- episodes ---------------------------------------------------------------------------------

    def seed(self, row: int, seed: int | None) -> None:
        """Restart a row's twister with the seed modulo 2**32, as the original."""
        if seed is None:
            if self._seeded[row]:
                return
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        rules.seed_row(self._keys[row], seed % 2**32)
        self._cursor[row] = 624
        self._seeded[row] = True

    def restart(self, mask: NDArray[np.bool_]) -> None:
        """Draw new layouts in the masked rows. Raises SaferlError when one finds no place in 10000 tries."""
        w, cols = self.world, self._columns
        chance = self._state, self._keys, self._cursor

        def draw(block: int, lo: int, hi: int) -> int:
            stuck: int = rules.draw_layouts(lo, hi, mask, *chance, cols, w.bounds, w.keepouts)
            return stuck

        def place(block: int, lo: int, hi: int) -> int:
            world_of_block = self._workers[block].handles, self._plan, cols, w.moving
            kernels.place_bodies(lo, hi, mask, self._state, *world_of_block, w.fixed, w.heights, quaternions)
            if w.family == "Circle":  # its lidar sees the origin, not the circle's body
                positions[lo:hi, w.names.index("circle")] = 0.0
            stuck: int = rules.begin(lo, hi, mask, *chance, self._rules, cols, w.bounds, w.keepouts)
            if len(self._joints):
                kernels.bend_joints(
                    lo, hi, mask, self._state, *world_of_block, self._joints, self._ant_angles()
                )
            if w.family == "Run":
                last[lo:hi, 0][mask[lo:hi]] = self._potential(lo, hi)[mask[lo:hi]]
            self._observe(lo, hi, mask[lo:hi])
            return stuck

        failed = max(self._blocks.each(draw))
        if failed < 0:
            quaternions = _quaternions(self._view("rotations", len(w.names)))
            positions, last = self._view("positions", len(w.names), 3), self._view("last", 2)
            failed = max(self._blocks.each(place))
        if failed >= 0:
            raise SaferlError(f"no layout was found for environment {failed} in 10000 tries")

    def _ant_angles(self) -> Floats:
        """The Ant's hips are nearly straight at the start, its ankles bent."""
        angles: Floats = self._view("noise", len(self._joints)).copy()
        angles[:, 1::2] += np.pi / 2
        angles[:, [3, 5]] *= -1
        return angles

    def step(self, actions: np.ndarray) -> Outcome:
        """Clip the actions, step, reward, cost, set new goals, observe."""
        w, cols = self.world, self._columns
        chance = self._state, self._keys, self._cursor
        n = len(self._state)
        low, high = self._control_range.T
        controls = np.clip(np.asarray(actions, np.float64), low, high)
        rewards, costs = np.empty(n), np.empty((len(self._codes), n))
        goal_met, terminated = np.empty(n, bool), np.empty(n, bool)
        speeds = np.zeros(n)

        def advance(block: int, lo: int, hi: int) -> None:
            kernels.move(
                lo, hi, *chance, self._workers[block].handles, self._plan, cols, w.moving,
                w.table.displacement, w.table.velocity, w.table.acceleration, w.targets, controls,
            )  # fmt: skip
            if w.family == "Circle":
                speeds[lo:hi] = self._circling(lo, hi)
            elif w.family == "Run":
                speeds[lo:hi] = self._potential(lo, hi)
            rules.judge(
                lo, hi, *chance, self._rules, cols, w.bounds, w.keepouts, speeds, self._codes,
                rewards, costs, goal_met, terminated,
            )  # fmt: skip
            self._observe(lo, hi, None)

        self._blocks.each(advance)
        return Outcome(
            rewards=rewards,
            cost=costs.max(axis=0),
            costs=dict(zip(self.cost_names, costs, strict=True)),
            terminated=terminated,
            extras={"goal_met": goal_met},
        )

    # --- what is computed by NumPy, whose functions the original calls ---------------------------------

    def _circling(self, lo: int, hi: int) -> Floats:
        """The Circle task's reward of the rows [lo, hi)."""
        task, dofs = self.world.task, self._plan.qvel
        x, y = self._view("xpos", 3)[lo:hi, :2].T
        # Stacks of matrices go to BLAS one by one, as the original's single ones do.
        qvel = np.ascontiguousarray(self._view("qvel", dofs)[lo:hi])
        jacobian = np.ascontiguousarray(self._view("jacobian", 3, dofs)[lo:hi])
        velocity = np.matmul(jacobian, qvel[:, :, None])
        u, v = velocity[:, 0, 0], velocity[:, 1, 0]
        radius = np.sqrt(np.float_power(x, 2.0) + np.float_power(y, 2.0))
        speed = ((-u * y + v * x) / radius) / (1 + np.abs(radius - task.circle.radius))
        reward: Floats = speed * task.reward_factor
        return reward

    def _potential(self, lo: int, hi: int) -> Floats:
        """The Run task's potential of the rows [lo, hi): how near the far end of the street is."""
        away = self._view("xpos", 3)[lo:hi, :2] - _RUN_GOAL
        norm = np.sqrt(np.matmul(away[:, None, :], away[:, :, None])[:, 0, 0])
        potential: Floats = -norm * self.world.task.reward_factor
        return potential

    def _observe(self, lo: int, hi: int, mask: NDArray[np.bool_] | None) -> None:
        """Write the observations of the rows [lo, hi), or of the masked ones (hi - lo,) among them."""
        w = self.world
        obs = self.obs[lo:hi] if mask is None else self.obs[lo:hi].copy()
        readings = self._view("readings", self._plan.readings)[lo:hi]
        obs[:, w.direct[1]] = readings[:, w.direct[0]]
        if len(w.angles[0]):
            angles = readings[:, w.angles[0]]
            obs[:, w.angles[1]] = np.sin(angles)
            obs[:, w.angles[1] + 1] = np.cos(angles)
        for first, column in zip(*w.quaternions, strict=True):
            kernels.rotation_matrices(readings, first, column, obs)
        if len(self._seen):
            to = self._view("positions", len(w.names), 3)[lo:hi, self._seen]
            to[..., 2] = 0.0
            to -= self._view("xpos", 3)[lo:hi, None]
            xmat = np.ascontiguousarray(self._view("xmat", 3, 3)[lo:hi])
            ego = np.matmul(to[:, :, None, :], xmat[:, None])[:, :, 0]
            distances = np.abs(ego[..., 0] + 1j * ego[..., 1])
            angles = np.arctan2(ego[..., 1], ego[..., 0]) % (np.pi * 2)
            rules.see(distances, angles, self._seen_columns, w.lidar_range, obs)
        if w.family == "Button":
            waiting = self._view("timer")[lo:hi] != 0
            for kind, _, column in w.lidars:
                if kind == "buttons":
                    obs[waiting, column : column + 16] = 0.0
        if mask is not None:
            self.obs[lo:hi][mask] = obs[mask]

    # --- state ------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the rows, their generators and observations."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Overwrite the rows, their generators and observations."""
        for name, array in self._arrays().items():
            array[...] = state[name]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "state": self._state,
            "keys": self._keys,
            "cursor": self._cursor,
            "seeded": self._seeded,
            "observations": self.obs,
        }

    def close(self) -> None:
        """End the threads."""
        self._blocks.close()


def _plan(w: World, model: mujoco.MjModel) -> kernels.Plan:
    return kernels.Plan(
        **w.robot,
        things=len(w.names),
        moving=len(w.moving),
        fixed=len(w.fixed),
        eq_size=model.eq_data.shape[1],
        free_robot=bool(model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE),
        mocap=w.mocap,
        comes_to_rest=not w.mocap,
        touch_moving=w.touch_moving,
        touch_fixed=w.touch_fixed,
        jacobian=w.family == "Circle",
        leave_out=w.leave_out,
        robot_reach=w.reach[0],
        moving_reach=w.reach[1],
        slack=w.slack,
        timestep=float(model.opt.timestep),
    )


def _columns(plan: kernels.Plan, model: mujoco.MjModel) -> tuple[kernels.Columns, int]:
    """Lay the parts of a row one behind the other; return where they start, and the row's width."""
    moving, things, bodies, dofs = plan.moving, plan.things, model.nbody, model.nv
    sizes = {
        "qpos": plan.qpos,
        "qvel": plan.qvel,
        "warmstart": plan.qvel,
        "moving_qpos": 7 * moving,
        "moving_qvel": 6 * moving,
        "moving_warmstart": 6 * moving,
        "fate": moving,
        "body_pos": 3 * bodies,
        "body_quat": 4 * bodies,
        "body_weight": 2 * bodies,
        "dof_constants": 3 * dofs,
        "qpos0": model.nq,
        "qpos_spring": model.nq,
        "eq_data": model.eq_data.size,
        "xpos": 3,
        "xmat": 9,
        "readings": plan.readings,
        "touch_moving": moving,
        "touch_fixed": plan.fixed,
        "jacobian": 3 * dofs if plan.jacobian else 0,
        "positions": 3 * things,
        "places": 2 * things,
        "rotations": things,
        "noise": plan.ctrl,
        "last": 2,
    }
    ends = np.cumsum([sizes.get(name, 1) for name in kernels.Columns._fields]).tolist()
    return kernels.Columns(*[0, *ends[:-1]]), ends[-1]


def _rules(w: World) -> rules.Rules:
    task = w.task

    def things(kind: str) -> list[int]:
        return [i for i, name in enumerate(w.names) if name.rstrip("0123456789") == kind]

    goal, hazards, gremlins, buttons = map(things, ("goal", "hazard", "gremlin", "button"))
    limits = [0.0, 0.0]
    if hasattr(task, "sigwalls"):
        limits = [task.sigwalls.locate_factor, task.sigwalls.locate_factor if task.sigwalls.num == 4 else 0.0]
    rewarded = task.buttons if buttons else getattr(task, "goal", None)
    return rules.Rules(
        kind=rules.KINDS[w.family],
        goal=goal[0] if goal else -1,
        goal_size=float(task.goal.size) if goal else 0.0,
        goal_reward=float(rewarded.reward_goal) if rewarded is not None else 0.0,
        reward_clip=float(task.reward_conf.reward_clip or 0.0),
        first_hazard=hazards[0] if hazards else 0,
        hazards=len(hazards),
        hazard_size=float(task.hazards.size) if hazards else 0.0,
        box=w.names.index("push_box") if "push_box" in w.names else -1,
        moving=len(w.moving),
        fixed=len(w.fixed),
        gremlins=gremlins[0] if gremlins else -1,
        buttons=len(buttons),
        first_button=buttons[0] if buttons else 0,
        button_delay=int(task.buttons.resampling_delay) if buttons else 0,
        vase_speed=float(task.vases.velocity_threshold) if hasattr(task, "vases") else 0.0,
        x_limit=float(limits[0]),
        y_limit=float(limits[1]),
        ant=type(task.agent).__name__ == "Ant",
        joints=w.robot["ctrl"] if type(task.agent).__name__ == "Ant" else 0,
    )


def _ant_joints(w: World, model: mujoco.MjModel) -> NDArray[np.int64]:
    """The coordinates that the Ant sets at a reset; other robots set none."""
    if type(w.task.agent).__name__ != "Ant":
        return np.zeros(0, np.int64)
    return np.asarray(model.jnt_qposadr[model.actuator_trnid[:, 0]], np.int64)


def _quaternions(rotations: Floats) -> Floats:
    """Unit quaternions (..., 4) about the vertical (see `compat` for the normalisation)."""
    w, z = np.cos(rotations / 2), np.sin(rotations / 2)
    norm = np.sqrt(w * w + z * z)
    zeros = np.zeros_like(w)
    return np.stack([w / norm, zeros, zeros, z / norm], axis=-1)
