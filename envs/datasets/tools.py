"""Thinner, harder and noisier data sets, as DSRL makes them, and a picture of one.

Every function takes a data set and returns another; none changes its argument. What is random comes from
the NumPy generator that is given (DSRL's is seeded with 1234), so that equal seeds give equal data.

Departures from DSRL's `pre_process_data`:

* the episodes that a full cell keeps are drawn from the generator too, and not from Python's global one;
* episodes stay in their order; a grid over equal values has one cell, where DSRL divides by zero;
* `trim_best` looks at the episodes that are there, also after `inpaint`, where DSRL mixes up their numbers,
  and leaves the data alone when no episode is safe (or risky), where DSRL fails;
* `inpaint` takes shares of the whole range of returns, as DSRL's source does now; its release 0.1.0 took
  them of the range of those episodes whose cost is inside;
* pictures are drawn on request (`scatter`), and not at every call.

Source: Liu et al., "Datasets and Benchmarks for Offline Safe Reinforcement Learning", 2023, section on
post-processing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferl.envs.datasets.tasks import GridPreset, normalised_score
from saferl.envs.datasets.transitions import OfflineDataset
from saferl.errors import DatasetError, UsageError

__all__ = [
    "add_noise",
    "add_outliers",
    "cells",
    "episode_statistics",
    "grid_filter",
    "inpaint",
    "pre_process",
    "scatter",
    "trim_best",
]

Indices = NDArray[np.intp]
Range = tuple[float, float]
Rectangle = tuple[float, float, float, float]

_EVERYTHING: Range = (-np.inf, np.inf)
_BLOCK = 1 << 16


def cells(values: ArrayLike, bins: int, bounds: Range = _EVERYTHING) -> Indices:
    """Return the cell of each value (n,) on a grid over the values' range, cut to `bounds`.

    Cells are numbered from 0 and `bins` of them are equally wide; the largest value has a cell of its own,
    number `bins`. Values outside the bounds have -1.
    """
    if bins < 1:
        raise UsageError(f"the number of bins is {bins}; a grid has at least one.")
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return np.zeros(0, np.intp)
    low, high = max(float(numbers.min()), bounds[0]), min(float(numbers.max()), bounds[1])
    inside = (numbers >= low) & (numbers <= high)
    step = (high - low) / bins
    index = np.floor_divide(numbers - low, step) if step > 0 else np.zeros_like(numbers)
    return np.where(inside, index, -1).astype(np.intp)


def grid_filter(
    dataset: OfflineDataset,
    generator: np.random.Generator,
    *,
    cost_bins: int = 10,
    return_bins: int = 50,
    max_per_cell: int = 5,
    min_per_cell: int = 2,
    cost_bounds: Range = _EVERYTHING,
    return_bounds: Range = _EVERYTHING,
) -> OfflineDataset:
    """Thin the data on a grid over episode cost and return.

    A cell with more than `max_per_cell` episodes keeps that many, drawn at random; one with `min_per_cell` or
    fewer is emptied. Episodes outside the bounds and the trailing fragment go.

    Raises:
        UsageError: a number of bins is not positive, or a number of episodes negative.
    """
    if max_per_cell < 0 or min_per_cell < 0:
        raise UsageError("max_per_cell and min_per_cell count episodes; neither may be negative.")
    cost_cells = cells(dataset.episode_costs, cost_bins, cost_bounds)
    return_cells = cells(dataset.episode_returns, return_bins, return_bounds)
    inside = np.flatnonzero((cost_cells >= 0) & (return_cells >= 0))
    cell = cost_cells[inside] * (return_bins + 1) + return_cells[inside]
    kept: list[Indices] = []
    for number in np.unique(cell):
        members = inside[cell == number]
        if len(members) > max_per_cell:
            kept.append(generator.choice(members, max_per_cell, replace=False))
        elif len(members) > min_per_cell:
            kept.append(members)
    return dataset.select(np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.intp))


def add_outliers(
    dataset: OfflineDataset,
    generator: np.random.Generator,
    *,
    share: float,
    cost_limit: float,
    max_cost: float | None = None,
    max_return: float | None = None,
) -> tuple[OfflineDataset, Indices]:
    """Make some costly, rewarding episodes look safe and still better: tempting data that are false.

    Of the episodes with at least half of `max_cost` and half of `max_return`, share x (all episodes), rounded
    down but at least 1, get 1.5 times their rewards, and as costs a random number of ones, less than the
    cost limit, in random steps.

    Args:
        dataset: whole episodes of it are kept.
        generator: draws episodes, costs and steps.
        share: share of the outliers in all episodes, in [0, 1].
        cost_limit: at least 1.
        max_cost, max_return: the task's constants when left out, or without a task the data's largest.

    Returns:
        the data set and the numbers of the changed episodes.

    Raises:
        UsageError: the share or limit is impossible, or too few episodes are costly and rewarding enough.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"the share of outliers is {share:g}; it lies in [0, 1].")
    if not cost_limit >= 1:
        raise UsageError(f"the cost limit is {cost_limit:g}; outliers with fewer ones need at least 1.")
    dataset = dataset.whole_episodes()
    costs, returns = dataset.episode_costs, dataset.episode_returns
    if max_cost is None:
        max_cost = dataset.task.max_episode_cost if dataset.task else float(costs.max(initial=0.0))
    if max_return is None:
        max_return = dataset.task.max_episode_reward if dataset.task else float(returns.max(initial=0.0))
    number = max(int(dataset.num_episodes * share), 1)
    eligible = np.flatnonzero((costs >= max_cost / 2) & (returns >= max_return / 2))
    if number > len(eligible):
        raise UsageError(
            f"{number} outliers are asked for and {len(eligible)} episodes have cost {max_cost / 2:g} and "
            f"return {max_return / 2:g} or more; ask for a smaller share."
        )
    chosen = generator.choice(eligible, size=number, replace=False)
    new_costs = generator.choice(np.arange(int(cost_limit)), size=number)
    step_costs, rewards = np.array(dataset.costs), np.array(dataset.rewards)
    for episode, cost in zip(chosen, new_costs, strict=True):
        rows = dataset.rows_of(episode)
        step_costs[rows] = 0.0
        step_costs[rows[generator.choice(np.arange(len(rows)), min(cost, len(rows)), replace=False)]] = 1.0
        rewards[rows] *= 1.5
    return dataset.replace(costs=step_costs, rewards=rewards), np.sort(chosen)


