"""Learners, attackers and language-policy wrappers on saferl's primitives."""

from __future__ import annotations

from typing import NamedTuple


class Learner(NamedTuple):
    """Where a learner lives: a module with `Config` and `train(config, run)`, imported when asked for."""

    module: str
    summary: str


def _offline(module: str, summary: str) -> Learner:
    return Learner(f"saferl.agents.offline.{module}", summary)


def _online(module: str, summary: str) -> Learner:
    return Learner(f"saferl.agents.online.{module}", summary)


LEARNERS: dict[str, Learner] = {
    "ppo": _online("ppo", "proximal policy optimisation, unconstrained (Schulman 2017)"),
    "ppo-lag": _online("ppo_lag", "PPO on the Lagrangian (Ray 2019)"),
    "cppo-pid": _online("cppo_pid", "PPO with a PID-controlled multiplier (Stooke 2020)"),
    "trpo": _online("trpo", "trust-region policy optimisation, unconstrained (Schulman 2015)"),
    "trpo-lag": _online("trpo_lag", "TRPO on the Lagrangian (Ray 2019)"),
    "trpo-pid": _online("trpo_pid", "TRPO with a PID-controlled multiplier (Stooke 2020)"),
    "rcpo": _online("rcpo", "natural gradient on the Lagrangian, no line search (Tessler 2019)"),
    "cpo": _online("cpo", "trust region with linearised constraints (Achiam 2017)"),
    "pcpo": _online("pcpo", "TRPO's step projected onto the constraints (Yang 2020)"),
    "focops": _online("focops", "first-order constrained optimisation in policy space (Zhang 2020)"),
    "cup": _online("cup", "PPO, then a projection onto the constraints (Yang 2022)"),
    "p3o": _online("p3o", "PPO with exact penalties (Zhang 2022)"),
    "ipo": _online("ipo", "PPO with a logarithmic barrier (Liu 2020)"),
    "ppo-saute": _online("ppo_saute", "PPO that sees its cost budget (Sootla 2022)"),
    "trpo-saute": _online("trpo_saute", "TRPO that sees its cost budget (Sootla 2022)"),
    "ppo-simmer": _online("ppo_simmer", "PPO-Saute with a budget that is let out step by step (Sootla 2022)"),
    "ppo-early-terminated": _online("ppo_early_terminated", "PPO, episodes end at the limit (Sun 2021)"),
    "trpo-early-terminated": _online("trpo_early_terminated", "TRPO, episodes end at the limit (Sun 2021)"),
    "crpo": _online("crpo", "a step on the reward or, beyond the limit, on the cost (Xu 2021)"),
    "sac": _online("sac", "soft actor-critic, unconstrained (Haarnoja 2018)"),
    "sac-lag": _online("sac_lag", "soft actor-critic on the Lagrangian (Ray 2019)"),
    "sac-pid": _online("sac_pid", "soft actor-critic with a PID-controlled multiplier (Stooke 2020)"),
    "td3": _online("td3", "twin delayed DDPG, unconstrained (Fujimoto 2018)"),
    "td3-lag": _online("td3_lag", "twin delayed DDPG on the Lagrangian (Ray 2019)"),
    "td3-pid": _online("td3_pid", "twin delayed DDPG with a PID-controlled multiplier (Stooke 2020)"),
    "carl": _online(
        "carl", "driving: PPO on gated route completion, scales with the mini-batch (Jaeger 2025)"
    ),
    "carl-lag": _online("carl_lag", "driving: CaRL's PPO with limits on infractions instead of gates"),
    "bc-all": _offline("bc_all", "offline: imitates all episodes"),
    "bc-safe": _offline("bc_safe", "offline: imitates the episodes within the limit (Liu 2023)"),
    "bc-frontier": _offline("bc_frontier", "offline: imitates the best episodes for their cost (Liu 2023)"),
    "bcq-lag": _offline(
        "bcq_lag", "offline: Q-learning over actions like the data's, priced (Fujimoto 2019)"
    ),
    "bear-lag": _offline("bear_lag", "offline: actor-critic on the data's support, priced (Kumar 2019)"),
    "cpq": _offline("cpq", "offline: Q-learning blind to unsafe and unknown actions (Xu 2022)"),
    "coptidice": _offline("coptidice", "offline: stationary distributions within the limit (Lee 2022)"),
    "iql-lag": _offline(
        "iql_lag", "offline: implicit Q-learning on the Lagrangian (ours, after Kostrikov 2022)"
    ),
    "cdt": _offline("cdt", "offline: a transformer told what to earn and what to spend (Liu 2023)"),
    "trebi": _offline("trebi", "offline: a diffusion planner told what it may spend (Lin 2023)"),
    "fisor": _offline("fisor", "offline: a diffusion policy guided by feasible regions (Zheng 2024)"),
}
"""The learners of `saferl train`, by the name typed there."""
