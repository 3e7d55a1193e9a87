"""CaRL's network: a picture from above and measurements, a Beta policy, and a critic that is told more.

Layers are those of the published code ("roach_ln2"): seven convolutions, each with LayerNorm over channels
and pixels and ReLU; measurements through two layers of 256; both through 512 and 256 to the features that
policy and critic share. The critic also reads "value_measurements", which the policy does not. A picture of
256 pixels gives the published 1,983,541 parameters. For a smaller picture the first convolutions keep its
resolution (stride 1) until the last still has a pixel; for a vector instead of a picture, two layers of 256
are the encoder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from saferl.errors import UsageError
from saferl.nn.beta import BetaActions
from saferl.nn.spaces import space_from_json, space_to_json

__all__ = ["DrivingCritic", "DrivingPolicy", "batch_of"]

_KERNELS = (5, 5, 5, 5, 3, 3, 3)
_STRIDES = (2, 2, 2, 2, 2, 1, 1)
_CHANNELS = (8, 16, 24, 32, 64, 128, 256)
FEATURES = 256
PICTURE, VALUE = "bev", "value_measurements"


def _dense(inputs: int, *widths: int) -> nn.Sequential:
    """Linear, LayerNorm, ReLU, for each width."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def _sides(side: int, strides: tuple[int, ...]) -> list[int]:
    """Pixels a side after each convolution."""
    found = []
    for kernel, stride in zip(_KERNELS, strides, strict=True):
        side = (side - kernel) // stride + 1 if side >= kernel else 0
        found.append(side)
    return found


def _strides_for(side: int) -> tuple[int, ...]:
    """The published strides, the first of them 1 for pictures that would otherwise vanish."""
    for keep in range(6):
        strides = tuple(1 if k < keep else s for k, s in enumerate(_STRIDES))
        if _sides(side, strides)[-1] >= 1:
            return strides
    raise UsageError(f"a picture of {side} pixels a side is too small for CaRL's network; 23 are the least.")


class _PictureEncoder(nn.Module):
    """uint8 pictures (B, C, H, H) to flat features (B, size)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(shape) != 3 or shape[1] != shape[2]:
            raise UsageError(f"the picture has shape {shape}; CaRL's network takes (channels, side, side).")
        channels, side = shape[0], shape[1]
        strides = _strides_for(side)
        layers: list[nn.Module] = []
        for kernel, stride, width, after in zip(
            _KERNELS, strides, _CHANNELS, _sides(side, strides), strict=True
        ):
            convolution = nn.Conv2d(channels, width, kernel, stride)
            nn.init.xavier_uniform_(convolution.weight, nn.init.calculate_gain("relu"))
            nn.init.constant_(convolution.bias, 0.1)  # type: ignore[arg-type]
            layers += [convolution, nn.LayerNorm([width, after, after]), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.size = _CHANNELS[-1] * _sides(side, strides)[-1] ** 2

    def forward(self, pictures: Tensor) -> Tensor:
        encoded: Tensor = self.layers(pictures.float() / 255.0)
        return encoded


def batch_of(space: spaces.Space[Any], obs: Any, device: torch.device | str) -> dict[str, Tensor]:
    """Observations of a space as tensors by name; a plain box is "vector". Pictures stay uint8."""
    named = obs if isinstance(space, spaces.Dict) else {"vector": obs}
    result = {}
    for name, value in named.items():
        tensor = torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value, device=device)
        result[name] = tensor if tensor.dtype == torch.uint8 else tensor.float()
    return result


class DrivingPolicy(nn.Module):
    """Encoder, shared features and Beta policy: all that acting needs; follows the protocol of policies.

    Args:
        observation_space: a box of numbers, or a dictionary of "bev" (channels, side, side) uint8 and boxes
            of numbers; "value_measurements" is the critic's and not read.
        action_space: a box with finite bounds.

    Raises:
        UsageError: another space.
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        named = (
            dict(observation_space.spaces)
            if isinstance(observation_space, spaces.Dict)
            else {"vector": observation_space}
        )
        for name, space in named.items():
            if not isinstance(space, spaces.Box):
                raise UsageError(f"the observation {name!r} is {space}; CaRL's network takes boxes.")
        self.vectors = sorted(set(named) - {PICTURE, VALUE})
        self.value_size = int(np.prod(named[VALUE].shape or (1,))) if VALUE in named else 0
        width = sum(int(np.prod(named[name].shape or (1,))) for name in self.vectors)
        if not width and PICTURE not in named:
            raise UsageError("the policy has nothing to look at: give it a picture ('bev') or numbers.")
        self.numbers = _dense(width, 256, 256) if width else None
        self.picture: _PictureEncoder | None = None
        self.join: nn.Sequential | None = None
        if PICTURE in named:
            self.picture = _PictureEncoder(named[PICTURE].shape)  # type: ignore[arg-type]
            self.join = _dense(self.picture.size + (256 if width else 0), 512, FEATURES)
        self.distribution = BetaActions(action_space)
        size = self.distribution.action_size
        self.body = _dense(FEATURES, 256, 256)
        self.alpha, self.beta = nn.Linear(256, size), nn.Linear(256, size)
        self._generator: torch.Generator | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.alpha.weight.device

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Shared features (B, 256)."""
        parts = []
        if self.picture is not None:
            parts.append(self.picture(batch[PICTURE]))
        if self.numbers is not None:
            parts.append(self.numbers(torch.cat([batch[name].flatten(1) for name in self.vectors], 1)))
        if self.join is None:
            return parts[0]  # type: ignore[no-any-return]
        joined: Tensor = self.join(torch.cat(parts, 1))
        return joined

    def parameters_at(self, features: Tensor) -> Tensor:
        """alpha and beta (B, 2 A)."""
        hidden = self.body(features)
        return self.distribution.parameters_of(torch.cat([self.alpha(hidden), self.beta(hidden)], -1))

    def seed(self, seed: int) -> None:
        """Make the stochastic actions of `act` reproducible."""
        self._generator = torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Actions for a batch of observations: arrays in, array out; tensors in, tensor on the device out."""
        batch = batch_of(self.observation_space, obs, self.device)
        parameters = self.parameters_at(self.features(batch))
        if deterministic:
            actions = self.distribution.mode(parameters)
        else:
            actions = self.distribution.sample(parameters, self._generator)
        mapped = self.distribution.to_env(actions)
        leaf = next(iter(obs.values())) if isinstance(obs, dict) else obs
        return mapped if isinstance(leaf, Tensor) else mapped.cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """All that `from_description` needs to rebuild the module, as JSON values."""
        return {
            "kind": "driving",
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> DrivingPolicy:
        """Rebuild a policy (with fresh weights) from `describe`'s answer."""
        return cls(
            space_from_json(description["observation_space"]), space_from_json(description["action_space"])
        )


class DrivingCritic(nn.Module):
    """Values of the reward and of K - 1 costs from shared features and what only the critic is told."""

    def __init__(self, policy: DrivingPolicy, outputs: int = 1) -> None:
        super().__init__()
        self.told = policy.value_size
        self.layers = nn.Sequential(*_dense(FEATURES + self.told, 256, 256), nn.Linear(256, outputs))

    def forward(self, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(B, K)."""
        if self.told:
            features = torch.cat([features, batch[VALUE].flatten(1)], 1)
        values: Tensor = self.layers(features).float()
        return values
