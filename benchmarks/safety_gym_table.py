"""The table of this field: constrained agents on Safety-Gymnasium, beside the published rows.

Every run is an ordinary `saferl train`, evaluated over fresh episodes. The script can be stopped at any
moment and started again: finished runs are in results/safety_gym_table.json, an unfinished one goes on from
its checkpoint. `--algos`, `--tasks`, `--steps` and `--seeds` restrict or change the plan; `--plan` prints it.

    python benchmarks/safety_gym_table.py --jobs 2
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, command_line, finished_step, machine, train

from saferl.experiment.checkpoint import write_atomically
from saferl.experiment.metrics import read_metrics

NAME = "safety_gym_table"
LIMIT = 25.0
# A dual method circles around what it aims at, and its policy is frozen where its learning rate has run out:
# aiming somewhat lower is what keeps the limit itself in the end.
AIM = 22.0

MAIN = ("ppo", "ppo-lag", "trpo-lag", "cpo", "cppo-pid")
ZOO = (
    *("trpo", "rcpo", "trpo-pid", "pcpo", "crpo", "focops", "cup", "p3o", "ipo"),
    *("ppo-saute", "trpo-saute", "ppo-simmer", "ppo-early-terminated", "trpo-early-terminated"),
    *("sac", "sac-lag", "sac-pid", "td3", "td3-lag", "td3-pid"),
)
OFF_POLICY = ("sac", "sac-lag", "sac-pid", "td3", "td3-lag", "td3-pid")
UNCONSTRAINED = ("ppo", "trpo", "sac", "td3")

# --- settings: one set an algorithm, the same for every seed and, unless said here, every task -----------

# The lambda of safety-starter-agents: with OmniSafe's 0.95 the second-order family learns far more slowly.
LAMBDA = {"gae_lambda": 0.97, "cost_gae_lambda": 0.97}
# Five passes with mini-batches of 500 instead of the published 40 of 64: a sixtieth of the gradient steps.
FIRST_ORDER = {**LAMBDA, "num_envs": 20, "steps_per_iteration": 20_000, "epochs": 5, "batch_size": 500}
# Larger rollouts and steps, and the Fisher information from half of the samples: from 5,000 of them for 8,000
# weights the trust region fitted noise, and entropy and cost ceased to fall.
SECOND_ORDER = {
    **LAMBDA,
    "num_envs": 50,
    "steps_per_iteration": 50_000,
    "target_kl": 0.02,
    "fisher_stride": 2,
    "critic_epochs": 5,
    "critic_batch_size": 500,
}
# The dual sees the episodes of the last iteration, not of the last five, and moves with the violation. PPO's
# steps shrink with its learning rate, and its policy hardens: a multiplier that begins near its end (1) comes
# in time, one that grew from 0 came too late. The trust region does not shrink: there it may grow.
FRESH = {"cost_window": 20}
ADDITIVE = {**FRESH, "multiplier_optimizer": "sgd", "multiplier_lr": 0.002, "multiplier_init": 1.0}
# As fast in samples: an iteration is two and a half times as long, and ends as many more episodes.
FRESH_LONG = {"cost_window": 50}
ADDITIVE_LONG = {**FRESH_LONG, "multiplier_optimizer": "sgd", "multiplier_lr": 0.0025}
PID = {**FRESH, "kp": 0.02, "ki": 0.002, "kd": 0.01, "ema_p": 0.8, "ema_d": 0.8, "delay": 1}
PID_LONG = {**PID, **FRESH_LONG, "kp": 0.01, "ki": 0.0025}
# At the published -0.2 a step, ten times what the task pays, Goal was not learned in a fifth of the budget.
BUDGET = {"saute_discount": 0.9999, "unsafe_reward": -0.1}
SIMMER = {**BUDGET, "start_budget": 0.2, "ramp": 0.5}
# 40,000 gradient steps in 2 million steps, where the published runs take three million; with so few they are
# larger, and the multiplier waits until there is a policy to correct. It prices costs in units of reward, not
# of normalised advantages as on policy.
OFF = {
    "num_envs": 80,
    "steps_per_iteration": 20_000,
    "learning_starts": 20_000,
    "update_interval": 200,
    "updates_per_step": 0.02,
    "hidden_sizes": [64, 64],
    "actor_lr": 0.001,
    "critic_lr": 0.001,
    "polyak": 0.01,
    "normalise_observations": True,
}
SOFT = {**OFF, "auto_alpha": True, "alpha": 0.01}
PRICED = {**FRESH, "multiplier_warmup": 600_000}
PRICED_LAG = {**PRICED, "multiplier_optimizer": "sgd", "multiplier_lr": 0.001}
PRICED_PID = {**PRICED, "kp": 0.005, "ki": 0.001, "kd": 0.001, "ema_p": 0.8, "ema_d": 0.8}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": FIRST_ORDER,
    "ppo-lag": {**FIRST_ORDER, **ADDITIVE},
    "cppo-pid": {**FIRST_ORDER, **PID},
    "focops": {**FIRST_ORDER, **FRESH, "multiplier_lr": 0.005, "multiplier_max": 5.0},
    "cup": {**FIRST_ORDER, **FRESH, "multiplier_lr": 0.005, "multiplier_max": 5.0},
    "p3o": {**FIRST_ORDER, **FRESH},
    # The published barrier's cap of 1 is less than what the limit costs here.
    "ipo": {**FIRST_ORDER, **FRESH, "kappa": 5.0, "penalty_max": 4.0},
    "ppo-saute": {**FIRST_ORDER, **BUDGET},
    "ppo-simmer": {**FIRST_ORDER, **SIMMER},
    "ppo-early-terminated": FIRST_ORDER,
    "trpo": SECOND_ORDER,
    "trpo-lag": {**SECOND_ORDER, **ADDITIVE_LONG},
    "rcpo": {**SECOND_ORDER, **ADDITIVE_LONG},
    "trpo-pid": {**SECOND_ORDER, **PID_LONG},
    "cpo": {**SECOND_ORDER, **FRESH_LONG, "margin_lr": 0.02},
    "pcpo": {**SECOND_ORDER, **FRESH_LONG, "margin_lr": 0.1},
    "crpo": {**SECOND_ORDER, **FRESH_LONG},
    "trpo-saute": {**SECOND_ORDER, **BUDGET},
    "trpo-early-terminated": SECOND_ORDER,
    "sac": SOFT,
    "sac-lag": {**SOFT, **PRICED_LAG},
    "sac-pid": {**SOFT, **PRICED_PID},
    "td3": OFF,
    "td3-lag": {**OFF, **PRICED_LAG},
    "td3-pid": {**OFF, **PRICED_PID},
}
# Costs of Circle are ten times those of Goal at first, returns twice: the same gain for the policy is a tenth
# of the gain for the multiplier.
CIRCLE_ADDITIVE = {"multiplier_lr": 0.0005}
CIRCLE_PID = {"kp": 0.002, "ki": 0.001, "kd": 0.001}
CIRCLE_PRICE = {"multiplier_lr": 0.00006}
CIRCLE_PRICE_PID = {"kp": 0.0003, "ki": 0.00006, "kd": 0.0003}
# A tenth of the budget leaves 20 long iterations: take 50 short ones instead, on all samples.
SHORT = {"num_envs": 20, "steps_per_iteration": 20_000, "fisher_stride": 1, "cost_window": 20}
FASTER = {"multiplier_lr": 0.003}
OVERRIDES: dict[tuple[str, str], dict[str, Any]] = {
    ("SafetyPointCircle1-v0", "rcpo"): CIRCLE_ADDITIVE,
    ("SafetyPointCircle1-v0", "trpo-pid"): CIRCLE_PID,
    ("SafetyPointCircle1-v0", "focops"): {"multiplier_lr": 0.0005},
    ("SafetyPointCircle1-v0", "cup"): {"multiplier_lr": 0.0005},
    ("SafetyPointCircle1-v0", "sac-lag"): CIRCLE_PRICE,
    ("SafetyPointCircle1-v0", "td3-lag"): CIRCLE_PRICE,
    ("SafetyPointCircle1-v0", "sac-pid"): CIRCLE_PRICE_PID,
    ("SafetyPointCircle1-v0", "td3-pid"): CIRCLE_PRICE_PID,
    ("SafetyCarGoal1-v0", "ppo-lag"): FASTER,
    ("SafetyCarGoal1-v0", "trpo-lag"): {**SHORT, **FASTER},
    ("SafetyCarGoal1-v0", "cpo"): SHORT,
}
# A gait takes many more steps of the policy than a path: iterations a fifth as long, twice the passes.
RUNNING = {"num_envs": 8, "steps_per_iteration": 4_000, "epochs": 10, "batch_size": 125, "cost_window": 8}
RUNNING_SECOND = {"num_envs": 8, "steps_per_iteration": 8_000, "fisher_stride": 1, "critic_batch_size": 125}
for _task in ("SafetyHalfCheetahVelocity-v1", "SafetyHopperVelocity-v1"):
    OVERRIDES |= {
        (_task, "ppo"): {name: value for name, value in RUNNING.items() if name != "cost_window"},
        (_task, "ppo-lag"): RUNNING,
        (_task, "cppo-pid"): RUNNING,
        (_task, "trpo-lag"): {**RUNNING_SECOND, "cost_window": 8, "multiplier_lr": 0.001},
        (_task, "cpo"): {**RUNNING_SECOND, "cost_window": 8},
    }

# --- published rows: OmniSafe's benchmark, 1e7 steps, limit 25 (return, cost) ----------------------------

PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "SafetyPointGoal1-v0": {
        "ppo": (25.44, 55.7),
        "trpo": (27.20, 45.9),
        "ppo-lag": (12.96, 25.8),
        "trpo-lag": (18.51, 23.0),
        "rcpo": (15.27, 30.6),
        "cpo": (20.46, 28.8),
        "pcpo": (18.57, 23.0),
        "focops": (14.97, 33.7),
        "cup": (14.42, 19.0),
        "p3o": (1.6, 31.1),
        "cppo-pid": (8.43, 25.7),
        "trpo-pid": (19.24, 21.4),
        "ppo-saute": (7.06, 20.0),
        "trpo-saute": (16.18, 29.9),
        "ppo-simmer": (8.30, 25.3),
        "ppo-early-terminated": (16.03, 19.2),
        "trpo-early-terminated": (16.31, 22.1),
        "sac": (27.04, 67.6),
        "td3": (27.28, 51.4),
        "sac-lag": (21.45, 19.2),
        "td3-lag": (25.27, 28.0),
        "sac-pid": (15.87, 27.5),
        "td3-pid": (18.76, 12.2),
    },
    "SafetyPointCircle1-v0": {
        "sac": (115.06, 403.4),
        "td3": (115.15, 391.1),
        "sac-lag": (83.68, 12.8),
        "td3-lag": (83.07, 7.8),
        "sac-pid": (75.15, 4.5),
        "td3-pid": (70.95, 0.0),
    },
    "SafetyCarGoal1-v0": {
        "ppo": (33.41, 58.1),
        "ppo-lag": (13.27, 21.7),
        "trpo-lag": (27.04, 26.8),
        "cpo": (25.52, 43.3),
        "cppo-pid": (10.60, 30.7),
    },
    "SafetyHalfCheetahVelocity-v1": {
        "ppo": (6921.8, 919.2),
        "ppo-lag": (2946.2, 3.4),
        "trpo-lag": (2884.7, 9.0),
        "cpo": (2786.5, 4.7),
        "cppo-pid": (2837.9, 8.1),
    },
    "SafetyHopperVelocity-v1": {
        "ppo": (2337.1, 550.0),
        "ppo-lag": (961.9, 14.0),
        "trpo-lag": (1391.8, 11.2),
        "cpo": (1713.7, 13.4),
        "cppo-pid": (1713.3, 9.0),
    },
}


@dataclass(frozen=True)
class Suite:
    """One block of the table."""

    title: str
    tasks: tuple[str, ...]
    algorithms: tuple[str, ...]
    steps: int
    seeds: int
    episodes: int = 400
    """Of the evaluation."""


SUITES = (
    Suite("the published budget", ("SafetyPointGoal1-v0",), MAIN, 10_000_000, 3),
    Suite(
        "the rest of the zoo at a fifth of it",
        ("SafetyPointGoal1-v0", "SafetyPointCircle1-v0"),
        ZOO,
        2_000_000,
        2,
    ),
    Suite("another robot at a tenth of it", ("SafetyCarGoal1-v0",), MAIN, 1_000_000, 1, episodes=100),
    Suite(
        "running at a twentieth of it",
        ("SafetyHalfCheetahVelocity-v1", "SafetyHopperVelocity-v1"),
        MAIN,
        500_000,
        2,
        episodes=100,
    ),
)


@dataclass(frozen=True)
class Work:
    """One run of the table."""

    suite: int
    task: str
    algorithm: str
    seed: int
    steps: int

    @property
    def options(self) -> dict[str, Any]:
        """Settings of the algorithm, as stored with the result: another setting is another result."""
        limited = {} if self.algorithm in UNCONSTRAINED else {"cost_limit": AIM}
        of_task = OVERRIDES.get((self.task, self.algorithm), {})
        return {**SETTINGS.get(self.algorithm, {}), **of_task, **limited}

    @property
    def name(self) -> str:
        """Folder of the run; other settings have another."""
        settings = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()
        return f"{self.task}-{self.algorithm}-{self.steps}-{self.seed}-{settings[:6]}"

    def words(self) -> list[str]:
        """Command-line options."""
        words = ["--env", self.task, "--seed", str(self.seed)]
        for name, value in self.options.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
        return words

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a stored result is of this very run."""
        return all(
            row[field] == value
            for field, value in (
                ("task", self.task),
                ("algorithm", self.algorithm),
                ("seed", self.seed),
                ("steps", self.steps),
                ("options", self.options),
            )
        )


