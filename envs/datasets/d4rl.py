"""D4RL's files, with the package's own rules for what follows an observation.

One HDF5, arrays possibly in groups ("infos/cost"), episodes behind one another:

    observations (N, S)   actions (N, A)   rewards, terminals (N,)
    optional: timeouts (N,), next_observations (N, S), costs or infos/cost (N,)

Without `next_observations` a row is followed by the observation of the next row, so that the row at a
timeout has no successor and is left out, as is the last row of the file: E episodes of T steps that are
all cut by timeouts give E (T - 1) rows. At a terminal row the "next" observation is the following
episode's first; it means nothing, and whoever respects `terminals` never uses it.

Source: Fu et al., "D4RL: Datasets for Deep Data-Driven Reinforcement Learning", 2020.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from saferl.envs.datasets import hdf5
from saferl.envs.datasets.tasks import OfflineTask, find_task
from saferl.envs.datasets.transitions import FLAGS, OfflineDataset
from saferl.errors import DatasetError, UsageError

__all__ = ["find_d4rl_faults", "kept_rows", "qlearning_dataset", "read_d4rl", "write_d4rl"]

Bools = NDArray[np.bool_]

_COSTS = ("costs", "cost", "infos/cost", "infos/costs")
_RANKS = {
    "observations": 2,
    "actions": 2,
    "rewards": 1,
    "terminals": 1,
    "timeouts": 1,
    "next_observations": 2,
}
_NEEDED = ("observations", "actions", "rewards", "terminals")


def read_d4rl(
    path: str | Path,
    *,
    max_episode_steps: int | None = None,
    task: OfflineTask | str | None = None,
    outline: bool = False,
    progress: hdf5.Progress | None = None,
) -> OfflineDataset:
    """Read a file of D4RL's layout.

    Args:
        path: the HDF5 file.
        max_episode_steps: steps after which an episode was cut; needed when the file has no `timeouts`.
        task: the DSRL task whose data it holds, if any.
        outline: leave observations and actions unread; in their place are arrays of NaN that take no memory.
        progress: called with bytes read and in all.

    Returns:
        the data set. With `next_observations` in the file it has every row. Without, it has the rows of
        `qlearning_dataset`, and the last row that is left of an episode that lost its end has `timeouts` set.
        Costs are those of `costs`, `cost`, `infos/cost` or `infos/costs`, else zero, with a warning.

    Raises:
        UsageError: the task is unknown, or `max_episode_steps` is not positive.
        DatasetError: the file is missing, damaged or incomplete; the message names array and row.
    """
    path = Path(path)
    if isinstance(task, str):
        task = find_task(task)
    if max_episode_steps is not None and max_episode_steps < 1:
        raise UsageError(f"max_episode_steps is {max_episode_steps}; an episode has at least one step.")
    with hdf5.open_file(path) as file:
        raw = _arrays(file, path, outline, progress)
    if "timeouts" not in raw and max_episode_steps is None:
        raise DatasetError(f"{path} has no array 'timeouts'; give max_episode_steps or the environment.")
    rows = len(raw["rewards"])
    costs = raw.get("costs")
    if costs is None:
        warnings.warn(f"{path} has no costs; all are zero.", stacklevel=2)
        costs = np.zeros(rows, np.float32)
    if "next_observations" in raw:
        columns: dict[str, Any] = {key: raw[key] for key in ("observations", "actions", "rewards")}
        columns |= {"next_observations": raw["next_observations"], "terminals": raw["terminals"]}
        columns["timeouts"] = raw.get("timeouts")
        if columns["timeouts"] is None:
            columns["timeouts"] = _timeouts(raw["terminals"], max_episode_steps or 1)
    else:
        if outline:
            columns = _outlined(raw, max_episode_steps)
        else:
            columns = qlearning_dataset(raw, max_episode_steps=max_episode_steps)
        keep = kept_rows(raw["terminals"], raw.get("timeouts"), max_episode_steps)
        # An episode whose last row went was cut before it, unless the row before ended the episode before.
        ended = np.append(~keep, True)  # the rows that are left out, the file's last one included
        if not (raw["terminals"][-1] or _cut_at_end(raw, keep, max_episode_steps)):
            ended[-1] = False  # the file stops within an episode
        columns["timeouts"] = (ended[1:] & ~raw["terminals"][:-1])[keep]
        costs = costs[:-1][keep]
    if not len(columns["rewards"]):
        raise DatasetError(f"{path} holds no transition whose next observation is known; get another file.")
    return OfflineDataset(**columns, costs=costs, task=task, source=str(path))


def write_d4rl(path: str | Path, dataset: OfflineDataset, *, progress: hdf5.Progress | None = None) -> None:
    """Write a data set in D4RL's layout, with next observations and costs (infos/cost), in one step.

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
            hdf5.write_column(file, "infos/cost" if key == "costs" else key, array, report)


