"""How fast does FISOR learn and act? Gradient steps and actions a second, and what the machine could do.

At the published sizes on observations of 60 numbers, with random data. "Plain" is the authors' step written
with torch's modules, autograd and optimisers: one network after the other, the weights evaluated for each
half of the batch, every row through the policy network. Ours is timed twice: with critics that give every
row a weight, and with critics for which a given share of the actions keeps to the feasible region. Turns
alternate, and what is reported is the median. FLOP are counted from the layers: 2 a weight and row, forward,
and twice that backward.

    python benchmarks/offline_speed.py [--threads 2] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _common import save
from gymnasium import spaces
from torch import Tensor, nn

from saferl.agents.offline import fisor
from saferl.agents.offline.engine import Batch, Context
from saferl.feasibility import constraint_signal, expectile_loss, feasibility_weights, safety_targets
from saferl.nn.diffusion import VPSchedule
from saferl.nn.diffusion_policy import DiffusionPolicy

S, A = 60, 2
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (S,), np.float32)
NO_DATA: tuple[Any, Any] = (None, None)
ACTIONS = spaces.Box(-1.0, 1.0, (A,), np.float32)


def batch_of(size: int, device: torch.device) -> Batch:
    """Random transitions."""
    generator = torch.Generator().manual_seed(0)
    parts = (
        torch.randn(size, S, generator=generator),
        torch.rand(size, A, generator=generator) * 2 - 1,
        torch.randn(size, generator=generator),
        (torch.rand(size, generator=generator) < 0.05).float(),
        (torch.rand(size, generator=generator) < 0.99).float(),
        torch.randn(size, S, generator=generator),
    )
    return Batch(*(part.to(device) for part in parts))


# --- the same step, plainly ------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.1), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(nn.functional.mish(self.wide(self.norm(self.dropout(x)))))


class Score(nn.Module):
    def __init__(self, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(32, 1))
        self.time = nn.Sequential(nn.Linear(64, 128), nn.Mish(), nn.Linear(128, 128))
        self.first = nn.Linear(A + S + 128, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.last = nn.Linear(width, A)

    def forward(self, observations: Tensor, x: Tensor, steps: Tensor) -> Tensor:
        angles = 2 * np.pi * steps[:, None].float() @ self.frequencies.T
        time_features = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        hidden = self.blocks(self.first(torch.cat([x, observations, time_features], dim=1)))
        return self.last(nn.functional.mish(hidden))  # type: ignore[no-any-return]


def critic(inputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1), nn.Flatten(0)
    )


class Plain:
    def __init__(self, device: torch.device) -> None:
        self.schedule = VPSchedule(5).to(device)
        self.score = Score().to(device)
        self.q, self.risk = ([critic(S + A).to(device) for _ in range(2)] for _ in range(2))
        self.v, self.v_h = critic(S).to(device), critic(S).to(device)
        self.slow_score = copy.deepcopy(self.score)
        self.slow_q, self.slow_risk = copy.deepcopy(self.q), copy.deepcopy(self.risk)
        everything = {
            "score": [self.score],
            "q": self.q,
            "risk": self.risk,
            "v": [self.v],
            "v_h": [self.v_h],
        }
        self.optimizers = {
            name: torch.optim.Adam([p for net in nets for p in net.parameters()], lr=3e-4)
            for name, nets in everything.items()
        }

    def step(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    @staticmethod
    @torch.no_grad()
    def follow(slow: nn.Module, fast: nn.Module, share: float) -> None:
        for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
            p.mul_(1 - share).add_(q, alpha=share)

    def update(self, batch: Batch) -> None:
        half = len(batch.rewards) // 2
        for rows in (slice(half), slice(half, None)):
            part = Batch(*(x[rows] for x in batch))
            pairs = torch.cat([part.observations, part.actions], dim=1)
            with torch.no_grad():
                q = torch.minimum(*(net(pairs) for net in self.slow_q))
                q_h = torch.maximum(*(net(pairs) for net in self.slow_risk))
                advantages = q - self.v(part.observations)
                weights = feasibility_weights(self.v_h(part.observations), q_h, advantages)
            steps = torch.randint(5, (half,), device=weights.device)
            noise = torch.randn_like(part.actions)
            noisy = self.schedule.add_noise(part.actions, noise, steps)
            errors = (self.score(part.observations, noisy, steps) - noise).square().sum(-1)
            self.step("score", (weights * errors).mean())
            self.follow(self.slow_score, self.score, 0.001)
        part = Batch(*(x[:256] for x in batch))
        pairs = torch.cat([part.observations, part.actions], dim=1)
        for v, slow, fast, name, value, least in (
            (self.v, self.slow_q, self.q, "q", "v", True),
            (self.v_h, self.slow_risk, self.risk, "risk", "v_h", False),
        ):
            reduce = torch.minimum if least else torch.maximum
            with torch.no_grad():
                target = reduce(*(net(pairs) for net in slow))
            self.step(value, expectile_loss(v(part.observations), target, 0.9, reverse=not least))
            with torch.no_grad():
                following = v(part.next_observations)
                if least:
                    y = part.rewards + 0.99 * part.masks * following
                else:
                    y = safety_targets(constraint_signal(part.costs, 25.0), following, part.masks, 0.99)
            self.step(name, torch.stack([(net(pairs) - y).square().mean() for net in fast]).sum())
            for one, other in zip(slow, fast, strict=True):
                self.follow(one, other, 0.005)


# --- timing ----------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Mean seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def product(device: torch.device) -> tuple[Callable[[], Tensor], float]:
    """The policy network's largest product on half a batch, and its GFLOP."""
    left, right = torch.randn(1024, 256, device=device), torch.randn(256, 1024, device=device)
    out = torch.empty(1024, 1024, device=device)
    return lambda: torch.mm(left, right, out=out), 2 * 1024 * 256 * 1024 / 1e9


