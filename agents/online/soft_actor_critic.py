"""The gradient step of soft actor-critic, shared by SAC and all that constrain it.

Haarnoja, Zhou, Abbeel and Levine 2018, "Soft Actor-Critic" and "Soft Actor-Critic Algorithms and
Applications":

    y_R = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s')),    a' ~ pi(.|s')
    y_C = c + gamma_C (1 - terminated) Q'_C(s', a')                                  (no entropy in a cost)
    J   = E [min_i Q_i(s, a) - alpha log pi(a|s)],                                   a ~ pi(.|s)

with alpha fixed, or moved so that the policy's entropy comes to a target:

    log alpha descends  -log alpha E [log pi(a|s) + target entropy]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saferl.agents.online.engine import at_least
from saferl.agents.online.off_policy import Context, OffPolicyConfig
from saferl.agents.online.off_policy_learner import OffPolicyLearner
from saferl.constraints import ConstraintSet
from saferl.errors import UsageError
from saferl.nn.distributions import SquashedGaussianActions


@dataclass(frozen=True, kw_only=True)
class SoftConfig(OffPolicyConfig):
    """Hyperparameters of soft actor-critic; defaults are those of OmniSafe's published runs."""

    alpha: float = 0.2
    """Weight of the policy's entropy; with `auto_alpha` where it starts."""
    auto_alpha: bool = False
    """Move alpha towards the target entropy."""
    target_entropy: float | None = None
    """Entropy that `auto_alpha` seeks; minus the number of action dimensions by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("alpha", self.alpha, 0)
        if self.auto_alpha and self.alpha == 0:
            raise UsageError("alpha is 0, where its logarithm cannot move; start auto_alpha above 0.")


class SoftActorCritic(OffPolicyLearner):
    """See the module's docstring; the constraints' part is `OffPolicyLearner`'s."""

    def __init__(
        self,
        config: SoftConfig,
        context: Context,
        constraints: ConstraintSet | None = None,
        warmup: int = 0,
    ) -> None:
        super().__init__(config, context, constraints=constraints, warmup=warmup, head="squashed")
        self.auto_alpha = config.auto_alpha
        dimensions = self.actor.distribution.action_size
        self.target_entropy = -dimensions if config.target_entropy is None else config.target_entropy
        start = math.log(config.alpha) if config.alpha > 0 else -math.inf
        self.log_alpha = torch.tensor([start], device=context.device, requires_grad=config.auto_alpha)
        # OmniSafe and Stable-Baselines3 move alpha at the critics' rate.
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=config.critic_lr)
        self.alpha = self.log_alpha.detach().exp()
        self._log_probs: Tensor

    def act(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled actions (B, A) and their log-density (B,), with gradient."""
        distribution = self.actor.distribution
        assert isinstance(distribution, SquashedGaussianActions)
        parameters = self.actor.distribution_parameters(features)
        return distribution.sample_with_log_prob(parameters, self.generator)

    def next_values(self, next_features: Tensor) -> Tensor:
        actions, log_probs = self.act(next_features)
        values = self.target_critics(torch.cat([next_features, actions], dim=1))[..., 0]
        soft = torch.minimum(values[0], values[1]) - self.alpha * log_probs
        return torch.cat([soft[None], values[2:]])

    def objective(self, features: Tensor) -> tuple[Tensor, Tensor]:
        actions, log_probs = self.act(features)
        self._log_probs = log_probs.detach()
        values = self.critics(torch.cat([features, actions], dim=1))[..., 0]
        return torch.minimum(values[0], values[1]) - self.alpha * log_probs, values[2:]

    def after_policy_step(self) -> None:
        self._record("policy/entropy", -self._log_probs.mean())
        self._record("policy/alpha", self.alpha)
        if self.auto_alpha:
            gap = (self._log_probs + self.target_entropy).mean()
            self.log_alpha.grad = -gap[None]
            self.alpha_optimizer.step()
            self.alpha = self.log_alpha.detach().exp()

    def _stateful(self) -> Iterable[tuple[str, Any]]:
        return [*super()._stateful(), ("alpha_optimizer", self.alpha_optimizer)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "log_alpha": self.log_alpha.detach()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self.alpha = self.log_alpha.detach().exp()
