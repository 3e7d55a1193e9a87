"""Mish (Misra 2019), x tanh(softplus(x)), several times faster on the CPU than torch's.

With w = e^x and q = w (w + 2), tanh(softplus(x)) = q / (q + 2), and the derivative is

    q / (q + 2) + 4 x w (w + 1) / (q + 2)^2.

One exponential serves both, and the derivative is kept from the forward pass, so that the backward pass is a
product. Elsewhere than in float32 on the CPU it is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Mish", "mish"]


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
    mish_kernel.forward(x.view(-1).numpy(), out.view(-1).numpy())
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
        mish_kernel.forward_and_slope(*(tensor.view(-1).numpy() for tensor in (x, out, slopes)))
        ctx.save_for_backward(slopes)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slopes,) = ctx.saved_tensors
        result: Tensor = gradient * slopes
        return result
