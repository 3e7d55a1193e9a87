"""`saferl dataset`: what it tells, writes and refuses, and what an interruption leaves behind."""

from __future__ import annotations

import functools
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from saferl.envs.datasets import (
    OfflineDataset,
    download,
    load,
    read_d4rl,
    read_dsrl,
    read_minari,
    write_d4rl,
    write_dsrl,
    write_minari,
)
from saferl.envs.datasets.tasks import TASKS, density_preset
from saferl.envs.datasets.tools import pre_process
from saferl.experiment import progress

Saferl = Callable[..., tuple[int, str, str]]
CAR_RUN = TASKS["CarRun"]


def make(
    returns: Any,
    costs: Any,
    *,
    steps: int = 2,
    trailing: int = 0,
    sizes: tuple[int, int] = (7, 2),
    seed: int = 0,
) -> OfflineDataset:
    """An episode for each return and cost, spread evenly over its steps; the last one terminates."""
    rng = np.random.default_rng(seed)
    rows = len(returns) * steps + trailing
    observations = rng.normal(size=(rows + 1, sizes[0])).astype(np.float32)
    ends = np.arange(rows) % steps == steps - 1
    last = np.zeros(rows, bool)
    last[len(returns) * steps - 1 : len(returns) * steps] = True
    ends[len(returns) * steps :] = False
    pad = np.zeros(trailing)
    return OfflineDataset(
        observations=observations[:-1],
        next_observations=observations[1:],
        actions=rng.uniform(-1, 1, (rows, sizes[1])),
        rewards=np.append(np.repeat(np.asarray(returns) / steps, steps), pad),
        costs=np.append(np.repeat(np.asarray(costs) / steps, steps), pad),
        terminals=last,
        timeouts=ends & ~last,
    )


def same(first: OfflineDataset, second: OfflineDataset) -> None:
    for key, array in first.arrays().items():
        assert array.dtype == getattr(second, key).dtype, key
        np.testing.assert_array_equal(array, getattr(second, key), err_msg=key)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of DSRL's files, empty, and a working folder beside it."""
    folder, work = tmp_path / "cache", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.setenv("DSRL_DATASET_DIR", str(folder))
    monkeypatch.chdir(work)
    return folder


@pytest.fixture
def data(cache: Path) -> OfflineDataset:
    """Four episodes of CarRun as its file and as data.hdf5, and one transition behind them."""
    made = make([200, 300, 400, 500], [0, 10, 20, 50], trailing=1)
    write_dsrl(cache / CAR_RUN.file_name, made)
    write_dsrl("data.hdf5", made)
    return made


# --- info -----------------------------------------------------------------------------------------------


def test_info_tells_what_was_worked_by_hand(saferl: Saferl, data: OfflineDataset) -> None:
    status, out, _ = saferl("dataset", "info", "CarRun", "--json")
    assert status == 0
    table = json.loads(out)
    assert (table["format"], table["task"], table["env"]) == ("dsrl", "CarRun", "SafetyCarRun-v0")
    assert (table["transitions"], table["episodes"], table["trailing"]) == (9, 4, 1)
    assert (table["terminated"], table["timeouts"]) == (1, 3)
    assert (table["observation_size"], table["action_size"]) == (7, 2)
    assert table["return"] == {"min": 200, "25%": 275, "50%": 350, "75%": 425, "max": 500, "mean": 350}
    assert table["cost"]["mean"] == 20
    assert table["length"]["max"] == 2
    # R_min 204.28726, R_max 574.65332; the best of those within the limit; means of 350 and 20
    scores = [
        (
            row["cost_limit"],
            row["safe"],
            row["best"],
            row["best_normalised"],
            *row["mean_normalised"].values(),
        )
        for row in table["limits"]
    ]
    np.testing.assert_allclose(
        scores,
        [
            (10, 0.5, 300, 0.258427, 0.393429, 2.0),
            (20, 0.75, 400, 0.528430, 0.393429, 1.0),
            (40, 0.75, 400, 0.528430, 0.393429, 0.5),
        ],
        rtol=2e-6,
    )
    status, out, _ = saferl("dataset", "info", "CarRun")
    assert status == 0
    assert "dsrl layout, task CarRun" in out
    assert "4 episodes, 1 terminated, 3 cut by time; 1 transitions behind the last" in out
    assert "0.528" in out


