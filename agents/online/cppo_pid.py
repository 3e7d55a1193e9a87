"""CPPO-PID: PPO on a Lagrangian whose multiplier is a PID controller.

Stooke, Achiam and Abbeel 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian
Methods". With delta = J_C - d at every iteration,

    I <- max(0, I + Ki delta)
    P <- ema_p P + (1 - ema_p) delta
    C <- ema_d C + (1 - ema_d) J_C,    D = max(0, C - C[delay iterations ago])
    lambda = max(0, Kp P + I + Kd D)

and the policy improves by PPO's clipped surrogate on (A_R - sum_i lambda_i A_C_i) / (1 + sum_i
lambda_i). The recursion, the gains and the one clipped surrogate are those of OmniSafe; the authors'
own code clips the cost's surrogate separately and pessimistically.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.first_order import FirstOrderConfig, FirstOrderUpdate, clipped_policy_loss
from saferl.agents.online.lagrangian import PIDConfig, lagrangian_advantages, update_multipliers
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(PIDConfig, FirstOrderConfig):
    """PPO's hyperparameters and the controller's gains."""


class CPPOPID:
    """One controller step and one PPO update an iteration."""

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
    """Train CPPO-PID; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(
        config, run, lambda context: CPPOPID(config, context), cost_limits(config.cost_limit)
    )
