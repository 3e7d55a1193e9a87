"""BC-Frontier: imitate the recorded episodes near the best return for their cost (OSRL's mode "frontier").

The front is the episodes that no other beats, with at most their cost and at least their return. Through it
goes a polynomial R(C) of degree 0, 1 or 2, the first with a coefficient of determination of 0.9, held at
its end for higher costs; imitated is what lies within a fifth of the data's range of returns around it. See
`saferl.agents.offline.behaviour` for the loss. Rows after the last end of an episode are left out.

Departure: a front too short for the next degree keeps the one before, where OSRL's fit fails. That the fit is
held beyond the front, where a parabola would fall and let poor episodes in, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from saferl.agents.offline.behaviour import BehaviourCloning, BehaviourConfig
from saferl.agents.offline.engine import train_offline
from saferl.envs.datasets import OfflineDataset
from saferl.errors import UsageError
from saferl.experiment.run import Run

__all__ = ["Config", "fit_front", "frontier_episodes", "pareto_front", "train"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Config(BehaviourConfig):
    """Hyperparameters of BC-Frontier."""

    band: float = 0.2
    """Largest distance of an imitated episode's return from the front, as a share of the returns' range."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.band > 0:
            raise UsageError(f"the band is {self.band:g}; it must be positive.")


def pareto_front(costs: Floats, returns: Floats) -> NDArray[np.intp]:
    """Numbers of the episodes (E,) that none beats, by rising cost; of equal ones the first."""
    order = np.lexsort((-returns, costs))
    best = np.maximum.accumulate(returns[order])
    fresh = np.concatenate([[True], best[1:] > best[:-1]])
    front: NDArray[np.intp] = order[fresh]
    return front


def fit_front(costs: Floats, returns: Floats) -> np.polynomial.Polynomial:
    """The front's polynomial R(C), from all episodes' costs and returns (E,)."""
    front = pareto_front(costs, returns)
    x, y = costs[front], returns[front]
    spread = np.square(y - y.mean()).sum()
    for degree in range(3):
        fitted = np.polynomial.Polynomial.fit(x, y, degree)
        error = np.square(y - fitted(x)).sum()
        if spread == 0 or 1 - error / spread >= 0.9 or len(x) < degree + 2:
            break
    return fitted


def frontier_episodes(data: OfflineDataset, band: float) -> OfflineDataset:
    """The whole episodes within `band` times the range of returns around the front.

    Raises UsageError where the data have no whole episode.
    """
    if not data.num_episodes:
        raise UsageError(f"{data.source} has no whole episode, so that there is no front.")
    costs, returns = data.episode_costs, data.episode_returns
    reach = costs[pareto_front(costs, returns)].max()
    distance = np.abs(returns - fit_front(costs, returns)(np.minimum(costs, reach)))
    near = distance <= band * np.ptp(returns) + 1e-9
    if not near.any():
        raise UsageError(f"no episode of {data.source} lies within the band of {band:g}; raise --band.")
    return data.select(near)


def train(config: Config, run: Run) -> nn.Module:
    """Train on the episodes near the front; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(
        config,
        run,
        lambda context: BehaviourCloning(config, context),
        reward_scale=1.0,
        select=lambda data: frontier_episodes(data, config.band),
    )
