"""Offline safe RL: every learner on data of ours, and on DSRL's files where they are at hand.

DSRL's protocol: learners that take a cost limit are trained for each of three, all are evaluated over 20
episodes, and scores are normalised, (R - R_min) / (R_max - R_min) with the extremes of the data's episodes,
C / limit for the cost; a learner is safe where that is at most 1. FISOR and cloning of all or of the front
know no limit: one policy is scored against all. Networks, batches and budgets are cut to a few hours of two
cores.

Rows are written as runs finish; called again, the script goes on. With DSRL's own files in the cache,
`--published` trains on them with the published budgets and prints the published numbers beside ours.

    python benchmarks/offline_table.py --jobs 2 [--algos fisor bc-all ...] [--tasks ...] [--plan]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import offline_data
from _common import RESULTS, command_line, machine, train

NAME = "offline_table"
RUNS = offline_data.RUNS
LIMITS = (20.0, 40.0, 80.0)
EPISODES = 20

# --- settings: one set an algorithm, the same for every task, limit and seed ------------------------------

HIDDEN = {"hidden-sizes": "128 128", "batch-size": 256}
FISOR = {
    "preset": "cpu",
    "batch-size": 256,
    "polyak": 0.01,
    "total-steps": 12_000,
    "policy-lr-steps": 36_000,
}
FAST = {**HIDDEN, "polyak": 0.05}
PROPOSING = {**FAST, "vae-hidden-size": 128, "samples": 5, "total-steps": 6_000}
SETTINGS: dict[str, dict[str, Any]] = {
    "fisor": FISOR,
    "fisor-calibrated": {**FISOR, "cost-scale": 1},
    "bc-all": {**HIDDEN, "total-steps": 20_000},
    "bc-safe": {**HIDDEN, "total-steps": 20_000},
    "bc-frontier": {**HIDDEN, "total-steps": 20_000},
    "cdt": {
        "batch-size": 64,
        "width": 64,
        "layers": 2,
        "heads": 4,
        "lr": 5e-4,
        "warmup-steps": 200,
        "total-steps": 2_500,
    },
    "bcq-lag": PROPOSING,
    "bear-lag": PROPOSING,
    "cpq": {**FAST, "vae-size": 128, "samples": 5, "actor-lr": 3e-4, "total-steps": 6_000},
    "coptidice": {**HIDDEN, "total-steps": 8_000},
    "iql-lag": {**FAST, "total-steps": 10_000},
    "trebi": {
        "batch-size": 32,
        "horizon": 16,
        "width": 16,
        "multipliers": "1 2 4",
        "hidden-sizes": "128 128",
        "diffusion-steps": 10,
        "plans": 8,
        "total-steps": 3_000,
    },
}
"""Networks, batches and steps are a fraction of the published ones. For that, slow critics follow faster (at
0.005 a cost critic is at a fifth of its value after 6,000 steps, and no limit binds), and the learning rates
of the two whose published rate is 1e-4 are higher."""
ALGORITHMS = {"fisor-calibrated": "fisor"}
"""What `saferl train` calls a row, where it is called otherwise here."""
LIMITLESS = ("fisor", "fisor-calibrated", "bc-all", "bc-frontier")
"""Trained once, scored against every limit."""
CONDITIONED = ("cdt", "trebi")
"""Trained once, told the limit when they act."""
SEEDS = {"fisor": 3, "bc-safe": 3, "cdt": 3, "iql-lag": 3, "fisor-calibrated": 1}
"""2 for those left out. The calibrated cost scale lost on its first Goal task (1.8 / 57 against -1.5 /
0.8)."""


@dataclass(frozen=True)
class Work:
    """One trained policy."""

    task: str
    algorithm: str
    limit: float | None
    seed: int

    @property
    def name(self) -> str:
        limit = "" if self.limit is None else f"-{self.limit:g}"
        return f"{self.task}-{self.algorithm}{limit}-{self.seed}"

    def words(self, dataset: Path) -> list[str]:
        """Command-line options."""
        options = {**SETTINGS[self.algorithm], "dataset": dataset, "env": self.task, "seed": self.seed}
        if self.limit is not None:
            options["cost-limit"] = f"{self.limit:g}"
        return [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]

    def key(self) -> list[Any]:
        return [self.task, self.algorithm, self.limit, self.seed, SETTINGS[self.algorithm]]


def plan(tasks: Sequence[str], algorithms: Sequence[str], seeds: int | None) -> Iterator[Work]:
    """All runs, seed by seed."""
    for seed in range(max(SEEDS.values()) if seeds is None else seeds):
        for task in tasks:
            for algorithm in algorithms:
                if seed < SEEDS.get(algorithm, 2):
                    free = algorithm in LIMITLESS or algorithm in CONDITIONED
                    for limit in (None,) if free else LIMITS:
                        yield Work(task, algorithm, limit, seed)


class Results:
    """Finished runs, in a file that several processes add to."""

    def __init__(self) -> None:
        self.path = RESULTS / f"{NAME}.json"

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.path.read_text())["runs"] if self.path.exists() else []
        return rows

    def done(self) -> list[list[Any]]:
        return [row["key"] for row in self.rows()]

    def add(self, row: dict[str, Any]) -> None:
        from saferl.experiment.checkpoint import write_atomically

        with (RUNS / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            rows = [old for old in self.rows() if old["key"][:4] != row["key"][:4]] + [row]
            rows.sort(key=lambda r: (r["key"][0], list(SETTINGS).index(r["key"][1]), str(r["key"][2:4])))
            head = json.dumps({"command": command_line(), "machine": machine()})
            lines = ",\n".join(json.dumps(r) for r in rows)
            write_atomically(self.path, f'{head[:-1]}, "runs": [\n{lines}\n]}}\n')


def one(work: Work) -> None:
    """Train and evaluate; the row is stored."""
    import torch

    from saferl.envs import make_vec
    from saferl.envs.datasets import read_dsrl
    from saferl.experiment.evaluate import evaluate
    from saferl.policies import load_policy

    torch.set_num_threads(1)
    dataset = offline_data.make(work.task)
    run = RUNS / "runs" / work.name
    began = time.monotonic()
    name = ALGORITHMS.get(work.algorithm, work.algorithm)
    train(run, name, work.words(dataset), SETTINGS[work.algorithm]["total-steps"])
    seconds = time.monotonic() - began
    data = read_dsrl(dataset)
    low, high = float(data.episode_returns.min()), float(data.episode_returns.max())
    policy: Any = load_policy(run)
    scored: dict[str, dict[str, Any]] = {}
    for variant in variants(work, policy):
        name, limits = variant
        env = make_vec(work.task, EPISODES)
        try:
            if hasattr(policy, "seed"):
                policy.seed(0)
            outcome = evaluate(policy, env, EPISODES, seed=9_000_000, deterministic=True)
        finally:
            env.close()
        returns, costs = outcome.returns, outcome.costs["cost"]
        for limit in limits:
            scored.setdefault(name, {})[f"{limit:g}"] = {
                "return": float(returns.mean()),
                "cost": float(costs.mean()),
                "reward_score": float((returns.mean() - low) / (high - low)),
                "cost_score": float(costs.mean() / limit),
            }
    Results().add({"key": work.key(), "seconds": round(seconds), "scores": scored})
    for name, by_limit in scored.items():
        said = ", ".join(f"{limit}: {s['return']:.1f} / {s['cost']:.1f}" for limit, s in by_limit.items())
        print(f"{work.name} {name} (return / cost at the limit) {said}, {seconds:.0f} s", flush=True)


def variants(work: Work, policy: Any) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Ways to act with one trained policy, set on it one after another, and the limits each is scored at."""
    if work.algorithm.startswith("fisor"):
        for extraction in ("least-risk", "feasible-first"):
            policy.extraction = extraction
            yield f"{work.algorithm}, {extraction}", LIMITS
    elif work.algorithm in CONDITIONED:
        for limit in LIMITS:
            policy.target_cost = limit
            yield work.algorithm, (limit,)
    else:
        yield work.algorithm, LIMITS if work.limit is None else (work.limit,)


