"""TRPO-PID: TRPO on a Lagrangian whose multiplier is a PID controller.

The multiplier is that of Stooke, Achiam and Abbeel 2020, "Responsive Safety in Reinforcement Learning by PID
Lagrangian Methods" (see `cppo_pid` for its recursion), the step TRPO's (see `trpo`) on

    A = (A_R - sum_i lambda_i A_C_i) / (1 + sum_i lambda_i).

The combination and the defaults are those of OmniSafe's published runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.lagrangian import PIDConfig, lagrangian_advantages, update_multipliers
from saferl.agents.online.second_order import SecondOrderConfig, SecondOrderUpdate
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(PIDConfig, SecondOrderConfig):
    """TRPO's hyperparameters and the controller's gains."""


class TRPOPID:
    """One controller step and one trust-region step an iteration."""

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
    """Train TRPO-PID; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(
        config, run, lambda context: TRPOPID(config, context), cost_limits(config.cost_limit)
    )
