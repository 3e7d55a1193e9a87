"""Constraints for agents and language policies alike: arrays in, numbers out, no environment.

An `Estimator` turns observed costs into an estimate, a `Multiplier` turns its violation into a price, a
`Constraint` joins them with a limit, and `scalarise` applies the prices. Confidence bounds and the one-shot
`SafetyTest` say whether a policy may be used; `CostBudget` is a constraint on every single episode.
"""

from saferl.constraints.bounds import (
    METHODS,
    bootstrap_bound,
    clopper_pearson_bound,
    empirical_bernstein_bound,
    hoeffding_bound,
    student_t_bound,
    upper_bound,
)
from saferl.constraints.budget import CostBudget, discounted_limit
from saferl.constraints.constraint import Constraint, ConstraintSet
from saferl.constraints.estimators import (
    BatchEstimator,
    EMAEstimator,
    Estimate,
    Estimator,
    UpperBoundEstimator,
    WindowEstimator,
)
from saferl.constraints.multipliers import (
    AdditiveMultiplier,
    AugmentedLagrangianMultiplier,
    FixedMultiplier,
    LogMultiplier,
    Multiplier,
    PIDMultiplier,
    ProportionalMultiplier,
    SoftplusMultiplier,
)
from saferl.constraints.safety_test import NO_SOLUTION, PASS, SafetyTest, TestResult
from saferl.constraints.scalarise import scalarise

__all__ = [
    "METHODS",
    "NO_SOLUTION",
    "PASS",
    "AdditiveMultiplier",
    "AugmentedLagrangianMultiplier",
    "BatchEstimator",
    "Constraint",
    "ConstraintSet",
    "CostBudget",
    "EMAEstimator",
    "Estimate",
    "Estimator",
    "FixedMultiplier",
    "LogMultiplier",
    "Multiplier",
    "PIDMultiplier",
    "ProportionalMultiplier",
    "SafetyTest",
    "SoftplusMultiplier",
    "TestResult",
    "UpperBoundEstimator",
    "WindowEstimator",
    "bootstrap_bound",
    "clopper_pearson_bound",
    "discounted_limit",
    "empirical_bernstein_bound",
    "hoeffding_bound",
    "scalarise",
    "student_t_bound",
    "upper_bound",
]
