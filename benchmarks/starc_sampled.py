"""Reward distances from transitions: error against the exact ones, the naive way, and speed.

Error: 20 random processes (32 states, 4 actions, discount 0.95, uniform pairs of them, one-hot features); a
reward against its shaped, redistributed, mixed, unrelated and opposite versions. Ours shares one linear
operator and takes inner products between halves of the data. "Apart" samples the transitions of each reward
anew, and takes norms of one-step residuals, which is the way of STARC's published code with its network
replaced by the exact least squares; "EPIC" is the sampled form of Gleave et al., with 256 states and actions
drawn from the data for its expectations, normalised to the same scale.

Speed: at the sizes that the exact and the sampled form are meant for.

    python benchmarks/starc_sampled.py [--threads 2]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import save
from scipy import sparse

from saferl.starc import Canonicalizer, TabularMDP, starc_distance
from saferl.starc.sampled import Features, Transitions, compare

SIZE, ACTIONS, DISCOUNT = 32, 4, 0.95
KINDS = ("shaped", "redistributed", "0.7 R + 0.3 R'", "unrelated", "opposite")


def process(seed: int) -> tuple[TabularMDP, list[np.ndarray]]:
    """A sparse process; a reward and its versions in the order of KINDS."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(SIZE, ACTIONS, SIZE))
    logits[logits <= 1] = -20
    weights = np.exp(logits)
    mdp = TabularMDP(weights / weights.sum(axis=2, keepdims=True), DISCOUNT)
    reward, other, moved = (rng.normal(size=(SIZE, ACTIONS, SIZE)) for _ in range(3))
    moved -= np.einsum("sat,sat->sa", moved, mdp.transitions)[:, :, None]
    potential = 5 * rng.normal(size=SIZE)
    shaped = reward + DISCOUNT * potential - potential[:, None, None]
    return mdp, [reward, shaped, reward + moved, 0.7 * reward + 0.3 * other, other, -reward]


