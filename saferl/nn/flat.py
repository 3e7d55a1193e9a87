"""The parameters of a network, or of a stack of them, in one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["FlatParameters"]


class FlatParameters:
    """Move parameters into the rows of one tensor; modules see the same weights through views.

    Clipping, Adam and the average of a target network then cost a call each, instead of one a parameter.

    Args:
        parameters: all of a module; with `stacked` the first axis of each counts the networks S.
        stacked: see `saferl.nn.batched.BatchedMLPs`; otherwise S = 1.
    """

    values: nn.Parameter
    """All of them (S, P): what an optimiser is given."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, stacked: bool = False) -> None:
        self.parameters = [*parameters]
        self.rows = self.parameters[0].shape[0] if stacked else 1
        self.values = nn.Parameter(
            torch.cat([p.detach().reshape(self.rows, -1) for p in self.parameters], dim=1)
        )
        start = 0
        for parameter in self.parameters:
            end = start + parameter.numel() // self.rows
            parameter.data = self.values.data[:, start:end].view(parameter.shape)
            start = end

    def set_gradients(self, gradients: Sequence[Tensor], max_norm: float) -> None:
        """Hand the parameters' gradients to `values`, each network's clipped to a norm of `max_norm`."""
        flat = torch.cat([g.reshape(self.rows, -1) for g in gradients], dim=1)
        norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        self.values.grad = flat.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))

    @torch.no_grad()
    def follow(self, source: FlatParameters, share: float) -> None:
        """Move `share` of the way towards `source`: the step of a target network."""
        self.values.lerp_(source.values, share)
