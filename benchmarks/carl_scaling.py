"""Does route completion keep improving as mini-batches grow, and does the shaped sum?

CaRL's PPO on RouteDriving with the vector observation, under CaRL's reward and under Roach's: equal
samples, equal rollouts (128 drives x 128 steps), and mini-batches of 256, 1,024, 4,096 and 16,384 of them,
three epochs each; so larger mini-batches mean fewer gradient steps, as they do in CaRL's own scaling. One
learning rate for all. Policies act by the mean on 36 drives of other seeds by the leaderboard's rules:
driving score, route completion, infractions, and the share of steps that are parked, v < 0.1 m/s where
Roach's desired speed is 0.

Rows are written as runs finish; called again, the script goes on. Drivers to compare with are scored at the
end.

    python benchmarks/carl_scaling.py --jobs 2 [--samples 1000000] [--seeds 3] [--plan]
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
import torch
from _common import RESULTS, command_line, machine, train

from saferl.envs.driving.drivers import DRIVERS, Driver
from saferl.envs.driving.env import RouteDrivingVectorEnv
from saferl.envs.driving.reward import RoachReward
from saferl.envs.driving.score import summarise

NAME = "carl_scaling"
RUNS = Path("runs") / NAME
WORLD = {"maps": 8, "routes": 64, "route_length": 120.0, "time_limit": 60.0}
ENVS, STEPS = 128, 128
PARTS = {256: 64, 1024: 16, 4096: 4, 16384: 1}
"""Mini-batches of an iteration, by their size."""
REWARDS = ("carl", "roach")
DRIVES = 36


@dataclass(frozen=True)
class Work:
    """One trained policy."""

    reward: str
    size: int
    seed: int
    samples: int

    @property
    def name(self) -> str:
        return f"{self.reward}-{self.size}-{self.samples}-{self.seed}"

    def key(self) -> list[Any]:
        return [self.reward, self.size, self.seed, self.samples]


def plan(seeds: int, samples: int) -> Iterator[Work]:
    for seed in range(seeds):
        for size in PARTS:
            for reward in REWARDS:
                yield Work(reward, size, seed, samples)


def rows() -> list[dict[str, Any]]:
    path = RESULTS / f"{NAME}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else []
    return found


def add(row: dict[str, Any]) -> None:
    from saferl.experiment.checkpoint import write_atomically

    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        kept = [old for old in rows() if old["key"] != row["key"]] + [row]
        kept.sort(key=lambda r: str(r["key"]))
        head = json.dumps({"command": command_line(), "machine": machine()})
        lines = ",\n".join(json.dumps(r) for r in kept)
        write_atomically(RESULTS / f"{NAME}.json", f'{head[:-1]}, "runs": [\n{lines}\n]}}\n')


def score(policy: Any, privileged: bool) -> dict[str, float]:
    """The first of each of 36 drives by the leaderboard's rules, with the share of parked steps."""
    env = RouteDrivingVectorEnv(DRIVES, mode="eval", privileged=privileged, **WORLD)
    obs, _ = env.reset(seed=1_000_000)
    shaped, over = RoachReward(), np.zeros(DRIVES, bool)
    found: list[dict[str, float]] = []
    parked = steps = 0
    while not over.all():
        seen = obs
        obs, *_, info = env.step(policy.act(seen, deterministic=True))
        still = (env.frame.speed < 0.1) & (shaped.hazard_speed(env.frame) <= 0)
        parked += int((still.numpy() & ~over).sum())
        steps += int((~over).sum())
        if "final_info" in info:
            for k in np.flatnonzero(info["_final_obs"] & ~over):
                told = info["final_info"]
                found.append({n: float(told[n][k]) for n in told if not n.startswith("_")})
            over |= info["_final_obs"]
    return {**summarise(found), "parked": parked / steps}


