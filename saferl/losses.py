"""Losses as pure functions of tensors, shared by control and language learners."""

from __future__ import annotations

import torch
from torch import Tensor

from saferl.nn.shapes import same_shape


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's pessimistic surrogate, to be minimised.

    L = -E min(rho A, clip(rho, 1 - clip, 1 + clip) A),  rho = exp(log pi - log pi_old)

    Schulman et al. 2017, equation 7. All arguments have one shape (B,). Returns the loss and the
    detached diagnostics `ratio` (mean) and `clip_fraction`. Raises `ValueError` on unequal shapes.
    """
    same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    detached = ratio.detach()
    return loss, {"ratio": detached.mean(), "clip_fraction": ((detached - 1).abs() > clip).float().mean()}


def value_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over the batch, summed over streams: values and targets (B, S).

    Every stream has its own network, so the sum gives each exactly the gradient it would have alone.
    """
    same_shape(values=values, targets=targets)
    return (values - targets).square().mean(0).sum()
