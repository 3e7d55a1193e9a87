"""Reading HDF5 files that nobody vouches for, block by block, and writing them in one step.

A damaged or hostile file must end in a `DatasetError`, not in a crash, a hang, or memory that runs out:
every call into the HDF5 library is guarded, sizes are compared with the file's own before anything is
allocated, and a file may not refer to other files (links, external storage, virtual data).

HDF5 2.0 neither crashed nor hung on any of 340,000 files damaged at random, so its files are read in this
process. Release 1.14.2 crashed twice and hung once in 60,000. Where h5py brings a release before 2.0, every
file is first read in a child process, which may crash or be stopped, at the price of reading it twice.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferl.envs.datasets.transitions import FLAGS, bad_rows
from saferl.errors import DatasetError

__all__ = [
    "Column",
    "Progress",
    "column",
    "faults",
    "find_faults",
    "interrupts_at_the_end",
    "missing",
    "names",
    "open_file",
    "rehearse",
    "reporter",
    "room",
    "sync",
    "unread",
    "write_column",
    "write_file",
]

#: Called with bytes done and in all.
Progress = Callable[[int, int], object]

_BLOCK_BYTES = 16 << 20  # read at a time, where the file's own blocks are not larger
_SOUND = (2, 0, 0)  # the first release of HDF5 that damaged files do not crash
_REHEARSAL = "import sys; from saferl.envs.datasets import hdf5; hdf5.rehearse(sys.argv[1])"
_REHEARSAL_SECONDS = 60.0
_REHEARSAL_SPEED = 5e6  # bytes of the file a second, at least
_MOST_DEFLATED = 1100  # deflate makes at most 1032 bytes of one
_SLACK = 1 << 20  # bytes that a data set of a tiny file may have beyond that
# What h5py raises for damaged files; anything else is a mistake of ours.
_FAULTS = (
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    SystemError,
)


@contextlib.contextmanager
def interrupts_at_the_end() -> Iterator[None]:
    """Hold Ctrl-C (and SIGTERM where it has a handler) back until a call into the HDF5 library is over.

    The first Python code that runs in such a call is most often a weak reference's callback of h5py's.
    What a signal raises there is dropped, so that the work would go on as if nobody had asked it to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are another thread's
        return
    held: list[tuple[int, Any]] = []
    handlers: dict[int, Callable[..., Any]] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
    try:
        for caught in handlers:
            signal.signal(caught, lambda *now: held.append(now))
        yield
    finally:
        for caught, handler in handlers.items():
            signal.signal(caught, handler)
        for caught, frame in held:
            handlers[caught](caught, frame)


@contextlib.contextmanager
def faults(path: Path, what: str = "") -> Iterator[None]:
    """Turn what h5py raises for a damaged file into a DatasetError that names the file and `what` in it."""
    try:
        with interrupts_at_the_end():
            yield
    except _FAULTS as error:
        # "Unable to open file (why: a, b)" is most often what HDF5 says: keep the why.
        text = " ".join(str(error).split())
        found = re.search(r"\((.+)\)", text)
        raise DatasetError(
            f"{path}{f': {what}' if what else ''} cannot be read ({found[1] if found else text}); "
            "the file is damaged, get it again."
        ) from error


_rehearsed: set[tuple[str, int, int]] = set()


@contextlib.contextmanager
def open_file(path: Path, *, rehearsal: bool = True) -> Iterator[Any]:
    """Open an HDF5 file for reading, with `rehearsal` in a child process first where that is needed.

    Raises:
        DatasetError: there is no such file, it cannot be read, is empty, damaged or no HDF5.
    """
    import h5py

    if not path.exists():
        raise DatasetError(f"{path} does not exist; mend the path or download the data set first.")
    if not path.is_file():
        raise DatasetError(f"{path} is not a file; give the HDF5 file itself.")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror or error}).") from error
    if not head:
        raise DatasetError(f"{path} is empty; get it again.")
    if rehearsal and h5py.version.hdf5_version_tuple < _SOUND:
        _survive(path)
    with faults(path):
        recognised = h5py.is_hdf5(path)
    if not recognised:
        kind = ""
        if head.lstrip()[:1] == b"<":
            kind = "; it is a web page, perhaps the answer to a failed download"
        elif head.startswith(b"version https://git-lfs"):
            kind = "; it is a pointer of Git LFS, to be replaced by the file that it points to"
        raise DatasetError(f"{path} is not an HDF5 file{kind}.")
    with faults(path):
        file = h5py.File(path, "r")
    try:
        yield file
    finally:
        with contextlib.suppress(*_FAULTS):
            file.close()