def test_info_of_a_file_that_no_task_is_known_of(saferl: Saferl, data: OfflineDataset) -> None:
    table = json.loads(saferl("dataset", "info", "data.hdf5", "--json")[1])
    assert (table["task"], table["limits"]) == (None, [])
    words = ["--cost-limit", "9", "--cost-limit", "30"]
    table = json.loads(saferl("dataset", "info", *words, "data.hdf5", "--json")[1])
    assert table["limits"] == [
        {"cost_limit": 9, "safe": 0.25, "best": 200},
        {"cost_limit": 30, "safe": 0.75, "best": 400},
    ]
    status, out, _ = saferl("dataset", "info", "data.hdf5", *words)
    assert "task unknown" in out
    assert "75.0 %" in out
    table = json.loads(saferl("dataset", "info", "data.hdf5", "--env", "CarRun", "--json")[1])
    assert table["task"] == "CarRun"
    status, _, err = saferl("dataset", "info", "data.hdf5", "--env", "PointGoal1")
    assert status == 1
    assert "observations have 7 components and PointGoal1's 60" in err


def test_info_without_a_whole_episode(saferl: Saferl, cache: Path) -> None:
    write_dsrl(cache / CAR_RUN.file_name, make([], [], trailing=3))
    status, out, _ = saferl("dataset", "info", "CarRun")
    assert status == 0
    assert "0 episodes, 0 terminated, 0 cut by time; 3 transitions behind the last" in out
    assert json.loads(saferl("dataset", "info", "CarRun", "--json")[1])["return"] == {}


def test_all_layouts_give_the_same_information(saferl: Saferl, cache: Path) -> None:
    made = make([1, 2, 3], [4, 0, 2])
    write_dsrl("a.hdf5", made)
    write_d4rl("b.hdf5", made)
    write_minari(Path("c"), made)
    tables = [json.loads(saferl("dataset", "info", name, "--json")[1]) for name in ("a.hdf5", "b.hdf5", "c")]
    assert [table.pop("format") for table in tables] == ["dsrl", "d4rl", "minari"]
    assert [table.pop("source") for table in tables] == ["a.hdf5", "b.hdf5", "c"]
    assert tables[0] == tables[1] == tables[2]


