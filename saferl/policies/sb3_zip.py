"""Stable-Baselines3 zips as policies, read without executing anything from the file.

A zip of Stable-Baselines3 (https://stable-baselines3.readthedocs.io/en/master/guide/save_format.html) holds
`data`, a JSON whose values are partly cloudpickled objects, and `policy.pth`, a state dict. Its own `load`
unpickles every value in `data`, which executes whatever the file says. Here

* `policy.pth` is read by `torch.load(weights_only=True)`;
* of `data` only the spaces, the policy's class and its keyword arguments are decoded, by an unpickler that
  imports nothing (`saferl.policies.unpickle`);
* the optimiser's class and arguments are dropped, the schedule is a constant, and the policy is built by the
  installed Stable-Baselines3 from the rebuilt spaces and the checked arguments.

No member is extracted to disk. Policies of PPO, A2C, SAC, TD3, DDPG and DQN are covered, with the Mlp, Cnn
and MultiInput variants. A custom policy's code is not in the allow-list: export it as TorchScript.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from saferl.errors import CheckpointError, MissingPackageError, UsageError
from saferl.policies.protocol import check_batch, is_torch, to_numpy
from saferl.policies.unpickle import (
    ACTIVATIONS,
    EXTRACTORS,
    OFF_POLICY_CLASSES,
    ON_POLICY_CLASSES,
    Record,
    Reference,
    safe_loads,
    to_array,
    to_space,
)

MAX_DATA_BYTES = 256 * 2**20
MAX_WEIGHT_BYTES = 4 * 2**30
EXPORT_ADVICE = (
    "if this is a custom policy, export it where it was trained with "
    "torch.jit.trace(policy, obs).save('policy.pt') and load that file."
)


@dataclass(frozen=True)
class ObservationStatistics:
    """Frozen statistics of a `VecNormalize`; a key of None stands for observations that are one array."""

    mean: Mapping[str | None, np.ndarray[Any, Any]]
    var: Mapping[str | None, np.ndarray[Any, Any]]
    clip: float
    epsilon: float

    def __call__(self, obs: Any) -> Any:
        """Normalise: clip((obs - mean) / sqrt(var + epsilon)), float32, as `VecNormalize.normalize_obs`."""
        if isinstance(obs, Mapping):
            return {key: self._one(value, key) if key in self.mean else value for key, value in obs.items()}
        return self._one(obs, None) if self.mean else obs

    def fit(self, space: spaces.Space[Any]) -> bool:
        """Whether the statistics belong to observations of this space (images in any order of axes)."""
        members: dict[Any, spaces.Space[Any]] = (
            dict(space.spaces) if isinstance(space, spaces.Dict) else {None: space}
        )
        return all(
            key in members and sorted(mean.shape) == sorted(members[key].shape or ())
            for key, mean in self.mean.items()
        )

    def _one(self, obs: Any, key: str | None) -> np.ndarray[Any, Any]:
        scaled = (obs - self.mean[key]) / np.sqrt(self.var[key] + self.epsilon)
        return np.asarray(np.clip(scaled, -self.clip, self.clip), dtype=np.float32)


class SB3Policy:
    """A Stable-Baselines3 policy behind the `Policy` protocol.

    Attributes:
        module: the Stable-Baselines3 policy, a torch module in evaluation mode, for white-box use.
        observation_space, action_space: the spaces it was trained with, before normalisation.
        statistics: what normalises observations first, or None.
    """

    def __init__(
        self,
        module: Any,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        statistics: ObservationStatistics | None = None,
    ) -> None:
        self.module = module
        self.observation_space = observation_space
        self.action_space = action_space
        self.statistics = statistics

    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Choose actions as `predict` of Stable-Baselines3 does; see `Policy.act`.

        Images may come channel-first or channel-last. Samples use torch's global generator.

        Raises:
            UsageError: the observations have no leading axis or do not belong to the observation space.
        """
        as_torch = is_torch(obs)
        obs = to_numpy(obs)
        check_batch(obs, self.observation_space)
        if self.statistics is not None:
            obs = self.statistics(obs)
        try:
            action, _ = self.module.predict(obs, deterministic=deterministic)
        except ValueError as error:
            raise UsageError(f"the policy cannot act on these observations: {error}") from error
        return torch.as_tensor(action, device=self.module.device) if as_torch else action


