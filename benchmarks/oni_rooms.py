"""What does a judge of captions add, and what does it cost?

Rooms, with a caption and a place for every step (some 300 different ones). A softmax table learns by policy
gradients from the extrinsic reward alone, or with ONI's intrinsic one: labels looked up, classified by a
network, or ranked by one from pairs. A scripted judge likes keys, doors and the goal; its labels arrive five
updates late. "No counts" leaves the division by the caption's count in the episode away, "raw score" feeds
the ranking network's score as it is, as the published code does. Shares of episodes that reach the goal.
Then throughput: steps a second with the annotator's thread running and without, and captions labelled.

    python benchmarks/oni_rooms.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save

from saferl.envs.tabular.rooms import CAPTIONS, EPISODE_STEPS, RoomsVectorEnv, tables
from saferl.rewards.barfi import discounted_sums
from saferl.rewards.oni import (
    ClassificationDistiller,
    EpisodeCounts,
    RankingDistiller,
    RetrievalDistiller,
    ThreadedAnnotator,
    combined_rewards,
)

ENVS, UPDATES, LATENCY = 64, 150, 5
DISCOUNT, ENTROPY, RATE = 0.97, 0.01, 20.0
WAYS = (
    "extrinsic alone",
    "retrieval",
    "retrieval, no counts",
    "classification",
    "ranking",
    "ranking, raw score",
)
LIKED = ("key!", "unlock", "goal!")


def judge(captions: Sequence[str]) -> list[int]:
    return [int(any(word in caption for word in LIKED)) for caption in captions]


def words() -> np.ndarray:
    """The caption of every state and action (S, A), with the place."""
    task = tables()
    rows = [
        [f"{CAPTIONS[caption]} (place {state})" for caption in captions]
        for state, captions in enumerate(task.captions)
    ]
    return np.array(rows, object)


def roll(logits: torch.Tensor, texts: np.ndarray, generator: torch.Generator) -> dict[str, Any]:
    """An episode in each environment (N, T), with the captions' counts."""
    env = RoomsVectorEnv(ENVS)
    states, _ = env.reset()
    chances = torch.softmax(logits.detach(), dim=1)
    counts = EpisodeCounts(ENVS, texts.size)
    alive = np.ones(ENVS, bool)
    names = ("states", "actions", "rewards", "counts", "mask")
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    different, index = np.unique(texts.astype(str), return_inverse=True)
    index = index.reshape(texts.shape)
    for _ in range(EPISODE_STEPS):
        actions = torch.multinomial(chances[states], 1, generator=generator)[:, 0].numpy()
        following, rewards, ended, cut, _ = env.step(actions)
        found = counts.step(index[states, actions], ended | cut)
        step = (states, actions, rewards * alive, found, alive.copy())
        for name, values in zip(names, step, strict=True):
            rows[name].append(values)
        alive &= ~(ended | cut)
        states = following
    stacked = {name: np.stack(values, axis=1) for name, values in rows.items()}
    return {**stacked, "captions": index[stacked["states"], stacked["actions"]], "different": different}


class Teacher:
    """A distiller that hears of captions and gets labels late."""

    def __init__(self, way: str, seed: int) -> None:
        self.way = way
        self.rng = np.random.default_rng(seed)
        self.seen: list[str] = []
        self.retrieval = RetrievalDistiller()
        self.classifier = ClassificationDistiller(gate=50, batch_size=64, lr=1e-3, seed=seed)
        threshold = -np.inf if "raw" in way else -0.5
        self.ranker = RankingDistiller(threshold, gate=200, batch_size=64, lr=1e-3, seed=seed)
        self.late: deque[tuple[int, list[str]]] = deque()

    def hear(self, update: int, captions: list[str]) -> None:
        fresh = [caption for caption in captions if caption not in set(self.seen)]
        self.seen += fresh
        self.late.append((update + LATENCY, fresh))
        while self.late and self.late[0][0] <= update:
            _, arrived = self.late.popleft()
            labels = dict(zip(arrived, judge(arrived), strict=True))
            self.retrieval.update(labels)
            if self.way == "classification":
                self.classifier.update(labels)
            if self.way.startswith("ranking"):
                known = list(self.retrieval.labels)
                pairs: Any = self.rng.integers(0, len(known), (64, 2)) if known else []
                chosen = [(known[i], known[j]) for i, j in pairs]
                first, second = ([self.retrieval.labels[p[k]] for p in chosen] for k in (0, 1))
                preferred = 0.5 + 0.5 * np.sign(np.subtract(first, second))
                self.ranker.update(dict(zip(chosen, preferred.tolist(), strict=True)))
        if self.way == "classification":
            for _ in range(2):
                self.classifier.learn()
        if self.way.startswith("ranking"):
            for _ in range(2):
                self.ranker.learn()

    def reward(self, captions: list[str]) -> np.ndarray:
        if self.way.startswith("retrieval"):
            return self.retrieval.reward(captions)
        if self.way == "classification":
            return self.classifier.reward(captions)
        if "raw" in self.way and len(self.ranker._labels) >= self.ranker.gate:
            return self.ranker._outputs(captions)[:, 0].double().numpy()
        return self.ranker.reward(captions)


