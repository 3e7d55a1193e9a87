"""The gradient step that SAC and TD3 share: stacked critics, delayed policy, slow targets, priced costs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saferl.agents.online.engine import Episodes, at_least
from saferl.agents.online.lagrangian import ConstrainedConfig, LagrangianConfig, PIDConfig
from saferl.agents.online.off_policy import Context, OffPolicyConfig
from saferl.agents.online.replay import Batch
from saferl.constraints import ConstraintSet, scalarise
from saferl.nn.batched import BatchedMLPs
from saferl.nn.distributions import Head
from saferl.nn.flat import FlatParameters
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class WarmUpConfig(ConstrainedConfig):
    """When the multipliers move; a mixin for the constrained learners' `Config`."""

    cost_window: int = 10
    """Finished episodes over which the mean cost is taken."""
    multiplier_warmup: int = 200_000
    """Environment steps before the multipliers move (OmniSafe: 100 epochs of 2,000)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("multiplier warmup", self.multiplier_warmup, 0)


@dataclass(frozen=True, kw_only=True)
class OffPolicyLagrangianConfig(WarmUpConfig, LagrangianConfig):
    """Hyperparameters of additive multipliers that move once an iteration.

    OmniSafe moves them at each gradient step with Adam at 1e-5, and the mean cost changes only when an
    episode ends; Adam's steps do not depend on the violation's size, so that is 2,000 x 1e-5 an iteration.
    """

    multiplier_lr: float = 0.02
    """Step size of the multipliers (OmniSafe's 1e-5 for each of 2,000 gradient steps)."""


@dataclass(frozen=True, kw_only=True)
class OffPolicyPIDConfig(WarmUpConfig, PIDConfig):
    """Gains of a PID controller that moves once an iteration.

    OmniSafe's controller moves at each gradient step with gains 1e-6, 1e-7 and 1e-7, smoothing over 20 and a
    derivative over 10 gradient steps. In an iteration of 2,000 its integral gains 2e-4 a unit of violation,
    smoothing is over and the derivative is that of an episode's end: these are the defaults here.
    """

    kp: float = 1e-6
    """Proportional gain."""
    ki: float = 2e-4
    """Integral gain (OmniSafe's 1e-7 for each of 2,000 gradient steps)."""
    kd: float = 1e-7
    """Derivative gain."""
    ema_p: float = 0.0
    """Smoothing of the proportional term."""
    ema_d: float = 0.0
    """Smoothing of the cost in the derivative term."""
    delay: int = 1
    """Updates over which the derivative is taken."""


class OffPolicyLearner(ABC):
    """An actor, S = 2 + K critics (twins of the reward, one a cost) and their multipliers.

    Every gradient step moves all critics on one sample,

        L = sum_i E (Q_i(s, a) - y_i)^2,

    and every `policy_delay`-th also the policy and the target networks. Critics are one stack, so that K
    costs pay for one network's calls. With multipliers lambda_k the policy descends

        (-J + sum_k lambda_k Q_k) / (1 + sum_k lambda_k),    J the unconstrained learner's objective.

    A subclass gives `targets`, `objective` and, if it has more of them, further networks.

    Args:
        config: see `OffPolicyConfig`.
        context: spaces, costs, device and generator.
        constraints: on the context's costs; none by default.
        warmup: environment steps before the multipliers move.
        head: of the actor.
        exploration_noise: of a deterministic actor.
    """

    def __init__(
        self,
        config: OffPolicyConfig,
        context: Context,
        *,
        constraints: ConstraintSet | None = None,
        warmup: int = 0,
        head: Head,
        exploration_noise: float = 0.0,
    ) -> None:
        self.config = config
        self.cost_names = context.cost_names
        self.generator = context.generator
        self.constraints = ConstraintSet([]) if constraints is None else constraints
        self.warmup = warmup
        self.actor = Actor(
            context.observation_space,
            context.action_space,
            hidden_sizes=config.hidden_sizes,
            activation=config.activation,
            normalise_observations=config.normalise_observations,
            head=head,
            exploration_noise=exploration_noise,
        ).to(context.device)
        self.critics = BatchedMLPs(
            2 + len(context.cost_names),
            self.actor.encoder.size + self.actor.distribution.action_size,
            config.hidden_sizes,
            activation=config.activation,
        ).to(context.device)
        self.networks = nn.ModuleDict({"actor": self.actor, "critics": self.critics})
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self._actor = FlatParameters(self.actor.network.parameters())
        self._critics = FlatParameters(self.critics.parameters(), stacked=True)
        self._target_critics = FlatParameters(self.target_critics.parameters(), stacked=True)
        self.actor_optimizer = torch.optim.Adam([self._actor.values], lr=config.actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam([self._critics.values], lr=config.critic_lr, fused=True)
        # Row 0 is the reward's, the others the costs', as in a batch's signals.
        self._discounts = torch.tensor(
            [config.discount] + [config.cost_discount] * len(self.cost_names), device=context.device
        )
        self.steps = 0
        """Gradient steps taken."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    # --- what a subclass gives --------------------------------------------------------------------

    @abstractmethod
    def next_values(self, next_features: Tensor) -> Tensor:
        """What is discounted into the targets: (1 + K, B) at normalised features (B, D), without gradient."""

    @abstractmethod
    def objective(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The objective J (B,) and the costs' values (K, B) at the policy's actions, with gradient."""

    @abstractmethod
    def after_policy_step(self) -> None:
        """Whatever else moves when the policy has."""

    # --- the gradient step ------------------------------------------------------------------------

    def update(self, batch: Batch) -> None:
        """Take one gradient step on the critics and, every `policy_delay`-th time, one on the policy."""
        self.steps += 1
        features = self.actor.normalise(batch.features)
        values, errors = self._errors(features, batch)
        squares = errors.square().mean(1)
        self._step(self.critic_optimizer, squares.sum(), self._critics)
        self._record("critics", torch.stack([squares.detach(), values.detach().mean(1)]))
        if self.steps % self.config.policy_delay == 0:
            loss = self.policy_loss(features)
            self._step(self.actor_optimizer, loss, self._actor)
            self._record("loss/policy", loss.detach())
            self.after_policy_step()
            self._target_critics.follow(self._critics, self.config.polyak)

    def targets(self, batch: Batch) -> Tensor:
        """y = signal + discount (1 - terminated) next value, (1 + K, B): the reward's and the costs'."""
        with torch.no_grad():
            following = self.next_values(self.actor.normalise(batch.next_features))
            going_on = self._discounts[:, None] * (1 - batch.terminated)
            return batch.signals.T + going_on * following

    def critic_loss(self, batch: Batch) -> Tensor:
        """Mean squared error, summed over the S critics."""
        return self._errors(self.actor.normalise(batch.features), batch)[1].square().mean(1).sum()

    def policy_loss(self, features: Tensor) -> Tensor:
        """(-J + sum_k lambda_k Q_k) / (1 + sum_k lambda_k), averaged over normalised features (B, D)."""
        objective, values = self.objective(features)
        costs = dict(zip(self.cost_names, values, strict=True))
        combined: Tensor = scalarise(objective, costs, self.constraints.multipliers, norm="sum")
        return -combined.mean()

    def _errors(self, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        targets = self.targets(batch)
        values = self.critics(torch.cat([features, batch.actions], dim=1))[..., 0]
        return values, values - torch.cat([targets[:1], targets])  # both twins have the reward's target

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor, flat: FlatParameters) -> None:
        # Asking for these gradients alone spares those of the critics in the policy's step.
        flat.set_gradients(torch.autograd.grad(loss, flat.parameters), self.config.max_grad_norm)
        optimizer.step()

    # --- iterations -------------------------------------------------------------------------------

    def end_iteration(self, episodes: Episodes, step: int) -> dict[str, float]:
        """Move the multipliers if episodes have ended since the last time; returns scalars to log."""
        if len(episodes) and len(self.constraints):
            self.constraints.observe({name: episodes.costs[name] for name in self.constraints.names})
            if step > self.warmup:
                self.constraints.update()
        return {**self.constraints.metrics(), **self._means()}

    def _record(self, name: str, values: Tensor) -> None:
        """Add to a sum that stays on the device until the iteration ends."""
        self._sums[name] = self._sums[name] + values if name in self._sums else values
        self._counts[name] = self._counts.get(name, 0) + 1

    def _means(self) -> dict[str, float]:
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        critics = means.pop("critics", None)
        metrics = {name: float(value) for name, value in means.items()}
        if critics is not None:
            losses, values = critics.tolist()
            metrics |= {"loss/value": sum(losses[:2]), "value/reward": sum(values[:2]) / 2}
            for k, name in enumerate(self.cost_names):
                metrics |= {f"loss/value/{name}": losses[2 + k], f"value/{name}": values[2 + k]}
        return metrics

    # --- state ------------------------------------------------------------------------------------

    def _stateful(self) -> Iterable[tuple[str, Any]]:
        """What has a `state_dict` of its own, the actor's weights left out."""
        return [
            ("critics", self.critics),
            ("target_critics", self.target_critics),
            ("actor_optimizer", self.actor_optimizer),
            ("critic_optimizer", self.critic_optimizer),
            ("constraints", self.constraints),
        ]

    def state_dict(self) -> dict[str, Any]:
        """Critics, targets, optimisers, multipliers and the count of steps."""
        return {"steps": self.steps, **{name: part.state_dict() for name, part in self._stateful()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.steps = int(state["steps"])
        for name, part in self._stateful():
            part.load_state_dict(dict(state[name]))
