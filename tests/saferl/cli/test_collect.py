"""`saferl collect`, and an offline learner trained on what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from saferl.cli import main
from saferl.envs.datasets import load
from saferl.experiment.checkpoint import list_checkpoints, load_checkpoint

Saferl = Callable[..., tuple[int, str, str]]
SMALL = [
    "--total-steps",
    "800",
    "--steps-per-iteration",
    "400",
    "--num-envs",
    "4",
    "--epochs",
    "1",
    "--quiet",
]
TINY = [
    "--env",
    "PointRobot-v0",
    "--batch-size",
    "32",
    "--critic-batch-size",
    "16",
    "--width",
    "16",
    "--blocks",
    "1",
]
TINY += ["--hidden-sizes", "16", "--log-interval", "5", "--checkpoint-interval", "0", "--quiet"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("collect")
    run, file = folder / "run", folder / "data.hdf5"
    assert main(["train", "ppo", "--env", "PointRobot-v0", *SMALL, "--run", str(run)]) == 0
    words = ["--episodes", "6", "--random-episodes", "5", "--num-envs", "4", "--quiet"]
    assert main(["collect", str(run), "-o", str(file), *words]) == 0
    return run, file


def test_the_file_is_in_dsrls_format(recorded: tuple[Path, Path]) -> None:
    with h5py.File(recorded[1]) as file:
        assert {key: file[key].dtype for key in file} == {
            **dict.fromkeys(("observations", "next_observations", "actions", "rewards", "costs"), np.float32),
            **dict.fromkeys(("terminals", "timeouts"), file["terminals"].dtype),
        }
        assert all(file[key].compression == "gzip" for key in file)
        assert all(len(file[key]) == len(file["rewards"]) for key in file)
    data = load(recorded[1])
    assert (data.num_episodes, data.trailing) == (11, 0)
    assert data.observations.shape[1] == 11


def test_wrong_use(saferl: Saferl, recorded: tuple[Path, Path], tmp_path: Path) -> None:
    run, file = recorded
    assert "--overwrite" in saferl("collect", run, "-o", file)[2]
    assert saferl("collect", "-o", tmp_path / "x.hdf5")[0] == 2
    status, _, err = saferl("collect", run, "--env", "SpeedLimit-v0", "-o", tmp_path / "x.hdf5", "--quiet")
    assert status == 1
    assert "observations of shape" in err
    status, _, err = saferl("train", "fisor", "--dataset", file, *TINY, "--env", "SpeedLimit-v0")
    assert status == 2
    assert "of size 11" in err
    assert saferl("train", "fisor", "--dataset", tmp_path / "none.hdf5", *TINY, "--total-steps", "5")[0] in (
        1,
        2,
    )
    assert not list(tmp_path.glob("x.hdf5*"))


def test_fisor_trains_resumes_to_the_same_bits_and_evaluates(
    saferl: Saferl, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ["--dataset", recorded[1], *TINY]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert saferl("train", "fisor", *words, "--total-steps", 30, "--run", whole)[0] == 0
    assert saferl("train", "fisor", *words, "--total-steps", 15, "--run", parts)[0] == 0
    status, out, _ = saferl("train", "--resume", parts, "--total-steps", 30, "--quiet")
    assert status == 0
    assert "resumed at gradient step 15" in out
    one, other = (load_checkpoint(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, parts))
    _same(one, other)
    rows = [(run / "metrics.csv").read_text().splitlines() for run in (whole, parts)]
    assert len(rows[0]) == len(rows[1]) == 7

    assert saferl("evaluate", whole, "--episodes", "3", "--num-envs", "3", "--quiet")[0] == 0
    first = json.loads((whole / "evaluation.json").read_text())
    assert saferl("evaluate", parts, "--episodes", "3", "--num-envs", "3", "--quiet")[0] == 0
    assert json.loads((parts / "evaluation.json").read_text())["return"] == first["return"]


def test_a_preset_changes_defaults_and_what_is_typed_goes_before_it(
    saferl: Saferl, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--dataset", recorded[1], *TINY, "--preset=cpu", "--total-steps", 2, "--run", run]
    assert saferl("train", "fisor", *words)[0] == 0
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["policy_lr_steps"] == 150_000
    assert config["total_steps"] == 2
    assert "preset" not in config


def _same(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            _same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        for a, b in zip(one, other, strict=True):
            _same(a, b)
    else:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
