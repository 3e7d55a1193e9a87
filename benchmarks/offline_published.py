"""The published comparison on DSRL's own files, run where they are in the cache.

FISOR's table (Zheng et al. 2024, table 1; digits read off the figure in the authors' repository): normalised
reward / normalised cost, 20 episodes a seed, three seeds. Its cost limit is 10 on Safety-Gymnasium and 5 on
Bullet, where a user reproduced it with that; on MetaDrive 5 is unverified. The learners train with their
published budgets, hours each on a GPU. Rows are stored as they finish.

    python benchmarks/offline_published.py [--tasks CarGoal1 ...] [--algos fisor ...] [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _common import RESULTS, command_line, machine, train

NAME = "offline_published"
RUNS = Path("runs/offline_published")
EPISODES = 20
LIMITS = {"safety-gymnasium": 10.0, "bullet": 5.0, "metadrive": 5.0}
COLUMNS = ("bc-all", "cdt", "bcq-lag", "cpq", "coptidice", "trebi", "fisor")
STEPS = {"fisor": 1_000_000, "trebi": 1_000_000}
"""Published gradient steps; 100,000 for the others."""

# One row a task: reward and cost of each of COLUMNS.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "CarButton1": (0.01, 6.19, 0.17, 7.05, 0.13, 6.68, 0.22, 40.06, -0.16, 4.63, 0.07, 3.75, -0.02, 0.26),
    "CarButton2": (-0.10, 4.47, 0.23, 12.87, -0.04, 4.43, 0.08, 19.03, -0.17, 3.40, -0.03, 0.97, 0.01, 0.58),
    "CarPush1": (0.21, 1.97, 0.27, 2.12, 0.23, 1.33, 0.08, 0.77, 0.21, 1.28, 0.26, 1.03, 0.28, 0.28),
    "CarPush2": (0.11, 3.89, 0.16, 4.60, 0.10, 2.78, -0.03, 10.00, 0.10, 4.55, 0.12, 2.65, 0.14, 0.89),
    "CarGoal1": (0.35, 1.54, 0.60, 3.15, 0.44, 2.76, 0.33, 4.93, 0.43, 2.81, 0.41, 1.16, 0.49, 0.83),
    "CarGoal2": (0.22, 3.30, 0.45, 6.05, 0.34, 4.72, 0.10, 6.31, 0.19, 2.83, 0.13, 1.16, 0.06, 0.33),
    "AntVelocity": (0.99, 12.19, 0.98, 0.91, 0.85, 18.54, -1.01, 0.00, 1.00, 10.29, 0.31, 0.00, 0.89, 0.00),
    "HalfCheetahVelocity": (
        *(0.97, 17.93, 0.97, 0.55, 1.04, 57.06, 0.08, 2.56, 0.43, 0.00, 0.87, 0.23, 0.89, 0.00),
    ),
    "SwimmerVelocity": (
        0.38,
        2.98,
        0.67,
        1.47,
        0.29,
        4.10,
        0.31,
        11.58,
        0.58,
        23.64,
        0.42,
        1.31,
        -0.04,
        0.00,
    ),
    "AntRun": (0.73, 11.73, 0.70, 1.88, 0.65, 3.30, 0.00, 0.00, 0.62, 3.64, 0.63, 5.43, 0.45, 0.03),
    "BallRun": (0.67, 11.38, 0.32, 0.45, 0.43, 6.25, 0.85, 13.67, 0.55, 11.32, 0.29, 4.24, 0.18, 0.00),
    "CarRun": (0.96, 1.88, 0.99, 1.10, 0.84, 2.51, 1.06, 10.49, 0.92, 0.00, 0.97, 1.01, 0.73, 0.14),
    "DroneRun": (0.55, 5.21, 0.58, 0.30, 0.80, 17.98, 0.02, 7.95, 0.72, 13.77, 0.59, 1.41, 0.30, 0.55),
    "AntCircle": (0.65, 19.45, 0.48, 7.44, 0.67, 19.13, 0.00, 0.00, 0.18, 13.41, 0.37, 2.50, 0.20, 0.00),
    "BallCircle": (0.72, 10.02, 0.68, 2.10, 0.67, 8.50, 0.40, 4.37, 0.70, 9.06, 0.63, 1.89, 0.34, 0.00),
    "CarCircle": (0.65, 11.16, 0.71, 2.19, 0.68, 8.84, 0.49, 4.48, 0.44, 7.73, 0.49, 0.73, 0.40, 0.11),
    "DroneCircle": (0.82, 13.78, 0.55, 1.29, 0.95, 18.56, -0.27, 1.29, 0.24, 2.19, 0.54, 2.36, 0.48, 0.00),
    "easysparse": (0.32, 4.73, 0.05, 0.10, 0.99, 14.00, -0.06, 0.24, 0.94, 18.21, 0.26, 6.22, 0.38, 0.53),
    "easymean": (0.22, 2.68, 0.27, 0.24, 0.54, 10.35, -0.06, 0.24, 0.74, 14.81, 0.19, 4.85, 0.38, 0.25),
    "easydense": (0.20, 1.70, 0.43, 2.31, 0.40, 6.64, -0.06, 0.29, 0.60, 11.27, 0.26, 5.81, 0.36, 0.25),
    "mediumsparse": (0.53, 1.74, 0.26, 2.20, 0.93, 7.48, -0.08, 0.18, 0.64, 7.26, 0.06, 1.70, 0.42, 0.22),
    "mediummean": (0.66, 2.94, 0.28, 2.13, 0.60, 6.35, -0.08, 0.28, 0.73, 8.35, 0.20, 1.90, 0.39, 0.08),
    "mediumdense": (0.65, 3.79, 0.29, 0.77, 0.64, 3.78, -0.08, 0.20, 0.91, 9.52, 0.03, 1.18, 0.49, 0.44),
    "hardsparse": (0.28, 1.98, 0.17, 0.47, 0.48, 7.52, -0.04, 0.28, 0.34, 7.34, 0.00, 0.82, 0.30, 0.01),
    "hardmean": (0.34, 3.76, 0.28, 3.32, 0.31, 6.06, -0.05, 0.24, 0.36, 7.51, 0.16, 4.91, 0.26, 0.09),
    "harddense": (0.40, 5.57, 0.24, 1.49, 0.39, 5.11, -0.04, 0.24, 0.42, 8.11, 0.02, 1.21, 0.30, 0.34),
}


class Work(NamedTuple):
    """One trained policy."""

    task: str
    file: Path
    algorithm: str
    seed: int


def cached(names: list[str]) -> Iterator[tuple[str, Path]]:
    """Tasks whose file is in the cache and whose environment can be had; says of the others why not."""
    from saferl.envs.datasets import TASKS, locate
    from saferl.errors import SaferlError

    for name in names:
        if TASKS[name].env_id is None:
            print(f"{name}: saferl has no environment of it")
            continue
        try:
            yield name, locate(name, offline=True)[0]
        except SaferlError as error:
            print(f"{name}: {error}")


def one(work: Work, device: str, steps: int | None) -> dict[str, Any]:
    """Train and evaluate."""
    from saferl.envs import make_vec
    from saferl.envs.datasets import TASKS, normalised_score
    from saferl.experiment.evaluate import evaluate
    from saferl.policies import load_policy

    task = TASKS[work.task]
    assert task.env_id is not None
    limit = LIMITS[task.family]
    total = STEPS.get(work.algorithm, 100_000) if steps is None else steps
    run = RUNS / f"{work.task}-{work.algorithm}-{work.seed}"
    words = ["--dataset", str(work.file), "--env", task.env_id, "--seed", str(work.seed), "--device", device]
    if work.algorithm not in ("bc-all",):
        words += ["--cost-limit", f"{limit:g}"]
    began = time.monotonic()
    train(run, work.algorithm, words, total)
    seconds = time.monotonic() - began
    policy: Any = load_policy(run)
    if hasattr(policy, "seed"):
        policy.seed(0)
    env = make_vec(task.env_id, EPISODES)
    try:
        found = evaluate(policy, env, EPISODES, seed=9_000_000)
    finally:
        env.close()
    reward, cost = normalised_score(task, found.returns.mean(), found.costs["cost"].mean(), limit)
    return {
        "task": work.task,
        "algorithm": work.algorithm,
        "seed": work.seed,
        "steps": total,
        "limit": limit,
        "reward": float(reward),
        "cost": float(cost),
        "seconds": round(seconds),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Ours beside the published pairs."""
    lines = [
        "Normalised reward / normalised cost on DSRL's files: ours, mean over the seeds (published).",
        "",
        f"| task | limit | steps | {' | '.join(COLUMNS)} |",
        "| --- |" + " ---: |" * (2 + len(COLUMNS)),
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        steps = ", ".join(f"{s:,}" for s in sorted({row["steps"] for row in here}))
        cells = [task, f"{here[0]['limit']:g}", steps]
        for k, name in enumerate(COLUMNS):
            mine = [(row["reward"], row["cost"]) for row in here if row["algorithm"] == name]
            ours = "{:.2f} / {:.2f}".format(*np.mean(mine, axis=0)) if mine else "-"
            theirs = "-"
            if task in PUBLISHED:
                theirs = "{:.2f} / {:.2f}".format(*PUBLISHED[task][2 * k : 2 * k + 2])
            cells.append(f"{ours} ({theirs})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from saferl.envs.datasets import TASKS
    from saferl.experiment.checkpoint import write_atomically

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--algos", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="gradient steps of every learner, instead of the published")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    tasks = list(cached(asked.tasks))
    if not tasks:
        raise SystemExit(
            "no file of DSRL is in the cache; `saferl dataset download NAME` fetches one, and "
            "`saferl dataset list` says where they belong."
        )
    for seed in range(asked.seeds):
        for task, file in tasks:
            for algorithm in asked.algos:
                keys = (task, algorithm, seed)
                if any((row["task"], row["algorithm"], row["seed"]) == keys for row in rows):
                    continue
                rows.append(one(Work(task, file, algorithm, seed), asked.device, asked.steps))
                stored = {"command": command_line(), "machine": machine(), "runs": rows}
                write_atomically(path, json.dumps(stored, indent=1) + "\n")
                (RESULTS / f"{NAME}.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