def load_sb3_zip(
    path: str | Path, *, device: str | torch.device = "cpu", vec_normalize: str | Path | None = None
) -> SB3Policy:
    """Rebuild the policy of a Stable-Baselines3 zip.

    Args:
        path: the file written by `model.save`.
        device: where the weights live.
        vec_normalize: the file written by `VecNormalize.save`, or None for raw observations.

    Raises:
        CheckpointError: a file is missing or damaged, or holds more than plain data.
        MissingPackageError: stable-baselines3 is not installed.
    """
    path = Path(path)
    data, weights = _read_zip(path)
    observation_space = to_space(_entry(data, "observation_space", path), f"the observation space in {path}")
    action_space = to_space(_entry(data, "action_space", path), f"the action space in {path}")
    policy_class = _entry(data, "policy_class", path)
    if (
        not isinstance(policy_class, Reference)
        or policy_class.name not in ON_POLICY_CLASSES | OFF_POLICY_CLASSES
    ):
        raise CheckpointError(f"{path} names no policy class of Stable-Baselines3; {EXPORT_ADVICE}")
    kwargs = _policy_kwargs(_entry(data, "policy_kwargs", path, default={}), path)
    if policy_class.name in ON_POLICY_CLASSES:
        kwargs["use_sde"] = bool(data.get("use_sde", False))
    module = _build(
        policy_class, observation_space, action_space, kwargs, weights, torch.device(device), path
    )
    statistics = None if vec_normalize is None else load_statistics(vec_normalize)
    if statistics is not None and not statistics.fit(observation_space):
        raise CheckpointError(
            f"{vec_normalize} does not fit the observations of {path}; give the file saved with this model."
        )
    return SB3Policy(module, observation_space, action_space, statistics)


def load_statistics(path: str | Path) -> ObservationStatistics:
    """Read the observation statistics of a file written by `VecNormalize.save`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than statistics and spaces.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_DATA_BYTES:
            raise CheckpointError(f"{path} is too large for observation statistics; is it the right file?")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); give VecNormalize's file."
        ) from error
    record = safe_loads(raw, str(path), "give the file that VecNormalize.save wrote.")
    if not isinstance(record, Record) or record.kind != "VecNormalize":
        raise CheckpointError(f"{path} holds no VecNormalize; give the file that VecNormalize.save wrote.")
    try:
        moments = record.get("obs_rms") if record.get("norm_obs") else {}
        moments = {None: moments} if isinstance(moments, Record) else dict(moments)
        return ObservationStatistics(
            mean={key: to_array(rms.get("mean")) for key, rms in moments.items()},
            var={key: to_array(rms.get("var")) for key, rms in moments.items()},
            clip=float(record.get("clip_obs")),
            epsilon=float(record.get("epsilon")),
        )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}); save VecNormalize again."
        ) from error


def _read_zip(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON `data` and the state dict; nothing in the JSON is decoded yet."""
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(_member(archive, "data", MAX_DATA_BYTES, path))
            raw = _member(archive, "policy.pth", MAX_WEIGHT_BYTES, path)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; give a file that model.save wrote.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or no zip file; save or download it again.") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged: its description is no JSON; save the model again."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is damaged: its description is no JSON object; save the model again.")
    return data, _weights(raw, path)


def _member(archive: zipfile.ZipFile, name: str, limit: int, path: Path) -> bytes:
    names = archive.namelist()
    if name not in names:
        raise CheckpointError(
            f"{path} has no member {name!r}, so it is no model of Stable-Baselines3; give the file that "
            "model.save wrote."
        )
    if archive.getinfo(name).file_size > limit:
        raise CheckpointError(
            f"{path} is refused: its member {name!r} unpacks to more than {limit >> 20} MiB."
        )
    with archive.open(name) as member:
        return member.read(limit)


def _weights(raw: bytes, path: Path) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as inner:
            if sum(info.file_size for info in inner.infolist()) > MAX_WEIGHT_BYTES:
                raise CheckpointError(f"{path} is refused: its weights unpack to more than 4 GiB.")
        weights = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: policy.pth holds more than weights and could execute code; save the "
            "model again."
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: policy.pth cannot be read; save or download it again."
        ) from error
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()
    ):
        raise CheckpointError(f"{path} is damaged: policy.pth is no state dict; save the model again.")
    return weights


