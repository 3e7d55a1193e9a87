"""Learners, attackers and language-policy wrappers on saferl's primitives."""

from __future__ import annotations

from typing import NamedTuple


class Learner(NamedTuple):
    """Where a learner lives: a module with `Config` and `train(config, run)`, imported when asked for."""

    module: str
    summary: str


LEARNERS: dict[str, Learner] = {
    "ppo": Learner("saferl.agents.online.ppo", "proximal policy optimisation, unconstrained (Schulman 2017)"),
    "ppo-lag": Learner("saferl.agents.online.ppo_lag", "PPO on the Lagrangian (Ray 2019)"),
    "cppo-pid": Learner(
        "saferl.agents.online.cppo_pid", "PPO with a PID-controlled multiplier (Stooke 2020)"
    ),
}
"""The learners of `saferl train`, by the name typed there."""
