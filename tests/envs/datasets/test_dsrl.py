"""DSRL's layout: round trips, every fault that a file can have, and mapped arrays."""

from __future__ import annotations

import os
import re
import signal
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from saferl.envs.datasets import (
    OfflineDataset,
    detect_format,
    examine,
    hdf5,
    load,
    read_dsrl,
    validate,
    write_d4rl,
    write_dsrl,
    write_minari,
)
from saferl.envs.datasets.tasks import TASKS
from saferl.errors import DatasetError, SaferlError, UsageError

Edit = Callable[[h5py.File], object]


def edited(path: Path, dataset: OfflineDataset, edit: Edit) -> Path:
    write_dsrl(path, dataset)
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def put(key: str, values: Any) -> Edit:
    def edit(file: h5py.File) -> None:
        del file[key]
        file[key] = values

    return edit


# --- round trips --------------------------------------------------------------------------------------


def test_round_trip_is_exact_in_dsrls_own_layout(tmp_path: Path, maker: Any, same: Any) -> None:
    data = maker(4, trailing=3)
    path = tmp_path / "folder" / "data.hdf5"
    write_dsrl(path, data)
    same(read_dsrl(path), data)
    with h5py.File(path) as file:
        assert set(file) == set(data.arrays())
        for key, array in data.arrays().items():
            assert file[key].compression == "gzip"
            assert (file[key].shape, file[key].dtype) == (array.shape, array.dtype)
    assert [p.name for p in path.parent.iterdir()] == ["data.hdf5"]
    assert detect_format(path) == "dsrl"
    report = validate(path)
    assert (report.format, report.transitions, report.episodes, report.trailing) == ("dsrl", 83, 4, 3)
    assert not report.checksum


def test_columns_and_other_dtypes_are_read(tmp_path: Path, dataset: OfflineDataset, same: Any) -> None:
    def edit(file: h5py.File) -> None:
        for key, dtype in {
            "rewards": ">f4",
            "costs": "u1",
            "terminals": "f8",
            "timeouts": "i8",
            "observations": "f4",
        }.items():
            values = file[key][()].astype(dtype)
            put(key, values if key == "observations" else values[:, None])(file)

    path = edited(tmp_path / "data.hdf5", dataset, edit)
    same(read_dsrl(path), dataset)
    same(read_dsrl(path, memory_map=tmp_path / "arrays"), dataset)


def test_the_task_comes_from_the_argument_or_the_files_name(tmp_path: Path, maker: Any) -> None:
    data = maker(sizes=(7, 2))
    write_dsrl(tmp_path / "data.hdf5", data)
    official = tmp_path / TASKS["CarRun"].file_name
    write_dsrl(official, data)
    assert read_dsrl(tmp_path / "data.hdf5").task is None
    assert read_dsrl(tmp_path / "data.hdf5", task="BallRun").task is TASKS["BallRun"]
    assert read_dsrl(official).task is TASKS["CarRun"]
    with pytest.raises(DatasetError, match="observations have 7 components and AntRun's 33"):
        read_dsrl(official, task="AntRun")
    with pytest.raises(UsageError, match="did you mean"):
        read_dsrl(official, task="AntRum")


def test_blocks_that_do_not_fit_the_files_own(
    tmp_path: Path, maker: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saferl.envs.datasets.hdf5._BLOCK_BYTES", 512)
    data = maker(7, trailing=5)
    path = tmp_path / "data.hdf5"
    done: list[tuple[int, int]] = []
    for chunks in (1, 9, 1000):
        with h5py.File(path, "w") as file:
            for key, array in data.arrays().items():
                rows = (min(chunks, len(array)), *((2,) if array.ndim == 2 else ()))
                file.create_dataset(key, data=array, chunks=rows, compression="gzip", shuffle=True)
        done.clear()
        same(read_dsrl(path, progress=lambda *now: done.append(now)), data)
        assert done[-1] == (data.nbytes, data.nbytes)
        assert validate(path).episodes == 7


# --- writing ------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_earlier_file(
    tmp_path: Path, dataset: OfflineDataset, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.hdf5"
    write_dsrl(path, dataset)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(DatasetError, match=r"data\.hdf5 could not be written \(No space left on device\)"):
        write_dsrl(path, dataset.select([0]))
    monkeypatch.undo()
    same(read_dsrl(path), dataset)
    assert os.listdir(tmp_path) == ["data.hdf5"]  # noqa: PTH208


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path, dataset: OfflineDataset) -> None:
    rewards = dataset.rewards.copy()
    rewards[7] = np.nan
    with pytest.raises(DatasetError, match=r"rewards\[7\] is not finite"):
        write_dsrl(tmp_path / "data.hdf5", dataset.replace(rewards=rewards))
    with pytest.raises(DatasetError, match="nothing to write"):
        write_dsrl(tmp_path / "data.hdf5", dataset.select([]))
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="choose another folder"):
        write_dsrl(tmp_path / "file" / "data.hdf5", dataset)


