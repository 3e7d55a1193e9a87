"""How well do reward distances predict regret? STARC's tabular experiment, at its full size and exactly.

Random processes with 32 states and 4 actions, discount 0.95; pairs of random rewards, sparse, scaled, shifted
or shaped at random; 16 steps from one reward to the other. The regret of a step is the mean over both
directions of the share of a reward's range that is lost by the other's optimal policy. Score: Pearson's
correlation of distance and regret over all points. Returns are exact here, sampled by the authors, so that
ours come out higher; what compares is the order.

Finished processes are kept, so that the script goes on where it was stopped.

    python benchmarks/starc_correlation.py [--processes 128 --pairs 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, save

from saferl.starc import CANONICALIZATIONS, Canonicalizer, TabularMDP, optimal_policy, policy_return
from saferl.starc.canonical import Canonicalization

CACHE = Path("runs/starc_correlation")
SIZE, ACTIONS, DISCOUNT, STEPS = 32, 4, 0.95, 16
NORMALISERS = ("0", "1", "2", "inf", "w1", "w2", "winf")
METRICS = ("1", "2", "inf", "w1", "w2", "winf")
NONLINEAR = ("minimal-1", "minimal-inf")
PUBLISHED: dict[tuple[str, str], list[float]] = {
    ("val", "1"): [0.873, 0.870, 0.749, 0.873, 0.870, 0.741],
    ("val", "2"): [0.804, 0.856, 0.858, 0.804, 0.856, 0.783],
    ("val", "inf"): [0.708, 0.723, 0.756, 0.708, 0.723, 0.707],
    ("val", "winf"): [0.707, 0.766, 0.816, 0.707, 0.766, 0.734],
    ("val-potential", "1"): [0.800, 0.240, 0.171, 0.876, 0.776, 0.685],
    ("val-potential", "2"): [0.752, 0.782, 0.625, 0.767, 0.828, 0.677],
    ("val-potential", "w1"): [-0.035, -0.040, -0.044, 0.867, -0.037, 0.692],
    ("val-potential", "w2"): [0.112, 0.093, 0.065, 0.784, 0.845, 0.807],
    ("dard", "1"): [0.824, 0.453, 0.376, 0.861, 0.761, 0.654],
    ("dard", "2"): [0.751, 0.782, 0.630, 0.767, 0.826, 0.675],
    ("dard", "w1"): [0.621, 0.241, 0.220, 0.835, 0.754, 0.679],
    ("epic", "1"): [0.814, 0.647, 0.542, 0.819, 0.622, 0.517],
    ("epic", "2"): [0.734, 0.778, 0.634, 0.746, 0.814, 0.637],
    ("epic", "w1"): [0.749, 0.529, 0.436, 0.830, 0.730, 0.607],
    ("minimal-potential", "1"): [0.815, 0.576, 0.493, 0.718, 0.568, 0.489],
    ("minimal-potential", "2"): [0.733, 0.778, 0.634, 0.746, 0.814, 0.637],
    ("none", "2"): [0.571, 0.618, 0.444, 0.579, 0.633, 0.513],
}
"""Read from the figure of the authors' repository; columns are METRICS."""


def random_process(rng: np.random.Generator) -> TabularMDP:
    """Sparse rows: normal logits, those up to 1 at -20, softmax."""
    logits = rng.normal(size=(SIZE, ACTIONS, SIZE))
    logits[logits <= 1] = -20
    weights = np.exp(logits)
    return TabularMDP(weights / weights.sum(axis=2, keepdims=True), DISCOUNT)


def random_reward(rng: np.random.Generator) -> np.ndarray:
    """As the authors draw them."""
    reward = rng.normal(size=(SIZE, ACTIONS, SIZE))
    if rng.random() < 0.2:
        reward = np.where(reward > 3, reward, 0.0)
    if rng.random() < 0.7:
        reward = reward * rng.uniform(0, 10)
    if rng.random() < 0.3:
        reward = reward + rng.uniform(0, 10)
    if rng.random() < 0.5:
        potential = rng.normal(size=SIZE) * rng.uniform(0, 10) + rng.uniform(0, 1)
        reward = reward + DISCOUNT * potential - potential[:, None, None]
    return np.asarray(reward)


