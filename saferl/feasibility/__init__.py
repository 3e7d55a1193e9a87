"""Feasible regions: where a hard constraint can be kept for ever, learned from data or computed exactly."""

from saferl.feasibility.grid import (
    exact_safety_values,
    expectile,
    expectile_safety_values,
    largest_feasible_region,
    solve_on_grid,
)
from saferl.feasibility.reachability import (
    constraint_signal,
    cost_targets,
    expectile_loss,
    feasibility_weights,
    feasible_first,
    horizon_of_signal,
    least_risk,
    safety_targets,
    signal_for_horizon,
)

__all__ = [
    "constraint_signal",
    "cost_targets",
    "exact_safety_values",
    "expectile",
    "expectile_loss",
    "expectile_safety_values",
    "feasibility_weights",
    "feasible_first",
    "horizon_of_signal",
    "largest_feasible_region",
    "least_risk",
    "safety_targets",
    "signal_for_horizon",
    "solve_on_grid",
]