# --- faults -------------------------------------------------------------------------------------------

KEYS = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")
NAN = np.zeros(100, np.float32)
NAN[[41, 60]] = np.nan
HUGE = np.zeros((100, 4))
HUGE[3, 2] = 1e39


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_array_is_named(tmp_path: Path, dataset: OfflineDataset, key: str) -> None:
    path = edited(tmp_path / "data.hdf5", dataset, lambda file: file.pop(key))
    with pytest.raises(
        DatasetError, match=rf"has no array '{key}', which DSRL's layout needs; it holds [a-c]"
    ):
        read_dsrl(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("rewards", NAN), "rewards is NaN, infinite or too large for float32 in row 41"),
        (put("observations", HUGE), "observations is NaN, infinite or too large for float32 in row 3"),
        (put("terminals", np.arange(100) // 50 * 2), "terminals is neither 0 nor 1 in row 50"),
        (put("timeouts", NAN), "timeouts is neither 0 nor 1 in row 41"),
        (put("costs", np.zeros(99)), "costs has 99 rows and not 100"),
        (put("rewards", np.zeros((100, 2))), r"rewards has shape \(100, 2\); it must be \(transitions,\)"),
        (put("observations", np.zeros(100)), r"observations has shape \(100,\); it must be"),
        (put("observations", np.zeros((100, 3))), r"next_observations has shape \(100, 4\) and observations"),
        (put("actions", np.zeros((100, 2, 1))), r"actions has shape \(100, 2, 1\)"),
        (put("actions", np.zeros((100, 0))), "actions has rows without components"),
        (put("actions", h5py.Empty("f4")), "actions has shape None"),
        (put("rewards", 1.0), r"rewards has shape \(\)"),
        (put("rewards", np.array([b"1"] * 100)), r"rewards has dtype \|S1; it must be numeric"),
        (put("rewards", np.zeros(100, "c8")), "rewards has dtype complex64"),
        (put("rewards", np.zeros(100, [("a", "f4")])), "rewards has dtype"),
        (put("rewards", h5py.SoftLink("/costs")), "rewards is a link"),
        (put("rewards", h5py.ExternalLink("/etc/passwd", "/a")), "rewards is a link"),
    ],
)
def test_faults_are_named_with_array_and_row(
    tmp_path: Path, dataset: OfflineDataset, edit: Edit, message: str
) -> None:
    path = edited(tmp_path / "data.hdf5", dataset, edit)
    for read in (read_dsrl, validate, lambda p: read_dsrl(p, memory_map=tmp_path / "arrays")):
        with pytest.raises(DatasetError, match=f"{re.escape(str(path))}: {message}"):
            read(path)
    arrays = tmp_path / "arrays"
    assert not arrays.exists() or not list(arrays.iterdir())


