"""SAC-Lag: soft actor-critic on the Lagrangian of a constrained problem.

Haarnoja, Zhou, Abbeel and Levine 2018 with the multipliers of Ray, Achiam and Amodei 2019, as in OmniSafe;
Ha, Xu, Tan, Levine and Tan 2020 is usually named for it (unverified). With one critic Q_k and one multiplier
lambda_k a cost, the policy descends

    E [alpha log pi(a|s) - min_i Q_i(s, a) + sum_k lambda_k Q_k(s, a)] / (1 + sum_k lambda_k)

while  Q_k  goes to  c_k + gamma_C (1 - terminated) Q'_k(s', a'), a' ~ pi, without the entropy, and  lambda_k
ascends  J_k - d_k, with J_k the mean undiscounted cost of the last `cost_window` episodes.

Defaults are those of OmniSafe's published runs (window of 10 episodes, multipliers at rest for 100 epochs of
2,000 steps, initially 0.001), with these departures:

* OmniSafe moves the multiplier at every gradient step, thousands of times on one stale mean; here it moves
  once an iteration, and only if an episode has ended since. `multiplier_lr` is 0.02 = 2,000 x 1e-5 to the
  same effect.
* OmniSafe's cost critic bootstraps from the policy's mode, ours from the policy's samples, whose cost is
  limited.
* OmniSafe divides costs by their running deviation on the velocity tasks; here costs keep their units.

Its runs on the navigation tasks (Goal, Circle) use alpha=1e-5, actor_lr=5e-6, critic_lr=1e-3,
multiplier_init=0, multiplier_lr=1e-3 (5e-7 a gradient step) and 3 million steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from saferl.agents.online.off_policy import Context, train_off_policy
from saferl.agents.online.off_policy_learner import OffPolicyLagrangianConfig
from saferl.agents.online.soft_actor_critic import SoftActorCritic, SoftConfig
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(OffPolicyLagrangianConfig, SoftConfig):
    """SAC's hyperparameters and those of the multipliers."""


class SACLag(SoftActorCritic):
    """The soft gradient step with priced costs; one multiplier step an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context, config.constraints(), config.multiplier_warmup)


def train(config: Config, run: Run) -> Actor:
    """Train SAC-Lag; see `saferl.agents.online.off_policy.train_off_policy`."""
    return train_off_policy(
        config, run, lambda context: SACLag(config, context), cost_limits(config.cost_limit)
    )
