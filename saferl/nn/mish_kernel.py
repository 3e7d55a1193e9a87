"""The compiled part of `saferl.nn.mish`, apart so that numba is imported only for it.

Tiles fit the first-level cache. In each a first loop reduces x to k ln 2 + r, 2^k as the bits of a float, and
a second evaluates e^r by Cephes' polynomial of degree 7 (relative error 2^-23) and all that follows:
apart, the compiler makes vector code of both.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_TILE = 2_048
_ONE, _TWO, _FOUR = np.float32(1), np.float32(2), np.float32(4)
_LOW, _TOP = np.float32(-87), np.float32(20)  # beyond 20 tanh(softplus) is 1 in float32
_LOG2E = np.float32(1.44269504088896341)
_ROUND = np.float32(12_582_912)  # 1.5 * 2^23: adding it rounds to an integer
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_BIAS, _MANTISSA = np.int32(127), np.int32(23)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)

_compile = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})


@_compile
def _reduce(x: NDArray[np.float32], bits: NDArray[np.int32], rest: NDArray[np.float32]) -> None:
    """Write the bits of 2^k, and r, for x = k ln 2 + r."""
    for j in range(x.size):
        v = min(max(x[j], _LOW), _TOP)
        k = (v * _LOG2E + _ROUND) - _ROUND
        bits[j] = (np.int32(k) + _BIAS) << _MANTISSA
        rest[j] = (v - k * _LN2_HIGH) - k * _LN2_LOW


@_compile
def forward(x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write x tanh(softplus(x)) to `out` (N,)."""
    bits, rest = np.empty(_TILE, np.int32), np.empty(_TILE, np.float32)
    powers = bits.view(np.float32)
    for start in range(0, x.size, _TILE):
        xs, os = x[start : start + _TILE], out[start : start + _TILE]
        _reduce(xs, bits, rest)
        for j in range(xs.size):
            r = rest[j]
            p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
            w = (p * r * r + r + _ONE) * powers[j]
            q = w * (w + _TWO)
            os[j] = xs[j] * (q * (_ONE / (q + _TWO)))


@_compile
def forward_and_slope(x: NDArray[np.float32], out: NDArray[np.float32], slopes: NDArray[np.float32]) -> None:
    """As `forward`; the derivative goes to `slopes` (N,)."""
    bits, rest = np.empty(_TILE, np.int32), np.empty(_TILE, np.float32)
    powers = bits.view(np.float32)
    for start in range(0, x.size, _TILE):
        end = start + _TILE
        xs, os, ss = x[start:end], out[start:end], slopes[start:end]
        _reduce(xs, bits, rest)
        for j in range(xs.size):
            r = rest[j]
            p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
            w = (p * r * r + r + _ONE) * powers[j]
            q = w * (w + _TWO)
            share = _ONE / (q + _TWO)
            t = q * share
            os[j] = xs[j] * t
            ss[j] = t + xs[j] * _FOUR * w * (w + _ONE) * share * share
