"""Damaged files give a valid data set or a DatasetError, and nothing else: no crash, no hang, no other error.

The files are read in a child process, so that a crash or a hang of the HDF5 library would be seen as such.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from saferl.envs.datasets import OfflineDataset, examine, hdf5, load, read_dsrl, write_dsrl, write_minari
from saferl.errors import DatasetError

PER_LAYOUT = 260
SECONDS = 120


def valid(data: OfflineDataset) -> bool:
    data.check_values()
    lengths = data.episode_lengths
    return len(data) > 0 and lengths.sum() + data.trailing == len(data) and (lengths > 0).all()


# --- mutations ----------------------------------------------------------------------------------------


def damage_bytes(raw: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(raw)
    kind = rng.integers(5)
    if kind == 0:
        for _ in range(rng.integers(1, 8)):
            changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del changed[rng.integers(len(changed)) :]
    elif kind == 2:  # the structure is mostly at the beginning
        for _ in range(rng.integers(1, 20)):
            changed[rng.integers(min(len(changed), 4096))] = int(rng.choice([0, 1, 127, 128, 255]))
    elif kind == 3:
        place = rng.integers(len(changed) - 8)
        changed[place : place + 8] = rng.bytes(8) if rng.random() < 0.5 else b"\xff" * 8
    else:
        source, place, size = (int(n) for n in rng.integers(0, len(changed) - 64, 3))
        size = 4 + size % 60
        changed[place : place + size] = changed[source : source + size]
    return bytes(changed)


def damage_contents(path: Path, rng: np.random.Generator) -> None:
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = str(rng.choice(names))
        kind = rng.integers(7)
        if kind == 0:
            del file[name]
            return
        if kind == 1:
            file.move(name, f"renamed{rng.integers(9)}")
            return
        if not isinstance(file[name], h5py.Dataset):
            return
        values = np.asarray(file[name][()])
        del file[name]
        if kind == 2:
            shapes: list[Any] = [(-1, 1), (1, -1), (-1,), (values.size, 1, 1)]
            file[name] = values.reshape(shapes[rng.integers(4)])
        elif kind == 3:
            file[name] = values[: rng.integers(len(values))]
        elif kind == 4:
            kinds = ["f8", "f2", ">f4", "i2", "u8", "c8", "S3", "?"]
            with np.errstate(invalid="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                file[name] = values.astype(kinds[rng.integers(len(kinds))])
        elif kind == 5:
            values = values.astype(np.float64)
            values.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e300, 2, -1])
            file[name] = values
        else:
            file[name] = [3, b"text", h5py.Empty("f4"), h5py.SoftLink("/nowhere")][rng.integers(4)]


def work(folder: Path, layout: int, seeds: range, told: Any) -> None:
    """Read damaged files, telling of each what came of it."""
    source = folder / f"{layout}.hdf5"
    raw = source.read_bytes()
    path = folder / f"{layout}-damaged.hdf5"
    warnings.simplefilter("ignore")
    for seed in seeds:
        rng = np.random.default_rng([layout, seed])
        told.send(f"{seed} began")
        if seed % 3:
            path.write_bytes(damage_bytes(raw, rng))
        else:
            path.write_bytes(raw)
            damage_contents(path, rng)
        try:
            answer = "valid" if valid(load(path, env="SpeedLimit-v0")) else "not valid"
        except DatasetError as error:
            answer = "refused" if str(path) in str(error) and "\n" not in str(error) else f"unclear: {error}"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        if seed % 2:
            other = examined(path)
            answer = answer if other == answer else f"{answer}, but examined it is {other}"
        told.send(answer)
    told.send("done")


def examined(path: Path) -> str:
    """The same answers from the search for all faults."""
    try:
        report, faults = examine(path, env="SpeedLimit-v0")
    except DatasetError as error:
        faults = [str(error)]
        report = None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if report is not None:
        return "valid" if not faults else "both"
    unclear = [fault for fault in faults if str(path) not in fault or "\n" in fault]
    return "refused" if faults and not unclear else f"unclear: {faults}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each layout, 0 and 1 DSRL's in the old and new HDF5 format, 2 D4RL's, 3 Minari's."""
    folder = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    rows = 120
    observations = rng.normal(size=(rows + 1, 6)).astype(np.float32)
    data = OfflineDataset(
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=rng.normal(size=(rows, 2)),
        rewards=rng.normal(size=rows),
        costs=rng.integers(0, 2, rows),
        terminals=np.zeros(rows),
        timeouts=np.arange(rows) % 20 == 19,
    )
    write_dsrl(folder / "0.hdf5", data)
    with h5py.File(folder / "1.hdf5", "w", libver="latest") as file:
        for key, array in data.arrays().items():
            file.create_dataset(key, data=array, compression="gzip", shuffle=True, fletcher32=True)
    with h5py.File(folder / "2.hdf5", "w") as file:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            file[key] = getattr(data, key)
        file["infos/cost"] = data.costs
    write_minari(folder / "minari", data)
    (folder / "minari" / "data" / "main_data.hdf5").rename(folder / "3.hdf5")
    return folder


