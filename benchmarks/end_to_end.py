"""End-to-end speed of `saferl train ppo-lag` against the plain loop over the official environment.

Both in one run, alternating, on SafetyPointGoal1-v0: the plain loop steps the package's environment as it
comes (textures compiled at every reset) with random actions and learns nothing; `saferl train` steps,
learns, logs and checkpoints. Import times and the wheel's size are measured beside.

    python benchmarks/end_to_end.py --steps 20000 --repeats 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import save

TASK = "SafetyPointGoal1-v0"
ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

PLAIN_LOOP = """
import sys, time
import numpy as np
from saferl.envs.safety_gym import compat
steps = int(sys.argv[1])
with compat.textures(keep=True):
    env = compat.make("{task}")
    rng = np.random.default_rng(0)
    low, high = env.action_space.low, env.action_space.high
    began = time.perf_counter()
    env.reset(seed=0)
    for _ in range(steps):
        *_, terminated, truncated, _ = env.step(rng.uniform(low, high))
        if terminated or truncated:
            env.reset()
print(steps / (time.perf_counter() - began))
"""

# The same loop on the package's own pinned stack, in an interpreter that has it.
PINNED_LOOP = """
import sys, time
import numpy as np
import safety_gymnasium
steps = int(sys.argv[1])
env = safety_gymnasium.make("{task}")
rng = np.random.default_rng(0)
low, high = env.action_space.low, env.action_space.high
began = time.perf_counter()
env.reset(seed=0)
for _ in range(steps):
    *_, terminated, truncated, _ = env.step(rng.uniform(low, high))
    if terminated or truncated:
        env.reset()
print(steps / (time.perf_counter() - began))
"""


def loop(python: str, code: str, steps: int) -> float:
    """Steps per second of a loop in a process of its own, without the start of the interpreter."""
    command = [python, "-c", code.format(task=TASK), str(steps)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ONE_THREAD)
    return float(done.stdout.split()[-1])


def train(steps: int, *options: str) -> float:
    """Steps per second of a whole `saferl train`: interpreter start, updates and checkpoints included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "saferl", "train", "ppo-lag", "--env", TASK, "--quiet"]
        command += ["--backend", "original"]
        command += ["--total-steps", str(steps), "--run", f"{folder}/run", *options]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD)
        return steps / (time.perf_counter() - began)


def seconds(*command: str) -> float:
    """The least of five runs."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD)
        times.append(time.perf_counter() - began)
    return min(times)


def wheel_kilobytes() -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, str(ROOT)]
        subprocess.run(command, check=True, capture_output=True)
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.stat().st_size / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--oracle-python", help="a Python that has safety-gymnasium with its pinned packages")
    asked = parser.parse_args()
    small = ["--steps-per-iteration", "5000"]
    variants = {
        "plain loop, package as it comes, random actions": lambda: loop(
            sys.executable, PLAIN_LOOP, asked.steps
        ),
        "saferl train ppo-lag, 1 process, 10 passes": lambda: train(asked.steps, *small, "--epochs", "10"),
        "saferl train ppo-lag, 2 worker processes, 10 passes": lambda: train(
            asked.steps, *small, "--epochs", "10", "--processes", "2"
        ),
        "saferl train ppo-lag, 2 worker processes, up to 40 passes": lambda: train(
            asked.steps, *small, "--processes", "2"
        ),
    }
    if asked.oracle_python:
        variants = {
            "plain loop, package's pinned stack, random actions": lambda: loop(
                asked.oracle_python, PINNED_LOOP, asked.steps
            ),
            **variants,
        }
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(asked.repeats):
        for name, measure in variants.items():
            speeds[name].append(measure())
            print(f"{name}: {speeds[name][-1]:,.0f} steps/s", flush=True)
    base = statistics.median(speeds["plain loop, package as it comes, random actions"])
    bare = seconds(sys.executable, "-c", "pass")
    times = {
        "python -c pass": bare,
        "import saferl": seconds(sys.executable, "-c", "import saferl"),
        "import saferl.constraints": seconds(sys.executable, "-c", "import saferl.constraints"),
        "import saferl.envs": seconds(sys.executable, "-c", "import saferl.envs"),
        "import saferl.agents.online.ppo_lag": seconds(
            sys.executable, "-c", "import saferl.agents.online.ppo_lag"
        ),
        "saferl --help": seconds(sys.executable, "-m", "saferl", "--help"),
    }
    size = wheel_kilobytes()
    lines = [f"| {TASK}, {asked.steps:,} steps | median steps/s | ratio |", "| --- | ---: | ---: |"]
    for name, values in speeds.items():
        lines.append(
            f"| {name} | {statistics.median(values):,.0f} | {statistics.median(values) / base:.2f} |"
        )
    lines += ["", "| command | seconds (least of 5) |", "| --- | ---: |"]
    lines += [f"| `{name}` | {value:.2f} |" for name, value in times.items()]
    lines += ["", f"Wheel: {size:,.0f} kB."]
    save(
        "end_to_end",
        {"steps_per_second": speeds, "seconds": times, "wheel_kilobytes": size},
        "\n".join(lines),
    )


if __name__ == "__main__":
    main()