class Results:
    """The finished runs, a line of the file each, written after each."""

    def __init__(self) -> None:
        self.path = RESULTS / f"{NAME}.json"
        self.lock = threading.Lock()
        self.rows: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Take what is stored, by another process of this script too."""
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())["runs"]

    def find(self, work: Work) -> dict[str, Any] | None:
        return next((row for row in self.rows if work.matches(row)), None)

    def add(self, row: dict[str, Any]) -> None:
        with self.lock, (RESULTS / f".{NAME}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.read()
            same = ("task", "algorithm", "seed", "steps")
            self.rows = [old for old in self.rows if any(old[key] != row[key] for key in same)]
            self.rows.append(row)
            order = [*MAIN, *ZOO]
            self.rows.sort(key=lambda r: (-r["steps"], r["task"], order.index(r["algorithm"]), r["seed"]))
            head = {"command": command_line(), "machine": machine(), "limit": LIMIT, "aim": AIM}
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            write_atomically(self.path, f'{json.dumps(head)[:-1]}, "runs": [\n{lines}\n]}}\n')


def one(work: Work, results: Results, folder: Path) -> None:
    """Train and evaluate a run, unless its result is stored."""
    if results.find(work) is not None:
        return
    run = folder / work.name
    began, start = time.monotonic(), finished_step(run)
    train(run, work.algorithm, work.words(), work.steps)
    seconds, done = time.monotonic() - began, work.steps - start
    row: dict[str, Any] = {
        "suite": work.suite,
        "task": work.task,
        "algorithm": work.algorithm,
        "seed": work.seed,
        "steps": work.steps,
        "options": work.options,
        "seconds": round(seconds * work.steps / max(done, 1), 1),
        "curve": curve(run),
    }
    for mode in ("stochastic", "deterministic"):
        written = run / f"evaluation-{mode}.json"
        command = [
            sys.executable,
            "-m",
            "saferl",
            "evaluate",
            str(run),
            "--episodes",
            str(SUITES[work.suite].episodes),
        ]
        command += ["--num-envs", "40", "--cost-limit", str(LIMIT), "--output", str(written), "--quiet"]
        command += ["--stochastic"] if mode == "stochastic" else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        evaluation = json.loads(written.read_text())
        row[mode] = {name: evaluation[name] for name in ("return", "cost", "violation_rate")}
        row["engine"] = evaluation["backend"]
    results.add(row)
    print(
        f"{work.name}: return {row['stochastic']['return']['mean']:.2f}, "
        f"cost {row['stochastic']['cost']['mean']:.1f}, {seconds:.0f} s",
        flush=True,
    )


def curve(run: Path, points: int = 50) -> dict[str, list[float]]:
    """Return, cost and multiplier over training, averaged into at most `points` bins."""
    rows = [row for row in read_metrics(run / "metrics.csv") if "train/return" in row]
    names = ("step", "train/return", "train/cost", "constraint/cost/multiplier")
    bins = np.array_split(np.arange(len(rows)), min(points, len(rows)))
    return {
        name: [float(f"{np.mean([rows[i][name] for i in part]):.5g}") for part in bins]
        for name in names
        if all(name in row for row in rows)
    }


# --- what is shown -------------------------------------------------------------------------------------


def interquartile_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Interquartile mean over runs and its 95 % bootstrap interval (Agarwal et al. 2021)."""
    from scipy.stats import bootstrap, trim_mean

    data = np.asarray(values, float)
    centre = float(trim_mean(data, 0.25))
    if len(data) < 2 or np.ptp(data) == 0:
        return centre, centre, centre
    interval = bootstrap(
        (data,), lambda x, axis: trim_mean(x, 0.25, axis=axis), method="percentile", rng=0, n_resamples=2000
    ).confidence_interval
    return centre, float(interval.low), float(interval.high)


