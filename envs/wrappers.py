"""Wrappers that keep an account of every episode's cost: `Saute` shows it to the policy, `EarlyTermination`
ends the episode.

Both wrap vector environments of the contract in `saferl.envs.vector` (SAME_STEP autoreset), any number of
environments and any number of limits. `info["cost"]` and `info["costs"]` stay as they are and
`info["unwrapped_reward"]` (N,) holds the reward before the wrapper changed it. An environment that works with
torch tensors on a device (attribute `torch_device`) is wrapped without a copy to the host; one whose state
can be stored (`get_state`, `set_state`) stays so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from saferl.constraints.budget import CostBudget
from saferl.envs.vector import cost_names_of
from saferl.errors import UsageError, unknown_name

__all__ = ["BUDGET", "EarlyTermination", "Saute"]

#: Key of the budgets in the observations of an environment with Dict observations.
BUDGET = "budget"

#: NumPy arrays, or torch tensors where the environment works with those.
Array: TypeAlias = Any


class _CostAccount(VectorWrapper[Any, Any, Any, Any, Any]):
    """One number an environment and limit, kept over an episode."""

    def __init__(self, env: VectorEnv, limits: Mapping[str, float], start: Mapping[str, float]) -> None:
        super().__init__(env)
        known = {"cost", *cost_names_of(env)}
        for name in limits:
            if name not in known:
                raise unknown_name("cost", name, known)
        self.limits = dict(limits)
        #: What the next episodes start with, by name of the limit.
        self.start = dict(start)
        self.torch_device = getattr(env, "torch_device", None)
        self._arrays: Any = np
        if self.torch_device is not None:
            import torch

            self._arrays = torch
        self._account = {name: self._vector(np.full(self.num_envs, self.start[name])) for name in limits}
        if hasattr(env, "get_state") and hasattr(env, "set_state"):
            self.get_state, self.set_state = self._get_state, self._set_state

    def _vector(self, values: Any) -> Array:
        """Numbers (N,) as float64 of the environment's own kind."""
        if self.torch_device is None:
            return np.array(values, np.float64)
        return self._arrays.tensor(values, dtype=self._arrays.float64, device=self.torch_device)

    def _restart(self, ended: Array) -> None:
        if self.torch_device is not None:
            ended = self._arrays.as_tensor(ended, device=self.torch_device)
        self._account = {
            name: self._arrays.where(ended, self.start[name], kept) for name, kept in self._account.items()
        }

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes (all, or those in `options["reset_mask"]`) and their accounts."""
        obs, info = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # ours take lists
        mask = None if options is None else options.get("reset_mask")
        if mask is None:
            self._account = {
                name: self._vector(np.full(self.num_envs, self.start[name])) for name in self._account
            }
        else:
            self._restart(mask)
        return obs, info

    def _cost(self, info: Mapping[str, Any], name: str) -> Array:
        return info["cost"] if name == "cost" else info["costs"][name]

    def _get_state(self) -> dict[str, Any]:
        """The wrapped environment's state and the accounts."""
        return {
            "env": self.env.get_state(),  # type: ignore[attr-defined]
            "account": {name: self._copy(values) for name, values in self._account.items()},
            "start": dict(self.start),
        }

    def _set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`'s result."""
        if set(state["account"]) != set(self._account):
            raise UsageError(
                f"the stored accounts are of the costs {sorted(state['account'])}, these limits of "
                f"{sorted(self._account)}; use the same names"
            )
        self.env.set_state(state["env"])  # type: ignore[attr-defined]
        self._account = {name: self._copy(state["account"][name]) for name in self._account}
        self.start = {name: float(value) for name, value in state["start"].items()}

    def _copy(self, values: Any) -> Array:
        if self.torch_device is None:
            return np.asarray(values, np.float64).copy()
        copied = self._arrays.as_tensor(values, dtype=self._arrays.float64, device=self.torch_device)
        return copied.clone()


class Saute(_CostAccount):
    """Show the policy what is left of every cost budget, and pay no reward once one is spent.

        z <- (z - c / D) / discount,    D = discounted_limit(limit, discount, horizon)
        reward = r where every z > 0 after the step, else unsafe_reward

    z starts every episode at `start`, 1 being the whole limit. A policy that sees z can keep the limit in
    every single episode (Sootla et al. 2022, "Sauté RL: Almost Surely Safe Reinforcement Learning Using State
    Augmentation"; see `saferl.constraints.CostBudget`). `start` may be moved between steps, as Simmer does
    (Sootla et al. 2022, "Enhancing Safe Exploration Using Safety State Augmentation"); episodes that begin
    afterwards use it. The final observation of an episode shows what was left at its end.

    Observations: K budgets, one a limit in their order, are appended to those of a flat Box; a Dict gets them
    under "budget"; a Tuple as its last element; anything else becomes the first of a Tuple of two.

    Args:
        env: the vector environment.
        limits: allowed undiscounted episode cost by name, positive; "cost" is the total.
        discount: the safety discount.
        horizon: steps of an episode; taken from `env.spec` when None. Not used when the discount is 1.
        unsafe_reward: reward of a step after which a budget is spent.
        start: share of the limits that an episode starts with.

    Raises:
        UsageError: a value or cost name is impossible, or the horizon is not known.
    """

    def __init__(
        self,
        env: VectorEnv,
        limits: Mapping[str, float],
        *,
        discount: float = 0.999,
        horizon: int | None = None,
        unsafe_reward: float = -1.0,
        start: float = 1.0,
    ) -> None:
        if not 0 < start <= 1:
            raise UsageError(f"the start budget is {start:g} of the limit; it must be more than 0, at most 1")
        if horizon is None:
            horizon = getattr(env.spec, "max_episode_steps", None)
        if horizon is None and discount < 1:
            raise UsageError(
                "the environment does not say how long its episodes are, which a discounted cost budget must "
                "know; give the horizon, or use a safety discount of 1"
            )
        self.budgets = {name: CostBudget(limit, discount, horizon or 1) for name, limit in limits.items()}
        super().__init__(env, limits, dict.fromkeys(limits, start))
        self.unsafe_reward = float(unsafe_reward)
        inner = env.single_observation_space
        left = spaces.Box(-np.inf, np.inf, (len(self.limits),), np.float32)
        self._flat = isinstance(inner, spaces.Box) and len(inner.shape) == 1
        if isinstance(inner, spaces.Box) and self._flat:
            dtype = inner.dtype if np.issubdtype(inner.dtype, np.floating) else np.dtype(np.float32)
            low, high = (
                np.concatenate([np.asarray(a, dtype), np.asarray(b, dtype)])
                for a, b in ((inner.low, left.low), (inner.high, left.high))
            )
            self.single_observation_space = spaces.Box(low, high, dtype=dtype.type)
        elif isinstance(inner, spaces.Dict):
            if BUDGET in inner.spaces:
                raise UsageError(f"the observations already have an entry {BUDGET!r}; rename it")
            self.single_observation_space = spaces.Dict([*inner.spaces.items(), (BUDGET, left)])
        elif isinstance(inner, spaces.Tuple):
            self.single_observation_space = spaces.Tuple((*inner.spaces, left))
        else:
            self.single_observation_space = spaces.Tuple((inner, left))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    @property
    def left(self) -> dict[str, Array]:
        """The budgets z (N,) of the episodes in progress, by name of the limit."""
        return self._account

    def _augment(self, obs: Any) -> Any:
        left = self._arrays.stack(list(self._account.values()), 1)
        if self._flat:
            if self.torch_device is None:
                dtype = self.single_observation_space.dtype
                return np.concatenate([obs, left], 1, dtype=dtype, casting="same_kind")
            dtype = obs.dtype if obs.is_floating_point() else self._arrays.float32
            return self._arrays.cat([obs.to(dtype), left.to(dtype)], 1)
        left = left.astype(np.float32) if self.torch_device is None else left.float()
        if isinstance(obs, dict):
            return {**obs, BUDGET: left}
        return (*obs, left) if isinstance(obs, tuple) else (obs, left)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes (all, or those in `options["reset_mask"]`) with full budgets."""
        obs, info = super().reset(seed=seed, options=options)
        return self._augment(obs), info

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """Take a step and spend its costs."""
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        info = {**info, "unwrapped_reward": info.get("unwrapped_reward", rewards)}
        for name, budget in self.budgets.items():
            left = budget.spend(self._account[name], self._cost(info, name))
            self._account[name] = left
            rewards = budget.reward(rewards, left, self.unsafe_reward)
        if "final_obs" in info:
            info["final_obs"] = self._augment(info["final_obs"])
            self._restart(terminated | truncated)
        return self._augment(obs), rewards, terminated, truncated, info


class EarlyTermination(_CostAccount):
    """End an episode when its cost exceeds a limit: terminated, with reward 0 and no value beyond.

    Only the environments concerned are reset, by `reset(options={"reset_mask": ...})`. A step that exceeds
    the limit where the episode ends anyway counts as terminated, not truncated. The costs are counted anew
    from every end of an episode, whatever its reason.

    Args:
        env: the vector environment.
        limits: episode cost by name that must not be exceeded; "cost" is the total.

    Raises:
        UsageError: a cost name does not exist.
    """

    def __init__(self, env: VectorEnv, limits: Mapping[str, float]) -> None:
        super().__init__(env, limits, dict.fromkeys(limits, 0.0))

    @property
    def spent(self) -> dict[str, Array]:
        """The costs (N,) of the episodes in progress, by name of the limit."""
        return self._account

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """Take a step and restart the environments whose episode ended or whose cost is too high."""
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        info = {**info, "unwrapped_reward": info.get("unwrapped_reward", rewards)}
        ended = terminated | truncated
        exceeded = self._arrays.zeros_like(ended)
        for name, limit in self.limits.items():
            self._account[name] = self._account[name] + self._cost(info, name)
            exceeded = exceeded | (self._account[name] > limit)
        if bool(exceeded.any()):
            cut = exceeded & ~ended
            rewards = self._arrays.where(exceeded, 0.0, rewards)
            terminated, truncated, ended = terminated | exceeded, truncated & ~exceeded, ended | exceeded
            # Rows whose episode goes on equal the observations: those to be cut hold their last ones.
            info["final_obs"], info["_final_obs"] = info.get("final_obs", obs), ended
            if bool(cut.any()):
                obs, _ = self.env.reset(options={"reset_mask": cut})
        self._restart(ended)
        return obs, rewards, terminated, truncated, info
