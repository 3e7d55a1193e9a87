"""What the learners share that hold a limit in every episode through the environment, not through a price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gymnasium.vector import VectorEnv

from saferl.agents.online.lagrangian import UnpricedConfig
from saferl.envs.wrappers import EarlyTermination, Saute
from saferl.errors import UsageError
from saferl.experiment.config import cost_limits


@dataclass(frozen=True, kw_only=True)
class SauteConfig(UnpricedConfig):
    """Hyperparameters of the cost budgets that the policy sees; defaults are those of OmniSafe."""

    saute_discount: float = 0.999
    """Discount of the costs in the budgets; OmniSafe's navigation runs use 0.9999."""
    unsafe_reward: float = -1.0
    """Reward of a step after which a budget is spent; OmniSafe's navigation runs use -0.2."""
    horizon: int | None = None
    """Steps of an episode; the environment's own when left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.saute_discount <= 1:
            raise UsageError(f"saute_discount is {self.saute_discount:g}; it must be above 0 and at most 1.")
        if self.horizon is not None and self.horizon < 1:
            raise UsageError(f"the horizon is {self.horizon}; an episode has at least one step.")
        for name, limit in cost_limits(self.cost_limit).items():
            if not limit > 0:
                raise UsageError(
                    f"the budget of the cost {name!r} is {limit:g}; it must be positive (try a tiny one)."
                )


def saute(config: SauteConfig, start: float = 1.0) -> Callable[[VectorEnv], VectorEnv]:
    """The wrapper that shows the policy its budgets, which start at this share of the limits."""

    def wrap(env: VectorEnv) -> VectorEnv:
        return Saute(
            env,
            cost_limits(config.cost_limit),
            discount=config.saute_discount,
            horizon=config.horizon,
            unsafe_reward=config.unsafe_reward,
            start=start,
        )

    return wrap


def early_termination(config: UnpricedConfig) -> Callable[[VectorEnv], VectorEnv]:
    """The wrapper that ends an episode when its cost exceeds a limit."""
    return lambda env: EarlyTermination(env, cost_limits(config.cost_limit))
