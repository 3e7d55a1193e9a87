"""`saferl starc`: exact and sampled comparisons, what it writes, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from saferl.starc import TabularMDP, regret, starc_distance

REWARDS = """
import numpy as np

def shaped(s, a, after):
    angle = np.arctan2(s[:, 1], s[:, 0])
    cost = angle**2 + 0.1 * s[:, 2] ** 2 + 0.001 * (2 * a[:, 0]) ** 2
    return -cost + 0.99 * 3 * after[:, 2] - 3 * s[:, 2]

def broken(s, a, after):
    return s[:, 7]

def nan(s, a, after):
    return np.nan * s[:, 0]

def by_action(mdp):
    return np.ones((mdp.num_states, 1)) * np.arange(mdp.num_actions)

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of rewards and a process; one module name a test, since imports stay."""
    name = f"rewards_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.ones(5), (5, 2))
    task, cost = rng.normal(size=(5, 2)), rng.random((5, 2, 5))
    np.savez(
        tmp_path / "mdp.npz",
        transitions=table,
        discount=0.9,
        task=task,
        cost=cost,
        opposite=-task,
        constant=1.0,
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def module(folder: Path) -> str:
    return next(folder.glob("rewards_*.py")).stem


def test_exactly(saferl: Any, folder: Path) -> None:
    names = ["task", "cost", "opposite", "constant", f"{module(folder)}:by_action"]
    status, out, err = saferl("starc", *names, "--mdp", "mdp.npz", "--output", "out")
    assert status == 0, err
    archive = np.load("mdp.npz")
    mdp = TabularMDP(archive["transitions"], 0.9)
    found = json.loads(Path("out/starc.json").read_text())
    assert found["rewards"] == names
    distances = np.array(found["distances"])
    assert distances[0, 1] == pytest.approx(starc_distance(archive["task"], archive["cost"], mdp))
    assert distances[0, 2] == pytest.approx(2)
    assert distances[0, 3] == pytest.approx(1)
    lost = regret(archive["task"], archive["cost"], mdp)
    assert f"optimising cost costs up to {lost:.1%} of the range of task" in out
    assert "optimising opposite costs up to 100.0%" in out
    assert "caution: all policies earn constant alike" in out
    for picture in ("distances.png", "map.png"):
        assert Path("out", picture).read_bytes()[:4] == b"\x89PNG"


def test_other_norms(saferl: Any, folder: Path) -> None:
    words = ["--mdp", "mdp.npz", "--canonicalization", "minimal", "--norm", "w2", "--metric", "angle"]
    status, out, err = saferl("starc", "task", "cost", *words, "--output", "out")
    assert status == 0, err
    assert "angle in radians" in out


def test_from_an_environment(saferl: Any, folder: Path) -> None:
    name = f"{module(folder)}:shaped"
    words = ["--env", "Pendulum-v1", "--episodes", "40", "--resamples", "20", "--output", "out", "--quiet"]
    status, out, err = saferl("starc", "reward", name, *words)
    assert status == 0, err
    found = json.loads(Path("out/starc.json").read_text())
    assert found["distances"][0][1] < 0.05
    assert found["low"][0][1] <= found["distances"][0][1] <= found["high"][0][1]
    assert f"a step along the advantages of {name} brings 100%" in out


def test_from_a_data_set_with_columns_and_a_reward_model(saferl: Any, folder: Path) -> None:
    rng = np.random.default_rng(0)
    count = 2_000
    s, a = rng.normal(size=(count, 3)), rng.uniform(-1, 1, (count, 2))
    after = 0.9 * s + 0.1 * rng.normal(size=(count, 3))
    ends = np.arange(count) % 50 == 49
    columns = {
        "observations": s,
        "next_observations": after,
        "actions": a,
        "rewards": s[:, 0] * a[:, 0],
        "costs": (s[:, 1] > 1) * 1.0,
        "terminals": np.zeros(count),
        "timeouts": ends * 1.0,
        "learned": -s[:, 0] * a[:, 0],
        "short": np.zeros(3),
    }
    with h5py.File("data.hdf5", "w") as file:
        for name, values in columns.items():
            file[name] = values.astype(np.float32)

    class Model(torch.nn.Module):
        def forward(self, s: torch.Tensor, a: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            return 3 * s[:, 0] * a[:, 0] + 0.99 * after[:, 1] - s[:, 1]

    torch.jit.script(Model()).save("model.pt")
    words = ["--dataset", "data.hdf5", "--resamples", "20", "--output", "out"]
    status, _, err = saferl("starc", "rewards", "learned", "model.pt", "costs", *words)
    assert status == 0, err
    distances = np.array(json.loads(Path("out/starc.json").read_text())["distances"])
    assert distances[0, 1] > 1.9
    assert distances[0, 2] < 0.05
    status, _, err = saferl("starc", "rewards", "short", *words)
    assert status == 1
    assert "the column short has 3 rows for 2,000 transitions" in err


PENDULUM = ["--env", "Pendulum-v1", "--episodes", "4", "--quiet"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["task", "--mdp", "mdp.npz"], "at least two rewards"),
        (["task", "task", "--mdp", "mdp.npz"], "named twice"),
        (["task", "cost"], "one of --env ID, --mdp FILE, --dataset FILE"),
        (["task", "cost", "--mdp", "mdp.npz", "--env", "Pendulum-v1"], "one of --env ID"),
        (["task", "lost", "--mdp", "mdp.npz"], "lost is no array of mdp.npz (task, cost"),
        (["task", "cost", "--mdp", "no.npz"], "there is no file no.npz"),
        (["task", "cost", "--mdp", "{module}.py"], "no intact NumPy archive"),
        (["task", "cost", "--mdp", "mdp.npz", "--discount", "1"], "the discount is 1"),
        (["task", "transitions", "--mdp", "mdp.npz", "--norm", "3"], "invalid choice '3'"),
        (["task", "cost", "--mdp", "mdp.npz", "--canonicalization", "epick"], "did you mean 'epic'"),
        (["task", "cost", "--mdp", "mdp.npz", "--norm", "1", "--metric", "angle"], "the angle needs"),
        (["task", "{module}:lost", "--mdp", "mdp.npz"], "cannot be imported"),
        (["task", "{module}:number", "--mdp", "mdp.npz"], "is no function"),
        (["task", "{module}:broken", "--mdp", "mdp.npz"], "failed: TypeError"),
        (["reward", "{module}:broken", *PENDULUM], "{module}:broken failed: IndexError"),
        (["reward", "{module}:nan", *PENDULUM], "{module}:nan is not finite at transition 0"),
        (["reward", "unknown", *PENDULUM], "neither a column (reward, cost)"),
        (["reward", "model.pt", *PENDULUM], "there is no file model.pt"),
        (["reward", "cost", *PENDULUM, "--norm", "1"], "other norms need --mdp"),
        (["reward", "cost", *PENDULUM, "--canonicalization", "epic"], "epic needs --mdp"),
        (["reward", "cost", "--env", "Pendulum-v1", "--episodes", "2"], "at least 4"),
        (["reward", "cost", "--env", "Pendulumm-v1"], "Pendulum"),
    ],
)
def test_wrong_use(saferl: Any, folder: Path, words: list[str], sentence: str) -> None:
    name = module(folder)
    status, _, err = saferl("starc", *(word.replace("{module}", name) for word in words))
    assert status == 2
    assert sentence.replace("{module}", name) in err
    assert len(err.strip().splitlines()) == 1
    assert not (folder / "runs").exists()
