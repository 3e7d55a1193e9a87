"""STARC's continuous experiment on Reacher, from the same transitions for all rewards.

Six rewards against the environment's own: shaped by a random linear potential; with a second, wider peak of
reward elsewhere; the fingertip's distance seen through a quantised Gaussian; the opposite; a random linear
one; and one that differs only on transitions that cannot happen. Distances by val and minimal with n = m = 2
and intervals, beside those that the authors' repository stores, whose estimator samples every reward apart.
The rewards are built after the descriptions there, with constants of ours.

    python benchmarks/starc_reacher.py [--episodes 2000]
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

import numpy as np
import torch
from _common import RESULTS, save

from saferl.envs import make_vec
from saferl.envs.datasets.record import RandomPolicy, record
from saferl.starc.sampled import Features, Transitions, compare

DISCOUNT = 0.99
NAMES = ("shaped", "second peak", "quantised", "negative", "random", "impossible")
LARGE = {"shaped": 0.897, "second peak": 1.257, "negative": 1.706, "random": 1.378}
"""Published, 100,000 samples; the true value of the first is 0 and of the third 2."""
SMALL = {
    "shaped": 0.691,
    "second peak": 0.709,
    "quantised": 1.523,
    "negative": 1.569,
    "random": 1.358,
    "impossible": 0.869,
}
"""Published, 96 samples."""


def rewards(data: Any, rng: np.random.Generator) -> list[np.ndarray]:
    """The environment's reward and the six (N,)."""
    s, after, truth = data.observations.astype(float), data.next_observations.astype(float), data.rewards
    linear = rng.normal(size=s.shape[1]) / np.maximum(s.std(axis=0), 1e-6)
    potential, later = s @ linear, after @ linear
    factor = 3 * truth.std() / potential.std()
    offset = after[:, 8:10]  # fingertip less target
    second = offset - np.array([0.1, -0.15])
    peak = truth + 0.5 * np.exp(-np.square(second).sum(axis=1) / (2 * 0.08**2))
    near = np.exp(-np.square(offset).sum(axis=1) / (2 * 0.1**2))
    other = after @ (rng.normal(size=s.shape[1]) / np.maximum(s.std(axis=0), 1e-6))
    possible = np.ones(len(s), bool)  # all that is recorded has happened
    return [
        truth,
        truth + factor * (DISCOUNT * later - potential),
        peak,
        np.round(10 * near) / 10,
        -truth,
        other,
        np.where(possible, truth, 100 * other),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=2_000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    env = make_vec("Reacher-v5", 50)
    data = record(RandomPolicy(env.single_action_space, 0), env, asked.episodes, seed=0)
    env.close()
    ends = data.terminals | data.timeouts
    transitions = Transitions(
        data.observations,
        data.actions,
        data.next_observations,
        data.terminals,
        np.concatenate([[0], np.cumsum(ends)[:-1]]),
    )
    columns = rewards(data, np.random.default_rng(0))
    rows: dict[str, Any] = {}
    names: tuple[Literal["val", "minimal"], ...] = ("val", "minimal")
    for name in names:
        learned = Features(network=64)
        found = compare(columns, transitions, DISCOUNT, canonicalization=name, features=learned)
        rows[name] = {
            "distances": found.distances[0, 1:].tolist(),
            "low": found.low[0, 1:].tolist(),
            "high": found.high[0, 1:].tolist(),
            "cautions": found.cautions,
        }
    save("starc_reacher", {"transitions": len(data), "rows": rows}, table(rows, len(data)))
    figure(rows)


def table(rows: dict[str, Any], count: int) -> str:
    lines = [
        f"Distance from the environment's reward, {count:,} transitions of random actions, discount "
        f"{DISCOUNT}, intervals of 95 %:",
        "",
        "| reward | "
        + " | ".join(f"{name} (95 %)" for name in rows)
        + " | published | published, small run |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for k, name in enumerate(NAMES):
        cells = [f"{r['distances'][k]:.3f} ({r['low'][k]:.3f} to {r['high'][k]:.3f})" for r in rows.values()]
        cells += [f"{known[name]:.3f}" if name in known else "" for known in (LARGE, SMALL)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, row in rows.items():
        lines += [f"\nCaution ({name}): {caution}" for caution in row["cautions"]]
    return "\n".join(lines)


def figure(rows: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    page, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
    places = np.arange(len(NAMES))
    for shift, (name, row) in zip((-0.15, 0.0), rows.items(), strict=True):
        values = np.array(row["distances"])
        spread = np.abs(np.array([row["low"], row["high"]]) - values)
        ax.errorbar(places + shift, values, spread, fmt="o", ms=4, capsize=3, label=f"saferl, {name}")
    for shift, known, label in ((0.15, LARGE, "published"), (0.3, SMALL, "published, small run")):
        chosen = [k for k, name in enumerate(NAMES) if name in known]
        ax.plot(np.array(chosen) + shift, [known[NAMES[k]] for k in chosen], "x", label=label)
    ax.set_xticks(places, NAMES)
    ax.set(ylabel="distance from the environment's reward", ylim=(-0.05, 2.1))
    ax.legend(frameon=False)
    page.savefig(RESULTS / "starc_reacher.png", dpi=100)
    plt.close(page)


if __name__ == "__main__":
    main()
