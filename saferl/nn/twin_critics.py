"""Critics of the reward and of a cost, two ensembles each, as one stack of networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saferl.nn.batched import BatchedMLPs

__all__ = ["TwinCritics"]


class TwinCritics(BatchedMLPs):
    """Q_1, Q_2 of the reward and Q_C,1, Q_C,2 of the cost, each the least of its members: 4 n networks.

    Args:
        input_size: observations and actions together, S + A.
        hidden_sizes: widths of every network.
        members: n.
    """

    def __init__(self, input_size: int, hidden_sizes: Sequence[int], members: int = 1) -> None:
        super().__init__(4 * members, input_size, hidden_sizes)

    def pairs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(2, 2, B): reward and cost, first and second ensemble, at (B, S) and (B, A)."""
        values: Tensor = self(torch.cat([observations, actions], dim=1))[..., 0]
        return values.view(2, 2, -1, len(observations)).amin(2)

    def least(self, observations: Tensor, actions: Tensor) -> Tensor:
        """min(Q_1, Q_2) of the reward and of the cost (2, B) at (B, S) and (B, A)."""
        return self.pairs(observations, actions).amin(1)

    @torch.no_grad()
    def targets(
        self,
        observations: Tensor,
        actions: Tensor,
        signals: Tensor,
        discounts: Tensor,
        min_weight: float,
    ) -> Tensor:
        """BCQ's y = signal + discount max_k [w min_i Q_i(s', a_k) + (1 - w) max_i Q_i(s', a_k)], (2, B).

        Args:
            observations: next ones s' (B, S).
            actions: K of them for each (B, K, A).
            signals: rewards and costs (2, B).
            discounts: gamma, or 0 where the episode ends (B,).
            min_weight: w.
        """
        size, samples, _ = actions.shape
        pairs = self.pairs(observations.repeat_interleave(samples, dim=0), actions.flatten(0, 1))
        blend = min_weight * pairs.amin(1) + (1 - min_weight) * pairs.amax(1)
        return signals + discounts * blend.view(2, size, samples).amax(2)

    def loss(self, observations: Tensor, actions: Tensor, targets: Tensor) -> Tensor:
        """Mean squared errors at (B, S) and (B, A) from targets (2, B), summed over all networks."""
        values: Tensor = self(torch.cat([observations, actions], dim=1))[..., 0]
        errors = values.view(2, -1, len(observations)) - targets[:, None]
        return errors.square().mean(2).sum()
