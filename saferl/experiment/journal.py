"""An append-only table on disk, for data too large to be written anew with every checkpoint.

A replay buffer of a million transitions holds hundreds of megabytes. Here its rows go to files
`chunk_000000.bin`, ... of a fixed number of rows (little-endian float32) in the order of their arrival,
each written once. What a checkpoint keeps is only how many rows there were and the SHA-256 of each chunk up
to that row, so it stays small and its cost is that of the rows since the last one. Files may be longer than
the newest checkpoint says (a kill between the two): `restore` cuts off what lies beyond, since it is done
again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from saferl.errors import CheckpointError, SaferlError

__all__ = ["RowJournal"]

_ROWS_PER_CHUNK = 65_536


class RowJournal:
    """Rows of float32, appended, described for a checkpoint, and read back verified.

    Args:
        directory: where the chunks lie; made when the first row comes.
        columns: floats a row.
        rows_per_chunk: rows a file; what a checkpoint says counts when it is restored.
    """

    def __init__(self, directory: Path, columns: int, rows_per_chunk: int = _ROWS_PER_CHUNK) -> None:
        self.directory = directory
        self.columns = columns
        self.rows_per_chunk = rows_per_chunk
        self.rows = 0
        """Rows appended so far."""
        self._digests: dict[int, str] = {}  # of full chunks
        self._hash = hashlib.sha256()  # of the last one, as far as it is filled
        self._file: IO[bytes] | None = None

    def append(self, rows: np.ndarray) -> None:
        """Write rows (M, columns) behind the others; they are safe once `sync` has returned.

        Raises:
            SaferlError: the disk is full or not writable.
        """
        rows = np.ascontiguousarray(rows, dtype="<f4")
        try:
            while len(rows):
                chunk, filled = divmod(self.rows, self.rows_per_chunk)
                part, rows = np.split(rows, [self.rows_per_chunk - filled])
                if self._file is None:
                    self.directory.mkdir(parents=True, exist_ok=True)
                    self._file = self._path(chunk).open("ab", buffering=0)
                payload = part.data.cast("B")
                _write_all(self._file, payload)
                self._hash.update(payload)
                self.rows += len(part)
                if self.rows % self.rows_per_chunk == 0:
                    self._digests[chunk] = self._hash.hexdigest()
                    self._hash = hashlib.sha256()
                    self.sync()
                    self.close()
        except OSError as error:
            raise SaferlError(
                f"{self.directory} could not be written ({error.strerror or error}); free some space, then "
                "resume the run."
            ) from error

    def sync(self) -> None:
        """Flush everything appended to the disk, as a checkpoint that describes it requires."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the open chunk; `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def clear(self) -> None:
        """Remove all chunks: what is appended next is row 0."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        self.rows, self._digests, self._hash = 0, {}, hashlib.sha256()

    def discard_before(self, row: int) -> None:
        """Remove the chunks of which no row from `row` on is part."""
        for chunk, path in self._chunks():
            if (chunk + 1) * self.rows_per_chunk <= row:
                path.unlink(missing_ok=True)
                self._digests.pop(chunk, None)

    def state_dict(self) -> dict[str, Any]:
        """How many rows there are and the digests of their chunks, as JSON values."""
        digests = {str(chunk): digest for chunk, digest in self._digests.items()}
        if self.rows % self.rows_per_chunk:
            digests[str(self.rows // self.rows_per_chunk)] = self._hash.hexdigest()
        return {
            "rows": self.rows,
            "columns": self.columns,
            "rows_per_chunk": self.rows_per_chunk,
            "sha256": digests,
        }

    def restore(self, state: Mapping[str, Any], first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Go back to what `state_dict` described, cutting off later rows; yields rows from `first` on.

        Args:
            state: `state_dict`'s answer.
            first: the first row that is asked for; chunks before it need not exist.

        Yields:
            the number of a row, and it with those that follow in its chunk (M, columns).

        Raises:
            CheckpointError: a chunk is missing, too short or damaged, or its rows are of another width.
        """
        if int(state["columns"]) != self.columns:
            raise CheckpointError(
                f"{self.directory} holds rows of {state['columns']} numbers, this run needs {self.columns}; "
                "resume with the environment and the constraints that the run was started with."
            )
        self.close()
        self.rows, self.rows_per_chunk = int(state["rows"]), int(state["rows_per_chunk"])
        self._digests, self._hash = {}, hashlib.sha256()
        for chunk in range(max(0, first) // self.rows_per_chunk, -(-self.rows // self.rows_per_chunk)):
            start = chunk * self.rows_per_chunk
            count = min(self.rows_per_chunk, self.rows - start)
            rows = self._read(chunk, count, str(state["sha256"].get(str(chunk))))
            skipped = max(0, first - start)
            yield start + skipped, rows[skipped:]
        for chunk, path in self._chunks():
            if chunk * self.rows_per_chunk >= self.rows:
                path.unlink()

    def _chunks(self) -> list[tuple[int, Path]]:
        return [(int(p.stem.removeprefix("chunk_")), p) for p in self.directory.glob("chunk_*.bin")]

    def _path(self, chunk: int) -> Path:
        return self.directory / f"chunk_{chunk:06d}.bin"

    def _read(self, chunk: int, count: int, digest: str) -> np.ndarray:
        """Rows (count, columns) of a chunk, verified; anything behind them is cut off."""
        path = self._path(chunk)
        size = count * self.columns * 4
        try:
            with path.open("rb") as file:
                payload = file.read(size)
            if len(payload) == size and path.stat().st_size > size:
                os.truncate(path, size)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); {_ADVICE}") from error
        found = hashlib.sha256(payload)
        if found.hexdigest() != digest:
            raise CheckpointError(f"{path} is damaged (its checksum does not match); {_ADVICE}")
        if count == self.rows_per_chunk:
            self._digests[chunk] = digest
        else:
            self._hash = found
        return np.frombuffer(payload, dtype="<f4").reshape(count, self.columns)


_ADVICE = "the run cannot go on from here, but its policy still loads: start a new run."


def _write_all(file: IO[bytes], payload: memoryview) -> None:
    """Write everything: an unbuffered file may take less than it is given."""
    while payload:
        payload = payload[file.write(payload) :]