def one(work: Work) -> None:
    """Train and score; the row is stored."""
    from saferl.policies import load_policy

    torch.set_num_threads(1)
    run = RUNS / work.name
    options = "&".join(f"{k}={v}" for k, v in {"privileged": "true", "reward": work.reward, **WORLD}.items())
    words: list[str] = [
        "--env", f"RouteDriving-v0?{options}", "--num-envs", str(ENVS), "--steps", str(STEPS),
        "--minibatches", str(PARTS[work.size]), "--seed", str(work.seed),
    ]  # fmt: skip
    began = time.monotonic()
    train(run, "carl", words, work.samples)
    seconds = time.monotonic() - began
    result = score(load_policy(run), True)
    add({"key": work.key(), "seconds": round(seconds), "scores": result})
    print(
        f"{work.name}: driving score {result['driving_score']:.1f}, completion "
        f"{result['route_completion']:.1f}, "
        f"parked {100 * result['parked']:.0f} %, {seconds:.0f} s",
        flush=True,
    )


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def table(found: list[dict[str, Any]], drivers: dict[str, dict[str, float]]) -> str:
    lines = [
        "| reward | mini-batch | seeds | driving score | route completion | penalty | collisions a km "
        "| red lights a km | parked |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def cells(scores: list[dict[str, float]]) -> str:
        hits = [s["pedestrians_per_km"] + s["vehicles_per_km"] + s["statics_per_km"] for s in scores]
        return (
            f"{spread([s['driving_score'] for s in scores])} "
            f"| {spread([s['route_completion'] for s in scores])} "
            f"| {np.mean([s['penalty'] for s in scores]):.2f} | {np.mean(hits):.2f} "
            f"| {np.mean([s['red_lights_per_km'] for s in scores]):.2f} "
            f"| {100 * np.mean([s['parked'] for s in scores]):.0f} % |"
        )

    for reward in REWARDS:
        for size in PARTS:
            scores = [r["scores"] for r in found if r["key"][:2] == [reward, size]]
            if scores:
                lines.append(f"| {reward} | {size:,} | {len(scores)} | {cells(scores)}")
    for name, result in drivers.items():
        lines.append(f"| driver: {name} | | | {cells([result])}")
    return "\n".join(lines)


def figure(found: list[dict[str, Any]], drivers: dict[str, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3.6), layout="constrained")
    panels = picture.subplots(1, 3)
    for panel, name, label in zip(
        panels, ("driving_score", "route_completion", "parked"),
        ("driving score", "route completion (%)", "share of steps parked"), strict=True,
    ):  # fmt: skip
        for reward, colour in zip(REWARDS, ("#0072B2", "#D55E00"), strict=True):
            points = [
                (size, [r["scores"][name] for r in found if r["key"][:2] == [reward, size]]) for size in PARTS
            ]
            points = [(size, values) for size, values in points if values]
            if points:
                sizes = [size for size, _ in points]
                panel.plot(sizes, [np.mean(v) for _, v in points], "o-", color=colour, label=reward)
                for size, values in points:
                    panel.plot([size] * len(values), values, ".", color=colour, alpha=0.5)
        if name == "driving_score":
            for driver, result in drivers.items():
                panel.axhline(result[name], ls="--", lw=0.8, color="#777777")
                panel.text(256, result[name], driver, fontsize=7, va="bottom")
        panel.set(xscale="log", xlabel="mini-batch", ylabel=label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    picture.savefig(RESULTS / f"{NAME}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plan", action="store_true", help="list the runs and leave")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    works = list(plan(asked.seeds, asked.samples))
    if asked.only:
        one(next(work for work in works if work.name == asked.only))
        return
    done = [row["key"] for row in rows()]
    waiting = [work for work in works if work.key() not in done]
    if asked.plan:
        for work in works:
            print("done " if work not in waiting else "     ", work.name)
        return
    command = [sys.executable, __file__, "--samples", str(asked.samples), "--seeds", str(asked.seeds)]
    with ThreadPoolExecutor(asked.jobs) as pool:
        codes = list(pool.map(lambda w: subprocess.run([*command, "--only", w.name]).returncode, waiting))
    torch.set_num_threads(1)
    drivers = {name: score(Driver(name), False) for name in DRIVERS}
    found = [row for row in rows() if row["key"][3] == asked.samples]
    figure(found, drivers)
    text = f"{table(found, drivers)}\n\n{asked.samples:,} samples a run, {DRIVES} drives of 120 m a policy."
    (RESULTS / f"{NAME}.md").write_text(f"{text}\n\n`{command_line()}`, {machine()}.\n")
    print(text)
    if any(codes):
        raise SystemExit(f"{sum(map(bool, codes))} runs failed; call the script again.")


if __name__ == "__main__":
    main()
