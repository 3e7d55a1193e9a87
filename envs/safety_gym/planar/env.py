"""Safety-Gymnasium's Point tasks in closed form, thousands at once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from saferl.envs.safety_gym.planar.draw import Scene, Track, draw
from saferl.envs.safety_gym.planar.tasks import TASKS, PlanarTask
from saferl.envs.vector import check_num_envs, expand_seed, split_reset_mask
from saferl.errors import SaferlError, UsageError, unknown_name

__all__ = ["PlanarVectorEnv"]

_ROWS_A_THREAD = 512  # fewer are done before a second thread has started
_MOST_DRAWN = 64  # a frame takes milliseconds, and megabytes once it is unpacked


def find_task(task_id: str, max_episode_steps: int | None) -> PlanarTask:
    """Return the task; UsageError for an unknown one, or for a number of steps that is not its own."""
    if task_id not in TASKS:
        raise unknown_name("planar task", task_id, TASKS)
    task = TASKS[task_id]
    if max_episode_steps not in (None, task.max_episode_steps):
        raise UsageError(f"{task_id} has {task.max_episode_steps} steps, not {max_episode_steps}")
    return task


def task_spaces(task: PlanarTask) -> tuple[spaces.Box, spaces.Box]:
    """Return the observation and the action space of one robot: sensors without bounds, lidars in [0, 1]."""
    low, high = np.full(task.observation_size, -np.inf), np.full(task.observation_size, np.inf)
    low[12:], high[12:] = 0.0, 1.0
    return spaces.Box(low, high, dtype=np.float64), spaces.Box(-1.0, 1.0, (2,), np.float64)


def check_state(state: Mapping[str, Any], task: PlanarTask, num_envs: int) -> None:
    """Raise UsageError unless a stored state is of this task and number of environments."""
    stored_task, stored = state.get("task", task.id), len(state["steps"])
    if stored_task != task.id or stored != num_envs:
        raise UsageError(
            f"the stored state is of {stored} environments of {stored_task}, not {num_envs} of {task.id}; "
            "make the same environment with the same number"
        )


def full_rows(stored: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """Return a copy of (N, C) with `columns` columns: states stored before vases turned have no spin."""
    rows = np.zeros((len(stored), columns))
    rows[:, : stored.shape[1]] = stored
    return rows


class PlanarVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N Point robots at once (for the contract, see `saferl.envs.vector`).

    Same seed, same layouts bit for bit as safety-gymnasium 1.0.0, goals drawn later included; sensors, lidars
    and rewards agree to about 1e-9 until chaos separates the trajectories (see `equations`). Observation
    (N, 12 + 16 a lidar) float64 and action (N, 2) are the original's; `info["goal_met"]` (N,) bool tells who
    reached a goal in this step. Neither safety-gymnasium nor MuJoCo is needed.

    **Approximated:** the one vase of PointGoal1, which costs nothing but is seen and can be pushed. It is a
    box that gives way to the robot's body and nose, is dragged along by friction, slides on, and does not
    slow the robot (in the original its weight is 0.15% of the robot's). It enters the observation's last 16
    numbers and, where a new goal may stand, the layout.

    Args:
        task_id: one of `saferl.envs.safety_gym.planar.tasks.TASKS`.
        num_envs: robots N.
        threads: threads that share the work of large batches; 0 is one a core.
        max_episode_steps: accepted because Gymnasium passes it; must be the task's own.
        render_mode: None, or "rgb_array" for a drawn view (see `draw`) of up to 64 environments.

    Raises UsageError for an unknown task or render mode or impossible numbers.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        task_id: str,
        num_envs: int = 1,
        *,
        threads: int = 0,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.task = task = find_task(task_id, max_episode_steps)
        if threads < 0:
            raise UsageError(f"threads is {threads}; 0 means one a core")
        if render_mode not in (None, "rgb_array"):
            raise UsageError(f"render_mode is {render_mode!r}; the planar engine has 'rgb_array'")
        if render_mode is not None and num_envs > _MOST_DRAWN:
            raise UsageError(
                f"{num_envs} environments are too many to draw; make at most {_MOST_DRAWN} with a render_mode"
            )
        # Compiled by numba, which takes a second to import.
        from saferl.envs.safety_gym.planar import kernels

        self._kernels = kernels
        self.num_envs = n = check_num_envs(num_envs)
        self.metadata = {
            **type(self).metadata,
            "backend": "planar",
            "cost_names": (task.cost_name,),
            "render_fps": 50,
        }
        self.single_observation_space, self.single_action_space = task_spaces(task)
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)

        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, min(threads or available, n // _ROWS_A_THREAD))
        edges = np.linspace(0, n, workers + 1).astype(int).tolist()
        self._blocks = list(itertools.pairwise(edges))
        self._pool = ThreadPoolExecutor(workers - 1, "planar") if workers > 1 else None

        things = len(task.things)
        self._kind = kernels.KINDS[task.kind]
        self._bounds = np.array([thing.bounds for thing in task.things])
        self._keepouts = np.array([thing.keepout for thing in task.things])
        self._state = np.zeros((n, kernels.STATE))
        self._places = np.zeros((n, things, 2))
        self._rotations = np.zeros((n, things))
        self._keys = np.zeros((n, 624), np.uint32)
        self._cursor = np.full(n, 624, np.int64)
        self._steps = np.zeros(n, np.int64)
        self._seeded = np.zeros(n, bool)
        self._started = False
        self._obs = np.zeros((n, task.observation_size))
        self.render_mode = render_mode
        self._tracks = [] if render_mode is None else [Track() for _ in range(n)]

    # --- the interface ----------------------------------------------------------------------------

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes: of all environments, or of those that `options["reset_mask"]` (N,) selects.

        A seed (modulo 2**32, as in the original) restarts an environment's random numbers, else they go on.
        Returns the observations of all environments, those not selected as they were.
        """
        mask, _ = split_reset_mask(options, self.num_envs)
        for row, row_seed in enumerate(expand_seed(seed, self.num_envs)):
            if row_seed is None and not self._seeded[row]:
                row_seed = int(np.random.SeedSequence().generate_state(1)[0])
            if row_seed is not None and mask[row]:
                self._kernels.seed_row(self._keys[row], row_seed % 2**32)
                self._cursor[row] = 624
                self._seeded[row] = True
        self._obs = self._obs.copy()
        self._restart(mask, self._obs)
        self._started = bool(self._seeded.all())
        return self._obs, {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one control step (20 ms) with `actions` (N, 2): push and turn, clipped to [-1, 1].

        Raises UsageError for another shape, or before every environment was reset.
        """
        n, task = self.num_envs, self.task
        if not self._started:
            raise UsageError("an environment has no episode yet; call reset before step")
        actions = np.ascontiguousarray(actions, np.float64)
        if actions.shape != (n, 2):
            raise UsageError(f"actions have shape {actions.shape}; this environment takes {(n, 2)}")
        obs = np.empty((n, task.observation_size))
        rewards, costs = np.empty(n), np.empty(n)
        goal_met, terminated, truncated = np.empty(n, bool), np.empty(n, bool), np.empty(n, bool)
        ended = self._each(
            self._kernels.step_rows,
            self._kind, self._bounds, self._keepouts, task.hazards, task.vase, task.lidar_range,
            task.x_limit, task.y_limit, task.max_episode_steps,
            actions, self._state, self._places, self._rotations, self._keys, self._cursor, self._steps,
            obs, rewards, costs, goal_met, terminated, truncated,
        )  # fmt: skip
        info: dict[str, Any] = {"cost": costs, "costs": {task.cost_name: costs.copy()}}
        if task.kind == "goal":
            info["goal_met"] = goal_met
        for track, row, reward, cost in zip(self._tracks, self._state, rewards, costs, strict=False):
            track.add(row[0], row[1], reward, cost)
        if sum(ended):
            mask = terminated | truncated
            info["final_obs"], info["_final_obs"] = obs.copy(), mask
            self._restart(mask, obs)
        self._obs = obs
        return obs, rewards, terminated, truncated, info

    def get_state(self) -> dict[str, Any]:
        """Return everything that the future depends on: the task's id, and arrays of N rows."""
        return {
            "task": self.task.id,
            "state": self._state.copy(),
            "places": self._places.copy(),
            "rotations": self._rotations.copy(),
            "keys": self._keys.copy(),
            "cursor": self._cursor.copy(),
            "steps": self._steps.copy(),
            "observations": self._obs.copy(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`'s result; UsageError when it is of another task or number."""
        check_state(state, self.task, self.num_envs)
        self._state = full_rows(state["state"], self._kernels.STATE)
        self._places = np.array(state["places"], np.float64)
        self._rotations = np.array(state["rotations"], np.float64)
        self._keys = np.array(state["keys"], np.uint32)
        self._cursor = np.array(state["cursor"], np.int64)
        self._steps = np.array(state["steps"], np.int64)
        self._obs = np.array(state["observations"], np.float64)
        self._seeded[:] = self._started = True
        self._start_tracks(np.ones(self.num_envs, bool))

    def render(self) -> tuple[NDArray[np.uint8], ...]:
        """Return a frame of every environment, each (height, width, 3) uint8, as `draw` paints it.

        An environment whose episode ended in the last step shows the beginning of the next one. The sums that
        a frame reads out begin with the episode, or with `set_state`.

        Raises UsageError without `render_mode`, or before the first reset.
        """
        if self.render_mode is None:
            raise UsageError("this environment was made without render_mode; pass render_mode='rgb_array'")
        if not self._started:
            raise UsageError("nothing can be drawn before the first reset; call reset first")
        return tuple(draw(self._scene(row)) for row in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    # --- blocks of rows ---------------------------------------------------------------------------

    def _each(self, kernel: Any, *arguments: Any) -> list[Any]:
        """Call a kernel on every block of rows, the first in this thread."""
        if self._pool is None:
            return [kernel(0, self.num_envs, *arguments)]
        waiting = [self._pool.submit(kernel, lo, hi, *arguments) for lo, hi in self._blocks[1:]]
        first = kernel(*self._blocks[0], *arguments)
        return [first, *(future.result() for future in waiting)]

    def _start_tracks(self, mask: NDArray[np.bool_]) -> None:
        for track, row, chosen in zip(self._tracks, self._state, mask, strict=False):
            if chosen:
                track.start(row[0], row[1])

    def _scene(self, row: int) -> Scene:
        task, places, track = self.task, self._places[row], self._tracks[row]
        x, y, heading = self._state[row, :3].tolist()
        first, last = task.hazards
        vase = (*places[task.vase].tolist(), float(self._rotations[row, task.vase])) if task.vase else None
        return Scene(
            title=task.id.removeprefix("Safety").partition("-")[0],
            kind=task.kind,
            robot=(x, y, heading),
            paying=track.paying,
            trail=track.trail,
            trail_paid=track.paid,
            side=task.things[1].area[2] if task.kind == "goal" else 0.0,
            goal=(float(places[1, 0]), float(places[1, 1])) if task.kind == "goal" else None,
            hazards=places[first:last].copy(),
            vase=vase,
            x_limit=task.x_limit,
            y_limit=task.y_limit,
            step=int(self._steps[row]),
            episode_return=track.total_return,
            episode_cost=track.total_cost,
        )

    def _restart(self, mask: NDArray[np.bool_], obs: NDArray[np.float64]) -> None:
        task = self.task
        stuck = self._each(
            self._kernels.reset_rows,
            mask, self._kind, self._bounds, self._keepouts, self._state, self._places, self._rotations,
            self._keys, self._cursor, self._steps,
        )  # fmt: skip
        if max(stuck) >= 0:
            raise SaferlError(f"no layout was found for environment {max(stuck)} in 10000 tries")
        self._each(
            self._kernels.observe_rows,
            mask, self._kind, task.hazards, task.vase, task.lidar_range, self._state, self._places, obs,
        )  # fmt: skip
        self._start_tracks(mask)
