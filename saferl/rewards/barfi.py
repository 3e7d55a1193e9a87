"""BARFI: a reward that blends the one that is meant with a heuristic, learned so that learning from it works.

Gupta, Chandak, Jordan, Thomas and da Silva 2023, "Behavior Alignment via Reward Function Optimization" (arXiv
2310.19007); the idea is its abstract's, the equations below are recalled and unverified.

The inner problem is policy-gradient learning on r_phi = phi_1 + phi_2 r_p + phi_3 r_aux with a discount of
its own and entropy weight lambda; it ends where

    Delta(theta, phi) = E sum_t psi_t G_t = 0,     psi_t = grad ln pi(a_t | s_t),
    G_t = sum_{j >= t} gamma_phi^(j - t) (r_phi(s_j, a_j) - lambda ln pi(a_j | s_j)).

The outer problem maximises J(theta(phi)), the return of the primary reward r_p under the true discount, less
a price on gamma_phi. The implicit function theorem gives

    dJ/dphi = -(dJ/dtheta) H^-1 dDelta/dphi,       H = dDelta/dtheta,

where H is negative definite near the fixed point. Only products with H are formed, by automatic
differentiation. Far from the fixed point the gradient is biased; phi must move more slowly than theta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saferl.errors import NonFiniteError, UsageError

__all__ = [
    "AlignmentReward",
    "Trajectories",
    "discounted_sums",
    "fixed_point",
    "implicit_gradient",
    "outer_step",
    "primary_gradient",
]


@dataclass(frozen=True)
class Trajectories:
    """What the outer step needs of N trajectories of T steps; steps after an end have mask 0.

    Attributes:
        primary: r_p (N, T).
        auxiliary: r_aux (N, T).
        mask: 1 on the steps that were taken (N, T).
    """

    primary: Tensor
    auxiliary: Tensor
    mask: Tensor


class AlignmentReward(nn.Module):
    """r_phi = phi_1 + phi_2 r_p + phi_3 r_aux and its discount, all learned.

    Args:
        weights: phi at the start; the plain sum of both rewards by default.
        discount: gamma_phi at the start, strictly between 0 and 1.

    Raises:
        UsageError: there are not three weights, or the discount is out of range.
    """

    def __init__(self, weights: tuple[float, ...] = (0.0, 1.0, 1.0), discount: float = 0.99) -> None:
        super().__init__()
        if len(weights) != 3:
            raise UsageError(f"{len(weights)} weights were given; there are three: constant, r_p and r_aux.")
        if not 0 < discount < 1:
            raise UsageError(f"the discount is {discount:g}; it must lie strictly between 0 and 1.")
        self.weights = nn.Parameter(torch.tensor(weights))
        self.discount_logit = nn.Parameter(torch.logit(torch.tensor(discount)))

    @property
    def discount(self) -> Tensor:
        """gamma_phi, a scalar in (0, 1)."""
        return torch.sigmoid(self.discount_logit)

    def forward(self, primary: Tensor, auxiliary: Tensor) -> Tensor:
        """r_phi of rewards of one shape."""
        constant, first, second = self.weights
        blended: Tensor = constant + first * primary + second * auxiliary
        return blended


def discounted_sums(rewards: Tensor, discount: Tensor | float) -> Tensor:
    """sum_{j >= t} discount^(j - t) r_j (N, T), differentiable in rewards (N, T) and discount."""
    steps = torch.arange(rewards.shape[1], device=rewards.device)
    apart = steps[:, None] - steps  # j - t in row j, column t
    powers = torch.as_tensor(discount).to(rewards) ** apart.clamp(min=0)
    return rewards @ torch.where(apart >= 0, powers, 0.0)


def fixed_point(
    log_probs: Tensor, rewards: Tensor, mask: Tensor, discount: Tensor, entropy: float
) -> Callable[[list[Tensor]], list[Tensor]]:
    """Delta as a function of the policy's parameters, for log-probabilities (N, T) that depend on them.

    Args:
        log_probs: ln pi(a_t | s_t), with its graph.
        rewards: r_phi (N, T), with its graph.
        mask: (N, T).
        discount: gamma_phi.
        entropy: lambda.

    Returns:
        parameters -> Delta, one tensor a parameter, with a graph to parameters and phi.
    """
    gains = discounted_sums(mask * (rewards - entropy * log_probs), discount)

    def delta(parameters: list[Tensor]) -> list[Tensor]:
        weights = mask * gains / len(log_probs)
        return list(torch.autograd.grad(log_probs, parameters, weights, create_graph=True))

    return delta


def primary_gradient(
    log_probs: Tensor, primary: Tensor, mask: Tensor, discount: float, parameters: list[Tensor]
) -> list[Tensor]:
    """dJ/dtheta by REINFORCE, with the batch's mean return at each step for a baseline."""
    gains = discounted_sums(mask * primary, discount)
    taken = mask.sum(0).clamp(min=1)
    baseline = (gains * mask).sum(0) / taken
    start = torch.as_tensor(discount, dtype=gains.dtype) ** torch.arange(gains.shape[1])
    weights = (mask * start.to(gains) * (gains - baseline)).detach() / len(log_probs)
    return list(torch.autograd.grad(log_probs, parameters, weights, retain_graph=True))


