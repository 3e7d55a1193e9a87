"""One self-contained HTML page about a run, or about several: numbers, curves, evaluation, settings.

data.py     reads runs, and groups those that differ only in their seed
figures.py  draws them as SVG in the page's colours
page.py     puts numbers, figures and settings on the page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saferl.errors import UsageError
from saferl.experiment.checkpoint import write_atomically
from saferl.experiment.report.data import RunRecord, Series, final_mean, read_runs
from saferl.experiment.report.page import render

__all__ = ["RunRecord", "Series", "final_mean", "read_runs", "render", "write_report"]


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
