"""BC-All: imitate everything that was recorded. The baseline that knows neither reward nor cost.

See `saferl.agents.offline.behaviour` for the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from saferl.agents.offline.behaviour import BehaviourCloning, BehaviourConfig
from saferl.agents.offline.engine import train_offline
from saferl.experiment.run import Run

__all__ = ["Config", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(BehaviourConfig):
    """As `BehaviourConfig`."""


def train(config: Config, run: Run) -> nn.Module:
    """Train on all transitions; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(config, run, lambda context: BehaviourCloning(config, context), reward_scale=1.0)
