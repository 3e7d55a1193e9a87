"""CPO: constrained policy optimisation.

Achiam, Held, Tamar and Abbeel 2017, "Constrained Policy Optimization". Each iteration solves

    maximise  g.x   subject to  c_i + b_i.x <= 0,   x.Hx / 2 <= delta                              (eq. 11)

with g the gradient of E[rho A_R], b_i that of E[rho A_C_i] and H the Fisher information plus damping, by the
dual (see `saferl.natural_gradient.cpo_step`), or takes the step that lowers the costs most where no step is
feasible. A line search then finds the longest share of x with a KL divergence of at most delta that raises
no cost's surrogate by more than max(-c_i, 0) and, unless a limit is exceeded, does not lower the reward's.

**Units.** b_i is the gradient of a mean over steps, so the excess over the limit must be one too:

    c_i = (J_C_i - d_i) / (mean episode length)

as in safety-starter-agents. OmniSafe and Safe-Policy-Optimization leave the division out, and with c
hundreds of times too large almost every update is either unconstrained or pure recovery. Their dual also has
the wrong sign of r = g.H^-1 b; the closed form here is tested against brute force.

J_C_i is the mean undiscounted cost of the last `cost_window` finished episodes; until one has finished, its
limit does not bind. `margin_lr` lets a limit that stays exceeded gain a margin, as an option of
safety-starter-agents does. A_R is standardised, A_C centred. Several limits are solved together. Other
defaults are OmniSafe's.
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
from saferl.natural_gradient import cpo_step
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(UnpricedConfig, SecondOrderConfig):
    """The limits and the second-order family's hyperparameters."""

    backtrack_steps: int = 20
    """Steps of the line search."""
    margin_lr: float = 0.0
    """Rate at which a limit that stays exceeded gains a margin (safety-starter-agents: 0.05); 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("margin lr", self.margin_lr, 0)


class CPO:
    """One constrained trust-region step an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.steps = SecondOrderUpdate(config, context)
        self.constraints = config.constraints()
        self.excess = StepExcess(config.margin_lr)

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        metrics = observe_costs(self.constraints, rollout)
        excess = self.excess(self.constraints, rollout)
        taken = self.steps.constrained_step(rollout, excess, cpo_step)
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
    """Train CPO; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: CPO(config, context), cost_limits(config.cost_limit))