def table(rows: list[dict[str, Any]], baseline: Mapping[str, Any] | None) -> str:
    lines = [
        f"Cost limit {LIMIT:g} an episode; the constrained methods aim at {AIM:g}. 400 fresh episodes a run "
        "(other robots: 100) with the stochastic policy, which is what the constraint speaks of. "
        "Interquartile mean over the seeds with 95 % bootstrap interval (of three seeds or fewer it is the "
        "mean), every seed's cost, return and cost of the policy's mode, and the row of OmniSafe's benchmark "
        "at 1e7 steps (off-policy: 1e6, Circle and Goal 3e6) where one is published. Steps/s are of training "
        "beside other work."
    ]
    for number, suite in enumerate(SUITES):
        for task in suite.tasks:
            found = [r for r in rows if (r["suite"], r["task"]) == (number, task)]
            if not found:
                continue
            lines += [
                "",
                f"**{task}, {found[0]['steps']:,} steps, {plural(len({r['seed'] for r in found}), 'seed')}** "
                f"({suite.title})",
                "",
                "| algorithm | return | cost | of each seed | mode: return / cost | published | steps/s |",
                "| --- | --- | --- | --- | --- | --- | ---: |",
            ]
            if baseline is not None and task == "SafetyPointGoal1-v0":
                lines.append(
                    f"| goal-seeker, by hand | {baseline['return']:.2f} | {baseline['cost']:.1f} | | | | |"
                )
            for algorithm in suite.algorithms:
                runs = [r for r in found if r["algorithm"] == algorithm]
                if runs:
                    lines.append(line(task, algorithm, runs))
    hours = sum(row["seconds"] for row in rows) / 3600
    lines += ["", f"{len(rows)} runs, {hours:.1f} core-hours of training."]
    return "\n".join(lines)


