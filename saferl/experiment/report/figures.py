"""Figures as inline SVG whose colours and font are those of the page around them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from saferl.experiment.report.data import Group, Series, final_mean

Size = tuple[float, float]
Curve = tuple[Group, Sequence[Series]]  # of each run of the group that has it

LARGE: dict[int, Size] = {2: (5.0, 3.1), 3: (3.8, 2.7)}  # inches, by figures in a row
SMALL: Size = (2.6, 1.75)

# Stand-ins, which become the page's colours: --c0 to --c6, that of its text and --limit.
_COLOURS = tuple(f"#fedc0{i}" for i in range(7))
_INK, _LIMIT = "#fedc0a", "#fedc0b"
_DASHES = ("solid", "dashed", "dotted")  # as both matplotlib and CSS call them
_MARKERS = "osD^vPX"
_POINTS = 200  # the most that are drawn of a curve
_COLOURED = ("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color")
_SETTINGS: dict[Any, Any] = {
    **dict.fromkeys(_COLOURED, _INK),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8),
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.5,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "xtick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
}
_STYLE: Any = ["default", _SETTINGS]  # whatever the user's own style is
_LIMIT_LINE: dict[str, Any] = {"color": _LIMIT, "linestyle": "--", "linewidth": 1.1}
_LIMIT_TEXT: dict[str, Any] = {"color": _LIMIT, "fontsize": 8}


def look(index: int) -> tuple[str, str]:
    """Colour and dashes of the group at a place."""
    return _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]


def themed(text: str) -> str:
    """Text with the page's colours, be it light or dark."""
    text = text.replace(_INK, "currentColor").replace(_LIMIT, "var(--limit)")
    return re.sub(r"#fedc0(\d)", r"var(--c\1)", text)


def curve_figure(
    curves: Sequence[Curve], title: str, limits: Iterable[Series] = (), *, size: Size, smooth: bool = True
) -> str:
    """Curves against steps, with dashed lines at the limits."""
    small = size == SMALL
    with matplotlib.style.context(_STYLE):
        figure, axes = _axes(size)
        for group, runs in curves:
            if len(curves) == len(runs) == 1 and smooth and not small:
                _line(axes, group, runs[0], 0.7, 0.3)  # as recorded
            if runs:
                _draw(axes, group, [run.smoothed() if smooth else run for run in runs], 1.2 if small else 1.6)
        for limit in limits:
            last = limit.values[-1]
            if (limit.values == last).all():
                axes.axhline(last, **_LIMIT_LINE)
            else:
                axes.plot(limit.steps, limit.values, **_LIMIT_LINE)
            right = axes.get_yaxis_transform()
            axes.text(1.01, last, f"limit {last:g}", transform=right, va="center", **_LIMIT_TEXT)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if not small:
            axes.set_xlabel("steps")
        return _svg(figure, f"{title} against steps")


def scatter_figure(groups: Sequence[Group], cost: str, title: str, size: Size) -> str:
    """Final return against a final cost, a mark a run."""
    with matplotlib.style.context(_STYLE):
        figure, axes = _axes(size)
        axes.margins(0.12)
        for group in groups:
            for run in group.runs:
                x, y = final_mean(run.cost_series(cost)), final_mean(run.return_series)
                if x is not None and y is not None:
                    marker = _MARKERS[group.index % len(_MARKERS)]
                    axes.plot(x, y, color=look(group.index)[0], marker=marker, alpha=0.85)
        limits = sorted({run.limits[cost] for group in groups for run in group.runs if cost in run.limits})
        for limit in limits:
            axes.axvline(limit, **_LIMIT_LINE)
            top = axes.get_xaxis_transform()
            axes.text(
                limit, 0.98, f"\N{NO-BREAK SPACE}limit {limit:g}", transform=top, va="top", **_LIMIT_TEXT
            )
        if len(limits) == 1:
            left, right = axes.get_xlim()
            axes.axvspan(limits[0], right + (right - left), color=_LIMIT, alpha=0.06, linewidth=0, zorder=0)
            axes.set_xlim(left, right)
        axes.set_xlabel("final cost" if cost == "cost" else f"final cost: {cost}")
        axes.set_ylabel("final return")
        return _svg(figure, f"{title}, a mark a run")


def _draw(axes: Axes, group: Group, runs: Sequence[Series], width: float) -> None:
    """A line for one run; for several their mean in a band, and thin lines where not all go on."""
    if len(runs) == 1:
        _line(axes, group, runs[0], width)
        return
    first, last = max(run.steps[0] for run in runs), min(run.steps[-1] for run in runs)
    if first <= last:
        steps = np.unique(np.concatenate([run.steps for run in runs]))
        steps = steps[(steps >= first) & (steps <= last)]
        steps = Series(steps, steps).thinned(_POINTS).steps
        table = np.stack([np.interp(steps, run.steps, run.values) for run in runs])
        band, colour = (table.min(0), table.max(0)), look(group.index)[0]
        axes.fill_between(steps, *band, color=colour, alpha=0.18, linewidth=0, zorder=1)
        _line(axes, group, Series(steps, table.mean(0)), width)
    for run in runs:
        alone = run.steps >= last if first <= last else np.ones(len(run), dtype=bool)
        if alone.sum() > 1 or first > last:
            _line(axes, group, Series(run.steps[alone], run.values[alone]), 0.7, 0.7)


def _line(axes: Axes, group: Group, series: Series, width: float, alpha: float = 1.0) -> None:
    thin, (colour, dash) = series.thinned(_POINTS), look(group.index)
    style: dict[str, Any] = {"color": colour, "linestyle": dash, "linewidth": width, "alpha": alpha}
    axes.plot(thin.steps, thin.values, marker="." if len(series) == 1 else "", **style)


def _axes(size: Size) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.locator_params(nbins=4 if size == SMALL else 6)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an inline SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = re.sub(r"^.*?<svg[^>]*>", f'<svg {box[0]} role="img" aria-label="LABEL">', text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    # Clipping paths and marks are referred to, by names drawn at random; other names repeat in every figure.
    text = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;?\s*", "", text)
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag[0]), text)
    text = re.sub(r">\s+<", "><", text).strip().replace("\n", " ")
    return themed(text).replace("LABEL", escape(label), 1)