def _entry(data: Mapping[str, Any], key: str, path: Path, default: Any = None) -> Any:
    """One entry of `data`, decoded if it is pickled."""
    if key not in data:
        if default is None:
            raise CheckpointError(
                f"{path} does not say its {key}, so the policy cannot be rebuilt; {EXPORT_ADVICE}"
            )
        return default
    value = data[key]
    if isinstance(value, dict) and ":serialized:" in value:
        try:
            raw = base64.b64decode(value[":serialized:"], validate=True)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: its {key} cannot be decoded.") from error
        return safe_loads(raw, f"the {key} in {path}", EXPORT_ADVICE)
    return value


def _policy_kwargs(kwargs: Any, path: Path) -> dict[str, Any]:
    """The policy's keyword arguments, with the few classes they may name imported."""
    if not isinstance(kwargs, dict):
        raise CheckpointError(f"{path} is damaged: policy_kwargs is no dictionary; save the model again.")
    kept = {key: value for key, value in kwargs.items() if not str(key).startswith("optimizer_")}
    for key, allowed in (("activation_fn", ACTIVATIONS), ("features_extractor_class", EXTRACTORS)):
        value = kept.get(key)
        if isinstance(value, Reference) and value.name in allowed:
            kept[key] = _resolve(value)
    try:
        plain = _plain({key: value for key, value in kept.items() if not isinstance(value, type)})
    except RecursionError:
        plain = False
    if not plain:
        raise CheckpointError(
            f"{path} is refused: policy_kwargs holds more than plain values; {EXPORT_ADVICE}"
        )
    return kept


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(member) for key, member in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | bool | int | float | np.number)


def _integers(value: Any) -> list[int]:
    """Every integer in nested plain values."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for member in value for number in _integers(member)]
    return [int(value)] if isinstance(value, int | np.integer) else []


def _largest(space: spaces.Space[Any]) -> int:
    """The widest one-hot block or bit vector of a space; arrays are bounded by the file itself."""
    match space:
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case spaces.MultiBinary():
            return int(np.prod(space.shape))
        case spaces.Dict():
            return max((_largest(sub) for sub in space.spaces.values()), default=0)
        case spaces.Tuple():
            return max((_largest(sub) for sub in space.spaces), default=0)
    return 0


def _resolve(reference: Reference) -> Any:
    """Import a class whose exact name is on the allow-list."""
    module, _, name = reference.name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingPackageError(
            "stable-baselines3 is needed to rebuild its policies; install it with: "
            "pip install 'saferl[control]'"
        ) from error


def _constant_schedule(_progress: float) -> float:
    return 0.0


def _build(
    policy_class: Reference,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    kwargs: dict[str, Any],
    weights: dict[str, torch.Tensor],
    device: torch.device,
    path: Path,
) -> Any:
    """Construct the policy and give it its weights, leaving torch's generators as they were."""
    # every layer's width is a dimension of some weight, so no honest file asks for a wider one
    widest = max([64, len(weights), *(size for value in weights.values() for size in value.shape)])
    sizes = [*_integers(kwargs), _largest(observation_space), _largest(action_space)]
    if max(sizes, default=0) > widest:
        raise CheckpointError(
            f"{path} is refused: it describes a network {max(sizes)} wide and holds weights for {widest} at "
            "most."
        )
    cls = _resolve(policy_class)
    try:
        with torch.random.fork_rng():
            policy = cls(observation_space, action_space, _constant_schedule, **kwargs)
            if {key: value.shape for key, value in policy.state_dict().items()} != {
                key: value.shape for key, value in weights.items()
            }:
                raise CheckpointError(
                    f"{path} is damaged: its weights do not fit the policy it describes; save the "
                    "model again."
                )
            policy.load_state_dict(weights)
            policy = policy.to(device)
            if kwargs.get("use_sde"):
                policy.reset_noise()
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} describes a policy that this Stable-Baselines3 cannot build ({type(error).__name__}: "
            f"{reason}); {EXPORT_ADVICE}"
        ) from error
    policy.set_training_mode(False)
    return policy
