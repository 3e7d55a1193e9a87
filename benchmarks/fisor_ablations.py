"""What FISOR's sampler, number of candidates and number of noise levels are worth, on PointRobot.

The policies of `feasible_region.py` at the published expectile act by other samplers and numbers of
candidates; other numbers of noise levels are trained for. Share of episodes from feasible starts with a
violation and share that reaches the goal, means over the seeds with their range; passes of the network an
action, and time an action relative to the published setting's, all in one run.

    python benchmarks/fisor_ablations.py [--seeds 3] [--levels 3 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import feasible_region as region
import numpy as np
import torch
from _common import save

from saferl.envs.point_robot import PointRobotVectorEnv, escapes
from saferl.policies import load_policy

EPISODES = 200


def drive(policy: Any) -> dict[str, float]:
    """Shares of violations and arrivals from feasible random starts, and seconds an action."""
    policy.seed(0)
    env = PointRobotVectorEnv(EPISODES, random_start=True)
    obs, _ = env.reset(seed=10_000_000)
    start = escapes(env.states)
    violated, arrived = np.zeros(EPISODES, bool), np.zeros(EPISODES, bool)
    alive, seconds, steps = np.ones(EPISODES, bool), 0.0, 0
    while alive.any():
        began = time.perf_counter()
        actions = policy.act(obs)
        seconds += time.perf_counter() - began
        steps += 1
        obs, rewards, terminations, truncations, info = env.step(actions)
        violated |= (info["constraint"] > 0) & alive
        arrived |= terminations & alive & (rewards > 0.9)
        alive &= ~(terminations | truncations)
    return {
        "violations": float(violated[start].mean()),
        "arrived": float(arrived[start].mean()),
        "seconds": seconds / (steps * EPISODES),
    }


def trained(seed: int, levels: int, steps: int) -> Path:
    """A run with `levels` noise levels; those of the figure where they are the published five."""
    if levels == 5:
        return region.trained(0.9, seed, steps)
    return region.trained(0.9, seed, steps, {"diffusion-steps": levels}, f"levels-{levels}-{seed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--levels", type=int, nargs="*", default=[3, 20])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    settings: list[tuple[str, int, str, int | None, int]] = [("published", 5, "ddpm", None, 8)]
    settings += [
        (f"{sampler}, {passes} passes", 5, sampler, passes, 8)
        for sampler, passes in (
            ("ddim", 3),
            ("ddim", 2),
            ("ddim", 1),
            ("dpm-solver++", 3),
            ("dpm-solver++", 2),
        )
    ]
    settings += [(f"N = {n}", 5, "ddpm", None, n) for n in (1, 4, 16, 64)]
    settings += [(f"T = {levels}", levels, "ddpm", None, 8) for levels in asked.levels]
    rows: list[dict[str, Any]] = []
    for name, levels, sampler, passes, candidates in settings:
        seeds = []
        for seed in range(asked.seeds):
            policy: Any = load_policy(trained(seed, levels, asked.steps))
            policy.use_sampler(sampler, passes)
            policy.candidates = candidates
            seeds.append(drive(policy))
        rows.append({"name": name, "passes": policy.passes, "candidates": candidates, "seeds": seeds})
        print(name, seeds, flush=True)
    save("fisor_ablations", {"rows": rows, "steps": asked.steps}, table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """One line a setting."""
    lines = [
        f"PointRobot, {len(rows[0]['seeds'])} seeds, {EPISODES} random starts each, of which the feasible "
        "ones count. Published here: DDPM, T = 5, N = 8.",
        "",
        "| setting | passes | candidates | violations | goal reached | time an action |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = statistics.median(seed["seconds"] for seed in rows[0]["seeds"])
    for row in rows:
        cells = [row["name"], str(row["passes"]), str(row["candidates"])]
        for quantity in ("violations", "arrived"):
            values = [seed[quantity] for seed in row["seeds"]]
            cells.append(f"{statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})")
        cells.append(f"{statistics.median(seed['seconds'] for seed in row['seeds']) / base:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
