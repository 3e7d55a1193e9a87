"""Action distributions: diagonal Gaussian for boxes, categorical for discrete spaces.

A distribution is described by one parameter tensor of shape (..., P), so that a rollout stores the
behaviour policy exactly and the KL divergence to it has a closed form.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from saferl.errors import UsageError

_LOG_2PI = math.log(2 * math.pi)


class ActionDistribution(Protocol):
    """What the agents ask of a distribution; B stands for any leading axes.

    `parameter_size` P, `action_size` A (columns that a rollout stores) and `network_size` (outputs of
    the policy network) are plain integers.
    """

    parameter_size: int
    action_size: int
    network_size: int

    def parameters_of(self, outputs: Tensor) -> Tensor:
        """Network outputs (B, network_size) to distribution parameters (B, P)."""
        ...

    def sample(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw actions (B, A)."""
        ...

    def mode(self, parameters: Tensor) -> Tensor:
        """The most likely actions (B, A)."""
        ...

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """Log-density or log-probability (B,), summed over action dimensions."""
        ...

    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy (B,), summed over action dimensions."""
        ...

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old || new) (B,), summed over action dimensions."""
        ...

    def to_env(self, actions: Tensor) -> Tensor:
        """What the environment's `step` takes, from stored actions (B, A)."""
        ...


class GaussianActions(nn.Module):
    """Unsquashed diagonal Gaussian with a standard deviation that does not depend on the state.

    Actions live in [-1, 1] per dimension and are mapped affinely onto the environment's box, then
    clipped to it; a dimension without finite bounds is passed through. `log_std` starts at 0
    (OmniSafe, Safe-Policy-Optimization). Parameters: mean and log_std side by side, P = 2 A.
    """

    low: Tensor
    high: Tensor

    def __init__(self, space: spaces.Box, log_std_init: float = 0.0) -> None:
        super().__init__()
        self.shape = space.shape
        self.action_size = int(np.prod(space.shape))
        self.network_size = self.action_size
        self.parameter_size = 2 * self.action_size
        self.log_std = nn.Parameter(torch.full((self.action_size,), float(log_std_init)))
        low = torch.as_tensor(np.asarray(space.low, dtype=np.float32).reshape(-1))
        high = torch.as_tensor(np.asarray(space.high, dtype=np.float32).reshape(-1))
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        bounded = torch.isfinite(low) & torch.isfinite(high)
        self.register_buffer("_offset", torch.where(bounded, (high + low) / 2, 0.0), persistent=False)
        self.register_buffer("_scale", torch.where(bounded, (high - low) / 2, 1.0), persistent=False)

    def parameters_of(self, outputs: Tensor) -> Tensor:
        return torch.cat([outputs, self.log_std.expand_as(outputs)], dim=-1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_std = parameters.chunk(2, dim=-1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + log_std.exp() * noise

    def mode(self, parameters: Tensor) -> Tensor:
        return parameters.chunk(2, dim=-1)[0]

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = parameters.chunk(2, dim=-1)
        standard = (actions - mean) * (-log_std).exp()
        return -(0.5 * standard.square() + log_std + 0.5 * _LOG_2PI).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        return (parameters.chunk(2, dim=-1)[1] + 0.5 + 0.5 * _LOG_2PI).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        old_mean, old_log_std = old.chunk(2, dim=-1)
        new_mean, new_log_std = new.chunk(2, dim=-1)
        gap = (old_mean - new_mean).square() + (2 * old_log_std).exp()
        return (new_log_std - old_log_std + 0.5 * gap * (-2 * new_log_std).exp() - 0.5).sum(-1)

    def to_env(self, actions: Tensor) -> Tensor:
        offset, scale = self.get_buffer("_offset"), self.get_buffer("_scale")
        mapped = torch.maximum(torch.minimum(actions * scale + offset, self.high), self.low)
        return mapped.reshape(actions.shape[:-1] + self.shape)


class CategoricalActions(nn.Module):
    """One independent categorical for Discrete spaces, several for MultiDiscrete.

    Parameters are the log-probabilities of all categories side by side, P = sum of the sizes.
    """

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        super().__init__()
        if isinstance(space, spaces.Discrete):
            self.sizes, start = [int(space.n)], np.asarray([space.start])
        else:
            self.sizes, start = [int(n) for n in space.nvec.reshape(-1)], np.asarray(space.start).reshape(-1)
        self.scalar = isinstance(space, spaces.Discrete)
        self.shape = space.shape or ()
        self.action_size = len(self.sizes)
        self.network_size = self.parameter_size = sum(self.sizes)
        self.register_buffer("_start", torch.as_tensor(start, dtype=torch.int64), persistent=False)

    def _split(self, parameters: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = parameters.split(self.sizes, dim=-1)
        return parts

    def parameters_of(self, outputs: Tensor) -> Tensor:
        return torch.cat([part.log_softmax(-1) for part in self._split(outputs)], dim=-1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        columns = []
        for part in self._split(parameters):
            # Gumbel-max keeps any leading shape and needs no reshaping for torch.multinomial.
            uniform = torch.rand(part.shape, generator=generator, device=part.device, dtype=part.dtype)
            gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
            columns.append((part + gumbel).argmax(-1))
        return torch.stack(columns, dim=-1).float()

    def mode(self, parameters: Tensor) -> Tensor:
        return torch.stack([part.argmax(-1) for part in self._split(parameters)], dim=-1).float()

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        index = actions.long()
        gathered = [
            part.gather(-1, index[..., i : i + 1]).squeeze(-1)
            for i, part in enumerate(self._split(parameters))
        ]
        return torch.stack(gathered).sum(0)

    def entropy(self, parameters: Tensor) -> Tensor:
        return -(parameters.exp() * parameters).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        return (old.exp() * (old - new)).sum(-1)

    def to_env(self, actions: Tensor) -> Tensor:
        index = actions.long() + self.get_buffer("_start")
        return index.squeeze(-1) if self.scalar else index.reshape(actions.shape[:-1] + self.shape)


def action_distribution(
    space: spaces.Space[Any], log_std_init: float = 0.0
) -> GaussianActions | CategoricalActions:
    """The distribution for an action space.

    Raises `UsageError` unless the space is Box, Discrete or MultiDiscrete.
    """
    if isinstance(space, spaces.Box):
        return GaussianActions(space, log_std_init)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return CategoricalActions(space)
    raise UsageError(
        f"actions of {type(space).__name__} are not supported; on-policy agents take Box, Discrete or "
        "MultiDiscrete."
    )
