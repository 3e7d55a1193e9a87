"""Checkpoints: safetensors for arrays, JSON for the rest; atomic, verified, never unpickled.

A checkpoint is a folder `step_00001000` holding one `NAME.safetensors` for every part (such as
`policy` and `training`) and `state.json`, which carries the structure, everything that is not an
array, and the SHA-256 of each array file. It is written under a temporary name, flushed to the disk
and renamed, so that a kill or a full disk leaves the earlier checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.errors import CheckpointError, SaferlError

FORMAT = 1
_PREFIX = "step_"


def step_of(folder: Path) -> int:
    """The environment step in a checkpoint folder's name."""
    return int(folder.name.removeprefix(_PREFIX))


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first; temporary ones are not listed."""
    if not directory.is_dir():
        return []
    found = [
        p for p in directory.iterdir() if p.name.startswith(_PREFIX) and p.name[len(_PREFIX) :].isdigit()
    ]
    return sorted(found, key=step_of)


def save_checkpoint(directory: Path, step: int, parts: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint of `step` and remove all but the newest `keep`.

    Args:
        directory: the run's `checkpoints` folder.
        step: environment (or gradient) steps done.
        parts: name to a tree of dicts, lists, tensors, arrays and JSON values.
        keep: finished checkpoints left on the disk, this one included.

    Raises:
        SaferlError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = directory / f"{_PREFIX}{step:08d}"
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory)
        temporary.mkdir()
        state: dict[str, Any] = {"format": FORMAT, "step": step, "parts": {}, "sha256": {}}
        for name, tree in parts.items():
            arrays: dict[str, Tensor] = {}
            state["parts"][name] = _encode(tree, "", arrays)
            payload = _serialise(arrays)
            state["sha256"][name] = hashlib.sha256(payload).hexdigest()
            _write(temporary / f"{name}.safetensors", payload)
        state["sha256"]["state"] = _digest(state["step"], state["parts"])
        _write(temporary / "state.json", json.dumps(state).encode())
        _sync_folder(temporary)
        if final.exists():  # a resumed run has come to the same step again
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaferlError(
            f"the checkpoint of step {step} could not be written to {directory} ({error.strerror or error}); "
            "free some space or choose another --run folder, then resume: earlier checkpoints are intact."
        ) from error
    for old in list_checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(folder: Path, *, only: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Read and verify a checkpoint folder.

    Args:
        folder: a `step_...` folder.
        only: the parts to read; all of them by default.

    Returns:
        name to the tree that was saved (tensors on the CPU), and `"step"`.

    Raises:
        CheckpointError: a file is missing, damaged or of another format; the message names it.
    """
    try:
        state = json.loads((folder / "state.json").read_bytes())
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {state['format']}, this version reads {FORMAT}; "
                "load it with the version of saferl that wrote it."
            )
        if state["sha256"]["state"] != _digest(state["step"], state["parts"]):
            raise ValueError("its checksum does not match")
        names = only or tuple(state["parts"])
        trees = {name: state["parts"][name] for name in names}
        digests = {name: state["sha256"][name] for name in names}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no state.json; it is not a complete checkpoint.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'state.json'} is damaged ({error}); use an earlier checkpoint or start the run anew."
        ) from error
    loaded: dict[str, Any] = {"step": int(state["step"])}
    for name in names:
        path = folder / f"{name}.safetensors"
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
        if hashlib.sha256(payload).hexdigest() != digests[name]:
            raise CheckpointError(
                f"{path} is damaged (its checksum does not match); use an earlier checkpoint or start "
                "the run anew."
            )
        loaded[name] = _decode(trees[name], _deserialise(payload, path))
    return loaded


def load_latest(directory: Path, *, only: tuple[str, ...] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Read the newest checkpoint that is intact.

    Returns:
        the checkpoint and the faults of newer ones that had to be passed over.

    Raises:
        CheckpointError: there is none, or every one is damaged.
    """
    faults: list[str] = []
    for folder in reversed(list_checkpoints(directory)):
        try:
            return load_checkpoint(folder, only=only), faults
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(faults[0])
    raise CheckpointError(f"{directory} holds no finished checkpoint; the run has nothing to load yet.")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step, flushed to the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, text.encode())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaferlError(
            f"{path} could not be written ({error.strerror or error}); free some space or choose another "
            "folder."
        ) from error


def _serialise(arrays: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(arrays)


def _deserialise(payload: bytes, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(payload)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file ({error}); it was not written by saferl."
        ) from error


def _digest(step: int, parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([step, parts]).encode()).hexdigest()


def _write(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(directory: Path) -> None:
    """Remove what a killed writer left behind."""
    for leftover in directory.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _encode(tree: Any, path: str, arrays: dict[str, Tensor]) -> Any:
    """Replace arrays by references; keys that are not strings are marked, since JSON has only strings."""
    if isinstance(tree, Tensor):
        arrays[path] = tree.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if isinstance(tree, np.ndarray):
        arrays[path] = torch.from_numpy(np.ascontiguousarray(tree).copy())
        return {"$array": path, "shape": list(tree.shape)}
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, Mapping):
        encoded = {}
        for key, value in tree.items():
            name = key if isinstance(key, str) else f"$int:{int(key)}"
            encoded[name] = _encode(value, f"{path}/{name}" if path else name, arrays)
        return encoded
    if isinstance(tree, list | tuple):
        return [_encode(value, f"{path}/{i}" if path else str(i), arrays) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, str | int | float | bool):
        return tree
    raise TypeError(f"{path}: {type(tree).__name__} cannot be stored in a checkpoint.")


def _decode(tree: Any, arrays: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        if "$tensor" in tree:
            return arrays[tree["$tensor"]]
        if "$array" in tree:
            return arrays[tree["$array"]].numpy().reshape(tree["shape"])
        return {
            int(key.removeprefix("$int:")) if key.startswith("$int:") else key: _decode(value, arrays)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [_decode(value, arrays) for value in tree]
    return tree
