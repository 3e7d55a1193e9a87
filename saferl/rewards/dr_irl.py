"""DR-IRL: advantages multiplied by how hard a prompt is and how the policy responds to its demonstrations.

Cheng et al. 2025, "Inverse Reinforcement Learning with Dynamic Reward Scaling for LLM Alignment" (arXiv
2503.18991). The formulas were read in summaries of the paper; its own code, its threshold tau and its
training settings are unverified. Prompts fall into categories (harm types), each with its own reward model;
statistics are taken over the prompts of one category. Category ids are integers (N,), a negative one marks an
unknown category, whose multiplier is 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from saferl.errors import UsageError

__all__ = [
    "data_hardness",
    "difficulty_multiplier",
    "hardness_multiplier",
    "irl_loss",
    "responsiveness_multiplier",
    "scaled_group_advantages",
]


def irl_loss(demonstrations: Tensor, samples: Tensor, beta: float) -> Tensor:
    """Maximum-likelihood inverse RL of a reward model: -(mean r(x, demo) - mean r(x, sample)) / beta.

    Rewards of demonstrations and of the current policy's samples, each of any shape; a scalar. Its gradient
    is that of the demonstrations' negative log-likelihood under pi proportional to pi_ref exp(r / beta), if
    the policy is that pi. Raises `UsageError` for no rewards and unless beta > 0.
    """
    if not beta > 0:
        raise UsageError(f"beta is {beta:g}; it must be positive.")
    if demonstrations.numel() == 0 or samples.numel() == 0:
        raise UsageError("there are no demonstrations or no samples; the loss compares their mean rewards.")
    return (samples.mean() - demonstrations.mean()) / beta


def data_hardness(
    demonstrations: Tensor, samples: Tensor, demonstration_mask: Tensor, sample_mask: Tensor
) -> Tensor:
    """delta = 1 - W, W = mean over the demonstration's clauses k of max_l cos(demo_k, sample_l); (N,).

    Clause embeddings (N, K, E) and (N, L, E), padded; the boolean masks (N, K) and (N, L) are True for
    clauses that exist. delta lies in [0, 2], and is 1 where either response is empty. Raises `UsageError` for
    shapes that do not fit.
    """
    fits = (
        demonstrations.dim() == samples.dim() == 3
        and demonstrations.shape[0] == samples.shape[0]
        and demonstrations.shape[2] == samples.shape[2]
        and demonstrations.shape[:2] == demonstration_mask.shape
        and samples.shape[:2] == sample_mask.shape
    )
    if not fits:
        raise UsageError(
            f"the clause embeddings have shapes {tuple(demonstrations.shape)} and {tuple(samples.shape)} and "
            f"the masks {tuple(demonstration_mask.shape)} and {tuple(sample_mask.shape)}; "
            "they must be (N, K, E), (N, L, E), (N, K) and (N, L)."
        )
    if demonstrations.shape[1] == 0 or samples.shape[1] == 0:
        return demonstrations.new_ones(len(demonstrations))
    cosines = functional.normalize(demonstrations, dim=-1) @ functional.normalize(samples, dim=-1).mT
    best = cosines.masked_fill(~sample_mask[:, None, :], -torch.inf).amax(dim=2)
    used = demonstration_mask & sample_mask.any(dim=1, keepdim=True)
    similarity = torch.where(used, best, 0.0).sum(dim=1) / used.sum(dim=1).clamp(min=1)
    return (1 - similarity).clamp(0.0, 2.0)


def hardness_multiplier(hardness: Tensor, categories: Tensor) -> Tensor:
    """alpha_D = sigmoid(delta) / sigmoid(mean delta of the category); hardness (N,) -> (N,).

    1 where all prompts of the category are equally hard, and within [0.5677, 1.7616] for delta in [0, 2].
    Raises `UsageError` for shapes or category ids that do not fit.
    """
    index, size, known = _segments(hardness, categories)
    mean = _segment_mean(hardness, known, index, size)[index]
    return torch.where(known, torch.sigmoid(hardness) / torch.sigmoid(mean), 1.0)


def responsiveness_multiplier(gaps: Tensor, categories: Tensor, tolerance: float) -> Tensor:
    """alpha_M = sigmoid(mean of the kept gaps) / sigmoid(mean of all gaps), per category; gaps (N,) -> (N,).

    A gap is r(demonstration) - r(sample); it is kept where its squared distance from the category's mean is
    at most `tolerance` (tau, in squared reward units; the paper's value is unverified). All prompts of a
    category share the multiplier, which is positive, 1 for equal gaps, below 2 where the mean gap is at least
    0, and by our definition 1 where no gap is kept. Raises `UsageError` for a negative tolerance, and for
    shapes or category ids that do not fit.
    """
    if not tolerance >= 0:
        raise UsageError(f"the tolerance is {tolerance:g}; it must be at least 0.")
    index, size, known = _segments(gaps, categories)
    mean = _segment_mean(gaps, known, index, size)
    kept = known & ((gaps - mean[index]).square() <= tolerance)
    any_kept = torch.bincount(index[kept], minlength=size) > 0
    kept_mean = torch.where(any_kept, _segment_mean(gaps, kept, index, size), mean)
    ratio = torch.exp(functional.logsigmoid(kept_mean) - functional.logsigmoid(mean))
    return torch.where(known, ratio[index], 1.0)


def difficulty_multiplier(
    hardness: Tensor,
    gaps: Tensor,
    categories: Tensor,
    tolerance: float,
    direction: Literal["formula", "reversed"] = "formula",
) -> Tensor:
    """alpha = alpha_D alpha_M, the advantage multiplier of each prompt (N,); positive, so no sign flips.

    By the paper's formula a response unlike its demonstration (large delta) gets a larger multiplier, while
    its summaries call a large multiplier easy; "reversed" takes 1 / alpha, our reading of that text. Both
    factors are relative to the prompt's own category, so alpha does not make up for a category that is rarely
    sampled. No gradient flows into alpha. Raises `UsageError` for an unknown direction and as its two factors
    do.
    """
    if direction not in ("formula", "reversed"):
        raise UsageError(f"the direction is {direction!r}; it must be 'formula' or 'reversed'.")
    with torch.no_grad():
        alpha = hardness_multiplier(hardness, categories) * responsiveness_multiplier(
            gaps, categories, tolerance
        )
        return alpha if direction == "formula" else alpha.reciprocal()


def scaled_group_advantages(
    rewards: Tensor, multipliers: Tensor, std: Literal["population", "sample"] = "population"
) -> Tensor:
    """alpha (R - mean) / std over each prompt's group: rewards (N, G) and alpha (N,) -> (N, G).

    The paper does not say which standard deviation it takes. A group of equal rewards gets 0. Raises
    `UsageError` for other shapes, an unknown `std`, and a sample deviation of a single response.
    """
    if std not in ("population", "sample"):
        raise UsageError(f"std is {std!r}; it must be 'population' or 'sample'.")
    correction = int(std == "sample")
    if rewards.dim() != 2 or multipliers.shape != rewards.shape[:1] or rewards.shape[1] <= correction:
        raise UsageError(
            f"the rewards have shape {tuple(rewards.shape)} and the multipliers {tuple(multipliers.shape)}; "
            f"they must be (N, G) and (N,), with a group of at least {1 + correction}."
        )
    deviation = rewards.std(dim=1, correction=correction, keepdim=True)
    # Equal rewards are told by their range: rounding of their mean can leave a deviation above 0.
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    scaled = (rewards - rewards.mean(dim=1, keepdim=True)) / torch.where(equal, 1.0, deviation)
    return torch.where(equal, 0.0, multipliers[:, None] * scaled)


def _segments(values: Tensor, categories: Tensor) -> tuple[Tensor, int, Tensor]:
    """The segment of each prompt (N,), the number of segments, and which prompts have a known category."""
    if values.dim() != 1 or categories.shape != values.shape:
        raise UsageError(
            f"the values have shape {tuple(values.shape)} and the category ids {tuple(categories.shape)}; "
            "both must be (N,)."
        )
    if categories.is_floating_point() or categories.is_complex() or categories.dtype == torch.bool:
        raise UsageError(f"the category ids have type {categories.dtype}; they must be integers.")
    ids, index = categories.unique(return_inverse=True)
    return index, len(ids), categories >= 0


def _segment_mean(values: Tensor, mask: Tensor, index: Tensor, size: int) -> Tensor:
    """The mean of `values` (N,) where `mask`, per segment (size,); 0 for a segment with none."""
    sums = values.new_zeros(size).index_add(0, index, torch.where(mask, values, 0.0))
    return sums / values.new_zeros(size).index_add(0, index, mask.to(values.dtype)).clamp(min=1)
