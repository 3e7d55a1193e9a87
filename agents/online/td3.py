"""TD3: twin delayed deep deterministic policy gradient, the unconstrained baseline.

Fujimoto, van Hoof and Meger 2018, "Addressing Function Approximation Error in Actor-Critic Methods". The
equations stand in `saferl.agents.online.twin_delayed`: twin critics with smoothed targets, and a
deterministic policy that ascends the first critic at every second step. Costs are recorded and ignored.
Actions must be a bounded Box.

Hyperparameters are those of OmniSafe's published runs: rates 3e-4, 256-256 relu, batches of 256, 25,000
random steps, exploration noise 0.1, target noise 0.2 clipped at 0.5, policy and targets at every second
step. Each network's gradient is clipped on its own; OmniSafe clips the twins together. A loaded policy
asked for stochastic actions adds the exploration noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from saferl.agents.online.off_policy import Context, train_off_policy
from saferl.agents.online.twin_delayed import TwinDelayed, TwinDelayedConfig
from saferl.experiment.run import Run
from saferl.nn.models import Actor


@dataclass(frozen=True, kw_only=True)
class Config(TwinDelayedConfig):
    """TD3 has no hyperparameters beyond those of the twin delayed family."""


class TD3(TwinDelayed):
    """The twin delayed gradient step without constraints."""

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)


def train(config: Config, run: Run) -> Actor:
    """Train TD3; see `saferl.agents.online.off_policy.train_off_policy`."""
    return train_off_policy(config, run, lambda context: TD3(config, context))
