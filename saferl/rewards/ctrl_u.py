"""Ctrl-U: weigh a reward model's signal by exp(-U), U being how much the model disagrees with itself.

Zhang et al. 2025, "Ctrl-U: Robust Conditional Image Generation via Uncertainty-aware Reward Modeling" (ICLR
2025, arXiv 2410.11236). There the frozen reward model reads two generations for one condition, and the reward
loss of each element is weighed by their disagreement, which is itself penalised. The second half of the
module carries the idea over to scalar rewards of reinforcement learning, where the variance over an ensemble,
dropout passes, paraphrases or prefix resamples is the disagreement; that form is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from saferl.errors import UsageError

__all__ = [
    "absolute_disagreement",
    "classification_disagreement",
    "ensemble_disagreement",
    "stationary_uncertainty",
    "uncertainty_loss",
    "uncertainty_weighted_reward",
]


def classification_disagreement(
    primary: Tensor, auxiliary: Tensor, *, dim: int = 1, detach: bool = False
) -> Tensor:
    """KL(softmax(auxiliary) || softmax(primary)) over the classes: logits (B, C, ...) -> U (B, ...), nats.

    The direction is that of the published segmentation code, which also leaves U in the graph, so that its
    penalty pulls the two predictions together; `detach` cuts the gradient and leaves only the weighting.
    `dim` is the class axis, which disappears. Raises `UsageError` on unequal shapes.
    """
    _check_shapes(primary=primary, auxiliary=auxiliary)
    log_primary = functional.log_softmax(primary, dim=dim)
    log_auxiliary = functional.log_softmax(auxiliary, dim=dim)
    divergence = (log_auxiliary.exp() * (log_auxiliary - log_primary)).sum(dim=dim)
    return divergence.detach() if detach else divergence


def absolute_disagreement(primary: Tensor, auxiliary: Tensor, *, detach: bool = False) -> Tensor:
    """|primary - auxiliary|, elementwise: the published U of depth, edge and line-art predictions.

    `detach` as in `classification_disagreement`. Raises `UsageError` on unequal shapes.
    """
    _check_shapes(primary=primary, auxiliary=auxiliary)
    difference = (primary - auxiliary).abs()
    return difference.detach() if detach else difference


def uncertainty_loss(losses: Tensor, uncertainty: Tensor, penalty: float = 1.0) -> Tensor:
    """L exp(-U) + lambda U, elementwise (equation 4, read at second hand).

    The caller averages, over the labelled elements where some are not. With U = 0 this is the loss L; for U
    free to move it is least at `stationary_uncertainty`. The published code scales the penalty by 1 for
    segmentation on ADE20K and by 0.1 elsewhere, and weighs the first term alone by a reward scale of 0.1 or
    0.2. Raises `UsageError` on unequal shapes and for a negative penalty.
    """
    _check_shapes(losses=losses, uncertainty=uncertainty)
    if not 0 <= penalty < math.inf:
        raise UsageError(f"the uncertainty penalty is {penalty:g}; it must be finite and at least 0.")
    return losses * torch.exp(-uncertainty) + penalty * uncertainty


def stationary_uncertainty(losses: Tensor, penalty: float = 1.0) -> Tensor:
    """The U >= 0 that minimises `uncertainty_loss`: ln(L / lambda) where L > lambda, else 0; elementwise.

    Raises `UsageError` unless the penalty is positive.
    """
    if not 0 < penalty < math.inf:
        raise UsageError(f"the uncertainty penalty is {penalty:g}; it must be positive and finite.")
    return (losses / penalty).clamp(min=1.0).log()


def ensemble_disagreement(rewards: Tensor, dim: int = 0) -> Tensor:
    """The sample variance over K readings of the same reward: (K, ...) -> U (...), in squared reward units.

    The axis `dim` holds ensemble members, dropout passes, paraphrases or prefix resamples. No gradient flows
    into U. Raises `UsageError` for fewer than 2 readings, which cannot disagree.
    """
    if rewards.dim() == 0 or rewards.shape[dim] < 2:
        raise UsageError("a reward was read fewer than 2 times; disagreement needs at least 2 readings.")
    return rewards.detach().var(dim=dim)


def uncertainty_weighted_reward(rewards: Tensor, uncertainty: Tensor, baseline: float | Tensor) -> Tensor:
    """exp(-U) (r - b), elementwise: an uncertain reward counts as the baseline.

    The reward is centred first, because shrinking a raw one towards 0 would favour or punish whatever is
    uncertain. `baseline` b is a number or broadcasts to the rewards, for example the mean of a group. Raises
    `UsageError` on unequal shapes of rewards and uncertainty, or a baseline that does not fit.
    """
    _check_shapes(rewards=rewards, uncertainty=uncertainty)
    centred = rewards - baseline
    if centred.shape != rewards.shape:
        raise UsageError(
            f"the centred rewards have shape {tuple(centred.shape)}; the baseline must broadcast to the "
            f"rewards' {tuple(rewards.shape)}."
        )
    return torch.exp(-uncertainty) * centred


def _check_shapes(**tensors: Tensor) -> None:
    (first, one), (second, two) = tensors.items()
    if one.shape != two.shape:
        raise UsageError(
            f"{first} has shape {tuple(one.shape)} and {second} {tuple(two.shape)}; they must be equal."
        )
