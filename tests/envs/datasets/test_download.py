"""Downloads from a local server that drops connections, ignores ranges, changes its mind, or has nothing."""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saferl.envs.datasets import download, fetch, load, validate, write_dsrl
from saferl.envs.datasets.tasks import TASKS
from saferl.errors import DatasetError, UsageError

NAME = TASKS["CarRun"].file_name
BODY = b"\x89HDF\r\n\x1a\n" + np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


@dataclass
class Server:
    """What to answer, and what was asked."""

    url: str = ""
    body: bytes = BODY
    etag: str | None = '"one"'
    drop_after: list[int] = field(default_factory=list)
    """For each answer in turn, bytes after which the connection breaks off."""
    ranges: bool = True
    length: bool = True
    status: list[int] = field(default_factory=list)
    """For each answer in turn, a status to send instead."""
    asked: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def handler(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            server.asked.append({key.lower(): value for key, value in self.headers.items()})
            server.paths.append(self.path)
            if self.path.startswith("/moved/"):
                self.send_response(302)
                self.send_header("Location", self.path.replace("/moved/", "/data/"))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if server.status:
                self.send_error(server.status.pop(0))
                return
            body, start = server.body, 0
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            same = self.headers.get("If-Range") in (None, server.etag)
            if wanted and server.ranges and same:
                start = int(wanted[1])
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            if server.etag:
                self.send_header("ETag", server.etag)
            if server.length:
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            end = start + server.drop_after.pop(0) if server.drop_after else len(body)
            self.wfile.write(body[start:end])
            self.wfile.flush()
            self.close_connection = True

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "_PAUSE", 0.001)
    told = Server()
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(told))
    told.url = f"http://127.0.0.1:{service.server_port}/data"
    thread = threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield told
    service.shutdown()
    service.server_close()
    thread.join()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_complete_checked_and_recorded(tmp_path: Path, server: Server) -> None:
    seen: list[tuple[int, int | None]] = []
    path = fetch(
        "CarRun",
        cache=tmp_path / "cache",
        base_url=f"{server.url}/",
        sha256=DIGEST.upper(),
        progress=lambda *now: seen.append(now),
    )
    assert path == tmp_path / "cache" / NAME
    assert path.read_bytes() == BODY
    assert server.paths == [f"/data/{NAME}"]
    assert seen[-1] == (len(BODY), len(BODY))
    assert left(path.parent) == [NAME, f"{NAME}.sha256"]
    assert (path.parent / f"{NAME}.sha256").read_text() == f"{DIGEST}  {NAME}\n"
    assert fetch("CarRun", cache=tmp_path / "cache", base_url=server.url) == path
    assert len(server.asked) == 1  # it is there
    assert download.verify_checksum(path)


def test_dropped_connections_are_resumed(tmp_path: Path, server: Server) -> None:
    # more drops than attempts without any progress
    server.drop_after = [100_000, 50_000, 1, 2, 3, 4, 5, 6, 0, 0, 0, 7]
    path = fetch("CarRun", cache=tmp_path, base_url=server.url)
    assert path.read_bytes() == BODY
    assert "range" not in server.asked[0]
    assert server.asked[1]["range"] == "bytes=100000-"
    assert server.asked[1]["if-range"] == '"one"'
    assert server.asked[2]["range"] == "bytes=150000-"


def test_ranges_survive_a_redirection(tmp_path: Path, server: Server) -> None:
    server.drop_after = [100_000]
    moved = server.url.replace("/data", "/moved")
    assert fetch("CarRun", cache=tmp_path, base_url=moved).read_bytes() == BODY
    assert server.paths == [f"/moved/{NAME}", f"/data/{NAME}"] * 2
    assert server.asked[3]["range"] == "bytes=100000-"


