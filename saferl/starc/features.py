"""Transitions, and features of their states and actions, for `saferl.starc.sampled`."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saferl.errors import UsageError
from saferl.starc.tabular import Floats

__all__ = ["Basis", "Features", "Transitions"]


@dataclass(frozen=True)
class Transitions:
    """N steps of episodes.

    Args:
        observations: s (N, S).
        actions: a (N, A), or integers (N,).
        next_observations: s' (N, S).
        terminations: true ends (N,), after which nothing counts; truncation is none. None: none.
        episodes: an id for each step (N,), whose steps are resampled together. None: each step for itself.

    Raises:
        UsageError: shapes do not fit, a number is not finite, or there are too few steps to say anything.
    """

    observations: NDArray[Any]
    actions: NDArray[Any]
    next_observations: NDArray[Any]
    terminations: NDArray[np.bool_] | None = None
    episodes: NDArray[np.integer[Any]] | None = None

    def __post_init__(self) -> None:
        count = len(self.observations)
        for name in ("observations", "actions", "next_observations"):
            array = np.asarray(getattr(self, name))
            if len(array) != count:
                raise UsageError(f"there are {count:,} observations but {len(array):,} {name}.")
            if not np.isfinite(array).all():
                row = int(np.flatnonzero(~np.isfinite(array.reshape(count, -1)).all(axis=1))[0])
                raise UsageError(f"the {name} of transition {row:,} hold a number that is not finite.")
            if np.issubdtype(array.dtype, np.floating) or name != "actions":
                array = array.reshape(count, -1)
            object.__setattr__(self, name, array)
        if self.observations.shape != self.next_observations.shape:
            raise UsageError(
                f"observations have shape {self.observations.shape} and next observations "
                f"{self.next_observations.shape}; they must agree."
            )
        done = np.zeros(count, bool) if self.terminations is None else np.asarray(self.terminations, bool)
        object.__setattr__(self, "terminations", done)
        ids = np.arange(count) if self.episodes is None else np.asarray(self.episodes)
        object.__setattr__(self, "episodes", ids)
        for name, array in (("terminations", done), ("episodes", ids)):
            if array.shape != (count,):
                raise UsageError(f"the {name} have shape {array.shape}; they must be ({count},).")
        if count < 100:
            raise UsageError(f"{count} transitions are too few to compare rewards; give at least 100.")

    def __len__(self) -> int:
        return len(self.observations)


@dataclass(frozen=True)
class Features:
    """What potentials and advantages are made of.

    Args:
        random: random ridge features tanh(w . z + b) of states, and as many of states and actions.
        network: width of the last layer of a network that learns the rewards' values first; 0 for none.
        network_steps: its gradient steps.
        seed: of the random features and the network.
    """

    random: int = 128
    network: int = 0
    network_steps: int = 2_000
    seed: int = 0


class Basis:
    """psi(s) and chi(s, a) of chunks of transitions, on standardised inputs."""

    def __init__(
        self, data: Transitions, features: Features, rewards: Floats, discount: float, device: torch.device
    ) -> None:
        self.device = device
        self.actions_are_indices = not np.issubdtype(data.actions.dtype, np.floating)
        if self.actions_are_indices:
            self._kinds = int(data.actions.max()) + 1
            if data.actions.min() < 0 or self._kinds > 1_000:
                raise UsageError("integer actions must count from 0 and be fewer than 1,000.")
            size = self._kinds
        else:
            size = data.actions.shape[1]
        sample = np.random.default_rng(features.seed).permutation(len(data))[:100_000]
        states = torch.as_tensor(data.observations[sample], dtype=torch.float64, device=device)
        self._mean = states.mean(0)
        spread = states.std(0)
        self._scale = torch.where(spread > 1e-8, spread, torch.inf)
        moves = self._raw_actions(data.actions[sample])
        self.action_mean = moves.mean(0)
        action_spread = moves.std(0)
        self._action_scale = torch.where(action_spread > 1e-8, action_spread, torch.inf)
        generator = torch.Generator().manual_seed(features.seed)
        dimension = states.shape[1]
        self._quadratic = dimension <= 24
        self._state_weights = self._draw(dimension, features.random, generator)
        self._pair_weights = self._draw(dimension + size, features.random, generator)
        self._network: nn.Module | None = None
        if features.network:
            self._network = _learn_values(self, data, rewards, discount, features)

    def _draw(self, inputs: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # Ridges of different steepness: half of them slow over the data, half several times faster.
        weights = torch.randn(inputs, count, generator=generator, dtype=torch.float64) / math.sqrt(inputs)
        weights = weights * torch.where(torch.arange(count) % 2 == 0, 1.0, 3.0)
        shifts = 2 * torch.randn(count, generator=generator, dtype=torch.float64)
        return weights.to(self.device), shifts.to(self.device)

    def _raw_actions(self, actions: NDArray[Any]) -> Tensor:
        chosen = torch.as_tensor(actions, device=self.device)
        if self.actions_are_indices:
            return nn.functional.one_hot(chosen.long(), self._kinds).double()
        return chosen.double()

    def standard(self, observations: NDArray[Any]) -> Tensor:
        """Standardised states (n, S); a constant entry is 0."""
        states = torch.as_tensor(observations, dtype=torch.float64, device=self.device)
        return (states - self._mean) / self._scale

    def psi(self, observations: NDArray[Any]) -> Tensor:
        """Features (n, F) of states: 1, z, squares (products where the state is small), ridges, network."""
        return self._state_features(self.standard(observations))

    def _state_features(self, z: Tensor) -> Tensor:
        weights, shifts = self._state_weights
        parts = [torch.ones(len(z), 1, dtype=z.dtype, device=z.device), z, *self._squares(z)]
        parts.append(torch.tanh(z @ weights + shifts))
        if self._network is not None:
            with torch.no_grad():
                parts.append(self._network(z.float()).double())
        return torch.cat(parts, dim=1)

    def _squares(self, z: Tensor) -> list[Tensor]:
        if not self._quadratic:
            return [z.square()]
        rows, columns = torch.triu_indices(z.shape[1], z.shape[1], device=z.device)
        return [z[:, rows] * z[:, columns]]

    def both(self, observations: NDArray[Any], actions: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """psi (n, F) and chi (n, G): psi, actions, their products with states and actions, ridges of both."""
        z = self.standard(observations)
        psi = self._state_features(z)
        u = (self._raw_actions(actions) - self.action_mean) / self._action_scale
        products = (z[:, :, None] * u[:, None, :]).flatten(1)
        weights, shifts = self._pair_weights
        ridges = torch.tanh(torch.cat([z, u], dim=1) @ weights + shifts)
        parts = [psi, u, products, ridges]
        if not self.actions_are_indices:
            rows, columns = torch.triu_indices(u.shape[1], u.shape[1], device=u.device)
            parts.append(u[:, rows] * u[:, columns])
        return psi, torch.cat(parts, dim=1)


def _learn_values(
    basis: Basis, data: Transitions, rewards: Floats, discount: float, features: Features
) -> nn.Module:
    """The hidden layers of one network that learns the values of all rewards by temporal differences."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(features.seed)
        inputs, width = data.observations.shape[1], features.network
        trunk = nn.Sequential(nn.Linear(inputs, 2 * width), nn.Tanh(), nn.Linear(2 * width, width), nn.Tanh())
        head = nn.Linear(width, rewards.shape[1])
    trunk, head = trunk.to(basis.device), head.to(basis.device)
    slow = copy.deepcopy(nn.Sequential(trunk, head)).requires_grad_(False)
    spread = rewards.std(axis=0)
    targets = torch.as_tensor(rewards / np.where(spread > 0, spread, 1) * (1 - discount))
    optimizer = torch.optim.Adam([*trunk.parameters(), *head.parameters()], lr=1e-3)
    rng = np.random.default_rng(features.seed)
    assert data.terminations is not None
    for step in range(features.network_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / features.network_steps)
        rows = rng.integers(0, len(data), 512)
        now = basis.standard(data.observations[rows]).float()
        after = basis.standard(data.next_observations[rows]).float()
        going = torch.as_tensor(~data.terminations[rows], device=basis.device)[:, None]
        with torch.no_grad():
            aims = targets[rows].to(now) + discount * going * slow(after)
        loss = (head(trunk(now)) - aims).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(slow.parameters(), [*trunk.parameters(), *head.parameters()], strict=True):
                old.lerp_(new, 0.02)
    return trunk.requires_grad_(False).eval()
