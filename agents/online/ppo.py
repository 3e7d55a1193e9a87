"""PPO: proximal policy optimisation, the unconstrained baseline.

Schulman, Wolski, Dhariwal, Radford and Klimov 2017, "Proximal Policy Optimization Algorithms".

    maximise  E min(rho A, clip(rho, 1 - eps, 1 + eps) A),    rho = pi(a|s) / pi_k(a|s)     (eq. 7)

with A the standardised GAE advantage of the reward. Costs are recorded and ignored. Hyperparameters
are those of OmniSafe's published runs, against which the constrained agents are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.first_order import FirstOrderConfig, FirstOrderUpdate, clipped_policy_loss
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(FirstOrderConfig):
    """PPO has no hyperparameters beyond those of the first-order family."""


class PPO:
    """One PPO update an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.epochs = FirstOrderUpdate(config, context)

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        loss = clipped_policy_loss(rollout, standardise(rollout.advantages), self.config.clip)
        return self.epochs.run(rollout, loss, progress)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state["epochs"])


def train(config: Config, run: Run) -> Actor:
    """Train PPO; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: PPO(config, context))
