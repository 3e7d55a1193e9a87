"""The trust-region learners on SpeedLimit: each keeps the limit in its own way, and none by standing still.

Full throttle costs 90 and returns 18.9; the optimum returns 12.4 with the limit of 25 and 9.9 without any
cost. A car that stalls ends its episode early, at a return near 0.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from saferl.agents.online import cpo, crpo, pcpo, rcpo, trpo, trpo_lag, trpo_pid
from saferl.experiment.config import to_json
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run

LIMIT = 25.0
SHARED: dict[str, Any] = {
    "env": "SpeedLimit-v0",
    "num_envs": 20,
    "total_steps": 60_000,
    "steps_per_iteration": 2_000,
    "target_kl": 0.02,
    "critic_lr": 2e-3,
    "hidden_sizes": (32,),
    "log_std_init": -0.5,
}
ADDITIVE: dict[str, Any] = {"multiplier_optimizer": "sgd", "multiplier_lr": 0.02, "multiplier_max": 5.0}
LEARNERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (trpo, {}),
    "trpo-lag": (trpo_lag, ADDITIVE),
    "rcpo": (rcpo, ADDITIVE),
    "trpo-pid": (
        trpo_pid,
        {"kp": 0.05, "ki": 0.01, "kd": 0.02, "ema_p": 0.0, "ema_d": 0.0, "delay": 1},
    ),
    "cpo": (cpo, {}),
    "pcpo": (pcpo, {}),
    "crpo": (crpo, {}),
}


@cache
def curves(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return and cost of each iteration of the second half of training."""
    module, options = LEARNERS[name]
    if name != "trpo":
        options = {**options, "cost_limit": {"speed": LIMIT}, "cost_window": 20}
    config = module.Config(**SHARED, **options, seed=seed)
    with TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", {"algorithm": name, "config": to_json(config)}, quiet=True)
        module.train(config, run)
        run.close()
        rows = read_metrics(run.directory / "metrics.csv")
    half = rows[len(rows) // 2 :]
    return np.array([r["train/return"] for r in half]), np.array([r["train/cost"] for r in half])


def test_trpo_breaks_the_limit() -> None:
    returns, costs = curves("trpo", 0)
    assert costs[-5:].mean() > 3 * LIMIT
    assert returns[-5:].mean() > 17


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["cpo", "pcpo"])
def test_projections_settle_at_the_limit_and_near_the_optimum(name: str, seed: int) -> None:
    returns, costs = curves(name, seed)
    assert 0.93 * LIMIT < costs[-10:].mean() < 1.07 * LIMIT
    assert returns[-10:].mean() > 12  # the optimum is 12.4


@pytest.mark.parametrize("name", ["trpo-lag", "rcpo", "trpo-pid", "crpo"])
def test_the_others_keep_it_on_average_and_earn_more_than_the_timid_optimum(name: str) -> None:
    returns, costs = curves(name, 0)
    assert 0.3 * LIMIT < costs.mean() < 1.4 * LIMIT
    assert 9.9 < returns.mean() < 14
