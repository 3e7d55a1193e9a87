"""Reward gates: which rewards count, and when. One primitive for control agents and language policies.

A gate is open where a signal passes a threshold. Rewards are combined through gates in four ways:

    accumulate   a reward of lower priority counts only where all of higher priority pass their gates
    multiply     a reward times factors in [0, 1], such as soft penalties
    terminate    a hard infraction ends the episode: what comes after it is 0
    switch       one of two rewards by a condition

G-RA (Sun et al. 2025, arXiv 2508.10548) accumulates; CaRL's driving reward multiplies and terminates;
length rewards that only correct answers earn are `gated_sum`. Arrays are NumPy's or torch's alike, of any
shape that broadcasts; what comes out is of the kind that went in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from saferl.errors import UsageError

__all__ = [
    "Array",
    "Gate",
    "accumulate",
    "gated_sum",
    "lexicographic",
    "lexicographic_weights",
    "multiply",
    "switch",
    "terminate",
]

Array: TypeAlias = Any
"""A NumPy array or a torch tensor."""


@dataclass(frozen=True)
class Gate:
    """1 where a signal passes a threshold and 0 elsewhere, or a sigmoid of its excess.

    Args:
        threshold: delta; -inf is open for every finite signal, inf for none.
        strict: whether the signal must exceed the threshold rather than reach it. G-RA's is strict
            (unverified).
        sharpness: k of the soft gate sigmoid(k (x - delta)); None for a hard one.

    Raises:
        UsageError: the threshold is NaN, or the sharpness is not positive.
    """

    threshold: float = 0.0
    strict: bool = True
    sharpness: float | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise UsageError("the gate's threshold is not a number.")
        if self.sharpness is not None and not 0 < self.sharpness < math.inf:
            raise UsageError(
                f"the gate's sharpness is {self.sharpness:g}; it must be positive (None for a hard gate)."
            )

    def __call__(self, signal: Array) -> Array:
        """How far it is open (...), in [0, 1]; a signal that is NaN leaves a hard gate shut."""
        if self.sharpness is None:
            return _like(signal > self.threshold if self.strict else signal >= self.threshold, signal)
        if math.isinf(self.threshold):
            return _like(signal > self.threshold, signal)
        excess = self.sharpness * (signal - self.threshold)
        if isinstance(excess, Tensor):
            return excess.sigmoid()
        from scipy.special import expit

        return expit(excess)


def accumulate(levels: Sequence[Array], gates: Sequence[Gate]) -> tuple[Array, list[Array]]:
    """The sum of rewards in which each counts only where all before it pass their gates.

    Args:
        levels: rewards of broadcastable shape, from the highest priority to the lowest; behind a shut gate
            they may be anything, NaN included.
        gates: one for each level but the last; a gate judges the level's own reward.

    Returns:
        the total, and the openness of every level after the first, as a factor: the product of the gates
        before it.

    Raises:
        UsageError: the numbers of levels and gates do not fit.
    """
    if not levels or len(gates) != len(levels) - 1:
        raise UsageError(
            f"{len(levels)} levels need {max(len(levels) - 1, 0)} gates, one for each but the last; "
            f"there are {len(gates)}."
        )
    total, factors = levels[0], []
    opened: Array = 1.0
    for judged, gate, reward in zip(levels, gates, levels[1:], strict=False):
        opened = opened * gate(judged)
        total = gated_sum(total, reward, opened)
        factors.append(opened)
    return total, factors


def gated_sum(base: Array, inner: Array, opened: Array) -> Array:
    """base + opened * inner: an inner reward that only some earn. Arrays that broadcast.

    Where `opened` is 0 the inner reward may be anything, NaN and infinity included.
    """
    return base + opened * switch(opened == 0, 0.0, inner)


def multiply(reward: Array, *factors: Array, check: bool = True) -> Array:
    """The reward times factors in [0, 1].

    `check` looks at every factor and raises `UsageError` for one outside; on a GPU that waits for it, and
    factors that are clipped need no look.
    """
    for k, factor in enumerate(factors if check else ()):
        low, high = float(factor.min()), float(factor.max())
        if not (low >= 0 and high <= 1):
            raise UsageError(f"factor {k} spans {low:g} to {high:g}; a soft penalty lies between 0 and 1.")
    for factor in factors:
        reward = reward * factor
    return reward


def terminate(
    rewards: Array, infractions: Array, *, penalty: float | Array = 0.0, keep_last: bool = True
) -> tuple[Array, Array]:
    """Rewards of steps (..., T) when a hard infraction ends the episode, and which steps it ends (..., T).

    Args:
        rewards: (..., T).
        infractions: whether a step commits one (..., T).
        penalty: added to the step that ends the episode, a number or (..., T) where it depends on the
            infraction. CaRL's is -1 in CARLA (collisions and red lights; 0 for others), where the step's own
            reward still counts, and 0 in nuPlan, where it does not.
        keep_last: whether the ending step's own reward counts.

    Returns:
        rewards that are 0 after the first infraction; the mask of the first infractions.

    Raises:
        UsageError: the shapes differ.
    """
    if rewards.shape != infractions.shape:
        raise UsageError(
            f"the rewards have shape {tuple(rewards.shape)} and the infractions {tuple(infractions.shape)}; "
            "they must be equal."
        )
    hard = infractions.bool() if isinstance(infractions, Tensor) else np.asarray(infractions, bool)
    seen = hard.cumsum(-1)
    first = hard & (seen == 1)
    alive = seen == 0
    counted = alive | first if keep_last else alive
    return switch(counted, rewards, 0.0) + penalty * _like(first, rewards), first


def switch(condition: Array, first: Array, second: Array) -> Array:
    """`first` where the condition holds, else `second`: arrays that broadcast, or numbers.

    Raises `UsageError` unless the condition is Boolean: the openness of a gate may lie between 0 and 1.
    """
    if getattr(condition, "dtype", None) not in (torch.bool, np.bool_):
        raise UsageError("the condition of a switch must be a Boolean array; compare the openness first.")
    if isinstance(condition, Tensor):
        return torch.where(condition, first, second)
    return np.where(condition, first, second)


def lexicographic(passing: tuple[float, float], failing: tuple[float, float], gap: float) -> bool:
    """Whether every reward of the higher of two outcomes outranks every one of the lower, `gap` apart.

    Usually the outcomes that pass a gate against those that fail it. An order of more outcomes is
    lexicographic if every pair of neighbours is; two that both pass need passing = failing = the inner range,
    whose width must then be less than the gap. A gate thus ranks failures below, not successes among
    themselves.

    Args:
        passing: least and greatest counted inner reward with the higher outcome.
        failing: with the lower outcome; (0, 0) behind a hard gate, the range times the openness behind a
            soft one.
        gap: least of the higher outcomes less the greatest of the lower.

    Returns:
        failing[1] < gap + passing[0]; the bound is sharp where the extremes are attained.
    """
    return failing[1] < gap + passing[0]


def lexicographic_weights(
    ranges: Sequence[float], gaps: Sequence[float], margin: float = 0.01
) -> list[float]:
    """Weights w_i under which a plain sum orders outcomes lexicographically, without any gate.

    The last is 1, and w_i gap_i = (1 + margin) * sum over j > i of w_j range_j: the least difference of a
    level outweighs all of the lower ones together.

    Args:
        ranges: greatest less least reward of each level, from the highest priority to the lowest.
        gaps: least difference of two unequal rewards of each level but the last.
        margin: positive.

    Raises:
        UsageError: the numbers do not fit, or one is not positive and finite.
    """
    if len(gaps) != len(ranges) - 1:
        raise UsageError(f"{len(ranges)} levels need {len(ranges) - 1} gaps; there are {len(gaps)}.")
    if not all(0 < value < math.inf for value in (*ranges, *gaps, margin)):
        raise UsageError("ranges, gaps and the margin must be positive and finite.")
    weights, below = [1.0], ranges[-1]
    for extent, gap in zip(ranges[-2::-1], gaps[::-1], strict=True):
        weight = (1 + margin) * below / gap
        weights.append(weight)
        below += weight * extent
    return weights[::-1]


def _like(mask: Array, example: Array) -> Array:
    """A mask as numbers of the example's kind."""
    if isinstance(mask, Tensor):
        dtype = example.dtype if isinstance(example, Tensor) and example.is_floating_point() else None
        return mask.to(dtype) if dtype is not None else mask.float()
    dtype = getattr(example, "dtype", None)
    return np.asarray(mask, dtype if dtype is not None and np.issubdtype(dtype, np.floating) else float)
