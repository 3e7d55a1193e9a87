"""PPO's clipped update over mini-batches that all processes share, as CaRL's published code has it.

With rho = pi / pi_old, A the advantage (standardised over the mini-batch of all processes), R the target:

    L = - min(rho A, clip(rho, 1 -+ c) A)
        + 0.5 * 0.5 max((V - R)^2, (V_old + clip(V - V_old, -+v) - R)^2) - 0.01 H(pi)

Adam with eps 1e-5, gradients clipped by their norm, learning rate lr (1 - (u - 1) / U) at update u = 0 .. U
- 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saferl.agents.online.data_parallel import Context, DataParallelConfig, MinibatchesOf, Rollout
from saferl.agents.online.engine import at_least


@dataclass(frozen=True, kw_only=True)
class LargeBatchConfig(DataParallelConfig):
    """Hyperparameters of the update, those of CaRL's run of 300 million samples."""

    minibatches: int = 4
    """Parts of an iteration's samples, each a gradient step."""
    epochs: int = 3
    """Passes over the samples."""
    lr: float = 2.5e-4
    """Learning rate at the start."""
    anneal_lr: bool = True
    """Let it fall linearly to 0."""
    clip: float = 0.1
    """Range of the probability ratio."""
    value_clip: float | None = 0.1
    """Range of a value's move, in units of the return; None for none."""
    entropy_coef: float = 0.01
    """Weight of the entropy."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Norm at which gradients are clipped."""
    normalise_advantages: bool = True
    """Standardise advantages over the mini-batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("minibatches", self.minibatches, 1)
        at_least("epochs", self.epochs, 1)


def learning_rate(lr: float, update: int, updates: int) -> float:
    """lr (1 - (u - 1) / U), the published schedule: it starts one step above lr and does not reach 0."""
    return lr * (1.0 - (update - 1.0) / updates)


def value_loss(values: Tensor, old: Tensor, targets: Tensor, clip: float | None) -> Tensor:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old) - R)^2), of the shape of `values`."""
    plain = (values - targets).square()
    if clip is None:
        return 0.5 * plain
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (clipped - targets).square())


class LargeBatchUpdate:
    """Epochs over mini-batches, a gradient step each."""

    def __init__(self, config: LargeBatchConfig, context: Context) -> None:
        self.config, self.context = config, context
        self.optimizer = torch.optim.Adam(context.model.parameters(), lr=config.lr, eps=1e-5)

    def improve(
        self, rollout: Rollout, advantages: Tensor, iteration: int, minibatches: MinibatchesOf
    ) -> dict[str, float]:
        """Ascend the clipped objective with given advantages (B,)."""
        config, ranks = self.config, self.context.ranks
        rate = learning_rate(config.lr, iteration, config.iterations) if config.anneal_lr else config.lr
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = torch.zeros(6, dtype=torch.float64, device=advantages.device)
        for _ in range(config.epochs):
            for rows, size in minibatches(config.minibatches):
                chosen = advantages[rows]
                if config.normalise_advantages:
                    chosen = self._standardise(chosen, size)
                sums += self._step(rollout, rows, chosen, size)
        total = ranks.total(sums)
        policy, value, entropy, kl, clipped, count = (float(x) for x in total)
        return {
            "loss/policy": policy / count,
            "loss/value": value / count,
            "loss/entropy": entropy / count,
            "loss/kl": kl / count,
            "loss/clip_fraction": clipped / count,
            "loss/learning_rate": rate,
        }

    def _standardise(self, advantages: Tensor, size: int) -> Tensor:
        """By the mean and deviation of the whole mini-batch, with Bessel's correction."""
        total = self.context.ranks.total(advantages.double().sum()[None])[0]
        mean = total / size
        squares = self.context.ranks.total((advantages.double() - mean).square().sum()[None])[0]
        deviation = (squares / max(size - 1, 1)).sqrt()
        return ((advantages.double() - mean) / (deviation + 1e-8)).float()

    def _step(self, rollout: Rollout, rows: Tensor, advantages: Tensor, size: int) -> Tensor:
        """One gradient step on a mini-batch of `size` samples of which `rows` are ours; sums for reports."""
        config, context = self.config, self.context
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(6, dtype=torch.float64, device=advantages.device)
        micro = config.micro_batch or max(len(rows), 1)
        parts = list(range(0, max(len(rows), 1), micro))
        for k, first in enumerate(parts):
            own, weights = rows[first : first + micro], advantages[first : first + micro]
            last = k == len(parts) - 1
            # Gradients meet once a mini-batch, not once a part of it.
            wait = contextlib.nullcontext() if last or context.ranks.size == 1 else context.parallel.no_sync()  # type: ignore[operator]
            with wait:
                loss, said = self._loss(rollout, own, weights)
                # Processes' gradients are averaged: the sum over all samples, over their number.
                (loss * context.ranks.size / size).backward()
            sums += said
        torch.nn.utils.clip_grad_norm_(context.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        return sums

    def _loss(self, rollout: Rollout, rows: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over samples, and sums for reports."""
        config = self.config
        empty = not len(rows)
        if empty:  # a process without a sample in this part still takes its turn
            rows, advantages = (
                torch.zeros(1, dtype=torch.long, device=advantages.device),
                torch.zeros(1).to(advantages),
            )
        batch = {name: value[rows] for name, value in rollout.observations.items()}
        device = advantages.device.type
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"):
            parameters, values = self.context.parallel(batch)
        distribution = self.context.model.policy.distribution
        log_ratio = distribution.log_prob(parameters, rollout.actions[rows]) - rollout.log_probs[rows]
        ratio = log_ratio.exp()
        surrogate = torch.minimum(
            ratio * advantages, ratio.clamp(1 - config.clip, 1 + config.clip) * advantages
        )
        loss_value = value_loss(values, rollout.values[rows], rollout.targets[rows], config.value_clip).sum(
            -1
        )
        entropy = distribution.entropy(parameters)
        loss = (-surrogate + config.value_coef * loss_value - config.entropy_coef * entropy).sum()
        with torch.no_grad():
            kl = distribution.kl(rollout.parameters[rows], parameters)
            outside = ((ratio - 1).abs() > config.clip).float()
            said = torch.stack([
                -surrogate.sum(), loss_value.sum(), entropy.sum(), kl.sum(), outside.sum(),
                torch.ones_like(ratio).sum(),
            ]).double()  # fmt: skip
        return (0.0 * loss, 0.0 * said) if empty else (loss, said)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