def test_a_broken_download_is_resumed_by_the_next_call(tmp_path: Path, server: Server) -> None:
    server.drop_after = [123_456] + [0] * 10
    with pytest.raises(
        DatasetError,
        match=rf"{server.url}/{NAME} could not be downloaded \(the connection broke off after 123456 of "
        rf"300008 bytes\).*put the file at {tmp_path / NAME} by hand",
    ):
        fetch("CarRun", cache=tmp_path, base_url=server.url)
    assert not (tmp_path / NAME).exists()
    assert (tmp_path / f"{NAME}.part").stat().st_size == 123_456
    server.drop_after, asked = [], len(server.asked)
    assert fetch("CarRun", cache=tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.asked[asked]["range"] == "bytes=123456-"
    assert left(tmp_path) == [NAME, f"{NAME}.sha256"]


def test_a_server_that_ignores_ranges_starts_again(tmp_path: Path, server: Server) -> None:
    server.ranges = False
    server.drop_after = [200_000, 100]  # the second answer is shorter than what is there already
    assert fetch("CarRun", cache=tmp_path, base_url=server.url).read_bytes() == BODY
    assert len(server.asked) == 3


def test_a_file_that_changed_meanwhile_is_not_mixed(tmp_path: Path, server: Server) -> None:
    server.drop_after = [100_000] + [0] * 10
    with pytest.raises(DatasetError):
        fetch("CarRun", cache=tmp_path, base_url=server.url)
    server.drop_after, server.etag, server.body = [], '"two"', BODY[:8] + b"other" * 50_000
    assert fetch("CarRun", cache=tmp_path, base_url=server.url).read_bytes() == server.body


def test_a_shorter_file_without_a_version_is_fetched_anew(tmp_path: Path, server: Server) -> None:
    server.etag = None
    (tmp_path / f"{NAME}.part").write_bytes(BODY + b"more")
    assert fetch("CarRun", cache=tmp_path, base_url=server.url).read_bytes() == BODY


def test_a_complete_part_needs_no_byte(tmp_path: Path, server: Server) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(BODY)
    assert fetch("CarRun", cache=tmp_path, base_url=server.url).read_bytes() == BODY
    assert server.asked[0]["range"] == f"bytes={len(BODY)}-"


def test_an_unknown_length_is_accepted(tmp_path: Path, server: Server) -> None:
    server.length = False
    seen: list[tuple[int, int | None]] = []
    path = fetch("CarRun", cache=tmp_path, base_url=server.url, progress=lambda *now: seen.append(now))
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), None)


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(tmp_path: Path, server: Server) -> None:
    server.status = [503, 429, 500]
    assert fetch("CarRun", cache=tmp_path, base_url=server.url).read_bytes() == BODY
    for status in (404, 403, 401, 410):
        server.status, asked = [status] * 9, len(server.asked)
        with pytest.raises(DatasetError, match=rf"the server answers {status} .* put the file at"):
            fetch("BallRun", cache=tmp_path, base_url=server.url)
        assert len(server.asked) == asked + 1
    server.status = [503] * 9
    with pytest.raises(DatasetError, match="the server answers 503"):
        fetch("BallRun", cache=tmp_path, base_url=server.url)


def test_a_wrong_checksum_is_not_kept(tmp_path: Path, server: Server) -> None:
    wrong = "0" * 64
    with pytest.raises(DatasetError, match=f"has the SHA-256 {DIGEST} and not {wrong}; it is removed"):
        fetch("CarRun", cache=tmp_path, base_url=server.url, sha256=wrong)
    assert left(tmp_path) == []
    fetch("CarRun", cache=tmp_path, base_url=server.url)
    with pytest.raises(DatasetError, match="is damaged or another version"):
        fetch("CarRun", cache=tmp_path, base_url=server.url, sha256=wrong)
    assert (tmp_path / NAME).exists()  # it may have been put there by hand
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        fetch("CarRun", cache=tmp_path, base_url=server.url, sha256="abc")


def test_a_web_page_is_no_data_set(tmp_path: Path, server: Server) -> None:
    server.body = b"<html>Please log in</html>"
    with pytest.raises(DatasetError, match="is not an HDF5 file; check the address"):
        fetch("CarRun", cache=tmp_path, base_url=server.url)
    assert left(tmp_path) == []


