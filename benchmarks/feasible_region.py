"""The feasible region that FISOR learns on PointRobot, against the exact one: figure and overlap.

Data: robots that start anywhere and seek the goal, brake and turn away from hazards, or hold random actions;
the costs of the file are the signed constraint h of the state, as in the authors' data of this task. FISOR
with their settings for it (alpha_c 2, alpha_r 5, N 8) at a smaller size. The exact region is the one of the
same dynamics on a grid (`saferl.feasibility.solve_on_grid`), and the authors' test by a braking manoeuvre
(`saferl.envs.point_robot.escapes`). Intersection over union counts the cells that both call feasible, over
those that one does, and the same for the infeasible.

    python benchmarks/feasible_region.py [--steps 60000] [--seeds 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, save, train
from numpy.typing import NDArray

from saferl.envs.datasets import OfflineDataset, concatenate, write_dsrl
from saferl.envs.datasets.record import record
from saferl.envs.point_robot import (
    GOAL,
    HALF_WIDTH,
    HAZARD_RADIUS,
    HAZARDS,
    PointRobotVectorEnv,
    advance,
    constraint,
    escapes,
    observe,
)
from saferl.feasibility import solve_on_grid
from saferl.policies import load_policy

RUNS = Path("runs/feasible_region")
SLICES = ((0.5, math.pi / 4), (1.0, math.pi / 2), (1.5, math.pi / 4))
"""Speed and heading of the figure's panels, the authors'."""
OPTIONS = {
    "batch-size": 256,
    "critic-batch-size": 256,
    "hidden-sizes": "128 128",
    "width": 64,
    "blocks": 2,
    "candidates": 8,
    "risk-temperature": 2,
    "reward-temperature": 5,
    "cost-scale": "None",
    "reward-scale": 1,
}
Floats = NDArray[np.float64]


# --- data ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Behaviour:
    """Seeks the goal, flees the nearer hazard, or holds random actions, with noise."""

    kind: str
    noise: float
    rng: np.random.Generator
    held: Floats | None = None

    def act(self, obs: Floats, *, deterministic: bool = False) -> NDArray[np.float32]:
        """Actions (N, 2)."""
        n = len(obs)
        if self.kind == "seek":
            wanted = np.arctan2(GOAL[1] - obs[:, 1], GOAL[0] - obs[:, 0])
            turn = (wanted - np.arctan2(obs[:, 4], obs[:, 3]) + np.pi) % (2 * np.pi) - np.pi
            actions = np.stack([1.2 - obs[:, 2], turn], axis=1) * 2
        elif self.kind == "flee":
            near = obs[:, 5] < obs[:, 8]
            left = np.where(near, obs[:, 7], obs[:, 10])
            actions = np.stack([np.where(obs[:, 2] > 0, -1.0, 1.0), -np.sign(left)], axis=1)
        else:
            fresh = self.rng.uniform(-1, 1, (n, 2)).round()
            if self.held is None or len(self.held) != n:
                self.held = fresh
            self.held = np.where(self.rng.random((n, 1)) < 0.1, fresh, self.held)
            actions = self.held
        noisy = actions + self.noise * self.rng.normal(size=actions.shape)
        return np.clip(noisy, -1, 1).astype(np.float32)


def dataset(path: Path, episodes: int = 400) -> OfflineDataset:
    """Record the data, once."""
    rng = np.random.default_rng(0)
    env = PointRobotVectorEnv(50, random_start=True)
    kinds = (("seek", 0.3), ("seek", 1.0), ("flee", 0.3), ("hold", 0.1), ("hold", 0.5))
    data = concatenate(
        [
            record(Behaviour(kind, noise, rng), env, episodes, seed=100_000 * k)
            for k, (kind, noise) in enumerate(kinds)
        ]
    )
    shown = dataclasses.replace(data, costs=constraint(data.observations[:, :2]).astype(np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_dsrl(path, shown)
    return data


def trained(
    expectile: float, seed: int, steps: int, other: Mapping[str, Any] | None = None, name: str | None = None
) -> Path:
    """A finished run of FISOR, with `other` options than `OPTIONS`; gone on with or begun if need be."""
    file = RUNS / "point_robot.hdf5"
    if not file.exists():
        dataset(file)
    run = RUNS / (name or f"expectile-{expectile:g}-{seed}")
    options = {**OPTIONS, "dataset": file, "env": "PointRobot-v0", "expectile": expectile, "seed": seed}
    options |= {"policy-lr-steps": 3 * steps, **(other or {})}
    words = [word for option, value in options.items() for word in (f"--{option}", *str(value).split())]
    train(run, "fisor", words, steps)
    return run


# --- regions ---------------------------------------------------------------------------------------------


def plane(speed: float, heading: float, cells: int = 61) -> Floats:
    """States (cells, cells, 4) over the whole square."""
    axis = np.linspace(-HALF_WIDTH, HALF_WIDTH, cells)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    return np.stack([x, y, np.full_like(x, speed), np.full_like(x, heading)], axis=-1)


def exact_values(discount: float, path: Path) -> tuple[list[Floats], Floats]:
    """The operator's fixed point on a grid of x, y, v, theta, kept in a file."""
    axes = [
        np.linspace(-HALF_WIDTH, HALF_WIDTH, 61),
        np.linspace(-HALF_WIDTH, HALF_WIDTH, 61),
        np.linspace(-0.5, 2.5, 13),
        np.linspace(0, 2 * np.pi, 24, endpoint=False),
    ]
    if not path.exists():
        actions = [[u, w] for u in (-1, 0, 1) for w in (-1, 0, 1)]
        values = solve_on_grid(axes, advance, actions, constraint, discount=discount, periodic=[3])
        np.save(path, values)
    return axes, np.load(path)


