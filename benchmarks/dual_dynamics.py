"""How the multipliers behave on a problem whose answer is known by hand.

A policy chooses a, earns a and costs a^2 under the limit 0.25. The Lagrangian a - lambda (a^2 - 0.25) is
maximised by a = 1 / (2 lambda), so the constrained optimum is a = 0.5 at lambda = 1. The policy follows its
gradient slowly (as a learner does), the cost is seen with noise through a window, and each multiplier starts
low: how far does the cost overshoot, and how long does it stay above the limit?

    python benchmarks/dual_dynamics.py
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from _common import RESULTS, save

from saferl.constraints import (
    AdditiveMultiplier,
    Constraint,
    LogMultiplier,
    Multiplier,
    PIDMultiplier,
    SoftplusMultiplier,
    WindowEstimator,
)

LIMIT, STEPS, SEEDS, RATE, NOISE = 0.25, 400, 10, 0.05, 0.02
CONTROLLERS: dict[str, Callable[[], Multiplier]] = {
    "projected gradient": lambda: AdditiveMultiplier(lr=0.1, init=0.0, optimizer="sgd"),
    "Adam": lambda: AdditiveMultiplier(lr=0.035, init=0.001),
    "softplus": lambda: SoftplusMultiplier(lr=0.05, init=0.1),
    "log-space": lambda: LogMultiplier(lr=0.1, init=0.1, maximum=5.0),
    "PID": lambda: PIDMultiplier(4.0, 0.1, 4.0, ema_p=0, ema_d=0, delay=1, init=0.0, derivative="violation"),
}


def simulate(make: Callable[[], Multiplier], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs and multipliers over time."""
    rng = np.random.default_rng(seed)
    constraint = Constraint("cost", LIMIT, estimator=WindowEstimator(20), multiplier=make())
    action, costs, multipliers = 1.0, np.empty(STEPS), np.empty(STEPS)
    for t in range(STEPS):
        costs[t] = action**2
        constraint.observe(costs[t] + rng.normal(0, NOISE, 4))
        multipliers[t] = constraint.update()
        # Normalised by 1 + lambda, as the agents' combined advantage is.
        action += RATE * (1 - 2 * multipliers[t] * action) / (1 + multipliers[t])
        action = float(np.clip(action, 0.0, 1.0))
    return costs, multipliers


def main() -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    lines = [
        f"Limit {LIMIT}, optimum lambda = 1; {SEEDS} seeds, {STEPS} updates; final: the last 100.",
        "",
        "| multiplier | steps above limit + 10 % | final cost | final spread of cost | final lambda |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    result = {}
    for name, make in CONTROLLERS.items():
        runs = [simulate(make, seed) for seed in range(SEEDS)]
        costs, multipliers = (np.array([run[i] for run in runs]) for i in (0, 1))
        above = (costs > 1.1 * LIMIT).sum(1).mean()
        tail, price = costs[:, -100:], multipliers[:, -100:].mean()
        result[name] = {"above": above, "cost": tail.mean(), "spread": tail.std(), "multiplier": price}
        lines.append(f"| {name} | {above:.0f} | {tail.mean():.3f} | {tail.std():.3f} | {price:.2f} |")
        left.plot(costs.mean(0), label=name)
        right.plot(multipliers.mean(0), label=name)
    left.axhline(LIMIT, color="black", ls="--", lw=1)
    left.set(xlabel="update", title="cost")
    right.axhline(1.0, color="black", ls="--", lw=1)
    right.set(xlabel="update", title="multiplier")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    save("dual_dynamics", {"controllers": result}, "\n".join(lines))
    fig.savefig(RESULTS / "dual_dynamics.png", dpi=100)


if __name__ == "__main__":
    main()
