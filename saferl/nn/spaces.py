"""Observations of any Gymnasium space as one float vector an environment, and actions back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from saferl.errors import UsageError


class ObservationEncoder:
    """Turn batched observations of a space into a (B, size) float tensor.

    Box is flattened, Discrete and MultiDiscrete become one-hot, MultiBinary is kept, Dict and Tuple
    are concatenated in the space's own order. All of it is vectorised over the batch.

    Raises:
        UsageError: for a space without a fixed size (Text, Sequence, Graph).
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space
        self.size = _size(space)

    def __call__(self, observations: Any, device: torch.device | str = "cpu") -> Tensor:
        """Encode a batch; the leading axis of every leaf is the environment.

        Float64 leaves keep their precision until the normaliser has seen them.
        """
        parts: list[Tensor] = []
        _encode(self.space, observations, torch.device(device), parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _size(space: spaces.Space[Any]) -> int:
    match space:
        case spaces.Box() | spaces.MultiBinary():
            return int(np.prod(space.shape))
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(np.sum(space.nvec))
        case spaces.Dict():
            return sum(_size(s) for s in space.spaces.values())
        case spaces.Tuple():
            return sum(_size(s) for s in space.spaces)
    raise UsageError(
        f"observations of {type(space).__name__} have no fixed size; wrap the environment so that it "
        "returns a Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple."
    )


def _encode(space: spaces.Space[Any], value: Any, device: torch.device, parts: list[Tensor]) -> None:
    match space:
        case spaces.Dict():
            for key, sub in space.spaces.items():
                _encode(sub, value[key], device, parts)
        case spaces.Tuple():
            for sub, item in zip(space.spaces, value, strict=True):
                _encode(sub, item, device, parts)
        case spaces.Discrete():
            index = torch.as_tensor(value, device=device).long().reshape(-1) - int(space.start)
            parts.append(torch.nn.functional.one_hot(index, int(space.n)).float())
        case spaces.MultiDiscrete():
            index = torch.as_tensor(value, device=device).long()
            index = index.reshape(index.shape[0], -1) - torch.as_tensor(
                space.start.reshape(-1), device=device
            )
            for column, n in enumerate(space.nvec.reshape(-1)):
                parts.append(torch.nn.functional.one_hot(index[:, column], int(n)).float())
        case _:
            tensor = torch.as_tensor(value, device=device)
            tensor = tensor if tensor.is_floating_point() else tensor.float()
            parts.append(tensor.reshape(tensor.shape[0], -1))


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """Describe a space in JSON, so that a policy can be rebuilt without unpickling anything."""
    match space:
        case spaces.Box():
            return {
                "type": "Box",
                "low": np.asarray(space.low, dtype=np.float64).tolist(),
                "high": np.asarray(space.high, dtype=np.float64).tolist(),
                "shape": list(space.shape),
                "dtype": str(space.dtype),
            }
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
        case spaces.MultiBinary():
            n = space.n
            return {
                "type": "MultiBinary",
                "n": int(n) if isinstance(n, int | np.integer) else list(space.shape),
            }
        case spaces.Dict():
            return {"type": "Dict", "spaces": [[k, space_to_json(s)] for k, s in space.spaces.items()]}
        case spaces.Tuple():
            return {"type": "Tuple", "spaces": [space_to_json(s) for s in space.spaces]}
    raise UsageError(f"spaces of type {type(space).__name__} are not supported.")


def space_from_json(data: Mapping[str, Any]) -> spaces.Space[Any]:
    """Rebuild the space that `space_to_json` described."""
    match data["type"]:
        case "Box":
            dtype = np.dtype(data["dtype"])
            shape = tuple(data["shape"])
            low = np.asarray(data["low"], dtype=np.float64).reshape(shape).astype(dtype)
            high = np.asarray(data["high"], dtype=np.float64).reshape(shape).astype(dtype)
            return spaces.Box(low, high, shape, dtype=dtype.type)
        case "Discrete":
            return spaces.Discrete(data["n"], start=data["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(np.asarray(data["nvec"]), start=np.asarray(data["start"]))
        case "MultiBinary":
            return spaces.MultiBinary(data["n"])
        case "Dict":
            return spaces.Dict([(k, space_from_json(s)) for k, s in data["spaces"]])
        case "Tuple":
            return spaces.Tuple([space_from_json(s) for s in data["spaces"]])
    raise UsageError(f"unknown space type {data['type']!r} in the policy's description.")
