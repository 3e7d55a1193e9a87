"""A small data set in the shape of a control task's: vectors, episodes of 20 steps, costs of 0 and 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from saferl.envs.datasets import OfflineDataset

Maker = Callable[..., OfflineDataset]


def make_dataset(
    episodes: int = 5, steps: int = 20, *, trailing: int = 0, sizes: tuple[int, int] = (4, 2), seed: int = 0
) -> OfflineDataset:
    """Chained observations; every third episode terminates, the others are cut."""
    rng = np.random.default_rng(seed)
    parts = []
    for episode in range(episodes + bool(trailing)):
        length = steps if episode < episodes else trailing
        observations = rng.normal(size=(length + 1, sizes[0])).astype(np.float32)
        ends = np.zeros(length, bool)
        ends[-1] = episode < episodes
        parts.append(
            OfflineDataset(
                observations=observations[:-1],
                next_observations=observations[1:],
                actions=rng.uniform(-1, 1, (length, sizes[1])),
                rewards=rng.normal(size=length),
                costs=rng.integers(0, 2, length),
                terminals=ends & (episode % 3 == 2),
                timeouts=ends & (episode % 3 != 2),
            )
        )
    arrays = [part.arrays() for part in parts]
    return OfflineDataset(**{key: np.concatenate([part[key] for part in arrays]) for key in arrays[0]})


def assert_equal(first: OfflineDataset, second: OfflineDataset) -> None:
    """Bit for bit, and of equal dtypes."""
    for key, array in first.arrays().items():
        other = getattr(second, key)
        assert array.dtype == other.dtype, key
        np.testing.assert_array_equal(array, other, err_msg=key)


@pytest.fixture
def dataset() -> OfflineDataset:
    """Five episodes of 20 steps."""
    return make_dataset()


@pytest.fixture
def maker() -> Maker:
    """`make_dataset`."""
    return make_dataset


@pytest.fixture
def same() -> Callable[[OfflineDataset, OfflineDataset], None]:
    """`assert_equal`."""
    return assert_equal
