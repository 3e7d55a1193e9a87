"""IQL-Lag: implicit Q-learning on the Lagrangian. A composition of ours, without published results.

Kostrikov, Nair and Levine 2022, "Offline Reinforcement Learning with Implicit Q-Learning", for the reward:
values are learned on recorded actions alone. What the policy costs is learned by evaluating it, and a PID
controller prices that. With m = 0 at the end of an episode (a time limit counts as an end), tau the
expectile, gamma the discount, beta the inverse temperature and averages over a batch:

    V       E |tau - 1[u < 0]| u^2,   u = min_i Q'_i(s, a) - V(s)                 (equation 5)
    Q       E (Q_i - y)^2,            y = r + gamma m V(s')                         (equation 6)
    Q_C     E (Q_C,i - y)^2,          y = c + gamma m max_i Q'_C,i(s', a'),        a' ~ pi(.|s')
    pi      max E w log pi(a|s),      w = min(exp(beta (A - lambda A_C) / (1 + lambda)), 100)  (equation 7)
            A = min_i Q'_i(s, a) - V(s)
            A_C = max_i Q'_C,i(s, a) - max_i Q'_C,i(s, a_pi),                     a_pi ~ pi(.|s)
    lambda  PID on the mean of max_i Q'_C,i(s, a_pi) against `saferl.constraints.discounted_limit`

Q' are slow copies. A cost critic of the recorded behaviour, learned as the reward's, would not answer to the
multiplier, which then never settled: hence the evaluation of pi, whose actions stay near the data by the
weights' bound. The policy is a squashed Gaussian. The controller and its gains are those of OSRL's BCQ-Lag.
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
from saferl.feasibility import expectile_loss
from saferl.nn.batched import BatchedMLPs
from saferl.nn.distributions import SquashedGaussianActions
from saferl.nn.flat import FlatParameters
from saferl.nn.models import Actor

__all__ = ["Config", "IQLLag", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Hyperparameters: IQL's for locomotion, and the multiplier's."""

    cost_limit: float = 10.0
    """Largest mean cost of an episode."""
    reward_scale: float | None = None
    """Factor of the rewards; longest episode over the range of returns when left out."""
    expectile: float = 0.7
    """Of the reward's values."""
    temperature: float = 3.0
    """Inverse temperature beta of the policy's weights."""
    weight_clip: float = 100.0
    """Largest weight."""
    lr: float = 3e-4
    """Adam's learning rate for all networks."""
    polyak: float = 0.005
    """Share of the critics that moves into their slow copies at every step."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of every network."""
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
        for name in ("temperature", "weight_clip", "lr"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name):g}; it must be positive.")
        if not 0 < self.polyak <= 1:
            raise UsageError(f"polyak is {self.polyak:g}; it must be above 0 and at most 1.")
        if self.reward_scale is not None and not self.reward_scale > 0:
            raise UsageError(f"reward_scale is {self.reward_scale:g}; it must be positive.")
        if not min(self.kp, self.ki, self.kd) >= 0:
            raise UsageError("the gains kp, ki and kd must be zero or more.")
        if not 0 < self.expectile < 1:
            raise UsageError(f"the expectile is {self.expectile:g}; it must lie strictly between 0 and 1.")