def plural(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def line(task: str, algorithm: str, runs: list[dict[str, Any]]) -> str:
    returns = [r["stochastic"]["return"]["mean"] for r in runs]
    costs = [r["stochastic"]["cost"]["mean"] for r in runs]
    mode = [np.mean([r["deterministic"][key]["mean"] for r in runs]) for key in ("return", "cost")]
    reference = PUBLISHED.get(task, {}).get(algorithm)
    shown = "" if reference is None else f"{reference[0]:g} / {reference[1]:g}"
    speed = np.mean([r["steps"] / r["seconds"] for r in runs])
    digits = 0 if max(returns) > 1000 else 2
    r, c = interquartile_mean(returns), interquartile_mean(costs)
    return (
        f"| {algorithm} | {r[0]:.{digits}f} [{r[1]:.{digits}f}, {r[2]:.{digits}f}] "
        f"| {c[0]:.1f} [{c[1]:.1f}, {c[2]:.1f}] | {', '.join(f'{x:.1f}' for x in costs)} "
        f"| {mode[0]:.{digits}f} / {mode[1]:.1f} | {shown} | {speed:,.0f} |"
    )


COLOURS = {
    "ppo": "#555555",
    "ppo-lag": "#0072B2",
    "trpo-lag": "#009E73",
    "cpo": "#CC79A7",
    "cppo-pid": "#D55E00",
}


def label(axis: Any, centres: Mapping[str, tuple[float, float]]) -> None:
    """Name the points to their right, one name below the other where they are crowded."""
    x_end, (y_low, y_high) = axis.get_xlim()[1], axis.get_ylim()
    axis.set_xlim(right=1.35 * x_end)
    height, placed = 0.042 * (y_high - y_low), []
    for name, (x, y) in sorted(centres.items(), key=lambda item: -item[1][1]):
        left, level = x + 0.03 * x_end, y
        width = 0.024 * len(name) * x_end
        moved = True
        while moved:
            moved = False
            for other, other_width, other_level in placed:
                across = left < other + other_width and other < left + width
                if across and abs(level - other_level) < 0.99 * height:
                    level, moved = other_level - height, True
        placed.append((left, width, level))
        axis.annotate(
            name, (x, y), (left, level), fontsize=7, va="center", arrowprops={"arrowstyle": "-", "lw": 0.3}
        )


def figures(rows: list[dict[str, Any]], baseline: Mapping[str, Any] | None) -> None:
    from matplotlib.figure import Figure

    first = [r for r in rows if r["suite"] == 0]
    if first:
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        panels = (("train/return", "return"), ("train/cost", "cost"), ("constraint/cost/multiplier", "λ"))
        for axis, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
            for algorithm in MAIN:
                curves = [r["curve"] for r in first if r["algorithm"] == algorithm and name in r["curve"]]
                if not curves:
                    continue
                length = min(len(c["step"]) for c in curves)
                steps = np.array(curves[0]["step"][:length]) / 1e6
                values = np.array([c[name][:length] for c in curves])
                axis.plot(steps, values.mean(0), color=COLOURS[algorithm], label=algorithm, lw=1.5)
                axis.fill_between(
                    steps, values.min(0), values.max(0), color=COLOURS[algorithm], alpha=0.15, lw=0
                )
            axis.set(title=title, xlabel="million environment steps")
            axis.spines[["top", "right"]].set_visible(False)
            if name == "train/cost":
                axis.axhline(LIMIT, color="black", ls="--", lw=1)
                axis.set_ylim(0, 90)
            if name == "train/return":
                axis.legend(frameon=False, fontsize=8)
        figure.suptitle("SafetyPointGoal1-v0, mean and range of the seeds", fontsize=10)
        figure.savefig(RESULTS / f"{NAME}_curves.png", dpi=120)

    pairs = [(n, t) for n, s in enumerate(SUITES) for t in s.tasks if any(
        (r["suite"], r["task"]) == (n, t) for r in rows
    )]  # fmt: skip
    if not pairs:
        return
    columns = min(3, len(pairs))
    figure = Figure(figsize=(5 * columns, 4.4 * -(-len(pairs) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(pairs) // columns), columns, squeeze=False).flat
    for axis, (number, task) in zip(axes, pairs, strict=False):
        centres: dict[str, tuple[float, float]] = {}
        for algorithm in SUITES[number].algorithms:
            runs = [r for r in rows if (r["suite"], r["task"], r["algorithm"]) == (number, task, algorithm)]
            if not runs:
                continue
            xs = [r["stochastic"]["cost"]["mean"] for r in runs]
            ys = [r["stochastic"]["return"]["mean"] for r in runs]
            colour = COLOURS.get(algorithm, "#56B4E9")
            axis.scatter(xs, ys, s=14, color=colour, alpha=0.5, lw=0)
            axis.scatter(np.mean(xs), np.mean(ys), s=40, color=colour)
            centres[algorithm] = float(np.mean(xs)), float(np.mean(ys))
            reference = PUBLISHED.get(task, {}).get(algorithm)
            if reference is not None and number == 0:
                axis.scatter(reference[1], reference[0], s=40, facecolor="none", edgecolor=colour)
        if baseline is not None and task == "SafetyPointGoal1-v0":
            axis.scatter(baseline["cost"], baseline["return"], s=50, marker="x", color="black")
        axis.axvline(LIMIT, color="black", ls="--", lw=1)
        axis.set_title(f"{task.removesuffix('-v0')}, {SUITES[number].steps / 1e6:g}M steps", fontsize=10)
        axis.set_xlabel("cost")
        axis.set_xlim(left=0)
        axis.margins(y=0.08)
        axis.spines[["top", "right"]].set_visible(False)
        label(axis, centres)
    for axis in list(axes)[len(pairs) :]:
        axis.set_visible(False)
    figure.supylabel("return")
    figure.savefig(RESULTS / f"{NAME}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algos", nargs="+", choices=[*MAIN, *ZOO], help="only these")
    parser.add_argument("--tasks", nargs="+", help="only these of the plan")
    parser.add_argument("--steps", type=int, help="another budget")
    parser.add_argument("--seeds", type=int, help="another number of seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/safety_gym_table"))
    parser.add_argument("--plan", action="store_true", help="print what is to do and stop")
    asked = parser.parse_args()
    plan = [
        Work(number, task, algorithm, seed, asked.steps or suite.steps)
        for number, suite in enumerate(SUITES)
        for seed in range(asked.seeds or suite.seeds)
        for task in suite.tasks
        for algorithm in suite.algorithms
        if algorithm in (asked.algos or suite.algorithms) and task in (asked.tasks or suite.tasks)
    ]
    results = Results()
    if asked.plan:
        for work in plan:
            print(("done  " if results.find(work) else "      ") + work.name, *work.words()[4:])
        return
    with ThreadPoolExecutor(asked.jobs) as pool:
        list(pool.map(lambda work: one(work, results, asked.folder), plan))
    from planar_parity import goal_seeker

    baseline = goal_seeker(400)
    rows = results.rows
    text = table(rows, baseline)
    (RESULTS / f"{NAME}.md").write_text(f"{text}\n\n`{command_line()}`, {machine()}.\n")
    print(text)
    figures(rows, baseline)


if __name__ == "__main__":
    main()
