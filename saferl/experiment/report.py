"""One self-contained HTML page about a run, or about several: numbers, curves, evaluation, settings.

Runs that differ only in their seed form a group, drawn as the mean of its runs inside a band from the
smallest to the largest; every other difference in hyperparameters makes another group. The page needs
nothing besides itself: figures are inline SVG whose colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saferl.errors import CheckpointError, SaferlError, UsageError
from saferl.experiment.checkpoint import write_atomically
from saferl.experiment.config import cost_limits
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

FINAL_SHARE = 0.1
"""The last part of the iterations that the final numbers are means over."""
SMOOTHING_SHARE = 0.05
"""Width of the curves' moving average, as a part of the iterations."""

_SMOOTH_FROM = 20  # iterations; shorter curves are drawn as they are
_POINTS, _SMALL_POINTS = 400, 120  # the most that are drawn of a curve, in large and small figures
Size = tuple[float, float]
_LARGE: dict[int, Size] = {2: (5.0, 3.1), 3: (3.8, 2.7)}  # inches, by figures in a row
_SMALL: Size = (3.1, 2.0)
_TICK_STEPS = (1, 2, 2.5, 5, 10)
_DASHES = ("-", "--", ":", "-.")
# Okabe and Ito's palette, which the colour-blind can tell apart, on light and on dark paper.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b4518f", "#c98500", "#3a9bd0", "#8c6d46")
_DARK = ("#4fa9e2", "#f4874b", "#2ec49a", "#e39cc9", "#f0b93a", "#93d3f7", "#c9a77c")
_INK, _LIMIT = "#010203", "#040506"  # stand-ins, replaced by the page's colours
_LIGHT_LIMIT, _DARK_LIMIT = "#b3261e", "#ff8a80"

_SPEED = "time/steps_per_second"
_TITLES = {
    "train/episode_length": "Episode length",
    "eval/return": "Evaluation return",
    "eval/cost": "Evaluation cost",
    "loss/policy": "Policy loss",
    "loss/value": "Value loss",
    "policy/kl": "KL divergence",
    "policy/entropy": "Policy entropy",
    "policy/epochs": "Passes over the batch",
    _SPEED: "Steps per second",
}
# Differences in these do not make another experiment.
_INCIDENTAL = {"seed", "device", "threads", "processes", "checkpoint_interval", "total_steps"}


