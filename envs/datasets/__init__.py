"""Offline data: DSRL's 38 tasks, and files in DSRL's, D4RL's and Minari's layouts.

`load("PointGoal1")` fetches a task's file, `load("data.hdf5")` opens one. The rest is imported on first use,
so that importing this package loads neither h5py nor matplotlib.

transitions.py   the data set: arrays of transitions and an index of episodes
tasks.py         constants of the tasks, normalised scores
dsrl.py, d4rl.py, minari.py   the layouts;   hdf5.py   guarded access to the files
download.py      fetching
tools.py         DSRL's post-processing, statistics, pictures
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saferl.errors import DatasetError, UsageError

if TYPE_CHECKING:
    from saferl.envs.datasets.d4rl import read_d4rl, write_d4rl
    from saferl.envs.datasets.download import fetch
    from saferl.envs.datasets.dsrl import read_dsrl, write_dsrl
    from saferl.envs.datasets.minari import read_minari, write_minari
    from saferl.envs.datasets.tasks import TASKS, OfflineTask, find_task, normalised_score
    from saferl.envs.datasets.transitions import OfflineDataset, concatenate

__all__ = [
    "TASKS",
    "Format",
    "OfflineDataset",
    "OfflineTask",
    "Report",
    "concatenate",
    "detect_format",
    "examine",
    "fetch",
    "find_task",
    "load",
    "locate",
    "normalised_score",
    "read_d4rl",
    "read_dsrl",
    "read_minari",
    "validate",
    "write_d4rl",
    "write_dsrl",
    "write_minari",
]

Format = Literal["dsrl", "d4rl", "minari"]

_HOMES = {
    "TASKS": "tasks",
    "OfflineDataset": "transitions",
    "OfflineTask": "tasks",
    "concatenate": "transitions",
    "fetch": "download",
    "find_task": "tasks",
    "normalised_score": "tasks",
    "read_d4rl": "d4rl",
    "read_dsrl": "dsrl",
    "read_minari": "minari",
    "write_d4rl": "d4rl",
    "write_dsrl": "dsrl",
    "write_minari": "minari",
}


def __getattr__(name: str) -> Any:
    """Import on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


@dataclass(frozen=True)
class Report:
    """What `validate` found in a file without faults."""

    format: Format
    transitions: int
    episodes: int
    trailing: int
    """Transitions after the last end of an episode."""
    checksum: bool
    """Whether there was a checksum to compare with."""


