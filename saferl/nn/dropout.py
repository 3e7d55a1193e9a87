"""Dropout (Srivastava et al. 2014), several times faster on the CPU than torch's.

torch draws a number of 32 bits an entry, one after the other. Sixteen bits decide as well: the rate is a
multiple of 2^-16, and kept entries are scaled by exactly its complement.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Dropout", "dropout"]

_LEVELS = 1 << 16


def dropout(x: Tensor, rate: float) -> Tensor:
    """x with a share `rate` of its entries 0 and the others times 1 / (1 - rate).

    Bits come from torch's default generator. On other devices than the CPU it is torch's.
    """
    level = round(rate * _LEVELS)
    if level == 0:
        return x
    if x.device.type != "cpu" or level == _LEVELS or torch.compiler.is_compiling():
        return nn.functional.dropout(x, rate)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
    words.random_(-(1 << 63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= level - _LEVELS // 2
    return x * (kept.to(x.dtype) * (_LEVELS / (_LEVELS - level)))


class Dropout(nn.Module):
    """`dropout` as a module, in training.

    Args:
        rate: share of entries that are dropped, in [0, 1].
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return dropout(x, self.rate) if self.training else x
