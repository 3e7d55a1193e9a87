"""D4RL's layout: its own rules for the next observation, against a plain loop and against the package."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saferl.envs.datasets import detect_format, examine, load, read_d4rl, validate, write_d4rl
from saferl.envs.datasets.d4rl import kept_rows, qlearning_dataset
from saferl.errors import DatasetError, UsageError


def raw(rows: int, terminals: Any = None, timeouts: Any = None, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal(size=(rows, 3)),
        "actions": rng.normal(size=(rows, 2)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, bool) if terminals is None else np.asarray(terminals, bool),
    }
    if timeouts is not None:
        arrays["timeouts"] = np.asarray(timeouts, bool)
    return arrays


def counted(terminals: np.ndarray, limit: int) -> list[bool]:
    """The package's counting of steps, row by row: only a cut starts the next episode at zero."""
    kept, step = [], 0
    for ended in terminals[:-1]:
        cut = step == limit - 1
        kept.append(not cut)
        if cut:
            step = 0
            continue
        step = 1 if ended else step + 1
    return kept


def write(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip" if np.ndim(array) else None)
    return path


def every(steps: int, rows: int) -> np.ndarray:
    return np.arange(rows) % steps == steps - 1


# --- qlearning_dataset ----------------------------------------------------------------------------------


def test_two_episodes_of_five_steps_give_eight_rows() -> None:
    arrays = raw(10, timeouts=every(5, 10))
    found = qlearning_dataset(arrays, implementation="native")
    rows = [0, 1, 2, 3, 5, 6, 7, 8]
    np.testing.assert_array_equal(found["observations"], arrays["observations"][rows].astype("f4"))
    np.testing.assert_array_equal(
        found["next_observations"], arrays["observations"][np.add(rows, 1)].astype("f4")
    )
    np.testing.assert_array_equal(found["rewards"], arrays["rewards"][rows])
    assert not found["terminals"].any()
    counted_steps = qlearning_dataset(raw(10), max_episode_steps=5, implementation="native")
    for key, array in found.items():
        np.testing.assert_array_equal(array, counted_steps[key])


@given(episodes=st.integers(1, 6), steps=st.integers(1, 8))
def test_episodes_cut_by_timeouts_lose_a_row_each(episodes: int, steps: int) -> None:
    rows = episodes * steps
    found = qlearning_dataset(raw(rows, timeouts=every(steps, rows)), implementation="native")
    assert len(found["rewards"]) == episodes * (steps - 1)
    assert found["observations"].shape == (episodes * (steps - 1), 3)


@given(terminals=st.lists(st.booleans(), min_size=1, max_size=60), limit=st.integers(1, 7))
def test_counted_steps_equal_the_loop(terminals: list[bool], limit: int) -> None:
    flags = np.array(terminals)
    assert kept_rows(flags, None, limit).tolist() == counted(flags, limit)


@given(
    flags=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40),
    limit=st.integers(1, 7),
    with_timeouts=st.booleans(),
    terminate_on_end=st.booleans(),
)
def test_native_equals_the_package(
    flags: list[tuple[bool, bool]], limit: int, with_timeouts: bool, terminate_on_end: bool
) -> None:
    pytest.importorskip("d4rl")
    terminals, timeouts = np.array(flags).T
    arrays = raw(len(flags), terminals, timeouts if with_timeouts else None)
    settings: dict[str, Any] = {"max_episode_steps": limit, "terminate_on_end": terminate_on_end}
    native = qlearning_dataset(arrays, implementation="native", **settings)
    package = qlearning_dataset(arrays, implementation="package", **settings)
    assert native.keys() == package.keys()
    for key, array in native.items():
        np.testing.assert_array_equal(array, package[key])
        assert (array.dtype, array.shape) == (package[key].dtype, package[key].shape)


def test_terminate_on_end_keeps_all_but_the_last_row() -> None:
    arrays = raw(10, timeouts=every(5, 10))
    assert len(qlearning_dataset(arrays, terminate_on_end=True)["rewards"]) == 9


def test_an_absent_package_and_missing_steps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saferl.envs.datasets.d4rl._package_function", lambda: None)
    with pytest.raises(UsageError, match="cannot be imported"):
        qlearning_dataset(raw(4, timeouts=every(2, 4)), implementation="package")
    with pytest.raises(UsageError, match="give max_episode_steps"):
        qlearning_dataset(raw(4))


# --- files ----------------------------------------------------------------------------------------------


