"""Behaviour cloning: what BC-All, BC-Safe and BC-Frontier share, which differ in the episodes they imitate.

    L = E |tanh(f(s)) - a|^2,    mean over the batch and the dimensions of the action

with a rectified network f and Adam. Sizes and rates are those of OSRL's code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saferl.agents.offline.engine import Batch, Context, OfflineConfig
from saferl.agents.online.engine import at_least
from saferl.errors import UsageError
from saferl.nn.flat import FlatParameters
from saferl.nn.models import Actor

__all__ = ["BehaviourCloning", "BehaviourConfig"]


@dataclass(frozen=True, kw_only=True)
class BehaviourConfig(OfflineConfig):
    """Hyperparameters of behaviour cloning; defaults are those of OSRL's published runs."""

    total_steps: int = 100_000
    """Gradient steps in all."""
    batch_size: int = 512
    """Transitions a gradient step."""
    lr: float = 1e-3
    """Adam's learning rate."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the policy network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("hidden sizes", min(self.hidden_sizes, default=1), 1)
        if not self.lr > 0:
            raise UsageError(f"the learning rate is {self.lr:g}; it must be positive.")


class BehaviourCloning:
    """A deterministic policy regressed on the recorded actions."""

    def __init__(self, config: BehaviourConfig, context: Context) -> None:
        self.policy = Actor(
            context.observation_space,
            context.action_space,
            hidden_sizes=config.hidden_sizes,
            activation="relu",
            normalise_observations=False,
            head="deterministic",
            exploration_noise=0.0,
        ).to(context.device)
        self._flat = FlatParameters(self.policy.parameters())
        self.optimizer = torch.optim.Adam([self._flat.values], lr=config.lr, fused=True)

    @property
    def networks(self) -> Actor:
        """All that is trained."""
        return self.policy

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the actions."""
        actions = self.policy.distribution.mode(self.policy.distribution_parameters(batch.observations))
        return (actions - batch.actions).square().mean()

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step down the loss."""
        loss = self.loss(batch)
        self._flat.set_gradients(torch.autograd.grad(loss, self._flat.parameters), math.inf)
        self.optimizer.step()
        return {"loss/policy": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """The optimiser; the weights are the policy's."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.optimizer.load_state_dict(state["optimizer"])
