"""The page: tables, galleries of figures, and the style sheet that colours both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from saferl.experiment.report import figures
from saferl.experiment.report.data import Group, RunRecord, Series, final_mean, group_runs, setting, union


class Quantity(NamedTuple):
    """What counts of a run."""

    title: str
    get: Callable[[RunRecord], Series | None]
    cost: str = ""
    """The cost whose limit holds for it."""
    smooth: bool = True


_SPEED = "time/steps_per_second"
_TITLES = {
    "train/episode_length": "Episode length",
    "loss/policy": "Policy loss",
    "loss/value": "Value loss",
    "policy/kl": "KL divergence",
    "policy/entropy": "Policy entropy",
    "policy/epochs": "Passes over the batch",
    _SPEED: "Steps per second",
}


def render(records: Sequence[RunRecord]) -> str:
    """The page as HTML."""
    environments = group_runs(records)
    algorithms = dict.fromkeys(run.algorithm for run in records)
    title = escape(f"{', '.join(algorithms)} on {', '.join(environments)}")
    body = [f"<h1>{title}</h1>", _overview(records)]
    for environment, groups in environments.items():
        if len(environments) > 1:
            body.append(f'<h2 class="environment">{escape(environment)}</h2>')
        body += ["<h2>Final numbers</h2>", _final_table(groups)]
        body += ["<h2>Curves</h2>", _legend(groups), _curves(groups)]
    body += [_evaluations(records), _settings(environments), _notes(records)]
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(body))


def _overview(records: Sequence[RunRecord]) -> str:
    """What ran, how far, and with which versions."""
    rows = []
    for run in records:
        total = run.hyperparameters.get("total_steps")
        finished = total is not None and run.step >= total
        state = _badge("good", "finished") if finished else _badge("note", f"stopped at step {run.step:,}")
        steps = f"{run.step:,}" + ("" if total is None else f" of {total:,}")
        cells = [escape(cell) for cell in (run.algorithm, run.environment, run.seed, steps)]
        rows.append(_row(escape(run.name), [*cells, state]))
    versions = union(", ".join(map(" ".join, run.versions.items())) for run in records)
    head = map(_th, ("Run", "Algorithm", "Environment", "Seed", "Steps", "State"))
    return _table("overview", head, rows) + f'<p class="small">{"<br>".join(map(escape, versions))}</p>'


def _quantities(runs: Sequence[RunRecord]) -> list[Quantity]:
    """What at least one of the runs has."""
    found = [Quantity("Return", lambda run: run.return_series)]
    for name in union(*(run.costs for run in runs)):
        found.append(Quantity(_named("Cost", name), partial(RunRecord.cost_series, name=name), name))
    for name in union(*(run.constraints for run in runs)):
        get = partial(RunRecord.multiplier_series, name=name)
        found.append(Quantity(_named("Multiplier", name), get, smooth=False))
    return [quantity for quantity in found if any(map(quantity.get, runs))]


def _named(title: str, cost: str) -> str:
    return title if cost == "cost" else f"{title}: {cost}"


def _final_table(groups: Sequence[Group]) -> str:
    """A row a run, and above the runs of a group their mean.

    Deviations and verdicts have cells of their own, so that numbers stand below each other.
    """
    runs = [run for group in groups for run in group.runs]
    quantities = _quantities(runs)

    def row(members: Sequence[RunRecord], label: str, kind: str = "") -> str:
        cells = []
        for _, get, cost, _ in quantities:
            values = [v for run in members if (v := final_mean(get(run))) is not None]
            mean = float(np.mean(values)) if values else None
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            cells.append(_number(mean))
            cells.append("" if deviation is None else f"<small>± {_number(deviation)}</small>")
            cells.append(_verdict(mean, members[0].limits.get(cost)))
        speeds = [float(np.median(run.series[_SPEED].values)) for run in members if _SPEED in run.series]
        return _row(label, [*cells, _number(float(np.mean(speeds)) if speeds else None)], kind)

    rows = []
    for group in groups:
        label = _swatch(group) + escape(group.label)
        if len(group.runs) > 1:
            rows.append(row(group.runs, f"{label} <small>mean of {len(group.runs)} runs</small>", "group"))
            for run in group.runs:
                name = f"seed {escape(run.seed)} <small>{escape(run.name)}</small>"
                rows.append(row([run], name, "member"))
        elif len(groups) > 1:
            rows.append(row(group.runs, label, "group"))
        else:
            rows.append(row(group.runs, escape(group.runs[0].name)))
    head = [_th("Run"), *(_th(quantity.title, span=3) for quantity in quantities), _th("Steps/s")]
    table = _table("final", head, rows)
    if any(run.return_series for run in runs):
        return table
    return table + '<p class="small">No episode has finished yet: there is no return and no cost to show.</p>'


def _curves(groups: Sequence[Group]) -> str:
    """Return, costs and multipliers in large figures, the other metrics in small ones."""
    runs = [run for group in groups for run in group.runs]
    large: list[tuple[str, Callable[..., str]]] = []  # title, and what draws it in a size
    for title, get, cost, smooth in _quantities(runs):
        curves = [(group, [s for run in group.runs if (s := get(run))]) for group in groups]
        found = [limit for run in runs if (limit := run.series.get(f"constraint/{cost}/limit"))]
        limits = {tuple(np.unique(limit.values)): limit for limit in found}.values()  # each once
        large.append((title, partial(figures.curve_figure, curves, title, limits, smooth=smooth)))
    for cost in union(*(run.limits for run in runs)) or ["cost"]:
        if sum(bool(run.return_series and run.cost_series(cost)) for run in runs) > 1:
            title = _named("Return against cost", cost)
            large.append((title, partial(figures.scatter_figure, groups, cost, title)))
    columns = 3 if len(large) % 3 == 0 else 2
    drawn = [(title, draw(size=figures.LARGE[columns])) for title, draw in large]

    small = []
    for metric in union(*(run.series for run in runs)):
        if not metric.startswith(("constraint/", "train/return", "train/cost")):
            curves = [(g, [r.series[metric] for r in g.runs if metric in r.series]) for g in groups]
            title = _TITLES.get(metric, metric)
            small.append((title, figures.curve_figure(curves, title, size=figures.SMALL)))
    return _gallery(f"in-{columns}", drawn) + _gallery("small", small)


def _legend(groups: Sequence[Group]) -> str:
    if len(groups) == 1:
        return ""
    items = []
    for group in groups:
        seeds = ("seeds " if len(group.runs) > 1 else "seed ") + ", ".join(run.seed for run in group.runs)
        items.append(f"<li>{_swatch(group)}{escape(group.label)} <small>{escape(seeds)}</small></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _gallery(kind: str, drawn: Sequence[tuple[str, str]]) -> str:
    items = [f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in drawn]
    return f'<div class="gallery {kind}">{"".join(items)}</div>'


def _evaluations(records: Sequence[RunRecord]) -> str:
    evaluated = [(run, run.evaluation) for run in records if run.evaluation]
    if not evaluated:
        return ""
    names = union(["cost"], *(evaluation["costs"] for _, evaluation in evaluated))
    rows = []
    for run, evaluation in evaluated:
        costs, limits = {"cost": evaluation["cost"], **evaluation["costs"]}, evaluation["limits"]
        cells = [str(evaluation["episodes"]), _estimate(evaluation["return"])]
        cells += [_estimate(costs[name], limits.get(name)) if name in costs else "–" for name in names]
        cells.append(f"{100 * evaluation['violation_rate']:.0f} %" if limits else "–")
        about = [] if evaluation.get("step") is None else [f"step {evaluation['step']:,}"]
        about += [f"on {evaluation['env']}"] if evaluation["env"] != run.environment else []
        about.append("deterministic" if evaluation["deterministic"] else "stochastic")
        about += [f"backend {evaluation['backend']}", f"seed {evaluation['seed']}"]
        rows.append(_row(f"{escape(run.name)}<br><small>{escape(', '.join(about))}</small>", cells))
    head = ["Run", "Episodes", "Return", *(_named("Cost", name) for name in names), "Episodes above"]
    return (
        f"<h2>Evaluation</h2>{_table('evaluation', map(_th, head), rows)}"
        '<p class="small">Mean ± standard deviation over episodes, with the 95 % interval of the mean below; '
        "“episodes above” is the share of episodes whose cost exceeds a limit.</p>"
    )


def _settings(environments: dict[str, list[Group]]) -> str:
    """Hyperparameters, a column a group; where groups differ the row is marked."""
    groups = list(chain(*environments.values()))
    rows = []
    for name in union(*(run.hyperparameters for group in groups for run in group.runs)):
        cells = []
        for group in groups:
            found = [run.hyperparameters for run in group.runs]
            cells.append(
                escape(", ".join(union(setting(own[name]) if name in own else "–" for own in found)))
            )
        differs = "differs" if len(set(cells)) > 1 else ""
        rows.append(_row(f"<code>{escape(name)}</code>", cells, differs))
    table = _table("settings", map(_th, ["", *(group.label for group in groups)]), rows)
    return f"<details><summary>Hyperparameters</summary>{table}</details>"


def _notes(records: Sequence[RunRecord]) -> str:
    seeds = (
        "Runs that differ only in their seed are drawn as their mean in a band from the smallest to the "
        "largest; thin lines go on where other runs have ended; ± is the standard deviation over runs. "
    )
    return (
        "<footer><p>Curves of 20 iterations or more, save multipliers, are moving averages over 5 % of them; "
        f"a faint line is what was recorded. {seeds if len(records) > 1 else ''}Final numbers are means "
        "of what was recorded over the last 10 % of the iterations; cost is the undiscounted sum over a "
        "finished training episode; steps per second is the median over iterations. A run counts as stopped "
        "until it has recorded its last step.</p><p>Written by <code>saferl report</code> on "
        f"{time.strftime('%Y-%m-%d %H:%M')}.</p></footer>"
    )


def _table(kind: str, head: Iterable[str], rows: Iterable[str]) -> str:
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(label: str, cells: Iterable[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><th scope="row">{label}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'


def _th(title: str, span: int = 1) -> str:
    return f'<th scope="col" colspan="{span}">{escape(title)}</th>'


def _badge(kind: str, text: str) -> str:
    return f'<span class="badge {kind}">{text}</span>'


def _verdict(mean: float | None, limit: float | None) -> str:
    """A badge that compares a mean with its limit, if there is one."""
    if limit is None or mean is None:
        return ""
    within = mean <= limit
    return _badge("good" if within else "bad", f"{'within' if within else 'above'} limit {limit:g}")


def _estimate(entry: dict[str, Any], limit: float | None = None) -> str:
    """Mean, deviation, interval and verdict of an evaluated quantity."""
    mean, deviation, low, high = map(_number, (entry["mean"], entry["std"], *entry["ci95"]))
    return (
        f"{mean} <small>± {deviation}</small><br><small>[{low}, {high}]</small>"
        f"<br>{_verdict(entry['mean'], limit)}"
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    size = abs(value)
    style = ",.0f" if size >= 1000 else ".1f" if size >= 100 else ".2f" if size >= 0.1 or not size else ".2g"
    return f"{value:{style}}".replace("-", "\N{MINUS SIGN}")


def _swatch(group: Group) -> str:
    """A piece of the group's line."""
    colour, dash = figures.look(group.index)
    return f'<i class="swatch" style="border-top: 3px {dash} {figures.themed(colour)}"></i>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

