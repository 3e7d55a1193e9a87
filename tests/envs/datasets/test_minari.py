"""Minari's layout: conversion without loss, costs, and the faults of episodes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from saferl.envs.datasets import (
    OfflineDataset,
    detect_format,
    examine,
    load,
    read_dsrl,
    read_minari,
    validate,
    write_dsrl,
    write_minari,
)
from saferl.envs.datasets.tasks import TASKS
from saferl.errors import DatasetError

Edit = Callable[[h5py.File], object]


def main_file(folder: Path) -> Path:
    return folder / "data" / "main_data.hdf5"


def put(key: str, values: Any) -> Edit:
    def edit(file: h5py.File) -> None:
        del file[key]
        file[key] = values

    return edit


def edited(folder: Path, data: OfflineDataset, edit: Edit) -> Path:
    write_minari(folder, data)
    with h5py.File(main_file(folder), "r+") as file:
        edit(file)
    return folder


def test_conversion_is_exact_both_ways(tmp_path: Path, maker: Any, same: Any) -> None:
    data = maker(12)  # episode_10 comes after episode_9
    write_dsrl(tmp_path / "first.hdf5", data)
    write_minari(tmp_path / "minari", read_dsrl(tmp_path / "first.hdf5"))
    back = read_minari(tmp_path / "minari")
    same(back, data)
    write_dsrl(tmp_path / "second.hdf5", back)
    assert (tmp_path / "first.hdf5").read_bytes() == (tmp_path / "second.hdf5").read_bytes()
    write_minari(tmp_path / "again", back)
    with h5py.File(main_file(tmp_path / "minari")) as one, h5py.File(main_file(tmp_path / "again")) as two:
        names: list[str] = []
        one.visit(names.append)
        assert len(names) == 12 * 8
        for name in names:
            if isinstance(one[name], h5py.Dataset):
                np.testing.assert_array_equal(one[name][()], two[name][()])


def test_the_layout(tmp_path: Path, maker: Any) -> None:
    data = maker(3, sizes=(7, 2)).replace(task=TASKS["CarRun"])
    write_minari(tmp_path / "data", data, dataset_id="safe/carrun-v1")
    with h5py.File(main_file(tmp_path / "data")) as file:
        group = file["episode_1"]
        assert dict(group.attrs) == {"id": 1, "total_steps": 20}
        assert group["observations"].shape == (21, 7)
        assert group["infos/cost"].shape == (21,)
        assert group["infos/cost"][0] == 0
        np.testing.assert_array_equal(group["infos/cost"][1:], data.costs[20:40])
        np.testing.assert_array_equal(group["observations"][20], data.next_observations[39])
    metadata = json.loads((tmp_path / "data" / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == "safe/carrun-v1"
    assert (metadata["total_episodes"], metadata["total_steps"]) == (3, 60)
    assert metadata["cost_limits"] == [10, 20, 40]
    assert metadata["max_episode_cost"] == data.episode_costs.max()
    assert metadata["ref_max_score"] == TASKS["CarRun"].max_episode_reward
    for place in (tmp_path / "data", tmp_path / "data" / "data", main_file(tmp_path / "data")):
        assert detect_format(place) == "minari"
        assert load(place).task is TASKS["CarRun"]
        assert validate(place).episodes == 3
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_costs_without_one_for_the_reset_and_none_at_all(tmp_path: Path, maker: Any, same: Any) -> None:
    data = maker(2)

    def shorten(file: h5py.File) -> None:
        for name in ("episode_0", "episode_1"):
            put(f"{name}/infos/cost", file[f"{name}/infos/cost"][1:])(file)

    same(read_minari(edited(tmp_path / "short", data, shorten)), data)

    def remove(file: h5py.File) -> None:
        for name in ("episode_0", "episode_1"):
            del file[f"{name}/infos"]

    folder = edited(tmp_path / "none", data, remove)
    with pytest.warns(UserWarning, match="has no costs; all are zero"):
        same(read_minari(folder), data.replace(costs=np.zeros(40)))


def test_an_episode_without_an_end_counts_as_cut(tmp_path: Path, maker: Any) -> None:
    folder = edited(tmp_path / "data", maker(3), put("episode_2/terminations", np.zeros(20)))
    back = read_minari(folder)
    assert back.timeouts[59]
    assert not back.terminals[59]
    assert (back.num_episodes, back.trailing) == (3, 0)


def test_what_would_be_lost_is_not_written(tmp_path: Path, maker: Any, same: Any) -> None:
    data = maker(2, trailing=3)
    with pytest.raises(DatasetError, match=r"the last 3 transitions .* whole_episodes\(\)"):
        write_minari(tmp_path / "data", data)
    write_minari(tmp_path / "data", data.whole_episodes())
    with pytest.raises(DatasetError, match="exists already"):
        write_minari(tmp_path / "data", data.whole_episodes())
    following = data.next_observations.copy()
    following[7, 1] += 1e-6
    broken = data.replace(next_observations=following).whole_episodes()
    with pytest.raises(DatasetError, match=r"row 7 of .* has another next observation"):
        write_minari(tmp_path / "other", broken)
    with pytest.raises(DatasetError, match="no whole episode"):
        write_minari(tmp_path / "other", data.select([]))
    following[7, 1] -= 1e-6
    following[19] += 1  # the last of an episode is free
    ending = data.replace(next_observations=following).whole_episodes()
    write_minari(tmp_path / "other", ending)
    same(read_minari(tmp_path / "other").select([1]), ending.select([1]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "other"]


def test_a_data_set_is_replaced_on_request_and_nothing_else_is(
    tmp_path: Path, maker: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = maker(2), maker(3, seed=1)
    folder = tmp_path / "data"
    write_minari(folder, first)
    write_minari(folder, second, overwrite=True)
    same(read_minari(folder), second)
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == folder and self.name.endswith(".tmp"):
            raise KeyboardInterrupt  # when the earlier folder is out of the way
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_minari(folder, first, overwrite=True)
    same(read_minari(folder), second)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert sorted(p.name for p in folder.rglob("*")) == ["data", "main_data.hdf5", "metadata.json"]
    (folder / "notes.txt").touch()
    for place in (folder, tmp_path, folder / "notes.txt"):
        with pytest.raises(DatasetError, match="it is not replaced"):
            write_minari(place, first, overwrite=True)
    same(read_minari(folder), second)


SHIFTED = np.zeros(20, bool)
SHIFTED[4] = True
NAN = np.zeros(20)
NAN[11] = np.nan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file: file["episode_1"].pop("actions"), "episode_1 has no array 'actions'"),
        (lambda file: file["episode_1"].pop("infos"), "episode_1 has no infos/cost and others have"),
        (put("episode_1/infos/cost", np.zeros(18)), "episode_1/infos/cost has 18 rows; an episode of 20"),
        (
            put("episode_1/rewards", NAN),
            "episode_1/rewards is NaN, infinite or too large for float32 in row 11",
        ),
        (put("episode_1/observations", np.zeros((20, 4))), "episode_1/observations has 20 rows and not 21"),
        (put("episode_1/actions", np.zeros((20, 3))), "episode_1/actions has rows of 3 components and those"),
        (put("episode_1/actions", np.zeros(20)), r"episode_1/actions has shape \(20,\)"),
        (put("episode_1/truncations", SHIFTED), "episode_1 ends in row 4 of 20"),
        (put("episode_1/terminations", SHIFTED * 2), "episode_1/terminations is neither 0 nor 1 in row 4"),
        (put("episode_1", np.zeros(3)), "episode_1 has no array 'rewards'"),
    ],
)
def test_faults_are_named_with_episode_and_row(tmp_path: Path, maker: Any, edit: Edit, message: str) -> None:
    folder = edited(tmp_path / "data", maker(3), edit)
    for read in (read_minari, load, validate):
        with pytest.raises(DatasetError, match=re.escape(f"{main_file(folder)}: ") + message):
            read(folder)


def test_all_faults_are_found_at_once(tmp_path: Path, maker: Any) -> None:
    def spoil(file: h5py.File) -> None:
        file["episode_0"].pop("actions")
        put("episode_1/rewards", NAN)(file)
        put("episode_1/infos/cost", np.full(21, np.inf))(file)
        put("episode_2/truncations", SHIFTED)(file)

    folder = edited(tmp_path / "data", maker(4), spoil)
    (folder / "data" / "metadata.json").write_text("[]")
    told: list[tuple[int, int]] = []
    report, faults = examine(folder, progress=lambda *now: told.append(now))
    assert report is None
    main = main_file(folder)
    for fault, expected in zip(
        faults,
        (
            f"{folder / 'data' / 'metadata.json'} is damaged",
            f"{main}: episode_0 has no array 'actions'",
            f"{main}: episode_1/rewards is NaN, infinite or too large for float32 in row 11; repair",
            f"{main}: episode_1/infos/cost is NaN, infinite or too large for float32 in row 0 and 20 more up",
            f"{main}: episode_2 ends in row 4 of 20",
        ),
        strict=True,
    ):
        assert fault.startswith(expected)
    done = [now for now, _ in told]
    assert done == sorted(done)
    assert done[-1] <= told[-1][1] == main.stat().st_size


def test_dict_observations_are_told(tmp_path: Path, maker: Any) -> None:
    def nest(file: h5py.File) -> None:
        values = file["episode_0/observations"][()]
        del file["episode_0/observations"]
        file["episode_0/observations/lidar"] = values

    with pytest.raises(DatasetError, match="episode_0/observations is a group; it must be an array"):
        read_minari(edited(tmp_path / "data", maker(1), nest))


def test_no_episode_no_file_and_other_formats(tmp_path: Path, maker: Any) -> None:
    folder = edited(tmp_path / "data", maker(1), lambda file: file.pop("episode_0"))
    with pytest.raises(DatasetError, match="holds no episode"):
        read_minari(folder)
    with pytest.raises(DatasetError, match="a folder without a Minari data set"):
        load(tmp_path)
    with pytest.raises(DatasetError, match=r"holds no main_data\.hdf5"):
        read_minari(tmp_path)
    metadata = folder / "data" / "metadata.json"
    for text, message in (
        ('{"data_format": "arrow"}', "tells of the format 'arrow'"),
        ("[]", "is damaged"),
        ("{", "is damaged"),
    ):
        metadata.write_text(text)
        with pytest.raises(DatasetError, match=message):
            read_minari(folder)


def test_one_array_under_many_names_is_no_way_to_fill_the_memory(tmp_path: Path, maker: Any) -> None:
    def multiply(file: h5py.File) -> None:
        group = file["episode_0"]
        for key, shape in {"observations": (20_001, 4), "actions": (20_000, 2)}.items():
            del group[key]
            group.create_dataset(key, shape, "f4", chunks=(1000, 2), compression="gzip")
        for key in ("rewards", "terminations", "truncations"):
            del group[key]
            group.create_dataset(key, (20_000,), "f4", chunks=(1000,), compression="gzip")
        for number in range(1, 400):
            file[f"episode_{number}"] = group

    folder = edited(tmp_path / "data", maker(1).replace(), multiply)
    with h5py.File(main_file(folder), "r+") as file:
        del file["episode_0/infos"]
    with pytest.raises(DatasetError, match="claims more data than the file can hold"):
        read_minari(folder)


def test_minari_itself_reads_what_is_written(tmp_path: Path, maker: Any) -> None:
    minari = pytest.importorskip("minari")
    data = maker(4)
    write_minari(tmp_path / "data", data, dataset_id="safe/data-v0")
    theirs = minari.MinariDataset(tmp_path / "data" / "data")
    assert (theirs.total_episodes, theirs.total_steps) == (4, 80)
    for number, episode in enumerate(theirs.iterate_episodes()):
        one = data.select([number])
        np.testing.assert_array_equal(episode.observations[:-1], one.observations)
        np.testing.assert_array_equal(episode.observations[1:], one.next_observations)
        np.testing.assert_array_equal(episode.actions, one.actions)
        np.testing.assert_array_equal(episode.rewards, one.rewards)
        np.testing.assert_array_equal(episode.terminations, one.terminals)
        np.testing.assert_array_equal(episode.truncations, one.timeouts)
        np.testing.assert_array_equal(episode.infos["cost"][1:], one.costs)