def test_notes_and_progress_stay_out_of_the_json(
    saferl: Saferl, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", -1)
    write_d4rl("b.hdf5", make([1, 2], [0, 0]))
    with h5py.File("b.hdf5", "r+") as file:
        del file["infos"]
    status, out, err = saferl("dataset", "info", "b.hdf5", "--json")
    assert status == 0
    assert json.loads(out)["cost"]["max"] == 0
    assert "note: b.hdf5 has no costs; all are zero." in err
    assert "reading" in err


# --- plot -----------------------------------------------------------------------------------------------


def test_plot(saferl: Saferl, data: OfflineDataset) -> None:
    status, out, _ = saferl("dataset", "plot", "CarRun", "-o", "new/picture.svg")
    assert status == 0
    assert "picture: new/picture.svg (4 episodes)" in out
    drawn = Path("new/picture.svg").read_text()
    assert re.findall(r"<!-- +limit (\d+) +-->", drawn) == ["10", "20", "40"]
    assert "CarRun: 4 episodes" in drawn
    assert saferl("dataset", "plot", "data.hdf5", "-o", "picture.png")[0] == 0
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = saferl("dataset", "plot", "data.hdf5", "-o", "new/picture.svg")
    assert status == 2
    assert "new/picture.svg exists; choose another name, or add --overwrite." in err
    words = ["--cost-limit", "30", "--overwrite"]
    assert saferl("dataset", "plot", "CarRun", "-o", "new/picture.svg", *words)[0] == 0
    assert re.findall(r"<!-- +limit (\d+) +-->", Path("new/picture.svg").read_text()) == ["30"]
    assert saferl("dataset", "plot", "CarRun", "-o", "picture.txt")[0] == 2


# --- convert --------------------------------------------------------------------------------------------


def test_conversion_is_exact_both_ways(saferl: Saferl, data: OfflineDataset) -> None:
    write_dsrl("whole.hdf5", data.whole_episodes())
    status, out, _ = saferl("dataset", "convert", "whole.hdf5", "folder/data-v0")
    assert status == 0
    assert "data set: folder/data-v0 (minari layout, 4 episodes, 8 transitions)" in out
    assert "left out" not in out
    same(read_minari(Path("folder/data-v0")), data.whole_episodes())
    told = json.loads(Path("folder/data-v0/data/metadata.json").read_text())
    assert told["dataset_id"] == "data-v0"
    assert saferl("dataset", "convert", "folder/data-v0", "back.hdf5")[0] == 0
    assert Path("back.hdf5").read_bytes() == Path("whole.hdf5").read_bytes()
    # D4RL's keeps what is behind the last episode
    assert saferl("dataset", "convert", "data.hdf5", "flat.h5", "--to", "d4rl")[0] == 0
    same(read_d4rl("flat.h5"), data)
    assert saferl("dataset", "convert", "flat.h5", "data.hdf5", "--overwrite")[0] == 0
    same(read_dsrl("data.hdf5"), data)


def test_the_task_is_kept_where_the_layout_has_room_for_it(saferl: Saferl, data: OfflineDataset) -> None:
    out = saferl("dataset", "convert", "CarRun", "carrun-v0")[1]
    assert "left out: the last 1 transitions, which belong to no whole episode" in out
    assert load("carrun-v0").task is CAR_RUN
    out = saferl("dataset", "convert", "CarRun", "thin.hdf5")[1]
    assert "its name does not say that it is of CarRun: add --env CarRun to what reads it" in out
    out = saferl("dataset", "convert", "carrun-v0", CAR_RUN.file_name)[1]
    assert "add --env" not in out
    assert load(CAR_RUN.file_name).task is CAR_RUN


def test_what_was_there_is_replaced_on_request_alone(saferl: Saferl, data: OfflineDataset) -> None:
    Path("keep.hdf5").write_text("earlier")
    Path("keep.hdf5.sha256").write_text(f"{'0' * 64}  keep.hdf5\n")
    status, _, err = saferl("dataset", "convert", "data.hdf5", "keep.hdf5")
    assert status == 2
    assert "keep.hdf5 exists; choose another name, or add --overwrite." in err
    assert Path("keep.hdf5").read_text() == "earlier"
    assert saferl("dataset", "convert", "data.hdf5", "keep.hdf5", "--overwrite")[0] == 0
    assert saferl("dataset", "validate", "keep.hdf5")[0] == 0  # the old checksum is gone
    assert saferl("dataset", "convert", "data.hdf5", "m")[0] == 0
    assert saferl("dataset", "convert", "data.hdf5", "m")[0] == 2
    assert saferl("dataset", "convert", "data.hdf5", "m", "--overwrite")[0] == 0
    Path("m/notes").touch()
    status, _, err = saferl("dataset", "convert", "data.hdf5", "m", "--overwrite")
    assert status == 1
    assert "it is not replaced" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.xyz"], "data.xyz does not say the layout; add --to dsrl, --to d4rl or --to minari."),
        (["x.hdf5", "--to", "minari"], "a data set in Minari's layout is a folder; leave out .hdf5."),
        ([CAR_RUN.file_name, "--to", "d4rl"], "is the name of a file in DSRL's layout"),
        ([".", "--to", "dsrl"], ". is a folder; name the file to write."),
        (["x.hdf5", "--to", "minary"], "invalid choice 'minary' for argument '--to'. Expected one of ("),
        ([], "missing: OUT; see `saferl dataset convert --help`."),
        (["x.hdf5", "--too", "dsrl"], "unknown option '--too'; did you mean --to?"),
        (["x.hdf5", "--density", "0.5"], "add --env TASK, or give --grid numbers."),
        (["x.hdf5", "--density", "0.3", "--env", "CarRun"], "(it has 0.5, 0.75); give --grid numbers."),
        (["x.hdf5", "--density", "0.5", "--grid", "2", "2", "2", "0"], "--density and --grid say the same"),
        (["x.hdf5", "--outliers", "0.1"], "add --cost-limit."),
        (["x.hdf5", "--inpaint", "0", "2", "0", "1"], "is not (lowest, highest cost"),
        (["x.hdf5", "--noise", "-1"], "the scale of the noise is -1"),
    ],
)
def test_what_cannot_be_converted(
    saferl: Saferl, data: OfflineDataset, words: list[str], message: str
) -> None:
    status, _, err = saferl("dataset", "convert", "data.hdf5", *words)
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert left(Path()) == ["data.hdf5"]


