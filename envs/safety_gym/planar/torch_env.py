"""The planar engine in array code: the same environments on any torch device, a GPU above all.

The dynamics are those of `equations`, the tasks those of `tasks`, the order of operations that of `kernels`;
only sines, cosines and arctangents may differ in their last bit. `step` takes and returns tensors on the
device and never waits for it: what a step needs to decide on the host, the host counts by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from saferl.envs.safety_gym.planar import equations as eq
from saferl.envs.safety_gym.planar import kernels as k
from saferl.envs.safety_gym.planar.env import check_state, find_task, full_rows, task_spaces
from saferl.envs.vector import check_num_envs, expand_seed, split_reset_mask
from saferl.errors import SaferlError, UsageError
from saferl.experiment.seeding import choose_device

__all__ = ["PlanarTorchVectorEnv"]

_BLOCK = 624  # words of a Mersenne twister
_WINDOW = 3 * _BLOCK  # the current block and two more, to draw ahead without making new ones
_SHIFT_INTERVAL = 64  # steps after which the windows are moved on
_CANDIDATES = 156  # places tried for a new goal; the longest search among 245,000 of PointGoal1 took 66
_ELEMENTS = 2**24  # numbers of a temporary array while searching: 128 MiB


class PlanarTorchVectorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """N Point robots on a torch device (for the contract, see `saferl.envs.vector`; for the tasks, `env`).

    Same seed, same layouts and goals, bit for bit, as `PlanarVectorEnv`; costs are the same and the rest
    agrees to rounding until chaos separates the trajectories. Everything a step returns is a tensor on
    `torch_device`: observations (N, D) and rewards (N,) float64, ends (N,) bool, and the arrays in `info`.
    States go to and fro between the two engines (`get_state`, `set_state`).

    **Waiting.** On CUDA a step enqueues its work and returns. It waits for the device in two cases only: when
    episodes are truncated, which the host knows by counting, for their layouts are drawn on the host; and
    never otherwise. Environments that were started together end together, so that is once an episode.
    `reset`, `get_state` and `set_state` wait as well.

    **New goals.** Up to 156 places are tried at once, and the first free one is taken, as if they had been
    drawn one by one. Should none be free (less than once in 1e8 goals), the CPU tries on like the original,
    up to 10,000 places, and terminates the episode if all fail; CUDA, which must not wait for the answer,
    takes the last place. So on CUDA no episode is ever terminated.

    Args:
        task_id: one of `saferl.envs.safety_gym.planar.tasks.TASKS`.
        num_envs: robots N.
        device: "cpu", "cuda" or "cuda:N".
        max_episode_steps: accepted because Gymnasium passes it; must be the task's own.

    Raises UsageError for an unknown task, an impossible number, or a device that is not there.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        task_id: str,
        num_envs: int = 1,
        *,
        device: str | torch.device = "cuda",
        max_episode_steps: int | None = None,
    ) -> None:
        self.task = task = find_task(task_id, max_episode_steps)
        self.num_envs = n = check_num_envs(num_envs)
        chosen = choose_device(str(device))
        if chosen.type not in ("cpu", "cuda"):
            raise UsageError(f"the planar engine needs float64 and runs on cpu or cuda, not on {chosen}")
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
        self.torch_device = chosen
        self.metadata = {
            **type(self).metadata,
            "backend": "planar torch",
            "cost_names": (task.cost_name,),
            "render_fps": 50,
        }
        self.single_observation_space, self.single_action_space = task_spaces(task)
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)

        self._waits = chosen.type == "cpu"  # whether control flow may depend on what was computed
        self._bounds = np.array([thing.bounds for thing in task.things])
        self._keepouts = np.array([thing.keepout for thing in task.things])
        things = len(task.things)
        # Rows are quantities and columns environments: every operation runs over contiguous numbers.
        self._state = self._zeros(k.STATE, n)
        self._places = self._zeros(2, things, n)
        self._rotations = self._zeros(things, n)
        self._words = self._zeros(n, _WINDOW, dtype=torch.int32)  # the twisters' bits, sign included
        self._cursor = self._zeros(n, dtype=torch.int64)  # into the window
        self._steps = self._zeros(n, dtype=torch.int64)
        self._obs = self._zeros(n, task.observation_size)
        self._counted = np.zeros(n, np.int64)  # the same steps, known to the host
        self._since_shift = 0
        self._seeded = np.zeros(n, bool)
        self._started = False

        others = [j for j in range(things) if j != 1]
        self._others = torch.tensor(others, device=chosen)
        if task.kind == "goal":
            distances = self._keepouts[others] + 0.0 + self._keepouts[1]
            self._clearances = torch.tensor(distances, device=chosen)[None, :, None]
            chunk = _ELEMENTS // (n * len(others))
            self._chunk = max(1, min(_CANDIDATES, chunk))
            self._tries = torch.arange(_CANDIDATES, device=chosen)
            self._ahead = torch.arange(4 * self._chunk, device=chosen)
        self._zero = self._zeros(n)
        self._one = self._zero + 1.0
        self._gravity = self._zero + eq.GRAVITY

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.torch_device)

    # --- the interface ----------------------------------------------------------------------------

    @torch.no_grad()
    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes: of all environments, or of those that `options["reset_mask"]` (N,) selects.

        A seed (modulo 2**32, as in the original) restarts an environment's random numbers, else they go on.
        Returns the observations (N, D) of all environments, those not selected as they were.
        """
        mask, _ = split_reset_mask(options, self.num_envs)
        seeds: dict[int, int] = {}
        for row, row_seed in enumerate(expand_seed(seed, self.num_envs)):
            if row_seed is None and not self._seeded[row]:
                row_seed = int(np.random.SeedSequence().generate_state(1)[0])
            if row_seed is not None and mask[row]:
                seeds[row] = row_seed % 2**32
                self._seeded[row] = True
        self._obs = self._obs.clone()
        self._restart(mask, self._obs, seeds)
        self._started = bool(self._seeded.all())
        return self._obs, {}

    @torch.no_grad()
    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one control step (20 ms) with `actions` (N, 2): push and turn, clipped to [-1, 1].

        Actions elsewhere than on `torch_device` are copied there, which waits. Raises UsageError for another
        shape, or before every environment was reset.
        """
        task, state, places = self.task, self._state, self._places
        if not self._started:
            raise UsageError("an environment has no episode yet; call reset before step")
        actions = torch.as_tensor(actions, dtype=torch.float64, device=self.torch_device)
        if actions.shape != (self.num_envs, 2):
            raise UsageError(
                f"actions have shape {tuple(actions.shape)}; this environment takes {(self.num_envs, 2)}"
            )
        before = torch.stack((state[k.X], state[k.Y], state[k.HEADING].sin(), state[k.HEADING].cos()))
        self._cursor += 2  # the original draws a number of substeps, always ten, from one double
        sin, cos, ax, ay = self._move(actions)
        if task.vase:
            self._move_vase(before, sin, cos)

        x, y = state[k.X], state[k.Y]
        cost = torch.zeros_like(x)
        met = failed = torch.zeros_like(x, dtype=torch.bool)
        if task.kind == "goal":
            distance = _length(places[0, 1] - x, places[1, 1] - y)
            reward = state[k.LAST] - distance
            if task.hazards[1]:
                first, last = task.hazards
                near = _length(places[0, first:last] - x, places[1, first:last] - y) < k.HAZARD_SIZE
                cost = near.any(0).double()
            met = distance <= k.GOAL_SIZE
            reward = torch.where(met, reward + 1.0, reward)
            failed = self._place_goals(met)
            renewed = _length(places[0, 1] - x, places[1, 1] - y)
            state[k.LAST] = torch.where(met, renewed, distance)
            reward = reward.clamp(-10.0, 10.0)
        elif task.kind == "circle":
            radius = _length(x, y)
            turning = -state[k.VX] * y + state[k.VY] * x
            reward = 0.1 * (turning / radius) / (1.0 + (radius - k.CIRCLE_RADIUS).abs())
            reward = reward.clamp(-10.0, 10.0)
        else:
            potential = -_length(x, y - k.RUN_GOAL_Y) * k.RUN_FACTOR
            reward = potential - state[k.LAST]
            state[k.LAST] = potential
        for limit, position in ((task.x_limit, x), (task.y_limit, y)):
            if limit > 0.0:
                cost = torch.where(position.abs() > limit, self._one, cost)

        self._steps += 1
        self._counted += 1
        truncated = self._steps >= task.max_episode_steps
        obs = self._observe(sin, cos, ax, ay)
        info: dict[str, Any] = {"cost": cost, "costs": {task.cost_name: cost.clone()}}
        if task.kind == "goal":
            info["goal_met"] = met
        ended = self._counted >= task.max_episode_steps
        if self._waits:
            ended = ended | failed.numpy()
        if ended.any():
            info["final_obs"], info["_final_obs"] = obs.clone(), failed | truncated
            self._restart(ended, obs, {})
        self._since_shift += 1
        if self._since_shift >= _SHIFT_INTERVAL:
            self._shift()
        self._obs = obs
        return obs, reward, failed, truncated, info

    @torch.no_grad()
    def get_state(self) -> dict[str, Any]:
        """Return everything that the future depends on: the task's id, and NumPy arrays of N rows.

        `PlanarVectorEnv.set_state` takes it too.
        """
        self._shift()
        return {
            "task": self.task.id,
            "state": self._state.T.cpu().numpy().copy(),
            "places": self._places.permute(2, 1, 0).cpu().numpy().copy(),
            "rotations": self._rotations.T.cpu().numpy().copy(),
            "keys": self._words[:, :_BLOCK].cpu().numpy().view(np.uint32).copy(),
            "cursor": self._cursor.cpu().numpy().copy(),
            "steps": self._counted.copy(),
            "observations": self._obs.cpu().numpy().copy(),
        }

    @torch.no_grad()
    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the answer of `get_state`, of this class or of `PlanarVectorEnv`.

        Raises UsageError when it is of another task or number of environments.
        """
        check_state(state, self.task, self.num_envs)

        def load(name: str, dtype: Any = np.float64) -> Tensor:
            # A copy: the caller's arrays stay the caller's.
            return torch.tensor(np.asarray(state[name], dtype), device=self.torch_device)

        rows = full_rows(np.asarray(state["state"]), k.STATE)
        self._state = torch.tensor(rows.T.copy(), device=self.torch_device)
        self._places = load("places").permute(2, 1, 0).contiguous()
        self._rotations = load("rotations").T.contiguous()
        self._set_words(slice(None), np.asarray(state["keys"], np.uint32))
        self._cursor = load("cursor", np.int64)
        self._steps = load("steps", np.int64)
        self._obs = load("observations")
        self._counted = np.array(state["steps"], np.int64)
        self._seeded[:] = self._started = True

    # --- the control step -------------------------------------------------------------------------

    def _move(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ten substeps; returns the heading's sine and cosine and the last accelerations, each (N,)."""
        drive, turn = actions.clamp(-1.0, 1.0).unbind(1)
        force = eq.GEAR * drive.clamp(-eq.FORCE_LIMIT, eq.FORCE_LIMIT)
        x, y, heading, vx, vy, w = self._state[:6].unbind(0)
        sin, cos = heading.sin(), heading.cos()
        h = eq.SUBSTEP_SECONDS
        for _ in range(eq.SUBSTEPS):
            torque = eq.GEAR * (turn - eq.GEAR * w).clamp(-eq.FORCE_LIMIT, eq.FORCE_LIMIT)
            ax, ay, alpha = eq.accelerations(vx, vy, w, sin, cos, force, torque, h)
            vx = vx + h * ax
            vy = vy + h * ay
            w = w + h * alpha
            x = x + h * vx
            y = y + h * vy
            heading = heading + h * w
            sin, cos = heading.sin(), heading.cos()
        torch.stack((x, y, heading, vx, vy, w), out=self._state[:6])
        torque = eq.GEAR * (turn - eq.GEAR * w).clamp(-eq.FORCE_LIMIT, eq.FORCE_LIMIT)
        ax, ay, _ = eq.accelerations(vx, vy, w, sin, cos, force, torque, 0.0)
        return sin, cos, ax, ay

    def _move_vase(self, before: Tensor, sin: Tensor, cos: Tensor) -> None:
        """Slide the vases and let them give way: what `kernels.move_vase` does, without branches.

        `before` holds x, y, sine and cosine of the heading (4, N) before the step.
        """
        state, vase = self._state, self.task.vase
        x, y, velocity = state[k.X], state[k.Y], state[k.VASE_VX :]
        old_x, old_y, old_turned = self._places[0, vase], self._places[1, vase], self._rotations[vase]
        speed = _length(velocity[0], velocity[1])
        moving = speed > 0.0
        if self._waits and not bool((moving | (_length(old_x - x, old_y - y) < 0.3)).any()):
            return
        loss = k.FRICTION * eq.GRAVITY * eq.CONTROL_SECONDS
        braked = (speed - loss / 2) * eq.CONTROL_SECONDS
        way = torch.where(speed > loss, braked, speed * speed / (2 * eq.GRAVITY))
        box_x = torch.where(moving, old_x + velocity[0] / speed * way, old_x)
        box_y = torch.where(moving, old_y + velocity[1] / speed * way, old_y)
        turned = torch.where(moving, old_turned + velocity[2] * eq.CONTROL_SECONDS, old_turned)
        kept = (speed - loss).clamp(min=0.0) / speed
        velocity = torch.where(moving, velocity * kept, velocity)

        dx, dy = box_x - x, box_y - y
        near = dx * dx + dy * dy < 0.09
        touched = torch.zeros_like(near)
        x0, y0, sin0, cos0 = before
        old_sin, old_cos = old_turned.sin(), old_turned.cos()
        nose = (x + k.NOSE_AHEAD * cos, y + k.NOSE_AHEAD * sin, k.NOSE_RADIUS)
        for disc_x, disc_y, radius in ((x, y, k.BODY_RADIUS), nose):
            box_sin, box_cos = turned.sin(), turned.cos()
            ahead, left = eq.to_ego(disc_x - box_x, disc_y - box_y, box_sin, box_cos)
            near_x, near_y = ahead.clamp(-k.VASE_HALF, k.VASE_HALF), left.clamp(-k.VASE_HALF, k.VASE_HALF)
            out_x, out_y = near_x - ahead, near_y - left
            distance = _length(out_x, out_y)
            touch = near & (distance < radius) & (distance != 0.0)
            normal_x = (box_cos * out_x - box_sin * out_y) / distance
            normal_y = (box_sin * out_x + box_cos * out_y) / distance
            lever_x, lever_y = box_cos * near_x - box_sin * near_y, box_sin * near_x + box_cos * near_y
            turning = lever_x * normal_y - lever_y * normal_x
            push = (radius - distance) / (1.0 + turning * turning / k.VASE_TURNING)
            at_x, at_y = eq.to_ego(box_x + lever_x - x, box_y + lever_y - y, sin, cos)
            from_x, from_y = x0 + cos0 * at_x - sin0 * at_y, y0 + sin0 * at_x + cos0 * at_y
            was_x = old_x + old_cos * near_x - old_sin * near_y
            was_y = old_y + old_sin * near_x + old_cos * near_y
            slip = (was_y - from_y) * normal_x - (was_x - from_x) * normal_y
            across = lever_x * normal_x + lever_y * normal_y
            most = k.PUSH_FRICTION * push
            drag = (slip / (1.0 + across * across / k.VASE_TURNING)).clamp(-most, most)
            box_x = torch.where(touch, box_x + (push * normal_x - drag * normal_y), box_x)
            box_y = torch.where(touch, box_y + (push * normal_y + drag * normal_x), box_y)
            turn = (push * turning + drag * across) / k.VASE_TURNING
            turned = torch.where(touch, turned + turn, turned)
            touched |= touch
        ways = torch.stack((box_x - old_x, box_y - old_y, turned - old_turned))
        state[k.VASE_VX :] = torch.where(touched, ways / eq.CONTROL_SECONDS, velocity)
        self._places[0, vase], self._places[1, vase], self._rotations[vase] = box_x, box_y, turned

    def _observe(self, sin: Tensor, cos: Tensor, ax: Tensor, ay: Tensor) -> Tensor:
        """Observations (N, D) of all robots."""
        task, state, places = self.task, self._state, self._places
        zero = self._zero
        parts = [
            torch.stack(
                (
                    *(*eq.to_ego(ax, ay, sin, cos), self._gravity),
                    *(*eq.to_ego(state[k.VX], state[k.VY], sin, cos), zero),
                    *(zero, zero, state[k.RATE]),
                    *(*eq.to_ego(zero, zero + eq.MAGNETIC_FIELD, sin, cos), zero),
                ),
                1,
            )
        ]
        if task.kind == "goal":
            first, last = task.hazards
            seen = [slice(1, 2), slice(first, last), slice(task.vase, task.vase + 1)]
            for things in seen[: len(task.lidars)]:
                parts.append(self._lidar(places[0, things], places[1, things], sin, cos))
        elif task.kind == "circle":
            parts.append(self._lidar(zero[None], zero[None], sin, cos))
        return torch.cat(parts, 1)

    def _lidar(self, things_x: Tensor, things_y: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """16 bins (N, 16) that see things at (M, N) places; as in `kernels`."""
        x, y = things_x - self._state[k.X], things_y - self._state[k.Y]
        reach = self.task.lidar_range
        closeness = (reach - _length(x, y)).clamp(min=0.0) / reach
        ahead, left = eq.to_ego(x, y, sin, cos)
        angle = torch.atan2(left, ahead)
        angle = torch.where(angle < 0.0, angle + 2 * math.pi, angle)
        index = (angle / k.BIN).floor()
        share = (angle - k.BIN * index) / k.BIN
        # Integers first: a NaN becomes some integer, and that some bin.
        bins = torch.stack((index, index + 1.0, index - 1.0)).long().remainder(k.BINS)
        values = torch.stack((closeness, share * closeness, (1.0 - share) * closeness))
        out = self._zeros(self.num_envs, k.BINS)
        return out.scatter_reduce(1, bins.flatten(0, 1).T, values.flatten(0, 1).T, "amax")

    # --- new goals --------------------------------------------------------------------------------

    def _place_goals(self, met: Tensor) -> Tensor:
        """Put new goals where `met` (N,), the robots' places becoming part of the layout.

        Returns (N,) bool, whose goal found no place in 10,000 tries: never any where the host must not wait.
        """
        places, nowhere = self._places, torch.zeros_like(met)
        if self._waits:
            rows = met.nonzero()[:, 0]
            if len(rows) == 0:
                return nowhere
            places[:, 0, rows] = self._state[: k.Y + 1, rows]
            x, y, used, found = self._search(self._words[rows], self._cursor[rows], places[:, :, rows])
            placed = rows[found]
            places[0, 1, placed], places[1, 1, placed] = x[found], y[found]
            self._cursor[placed] += 4 * used[found]
            for row in rows[~found].tolist():
                nowhere[row] = not self._place_goal_on_host(row)
            return nowhere
        x, y, used, _ = self._search(self._words, self._cursor, torch.where(met, self._with_robots(), places))
        places[:, 0] = torch.where(met, self._state[: k.Y + 1], places[:, 0])
        places[0, 1] = torch.where(met, x, places[0, 1])
        places[1, 1] = torch.where(met, y, places[1, 1])
        self._cursor += 4 * torch.where(met, used, 0)
        return nowhere

    def _with_robots(self) -> Tensor:
        """The places (2, things, N) with the robots where they are now."""
        return torch.cat((self._state[: k.Y + 1, None], self._places[:, 1:]), 1)

    def _search(self, words: Tensor, cursor: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first free place for a goal among the next candidates.

        Args:
            words: the twisters' windows (M, W); cursor: where in them to begin (M,).
            places: of all things (2, things, M); the goal's own does not count.

        Returns:
            x, y, the number of candidates tried and whether one was free, each (M,). Where none was free, the
            last candidate that lies in the window.
        """
        (xmin, ymin, xmax, ymax), chunk = self._bounds[1].tolist(), self._chunk
        others = places[:, self._others].permute(0, 2, 1)[..., None]  # (2, M, things - 1, 1)
        x = y = torch.zeros_like(cursor, dtype=torch.float64)
        used = torch.zeros_like(cursor)
        found = torch.zeros_like(cursor, dtype=torch.bool)
        for start in range(0, _CANDIDATES, chunk):
            if self._waits and bool(found.all()):
                break
            number = min(chunk, _CANDIDATES - start)
            index = cursor[:, None] + (4 * start + self._ahead[: 4 * number])
            inside = index[:, 3::4] < _WINDOW
            uniform = _doubles(words.gather(1, index.clamp(max=_WINDOW - 1)))
            xs = xmin + (xmax - xmin) * uniform[:, 0::2]
            ys = ymin + (ymax - ymin) * uniform[:, 1::2]
            dx, dy = xs[:, None] - others[0], ys[:, None] - others[1]
            free = ~(_length(dx, dy) < self._clearances).any(1) & inside
            tries = self._tries[:number]
            first = torch.where(free, tries, number).amin(1)
            hit = first < number
            last = inside.sum(1)
            pick = torch.where(hit, first, (last - 1).clamp(min=0))[:, None]
            take = ~found & (last > 0)
            x = torch.where(take, xs.gather(1, pick)[:, 0], x)
            y = torch.where(take, ys.gather(1, pick)[:, 0], y)
            used = torch.where(take, used + pick[:, 0] + 1, used)
            found = found | hit
        return x, y, used, found

    def _place_goal_on_host(self, row: int) -> bool:
        """Draw a goal one by one, as the original does; False when 10,000 tries fail."""
        self._shift()
        key = self._words[row, :_BLOCK].cpu().numpy().view(np.uint32).copy()
        cursor = self._cursor[row : row + 1].cpu().numpy().copy()
        places = self._places[:, :, row].T.cpu().numpy().copy()
        placed = bool(k.place_goal(key, cursor, 0, places, self._bounds, self._keepouts))
        self._set_words(torch.tensor([row], device=self.torch_device), key[None])
        self._cursor[row] = int(cursor[0])
        self._places[:, :, row] = torch.tensor(places.T, device=self.torch_device)
        return placed

    # --- Mersenne twisters ------------------------------------------------------------------------

    def _set_words(self, rows: Any, keys: np.ndarray) -> None:
        """Fill the windows of some rows from their current blocks (M, 624) uint32."""
        blocks = [torch.tensor(keys.view(np.int32), device=self.torch_device)]
        while len(blocks) * _BLOCK < _WINDOW:
            blocks.append(_next_block(blocks[-1]))
        self._words[rows] = torch.cat(blocks, 1)

    def _shift(self) -> None:
        """Move windows on until their cursors are in the first block, at its end at most."""
        self._since_shift = 0
        for _ in range(_WINDOW // _BLOCK - 1):
            past = self._cursor > _BLOCK
            if self._waits:
                rows = past.nonzero()[:, 0]
                if len(rows) == 0:
                    return
                words = self._words[rows]
                self._words[rows] = torch.cat((words[:, _BLOCK:], _next_block(words[:, -_BLOCK:])), 1)
            else:
                words = self._words
                moved = torch.cat((words[:, _BLOCK:], _next_block(words[:, -_BLOCK:])), 1)
                self._words = torch.where(past[:, None], moved, words)
            self._cursor = torch.where(past, self._cursor - _BLOCK, self._cursor)

    # --- new episodes -----------------------------------------------------------------------------

    def _restart(self, mask: np.ndarray, obs: Tensor, seeds: Mapping[int, int]) -> None:
        """Start episodes where `mask` (N,), by the compiled engine on the host, and fill their `obs`.

        `seeds` restarts the random numbers of some of these rows.
        """
        rows = np.flatnonzero(mask)
        if len(rows) == 0:
            return
        self._shift()
        task, number, things = self.task, len(rows), len(self.task.things)
        index = torch.tensor(rows, device=self.torch_device)
        keys = self._words[index, :_BLOCK].cpu().numpy().view(np.uint32).copy()
        cursor = self._cursor[index].cpu().numpy().copy()
        for at, row in enumerate(rows.tolist()):
            if row in seeds:
                k.seed_row(keys[at], seeds[row])
                cursor[at] = _BLOCK
        state, places = np.zeros((number, k.STATE)), np.zeros((number, things, 2))
        rotations, steps = np.zeros((number, things)), np.zeros(number, np.int64)
        started, seen = np.ones(number, bool), np.zeros((number, task.observation_size))
        kind = k.KINDS[task.kind]
        stuck = k.reset_rows(
            0, number, started, kind, self._bounds, self._keepouts, state, places, rotations,
            keys, cursor, steps,
        )  # fmt: skip
        if stuck >= 0:
            raise SaferlError(f"no layout was found for environment {rows[stuck]} in 10000 tries")
        k.observe_rows(
            0, number, started, kind, task.hazards, task.vase, task.lidar_range, state, places, seen
        )

        def send(array: np.ndarray) -> Tensor:
            return torch.tensor(array, device=self.torch_device)

        self._state[:, index] = send(state.T)
        self._places[:, :, index] = send(places.transpose(2, 1, 0))
        self._rotations[:, index] = send(rotations.T)
        self._set_words(index, keys)
        self._cursor[index] = send(cursor)
        self._steps[index] = 0
        self._counted[rows] = 0
        obs[index] = send(seen)


def _length(x: Tensor, y: Tensor) -> Tensor:
    """sqrt(x^2 + y^2), rounded as in the compiled engine; `torch.hypot` rounds otherwise."""
    return (x * x + y * y).sqrt()


def _next_block(key: Tensor) -> Tensor:
    """The 624 words (M, 624) int32 that follow a block of MT19937.

    Word i needs word i + 397 modulo 624 of the same block once that is made: three stretches do.
    """
    following = key.roll(-1, 1)
    mixed = (key & -(2**31)) | (following & (2**31 - 1))
    # int32 shifts drag the sign along: mask it. 0x9908B0DF is the constant, as a signed number.
    twist = ((mixed >> 1) & (2**31 - 1)) ^ (-(mixed & 1) & (0x9908B0DF - 2**32))
    first = key[:, 397:] ^ twist[:, :227]
    second = first ^ twist[:, 227:454]
    third = second[:, :169] ^ twist[:, 454:623]
    # The last word mixes its high bit with the new block's first word.
    mixed = (key[:, 623:] & -(2**31)) | (first[:, :1] & (2**31 - 1))
    twist = ((mixed >> 1) & (2**31 - 1)) ^ (-(mixed & 1) & (0x9908B0DF - 2**32))
    return torch.cat((first, second, third, second[:, 169:170] ^ twist), 1)


def _doubles(words: Tensor) -> Tensor:
    """NumPy's doubles in [0, 1) from pairs of raw words (M, 2 L) int32: (M, L)."""
    y = words ^ ((words >> 11) & (2**21 - 1))
    y = y ^ ((y << 7) & (0x9D2C5680 - 2**32))
    y = y ^ ((y << 15) & (0xEFC60000 - 2**32))
    y = y ^ ((y >> 18) & (2**14 - 1))
    high = ((y[:, 0::2] >> 5) & (2**27 - 1)).double()
    low = ((y[:, 1::2] >> 6) & (2**26 - 1)).double()
    return (high * 67108864.0 + low) / 9007199254740992.0
