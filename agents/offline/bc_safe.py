"""BC-Safe: imitate the recorded episodes whose cost is at most the limit (OSRL's mode "safe").

See `saferl.agents.offline.behaviour` for the loss. Rows after the last end of an episode belong to none and
are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from saferl.agents.offline.behaviour import BehaviourCloning, BehaviourConfig
from saferl.agents.offline.engine import train_offline
from saferl.agents.online.engine import at_least
from saferl.envs.datasets import OfflineDataset
from saferl.errors import UsageError
from saferl.experiment.run import Run

__all__ = ["Config", "safe_episodes", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(BehaviourConfig):
    """Hyperparameters of BC-Safe."""

    cost_limit: float = 10.0
    """Largest cost of an episode that is imitated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("cost limit", self.cost_limit, 0)


def safe_episodes(data: OfflineDataset, cost_limit: float) -> OfflineDataset:
    """The whole episodes with a cost of at most `cost_limit`; raises UsageError where there is none."""
    if not data.num_episodes:
        raise UsageError(f"{data.source} has no whole episode, so that none is known to keep the limit.")
    safe = data.episode_costs <= cost_limit
    if not safe.any():
        raise UsageError(
            f"no episode of {data.source} costs {cost_limit:g} or less, the cheapest costs "
            f"{data.episode_costs.min():g}; raise --cost-limit."
        )
    return data.select(safe)


def train(config: Config, run: Run) -> nn.Module:
    """Train on the safe episodes; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(
        config,
        run,
        lambda context: BehaviourCloning(config, context),
        reward_scale=1.0,
        select=lambda data: safe_episodes(data, config.cost_limit),
    )