def interpolate(axes: list[Floats], values: Floats, states: Floats) -> Floats:
    """Values at states that lie between the grid's."""
    from scipy.interpolate import RegularGridInterpolator

    turning = [*axes[:3], np.append(axes[3], 2 * np.pi)]
    closed = np.concatenate([values, values[..., :1]], axis=-1)
    result: Floats = RegularGridInterpolator(turning, closed)(states)
    return result


@torch.no_grad()
def learned_values(run: Path, states: Floats) -> Floats:
    """V_h at states (..., 4)."""
    from saferl.experiment.checkpoint import list_checkpoints, load_checkpoint
    from saferl.nn.diffusion_policy import critics

    stored = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    weights = {
        name.removeprefix("state_values."): value
        for name, value in stored["training"]["algorithm"]["networks"].items()
        if name.startswith("state_values.")
    }
    policy = load_policy(run)
    values = critics(2, policy.encoder.size, tuple(policy.settings["hidden_sizes"]))  # type: ignore[attr-defined]
    values.load_state_dict(weights)
    features = torch.from_numpy(observe(states.reshape(-1, 4)))
    result: Floats = values(features)[1, :, 0].double().numpy().reshape(states.shape[:-1])
    return result


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((one & other).sum() / (one | other).sum())


def drive(run: Path, extraction: str, episodes: int = 200) -> dict[str, float]:
    """Share of episodes with a violation, and return, from feasible random starts."""
    policy: Any = load_policy(run)
    policy.extraction = extraction
    policy.seed(0)
    env = PointRobotVectorEnv(episodes, random_start=True)
    obs, _ = env.reset(seed=10_000_000)
    start = escapes(env.states)
    returns, violated, alive = np.zeros(episodes), np.zeros(episodes, bool), np.ones(episodes, bool)
    arrived = np.zeros(episodes, bool)
    for _ in range(300):
        obs, rewards, terminations, truncations, info = env.step(policy.act(obs))
        returns += rewards * alive
        violated |= (info["constraint"] > 0) & alive
        arrived |= terminations & alive & (rewards > 0.9)
        alive &= ~(terminations | truncations)
    return {
        "violations": float(violated[start].mean()),
        "return": float(returns[start].mean()),
        "arrived": float(arrived[start].mean()),
        "episodes": int(start.sum()),
    }


