"""`saferl evaluate` shows a policy what it saw in training, and leaves out what only training needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saferl.agents import LEARNERS, Learner
from saferl.cli import main

SMALL = ["--env", "SpeedLimit-v0", "--total-steps", "800", "--steps-per-iteration", "400", "--num-envs", "4"]
SMALL += ["--epochs", "2", "--quiet"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ppo-saute", "ppo-simmer", "ppo-early-terminated", "trpo-saute"):
        module = f"saferl.agents.online.{name.replace('-', '_')}"
        monkeypatch.setitem(LEARNERS, name, LEARNERS.get(name, Learner(module, "")))


def evaluated(run: Path, *words: str) -> dict[str, Any]:
    assert main(["evaluate", str(run), "--episodes", "6", "--num-envs", "3", "--quiet", *words]) == 0
    written: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return written


@pytest.mark.parametrize("name", ["ppo-saute", "ppo-simmer", "trpo-saute"])
def test_budgets_are_shown_and_the_return_is_the_environments(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--cost-limit", "speed=0.001,throttle=0.001", "--unsafe-reward", "-1000", "--horizon", "50"]
    small = [word.replace("--epochs", "--critic-epochs") for word in SMALL] if "trpo" in name else SMALL
    assert main(["train", name, *small, *options, "--run", str(run)]) == 0
    written = evaluated(run)
    # The budgets are spent at once, yet no unsafe reward is counted.
    assert 0 < written["return"]["mean"] < 19
    assert written["limits"] == {"speed": 0.001, "throttle": 0.001}
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert evaluated(run)["return"] == written["return"]
    assert main(["evaluate", str(newest), "--episodes", "2", "--quiet"]) == 0


def test_early_termination_does_not_apply(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        main(["train", "ppo-early-terminated", *SMALL, "--cost-limit", "throttle=1", "--run", str(run)]) == 0
    )
    written = evaluated(run, "--stochastic")
    assert written["costs"]["throttle"]["mean"] > 2
