"""COptiDICE: the best stationary distribution near the data's whose cost, bounded from above, is in limits.

Lee, Paduraru, Mankowitz, Heess, Precup, Kim and Guez 2022, "COptiDICE: Offline Constrained Reinforcement
Learning via Stationary Distribution Correction Estimation". Nothing is bootstrapped through a policy: nu
gives every transition its ratio w of the best distribution to the data's, and the policy imitates with these
weights. With m = 0 at the end of an episode (a time limit counts as an end), s_0 a first observation, f the
soft chi-square divergence and averages over a batch:

    e       = r - lambda c + gamma m nu(s') - nu(s),          w = max(0, f'^-1(e / alpha))
    nu      min (1 - gamma) E nu(s_0) + E [w e - alpha f(w)]
    ell     = (1 - gamma) chi(s_0) + w (c + gamma m chi(s') - chi(s))
    p       = softmax(ell / tau),          C = sum p w c       (the cost's upper bound)
    chi     min tau log E exp(ell / tau)
    tau     descends tau (epsilon - KL(p | uniform))
    lambda  descends lambda (l - C),          l = (1 - gamma) `saferl.constraints.discounted_limit`
    pi      max E w log pi(a + x | s + z),          x, z noise of a tenth of the data's deviations

lambda and tau are softplus of what Adam moves (`saferl.constraints.SoftplusMultiplier`). Equations and
hyperparameters are those of OSRL's code as far as they were read; the order of the steps is unverified.
Departures: OSRL holds the discounted limit of an episode's sum against C, which is a mean over steps, so
that it hardly ever binds; here it is (1 - gamma) of it, in the units of C. nu and chi are one network each;
OSRL has two each, and how it joins them is unverified.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saferl.agents.offline.engine import Batch, Context, OfflineConfig, train_offline
from saferl.agents.online.engine import at_least
from saferl.constraints import SoftplusMultiplier, discounted_limit
from saferl.errors import UsageError
from saferl.experiment.run import Run
from saferl.nn.batched import BatchedMLPs
from saferl.nn.flat import FlatParameters
from saferl.nn.models import Actor

__all__ = ["COptiDICE", "Config", "divergence", "ratio_of_slope", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """COptiDICE's hyperparameters; defaults are those of OSRL's published runs."""

    total_steps: int = 100_000
    """Gradient steps in all."""
    batch_size: int = 512
    """Transitions, and first observations, a gradient step."""
    cost_limit: float = 10.0
    """Largest mean cost of an episode."""
    reward_scale: float = 0.1
    """Factor of the rewards."""
    alpha: float = 0.5
    """Weight of the divergence from the data."""
    bound: float = 0.01
    """epsilon: how far, in KL, the data may be from what the cost is bounded for."""
    lr: float = 1e-4
    """Adam's learning rate for all networks."""
    multiplier_lr: float = 1e-4
    """Adam's learning rate for lambda and tau."""
    noise: float = 0.1
    """Noise on what the policy imitates, in units of the data's standard deviations."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of every network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cost_limit", "noise"):
            at_least(name.replace("_", " "), getattr(self, name), 0)
        at_least("hidden sizes", min(self.hidden_sizes, default=1), 1)
        for name in ("alpha", "bound", "lr", "multiplier_lr", "reward_scale"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name):g}; it must be positive.")


def divergence(ratios: Tensor) -> Tensor:
    """f(w) = w (log w - 1) + 1 below 1 and (w - 1)^2 / 2 from there: the soft chi-square divergence."""
    small = ratios.clamp(max=1.0)
    low = torch.xlogy(small, small) - small + 1
    return torch.where(ratios < 1, low, 0.5 * (ratios - 1).square())


def ratio_of_slope(slopes: Tensor) -> Tensor:
    """f'^-1(y) = exp(y) below 0 and y + 1 from there."""
    return torch.where(slopes < 0, slopes.clamp(max=0.0).exp(), slopes + 1)