def step_gflop(config: fisor.Config, share: float, plain: bool = False) -> float:
    """GFLOP of a gradient step in which `share` of the rows go through the policy network."""
    width, total = config.width, 0.0
    score = (A + S + 128) * width + config.blocks * 8 * width**2 + width * A + 64 * 128 + 128**2
    hidden = config.hidden_sizes[0]
    one = hidden**2 + hidden
    q, v = (S + A) * hidden + one, S * hidden + one
    total += 6 * score * config.batch_size * share
    total += 2 * (4 * q + 2 * v) * config.batch_size  # weights
    total += 6 * (4 * q + 2 * v) * config.critic_batch_size + 2 * 2 * v * config.critic_batch_size
    if plain:
        total += 2 * 4 * q * config.critic_batch_size  # slow critics again
    return total / 1e9


def learner(config: fisor.Config, share: float, device: torch.device, batch: Batch) -> fisor.FISOR:
    """A learner that gives `share` of the batch a weight: its V_h says feasible, its Q_h for the rest not."""
    context = Context(OBSERVATIONS, ACTIONS, device, torch.Generator(device).manual_seed(0), 1_000, *NO_DATA)
    made = fisor.FISOR(config, context)
    # The last observation decides: V_h is well below 0, Q_h is its distance to the share's quantile.
    level = torch.quantile(batch.observations[:, -1], share)
    judge = made._slow_values

    def slow_values(part: Batch) -> tuple[Tensor, Tensor]:
        judge(part)  # what it costs
        return 0 * part.rewards, part.observations[:, -1] - level

    made._slow_values = slow_values  # type: ignore[method-assign]
    with torch.no_grad():
        made.values.biases[-1][1] = -1e3
    return made


