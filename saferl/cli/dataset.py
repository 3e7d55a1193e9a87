"""`saferl dataset info|plot|validate|convert|download|list`: data sets for offline learning."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from saferl.cli.parsing import parse
from saferl.errors import MissingPackageError, UsageError, unknown_name
from saferl.experiment.progress import Meter

if TYPE_CHECKING:
    from saferl.envs.datasets import OfflineDataset

COMMANDS: dict[str, tuple[str, str, str]] = {
    "info": ("saferl.cli.dataset", "FILE|NAME", "episodes, returns, costs, and scores at the cost limits"),
    "plot": ("saferl.cli.dataset", "FILE|NAME -o PNG", "draw the episodes by cost and return"),
    "validate": ("saferl.cli.dataset", "FILE|NAME", "check every value; status 1 where something is wrong"),
    "convert": ("saferl.cli.dataset_convert", "FILE|NAME OUT", "another layout, or thinner and harder data"),
    "download": ("saferl.cli.dataset_download", "NAME...", "fetch tasks, a family of them, or all"),
    "list": ("saferl.cli.dataset_download", "", "DSRL's tasks, their limits, and which are there"),
}
"""Module, words and summary of each; the module has a function of its name."""


def main(arguments: list[str]) -> int:
    """Run one of `COMMANDS`."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_usage())
        return 0 if arguments else 2
    name = arguments[0]
    if name not in COMMANDS:
        raise unknown_name("dataset command", name, COMMANDS)
    try:
        status: int = getattr(importlib.import_module(COMMANDS[name][0]), f"{name}_command")(arguments[1:])
    except ModuleNotFoundError as error:
        if error.name not in {"h5py", "matplotlib"}:
            raise
        raise MissingPackageError(
            f"`saferl dataset {name}` needs {error.name}, which is not installed; run: "
            f"pip install {error.name}"
        ) from error
    return status


def _usage() -> str:
    lines = ["usage: saferl dataset COMMAND ...", ""]
    heads = {name: f"{name} {words}".strip() for name, (_, words, _) in COMMANDS.items()}
    width = max(map(len, heads.values()))
    lines += [f"  {heads[name]:<{width}}  {summary}" for name, (_, _, summary) in COMMANDS.items()]
    lines += ["", "FILE is in DSRL's, D4RL's or Minari's layout, NAME a task of `saferl dataset list`."]
    return "\n".join([*lines, "`saferl dataset COMMAND --help` documents the options."])


# --- what the commands share ----------------------------------------------------------------------------


@dataclass(kw_only=True)
class Source:
    """A data set to read."""

    source: Annotated[str, tyro.conf.arg(metavar="FILE|NAME"), tyro.conf.Positional]
    """File or folder in DSRL's, D4RL's or Minari's layout, or a task's name."""
    env: str | None = None
    """Environment that the data are of: a DSRL task or any environment id."""
    offline: bool = False
    """Never look for it on the network."""
    quiet: bool = False
    """Plain lines instead of a progress bar."""


def find(asked: Source) -> tuple[Path, str | None]:
    """The path of what was asked for, downloaded if need be, and the environment that it is of."""
    from saferl.envs.datasets import locate

    with Meter("downloading", quiet=asked.quiet) as meter:
        path, task = locate(asked.source, offline=asked.offline, progress=meter, notice=meter.say)
    return path, asked.env or (task.key if task is not None else None)


def read(asked: Source, *, outline: bool) -> OfflineDataset:
    """The data set, in memory as a whole unless in outline; what the reader warns of is printed."""
    from saferl.envs.datasets import load

    path, env = find(asked)
    with Meter("reading", quiet=asked.quiet) as meter, _notes():
        return load(path, env=env, outline=outline, progress=meter)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            print(f"note: {warning.message}", file=sys.stderr)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise UsageError when there is something that may not be replaced."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another name, or add --overwrite.")


# --- info -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Info(Source):
    """Tell what a data set holds; observations and actions are not read."""

    cost_limit: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Limit on an episode's cost, once or more often; those of the task when left out."""
    json: bool = False
    """Print one JSON object instead of tables."""


