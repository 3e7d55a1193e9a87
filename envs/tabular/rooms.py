"""Rooms: a key, a locked door and a goal on a grid, with captions of what happens and heuristic rewards.

    #############
    #S....#.....#        S start   K key   D door   G goal
    #.....#.....#        ~ humming tiles, which a misleading heuristic pays for
    #.~~..D...G.#
    #.~~..#.....#
    #....K#.....#
    #############

The agent moves in four directions; it passes the door once it has stepped on the key, and the episode ends at
the goal, with reward 1, or is cut after 100 steps. There is no chance in it, so that dynamics, rewards and
captions are tables over (state, action), a state being a free cell and whether the key was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from saferl.envs.vector import check_num_envs, split_reset_mask
from saferl.errors import UsageError

__all__ = ["CAPTIONS", "EPISODE_STEPS", "RoomsVectorEnv", "Tables", "tables"]

MAP = (
    "#############",
    "#S....#.....#",
    "#.....#.....#",
    "#.~~..D...G.#",
    "#.~~..#.....#",
    "#....K#.....#",
    "#############",
)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
EPISODE_STEPS = 100
CAPTIONS = (
    "You walk on.",
    "You bump into a wall.",
    "The tile hums.",
    "You find a key!",
    "The door is locked.",
    "You unlock the door and step through.",
    "You reach the goal!",
)
WALK, BUMP, HUM, KEY, LOCKED, DOOR, GOAL = range(len(CAPTIONS))


class Tables(NamedTuple):
    """The task over S states and A = 4 actions; the last state is the end, which nothing leaves."""

    successors: NDArray[np.intp]
    """s' (S, A)."""
    rewards: NDArray[np.float64]
    """1 for reaching the goal (S, A)."""
    captions: NDArray[np.intp]
    """Indices into `CAPTIONS` (S, A)."""
    helpful: NDArray[np.float64]
    """A heuristic that pays for what the task needs, the key and the door, once each (S, A)."""
    misleading: NDArray[np.float64]
    """A heuristic that pays for every step onto a humming tile (S, A)."""
    distances: NDArray[np.float64]
    """Steps to the goal on a shortest way (S,)."""
    start: int

    def transitions(self) -> NDArray[np.float64]:
        """T (S, A, S') for exact planning."""
        size = len(self.successors)
        return np.eye(size)[self.successors]


@cache
def tables() -> Tables:
    """The map as tables."""
    cells = [(r, c) for r, row in enumerate(MAP) for c, mark in enumerate(row) if mark not in "#G"]
    index = {cell: k for k, cell in enumerate(cells)}
    free, end = len(cells), 2 * len(cells)
    shape = (end + 1, len(MOVES))
    successors = np.full(shape, end)
    rewards, helpful, misleading = (np.zeros(shape) for _ in range(3))
    captions = np.full(shape, WALK)
    for has_key in (0, 1):
        for (row, column), k in index.items():
            state = k + has_key * free
            for action, (down, right) in enumerate(MOVES):
                target = (row + down, column + right)
                mark = MAP[target[0]][target[1]]
                caption, after = WALK, state
                if mark == "#":
                    caption = BUMP
                elif mark == "D" and not has_key:
                    caption = LOCKED
                elif mark == "G":
                    caption, after = GOAL, end
                else:
                    found = has_key or mark == "K"
                    after = index[target] + int(found) * free
                    if mark == "K" and not has_key:
                        caption = KEY
                    elif mark == "D":
                        caption = DOOR
                    elif mark == "~":
                        caption = HUM
                successors[state, action], captions[state, action] = after, caption
    rewards[captions == GOAL] = 1
    helpful[captions == KEY] = 0.5
    # Once: stepping back into the door's cell from the far room pays nothing.
    door = next(k for cell, k in index.items() if MAP[cell[0]][cell[1]] == "D") + free
    before = [index[cells[door - free][0], cells[door - free][1] - 1] + free]
    helpful[before[0], MOVES.index((0, 1))] = 0.5
    helpful[door, MOVES.index((0, -1))] = -0.5
    misleading[captions == HUM] = 0.2
    distances = np.full(end + 1, np.inf)
    distances[end] = 0
    for _ in range(end):
        distances[:end] = np.minimum(distances[:end], 1 + distances[successors[:end]].min(axis=1))
    start = next(k for cell, k in index.items() if MAP[cell[0]][cell[1]] == "S")
    return Tables(successors, rewards, captions, helpful, misleading, distances, start)


class RoomsVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N agents at once (for the contract, see `saferl.envs.vector`).

    Observation (N,): the state's index. Action (N,): up, down, left, right. `info["caption"]` (N,) is an
    index into `CAPTIONS`, `info["helpful"]` and `info["misleading"]` (N,) are the heuristics; `info["cost"]`
    is 1 for bumping into a wall.

    Args:
        num_envs: N.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # Gymnasium's declaration
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
        "cost_names": ("bumps",),
    }

    def __init__(self, num_envs: int = 1) -> None:
        self.num_envs = check_num_envs(num_envs)
        self._tables = tables()
        self.single_observation_space = spaces.Discrete(len(self._tables.successors))
        self.single_action_space = spaces.Discrete(len(MOVES))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._states = np.full(num_envs, self._tables.start)
        self._steps = np.zeros(num_envs, np.int64)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start anew in all environments, or in those that `options["reset_mask"]` (N,) selects."""
        mask, _ = split_reset_mask(options, self.num_envs)
        self._states[mask], self._steps[mask] = self._tables.start, 0
        return self._states.copy(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One move each with `actions` (N,). Raises UsageError for another shape or an unknown action."""
        chosen = np.asarray(actions)
        if chosen.shape != (self.num_envs,) or ((chosen < 0) | (chosen >= len(MOVES))).any():
            raise UsageError(f"the actions must be {self.num_envs} numbers from 0 to {len(MOVES) - 1}.")
        here, task = (self._states, chosen), self._tables
        self._states = task.successors[here]
        self._steps = self._steps + 1
        info: dict[str, Any] = {
            "caption": task.captions[here],
            "helpful": task.helpful[here],
            "misleading": task.misleading[here],
            "cost": (task.captions[here] == BUMP).astype(float),
        }
        info["costs"] = {"bumps": info["cost"]}
        terminations = self._states == len(task.successors) - 1
        truncations = ~terminations & (self._steps >= EPISODE_STEPS)
        rewards, obs = task.rewards[here], self._states.copy()
        ended = terminations | truncations
        if ended.any():
            info["final_obs"], info["_final_obs"] = obs, ended
            self._states = np.where(ended, task.start, self._states)
            self._steps = np.where(ended, 0, self._steps)
            obs = self._states.copy()
        return obs, rewards, terminations, truncations, info
