"""SAC: soft actor-critic, the unconstrained off-policy baseline with a stochastic policy.

Haarnoja, Zhou, Abbeel and Levine 2018, "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement
Learning with a Stochastic Actor". The equations stand in `saferl.agents.online.soft_actor_critic`:

    maximise  E sum_t gamma^t (r_t + alpha H(pi(.|s_t)))

with twin critics, a squashed Gaussian policy and slow target critics. Costs are recorded and ignored. Actions
must be a bounded Box.

Hyperparameters are those of OmniSafe's published runs: alpha fixed at 0.2, rates 3e-4, 256-256 relu,
batches of 256, 10,000 random steps, and as in its code a policy and target step at every second critic step
(the paper takes one at each: `policy_delay=1`). Its runs on the navigation tasks (Goal, Circle) use
alpha=1e-5, actor_lr=5e-6, critic_lr=1e-3 and 3 million steps. Each network's gradient is clipped on its
own; OmniSafe clips the twins together.
"""

from __future__ import annotations

from dataclasses import dataclass

from saferl.agents.online.off_policy import Context, train_off_policy
from saferl.agents.online.soft_actor_critic import SoftActorCritic, SoftConfig
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(SoftConfig):
    """SAC has no hyperparameters beyond those of the soft family."""


class SAC(SoftActorCritic):
    """The soft gradient step without constraints."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)


def train(config: Config, run: Run) -> Actor:
    """Train SAC; see `saferl.agents.online.off_policy.train_off_policy`."""
    return train_off_policy(config, run, lambda context: SAC(config, context))
