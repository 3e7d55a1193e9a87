"""PPO-EarlyTerminated: PPO on episodes that end when their cost exceeds the limit.

Sun, Xu, Fang, Peng, Guo, Dai and Zhou 2021, "Safe Exploration by Solving Early Terminated MDP". The step that
takes the episode's cost above the limit d pays no reward and ends the episode, with no value beyond:

    terminated <- terminated or sum_t c_t > d,    reward <- 0 there

so an agent whose rewards are positive learns to stay below the limit in order to live on (one whose rewards
are negative learns the opposite). There is no multiplier and no cost critic. With several limits, any of them
ends the episode. The costs of training episodes show the rule, not the policy: they hardly can exceed d.
Evaluation therefore lets episodes run to their end. Defaults are those of OmniSafe; the paper is cited from
there, unverified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gymnasium.vector import VectorEnv

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.episode_limits import early_termination
from saferl.agents.online.first_order import FirstOrderConfig, FirstOrderUpdate, clipped_policy_loss
from saferl.agents.online.lagrangian import UnpricedConfig, observe_costs
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(UnpricedConfig, FirstOrderConfig):
    """The limits and PPO's hyperparameters."""


class PPOEarlyTerminated:
    """One PPO update an iteration; the limits are the environment's."""

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
    """What training puts around the environments; evaluation does not."""
    return early_termination(config)


def train(config: Config, run: Run) -> Actor:
    """Train PPO-EarlyTerminated; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(
        config, run, lambda context: PPOEarlyTerminated(config, context), wrap=wrap(config)
    )