def test_filters_are_dsrls(saferl: Saferl, cache: Path) -> None:
    rng = np.random.default_rng(3)
    made = make(rng.uniform(205, 570, 400), rng.integers(0, 41, 400), trailing=1)
    write_dsrl(cache / CAR_RUN.file_name, made)
    read = read_dsrl(cache / CAR_RUN.file_name)
    status, out, _ = saferl("dataset", "convert", "CarRun", "thin.hdf5", "--density", "0.5", "--seed", "0")
    assert status == 0
    thin = read_dsrl("thin.hdf5")
    same(thin, pre_process(read, seed=0, grid=density_preset("CarRun", 0.5)))
    assert 0 < thin.num_episodes < 400
    assert f"{thin.num_episodes} of 400 episodes" in out
    assert "left out: the last 1 transitions" in out
    words = ["--grid", "4", "5", "12", "1", "--outliers", "0.02", "--inpaint", "0", "0.2", "0", "0.5"]
    words += ["--inpaint", "0.9", "1", "0", "1", "--epsilon", "3", "--noise", "0.1", "--cost-limit", "20"]
    assert saferl("dataset", "convert", "CarRun", "hard.hdf5", *words)[0] == 0
    grid = type(density_preset("CarRun", 0.5))(cost_bins=4, return_bins=5, max_per_cell=12, min_per_cell=1)
    rectangles = [(0, 0.2, 0, 0.5), (0.9, 1, 0, 1)]
    expected = pre_process(
        read, grid=grid, outliers=0.02, inpainted=rectangles, epsilon=3, noise=0.1, cost_limit=20
    )
    same(read_dsrl("hard.hdf5"), expected)
    # Nothing asked for, nothing done: also not to the transition behind the last episode.
    assert saferl("dataset", "convert", "CarRun", "copy.hdf5", "--seed", "5")[0] == 0
    same(read_dsrl("copy.hdf5"), read)


@pytest.mark.parametrize(
    ("out", "layout"), [("new.hdf5", "dsrl"), ("new.hdf5", "d4rl"), ("new-v0", "minari")]
)
def test_an_interrupted_conversion_leaves_nothing(
    saferl: Saferl, data: OfflineDataset, monkeypatch: pytest.MonkeyPatch, out: str, layout: str
) -> None:
    def stop(self: progress.Meter, done: int, total: int | None) -> None:
        if self._title == "writing":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.Meter, "__call__", stop)
        status, _, err = saferl("dataset", "convert", "data.hdf5", out, "--to", layout)
        assert status == 130
        assert f"stopped; {out} was not written" in err
        assert left(Path()) == ["data.hdf5"]
    assert saferl("dataset", "convert", "data.hdf5", out, "--to", layout)[0] == 0
    earlier = load(out)
    monkeypatch.setattr(progress.Meter, "__call__", stop)
    assert saferl("dataset", "convert", "data.hdf5", out, "--to", layout, "--overwrite")[0] == 130
    same(load(out), earlier)
    assert left(Path()) == sorted(["data.hdf5", out])


