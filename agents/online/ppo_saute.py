"""PPO-Saute: PPO on an environment that shows the policy what is left of its cost budget.

Sootla, Cowen-Rivers, Jafferjee, Wang, Mguni, Wang and Bou Ammar 2022, "Sauté RL: Almost Surely Safe
Reinforcement Learning Using State Augmentation". The observation gains z, which starts every episode at 1,
and the reward depends on it:

    z <- (z - c / D) / gamma_s,    D = d (1 - gamma_s^T) / ((1 - gamma_s) T)
    reward = r where z > 0 after the step, else unsafe_reward

so that PPO on the reward alone learns to keep the limit d in every episode of T steps, not on average. There
is no multiplier and no cost critic. With several limits there is a z for each, and a step is unsafe when any
is spent. gamma_s, unsafe_reward and the other defaults are those of OmniSafe (its navigation runs: 0.9999,
-0.2, 80 passes, observations not normalised); the authors' class takes gamma_s 0.99 and unsafe_reward 0.
Returns and costs are reported as the environment gave them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gymnasium.vector import VectorEnv

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.episode_limits import SauteConfig, saute
from saferl.agents.online.first_order import FirstOrderConfig, FirstOrderUpdate, clipped_policy_loss
from saferl.agents.online.lagrangian import observe_costs
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(SauteConfig, FirstOrderConfig):
    """The budgets' hyperparameters and PPO's."""


class PPOSaute:
    """One PPO update an iteration; the budgets are the environment's."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.epochs = FirstOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        loss = clipped_policy_loss(rollout, standardise(rollout.advantages), self.config.clip)
        return observe_costs(self.constraints, rollout) | self.epochs.run(rollout, loss, progress)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state["epochs"])
        self.constraints.load_state_dict(state["constraints"])


def wrap(config: Config) -> Callable[[VectorEnv], VectorEnv]:
    """What training puts around the environments."""
    return saute(config)


def evaluation_wrap(config: Config) -> Callable[[VectorEnv], VectorEnv]:
    """The same for evaluation: the policy needs to see its budgets."""
    return saute(config)


def train(config: Config, run: Run) -> Actor:
    """Train PPO-Saute; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: PPOSaute(config, context), wrap=wrap(config))
