"""Cost budgets: the share of an episode's allowance that is left, as a state the policy sees.

Sootla et al. 2022, "Sauté RL: Almost Surely Safe Reinforcement Learning Using State Augmentation".
"""

from __future__ import annotations

from typing import Any, TypeAlias

from saferl.errors import UsageError

Array: TypeAlias = Any
"""A NumPy array or a torch tensor of shape (N,)."""


def discounted_limit(limit: float, discount: float, horizon: int) -> float:
    """The discounted counterpart of an episode limit: d (1 - gamma^T) / ((1 - gamma) T); d for gamma = 1.

    The limit that a constant cost rate d / T fills exactly, as in OmniSafe's Sauté adapter and FSRL's CVPO.
    """
    if horizon < 1:
        raise UsageError(f"the horizon is {horizon}; it must be at least one step.")
    if not 0 < discount <= 1:
        raise UsageError(f"the discount is {discount:g}; it must be more than 0 and at most 1.")
    if discount == 1:
        return float(limit)
    return limit * (1 - discount**horizon) / (1 - discount) / horizon


class CostBudget:
    """The budget z of N environments, which starts at 1 and is spent by costs (Sauté state).

        z <- (z - c / D) / discount,    D = discounted_limit(limit, discount, horizon)

    A policy that sees z can be safe in every episode rather than on average: reward counts only while
    z > 0 after the step. With discount 1, z = 1 - sum(c) / limit.

    Args:
        limit: allowed undiscounted episode cost, positive.
        discount: the safety discount (0.999 in the paper's navigation runs).
        horizon: steps of an episode.

    Raises:
        UsageError: a value is impossible.
    """

    def __init__(self, limit: float, discount: float, horizon: int) -> None:
        if not limit > 0:
            raise UsageError(
                f"the cost budget is {limit:g}; it must be positive (use a tiny one for zero cost)."
            )
        self.limit = float(limit)
        self.discount = float(discount)
        self.horizon = horizon
        self.allowance = discounted_limit(limit, discount, horizon)

    def spend(self, budget: Array, costs: Array) -> Array:
        """The budget (N,) after a step of the given costs (N,)."""
        return (budget - costs / self.allowance) / self.discount

    def restart(self, budget: Array, ended: Array, start: float = 1.0) -> Array:
        """The budget (N,) with `start` where `ended` (N,) bool, as the next episodes' first observation.

        The final observation of an ended episode must show the budget before this call.
        """
        keep = _like(~ended, budget)
        return budget * keep + start * (1 - keep)

    def reward(self, rewards: Array, budget: Array, unsafe_reward: float = 0.0) -> Array:
        """The reward (N,) where budget is left after the step, `unsafe_reward` where it is spent."""
        safe = _like(budget > 0, rewards)
        return rewards * safe + unsafe_reward * (1 - safe)


def _like(mask: Array, values: Array) -> Array:
    """A boolean mask as zeros and ones of the type of `values`."""
    return mask.astype(values.dtype) if hasattr(mask, "astype") else mask.to(values.dtype)
