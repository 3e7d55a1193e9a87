"""SAC and TD3 on SpeedLimit: plain they break the limit, constrained they come back to it.

Full throttle costs 90 and returns 18.9; the optimum returns 12.4 with the limit of 25 and 9.9 without any
cost. A car that stalls ends its episode early, at a return near 0. The problem is linear, so a deterministic
policy jumps between both sides of the right multiplier (0.1), where SAC's entropy lets it settle.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from saferl.agents.online import sac, sac_lag, sac_pid, td3, td3_lag, td3_pid
from saferl.experiment.config import to_json
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run

LIMIT = 25.0
SHARED: dict[str, Any] = {
    "env": "SpeedLimit-v0",
    "num_envs": 20,
    "steps_per_iteration": 2_000,
    "learning_starts": 2_000,
    "update_interval": 20,
    "updates_per_step": 0.1,
    "hidden_sizes": (64, 64),
    "batch_size": 128,
    "actor_lr": 1e-3,
    "critic_lr": 2e-3,
    "polyak": 0.02,
}
LIMITED: dict[str, Any] = {"cost_limit": {"speed": LIMIT}, "cost_window": 20, "multiplier_warmup": 2_000}
PID: dict[str, Any] = {**LIMITED, "kp": 0.002, "ki": 5e-4, "kd": 0.0}
LEARNERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sac": (sac, {"alpha": 0.02, "total_steps": 16_000}),
    "td3": (td3, {"total_steps": 16_000}),
    "sac-lag": (
        sac_lag,
        {
            **LIMITED,
            "alpha": 0.02,
            "multiplier_optimizer": "sgd",
            "multiplier_lr": 0.002,
            "total_steps": 30_000,
        },
    ),
    "sac-pid": (sac_pid, {**PID, "alpha": 0.02, "total_steps": 40_000}),
    "td3-lag": (
        td3_lag,
        {**LIMITED, "multiplier_optimizer": "sgd", "multiplier_lr": 0.001, "total_steps": 40_000},
    ),
    "td3-pid": (td3_pid, {**PID, "total_steps": 50_000}),
}


@cache
def curves(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return and cost of each iteration."""
    module, options = LEARNERS[name]
    config = module.Config(**{**SHARED, **options}, seed=seed)
    with TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", {"algorithm": name, "config": to_json(config)}, quiet=True)
        module.train(config, run)
        run.close()
        rows = read_metrics(run.directory / "metrics.csv")
    return np.array([r["train/return"] for r in rows]), np.array([r["train/cost"] for r in rows])


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_the_plain_learners_break_the_limit(name: str) -> None:
    returns, costs = curves(name, 0)
    assert costs[-2:].mean() > 3 * LIMIT
    assert returns[-2:].mean() > 17


@pytest.mark.parametrize("seed", [0, 1])
def test_sac_lag_settles_at_the_limit_and_near_the_optimum(seed: int) -> None:
    returns, costs = curves("sac-lag", seed)
    assert costs.max() > 2 * LIMIT, "it began by breaking the limit"
    assert 0.8 * LIMIT < costs[-5:].mean() < 1.2 * LIMIT
    assert returns[-5:].mean() > 11.8  # the optimum is 12.4


@pytest.mark.parametrize("name", ["sac-pid", "td3-lag", "td3-pid"])
def test_the_others_come_back_to_it(name: str) -> None:
    returns, costs = curves(name, 0)
    assert costs.max() > 2 * LIMIT
    assert 0.3 * LIMIT < costs[-6:].mean() < 1.4 * LIMIT
    assert returns[-6:].mean() > 10.5
