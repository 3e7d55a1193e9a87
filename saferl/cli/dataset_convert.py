"""`saferl dataset convert FILE|NAME OUT`: another layout, and DSRL's post-processing."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from saferl.cli.dataset import Source, read, refuse_existing
from saferl.cli.parsing import parse
from saferl.errors import UsageError
from saferl.experiment.progress import Meter

if TYPE_CHECKING:
    from saferl.envs.datasets import Format, OfflineDataset

_SUFFIXES = (".hdf5", ".h5")


@dataclass(kw_only=True)
class Convert(Source):
    """Write a data set in another layout, or with fewer, false or noisier episodes.

    What is asked for is applied in DSRL's order: density or grid, outliers, inpaint, epsilon, noise.
    """

    output: Annotated[Path, tyro.conf.arg(metavar="OUT"), tyro.conf.Positional]
    """File to write, for Minari's layout a folder."""
    to: Literal["dsrl", "d4rl", "minari"] | None = None
    """Layout; by OUT's name when left out: dsrl for .hdf5 and .h5, minari without an ending."""
    density: float | None = None
    """Thin the data on a grid over cost and return, by the task's preset for this share of the episodes."""
    grid: tuple[int, int, int, int] | None = None
    """The same by numbers: bins of cost and of return, most episodes a cell, and what counts as empty."""
    outliers: float | None = None
    """Share of the episodes that is made to look safe and rewarding, and is not."""
    inpaint: tyro.conf.UseAppendAction[tuple[tuple[float, float, float, float], ...]] = ()
    """Rectangle to empty, once or more often: lowest, highest cost, lowest, highest return, as shares."""
    epsilon: float | None = None
    """Delete the safe episodes within this of the best safe return; below 0, of the risky ones."""
    noise: float | None = None
    """Noise on the observations, as a multiple of their standard deviation."""
    cost_limit: float | None = None
    """What counts as safe, for outliers and epsilon."""
    seed: int = 1234
    """Of all that is drawn; the default is DSRL's."""
    overwrite: bool = False
    """Replace OUT if it exists."""


def convert_command(arguments: list[str]) -> int:
    """`saferl dataset convert`."""
    asked = parse(Convert, arguments, "saferl dataset convert")
    layout = _layout(asked)
    refuse_existing(asked.output, asked.overwrite)
    if asked.density is not None and asked.grid is not None:
        raise UsageError("--density and --grid say the same thing; give one of them.")
    data = read(asked, outline=False)
    before = data.num_episodes
    trailing = data.trailing
    data = _processed(asked, data)
    if layout == "minari":
        data = data.whole_episodes()
    try:
        _write(asked, layout, data)
    except KeyboardInterrupt:
        print(f"\nstopped; {asked.output} was not written", file=sys.stderr)
        raise
    if trailing and not data.trailing:
        print(f"left out: the last {trailing:,} transitions, which belong to no whole episode")
    kept = f"{data.num_episodes:,}" + (f" of {before:,}" if data.num_episodes != before else "")
    print(f"data set: {asked.output} ({layout} layout, {kept} episodes, {len(data):,} transitions)")
    if data.task is not None and layout != "minari" and _named_task(asked.output) is not data.task:
        print(
            f"its name does not say that it is of {data.task.key}: add --env {data.task.key} to what reads it"
        )
    return 0


def _layout(asked: Convert) -> Format:
    """The layout to write, when OUT can be one of its data sets."""
    output = asked.output
    layout: Format
    if asked.to is not None:
        layout = asked.to
    elif output.suffix.lower() in _SUFFIXES:
        layout = "dsrl"
    elif not output.suffix:
        layout = "minari"
    else:
        raise UsageError(f"{output} does not say the layout; add --to dsrl, --to d4rl or --to minari.")
    if layout == "minari" and output.suffix.lower() in _SUFFIXES:
        raise UsageError(f"{output}: a data set in Minari's layout is a folder; leave out {output.suffix}.")
    if layout != "minari" and output.is_dir():
        raise UsageError(f"{output} is a folder; name the file to write.")
    if layout == "d4rl" and _named_task(output) is not None:
        raise UsageError(
            f"{output} is the name of a file in DSRL's layout, and read as that; choose another."
        )
    return layout


def _named_task(path: Path) -> object | None:
    from saferl.envs.datasets import find_task

    try:
        return find_task(path.name)
    except UsageError:
        return None


def _processed(asked: Convert, data: OfflineDataset) -> OfflineDataset:
    """The data after what was asked for, untouched when nothing was."""
    from saferl.envs.datasets.tasks import GridPreset, density_preset
    from saferl.envs.datasets.tools import pre_process

    grid = None
    if asked.grid is not None:
        bins, return_bins, most, least = asked.grid
        grid = GridPreset(cost_bins=bins, return_bins=return_bins, max_per_cell=most, min_per_cell=least)
    elif asked.density is not None:
        if data.task is None:
            raise UsageError(
                "presets of --density are a task's, and nothing says which one the data are of; add --env "
                "TASK, or give --grid numbers."
            )
        if asked.density not in data.task.densities:
            known = ", ".join(f"{density:g}" for density in data.task.densities) or "none"
            raise UsageError(
                f"{data.task.key} has no preset for --density {asked.density:g} (it has {known}); give "
                "--grid numbers."
            )
        grid = density_preset(data.task, asked.density)
    if grid is None and not asked.inpaint and asked.outliers is asked.epsilon is asked.noise is None:
        return data
    if asked.cost_limit is None and (asked.outliers is not None or asked.epsilon is not None):
        raise UsageError("--outliers and --epsilon depend on what is safe; add --cost-limit.")
    return pre_process(
        data,
        seed=asked.seed,
        grid=grid,
        outliers=asked.outliers,
        inpainted=asked.inpaint,
        epsilon=asked.epsilon,
        noise=asked.noise,
        cost_limit=asked.cost_limit,
    )


def _write(asked: Convert, layout: Format, data: OfflineDataset) -> None:
    from saferl.envs.datasets import write_d4rl, write_dsrl, write_minari

    with Meter("writing", quiet=asked.quiet) as meter:
        if layout == "minari":
            # Minari finds a data set by the folder of its id.
            name = asked.output.resolve().name
            chosen = {"dataset_id": name} if re.fullmatch(r"[\w-]+-v\d+", name) else {}
            write_minari(asked.output, data, overwrite=asked.overwrite, progress=meter, **chosen)
            return
        write = write_d4rl if layout == "d4rl" else write_dsrl
        write(asked.output, data, progress=meter)
    # A checksum of the file that was there before would call this one damaged.
    asked.output.with_name(f"{asked.output.name}.sha256").unlink(missing_ok=True)
