"""What a report knows of runs: the contents of their folders, sorted into groups."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferl.errors import CheckpointError, SaferlError, UsageError
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import read_config

Floats = NDArray[np.float64]

# Differences in these do not make another experiment.
_INCIDENTAL = {"seed", "device", "threads", "processes", "checkpoint_interval", "total_steps"}
_EVALUATED = {"episodes", "return", "cost", "costs", "limits", "env", "backend", "seed", "deterministic"}


@dataclass(frozen=True)
class Series:
    """A metric over the steps at which it was recorded, each of shape (T,)."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def window(self) -> int:
        """Iterations that the moving average spans: about 5 % of 20 or more; an odd number."""
        n = len(self)
        return 1 if n < 20 else 2 * round(0.05 * n / 2) + 1

    def smoothed(self) -> Series:
        """Centred moving average; near the ends, over what there is."""
        kernel = np.ones(self.window)
        counts = np.convolve(np.ones(len(self)), kernel, mode="same")
        return Series(self.steps, np.convolve(self.values, kernel, mode="same") / counts)

    def thinned(self, points: int) -> Series:
        """At most `points` of the points, evenly chosen, the first and the last among them."""
        if len(self) <= points:
            return self
        rows = np.linspace(0, len(self) - 1, points).round().astype(int)
        return Series(self.steps[rows], self.values[rows])


@dataclass(frozen=True)
class RunRecord:
    """What a report knows of a run."""

    directory: Path
    name: str
    algorithm: str
    hyperparameters: dict[str, Any]
    versions: dict[str, str]
    step: int
    """Steps done."""
    series: dict[str, Series]
    """Finite values by metric; a metric that has none is absent."""
    evaluation: dict[str, Any] | None
    """Contents of `evaluation.json`, None if the run was not evaluated."""

    @property
    def environment(self) -> str:
        return str(self.hyperparameters.get("env", "unknown environment"))

    @property
    def seed(self) -> str:
        return str(self.hyperparameters.get("seed", "–"))

    @property
    def constraints(self) -> list[str]:
        """Names of the costs that are held below a limit."""
        metrics = [m.removeprefix("constraint/") for m in self.series if m.startswith("constraint/")]
        return union([m.rsplit("/", 1)[0] for m in metrics])

    @property
    def limits(self) -> dict[str, float]:
        """Last cost limits by name; empty for an unconstrained learner."""
        found = {name: self.series.get(f"constraint/{name}/limit") for name in self.constraints}
        return {name: float(series.values[-1]) for name, series in found.items() if series}

    @property
    def costs(self) -> list[str]:
        """Recorded costs, the total ("cost") first."""
        total = ["cost"] if self.cost_series("cost") else []
        named = [m.removeprefix("train/cost/") for m in self.series if m.startswith("train/cost/")]
        return union(total, named, self.constraints)

    @property
    def return_series(self) -> Series | None:
        """Return of finished training episodes, of evaluations where training has no episodes."""
        return self.series.get("train/return") or self.series.get("eval/return")

    def cost_series(self, name: str) -> Series | None:
        """Cost of finished training episodes by name, of evaluations where training has no episodes."""
        metrics = ("train/cost", "eval/cost") if name == "cost" else (f"train/cost/{name}",)
        return next((self.series[m] for m in (*metrics, f"constraint/{name}/mean") if m in self.series), None)

    def multiplier_series(self, name: str) -> Series | None:
        """Lagrange multiplier of a constraint."""
        return self.series.get(f"constraint/{name}/multiplier")


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    runs: list[RunRecord]
    index: int
    """Place among the groups of its environment."""


def final_mean(series: Series | None) -> float | None:
    """Mean of a metric over the last 10 % of its iterations, at least one; None for no metric."""
    if series is None:
        return None
    return float(series.values[-math.ceil(0.1 * len(series)) :].mean())


def read_runs(runs: Sequence[Path]) -> list[RunRecord]:
    """Read run directories; one that is given twice counts once.

    Raises:
        UsageError: no run is given, or a folder is no run.
        SaferlError: a run has recorded no metric yet, or one of its files is damaged.
    """
    if not runs:
        raise UsageError("no run to report on; name the folder of a `saferl train`.")
    unique = list({Path(run).resolve(): Path(run) for run in runs}.values())
    names = [path.resolve().name for path in unique]
    if len(set(names)) < len(names):
        names = [str(path) for path in unique]
    return [_read_run(path, name) for path, name in zip(unique, names, strict=True)]


def _read_run(directory: Path, name: str) -> RunRecord:
    config = read_config(directory)
    path = directory / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    if not rows:
        raise SaferlError(
            f"{directory} has recorded no metrics yet; wait for its first iteration, or go on with it by "
            f"`saferl train --resume {directory}`."
        )
    series: dict[str, Series] = {}
    for metric in dict.fromkeys(metric for row in rows for metric in row if metric != "step"):
        pairs = [(row["step"], row[metric]) for row in rows if math.isfinite(row.get(metric, math.nan))]
        if pairs:
            steps, values = np.array(pairs, dtype=np.float64).T
            series[metric] = Series(steps, values)
    return RunRecord(
        directory=directory,
        name=name,
        algorithm=str(config["algorithm"]),
        hyperparameters=config.get("config", {}),
        versions=config.get("versions", {}),
        step=int(rows[-1]["step"]),
        series=series,
        evaluation=_read_evaluation(directory / "evaluation.json"),
    )


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        evaluation: dict[str, Any] = json.loads(path.read_text())
        if missing := _EVALUATED - set(evaluation):
            raise ValueError(f"without {missing}")
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged; write it anew by `saferl evaluate`.") from error
    return evaluation


def group_runs(records: Iterable[RunRecord]) -> dict[str, list[Group]]:
    """Groups by environment, told apart by algorithm and by the hyperparameters that differ."""
    found: dict[str, dict[str, list[RunRecord]]] = {}
    for record in records:
        settings = {k: v for k, v in record.hyperparameters.items() if k not in _INCIDENTAL}
        key = json.dumps([record.algorithm, settings], sort_keys=True)
        found.setdefault(record.environment, {}).setdefault(key, []).append(record)
    answer = {}
    for environment, groups in found.items():
        firsts = [runs[0] for runs in groups.values()]
        answer[environment] = [
            Group(_label(runs[0], firsts), runs, i) for i, runs in enumerate(groups.values())
        ]
    return answer


def _label(record: RunRecord, others: Iterable[RunRecord]) -> str:
    """The algorithm, with what sets this run apart from others of the same algorithm."""
    own = record.hyperparameters
    peers = [other.hyperparameters for other in others if other.algorithm == record.algorithm]
    differing = [k for k in union(*peers) if any(peer.get(k) != own.get(k) for peer in peers)]
    parts = [f"{k.replace('_', ' ')} {setting(own.get(k))}" for k in differing if k not in _INCIDENTAL]
    if len(parts) > 3:
        parts[3:] = ["…"]
    return f"{record.algorithm} ({', '.join(parts)})" if parts else record.algorithm


def union(*lists: Iterable[str]) -> list[str]:
    """Names in order of first appearance, the total cost first."""
    return sorted(dict.fromkeys(chain(*lists)), key=lambda name: name != "cost")


def setting(value: Any) -> str:
    """A hyperparameter as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " × ".join(map(setting, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} {setting(v)}" for k, v in value.items())
    return str(value)
