"""The run directory: configuration, metrics, checkpoints and report of one experiment.

RUN/config.json                what was asked for, and the versions that ran it
RUN/metrics.csv                scalars by step, also in events.out.tfevents.*
RUN/checkpoints/step_00001000/ policy.safetensors, training.safetensors, state.json
RUN/report/index.html          written by `saferl report`
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saferl.errors import CheckpointError, UsageError
from saferl.experiment import checkpoint
from saferl.experiment.metrics import MetricsWriter
from saferl.experiment.progress import Progress


class Run:
    """One experiment on disk; `create` starts it, `open` takes it up again.

    Args:
        directory: the run directory, which exists and holds `config.json`.
        config: the contents of `config.json`.
        resumed: the checkpoint to go on from, None for a new run.
        quiet: plain lines instead of a progress bar.
    """

    def __init__(
        self, directory: Path, config: dict[str, Any], resumed: dict[str, Any] | None, *, quiet: bool = False
    ) -> None:
        self.directory = directory
        self.config = config
        self.quiet = quiet
        self.resumed = resumed
        self.checkpoints = directory / "checkpoints"
        self._metrics = MetricsWriter(directory, None if resumed is None else int(resumed["step"]))
        self._last_save = time.monotonic()
        self._saved_step: int | None = None if resumed is None else int(resumed["step"])

    @classmethod
    def create(cls, directory: Path, config: Mapping[str, Any], *, quiet: bool = False) -> Run:
        """Start a run in a new or empty folder.

        Raises:
            UsageError: the folder already holds something, or cannot be made.
        """
        if directory.exists() and any(directory.iterdir()):
            raise UsageError(
                f"{directory} is not empty; choose another --run folder, or go on with it by "
                f"`saferl train --resume {directory}`."
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the run folder {directory} cannot be made ({error.strerror}).") from error
        full = {**config, "versions": _versions()}
        checkpoint.write_atomically(directory / "config.json", json.dumps(full, indent=2) + "\n")
        return cls(directory, full, None, quiet=quiet)

    @classmethod
    def open(cls, directory: Path, *, quiet: bool = False) -> Run:
        """Take up an interrupted run at its newest intact checkpoint, or at the start if it has none.

        Raises:
            UsageError: the folder is no run.
            CheckpointError: it has checkpoints and all of them are damaged.
        """
        config = read_config(directory)
        resumed: dict[str, Any] | None = None
        if checkpoint.list_checkpoints(directory / "checkpoints"):
            resumed, faults = checkpoint.load_latest(directory / "checkpoints")
            for fault in faults:
                print(f"warning: {fault}")
        run = cls(directory, config, resumed, quiet=quiet)
        if resumed is None:
            # Killed before its first checkpoint: whatever was recorded belongs to steps done again.
            run._metrics.close()
            run._metrics = MetricsWriter(directory, 0)
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record scalars at an environment step."""
        self._metrics.write(step, metrics)

    def save(self, step: int, parts: Mapping[str, Any]) -> Path:
        """Write a checkpoint (see `saferl.experiment.checkpoint.save_checkpoint`)."""
        path = checkpoint.save_checkpoint(self.checkpoints, step, parts)
        self._last_save = time.monotonic()
        self._saved_step = step
        return path

    @property
    def seconds_since_save(self) -> float:
        """Seconds since the last checkpoint, or since the run was opened."""
        return time.monotonic() - self._last_save

    @property
    def saved_step(self) -> int | None:
        """Step of the last checkpoint, None if there is none."""
        return self._saved_step

    def progress(self, title: str, total: int) -> Progress:
        """A progress display that respects `quiet`."""
        return Progress(title, total, quiet=self.quiet)

    def close(self) -> None:
        """Flush the metrics."""
        self._metrics.close()


class ShadowRun(Run):
    """A run as the processes beside the first see it: they read it and write nothing."""

    def __init__(self, directory: Path, config: dict[str, Any], resumed: dict[str, Any] | None) -> None:
        self.directory = directory
        self.config = config
        self.quiet = True
        self.resumed = resumed
        self.checkpoints = directory / "checkpoints"
        self._last_save = time.monotonic()
        self._saved_step = None if resumed is None else int(resumed["step"])

    @classmethod
    def create(cls, directory: Path, config: Mapping[str, Any], *, quiet: bool = False) -> ShadowRun:
        """A new run that another process starts."""
        return cls(directory, dict(config), None)

    @classmethod
    def open(cls, directory: Path, *, quiet: bool = False) -> ShadowRun:
        """An interrupted run that another process takes up; raises what `Run.open` does."""
        resumed: dict[str, Any] | None = None
        if checkpoint.list_checkpoints(directory / "checkpoints"):
            resumed, _ = checkpoint.load_latest(directory / "checkpoints")
        return cls(directory, read_config(directory), resumed)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def save(self, step: int, parts: Mapping[str, Any]) -> Path:
        """Nothing, but the time is noted."""
        self._last_save = time.monotonic()
        self._saved_step = step
        return self.checkpoints

    def close(self) -> None:
        """Nothing."""


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a run.

    Raises `UsageError` if the folder is no run, `CheckpointError` if the file is damaged.
    """
    path = Path(directory) / "config.json"
    if not path.exists():
        raise UsageError(
            f"{directory} is not a run: it has no config.json; give the folder of a `saferl train`."
        )
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); the run cannot be opened.") from error
    if not isinstance(config, dict) or "algorithm" not in config:
        raise CheckpointError(f"{path} is damaged (no algorithm in it); the run cannot be opened.")
    return config


def _versions() -> dict[str, str]:
    import gymnasium
    import numpy
    import torch

    import saferl

    return {
        "saferl": saferl.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "gymnasium": gymnasium.__version__,
    }