def info_command(arguments: list[str]) -> int:
    """`saferl dataset info`."""
    asked = parse(Info, arguments, "saferl dataset info")

    from saferl.envs.datasets import detect_format
    from saferl.envs.datasets.tools import episode_statistics

    with contextlib.redirect_stdout(sys.stderr) if asked.json else contextlib.nullcontext():
        data = read(asked, outline=True)
    table = {
        "source": data.source,
        "format": detect_format(data.source),
        "env": data.task.env_id if data.task is not None else None,
        "observation_size": data.observation_size,
        "action_size": data.action_size,
        **episode_statistics(data, asked.cost_limit or None),
    }
    if asked.json:
        print(json.dumps(table, indent=2))
    else:
        _print_info(table)
    return 0


def _print_info(table: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    task = "task unknown" if table["task"] is None else f"task {table['task']}"
    print(f"{table['source']}: {table['format']} layout, {task}")
    print(
        f"{table['transitions']:,} transitions, observations {table['observation_size']}, actions "
        f"{table['action_size']}"
    )
    print(
        f"{table['episodes']:,} episodes, {table['terminated']:,} terminated, {table['timeouts']:,} cut by "
        f"time; {table['trailing']:,} transitions behind the last"
    )
    if not table["episodes"]:
        return
    episodes = Table(title="episodes", title_justify="left")
    for column in ("", "min", "25 %", "median", "75 %", "max", "mean"):
        episodes.add_column(column, justify="left" if not column else "right")
    for name in ("return", "cost", "length"):
        episodes.add_row(name, *(f"{value:.2f}" for value in table[name].values()))
    Console().print(episodes)
    if not table["limits"]:
        return
    known = table["task"] is not None
    limits = Table(title="at cost limits", title_justify="left")
    columns = ["limit", "episodes within", "best return within"]
    if known:
        columns += ["normalised", "mean return, normalised", "mean cost, normalised"]
    for column in columns:
        limits.add_column(column, justify="right")
    for row in table["limits"]:
        cells = [f"{row['cost_limit']:g}", f"{100 * row['safe']:.1f} %"]
        cells += ["-" if row["best"] is None else f"{row['best']:.2f}"]
        if known:
            cells += ["-" if row["best"] is None else f"{row['best_normalised']:.3f}"]
            cells += [f"{row['mean_normalised'][key]:.3f}" for key in ("return", "cost")]
        limits.add_row(*cells)
    Console().print(limits)


# --- plot -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Plot(Source):
    """Draw the episodes in the plane of cost and return."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Picture to write: .png, .svg or .pdf."""
    cost_limit: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Limit to mark, once or more often; those of the task when left out."""
    overwrite: bool = False
    """Replace the picture if it exists."""


def plot_command(arguments: list[str]) -> int:
    """`saferl dataset plot`."""
    asked = parse(Plot, arguments, "saferl dataset plot")
    refuse_existing(asked.output, asked.overwrite)

    from saferl.envs.datasets.tools import scatter

    data = read(asked, outline=True)
    scatter(data, asked.output, asked.cost_limit or (data.task.cost_limits if data.task else None))
    print(f"picture: {asked.output} ({data.num_episodes:,} episodes)")
    return 0


# --- validate -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Validate(Source):
    """Read every value of a data set and, where there is one, compare the checksum beside it."""


def validate_command(arguments: list[str]) -> int:
    """`saferl dataset validate`."""
    asked = parse(Validate, arguments, "saferl dataset validate")

    from saferl.envs.datasets import examine

    path, env = find(asked)
    with Meter("checking", quiet=asked.quiet) as meter:
        report, faults = examine(path, env=env, progress=meter)
    if report is None:
        for fault in faults:
            print(fault)
        print(f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}")
        return 1
    counts = [f"{report.episodes:,} episodes", f"{report.transitions:,} transitions"]
    if report.trailing:
        counts.append(f"{report.trailing:,} of them behind the last episode")
    if report.checksum:
        counts.append("checksum agrees")
    print(f"{path}: OK ({report.format} layout, {', '.join(counts)})")
    return 0
