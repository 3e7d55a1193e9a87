"""What the batched engines share: blocks of rows on threads, and the interface to `SimulatedVectorEnv`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

__all__ = ["Blocks", "Engine", "Outcome", "available_cores"]

Floats = NDArray[np.float64]
Result = TypeVar("Result")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Blocks:
    """Consecutive rows shared out evenly among threads, the first block to the caller's."""

    def __init__(self, rows: int, threads: int) -> None:
        edges = np.linspace(0, rows, min(threads, rows) + 1).astype(int).tolist()
        self.bounds = list(itertools.pairwise(edges))
        self._pool = ThreadPoolExecutor(len(self.bounds) - 1, "simulated") if len(self.bounds) > 1 else None

    def each(self, function: Callable[[int, int, int], Result]) -> list[Result]:
        """Call `function(block, first row, last row + 1)` for every block; return the results in order."""
        first, *others = [(block, lo, hi) for block, (lo, hi) in enumerate(self.bounds)]
        if self._pool is None:
            return [function(*first)]
        waiting = [self._pool.submit(function, *block) for block in others]
        done = function(*first)
        return [done, *(future.result() for future in waiting)]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


@dataclass
class Outcome:
    """What a step gave, one entry an environment."""

    rewards: Floats
    cost: Floats
    costs: dict[str, Floats]
    terminated: NDArray[np.bool_]
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    """Further entries of `info`."""


class Engine:
    """N environments of one task that are stepped together; knows nothing of episodes' lengths."""

    observation_space: spaces.Box
    action_space: spaces.Box
    cost_names: tuple[str, ...]
    render_fps: int
    obs: Floats
    """The observations (N, ...) of the current states."""

    def seed(self, row: int, seed: int | None) -> None:
        """Restart a row's random numbers; None draws a seed from the system unless there was one before."""
        raise NotImplementedError

    def restart(self, mask: NDArray[np.bool_]) -> None:
        """Start new episodes in the masked rows and write their observations."""
        raise NotImplementedError

    def step(self, actions: np.ndarray) -> Outcome:
        """Take one control step with actions (N, A) and write the observations."""
        raise NotImplementedError

    def get_state(self) -> dict[str, Any]:
        """Return everything that the future depends on: arrays and JSON values."""
        raise NotImplementedError

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `get_state`'s result of an engine of the same kind and size."""
        raise NotImplementedError

    def close(self) -> None:
        """End the threads."""
        raise NotImplementedError