def drawn(mdp: TabularMDP, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Uniform pairs and what follows."""
    s, a = rng.integers(0, SIZE, count), rng.integers(0, ACTIONS, count)
    after = (rng.random(count)[:, None] > mdp.transitions.cumsum(axis=2)[s, a]).sum(axis=1)
    return s, a, after.clip(0, SIZE - 1)


def ours(mdp: TabularMDP, rewards: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    s, a, t = drawn(mdp, count, rng)
    eye = np.eye(SIZE)
    data = Transitions(eye[s], a, eye[t])
    columns = [reward[s, a, t] for reward in rewards]
    return compare(columns, data, DISCOUNT, features=Features(random=0), resamples=20).distances[0, 1:]


def apart(mdp: TabularMDP, rewards: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Every reward with samples of its own for its values; norms of residuals on a third sample."""
    values = []
    for reward in rewards:
        s, a, t = drawn(mdp, count, rng)
        now, after = np.eye(SIZE)[s], np.eye(SIZE)[t]
        system = now.T @ (now - DISCOUNT * after)
        values.append(np.linalg.lstsq(system, now.T @ reward[s, a, t], rcond=None)[0])
    s, a, t = drawn(mdp, count, rng)
    forms = [r[s, a, t] + DISCOUNT * v[t] - v[s] for r, v in zip(rewards, values, strict=True)]
    standard = [form / np.sqrt(np.mean(form**2)) for form in forms]
    return np.array([np.sqrt(np.mean((form - standard[0]) ** 2)) for form in standard[1:]])


def epic(mdp: TabularMDP, rewards: list[np.ndarray], count: int, rng: np.random.Generator) -> np.ndarray:
    """Pearson distance of sampled canonical forms, times 2: 0 equal, 2 opposite."""
    s, a, t = drawn(mdp, count, rng)
    states, actions = rng.choice(s, 256), rng.choice(a, 256)
    forms = []
    for reward in rewards:
        means = reward[:, actions, states].mean(axis=1)
        forms.append(reward[s, a, t] + DISCOUNT * means[t] - means[s] - DISCOUNT * means[states].mean())
    return np.array([2 * np.sqrt(max(0, 1 - np.corrcoef(forms[0], form)[0, 1]) / 2) for form in forms[1:]])


WAYS: dict[str, Callable[..., np.ndarray]] = {"ours": ours, "apart": apart, "EPIC": epic}


def errors(processes: int, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Distances found and mean absolute errors, a row for a way and a number of transitions."""
    rows = []
    cases = [process(seed) for seed in range(processes)]
    exact = np.array([[starc_distance(r[0], x, mdp) for x in r[1:]] for mdp, r in cases])
    rows.append(
        {"way": "exact", "count": 0, "mean": exact.mean(axis=0).tolist(), "error": [0.0] * len(KINDS)}
    )
    for count in counts:
        for way, measure in WAYS.items():
            began = time.perf_counter()
            found = np.array(
                [
                    measure(mdp, r, count, np.random.default_rng([seed, 7]))
                    for seed, (mdp, r) in enumerate(cases)
                ]
            )
            rows.append(
                {
                    "way": way,
                    "count": count,
                    "mean": found.mean(axis=0).tolist(),
                    "error": np.abs(found - exact).mean(axis=0).tolist(),
                    "seconds": (time.perf_counter() - began) / processes,
                }
            )
            print(rows[-1], flush=True)
    return rows


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def speed() -> list[dict[str, Any]]:
    """Seconds at full sizes; the most memory so far."""
    rng = np.random.default_rng(0)
    rows = []

    def add(what: str, seconds: float, residual: float | None) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"what": what, "seconds": seconds, "gib": memory, "residual": residual})
        print(rows[-1], flush=True)

    size, actions, successors = 100_000, 4, 10
    index = np.repeat(np.arange(size * actions), successors)
    weights = rng.dirichlet(np.ones(successors), size * actions).ravel()
    flat = sparse.csr_array((weights, (index, rng.integers(0, size, index.size))), (size * actions, size))
    first, second = rng.normal(size=(2, size, actions))

    def sparse_val() -> float:
        canonical = Canonicalizer(TabularMDP(flat, 0.99))
        starc_distance(first, second, canonical.mdp, canonical)
        return canonical.residual

    add("exact, 100,000 states x 4 actions x 10 successors, discount 0.99", *timed(sparse_val))
    size = 2_000
    table = rng.dirichlet(np.ones(50), (size, actions))
    dense = np.zeros((size, actions, size))
    dense[..., :50] = table
    rewards = rng.normal(size=(2, size, actions, size))

    def dense_val() -> float:
        canonical = Canonicalizer(TabularMDP(dense, 0.99))
        starc_distance(rewards[0], rewards[1], canonical.mdp, canonical)
        return canonical.residual

    add("exact, 2,000 states x 4 actions, dense, discount 0.99", *timed(dense_val))
    count = 1_000_000
    s, a = rng.normal(size=(count, 20)).astype(np.float32), rng.uniform(-1, 1, (count, 4)).astype(np.float32)
    after = (0.9 * s + 0.1 * rng.normal(size=(count, 20))).astype(np.float32)
    columns = [s[:, 0] * a[:, 0], s[:, 0] * a[:, 0] + s[:, 1] * a[:, 1]]
    data = Transitions(s, a, after, None, np.arange(count) // 1_000)
    for network in (0, 64):
        seconds, found = timed(lambda n=network: compare(columns, data, 0.99, features=Features(network=n)))  # type: ignore[misc]
        what = "with a network" if network else "no network"
        add(f"sampled, 1,000,000 transitions, {found.rank} features, 100 resamples, {what}", seconds, None)
    return rows


def table(found: list[dict[str, Any]], speeds: list[dict[str, Any]], threads: int) -> str:
    lines = [
        "Mean distance over 20 processes, and mean absolute error:",
        "",
        "| way | transitions | " + " | ".join(KINDS) + " | seconds |",
        "| --- | ---: |" + " ---: |" * (len(KINDS) + 1),
    ]
    for row in found:
        cells = [
            f"{m:.3f}" if row["way"] == "exact" else f"{m:.3f} ± {e:.3f}"
            for m, e in zip(row["mean"], row["error"], strict=True)
        ]
        count = f"{row['count']:,}" if row["count"] else ""
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else ""
        lines.append(f"| {row['way']} | {count} | {' | '.join(cells)} | {seconds} |")
    lines += [
        "",
        f"Two rewards compared, {threads} threads:",
        "",
        "| size | seconds | largest memory so far, GiB | relative residual |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in speeds:
        residual = "" if row["residual"] is None else f"{row['residual']:.0e}"
        lines.append(f"| {row['what']} | {row['seconds']:.1f} | {row['gib']:.2f} | {residual} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    speeds = speed()
    found = errors(asked.processes, (2_000, 10_000, 50_000))
    save("starc_sampled", {"errors": found, "speed": speeds}, table(found, speeds, asked.threads))


if __name__ == "__main__":
    main()
