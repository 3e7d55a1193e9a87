"""Running normalisation that evaluation cannot disturb and checkpoints carry."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningNormaliser(nn.Module):
    """Standardise by the running mean and standard deviation of everything seen in training mode.

    y = clip((x - mean) / max(std, floor), -clip, clip)

    The moments are merged batch by batch (Chan, Golub and LeVeque 1983) in float64. `update` does
    nothing in eval mode, so an evaluation never changes a policy; the moments are buffers, so a
    checkpoint of the module holds them. Defaults (floor 0.01, clip 5) are those of the published
    on-policy agents of OmniSafe.

    Args:
        size: features of the last axis.
        clip: bound on the result's magnitude.
        floor: smallest standard deviation divided by.
        centre: subtract the mean; False only rescales (for rewards, whose sign has a meaning).
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, size: int, *, clip: float = 5.0, floor: float = 0.01, centre: bool = True) -> None:
        super().__init__()
        self.clip = clip
        self.floor = floor
        self.centre = centre
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge a batch `x` of shape (B, size) into the moments; without effect in eval mode."""
        if not self.training or x.shape[0] == 0:
            return
        x = x.double()
        batch_variance, batch_mean = torch.var_mean(x, 0, correction=0)
        total = self.count + x.shape[0]
        weight = x.shape[0] / total
        delta = batch_mean - self.mean
        # While nothing was seen the placeholder variance has weight zero, so it leaves no trace.
        self.variance.copy_(
            self.variance * (1 - weight) + batch_variance * weight + delta.square() * weight * (1 - weight)
        )
        self.mean.add_(delta * weight)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape (..., size); float32 comes back."""
        scale = self.variance.sqrt().clamp_min(self.floor)
        shifted = x.double() - self.mean if self.centre else x.double()
        return (shifted / scale).clamp(-self.clip, self.clip).float()
