"""The journal: what was appended comes back, later rows are cut off, damage and full disks are named."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saferl.errors import CheckpointError, SaferlError
from saferl.experiment import journal
from saferl.experiment.journal import RowJournal

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


def filled(folder: Path, count: int = 20, sizes: tuple[int, ...] = (3, 1, 7)) -> RowJournal:
    made, start, i = RowJournal(folder, 3, rows_per_chunk=4), 0, 0
    while start < count:
        size = min(sizes[i % len(sizes)], count - start)
        made.append(ROWS[start : start + size])
        start, i = start + size, i + 1
    return made


def read(folder: Path, state: dict[str, Any], first: int = 0) -> tuple[RowJournal, np.ndarray]:
    again = RowJournal(folder, 3, rows_per_chunk=4)
    parts = list(again.restore(state, first))
    assert [start for start, _ in parts] == [
        max(first, start) for start in range(max(0, first) // 4 * 4, state["rows"], 4)
    ]
    return again, np.concatenate([np.empty((0, 3)), *(rows for _, rows in parts)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    count=st.integers(0, 20),
    first=st.integers(-3, 20),
)
def test_rows_come_back_whatever_the_portions(
    sizes: list[int], count: int, first: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    state = filled(folder, count, tuple(sizes)).state_dict()
    assert state["rows"] == count
    _, rows = read(folder, state, min(first, count))
    np.testing.assert_array_equal(rows, ROWS[max(0, min(first, count)) : count])


@pytest.mark.parametrize("at", [0, 3, 4, 11, 12])
def test_rows_after_the_checkpoint_are_cut_off_and_written_again(at: int, tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole")
    first = filled(tmp_path / "broken", at)
    state = first.state_dict()
    first.append(ROWS[at:15] + 100)  # what a killed process had written beyond its checkpoint
    again, _ = read(tmp_path / "broken", state)
    assert again.state_dict() == state
    again.append(ROWS[at:])
    assert again.state_dict() == whole.state_dict()
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_damaged_a_short_and_a_missing_chunk_are_named(tmp_path: Path) -> None:
    state = filled(tmp_path, 10).state_dict()
    path = tmp_path / "chunk_000001.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"chunk_000001.bin is damaged"):
        read(tmp_path, state)
    path.write_bytes(good[:-4])
    with pytest.raises(CheckpointError, match=r"chunk_000001.bin is damaged"):
        read(tmp_path, state)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"chunk_000001.bin cannot be read"):
        read(tmp_path, state)
    _, rows = read(tmp_path, state, first=8)  # not needed from here on
    np.testing.assert_array_equal(rows, ROWS[8:10])


def test_rows_of_another_width_are_refused(tmp_path: Path) -> None:
    state = filled(tmp_path).state_dict()
    with pytest.raises(CheckpointError, match="holds rows of 3 numbers, this run needs 5"):
        list(RowJournal(tmp_path, 5).restore(state))


def test_only_chunks_that_no_one_needs_are_discarded(tmp_path: Path) -> None:
    made = filled(tmp_path, 18)
    made.discard_before(11)
    assert sorted(files(tmp_path)) == [f"chunk_{i:06d}.bin" for i in (2, 3, 4)]
    _, rows = read(tmp_path, made.state_dict(), first=11)
    np.testing.assert_array_equal(rows, ROWS[11:18])
    made.clear()
    assert made.rows == 0
    assert not tmp_path.exists()


def test_a_full_disk_is_reported_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(tmp_path, 6)
    state = made.state_dict()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_write_all", full)
        with pytest.raises(SaferlError, match=r"No space left on device.*resume the run"):
            made.append(ROWS[6:])
    _, rows = read(tmp_path, state)
    np.testing.assert_array_equal(rows, ROWS[:6])