def test_a_file_without_next_observations(tmp_path: Path) -> None:
    """Three episodes: 4 steps cut, 3 terminated, 4 cut; then 2 more rows of a fourth."""
    terminals, timeouts = np.zeros(13, bool), np.zeros(13, bool)
    terminals[6], timeouts[[3, 10]] = True, True
    arrays = raw(13, terminals, timeouts)
    costs = np.arange(13.0)
    path = write(
        tmp_path / "data.hdf5", arrays | {"infos/cost": costs, "infos/goal": costs, "metadata/name": b"x"}
    )
    assert detect_format(path) == "d4rl"
    data = read_d4rl(path)
    rows = [0, 1, 2, 4, 5, 6, 7, 8, 9, 11]
    np.testing.assert_array_equal(data.rewards, arrays["rewards"][rows])
    np.testing.assert_array_equal(data.costs, rows)
    assert data.starts.tolist() == [0, 3, 6]
    assert data.episode_lengths.tolist() == [3, 3, 3]
    assert np.flatnonzero(data.terminals).tolist() == [5]
    assert np.flatnonzero(data.timeouts).tolist() == [2, 8]
    assert data.trailing == 1


def test_the_files_end_is_an_episodes_end_or_not(tmp_path: Path) -> None:
    costs = {"costs": np.zeros(8)}
    for last, trailing in ((7, 0), (None, 3)):
        terminals, timeouts = np.zeros(8, bool), np.zeros(8, bool)
        timeouts[3] = True
        for flags in (terminals, timeouts):
            changed = flags.copy()
            if last is not None:
                changed[last] = True
            arrays = raw(8, changed if flags is terminals else terminals, timeouts)
            if flags is timeouts:
                arrays["timeouts"] = changed
            data = read_d4rl(write(tmp_path / "data.hdf5", arrays | costs))
            assert (len(data), data.trailing) == (6, trailing)
    counted_data = read_d4rl(write(tmp_path / "data.hdf5", raw(8) | costs), max_episode_steps=4)
    assert (counted_data.num_episodes, counted_data.trailing, len(counted_data)) == (2, 0, 6)
    counted_data = read_d4rl(write(tmp_path / "data.hdf5", raw(8) | costs), max_episode_steps=5)
    assert (counted_data.num_episodes, counted_data.trailing, len(counted_data)) == (1, 2, 6)


@given(
    flags=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30),
    limit=st.integers(1, 7),
    with_timeouts=st.booleans(),
)
def test_no_episode_runs_over_a_row_that_was_left_out(
    tmp_path_factory: pytest.TempPathFactory,
    flags: list[tuple[bool, bool]],
    limit: int,
    with_timeouts: bool,
) -> None:
    terminals, timeouts = np.array(flags).T
    arrays = raw(len(flags), terminals, timeouts if with_timeouts else None)
    arrays["costs"] = np.arange(len(flags), dtype=np.float32)  # the row itself
    path = write(tmp_path_factory.mktemp("d4rl") / "data.hdf5", arrays)
    steps = None if with_timeouts else limit
    if not kept_rows(terminals, timeouts if with_timeouts else None, limit).any():
        with pytest.raises(DatasetError, match="no transition whose next"):
            read_d4rl(path, max_episode_steps=steps)
        return
    data = read_d4rl(path, max_episode_steps=steps)
    rows = data.costs.astype(int)
    ended = data.terminals | data.timeouts
    inside = np.flatnonzero(~ended[:-1])
    np.testing.assert_array_equal(rows[inside + 1], rows[inside] + 1)
    np.testing.assert_array_equal(data.next_observations, arrays["observations"][rows + 1].astype("f4"))


def test_stored_next_observations_keep_every_row(tmp_path: Path) -> None:
    terminals = np.zeros(10, bool)
    terminals[2] = True
    arrays = raw(10, terminals)
    following = np.random.default_rng(1).normal(size=(10, 3)).astype("f4")
    path = write(tmp_path / "data.hdf5", arrays | {"next_observations": following, "infos/cost": np.ones(10)})
    data = read_d4rl(path, max_episode_steps=4)
    np.testing.assert_array_equal(data.next_observations, following)
    assert np.flatnonzero(data.timeouts).tolist() == [6]
    assert (len(data), data.num_episodes, data.trailing) == (10, 2, 3)
    with pytest.raises(DatasetError, match="has no array 'timeouts'; give max_episode_steps"):
        read_d4rl(path)
    with pytest.raises(UsageError, match="at least one step"):
        read_d4rl(path, max_episode_steps=0)


def test_missing_costs_are_zero_with_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "data.hdf5", raw(10, timeouts=every(5, 10)))
    with pytest.warns(UserWarning, match="has no costs; all are zero"):
        assert not read_d4rl(path).costs.any()


