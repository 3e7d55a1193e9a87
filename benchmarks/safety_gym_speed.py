"""How fast are resets and steps of the real Safety-Gymnasium tasks, with and without texture compilation?

Whole episodes with random actions in one process. "saferl" is what `gymnasium.make("saferl/...")` gives;
"textures" is the same with the sky's and the floor's textures compiled at every reset, as the package does;
"original" is safety-gymnasium 1.0.0 with the versions it pins, in the Python given by --oracle-python.

    python benchmarks/safety_gym_speed.py [--repeats 5] [--oracle-python ORACLE/bin/python]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import matplotlib.pyplot as plt
from _common import RESULTS, save

import saferl.envs  # noqa: F401  # registers the ids

TASKS = (
    "SafetyPointGoal1-v0",
    "SafetyCarGoal1-v0",
    "SafetyPointButton1-v0",
    "SafetyPointCircle1-v0",
    "SafetyHalfCheetahVelocity-v1",
)
COLOURS = {"saferl": "#0072B2", "textures": "#D55E00", "original": "#555555"}

# Plain text, because the original's Python runs it too. `step` is where the two interfaces differ.
MEASURE = '''
import time

def measure(env, step, seed, resets):
    """Seconds of a reset (mean of several) and of an episode's steps, and their number."""
    start = time.perf_counter()
    for index in range(resets):
        env.reset(seed=1000 * seed + index)
    reset = (time.perf_counter() - start) / resets
    env.action_space.seed(seed)
    steps, ended = 0, False
    start = time.perf_counter()
    while not ended:
        ended = step(env, env.action_space.sample())
        steps += 1
    return {"reset": reset, "episode": time.perf_counter() - start, "steps": steps}
'''
ORACLE = (
    MEASURE
    + """
import json, sys
import safety_gymnasium

def step(env, action):
    _, _, _, terminated, truncated, _ = env.step(action)
    return terminated or truncated

task, resets = sys.argv[1], int(sys.argv[2])
env = safety_gymnasium.make(task)
env.reset(seed=0)
for seed in sys.stdin:
    print(json.dumps(measure(env, step, int(seed), resets)), flush=True)
"""
)
_scope: dict[str, Any] = {}
exec(MEASURE, _scope)
measure = _scope["measure"]


def step(env: gym.Env, action: Any) -> bool:
    _, _, terminated, truncated, _ = env.step(action)
    return terminated or truncated


def run_task(task: str, repeats: int, resets: int, oracle: Path | None) -> dict[str, list[dict[str, float]]]:
    """All variants, taking turns, so that a busy machine slows all alike."""
    envs = {
        "saferl": gym.make(f"saferl/{task}", disable_env_checker=True),
        "textures": gym.make(f"saferl/{task}", disable_env_checker=True, _textures=True),
    }
    for env in envs.values():
        env.reset(seed=0)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in envs}
    with contextlib.ExitStack() as stack:
        original = None
        if oracle:
            words = [str(oracle), "-W", "ignore", "-c", ORACLE, task, str(resets)]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            original = stack.enter_context(subprocess.Popen(words, text=True, **pipes))
            runs["original"] = []
        for seed in range(repeats):
            for name, env in envs.items():
                runs[name].append(measure(env, step, seed, resets))
            if original:
                print(seed, file=original.stdin, flush=True)
                runs["original"].append(json.loads(_next_result(original)))
    return runs


def _next_result(process: subprocess.Popen[str]) -> str:
    """The next line that is a result; the original prints remarks when it is imported."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return line
    raise SystemExit("the original's Python ended early; run its import by hand to see why")


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    resets = [run["reset"] for run in runs]
    return {
        "reset_seconds": median(resets),
        "reset_seconds_min": min(resets),
        "reset_seconds_max": max(resets),
        "steps_per_second": median(run["steps"] / run["episode"] for run in runs),
        "steps_per_second_with_resets": median(
            run["steps"] / (run["episode"] + run["reset"]) for run in runs
        ),
    }


def table(results: dict[str, dict[str, dict[str, float]]], repeats: int) -> str:
    lines = [
        "| task | variant | s / reset (range) | steps/s | steps/s with resets |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task, variants in results.items():
        for name, row in variants.items():
            lines.append(
                f"| {task} | {name} | {row['reset_seconds']:.4f} "
                f"({row['reset_seconds_min']:.4f} to {row['reset_seconds_max']:.4f}) "
                f"| {row['steps_per_second']:,.0f} | {row['steps_per_second_with_resets']:,.0f} |"
            )
    return (
        "\n".join(lines)
        + f"\n\nMedians of {repeats} episodes a row, seeds 0 to {repeats - 1}, random actions."
    )


def draw(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    titles = {"reset_seconds": "seconds a reset", "steps_per_second_with_resets": "steps/s, resets included"}
    names = list(next(iter(results.values())))
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for offset, name in enumerate(names):
            heights = [variants[name][key] for variants in results.values()]
            places = [index + 0.27 * (offset - (len(names) - 1) / 2) for index in range(len(results))]
            axis.bar(places, heights, 0.25, label=name, color=COLOURS[name])
        labels = [task.removeprefix("Safety").partition("-")[0] for task in results]
        axis.set_xticks(range(len(results)), labels, rotation=20, ha="right", fontsize=8)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resets", type=int, default=3, help="resets timed a repeat")
    parser.add_argument("--oracle-python", type=Path, help="a Python with the original's pinned packages")
    options = parser.parse_args()
    results = {}
    for task in options.tasks:
        runs = run_task(task, options.repeats, options.resets, options.oracle_python)
        results[task] = {name: summary(measured) for name, measured in runs.items()}
        print(task, json.dumps(results[task]), flush=True)
    result = {"repeats": options.repeats, "seeds": list(range(options.repeats)), "tasks": results}
    save(
        "safety_gym_speed",
        {**result, "threads": os.environ.get("OMP_NUM_THREADS")},
        table(results, options.repeats),
    )
    draw(results, RESULTS / "safety_gym_speed.png")


if __name__ == "__main__":
    main()
