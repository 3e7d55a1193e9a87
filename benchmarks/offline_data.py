"""Data sets for the comparison of offline learners, recorded with our own agents.

For each task PPO without a limit and PPO-Lag with three are trained, under the settings of the table of
agents at a small budget. Each is recorded at a quarter of it and at its end, next to uniformly random
actions: safe, unsafe, good and bad episodes in one file of DSRL's format. Every part is a file of its own, so
that the script goes on where it was stopped; the files stay out of the repository.

    python benchmarks/offline_data.py [--tasks SafetyPointCircle1-v0 ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import train
from safety_gym_table import OVERRIDES, SETTINGS

from saferl.envs import make_vec
from saferl.envs.datasets import OfflineDataset, concatenate, read_dsrl, write_dsrl
from saferl.envs.datasets.record import RandomPolicy, record
from saferl.policies import load_policy

RUNS = Path("runs/offline_table")
EPISODES = 40
RANDOM_EPISODES = 40


class Recipe(NamedTuple):
    """What a task's data are made of."""

    steps: int
    """Environment steps of every agent."""
    limits: tuple[float, ...]
    """Cost limits of PPO-Lag."""


RECIPES = {
    "SafetyPointCircle1-v0": Recipe(1_000_000, (5.0, 25.0, 60.0)),
    "SafetyCarCircle1-v0": Recipe(500_000, (5.0, 25.0, 60.0)),
    "SafetyPointGoal1-v0": Recipe(1_500_000, (5.0, 15.0, 30.0)),
    "SafetyCarGoal1-v0": Recipe(500_000, (5.0, 15.0, 30.0)),
    "SafetyHalfCheetahVelocity-v1": Recipe(500_000, (5.0, 25.0, 60.0)),
}


def words(task: str, algorithm: str, limit: float | None) -> list[str]:
    """Command-line options of an agent."""
    options: dict[str, Any] = {**SETTINGS[algorithm], **OVERRIDES.get((task, algorithm), {})}
    if limit is not None:
        options["cost_limit"] = limit
    found = ["--env", task, "--seed", "0"]
    for name, value in options.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def part(path: Path, policy: Any, task: str, episodes: int, seed: int) -> None:
    """Record a part, unless its file is there."""
    if path.exists():
        return
    policy = policy()
    if hasattr(policy, "seed"):
        policy.seed(seed)
    env = make_vec(task, min(20, episodes))
    try:
        data = record(policy, env, episodes, seed=seed)
    finally:
        env.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dsrl(path, data)
    print(f"{path.stem}: return {data.episode_returns.mean():.2f}, cost {data.episode_costs.mean():.1f}")


def make(task: str) -> Path:
    """The task's data set, recorded if it is not there."""
    whole = RUNS / "data" / f"{task}.hdf5"
    if whole.exists():
        return whole
    recipe, folder = RECIPES[task], RUNS / "data" / task
    agents: list[tuple[str, str, float | None]] = [("ppo", "ppo", None)]
    agents += [(f"ppo-lag-{limit:g}", "ppo-lag", limit) for limit in recipe.limits]
    space = make_vec(task, 1).single_action_space
    parts = [folder / "random.hdf5"]
    part(parts[0], lambda: RandomPolicy(space, 0), task, RANDOM_EPISODES, 7_000_000)
    for k, (name, algorithm, limit) in enumerate(agents):
        run = RUNS / "agents" / f"{task}-{name}"
        for j, (stage, share) in enumerate((("early", 0.25), ("late", 1.0))):
            path = folder / f"{name}-{stage}.hdf5"
            parts.append(path)
            if not path.exists():
                train(run, algorithm, words(task, algorithm, limit), int(recipe.steps * share))
                seed = 8_000_000 + 100_000 * (2 * k + j)
                part(path, lambda run=run: load_policy(run), task, EPISODES, seed)
    data: OfflineDataset = concatenate([read_dsrl(path) for path in parts])
    write_dsrl(whole, data)
    statistics = data.statistics()
    print(f"{whole}: {statistics.episodes} episodes, {statistics.transitions:,} transitions")
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=RECIPES, default=list(RECIPES))
    torch.set_num_threads(1)
    for task in parser.parse_args().tasks:
        make(task)


if __name__ == "__main__":
    main()
