"""Can a reward be learned that uses a heuristic where it helps and drops it where it misleads?

Rooms: a key, a door, a goal worth 1. A softmax table learns by policy gradients with entropy, for equal
numbers of inner updates, from the primary reward alone, from its plain sum with a heuristic, from potential
shaping by the heuristic (its best one-step payment for a potential), and from BARFI's blend, whose weights
and discount are moved by the implicit gradient of the primary return. Once the heuristic pays for the key and
the door, once for stepping on humming tiles. Shares of episodes that reach the goal. BARFI's outer rate was
chosen on seed 0 (three tried).

    python benchmarks/barfi_rooms.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save

from saferl.envs.tabular.rooms import EPISODE_STEPS, RoomsVectorEnv, tables
from saferl.errors import NonFiniteError
from saferl.rewards.barfi import AlignmentReward, Trajectories, discounted_sums, outer_step

ENVS, UPDATES, EVERY = 64, 1000, 5
DISCOUNT, ENTROPY, RATE = 0.97, 0.01, 20.0
WAYS = ("primary alone", "plain sum", "potential shaping", "BARFI")
HEURISTICS = ("helpful", "misleading")


def roll(logits: torch.Tensor, heuristic: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """An episode in each environment: states, actions, rewards, and which steps were taken (N, T)."""
    env = RoomsVectorEnv(ENVS)
    states, _ = env.reset()
    chances = torch.softmax(logits.detach(), dim=1)
    alive = np.ones(ENVS, bool)
    rows: dict[str, list[np.ndarray]] = {
        k: [] for k in ("states", "actions", "after", "primary", "auxiliary", "mask")
    }
    for _ in range(EPISODE_STEPS):
        actions = torch.multinomial(chances[states], 1, generator=generator)[:, 0].numpy()
        after = env._tables.successors[states, actions]
        following, rewards, ended, cut, info = env.step(actions)
        step = {
            "states": states,
            "actions": actions,
            "after": after,
            "primary": rewards * alive,
            "auxiliary": info[heuristic] * alive,
            "mask": alive.copy(),
        }
        for name, values in step.items():
            rows[name].append(values)
        alive &= ~(ended | cut)
        states = following
    return {name: torch.as_tensor(np.stack(values, axis=1)) for name, values in rows.items()}


def learn(way: str, heuristic: str, seed: int) -> dict[str, Any]:
    """Success along the way, and what BARFI ends with."""
    generator = torch.Generator().manual_seed(seed)
    task = tables()
    logits = torch.zeros(task.successors.shape, requires_grad=True)
    reward = AlignmentReward((0.0, 1.0, 1.0), DISCOUNT)
    optimizer = torch.optim.Adam(reward.parameters(), lr=0.1)
    payments = torch.as_tensor(getattr(task, heuristic)).float().amax(dim=1)
    curve = []
    for update in range(UPDATES):
        data = roll(logits, heuristic, generator)
        mask = data["mask"].float()
        primary, auxiliary = data["primary"].float(), data["auxiliary"].float()
        log_probs = torch.log_softmax(logits, dim=1)[data["states"], data["actions"]]
        discount: Any = DISCOUNT
        with torch.no_grad():
            if way == "primary alone":
                learned = primary
            elif way == "plain sum":
                learned = primary + auxiliary
            elif way == "potential shaping":
                learned = primary + DISCOUNT * payments[data["after"]] - payments[data["states"]]
            else:
                learned, discount = reward(primary, auxiliary), reward.discount
            gains = discounted_sums(mask * (learned - ENTROPY * log_probs), discount)
            baseline = (gains * mask).sum(0) / mask.sum(0).clamp(min=1)
            weights = mask * (gains - baseline) / ENVS / EPISODE_STEPS
        (gradient,) = torch.autograd.grad(log_probs, logits, weights, retain_graph=True)
        if way == "BARFI" and update % EVERY == EVERY - 1:
            trajectories = Trajectories(primary, auxiliary, mask)
            with contextlib.suppress(NonFiniteError):  # that step is left out
                outer_step(
                    reward,
                    optimizer,
                    log_probs,
                    trajectories,
                    [logits],
                    discount=DISCOUNT,
                    entropy=ENTROPY,
                    terms=5,
                    rate=0.1,
                    damping=0.1,
                )
        with torch.no_grad():
            logits += RATE * gradient
        curve.append(float(primary.sum(dim=1).mean()))
    return {
        "success": float(np.mean(curve[-20:])),
        "area": float(np.mean(curve)),
        "weights": reward.weights.tolist(),
        "discount": reward.discount.item(),
        "curve": [float(np.mean(curve[k : k + 10])) for k in range(0, UPDATES, 10)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"Means over {len(rows[0]['seeds'])} seeds with their range; {UPDATES} inner updates of {ENVS} "
        "episodes each.",
        "",
        "| heuristic | learned from | success at the end | mean over training | phi at the end |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        cells = []
        for column in ("success", "area"):
            values = [seed[column] for seed in row["seeds"]]
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        ends = ""
        if row["way"] == "BARFI":
            weights = np.mean([seed["weights"] for seed in row["seeds"]], axis=0)
            discount = np.mean([seed["discount"] for seed in row["seeds"]])
            ends = ", ".join(f"{w:.2f}" for w in weights) + f"; discount {discount:.3f}"
        lines.append(f"| {row['heuristic']} | {row['way']} | {' | '.join(cells)} | {ends} |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    page, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for ax, heuristic in zip(axes, HEURISTICS, strict=True):
        for row in rows:
            if row["heuristic"] == heuristic:
                curves = np.array([seed["curve"] for seed in row["seeds"]])
                steps = 10 * (1 + np.arange(curves.shape[1]))
                (line,) = ax.plot(steps, curves.mean(axis=0), label=row["way"])
                ax.fill_between(
                    steps, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.15
                )
        ax.set(title=f"{heuristic} heuristic", xlabel="inner updates")
    axes[0].set_ylabel("episodes that reach the goal")
    axes[0].legend(frameon=False)
    page.savefig(RESULTS / "barfi_rooms.png", dpi=100)
    plt.close(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for heuristic in HEURISTICS:
        for way in WAYS:
            seeds = [learn(way, heuristic, seed) for seed in range(asked.seeds)]
            rows.append({"heuristic": heuristic, "way": way, "seeds": seeds})
            print(heuristic, way, [round(seed["success"], 2) for seed in seeds], flush=True)
    save("barfi_rooms", {"rows": rows}, table(rows))
    figure(rows)


if __name__ == "__main__":
    main()