@dataclass(frozen=True)
class Series:
    """A metric over the steps at which it was recorded, each of shape (T,)."""

    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def window(self) -> int:
        """Iterations that the moving average spans; an odd number."""
        n = len(self)
        return 1 if n < _SMOOTH_FROM else 2 * round(SMOOTHING_SHARE * n / 2) + 1

    def smoothed(self) -> Series:
        """Centred moving average; near the ends, over what there is."""
        if self.window == 1:
            return self
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
    def total_steps(self) -> int | None:
        """Steps asked for."""
        total = self.hyperparameters.get("total_steps")
        return int(total) if isinstance(total, int | float) else None

    @property
    def finished(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    @property
    def limits(self) -> dict[str, float]:
        """Cost limits by name; empty for an unconstrained learner."""
        found = {
            name: float(self.series[f"constraint/{name}/limit"].values[-1])
            for name in self.constraints
            if f"constraint/{name}/limit" in self.series
        }
        asked = self.hyperparameters.get("cost_limit")
        return found or ({} if asked is None else cost_limits(asked))

    @property
    def constraints(self) -> list[str]:
        """Names under `constraint/`, in the order of the table."""
        names = [re.fullmatch(r"constraint/(.+)/[a-z]+", metric) for metric in self.series]
        return list(dict.fromkeys(match[1] for match in names if match))

    @property
    def costs(self) -> list[str]:
        """Recorded costs, the total ("cost") first."""
        named = [metric.removeprefix("train/cost/") for metric in self.series if "train/cost/" in metric]
        names = [*named, *self.constraints]
        total = self.cost_series("cost") is not None
        return list(dict.fromkeys((["cost"] if total else []) + names))

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


Getter = Callable[[RunRecord], Series | None]


def final_mean(series: Series | None) -> float | None:
    """Mean of a metric over the last 10 % of its iterations, at least one; None for no metric."""
    if series is None:
        return None
    return float(series.values[-math.ceil(FINAL_SHARE * len(series)) :].mean())


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


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the HTML page of one or more runs.

    Args:
        runs: run directories.
        output: the file to write, or a folder that is to hold `index.html`. By default
            RUN/report/index.html for one run, report/index.html for several.

    Returns:
        the file written.

    Raises:
        UsageError: no run is given, a folder is no run, or the output folder cannot be made.
        SaferlError: a run has recorded no metric yet, a file of it is damaged, or the disk is full.
    """
    records = read_runs(runs)
    if output is None:
        output = (records[0].directory if len(records) == 1 else Path()) / "report" / "index.html"
    elif output.is_dir():
        output = output / "index.html"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the folder {output.parent} cannot be made ({error.strerror}); choose another --output."
        ) from error
    write_atomically(output, render(records))
    return output


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
        hyperparameters=dict(config.get("config") or {}),
        versions=dict(config.get("versions") or {}),
        step=int(rows[-1]["step"]),
        series=series,
        evaluation=_read_evaluation(directory / "evaluation.json"),
    )


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        evaluation = json.loads(path.read_text())
        for name in ("return", "cost"):
            float(evaluation[name]["mean"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged; write it anew by `saferl evaluate`.") from error
    return dict(evaluation)


# --- groups ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Runs that differ only in their seed."""

    label: str
    runs: list[RunRecord]
    index: int

    @property
    def colour(self) -> str:
        return _LIGHT[self.index % len(_LIGHT)]

    @property
    def limits(self) -> dict[str, float]:
        return self.runs[0].limits


def _group(records: Iterable[RunRecord]) -> list[_Group]:
    """Groups of one environment, told apart by algorithm and by the hyperparameters that differ."""
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        settings = {k: v for k, v in record.hyperparameters.items() if k not in _INCIDENTAL}
        key = json.dumps([record.algorithm, settings], sort_keys=True, default=str)
        found.setdefault(key, []).append(record)
    groups = list(found.values())
    labels = []
    for runs in groups:
        algorithm, own = runs[0].algorithm, runs[0].hyperparameters
        peers = [g[0].hyperparameters for g in groups if g[0].algorithm == algorithm]
        differing = [
            name
            for name in dict.fromkeys(k for peer in peers for k in peer)
            if name not in _INCIDENTAL and any(peer.get(name) != own.get(name) for peer in peers)
        ]
        parts = [f"{name.replace('_', ' ')} {_setting(own.get(name))}" for name in differing[:3]]
        parts += ["…"] if len(differing) > 3 else []
        labels.append(f"{algorithm} ({', '.join(parts)})" if parts else algorithm)
    return [_Group(label, runs, i) for i, (label, runs) in enumerate(zip(labels, groups, strict=True))]


def _names(lists: Iterable[Iterable[str]]) -> list[str]:
    """The union in order of first appearance, the total cost first."""
    names = dict.fromkeys(name for names in lists for name in names)
    return sorted(names, key=lambda name: name != "cost")


# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """Lines of one group in a figure: a metric of each of its runs."""

    runs: list[Series]
    colour: str
    dash: str = "-"
    smooth: bool = True
    show_raw: bool = False
    """Draw the recorded values behind the smoothed ones."""


def _curve_figure(
    curves: Sequence[_Curve],
    label: str,
    limits: Sequence[Series] = (),
    legend: Sequence[tuple[str, str, str]] = (),
    *,
    size: Size = _SMALL,
) -> str:
    """Curves against steps as SVG.

    Args:
        curves: the groups' lines.
        label: what is drawn, for readers who cannot see it.
        limits: dashed lines.
        legend: label, colour and dash of each entry, if the page's own legend does not explain them.
        size: width and height in inches.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    small = size == _SMALL
    with _style():
        figure, axes = _axes(size)
        for curve in curves:
            _draw(axes, curve, small)
        for limit in limits:
            values = limit.values
            if (values == values[-1]).all():
                axes.axhline(values[-1], color=_LIMIT, linestyle="--", linewidth=1.1)
            else:
                axes.plot(limit.steps, values, color=_LIMIT, linestyle="--", linewidth=1.1)
            axes.annotate(
                f"limit {values[-1]:g}",
                (1.0, values[-1]),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=_LIMIT,
                fontsize=8,
            )
        axes.xaxis.set_major_locator(MaxNLocator(4 if small else 6, steps=_TICK_STEPS))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if not small:
            axes.set_xlabel("steps")
        if legend:
            style: list[dict[str, Any]] = [{"label": n, "color": c, "linestyle": d} for n, c, d in legend]
            handles = [Line2D([], [], **entry) for entry in style]
            axes.legend(handles=handles, frameon=False, labelcolor=_INK, fontsize=8)
        return _svg(figure, label)


def _draw(axes: Axes, curve: _Curve, small: bool) -> None:
    """One run: its smoothed curve over the raw one. Several: their mean in its band."""
    points = _SMALL_POINTS if small else _POINTS
    width = 1.2 if small else 1.6
    smooth = [series.smoothed() if curve.smooth else series for series in curve.runs]
    style: dict[str, Any] = {"color": curve.colour, "linestyle": curve.dash}

    def line(series: Series, **how: Any) -> None:
        dot = {"marker": "o", "markersize": 4} if len(series) == 1 else {}
        axes.plot(series.steps, series.values, **{**style, **dot, **how})

    if len(smooth) == 1:
        if curve.show_raw and curve.smooth and curve.runs[0].window > 1:
            raw = curve.runs[0].thinned(points)
            axes.plot(raw.steps, raw.values, color=curve.colour, alpha=0.3, linewidth=0.7)
        line(smooth[0].thinned(points), linewidth=width)
        return
    first, last = max(s.steps[0] for s in smooth), min(s.steps[-1] for s in smooth)
    every = np.unique(np.concatenate([s.steps for s in smooth]))
    shared = every[(every >= first) & (every <= last)]
    if len(shared):
        grid = Series(shared, shared).thinned(points).steps
        table = np.stack([np.interp(grid, s.steps, s.values) for s in smooth])
        axes.fill_between(
            grid, table.min(0), table.max(0), color=curve.colour, alpha=0.18, linewidth=0, zorder=1
        )
        line(Series(grid, table.mean(0)), linewidth=width)
    for series in smooth:  # what the other runs do not cover
        beyond = series.steps >= (last if len(shared) else -math.inf)
        if beyond.sum() > 1 or not len(shared):
            rest = Series(series.steps[beyond], series.values[beyond]).thinned(points)
            line(rest, linewidth=0.7, alpha=0.7)


def _final_points(groups: Sequence[_Group], cost: str) -> list[tuple[_Group, float, float]]:
    """Final cost and return of every run that has both."""
    return [
        (group, x, y)
        for group in groups
        for run in group.runs
        if (x := final_mean(run.cost_series(cost))) is not None
        and (y := final_mean(run.return_series)) is not None
    ]


def _scatter_figure(groups: Sequence[_Group], cost: str, label: str, size: Size) -> str:
    """Final return against final cost, a mark a run."""
    points = _final_points(groups, cost)
    with _style():
        figure, axes = _axes(size)
        marks = "osD^vPX"
        for group, x, y in points:
            axes.plot(
                x,
                y,
                color=group.colour,
                marker=marks[group.index % len(marks)],
                markersize=6,
                linestyle="",
                alpha=0.85,
            )
        limits = sorted({group.limits[cost] for group in groups if cost in group.limits})
        axes.margins(0.12)
        for limit in limits:
            axes.axvline(limit, color=_LIMIT, linestyle="--", linewidth=1.1)
            axes.annotate(
                f"limit {limit:g}",
                (limit, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                color=_LIMIT,
                fontsize=8,
            )
        if len(limits) == 1:
            left, right = axes.get_xlim()
            axes.axvspan(limits[0], right + (right - left), color=_LIMIT, alpha=0.06, linewidth=0, zorder=0)
            axes.set_xlim(left, right)
        axes.set_xlabel("final cost" if cost == "cost" else f"final cost: {cost}")
        axes.set_ylabel("final return")
        return _svg(figure, label)


def _style() -> Any:
    """A context with the page's settings, whatever the user's own matplotlib style is."""
    import contextlib

    import matplotlib

    @contextlib.contextmanager
    def settings() -> Any:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(
                {
                    "svg.fonttype": "none",
                    "svg.hashsalt": "saferl",
                    "text.parse_math": False,
                    "font.size": 9,
                    "axes.edgecolor": _INK,
                    "axes.labelcolor": _INK,
                    "axes.linewidth": 0.6,
                    "axes.spines.top": False,
                    "axes.spines.right": False,
                    "axes.grid": True,
                    "grid.color": _INK,
                    "grid.alpha": 0.12,
                    "grid.linewidth": 0.5,
                    "text.color": _INK,
                    "xtick.color": _INK,
                    "ytick.color": _INK,
                    "xtick.major.size": 2.5,
                    "ytick.major.size": 0,
                    "xtick.major.width": 0.6,
                }
            )
            yield

    return settings()


def _axes(size: Size) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(4 if size == _SMALL else 6, steps=_TICK_STEPS))
    axes.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an inline SVG element in the page's colours and font."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = re.sub(r"<svg[^>]*>", f'<svg {box[0]} role="img" aria-label="{escape(label)}">', text, count=1)
    # Keep the names that something refers to (clipping paths and marks), unlike those of other figures.
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)
    text = re.sub(r'((?: id="|"#|url\(#)[mp][0-9a-f]{10})', rf"\1-{key}", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;?\s*", "", text)
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), text)
    text = re.sub(r">\s+<", "><", text).replace("\n", " ")
    text = text.replace(_INK, "currentColor").replace(_LIMIT, "var(--limit)")
    for i, colour in enumerate(_LIGHT):
        text = text.replace(colour, f"var(--c{i})")
    return text


# --- the page -------------------------------------------------------------------------------------


def render(records: Sequence[RunRecord]) -> str:
    """The page as HTML."""
    by_environment: dict[str, list[RunRecord]] = {}
    for record in records:
        by_environment.setdefault(record.environment, []).append(record)
    title = _title(records)
    body = [f"<h1>{escape(title)}</h1>", _header(records)]
    for environment, members in by_environment.items():
        groups = _group(members)
        heading = "h2"
        if len(by_environment) > 1:
            body.append(f'<h2 class="environment">{escape(environment)}</h2>')
            heading = "h3"
        body += [_final_table(groups, heading), _figures(groups, heading)]
    body += [_evaluation_table(records), _settings_table(records), _notes(records)]
    return _PAGE.format(title=escape(title), style=_style_sheet(), body="\n".join(filter(None, body)))


def _title(records: Sequence[RunRecord]) -> str:
    algorithms = list(dict.fromkeys(r.algorithm for r in records))
    environments = list(dict.fromkeys(r.environment for r in records))
    what = ", ".join(algorithms) if len(algorithms) <= 3 else f"{len(algorithms)} algorithms"
    where = ", ".join(environments) if len(environments) <= 2 else f"{len(environments)} environments"
    return f"{what} on {where}"


def _header(records: Sequence[RunRecord]) -> str:
    versions: dict[str, list[str]] = {}
    for record in records:
        line = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        versions.setdefault(line or "versions not recorded", []).append(record.name)
    rows = []
    for record in records:
        asked = "" if record.total_steps is None else f" of {record.total_steps:,}"
        state = (
            _badge("good", "finished")
            if record.finished
            else _badge("note", f"stopped at step {record.step:,}")
        )
        cells = [record.algorithm, record.environment, record.seed, f"{record.step:,}{asked}"]
        rows.append(
            f'<tr><th scope="row">{escape(record.name)}</th>'
            + "".join(
                f'<td class="{kind}">{escape(c)}</td>'
                for kind, c in zip(("text", "text", "", ""), cells, strict=True)
            )
            + f'<td class="text">{state}</td></tr>'
        )
    lines = [
        escape(line) if len(versions) == 1 else f"{escape(', '.join(names))}: {escape(line)}"
        for line, names in versions.items()
    ]
    head = _head(["Run", "Algorithm", "Environment", "Seed", "Steps", "State"], text={1, 2, 5})
    return (
        f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="small">{"<br>".join(lines)}</p>'
    )


def _final_table(groups: Sequence[_Group], heading: str) -> str:
    """A row a run, and above the runs of a group their mean.

    A quantity has a column of its own, followed where needed by one of deviations and one of badges, so
    that numbers stand below each other.
    """
    runs = [run for group in groups for run in group.runs]
    costs = _names(run.costs for run in runs)
    multiplied = [n for n in _names(r.constraints for r in runs) if any(r.multiplier_series(n) for r in runs)]
    plain = not set(costs) - {"cost"}
    quantities: list[tuple[str, Callable[[RunRecord], float | None], str | None]] = [
        ("Return", lambda run: final_mean(run.return_series), None)
    ]
    quantities += [(_cost_title(name), _final(_cost(name)), name) for name in costs]
    quantities += [
        ("Multiplier" if plain else f"Multiplier: {name}", _final(_multiplier(name)), None)
        for name in multiplied
    ]
    spread = any(len(group.runs) > 1 for group in groups)
    limited = {name for run in runs for name in run.limits}

    head = ['<th scope="col" class="text">Run</th>']
    for title, _, cost in quantities:
        blanks = spread + (cost in limited)
        head.append(f'<th scope="col">{escape(title)}</th>' + "<td></td>" * blanks)
    head.append('<th scope="col">Steps/s</th>')

    def row(members: Sequence[RunRecord], label: str, kind: str) -> str:
        cells = []
        for _, get, cost in quantities:
            values = [v for run in members if (v := get(run)) is not None]
            cells.append(f"<td>{_number(float(np.mean(values)) if values else None)}</td>")
            if spread:
                deviation = f"± {_number(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
                cells.append(f'<td class="spread">{deviation}</td>')
            if cost in limited:
                limit = members[0].limits.get(cost) if cost is not None else None
                badge = _against(float(np.mean(values)), limit) if values else ""
                cells.append(f'<td class="verdict">{badge}</td>')
        speeds = [float(np.median(s.values)) for r in members if (s := r.series.get(_SPEED)) is not None]
        cells.append(f"<td>{_number(float(np.mean(speeds)) if speeds else None)}</td>")
        return f'<tr class="{kind}"><th scope="row">{label}</th>{"".join(cells)}</tr>'

    rows = []
    for group in groups:
        if len(group.runs) > 1:
            label = f"{_swatch(group)}{escape(group.label)} <small>mean of {len(group.runs)} runs</small>"
            rows.append(row(group.runs, label, "group"))
            rows += [
                row([run], f"seed {escape(run.seed)} <small>{escape(run.name)}</small>", "member")
                for run in group.runs
            ]
        elif len(groups) > 1:
            rows.append(row(group.runs, _swatch(group) + escape(group.label), "group"))
        else:
            rows.append(row(group.runs, escape(group.runs[0].name), ""))
    empty = "" if any(run.return_series for run in runs) else _NO_EPISODE
    return (
        f'<{heading}>Final numbers</{heading}><div class="scroll"><table class="final">'
        f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{empty}"
    )


def _figures(groups: Sequence[_Group], heading: str) -> str:
    runs = [run for group in groups for run in group.runs]
    costs = _names(run.costs for run in runs)
    constrained = [name for name in costs if any(name in run.limits for run in runs)]
    large: list[tuple[str, Callable[[Size], str]]] = []

    def add_curves(title: str, get: Getter, limits: list[Series]) -> None:
        if curves := _curves(groups, get):
            label = f"{title} against steps" + (", with its limit" if limits else "")
            large.append((title, lambda size: _curve_figure(curves, label, limits, size=size)))

    def add_scatter(title: str, cost: str) -> None:
        if len(_final_points(groups, cost)) > 1:
            label = f"{title}, a mark a run"
            large.append((title, lambda size: _scatter_figure(groups, cost, label, size)))

    add_curves("Return", lambda run: run.return_series, [])
    for cost in costs:
        add_curves(_cost_title(cost), _cost(cost), _limit_lines(groups, cost))
    multipliers, legend = _multiplier_curves(groups)
    if multipliers:
        label = "Lagrange multipliers against steps"
        large.append(("Multiplier", lambda size: _curve_figure(multipliers, label, legend=legend, size=size)))
    for cost in constrained or costs[:1]:
        add_scatter(_cost_title(cost).replace("Cost", "Return against cost"), cost)

    drawn = ("constraint/", "train/return", "train/cost")
    small: list[tuple[str, str]] = []
    for metric in dict.fromkeys(metric for run in runs for metric in run.series):
        if not metric.startswith(drawn):
            title = _TITLES.get(metric, metric)
            curves = _curves(groups, _metric(metric), show_raw=False)
            small.append((title, _curve_figure(curves, f"{title} against steps")))
    if not large and not small:
        return ""
    columns = 3 if len(large) % 3 == 0 else 2
    figures = [(title, draw(_LARGE[columns])) for title, draw in large]
    return (
        f"<{heading}>Curves</{heading}>{_legend(groups)}"
        + _gallery(figures, f"large in-{columns}")
        + _gallery(small, "small")
    )


def _curves(groups: Sequence[_Group], get: Getter, *, show_raw: bool = True) -> list[_Curve]:
    """The lines of the groups that have a metric."""
    found = [(group, [s for run in group.runs if (s := get(run)) is not None]) for group in groups]
    raw = show_raw and len(groups) == 1
    return [_Curve(series, g.colour, _dash(g), show_raw=raw) for g, series in found if series]


def _cost(name: str) -> Getter:
    return lambda run: run.cost_series(name)


def _multiplier(name: str) -> Getter:
    return lambda run: run.multiplier_series(name)


def _metric(name: str) -> Getter:
    return lambda run: run.series.get(name)


def _final(get: Getter) -> Callable[[RunRecord], float | None]:
    return lambda run: final_mean(get(run))


def _cost_title(name: str) -> str:
    return "Cost" if name == "cost" else f"Cost: {name}"


def _limit_lines(groups: Sequence[_Group], name: str) -> list[Series]:
    """The limits of a cost, each once."""
    lines: dict[tuple[float, ...], Series] = {}
    for group in groups:
        if name in group.limits:
            constant = Series(np.zeros(1), np.array([group.limits[name]]))
            limit = group.runs[0].series.get(f"constraint/{name}/limit", constant)
            lines.setdefault(tuple(np.unique(limit.values)), limit)
    return list(lines.values())


def _multiplier_curves(groups: Sequence[_Group]) -> tuple[list[_Curve], list[tuple[str, str, str]]]:
    """A line a constraint: told apart by colour for one group, by dashes where colours are groups.

    Also returns the legend's entries, if there is more than one constraint.
    """
    names = _names(run.constraints for group in groups for run in group.runs)
    curves: list[_Curve] = []
    legend: dict[str, tuple[str, str, str]] = {}
    alone = len(groups) == 1
    for i, name in enumerate(names):
        for group in groups:
            series = [s for run in group.runs if (s := run.multiplier_series(name)) is not None]
            if series:
                colour = _LIGHT[i % len(_LIGHT)] if alone else group.colour
                dash = "-" if alone else _DASHES[i % len(_DASHES)]
                curves.append(_Curve(series, colour, dash, smooth=False))
                legend[name] = (name, colour if alone else _INK, dash)
    return curves, list(legend.values()) if len(legend) > 1 else []


def _legend(groups: Sequence[_Group]) -> str:
    if len(groups) < 2:
        return ""
    items = []
    for group in groups:
        seeds = ", ".join(run.seed for run in group.runs)
        word = "seed" if len(group.runs) == 1 else "seeds"
        items.append(f"<li>{_swatch(group)}{escape(group.label)} <small>{word} {escape(seeds)}</small></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _gallery(figures: Sequence[tuple[str, str]], kind: str) -> str:
    if not figures:
        return ""
    items = [f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in figures]
    return f'<div class="gallery {kind}">{"".join(items)}</div>'


def _evaluation_table(records: Sequence[RunRecord]) -> str:
    evaluated = [(record, record.evaluation) for record in records if record.evaluation is not None]
    if not evaluated:
        return ""
    named = _names(evaluation.get("costs") or {} for _, evaluation in evaluated)
    columns = ["Run", "Episodes", "Return", "Cost", *(f"Cost: {name}" for name in named), "Episodes above"]
    rows = []
    for record, evaluation in evaluated:
        limits = evaluation.get("limits") or {}
        shown = {"cost": evaluation["cost"], **(evaluation.get("costs") or {})}
        cells = [f"{evaluation.get('episodes', '–')}", _estimate(evaluation["return"])]
        for name in ("cost", *named):
            entry = shown.get(name)
            badge = "" if entry is None else _against(entry.get("mean"), limits.get(name))
            cells.append("–" if entry is None else _estimate(entry) + (badge and f"<br>{badge}"))
        rate = evaluation.get("violation_rate")
        cells.append("–" if rate is None else f"{100 * rate:.0f} %")
        setting = ", ".join(_evaluation_setting(evaluation, record))
        rows.append(
            f'<tr><th scope="row">{escape(record.name)}<br><small>{escape(setting)}</small></th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        "<h2>Evaluation</h2>"
        f'<div class="scroll"><table class="evaluation">{_head(columns)}<tbody>'
        f"{''.join(rows)}</tbody></table></div>"
        '<p class="small">Mean ± standard deviation over episodes, with the 95 % interval of the mean below; '
        "“episodes above” is the share of episodes whose cost exceeds a limit.</p>"
    )


def _evaluation_setting(evaluation: Mapping[str, Any], record: RunRecord) -> list[str]:
    parts = []
    if evaluation.get("step") is not None:
        parts.append(f"step {evaluation['step']:,}")
    if evaluation.get("env") not in (None, record.environment):
        parts.append(f"on {evaluation['env']}")
    if evaluation.get("deterministic") is not None:
        parts.append("deterministic" if evaluation["deterministic"] else "stochastic")
    parts += [
        f"{name} {evaluation[name]}" for name in ("backend", "seed") if evaluation.get(name) is not None
    ]
    return parts


def _settings_table(records: Sequence[RunRecord]) -> str:
    """Hyperparameters, a column a group; where groups differ the row is marked."""
    by_environment: dict[str, list[RunRecord]] = {}
    for record in records:
        by_environment.setdefault(record.environment, []).append(record)
    groups = [group for members in by_environment.values() for group in _group(members)]
    names = dict.fromkeys(k for group in groups for run in group.runs for k in run.hyperparameters)
    rows = []
    for name in names:
        cells = []
        for group in groups:
            values = dict.fromkeys(
                _setting(run.hyperparameters[name]) if name in run.hyperparameters else "–"
                for run in group.runs
            )
            cells.append(", ".join(values))
        marked = ' class="differs"' if len(set(cells)) > 1 else ""
        rows.append(
            f'<tr{marked}><th scope="row"><code>{escape(name)}</code></th>'
            + "".join(f'<td class="text">{escape(cell)}</td>' for cell in cells)
            + "</tr>"
        )
    if not rows:
        return ""
    head = _head(["", *(group.label for group in groups)], text=set(range(1, 1 + len(groups))))
    return (
        "<details><summary>Hyperparameters</summary>"
        f'<div class="scroll"><table class="settings">{head}<tbody>{"".join(rows)}</tbody></table></div>'
        "</details>"
    )


def _notes(records: Sequence[RunRecord]) -> str:
    windows = {s.window for record in records if (s := record.return_series) is not None} or {1}
    low, high = min(windows), max(windows)
    span = f"{low}" if low == high else f"{low} to {high}"
    smoothing = (
        "Curves are not smoothed, for there are few iterations."
        if high == 1
        else f"Curves are centred moving averages over about {100 * SMOOTHING_SHARE:.0f} % of the iterations "
        f"(here {span}), multipliers excepted; in the large figures of a single run the faint line is what "
        "was recorded."
    )
    grouped = len(records) > 1 and (
        " Runs that differ only in their seed are drawn as the mean of the smoothed curves, in a band from "
        "the smallest to the largest of them; thin lines go on where other runs of the group have ended. "
        "In the table of final numbers ± is the standard deviation over runs."
    )
    return (
        f"<footer><p>{smoothing}{grouped or ''} Final numbers are means of the unsmoothed values over the "
        f"last {100 * FINAL_SHARE:.0f} % of the iterations; cost is the undiscounted sum over a finished "
        "training episode; steps per second is the median over iterations. A run counts as stopped until it "
        f"has recorded its last step.</p><p>Written by <code>saferl report</code> on "
        f"{time.strftime('%Y-%m-%d %H:%M')}.</p></footer>"
    )


_NO_EPISODE = '<p class="small">No episode has finished yet, so there is no return and no cost to show.</p>'


# --- pieces of HTML -------------------------------------------------------------------------------


def _head(columns: Sequence[str], text: Iterable[int] = ()) -> str:
    left = {0, *text}
    cells = [
        f'<th scope="col"{" class=text" if i in left else ""}>{escape(column)}</th>'
        for i, column in enumerate(columns)
    ]
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _badge(kind: str, text: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


def _against(mean: float | None, limit: float | None) -> str:
    """A badge that compares a mean with its limit, if there is one."""
    if limit is None or mean is None or not math.isfinite(mean):
        return ""
    within = mean <= limit
    return _badge("good", f"within limit {limit:g}") if within else _badge("bad", f"above limit {limit:g}")


def _estimate(entry: Mapping[str, Any]) -> str:
    """Mean, deviation and interval of an evaluated quantity."""
    text = _number(entry.get("mean"))
    if entry.get("std") is not None:
        text += f" <small>± {_number(entry['std'])}</small>"
    interval = list(entry.get("ci95") or [])
    if len(interval) == 2:
        text += f"<br><small>[{_number(interval[0])}, {_number(interval[1])}]</small>"
    return text


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.1f}"
    elif size >= 0.1 or size == 0:
        text = f"{value:.2f}"
    else:
        text = f"{value:.2g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _setting(value: Any) -> str:
    """A hyperparameter as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " × ".join(_setting(v) for v in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_setting(v)}" for k, v in value.items())
    return str(value)


def _dash(group: _Group) -> str:
    return _DASHES[group.index // len(_LIGHT) % len(_DASHES)]


def _swatch(group: _Group) -> str:
    dash = {"-": "", "--": "5 2", ":": "1.5 2", "-.": "5 2 1.5 2"}[_dash(group)]
    return (
        '<svg class="swatch" viewBox="0 0 18 8" aria-hidden="true">'
        f'<path d="M0 4H18" stroke="var(--c{group.index % len(_LIGHT)})" stroke-width="3" '
        f'stroke-dasharray="{dash}"/></svg>'
    )


def _style_sheet() -> str:
    def palette(colours: Sequence[str]) -> str:
        return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))

    return _STYLE.replace("LIGHT_PALETTE", f"{palette(_LIGHT)} --limit: {_LIGHT_LIMIT};").replace(
        "DARK_PALETTE", f"{palette(_DARK)} --limit: {_DARK_LIMIT};"
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  --paper: #ffffff; --ink: #1b1d21; --soft: #5d636d; --rule: #d9dce1; --tint: #f5f6f8;
  --good: #14693f; --good-tint: #dff3e7; --bad: #a3231b; --bad-tint: #fce4e2;
  --note: #6b5200; --note-tint: #faf0cf;
  LIGHT_PALETTE
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --ink: #e4e6ea; --soft: #9ea5b1; --rule: #343942; --tint: #1d2026;
    --good: #86dcae; --good-tint: #173826; --bad: #ffaaa3; --bad-tint: #48201d;
    --note: #eccf7a; --note-tint: #3b3216;
    DARK_PALETTE
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 3rem; }
h1, h2 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; line-height: 1.2; }
h1 { font-size: 1.9rem; font-weight: 600; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; font-weight: 600; margin: 2.4rem 0 .6rem; }
h3 { font: 600 1.15rem/1.2 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif;
  margin: 1.8rem 0 .6rem; }