def find_d4rl_faults(path: Path, progress: hdf5.Progress | None = None) -> list[str]:
    """Look at all of a file without keeping it; a sentence for each array that is missing or unsound."""
    with hdf5.open_file(path) as file:
        ranks = dict(_RANKS)
        for name in _COSTS:
            try:
                there = hdf5.column(file, path, name, 1) is not None
            except DatasetError:
                there = True
            if there:
                ranks[name] = 1
                break
        return hdf5.find_faults(file, path, ranks, _NEEDED, "D4RL", progress)


def qlearning_dataset(
    arrays: Mapping[str, NDArray[Any]],
    *,
    max_episode_steps: int | None = None,
    terminate_on_end: bool = False,
    implementation: Literal["auto", "native", "package"] = "auto",
) -> dict[str, NDArray[Any]]:
    """Return what D4RL's function of this name returns.

    Args:
        arrays: observations (N, S), actions (N, A), rewards (N,), terminals (N,), and timeouts (N,) if any.
        max_episode_steps: needed without timeouts.
        terminate_on_end: keep the rows at timeouts too.
        implementation: "package" calls the installed `d4rl` (a loop over the rows), "native" computes the
            same in whole arrays, "auto" takes the package where it can be imported.

    Returns:
        observations, actions, next_observations, rewards (float32) and terminals (bool), one row for each of
        the first N - 1 that is not at a timeout.

    Raises:
        UsageError: the package is asked for and cannot be imported, or `max_episode_steps` is missing.
    """
    if "timeouts" not in arrays and max_episode_steps is None:
        raise UsageError("the data have no timeouts; give max_episode_steps.")
    function = None if implementation == "native" else _package_function()
    if implementation == "package" and function is None:
        raise UsageError("the package d4rl cannot be imported; use implementation 'native'.")
    observations = np.asarray(arrays["observations"])
    terminals = np.asarray(arrays["terminals"], np.bool_)
    if function is not None:
        env = SimpleNamespace(_max_episode_steps=max_episode_steps)
        found = function(env, dataset=dict(arrays), terminate_on_end=terminate_on_end)
        shapes = {"observations": observations.shape[1:], "next_observations": observations.shape[1:]}
        shapes["actions"] = np.shape(arrays["actions"])[1:]
        return {
            key: np.asarray(value, np.bool_ if key == "terminals" else np.float32).reshape(
                -1 if len(value) else 0, *shapes.get(key, ())
            )
            for key, value in found.items()
        }
    keep = np.ones(max(0, len(observations) - 1), np.bool_)
    if not terminate_on_end:
        keep = kept_rows(terminals, arrays.get("timeouts"), max_episode_steps)
    return {
        "observations": observations[:-1][keep].astype(np.float32),
        "actions": np.asarray(arrays["actions"])[:-1][keep].astype(np.float32),
        "next_observations": observations[1:][keep].astype(np.float32),
        "rewards": np.asarray(arrays["rewards"])[:-1][keep].astype(np.float32),
        "terminals": terminals[:-1][keep],
    }


