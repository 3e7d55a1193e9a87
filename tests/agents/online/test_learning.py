"""The constrained learners keep a limit that the unconstrained one breaks, on a toy with a known optimum.

SpeedLimit's limit of 25 costs 90 at full throttle; the constrained optimum returns 12.4, the unconstrained
one 18.95 and obeying the sign at all times 9.9. The problem is linear, so dual ascent circles around the
limit and its average is what the theory promises, while a PID controller settles.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from saferl.agents.online import cppo_pid, ppo, ppo_lag
from saferl.experiment.config import to_json
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run

LIMIT = 25.0
SHARED: dict[str, Any] = {
    "env": "SpeedLimit-v0",
    "num_envs": 20,
    "total_steps": 60_000,
    "steps_per_iteration": 2_000,
    "epochs": 10,
    "actor_lr": 1e-3,
    "critic_lr": 1e-3,
    "hidden_sizes": (32,),
    "log_std_init": -0.5,
}
LEARNERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ppo": (ppo, {}),
    "ppo-lag": (ppo_lag, {"multiplier_optimizer": "sgd", "multiplier_lr": 0.02, "multiplier_max": 5.0}),
    "cppo-pid": (
        cppo_pid,
        {"kp": 0.05, "ki": 0.01, "kd": 0.02, "ema_p": 0.0, "ema_d": 0.0, "delay": 1},
    ),
}


@cache
def curves(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return and cost of each iteration of the second half of training."""
    module, options = LEARNERS[name]
    if name != "ppo":
        options = {**options, "cost_limit": {"speed": LIMIT}, "cost_window": 20}
    config = module.Config(**SHARED, **options, seed=seed)
    with TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", {"algorithm": name, "config": to_json(config)}, quiet=True)
        module.train(config, run)
        run.close()
        rows = read_metrics(run.directory / "metrics.csv")
    half = rows[len(rows) // 2 :]
    return np.array([r["train/return"] for r in half]), np.array([r["train/cost"] for r in half])


def test_ppo_breaks_the_limit() -> None:
    returns, costs = curves("ppo", 0)
    assert costs[-5:].mean() > 3 * LIMIT
    assert returns[-5:].mean() > 17


@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_lag_keeps_it_on_average_and_earns_more_than_the_timid_optimum(seed: int) -> None:
    returns, costs = curves("ppo-lag", seed)
    assert 0.2 * LIMIT < costs.mean() < 1.3 * LIMIT
    assert 9.9 < returns.mean() < 14


@pytest.mark.parametrize("seed", [0, 1])
def test_cppo_pid_settles_near_it(seed: int) -> None:
    returns, costs = curves("cppo-pid", seed)
    assert 0.5 * LIMIT < costs[-10:].mean() < 1.5 * LIMIT  # PPO ends at 3.6 times the limit
    assert costs.std() < 10
    assert returns[-5:].mean() > 10.5
