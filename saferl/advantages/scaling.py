"""What is done to advantages before they enter a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """(A - mean) / (std + 1e-8) over all entries, or over those where `mask` is True (others become 0).

    The population standard deviation is used, so a single entry gives 0 rather than NaN.
    """
    # Twice: the rounding error of the mean is all that equal advantages have left after the first time,
    # and divided by its own size it would be 1.
    centred = centre(centre(advantages, mask), mask)
    count = advantages.numel() if mask is None else mask.sum().clamp_min(1)
    variance = centred.square().sum() / count
    return centred / (variance.sqrt() + 1e-8)


def centre(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """A - mean over all entries, or over those where `mask` is True (others become 0).

    What cost advantages get: their scale carries the constraint's units, so it is left alone.
    """
    if mask is None:
        return advantages - advantages.mean()
    mean = torch.where(mask, advantages, 0.0).sum() / mask.sum().clamp_min(1)
    return torch.where(mask, advantages - mean, 0.0)
