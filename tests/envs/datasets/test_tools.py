"""DSRL's post-processing: its worked examples, what each filter removes, and the package's own results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from saferl.envs.datasets import OfflineDataset
from saferl.envs.datasets.tasks import TASKS, GridPreset
from saferl.envs.datasets.tools import (
    add_noise,
    add_outliers,
    cells,
    episode_statistics,
    grid_filter,
    inpaint,
    pre_process,
    scatter,
    trim_best,
)
from saferl.errors import DatasetError, UsageError


def plane(costs: Any, returns: Any, steps: int = 4) -> OfflineDataset:
    """An episode for each cost and return, marked by its number in the observations."""
    costs, returns = np.asarray(costs, float), np.asarray(returns, float)
    count = len(costs)
    numbers = np.repeat(np.arange(count), steps)[:, None]
    first = np.arange(count * steps) % steps == 0
    last = np.arange(count * steps) % steps == steps - 1
    return OfflineDataset(
        observations=numbers,
        next_observations=numbers + 0.5,
        actions=np.zeros((count * steps, 1)),
        rewards=np.repeat(returns, steps) / steps,
        costs=np.where(first, np.repeat(costs, steps), 0.0),
        terminals=np.zeros(count * steps),
        timeouts=last,
    )


def numbers(data: OfflineDataset) -> list[int]:
    return [int(number) for number in data.observations[data.starts, 0]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- the grid -----------------------------------------------------------------------------------------


def test_the_largest_value_has_a_cell_of_its_own() -> None:
    assert cells([0, 1, 9, 10], 10).tolist() == [0, 1, 9, 10]
    assert cells([3, 3, 3], 10).tolist() == [0, 0, 0]
    assert cells([0, 1, 4, 10], 10, (1, 9)).tolist() == [-1, 0, 3, -1]
    assert cells([], 10).tolist() == []
    with pytest.raises(UsageError, match="at least one"):
        cells([1], 0)


def test_full_cells_are_thinned_and_sparse_ones_emptied() -> None:
    # 8 episodes in one cell, 3 in another, 2 in a third, the largest alone
    costs = [0.0] * 8 + [5.0] * 3 + [8.0] * 2 + [10.0]
    data = plane(costs, costs)
    kept = grid_filter(data, rng(), return_bins=10, max_per_cell=5, min_per_cell=2)
    chosen = numbers(kept)
    assert len([n for n in chosen if n < 8]) == 5
    assert [n for n in chosen if n >= 8] == [8, 9, 10]
    assert chosen == sorted(chosen)
    again = grid_filter(data, rng(), return_bins=10, max_per_cell=5, min_per_cell=2)
    assert numbers(again) == chosen  # seeded
    everything = {tuple(numbers(grid_filter(data, rng(s), return_bins=10))) for s in range(20)}
    assert len(everything) > 5
    all_cells = grid_filter(data, rng(), return_bins=10, max_per_cell=99, min_per_cell=0)
    assert numbers(all_cells) == list(range(14))
    inner = grid_filter(
        data, rng(), max_per_cell=99, min_per_cell=0, cost_bounds=(1, 9), return_bounds=(0, 6)
    )
    assert numbers(inner) == [8, 9, 10]


def test_nothing_left_of_a_sparse_grid() -> None:
    assert len(grid_filter(plane([0, 5, 10], [0, 5, 10]), rng())) == 0


@given(seed=st.integers(0, 1000), bins=st.integers(1, 12), most=st.integers(0, 6), least=st.integers(0, 3))
def test_the_grid_against_a_loop(seed: int, bins: int, most: int, least: int) -> None:
    generator = rng(seed)
    data = plane(generator.integers(0, 12, 60), generator.integers(0, 12, 60))
    kept = numbers(
        grid_filter(data, generator, cost_bins=bins, return_bins=bins, max_per_cell=most, min_per_cell=least)
    )
    members: dict[tuple[int, int], list[int]] = {}
    keys = zip(cells(data.episode_costs, bins), cells(data.episode_returns, bins), strict=True)
    for episode, key in enumerate(keys):
        members.setdefault(key, []).append(episode)
    for inside in members.values():
        there = len(set(kept) & set(inside))
        assert there == (most if len(inside) > most else 0 if len(inside) <= least else len(inside))


# --- outliers -----------------------------------------------------------------------------------------


def test_outliers_look_safe_and_pay_more() -> None:
    costs, returns = np.arange(20.0), np.arange(20.0)
    data = plane(costs, returns, steps=30)
    changed, chosen = add_outliers(data, rng(), share=0.25, cost_limit=6)
    assert len(chosen) == 5
    assert set(chosen) <= set(range(10, 20))  # at least half of the largest cost and return
    np.testing.assert_allclose(changed.episode_returns[chosen], 1.5 * returns[chosen], rtol=1e-6)
    assert (changed.episode_costs[chosen] < 6).all()
    assert set(np.unique(changed.costs[changed.rows_of(chosen)])) <= {0.0, 1.0}
    others = np.setdiff1d(np.arange(20), chosen)
    np.testing.assert_array_equal(changed.episode_costs[others], costs[others])
    np.testing.assert_allclose(changed.episode_returns[others], returns[others], rtol=1e-6)
    np.testing.assert_array_equal(data.episode_costs, costs)  # the argument is as it was
    assert len(add_outliers(data, rng(), share=0.0, cost_limit=6)[1]) == 1  # at least one


def test_impossible_outliers_are_told() -> None:
    data = plane(np.arange(20), np.arange(20))
    for settings, message in (
        ({"share": 1.5, "cost_limit": 5}, "lies in"),
        ({"share": 0.1, "cost_limit": 0.5}, "at least 1"),
        (
            {"share": 0.9, "cost_limit": 5},
            "18 outliers are asked for and 10 episodes have cost 9.5 and return",
        ),
        ({"share": 0.1, "cost_limit": 5, "max_cost": 100.0}, "2 outliers are asked for and 0 episodes"),
    ):
        with pytest.raises(UsageError, match=message):
            add_outliers(data, rng(), **settings)  # type: ignore[arg-type]


def test_the_tasks_constants_decide_who_is_costly() -> None:
    data = plane(np.linspace(0, 40, 41), np.full(41, 500.0))
    data = data.replace(
        observations=np.repeat(data.observations, 7, 1),
        next_observations=np.repeat(data.next_observations, 7, 1),
        actions=np.zeros((len(data), 2)),
        task=TASKS["CarRun"],
    )
    _, chosen = add_outliers(data, rng(), share=0.5, cost_limit=20)
    assert chosen.min() >= 20


# --- inpainting, epsilon, noise -----------------------------------------------------------------------


def test_rectangles_are_deleted_with_their_edges() -> None:
    data = plane([0, 2, 5, 8, 10], [0, 2, 5, 8, 10])
    assert numbers(inpaint(data, [(0.2, 0.5, 0.2, 0.5)])) == [0, 3, 4]
    assert numbers(inpaint(data, [(0.2, 0.5, 0.2, 0.5)], keep=[2])) == [0, 2, 3, 4]
    assert numbers(inpaint(data, [(0, 0.1, 0, 1), (0.9, 1, 0, 1)])) == [1, 2, 3]
    assert numbers(inpaint(data, [(0, 0.5, 0, 1)], cost_range=(0, 20))) == []
    assert numbers(inpaint(data, [])) == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="is not"):
        inpaint(data, [(0.5, 0.2, 0, 1)])


def test_the_best_safe_or_risky_episodes_go() -> None:
    data = plane([0, 0, 0, 9, 9, 9], [1, 5, 6, 2, 7, 9])
    assert numbers(trim_best(data, epsilon=1, cost_limit=5)) == [0, 3, 4, 5]
    assert numbers(trim_best(data, epsilon=-2, cost_limit=5)) == [0, 1, 2, 3]
    assert numbers(trim_best(data, epsilon=0, cost_limit=5)) == [0, 1, 2, 3, 4, 5]
    assert len(trim_best(data, epsilon=1, cost_limit=-1).ends) == 6  # none is safe


def test_noise_is_scaled_by_one_deviation_and_independent(maker: Any) -> None:
    data = maker(100, 100)
    wide = data.replace(observations=data.observations * [1, 1, 1, 10])
    noisy = add_noise(wide, rng(), scale=0.5)
    std = wide.observations.std()
    for key, deviation in (("observations", std), ("next_observations", 1.0)):
        added = getattr(noisy, key) - getattr(wide, key)
        np.testing.assert_allclose(added.std(0), 0.5 * deviation, rtol=0.05)
    added = noisy.observations[1:] - wide.observations[1:]
    following = noisy.next_observations[:-1] - wide.next_observations[:-1]
    assert abs(np.corrcoef(added[:, 0], following[:, 0])[0, 1]) < 0.05
    np.testing.assert_array_equal(noisy.rewards, wide.rewards)
    with pytest.raises(UsageError, match="zero or more"):
        add_noise(data, rng(), scale=-1)


def test_all_in_dsrls_order() -> None:
    generator = rng(3)
    costs, returns = generator.integers(0, 40, 300), generator.uniform(0, 10, 300)
    data = plane(costs, returns, steps=40)
    grid = GridPreset(cost_bins=5, return_bins=5, max_per_cell=9, min_per_cell=2)
    settings: dict[str, Any] = {"grid": grid, "outliers": 0.05, "inpainted": [(0, 0.2, 0.2, 0.4)]}
    settings |= {"epsilon": 1.0, "noise": 0.01, "cost_limit": 10}
    first, second = pre_process(data, **settings), pre_process(data, **settings)
    np.testing.assert_array_equal(first.observations, second.observations)
    assert 0 < first.num_episodes < 250
    other = pre_process(data, seed=5, **settings)
    assert first.observations.shape != other.observations.shape or (first.costs != other.costs).any()
    assert pre_process(data).num_episodes == 300
    for needing in ({"outliers": 0.1}, {"epsilon": 1.0}):
        with pytest.raises(UsageError, match="give cost_limit"):
            pre_process(data, **needing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"outliers_percent": 0.05},
        {"noise_scale": 0.2},
        # over all costs, since release 0.1.0 takes the returns' range of the costs that are hit
        {"inpaint_ranges": ((0.0, 1.0, 0.3, 0.6),)},
        {"epsilon": 1.5},
        {"epsilon": -1.5},
        {"outliers_percent": 0.02, "noise_scale": 0.1, "epsilon": 1.0},
    ],
)
def test_the_package_gives_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the grid, whose draws the package takes from elsewhere."""
    offline_env = pytest.importorskip("dsrl.offline_env")
    monkeypatch.chdir(tmp_path)  # it draws a picture into the working folder
    monkeypatch.setenv("MPLBACKEND", "agg")
    generator = rng(4)
    data = plane(generator.integers(0, 40, 200), generator.uniform(0, 10, 200), steps=50)
    env = offline_env.OfflineEnv(max_episode_reward=10.0, max_episode_cost=39.0)
    env.set_target_cost(12)
    theirs = env.pre_process_data({key: array.copy() for key, array in data.arrays().items()}, **settings)
    monkeypatch.setattr(
        "saferl.envs.datasets.tools.add_outliers",
        lambda *a, **k: add_outliers(*a, max_cost=39.0, max_return=10.0, **k),
    )
    ours = pre_process(
        data,
        outliers=settings.get("outliers_percent"),
        inpainted=settings.get("inpaint_ranges", ()),
        epsilon=settings.get("epsilon"),
        noise=settings.get("noise_scale"),
        cost_limit=12,
    )
    for key, array in ours.arrays().items():
        np.testing.assert_allclose(array, theirs[key], rtol=1e-5, atol=1e-5, err_msg=key)


