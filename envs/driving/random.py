"""Random numbers that depend on nothing but what they are for: no generator, no state.

A world's draws are hashes of (its seed, the episode, a stream, an index), so that a drive is the same in
whatever batch and slot it happens, on the CPU and on a GPU.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["uniform", "whole"]

# Odd 64-bit constants, as signed integers; the mixer is that of SplitMix64 (Steele et al. 2014).
_SEED, _EPISODE, _STREAM = -7046029254386353131, -4417276706812531889, 1609587929392839161
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's copies the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(seed: Tensor, episode: Tensor, stream: int, index: Tensor | int) -> Tensor:
    bits = seed * _SEED + episode * _EPISODE + (index * 2654435761 + ((stream * _STREAM) % (1 << 62)))
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def uniform(seed: Tensor, episode: Tensor, stream: int, index: Tensor | int = 0) -> Tensor:
    """Uniform float32 in [0, 1) of the common shape of the int64 arguments."""
    return _shift(_mix(seed, episode, stream, index), 40).float() * 2.0**-24


def whole(seed: Tensor, episode: Tensor, stream: int, index: Tensor | int, below: Tensor | int) -> Tensor:
    """Uniform int64 in [0, below)."""
    result: Tensor = _shift(_mix(seed, episode, stream, index), 33) % below
    return result
