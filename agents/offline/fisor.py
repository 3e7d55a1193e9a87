"""FISOR: a diffusion policy that seeks reward where it is safe and safety where it is not.

Zheng, Li, Yu, Yang, Li, Zhan and Liu 2024, "Safe Offline Reinforcement Learning with Feasibility-Guided
Diffusion Model". No multiplier and no budget: three regressions on recorded data, none of which waits for
another. With h(s) = `cost_scale` where the transition costs and -1 elsewhere, tau the expectile, gamma the
discount, m = 0 at the end of an episode (a time limit counts as an end) and averages over a batch:

    feasible values      V_h:  E |tau - 1[u > 0]| u^2,   u = max_i Q'_h,i(s, a) - V_h(s)
                         Q_h:  E (Q_h,i - y)^2,   y = m [(1 - gamma) h + gamma max(h, V_h(s'))] + (1 - m) h
    reward values        V:    E |tau - 1[u < 0]| u^2,   u = min_i Q'_i(s, a) - V(s)
                         Q:    E (Q_i - y)^2,     y = r + gamma m V(s')
    policy               E w |eps_theta(s, x_t, t) - eps|^2,
                         w = saferl.feasibility.feasibility_weights(V_h, max_i Q'_h,i, min_i Q'_i - V)

Q' are slow copies, and the policy that acts is a slow copy of the trained one. To act, N actions are sampled
and the one with the least risk max_i Q'_h,i is executed. In a gradient step the policy learns first, with
the critics of the step before, twice, on a half of the batch each; then the critics, on the first
`critic_batch_size` rows.

Equations, order and hyperparameters are those of the authors' code; the paper's text is unverified.
Departures: rows of weight 0 are left out of the policy's forward pass (they do not change its mean), and both
halves take their weights from one evaluation of the critics, which do not move between them.

`critic="qc"` is the authors' ablation: Q_h and V_h are sums of discounted costs, y = c + gamma m V_h(s'), and
what `saferl.constraints.discounted_limit` allows is subtracted from both before the weights see them.

`extraction="feasible-first"` and another `cost_scale` are ours; see `saferl.feasibility`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saferl.agents.offline.engine import Batch, Context, OfflineConfig, train_offline
from saferl.agents.online.engine import at_least
from saferl.constraints import discounted_limit
from saferl.errors import UsageError, unknown_name
from saferl.experiment.run import Run
from saferl.feasibility import (
    constraint_signal,
    cost_targets,
    expectile_loss,
    feasibility_weights,
    safety_targets,
)
from saferl.nn.batched import BatchedMLPs
from saferl.nn.diffusion import Sampler, noise_prediction_loss
from saferl.nn.diffusion_policy import DiffusionPolicy, Extraction, critics
from saferl.nn.flat import FlatParameters

__all__ = ["FISOR", "PRESETS", "Config", "train"]

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "total_steps": 50_000,
        "policy_lr_steps": 150_000,
        "batch_size": 512,
        "width": 128,
        "blocks": 2,
        "hidden_sizes": (128, 128),
    }
}
"""Defaults for other budgets, by the name that `--preset` takes. "cpu": minutes on one core, with networks of
a ninth of the parameters, a quarter of the batch and a twentieth of the steps."""


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """FISOR's hyperparameters; defaults are the published ones for all DSRL tasks."""

    batch_size: int = 2_048
    """Transitions a gradient step; each half is a step of the policy."""
    critic_batch_size: int = 256
    """Of these, for the critics."""
    reward_scale: float | None = None
    """Factor of the rewards; longest episode over the range of returns when left out."""
    cost_scale: float | None = 25.0
    """Constraint value of a transition that costs; None where the data's costs are values of a constraint."""
    critic: Literal["hj", "qc"] = "hj"
    """What risk is: hj, the worst constraint value ahead (published), or qc, the costs ahead (ablation)."""
    cost_limit: float = 10.0
    """Largest cost of an episode that qc calls safe; hj has none."""
    expectile: float = 0.9
    """Of the reward's values, and reversed of the feasible ones."""
    risk_temperature: float = 5.0
    """Inverse temperature of the weights in the infeasible region."""
    reward_temperature: float = 3.0
    """Inverse temperature of the weights in the feasible region."""
    risk_clip: float = 150.0
    """Largest weight in the infeasible region."""
    reward_clip: float = 100.0
    """Largest weight in the feasible region."""
    lr: float = 3e-4
    """Adam's learning rate for all networks."""
    policy_lr_steps: int = 3_000_000
    """Steps of the policy over which its learning rate falls to 0 along a cosine; a gradient step has two."""
    polyak: float = 0.005
    """Share of the critics that moves into their slow copies at every step."""
    policy_polyak: float = 0.001
    """Share of the policy that moves into the one that acts, at every step of the policy."""
    width: int = 256
    """Width of the policy network."""
    blocks: int = 3
    """Residual blocks of the policy network."""
    dropout: float = 0.1
    """In the policy network's blocks."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of every critic."""
    diffusion_steps: int = 5
    """Noise levels T."""
    candidates: int = 16
    """Actions sampled to choose from, N."""
    extraction: Extraction = "least-risk"
    """Which candidate is executed: least-risk (the paper's) or feasible-first (ours)."""
    sampler: Sampler = "ddpm"
    """How candidates are drawn: ddpm (published), ddim or dpm-solver++, which need the diffusers package."""
    passes: int | None = None
    """Passes of the policy network that ddim and dpm-solver++ make; one a noise level when left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            *("critic_batch_size", "policy_lr_steps", "width", "blocks", "diffusion_steps", "candidates"),
        ):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        if self.batch_size % 2 or self.critic_batch_size > self.batch_size:
            raise UsageError(
                f"the batch of {self.batch_size} must be even and hold the critics' {self.critic_batch_size}."
            )
        if self.extraction not in ("least-risk", "feasible-first"):
            raise unknown_name("extraction", self.extraction, ("least-risk", "feasible-first"))
        if self.critic not in ("hj", "qc"):
            raise unknown_name("critic", self.critic, ("hj", "qc"))
        for name in ("cost_scale", "risk_clip", "reward_clip", "lr", "cost_limit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value:g}; it must be positive.")
        if not 0 < self.expectile < 1:
            raise UsageError(f"the expectile is {self.expectile:g}; it must lie strictly between 0 and 1.")


class FISOR:
    """V and V_h as a stack of two networks, Q, Q, Q_h, Q_h as one of four, the policy, and slow copies."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.generator = context.generator
        self.risk_limit = 0.0
        if config.critic == "qc":
            self.risk_limit = discounted_limit(config.cost_limit, config.discount, context.episode_steps)
        self.policy = DiffusionPolicy(
            context.observation_space,
            context.action_space,
            width=config.width,
            blocks=config.blocks,
            hidden_sizes=config.hidden_sizes,
            diffusion_steps=config.diffusion_steps,
            candidates=config.candidates,
            extraction=config.extraction,
            dropout=config.dropout,
            risk_limit=self.risk_limit,
            sampler=config.sampler,
            passes=config.passes,
        ).to(context.device)
        """Slow copies of the noise predictor and of the critics: what acts."""
        size = self.policy.encoder.size
        self.predictor = copy.deepcopy(self.policy.predictor)
        self.critics = copy.deepcopy(self.policy.critics)
        self.values: BatchedMLPs = critics(2, size, config.hidden_sizes).to(context.device)
        self.networks = nn.ModuleDict(
            {"predictor": self.predictor, "critics": self.critics, "state_values": self.values}
        )
        self.policy.requires_grad_(False).eval()
        self._predictor = FlatParameters(self.predictor.parameters())
        self._slow_predictor = FlatParameters(self.policy.predictor.parameters())
        self._critics = FlatParameters(self.critics.parameters(), stacked=True)
        self._slow_critics = FlatParameters(self.policy.critics.parameters(), stacked=True)
        self._values = FlatParameters(self.values.parameters(), stacked=True)
        self.optimizers = {
            "predictor": torch.optim.Adam([self._predictor.values], lr=config.lr, fused=True),
            "critics": torch.optim.Adam([self._critics.values], lr=config.lr, fused=True),
            "values": torch.optim.Adam([self._values.values], lr=config.lr, fused=True),
        }
        self.policy_steps = 0

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Two steps of the policy, one of V and V_h, one of Q and Q_h."""
        q, q_h = self._slow_values(batch)
        with torch.no_grad():
            v, v_h = self.values(batch.observations)[..., 0]
        weights = feasibility_weights(
            v_h - self.risk_limit,
            q_h - self.risk_limit,
            q - v,
            risk_temperature=self.config.risk_temperature,
            reward_temperature=self.config.reward_temperature,
            risk_clip=self.config.risk_clip,
            reward_clip=self.config.reward_clip,
        )
        half = len(weights) // 2
        policy_loss = self._policy_step(batch, weights, slice(half)) / 2
        policy_loss = policy_loss + self._policy_step(batch, weights, slice(half, None)) / 2

        rows = self.config.critic_batch_size
        part = Batch(*(x[:rows] for x in batch))
        value_losses = self.value_losses(part, q[:rows], q_h[:rows])
        self._step("values", value_losses.sum(), self._values)
        critic_losses = self.critic_losses(part)
        self._step("critics", critic_losses.sum(), self._critics)
        self._slow_critics.follow(self._critics, self.config.polyak)
        return {
            "loss/policy": policy_loss,
            "loss/value": value_losses[0].detach(),
            "loss/safety_value": value_losses[1].detach(),
            "loss/critic": critic_losses[0].detach(),
            "loss/safety_critic": critic_losses[1].detach(),
            "value/reward": v.mean(),
            "value/safety": v_h.mean(),
            "feasible/states": (v_h <= self.risk_limit).float().mean(),
            "feasible/weight": weights.mean(),
            "feasible/used": (weights > 0).float().mean(),
        }

    @torch.no_grad()
    def _slow_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """min Q' and max Q'_h (B,) of the recorded actions."""
        pairs = torch.cat([batch.observations, batch.actions], dim=1)
        q1, q2, risk1, risk2 = self.policy.critics(pairs)[..., 0]
        return torch.minimum(q1, q2), torch.maximum(risk1, risk2)

    def policy_loss(
        self, batch: Batch, weights: Tensor, steps: Tensor, noise: Tensor, rows: int | None = None
    ) -> Tensor:
        """mean w |eps_theta(s, x_t, t) - eps|^2 for weights (B,), steps t (B,) and noise eps (B, A).

        `rows` is the number that the mean is taken over, where the batch is only those with w > 0.
        """
        noisy = self.policy.schedule.add_noise(batch.actions, noise, steps)
        # Time is embedded once for each of the few levels, not for every row.
        levels = self.predictor.embed_times(torch.arange(self.config.diffusion_steps, device=steps.device))
        observed = self.predictor.embed_observations(batch.observations)
        predicted = self.predictor.trunk(observed, nn.functional.embedding(steps, levels), noisy)
        return noise_prediction_loss(predicted, noise, weights, rows)

    def value_losses(self, batch: Batch, q: Tensor, q_h: Tensor) -> Tensor:
        """Expectile losses (2,) of V and V_h on min Q' and max Q'_h (B,)."""
        v, v_h = self.values(batch.observations)[..., 0]
        level = self.config.expectile
        return torch.stack([expectile_loss(v, q, level), expectile_loss(v_h, q_h, level, reverse=True)])

    def critic_losses(self, batch: Batch) -> Tensor:
        """Squared errors (2,) of the Q and of the Q_h, each summed over its pair.

        The authors' mean over a pair is half of that; Adam's steps are the same.
        """
        with torch.no_grad():
            v, v_h = self.values(batch.next_observations)[..., 0]
            risk = self._risk_targets(batch, v_h)
            reward = batch.rewards + self.config.discount * batch.masks * v
        pairs = torch.cat([batch.observations, batch.actions], dim=1)
        errors = self.critics(pairs)[..., 0] - torch.stack([reward, reward, risk, risk])
        losses: Tensor = errors.square().mean(1).view(2, 2).sum(1)
        return losses

    def _risk_targets(self, batch: Batch, v_h: Tensor) -> Tensor:
        """Targets (B,) of Q_h, from V_h (B,) at the next states."""
        if self.config.critic == "qc":
            return cost_targets(batch.costs, v_h, batch.masks, self.config.discount)
        signals = batch.costs
        if self.config.cost_scale is not None:
            signals = constraint_signal(batch.costs, self.config.cost_scale)
        return safety_targets(signals, v_h, batch.masks, self.config.discount)

    def _policy_step(self, batch: Batch, weights: Tensor, rows: slice) -> Tensor:
        """One step on the rows; returns the loss."""
        part, weights = Batch(*(x[rows] for x in batch)), weights[rows]
        count, device = len(weights), weights.device
        steps = torch.randint(self.config.diffusion_steps, (count,), generator=self.generator, device=device)
        noise = torch.randn(part.actions.shape, generator=self.generator, device=device)
        used = weights.nonzero()[:, 0]
        part = Batch(*(x[used] for x in part))
        loss = self.policy_loss(part, weights[used], steps[used], noise[used], rows=count)
        for group in self.optimizers["predictor"].param_groups:
            progress = min(self.policy_steps / self.config.policy_lr_steps, 1.0)
            group["lr"] = self.config.lr * 0.5 * (1 + math.cos(math.pi * progress))
        self._step("predictor", loss, self._predictor)
        self._slow_predictor.follow(self._predictor, self.config.policy_polyak)
        self.policy_steps += 1
        return loss.detach()

    def _step(self, name: str, loss: Tensor, flat: FlatParameters) -> None:
        flat.set_gradients(torch.autograd.grad(loss, flat.parameters), math.inf)
        self.optimizers[name].step()

    def state_dict(self) -> dict[str, Any]:
        """Fast networks, optimisers and the number of policy steps; slow copies are the policy's."""
        return {
            "networks": self.networks.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "policy_steps": self.policy_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.networks.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.policy_steps = state["policy_steps"]


def train(config: Config, run: Run) -> nn.Module:
    """Train FISOR; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(
        config, run, lambda context: FISOR(config, context), reward_scale=config.reward_scale
    )