def kept_rows(terminals: NDArray[Any], timeouts: NDArray[Any] | None, max_episode_steps: int | None) -> Bools:
    """Return which of the first N - 1 rows `qlearning_dataset` keeps, (N - 1,).

    `terminals` and `timeouts` have shape (N,). Without timeouts the steps of an episode are counted, as D4RL
    does it: the episode after a terminal counts from one, the one after a cut from zero.
    """
    rows = max(0, len(terminals) - 1)
    if timeouts is not None:
        return ~np.asarray(timeouts[:rows], np.bool_)
    assert max_episode_steps is not None
    keep = np.ones(rows, np.bool_)
    start, count = 0, 0
    for stop in [*np.flatnonzero(np.asarray(terminals[:rows], np.bool_)), rows]:
        first_cut = start + max_episode_steps - 1 - count
        keep[first_cut : stop + 1 : max_episode_steps] = False
        count = int(stop < rows and keep[stop])
        start = stop + 1
    return keep


def _package_function() -> Any:
    """`d4rl.qlearning_dataset`, None where the package is absent or does not import on this system."""
    import contextlib
    import importlib.util
    import io

    try:
        if importlib.util.find_spec("d4rl") is None:
            return None
        with contextlib.redirect_stderr(io.StringIO()):  # it complains about simulators that are not there
            import d4rl  # type: ignore[import-not-found,unused-ignore]
        return getattr(d4rl, "qlearning_dataset", None)
    except Exception:  # an old package on a new system: anything can be raised
        return None


def _timeouts(terminals: Bools, max_episode_steps: int) -> Bools:
    """Rows at which an episode has had its number of steps, counted from the row after the last end."""
    timeouts = np.zeros(len(terminals), np.bool_)
    start = 0
    for stop in [*np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[start + max_episode_steps - 1 : stop + 1 : max_episode_steps] = True
        start = stop + 1
    return timeouts


def _cut_at_end(raw: Mapping[str, NDArray[Any]], keep: Bools, max_episode_steps: int | None) -> bool:
    """Whether the last row of the file is at a timeout."""
    if "timeouts" in raw:
        return bool(raw["timeouts"][-1])
    longer = kept_rows(np.append(raw["terminals"], False), None, max_episode_steps)
    return not longer[-1]


def _outlined(raw: Mapping[str, NDArray[Any]], max_episode_steps: int | None) -> dict[str, Any]:
    """`qlearning_dataset` where the rows of observations and actions are not to be copied."""
    sizes = {key: raw[key].shape[1] for key in ("observations", "actions")}
    narrow = {**raw, **{key: raw[key][:, :0] for key in sizes}}
    columns: dict[str, Any] = qlearning_dataset(
        narrow, max_episode_steps=max_episode_steps, implementation="native"
    )
    rows = len(columns["rewards"])
    for key, size in {**sizes, "next_observations": sizes["observations"]}.items():
        columns[key] = hdf5.unread((rows, size))
    return columns


def _arrays(file: Any, path: Path, outline: bool, progress: hdf5.Progress | None) -> dict[str, NDArray[Any]]:
    found: dict[str, hdf5.Column] = {}
    rows = None
    for name, rank in _RANKS.items():
        column = hdf5.column(file, path, name, rank, flags=name in FLAGS, rows=rows)
        if column is not None:
            found[name] = column
            rows = column.shape[0]
        elif name in _NEEDED:
            raise DatasetError(hdf5.missing(file, path, name, "D4RL"))
    for name in _COSTS:
        column = hdf5.column(file, path, name, 1, rows=rows)
        if column is not None:
            found["costs"] = column
            break
    if not rows:
        raise DatasetError(f"{path} holds no transition; get another file.")
    for name in ("observations", "actions"):
        if not found[name].shape[1]:
            raise DatasetError(f"{path}: {name} has rows without components; get another file.")
    read = {name: column for name, column in found.items() if not (outline and len(column.shape) == 2)}
    report = hdf5.reporter(sum(column.nbytes for column in read.values()), progress)
    return {
        name: column.read(report) if name in read else hdf5.unread(column.shape)
        for name, column in found.items()
    }
