"""`saferl dataset download NAME...` and `saferl dataset list`: DSRL's files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from saferl.cli.parsing import parse
from saferl.errors import UsageError, unknown_name
from saferl.experiment.progress import Meter

if TYPE_CHECKING:
    from saferl.envs.datasets import OfflineTask


@dataclass(kw_only=True)
class Download:
    """Fetch DSRL's files into $DSRL_DATASET_DIR, or ~/.dsrl/datasets; one that was cut off is resumed."""

    names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME"), tyro.conf.Positional]
    """Tasks (see `saferl dataset list`), families (bullet, safety-gymnasium, metadrive), or all."""
    base_url: str | None = None
    """Another server, for example a mirror of one's own."""
    offline: bool = False
    """Open no connection: fail at the first file that is not there."""
    quiet: bool = False
    """Plain lines instead of a progress bar."""


def download_command(arguments: list[str]) -> int:
    """`saferl dataset download`."""
    asked = parse(Download, arguments, "saferl dataset download")
    tasks = _chosen(asked.names)
    if not tasks:
        raise UsageError("name a task, a family or all; `saferl dataset list` shows them.")

    from saferl.envs.datasets.download import cache_directory, fetch

    for task in tasks:
        path = cache_directory() / task.file_name
        there = path.is_file()
        try:
            with Meter(f"downloading {task.key}", quiet=asked.quiet) as meter:
                path = fetch(
                    task, base_url=asked.base_url, offline=asked.offline, progress=meter, notice=meter.say
                )
        except KeyboardInterrupt:
            print("\nstopped; what has arrived is kept, the same command goes on from there", file=sys.stderr)
            raise
        size = f"{path.stat().st_size / 1e6:,.1f} MB"
        print(f"{task.key}: {path} ({size}{', was there' if there else ''})", flush=True)
    return 0


def _chosen(names: tuple[str, ...]) -> list[OfflineTask]:
    """The tasks of some names, each once."""
    from saferl.envs.datasets import TASKS, find_task

    groups: dict[str, list[OfflineTask]] = {"all": list(TASKS.values())}
    for task in TASKS.values():
        groups.setdefault(task.family, []).append(task)
    chosen: dict[str, OfflineTask] = {}
    for name in names:
        try:
            members = groups[name] if name in groups else [find_task(name)]
        except UsageError as error:
            if "did you mean" in str(error):
                raise
            raise unknown_name("task or family", name, [*groups, *TASKS]) from error
        chosen |= {task.key: task for task in members}
    return list(chosen.values())


@dataclass(kw_only=True)
class List:
    """List DSRL's tasks: environment, sizes, cost limits, and the file where it is there."""


def list_command(arguments: list[str]) -> int:
    """`saferl dataset list`: plain text, so that it can be searched."""
    parse(List, arguments, "saferl dataset list")

    from saferl.envs.datasets import TASKS
    from saferl.envs.datasets.download import cache_directory

    folder = cache_directory()
    head = ("task", "environment", "observations", "actions", "steps", "episodes", "cost limits", "file")
    rows: list[tuple[str, ...]] = [head]
    there = 0
    for task in TASKS.values():
        path = folder / task.file_name
        found = "-"
        if path.is_file():
            found = f"{path.stat().st_size / 1e6:,.1f} MB"
            there += 1
        elif path.with_name(f"{path.name}.part").is_file():
            found = "in part"
        sizes = task.observation_size, task.action_size, task.episode_steps, task.episodes
        limits = ", ".join(map(str, task.cost_limits))
        rows.append((task.key, task.env_id or "-", *map(str, sizes), limits, found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if 2 <= k <= 5 else f"{cell:<{width}}"
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print(f"\n{there} of {len(TASKS)} files are in {folder}")
    return 0
