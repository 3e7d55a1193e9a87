"""Mish (Misra 2019), x tanh(softplus(x)), several times faster on the CPU than torch's.

With w = e^x and q = w (w + 2), tanh(softplus(x)) = q / (q + 2), and the derivative is

    q / (q + 2) + 4 x w (w + 1) / (q + 2)^2.

One exponential serves both, and the derivative is kept from the forward pass, so that the backward pass is a
product. Elsewhere than in float32 on the CPU it is torch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Mish", "mish"]

_LEAST = 1 << 17
"""Entries that are worth a thread."""


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x)), elementwise; its gradient has none itself on the CPU in float32."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return nn.functional.mish(x)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Mish.apply(x)
        return result
    from saferl.nn import mish_kernel

    x = x.detach().contiguous()
    out = torch.empty_like(x)
    flat, target = x.view(-1).numpy(), out.view(-1).numpy()

    def piece(part: slice) -> None:
        _exponentials(flat[part], target[part])
        mish_kernel.forward(flat[part], target[part], target[part])

    _on_threads(piece, flat.size)
    return out


class Mish(nn.Module):
    """`mish` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return mish(x)


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from saferl.nn import mish_kernel

        x = x.contiguous()
        out, slopes = torch.empty_like(x), torch.empty_like(x)
        flat, target, result = (tensor.view(-1).numpy() for tensor in (x, slopes, out))

        def piece(part: slice) -> None:
            _exponentials(flat[part], target[part])
            mish_kernel.forward_and_slope(flat[part], target[part], result[part], target[part])

        _on_threads(piece, flat.size)
        ctx.save_for_backward(slopes)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slopes,) = ctx.saved_tensors
        result: Tensor = gradient * slopes
        return result


def _on_threads(piece: Callable[[slice], None], size: int) -> None:
    """Call `piece` for parts of `size` entries that cover them, on as many threads as torch uses."""
    workers = min(torch.get_num_threads(), size // _LEAST)
    if workers < 2:
        piece(slice(None))
        return
    edges = [size * k // workers for k in range(workers + 1)]
    list(_pool(workers).map(piece, map(slice, edges, edges[1:])))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="mish")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _exponentials(x: np.ndarray, out: np.ndarray) -> None:
    # Of 88 and more it is infinite, which the kernels cut.
    with np.errstate(over="ignore", under="ignore"):
        np.exp(x, out=out)
