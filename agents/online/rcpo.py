"""RCPO: a natural-gradient step on the Lagrangian, without a line search.

Tessler, Mankowitz and Mannor 2019, "Reward Constrained Policy Optimization", in the form in which OmniSafe
publishes results for it: multipliers as in `trpo_lag`, then the whole natural step

    x = sqrt(2 delta / (g.H^-1 g)) H^-1 g

on A = (A_R - sum_i lambda_i A_C_i) / (1 + sum_i lambda_i), whatever the surrogate and the KL divergence
turn out to be. The paper itself folds -lambda c into the reward and trains a single critic on
it (unverified). Defaults are those of OmniSafe's published runs.
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


class RCPO:
    """One multiplier step and one natural step an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.steps = SecondOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        multipliers = update_multipliers(self.constraints, rollout)
        advantages = lagrangian_advantages(rollout, multipliers)
        step, expected = self.steps.natural_step(rollout, advantages)
        kl = self.steps.try_step(rollout, step).kl if expected > 0 else 0.0
        fitted = self.steps.entropy(rollout) | self.steps.fit_critics(rollout)
        return self.constraints.metrics() | {"policy/kl": kl} | fitted

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps.load_state_dict(state["steps"])
        self.constraints.load_state_dict(state["constraints"])


def train(config: Config, run: Run) -> Actor:
    """Train RCPO; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: RCPO(config, context), cost_limits(config.cost_limit))