def training(device: torch.device, turns: int, repeats: int, share: float) -> dict[str, Any]:
    """Median seconds of a step of each kind, turn about."""
    config = fisor.Config(dataset="none", env="none")
    batch = batch_of(config.batch_size, device)
    plain = Plain(device)
    whole, part = learner(config, 1.0, device, batch), learner(config, share, device, batch)
    multiply, gflop = product(device)
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain.update(batch),
        "ours, all rows": lambda: whole.update(batch),
        f"ours, {share:.0%} of the rows": lambda: part.update(batch),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    products: list[float] = []
    for call in calls.values():
        call()
    for _ in range(turns):
        products.append(seconds_of(multiply, 20, device) / gflop)
        for name, call in calls.items():
            times[name].append(seconds_of(call, repeats, device))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    work = dict(
        zip(
            calls,
            (step_gflop(config, 1.0, True), step_gflop(config, 1.0), step_gflop(config, share)),
            strict=True,
        )
    )
    return {
        "seconds": medians,
        "gflop": work,
        "gflops": {name: work[name] / seconds for name, seconds in medians.items()},
        "matmul_gflops": 1 / statistics.median(products),
        "all": times,
    }


def acting(device: torch.device, turns: int) -> list[dict[str, Any]]:
    """Actions a second of batches of environments, N = 16 candidates."""
    rows = []
    sizes = {
        "published": {},
        "cpu preset": {k: fisor.PRESETS["cpu"][k] for k in ("width", "blocks", "hidden_sizes")},
    }
    kinds: list[tuple[str, int | None]] = [("ddpm", None), ("dpm-solver++", 2), ("ddim", 1)]
    for size, options in sizes.items():
        for sampler, passes in kinds:
            policy = DiffusionPolicy(OBSERVATIONS, ACTIONS, sampler=sampler, passes=passes, **options)  # type: ignore[arg-type]
            policy.to(device).eval()
            for envs in (1, 20, 256):
                observations = torch.randn(envs, S, device=device)
                policy.act(observations)
                seconds = [seconds_of(partial(policy.act, observations), 2, device) for _ in range(turns)]
                rows.append(
                    {
                        "size": size,
                        "sampler": sampler,
                        "passes": policy.passes,
                        "environments": envs,
                        "actions_per_second": envs / statistics.median(seconds),
                    }
                )
    return rows


def table(result: dict[str, Any]) -> str:
    """Both measurements in Markdown."""
    train = result["training"]
    plain = train["seconds"]["plain"]
    lines = [
        f"Gradient steps at the published sizes, {result['threads']} thread(s) on {result['device']}; this "
        f"machine multiplies 1024 x 256 x 1024 matrices at {train['matmul_gflops']:.0f} GFLOP/s.",
        "",
        "| step | steps/s | against plain | GFLOP | GFLOP/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, seconds in train["seconds"].items():
        lines.append(
            f"| {name} | {1 / seconds:.2f} | {plain / seconds:.2f} | {train['gflop'][name]:.1f} | "
            f"{train['gflops'][name]:.0f} |"
        )
    lines += [
        "",
        "Actions a second, N = 16 candidates for each:",
        "",
        "| networks | sampler, passes | 1 environment | 20 | 256 |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    kinds = {(row["size"], row["sampler"], row["passes"]) for row in result["acting"]}
    for kind in sorted(kinds, key=lambda k: (k[0] != "published", -k[2])):
        rates = [
            row["actions_per_second"]
            for row in result["acting"]
            if (row["size"], row["sampler"], row["passes"]) == kind
        ]
        lines.append(f"| {kind[0]} | {kind[1]}, {kind[2]} | " + " | ".join(f"{r:,.0f}" for r in rates) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.7, help="rows that have a weight, in the third row")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    device = torch.device(asked.device)
    result: dict[str, Any] = {
        "threads": asked.threads,
        "device": asked.device,
        "training": training(device, asked.turns, asked.repeats, asked.share),
        "acting": acting(device, asked.turns),
    }
    name = "offline_speed" if device.type == "cpu" else f"offline_speed_{device.type}"
    save(name, result, table(result))


if __name__ == "__main__":
    main()