def regrets(mdp: TabularMDP, rewards: np.ndarray) -> np.ndarray:
    """Mean regret (K - 1,) of the first reward and each other; NaN where one is trivial and has no range."""
    found = []
    for reward in rewards:
        actions, highest = optimal_policy(mdp, reward)
        _, lowest = optimal_policy(mdp, reward, lowest=True)
        top, bottom = float(mdp.initial @ highest), float(mdp.initial @ lowest)
        if top - bottom <= 1e-9 * mdp.expected(abs(reward)).max() / (1 - DISCOUNT):
            top = bottom = float("nan")
        found.append((actions, top, bottom))
    actions, best, least = found[0]
    values = []
    for reward, (others, top, bottom) in zip(rewards[1:], found[1:], strict=True):
        lost = (best - policy_return(mdp, rewards[0], others)) / (best - least)
        back = (top - policy_return(mdp, reward, actions)) / (top - bottom)
        values.append((lost + back) / 2)
    return np.array(values)


def lengths(forms: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All norms (K,) of forms (K, S * A * S')."""
    size = np.abs(forms)
    heavy = size * weights
    return {
        "1": size.sum(axis=1),
        "2": np.sqrt(np.einsum("kn,kn->k", size, size)),
        "inf": size.max(axis=1),
        "w1": heavy.sum(axis=1),
        "w2": np.sqrt(np.einsum("kn,kn->k", heavy, size)),
        "winf": heavy.max(axis=1),
    }


def distances(mdp: TabularMDP, rewards: np.ndarray, name: Canonicalization) -> np.ndarray:
    """Distances (7, 6, K - 1) of the first reward from the others: normalisers, metrics."""
    canonical = Canonicalizer(mdp, name)
    shape = (SIZE, ACTIONS, SIZE)
    if name in NONLINEAR:
        forms = np.stack([np.broadcast_to(canonical(r), shape).ravel() for r in rewards])
    else:
        first, last = (np.broadcast_to(canonical(r), shape).ravel() for r in (rewards[0], rewards[-1]))
        steps = np.linspace(0, 1, len(rewards))[:, None]
        forms = first + (last - first) * steps
    weights = mdp.transitions.ravel()
    norms = lengths(forms, weights)
    found = np.empty((len(NORMALISERS), len(METRICS), len(rewards) - 1))
    for i, normaliser in enumerate(NORMALISERS):
        scale = np.ones(len(forms)) if normaliser == "0" else norms[normaliser]
        standard = forms / np.where(scale > 0, scale, 1)[:, None]
        apart = lengths(standard[1:] - standard[0], weights)
        found[i] = [apart[metric] for metric in METRICS]
    return found


def process(index: int, pairs: int) -> dict[str, np.ndarray]:
    """All points of one process."""
    rng = np.random.default_rng([42, index])
    mdp = random_process(rng)
    lost, apart = [], []
    for _ in range(pairs):
        first, last = random_reward(rng), random_reward(rng)
        steps = np.arange(STEPS + 1)[:, None, None, None] / STEPS
        rewards = first + (last - first) * steps
        lost.append(regrets(mdp, rewards))
        apart.append([distances(mdp, rewards, name) for name in CANONICALIZATIONS])  # type: ignore[arg-type]
    return {"regret": np.array(lost), "distance": np.array(apart)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=8)
    asked = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    parts = []
    for index in range(asked.processes):
        path = CACHE / f"{index}-{asked.pairs}.npz"
        if not path.exists():
            arrays: dict[str, Any] = process(index, asked.pairs)
            np.savez_compressed(path.with_suffix(".part.npz"), **arrays)
            path.with_suffix(".part.npz").rename(path)
            print(f"{index + 1} of {asked.processes} processes", flush=True)
        with np.load(path) as archive:
            parts.append((archive["regret"], archive["distance"]))
    regret = np.concatenate([part[0].ravel() for part in parts])
    # (points, canonicalisations, normalisers, metrics)
    apart = np.concatenate([np.moveaxis(part[1], -1, 1).reshape(-1, *part[1].shape[1:-1]) for part in parts])
    kept = np.isfinite(regret)
    dropped = int((~kept).sum())
    regret, apart = regret[kept], apart[kept]
    scores = correlations(regret, apart)
    ratios = {name: largest_ratio(regret, apart, name, "2", "2") for name in ("none", "epic", "dard", "val")}
    ratios["minimal"] = largest_ratio(regret, apart, "minimal", "2", "2")
    result = {"points": len(regret), "dropped": dropped, "scores": scores.tolist(), "ratios": ratios}
    save("starc_correlation", result, table(scores, ratios, len(regret), dropped))
    figure(regret, apart, scores, RESULTS / "starc_correlation.png")


def correlations(regret: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Pearson's correlation (canonicalisations, normalisers, metrics)."""
    x = apart - apart.mean(axis=0)
    y = regret - regret.mean()
    return np.asarray(np.tensordot(y, x, axes=1) / np.sqrt((y @ y) * np.square(x).sum(axis=0)))


def largest_ratio(regret: np.ndarray, apart: np.ndarray, name: str, normaliser: str, metric: str) -> float:
    """The most regret for a distance: bounded for a sound metric."""
    column = apart[:, CANONICALIZATIONS.index(name), NORMALISERS.index(normaliser), METRICS.index(metric)]
    return float((regret / np.maximum(column, 1e-12))[regret > 1e-9].max())


def table(scores: np.ndarray, ratios: dict[str, float], points: int, dropped: int) -> str:
    lines = [
        f"Correlation of distance and regret over {points:,} points ({dropped:,} more have no regret: one "
        "of their rewards pays only on impossible transitions); in brackets the published ones, with returns "
        "by sampling. n = 0: not normalised. w: weighted by the transitions.",
        "",
        "| form | n | " + " | ".join(f"m = {m}" for m in METRICS) + " |",
        "| --- | --- |" + " ---: |" * len(METRICS),
    ]
    for i, name in enumerate(CANONICALIZATIONS):
        for j, normaliser in enumerate(NORMALISERS):
            cells = []
            for k in range(len(METRICS)):
                cell = f"{scores[i, j, k]:.3f}"
                if (name, normaliser) in PUBLISHED:
                    cell += f" ({PUBLISHED[name, normaliser][k]:.3f})"
                cells.append(cell)
            lines.append(f"| {name} | {normaliser} | {' | '.join(cells)} |")
    said = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    lines += ["", f"Largest regret for a distance (n = m = 2): {said}."]
    return "\n".join(lines)


def figure(regret: np.ndarray, apart: np.ndarray, scores: np.ndarray, path: Path) -> None:
    """Every metric's correlation, and regret against distance."""
    import matplotlib.pyplot as plt

    page, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for ax, name in zip(axes.ravel(), ("val", "minimal", "dard", "epic", "none"), strict=False):
        i, two = CANONICALIZATIONS.index(name), NORMALISERS.index("2")
        chosen = np.random.default_rng(0).permutation(len(regret))[:4_000]
        ax.plot(apart[chosen, i, two, 1], regret[chosen], ".", ms=2, alpha=0.4)
        ax.set(
            title=f"{name}, n = m = 2: {scores[i, two, 1]:.3f}",
            xlabel="distance",
            ylabel="regret",
            xlim=(0, 2),
            ylim=(0, 1),
        )
    last = axes[1, 2]
    for i in range(len(CANONICALIZATIONS)):
        values = scores[i, 1:].ravel()
        last.plot(np.full(values.size, i) + np.linspace(-0.25, 0.25, values.size), values, ".", ms=4)
    last.set_xticks(range(len(CANONICALIZATIONS)), CANONICALIZATIONS, rotation=60, ha="right")
    last.set(title="correlation, all n and m", ylim=(-0.1, 1))
    last.grid(axis="y", alpha=0.3)
    page.savefig(path, dpi=100)
    plt.close(page)


if __name__ == "__main__":
    main()