def rehearse(path: str) -> None:
    """Read all arrays of a file and keep nothing; what the child process does."""
    import h5py

    where = Path(path)
    with contextlib.suppress(DatasetError), open_file(where, rehearsal=False) as file:
        found: list[str] = []
        with contextlib.suppress(*_FAULTS):
            file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in found:
            for rank in (1, 2):
                with contextlib.suppress(DatasetError):
                    array = column(file, where, name, rank)
                    if array is not None:
                        array.fill(None)


def _survive(path: Path) -> None:
    """Raise DatasetError if reading a file crashes a process or does not end."""
    status = path.stat()
    seen = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if seen in _rehearsed:
        return
    seconds = _REHEARSAL_SECONDS + status.st_size / _REHEARSAL_SPEED
    fault = ""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _REHEARSAL, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
        if done.returncode < 0:
            fault = "it crashes the HDF5 library"
    except subprocess.TimeoutExpired:
        fault = f"reading it does not end within {seconds:.0f} s"
    if fault:
        raise DatasetError(f"{path} cannot be read ({fault}); the file is damaged, get it again.")
    _rehearsed.add(seen)


def names(file: Any, path: Path) -> list[str]:
    """Return the names at the top level of a file."""
    with faults(path, "its list of contents"):
        return [str(name) for name in file]