def test_the_packages_grid_keeps_as_many() -> None:
    offline_env = pytest.importorskip("dsrl.offline_env")
    generator = rng(5)
    data = plane(generator.integers(0, 40, 500), generator.uniform(0, 10, 500))
    theirs = offline_env.grid_filter(
        data.episode_costs,
        data.episode_returns,
        xbins=10,
        ybins=6,
        max_num_per_bin=8,
        min_num_per_bin=2,
    )
    ours = grid_filter(data, generator, cost_bins=10, return_bins=6, max_per_cell=8)
    assert ours.num_episodes == len(theirs)


# --- statistics and pictures --------------------------------------------------------------------------


def test_episode_statistics() -> None:
    data = plane([0, 10, 20, 30], [1, 2, 3, 4])
    table = episode_statistics(data, [10, 15, -1])
    assert (table["episodes"], table["transitions"], table["trailing"], table["task"]) == (4, 16, 0, None)
    assert table["cost"] == {"min": 0, "25%": 7.5, "50%": 15, "75%": 22.5, "max": 30, "mean": 15}
    assert table["limits"] == [
        {"cost_limit": 10, "safe": 0.5, "best": 2},
        {"cost_limit": 15, "safe": 0.5, "best": 2},
        {"cost_limit": -1, "safe": 0, "best": None},
    ]
    assert episode_statistics(data.select([]))["return"] == {}