def test_a_real_interrupt_while_the_library_is_at_work(cache: Path) -> None:
    """A Ctrl-C that arrives while HDF5 packs an array."""
    write_dsrl("data.hdf5", make(np.arange(40.0), np.zeros(40), steps=1000, sizes=(60, 2)))
    words = [sys.executable, "-m", "saferl", "dataset", "convert", "data.hdf5", "new.hdf5"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(Path().glob(".new.hdf5.*.tmp")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped; new.hdf5 was not written" in err
    assert "Traceback" not in err
    assert left(Path()) == ["data.hdf5"]


# --- validate -------------------------------------------------------------------------------------------


def test_validate_counts_or_names_every_fault(saferl: Saferl, data: OfflineDataset, cache: Path) -> None:
    status, out, _ = saferl("dataset", "validate", "data.hdf5")
    assert status == 0
    assert out == (
        "data.hdf5: OK (dsrl layout, 4 episodes, 9 transitions, 1 of them behind the last episode)\n"
    )
    with h5py.File("data.hdf5", "r+") as file:
        rewards = file["rewards"][()]
        rewards[[3, 5]] = np.nan
        file["rewards"][...] = rewards
        del file["next_observations"], file["timeouts"]
        file["timeouts"] = np.arange(9)
    status, out, _ = saferl("dataset", "validate", "data.hdf5")
    assert status == 1
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("data.hdf5 has no array 'next_observations'")
    assert "rewards is NaN, infinite or too large for float32 in row 3 and 1 more up to row 5" in lines[1]
    assert "timeouts is neither 0 nor 1 in row 2 and 6 more up to row 8" in lines[2]
    assert lines[3] == "data.hdf5: 3 faults"


def test_validate_compares_the_checksum(saferl: Saferl, data: OfflineDataset, cache: Path) -> None:
    path = cache / CAR_RUN.file_name
    sidecar = path.with_name(f"{path.name}.sha256")
    sidecar.write_text(f"{download._digest(path)}  {path.name}\n")
    assert "checksum agrees" in saferl("dataset", "validate", "CarRun")[1]
    sidecar.write_text(f"{'0' * 64}  {path.name}\n")
    status, out, _ = saferl("dataset", "validate", "CarRun")
    assert status == 1
    assert "is damaged or another version" in out
    assert f"{path}: 1 fault\n" in out


def test_validate_what_is_no_data_set(saferl: Saferl, cache: Path) -> None:
    Path("text.hdf5").write_text("text")
    Path("cut.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40))
    for name, message in {
        "text.hdf5": "text.hdf5 is not an HDF5 file.",
        "cut.hdf5": "the file is damaged, get it again.",
        "none.hdf5": "none.hdf5 does not exist; mend the path or name a task.",
        str(cache): "is a folder without a Minari data set",
    }.items():
        for words in (["validate", name], ["info", name], ["convert", name, "new.hdf5"]):
            status, out, err = saferl("dataset", *words)
            assert (status, out) == (1, "")
            assert message in err
    assert left(Path()) == ["cut.hdf5", "text.hdf5"]


# --- download and list ----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a folder that holds all Bullet tasks but one."""
    monkeypatch.setattr(download, "_PAUSE", 0.001)
    folder = tmp_path / "server"
    folder.mkdir()
    for task in TASKS.values():
        if task.family == "bullet" and task.key != "DroneRun":
            sizes = task.observation_size, task.action_size
            write_dsrl(folder / task.file_name, make([1, 2], [0, 3], sizes=sizes))
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    service = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=str(folder))
    )
    thread = threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{service.server_port}"
    service.shutdown()
    service.server_close()
    thread.join()


def test_download_tasks_and_families(saferl: Saferl, cache: Path, server: str) -> None:
    path = cache / CAR_RUN.file_name
    status, out, _ = saferl("dataset", "download", "CarRun", "OfflineCarRun-v0", "--base-url", server)
    assert status == 0
    assert out == f"CarRun: {path} ({path.stat().st_size / 1e6:,.1f} MB)\n"
    status, out, err = saferl("dataset", "download", "bullet", "--base-url", server)
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines()] == [
        key for key, task in TASKS.items() if task.family == "bullet" and key != "DroneRun"
    ]
    assert "was there" in out.splitlines()[5]
    missing = TASKS["DroneRun"].file_name
    assert f"{server}/{missing} could not be downloaded (the server answers 404" in err
    assert f"put the file at {cache / missing} by hand." in err
    status, out, _ = saferl("dataset", "download", "CarRun", "BallRun", "--offline")
    assert (status, out.count("was there")) == (0, 2)
    assert saferl("dataset", "info", "BallRun", "--offline")[0] == 0


