"""Minari's HDF5 layout, with costs, and its conversion to and from flat transitions without loss.

A data set is a folder with `data/main_data.hdf5` and `data/metadata.json`. The HDF5 has a group an episode:

    episode_0   attributes id, total_steps
      observations (T + 1, S)   the one of the reset first
      actions (T, A)   rewards, terminations, truncations (T,)
      infos/cost (T + 1,)       cost of each step after a zero for the reset; (T,) is read too

Minari has no field for costs; `infos/cost` is where an environment's `info["cost"]` comes to lie when its
recorder runs. The metadata has `cost_limits` and `max_episode_cost` beside the names that Minari itself uses.

Source: Farama Foundation, Minari, documentation of its dataset standards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferl.envs.datasets import hdf5
from saferl.envs.datasets.tasks import OfflineTask, find_task
from saferl.envs.datasets.transitions import ARRAYS, FLAGS, OfflineDataset
from saferl.errors import DatasetError

__all__ = ["find_minari", "find_minari_faults", "read_minari", "write_minari"]

MAIN_FILE = "main_data.hdf5"
METADATA_FILE = "metadata.json"
LAYOUT_VERSION = "0.5.0"  # of Minari, whose later versions read it


def find_minari(folder: Path) -> Path | None:
    """Return the HDF5 file of a Minari data set, given its folder or the folder "data" in it, else None."""
    for place in (folder / "data" / MAIN_FILE, folder / MAIN_FILE):
        if place.is_file():
            return place
    return None


def read_minari(
    path: str | Path,
    *,
    task: OfflineTask | str | None = None,
    outline: bool = False,
    progress: hdf5.Progress | None = None,
) -> OfflineDataset:
    """Read a data set of Minari's HDF5 layout whose observations and actions are vectors.

    Args:
        path: its folder, the folder "data" in it, or the HDF5 file.
        task: the DSRL task whose data it holds; by default the metadata's `dataset_task`, if there is one.
        outline: leave observations and actions unread; in their place are arrays of NaN that take no memory.
        progress: called with bytes of the file done and in all, as if all episodes were alike.

    Returns:
        the episodes in the order of their numbers. One whose last step is neither terminated nor truncated
        counts as truncated. Without any `infos/cost` costs are zero, with a warning.

    Raises:
        UsageError: the task is unknown.
        DatasetError: the data set is missing, damaged, of another format, or has other observations or
            actions than vectors; the message names episode, array and row.
    """
    path = Path(path)
    file_path = _main_file(path)
    metadata = _metadata(file_path.with_name(METADATA_FILE))
    if isinstance(task, str):
        task = find_task(task)
    elif task is None and isinstance(metadata.get("dataset_task"), str):
        task = find_task(metadata["dataset_task"])
    with hdf5.open_file(file_path) as file:
        arrays = _read_episodes(file, file_path, outline, progress)
    return OfflineDataset(**arrays, task=task, source=str(path))


def find_minari_faults(path: Path, progress: hdf5.Progress | None = None) -> list[str]:
    """Look at all of a data set without keeping it; a sentence for each array or episode that is unsound."""
    file_path = _main_file(path)
    found: list[str] = []
    try:
        _metadata(file_path.with_name(METADATA_FILE))
    except DatasetError as error:
        found.append(str(error))
    with hdf5.open_file(file_path) as file:
        episodes: list[dict[str, hdf5.Column]] = []
        size = 0
        names = _episode_names(file, file_path)
        step = _stepper(file_path, 2 * len(names), progress)
        for name in names:
            step()
            try:
                episodes.append(_episode_columns(file, file_path, name))
            except DatasetError as error:
                found.append(str(error))
                continue
            size += sum(column.nbytes for column in episodes[-1].values())
            if size > hdf5.room(file_path):
                return [*found, _too_much(file_path)]
        for columns in episodes:
            step()
            faults = {key: column.fault() for key, column in columns.items()}
            found += [fault for fault in faults.values() if fault is not None]
            if faults["terminals"] is None and faults["timeouts"] is None:
                ends = columns["terminals"].read() | columns["timeouts"].read()
                if ends[:-1].any():
                    found.append(_early_end(file_path, columns["rewards"].name.rsplit("/", 1)[0], ends))
    return found


def write_minari(
    path: str | Path,
    dataset: OfflineDataset,
    *,
    dataset_id: str = "saferl/data-v0",
    overwrite: bool = False,
    progress: hdf5.Progress | None = None,
) -> None:
    """Write whole episodes as a Minari data set, in one step.

    Args:
        path: the folder to make.
        dataset: must hold whole episodes alone (see `whole_episodes`), in each of which the next observation
            is the next row's observation, since Minari stores it once.
        dataset_id: as Minari writes it, (namespace/)name-vK.
        overwrite: replace a folder that holds a Minari data set and nothing else.
        progress: called with bytes written (of the flat arrays) and in all.

    Raises:
        DatasetError: the folder exists, the data cannot be stored without loss, or the disk does not take it.
    """
    path = Path(path)
    if path.exists():
        if not overwrite:
            raise DatasetError(f"{path} exists already; remove it or choose another folder.")
        if not _is_minari_alone(path):
            raise DatasetError(
                f"{path} is not a folder with a Minari data set alone; it is not replaced, choose another."
            )
    _check_convertible(dataset)
    dataset.check_values()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    report = hdf5.reporter(dataset.nbytes, progress)
    try:
        with hdf5.write_file(temporary / "data" / MAIN_FILE) as file:
            for episode in range(dataset.num_episodes):
                with hdf5.interrupts_at_the_end():
                    _write_episode(file, dataset, episode)
                report(int(dataset.episode_lengths[episode]) * (dataset.nbytes // len(dataset)))
        try:
            size = (temporary / "data" / MAIN_FILE).stat().st_size
            text = json.dumps(_describe(dataset, dataset_id, size), indent=2) + "\n"
            (temporary / "data" / METADATA_FILE).write_text(text, encoding="utf-8")
            hdf5.sync(temporary / "data" / METADATA_FILE)
            hdf5.sync(temporary / "data")
            _put_in_place(temporary, path)
            hdf5.sync(path.parent)
        except OSError as error:
            raise DatasetError(
                f"{path} could not be written ({error.strerror or error}); free some space or choose another "
                "folder."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- reading ------------------------------------------------------------------------------------------


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata beside the file; it may be missing, as for a file that was copied alone."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is damaged ({error}); get the data set again.") from error
    if not isinstance(values, dict):
        raise DatasetError(f"{path} is damaged (it holds no JSON object); get the data set again.")
    if values.get("data_format", "hdf5") != "hdf5":
        raise DatasetError(
            f"{path} tells of the format {values['data_format']!r}; convert the data set to HDF5 with Minari."
        )
    return values


def _main_file(path: Path) -> Path:
    """The HDF5 file of a data set, given that or a folder."""
    if not path.is_dir():
        return path
    found = find_minari(path)
    if found is None:
        raise DatasetError(
            f"{path} holds no {MAIN_FILE}; give the folder of a Minari data set in the HDF5 format "
            "(others are converted with Minari itself)."
        )
    return found


def _episode_names(file: Any, path: Path) -> list[str]:
    """Groups of episodes in the order of their numbers."""
    found = (re.fullmatch(r"episode_(\d+)", name) for name in hdf5.names(file, path))
    return [name for _, name in sorted({int(match[1]): match[0] for match in found if match}.items())]


def _stepper(path: Path, count: int, progress: hdf5.Progress | None) -> Callable[[], None]:
    """A function that tells `progress` of one more of `count` equal shares of the file.

    To find an episode's arrays takes longer than to read them, so that bytes read would not be a measure.
    """
    size, done = path.stat().st_size, 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(size * done // count, size)

    return step


def _too_much(path: Path) -> str:
    """One array under many names."""
    return f"{path} claims more data than the file can hold; it is damaged, get it again."


def _early_end(path: Path, name: str, ends: NDArray[np.bool_]) -> str:
    row = int(np.argmax(ends))
    return f"{path}: {name} ends in row {row} of {len(ends)}; an episode ends with its last row."


def _read_episodes(
    file: Any, path: Path, outline: bool, progress: hdf5.Progress | None
) -> dict[str, NDArray[Any]]:
    episodes = _episode_names(file, path)
    columns = []
    size = 0
    step = _stepper(path, 2 * len(episodes), progress)
    for name in episodes:
        step()
        columns.append(_episode_columns(file, path, name))
        size += sum(column.nbytes for column in columns[-1].values())
        if size > hdf5.room(path):
            raise DatasetError(_too_much(path))
    if not columns:
        raise DatasetError(f"{path} holds no episode; get another file.")
    lengths = [len_of["rewards"].shape[0] for len_of in columns]
    widths = {key: columns[0][key].shape[1] for key in ("observations", "actions")}
    widths["next_observations"] = widths["observations"]
    for name, parts in zip(episodes, columns, strict=True):
        for key in ("observations", "actions"):
            if parts[key].shape[1] != widths[key]:
                raise DatasetError(
                    f"{path}: {name}/{key} has rows of {parts[key].shape[1]} components and those of "
                    f"{episodes[0]} {widths[key]}; all episodes must be alike."
                )
    with_costs = sum("costs" in parts for parts in columns)
    if 0 < with_costs < len(columns):
        bare = next(name for name, parts in zip(episodes, columns, strict=True) if "costs" not in parts)
        raise DatasetError(f"{path}: {bare} has no infos/cost and others have; get the data set again.")
    if not with_costs:
        warnings.warn(f"{path} has no costs; all are zero.", stacklevel=3)
    total = sum(lengths)
    arrays: dict[str, NDArray[Any]] = {
        key: hdf5.unread((total, widths[key]))
        if outline and rank == 2
        else np.zeros((total, widths.get(key, 1))[:rank], np.bool_ if key in FLAGS else np.float32)
        for key, rank in ARRAYS.items()
    }
    start = 0
    for name, parts, length in zip(episodes, columns, lengths, strict=True):
        rows = slice(start, start + length)
        step()
        if not outline:
            observations = parts["observations"].read()
            arrays["observations"][rows] = observations[:-1]
            arrays["next_observations"][rows] = observations[1:]
            parts["actions"].fill(arrays["actions"][rows])
        for key in ("rewards", "terminals", "timeouts"):
            parts[key].fill(arrays[key][rows])
        if with_costs:
            arrays["costs"][rows] = parts["costs"].read()[-length:]
        ends = arrays["terminals"][rows] | arrays["timeouts"][rows]
        if ends[:-1].any():
            raise DatasetError(_early_end(path, name, ends))
        if not ends[-1]:
            arrays["timeouts"][start + length - 1] = True
        start += length
    return arrays


def _episode_columns(file: Any, path: Path, name: str) -> dict[str, hdf5.Column]:
    columns: dict[str, hdf5.Column] = {}
    steps: int | None = None
    for key, stored, rank in (
        ("rewards", "rewards", 1),
        ("observations", "observations", 2),
        ("actions", "actions", 2),
        ("terminals", "terminations", 1),
        ("timeouts", "truncations", 1),
    ):
        wanted = steps + 1 if steps is not None and key == "observations" else steps
        column = hdf5.column(file, path, f"{name}/{stored}", rank, flags=key in FLAGS, rows=wanted)
        if column is None:
            raise DatasetError(f"{path}: {name} has no array {stored!r}, which Minari's layout needs.")
        columns[key] = column
        steps = columns["rewards"].shape[0]
    if not steps:
        raise DatasetError(f"{path}: {name} has no step; get the data set again.")
    for key in ("observations", "actions"):
        if not columns[key].shape[1]:
            raise DatasetError(f"{path}: {name}/{key} has rows without components; get the data set again.")
    costs = hdf5.column(file, path, f"{name}/infos/cost", 1)
    if costs is not None:
        if costs.shape[0] not in (steps, steps + 1):
            raise DatasetError(
                f"{path}: {name}/infos/cost has {costs.shape[0]} rows; an episode of {steps} steps has "
                f"{steps} or {steps + 1}."
            )
        columns["costs"] = costs
    return columns


# --- writing ------------------------------------------------------------------------------------------


def _is_minari_alone(path: Path) -> bool:
    """Whether a folder holds what `write_minari` writes and nothing else that replacing it would lose."""
    if not path.is_dir() or path.is_symlink():
        return False
    inside = {entry.relative_to(path).as_posix() for entry in path.rglob("*")}
    return inside <= {"data", f"data/{MAIN_FILE}", f"data/{METADATA_FILE}"} and f"data/{MAIN_FILE}" in inside


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished folder; one that it replaces is there again if that fails."""
    before = temporary / "replaced"
    try:
        if path.exists():
            path.rename(before)
        temporary.rename(path)
    except BaseException:
        if before.exists() and not path.exists():
            before.rename(path)
        raise
    finally:
        shutil.rmtree(path / "replaced", ignore_errors=True)