class IQLLag:
    """V, the critics Q, Q, Q_C, Q_C as one stack with its slow copy, the policy and the multiplier."""

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
        self.policy = Actor(
            context.observation_space,
            context.action_space,
            hidden_sizes=config.hidden_sizes,
            activation="relu",
            normalise_observations=False,
            head="squashed",
        ).to(context.device)
        size, actions = self.policy.encoder.size, self.policy.distribution.action_size
        self.value = BatchedMLPs(1, size, config.hidden_sizes).to(context.device)
        self.critics = BatchedMLPs(4, size + actions, config.hidden_sizes).to(context.device)
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.networks = nn.ModuleDict({"policy": self.policy, "value": self.value, "critics": self.critics})
        self._flat = {
            "policy": FlatParameters(self.policy.parameters()),
            "value": FlatParameters(self.value.parameters()),
            "critics": FlatParameters(self.critics.parameters(), stacked=True),
        }
        self._slow = FlatParameters(self.slow_critics.parameters(), stacked=True)
        self.optimizers = {
            name: torch.optim.Adam([flat.values], lr=config.lr, fused=True)
            for name, flat in self._flat.items()
        }

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of V, of the policy and of the critics, in this order; then the multiplier's."""
        q, q_c = self.slow_values(batch.observations, batch.actions)
        value_loss = self.value_loss(batch, q)
        self._step("value", value_loss)
        with torch.no_grad():
            advantages = q - self.value(batch.observations)[0, :, 0]
            _, own_cost = self.slow_values(batch.observations, self.act(batch.observations))
        weights = self.weights(advantages, q_c - own_cost)
        policy_loss = self.policy_loss(batch, weights)
        self._step("policy", policy_loss)
        critic_loss = self.critic_loss(batch, self.act(batch.next_observations))
        self._step("critics", critic_loss)
        self._slow.follow(self._flat["critics"], self.config.polyak)
        self.multiplier.update(float(own_cost.mean()), self.limit)
        return {
            "loss/value": value_loss.detach(),
            "loss/policy": policy_loss.detach(),
            "loss/critic": critic_loss.detach(),
            "value/cost": own_cost.mean(),
            "policy/weight": weights.mean(),
            "constraint/cost/multiplier": torch.tensor(self.multiplier.value),
        }

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """Sampled actions (B, A) in [-1, 1]."""
        distribution = self.policy.distribution
        assert isinstance(distribution, SquashedGaussianActions)
        return distribution.sample(self.policy.distribution_parameters(observations), self.generator)

    @torch.no_grad()
    def slow_values(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """min Q' and max Q'_C (B,)."""
        q1, q2, c1, c2 = self.slow_critics(torch.cat([observations, actions], dim=1))[..., 0]
        return torch.minimum(q1, q2), torch.maximum(c1, c2)

    def value_loss(self, batch: Batch, q: Tensor) -> Tensor:
        """Expectile loss of V on min Q' (B,)."""
        return expectile_loss(self.value(batch.observations)[0, :, 0], q, self.config.expectile)

    def weights(self, advantages: Tensor, cost_advantages: Tensor) -> Tensor:
        """w (B,) of advantages A and A_C (B,)."""
        price = self.multiplier.value
        combined = (advantages - price * cost_advantages) / (1 + price)
        return (self.config.temperature * combined).exp().clamp(max=self.config.weight_clip)

    def policy_loss(self, batch: Batch, weights: Tensor) -> Tensor:
        """-E w log pi(a|s)."""
        parameters = self.policy.distribution_parameters(batch.observations)
        return -(weights * self.policy.distribution.log_prob(parameters, batch.actions)).mean()

    def critic_loss(self, batch: Batch, next_actions: Tensor) -> Tensor:
        """Squared errors of all four critics, summed over them; a' (B, A) are the policy's."""
        with torch.no_grad():
            v = self.value(batch.next_observations)[0, :, 0]
            _, next_cost = self.slow_values(batch.next_observations, next_actions)
            ahead = self.config.discount * batch.masks
            reward, cost = batch.rewards + ahead * v, batch.costs + ahead * next_cost
        pairs = torch.cat([batch.observations, batch.actions], dim=1)
        errors = self.critics(pairs)[..., 0] - torch.stack([reward, reward, cost, cost])
        loss: Tensor = errors.square().mean(1).sum()
        return loss

    def _step(self, name: str, loss: Tensor) -> None:
        flat = self._flat[name]
        flat.set_gradients(torch.autograd.grad(loss, flat.parameters), math.inf)
        self.optimizers[name].step()

    def state_dict(self) -> dict[str, Any]:
        """Critics, their slow copies, optimisers and multiplier; the policy's weights are its own."""
        return {
            "value": self.value.state_dict(),
            "critics": self.critics.state_dict(),
            "slow_critics": self.slow_critics.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "multiplier": self.multiplier.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.value.load_state_dict(state["value"])
        self.critics.load_state_dict(state["critics"])
        self.slow_critics.load_state_dict(state["slow_critics"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.multiplier.load_state_dict(state["multiplier"])


def train(config: Config, run: Run) -> nn.Module:
    """Train IQL-Lag; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(
        config, run, lambda context: IQLLag(config, context), reward_scale=config.reward_scale
    )
