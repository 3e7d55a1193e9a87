"""Beta distributions over a box, CaRL's and Roach's policy."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from saferl.errors import UsageError

__all__ = ["BetaActions", "beta_sample", "roach_mode"]

_EDGE = 1e-7
ROUNDS = 8
"""Attempts at a draw; a shape above 1 is refused 5 % of the time, all of them once in 10^10."""


def beta_sample(alpha: Tensor, beta: Tensor, normals: Tensor, uniforms: Tensor) -> Tensor:
    """Draws from Beta(alpha, beta) made of given noise, by Marsaglia and Tsang's (2000) gamma variates.

    The noise of a sample is fixed in number, whatever the parameters: rows of a batch can be drawn by
    different processes from one stream, and come out as if one had drawn all.

    Args:
        alpha, beta: (..., A), both at least 1.
        normals, uniforms: (..., 2 A, ROUNDS), standard normal and uniform on [0, 1).

    Returns:
        (..., A) in (0, 1).
    """
    shape = torch.cat([alpha, beta], -1)[..., None]
    d = shape - 1 / 3
    v = (1 + normals / (9 * d).sqrt()) ** 3
    positive = v > 0
    safe = torch.where(positive, v, 1.0)
    squeeze = 0.5 * normals * normals + d * (1 - safe + safe.log())
    # Refused attempts lose to accepted ones; if all are, the mean stands in.
    accepted = positive & (uniforms.clamp(min=1e-38).log() < squeeze)
    first = accepted & (accepted.cumsum(-1) == 1)
    variate = torch.where(accepted.any(-1), (first * safe).sum(-1), 1.0) * d[..., 0]
    a, b = variate.chunk(2, -1)
    return (a / (a + b)).clamp(_EDGE, 1 - _EDGE)


def roach_mode(parameters: Tensor) -> Tensor:
    """Roach's deterministic action in (0, 1): the mode, an end of the interval where a parameter is at most
    1, the mean where both are. CaRL takes the mean everywhere."""
    alpha, beta = parameters.chunk(2, -1)
    mode = (alpha - 1) / (alpha + beta - 2).clamp(min=1e-12)
    mean = alpha / (alpha + beta)
    result = torch.where((alpha > 1) & (beta > 1), mode, mean)
    result = torch.where((alpha <= 1) & (beta > 1), 0.0, result)
    return torch.where((alpha > 1) & (beta <= 1), 1.0, result)


class BetaActions(nn.Module):
    """x ~ Beta(alpha, beta) on (0, 1) in each of A dimensions, mapped onto the box; alpha, beta = softplus
    + 1.

    The + 1 keeps the density bounded and with one peak. Densities and entropies are those of x: the
    constant of the map cancels in ratios. Actions are stored as x. `mode` is the mean, which CaRL acts by.
    Parameters: alpha and beta side by side, P = 2 A.

    Raises:
        UsageError: the space is no box with finite bounds.
    """

    low: Tensor
    span: Tensor

    def __init__(self, space: spaces.Space) -> None:
        super().__init__()
        if not isinstance(space, spaces.Box) or not np.isfinite([space.low, space.high]).all():
            raise UsageError(f"a Beta policy needs actions in a box with finite bounds, not {space}.")
        self.shape = space.shape
        self.action_size = int(np.prod(space.shape))
        self.parameter_size = self.network_size = 2 * self.action_size
        low = torch.as_tensor(np.asarray(space.low, np.float32).reshape(-1))
        high = torch.as_tensor(np.asarray(space.high, np.float32).reshape(-1))
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("span", high - low, persistent=False)

    def parameters_of(self, outputs: Tensor) -> Tensor:
        """Network outputs (B, 2 A) to alpha and beta (B, 2 A), in float32."""
        return F.softplus(outputs.float()) + 1.0

    def noise(
        self, batch: int, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """What `draw` needs for a batch."""
        size = (batch, 2 * self.action_size, ROUNDS)
        return (
            torch.randn(size, generator=generator, device=device),
            torch.rand(size, generator=generator, device=device),
        )

    def draw(self, parameters: Tensor, noise: tuple[Tensor, Tensor]) -> Tensor:
        """Actions x (B, A) from given noise."""
        alpha, beta = parameters.chunk(2, -1)
        return beta_sample(alpha, beta, *noise)

    def sample(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw actions x (B, A)."""
        return self.draw(parameters, self.noise(len(parameters), generator, parameters.device))

    def mode(self, parameters: Tensor) -> Tensor:
        """The mean alpha / (alpha + beta) (B, A)."""
        alpha, beta = parameters.chunk(2, -1)
        return alpha / (alpha + beta)

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """Log-density of x (B,), which is kept 1e-7 away from 0 and 1."""
        alpha, beta = parameters.chunk(2, -1)
        x = actions.clamp(_EDGE, 1 - _EDGE)
        density = (alpha - 1) * x.log() + (beta - 1) * torch.log1p(-x) - _log_beta(alpha, beta)
        return density.sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy of x (B,)."""
        alpha, beta = parameters.chunk(2, -1)
        total = alpha + beta
        inner = (total - 2) * torch.digamma(total)
        inner = inner - (alpha - 1) * torch.digamma(alpha) - (beta - 1) * torch.digamma(beta)
        return (_log_beta(alpha, beta) + inner).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old || new) (B,)."""
        a, b = old.chunk(2, -1)
        c, d = new.chunk(2, -1)
        gap = (a - c) * torch.digamma(a) + (b - d) * torch.digamma(b)
        gap = gap + (c - a + d - b) * torch.digamma(a + b)
        return (_log_beta(c, d) - _log_beta(a, b) + gap).sum(-1)

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment takes, from x (B, A)."""
        return (self.low + self.span * actions).reshape(actions.shape[:-1] + self.shape)


def _log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
