"""The velocity tasks (Gymnasium's locomotion robots with a speed limit) in batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from numpy.typing import NDArray

from saferl.envs.safety_gym.original import SafetyGymEnv
from saferl.envs.safety_gym.simulated.engine import Blocks, Engine, Outcome
from saferl.envs.safety_gym.simulated.native import (
    address_of,
    compile_loop,
    doubles,
    mj_forward,
    mj_normalizeQuat,
    mj_resetData,
    mj_rnePostConstraint,
    mj_step,
)

__all__ = ["Velocity"]

Floats = NDArray[np.float64]

_NORMAL_VELOCITIES = ("HalfCheetah", "Ant")  # at the start; the others' are uniform
_HIDDEN = {"Swimmer": 2, "Ant": 2, "Humanoid": 2}  # coordinates that are not observed; else 1
_CLIPPED = ("Hopper", "Walker2d")
_STEP, _RESET = range(2)


@compile_loop
def _run(  # type: ignore[no-untyped-def]
    lo, hi, mask, handle, mode, frames, forces, qpos, qvel, warmstart, controls, seen, addresses, sizes
):
    """Step the rows [lo, hi), or put the masked ones into their states; then copy what is seen.

    `handle` holds the addresses of a model, its data, and in it qpos, qvel, qacc_warmstart and ctrl;
    `addresses` and `sizes` name the arrays that are copied one behind the other to `seen` (N, S). As in
    MuJoCo they belong to the state before the last physics step. `forces` asks for the contacts' as well.
    """
    model, data = handle[0], handle[1]
    position, velocity = doubles(handle[2], qpos.shape[1]), doubles(handle[3], qvel.shape[1])
    start, control = doubles(handle[4], qvel.shape[1]), doubles(handle[5], controls.shape[1])
    for i in range(lo, hi):
        if mode == _RESET:
            if not mask[i]:
                continue
            mj_resetData(model, data)
            position[:], velocity[:] = qpos[i], qvel[i]
            mj_forward(model, data)
            mj_normalizeQuat(model, handle[2])  # as `compat` does
        else:
            position[:], velocity[:], start[:], control[:] = qpos[i], qvel[i], warmstart[i], controls[i]
            for _ in range(frames):
                mj_step(model, data)
            if forces:
                mj_rnePostConstraint(model, data)
        qpos[i], qvel[i], warmstart[i] = position, velocity, start
        first = 0
        for n in range(len(sizes)):
            seen[i, first : first + sizes[n]] = doubles(addresses[n], sizes[n])
            first += sizes[n]


class Velocity(Engine):
    """N environments of a velocity task (see `SimulatedVectorEnv` for the arguments)."""

    def __init__(self, task_id: str, num_envs: int, threads: int) -> None:
        template = SafetyGymEnv(task_id)
        self._env = env = template._env
        name, _, version = task_id.partition("-")
        self._robot = robot = name.removeprefix("Safety").removesuffix("Velocity")
        # Speed is sideways as well for these; version 0 of the Swimmer is one of them.
        self._planar = robot in ("Ant", "Humanoid") or (robot, version) == ("Swimmer", "v0")
        assert isinstance(template.observation_space, spaces.Box)
        assert isinstance(template.action_space, spaces.Box)
        self.observation_space, self.action_space = template.observation_space, template.action_space
        self.cost_names = template.metadata["cost_names"]
        self.render_fps = template.metadata["render_fps"]
        self._blocks = Blocks(num_envs, threads)
        self._workers = [self._worker(copy.copy(env.model)) for _ in self._blocks.bounds]
        n, model = num_envs, env.model
        assert model.na == 0
        self._qpos, self._qvel = np.zeros((n, model.nq)), np.zeros((n, model.nv))
        self._warmstart = np.zeros((n, model.nv))
        self._seen = np.zeros((n, int(self._sizes.sum())))
        self._generators: list[np.random.Generator | None] = [None] * n
        assert self.observation_space.shape is not None
        self.obs = np.zeros((n, *self.observation_space.shape))

    def _worker(self, model: mujoco.MjModel) -> tuple[mujoco.MjModel, mujoco.MjData, Any, Any]:
        """A thread's model and data, their addresses and those of the arrays in them that are seen."""
        data = mujoco.MjData(model)
        state = [data.qpos, data.qvel, data.qacc_warmstart, data.ctrl]
        handle = np.array([model._address, data._address, *map(address_of, state)], np.int64)
        seen: list[np.ndarray] = []
        if self._robot == "Ant":
            seen = [data.xpos[model.body("torso").id]]
        elif self._robot == "Humanoid":
            seen = [data.xipos, data.cinert, data.cvel, data.qfrc_actuator, data.cfrc_ext]
        self._sizes = np.array([array.size for array in seen], np.int64)
        return model, data, handle, np.array([address_of(array) for array in seen], np.int64)

    # --- episodes ---------------------------------------------------------------------------------

    def seed(self, row: int, seed: int | None) -> None:
        """Restart a row's generator with the seed modulo 2**32."""
        if seed is not None or self._generators[row] is None:
            self._generators[row], _ = seeding.np_random(None if seed is None else seed % 2**32)

    def restart(self, mask: NDArray[np.bool_]) -> None:
        """Start from Gymnasium's initial states with its noise."""
        env = self._env
        scale = env._reset_noise_scale
        for row in np.flatnonzero(mask):
            generator = self._generators[row]
            assert generator is not None
            self._qpos[row] = env.init_qpos + generator.uniform(-scale, scale, env.model.nq)
            if self._robot in _NORMAL_VELOCITIES:
                noise = scale * generator.standard_normal(env.model.nv)
            else:
                noise = generator.uniform(-scale, scale, env.model.nv)
            self._qvel[row] = env.init_qvel + noise
        self._each(_RESET, mask, np.zeros((len(mask), env.model.nu)))
        obs = self.obs.copy()
        self._observe(obs)
        self.obs[mask] = obs[mask]

    def _each(self, mode: int, mask: NDArray[np.bool_], controls: Floats) -> None:
        def run(block: int, lo: int, hi: int) -> None:
            _, _, handle, addresses = self._workers[block]
            _run(
                lo, hi, mask, handle, mode, self._env.frame_skip, self._robot == "Humanoid", self._qpos,
                self._qvel, self._warmstart, controls, self._seen, addresses, self._sizes,
            )  # fmt: skip

        self._blocks.each(run)

    def step(self, actions: np.ndarray) -> Outcome:
        """Step, then Gymnasium's rewards and the cost of speed."""
        env, robot = self._env, self._robot
        actions = np.asarray(actions, self.action_space.dtype)
        before = self._places()
        controls = actions.astype(np.float64)
        self._each(_STEP, np.ones(len(actions), bool), controls)
        after = self._places()
        velocity = (after - before) / env.dt
        x_velocity = velocity[:, 0]
        effort = controls if robot == "Humanoid" else actions  # the others' cost is in single precision
        control_cost = env._ctrl_cost_weight * np.sum(np.square(effort), axis=1)
        forward = x_velocity if robot == "Ant" else env._forward_reward_weight * x_velocity
        healthy, reward = self._healthy(), forward
        survival = np.zeros(len(actions))
        if healthy is not None:
            survival = survival + env._healthy_reward
            reward = reward + survival
        speed = x_velocity
        if self._planar:
            speed = np.sqrt(np.float_power(velocity[:, 0], 2.0) + np.float_power(velocity[:, 1], 2.0))
        cost = (speed > env._velocity_threshold).astype(np.float64)
        self._observe(self.obs)
        return Outcome(
            rewards=reward - control_cost,
            cost=cost,
            costs={"velocity": cost.copy()},
            terminated=np.zeros(len(actions), bool) if healthy is None else ~healthy,
            extras=self._extras(after, velocity, forward, control_cost, survival),
        )

    # --- Gymnasium's formulas ---------------------------------------------------------------------------

    def _places(self) -> Floats:
        """Where the robots are, (N, 1 or 2), as their rewards have it."""
        if self._robot == "Ant":
            return self._seen[:, :2].copy()
        if self._robot == "Humanoid":
            mass = self._env.model.body_mass[:, None]
            centres = self._seen[:, : 3 * len(mass)].reshape(-1, len(mass), 3)
            centre: Floats = (np.sum(mass * centres, axis=1) / np.sum(mass))[:, :2]
            return centre
        return self._qpos[:, : 2 if self._robot == "Swimmer" else 1].copy()

    def _healthy(self) -> NDArray[np.bool_] | None:
        """Which robots go on; None for those that always do."""
        env, qpos, robot = self._env, self._qpos, self._robot
        if robot in ("HalfCheetah", "Swimmer"):
            return None
        low, high = env._healthy_z_range
        healthy: NDArray[np.bool_]
        if robot == "Humanoid":
            healthy = (low < qpos[:, 2]) & (qpos[:, 2] < high)
        elif robot == "Ant":
            finite = np.isfinite(qpos).all(axis=1) & np.isfinite(self._qvel).all(axis=1)
            healthy = finite & (low <= qpos[:, 2]) & (qpos[:, 2] <= high)
        else:
            least, most = env._healthy_angle_range
            healthy = (low < qpos[:, 1]) & (qpos[:, 1] < high) & (least < qpos[:, 2]) & (qpos[:, 2] < most)
        if robot == "Hopper":
            least, most = env._healthy_state_range
            state = np.concatenate([qpos[:, 2:], self._qvel], axis=1)
            healthy &= ((least < state) & (state < most)).all(axis=1)
        return healthy

    def _observe(self, obs: Floats) -> None:
        hidden = _HIDDEN.get(self._robot, 1)
        first, last = self._qpos.shape[1] - hidden, self._qpos.shape[1] - hidden + self._qvel.shape[1]
        obs[:, :first] = self._qpos[:, hidden:]
        obs[:, first:last] = self._qvel
        if self._robot in _CLIPPED:
            np.clip(obs[:, first:last], -10, 10, out=obs[:, first:last])
        if self._robot == "Humanoid":
            obs[:, last:] = self._seen[:, self._sizes[0] :]

    def _extras(
        self, places: Floats, velocity: Floats, forward: Floats, control_cost: np.ndarray, survival: Floats
    ) -> dict[str, np.ndarray]:
        """The entries of the original's info."""
        along = {"x_position": places[:, 0].copy(), "x_velocity": velocity[:, 0].copy()}
        if self._robot in ("Hopper", "Walker2d"):
            return along
        if self._robot == "HalfCheetah":
            return {**along, "reward_run": forward, "reward_ctrl": -control_cost}
        rewards = {
            "Swimmer": {"reward_fwd": forward, "reward_ctrl": -control_cost},
            "Ant": {"reward_forward": forward, "reward_ctrl": -control_cost, "reward_survive": survival},
            "Humanoid": {
                "reward_linvel": forward,
                "reward_quadctrl": -control_cost,
                "reward_alive": survival,
            },
        }[self._robot]
        # A dot product by BLAS, as in np.linalg.norm.
        distance = np.sqrt(np.matmul(places[:, None, :], places[:, :, None])[:, 0, 0])
        return {
            **{name: value.copy() for name, value in rewards.items()},
            **along,
            "y_position": places[:, 1].copy(),
            "y_velocity": velocity[:, 1].copy(),
            "distance_from_origin": distance,
            "forward_reward": forward.copy(),
        }

    # --- state ------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return every array of rows, and the generators' states (JSON values)."""
        generators = [None if g is None else g.bit_generator.state for g in self._generators]
        return {
            "qpos": self._qpos.copy(),
            "qvel": self._qvel.copy(),
            "warmstart": self._warmstart.copy(),
            "seen": self._seen.copy(),
            "observations": self.obs.copy(),
            "generators": generators,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Overwrite every array of rows, and the generators."""
        self._qpos[...], self._qvel[...] = state["qpos"], state["qvel"]
        self._warmstart[...], self._seen[...] = state["warmstart"], state["seen"]
        self.obs[...] = state["observations"]
        for row, stored in enumerate(state["generators"]):
            generator = None
            if stored is not None:
                generator, _ = seeding.np_random(0)
                generator.bit_generator.state = stored
            self._generators[row] = generator

    def close(self) -> None:
        """End the threads."""
        self._blocks.close()