def _check_convertible(dataset: OfflineDataset) -> None:
    if not dataset.num_episodes:
        raise DatasetError(f"{dataset.source} has no whole episode; there is nothing to write.")
    if dataset.trailing:
        raise DatasetError(
            f"the last {dataset.trailing} transitions of {dataset.source} belong to no whole episode; leave "
            "them out with whole_episodes()."
        )
    inside = np.ones(len(dataset), np.bool_)
    inside[dataset.ends] = False
    rows = np.flatnonzero(inside)
    for begin in range(0, len(rows), 1 << 16):
        block = rows[begin : begin + (1 << 16)]
        equal = (dataset.next_observations[block] == dataset.observations[block + 1]).all(1)
        if not equal.all():
            raise DatasetError(
                f"row {block[np.argmin(equal)]} of {dataset.source} has another next observation than the "
                "row after it observes, which Minari's layout cannot express; write it in DSRL's."
            )


def _write_episode(file: Any, dataset: OfflineDataset, episode: int) -> None:
    rows = slice(int(dataset.starts[episode]), int(dataset.ends[episode]) + 1)
    final = dataset.next_observations[rows.stop - 1 : rows.stop]
    group = file.create_group(f"episode_{episode}")
    group.attrs["id"] = episode
    group.attrs["total_steps"] = rows.stop - rows.start
    group["observations"] = np.concatenate([dataset.observations[rows], final])
    group["actions"] = dataset.actions[rows]
    group["rewards"] = dataset.rewards[rows]
    group["terminations"] = dataset.terminals[rows]
    group["truncations"] = dataset.timeouts[rows]
    group["infos/cost"] = np.concatenate([np.zeros(1, np.float32), dataset.costs[rows]])


