"""Killed, interrupted and terminated runs go on and end with the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saferl.experiment.checkpoint import list_checkpoints
from saferl.experiment.metrics import read_metrics

TRAIN = ["train", "ppo-lag", "--env", "SpeedLimit-v0", "--cost-limit", "speed=5", "--num-envs", "4"]
TRAIN += [
    "--steps-per-iteration",
    "80",
    "--epochs",
    "2",
    "--hidden-sizes",
    "16",
    "--checkpoint-interval",
    "0",
]
TRAIN += ["--total-steps", "12000", "--quiet"]


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "saferl", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def steps_done(folder: Path) -> int:
    found = list_checkpoints(folder / "checkpoints")
    return int(found[-1].name[5:]) if found else 0


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> None:
    while process.poll() is None and steps_done(folder) < steps:
        time.sleep(0.005)


def record(folder: Path) -> tuple[bytes, bytes, list[dict[str, float]]]:
    newest = list_checkpoints(folder / "checkpoints")[-1]
    rows = read_metrics(folder / "metrics.csv")
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return (newest / "policy.safetensors").read_bytes(), (newest / "training.safetensors").read_bytes(), rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    status, _, err = finish(start(*TRAIN, "--run", folder))
    assert status == 0, err
    return folder


@pytest.mark.timeout(900)
def test_ten_kills_change_nothing(whole: Path, tmp_path: Path) -> None:
    """SIGKILL at ten moments of one run: while starting, rolling out, updating, writing a checkpoint."""
    folder = tmp_path / "run"
    chance = random.Random(0)
    killed_at = []
    for kill in range(10):
        words = (
            ["train", "--resume", folder, "--quiet"]
            if (folder / "config.json").exists()
            else [*TRAIN, "--run", folder]
        )
        process = start(*words)
        if kill == 0:
            time.sleep(chance.uniform(0.2, 1.0))  # before there is anything to resume
        else:
            wait_for_steps(process, folder, steps_done(folder) + chance.randrange(80, 1200, 80))
            time.sleep(chance.uniform(0, 0.06))
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at.append(steps_done(folder))
    assert killed_at[-1] < 12000
    assert len(set(killed_at)) >= 9
    status, _, err = finish(start("train", "--resume", folder, "--quiet"))
    assert status == 0, err
    assert record(folder) == record(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_orderly_stop_saves_and_says_how_to_go_on(
    number: signal.Signals, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(*TRAIN, "--checkpoint-interval", "1000000", "--run", folder)
    rows = folder / "metrics.csv"
    while process.poll() is None and not (rows.exists() and len(rows.read_text().splitlines()) > 20):
        time.sleep(0.01)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 130
    assert f"saferl train --resume {folder}" in err
    assert "Traceback" not in err
    assert steps_done(folder) >= 80 * 19
    status, _, err = finish(start("train", "--resume", folder, "--quiet"))
    assert status == 0, err
    policy, training, metrics = record(folder)
    assert policy == record(whole)[0]
    assert training == record(whole)[1]
    assert metrics == record(whole)[2]
