"""What the constrained methods share: limits, multipliers with their hyperparameters, the advantage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from saferl.advantages import centre, standardise
from saferl.agents.online.engine import Rollout
from saferl.constraints import (
    AdditiveMultiplier,
    Constraint,
    ConstraintSet,
    FixedMultiplier,
    Multiplier,
    PIDMultiplier,
    WindowEstimator,
    scalarise,
)
from saferl.experiment.config import CostLimit, cost_limits


@dataclass(frozen=True, kw_only=True)
class ConstrainedConfig:
    """Limits and how the episode costs held against them are estimated; a mixin for a learner's `Config`."""

    cost_limit: CostLimit = 25.0
    """Limit on the mean episode cost: a number, or one for every named cost (hazards=10,vases_contact=5)."""
    cost_window: int = 100
    """Finished episodes over which the mean cost is taken."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the learner's own base comes next
        cost_limits(self.cost_limit)

    def _constraints(self, multiplier: Mapping[str, Multiplier]) -> ConstraintSet:
        return ConstraintSet(
            Constraint(name, limit, estimator=WindowEstimator(self.cost_window), multiplier=multiplier[name])
            for name, limit in cost_limits(self.cost_limit).items()
        )


@dataclass(frozen=True, kw_only=True)
class UnpricedConfig(ConstrainedConfig):
    """Limits that a method holds by other means than a multiplier."""

    def constraints(self) -> ConstraintSet:
        """One constraint a limit, without a price: they are observed."""
        return self._constraints({name: FixedMultiplier(0.0) for name in cost_limits(self.cost_limit)})


@dataclass(frozen=True, kw_only=True)
class LagrangianConfig(ConstrainedConfig):
    """Hyperparameters of additive multipliers; defaults are those of OmniSafe's published runs."""

    multiplier_lr: float = 0.035
    """Step size of the multipliers."""
    multiplier_init: float = 0.001
    """Initial multipliers."""
    multiplier_max: float | None = None
    """Upper bound on the multipliers."""
    multiplier_optimizer: Literal["adam", "sgd"] = "adam"
    """adam ignores the size of the violation, sgd is proportional to it."""

    def constraints(self) -> ConstraintSet:
        """One constraint a limit, each with a multiplier of its own."""
        return self._constraints(
            {
                name: AdditiveMultiplier(
                    lr=self.multiplier_lr,
                    init=self.multiplier_init,
                    maximum=self.multiplier_max,
                    optimizer=self.multiplier_optimizer,
                )
                for name in cost_limits(self.cost_limit)
            }
        )


@dataclass(frozen=True, kw_only=True)
class PIDConfig(ConstrainedConfig):
    """Gains of the PID controller of Stooke et al. 2020; defaults are those of OmniSafe's published runs."""

    kp: float = 0.1
    """Proportional gain."""
    ki: float = 0.01
    """Integral gain."""
    kd: float = 0.01
    """Derivative gain."""
    ema_p: float = 0.95
    """Smoothing of the proportional term."""
    ema_d: float = 0.95
    """Smoothing of the cost in the derivative term."""
    delay: int = 10
    """Updates over which the derivative is taken."""
    multiplier_init: float = 0.001
    """Initial value of the integral term."""

    def constraints(self) -> ConstraintSet:
        """One constraint a limit, each with a controller of its own."""
        return self._constraints(
            {
                name: PIDMultiplier(
                    kp=self.kp,
                    ki=self.ki,
                    kd=self.kd,
                    ema_p=self.ema_p,
                    ema_d=self.ema_d,
                    delay=self.delay,
                    init=self.multiplier_init,
                )
                for name in cost_limits(self.cost_limit)
            }
        )


def update_multipliers(constraints: ConstraintSet, rollout: Rollout) -> dict[str, float]:
    """Show every constraint the rollout's finished episodes and move its multiplier; returns them by name."""
    constraints.observe({c.name: rollout.episodes.costs[c.name] for c in constraints})
    return constraints.update()


def observe_costs(constraints: ConstraintSet, rollout: Rollout) -> dict[str, float]:
    """Show unpriced constraints the rollout's finished episodes; returns their metrics."""
    constraints.observe({c.name: rollout.episodes.costs[c.name] for c in constraints})
    return {name: value for name, value in constraints.metrics().items() if not name.endswith("/multiplier")}


class StepExcess:
    """By how much the mean cost of a step exceeds the limit's: (J_C - d + margin) / (episode length).

    A surrogate's gradient is that of a mean over steps, so the violation that a step is to mend must be in
    the same units. Without new episodes the last estimates count again. A linearised constraint that is met
    on paper may stay exceeded in fact, update after update; the margin (safety-starter-agents) then grows,

        margin <- max(0, margin + margin_lr (J_C - d)),

    until it is met in fact.

    Args:
        margin_lr: rate of the margins; 0 for none.
    """

    def __init__(self, margin_lr: float = 0.0) -> None:
        self.margin_lr = margin_lr
        self.margins: dict[str, float] = {}
        self.episode_length: float | None = None

    def __call__(self, constraints: ConstraintSet, rollout: Rollout) -> dict[str, float]:
        """Move the margins; returns the excess by cost, of every constraint that has been observed."""
        if len(rollout.episodes):
            self.episode_length = float(rollout.episodes.lengths.mean())
        if self.episode_length is None:
            return {}
        excess = {}
        for c in constraints:
            if c.estimate is not None:
                moved = self.margins.get(c.name, 0.0) + self.margin_lr * c.violation
                self.margins[c.name] = max(0.0, moved)
                excess[c.name] = (c.violation + self.margins[c.name]) / self.episode_length
        return excess

    def metrics(self) -> dict[str, float]:
        """The margins, where there are any."""
        if not self.margin_lr:
            return {}
        return {f"constraint/{name}/margin": margin for name, margin in self.margins.items()}

    def state_dict(self) -> dict[str, Any]:
        """The margins and the last mean episode length."""
        return {"margins": dict(self.margins), "episode_length": self.episode_length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.margins = {name: float(value) for name, value in state["margins"].items()}
        self.episode_length = state["episode_length"]


def lagrangian_advantages(rollout: Rollout, multipliers: Mapping[str, float]) -> Tensor:
    """(A_R - sum_i lambda_i A_C_i) / (1 + sum_i lambda_i), shape (B,).

    The reward's advantage is standardised; a cost's is only centred, since its scale carries the
    constraint's units (OmniSafe, safety-starter-agents).
    """
    combined: Tensor = scalarise(
        standardise(rollout.advantages),
        {name: centre(advantages) for name, advantages in rollout.cost_advantages.items()},
        multipliers,
        norm="sum",
    )
    return combined
