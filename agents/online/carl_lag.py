"""CaRL-Lag: infractions as costs with limits, priced by multipliers, in the place of gates that end the
drive.

The update is CaRL's; the advantage is that of the Lagrangian,

    A = (A_R - sum_i lambda_i A_C_i) / (1 + sum_i lambda_i),

with a critic for every constrained cost. Ours, for the comparison of limits with gates; pair it with a
reward that does not end drives on infractions, or compare both under CaRL's. Multipliers move once an
iteration by the mean episode cost of the finished drives (`saferl.constraints`, the same as PPO-Lag's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.agents.online.data_parallel import Context, MinibatchesOf, Rollout, train_data_parallel
from saferl.agents.online.lagrangian import LagrangianConfig
from saferl.agents.online.large_batch import LargeBatchConfig, LargeBatchUpdate
from saferl.constraints import scalarise
from saferl.experiment.config import CostLimit, cost_limits
from saferl.experiment.run import Run
from saferl.nn.driving import DrivingPolicy

PRESETS: dict[str, dict[str, Any]] = {
    "10m": {"num_envs": 8, "total_steps": 10_000_000},
    "vector": {"num_envs": 128, "steps": 128, "total_steps": 3_000_000},
}
DATA_PARALLEL = True


@dataclass(frozen=True, kw_only=True)
class Config(LagrangianConfig, LargeBatchConfig):
    """CaRL's hyperparameters and those of the multipliers."""

    cost_limit: CostLimit = 0.1
    """Limit on the mean episode cost: a number, or one for every named cost
    (collision=0.05,red_light=0.1)."""


class CaRLLag:
    """One multiplier step and one PPO update an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.epochs = LargeBatchUpdate(config, context)
        self.constraints = config.constraints()
        self.names = context.cost_names

    def update(self, rollout: Rollout, iteration: int, minibatches: MinibatchesOf) -> dict[str, float]:
        self.constraints.observe({c.name: rollout.episodes.costs[c.name] for c in self.constraints})
        multipliers = self.constraints.update()
        costs = {name: rollout.advantages[:, 1 + k] for k, name in enumerate(self.names)}
        advantages = scalarise(rollout.advantages[:, 0], costs, multipliers)
        metrics = self.epochs.improve(rollout, advantages, iteration, minibatches)
        return {**self.constraints.metrics(), **metrics}

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state["epochs"])
        self.constraints.load_state_dict(state["constraints"])


def train(config: Config, run: Run) -> DrivingPolicy:
    """Train CaRL-Lag; see `saferl.agents.online.data_parallel.train_data_parallel`."""
    return train_data_parallel(
        config, run, lambda context: CaRLLag(config, context), tuple(cost_limits(config.cost_limit))
    )