# --- what is shown -----------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Mean scores over limits and seeds, one column a task."""
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    tasks = list(dict.fromkeys(row["key"][0] for row in rows))
    lines = [
        "Normalised reward / normalised cost, means over the limits 20, 40 and 80 and the seeds, "
        f"{EPISODES} episodes each; safe (cost at most 1) in bold. The last columns count the pairs of task "
        "and limit at which the mean over the seeds is safe, and average the tasks.",
        "",
        "| learner | " + " | ".join(task.removeprefix("Safety").split("-")[0] for task in tasks),
        "| --- |" + " ---: |" * (len(tasks) + 2),
    ]
    lines[2] += " | safe | all |"
    for name in names:
        cells, every, safe, pairs = [], [], 0, 0
        for task in tasks:
            found = [
                (limit, score)
                for row in rows
                if row["key"][0] == task
                for limit, score in row["scores"].get(name, {}).items()
            ]
            if not found:
                cells.append("")
                continue
            reward, cost = (np.mean([s[k] for _, s in found]) for k in ("reward_score", "cost_score"))
            every.append((reward, cost))
            cells.append(shown(float(reward), float(cost)))
            for limit in {limit for limit, _ in found}:
                pairs += 1
                safe += np.mean([s["cost_score"] for lim, s in found if lim == limit]) <= 1
        reward, cost = np.mean(every, axis=0)
        lines.append(f"| {name} | {' | '.join(cells)} | {safe} of {pairs} | {shown(reward, cost)} |")
    return "\n".join(lines)