def _describe(dataset: OfflineDataset, dataset_id: str, size: int) -> dict[str, Any]:
    """The metadata; spaces are boxes as large as the data, the actions' at least [-1, 1]."""
    low = np.minimum(np.min(dataset.actions, axis=0), -1.0)
    high = np.maximum(np.max(dataset.actions, axis=0), 1.0)
    reach = np.full(dataset.observation_size, np.inf)
    values: dict[str, Any] = {
        "dataset_id": dataset_id,
        "minari_version": LAYOUT_VERSION,
        "data_format": "hdf5",
        "total_episodes": dataset.num_episodes,
        "total_steps": len(dataset),
        "dataset_size": round(size / 1e6, 1),
        "observation_space": _box(-reach, reach),
        "action_space": _box(low, high),
        "max_episode_cost": float(dataset.episode_costs.max()),
    }
    if dataset.task is not None:
        task = dataset.task
        values["dataset_task"] = task.key
        values["cost_limits"] = list(task.cost_limits)
        values["ref_min_score"] = task.min_episode_reward
        values["ref_max_score"] = task.max_episode_reward
    return values


def _box(low: NDArray[Any], high: NDArray[Any]) -> str:
    return json.dumps(
        {
            "type": "Box",
            "dtype": "float32",
            "shape": list(low.shape),
            "low": low.tolist(),
            "high": high.tolist(),
        }
    )
