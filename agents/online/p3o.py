"""P3O: penalised proximal policy optimisation.

Zhang, Shen, Yang, Chen, Yuan, Wang and Tao 2022, "Penalized Proximal Policy Optimization for Safe
Reinforcement Learning". Constraints enter PPO's loss as exact penalties, which act only where the linearised
constraint is broken, so that a finite kappa is enough:

    L = -E min(rho A_R, clip(rho) A_R) + sum_i kappa max(0, S_i + (1 - gamma) (J_C_i - d_i))
    S_i = E max(rho A_C_i, clip(rho) A_C_i),    clip(rho) = clip(rho, 1 - eps, 1 + eps)

(1 - gamma) brings the violation of a whole episode to the units of S, an expectation over steps: an episode
cost discounted by gamma changes by S / (1 - gamma). Without it (OmniSafe) the sign of J_C - d alone decides,
and the penalty is on or off whatever the step does. J_C is the mean undiscounted episode cost here; the scale
is then exact for episodes of about 1 / (1 - gamma) steps and too strong for longer ones, on both sides of the
limit. kappa = 20 and 10 passes are OmniSafe's; whether the paper's runs used this kappa is unverified.

A_R is standardised, A_C centred over the rollout. A mini-batch's S is taken relative to its value at rho = 1,
the mean of the mini-batch's A_C, which is 0 in expectation: with 64 samples that mean is noise larger than
the violation, and since max(0, .) is convex it would act as a penalty of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saferl.advantages import centre, standardise
from saferl.agents.online.engine import Context, Rollout, at_least, train_on_policy
from saferl.agents.online.first_order import (
    FirstOrderConfig,
    FirstOrderUpdate,
    Minibatch,
    clipped_policy_loss,
)
from saferl.agents.online.lagrangian import ConstrainedConfig, update_multipliers
from saferl.constraints import ConstraintSet, FixedMultiplier
from saferl.errors import UsageError
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.losses import clipped_surrogate
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(ConstrainedConfig, FirstOrderConfig):
    """P3O's penalty factor and the first-order family's hyperparameters."""

    kappa: float = 20.0
    """Penalty factor; it must exceed the multiplier of the constrained optimum."""
    epochs: int = 10
    """Passes over the rollout, fewer when `target_kl` is exceeded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("kappa", self.kappa, 0)
        if self.cost_discount == 1:
            raise UsageError("P3O scales violations by 1 - cost_discount; use a cost discount below 1.")

    def constraints(self) -> ConstraintSet:
        """One constraint a limit, each priced at kappa."""
        return self._constraints({name: FixedMultiplier(self.kappa) for name in cost_limits(self.cost_limit)})


def exact_penalty(surrogate: Tensor, violation: float, discount: float, kappa: float) -> Tensor:
    """kappa max(0, S + (1 - discount) violation), a scalar with the gradient of the surrogate S."""
    return kappa * (surrogate + (1 - discount) * violation).relu()


class P3O:
    """One PPO update with penalties an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.epochs = FirstOrderUpdate(config, context)
        self.constraints = config.constraints()

    def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
        update_multipliers(self.constraints, rollout)
        losses = self.epochs.run(rollout, self._policy_loss(rollout), progress)
        return {**self.constraints.metrics(), **losses}

    def _policy_loss(self, rollout: Rollout) -> Callable[[Minibatch], Tensor]:
        config = self.config
        reward_loss = clipped_policy_loss(rollout, standardise(rollout.advantages), config.clip)
        # A constraint of which nothing is known yet, since no episode has finished, is left out.
        penalised = [
            (centre(rollout.cost_advantages[c.name]), c.violation)
            for c in self.constraints
            if c.estimate is not None
        ]

        def policy_loss(batch: Minibatch) -> Tensor:
            loss = reward_loss(batch)
            for advantages, violation in penalised:
                sampled = advantages[batch.index]
                # PPO's pessimistic loss of -A_C is max(rho A_C, clip(rho) A_C).
                surrogate, _ = clipped_surrogate(
                    batch.log_probs, rollout.log_probs[batch.index], -sampled, config.clip
                )
                loss = loss + exact_penalty(
                    surrogate - sampled.mean(), violation, config.cost_discount, config.kappa
                )
            return loss

        return policy_loss

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs.state_dict(), "constraints": self.constraints.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state["epochs"])
        self.constraints.load_state_dict(state["constraints"])


def train(config: Config, run: Run) -> Actor:
    """Train P3O; see `saferl.agents.online.engine.train_on_policy`."""
    return train_on_policy(config, run, lambda context: P3O(config, context), cost_limits(config.cost_limit))
