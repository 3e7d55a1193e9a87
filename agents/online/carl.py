"""CaRL: PPO on route completion behind gates, made for large mini-batches.

Jaeger et al. 2025, "CaRL: Learning Scalable Planning Policies with Simple Rewards", arXiv 2504.17838; what
follows is the published training code's (after CleanRL). The reward is the environment's
(`RouteDriving-v0?reward=carl`). With rho = pi / pi_old, A the advantage (standardised over the mini-batch
of all processes), R the target:

    L = - min(rho A, clip(rho, 1 -+ 0.1) A)
        + 0.5 * 0.5 max((V - R)^2, (V_old + clip(V - V_old, -+0.1) - R)^2) - 0.01 H(pi)

Adam with eps 1e-5, gradients clipped at norm 0.5, learning rate lr (1 - (u - 1) / U) at update u = 0 .. U -
1: the first is (1 + 1/U) times nominal, as published. The value clip is in units of the return, which goes
to 100. Training scales by the number of environments alone: 512 steps, 4 mini-batches and 3 epochs stay.

Defaults are those of the CARLA run of 300 million samples; `--preset 10m` is the published small one,
`--preset vector` ours for the vector observation on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saferl.agents.online.data_parallel import Context, MinibatchesOf, Rollout, train_data_parallel
from saferl.agents.online.large_batch import LargeBatchConfig, LargeBatchUpdate
from saferl.experiment.run import Run
from saferl.nn.driving import DrivingPolicy

PRESETS: dict[str, dict[str, Any]] = {
    "10m": {"num_envs": 8, "total_steps": 10_000_000},
    "vector": {"num_envs": 128, "steps": 128, "total_steps": 3_000_000},
}
DATA_PARALLEL = True


@dataclass(frozen=True, kw_only=True)
class Config(LargeBatchConfig):
    """CaRL's hyperparameters."""


class CaRL:
    """One PPO update an iteration."""

    def __init__(self, config: Config, context: Context) -> None:
        self.epochs = LargeBatchUpdate(config, context)

    def update(self, rollout: Rollout, iteration: int, minibatches: MinibatchesOf) -> dict[str, float]:
        return self.epochs.improve(rollout, rollout.advantages[:, 0], iteration, minibatches)

    def state_dict(self) -> dict[str, Any]:
        return self.epochs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs.load_state_dict(state)


def train(config: Config, run: Run) -> DrivingPolicy:
    """Train CaRL; see `saferl.agents.online.data_parallel.train_data_parallel`."""
    return train_data_parallel(config, run, lambda context: CaRL(config, context))
