"""How far apart are two rewards? STARC metrics on tables, from samples, and for reward models.

`starc_distance` compares rewards of a known process exactly, `saferl.starc.sampled` from transitions and
`saferl.starc.bandit` reward models on prompts and responses; `saferl.starc.regret` says what that costs.
"""

from saferl.starc.canonical import CANONICALIZATIONS, Canonicalization, Canonicalizer
from saferl.starc.distance import NORMS, Metric, Norm, distance_matrix, norm_of, standardize, starc_distance
from saferl.starc.regret import (
    average_regret,
    optimal_policy,
    policy_return,
    policy_values,
    regret,
    regret_bound,
    soundness_constant,
    worst_case_regret,
)
from saferl.starc.tabular import PolicySolver, TabularMDP

__all__ = [
    "CANONICALIZATIONS",
    "NORMS",
    "Canonicalization",
    "Canonicalizer",
    "Metric",
    "Norm",
    "PolicySolver",
    "TabularMDP",
    "average_regret",
    "distance_matrix",
    "norm_of",
    "optimal_policy",
    "policy_return",
    "policy_values",
    "regret",
    "regret_bound",
    "soundness_constant",
    "standardize",
    "starc_distance",
    "worst_case_regret",
]
