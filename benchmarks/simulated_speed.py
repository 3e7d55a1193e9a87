"""How fast is the batched MuJoCo engine beside the real package, and beside MuJoCo's bare steps?

Whole episodes with random actions, restarts included, in one process; the variants take turns. Steps per
second of processor time, so that other work on the machine counts little:

* "package": safety-gymnasium on today's MuJoCo, textures compiled at every reset as the package does;
* "compat": the same without textures, which is what `gymnasium.make("saferl/...")` gives;
* "simulated": `SimulatedVectorEnv` with 32 environments on one thread;
* "exact": the same with `exact=True`, every body stepped at every step;
* "mj_step": nothing but `mj_step(model, data, 10)` with random controls on the package's model (of the
  gremlins' tasks with their targets moved), called from Python; no sensors read, no rewards, no resets.

"2 threads" are steps per second of wall time with two threads, over those with one, and depend on whether
the second core is free.

    python benchmarks/simulated_speed.py [--repeats 5] [--tasks SafetyPointGoal2-v0 ...]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import mujoco
import numpy as np
from _common import RESULTS, save

from saferl.envs import safety_gym
from saferl.envs.safety_gym.original import SafetyGymEnv
from saferl.envs.safety_gym.simulated import SimulatedVectorEnv

warnings.filterwarnings("ignore", category=DeprecationWarning)
TASKS = (
    "SafetyPointGoal2-v0",
    "SafetyCarGoal1-v0",
    "SafetyPointButton1-v0",
    "SafetyPointPush1-v0",
    "SafetyCarButton2-v0",
    "SafetyDoggoGoal1-v0",
    "SafetyRacecarCircle1-v0",
    "SafetyAntVelocity-v1",
    "SafetyHalfCheetahVelocity-v1",
)
COLOURS = {
    "package": "#555555",
    "compat": "#999999",
    "mj_step": "#D55E00",
    "exact": "#56B4E9",
    "simulated": "#0072B2",
}
NUM_ENVS = 32
EXACT_ENVS = 8  # slower: fewer of them, the same time


def original(task_id: str, textures: bool, steps: int) -> Callable[[int], int]:
    """Run the package for `steps` steps."""
    env = SafetyGymEnv(task_id, _textures=textures)
    env.reset(seed=0)
    limit = {task.id: task.max_episode_steps for task in safety_gym.tasks()}[task_id]

    def run(seed: int) -> int:
        space, rng = env.action_space, np.random.default_rng(seed)
        actions = rng.uniform(space.low, space.high, (steps, *space.shape)).astype(space.dtype)
        env.reset(seed=seed)
        length = 0
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            length += 1
            if terminated or truncated or length >= limit:
                env.reset()
                length = 0
        return steps

    return run


def simulated(task_id: str, num_envs: int, threads: int, exact: bool, steps: int) -> Callable[[int], int]:
    """Run `num_envs` environments for `steps` steps each."""
    env = SimulatedVectorEnv(task_id, num_envs, threads=threads, exact=exact)
    env.reset(seed=0)
    env.step(env.action_space.sample())  # compiles

    def run(seed: int) -> int:
        space, rng = env.action_space, np.random.default_rng(seed)
        env.reset(seed=1000 * seed)
        for _ in range(steps):
            env.step(rng.uniform(space.low, space.high, space.shape).astype(space.dtype))
        return steps * num_envs

    return run


def bare(task_id: str, steps: int) -> Callable[[int], int]:
    """Call `mj_step` on the package's model."""
    env = SafetyGymEnv(task_id)
    env.reset(seed=0)
    inner: Any = env._env if env._task is None else env._task
    frames = inner.frame_skip if env._task is None else 10
    gremlins = getattr(inner, "gremlins", None)

    def run(seed: int) -> int:
        env.reset(seed=seed)
        model, data = inner.model, inner.data
        low, high = model.actuator_ctrlrange.T
        controls = np.random.default_rng(seed).uniform(low, high, (steps, model.nu))
        for control in controls:
            data.ctrl[:] = control
            if gremlins is not None:
                gremlins.move()
            mujoco.mj_step(model, data, frames)
        return steps

    return run


def run_task(task_id: str, repeats: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """All variants, taking turns, so that a busy machine slows all alike."""
    variants = {
        "package": original(task_id, True, steps),
        "compat": original(task_id, False, steps),
        "simulated": simulated(task_id, NUM_ENVS, 1, False, steps),
        "two_threads": simulated(task_id, NUM_ENVS, 2, False, steps),
        "exact": simulated(task_id, EXACT_ENVS, 1, True, steps),
        "mj_step": bare(task_id, steps),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for seed in range(repeats):
        for name, variant in variants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            done = variant(seed)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            runs[name].append({"cpu": done / cpu, "wall": done / wall})
    return runs


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, measured in runs.items():
        rates = [run["cpu"] for run in measured]
        result[name] = {"median": median(rates), "min": min(rates), "max": max(rates)}

    def ratio(a: str, b: str, clock: str = "cpu") -> float:
        return median(x[clock] / y[clock] for x, y in zip(runs[a], runs[b], strict=True))

    result["ratios"] = {
        "package": ratio("simulated", "package"),
        "compat": ratio("simulated", "compat"),
        "mj_step": ratio("simulated", "mj_step"),
        "exact_mj_step": ratio("exact", "mj_step"),
        "two_threads": ratio("two_threads", "simulated", "wall"),
    }
    return result


def table(results: dict[str, dict[str, Any]], repeats: int, steps: int) -> str:
    lines = [
        "| task | package | compat | mj_step | exact | simulated | / package | / compat | / mj_step "
        "| exact / mj_step | 2 threads |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task_id, row in results.items():
        rates = [f"{row[name]['median']:,.0f}" for name in COLOURS]
        ratios = row["ratios"]
        lines.append(
            f"| {task_id} | {' | '.join(rates)} | {ratios['package']:.1f} | {ratios['compat']:.1f} "
            f"| {ratios['mj_step']:.2f} | {ratios['exact_mj_step']:.2f} | {ratios['two_threads']:.2f} |"
        )
    return (
        "\n".join(lines)
        + f"\n\nSteps per second of processor time, medians of {repeats} runs of {steps} steps "
        f"({NUM_ENVS} environments, exact {EXACT_ENVS}), seeds 0 to {repeats - 1}, random actions; the "
        "ratios are of `simulated` and medians as well."
    )


def draw(results: dict[str, dict[str, Any]]) -> None:
    figure, axis = plt.subplots(figsize=(9, 3.4), constrained_layout=True)
    for offset, (name, colour) in enumerate(COLOURS.items()):
        places = [index + 0.17 * (offset - 2) for index in range(len(results))]
        axis.bar(places, [row[name]["median"] for row in results.values()], 0.16, label=name, color=colour)
    labels = [task.removeprefix("Safety").partition("-")[0] for task in results]
    axis.set_xticks(range(len(results)), labels, rotation=20, ha="right", fontsize=8)
    axis.set_yscale("log")
    axis.set_title("control steps per second of processor time", fontsize=10)
    axis.legend(fontsize=8, ncols=5)
    figure.savefig(RESULTS / "simulated_speed.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    results = {}
    for task_id in options.tasks:
        results[task_id] = summary(run_task(task_id, options.repeats, options.steps))
        print(task_id, json.dumps(results[task_id]), flush=True)
    result = {"repeats": options.repeats, "steps": options.steps, "num_envs": NUM_ENVS, "tasks": results}
    save("simulated_speed", result, table(results, options.repeats, options.steps))
    draw(results)


if __name__ == "__main__":
    main()