def load(
    name_or_path: str | Path,
    *,
    env: str | None = None,
    offline: bool = False,
    memory_map: bool = False,
    outline: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> OfflineDataset:
    """Open a data set, downloading it when it is a task's and not there yet.

    Args:
        name_or_path: a file or folder in one of the three layouts, or a task's name (see `find_task`).
        env: environment that the data are of: a task's name, or any environment id. It tells D4RL files
            without timeouts how long an episode may be.
        offline: never open a connection.
        memory_map: for DSRL's layout, map the arrays instead of reading them into memory (see `read_dsrl`).
        outline: leave observations and actions unread; in their place are arrays of NaN that take no memory.
        progress: called with bytes read and in all.

    Raises:
        UsageError: neither a file nor a task has this name, or the environment is unknown.
        DatasetError: the file is damaged, of no known layout, not of `env`, or cannot be downloaded.
    """
    task, steps = _task_and_steps(env)
    path, named = locate(name_or_path, offline=offline)
    task = task or named
    layout = detect_format(path)
    if layout == "minari":
        from saferl.envs.datasets.minari import read_minari

        return read_minari(path, task=task, outline=outline, progress=progress)
    if layout == "d4rl":
        from saferl.envs.datasets.d4rl import read_d4rl

        return read_d4rl(path, max_episode_steps=steps, task=task, outline=outline, progress=progress)
    from saferl.envs.datasets.dsrl import read_dsrl

    return read_dsrl(path, task=task, memory_map=memory_map, outline=outline, progress=progress)


def locate(
    name_or_path: str | Path,
    *,
    offline: bool = False,
    progress: Callable[[int, int | None], object] | None = None,
    notice: Callable[[str], object] | None = None,
) -> tuple[Path, OfflineTask | None]:
    """Return the path of a file or folder that is there, or of a task's file, downloaded if need be.

    Args and what is raised are those of `load` and `download.fetch`. The task is returned where it was named.
    """
    from saferl.envs.datasets.tasks import find_task

    path = Path(name_or_path)
    if path.exists():
        return path, None
    looks_like_a_path = (
        isinstance(name_or_path, Path) or len(path.parts) > 1 or path.suffix in (".hdf5", ".h5")
    )
    named = None
    with contextlib.suppress(UsageError):
        named = find_task(str(name_or_path))
    if named is None and looks_like_a_path:
        raise DatasetError(f"{path} does not exist; mend the path or name a task.")
    if named is None:
        try:
            named = find_task(str(name_or_path))
        except UsageError as error:
            raise UsageError(str(error).replace("unknown ", "unknown file or ", 1)) from None
    from saferl.envs.datasets.download import fetch

    return fetch(named, offline=offline, progress=progress, notice=notice), named


def detect_format(path: str | Path) -> Format:
    """Return a file's or folder's layout, by its contents.

    A group "episode_0" or another number means Minari; `costs` at the top, or a task's own file name, DSRL,
    whose reader then says what may be missing; `observations` without them D4RL.

    Raises:
        DatasetError: it is missing, damaged, or of none of these layouts.
    """
    import re

    from saferl.envs.datasets import hdf5
    from saferl.envs.datasets.tasks import find_task

    path = Path(path)
    if path.is_dir():
        from saferl.envs.datasets.minari import find_minari

        if find_minari(path) is None:
            raise DatasetError(
                f"{path} is a folder without a Minari data set; give a file, or such a folder."
            )
        return "minari"
    with hdf5.open_file(path) as file:
        there = hdf5.names(file, path)
    if any(re.fullmatch(r"episode_\d+", name) for name in there):
        return "minari"
    with contextlib.suppress(UsageError):
        find_task(path.name)
        return "dsrl"
    if "costs" in there:
        return "dsrl"
    if "observations" in there:
        return "d4rl"
    raise DatasetError(
        f"{path} has neither DSRL's, D4RL's nor Minari's layout; it holds "
        f"{', '.join(sorted(there)[:10]) or 'nothing'}."
    )


def validate(path: str | Path, *, env: str | None = None) -> Report:
    """Read a whole data set, checking every value and, where there is one, the checksum beside the file.

    It is never in memory as a whole. Raises DatasetError for the first fault; arguments as in `examine`.
    """
    report, faults = examine(path, env=env)
    if report is None:
        raise DatasetError(faults[0])
    return report


def examine(
    path: str | Path, *, env: str | None = None, progress: Callable[[int, int], object] | None = None
) -> tuple[Report | None, list[str]]:
    """Look for every fault of a data set, which is never in memory as a whole.

    Args:
        path: a file or folder in one of the three layouts.
        env: environment that the data are of, as in `load`.
        progress: called with bytes read and in all.

    Returns:
        what there is and no sentence; or None and a sentence on each array (of each episode, in Minari's
        layout) that is missing or has bad values, which names the array and the first such row.

    Raises:
        UsageError: the environment is unknown.
        DatasetError: nothing is there, or it is of no known layout.
    """
    import warnings

    from saferl.envs.datasets.d4rl import find_d4rl_faults
    from saferl.envs.datasets.download import verify_checksum
    from saferl.envs.datasets.dsrl import find_dsrl_faults
    from saferl.envs.datasets.minari import find_minari_faults

    path = Path(path)
    layout = detect_format(path)
    faults: list[str] = []
    checksum = False
    try:
        checksum = path.is_file() and verify_checksum(path)
    except DatasetError as error:
        faults.append(str(error))
    find = {"dsrl": find_dsrl_faults, "d4rl": find_d4rl_faults, "minari": find_minari_faults}[layout]
    faults += find(path, progress)
    if not faults:  # what only shows between arrays
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = load(path, env=env, outline=True)
            return Report(layout, len(data), data.num_episodes, data.trailing, checksum), []
        except DatasetError as error:
            faults.append(str(error))
    return None, faults


def _task_and_steps(env: str | None) -> tuple[OfflineTask | None, int | None]:
    """The task that an environment is of, and the steps of an episode, as far as they are known."""
    if env is None:
        return None, None
    from saferl.envs.datasets.tasks import find_task

    with contextlib.suppress(UsageError):
        task = find_task(env)
        return task, task.episode_steps
    import gymnasium as gym

    from saferl.envs import resolve_id

    return None, gym.spec(resolve_id(env)).max_episode_steps
