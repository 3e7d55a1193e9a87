"""DSRL's files: one HDF5 of seven arrays, episodes behind one another.

    observations, next_observations (N, S)   actions (N, A)   rewards, costs (N,)   float32
    terminals, timeouts (N,)                 0 or 1           all compressed with gzip

An episode ends where either flag is set. Source: Liu et al., "Datasets and Benchmarks for Offline Safe
Reinforcement Learning", 2023.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferl.envs.datasets import hdf5
from saferl.envs.datasets.download import cache_directory
from saferl.envs.datasets.tasks import OfflineTask, find_task
from saferl.envs.datasets.transitions import ARRAYS, FLAGS, OfflineDataset
from saferl.errors import DatasetError, UsageError

__all__ = ["find_dsrl_faults", "read_dsrl", "write_dsrl"]

_MAPPED_FORMAT = 1


def read_dsrl(
    path: str | Path,
    *,
    task: OfflineTask | str | None = None,
    memory_map: bool | Path = False,
    outline: bool = False,
    progress: hdf5.Progress | None = None,
) -> OfflineDataset:
    """Read a file of DSRL's layout, block by block, checking every value.

    Args:
        path: the HDF5 file.
        task: whose data it holds; found by the file's name when left out.
        memory_map: with True, unpack the file once into `.npy` files, which the arrays map; about as large
            as the data in memory would be, in the folder "arrays" of `download.cache_directory()` (or in
            this folder). Later calls map them at once, as long as the HDF5 file has not changed.
        outline: leave observations and actions unread; in their place are arrays of NaN that take no memory.
            Nothing is mapped then.
        progress: called with bytes unpacked and in all.

    Returns:
        the data set; (N, 1) arrays of rewards, costs and flags become (N,).

    Raises:
        UsageError: the task is unknown.
        DatasetError: the file is missing, damaged or incomplete, or its sizes are not the task's; the message
            names the array and, for a bad value, the first row.
    """
    path = Path(path)
    if isinstance(task, str):
        task = find_task(task)
    if memory_map and not outline:
        folder = memory_map if isinstance(memory_map, Path) else cache_directory() / "arrays"
        arrays = _mapped(path, folder, progress)
    else:
        with hdf5.open_file(path) as file:
            columns = _columns(file, path)
            read = {key: column for key, column in columns.items() if not (outline and ARRAYS[key] == 2)}
            report = hdf5.reporter(sum(column.nbytes for column in read.values()), progress)
            arrays = {
                key: column.read(report) if key in read else hdf5.unread(column.shape)
                for key, column in columns.items()
            }
    return OfflineDataset(**arrays, task=task or _task_by_name(path, arrays), source=str(path))


def find_dsrl_faults(path: Path, progress: hdf5.Progress | None = None) -> list[str]:
    """Look at all of a file without keeping it; a sentence for each array that is missing or unsound."""
    with hdf5.open_file(path) as file:
        return hdf5.find_faults(file, path, ARRAYS, ARRAYS, "DSRL", progress)


def write_dsrl(path: str | Path, dataset: OfflineDataset, *, progress: hdf5.Progress | None = None) -> None:
    """Write a data set in DSRL's layout, in one step: a kill leaves the earlier file or none.

    `progress` is called with bytes written (unpacked) and in all.

    Raises:
        DatasetError: a value is not finite, there is no transition, or the disk does not take the file.
    """
    if not len(dataset):
        raise DatasetError(f"{dataset.source} holds no transition; there is nothing to write.")
    dataset.check_values()
    report = hdf5.reporter(dataset.nbytes, progress)
    with hdf5.write_file(Path(path)) as file:
        for key, array in dataset.arrays().items():
            hdf5.write_column(file, key, array, report)


def _columns(file: Any, path: Path) -> dict[str, hdf5.Column]:
    columns: dict[str, hdf5.Column] = {}
    rows = None
    for key, rank in ARRAYS.items():
        column = hdf5.column(file, path, key, rank, flags=key in FLAGS, rows=rows)
        if column is None:
            raise DatasetError(hdf5.missing(file, path, key, "DSRL"))
        columns[key] = column
        rows = column.shape[0]
    if not rows:
        raise DatasetError(f"{path} holds no transition; get another file.")
    for key in ("observations", "actions"):
        if not columns[key].shape[1]:
            raise DatasetError(f"{path}: {key} has rows without components; get another file.")
    if columns["next_observations"].shape != columns["observations"].shape:
        raise DatasetError(
            f"{path}: next_observations has shape {columns['next_observations'].shape} and observations "
            f"{columns['observations'].shape}; they must be alike."
        )
    return columns


def _task_by_name(path: Path, arrays: Mapping[str, NDArray[Any]]) -> OfflineTask | None:
    try:
        task = find_task(path.name)
    except UsageError:
        return None
    sizes = arrays["observations"].shape[1], arrays["actions"].shape[1]
    return task if sizes == (task.observation_size, task.action_size) else None


# --- mapped arrays ------------------------------------------------------------------------------------


def _mapped(path: Path, folder: Path, progress: hdf5.Progress | None) -> dict[str, NDArray[Any]]:
    """The arrays mapped from `folder`, unpacked there first if they are not, or are of another file."""
    if not path.is_file():
        with hdf5.open_file(path):  # raises
            pass
    path = path.resolve()
    status = path.stat()
    origin = {
        "format": _MAPPED_FORMAT,
        "path": str(path),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }
    name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    final = folder / f"{path.stem}-{name}"
    arrays = _open_mapped(final, origin)
    if arrays is not None:
        return arrays
    temporary = folder / f".{final.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with hdf5.open_file(path) as file:
            columns = _columns(file, path)
            _check_room(folder, columns)
            report = hdf5.reporter(sum(column.nbytes for column in columns.values()), progress)
            _unpack(columns, temporary, origin, report)
        with contextlib.suppress(FileNotFoundError):
            final.rename(temporary / "replaced")  # so that whoever maps the old arrays keeps them
        with contextlib.suppress(OSError):  # another process was faster; its arrays are the same
            temporary.rename(final)
        shutil.rmtree(final / "replaced", ignore_errors=True)
        hdf5.sync(folder)
    except OSError as error:
        raise DatasetError(
            f"{path} could not be unpacked into {folder} ({error.strerror or error}); free some space, or "
            "choose another folder with memory_map or DSRL_DATASET_DIR."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    arrays = _open_mapped(final, origin)
    if arrays is None:
        raise DatasetError(f"{path} changed while it was unpacked into {final}; read it again.")
    return arrays


def _open_mapped(folder: Path, origin: Mapping[str, Any]) -> dict[str, NDArray[Any]] | None:
    """The arrays of a finished folder, None if there is none of this origin."""
    try:
        stored = json.loads((folder / "origin.json").read_bytes())
        if stored != dict(origin):
            return None
        return {key: np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False) for key in ARRAYS}
    except (OSError, ValueError, RecursionError):
        return None


def _check_room(folder: Path, columns: Mapping[str, hdf5.Column]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(column.nbytes for column in columns.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DatasetError(
            f"{folder} has {free / 1e9:.1f} GB left and the arrays need {needed / 1e9:.1f} GB; free some, "
            "or choose another folder with memory_map or DSRL_DATASET_DIR."
        )


def _unpack(
    columns: Mapping[str, hdf5.Column], folder: Path, origin: Mapping[str, Any], report: Callable[[int], None]
) -> None:
    folder.mkdir()
    for key, column in columns.items():
        file = folder / f"{key}.npy"
        out = np.lib.format.open_memmap(file, mode="w+", dtype=column.dtype, shape=column.shape)
        column.fill(out, report)
        out.flush()
        del out
        hdf5.sync(file)
    marker = folder / "origin.json"
    marker.write_text(json.dumps(origin))
    hdf5.sync(marker)
    hdf5.sync(folder)
