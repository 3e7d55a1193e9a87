"""SAC-PID: soft actor-critic on a Lagrangian whose multipliers are PID controllers.

Stooke, Achiam and Abbeel 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods",
applied to SAC as in OmniSafe. Once an iteration, if an episode has ended since, with delta = J_C - d,

    I <- max(0, I + ki delta)
    P <- ema_p P + (1 - ema_p) delta
    C <- ema_d C + (1 - ema_d) J_C,    D = max(0, C - C[delay iterations ago])
    lambda = max(0, kp P + I + kd D)

and the policy descends

    E [alpha log pi(a|s) - min_i Q_i(s, a) + sum_k lambda_k Q_k(s, a)] / (1 + sum_k lambda_k).

Defaults are those of OmniSafe's published runs (actor_lr 1e-4, window of 10 episodes, 100 epochs of 2,000
steps at rest). Its controller moves at every gradient step on a stale mean; what its gains come to in an
iteration of 2,000 gradient steps is set here, see `OffPolicyPIDConfig`: next to pure integral control. The
gains of the navigation tasks (Goal, Circle) come to kp=5e-7, ki=2e-5, kd=1e-8, with alpha=1e-5,
actor_lr=5e-6, critic_lr=1e-3 and 3 million steps. The other departures are those of
`saferl.agents.online.sac_lag`.
"""

from __future__ import annotations

from dataclasses import dataclass

from saferl.agents.online.off_policy import Context, train_off_policy
from saferl.agents.online.off_policy_learner import OffPolicyPIDConfig
from saferl.agents.online.soft_actor_critic import SoftActorCritic, SoftConfig
from saferl.experiment.config import cost_limits
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(OffPolicyPIDConfig, SoftConfig):
    """SAC's hyperparameters and the controllers' gains."""

    actor_lr: float = 1e-4
    """Adam's learning rate for the policy."""


class SACPID(SoftActorCritic):
    """The soft gradient step with priced costs; one controller step an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context, config.constraints(), config.multiplier_warmup)


def train(config: Config, run: Run) -> Actor:
    """Train SAC-PID; see `saferl.agents.online.off_policy.train_off_policy`."""
    return train_off_policy(
        config, run, lambda context: SACPID(config, context), cost_limits(config.cost_limit)
    )
