"""Does a gate keep step rewards from swamping the outcome? In words, and in control.

Ticket: a softmax table learns by group-relative policy gradients (groups of 16, 400 updates, rate 0.3) from
plain sums, outcomes alone, and G-RA at several gates. Submissions, edited submissions, step reward a ticket.
PointRobot: a Gaussian policy network learns in the same way to drive to the goal. The level above is safety,
a price for every step in a hazard; the one below pays for progress. Violations, arrivals, progress.

    python benchmarks/gated_accumulation.py [--seeds 8]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save
from torch import nn

from saferl.envs.language.ticket import SUBMIT, TURNS, TicketVectorEnv
from saferl.envs.point_robot import PointRobotVectorEnv
from saferl.gates import Gate
from saferl.rewards.gated_accumulation import GatedAccumulator, dead_groups

GATES = {
    "plain sum": -np.inf,
    "outcome only": np.inf,
    "gate 0": 0.0,
    "gate -1": -1.0,
    "gate -1.5": -1.5,
    "gate 1": 1.0,
}
GROUP, UPDATES, RATE = 16, 400, 0.3


def accumulator(threshold: float) -> GatedAccumulator:
    return GatedAccumulator([("outcome", Gate(threshold)), ("step", None)])


def group_advantages(totals: np.ndarray) -> np.ndarray:
    """(B,) as one group."""
    deviation = totals.std()
    return np.asarray((totals - totals.mean()) / deviation if deviation > 1e-9 else np.zeros_like(totals))


# --- Ticket ----------------------------------------------------------------------------------------------


def tickets(logits: np.ndarray, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One ticket in each of `count` environments: states, actions, rewards of both levels (B, T), ends."""
    env = TicketVectorEnv(count)
    obs, _ = env.reset()
    alive = np.ones(count, bool)
    rows: dict[str, list[np.ndarray]] = {
        k: [] for k in ("turn", "edited", "action", "outcome", "step", "alive")
    }
    for _ in range(TURNS):
        turn, edited = obs.astype(int).T
        chances = np.exp(logits[turn, edited])
        chances /= chances.sum(axis=1, keepdims=True)
        action = (rng.random(count)[:, None] > chances.cumsum(axis=1)).sum(axis=1).clip(0, 2)
        obs, _, ended, _, info = env.step(action)
        levels = {name: values * alive for name, values in info["levels"].items()}
        step = {"turn": turn, "edited": edited, "action": action, "alive": alive.copy(), **levels}
        for name, values in step.items():
            rows[name].append(values)
        alive &= ~ended
    return {name: np.stack(values, axis=1) for name, values in rows.items()}


def learn_tickets(threshold: float, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    logits = np.zeros((TURNS + 1, 2, 3))
    logits[..., SUBMIT] = -1.0
    gates, dead = accumulator(threshold), 0.0
    for _ in range(UPDATES):
        data = tickets(logits, GROUP, rng)
        totals = gates({"outcome": data["outcome"], "step": data["step"]}).total
        dead += dead_groups(totals, GROUP) / UPDATES
        advantages = group_advantages(totals)
        chances = np.exp(logits)
        chances /= chances.sum(axis=2, keepdims=True)
        gradient = np.zeros_like(logits)
        weight = (advantages[:, None] * data["alive"]).ravel() / GROUP
        turn, edited, action = (data[name].ravel() for name in ("turn", "edited", "action"))
        np.add.at(gradient, (turn, edited, action), weight)
        np.add.at(gradient, (turn, edited), -weight[:, None] * chances[turn, edited])
        logits += RATE * gradient
    data = tickets(logits, 2_000, rng)
    outcome = data["outcome"].sum(axis=1)
    return {
        "submitted": float((outcome >= 0).mean()),
        "edited": float((outcome > 0).mean()),
        "step": float(data["step"].sum(axis=1).mean()),
        "dead": dead,
    }


# --- PointRobot ------------------------------------------------------------------------------------------

ENVS, ITERATIONS, STEPS = 128, 400, 120
PRICE = 0.05
"""Of a step in a hazard; the straight way to the goal, worth 5.6, has some ten of them."""
DRIVING = {"plain sum": -np.inf, "outcome only": np.inf, "gate": -PRICE / 2}


class Gaussian(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 2))
        self.log_std = nn.Parameter(torch.full((2,), -0.5))

    def forward(self, obs: torch.Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.mean(obs), self.log_std.exp())


