"""Acting on the host without torch's cost of a call: for small batches that is most of the time.

A step of twenty environments is a dozen operations on a few hundred numbers; each costs torch ten times what
it costs NumPy. The arrays here are views of the actor's own parameters and buffers, so nothing is copied and
whatever trains the actor is seen at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from torch import nn

from saferl.nn.distributions import GaussianActions
from saferl.nn.models import Actor

__all__ = ["HostActor"]


class HostActor:
    """The arithmetic of an `Actor` in NumPy, for sampling actions while training on the host.

    Use `HostActor.of`, which says whether it can stand for an actor.
    """

    def __init__(self, actor: Actor) -> None:
        assert isinstance(actor.distribution, GaussianActions)
        self.normaliser = actor.normaliser
        if self.normaliser is not None:
            self._mean, self._variance = self.normaliser.mean.numpy(), self.normaliser.variance.numpy()
        layers = [module for module in actor.network if isinstance(module, nn.Linear)]
        self._layers = [(x.weight.detach().numpy().T, x.bias.detach().numpy()) for x in layers]
        self._log_std = actor.distribution.log_std.detach().numpy()
        offset, scale, low, high = (
            actor.distribution.get_buffer(name).numpy() for name in ("_offset", "_scale", "low", "high")
        )
        self._offset, self._scale, self._low, self._high = offset, scale, low, high
        self._shape = actor.distribution.shape

    @classmethod
    def of(cls, actor: Actor) -> HostActor | None:
        """A stand-in for `actor`, or None: it must be on the CPU, with Box spaces and tanh networks."""
        fits = (
            actor.device.type == "cpu"
            and isinstance(actor.observation_space, spaces.Box)
            and isinstance(actor.distribution, GaussianActions)
            and all(isinstance(module, nn.Linear | nn.Tanh) for module in actor.network)
        )
        return cls(actor) if fits else None

    def encode(self, observations: Any, *, update: bool = False) -> np.ndarray:
        """As `Actor.encode`: raw observations (B, ...) to normalised float32 features (B, D)."""
        x = np.asarray(observations)
        x = x.reshape(len(x), -1)
        if self.normaliser is None:
            plain: np.ndarray = x.astype(np.float32)
            return plain
        if update:
            self._update(x)
        deviation = np.maximum(np.sqrt(self._variance), self.normaliser.floor)
        y: np.ndarray = (x - self._mean) / deviation
        np.clip(y, -self.normaliser.clip, self.normaliser.clip, out=y)
        features: np.ndarray = y.astype(np.float32)
        return features

    def act(self, features: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sampled actions (B, A) and what `step` takes for them, from standard normal `noise` (B, A)."""
        x = features
        for i, (weights, biases) in enumerate(self._layers):
            x = x @ weights
            x += biases
            if i + 1 < len(self._layers):
                np.tanh(x, out=x)
        actions = x + np.exp(self._log_std) * noise
        command = actions * self._scale + self._offset
        np.clip(command, self._low, self._high, out=command)
        return actions, command.reshape(len(command), *self._shape)

    def _update(self, x: np.ndarray) -> None:
        """`RunningNormaliser.update` on the same buffers."""
        normaliser = self.normaliser
        assert normaliser is not None
        if not normaliser.training:
            return
        batch_mean = x.mean(0, dtype=np.float64)
        deviations = x - batch_mean
        batch_variance = np.einsum("ij,ij->j", deviations, deviations) / len(x)
        total = float(normaliser.count) + len(x)
        weight = len(x) / total
        delta = batch_mean - self._mean
        self._variance *= 1 - weight
        self._variance += weight * batch_variance + (weight * (1 - weight)) * delta * delta
        self._mean += weight * delta
        normaliser.count.fill_(total)