@pytest.mark.parametrize("layout", range(4))
def test_damaged_files_are_refused_or_valid(sources: Path, layout: int) -> None:
    assert valid(load(sources / f"{layout}.hdf5"))
    process = multiprocessing.get_context("fork")
    receiver, sender = process.Pipe(duplex=False)
    child = process.Process(target=work, args=(sources, layout, range(PER_LAYOUT), sender))
    child.start()
    sender.close()
    answers: list[str] = []
    try:
        while not answers or answers[-1] != "done":
            assert receiver.poll(SECONDS), f"{answers[-1:]} and no answer"
            answers.append(receiver.recv())
    except EOFError:
        pytest.fail(f"the reader crashed: {answers[-1:]}, exit code {child.exitcode}")
    finally:
        child.kill()
        child.join()
    outcomes = answers[1:-1:2]
    assert len(outcomes) == PER_LAYOUT
    assert set(outcomes) == {"valid", "refused"}


def _links_to_itself(file: h5py.File) -> None:
    file["loop"] = h5py.SoftLink("/loop")
    file["rewards"] = h5py.SoftLink("/loop")


def _many_dimensions(file: h5py.File) -> None:
    file["rewards"] = np.zeros((1,) * 32)


def _nested(file: h5py.File) -> None:
    file.create_dataset("rewards", (120,), dtype=h5py.vlen_dtype(np.float32))


def _reference(file: h5py.File) -> None:
    file.create_dataset("rewards", (120,), dtype=h5py.ref_dtype)


def _big_block(file: h5py.File) -> None:
    file.create_dataset("rewards", (120,), "f4", maxshape=(None,), chunks=(2**29,), compression="gzip")


@pytest.mark.parametrize("edit", [_links_to_itself, _many_dimensions, _nested, _reference, _big_block])
def test_odd_but_legal_files_are_refused(
    sources: Path, tmp_path: Path, edit: Callable[[h5py.File], None]
) -> None:
    path = tmp_path / "data.hdf5"
    path.write_bytes((sources / "0.hdf5").read_bytes())
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        edit(file)
    with pytest.raises(DatasetError, match="rewards"):
        read_dsrl(path)


# --- older releases of HDF5 ---------------------------------------------------------------------------


def test_a_release_that_can_crash_is_tried_in_a_child_process(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5, "_SOUND", (99, 0, 0))
    monkeypatch.setattr(hdf5, "_rehearsed", set())
    path = tmp_path / "data.hdf5"
    path.write_bytes((sources / "0.hdf5").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "_REHEARSAL", "import os; os.abort()")
        with pytest.raises(DatasetError, match="it crashes the HDF5 library"):
            load(path)
        patch.setattr(hdf5, "_REHEARSAL", "import time; time.sleep(60)")
        patch.setattr(hdf5, "_REHEARSAL_SECONDS", 0.2)
        with pytest.raises(DatasetError, match="reading it does not end within 0 s"):
            load(path)
    assert valid(load(path))
    monkeypatch.setattr(hdf5, "_REHEARSAL", "import os; os.abort()")
    assert valid(load(path))  # not tried again
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DatasetError, match="it crashes"):
        load(path)


def test_the_rehearsal_reads_everything_and_raises_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    fill = hdf5.Column.fill

    def noted(self: hdf5.Column, *arguments: Any) -> None:
        read.append(self.name)
        fill(self, *arguments)

    monkeypatch.setattr(hdf5.Column, "fill", noted)
    hdf5.rehearse(str(sources / "2.hdf5"))
    assert sorted(read) == ["actions", "infos/cost", "observations", "rewards", "terminals", "timeouts"]
    path = tmp_path / "data.hdf5"
    for content in (b"", b"text", (sources / "0.hdf5").read_bytes()[:5000]):
        path.write_bytes(content)
        hdf5.rehearse(str(path))