def inpaint(
    dataset: OfflineDataset,
    rectangles: Sequence[Rectangle],
    *,
    keep: ArrayLike = (),
    cost_range: Range | None = None,
    return_range: Range | None = None,
) -> OfflineDataset:
    """Delete the episodes inside rectangles of the plane of cost and return.

    Args:
        dataset: whole episodes of it are kept.
        rectangles: (lowest cost, highest cost, lowest return, highest return) each, as shares of the ranges
            in [0, 1]; the edges belong to them.
        keep: numbers of episodes that stay anyhow.
        cost_range, return_range: what the shares are of, the data's own ranges when left out.

    Raises:
        UsageError: a rectangle has no four shares in order.
    """
    costs, returns = dataset.episode_costs, dataset.episode_returns
    gone = np.zeros(dataset.num_episodes, np.bool_)
    for rectangle in rectangles:
        if len(rectangle) != 4 or not (
            0 <= rectangle[0] <= rectangle[1] <= 1 and 0 <= rectangle[2] <= rectangle[3] <= 1
        ):
            raise UsageError(
                f"the rectangle {rectangle} is not (lowest, highest cost, lowest, highest return) in [0, 1]."
            )
        inside = np.ones_like(gone)
        for values, (first, last), bounds in (
            (costs, rectangle[:2], cost_range),
            (returns, rectangle[2:], return_range),
        ):
            low, high = bounds or _range(values)
            inside &= ((high - low) * first + low <= values) & (values <= (high - low) * last + low)
        gone |= inside
    gone[np.asarray(keep, np.intp)] = False
    return dataset.select(~gone)