h2.environment { font-size: 1.5rem; margin-top: 3rem; padding-top: 1.2rem;
  border-top: 1px solid var(--rule); }
small, .small { color: var(--soft); font-size: .85em; }
p.small { margin: .5rem 0 0; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th, td { padding: .4rem .7rem; text-align: right; vertical-align: baseline; white-space: nowrap; }
th:first-child, td:first-child { padding-left: .2rem; }
th:last-child, td:last-child { padding-right: .2rem; }
thead th { font-weight: 600; border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
tbody th { font-weight: 400; text-align: left; }
th.text, td.text { text-align: left; }
tr.group > * { font-weight: 600; }
tr.group small { font-weight: 400; }
tr.member > * { border-top: 0 !important; color: var(--soft); padding-top: .1rem; padding-bottom: .1rem;
  font-size: .92em; }
tr.member th { padding-left: 1.7rem; }
table.final .spread { text-align: left; padding-left: 0; color: var(--soft); font-size: .85em;
  font-weight: 400; }
table.final .verdict { text-align: left; padding-left: 0; }
thead td { border-bottom: 1px solid var(--ink); }
table.evaluation th:first-child { white-space: normal; min-width: 11rem; }
.badge { display: inline-block; padding: 0 .5em; border-radius: 1em; font-size: .8rem; font-weight: 500;
  line-height: 1.55; white-space: nowrap; }
.good { color: var(--good); background: var(--good-tint); }
.bad { color: var(--bad); background: var(--bad-tint); }
.note { color: var(--note); background: var(--note-tint); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: 0 0 1rem;
  padding: 0; }
.swatch { width: 18px; height: 8px; margin-right: .5em; vertical-align: middle; fill: none; }
.gallery { display: grid; gap: 1.4rem 2rem; }
@media (min-width: 760px) {
  .gallery.in-2 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .gallery.in-3 { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1.4rem 1.5rem; }
}
.gallery.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 225px), 1fr));
  gap: 1rem 1.5rem; margin-top: 2rem; }
figure { margin: 0; max-width: 560px; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .93rem; margin-bottom: .2rem; }
.small figcaption { font-weight: 500; font-size: .85rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
details { margin-top: 2.4rem; }
summary { cursor: pointer; font: 600 1.25rem/1.2 Charter, "Bitstream Charter", Georgia, serif; }
details .scroll { margin-top: .8rem; }
table.settings th, table.settings td { padding-top: .15rem; padding-bottom: .15rem; }
table.settings td { white-space: normal; }
tr.differs td { font-weight: 600; }
footer { margin-top: 2.6rem; padding-top: .8rem; border-top: 1px solid var(--rule); color: var(--soft);
  font-size: .85rem; }
footer p { max-width: 90ch; margin: .5rem 0 0; }
@media print { main { max-width: none; padding: 0; } body { font-size: 11px; } }
"""
