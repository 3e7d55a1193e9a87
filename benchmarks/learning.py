"""Does the constraint hold? PPO, PPO-Lag and CPPO-PID on real Safety-Gymnasium tasks, several seeds.

Every run is an ordinary `saferl train` of the real package, evaluated over fresh episodes. The script can
be stopped and started again: it goes on where it was.

    python benchmarks/learning.py --steps 250000 --seeds 3 --jobs 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, machine, save, train

from saferl.experiment.metrics import read_metrics

ALGORITHMS = ("ppo", "ppo-lag", "cppo-pid")
COLOURS = {"ppo": "#555555", "ppo-lag": "#0072B2", "cppo-pid": "#D55E00"}
# One set of options for every algorithm, task and seed.
SHARED = ["--backend", "original", "--num-envs", "10", "--steps-per-iteration", "5000", "--epochs", "10"]
SHARED += ["--log-std-init", "-0.5"]
CONSTRAINED = {
    "ppo": [],
    # Projected gradient with the bound of FOCOPS and CUP: the first, costly episodes must not wind it up.
    "ppo-lag": [
        *("--cost-window", "10", "--multiplier-optimizer", "sgd"),
        *("--multiplier-lr", "0.005", "--multiplier-max", "2"),
    ],
    # OmniSafe's gains are for 500 updates of a slow estimate; this budget has 50 of a fresh one.
    "cppo-pid": [
        *("--cost-window", "10", "--kp", "0.02", "--ki", "0.001", "--kd", "0.01"),
        *("--ema-p", "0.5", "--ema-d", "0.5", "--delay", "1"),
    ],
}


def one(
    task: str, algorithm: str, seed: int, steps: int, limit: float, folder: Path, episodes: int
) -> dict[str, Any]:
    """Train and evaluate a run; returns its evaluation."""
    run = folder / f"{task}-{algorithm}-{seed}"
    options = ["--env", task, "--seed", str(seed), *SHARED, *CONSTRAINED[algorithm]]
    if algorithm != "ppo":
        options += ["--cost-limit", str(limit)]
    train(run, algorithm, options, steps)
    result: dict[str, Any] = {"task": task, "algorithm": algorithm, "seed": seed, "run": run.name}
    for mode in ("stochastic", "deterministic"):
        written = run / f"evaluation-{mode}.json"
        if not written.exists() or json.loads(written.read_text())["step"] < steps:
            command = [sys.executable, "-m", "saferl", "evaluate", str(run), "--episodes", str(episodes)]
            command += ["--num-envs", "10", "--cost-limit", str(limit), "--output", str(written), "--quiet"]
            command += ["--stochastic"] if mode == "stochastic" else []
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result[mode] = json.loads(written.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["SafetyPointCircle1-v0"])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--steps", type=int, default=250_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=25.0)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    asked = parser.parse_args()
    work = [(t, a, s) for t in asked.tasks for s in range(asked.seeds) for a in asked.algorithms]
    with ThreadPoolExecutor(asked.jobs) as pool:
        results = list(
            pool.map(lambda w: one(*w, asked.steps, asked.limit, asked.folder, asked.episodes), work)
        )
    save("learning", {"limit": asked.limit, "steps": asked.steps, "runs": results}, table(results, asked))
    figure(results, asked)


def table(results: list[dict[str, Any]], asked: argparse.Namespace) -> str:
    lines = [
        f"{asked.steps:,} steps, cost limit {asked.limit:g}, {asked.seeds} seeds, {asked.episodes} fresh "
        "episodes a seed; mean over seeds, and every seed's own mean cost. The multiplier sees the "
        "stochastic policy, so that is the one the constraint speaks of; its mode is shown beside it.",
        "",
        "| task | algorithm | policy | return | cost | cost of each seed | cost / limit |",
        "| --- | --- | --- | ---: | ---: | --- | ---: |",
    ]
    for task in asked.tasks:
        for algorithm in asked.algorithms:
            rows = [r for r in results if (r["task"], r["algorithm"]) == (task, algorithm)]
            for mode in ("stochastic", "deterministic"):
                returns = np.array([r[mode]["return"]["mean"] for r in rows])
                costs = np.array([r[mode]["cost"]["mean"] for r in rows])
                each = ", ".join(f"{c:.1f}" for c in costs)
                lines.append(
                    f"| {task} | {algorithm} | {mode} | {returns.mean():.2f} ± {returns.std():.2f} "
                    f"| {costs.mean():.1f} | {each} | {costs.mean() / asked.limit:.2f} |"
                )
    return "\n".join(lines)


def figure(results: list[dict[str, Any]], asked: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    panels = ("train/return", "train/cost", "constraint/cost/multiplier")
    fig = Figure(figsize=(10, 2.9 * len(asked.tasks)), layout="constrained")
    axes = fig.subplots(len(asked.tasks), 3, squeeze=False)
    for row, task in zip(axes, asked.tasks, strict=True):
        for algorithm in asked.algorithms:
            runs = [r for r in results if (r["task"], r["algorithm"]) == (task, algorithm)]
            tables = [read_metrics(asked.folder / r["run"] / "metrics.csv") for r in runs]
            for axis, name in zip(row, panels, strict=True):
                curves = [[(m["step"], m[name]) for m in rows if name in m] for rows in tables]
                if not all(curves):
                    continue
                length = min(map(len, curves))
                steps = np.array([s for s, _ in curves[0][:length]])
                values = np.array([[v for _, v in c[:length]] for c in curves])
                axis.plot(steps, values.mean(0), color=COLOURS[algorithm], label=algorithm)
                axis.fill_between(
                    steps, values.min(0), values.max(0), color=COLOURS[algorithm], alpha=0.2, lw=0
                )
        for axis, title in zip(row, ("return", "cost", "multiplier"), strict=True):
            axis.set(title=f"{task.removesuffix('-v0')}: {title}", xlabel="environment steps")
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
            axis.spines[["top", "right"]].set_visible(False)
        row[1].axhline(asked.limit, color="black", ls="--", lw=1)
        row[0].legend(frameon=False)
    fig.savefig(RESULTS / "learning.png", dpi=110)
    print(f"figure: {RESULTS / 'learning.png'} ({machine()})")


if __name__ == "__main__":
    main()
