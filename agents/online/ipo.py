"""IPO: interior-point policy optimisation.

Liu, Ding and Liu 2020, "IPO: Interior-Point Policy Optimization under Constraints". Every constraint adds a
logarithmic barrier to the objective,

    max_pi  J_R + kappa sum_i log(d_i - J_C_i)

whose gradient is that of the Lagrangian with the multipliers

    lambda_i = kappa / (d_i - J_C_i),    penalty_max where this exceeds it or J_C_i >= d_i

so the policy improves by PPO's clipped surrogate on (A_R - sum_i lambda_i A_C_i) / (1 + sum_i lambda_i), A_R
standardised and A_C centred. The cap, the division by 1 + sum lambda and the defaults (kappa 0.01,
penalty_max 1, 10 passes) are those of OmniSafe; the paper's own kappa is unverified. A barrier presumes a
start inside the limits: from outside, the cap is a fixed penalty that leads back in, if it is large enough.
OmniSafe also normalises rewards and costs in its IPO runs; here J_C is always in the cost's own units and
`normalise_rewards` is off unless asked for. Until an episode has finished, there is no penalty.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.first_order import FirstOrderConfig, FirstOrderUpdate, clipped_policy_loss
from saferl.agents.online.lagrangian import ConstrainedConfig, lagrangian_advantages, update_multipliers
from saferl.constraints import ConstraintSet
from saferl.errors import UsageError
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(ConstrainedConfig, FirstOrderConfig):
    """The barrier's strength and cap, and the first-order family's hyperparameters."""

    kappa: float = 0.01
    """Strength of the barrier; the larger, the further inside the limit the policy stays."""
    penalty_max: float = 1.0
    """Largest penalty, and the one used at and beyond the limit."""
    epochs: int = 10
    """Passes over the rollout, fewer when `target_kl` is exceeded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kappa", "penalty_max"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} is {value:g}; it must be positive and finite.")

    def constraints(self) -> ConstraintSet:
        """One constraint a limit, each with a barrier of its own."""
        return self._constraints(
            {name: BarrierMultiplier(self.kappa, self.penalty_max) for name in cost_limits(self.cost_limit)}
        )


class BarrierMultiplier:
    """The slope of a logarithmic barrier, min(kappa / (d - J), maximum), and the maximum for J >= d."""

    def __init__(self, kappa: float, maximum: float) -> None:
        self.kappa, self.maximum = kappa, maximum
        self.value = 0.0

    def update(self, cost: float, limit: float) -> float:
        slack = limit - cost
        # The product instead of the quotient: no slack, however small, overflows.
        inside = slack > 0 and self.kappa < self.maximum * slack
        self.value = self.kappa / slack if inside else self.maximum
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = float(state["value"])


class IPO:
    """One PPO update on the barrier's Lagrangian an iteration."""

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
    """Train IPO; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: IPO(config, context), cost_limits(config.cost_limit))
