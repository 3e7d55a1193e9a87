"""Natural-gradient steps under constraints, as functions of vectors and a few numbers.

A trust-region method looks for the step x that maximises g.x within x.Hx / 2 <= delta, H being the Fisher
information; constrained ones add c_i + b_i.x <= 0. Everything that decides the step lies in the numbers

    q = g.H^-1 g,    r_i = g.H^-1 b_i,    s_ij = b_i.H^-1 b_j,    c_i,    delta

with g the gradient of the objective to be *maximised*, b_i that of a cost to be kept down, and c_i by how
much the cost exceeds its limit now, in the units of b_i. The answers are coefficients of the directions
H^-1 g and H^-1 b_i:

    x = alpha H^-1 g - sum_i beta_i H^-1 b_i

Nothing here knows a policy or an environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["Step", "conjugate_gradient", "cpo_step", "pcpo_step", "trust_region_scale"]

Weights: TypeAlias = NDArray[np.float64]

_NEGLIGIBLE = 1e-8  # of s_ii: this cost's gradient vanishes, no step can change it
_FLAT = 1e-12  # of q: the objective is flat, there is nothing to gain


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 15, tolerance: float = 1e-10
) -> Tensor:
    """Solve H x = b, with `product(v)` = H v for a symmetric positive definite H, for x of b's shape (P,).

    Stops after `iterations`, or when the squared residual falls below `tolerance` times that of x = 0
    (Hestenes and Stiefel 1952). The test waits for the device once an iteration.
    """
    x = torch.zeros_like(b)
    residual = b.clone()
    direction = residual.clone()
    norm = residual.dot(residual)
    enough = tolerance * norm
    for _ in range(iterations):
        if not bool(norm > enough):
            break
        image = product(direction)
        step = norm / direction.dot(image)
        x += step * direction
        residual -= step * image
        new_norm = residual.dot(residual)
        direction = residual + (new_norm / norm) * direction
        norm = new_norm
    return x


def trust_region_scale(q: float, delta: float) -> float:
    """sqrt(2 delta / q): the multiple of H^-1 g that ends on the trust region; 0 where q is not positive."""
    return math.sqrt(2 * delta / q) if q > _FLAT else 0.0


@dataclass(frozen=True)
class Step:
    """A step x = alpha H^-1 g - sum_i beta_i H^-1 b_i and how it was found."""

    alpha: float
    """Coefficient of H^-1 g."""
    beta: Weights
    """Coefficients of -H^-1 b_i, shape (K,)."""
    case: int
    """CPO's case: 4 no cost has a gradient, 3 the whole trust region is allowed, 2 allowed now, 1 violated
    but reachable, 0 no step within the trust region satisfies the constraints: recovery."""


def cpo_step(q: float, r: ArrayLike, s: ArrayLike, c: ArrayLike, delta: float) -> Step:
    """CPO's step: maximise g.x subject to c_i + b_i.x <= 0 and x.Hx / 2 <= delta.

    Achiam, Held, Tamar and Abbeel 2017, "Constrained Policy Optimization", theorem 2, for one constraint in
    closed form; several by their convex dual,

        min_{nu >= 0} sqrt(2 delta) |g - sum_i nu_i b_i|_{H^-1} - nu.c.

    Where no step is feasible, the step that lowers the costs most: along the combination of their
    gradients that proves the infeasibility (for one cost: along that cost's).

    Args:
        q: g.H^-1 g.
        r: g.H^-1 b_i, shape (K,) or a number.
        s: b_i.H^-1 b_j, shape (K, K) or a number.
        c: excess over the limits in the units of b, shape (K,) or a number.
        delta: radius of the trust region.
    """
    r, s, c = _arrays(r, s, c)
    live = np.diag(s) > _NEGLIGIBLE
    beta = np.zeros(len(c))
    if not live.any():
        return Step(trust_region_scale(q, delta), beta, 4)
    alpha, beta[live], case = _solve(max(q, 0.0), r[live], s[np.ix_(live, live)], c[live], delta)
    return Step(alpha, beta, case)


def _solve(q: float, r: Weights, s: Weights, c: Weights, delta: float) -> tuple[float, Weights, int]:
    none = np.zeros(len(c))
    # The largest b_i.x within the trust region is sqrt(2 delta s_ii): then even that violates nothing.
    if bool(((c < 0) & (c * c > 2 * delta * np.diag(s))).all()):
        return trust_region_scale(q, delta), none, 3
    if len(c) > 1:
        return _solve_dual(q, r, s, c, delta)
    case = 2 if c[0] < 0 else 1
    room = 2 * delta - c[0] ** 2 / s[0, 0]
    if case == 1 and room < 0:
        return 0.0, np.array([math.sqrt(2 * delta / s[0, 0])]), 0
    unconstrained = trust_region_scale(q, delta)
    # lambda = 1 / unconstrained; the plain step satisfies the constraint if lambda c + r <= 0.
    if unconstrained == 0.0 or c[0] + unconstrained * r[0] <= 0:
        if unconstrained > 0.0 or c[0] <= 0:
            return unconstrained, none, case
        return 0.0, np.array([c[0] / s[0, 0]]), case
    useful = max(q - r[0] ** 2 / s[0, 0], 0.0)
    if useful <= _FLAT * max(q, 1.0):
        # The objective's gradient is parallel to the cost's: the step is where the constraint holds.
        return 0.0, np.array([c[0] / s[0, 0]]), case
    multiplier = math.sqrt(useful / max(room, 1e-300))
    price = max(0.0, (multiplier * c[0] + r[0]) / s[0, 0])
    return 1 / multiplier, np.array([price / multiplier]), case


def _solve_dual(q: float, r: Weights, s: Weights, c: Weights, delta: float) -> tuple[float, Weights, int]:
    from scipy.optimize import Bounds, LinearConstraint, minimize

    radius = math.sqrt(2 * delta)
    scale = np.sqrt(np.diag(s))
    # In units of each cost's own gradient, so that the problem is well scaled.
    unit_s, unit_r, unit_c = s / np.outer(scale, scale), r / scale, c / scale
    count = len(c)

    def norm(weights: Weights, q: float, r: Weights) -> float:
        """|g - sum_i w_i b_i| in the metric H^-1."""
        return math.sqrt(max(q - 2 * float(weights @ r) + float(weights @ unit_s @ weights), 1e-18))

    def dual(q: float, r: Weights) -> tuple[Callable[[Weights], float], Callable[[Weights], Weights]]:
        """The dual function and its slope."""
        return (
            lambda w: radius * norm(w, q, r) - float(w @ unit_c),
            lambda w: radius * (unit_s @ w - r) / norm(w, q, r) - unit_c,
        )

    # With g = 0 the dual on the simplex is what the trust region can lower the weighted costs by, less what
    # they exceed their limits by: below zero, no step satisfies them all.
    value, slope = dual(0.0, np.zeros(count))
    worst = minimize(
        value,
        np.full(count, 1 / count),
        jac=slope,
        method="SLSQP",
        bounds=Bounds(0.0, 1.0),
        constraints=LinearConstraint(np.ones((1, count)), 1.0, 1.0),
        options={"ftol": 1e-14, "maxiter": 200},
    )
    if worst.fun < 0:
        weights = np.asarray(worst.x, float)
        return 0.0, radius * weights / norm(weights, 0.0, np.zeros(count)) / scale, 0
    value, slope = dual(q, unit_r)
    found = minimize(
        value,
        np.zeros(count),
        jac=slope,
        method="L-BFGS-B",
        bounds=Bounds(0.0, np.inf),
        options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 500},
    )
    prices = np.asarray(found.x, float)
    alpha = radius / norm(prices, q, unit_r)
    return alpha, alpha * prices / scale, 2 if bool((c < 0).all()) else 1


def pcpo_step(q: float, r: ArrayLike, s: ArrayLike, c: ArrayLike, delta: float) -> Step:
    """PCPO's step: the plain natural step, then the nearest point (in KL) where the constraints hold.

    Yang, Rosca, Narasimhan and Ramadge 2020, "Projection-Based Constrained Policy Optimization", with the
    projection in the metric H. For one constraint

        x = sqrt(2 delta / q) H^-1 g - max(0, (sqrt(2 delta / q) r + c) / s) H^-1 b,

    for several the projection onto their intersection. Arguments as for `cpo_step`; the case is 1 where the
    projection moves the step and 3 where it does not (4 where no cost has a gradient). The projection may
    lead out of the trust region.
    """
    from scipy.optimize import nnls

    r, s, c = _arrays(r, s, c)
    live = np.diag(s) > _NEGLIGIBLE
    beta = np.zeros(len(c))
    alpha = trust_region_scale(q, delta)
    if not live.any():
        return Step(alpha, beta, 4)
    excess = alpha * r[live] + c[live]
    if live.sum() == 1:
        beta[live] = np.maximum(0.0, excess / s[live][:, live][0])
    else:
        # min_{m >= 0} m.S m / 2 - m.excess, as least squares with S = L L^T.
        part = s[np.ix_(live, live)]
        factor = np.linalg.cholesky(part + 1e-12 * np.diag(np.diag(part)))
        beta[live] = nnls(factor.T, np.linalg.solve(factor, excess))[0]
    return Step(alpha, beta, 1 if beta.any() else 3)


def _arrays(r: ArrayLike, s: ArrayLike, c: ArrayLike) -> tuple[Weights, Weights, Weights]:
    r, c = np.atleast_1d(np.asarray(r, float)), np.atleast_1d(np.asarray(c, float))
    return r, np.asarray(s, float).reshape(len(c), len(c)), c