class COptiDICE:
    """nu and chi as a stack of two networks, the policy, and lambda and tau."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.generator = context.generator
        self.limit = (1 - config.discount) * discounted_limit(
            config.cost_limit, config.discount, context.episode_steps
        )
        self.multiplier = SoftplusMultiplier(lr=config.multiplier_lr, init=1.0)
        self.temperature = SoftplusMultiplier(lr=config.multiplier_lr, init=1.0)
        self.policy = Actor(
            context.observation_space,
            context.action_space,
            hidden_sizes=config.hidden_sizes,
            activation="relu",
            normalise_observations=False,
            head="squashed",
        ).to(context.device)
        self.potentials = BatchedMLPs(2, self.policy.encoder.size, config.hidden_sizes).to(context.device)
        self.networks = nn.ModuleDict({"policy": self.policy, "potentials": self.potentials})
        self._flat = {
            "policy": FlatParameters(self.policy.parameters()),
            "potentials": FlatParameters(self.potentials.parameters(), stacked=True),
        }
        self.optimizers = {
            name: torch.optim.Adam([flat.values], lr=config.lr, fused=True)
            for name, flat in self._flat.items()
        }
        data = context.transitions
        # Without a whole episode the first row is the one start that is known.
        starts = context.data.starts if context.data.num_episodes else np.zeros(1, np.intp)
        self.firsts = data.observations[torch.as_tensor(starts, device=context.device)]
        self.deviations = data.observations.std(0), data.actions.std(0)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of nu and chi, of tau and lambda, and of the policy, in this order."""
        drawn = torch.randint(
            len(self.firsts), (len(batch.rewards),), generator=self.generator, device=self.firsts.device
        )
        losses, ratios, weights = self.potential_losses(batch, self.firsts[drawn])
        self._step("potentials", losses.sum())
        cost = (weights * ratios * batch.costs).sum()
        spread = (weights * (weights * len(weights)).log()).sum()
        price = self.multiplier.update(float(cost), self.limit)
        tau = self.temperature.update(float(spread), self.config.bound)
        policy_loss = self.policy_loss(batch, ratios)
        self._step("policy", policy_loss)
        return {
            "loss/value": losses[0].detach(),
            "loss/cost_bound": losses[1].detach(),
            "loss/policy": policy_loss.detach(),
            "value/cost": cost,
            "value/ratio": ratios.mean(),
            "constraint/cost/multiplier": torch.tensor(price),
            "constraint/cost/temperature": torch.tensor(tau),
        }

    def potential_losses(self, batch: Batch, firsts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (2,) of nu and chi at first observations (B, S), and w and p (B,), without gradient."""
        discount, price, tau = self.config.discount, self.multiplier.value, self.temperature.value
        rows = torch.cat([firsts, batch.observations, batch.next_observations])
        (nu_0, nu, nu_next), (chi_0, chi, chi_next) = self.potentials(rows)[..., 0].view(2, 3, -1)
        ahead = discount * batch.masks
        advantages = batch.rewards - price * batch.costs + ahead * nu_next - nu
        ratios = ratio_of_slope(advantages / self.config.alpha).clamp(min=0.0)
        gain = ratios * advantages - self.config.alpha * divergence(ratios)
        nu_loss = (1 - discount) * nu_0.mean() + gain.mean()
        ratios = ratios.detach()
        ell = (1 - discount) * chi_0 + ratios * (batch.costs + ahead * chi_next - chi)
        chi_loss = tau * (torch.logsumexp(ell / tau, 0) - math.log(len(ell)))
        return torch.stack([nu_loss, chi_loss]), ratios, (ell.detach() / tau).softmax(0)

    def policy_loss(self, batch: Batch, ratios: Tensor) -> Tensor:
        """-E w log pi(a + x | s + z)."""
        noisy = []
        for values, deviation in zip((batch.observations, batch.actions), self.deviations, strict=True):
            noise = torch.randn(
                values.shape, generator=self.generator, device=values.device, dtype=values.dtype
            )
            noisy.append(values + self.config.noise * deviation * noise)
        edge = 1 - 1e-5
        parameters = self.policy.distribution_parameters(noisy[0])
        log_probs = self.policy.distribution.log_prob(parameters, noisy[1].clamp(-edge, edge))
        return -(ratios * log_probs).mean()

    def _step(self, name: str, loss: Tensor) -> None:
        flat = self._flat[name]
        flat.set_gradients(torch.autograd.grad(loss, flat.parameters), math.inf)
        self.optimizers[name].step()

    def state_dict(self) -> dict[str, Any]:
        """nu and chi, optimisers, lambda and tau; the policy's weights are its own."""
        return {
            "potentials": self.potentials.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "multiplier": self.multiplier.state_dict(),
            "temperature": self.temperature.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.potentials.load_state_dict(state["potentials"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.multiplier.load_state_dict(state["multiplier"])
        self.temperature.load_state_dict(state["temperature"])


def train(config: Config, run: Run) -> nn.Module:
    """Train COptiDICE; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(
        config, run, lambda context: COptiDICE(config, context), reward_scale=config.reward_scale
    )
