"""FOCOPS: first-order constrained optimisation in policy space.

Zhang, Vuong and Ross 2020, "First Order Constrained Optimization in Policy Space". The optimal policy within
a KL ball and the constraints is known in closed form up to its multipliers nu_i and temperature lambda; a
parametric policy follows it by descending, sample by sample,

    L = mean_j [KL_j - rho_j A_j / lambda] 1[KL_j <= eta]
    KL_j = KL(pi(.|s_j) || pi_k(.|s_j)),    rho_j = pi(a_j|s_j) / pi_k(a_j|s_j),    A = A_R - sum_i nu_i A_C_i
    nu_i <- clip(nu_i + alpha (J_C_i - d_i), 0, nu_max)

with the multipliers moved first. The mask is each sample's own: one that has left the trust region stops
contributing, the others go on. Passes end as for PPO, when the mean KL exceeds `target_kl`.

Defaults of temperature, eta, alpha, nu_max and the initial nu = 0 are those of the authors' code, which also
standardises the advantages of reward and costs alike, without dividing by 1 + nu; so does this file (OmniSafe
only centres the costs', divides by 1 + nu, and moves nu by Adam, rate 0.035). The other defaults are those of
OmniSafe's first-order family; the authors collect 2048 steps, make 10 passes and start from a log standard
deviation of -0.5. J_C is the mean undiscounted episode cost, where the authors' code sums discounted costs.
With several limits every cost has its own multiplier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from saferl.advantages import standardise
from saferl.agents.online.engine import Context, Rollout, at_least, train_on_policy
from saferl.agents.online.first_order import FirstOrderConfig, FirstOrderUpdate, Minibatch
from saferl.agents.online.lagrangian import LagrangianConfig, update_multipliers
from saferl.constraints import scalarise
from saferl.errors import UsageError
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor
from saferl.nn.shapes import same_shape


@dataclass(frozen=True, kw_only=True)
class Config(LagrangianConfig, FirstOrderConfig):
    """FOCOPS's temperature and mask, its multipliers, and the first-order family's hyperparameters."""

    temperature: float = 1.5
    """Lambda: how much KL divergence an advantage is worth; a lower one makes bolder steps."""
    eta: float = 0.02
    """Samples whose KL divergence exceeds this are masked out."""
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
        at_least("eta", self.eta, 0)
        if not self.temperature > 0:
            raise UsageError(f"the temperature is {self.temperature:g}; it must be positive.")


def focops_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, kl: Tensor, temperature: float, eta: float
) -> Tensor:
    """FOCOPS's masked loss, to be minimised: mean [KL - rho A / temperature] 1[KL <= eta].

    All tensors have one shape (B,); `kl` is every sample's own, with gradient, and the mean is over all B.
    Raises `ValueError` on unequal shapes.
    """
    same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, kl=kl)
    ratio = (log_probs - old_log_probs).exp()
    inside = (kl.detach() <= eta).to(kl.dtype)
    return ((kl - ratio * advantages / temperature) * inside).mean()


class FOCOPS:
    """One multiplier step and one policy update an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.distribution = context.model.actor.distribution
        self.epochs = FirstOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        multipliers = update_multipliers(self.constraints, rollout)
        costs = {name: standardise(advantages) for name, advantages in rollout.cost_advantages.items()}
        advantages = scalarise(standardise(rollout.advantages), costs, multipliers, norm="none")
        losses = self.epochs.run(rollout, self._policy_loss(rollout, advantages), progress)
        return {**self.constraints.metrics(), **losses}

    def _policy_loss(self, rollout: Rollout, advantages: Tensor) -> Callable[[Minibatch], Tensor]:
        def policy_loss(batch: Minibatch) -> Tensor:
            return focops_loss(
                batch.log_probs,
                rollout.log_probs[batch.index],
                advantages[batch.index],
                self.distribution.kl(batch.parameters, rollout.parameters[batch.index]),
                self.config.temperature,
                self.config.eta,
            )

        return policy_loss

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state["epochs"])
        self.constraints.load_state_dict(state["constraints"])


def train(config: Config, run: Run) -> Actor:
    """Train FOCOPS; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(
        config, run, lambda context: FOCOPS(config, context), cost_limits(config.cost_limit)
    )