def learn(way: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(tables().successors.shape, requires_grad=True)
    texts, teacher, curve = words(), Teacher(way, seed), []
    for update in range(UPDATES):
        data = roll(logits, texts, generator)
        mask = torch.as_tensor(data["mask"]).float()
        rewards = 10 * data["rewards"]
        if way != "extrinsic alone":
            there = np.unique(data["captions"][data["mask"]])
            captions = data["different"][there].tolist()
            teacher.hear(update, captions)
            by_caption = np.zeros(len(data["different"]))
            by_caption[there] = teacher.reward(captions)
            counts = np.ones_like(data["counts"]) if "no counts" in way else data["counts"]
            intrinsic = by_caption[data["captions"]]
            rewards = combined_rewards(data["rewards"], intrinsic, counts, extrinsic_weight=10)
        rewards = torch.as_tensor(rewards / 10).float()
        states, actions = torch.as_tensor(data["states"]), torch.as_tensor(data["actions"])
        log_probs = torch.log_softmax(logits, dim=1)[states, actions]
        with torch.no_grad():
            gains = discounted_sums(mask * (rewards - ENTROPY * log_probs), DISCOUNT)
            baseline = (gains * mask).sum(0) / mask.sum(0).clamp(min=1)
            weights = mask * (gains - baseline) / ENVS / EPISODE_STEPS
        (gradient,) = torch.autograd.grad(log_probs, logits, weights)
        with torch.no_grad():
            logits += 2 * RATE * gradient
        curve.append(float((data["rewards"] * data["mask"]).sum(axis=1).mean()))
    return {"success": float(np.mean(curve[-20:])), "area": float(np.mean(curve)), "curve": curve}


def throughput(seconds: float = 5.0) -> dict[str, float]:
    """Steps a second of the task with and without a judge of 20 ms a call in a thread of its own."""
    texts = words()

    def steps(annotator: ThreadedAnnotator | None) -> tuple[float, int]:
        env, rng, labelled = RoomsVectorEnv(ENVS), np.random.default_rng(0), 0
        states, _ = env.reset()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            actions = rng.integers(0, 4, ENVS)
            if annotator is not None:
                annotator.submit([f"{text} #{count}" for text in texts[states, actions][:4]])
                labelled += len(annotator.poll())
            states, *_ = env.step(actions)
            count += ENVS
        return count / (time.perf_counter() - began), labelled

    def slow(captions: list[str]) -> list[int]:
        time.sleep(0.02)
        return judge(captions)

    alone, _ = steps(None)
    with ThreadedAnnotator(slow) as annotator:
        judged, labelled = steps(annotator)
    return {"alone": alone, "judged": judged, "labels": labelled / seconds}


def table(rows: list[dict[str, Any]], rates: dict[str, float]) -> str:
    lines = [
        f"Means over {len(rows[0]['seeds'])} seeds with their range; {UPDATES} updates of {ENVS} episodes "
        "each.",
        "",
        "| learned from | success at the end | mean over training |",
        "| --- | ---: | ---: |",
    ]
    for row in rows:
        cells = []
        for column in ("success", "area"):
            values = [seed[column] for seed in row["seeds"]]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {row['way']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{rates['alone']:,.0f} steps a second without an annotator, {rates['judged']:,.0f} with one that is "
        f"handed four new captions for every {ENVS} steps and answers batches of 100 in 20 ms: "
        f"{rates['labels']:,.0f} labels a second, the newest first.",
    ]
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    page, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        curves = np.array([seed["curve"] for seed in row["seeds"]]).mean(axis=0)
        ax.plot(np.convolve(curves, np.full(10, 0.1), "valid"), label=row["way"])
    ax.set(xlabel="updates", ylabel="episodes that reach the goal")
    ax.legend(frameon=False)
    page.savefig(RESULTS / "oni_rooms.png", dpi=100)
    plt.close(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rates = throughput()
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        rows.append({"way": way, "seeds": [learn(way, seed) for seed in range(asked.seeds)]})
        print(way, [round(seed["success"], 2) for seed in rows[-1]["seeds"]], flush=True)
    save("oni_rooms", {"rows": rows, "throughput": rates}, table(rows, rates))
    figure(rows)


if __name__ == "__main__":
    main()
