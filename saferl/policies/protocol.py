"""What everything that evaluates, certifies or attacks asks of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike

from saferl.errors import UsageError


@runtime_checkable
class Policy(Protocol):
    """A batched map from observations to actions."""

    @property
    def observation_space(self) -> spaces.Space[Any] | None:
        """Space of one observation, or None where the file does not say (TorchScript)."""
        ...

    @property
    def action_space(self) -> spaces.Space[Any] | None:
        """Space of one action, or None where the file does not say."""
        ...

    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Choose an action for each environment.

        Args:
            obs: observations with a leading axis of environments: an array or tensor of shape (N, ...),
                or a mapping from names to such arrays for a Dict space.
            deterministic: take the mode of the action distribution instead of a sample.

        Returns:
            Actions of shape (N, *action_space.shape) in the environment's own scale: a NumPy array for
            NumPy observations; for torch observations a tensor on the policy's device, without gradient.
        """
        ...


@runtime_checkable
class Stateful(Protocol):
    """What a policy has besides `act` when its actions depend on the steps before.

    Whoever steps environments with it calls `begin` after a reset of all of them and `observe` after every
    step, before the next `act`. An environment that ended is in a fresh episode from then on.
    """

    def begin(self, num_envs: int) -> None:
        """Forget everything: each of `num_envs` environments is at the start of an episode."""
        ...

    def observe(self, rewards: ArrayLike, costs: ArrayLike, ended: ArrayLike) -> None:
        """Take in what the actions of the last `act` led to.

        Args:
            rewards: (N,), of the step.
            costs: (N,), of the step.
            ended: (N,), whether the episode was over with it, in either way.
        """
        ...


def is_torch(obs: Any) -> bool:
    """Whether a batch of observations, possibly nested in mappings, consists of torch tensors."""
    if isinstance(obs, Mapping):
        return any(is_torch(value) for value in obs.values())
    return isinstance(obs, torch.Tensor)


def to_numpy(obs: Any) -> Any:
    """Copy a batch of observations to NumPy, leaf by leaf; NumPy leaves pass unchanged."""
    if isinstance(obs, Mapping):
        return {key: to_numpy(value) for key, value in obs.items()}
    if isinstance(obs, torch.Tensor):
        return obs.detach().cpu().numpy()
    return np.asarray(obs)


def check_batch(obs: Any, space: spaces.Space[Any]) -> None:
    """Raise UsageError unless NumPy observations have a leading axis and the members of `space`."""
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, Mapping) or set(obs) != set(space.spaces):
            got = f"keys {sorted(obs)}" if isinstance(obs, Mapping) else f"a {type(obs).__name__}"
            raise UsageError(f"the policy needs observations with keys {sorted(space.spaces)}, got {got}.")
        for key, sub in space.spaces.items():
            check_batch(obs[key], sub)
        return
    if isinstance(obs, Mapping):
        raise UsageError("the policy needs one array of observations, got a mapping.")
    shape = tuple(space.shape or ())
    if np.ndim(obs) != len(shape) + 1:
        raise UsageError(
            f"the policy acts on batches of shape (N, {', '.join(map(str, shape))}), got {np.shape(obs)}; "
            "add a leading axis for one observation."
        )
