"""From one advantage for the reward and one for every cost to the one that a policy ascends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from saferl.errors import UsageError

ArrayT = TypeVar("ArrayT")
"""A NumPy array, a torch tensor, or a float."""

Norm = Literal["none", "sum", "convex"]


def scalarise(
    advantages: ArrayT,
    cost_advantages: Mapping[str, ArrayT],
    multipliers: Mapping[str, float],
    norm: Norm = "sum",
) -> ArrayT:
    """Combine advantages (or rewards) with costs by their multipliers.

        none     A_R - sum_i lambda_i A_i                               (HC-RLHF)
        sum      (A_R - sum_i lambda_i A_i) / (1 + sum_i lambda_i)      (PPO-Lag, Safe RLHF, Stooke 2020)
        convex   (1 - sum_i lambda_i) A_R - sum_i lambda_i A_i          (Stooke 2020 with diff_norm)

    Args:
        advantages: of the reward, any shape.
        cost_advantages: by name, each of the same shape; costs are bad, so they enter with a minus sign.
        multipliers: by the same names, each >= 0; for "convex" their sum is at most 1.
        norm: see above.

    Raises:
        UsageError: names differ, shapes differ, or multipliers are impossible.
    """
    if set(cost_advantages) != set(multipliers):
        raise UsageError(
            f"costs are named {sorted(cost_advantages)} but multipliers {sorted(multipliers)}; "
            "they must match."
        )
    shape = getattr(advantages, "shape", ())
    total = 0.0
    combined: Any = advantages
    for name, multiplier in multipliers.items():
        if not 0 <= multiplier < math.inf:
            raise UsageError(f"the multiplier of {name!r} is {multiplier}; it must be finite, zero or more.")
        cost_shape = getattr(cost_advantages[name], "shape", ())
        if tuple(cost_shape) != tuple(shape):
            raise UsageError(
                f"the advantages have shape {tuple(shape)} but those of the cost {name!r} "
                f"{tuple(cost_shape)}; one shape is needed, since a broadcast would mix samples."
            )
        total += multiplier
    match norm:
        case "none":
            weight, divisor = 1.0, 1.0
        case "sum":
            weight, divisor = 1.0 / (1.0 + total), 1.0 + total
        case "convex":
            if total > 1:
                raise UsageError(f"the multipliers sum to {total:g}; a convex combination needs at most 1.")
            weight, divisor = 1.0 - total, 1.0
        case _:
            raise UsageError(f"unknown norm {norm!r}; use none, sum or convex.")
    # Weights first: lambda A_i may overflow in single precision where its share of the sum does not.
    combined = combined * weight
    for name, multiplier in multipliers.items():
        cost: Any = cost_advantages[name]
        combined = combined - (float(multiplier) / divisor) * cost
    result: ArrayT = combined
    return result