def test_no_server_is_one_sentence_with_the_files_place(
    saferl: Saferl, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PAUSE", 0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    status, out, err = saferl("dataset", "download", "CarRun", "BallRun", "--base-url", url)
    assert status == 1
    assert err == (
        f"saferl: {url}/{CAR_RUN.file_name} could not be downloaded (Connection refused); try again when the "
        f"connection is better, or put the file at {cache / CAR_RUN.file_name} by hand.\n"
    )
    assert out.count("Connection refused; trying again in") == 4
    monkeypatch.setattr(download, "BASE_URL", url)
    for words in (["info", "CarRun"], ["plot", "CarRun", "-o", "a.png"], ["convert", "CarRun", "a.hdf5"]):
        assert f"put the file at {cache / CAR_RUN.file_name} by hand." in saferl("dataset", *words)[2]
        status, _, err = saferl("dataset", *words, "--offline")
        assert status == 1
        assert f"{cache / CAR_RUN.file_name} is not there and may not be downloaded" in err
    assert left(cache) == left(Path()) == []


def test_an_interrupted_download_is_resumed(
    saferl: Saferl, cache: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: progress.Meter, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_BLOCK", 1000)
        patch.setattr(progress.Meter, "__call__", stop)
        status, _, err = saferl("dataset", "download", "CarRun", "--base-url", server)
    assert status == 130
    assert "what has arrived is kept, the same command goes on from there" in err
    assert (cache / f"{CAR_RUN.file_name}.part").stat().st_size == 1000
    assert "in part" in next(line for line in saferl("dataset", "list")[1].splitlines() if "CarRun " in line)
    assert saferl("dataset", "download", "CarRun", "--base-url", server)[0] == 0
    assert left(cache) == [CAR_RUN.file_name, f"{CAR_RUN.file_name}.sha256"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CarRum", "unknown offline task 'CarRum'; did you mean 'CarRun'?"),
        ("bulet", "unknown task or family 'bulet'; did you mean 'bullet'?"),
        ("zzzz", "unknown task or family 'zzzz'; known: "),
    ],
)
def test_unknown_names(saferl: Saferl, cache: Path, name: str, message: str) -> None:
    status, _, err = saferl("dataset", "download", "BallRun", name, "--offline")
    assert status == 2
    assert message in err


def test_list(saferl: Saferl, data: OfflineDataset, cache: Path) -> None:
    status, out, _ = saferl("dataset", "list")
    assert status == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:39]}
    assert list(rows) == list(TASKS)
    assert rows["PointGoal1"] == [
        *("PointGoal1", "SafetyPointGoal1-v0", "60", "2", "1000", "2022", "20,", "40,", "80", "-")
    ]
    assert rows["CarRun"][1] == "SafetyCarRun-v0"
    assert rows["easysparse"][1] == "-"
    assert rows["CarRun"][-2:] == ["0.0", "MB"]
    assert out.endswith(f"\n1 of 38 files are in {cache}\n")


# --- the whole ------------------------------------------------------------------------------------------


