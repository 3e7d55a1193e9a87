"""The compiled part of `saferl.nn.mish`, apart so that numba is imported only for it."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_ONE, _TWO, _FOUR = np.float32(1), np.float32(2), np.float32(4)
_TOP = np.float32(5e8)  # e^20: beyond it tanh(softplus) is 1 in float32

_compile = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})


@_compile
def forward(x: NDArray[np.float32], exponentials: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write x tanh(softplus(x)) to `out` (N,), given e^x; the two may be one array."""
    for j in range(x.size):
        w = min(exponentials[j], _TOP)
        q = w * (w + _TWO)
        out[j] = x[j] * (q * (_ONE / (q + _TWO)))


@_compile
def forward_and_slope(
    x: NDArray[np.float32],
    exponentials: NDArray[np.float32],
    out: NDArray[np.float32],
    slopes: NDArray[np.float32],
) -> None:
    """As `forward`; the derivative goes to `slopes` (N,), which may be the array of e^x."""
    for j in range(x.size):
        w = min(exponentials[j], _TOP)
        q = w * (w + _TWO)
        share = _ONE / (q + _TWO)
        t = q * share
        out[j] = x[j] * t
        slopes[j] = t + x[j] * _FOUR * w * (w + _ONE) * share * share
