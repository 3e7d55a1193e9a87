"""BCQ-Lag: batch-constrained Q-learning on the Lagrangian.

Fujimoto, Meger and Precup 2019, "Off-Policy Deep Reinforcement Learning without Exploration", with the cost
critics and the PID controller (Stooke, Achiam and Abbeel 2020) that OSRL gave it (Liu et al. 2023). Actions
come from an autoencoder G of the data's, so that critics are asked only about actions like them. With m = 0
at the end of an episode (a time limit counts as an end), gamma the discount, z ~ N(0, 1) clamped to
[-1/2, 1/2], and averages over a batch:

    G       `saferl.nn.variational.ActionVAE`
    a       a(s) = clip(g + phi tanh f(s, g), -1, 1),   g = G(s, z)
    Q, Q_C  E (Q_i - y)^2,   y = r + gamma m max_k [w min_i Q'_i(s', a_k) + (1 - w) max_i Q'_i(s', a_k)],
            and the same with costs; a_k ~ a'(s'), k = 1 .. 10
    f       min E -min_i Q_i(s, a(s)) + lambda (min_i Q_C,i(s, a(s)) - d)
    lambda  PID on the mean of min_i Q_C,i(s, a(s)) against d = `saferl.constraints.discounted_limit`

i runs over two, each the least of an ensemble of `members` networks; Q' and a' are slow copies (of f; G has
none). Equations, order and hyperparameters are those of OSRL's code. Of its two weak points the inconsistency
stays: the cost's target is the largest of ten actions (cautious), what the policy sees the least of the
critics (hopeful). Departures:

- cost targets stop at the end of an episode, as the reward's do; OSRL forgets the mask, which counts costs
  after the end;
- reward's and cost's targets share their ten actions;
- to act, `candidates` actions are drawn and that with the largest Q - lambda Q_C is executed, as BCQ chooses
  by Q; OSRL's code draws one (`candidates=1`).
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
from saferl.constraints import PIDMultiplier, discounted_limit
from saferl.errors import UsageError
from saferl.experiment.run import Run
from saferl.nn.flat import FlatParameters
from saferl.nn.proposal_policy import Perturbation, ProposalPolicy

__all__ = ["BCQLag", "Config", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Hyperparameters; defaults are OSRL's for all tasks but MetaDrive's (200,000 steps there)."""

    total_steps: int = 100_000
    """Gradient steps in all."""
    batch_size: int = 512
    """Transitions a gradient step."""
    cost_limit: float = 10.0
    """Largest mean cost of an episode."""
    reward_scale: float | None = 0.1
    """Factor of the rewards; None takes longest episode over the range of returns."""
    lr: float = 1e-3
    """Adam's learning rate for all networks."""
    polyak: float = 0.005
    """Share of the critics and the perturbation that moves into their slow copies at every step."""
    samples: int = 10
    """Actions a next state, over which a target takes the largest value."""
    min_weight: float = 0.75
    """Weight w of the smaller critic in a target; 1 - w is the larger's."""
    members: int = 2
    """Networks of each of the four ensembles: two of the reward, two of the cost."""
    phi: float = 0.05
    """Largest shift of a proposed action, where actions span [-1, 1]."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the critics and of the perturbation."""
    vae_hidden_size: int = 400
    """Width of the autoencoder's layers."""
    candidates: int = 10
    """Actions drawn to choose from when acting; 1 in OSRL's code."""
    kp: float = 0.1
    """Proportional gain of the multiplier."""
    ki: float = 0.003
    """Integral gain."""
    kd: float = 0.001
    """Derivative gain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("cost limit", self.cost_limit, 0)
        at_least("hidden sizes", min(self.hidden_sizes, default=1), 1)
        for name in ("samples", "members", "vae_hidden_size", "candidates"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in ("lr", "reward_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value:g}; it must be positive.")
        if not 0 < self.polyak <= 1:
            raise UsageError(f"polyak is {self.polyak:g}; it must be above 0 and at most 1.")
        if not 0 <= self.min_weight <= 1:
            raise UsageError(f"min_weight is {self.min_weight:g}; it must lie between 0 and 1.")
        if not 0 <= self.phi <= 2:
            raise UsageError(f"phi is {self.phi:g}; it must lie between 0 and 2, the span of the actions.")
        if not min(self.kp, self.ki, self.kd) >= 0:
            raise UsageError("the gains kp, ki and kd must be zero or more.")


class BCQLag:
    """Autoencoder, perturbation and critics (all in the policy), slow copies of the last two, multiplier."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.generator = context.generator
        self.limit = discounted_limit(config.cost_limit, config.discount, context.episode_steps)
        self.multiplier = PIDMultiplier(
            config.kp,
            config.ki,
            config.kd,
            ema_p=0.0,
            ema_d=0.0,
            delay=1,
            init=0.0,
            derivative="violation",
            one_sided=True,
        )
        self.policy = ProposalPolicy(
            context.observation_space,
            context.action_space,
            hidden_sizes=config.hidden_sizes,
            vae_hidden_size=config.vae_hidden_size,
            members=config.members,
            scale=config.phi,
            candidates=config.candidates,
        ).to(context.device)
        self.networks: nn.Module = self.policy
        self.vae, self.critics = self.policy.vae, self.policy.critics
        self.perturbation = self.policy.perturbation
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.slow_perturbation = copy.deepcopy(self.perturbation).requires_grad_(False)
        self._flat = {
            "vae": FlatParameters(self.vae.parameters()),
            "critics": FlatParameters(self.critics.parameters(), stacked=True),
            "perturbation": FlatParameters(self.perturbation.parameters()),
        }
        self._slow = {
            "critics": FlatParameters(self.slow_critics.parameters(), stacked=True),
            "perturbation": FlatParameters(self.slow_perturbation.parameters()),
        }
        self.optimizers = {
            name: torch.optim.Adam([flat.values], lr=config.lr, fused=True)
            for name, flat in self._flat.items()
        }

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the autoencoder, of the critics and of the perturbation, in this order."""
        vae_loss = self.vae.loss(batch.observations, batch.actions, self.generator)
        self._step("vae", vae_loss)
        critic_loss = self.critic_loss(batch, self.next_actions(batch.next_observations))
        self._step("critics", critic_loss)
        q, q_c = self.values(batch.observations)
        self.policy.price.fill_(self.multiplier.update(float(q_c.detach().mean()), self.limit))
        policy_loss = self.policy_loss(q, q_c)
        self._step("perturbation", policy_loss)
        for name, slow in self._slow.items():
            slow.follow(self._flat[name], self.config.polyak)
        return {
            "loss/vae": vae_loss.detach(),
            "loss/critic": critic_loss.detach(),
            "loss/policy": policy_loss.detach(),
            "value/reward": q.detach().mean(),
            "value/cost": q_c.detach().mean(),
            "constraint/cost/multiplier": self.policy.price.clone(),
        }

    @torch.no_grad()
    def propose(self, observations: Tensor, perturbation: Perturbation) -> Tensor:
        """Actions (B, A) at (B, S)."""
        actions: Tensor = perturbation(observations, self.vae.sample(observations, self.generator))
        return actions

    def next_actions(self, observations: Tensor) -> Tensor:
        """a_k (B, K, A) at next states (B, S)."""
        repeated = observations.repeat_interleave(self.config.samples, dim=0)
        actions = self.propose(repeated, self.slow_perturbation)
        return actions.view(len(observations), self.config.samples, -1)

    def critic_loss(self, batch: Batch, next_actions: Tensor) -> Tensor:
        """Squared errors, summed over all critics, for a_k (B, K, A)."""
        targets = self.slow_critics.targets(
            batch.next_observations,
            next_actions,
            torch.stack([batch.rewards, batch.costs]),
            self.config.discount * batch.masks,
            self.config.min_weight,
        )
        return self.critics.loss(batch.observations, batch.actions, targets)

    def values(self, observations: Tensor) -> Tensor:
        """min_i Q_i and min_i Q_C,i at a(s) (2, B), with the gradient of the perturbation."""
        with torch.no_grad():
            proposed = self.vae.sample(observations, self.generator)
        return self.critics.least(observations, self.perturbation(observations, proposed))

    def policy_loss(self, q: Tensor, q_c: Tensor) -> Tensor:
        """E -Q + lambda (Q_C - d) for Q and Q_C (B,)."""
        return (self.multiplier.value * (q_c - self.limit) - q).mean()

    def _step(self, name: str, loss: Tensor) -> None:
        flat = self._flat[name]
        flat.set_gradients(torch.autograd.grad(loss, flat.parameters), math.inf)
        self.optimizers[name].step()

    def state_dict(self) -> dict[str, Any]:
        """Slow copies, optimisers and multiplier; all fast networks are the policy's."""
        return {
            "slow_critics": self.slow_critics.state_dict(),
            "slow_perturbation": self.slow_perturbation.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "multiplier": self.multiplier.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.slow_critics.load_state_dict(state["slow_critics"])
        self.slow_perturbation.load_state_dict(state["slow_perturbation"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.multiplier.load_state_dict(state["multiplier"])


def train(config: Config, run: Run) -> nn.Module:
    """Train BCQ-Lag; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(
        config, run, lambda context: BCQLag(config, context), reward_scale=config.reward_scale
    )
