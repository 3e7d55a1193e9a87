"""The data set: shapes, the index of episodes against a plain loop, parts, and statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saferl.envs.datasets.tasks import TASKS
from saferl.envs.datasets.transitions import OfflineDataset, concatenate
from saferl.errors import DatasetError, UsageError


def flagged(terminals: Any, timeouts: Any, **changes: Any) -> OfflineDataset:
    rows = len(terminals)
    values: dict[str, Any] = {
        "observations": np.arange(rows, dtype=np.float32)[:, None],
        "next_observations": np.arange(1, rows + 1, dtype=np.float32)[:, None],
        "actions": np.zeros((rows, 1), np.float32),
        "rewards": np.arange(rows) + 1.0,
        "costs": np.ones(rows),
        "terminals": terminals,
        "timeouts": timeouts,
    }
    return OfflineDataset(**(values | changes))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_index_equals_a_loop(flags: list[tuple[bool, bool]]) -> None:
    terminals, timeouts = np.array(flags).T
    data = flagged(terminals, timeouts)
    spans, start = [], 0
    for row, ended in enumerate(terminals | timeouts):
        if ended:
            spans.append((start, row))
            start = row + 1
    assert list(zip(data.starts.tolist(), data.ends.tolist(), strict=True)) == spans
    assert data.num_episodes == len(spans)
    assert data.trailing == len(data) - start
    np.testing.assert_array_equal(data.episode_lengths, [b - a + 1 for a, b in spans])
    np.testing.assert_allclose(data.episode_returns, [data.rewards[a : b + 1].sum() for a, b in spans])
    np.testing.assert_allclose(data.episode_costs, [b - a + 1 for a, b in spans])
    assert len(data.whole_episodes()) == start
    chosen = np.arange(len(spans))[::-2]
    rows = [row for episode in chosen for row in range(spans[episode][0], spans[episode][1] + 1)]
    assert data.rows_of(chosen).tolist() == rows
    np.testing.assert_array_equal(data.select(chosen).observations[:, 0], rows)


def test_conversion_keeps_what_fits_and_squeezes_nothing(maker: Any) -> None:
    data = maker()
    again = OfflineDataset(**data.arrays())
    assert again.observations is data.observations  # no copy
    assert {array.dtype for array in again.arrays().values()} == {np.dtype(np.float32), np.dtype(bool)}
    doubles = flagged([0, 1], [0.0, 0.0], rewards=np.array([1, 2], ">f8"))
    assert doubles.rewards.dtype == np.float32
    assert doubles.terminals.tolist() == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": np.zeros(2)}, "rewards has 2 rows and observations 3"),
        ({"observations": np.zeros(3)}, r"observations has shape \(3,\); it must be \(transitions, size\)"),
        ({"costs": np.zeros((3, 2))}, r"costs has shape \(3, 2\); it must be \(transitions,\)"),
        ({"next_observations": np.zeros((3, 2))}, "they must be alike"),
        ({"actions": np.array([["a"]] * 3)}, "actions has dtype"),
        ({"terminals": [0, 2, 1]}, r"terminals\[1\] is 2; a flag is 0 or 1"),
        ({"timeouts": [0, 1, np.nan]}, r"timeouts\[2\] is nan"),
        ({"task": TASKS["CarRun"]}, "observations have 1 components and CarRun's 7"),
    ],
)
def test_wrong_arrays_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        flagged(**{"terminals": [0, 0, 1], "timeouts": [0, 0, 0], **changes})


def test_values_are_checked_on_request() -> None:
    rows = 70_000  # more than are looked at together
    rewards = np.zeros(rows)
    rewards[66_000] = np.inf
    data = flagged(np.zeros(rows), np.zeros(rows), rewards=rewards)
    with pytest.raises(DatasetError, match=r"rewards\[66000\] is not finite"):
        data.check_values()
    with pytest.raises(DatasetError, match=r"observations\[1\] is not finite"):
        flagged([0, 1], [0, 0], observations=np.array([[1e300], [1e39]])[::-1] * [[0], [1]]).check_values()
    data.replace(rewards=np.zeros(rows)).check_values()


def test_selecting_by_mask_and_wrong_numbers(dataset: OfflineDataset) -> None:
    mask = dataset.episode_costs <= np.median(dataset.episode_costs)
    safe = dataset.select(mask)
    np.testing.assert_array_equal(safe.episode_costs, dataset.episode_costs[mask])
    assert len(dataset.select([])) == 0
    assert dataset.select([3, 3]).num_episodes == 2
    with pytest.raises(UsageError, match="episode 5 does not exist"):
        dataset.select([0, 5])
    with pytest.raises(UsageError, match="episode -1 does not exist"):
        dataset.select([-1, 2])
    with pytest.raises(UsageError, match="the mask of episodes"):
        dataset.select(np.ones(4, bool))


def test_concatenation_leaves_out_inner_fragments(maker: Any, same: Any) -> None:
    first, second = maker(2, trailing=3), maker(3, trailing=4, seed=1)
    both = concatenate([first, second])
    assert (both.num_episodes, both.trailing, len(both)) == (5, 4, 104)
    same(both.select([0, 1]), first.whole_episodes())
    same(both.select([2, 3, 4]), second.whole_episodes())
    same(concatenate([first]), first)
    with pytest.raises(DatasetError, match="only data of one task"):
        concatenate([first, maker(1, sizes=(5, 2))])
    with pytest.raises(UsageError, match="at least one"):
        concatenate([])


def test_statistics(maker: Any) -> None:
    data = maker(6, trailing=7)
    stats = data.statistics()
    assert (stats.transitions, stats.episodes, stats.trailing, stats.terminated) == (127, 6, 7, 2)
    assert stats.lengths is not None
    assert (stats.lengths.min, stats.lengths.max, stats.lengths.std) == (20, 20, 0)
    assert stats.returns is not None
    assert stats.returns.mean == pytest.approx(data.rewards[:120].sum(dtype=float) / 6)
    assert stats.costs is not None
    assert stats.costs.max == data.episode_costs.max()
    np.testing.assert_allclose(stats.observation_mean, data.observations.mean(0, dtype=float))
    np.testing.assert_allclose(stats.observation_std, data.observations.std(0, dtype=float))
    np.testing.assert_array_equal(stats.action_low, data.actions.min(0))
    np.testing.assert_array_equal(stats.action_high, data.actions.max(0))


def test_no_episode_and_no_transition(maker: Any) -> None:
    open_end = flagged([0, 0], [0, 0])
    assert (open_end.num_episodes, open_end.trailing) == (0, 2)
    assert open_end.statistics().returns is None
    assert open_end.episode_returns.shape == (0,)
    assert len(open_end.whole_episodes()) == 0
    with pytest.raises(DatasetError, match="no transition"):
        open_end.whole_episodes().statistics()
