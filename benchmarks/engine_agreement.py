"""Does a policy trained on our engines do the same on the real package?

Takes runs of safety_gym_table.py, evaluates each over fresh episodes on the engine that trained it and on the
original, and compares: the same seeds, hence the same layouts, but sampled actions and roundings drive the
episodes apart, so returns and costs are compared as two samples (Welch's test).

    python benchmarks/engine_agreement.py [--episodes 100]
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import finished_step, save
from safety_gym_table import SUITES, Work
from scipy.stats import ttest_ind_from_stats

NAME = "engine_agreement"
CHOSEN = (
    (0, "SafetyPointGoal1-v0", "ppo"),
    (0, "SafetyPointGoal1-v0", "ppo-lag"),
    (0, "SafetyPointGoal1-v0", "trpo-lag"),
    (0, "SafetyPointGoal1-v0", "cpo"),
    (0, "SafetyPointGoal1-v0", "cppo-pid"),
    (1, "SafetyPointCircle1-v0", "focops"),
    (1, "SafetyPointCircle1-v0", "ppo-saute"),
    (2, "SafetyCarGoal1-v0", "ppo-lag"),
    (3, "SafetyHalfCheetahVelocity-v1", "ppo-lag"),
)


def evaluate(run: Path, backend: str, episodes: int) -> dict[str, Any]:
    """Mean, deviation and interval of return and cost of the stochastic policy, and the engine's name."""
    written = run / f"agreement-{backend}-{episodes}.json"
    if not written.exists():
        command = [sys.executable, "-m", "saferl", "evaluate", str(run), "--episodes", str(episodes)]
        command += ["--backend", backend, "--stochastic", "--seed", "1000", "--num-envs", "20"]
        subprocess.run([*command, "--output", str(written), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    evaluation: dict[str, Any] = json.loads(written.read_text())
    return {name: evaluation[name] for name in ("return", "cost", "backend")}


def compare(ours: dict[str, Any], original: dict[str, Any], quantity: str, episodes: int) -> dict[str, Any]:
    """Difference of the means, ours minus the original's, with standard error and p-value."""
    a, b = ours[quantity], original[quantity]
    error = math.sqrt((a["std"] ** 2 + b["std"] ** 2) / episodes)
    test = ttest_ind_from_stats(a["mean"], a["std"], episodes, b["mean"], b["std"], episodes, equal_var=False)
    return {"difference": a["mean"] - b["mean"], "standard_error": error, "p": float(test.pvalue)}


def shown(evaluation: dict[str, Any], quantity: str) -> str:
    part = evaluation[quantity]
    half = (part["ci95"][1] - part["ci95"][0]) / 2
    digits = 0 if abs(part["mean"]) > 1000 else 2
    return f"{part['mean']:.{digits}f} ± {half:.{digits}f}"


def table(rows: list[dict[str, Any]], episodes: int) -> str:
    lines = [
        f"Means of {episodes} episodes with 95 % intervals, sampled actions, the same seeds on both; p is "
        "that of Welch's test for equal means.",
        "",
        "| policy | engine | return | on the original | p | cost | on the original | p |",
        "| --- | --- | --- | --- | ---: | --- | --- | ---: |",
    ]
    for row in rows:
        cells = [f"{row['algorithm']}, {row['task']}", row["ours"]["backend"]]
        for quantity in ("return", "cost"):
            cells += [shown(row["ours"], quantity), shown(row["original"], quantity)]
            cells.append(f"{row['compared'][quantity]['p']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    tests = [row["compared"][quantity]["p"] for row in rows for quantity in ("return", "cost")]
    low = sum(p < 0.05 for p in tests)
    lines += [
        "",
        f"{low} of {len(tests)} tests have p < 0.05; {0.05 * len(tests):.1f} are expected by chance.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/safety_gym_table"))
    asked = parser.parse_args()
    rows = []
    for suite, task, algorithm in CHOSEN:
        work = Work(suite, task, algorithm, 0, SUITES[suite].steps)
        run = asked.folder / work.name
        if finished_step(run) < work.steps:
            print(f"{work.name} is not trained yet and left out: run safety_gym_table.py first", flush=True)
            continue
        ours = evaluate(run, "auto", asked.episodes)
        original = evaluate(run, "original", asked.episodes)
        compared = {q: compare(ours, original, q, asked.episodes) for q in ("return", "cost")}
        rows.append(
            {"task": task, "algorithm": algorithm, "ours": ours, "original": original, "compared": compared}
        )
        print(task, algorithm, compared, flush=True)
    save(NAME, {"rows": rows}, table(rows, asked.episodes))


if __name__ == "__main__":
    main()