def figure(panels: list[dict[str, Any]], path: Path) -> None:
    """Learned values in colour, with the three borders."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4.2), layout="constrained")
    axis = np.linspace(-HALF_WIDTH, HALF_WIDTH, 61)
    top = max(float(np.abs(panel["learned"]).max()) for panel in panels)
    for ax, panel in zip(axes, panels, strict=True):
        image = ax.pcolormesh(axis, axis, panel["learned"].T, cmap="RdBu_r", vmin=-top, vmax=top, alpha=0.8)
        for hazard in HAZARDS:
            ax.add_patch(plt.Circle(tuple(hazard), HAZARD_RADIUS, fill=False, color="black", lw=1))
        ax.contour(axis, axis, panel["learned"].T, [0.0], colors="black", linewidths=2)
        ax.contour(axis, axis, panel["exact"].T, [0.0], colors="green", linewidths=2, linestyles="--")
        ax.set(
            title=f"v = {panel['speed']:g} m/s, θ = {math.degrees(panel['heading']):.0f}°: "
            f"overlap {panel['infeasible']:.2f}",
            xlabel="x (m)",
            aspect="equal",
        )
    axes[0].set_ylabel("y (m)")
    figure.colorbar(image, ax=axes, label="learned safety value $V_h$", shrink=0.8)
    handles = [
        plt.Line2D([], [], color="black", lw=2, label="learned border $V_h = 0$"),
        plt.Line2D([], [], color="green", lw=2, ls="--", label="exact border"),
        plt.Line2D([], [], color="black", lw=1, label="hazard"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--expectile", type=float, nargs="+", default=[0.9, 0.99])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    axes, values = exact_values(0.99, RUNS / "exact.npy")
    rows: list[dict[str, Any]] = []
    for expectile in asked.expectile:
        for seed in range(asked.seeds):
            run = trained(expectile, seed, asked.steps)
            panels = []
            for speed, heading in SLICES:
                states = plane(speed, heading)
                learned, exact = learned_values(run, states), interpolate(axes, values, states)
                panels.append(
                    {
                        "speed": speed,
                        "heading": heading,
                        "learned": learned,
                        "exact": exact,
                        "feasible": overlap(learned <= 0, exact <= 0),
                        "infeasible": overlap(learned > 0, exact > 0),
                        "manoeuvre": overlap(learned <= 0, escapes(states)),
                    }
                )
            if seed == 0 and expectile == asked.expectile[0]:
                RESULTS.mkdir(exist_ok=True)
                figure(panels, RESULTS / "feasible_region.png")
            rows.append(
                {
                    "expectile": expectile,
                    "seed": seed,
                    "panels": [{k: v for k, v in p.items() if np.ndim(v) == 0} for p in panels],
                    **{name: drive(run, name) for name in ("least-risk", "feasible-first")},
                }
            )
    save("feasible_region", {"rows": rows, "steps": asked.steps}, table(rows, asked.steps))


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """One line a run."""
    lines = [
        f"FISOR on PointRobot, {steps:,} gradient steps: overlap (intersection over union) of the learned "
        "and the exact region, worst of three slices of speed and heading; then episodes from feasible "
        "starts with a violation, and those that reach the goal, for the published choice among 8 candidates "
        "and ours.",
        "",
        "| expectile | seed | feasible | infeasible | with the manoeuvre's | least-risk: violations, goal | "
        "feasible-first: violations, goal |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        worst = [min(p[k] for p in row["panels"]) for k in ("feasible", "infeasible", "manoeuvre")]
        driven = [
            f"{row[name]['violations']:.1%}, {row[name]['arrived']:.0%}"
            for name in ("least-risk", "feasible-first")
        ]
        cells = [f"{row['expectile']:g}", str(row["seed"]), *(f"{w:.3f}" for w in worst), *driven]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