def trim_best(dataset: OfflineDataset, *, epsilon: float, cost_limit: float) -> OfflineDataset:
    """Delete the best safe episodes (epsilon > 0, harder) or the best risky ones (epsilon < 0, easier).

    Those go whose return lies within |epsilon| of the best one of their kind; an episode is safe when its
    cost is at most `cost_limit`. Whole episodes are kept.
    """
    safe = dataset.episode_costs <= cost_limit
    of_kind = safe if epsilon > 0 else ~safe
    if epsilon == 0 or not of_kind.any():
        return dataset.whole_episodes()
    best = dataset.episode_returns[of_kind].max()
    return dataset.select(~(of_kind & (dataset.episode_returns >= best - abs(epsilon))))


def add_noise(dataset: OfflineDataset, generator: np.random.Generator, *, scale: float) -> OfflineDataset:
    """Add N(0, (scale x std)^2) to observations and, independently, to next observations.

    `std` is one number: the standard deviation over the whole array. The result lies in memory.
    """
    if not scale >= 0:
        raise UsageError(f"the scale of the noise is {scale:g}; it is zero or more.")
    changed = {}
    for key in ("observations", "next_observations"):
        clean = getattr(dataset, key)
        noisy = np.array(clean)
        std = float(np.std(clean, dtype=np.float64)) if len(clean) else 0.0
        for start in range(0, len(noisy), _BLOCK):
            block = noisy[start : start + _BLOCK]
            block += scale * generator.normal(0.0, std, block.shape)
        changed[key] = noisy
    return dataset.replace(**changed)


def pre_process(
    dataset: OfflineDataset,
    *,
    seed: int = 1234,
    grid: GridPreset | None = None,
    outliers: float | None = None,
    inpainted: Sequence[Rectangle] = (),
    epsilon: float | None = None,
    noise: float | None = None,
    cost_limit: float | None = None,
) -> OfflineDataset:
    """Apply what is asked for in DSRL's order: grid, outliers, inpainting, epsilon, noise.

    Args:
        dataset: the data; whole episodes of it are kept.
        seed: of the generator; DSRL's own by default.
        grid: for `grid_filter`, for example `tasks.density_preset("CarRun", 0.5)`.
        outliers: share for `add_outliers`; outliers are not inpainted.
        inpainted: rectangles for `inpaint`, shares of the ranges before the grid.
        epsilon: for `trim_best`.
        noise: scale for `add_noise`.
        cost_limit: needed for outliers and epsilon.

    Raises:
        UsageError: an argument is impossible, or the cost limit is missing.
    """
    if cost_limit is None and (outliers is not None or epsilon is not None):
        raise UsageError("outliers and epsilon depend on what is safe; give cost_limit.")
    generator = np.random.Generator(np.random.PCG64(seed))
    dataset = dataset.whole_episodes()
    ranges = _range(dataset.episode_costs), _range(dataset.episode_returns)
    protected: Indices = np.zeros(0, np.intp)
    if grid is not None:
        dataset = grid_filter(
            dataset,
            generator,
            cost_bins=grid.cost_bins,
            return_bins=grid.return_bins,
            max_per_cell=grid.max_per_cell,
            min_per_cell=grid.min_per_cell,
        )
    if outliers is not None and cost_limit is not None:
        dataset, protected = add_outliers(dataset, generator, share=outliers, cost_limit=cost_limit)
    if inpainted:
        dataset = inpaint(dataset, inpainted, keep=protected, cost_range=ranges[0], return_range=ranges[1])
    if epsilon is not None and cost_limit is not None:
        dataset = trim_best(dataset, epsilon=epsilon, cost_limit=cost_limit)
    return dataset if noise is None else add_noise(dataset, generator, scale=noise)


