"""How fast does an agent learn? PPO-Lag on SafetyPointGoal1 end to end, and where its time goes.

One process and one thread. The floor is what the matrix products of ten passes cost at the speed that this
machine multiplies the same matrices with, alone, in the same run; "plain" is the same update written with
torch's modules, autograd and optimiser, one network after the other.

    python benchmarks/training_speed.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import save
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--num-envs", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = ppo_lag.Config(
        env="SafetyPointGoal1-v0",
        num_envs=asked.num_envs,
        total_steps=asked.steps,
        epochs=10,
        batch_size=asked.batch_size,
        target_kl=1e9,
        checkpoint_interval=30,
        cost_window=20,
    )
    train(ppo_lag.Config(env=config.env, num_envs=asked.num_envs, total_steps=20_000, epochs=1))  # compile
    runs, floors, plains = [], [], []
    for _ in range(asked.repeats):
        floors.append(products(asked.batch_size) * config.epochs)
        plains.append(plain(asked.batch_size) * config.epochs)
        seconds, parts = train(config)
        runs.append(
            {
                "steps_per_second": asked.steps / seconds,
                "environment": parts["environment"] / asked.steps,
                "acting": (parts["collect"] - parts["environment"]) / asked.steps,
                "update": parts["update"] / asked.steps,
                "rest": (seconds - parts["collect"] - parts["update"]) / asked.steps,
            }
        )
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    floor, reference = statistics.median(floors), statistics.median(plains)
    micro = 1e6
    best = max(run["steps_per_second"] for run in runs)
    lines = [
        f"PPO-Lag on {config.env}, {asked.steps:,} steps, {config.epochs} passes, mini-batches of "
        f"{asked.batch_size}, {asked.num_envs} environments, one process with one thread: "
        f"**{median['steps_per_second']:,.0f} environment steps/s** (median of {asked.repeats} runs; best "
        f"{best:,.0f}).",
        "",
        "| part | µs a step | share |",
        "| --- | ---: | ---: |",
    ]
    total = sum(median[name] for name in ("environment", "acting", "update", "rest"))
    labels = {
        "environment": "stepping the environments (planar engine)",
        "acting": "normalising, acting, values, advantages",
        "update": "ten passes of gradient steps",
        "rest": "logging, checkpoints",
    }
    for name, label in labels.items():
        lines.append(f"| {label} | {median[name] * micro:.2f} | {100 * median[name] / total:.0f} % |")
    lines += [
        f"| *floor of the passes: their matrix products alone* | {floor * micro:.2f} | |",
        f"| *the passes with torch modules and autograd* | {reference * micro:.2f} | |",
        "",
        f"The passes take {median['update'] / floor:.1f} times their floor; written plainly "
        f"{reference / floor:.1f} times.",
    ]
    result = {"runs": runs, "floor": floors, "plain": plains, "numpy": np.__version__}
    save("training_speed", result, "\n".join(lines))


if __name__ == "__main__":
    main()
