"""How many steps a second: the real package, the planar engine compiled and in torch, side by side.

Random actions, drawn beforehand. Every variant is warmed up and then measured in turns, so that a busy
machine slows all alike; medians. The original runs whole episodes in one process, resets included, as the
others do.

    python benchmarks/planar_speed.py [--repeats 5] [--seconds 1]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save

from saferl.envs import make_vec
from saferl.envs.safety_gym.planar.env import PlanarVectorEnv
from saferl.envs.safety_gym.planar.tasks import TASKS
from saferl.envs.safety_gym.planar.torch_env import PlanarTorchVectorEnv

NAME = "planar_speed"
GOAL1 = "SafetyPointGoal1-v0"
SIZES = (1, 64, 1024, 4096)
CUDA_SIZES = (4096, 16384, 65536)
COLOURS = {
    "original": "#555555",
    "compiled, 1 thread": "#0072B2",
    "compiled, 2 threads": "#56B4E9",
    "torch cpu, 1 thread": "#D55E00",
    "torch cuda": "#009E73",
}


def stepper(env: Any, actions: Any, finish: Callable[[], None]) -> Callable[[float], float]:
    """A function that steps `env` for some seconds and returns environment steps a second.

    Environments start out of step, so that ends of episodes, with their resets, come at their usual rate.
    """
    env.reset(seed=0)
    if hasattr(env, "get_state"):
        state = env.get_state()
        horizon = env.task.max_episode_steps
        state["steps"] = np.random.default_rng(0).integers(0, horizon, env.num_envs)
        if env.num_envs > 1 and getattr(env, "torch_device", None) is None:
            env.set_state(state)
    counter = iter(range(10**12))

    def measure(seconds: float) -> float:
        finish()
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(4):
                env.step(actions[next(counter) % len(actions)])
            count += 4
        finish()
        return count * env.num_envs / (time.perf_counter() - began)

    return measure


def variants(task_id: str, sizes: tuple[int, ...]) -> Iterator[tuple[str, int, Callable[[float], float]]]:
    """Every engine that this machine has, at every size."""
    rng = np.random.default_rng(0)

    def nothing() -> None: ...

    def draw(size: int) -> np.ndarray:
        return rng.uniform(-1, 1, (16, size, 2))

    yield "original", 1, stepper(make_vec(task_id, 1, backend="original"), draw(1), nothing)
    for size in sizes:
        for threads in (1, 2):
            if threads == 2 and size < 1024:
                continue  # smaller batches are done by one thread
            label = f"compiled, {threads} thread{'s' if threads > 1 else ''}"
            yield label, size, stepper(PlanarVectorEnv(task_id, size, threads=threads), draw(size), nothing)
        env = PlanarTorchVectorEnv(task_id, size, device="cpu")
        yield "torch cpu, 1 thread", size, stepper(env, torch.tensor(draw(size)), nothing)
    if torch.cuda.is_available():
        for size in (*sizes, *(size for size in CUDA_SIZES if size > max(sizes))):
            gpu = PlanarTorchVectorEnv(task_id, size, device="cuda")
            actions = torch.tensor(draw(size), device=gpu.torch_device)
            yield "torch cuda", size, stepper(gpu, actions, torch.cuda.synchronize)


def run_task(task_id: str, sizes: tuple[int, ...], repeats: int, seconds: float) -> list[dict[str, Any]]:
    made = list(variants(task_id, sizes))
    for _, _, measure in made:
        measure(0.1)  # compiles, allocates
    rates: list[list[float]] = [[] for _ in made]
    for _ in range(repeats):
        for kept, (_, _, measure) in zip(rates, made, strict=True):
            kept.append(measure(seconds))
    rows = []
    for kept, (label, size, _) in zip(rates, made, strict=True):
        rows.append({"task": task_id, "engine": label, "size": size, "rates": kept})
        print(task_id, label, size, f"{statistics.median(kept):,.0f}", flush=True)
    return rows


def table(rows: list[dict[str, Any]], repeats: int) -> str:
    base = {row["task"]: statistics.median(row["rates"]) for row in rows if row["engine"] == "original"}
    lines = [
        "| task | engine | environments | steps/s | range | times the original |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        middle = statistics.median(row["rates"])
        spread = f"{min(row['rates']):,.0f} to {max(row['rates']):,.0f}"
        lines.append(
            f"| {row['task']} | {row['engine']} | {row['size']:,} | {middle:,.0f} | {spread} "
            f"| {middle / base[row['task']]:,.1f} |"
        )
    note = "" if torch.cuda.is_available() else " There was no CUDA device."
    return "\n".join(lines) + f"\n\nMedians of {repeats} turns, random actions, resets included.{note}"


def draw_figure(rows: list[dict[str, Any]], path: Any) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for label, colour in COLOURS.items():
        found = [row for row in rows if row["engine"] == label and row["task"] == GOAL1]
        if not found:
            continue
        sizes, rates = zip(*((row["size"], statistics.median(row["rates"])) for row in found), strict=True)
        if label == "original":
            axis.axhline(rates[0], color=colour, ls="--", label=label)
        else:
            axis.plot(sizes, rates, "o-", color=colour, label=label)
    axis.set(xscale="log", yscale="log", xlabel="environments", ylabel="steps/s", title=GOAL1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--tasks", nargs="+", default=[GOAL1, *(t for t in TASKS if t != GOAL1)])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for task_id in asked.tasks:
        sizes = SIZES if task_id == GOAL1 else (max(SIZES),)
        rows += run_task(task_id, sizes, asked.repeats, asked.seconds)
    result = {"repeats": asked.repeats, "threads": os.environ.get("OMP_NUM_THREADS"), "rows": rows}
    save(NAME, result, table(rows, asked.repeats))
    draw_figure(rows, RESULTS / f"{NAME}.png")


if __name__ == "__main__":
    main()