def episode_statistics(dataset: OfflineDataset, cost_limits: Sequence[float] | None = None) -> dict[str, Any]:
    """Return what a table or a JSON file should say about the episodes.

    Args:
        dataset: the data.
        cost_limits: limits on an episode's cost; the task's own when left out.

    Returns:
        plain numbers: "transitions", "episodes", "trailing", "terminated" (episodes that the environment
        ended) and "timeouts" (the others); for "length", "return" and "cost" the minimum, quartiles, maximum
        and mean; and for each limit the share of safe episodes and the best return of one (None if none is
        safe), with a known task also normalised, as is the mean of all episodes.
    """
    if cost_limits is None:
        cost_limits = dataset.task.cost_limits if dataset.task else ()
    costs, returns = dataset.episode_costs, dataset.episode_returns
    table: dict[str, Any] = {
        "task": dataset.task.key if dataset.task else None,
        "transitions": len(dataset),
        "episodes": dataset.num_episodes,
        "trailing": dataset.trailing,
    }
    table["terminated"] = int(np.asarray(dataset.terminals)[dataset.ends].sum())
    table["timeouts"] = dataset.num_episodes - table["terminated"]
    for name, values in (("length", dataset.episode_lengths), ("return", returns), ("cost", costs)):
        numbers: dict[str, float] = {}
        if len(values):
            labels = ("min", "25%", "50%", "75%", "max")
            quantiles = np.quantile(values, (0.0, 0.25, 0.5, 0.75, 1.0))
            numbers = {label: float(value) for label, value in zip(labels, quantiles, strict=True)}
            numbers["mean"] = float(values.mean())
        table[name] = numbers
    table["limits"] = []
    for limit in cost_limits:
        safe = costs <= limit
        best = float(returns[safe].max()) if safe.any() else None
        row: dict[str, Any] = {
            "cost_limit": float(limit),
            "safe": float(safe.mean()) if len(safe) else 0.0,
            "best": best,
        }
        if dataset.task is not None and best is not None:
            row["best_normalised"] = float(normalised_score(dataset.task, best, 0.0, limit)[0])
        if dataset.task is not None and len(safe):
            means = normalised_score(dataset.task, returns.mean(), costs.mean(), limit)
            row["mean_normalised"] = {"return": float(means[0]), "cost": float(means[1])}
        table["limits"].append(row)
    return table


def scatter(
    dataset: OfflineDataset, path: str | Path, cost_limit: float | Sequence[float] | None = None
) -> None:
    """Draw the episodes in the plane of cost and return, with a line at each limit.

    Args:
        dataset: the data.
        path: picture to write, in one step; its ending (.png, .svg, .pdf) says the format.
        cost_limit: limit on an episode's cost, or several, if any.

    Raises:
        UsageError: the ending is of no picture.
        DatasetError: there is no whole episode, or the file cannot be written.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    path = Path(path)
    if not dataset.num_episodes:
        raise DatasetError(f"{dataset.source} has no whole episode; there is nothing to draw.")
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(5.0, 3.6), layout="constrained")
        kind = path.suffix.lstrip(".").lower()
        if kind not in figure.canvas.get_supported_filetypes():
            raise UsageError(f"{path} has no picture's ending; name it .png, .svg or .pdf.")
        axes = figure.add_subplot()
        axes.scatter(
            dataset.episode_costs, dataset.episode_returns, s=9, alpha=0.5, linewidths=0, rasterized=True
        )
        for k, limit in enumerate(np.atleast_1d([] if cost_limit is None else cost_limit)):
            axes.axvline(limit, color="tab:red", linestyle="--", linewidth=1.1)
            # One below the other: limits may stand close together.
            top, height = axes.get_xaxis_transform(), 0.98 - 0.06 * k
            axes.text(limit, height, f" limit {limit:g}", color="tab:red", transform=top, va="top")
        name = dataset.task.key if dataset.task else Path(dataset.source).name
        axes.set_title(f"{name}: {dataset.num_episodes} episodes", parse_math=False)
        axes.set_xlabel("cost of the episode")
        axes.set_ylabel("return of the episode")
        axes.spines[["top", "right"]].set_visible(False)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, dpi=150, format=kind)
            temporary.replace(path)
        except OSError as error:
            raise DatasetError(
                f"{path} could not be written ({error.strerror or error}); choose another folder."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _range(values: NDArray[np.float64]) -> Range:
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
