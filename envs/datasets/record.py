"""Recording episodes of a policy as a data set, many environments at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from saferl.envs.datasets.transitions import OfflineDataset
from saferl.errors import DatasetError, UsageError
from saferl.policies.protocol import Stateful

__all__ = ["RandomPolicy", "record"]


class Acts(Protocol):
    """Whatever maps batched observations to batched actions."""

    def act(self, obs: Any, *, deterministic: bool = False) -> Any: ...


class RandomPolicy:
    """Uniform actions in a bounded box. Raises UsageError for another space."""

    def __init__(self, space: spaces.Space[Any], seed: int = 0) -> None:
        if not isinstance(space, spaces.Box) or not space.is_bounded():
            raise UsageError(f"uniform actions need a bounded box, not {space}.")
        self._space, self._rng = space, np.random.default_rng(seed)

    def act(self, obs: Any, *, deterministic: bool = False) -> np.ndarray:
        """Actions (N, *shape); there is no mode."""
        shape = (len(obs), *self._space.shape)
        return self._rng.uniform(self._space.low, self._space.high, shape).astype(self._space.dtype)


def record(
    policy: Acts,
    env: VectorEnv[Any, Any, Any],
    episodes: int,
    *,
    seed: int = 0,
    deterministic: bool = False,
    report: Callable[[int], None] | None = None,
    columns: dict[str, np.ndarray] | None = None,
) -> OfflineDataset:
    """Run `episodes` episodes and return all their transitions, episode after episode.

    Every environment contributes a fixed share of the episodes, its first ones, so that short episodes are
    not over-represented; the order is by environment, then by time. What is recorded is the action that the
    policy chose, before any clipping by the environment.

    Args:
        policy: acts on batched observations; one that is `Stateful` is told what comes of its actions.
        env: a vector environment in SAME_STEP autoreset mode, with Box observations and actions and the
            cost in `info["cost"]`.
        episodes: episodes in all.
        seed: environment i is seeded with seed + i.
        deterministic: act by the mode of the policy instead of a sample.
        report: called with the number of finished episodes.
        columns: filled with what the environment gives in `info["rewards"]`, other rewards of the same
            transitions by name, each (transitions,).

    Raises:
        UsageError: the observations or actions are no boxes, or no episode is asked for.
        DatasetError: a recorded value is not finite.
    """
    for what, space in (("observations", env.single_observation_space), ("actions", env.single_action_space)):
        if not isinstance(space, spaces.Box):
            raise UsageError(f"the data sets' {what} are arrays; this environment's are {space}.")
    if episodes < 1:
        raise UsageError(f"the number of episodes is {episodes}; ask for at least one.")
    n = env.num_envs
    share = np.full(n, episodes // n)
    share[: episodes % n] += 1
    counts, lengths = np.zeros(n, np.int64), np.zeros(n, np.int64)
    steps: list[tuple[np.ndarray, ...]] = []
    others: dict[str, list[np.ndarray]] = {}
    observations, _ = env.reset(seed=seed)
    memory = policy if isinstance(policy, Stateful) else None
    if memory is not None:
        memory.begin(n)
    while (counts < share).any():
        actions = np.asarray(policy.act(observations, deterministic=deterministic))
        following, reward, terminated, truncated, info = env.step(actions)
        terminated, truncated = np.asarray(terminated), np.asarray(truncated)
        ended = terminated | truncated
        if memory is not None:
            memory.observe(reward, info["cost"], ended)
        last = np.where(ended[:, None], info["final_obs"], following) if ended.any() else following
        # An episode that ends in both ways at once was ended by the environment.
        parts = (observations, last, actions, reward, info["cost"], terminated, truncated & ~terminated)
        steps.append(tuple(np.array(part) for part in parts))
        if columns is not None:
            for name, value in info.get("rewards", {}).items():
                others.setdefault(name, []).append(np.array(value))
        lengths += counts < share
        counts += ended
        observations = following
        if ended.any() and report is not None:
            report(int(np.minimum(counts, share).sum()))
    keys = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")
    arrays: dict[str, Any] = {}
    for name, values in others.items():
        table = np.stack(values, axis=1)
        rows = [row[:length] for row, length in zip(table, lengths, strict=True)]
        assert columns is not None
        columns[name] = np.concatenate(rows)
    for key, column in zip(keys, zip(*steps, strict=True), strict=True):
        table = np.stack(column, axis=1)  # (N, T, ...)
        arrays[key] = np.concatenate([row[:length] for row, length in zip(table, lengths, strict=True)])
    for key in ("observations", "next_observations", "actions"):
        arrays[key] = arrays[key].reshape(len(arrays[key]), -1)
    data = OfflineDataset(**arrays, source="the recording")
    try:
        data.check_values()
    except DatasetError as error:
        raise DatasetError(f"the recording cannot be kept: {error}") from error
    return data
