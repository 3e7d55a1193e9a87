"""What a penalty does to a reward: the distance between R and R - lambda C, and what it costs in R.

With lambda, the canonical form of R - lambda C turns from that of R to that of -C in their plane, so that the
distance grows to d(R, -C). On a random process of 8 states and 3 actions, and on a slippery grid whose short
way leads past hazards: the distance, and beside it the regret in R and the cost of the policy that is optimal
for the penalised reward.

    python benchmarks/starc_penalty.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
from _common import RESULTS, save

from saferl.constraints.scalarise import scalarise
from saferl.starc import (
    TabularMDP,
    distance_matrix,
    optimal_policy,
    policy_return,
    regret,
    worst_case_regret,
)

MULTIPLIERS = (0, 0.1, 0.5, 1, 2, 5, 10, 100)
PRICES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 1.2, 1.5, 2, 5, 100)
SIDE, SLIP = 9, 0.1


def random_process(seed: int) -> tuple[TabularMDP, np.ndarray, np.ndarray]:
    """Dynamics from a flat Dirichlet law, normal reward and cost (S, A, S')."""
    rng = np.random.default_rng(seed)
    mdp = TabularMDP(rng.dirichlet(np.ones(8), (8, 3)), 0.9)
    reward, cost = rng.normal(size=(2, 8, 3, 8))
    return mdp, reward, cost


def grid() -> tuple[TabularMDP, np.ndarray, np.ndarray]:
    """A grid to cross from the middle of the left edge; reward for the goal, a cost for each hazard entered.

    Hazards fill a block between start and goal but for the lane in the middle, where a slip leads into them;
    the safe way is around the block. The goal leads to an end without reward or cost.
    """
    cells, moves = SIDE**2, ((-1, 0), (0, 1), (1, 0), (0, -1))
    rows, columns = np.divmod(np.arange(cells), SIDE)
    transitions = np.zeros((cells + 1, 4, cells + 1))
    for action in range(4):
        for slip in range(4):
            down, along = moves[slip]
            after = (rows + down).clip(0, SIDE - 1) * SIDE + (columns + along).clip(0, SIDE - 1)
            chance = SLIP / 4 + (1 - SLIP) * (slip == action)
            transitions[np.arange(cells), action, after] += chance
    middle = SIDE // 2
    start, goal, end = middle * SIDE, middle * SIDE + SIDE - 1, cells
    transitions[[goal, end]] = 0
    transitions[[goal, end], :, end] = 1
    hazards = np.zeros(cells + 1)
    hazards[:cells] = (abs(rows - middle) <= 2) & (rows != middle) & (abs(columns - middle) <= 2)
    reward, cost = (np.zeros_like(transitions) for _ in range(2))
    reward[:, :, goal] = 1
    cost[:] = hazards
    return TabularMDP(transitions, 0.95, np.eye(cells + 1)[start]), reward, cost


def prices(
    mdp: TabularMDP, reward: np.ndarray, cost: np.ndarray, multipliers: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Distance from R, regret in R and both returns of the optimum of (R - lambda C) / (1 + lambda)."""
    # The divisor keeps large multipliers in range; a positive factor changes neither distance nor optimum.
    penalised = [scalarise(reward, {"cost": cost}, {"cost": lam}) for lam in multipliers]
    distances = {
        name: distance_matrix([reward, *penalised, -cost], mdp, name)[0, 1:] for name in ("val", "minimal")
    }
    rows = []
    for index, (lam, mixed) in enumerate(zip(multipliers, penalised, strict=True)):
        actions, _ = optimal_policy(mdp, mixed)
        rows.append(
            {
                "lambda": lam,
                **{name: float(values[index]) for name, values in distances.items()},
                "limit": {name: float(values[-1]) for name, values in distances.items()},
                "regret": regret(reward, mixed, mdp),
                "worst regret": worst_case_regret(reward, mixed, mdp),
                "reward": policy_return(mdp, reward, actions),
                "cost": policy_return(mdp, cost, actions),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| lambda | d (val) | d (minimal) | regret in R | worst-case regret | return | cost return |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    keys = ("val", "minimal", "regret", "worst regret", "reward", "cost")
    lines += [f"| {row['lambda']:g} | " + " | ".join(f"{row[k]:.4f}" for k in keys) + " |" for row in rows]
    limit = rows[0]["limit"]
    return [*lines, f"| -C alone | {limit['val']:.4f} | {limit['minimal']:.4f} | | | | |"]


def main() -> None:
    from matplotlib.figure import Figure

    processes = {"random": (random_process(0), MULTIPLIERS), "grid": (grid(), PRICES)}
    results = {name: prices(*process, multipliers) for name, (process, multipliers) in processes.items()}
    lines = [
        "d(R, R - lambda C) with n = m = 2; regret: the share of R's range that the optimum of R - lambda C "
        "loses; worst case: that a change of policy can lose which R - lambda C does not call worse.",
        "",
        "8 states, 3 actions, discount 0.9, R and C normal:",
        "",
        *table(results["random"]),
        "",
        f"{SIDE} x {SIDE} grid with hazards, slips with probability {SLIP:g}, discount 0.95:",
        "",
        *table(results["grid"]),
    ]
    save("starc_penalty", results, "\n".join(lines))

    fig = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (name, rows) in zip(fig.subplots(1, 2), results.items(), strict=True):
        multipliers = [row["lambda"] for row in rows]
        axis.plot(multipliers, [row["val"] for row in rows], marker=".", label="d(R, R - lambda C)")
        axis.axhline(rows[0]["limit"]["val"], color="black", ls="--", lw=1, label="d(R, -C)")
        axis.plot(multipliers, [row["regret"] for row in rows], marker=".", label="regret in R")
        if name == "grid":
            axis.plot(multipliers, [row["cost"] for row in rows], marker=".", label="cost return")
        axis.set_xscale("symlog", linthresh=multipliers[1])
        axis.set(xlabel="lambda", title={"random": "random process", "grid": "grid with hazards"}[name])
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(top=1.8)
        axis.legend(frameon=False, loc="upper left")
    fig.savefig(RESULTS / "starc_penalty.png", dpi=100)


if __name__ == "__main__":
    main()
