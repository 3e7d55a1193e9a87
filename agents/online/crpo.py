"""CRPO: a step on the reward while the limits hold, else a step on the cost.

Xu, Liang and Lan 2021, "CRPO: A New Approach for Safe Reinforcement Learning with Convergence Guarantee".

    if J_C_i <= d_i + tolerance for all i:   step on  A_R
    else:                                    step on -A_C_i of the constraint that is exceeded most

each TRPO's (see `trpo`). There is no multiplier to tune; the policy circles around the limit. The tolerance
of 2 (in units of the episode cost) is that of OmniSafe's OnCRPO; with several limits the excess is compared
in units of each limit (or as it is, where a limit is zero). J_C_i is the mean of the last `cost_window`
episodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, at_least, train_on_policy
from saferl.agents.online.lagrangian import UnpricedConfig, observe_costs
from saferl.agents.online.second_order import SecondOrderConfig, SecondOrderUpdate
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(UnpricedConfig, SecondOrderConfig):
    """TRPO's hyperparameters and the tolerance."""

    tolerance: float = 2.0
    """Excess over the limit, in units of the cost, below which the reward is improved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("tolerance", self.tolerance, 0)


class CRPO:
    """One trust-region step an iteration, on the reward or on a cost."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.steps = SecondOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        metrics = observe_costs(self.constraints, rollout)
        exceeded = {
            c.name: c.violation / (abs(c.limit) or 1.0)
            for c in self.constraints
            if c.violation > self.config.tolerance
        }
        if exceeded:
            worst = max(exceeded, key=lambda name: exceeded[name])
            advantages = -standardise(rollout.cost_advantages[worst])
        else:
            advantages = standardise(rollout.advantages)
        taken = self.steps.improve(rollout, advantages)
        fitted = self.steps.entropy(rollout) | self.steps.fit_critics(rollout)
        return metrics | {"policy/cost_step": float(bool(exceeded))} | taken | fitted

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps.load_state_dict(state["steps"])
        self.constraints.load_state_dict(state["constraints"])


def train(config: Config, run: Run) -> Actor:
    """Train CRPO; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: CRPO(config, context), cost_limits(config.cost_limit))