def test_statistics_of_a_task_are_at_its_limits_and_normalised(maker: Any) -> None:
    data = maker(sizes=(7, 2)).replace(task=TASKS["CarRun"])
    table = episode_statistics(data)
    assert [row["cost_limit"] for row in table["limits"]] == [10, 20, 40]
    best = max(data.episode_returns[data.episode_costs <= 20])
    task = TASKS["CarRun"]
    expected = (best - task.min_episode_reward) / (task.max_episode_reward - task.min_episode_reward)
    assert table["limits"][1]["best_normalised"] == pytest.approx(expected)
    mean = (data.episode_returns.mean() - task.min_episode_reward) / (
        task.max_episode_reward - task.min_episode_reward
    )
    for row in table["limits"]:
        cost = data.episode_costs.mean() / row["cost_limit"]
        assert row["mean_normalised"] == pytest.approx({"return": mean, "cost": cost})
    assert (table["terminated"], table["timeouts"]) == (1, 4)  # every third of five


def test_pictures(tmp_path: Path, dataset: OfflineDataset) -> None:
    scatter(dataset, tmp_path / "new" / "data.png", cost_limit=10)
    assert (tmp_path / "new" / "data.png").read_bytes().startswith(b"\x89PNG")
    scatter(dataset.replace(source="a$b$.hdf5"), tmp_path / "data.svg")
    assert b"svg" in (tmp_path / "data.svg").read_bytes()
    scatter(dataset, tmp_path / "data.svg", cost_limit=(5, 7.5))
    drawn = (tmp_path / "data.svg").read_text()  # has its words as comments
    assert re.findall(r"<!-- +limit ([\d.]+) +-->", drawn) == ["5", "7.5"]
    with pytest.raises(UsageError, match="no picture's ending"):
        scatter(dataset, tmp_path / "data.txt")
    with pytest.raises(DatasetError, match="nothing to draw"):
        scatter(dataset.select([]), tmp_path / "data.png")
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="could not be written"):
        scatter(dataset, tmp_path / "file" / "data.png")


def test_an_interrupted_picture_leaves_the_earlier_one(
    tmp_path: Path, dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.png"
    path.write_bytes(b"earlier")

    def stop(self: Figure, name: Path, **_: Any) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", stop)
    with pytest.raises(KeyboardInterrupt):
        scatter(dataset, path)
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["data.png"]
