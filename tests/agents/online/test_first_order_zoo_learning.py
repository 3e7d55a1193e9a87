"""Each learner keeps SpeedLimit's limit in its own way, and none by standing still.

Full throttle costs 90 and returns 18.9; the optimum returns 12.4 with the limit of 25 and 9.9 without any
cost. A car that stalls ends its episode early, at a return near 0.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest

from saferl.agents.online import (
    cup,
    focops,
    ipo,
    p3o,
    ppo,
    ppo_early_terminated,
    ppo_saute,
    ppo_simmer,
    trpo_early_terminated,
    trpo_saute,
)
from saferl.envs import make_vec
from saferl.experiment.config import to_json
from saferl.experiment.evaluate import Evaluation, evaluate
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run

LIMIT = 25.0
SHARED: dict[str, Any] = {
    "env": "SpeedLimit-v0",
    "num_envs": 20,
    "total_steps": 50_000,
    "steps_per_iteration": 2_000,
    "epochs": 10,
    "batch_size": 125,
    "actor_lr": 1.5e-3,
    "critic_lr": 2e-3,
    "hidden_sizes": (32,),
    "log_std_init": -0.5,
}
LEARNERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ppo": (ppo, {}),
    "focops": (focops, {"multiplier_lr": 0.05}),
    "cup": (cup, {"multiplier_lr": 0.03, "actor_lr": 5e-4}),
    "p3o": (p3o, {}),
    "ipo": (ipo, {}),
    "ppo-saute": (ppo_saute, {"unsafe_reward": 0.0}),
    "ppo-simmer": (
        ppo_simmer,
        {"unsafe_reward": 0.0, "start_budget": 0.2, "kp": 0.3, "smoothing": 0.0, "max_change": 5.0},
    ),
    "ppo-early-terminated": (ppo_early_terminated, {}),
    "trpo-saute": (trpo_saute, {"unsafe_reward": 0.0, "target_kl": 0.02}),
    "trpo-early-terminated": (trpo_early_terminated, {"target_kl": 0.02}),
}


class Outcome(NamedTuple):
    returns: np.ndarray
    """Of every iteration."""
    costs: np.ndarray
    evaluation: Evaluation
    """Forty episodes of the final policy, stochastic, wrapped as `saferl evaluate` does."""


@cache
def outcome(name: str, seed: int) -> Outcome:
    module, options = LEARNERS[name]
    if name != "ppo":
        options = {**options, "cost_limit": {"speed": LIMIT}, "cost_window": 20}
    options = {**SHARED, **options, "seed": seed}
    if name.startswith("trpo"):
        options = {k: v for k, v in options.items() if k not in ("epochs", "batch_size", "actor_lr")}
    config = module.Config(**options)
    with TemporaryDirectory() as folder:
        run = Run.create(Path(folder) / "run", {"algorithm": name, "config": to_json(config)}, quiet=True)
        policy = module.train(config, run)
        run.close()
        rows = read_metrics(run.directory / "metrics.csv")
    env = make_vec("SpeedLimit-v0", 40)
    if hasattr(module, "evaluation_wrap"):
        env = module.evaluation_wrap(config)(env)
    policy.seed(0)
    tested = evaluate(policy, env, 40, seed=10_000, deterministic=False)
    costs = np.array([row["train/cost"] for row in rows])
    return Outcome(np.array([row["train/return"] for row in rows]), costs, tested)


def test_ppo_breaks_the_limit() -> None:
    returns, costs, _ = outcome("ppo", 0)
    assert costs[-5:].mean() > 3 * LIMIT
    assert returns[-5:].mean() > 17


@pytest.mark.parametrize(
    ("name", "lowest", "highest", "least_return"),
    [
        # Dual ascent on a linear problem circles around the limit: the average is what it promises.
        ("focops", 0.5, 1.6, 10.5),
        ("cup", 0.4, 1.5, 8.0),
        # An exact penalty settles at the limit.
        ("p3o", 0.6, 1.2, 9.5),
        # On and off at the limit.
        ("ipo", 0.5, 1.6, 10.0),
    ],
)
def test_priced_learners_use_their_limit_and_keep_it_on_average(
    name: str, lowest: float, highest: float, least_return: float
) -> None:
    returns, costs, _ = outcome(name, 0)
    half = len(costs) // 2
    assert lowest * LIMIT < costs[half:].mean() < highest * LIMIT
    assert least_return < returns[half:].mean() < 14


@pytest.mark.parametrize("name", ["ppo-saute", "trpo-saute"])
def test_saute_keeps_it_in_single_episodes(name: str) -> None:
    """PPO-Lag's episodes scatter around the limit; a policy that sees its budget stops spending in time."""
    returns, costs, tested = outcome(name, 1)
    assert costs.max() > LIMIT, "it began by breaking the limit"
    assert costs[-5:].mean() < LIMIT
    assert (tested.costs["speed"] > 1.1 * LIMIT).mean() < 0.1
    assert tested.returns.mean() > 9.7
    assert 9.7 < returns[-5:].mean() < 13, "returns are reported in the environment's own units"


def test_simmer_explores_more_safely_than_saute() -> None:
    returns, costs, tested = outcome("ppo-simmer", 1)
    assert costs.max() < 0.7 * outcome("ppo-saute", 1).costs.max()
    assert returns[-5:].mean() > 9.4
    assert (tested.costs["speed"] > LIMIT).mean() < 0.1


@pytest.mark.parametrize("name", ["ppo-early-terminated", "trpo-early-terminated"])
def test_early_termination_teaches_a_policy_that_keeps_the_limit_when_nothing_stops_it(name: str) -> None:
    returns, costs, tested = outcome(name, 0)
    assert costs.max() < LIMIT + 1, "the rule holds in training whatever the policy does"
    assert tested.lengths.min() == 100, "evaluation lets episodes run to their end"
    assert 0.2 * LIMIT < tested.costs["speed"].mean() < 1.2 * LIMIT
    assert tested.returns.mean() > 10
    assert returns[-5:].mean() > 10
