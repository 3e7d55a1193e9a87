"""PPO-Lag: PPO on the Lagrangian of a constrained problem.

Ray, Achiam and Amodei 2019, "Benchmarking Safe Exploration in Deep Reinforcement Learning".

    max_pi min_{lambda >= 0}  J_R(pi) - sum_i lambda_i (J_C_i(pi) - d_i)

Each iteration first moves every multiplier along its constraint's violation (J_C_i is the mean
undiscounted cost of finished episodes), then improves the policy by PPO's clipped surrogate on

    A = (A_R - sum_i lambda_i A_C_i) / (1 + sum_i lambda_i)

with A_R standardised and A_C only centred, since its scale carries the constraint's units. Update
order, normalisation and defaults are those of OmniSafe's published runs (Adam on the multiplier,
rate 0.035, initial value 0.001, mean over the last 100 episodes). With Adam the step does not depend
on how large the violation is; `multiplier_optimizer="sgd"` is projected gradient ascent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.first_order import FirstOrderConfig, FirstOrderUpdate, clipped_policy_loss
from saferl.agents.online.lagrangian import LagrangianConfig, lagrangian_advantages, update_multipliers
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(LagrangianConfig, FirstOrderConfig):
    """PPO's hyperparameters and those of the multipliers."""


class PPOLag:
    """One multiplier step and one PPO update an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.epochs = FirstOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        multipliers = update_multipliers(self.constraints, rollout)
        advantages = lagrangian_advantages(rollout, multipliers)
        loss = clipped_policy_loss(rollout, advantages, self.config.clip)
        return {**self.constraints.metrics(), **self.epochs.run(rollout, loss, progress)}

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state["epochs"])
        self.constraints.load_state_dict(state["constraints"])


def train(config: Config, run: Run) -> Actor:
    """Train PPO-Lag; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(
        config, run, lambda context: PPOLag(config, context), cost_limits(config.cost_limit)
    )