def test_wrong_use_and_help(saferl: Saferl, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = saferl("dataset", "--help")
    assert status == 0
    for command in ("info", "plot", "validate", "convert", "download", "list"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)
        status, text, _ = saferl("dataset", command, "--help")
        assert status == 0
        assert f"usage: saferl dataset {command}" in text
    assert saferl("dataset")[0] == 2
    assert "unknown dataset command 'inof'; did you mean 'info'?" in saferl("dataset", "inof", "x")[2]
    assert "missing: FILE|NAME" in saferl("dataset", "info")[2]
    assert (
        "unknown file or offline task 'PointGaol1'; did you mean 'PointGoal1'?"
        in (saferl("dataset", "info", "PointGaol1")[2])
    )
    assert "missing: -o PATH, --output PATH" in saferl("dataset", "plot", "x.hdf5")[2]
    assert saferl("dataset", "download")[0] == 2
    Path("x.hdf5").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
    status, _, err = saferl("dataset", "info", "x.hdf5")
    assert status == 1
    assert "`saferl dataset info` needs h5py, which is not installed; run: pip install h5py" in err


def test_what_takes_long_shows_how_far_it_is(
    saferl: Saferl, data: OfflineDataset, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", -1)
    monkeypatch.setattr(download, "BASE_URL", server)
    for words, titles in (
        (["validate", "data.hdf5"], ["checking"]),
        (["convert", "data.hdf5", "new-v0"], ["reading", "writing"]),
        (["validate", "new-v0"], ["checking"]),
        (["convert", "new-v0", "flat.hdf5", "--to", "d4rl"], ["reading", "writing"]),
        (["info", "flat.hdf5"], ["reading"]),
        (["info", "AntRun"], ["downloading", "reading"]),
        (["download", "BallRun"], ["downloading BallRun"]),
    ):
        status, out, _ = saferl("dataset", *words)
        assert status == 0
        lines = re.findall(r"^(.+?)  ([\d,]+)/([\d,]+) kB \((\d+) %\)", out, re.MULTILINE)
        assert [line[0] for line in lines] == titles
        assert all(done == total for _, done, total, _ in lines)


def test_a_meter_of_unknown_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    with progress.Meter("downloading") as meter:
        meter(3_400_000, None)
        meter.say("a word")
    assert capsys.readouterr().out == "downloading  3 MB\na word\n"


# --- training on a task's data --------------------------------------------------------------------------

TINY = [
    "--total-steps",
    "4",
    "--batch-size",
    "16",
    "--critic-batch-size",
    "8",
    "--width",
    "8",
    "--blocks",
    "1",
]
TINY += ["--hidden-sizes", "8", "--log-interval", "2", "--quiet"]


def test_fisor_knows_the_environment_of_a_task(saferl: Saferl, cache: Path) -> None:
    task = TASKS["PointGoal1"]
    write_dsrl(cache / task.file_name, make([5, 6, 7], [0, 1, 4], steps=20, sizes=(60, 2)))
    for name, folder in (("PointGoal1", "one"), (cache / task.file_name, "two")):
        assert saferl("train", "fisor", "--dataset", name, *TINY, "--run", folder)[0] == 0
        stored = json.loads(Path(folder, "config.json").read_text())["config"]
        assert stored["env"] == "SafetyPointGoal1-v0"
        assert stored["dataset"] == str(name)
    assert saferl("train", "--resume", "one", "--total-steps", "6", "--quiet")[0] == 0
    assert saferl("evaluate", "one", "--episodes", "1", "--quiet")[0] == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "easysparse",
            "the environment of easysparse is none of saferl's; add --env ID of one with 261 observations",
        ),
        ("data.hdf5", "nothing says which environment data.hdf5 is of; add --env ID."),
        ("folder/data", "nothing says which environment folder/data is of; add --env ID."),
        ("PointGaol1", "unknown offline task 'PointGaol1'; did you mean 'PointGoal1'?"),
    ],
)
def test_fisor_asks_for_the_environment_of_other_data(
    saferl: Saferl, data: OfflineDataset, name: str, message: str
) -> None:
    status, _, err = saferl("train", "fisor", "--dataset", name, *TINY)
    assert status == 2
    assert message in err
    assert left(Path()) == ["data.hdf5"]
