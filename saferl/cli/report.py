"""`saferl report RUN...`: one HTML page with the curves and numbers of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from saferl.cli.parsing import parse

if TYPE_CHECKING:
    from saferl.experiment.report import RunRecord


@dataclass
class Arguments:
    """Write one HTML page with the curves and numbers of runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders; those that differ only in their seed are averaged."""
    output: Path | None = None
    """File to write: by default RUN/report/index.html for one run, report/index.html for several."""


def main(arguments: list[str]) -> int:
    """Write the page, and print the final numbers and where the page is."""
    asked = parse(Arguments, arguments, "saferl report")

    from saferl.experiment.report import read_runs, write_report

    path = write_report(asked.runs, asked.output)
    _print_table(read_runs(asked.runs))
    print(f"report: {path}")
    return 0


def _print_table(records: list[RunRecord]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from saferl.experiment.report import final_mean

    table = Table(title="mean over the last 10 % of the iterations", title_justify="left")
    table.add_column("run", overflow="fold")
    for column in ("return", "cost", "limit", "multiplier"):
        table.add_column(column, justify="right")
    for record in records:
        first = True
        for name in record.costs or ["cost"]:
            cost = final_mean(record.cost_series(name))
            limit = record.limits.get(name)
            verdict = "" if limit is None or cost is None else " ok" if cost <= limit else " above"
            label = "" if name == "cost" else f"{name} "
            table.add_row(
                escape(record.name) if first else "",
                _number(final_mean(record.return_series)) if first else "",
                "–" if cost is None else f"{label}{_number(cost)}",
                "" if limit is None else f"{limit:g}{verdict}",
                _number(final_mean(record.multiplier_series(name)), absent=""),
            )
            first = False
    Console().print(table)


def _number(value: float | None, absent: str = "–") -> str:
    return absent if value is None else f"{value:.3f}"
