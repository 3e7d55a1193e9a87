"""Recorded transitions, episode after episode, with an index of the episodes computed in whole arrays.

Row i is one step: observation, action, reward, cost, the observation that followed, and two flags. An
episode ends at a row whose `terminals` (the environment ended it) or `timeouts` (it was cut) is set.
Rows after the last such row are the **trailing fragment**: they are transitions like any other, but
belong to no episode, so that all that is about episodes leaves them out; `trailing` counts them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferl.envs.datasets.tasks import OfflineTask
from saferl.errors import DatasetError, UsageError

__all__ = [
    "ARRAYS",
    "FLAGS",
    "OfflineDataset",
    "Statistics",
    "Summary",
    "bad_rows",
    "concatenate",
    "first_bad_row",
]

#: The arrays of a data set and the number of their dimensions; all have one row a transition.
ARRAYS = {
    "observations": 2,
    "next_observations": 2,
    "actions": 2,
    "rewards": 1,
    "costs": 1,
    "terminals": 1,
    "timeouts": 1,
}
FLAGS = ("terminals", "timeouts")

Float32s: TypeAlias = NDArray[np.float32]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = NDArray[np.intp]

_BLOCK = 1 << 16  # rows that are looked at together, so that mapped files are never in memory as a whole


@dataclass(frozen=True)
class Summary:
    """Smallest value, mean, largest value and standard deviation of a number an episode."""

    min: float
    mean: float
    max: float
    std: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Summary | None:
        """Summarise values (E,); None for no episode."""
        if not len(values):
            return None
        numbers = (values.min(), values.mean(), values.max(), values.std())
        return cls(*(float(number) for number in numbers))


@dataclass(frozen=True)
class Statistics:
    """What there is in a data set; the summaries are over whole episodes, None where there is none."""

    transitions: int
    episodes: int
    trailing: int
    """Transitions after the last end of an episode."""
    terminated: int
    """Episodes that the environment ended."""
    lengths: Summary | None
    returns: Summary | None
    costs: Summary | None
    observation_mean: Floats
    """(S,) over all transitions, as is the standard deviation."""
    observation_std: Floats
    action_low: Floats
    """(A,) smallest and largest value of each action component."""
    action_high: Floats


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class OfflineDataset:
    """Transitions (N rows) in arrays, in memory or mapped from a disk; never changed in place.

    Floating-point arrays become float32 and flags bool on construction; arrays that are so already are
    kept, not copied. Values are not looked at (that would read a mapped file): `check_values` does.

    Raises:
        DatasetError: an array has another shape or kind, or a flag is neither 0 nor 1.
    """

    observations: Float32s
    """(N, S)"""
    next_observations: Float32s
    """(N, S)"""
    actions: Float32s
    """(N, A)"""
    rewards: Float32s
    """(N,)"""
    costs: Float32s
    """(N,)"""
    terminals: Bools
    """(N,), whether the environment ended the episode with this step."""
    timeouts: Bools
    """(N,), whether the episode was cut after this step."""
    task: OfflineTask | None = None
    """The DSRL task that it belongs to, if it is known."""
    source: str = "this data set"
    """Where it came from, for messages."""

    def __post_init__(self) -> None:
        for key, rank in ARRAYS.items():
            object.__setattr__(self, key, self._converted(key, rank))
        rows = len(self.observations)
        for key in ARRAYS:
            array = getattr(self, key)
            if len(array) != rows:
                raise DatasetError(
                    f"{self.source}: {key} has {len(array)} rows and observations {rows}; all arrays need "
                    "one row a transition."
                )
        if self.next_observations.shape != self.observations.shape:
            raise DatasetError(
                f"{self.source}: next_observations has shape {self.next_observations.shape} and observations "
                f"{self.observations.shape}; they must be alike."
            )
        if self.task is not None:
            self._check_task(self.task)

    def _converted(self, key: str, rank: int) -> NDArray[Any]:
        array = np.asanyarray(getattr(self, key))
        if array.dtype.kind not in "biuf":
            raise DatasetError(f"{self.source}: {key} has dtype {array.dtype}; it must be numeric.")
        if array.ndim != rank:
            shape = "(transitions, size)" if rank == 2 else "(transitions,)"
            raise DatasetError(f"{self.source}: {key} has shape {array.shape}; it must be {shape}.")
        if key in FLAGS:
            if array.dtype != np.bool_:
                bad = first_bad_row(array, flags=True)
                if bad is not None:
                    raise DatasetError(f"{self.source}: {key}[{bad}] is {array[bad]}; a flag is 0 or 1.")
            flags: Bools = array.astype(np.bool_, copy=False)
            return flags
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which `check_values` reports
            floats: Float32s = array.astype(np.float32, copy=False)
        return floats

    def _check_task(self, task: OfflineTask) -> None:
        for what, have, want in (
            ("observations", self.observation_size, task.observation_size),
            ("actions", self.action_size, task.action_size),
        ):
            if have != want:
                raise DatasetError(
                    f"{self.source}: {what} have {have} components and {task.key}'s {want}; name the task "
                    "that the data are of, or none."
                )

    # --- size and episodes --------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """One line: how much of what."""
        task = f" of {self.task.key}" if self.task else ""
        return (
            f"OfflineDataset({len(self)} transitions, {self.num_episodes} episodes{task}, "
            f"observations {self.observation_size}, actions {self.action_size})"
        )

    def __len__(self) -> int:
        """Transitions, the trailing fragment included."""
        return len(self.observations)

    @property
    def observation_size(self) -> int:
        """S."""
        return int(self.observations.shape[1])

    @property
    def action_size(self) -> int:
        """A."""
        return int(self.actions.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, in memory or mapped."""
        return sum(getattr(self, key).nbytes for key in ARRAYS)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the seven arrays by name."""
        return {key: getattr(self, key) for key in ARRAYS}

    @cached_property
    def ends(self) -> Indices:
        """Last row of each whole episode, (E,)."""
        return np.flatnonzero(np.asarray(self.terminals) | np.asarray(self.timeouts))

    @cached_property
    def starts(self) -> Indices:
        """First row of each whole episode, (E,)."""
        return np.concatenate([[0], self.ends[:-1] + 1]).astype(np.intp)[: len(self.ends)]

    @property
    def num_episodes(self) -> int:
        """E, the number of whole episodes."""
        return len(self.ends)

    @property
    def trailing(self) -> int:
        """Transitions after the last end of an episode."""
        return len(self) - (int(self.ends[-1]) + 1 if len(self.ends) else 0)

    @cached_property
    def episode_lengths(self) -> Indices:
        """Steps of each whole episode, (E,)."""
        return self.ends - self.starts + 1

    @cached_property
    def episode_returns(self) -> Floats:
        """Undiscounted sum of rewards of each whole episode, (E,), summed in double precision."""
        return self._sums(self.rewards)

    @cached_property
    def episode_costs(self) -> Floats:
        """Undiscounted sum of costs of each whole episode, (E,), summed in double precision."""
        return self._sums(self.costs)

    def _sums(self, values: Float32s) -> Floats:
        if not len(self.ends):
            return np.zeros(0)
        sums: Floats = np.add.reduceat(values[: self.ends[-1] + 1], self.starts, dtype=np.float64)
        return sums

    # --- parts --------------------------------------------------------------------------------------------

    def rows_of(self, episodes: ArrayLike) -> Indices:
        """Return the rows of some episodes, one after the other.

        Args:
            episodes: numbers of episodes in any order, also repeatedly, or a mask (E,).

        Raises:
            UsageError: a number is out of range, or the mask has another length.
        """
        chosen = np.asarray(episodes)
        if chosen.dtype == np.bool_:
            if chosen.shape != (self.num_episodes,):
                raise UsageError(
                    f"the mask of episodes has shape {chosen.shape}; {self.source} has {self.num_episodes}."
                )
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.intp).reshape(-1)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self.num_episodes:
            raise UsageError(
                f"episode {chosen.max() if chosen.min() >= 0 else chosen.min()} does not exist; "
                f"{self.source} has episodes 0 to {self.num_episodes - 1}."
            )
        lengths = self.episode_lengths[chosen]
        shifts = self.starts[chosen] - (np.cumsum(lengths) - lengths)
        return np.repeat(shifts, lengths) + np.arange(lengths.sum())

    def select(self, episodes: ArrayLike) -> OfflineDataset:
        """Return a data set of some episodes (see `rows_of`), in memory."""
        return self._at(self.rows_of(episodes))

    def whole_episodes(self) -> OfflineDataset:
        """Return the data set without its trailing fragment; the arrays are views."""
        return self if not self.trailing else self._at(slice(0, len(self) - self.trailing))

    def replace(self, **changes: Any) -> OfflineDataset:
        """Return a data set with some arrays (or the task or source) replaced."""
        return dataclasses.replace(self, **changes)

    def _at(self, rows: Indices | slice) -> OfflineDataset:
        return self.replace(**{key: array[rows] for key, array in self.arrays().items()})

    # --- values -------------------------------------------------------------------------------------------

    def check_values(self) -> None:
        """Raise DatasetError, naming array and row, when a number is NaN or infinite."""
        for key, array in self.arrays().items():
            if key in FLAGS:
                continue
            for start, block in _blocks(array):
                bad = first_bad_row(block)
                if bad is not None:
                    raise DatasetError(
                        f"{self.source}: {key}[{start + bad}] is not finite; repair or drop its episode."
                    )

    def statistics(self) -> Statistics:
        """Return counts, summaries of the episodes and the moments of observations and actions.

        Reads all observations and actions, block by block. Raises DatasetError when there is no transition.
        """
        if not len(self):
            raise DatasetError(f"{self.source} holds no transition; there is nothing to summarise.")
        mean = np.zeros(self.observation_size)
        for _, block in _blocks(self.observations):
            mean += block.sum(0, dtype=np.float64) / len(self)
        variance = np.zeros_like(mean)
        for _, block in _blocks(self.observations):
            variance += np.square(block - mean).sum(0) / len(self)
        extremes = [(block.min(0), block.max(0)) for _, block in _blocks(self.actions)]
        return Statistics(
            transitions=len(self),
            episodes=self.num_episodes,
            trailing=self.trailing,
            terminated=int(np.asarray(self.terminals)[self.ends].sum()),
            lengths=Summary.of(self.episode_lengths),
            returns=Summary.of(self.episode_returns),
            costs=Summary.of(self.episode_costs),
            observation_mean=mean,
            observation_std=np.sqrt(variance),
            action_low=np.min([low for low, _ in extremes], axis=0).astype(np.float64),
            action_high=np.max([high for _, high in extremes], axis=0).astype(np.float64),
        )


def concatenate(datasets: Sequence[OfflineDataset]) -> OfflineDataset:
    """Put data sets behind one another, in memory.

    The trailing fragments of all but the last are left out: they would run into the next one's first
    episode. The task stays when it is the same everywhere.

    Raises:
        UsageError: there is no data set.
        DatasetError: observations or actions have different sizes.
    """
    if not datasets:
        raise UsageError("there is no data set to concatenate; give at least one.")
    first = datasets[0]
    for other in datasets[1:]:
        sizes = [(data.observation_size, data.action_size) for data in (first, other)]
        if sizes[0] != sizes[1]:
            raise DatasetError(
                f"{first.source} has observations and actions of {sizes[0]} components and {other.source} "
                f"of {sizes[1]}; only data of one task can be concatenated."
            )
    parts = [*(data.whole_episodes() for data in datasets[:-1]), datasets[-1]]
    same = all(data.task is first.task for data in datasets)
    return OfflineDataset(
        **{key: np.concatenate([getattr(part, key) for part in parts]) for key in ARRAYS},
        task=first.task if same else None,
        source=first.source if len(datasets) == 1 else f"{first.source} and {len(datasets) - 1} more",
    )


def bad_rows(block: NDArray[Any], *, flags: bool = False) -> Indices:
    """Return the rows of (n, ...) that are not finite, or with `flags` neither 0 nor 1."""
    good = (block == 0) | (block == 1) if flags else np.isfinite(block)
    if good.all():
        return np.zeros(0, np.intp)
    return np.flatnonzero(~good.reshape(len(block), -1).all(1))


def first_bad_row(block: NDArray[Any], *, flags: bool = False) -> int | None:
    """Return the first of `bad_rows`, None if there is none."""
    bad = bad_rows(block, flags=flags)
    return int(bad[0]) if len(bad) else None


def _blocks(array: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    for start in range(0, len(array), _BLOCK):
        yield start, array[start : start + _BLOCK]
