"""Generalised advantage estimation for a reward and any number of costs at once.

Schulman, Moritz, Levine, Jordan and Abbeel 2016, "High-Dimensional Continuous Control Using Generalized
Advantage Estimation", equations 11 to 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: float | Sequence[float] | Tensor,
    gae_lambda: float | Sequence[float] | Tensor,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets, time-major.

        delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
        A_t = delta_t + gamma lambda (1 - ended_t) A_{t+1},    ended = terminated or truncated
        target_t = A_t + V(s_t)

    The linear recursion is solved by doubling (Hillis and Steele 1986): log2(T) vectorised passes instead of
    a Python loop over time.

    Args:
        rewards: (T, N) or (T, N, K), K streams such as a reward and its costs.
        values: V(s_t), the same shape.
        next_values: V(s_{t+1}), the same shape: of the final observation where an episode was truncated, of
            whatever follows elsewhere; not used where it terminated. See `next_values`.
        terminated: (T, N) bool, the episode ended in a state without future.
        truncated: (T, N) bool, the episode was cut off.
        discount: gamma, one number or one a stream.
        gae_lambda: lambda, likewise.

    Returns:
        advantages and targets, each of the shape of `rewards`.

    Raises:
        ValueError: shapes do not fit, or rewards are integers.
    """
    shape = rewards.shape
    if values.shape != shape or next_values.shape != shape:
        raise ValueError(
            f"rewards {tuple(shape)}, values {tuple(values.shape)} and next_values "
            f"{tuple(next_values.shape)} must have one shape."
        )
    if rewards.ndim not in (2, 3) or terminated.shape != shape[:2] or truncated.shape != shape[:2]:
        raise ValueError(
            f"rewards must be (T, N) or (T, N, K) and ends (T, N), not {tuple(shape)}, "
            f"{tuple(terminated.shape)} and {tuple(truncated.shape)}."
        )
    if not rewards.is_floating_point():
        raise ValueError(f"rewards are {rewards.dtype}; convert them to a floating-point type.")
    gamma = torch.as_tensor(discount, dtype=rewards.dtype, device=rewards.device)
    lam = torch.as_tensor(gae_lambda, dtype=rewards.dtype, device=rewards.device)
    for name, factor in (("discount", gamma), ("gae_lambda", lam)):
        if factor.ndim and (rewards.ndim == 2 or factor.shape != shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(factor.shape)} for rewards {tuple(shape)}; pass one number, or one "
                "for each of the K streams of (T, N, K)."
            )
    alive, unbroken = ~terminated.bool(), ~(terminated.bool() | truncated.bool())
    if rewards.ndim == 3:
        alive, unbroken = alive.unsqueeze(-1), unbroken.unsqueeze(-1)
    # where, not a product: a terminated state's next value may be anything, NaN included.
    delta = rewards + torch.where(alive, gamma * next_values, torch.zeros_like(rewards)) - values
    decay = (gamma * lam * unbroken).expand(shape).contiguous()
    advantages = delta
    reach = 1
    while reach < shape[0]:
        # advantages[t] holds the discounted sum of delta over [t, t + reach), decay[t] the product of
        # the factors over it; joining two neighbouring intervals doubles the reach.
        advantages = torch.cat(
            [advantages[:-reach] + decay[:-reach] * advantages[reach:], advantages[-reach:]]
        )
        decay = torch.cat([decay[:-reach] * decay[reach:], torch.zeros_like(decay[-reach:])])
        reach *= 2
    return advantages, advantages + values


def next_values(values: Tensor, last_values: Tensor, final_values: Tensor, truncated: Tensor) -> Tensor:
    """V(s_{t+1}) for `gae`, from what a rollout has.

    v_{t+1} = final_values_t where truncated_t, else values_{t+1} (last_values after the last step).

    Args:
        values: V(s_t), (T, N) or (T, N, K).
        last_values: V of the observations after the last step, (N,) or (N, K).
        final_values: V of final observations where an episode was truncated, the shape of `values`;
            whatever elsewhere.
        truncated: (T, N) bool.
    """
    shifted = torch.cat([values[1:], last_values.unsqueeze(0)])
    mask = truncated.unsqueeze(-1) if values.ndim == 3 else truncated
    return torch.where(mask, final_values, shifted)
