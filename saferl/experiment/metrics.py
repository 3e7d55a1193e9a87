"""Metrics on disk: one CSV table a person can open, and TensorBoard scalars of the same names."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from saferl.errors import SaferlError
from saferl.experiment.checkpoint import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Append rows of scalars to `metrics.csv` and to TensorBoard.

    The table's first column is `step`; a metric that appears late gets a new column. When a run is
    resumed at `resume_step`, later rows are dropped from the table (and purged in TensorBoard), so
    that the record reads as if the run had never stopped.

    Args:
        directory: the run directory.
        resume_step: None for a new run.
        tensorboard: write event files too.
    """

    def __init__(self, directory: Path, resume_step: int | None = None, *, tensorboard: bool = True) -> None:
        self.path = directory / "metrics.csv"
        self._columns: list[str] = ["step"]
        self._file: IO[str] | None = None
        if resume_step is not None and self.path.exists():
            rows = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            for row in rows:
                self._columns += [name for name in row if name not in self._columns]
            self._rewrite(rows)
        self._writer: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(directory), purge_step=None if resume_step is None else resume_step + 1, flush_secs=30
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars at an environment step. Raises `SaferlError` when the disk is full."""
        try:
            new = [name for name in metrics if name not in self._columns]
            if new:
                rows = read_metrics(self.path) if self.path.exists() else []
                self._columns += new
                self._rewrite(rows)
            if self._file is None:
                self._file = self.path.open("a", newline="")
            values = [repr(float(metrics[c])) if c in metrics else "" for c in self._columns[1:]]
            csv.writer(self._file).writerow([step, *values])
            self._file.flush()
            if self._writer is not None:
                for name, value in metrics.items():
                    self._writer.add_scalar(name, float(value), step)
        except OSError as error:
            raise SaferlError(
                f"{self.path} could not be written ({error.strerror or error}); free some space, then resume "
                "the run."
            ) from error

    def close(self) -> None:
        """Flush and close both records."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        lines = [",".join(self._columns)]
        for row in rows:
            cells = [str(int(row["step"]))]
            cells += [repr(row[c]) if c in row else "" for c in self._columns[1:]]
            lines.append(",".join(cells))
        write_atomically(self.path, "\n".join(lines) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.csv`, each without its empty cells.

    A last line cut short by a kill is dropped. Raises `SaferlError` when the file is no such table.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise SaferlError(f"{path} cannot be read ({error.strerror}); is this a run directory?") from error
    if not lines or lines[0][:1] != ["step"]:
        raise SaferlError(f"{path} is not a table of metrics: its first column should be 'step'.")
    header, rows = lines[0], []
    for line in lines[1:]:
        if len(line) != len(header):
            continue
        try:
            rows.append({name: float(cell) for name, cell in zip(header, line, strict=True) if cell != ""})
        except ValueError:
            continue
    return [row for row in rows if "step" in row and math.isfinite(row["step"])]
