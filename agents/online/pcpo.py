"""PCPO: projection-based constrained policy optimisation.

Yang, Rosca, Narasimhan and Ramadge 2020, "Projection-Based Constrained Policy Optimization". Each iteration
takes TRPO's step for the reward and projects it, in the metric of the Fisher information H (the KL
projection), onto the linearised constraints:

    x = k H^-1 g - max(0, (k g.H^-1 b + c) / (b.H^-1 b)) H^-1 b,    k = sqrt(2 delta / (g.H^-1 g))

with c the excess over the limit in the units of b, as in `cpo`. Both terms are natural gradients; OmniSafe
and Safe-Policy-Optimization take the raw gradient in the first. Several limits are projected onto together.
The projection may leave the trust region, so the line search (OmniSafe's length, 200) accepts by the same
rules as CPO's. Other defaults are those of OmniSafe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.agents.online.engine import Context, Rollout, at_least, train_on_policy
from saferl.agents.online.lagrangian import StepExcess, UnpricedConfig, observe_costs
from saferl.agents.online.second_order import SecondOrderConfig, SecondOrderUpdate
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.natural_gradient import pcpo_step
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(UnpricedConfig, SecondOrderConfig):
    """The limits and the second-order family's hyperparameters."""

    backtrack_steps: int = 200
    """Steps of the line search."""
    margin_lr: float = 0.0
    """Rate at which a limit that stays exceeded gains a margin (safety-starter-agents: 0.05); 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("margin lr", self.margin_lr, 0)


class PCPO:
    """One projected trust-region step an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.steps = SecondOrderUpdate(config, context)
        self.constraints = config.constraints()
        self.excess = StepExcess(config.margin_lr)

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        metrics = observe_costs(self.constraints, rollout)
        excess = self.excess(self.constraints, rollout)
        taken = self.steps.constrained_step(rollout, excess, pcpo_step)
        metrics |= self.excess.metrics()
        return metrics | taken | self.steps.entropy(rollout) | self.steps.fit_critics(rollout)

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps.state_dict(),
            "constraints": self.constraints.state_dict(),
            "excess": self.excess.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps.load_state_dict(state["steps"])
        self.constraints.load_state_dict(state["constraints"])
        self.excess.load_state_dict(state["excess"])


def train(config: Config, run: Run) -> Actor:
    """Train PCPO; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: PCPO(config, context), cost_limits(config.cost_limit))