@dataclass(frozen=True)
class Column:
    """One array of a file, found and checked; its values are read later, by `fill` or `read`."""

    path: Path
    name: str
    data: Any
    shape: tuple[int, ...]
    """After a superfluous second dimension of (n, 1) was dropped."""
    flags: bool

    @property
    def dtype(self) -> Any:
        """Dtype in memory: bool for flags, else float32."""
        return np.dtype(np.bool_ if self.flags else np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * int(self.dtype.itemsize)

    def read(self, report: Callable[[int], object] | None = None) -> NDArray[Any]:
        """Return all values in memory; `report` and what is raised are those of `fill`."""
        try:
            out = np.empty(self.shape, self.dtype)
        except MemoryError as error:
            raise DatasetError(
                f"{self.path}: {self.name} with {self.shape[0]} rows does not fit into memory; read the file "
                "with memory_map=True."
            ) from error
        self.fill(out, report)
        return out

    def fill(self, out: NDArray[Any] | None, report: Callable[[int], object] | None = None) -> None:
        """Read all values into `out` (shape `shape`, dtype `dtype`), or with None only look at them.

        `report` is called with the bytes done after every block.

        Raises:
            DatasetError: the values cannot be read, a number is not finite or does not fit into float32, or
                a flag is neither 0 nor 1; the message names the first such row.
        """
        for bad in self._read(out, report):
            if len(bad):
                raise DatasetError(self._sentence(f"row {bad[0]}"))

    def fault(self, report: Callable[[int], object] | None = None) -> str | None:
        """Look at all values; None, or what `fill` would raise, which counts the bad rows besides."""
        first = last = count = 0
        try:
            for bad in self._read(None, report):
                if len(bad):
                    first = first if count else int(bad[0])
                    last, count = int(bad[-1]), count + len(bad)
        except DatasetError as error:
            return str(error)
        if not count:
            return None
        return self._sentence(
            f"row {first}" + (f" and {count - 1} more up to row {last}" if count > 1 else "")
        )

    def _sentence(self, rows: str) -> str:
        what = "is neither 0 nor 1" if self.flags else "is NaN, infinite or too large for float32"
        return f"{self.path}: {self.name} {what} in {rows}; repair the file or get it again."

    def _read(
        self, out: NDArray[Any] | None, report: Callable[[int], object] | None
    ) -> Iterator[NDArray[np.intp]]:
        """Read block by block; yields the bad rows of each."""
        rows = _block_rows(self.data, self.shape)
        direct = not self.flags and self.data.dtype == np.float32
        scratch = None
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            if out is None and scratch is None:
                scratch = np.empty((stop - start, *self.shape[1:]), self.dtype)
            target = out[start:stop] if out is not None else scratch[: stop - start]  # type: ignore[index]
            if direct:
                with self._reading():
                    shaped = target.reshape(stop - start, *self.data.shape[1:])
                    self.data.read_direct(shaped, np.s_[start:stop], np.s_[: stop - start])
                bad = bad_rows(target)
            else:
                with self._reading():
                    block = np.asarray(self.data[start:stop]).reshape(target.shape)
                with np.errstate(over="ignore", invalid="ignore"):
                    target[...] = block
                bad = bad_rows(block, flags=True) if self.flags else bad_rows(target)
            yield start + bad
            if report is not None:
                report(target.nbytes)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """`faults`, but for an array that is packed by a filter which is not there."""
        try:
            with faults(self.path, self.name):
                yield
        except DatasetError as error:
            lacking = _missing_filters(self.data)
            if not lacking:
                raise
            raise DatasetError(
                f"{self.path}: {self.name} is packed by the filter {lacking[0]}, which is not installed; "
                "write the file anew with gzip (h5repack -f GZIP=4) where it can be read."
            ) from error


def _block_rows(data: Any, shape: tuple[int, ...]) -> int:
    """Rows to read or write at a time: whole blocks of the file, so that none is packed twice."""
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * data.dtype.itemsize)
    step = data.chunks[0] if data.chunks else 1
    return int(max(1, _BLOCK_BYTES // (row_bytes * step)) * step)


def _missing_filters(data: Any) -> list[str]:
    """Filters of an array that the HDF5 library here does not have, by name or number."""
    import h5py

    with contextlib.suppress(*_FAULTS):
        plan = data.id.get_create_plist()
        filters = [plan.get_filter(k) for k in range(plan.get_nfilters())]
        return [
            name.decode("ascii", "replace") or str(code)
            for code, _, _, name in filters
            if not h5py.h5z.filter_avail(code)
        ]
    return []


def unread(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return an array of NaN that takes no memory, in place of one whose values are not read."""
    return np.broadcast_to(np.float32(np.nan), shape)


def reporter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Return a function that adds up the bytes that it is called with, and tells `progress`."""
    done = 0

    def report(fresh: int) -> None:
        nonlocal done
        done += fresh
        if progress is not None:
            progress(done, total)

    return report


def missing(file: Any, path: Path, name: str, layout: str) -> str:
    """Say that a file has no array of this name."""
    there = ", ".join(sorted(names(file, path))[:10]) or "nothing"
    return f"{path} has no array {name!r}, which {layout}'s layout needs; it holds {there}."


def find_faults(
    file: Any,
    path: Path,
    ranks: Mapping[str, int],
    needed: Collection[str],
    layout: str,
    progress: Progress | None = None,
) -> list[str]:
    """Look at all values of flat arrays, those of `FLAGS` as flags.

    Args:
        file: an open file.
        path: its path, for messages.
        ranks: number of dimensions of each array; all have the length of the first that is sound.
        needed: those that may not be missing.
        layout: whose, for messages.
        progress: called with bytes done and in all.

    Returns:
        a sentence on each array that is missing or unsound.
    """
    found: list[str] = []
    columns: list[Column] = []
    for name, rank in ranks.items():
        try:
            rows = columns[0].shape[0] if columns else None
            there = column(file, path, name, rank, flags=name in FLAGS, rows=rows)
            if there is not None:
                columns.append(there)
            elif name in needed:
                found.append(missing(file, path, name, layout))
        except DatasetError as error:
            found.append(str(error))
    report = reporter(sum(each.nbytes for each in columns), progress)
    return found + [fault for each in columns if (fault := each.fault(report)) is not None]


def room(path: Path) -> int:
    """Return the most bytes that a file's arrays can have, unpacked."""
    return _MOST_DEFLATED * path.stat().st_size + _SLACK


def column(
    file: Any, path: Path, name: str, rank: int, *, flags: bool = False, rows: int | None = None
) -> Column | None:
    """Find an array of numbers in a file, "a/b" in a group, and check everything but its values.

    Args:
        file: an open file.
        path: its path, for messages.
        name: of the array.
        rank: number of dimensions; (n, 1) also passes where 1 is wanted.
        flags: whether the values are to be 0 or 1.
        rows: the length that it must have, if any.

    Returns:
        the array, None when the file has nothing of that name.

    Raises:
        DatasetError: what is there is no array, not numeric, of another shape, refers to another file, or
            claims to be larger than the file can hold.
    """
    import h5py

    with faults(path, name):
        item: Any = file
        for part in name.split("/"):
            # `part in item` would follow a link to another file
            if not isinstance(item, h5py.Group) or not item.id.links.exists(part.encode()):
                return None
            if not isinstance(item.get(part, getlink=True), h5py.HardLink):
                raise DatasetError(f"{path}: {name} is a link; store the array itself.")
            item = item[part]
        if not isinstance(item, h5py.Dataset):
            raise DatasetError(f"{path}: {name} is a group; it must be an array.")
        kind, shape = item.dtype.kind, item.shape
        if kind not in "fiub":
            raise DatasetError(f"{path}: {name} has dtype {item.dtype}; it must be numeric.")
        if item.external or item.is_virtual:
            raise DatasetError(f"{path}: {name} is stored in another file; store the array itself.")
        if shape is not None and rank == 1 and len(shape) == 2 and shape[1] == 1:
            shape = shape[:1]
        if shape is None or len(shape) != rank:
            wanted = "(transitions, size)" if rank == 2 else "(transitions,)"
            raise DatasetError(f"{path}: {name} has shape {shape}; it must be {wanted}.")
        if rows is not None and shape[0] != rows:
            raise DatasetError(f"{path}: {name} has {shape[0]} rows and not {rows}; the arrays do not fit.")
        most = room(path)
        for claimed in (shape, item.chunks or ()):
            # Python's integers: a damaged size may overflow any other
            size = item.dtype.itemsize
            for length in claimed:
                size *= int(length)
            if size > most:
                raise DatasetError(
                    f"{path}: {name} claims {size} bytes, more than the file can hold; it is damaged, get "
                    "it again."
                )
    return Column(path, name, item, tuple(int(length) for length in shape), flags)


def write_column(
    file: Any, name: str, array: NDArray[Any], report: Callable[[int], object] | None = None
) -> None:
    """Write an array with gzip, block by block; `report` is called with the bytes done after each."""
    with interrupts_at_the_end():
        data = file.create_dataset(name, shape=array.shape, dtype=array.dtype, compression="gzip")
    rows = _block_rows(data, array.shape)
    for start in range(0, len(array), rows):
        with interrupts_at_the_end():
            block = array[start : start + rows]
            data[start : start + len(block)] = block
        if report is not None:
            report(block.nbytes)


@contextlib.contextmanager
def write_file(path: Path) -> Iterator[Any]:
    """Write an HDF5 file under a temporary name; flush it to the disk and rename it at the end.

    Raises:
        DatasetError: the folder or disk does not take it; what was at `path` before is untouched.
    """
    import h5py

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = h5py.File(temporary, "w")
        try:
            yield file
        finally:
            with interrupts_at_the_end():
                file.close()
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DatasetError(
            f"{path} could not be written ({reason}); free some space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
