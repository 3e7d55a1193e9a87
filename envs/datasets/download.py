"""Fetching DSRL's files: resumed when cut off, checked for size and checksum, renamed when complete.

The files lie in the data set repository YYY-45/DSRL of Hugging Face. They are kept in `$DSRL_DATASET_DIR`,
or `~/.dsrl/datasets`, where DSRL itself also looks. Beside a file that was fetched stands NAME.sha256, in
the form that `sha256sum --check` reads; it is the checksum of what arrived, which later tells whether the
file has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferl.envs.datasets.tasks import OfflineTask, find_task
from saferl.errors import DatasetError, UsageError

__all__ = ["BASE_URL", "cache_directory", "fetch", "verify_checksum"]

#: Where the files are; a file's address is this, a slash, and its name.
BASE_URL = "https://huggingface.co/datasets/YYY-45/DSRL/resolve/main"

Progress = Callable[[int, int | None], object]

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BLOCK = 1 << 20
_TIMEOUT = 30.0  # s without any byte
_ATTEMPTS = 5  # in a row that bring no byte
_PAUSE = 1.0  # s before the second attempt, doubled before each further one
_LONGEST_PAUSE = 30.0
_RETRIED = {408, 425, 429, 500, 502, 503, 504}


def cache_directory() -> Path:
    """Return the folder of the files: `$DSRL_DATASET_DIR`, or `~/.dsrl/datasets`."""
    chosen = os.environ.get("DSRL_DATASET_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".dsrl" / "datasets"


def fetch(
    task: OfflineTask | str,
    *,
    cache: str | Path | None = None,
    base_url: str | None = None,
    offline: bool = False,
    sha256: str | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], object] | None = None,
) -> Path:
    """Return the path of a task's file, downloading it when it is not there yet.

    Args:
        task: a task, its name (see `tasks.find_task`), or the name of any file of the server.
        cache: folder of the files, `cache_directory()` when left out.
        base_url: another server, for example a mirror of one's own.
        offline: never open a connection.
        sha256: checksum that the file must have, if it is known; a file that is there already is checked too.
        progress: called with bytes done and in all (None if the server does not tell).
        notice: called with a sentence before every further attempt.

    Raises:
        UsageError: the task is unknown, or the URL or file name is impossible.
        DatasetError: the file is not there and `offline` is set, the server does not answer or has no such
            file, the disk is full, or the checksum is wrong. What was downloaded so far is kept in NAME.part
            and resumed by the next call; a file with a wrong checksum is removed.
    """
    name = _file_name(task)
    folder = Path(cache).expanduser() if cache is not None else cache_directory()
    url = f"{_checked(base_url or BASE_URL)}/{urllib.parse.quote(name)}"
    path = folder / name
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"the checksum {sha256!r} is not a SHA-256; give its 64 hexadecimal digits.")
    if path.is_file():
        if sha256 is not None:
            _compare(path, _digest(path), sha256)
        return path
    if offline:
        raise DatasetError(
            f"{path} is not there and may not be downloaded; get it from {url} elsewhere and put it there."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(
            f"the folder {folder} cannot be made ({error.strerror}); set DSRL_DATASET_DIR to another one."
        ) from error
    part = path.with_name(f"{name}.part")
    with _alone(part):
        if not path.is_file():  # else another process had it meanwhile
            _Download(url, path, part, progress, notice).run()
            _finish(url, path, part, sha256)
    return path


def verify_checksum(path: str | Path) -> bool:
    """Compare a file with the checksum beside it.

    Returns:
        True when they agree, False when there is no NAME.sha256.

    Raises:
        DatasetError: they differ, or one of the two cannot be read.
    """
    path = Path(path)
    sidecar = _sidecar(path)
    if not sidecar.is_file():
        return False
    try:
        words = sidecar.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{sidecar} cannot be read ({error}); remove it, or get the file again."
        ) from error
    if not words or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
        raise DatasetError(f"{sidecar} holds no SHA-256; remove it, or get the file again.")
    _compare(path, _digest(path), words[0])
    return True


# --- names and checksums ------------------------------------------------------------------------------


def _file_name(task: OfflineTask | str) -> str:
    if isinstance(task, OfflineTask):
        return task.file_name
    if task.endswith((".hdf5", ".h5")):
        if Path(task).name != task or "\\" in task:
            raise UsageError(f"{task!r} is a path; give a file's name alone, and its folder with cache.")
        return task
    return find_task(task).file_name


def _checked(base_url: str) -> str:
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"the address {base_url!r} is no web address; it begins with https:// or http://.")
    return base_url.rstrip("/")


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror or error}).") from error


def _compare(path: Path, found: str, wanted: str) -> None:
    if found != wanted.lower():
        raise DatasetError(
            f"{path} has the SHA-256 {found} and not {wanted.lower()}; it is damaged or another version, "
            "remove it and get it again."
        )


def _finish(url: str, path: Path, part: Path, sha256: str | None) -> None:
    """Check a complete download and move it to its place."""
    try:
        with part.open("rb") as file:
            head = file.read(len(_SIGNATURE))
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if head != _SIGNATURE or (sha256 is not None and found != sha256.lower()):
            _discard(part)
            raise DatasetError(
                f"what {url} sent is not an HDF5 file; check the address, or put the file at {path} by hand."
                if head != _SIGNATURE
                else f"what {url} sent has the SHA-256 {found} and not {str(sha256).lower()}; it is removed, "
                "try again, or correct the checksum."
            )
        # The checksum first: a file without one would never be checked again.
        sidecar = _sidecar(path)
        temporary = sidecar.with_name(f".{sidecar.name}.{os.getpid()}.tmp")
        temporary.write_text(f"{found}  {path.name}\n", encoding="utf-8")
        temporary.replace(sidecar)
        part.replace(path)
        _state(part).unlink(missing_ok=True)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unwritable(path, error) from error


# --- the download -------------------------------------------------------------------------------------


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> DatasetError:
    return DatasetError(
        f"{path} could not be written ({error.strerror or error}); free some space, or set DSRL_DATASET_DIR "
        "to another folder."
    )


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Keep a second process from writing the same file."""
    try:
        import fcntl
    except ImportError:  # Windows: two downloads of one file at a time are not detected
        yield
        return
    lock = part.with_name(f".{part.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(lock, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not lock.exists() or os.fstat(descriptor).st_ino != lock.stat().st_ino:
                raise OSError("the one who held the lock has just removed it")
        except OSError as error:
            raise DatasetError(
                f"{part} is being written by another process; wait until it is done."
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


class _Restart(Exception):
    """What was downloaded so far does not go with what the server has now."""


class _Lost(Exception):
    """The connection broke off; what arrived is in the file."""


@dataclass
class _Download:
    url: str
    path: Path
    part: Path
    progress: Progress | None
    notice: Callable[[str], object] | None = None
    total: int | None = None

    def run(self) -> None:
        """Download until the file is complete; raises DatasetError when it cannot be had."""
        failures, best = 0, self._size()
        while True:
            try:
                self._attempt()
                return
            except _Restart:
                fault = "it changed during the download"
                self._remove_part()
                best = 0
                failures += 1
            except _Lost as error:
                fault = str(error)
                if self._size() > best:
                    failures, best = 0, self._size()
                failures += 1
            if failures >= _ATTEMPTS:
                raise DatasetError(
                    f"{self.url} could not be downloaded ({fault}); try again when the connection is better, "
                    f"or put the file at {self.path} by hand."
                )
            pause = min(_PAUSE * 2.0 ** (failures - 1), _LONGEST_PAUSE)
            if self.notice is not None:
                self.notice(f"{self.path.name}: {fault}; trying again in {pause:.0f} s.")
            time.sleep(pause)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _remove_part(self) -> None:
        try:
            _discard(self.part)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _attempt(self) -> None:
        """Ask for what is missing and append it."""
        start = self._size()
        headers = {"User-Agent": "saferl", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            version = self._version()
            if version:
                headers["If-Range"] = version
        try:
            answer = urllib.request.urlopen(
                urllib.request.Request(self.url, headers=headers), timeout=_TIMEOUT
            )
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error, start)
            return
        except (OSError, http.client.HTTPException) as error:
            raise _Lost(_reason(error)) from error
        with answer:
            start = self._begin(answer, start)
            self._receive(answer, start)
        if self.total is not None and self._size() > self.total:
            raise _Restart

    def _refused(self, error: urllib.error.HTTPError, start: int) -> None:
        """The server answered with a fault: return when the file was complete already, else raise."""
        if error.code == 416 and start:
            found = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", "").strip())
            if found and int(found[1]) == start:
                return
            raise _Restart
        if error.code in _RETRIED:
            raise _Lost(f"the server answers {error.code} {error.reason}") from error
        raise DatasetError(
            f"{self.url} could not be downloaded (the server answers {error.code} {error.reason}); check the "
            f"address, or put the file at {self.path} by hand."
        ) from error

    def _begin(self, answer: Any, start: int) -> int:
        """Where the answer goes on, in bytes; sets `total`."""
        length = _number(answer.headers.get("Content-Length"))
        if answer.status == 206:
            found = re.fullmatch(
                r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("Content-Range", "").strip()
            )
            if not found or int(found[1]) != start:
                raise _Restart
            whole = _number(found[3])
            if self.total is not None and whole is not None and whole != self.total:
                raise _Restart
            self.total = whole if whole is not None else int(found[2]) + 1
        else:  # all of it, whatever was asked for
            start = 0
            self.total = length
        missing = None if self.total is None else self.total - start
        if missing is not None and missing > shutil.disk_usage(self.part.parent).free:
            raise DatasetError(
                f"{self.path.parent} has too little space for the {missing / 1e6:.0f} MB still to come; free "
                "some, or set DSRL_DATASET_DIR to another folder."
            )
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        try:
            _state(self.part).write_text(json.dumps({"version": version}), encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        return start

    def _version(self) -> str | None:
        """What the server called the version that the first part is of, if that can be asked for."""
        try:
            version = json.loads(_state(self.part).read_text(encoding="utf-8"))["version"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        usable = isinstance(version, str) and not version.startswith("W/") and version.isprintable()
        return version if usable else None

    def _receive(self, answer: Any, start: int) -> None:
        done = start
        try:
            file = self.part.open("r+b" if start else "wb")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        with file:
            file.seek(start)
            while True:
                try:
                    block = answer.read(_BLOCK)
                except http.client.IncompleteRead as error:
                    block = error.partial
                    self._write(file, block)
                    raise _Lost("the connection broke off") from error
                except (OSError, http.client.HTTPException) as error:
                    raise _Lost(_reason(error)) from error
                if not block:
                    break
                self._write(file, block)
                done += len(block)
                if self.progress is not None:
                    self.progress(done, self.total)
        if self.total is not None and done < self.total:
            raise _Lost(f"the connection broke off after {done} of {self.total} bytes")

    def _write(self, file: Any, block: bytes) -> None:
        try:
            file.write(block)
            file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)