def drive(policy: Gaussian, seed: int) -> dict[str, Any]:
    """One episode, cut after STEPS, in each environment, with rewards of both levels (B, T)."""
    env = PointRobotVectorEnv(ENVS)
    obs, _ = env.reset(seed=seed)
    alive = np.ones(ENVS, bool)
    rows: dict[str, list[Any]] = {k: [] for k in ("obs", "action", "violated", "step", "arrived", "alive")}
    for _ in range(STEPS):
        seen = torch.as_tensor(obs, dtype=torch.float32)
        with torch.no_grad():
            action = policy(seen).sample()
        obs, rewards, ended, cut, info = env.step(action.clamp(-1, 1).numpy())
        rows["obs"].append(seen)
        rows["action"].append(action)
        rows["violated"].append((info["constraint"] > 0) & alive)
        rows["step"].append(rewards * alive)
        rows["arrived"].append(ended & (rewards > 0.9) & alive)
        rows["alive"].append(alive.copy())
        alive &= ~(ended | cut)
    data = {k: np.stack(rows[k], axis=1) for k in ("violated", "step", "arrived", "alive")}
    outcome = -PRICE * data["violated"]
    both = {k: torch.stack(rows[k], 1) for k in ("obs", "action")}
    return {**both, **data, "outcome": outcome}


def learn_driving(threshold: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    policy = Gaussian(PointRobotVectorEnv(1).reset()[0].shape[1])
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    gates, dead = accumulator(threshold), 0.0
    for iteration in range(ITERATIONS):
        data = drive(policy, 1_000 * seed + iteration)
        totals = gates({"outcome": data["outcome"], "step": data["step"]}).total
        dead += dead_groups(totals, ENVS) / ITERATIONS
        advantages = torch.as_tensor(group_advantages(totals), dtype=torch.float32)
        alive = torch.as_tensor(data["alive"], dtype=torch.float32)
        log_probs = policy(data["obs"]).log_prob(data["action"]).sum(-1)
        loss = -(advantages[:, None] * log_probs * alive).sum() / alive.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    data = drive(policy, 10**6 + seed)
    return {
        "violated": float(data["violated"].any(axis=1).mean()),
        "arrived": float(data["arrived"].any(axis=1).mean()),
        "step": float(data["step"].sum(axis=1).mean()),
        "dead": dead,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    heads = {
        "Ticket": ("submitted", "edited", "step", "dead"),
        "PointRobot": ("violated", "arrived", "step", "dead"),
    }
    for task, columns in heads.items():
        names = {"edited": "with an edit", "step": "step reward", "dead": "groups without gradient"}
        lines += [
            f"{task}, means over {len(rows[0]['seeds'])} seeds with their range:",
            "",
            "| accumulation | " + " | ".join(names.get(c, c) for c in columns) + " |",
            "| --- |" + " ---: |" * len(columns),
        ]
        for row in rows:
            if row["task"] == task:
                cells = []
                for column in columns:
                    values = [seed[column] for seed in row["seeds"]]
                    cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
                lines.append(f"| {row['name']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    page, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    shown = (("Ticket", "edited", "submitted after an edit"), ("PointRobot", "violated", "with a violation"))
    for ax, (task, done, label) in zip(axes, shown, strict=True):
        for row in rows:
            if row["task"] == task:
                points = np.array([[seed["step"], seed[done]] for seed in row["seeds"]])
                ax.plot(*points.T, "o", ms=5, alpha=0.6, label=row["name"])
        ax.set(title=task, xlabel="step reward an episode", ylabel=f"episodes {label}", ylim=(-0.05, 1.05))
        ax.legend(frameon=False, fontsize=8)
    page.savefig(RESULTS / "gated_accumulation.png", dpi=100)
    plt.close(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, threshold in GATES.items():
        found = [learn_tickets(threshold, seed) for seed in range(asked.seeds)]
        rows.append({"task": "Ticket", "name": name, "seeds": found})
    for name, threshold in DRIVING.items():
        found = [learn_driving(threshold, seed) for seed in range(asked.seeds)]
        rows.append({"task": "PointRobot", "name": name, "seeds": found})
    save("gated_accumulation", {"rows": rows}, table(rows))
    figure(rows)


if __name__ == "__main__":
    main()
