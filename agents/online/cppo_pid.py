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
from saferl.agents.online.first_order import (
    FirstOrderConfig,
    FirstOrderUpdate,
    clipped_policy_loss,
    lagrangian_advantages,
)
from saferl.constraints import Constraint, ConstraintSet, PIDMultiplier, WindowEstimator
from saferl.experiment.config import CostLimit, cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(FirstOrderConfig):
    """PPO's hyperparameters and the controller's gains."""

    cost_limit: CostLimit = 25.0
    """Limit on the mean episode cost: a number, or one for every named cost (hazards=10,vases_contact=5)."""
    kp: float = 0.1
    """Proportional gain."""
    ki: float = 0.01
    """Integral gain."""
    kd: float = 0.01
    """Derivative gain."""
    ema_p: float = 0.95
    """Smoothing of the proportional term."""
    ema_d: float = 0.95
    """Smoothing of the cost in the derivative term."""
    delay: int = 10
    """Iterations over which the derivative is taken."""
    multiplier_init: float = 0.001
    """Initial value of the integral term."""
    cost_window: int = 100
    """Finished episodes whose mean cost the controller sees."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cost_limits(self.cost_limit)


class CPPOPID:
    """One controller step and one PPO update an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.epochs = FirstOrderUpdate(config, context)
        self.constraints = ConstraintSet(
            Constraint(
                name,
                limit,
                estimator=WindowEstimator(config.cost_window),
                multiplier=PIDMultiplier(
                    kp=config.kp,
                    ki=config.ki,
                    kd=config.kd,
                    ema_p=config.ema_p,
                    ema_d=config.ema_d,
                    delay=config.delay,
                    init=config.multiplier_init,
                ),
            )
            for name, limit in cost_limits(config.cost_limit).items()
        )

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        self.constraints.observe({c.name: rollout.episodes.costs[c.name] for c in self.constraints})
        multipliers = self.constraints.update()
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
