"""Hamilton-Jacobi reachability in data: targets, regressions, regions and weights of FISOR.

A state constraint h(s) <= 0 is kept for ever from s by some policy if and only if

    V_h(s) = min over policies of max over t of h(s_t)  <=  0,        Q_h(s, a) the same with a_0 = a,

and {s : V_h(s) <= 0} is the largest feasible region (Zheng et al. 2024, "Safe Offline Reinforcement Learning
with Feasibility-Guided Diffusion Model"; equations read in its code, the paper's text unverified). All
functions are pure, elementwise in their tensors and know neither networks nor environments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saferl.nn.shapes import same_shape

__all__ = [
    "constraint_signal",
    "cost_targets",
    "expectile_loss",
    "feasibility_weights",
    "feasible_first",
    "horizon_of_signal",
    "least_risk",
    "safety_targets",
    "signal_for_horizon",
]


def constraint_signal(costs: Tensor, violation: float = 25.0, threshold: float = 0.0) -> Tensor:
    """The constraint h of data that records costs only: `violation` where cost > threshold, else -1.

    Costs of any shape, which the result shares, in the costs' dtype. 25 is FISOR's `cost_scale`;
    `signal_for_horizon` says what another value means. Raises `ValueError` unless violation > 0.
    """
    if not violation > 0:
        raise ValueError(f"violation is {violation}; a violated constraint must have h > 0.")
    return torch.where(costs > threshold, violation, -1.0).to(costs.dtype)


def signal_for_horizon(steps: float, discount: float) -> float:
    """The `violation` whose shadow is `steps` long: discount**-steps - 1.

    With h = -1 before and c from the violation on, a state k steps before an unavoidable violation has the
    value V = -1 + (c + 1) discount**k, which is positive for k < steps. FISOR's 25 at 0.99 reaches 324 steps.
    Raises `ValueError` unless steps > 0 and 0 < discount < 1.
    """
    _check_discount(discount)
    if not steps > 0:
        raise ValueError(f"the horizon is {steps} steps; it must be positive.")
    return math.expm1(-steps * math.log(discount))


def horizon_of_signal(violation: float, discount: float) -> float:
    """Steps before an unavoidable violation from which a state's value is positive: inverse of the above."""
    _check_discount(discount)
    if not violation > 0:
        raise ValueError(f"violation is {violation}; a violated constraint must have h > 0.")
    return -math.log1p(violation) / math.log(discount)


def safety_targets(signals: Tensor, next_values: Tensor, masks: Tensor, discount: float) -> Tensor:
    """Targets of Q_h: the discounted safety Bellman operator, a contraction by `discount`.

        y = m [(1 - gamma) h + gamma max(h, V_h(s'))] + (1 - m) h

    `signals` h(s) of the transition's own state, `next_values` V_h(s') and `masks` m (1 where the episode
    goes on) have one shape. y >= h, and y is monotone in both. Raises `ValueError` on unequal shapes.
    Fisac et al. 2019, equation 6 (unverified); FISOR's code.
    """
    same_shape(signals=signals, next_values=next_values, masks=masks)
    ahead = (1 - discount) * signals + discount * torch.maximum(signals, next_values)
    return torch.where(masks.bool(), ahead, signals)


def cost_targets(costs: Tensor, next_values: Tensor, masks: Tensor, discount: float) -> Tensor:
    """Targets of the ablation that sums costs instead of looking for their maximum: c + gamma m V_c(s').

    A state is then feasible where V_c does not exceed `saferl.constraints.discounted_limit`, which is
    subtracted from V_c and Q_c before `feasibility_weights` sees them. Same shapes; raises `ValueError`
    otherwise. FISOR's critic type "qc".
    """
    same_shape(costs=costs, next_values=next_values, masks=masks)
    return costs + discount * masks * next_values


def expectile_loss(values: Tensor, targets: Tensor, expectile: float, *, reverse: bool = False) -> Tensor:
    """Mean of |tau - 1[u < 0]| u^2 with u = targets - values; `reverse` takes 1[u > 0] instead.

    With tau near 1 the values go to the upper end of their targets (the best return of the data's actions,
    Kostrikov et al. 2022, equation 5), with `reverse` to the lower one (the least risk). Same shapes; the
    gradient goes into both. Raises `ValueError` on unequal shapes.
    """
    same_shape(values=values, targets=targets)
    errors = targets - values
    favoured = errors < 0 if reverse else errors > 0
    squares = errors.square()
    return torch.where(favoured, expectile * squares, (1 - expectile) * squares).mean()


def feasibility_weights(
    state_risk: Tensor,
    action_risk: Tensor,
    advantages: Tensor,
    *,
    risk_temperature: float = 5.0,
    reward_temperature: float = 3.0,
    risk_clip: float = 150.0,
    reward_clip: float = 100.0,
    floor: float = 0.0,
) -> Tensor:
    """Weights of a weighted regression that seeks reward where it is safe, and safety where it is not.

        v_h > 0:               clip(exp(alpha_c (v_h - q_h)), floor, risk_clip)
        v_h <= 0, q_h <= 0:    min(exp(alpha_r A), reward_clip)
        v_h <= 0, q_h > 0:     0, the action leaves the feasible region

    `state_risk` v_h = V_h(s), `action_risk` q_h = Q_h(s, a) and `advantages` A = Q(s, a) - V(s) have one
    shape. FISOR has floor 0, and 1 on its MetaDrive branch. No gradient flows into the weights. Raises
    `ValueError` on unequal shapes.
    """
    same_shape(state_risk=state_risk, action_risk=action_risk, advantages=advantages)
    with torch.no_grad():
        risk = (risk_temperature * (state_risk - action_risk)).exp().clamp(floor, risk_clip)
        reward = (reward_temperature * advantages).exp().clamp(max=reward_clip)
        inside = torch.where(action_risk <= 0, reward, 0.0)
        return torch.where(state_risk > 0, risk, inside)


def least_risk(action_risk: Tensor) -> Tensor:
    """Index of the least risky candidate: risks (B, N) -> (B,), FISOR's choice at test time."""
    return action_risk.argmin(dim=-1)


def feasible_first(action_risk: Tensor, action_values: Tensor) -> Tensor:
    """Index of the best reward among candidates with Q_h <= 0, else of the least risk: (B, N) -> (B,).

    Ours, not FISOR's: its expectile grades risk even within the region, so that `least_risk` always takes the
    most timid candidate. Raises `ValueError` on unequal shapes.
    """
    same_shape(action_risk=action_risk, action_values=action_values)
    feasible = action_risk <= 0
    best = torch.where(feasible, action_values, -torch.inf).argmax(dim=-1)
    return torch.where(feasible.any(dim=-1), best, least_risk(action_risk))


def _check_discount(discount: float) -> None:
    if not 0 < discount < 1:
        raise ValueError(f"the discount is {discount}; it must lie strictly between 0 and 1.")
