"""TD3-Lag: twin delayed DDPG on the Lagrangian of a constrained problem.

Fujimoto, van Hoof and Meger 2018 with the multipliers of Ray, Achiam and Amodei 2019, as in OmniSafe. With
one critic Q_k and one multiplier lambda_k a cost,

    policy       descends  E [-Q_1(s, mu(s)) + sum_k lambda_k Q_k(s, mu(s))] / (1 + sum_k lambda_k)
    Q_k          ->        c_k + gamma_C (1 - terminated) Q'_k(s', a'),   a' the smoothed target action
    lambda_k     ascends   J_k - d_k, J_k the mean undiscounted cost of the last `cost_window` episodes

Episode costs are those of the exploring policy, noise included. Defaults are those of OmniSafe's published
runs (window of 10 episodes, multipliers at rest for 100 epochs of 2,000 steps, initially 0.001), with these
departures:

* OmniSafe moves the multiplier at every gradient step, thousands of times on one stale mean; here it moves
  once an iteration, and only if an episode has ended since. `multiplier_lr` is 0.02 = 2,000 x 1e-5 to the
  same effect.
* OmniSafe's cost critic bootstraps from the current policy's action without noise, ours from the action
  that the reward critics' target uses.
* OmniSafe divides costs by their running deviation on the velocity tasks; here costs keep their units.

Its runs on the navigation tasks (Goal, Circle) use actor_lr=5e-6, critic_lr=1e-3, multiplier_init=0,
multiplier_lr=1e-3 (5e-7 a gradient step) and 3 million steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from saferl.agents.online.off_policy import Context, train_off_policy
from saferl.agents.online.off_policy_learner import OffPolicyLagrangianConfig
from saferl.agents.online.twin_delayed import TwinDelayed, TwinDelayedConfig
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(OffPolicyLagrangianConfig, TwinDelayedConfig):
    """TD3's hyperparameters and those of the multipliers."""


class TD3Lag(TwinDelayed):
    """The twin delayed gradient step with priced costs; one multiplier step an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context, config.constraints(), config.multiplier_warmup)


def train(config: Config, run: Run) -> Actor:
    """Train TD3-Lag; see `saferl.agents.online.off_policy.train_off_policy`."""
    return train_off_policy(
        config, run, lambda context: TD3Lag(config, context), cost_limits(config.cost_limit)
    )
