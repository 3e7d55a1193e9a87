"""Action distributions: Gaussians (plain, squashed, around a deterministic action), categoricals.

A distribution is described by one parameter tensor of shape (..., P), so that a rollout stores the
behaviour policy exactly and the KL divergence to it has a closed form.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

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


class _BoxActions(nn.Module):
    """A diagonal Gaussian over A dimensions, whose actions in [-1, 1] map affinely onto a box.

    Parameters: mean and log standard deviation side by side, P = 2 A. A dimension without finite bounds is
    passed through.
    """

    low: Tensor
    high: Tensor

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.shape = space.shape
        self.action_size = int(np.prod(space.shape))
        self.parameter_size = 2 * self.action_size
        low = torch.as_tensor(np.asarray(space.low, dtype=np.float32).reshape(-1))
        high = torch.as_tensor(np.asarray(space.high, dtype=np.float32).reshape(-1))
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        bounded = torch.isfinite(low) & torch.isfinite(high)
        self.register_buffer("_offset", torch.where(bounded, (high + low) / 2, 0.0), persistent=False)
        self.register_buffer("_scale", torch.where(bounded, (high - low) / 2, 1.0), persistent=False)

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


class GaussianActions(_BoxActions):
    """Unsquashed diagonal Gaussian with a standard deviation that does not depend on the state.

    Actions live in [-1, 1] per dimension and are mapped affinely onto the environment's box, then
    clipped to it; a dimension without finite bounds is passed through. `log_std` starts at 0
    (OmniSafe, Safe-Policy-Optimization). Parameters: mean and log_std side by side, P = 2 A.
    """

    def __init__(self, space: spaces.Box, log_std_init: float = 0.0) -> None:
        super().__init__(space)
        self.network_size = self.action_size
        self.log_std = nn.Parameter(torch.full((self.action_size,), float(log_std_init)))

    def parameters_of(self, outputs: Tensor) -> Tensor:
        return torch.cat([outputs, self.log_std.expand_as(outputs)], dim=-1)


class SquashedGaussianActions(_BoxActions):
    """tanh of a diagonal Gaussian whose mean and deviation the network gives: SAC's policy.

    a = tanh(u), u ~ N(mean, std^2);  log pi(a) = log N(u) - sum log(1 - a^2)      (Haarnoja 2018, appendix C)

    with log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which neither overflows nor cancels. `log_std`
    is clipped to [-20, 2] (the authors' code and OmniSafe). The KL divergence between two of them is that
    between their Gaussians, since tanh is one-to-one. Parameters: mean and log_std of u, P = 2 A.

    Raises:
        UsageError: a dimension of the box has no finite bounds.
    """

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space)
        _check_bounded(space)
        self.network_size = 2 * self.action_size
        nodes, weights = np.polynomial.hermite.hermgauss(32)
        self.register_buffer(
            "_nodes", torch.as_tensor(nodes * math.sqrt(2), dtype=torch.float32), persistent=False
        )
        self.register_buffer(
            "_weights", torch.as_tensor(weights / math.sqrt(math.pi), dtype=torch.float32), persistent=False
        )

    def parameters_of(self, outputs: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, dim=-1)
        return torch.cat([mean, log_std.clamp(-20.0, 2.0)], dim=-1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        return super().sample(parameters, generator).tanh()

    def sample_with_log_prob(
        self, parameters: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw actions (B, A), differentiable in the parameters, and their log-density (B,)."""
        mean, log_std = parameters.chunk(2, dim=-1)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        before = mean + log_std.exp() * noise
        # (before - mean) / std is the noise itself: no division, and no gradient through the difference.
        log_normal = -(0.5 * noise.square() + log_std + 0.5 * _LOG_2PI)
        return before.tanh(), (log_normal - _log_slope(before)).sum(-1)

    def mode(self, parameters: Tensor) -> Tensor:
        """tanh of the mean (the median, and what evaluations of SAC act by)."""
        return super().mode(parameters).tanh()

    def log_prob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        edge = 1 - torch.finfo(actions.dtype).eps
        before = torch.atanh(actions.clamp(-edge, edge))
        return super().log_prob(parameters, before) - _log_slope(before).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy of the Gaussian plus E log(1 - tanh(u)^2), by 32-point Gauss-Hermite quadrature."""
        mean, log_std = parameters.chunk(2, dim=-1)
        points = mean[..., None] + log_std.exp()[..., None] * self.get_buffer("_nodes")
        bend = (_log_slope(points) * self.get_buffer("_weights")).sum(-1)
        return super().entropy(parameters) + bend.sum(-1)


class DeterministicActions(_BoxActions):
    """tanh of the network's outputs; sampling adds Gaussian noise of fixed size and clips: TD3's policy.

    Densities, entropy and KL divergence are those of the Gaussian before it is clipped to [-1, 1].
    Parameters: the action and its log noise, P = 2 A.

    Args:
        space: a box with finite bounds.
        noise: standard deviation of the exploration noise, in units of half the action range.

    Raises:
        UsageError: a dimension of the box has no finite bounds, or the noise is negative.
    """

    def __init__(self, space: spaces.Box, noise: float = 0.1) -> None:
        super().__init__(space)
        _check_bounded(space)
        if not noise >= 0:
            raise UsageError(f"the exploration noise must be 0 or more, not {noise:g}.")
        self.network_size = self.action_size
        self._log_noise = math.log(noise) if noise > 0 else -math.inf

    def parameters_of(self, outputs: Tensor) -> Tensor:
        actions = outputs.tanh()
        return torch.cat([actions, torch.full_like(actions, self._log_noise)], dim=-1)

    def sample(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        return super().sample(parameters, generator).clamp(-1.0, 1.0)


def _log_slope(u: Tensor) -> Tensor:
    """log of d tanh(u) / du = log(1 - tanh(u)^2), without cancellation for large |u|."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))


def _check_bounded(space: spaces.Box) -> None:
    if not space.is_bounded():
        raise UsageError(
            "this policy's actions fill a bounded box, but the environment's actions have no finite bounds; "
            "rescale them with a wrapper, or use an on-policy algorithm such as ppo-lag."
        )


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


Head = Literal["plain", "squashed", "deterministic"]
"""How actions come from a policy network: by `GaussianActions` or `CategoricalActions`, by
`SquashedGaussianActions`, or by `DeterministicActions`."""


def action_distribution(
    space: spaces.Space[Any],
    log_std_init: float = 0.0,
    *,
    head: Head = "plain",
    exploration_noise: float = 0.1,
) -> GaussianActions | CategoricalActions | SquashedGaussianActions | DeterministicActions:
    """The distribution for an action space.

    Args:
        space: of one action.
        log_std_init: initial log standard deviation of a plain Gaussian.
        head: which family.
        exploration_noise: of a deterministic policy.

    Raises `UsageError` unless the space is Box or, for a plain head, Discrete or MultiDiscrete.
    """
    if isinstance(space, spaces.Box):
        match head:
            case "squashed":
                return SquashedGaussianActions(space)
            case "deterministic":
                return DeterministicActions(space, exploration_noise)
            case _:
                return GaussianActions(space, log_std_init)
    if head != "plain":
        raise UsageError(
            f"SAC and TD3 take continuous (Box) actions, not {type(space).__name__}; use an on-policy "
            "algorithm such as ppo-lag."
        )
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return CategoricalActions(space)
    raise UsageError(
        f"actions of {type(space).__name__} are not supported; on-policy agents take Box, Discrete or "
        "MultiDiscrete."
    )
