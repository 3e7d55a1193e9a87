"""TRPO-Saute: TRPO on an environment that shows the policy what is left of its cost budget.

Sootla, Cowen-Rivers, Jafferjee, Wang, Mguni, Wang and Bou Ammar 2022, "Sauté RL: Almost Surely Safe
Reinforcement Learning Using State Augmentation". The observation gains z, which starts every episode at 1,
and the reward depends on it:

    z <- (z - c / D) / gamma_s,    D = d (1 - gamma_s^T) / ((1 - gamma_s) T)
    reward = r where z > 0 after the step, else unsafe_reward

so that TRPO's step on the reward alone (see `trpo`) learns to keep the limit d in every episode of T steps,
not on average. There is no multiplier and no cost critic. With several limits there is a z for each, and a
step is unsafe when any is spent. The budgets' defaults are those of OmniSafe's PPO-Saute; that its TRPO-Saute
shares them is unverified. Returns and costs are reported as the environment gave them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gymnasium.vector import VectorEnv

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.episode_limits import SauteConfig, saute
from saferl.agents.online.lagrangian import observe_costs
from saferl.agents.online.second_order import SecondOrderConfig, SecondOrderUpdate
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(SauteConfig, SecondOrderConfig):
    """The budgets' hyperparameters and TRPO's."""


class TRPOSaute:
    """One trust-region step an iteration; the budgets are the environment's."""

    def __init__(self, config: Config, context: Context) -> None:
        self.steps = SecondOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        observed = observe_costs(self.constraints, rollout)
        taken = self.steps.improve(rollout, standardise(rollout.advantages))
        return observed | taken | self.steps.entropy(rollout) | self.steps.fit_critics(rollout)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps.load_state_dict(state["steps"])
        self.constraints.load_state_dict(state["constraints"])


def wrap(config: Config) -> Callable[[VectorEnv], VectorEnv]:
    """What training puts around the environments."""
    return saute(config)


def evaluation_wrap(config: Config) -> Callable[[VectorEnv], VectorEnv]:
    """The same for evaluation: the policy needs to see its budgets."""
    return saute(config)


def train(config: Config, run: Run) -> Actor:
    """Train TRPO-Saute; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: TRPOSaute(config, context), wrap=wrap(config))
