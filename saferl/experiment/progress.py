"""Progress on the terminal: a live bar for a person, plain lines for a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_REFRESH_SECONDS = 0.1
_PATIENCE = 1.0  # s before progress is shown
_INTERVAL = 10.0  # s between lines where the size is unknown


class Progress:
    """Show how far a run is, with return, cost, multipliers and steps per second.

    On a terminal a bar is redrawn in place; with `quiet`, or when the output is no terminal, a line
    is printed at most every `line_interval` seconds and at the end.

    Args:
        title: what is running.
        total: steps in all.
        quiet: print plain lines even on a terminal.
        unit: what is counted.
        line_interval: seconds between plain lines.
    """

    def __init__(
        self, title: str, total: int, *, quiet: bool = False, unit: str = "steps", line_interval: float = 10.0
    ) -> None:
        self.title = title
        self.total = total
        self._start = self._done = 0
        self._unit = unit
        self._line_interval = line_interval
        self._began = self._last_line = self._last_update = time.monotonic()
        self._text = ""
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        if not quiet and sys.stdout.isatty():
            self._bar, self._task = _make_bar(title, total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._print_line()

    @property
    def steps_per_second(self) -> float:
        """Average speed since this process took up the run."""
        return (self._done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def update(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report `done` steps in all, and, after an iteration, its metrics."""
        self._done = done
        now = time.monotonic()
        if metrics is not None:
            self._text = _summary(metrics)
        elif now - self._last_update < _REFRESH_SECONDS:
            return  # called at every step: a redraw costs more than a step of a fast environment
        self._last_update = now
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=done,
                summary=self._text,
                speed=self._speed(),
            )
        elif now - self._last_line >= self._line_interval:
            self._print_line()

    def restart(self, done: int) -> None:
        """Count speed and remaining time from `done` steps on (a resumed run)."""
        self._start = self._done = done
        self._began = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, completed=done)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def _speed(self) -> str:
        speed = self.steps_per_second
        return f"{speed:,.0f} {self._unit}/s" if speed >= 100 else f"{speed:.3g} {self._unit}/s"

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        share = 100 * self._done / max(self.total, 1)
        print(
            f"{self.title}  {self._done:,}/{self.total:,} {self._unit} ({share:.0f} %)  {self._text}  "
            f"{self._speed()}",
            flush=True,
        )


class Meter:
    """Bytes done of an operation, shown if it takes longer than a moment."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title, self._quiet = title, quiet
        self._began = self._told = time.monotonic()
        self._bar: Progress | None = None
        self._unit = 1

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def __call__(self, done: int, total: int | None) -> None:
        """Show bytes done and in all."""
        now = time.monotonic()
        if total is None:
            if now - self._told > _INTERVAL:
                self._told = now
                self.say(f"{self._title}  {done // 1_000_000:,} MB")
        elif self._bar is not None:
            self._bar.update(done // self._unit)
        elif now - self._began > _PATIENCE:
            self._unit, name = (1_000_000, "MB") if total >= 10_000_000 else (1_000, "kB")
            self._bar = Progress(self._title, total // self._unit, quiet=self._quiet, unit=name)
            self._bar.__enter__()
            self._bar.restart(done // self._unit)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.message(text)
        else:
            print(text, flush=True)


def _summary(metrics: Mapping[str, float]) -> str:
    """Return, cost and multipliers in a few words."""
    parts = []
    for key, label in (("train/return", "return"), ("train/cost", "cost")):
        if key in metrics:
            parts.append(f"{label} {metrics[key]:.2f}")
    prefix, suffix = "constraint/", "/multiplier"
    names = [k[len(prefix) : -len(suffix)] for k in metrics if k.startswith(prefix) and k.endswith(suffix)]
    for name in names:
        label = "λ" if names == ["cost"] else f"λ({name})"
        parts.append(f"{label} {metrics[f'{prefix}{name}{suffix}']:.3f}")
    return "  ".join(parts)


def _make_bar(title: str, total: int) -> tuple[RichProgress, TaskID]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("[cyan]{task.fields[summary]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    task = bar.add_task(title, total=total, summary="", speed="")
    return bar, task
