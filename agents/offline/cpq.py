"""CPQ: Q-learning that takes actions of unsafe or unknown cost to be worth nothing.

Xu, Zhan and Zhu 2022, "Constraints Penalized Q-Learning for Safe Offline Reinforcement Learning". An
autoencoder tells which actions are unlike the data's, the cost critic learns to fear them, and the reward
critic does not see past an action that costs too much. With a ~ pi(.|s), m = 0 at the end of an episode (a
time limit counts as an end), l = `saferl.constraints.discounted_limit`, primes for slow copies, Q the smaller
and Q_C the larger of a pair, averages over a batch:

    VAE     see `saferl.nn.variational`
    Q_C     E (Q_C,i - y)^2 - alpha (E_ood - 1.5 l),          y = c + gamma m Q'_C(s', a')
            E_ood = mean over ten a ~ pi(.|s) of 1[KL(s, a) >= its 75th percentile] Q_C(s, a)
    alpha   log alpha ascends alpha (1.5 l - E_ood), within [-5, 5]
    Q       E (Q_i - y)^2,          y = r + gamma m 1[Q'_C(s', a') <= l] Q'(s', a')
    pi      max E 1[Q_C(s, a) <= l] Q(s, a)

KL is the autoencoder's divergence at (s, a), a mean over its latents; the percentile is over the batch. A
policy all of whose actions look unsafe has no gradient left: CPQ cannot leave such a place. Equations and
hyperparameters are those of OSRL's code; at which states it draws the ten actions is unverified, here those
of the batch. Departures, all defects there: the autoencoder and the critics see actions after their tanh
(theirs before it); Q_C is the larger of its pair (theirs the smaller, hopeful about cost); ends mask its
targets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saferl.agents.offline.engine import Batch, Context, OfflineConfig, train_offline
from saferl.agents.online.engine import at_least
from saferl.constraints import discounted_limit
from saferl.errors import UsageError
from saferl.experiment.run import Run
from saferl.nn.batched import BatchedMLPs
from saferl.nn.distributions import SquashedGaussianActions
from saferl.nn.flat import FlatParameters
from saferl.nn.models import Actor
from saferl.nn.variational import ActionVAE, divergence_from_prior

__all__ = ["CPQ", "Config", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """CPQ's hyperparameters; defaults are those of OSRL's published runs."""

    total_steps: int = 100_000
    """Gradient steps in all."""
    batch_size: int = 512
    """Transitions a gradient step."""
    cost_limit: float = 10.0
    """Largest mean cost of an episode."""
    reward_scale: float = 0.1
    """Factor of the rewards."""
    actor_lr: float = 1e-4
    """Adam's learning rate for the policy."""
    critic_lr: float = 1e-3
    """Adam's learning rate for the critics and the autoencoder."""
    alpha_lr: float = 1e-4
    """Step of log alpha."""
    polyak: float = 0.005
    """Share of the critics that moves into their slow copies at every step."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the policy and of every critic."""
    vae_size: int = 400
    """Width of the autoencoder."""
    samples: int = 10
    """Actions of the policy that are searched for unknown ones, for each state."""
    percentile: float = 0.75
    """Share of them that counts as known."""
    fear: float = 1.5
    """Cost that unknown actions are to be thought of, in units of the discounted limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("cost limit", self.cost_limit, 0)
        for name in ("vae_size", "samples"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        at_least("hidden sizes", min(self.hidden_sizes, default=1), 1)
        for name in ("actor_lr", "critic_lr", "reward_scale", "fear"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name):g}; it must be positive.")
        if not 0 <= self.percentile <= 1:
            raise UsageError(f"the percentile is {self.percentile:g}; it must lie between 0 and 1.")


class CPQ:
    """The policy, the autoencoder, and Q, Q, Q_C, Q_C as one stack of networks."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.generator = context.generator
        self.limit = discounted_limit(config.cost_limit, config.discount, context.episode_steps)
        self.policy = Actor(
            context.observation_space,
            context.action_space,
            hidden_sizes=config.hidden_sizes,
            activation="relu",
            normalise_observations=False,
            head="squashed",
        ).to(context.device)
        size, actions = self.policy.encoder.size, self.policy.distribution.action_size
        self.vae = ActionVAE(size, actions, config.vae_size).to(context.device)
        self.critics = BatchedMLPs(4, size + actions, config.hidden_sizes).to(context.device)
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=context.device)
        self.networks = nn.ModuleDict({"policy": self.policy, "vae": self.vae, "critics": self.critics})
        self._flat = {
            "vae": FlatParameters(self.vae.parameters()),
            "policy": FlatParameters(self.policy.parameters()),
            "critics": FlatParameters(self.critics.parameters(), stacked=True),
        }
        self._slow = FlatParameters(self.slow_critics.parameters(), stacked=True)
        self.optimizers = {
            name: torch.optim.Adam(
                [flat.values], lr=config.actor_lr if name == "policy" else config.critic_lr, fused=True
            )
            for name, flat in self._flat.items()
        }

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the autoencoder, of the critics, of alpha and of the policy, in this order."""
        vae_loss = self.vae.loss(batch.observations, batch.actions, self.generator)
        self._step("vae", vae_loss)
        with torch.no_grad():
            next_actions = self.act(batch.next_observations)
            repeated = batch.observations[:, None].expand(-1, self.config.samples, -1)
            candidates = self.act(repeated)
        unknown = self.unknown_cost(repeated, candidates)
        squares = self.squared_errors(batch, next_actions)
        gap = self.config.fear * self.limit - unknown
        alpha = self.log_alpha.exp()
        critic_loss = squares + alpha * gap
        self._step("critics", critic_loss)
        self.log_alpha = (self.log_alpha + self.config.alpha_lr * alpha * gap.detach()).clamp(-5.0, 5.0)
        values, costs = self.values(self.critics, batch.observations, self.act(batch.observations))
        safe = (costs <= self.limit).to(values)
        policy_loss = -(safe * values).mean()
        self._step("policy", policy_loss)
        self._slow.follow(self._flat["critics"], self.config.polyak)
        return {
            "loss/vae": vae_loss.detach(),
            "loss/critic": squares.detach(),
            "loss/policy": policy_loss.detach(),
            "value/reward": values.detach().mean(),
            "value/cost": costs.detach().mean(),
            "value/unknown_cost": unknown.detach(),
            "policy/safe": safe.mean(),
            "policy/alpha": alpha,
        }

    def act(self, observations: Tensor) -> Tensor:
        """Sampled actions (..., A) in [-1, 1], differentiable in the policy."""
        distribution = self.policy.distribution
        assert isinstance(distribution, SquashedGaussianActions)
        parameters = self.policy.distribution_parameters(observations)
        return distribution.sample_with_log_prob(parameters, self.generator)[0]

    @staticmethod
    def values(critics: BatchedMLPs, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Q and Q_C (B,) of observations (B, S) and actions (B, A)."""
        q1, q2, c1, c2 = critics(torch.cat([observations, actions], dim=1))[..., 0]
        return torch.minimum(q1, q2), torch.maximum(c1, c2)

    def unknown_cost(self, observations: Tensor, actions: Tensor) -> Tensor:
        """E_ood of observations (B, K, S) and actions (B, K, A), differentiable in the critics."""
        with torch.no_grad():
            divergence = divergence_from_prior(*self.vae.encode(observations, actions)).mean(-1).flatten()
            unknown = divergence >= torch.quantile(divergence, self.config.percentile)
        _, costs = self.values(self.critics, observations.flatten(0, 1), actions.flatten(0, 1))
        return (unknown * costs).mean()

    def squared_errors(self, batch: Batch, next_actions: Tensor) -> Tensor:
        """Squared errors summed over the four critics; actions (B, A) of the policy at the next states."""
        with torch.no_grad():
            value, cost = self.values(self.slow_critics, batch.next_observations, next_actions)
            ahead = self.config.discount * batch.masks
            reward_target = batch.rewards + ahead * (cost <= self.limit) * value
            cost_target = batch.costs + ahead * cost
        errors = self.critics(torch.cat([batch.observations, batch.actions], dim=1))[..., 0]
        errors = errors - torch.stack([reward_target, reward_target, cost_target, cost_target])
        loss: Tensor = errors.square().mean(1).sum()
        return loss

    def _step(self, name: str, loss: Tensor) -> None:
        flat = self._flat[name]
        flat.set_gradients(torch.autograd.grad(loss, flat.parameters), math.inf)
        self.optimizers[name].step()

    def state_dict(self) -> dict[str, Any]:
        """Autoencoder, critics, slow copies, optimisers and alpha; the policy's weights are its own."""
        return {
            "vae": self.vae.state_dict(),
            "critics": self.critics.state_dict(),
            "slow_critics": self.slow_critics.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "log_alpha": self.log_alpha,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.vae.load_state_dict(state["vae"])
        self.critics.load_state_dict(state["critics"])
        self.slow_critics.load_state_dict(state["slow_critics"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.log_alpha = state["log_alpha"].to(self.log_alpha)


def train(config: Config, run: Run) -> nn.Module:
    """Train CPQ; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(config, run, lambda context: CPQ(config, context), reward_scale=config.reward_scale)
