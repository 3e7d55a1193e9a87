"""`load` and its detection of layouts, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import saferl.envs.datasets as package
from saferl.envs.datasets import OfflineDataset, detect_format, load, write_dsrl
from saferl.envs.datasets.tasks import TASKS
from saferl.errors import DatasetError, UsageError


def test_the_import_is_light() -> None:
    code = (
        "import sys, saferl.envs.datasets as d; d.load, d.validate;"
        "print([m for m in ('h5py', 'matplotlib', 'torch', 'urllib.request') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_is_there() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_names_and_paths_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'PointGoal1'"):
        load("PointGoal1x")
    with pytest.raises(UsageError, match="unknown file or offline task 'recording'; known: AntCircle"):
        load("recording")
    for path in (tmp_path / "no.hdf5", "no.hdf5", "folder/no"):
        with pytest.raises(DatasetError, match="does not exist; mend the path or name a task"):
            load(path)


def test_a_layout_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(DatasetError, match=r"neither DSRL's, D4RL's nor Minari's layout; it holds weights"):
        load(path)


def test_an_official_name_is_never_taken_for_another_layout(tmp_path: Path, dataset: OfflineDataset) -> None:
    """Else a file that lost its costs would be read as one without any."""
    path = tmp_path / TASKS["CarRun"].file_name
    write_dsrl(path, dataset)
    with h5py.File(path, "r+") as file:
        del file["costs"]
    with pytest.raises(DatasetError, match="has no array 'costs'"):
        load(path)
    assert detect_format(path) == "dsrl"


def test_the_environment_names_the_task(tmp_path: Path, dataset: OfflineDataset) -> None:
    path = tmp_path / "data.hdf5"
    write_dsrl(path, dataset)
    assert load(path).task is None
    assert load(path, env="SpeedLimit-v0").task is None
    with pytest.raises(DatasetError, match="observations have 4 components and PointGoal1's 60"):
        load(path, env="SafetyPointGoal1-v0")
    with pytest.raises(UsageError, match="unknown environment"):
        load(path, env="Nowhere-v0")
