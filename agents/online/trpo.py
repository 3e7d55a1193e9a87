"""TRPO: trust-region policy optimisation, the unconstrained baseline of the second-order family.

Schulman, Levine, Moritz, Jordan and Abbeel 2015, "Trust Region Policy Optimization".

    maximise  E[rho A]   subject to  E[KL(pi_k || pi)] <= delta,    rho = pi(a|s) / pi_k(a|s)       (eq. 14)

solved to second order: x = sqrt(2 delta / (g.H^-1 g)) H^-1 g with g the surrogate's gradient and H the
Fisher information plus damping, H^-1 g by conjugate gradients; then a line search for the longest share of x
that improves the surrogate within the KL bound. A is the standardised GAE advantage of the reward; costs are
recorded and ignored. The KL divergence is summed over action dimensions (OmniSafe averages over them, which
makes its trust region as many times larger). Other defaults are those of OmniSafe's published runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.second_order import SecondOrderConfig, SecondOrderUpdate
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(SecondOrderConfig):
    """TRPO has no hyperparameters beyond those of the second-order family."""


class TRPO:
    """One trust-region step an iteration."""

    def __init__(self, config: SecondOrderConfig, context: Context) -> None:
        self.steps = SecondOrderUpdate(config, context)

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        taken = self.steps.improve(rollout, standardise(rollout.advantages))
        return taken | self.steps.entropy(rollout) | self.steps.fit_critics(rollout)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps.load_state_dict(state["steps"])


def train(config: Config, run: Run) -> Actor:
    """Train TRPO; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: TRPO(config, context))