_STYLE = """
:root {
  --paper: #ffffff; --ink: #1b1d21; --soft: #5d636d; --rule: #d9dce1; --limit: #b3261e;
  --good: #14693f; --note: #6b5200;
  /* Okabe and Ito's palette, which the colour-blind can tell apart, on light and on dark paper. */
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b4518f; --c4: #c98500; --c5: #3a9bd0; --c6: #8c6d46;
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif;
}
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #15171b; --ink: #e4e6ea; --soft: #9ea5b1; --rule: #343942; --limit: #ff8a80;
  --good: #86dcae; --note: #eccf7a;
  --c0: #4fa9e2; --c1: #f4874b; --c2: #2ec49a; --c3: #e39cc9; --c4: #f0b93a; --c5: #93d3f7; --c6: #c9a77c;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 3rem; }
h1 { font: 600 1.9rem/1.2 var(--serif); margin: 0 0 1.2rem; overflow-wrap: anywhere; }
h2, summary { font: 600 1.25rem/1.2 var(--serif); margin: 2.4rem 0 .6rem; }
.environment { font-size: 1.6rem; margin-top: 3rem; padding-top: 1.2rem; border-top: 1px solid var(--rule); }
small, .small, footer { color: var(--soft); font-size: .85em; }
p { margin: .5rem 0 0; }
footer p { max-width: 90ch; }
summary { cursor: pointer; }
footer { margin-top: 2.6rem; padding-top: .8rem; border-top: 1px solid var(--rule); }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums;
  border: solid var(--ink); border-width: 1.5px 0; }
th, td { padding: .4rem .7rem; text-align: right; vertical-align: baseline; white-space: nowrap; }
th:first-child { padding-left: .2rem; text-align: left; }
th:last-child, td:last-child { padding-right: .2rem; }
thead th { font-weight: 600; border-bottom: 1px solid var(--ink); }
tbody th { font-weight: 400; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.overview :is(th, td):is(:nth-child(2), :nth-child(3), :nth-child(6)) { text-align: left; }
.final th:first-child { width: 100%; }
.final thead th:not(:first-child) { text-align: center; }
.final td:empty { padding: 0; }
.final td:has(small, .badge) { text-align: left; padding-left: 0; }
.final .group > * { font-weight: 600; }
.final .group small { font-weight: 400; }
.final .member > * { border: 0; color: var(--soft); padding-block: .1rem; font-size: .92em; }
.final .member th { padding-left: 1.7rem; }
.evaluation th:first-child { white-space: normal; min-width: 11rem; }
.settings :is(th, td) { text-align: left; white-space: normal; padding-block: .15rem; }
.settings .differs td { font-weight: 600; }
.badge { padding: .1em .5em; border-radius: 1em; font-size: .8rem; font-weight: 500;
  background: color-mix(in srgb, currentColor 14%, transparent); }
.good { color: var(--good); }
.bad { color: var(--limit); }
.note { color: var(--note); }

.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: 0 0 1rem; padding: 0; }
.swatch { display: inline-block; width: 18px; margin-right: .5em; vertical-align: middle; }
.gallery { display: grid; gap: 1.4rem 2rem; }
@media (min-width: 760px) {
  .in-2 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .in-3 { grid-template-columns: repeat(3, minmax(0, 1fr)); column-gap: 1.5rem; }
}
.gallery.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 200px), 1fr)); margin-top: 2rem; }
figure { margin: 0; max-width: 560px; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .93rem; margin-bottom: .2rem; }
.small figcaption { font-weight: 500; font-size: .85rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
@media print { main { max-width: none; padding: 0; } body { font-size: 11px; } }
"""