def implicit_gradient(
    gradient: list[Tensor],
    delta: list[Tensor],
    parameters: list[Tensor],
    outer: list[Tensor],
    *,
    solver: Literal["neumann", "conjugate"] = "neumann",
    terms: int = 20,
    rate: float = 1.0,
    damping: float = 0.0,
) -> list[Tensor]:
    """-(dJ/dtheta) H^-1 dDelta/dphi, one tensor for each of the outer parameters.

    Neumann's series is H^-1 = -rate sum_k (I + rate H)^k, which converges for negative definite H and
    rate < 2 / |H|; conjugate gradients need H symmetric as well. Directions in which the policy does not
    change (the constant of softmax logits) are in the kernel of H and of dDelta/dphi, and add nothing.

    Args:
        gradient: dJ/dtheta.
        delta: Delta, with its graph.
        parameters: theta.
        outer: phi.
        solver: how H^-1 is applied.
        terms: of the series after its first, or steps of conjugate gradients.
        rate: eta of the series.
        damping: subtracted from H's diagonal.

    Raises:
        UsageError: an option is out of range.
        NonFiniteError: the series diverged; a smaller rate or more damping mends it.
    """
    if terms < 1 or not rate > 0 or damping < 0:
        raise UsageError("terms and rate must be positive, and the damping not negative.")

    def times(vector: list[Tensor]) -> list[Tensor]:
        """vector^T H."""
        found = torch.autograd.grad(delta, parameters, vector, retain_graph=True, allow_unused=True)
        return [
            (torch.zeros_like(v) if f is None else f) - damping * v
            for f, v in zip(found, vector, strict=True)
        ]

    if solver == "neumann":
        solved = _neumann(gradient, times, terms, rate)
    elif solver == "conjugate":
        solved = _conjugate(gradient, times, terms)
    else:
        raise UsageError(f"the solver is {solver!r}; it must be 'neumann' or 'conjugate'.")
    if not all(bool(v.isfinite().all()) for v in solved):
        raise NonFiniteError("the inner problem's inverse diverged; lower the rate or raise the damping.")
    found = torch.autograd.grad(delta, outer, [-v for v in solved], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if f is None else f for f, p in zip(found, outer, strict=True)]


def outer_step(
    reward: AlignmentReward,
    optimizer: torch.optim.Optimizer,
    log_probs: Tensor,
    data: Trajectories,
    parameters: list[Tensor],
    *,
    discount: float,
    entropy: float,
    discount_price: float = 0.0,
    terms: int = 20,
    rate: float = 1.0,
    damping: float = 0.0,
) -> list[Tensor]:
    """One step on phi and gamma_phi; the gradients of the objective that was maximised.

    Args:
        reward: r_phi.
        optimizer: of its parameters.
        log_probs: ln pi(a_t | s_t) (N, T) of the current policy on its own trajectories, with their graph.
        data: those trajectories.
        parameters: theta.
        discount: the true one, of J.
        entropy: lambda of the inner problem.
        discount_price: lambda_gamma, the price of gamma_phi.
        terms: see `implicit_gradient`, as the two below.
        rate: of the series.
        damping: of H.

    Raises:
        NonFiniteError: the series diverged; nothing is changed.
    """
    outer: list[Tensor] = [reward.weights, reward.discount_logit]
    gradient = primary_gradient(log_probs, data.primary, data.mask, discount, parameters)
    delta = fixed_point(log_probs, reward(data.primary, data.auxiliary), data.mask, reward.discount, entropy)
    found = implicit_gradient(
        gradient, delta(parameters), parameters, outer, terms=terms, rate=rate, damping=damping
    )
    if discount_price:
        (slope,) = torch.autograd.grad(reward.discount, reward.discount_logit)
        found[1] = found[1] - discount_price * slope
    for parameter, ascent in zip(outer, found, strict=True):
        parameter.grad = -ascent.detach()
    optimizer.step()
    optimizer.zero_grad()
    return [ascent.detach() for ascent in found]


def _neumann(
    gradient: list[Tensor], times: Callable[[list[Tensor]], list[Tensor]], terms: int, rate: float
) -> list[Tensor]:
    """gradient^T H^-1."""
    term = total = gradient
    for _ in range(terms):
        term = [u + rate * h for u, h in zip(term, times(term), strict=True)]
        total = [t + u for t, u in zip(total, term, strict=True)]
    return [-rate * t for t in total]


def _conjugate(
    gradient: list[Tensor], times: Callable[[list[Tensor]], list[Tensor]], steps: int
) -> list[Tensor]:
    """gradient^T H^-1 for a symmetric H, by the positive definite -H."""

    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()

    solution = [torch.zeros_like(g) for g in gradient]
    residual = direction = gradient
    size = first = dot(residual, residual)
    for _ in range(steps):
        if not size > 1e-20 * first:
            break
        image = [-h for h in times(direction)]
        curvature = dot(direction, image)
        if not curvature > 0:
            break  # a direction that H does not bend: the kernel
        step = size / curvature
        solution = [s + step * d for s, d in zip(solution, direction, strict=True)]
        residual = [r - step * i for r, i in zip(residual, image, strict=True)]
        before, size = size, dot(residual, residual)
        direction = [r + size / before * d for r, d in zip(residual, direction, strict=True)]
    return [-s for s in solution]