def test_no_server_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSE", 0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told: list[str] = []
    with pytest.raises(DatasetError) as caught:
        fetch("CarRun", cache=tmp_path, base_url=f"http://127.0.0.1:{port}", notice=told.append)
    assert told == [f"{NAME}: Connection refused; trying again in 0 s."] * 4
    message = str(caught.value)
    assert f"http://127.0.0.1:{port}/{NAME} could not be downloaded (Connection refused)" in message
    assert message.endswith(f"or put the file at {tmp_path / NAME} by hand.")


def test_offline_never_opens_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(socket, "create_connection", never)
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    address = f"{download.BASE_URL}/{NAME}"
    with pytest.raises(DatasetError, match=f"{tmp_path / NAME} is not there .* get it from {address}"):
        fetch("CarRun", offline=True)
    with pytest.raises(DatasetError, match="may not be downloaded"):
        load("CarRun", offline=True)
    (tmp_path / NAME).write_bytes(BODY)
    assert fetch("CarRun", offline=True) == tmp_path / NAME


def test_the_default_address_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DSRL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.cache_directory() == tmp_path / ".dsrl" / "datasets"
    monkeypatch.setenv("DSRL_DATASET_DIR", "~/elsewhere")
    assert download.cache_directory() == tmp_path / "elsewhere"
    assert download.BASE_URL.endswith("/datasets/YYY-45/DSRL/resolve/main")


def test_impossible_requests(tmp_path: Path) -> None:
    for name in ("../x.hdf5", "a/b.hdf5", "/x.hdf5", "a\\b.hdf5"):
        with pytest.raises(UsageError, match="is a path"):
            fetch(name, cache=tmp_path)
    with pytest.raises(UsageError, match="did you mean 'CarRun'"):
        fetch("CarRum", cache=tmp_path)
    for url in ("ftp://host/x", "file:///etc", "host"):
        with pytest.raises(UsageError, match="is no web address"):
            fetch("CarRun", cache=tmp_path, base_url=url)
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot be made"):
        fetch("CarRun", cache=tmp_path / "file" / "cache", base_url="http://127.0.0.1:9")


def test_two_downloads_of_one_file_do_not_mix(tmp_path: Path, server: Server) -> None:
    part = tmp_path / f"{NAME}.part"
    with download._alone(part), pytest.raises(DatasetError, match="written by another process"):
        fetch("CarRun", cache=tmp_path, base_url=server.url)
    assert fetch("CarRun", cache=tmp_path, base_url=server.url).read_bytes() == BODY


def test_a_full_disk_is_told_before_and_during(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(DatasetError, match="too little space"):
            fetch("CarRun", cache=tmp_path, base_url=server.url)

    def full(*_: Any) -> None:
        raise download._unwritable(tmp_path / NAME, OSError(28, "No space left on device"))

    monkeypatch.setattr(download._Download, "_write", full)
    with pytest.raises(DatasetError, match="No space left on device"):
        fetch("CarRun", cache=tmp_path, base_url=server.url)
    assert len(server.asked) == 2  # no second attempt


def test_load_fetches_and_validate_sees_later_damage(
    tmp_path: Path, server: Server, maker: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = maker(sizes=(7, 2))
    write_dsrl(tmp_path / "made.hdf5", data)
    server.body = (tmp_path / "made.hdf5").read_bytes()
    monkeypatch.setattr(download, "BASE_URL", server.url)
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "cache"))
    loaded = load("CarRun")
    same(loaded, data)
    assert loaded.task is TASKS["CarRun"]
    same(load(NAME, offline=True), data)
    mapped = load("OfflineCarRun-v0", offline=True, memory_map=True)
    same(mapped, data)
    path = tmp_path / "cache" / NAME
    assert validate(path).checksum
    write_dsrl(path, maker(sizes=(7, 2), seed=9))
    with pytest.raises(DatasetError, match="is damaged or another version"):
        validate(path)
    (tmp_path / "cache" / f"{NAME}.sha256").write_text("no digits")
    with pytest.raises(DatasetError, match="holds no SHA-256"):
        validate(path)