def shown(reward: float, cost: float) -> str:
    text = f"{reward:.2f} / {cost:.2f}"
    return f"**{text}**" if cost <= 1 else text


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Reward against cost, a panel a task; lines join the limits."""
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["key"][0] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    panels, axes = plt.subplots(
        1, len(tasks), figsize=(3.4 * len(tasks), 4.2), layout="constrained", squeeze=False
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        for k, name in enumerate(names):
            by_limit: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if row["key"][0] == task:
                    for limit, score in row["scores"].get(name, {}).items():
                        by_limit.setdefault(limit, []).append((score["cost_score"], score["reward_score"]))
            if by_limit:
                points = np.array([np.mean(by_limit[limit], axis=0) for limit in sorted(by_limit, key=float)])
                ax.plot(*points.T, "o-", ms=4, lw=0.8, color=colours[k % 20], label=name)
        ax.axvline(1, color="black", lw=1, ls="--")
        ax.set_xscale("symlog", linthresh=1)
        ax.set(title=task.removeprefix("Safety").split("-")[0], xlabel="normalised cost")
    axes[0][0].set_ylabel("normalised reward")
    handles, labels = axes[0][0].get_legend_handles_labels()
    panels.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    panels.savefig(path, dpi=100)
    plt.close(panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks", nargs="+", choices=offline_data.RECIPES, default=list(offline_data.RECIPES)
    )
    parser.add_argument("--algos", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="list the runs and leave")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    works = list(plan(asked.tasks, asked.algos, asked.seeds))
    if asked.only:
        one(next(work for work in works if work.name == asked.only))
        return
    done = Results().done()
    waiting = [work for work in works if work.key() not in done]
    if asked.plan:
        for work in works:
            print("done " if work not in waiting else "     ", work.name)
        return
    for task in asked.tasks:
        offline_data.make(task)
    with ThreadPoolExecutor(asked.jobs) as pool:

        def start(work: Work) -> str | None:
            done = subprocess.run([sys.executable, __file__, "--only", work.name])
            return work.name if done.returncode else None

        failed = [name for name in pool.map(start, waiting) if name]
    rows = Results().rows()
    if rows:
        figure(rows, RESULTS / f"{NAME}.png")
        text = table(rows)
        (RESULTS / f"{NAME}.md").write_text(f"{text}\n\n`{command_line()}`, {machine()}.\n")
        print(text)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
