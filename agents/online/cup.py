"""CUP: constrained update projection.

Yang, Ji, Dai, Zhang, Zhou, Li, Yang and Pan 2022, "Constrained Update Projection Approach to Safe Policy
Optimization". Each iteration moves the multipliers, improves the policy, and projects it back:

    nu_i <- clip(nu_i + alpha (J_C_i - d_i), 0, nu_max)
    pi_k'   = argmax of PPO's clipped surrogate on A_R                                   (improvement)
    pi_k+1  = argmin E[KL(pi || pi_k') + sum_i nu_i c_i rho A_C_i],   c_i = (1 - gamma lambda) / (1 - gamma)

with gamma and lambda those of the costs and rho = pi / pi_k relative to the policy that collected the data in
both stages (the samples are its own). Stage 2 trains the policy alone. Each stage stops after a pass whose
mean KL exceeds `target_kl`, the second measured from pi_k': measured from pi_k, where stage 1 has used up
that distance, stage 2 would end after its first pass, and CUP would be PPO. Where all nu are 0, pi_k' is
the exact minimiser, so stage 2 is left out.

The multipliers' defaults (alpha 0.01, nu_max 2, nu = 0 at first) are those of the authors' code, which also
standardises the advantages of reward and costs alike; so does this file (OmniSafe only centres the costs' and
moves nu by Adam, rate 0.035). target_kl = 0.01 is OmniSafe's (the authors' is 0.02), as are the other
defaults. J_C is the mean undiscounted episode cost, where the authors' code sums discounted costs. With
several limits, every cost adds its own term to stage 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, train_on_policy
from saferl.agents.online.first_order import (
    FirstOrderConfig,
    FirstOrderUpdate,
    Minibatch,
    clipped_policy_loss,
)
from saferl.agents.online.lagrangian import LagrangianConfig, update_multipliers
from saferl.errors import UsageError
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor
from saferl.nn.shapes import same_shape


@dataclass(frozen=True, kw_only=True)
class Config(LagrangianConfig, FirstOrderConfig):
    """CUP's multipliers and the first-order family's hyperparameters, which hold for both stages."""

    target_kl: float = 0.01
    """Stop a stage after the pass at whose end the mean KL from the stage's first policy exceeds this."""
    multiplier_lr: float = 0.01
    """Step size of the multipliers."""
    multiplier_init: float = 0.0
    """Initial multipliers."""
    multiplier_max: float | None = 2.0
    """Upper bound on the multipliers."""
    multiplier_optimizer: Literal["adam", "sgd"] = "sgd"
    """adam ignores the size of the violation, sgd is proportional to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cost_discount == 1:
            raise UsageError("CUP weighs costs by 1 / (1 - cost_discount); use a cost discount below 1.")

    @property
    def cost_coefficient(self) -> float:
        """(1 - gamma lambda) / (1 - gamma), 5.95 for 0.99 and 0.95."""
        return (1 - self.cost_discount * self.cost_gae_lambda) / (1 - self.cost_discount)


def projection_loss(log_probs: Tensor, old_log_probs: Tensor, cost_advantages: Tensor, kl: Tensor) -> Tensor:
    """Stage 2's loss, to be minimised: mean [KL(pi || pi_k') + rho A_C].

    All tensors have one shape (B,): `old_log_probs` of the behaviour policy pi_k, `cost_advantages` summed
    over constraints with their weights nu_i c_i. Raises `ValueError` on unequal shapes.
    """
    same_shape(log_probs=log_probs, old_log_probs=old_log_probs, cost_advantages=cost_advantages, kl=kl)
    return (kl + (log_probs - old_log_probs).exp() * cost_advantages).mean()


class CUP:
    """One multiplier step, one PPO update on the reward and one projection an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.actor = context.model.actor
        self.epochs = FirstOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        multipliers = update_multipliers(self.constraints, rollout)
        improvement = clipped_policy_loss(rollout, standardise(rollout.advantages), self.config.clip)
        metrics = self.constraints.metrics() | self.epochs.run(rollout, improvement, progress)
        if not any(multipliers.values()):
            return metrics
        with torch.no_grad():
            improved = self.actor.distribution_parameters(rollout.features)
        loss = self._projection(rollout, improved, multipliers)
        done = self.epochs.run(rollout, loss, progress, reference=improved, train_critics=False)
        return metrics | {
            "loss/projection": done["loss/policy"],
            "policy/projection_kl": done["policy/kl"],
            "policy/projection_epochs": done["policy/epochs"],
            "policy/entropy": done["policy/entropy"],
        }

    def _projection(
        self, rollout: Rollout, improved: Tensor, multipliers: Mapping[str, float]
    ) -> Callable[[Minibatch], Tensor]:
        weighted = torch.zeros_like(rollout.advantages)
        for name, advantages in rollout.cost_advantages.items():
            weight = multipliers[name] * self.config.cost_coefficient
            weighted = weighted + weight * standardise(advantages)

        def policy_loss(batch: Minibatch) -> Tensor:
            kl = self.actor.distribution.kl(batch.parameters, improved[batch.index])
            old_log_probs = rollout.log_probs[batch.index]
            return projection_loss(batch.log_probs, old_log_probs, weighted[batch.index], kl)

        return policy_loss

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state["epochs"])
        self.constraints.load_state_dict(state["constraints"])


def train(config: Config, run: Run) -> Actor:
    """Train CUP; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: CUP(config, context), cost_limits(config.cost_limit))