def test_the_environment_tells_the_steps(tmp_path: Path) -> None:
    rows = 200  # of SpeedLimit's 100 steps
    path = write(tmp_path / "data.hdf5", raw(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(load(path, env="SpeedLimit-v0")) == 198
        with pytest.raises(DatasetError, match="give max_episode_steps"):
            load(path)
        with pytest.raises(UsageError, match="did you mean 'SpeedLimit-v0'"):
            load(path, env="SpeedLimit-v1")


@pytest.mark.parametrize("key", ["observations", "actions", "rewards", "terminals"])
def test_a_missing_array_is_named(tmp_path: Path, key: str) -> None:
    arrays = raw(10, timeouts=every(5, 10))
    del arrays[key]
    with pytest.raises(DatasetError, match=rf"has no array '{key}', which D4RL's layout needs"):
        read_d4rl(write(tmp_path / "data.hdf5", arrays))


def test_nothing_left_is_told(tmp_path: Path) -> None:
    for arrays in (raw(1, timeouts=[1]), raw(3, timeouts=[1, 1, 1])):
        with pytest.raises(DatasetError, match="no transition whose next observation is known"):
            read_d4rl(write(tmp_path / "data.hdf5", arrays | {"costs": np.zeros(len(arrays["rewards"]))}))
    with pytest.raises(DatasetError, match="holds no transition"):
        read_d4rl(write(tmp_path / "data.hdf5", raw(0, timeouts=[])))


# --- writing, and files that are looked at without being kept -------------------------------------------


def test_what_is_written_is_read_back_exactly(tmp_path: Path, maker: Any, same: Any) -> None:
    data = maker(4, trailing=3)
    path = tmp_path / "new" / "data.hdf5"
    told: list[tuple[int, int]] = []
    write_d4rl(path, data, progress=lambda *now: told.append(now))
    assert told[-1] == (data.nbytes, data.nbytes)
    assert detect_format(path) == "d4rl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # costs are found
        same(read_d4rl(path), data)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["infos/cost"], data.costs)
        assert "costs" not in file  # else it were DSRL's layout
    assert [p.name for p in path.parent.iterdir()] == ["data.hdf5"]
    report = validate(path)
    assert (report.format, report.episodes, report.trailing) == ("d4rl", 4, 3)
    with pytest.raises(DatasetError, match="nothing to write"):
        write_d4rl(path, data.select([]))


@pytest.mark.parametrize("flags", [{"timeouts": every(5, 23)}, {}], ids=["timeouts", "counted"])
def test_an_outline_has_the_same_episodes(tmp_path: Path, flags: dict[str, Any]) -> None:
    terminals = np.arange(23) % 9 == 6
    arrays = raw(23, terminals, **flags) | {"infos/cost": np.arange(23.0)}
    path = write(tmp_path / "data.hdf5", arrays)
    whole, outline = (read_d4rl(path, max_episode_steps=5, outline=light) for light in (False, True))
    for key in ("rewards", "costs", "terminals", "timeouts"):
        np.testing.assert_array_equal(getattr(outline, key), getattr(whole, key))
    for key in ("observations", "next_observations", "actions"):
        assert getattr(outline, key).shape == getattr(whole, key).shape
        assert np.isnan(getattr(outline, key)).all()


def test_all_faults_are_found(tmp_path: Path) -> None:
    arrays = raw(20, timeouts=every(5, 20))
    arrays["rewards"][[3, 7, 11]] = np.nan
    arrays["costs"] = np.zeros(19)
    del arrays["terminals"]
    path = write(tmp_path / "data.hdf5", {k: v for k, v in arrays.items() if k != "costs"})
    with h5py.File(path, "r+") as file:
        file["infos/cost"] = arrays["costs"]
    report, faults = examine(path)
    assert report is None
    assert [fault.removeprefix(str(path)) for fault in faults] == [
        " has no array 'terminals', which D4RL's layout needs; it holds actions, infos, observations, "
        "rewards, timeouts.",
        ": infos/cost has 19 rows and not 20; the arrays do not fit.",
        ": rewards is NaN, infinite or too large for float32 in row 3 and 2 more up to row 11; repair the "
        "file or get it again.",
    ]


def test_the_environment_is_asked_for_where_there_are_no_timeouts(tmp_path: Path) -> None:
    path = write(tmp_path / "data.hdf5", raw(20))
    with pytest.raises(DatasetError, match="no array 'timeouts'; give max_episode_steps or the environment"):
        validate(path)
    assert validate(path, env="SpeedLimit-v0").transitions == 19
