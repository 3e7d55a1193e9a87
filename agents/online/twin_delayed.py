"""The gradient step of twin delayed DDPG, shared by TD3 and all that constrain it.

Fujimoto, van Hoof and Meger 2018, "Addressing Function Approximation Error in Actor-Critic Methods":

    a'  = clip(mu'(s') + clip(noise, -c, c), -1, 1),        noise ~ N(0, sigma^2)     (target smoothing)
    y_R = r + gamma (1 - terminated) min_i Q'_i(s', a')                              (twin critics)
    y_C = c + gamma_C (1 - terminated) Q'_C(s', a')
    J   = E Q_1(s, mu(s))                                                            (every second step)

mu' and Q' follow mu and Q slowly. The environments see clip(mu(s) + exploration noise, -1, 1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saferl.agents.online.engine import at_least
from saferl.agents.online.off_policy import Context, OffPolicyConfig
from saferl.agents.online.off_policy_learner import OffPolicyLearner
from saferl.constraints import ConstraintSet
from saferl.nn.flat import FlatParameters


@dataclass(frozen=True, kw_only=True)
class TwinDelayedConfig(OffPolicyConfig):
    """Hyperparameters of TD3; defaults are those of OmniSafe's published runs."""

    learning_starts: int = 25_000
    """Environment steps of uniformly random actions, an action for each environment, before learning."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on the actions taken, in units of half the action range."""
    policy_noise: float = 0.2
    """Standard deviation of the noise on the targets' actions, in the same units."""
    policy_noise_clip: float = 0.5
    """Bound on that noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("exploration_noise", "policy_noise", "policy_noise_clip"):
            at_least(name.replace("_", " "), getattr(self, name), 0)


class TwinDelayed(OffPolicyLearner):
    """See the module's docstring; the constraints' part is `OffPolicyLearner`'s."""

    def __init__(
        self,
        config: TwinDelayedConfig,
        context: Context,
        constraints: ConstraintSet | None = None,
        warmup: int = 0,
    ) -> None:
        super().__init__(
            config,
            context,
            constraints=constraints,
            warmup=warmup,
            head="deterministic",
            exploration_noise=config.exploration_noise,
        )
        self.policy_noise, self.policy_noise_clip = config.policy_noise, config.policy_noise_clip
        self.target_network = copy.deepcopy(self.actor.network).requires_grad_(False)
        self._target_actor = FlatParameters(self.target_network.parameters())

    def next_values(self, next_features: Tensor) -> Tensor:
        actions = self.target_network(next_features).tanh()
        noise = torch.randn(actions.shape, generator=self.generator, device=actions.device)
        noise = (self.policy_noise * noise).clamp(-self.policy_noise_clip, self.policy_noise_clip)
        smoothed = (actions + noise).clamp(-1.0, 1.0)
        values = self.target_critics(torch.cat([next_features, smoothed], dim=1))[..., 0]
        return torch.cat([torch.minimum(values[:1], values[1:2]), values[2:]])

    def objective(self, features: Tensor) -> tuple[Tensor, Tensor]:
        distribution = self.actor.distribution
        actions = distribution.mode(self.actor.distribution_parameters(features))
        # The second critic has no part in the policy's step.
        rows = [0, *range(2, len(self.critics))]
        values = self.critics(torch.cat([features, actions], dim=1), rows)[..., 0]
        return values[0], values[1:]

    def after_policy_step(self) -> None:
        self._target_actor.follow(self._actor, self.config.polyak)

    def _stateful(self) -> Iterable[tuple[str, Any]]:
        return [*super()._stateful(), ("target_network", self.target_network)]
