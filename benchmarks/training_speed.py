"""How fast does an agent learn? PPO-Lag on SafetyPointGoal1 end to end, and where its time goes.

One process and one thread. The floor is what the matrix products of the passes cost at the speed that
this machine multiplies the same matrices with, alone, in the same run; "plain" is the same update written
with torch's modules, autograd and optimiser, one network after the other.

    python benchmarks/training_speed.py
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import save
from safety_gym_table import AIM, SETTINGS
from torch import nn

from saferl.agents.online import engine, ppo_lag
from saferl.experiment.config import to_json
from saferl.experiment.run import Run
from saferl.nn.networks import mlp

HIDDEN = 64
INPUTS = 60
NETWORKS = 3


def timed(totals: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, its seconds added to totals[name]."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            totals[name] = totals.get(name, 0.0) + time.perf_counter() - began

    return wrapper


def train(config: ppo_lag.Config) -> tuple[float, dict[str, float]]:
    """Seconds of the training loop and of its parts."""
    totals: dict[str, float] = {}
    originals = engine._Trainer.train, engine._Trainer._collect, ppo_lag.PPOLag.update
    make_env = engine._Trainer.__init__

    def instrumented(self: Any, *args: Any, **kwargs: Any) -> None:
        make_env(self, *args, **kwargs)
        self.env.step = timed(totals, "environment", self.env.step)

    engine._Trainer.__init__ = instrumented  # type: ignore[method-assign]
    engine._Trainer.train = timed(totals, "all", originals[0])  # type: ignore[method-assign]
    engine._Trainer._collect = timed(totals, "collect", originals[1])  # type: ignore[method-assign]
    ppo_lag.PPOLag.update = timed(totals, "update", originals[2])  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            stored = {"algorithm": "ppo-lag", "config": to_json(config)}
            run = Run.create(Path(folder) / "run", stored, quiet=True)
            ppo_lag.train(config, run)
            run.close()
    finally:
        engine._Trainer.train, engine._Trainer._collect, ppo_lag.PPOLag.update = originals  # type: ignore[method-assign]
        engine._Trainer.__init__ = make_env  # type: ignore[method-assign]
    return totals.pop("all"), totals


def products(batch: int, seconds: float = 2.0) -> float:
    """Seconds a sample of the matrix products alone: forward, weight gradients, hidden gradients."""
    inputs = torch.randn(NETWORKS, batch, INPUTS)
    hidden = torch.randn(NETWORKS, batch, HIDDEN)
    heads = torch.randn(NETWORKS, batch, 2)
    first, second, last = (
        torch.randn(NETWORKS, INPUTS, HIDDEN),
        torch.randn(NETWORKS, HIDDEN, HIDDEN),
        torch.randn(NETWORKS, HIDDEN, 2),
    )
    out, small = torch.empty_like(hidden), torch.empty_like(heads)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.bmm(inputs, first, out=out)
        torch.bmm(hidden, second, out=out)
        torch.bmm(hidden, last, out=small)
        torch.bmm(heads.transpose(1, 2), hidden)
        torch.bmm(heads, last.transpose(1, 2), out=out)
        torch.bmm(hidden.transpose(1, 2), hidden)
        torch.bmm(hidden, second.transpose(1, 2), out=out)
        torch.bmm(hidden.transpose(1, 2), inputs)
        count += batch
    return (time.perf_counter() - began) / count


def plain(batch: int, seconds: float = 3.0) -> float:
    """Seconds a sample of the same update with torch's modules and autograd."""
    networks = [mlp(INPUTS, (HIDDEN, HIDDEN), outputs) for outputs in (2, 1, 1)]
    log_std = nn.Parameter(torch.zeros(2))
    parameters = [log_std, *(p for network in networks for p in network.parameters())]
    optimizer = torch.optim.Adam(parameters, lr=3e-4, fused=True)
    rows = 20_000
    features, actions, old = torch.randn(rows, INPUTS), torch.randn(rows, 2), torch.randn(rows)
    advantages, targets = torch.randn(rows), torch.randn(rows, 2)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for index in torch.randperm(rows).split(batch):
            x = features[index]
            policy = torch.distributions.Normal(networks[0](x), log_std.exp())
            ratio = (policy.log_prob(actions[index]).sum(-1) - old[index]).exp()
            gain = advantages[index]
            loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            values = torch.cat([network(x) for network in networks[1:]], dim=-1)
            loss = loss + (values - targets[index]).square().mean(0).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for network in networks:
                nn.utils.clip_grad_norm_(network.parameters(), 40.0)
            optimizer.step()
            count += len(index)
    return (time.perf_counter() - began) / count


def measure(config: ppo_lag.Config, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` turns of: training, the floor of its passes, the passes written plainly."""
    runs, floors, plains = [], [], []
    for _ in range(repeats):
        floors.append(products(config.batch_size) * config.epochs)
        plains.append(plain(config.batch_size) * config.epochs)
        seconds, parts = train(config)
        runs.append(
            {
                "steps_per_second": config.total_steps / seconds,
                "environment": parts["environment"] / config.total_steps,
                "acting": (parts["collect"] - parts["environment"]) / config.total_steps,
                "update": parts["update"] / config.total_steps,
                "rest": (seconds - parts["collect"] - parts["update"]) / config.total_steps,
            }
        )
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    median |= {"floor": statistics.median(floors), "plain": statistics.median(plains)}
    return {"epochs": config.epochs, "runs": runs, "median": median}


def table(results: list[dict[str, Any]], config: ppo_lag.Config, repeats: int) -> str:
    """What was measured, one column a number of passes."""
    speeds = [
        f"**{result['median']['steps_per_second']:,.0f} environment steps/s** with {result['epochs']} passes "
        f"(best {max(run['steps_per_second'] for run in result['runs']):,.0f})"
        for result in results
    ]
    lines = [
        f"PPO-Lag on {config.env}, {config.total_steps:,} steps, mini-batches of {config.batch_size}, "
        f"{config.num_envs} environments, one process with one thread, no early stopping: "
        f"{', '.join(speeds)}; medians of {repeats} runs. The table of agents uses {results[0]['epochs']}.",
        "",
        "| µs a step | " + " | ".join(f"{result['epochs']} passes" for result in results) + " |",
        "| --- |" + " ---: |" * len(results),
    ]
    labels = {
        "environment": "stepping the environments (planar engine)",
        "acting": "normalising, acting, values, advantages",
        "update": "gradient steps",
        "rest": "logging, checkpoints",
        "floor": "*floor of the gradient steps: their matrix products alone*",
        "plain": "*the gradient steps with torch modules and autograd*",
    }
    for name, label in labels.items():
        lines.append(f"| {label} | " + " | ".join(f"{r['median'][name] * 1e6:.2f}" for r in results) + " |")
    last = results[-1]["median"]
    lines += [
        "",
        f"The gradient steps take {last['update'] / last['floor']:.1f} times their floor; written plainly "
        f"{last['plain'] / last['floor']:.1f} times.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 10])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    options: dict[str, Any] = {**SETTINGS["ppo-lag"], "cost_limit": {"cost": AIM}, "target_kl": 1e9}
    config = ppo_lag.Config(env="SafetyPointGoal1-v0", total_steps=asked.steps, **options)
    train(dataclasses.replace(config, total_steps=20_000, epochs=1))  # compile
    results = [measure(dataclasses.replace(config, epochs=epochs), asked.repeats) for epochs in asked.epochs]
    save("training_speed", {"results": results}, table(results, config, asked.repeats))


if __name__ == "__main__":
    main()