def test_a_group_and_data_of_other_files_are_refused(tmp_path: Path, dataset: OfflineDataset) -> None:
    def group(file: h5py.File) -> None:
        del file["costs"]
        file.create_group("costs")

    def elsewhere(file: h5py.File) -> None:
        del file["costs"]
        file.create_dataset("costs", (100,), "f4", external=[(str(tmp_path / "secret"), 0, 400)])

    def virtual(file: h5py.File) -> None:
        del file["costs"]
        layout = h5py.VirtualLayout((100,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "costs", (100,))
        file.create_virtual_dataset("costs", layout)

    for edit, message in (
        (group, "costs is a group"),
        (elsewhere, "costs is stored in another file"),
        (virtual, "costs is stored in another file"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_dsrl(edited(tmp_path / "data.hdf5", dataset, edit))


def test_a_small_file_cannot_claim_much_memory(tmp_path: Path, dataset: OfflineDataset) -> None:
    def claim(file: h5py.File) -> None:
        for key in KEYS:
            shape = (10**12, 4) if "obs" in key else (10**12, 2) if key == "actions" else (10**12,)
            del file[key]
            file.create_dataset(key, shape, "f4", chunks=(100, 2)[: len(shape)], compression="gzip")

    with pytest.raises(DatasetError, match="observations claims 16000000000000 bytes, more than the file"):
        read_dsrl(edited(tmp_path / "data.hdf5", dataset, claim))


@pytest.mark.parametrize("kept", [1, 50, 700, 5000])
def test_a_truncated_file_is_told(tmp_path: Path, maker: Any, kept: int) -> None:
    path = tmp_path / "data.hdf5"
    write_dsrl(path, maker(20))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DatasetError, match=r"the file is damaged|is not an HDF5 file"):
        read_dsrl(path)


def test_damaged_values_do_not_pass(tmp_path: Path, maker: Any) -> None:
    """What gzip protects: a changed byte inside the compressed numbers is a fault, not another number."""
    path = tmp_path / "data.hdf5"
    write_dsrl(path, maker(40))
    with h5py.File(path) as file:
        offset = file["observations"].id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[offset + 1000] ^= 4
    path.write_bytes(raw)
    with pytest.raises(DatasetError, match="observations cannot be read"):
        read_dsrl(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; get it again"),
        (b"<!doctype html><title>404</title>", "is not an HDF5 file; it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"PK\x03\x04", "is not an HDF5 file"),
    ],
)
def test_other_files_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.hdf5"
    path.write_bytes(content)
    for read in (read_dsrl, validate, detect_format, lambda p: read_dsrl(p, memory_map=tmp_path)):
        with pytest.raises(DatasetError, match=message):
            read(path)


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    for memory_map in (False, True):
        with pytest.raises(DatasetError, match="does not exist"):
            read_dsrl(tmp_path / "no.hdf5", memory_map=memory_map)
        with pytest.raises(DatasetError, match="is not a file"):
            read_dsrl(tmp_path, memory_map=memory_map)


def test_a_file_without_rows_or_without_ends(tmp_path: Path, maker: Any) -> None:
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        for key in KEYS:
            file[key] = np.zeros((0, 2) if "obs" in key or key == "actions" else 0)
    with pytest.raises(DatasetError, match="holds no transition"):
        read_dsrl(path)
    data = maker(0, trailing=9)
    write_dsrl(path, data)
    assert (read_dsrl(path).num_episodes, read_dsrl(path).trailing) == (0, 9)
    assert (validate(path).episodes, validate(path).trailing) == (0, 9)


def test_all_faults_are_found_at_once(tmp_path: Path, dataset: OfflineDataset) -> None:
    def spoil(file: h5py.File) -> None:
        put("rewards", NAN)(file)
        put("terminals", np.arange(100) // 50 * 2)(file)
        put("costs", np.zeros(99))(file)
        del file["timeouts"]

    path = edited(tmp_path / "data.hdf5", dataset, spoil)
    told: list[tuple[int, int]] = []
    report, faults = examine(path, progress=lambda *now: told.append(now))
    assert report is None
    assert told[-1][0] == told[-1][1] > 0
    for fault, expected in zip(
        faults,
        (
            f"{path}: costs has 99 rows and not 100",
            f"{path} has no array 'timeouts'",
            f"{path}: rewards is NaN, infinite or too large for float32 in row 41 and 1 more up to row 60; ",
            f"{path}: terminals is neither 0 nor 1 in row 50 and 49 more up to row 99; repair",
        ),
        strict=True,
    ):
        assert fault.startswith(expected)


def test_an_outline_takes_no_memory(tmp_path: Path, maker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of what NumPy allocates: NumPy tells tracemalloc, the HDF5 library does not."""
    monkeypatch.setattr(hdf5, "_BLOCK_BYTES", 1 << 16)
    data = maker(30, 500, trailing=7, sizes=(40, 2))
    write_dsrl(tmp_path / "dsrl.hdf5", data)
    write_d4rl(tmp_path / "d4rl.hdf5", data)
    write_d4rl(tmp_path / "bare.hdf5", data)
    with h5py.File(tmp_path / "bare.hdf5", "r+") as file:
        del file["next_observations"]
    write_minari(tmp_path / "minari", data.whole_episodes())
    small = sum(getattr(data, key).nbytes for key in ("rewards", "costs", "terminals", "timeouts"))
    assert data.nbytes > 20 * small
    for name in ("dsrl.hdf5", "d4rl.hdf5", "bare.hdf5", "minari"):
        load(tmp_path / name, outline=True)  # what is imported
        for look in (lambda path: load(path, outline=True), examine):
            tracemalloc.start()
            try:
                look(tmp_path / name)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < data.nbytes / 3, (name, look)
        outline = load(tmp_path / name, outline=True)
        whole = load(tmp_path / name)
        assert (outline.num_episodes, outline.observation_size, outline.action_size) == (30, 40, 2)
        for key in ("rewards", "costs", "terminals", "timeouts"):
            np.testing.assert_array_equal(getattr(outline, key), getattr(whole, key))
        assert np.isnan(outline.observations[::50]).all()


def test_an_array_behind_a_filter_that_is_not_there(tmp_path: Path, dataset: OfflineDataset) -> None:
    """It is not damaged: another HDF5 library reads it."""
    path = tmp_path / "data.hdf5"
    write_dsrl(path, dataset)
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((100,))
        plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)  # zstd's number; optional, else it is not made
        space = h5py.h5s.create_simple((100,))
        made = h5py.h5d.create(file.id, b"rewards", h5py.h5t.NATIVE_FLOAT, space, plan)
        h5py.Dataset(made).id.write_direct_chunk((0,), dataset.rewards.tobytes(), 0)
    if h5py.h5z.filter_avail(32015):
        pytest.skip("this filter is installed here")
    expected = r"rewards is packed by the filter \S+, which is not installed; write the file anew with gzip"
    for read in (read_dsrl, validate):
        with pytest.raises(DatasetError, match=expected):
            read(path)


def test_what_a_signal_raises_in_a_callback_of_the_library_is_not_lost() -> None:
    class Thing:
        pass

    def stop(_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    went_on = []

    @hdf5.faults(Path("data.hdf5"))
    def call_of_the_library() -> None:
        thing = Thing()
        reference = weakref.ref(thing, stop)
        del thing
        assert reference() is None
        went_on.append(True)  # to the end of the call

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        call_of_the_library()
    assert went_on
    assert signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor(1) as pool:  # in which no handler can be set

        def call() -> int:
            with hdf5.faults(Path("data.hdf5")):
                return 3

        assert pool.submit(call).result() == 3


# --- mapped arrays ------------------------------------------------------------------------------------


def test_mapped_arrays_are_unpacked_once_and_anew_when_the_file_changes(
    tmp_path: Path, maker: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "cache"))
    first, second = maker(seed=1), maker(6, seed=2)
    path = tmp_path / "data.hdf5"
    write_dsrl(path, first)
    data = read_dsrl(path, memory_map=True)
    same(data, first)
    assert isinstance(data.observations, np.memmap)
    assert not data.observations.flags.writeable
    folders = list((tmp_path / "cache" / "arrays").iterdir())
    assert len(folders) == 1

    def never(*_: Any) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("saferl.envs.datasets.hdf5.Column.fill", never)
        same(read_dsrl(path, memory_map=True), first)

    write_dsrl(path, second)
    same(read_dsrl(path, memory_map=True), second)
    same(data, first)  # who still maps the old arrays keeps them
    assert list((tmp_path / "cache" / "arrays").iterdir()) == folders

    rewards = folders[0] / "rewards.npy"
    rewards.write_bytes(rewards.read_bytes()[:-40])  # a disk lost a piece
    same(read_dsrl(path, memory_map=True), second)


def test_mapped_arrays_need_space(
    tmp_path: Path, dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.hdf5"
    write_dsrl(path, dataset)
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 100})
        patch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(DatasetError, match="free some, or choose another folder with memory_map"):
            read_dsrl(path, memory_map=tmp_path / "arrays")
    (tmp_path / "file").touch()
    with pytest.raises(SaferlError, match="could not be unpacked"):
        read_dsrl(path, memory_map=tmp_path / "file")


def test_the_packages_reader_reads_what_is_written(
    tmp_path: Path, maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline_env = pytest.importorskip("dsrl.offline_env")
    import gymnasium as gym

    data = maker(4, trailing=3)
    path = tmp_path / "data.hdf5"
    write_dsrl(path, data)
    env = offline_env.OfflineEnv()
    env.observation_space = gym.spaces.Box(-1, 1, (4,))
    env.action_space = gym.spaces.Box(-1, 1, (2,))
    theirs = env.get_dataset(str(path))
    for key, array in data.arrays().items():
        np.testing.assert_array_equal(theirs[key], array)
        assert theirs[key].dtype == array.dtype
