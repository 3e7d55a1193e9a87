"""TRPO-Lag: TRPO on the Lagrangian of a constrained problem.

Ray, Achiam and Amodei 2019, "Benchmarking Safe Exploration in Deep Reinforcement Learning".

    max_pi min_{lambda >= 0}  J_R(pi) - sum_i lambda_i (J_C_i(pi) - d_i)

Each iteration first moves every multiplier along its constraint's violation (J_C_i is the mean undiscounted
cost of finished episodes), then takes TRPO's step (see `trpo`) on

    A = (A_R - sum_i lambda_i A_C_i) / (1 + sum_i lambda_i)

with A_R standardised and A_C only centred. Defaults are those of OmniSafe's published runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.lagrangian import LagrangianConfig, lagrangian_advantages, update_multipliers
from saferl.agents.online.second_order import SecondOrderConfig, SecondOrderUpdate
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(LagrangianConfig, SecondOrderConfig):
    """TRPO's hyperparameters and those of the multipliers."""


class TRPOLag:
    """One multiplier step and one trust-region step an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.steps = SecondOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        multipliers = update_multipliers(self.constraints, rollout)
        advantages = lagrangian_advantages(rollout, multipliers)
        taken = self.steps.improve(rollout, advantages)
        fitted = self.steps.entropy(rollout) | self.steps.fit_critics(rollout)
        return self.constraints.metrics() | taken | fitted

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps.load_state_dict(state["steps"])
        self.constraints.load_state_dict(state["constraints"])


def train(config: Config, run: Run) -> Actor:
    """Train TRPO-Lag; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(
        config, run, lambda context: TRPOLag(config, context), cost_limits(config.cost_limit)
    )
