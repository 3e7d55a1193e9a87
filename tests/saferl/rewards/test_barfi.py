"""BARFI: the implicit gradient on a bandit solved by hand, on trajectories against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saferl.errors import NonFiniteError, UsageError
from saferl.rewards.barfi import (
    AlignmentReward,
    Trajectories,
    discounted_sums,
    fixed_point,
    implicit_gradient,
    outer_step,
    primary_gradient,
)

PRIMARY = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
HEURISTIC = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)


def bandit(phi: Tensor, entropy: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logits at the inner optimum pi ~ exp(r_phi / lambda), and Delta there, with its graph."""
    with torch.no_grad():
        logits = (phi[0] * PRIMARY + phi[1] * HEURISTIC) / entropy
    logits = logits.clone().requires_grad_()
    log_probs = torch.log_softmax(logits, 0)
    objective = (log_probs.exp() * (phi[0] * PRIMARY + phi[1] * HEURISTIC - entropy * log_probs)).sum()
    (delta,) = torch.autograd.grad(objective, logits, create_graph=True)
    return logits, delta


def bandit_gradient(**options: Any) -> Tensor:
    phi = torch.ones(2, dtype=torch.float64, requires_grad=True)
    logits, delta = bandit(phi)
    (gradient,) = torch.autograd.grad((torch.softmax(logits, 0) * PRIMARY).sum(), logits)
    (found,) = implicit_gradient([gradient], [delta], [logits], [phi], **options)
    return found


def test_the_bandit_solved_by_hand() -> None:
    logits, delta = bandit(torch.ones(2, dtype=torch.float64))
    np.testing.assert_allclose(
        torch.softmax(logits, 0).detach(), [0.4223188, 0.4223188, 0.1553624], atol=1e-7
    )
    np.testing.assert_allclose(delta.detach(), 0, atol=1e-12)
    exact = [0.2439656, -0.1783532]
    np.testing.assert_allclose(bandit_gradient(terms=400), exact, atol=1e-7)
    np.testing.assert_allclose(bandit_gradient(solver="conjugate", terms=3), exact, atol=1e-7)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [(5, [0.22731, -0.17931]), (20, [0.24363, -0.17868]), (60, [0.24397, -0.17835])],
)
def test_partial_sums_of_the_series(terms: int, expected: list[float]) -> None:
    np.testing.assert_allclose(bandit_gradient(terms=terms), expected, atol=6e-6)


def test_against_solving_the_inner_problem_again() -> None:
    step, found = 1e-5, bandit_gradient(terms=400)
    for k in range(2):
        returns = []
        for sign in (1, -1):
            phi = torch.ones(2, dtype=torch.float64)
            phi[k] += sign * step
            returns.append((torch.softmax(bandit(phi)[0], 0) * PRIMARY).sum().item())
        assert found[k].item() == pytest.approx((returns[0] - returns[1]) / (2 * step), abs=1e-7)


def test_discounted_sums() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    discount = torch.tensor(0.5, requires_grad=True)
    sums = discounted_sums(rewards, discount)
    np.testing.assert_allclose(sums.detach(), [[3.0, 4.0, 4.0]])
    sums[0, 0].backward()
    assert discount.grad is not None
    assert discount.grad.item() == pytest.approx(2 + 2 * 0.5 * 4)
    np.testing.assert_allclose(discounted_sums(rewards, 0.0).detach(), rewards.detach())


def chain(logits: Tensor, actions: Tensor) -> Tensor:
    """ln pi (N, T) of a tabular policy: the state is the time."""
    return torch.log_softmax(logits, -1)[torch.arange(actions.shape[1]), actions]


def test_products_with_the_hessian_are_its_formula() -> None:
    torch.manual_seed(0)
    count, steps, entropy, gamma = 6, 4, 0.3, 0.8
    logits = torch.randn(steps, 3, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(0, 3, (count, steps))
    rewards = torch.randn(count, steps, dtype=torch.float64)
    mask = torch.ones(count, steps, dtype=torch.float64)
    mask[0, 2:] = 0

    def delta(theta: Tensor) -> Tensor:
        log_probs = chain(theta, actions)
        found = fixed_point(log_probs, rewards, mask, torch.tensor(gamma), entropy)([theta])
        return found[0]

    hessian: Any = torch.autograd.functional.jacobian(delta, logits)
    psi = []
    for n in range(count):
        for t in range(steps):
            (g,) = torch.autograd.grad(chain(logits, actions)[n, t], logits, retain_graph=True)
            psi.append(g)
    scores = torch.stack(psi).view(count, steps, -1)
    log_probs = chain(logits, actions).detach()
    gains = discounted_sums(mask * (rewards - entropy * log_probs), gamma)
    np.testing.assert_allclose(
        delta(logits).detach().ravel(), torch.einsum("nt,nt,ntp->p", mask, gains, scores) / count, atol=1e-12
    )
    # grad psi for softmax rows: -(diag(p) - p p') in the row of the step.
    chances = torch.softmax(logits.detach(), -1)
    expected = torch.zeros(steps * 3, steps * 3, dtype=torch.float64)
    for n in range(count):
        for t in range(steps):
            block = slice(3 * t, 3 * t + 3)
            curve = -(torch.diag(chances[t]) - torch.outer(chances[t], chances[t]))
            expected[block, block] += mask[n, t] * gains[n, t] * curve / count
            for j in range(t, steps):
                weight = entropy * gamma ** (j - t) * mask[n, t] * mask[n, j] / count
                expected -= weight * torch.outer(scores[n, t], scores[n, j])
    np.testing.assert_allclose(hessian.reshape(steps * 3, -1), expected, atol=1e-10)


def test_the_primary_gradient_is_reinforce() -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(0, 2, (5, 3))
    rewards = torch.randn(5, 3, dtype=torch.float64)
    (found,) = primary_gradient(chain(logits, actions), rewards, torch.ones(5, 3), 0.9, [logits])
    gains = discounted_sums(rewards, 0.9)
    surrogate = (0.9 ** torch.arange(3) * (gains - gains.mean(0)) * chain(logits, actions)).sum() / 5
    (expected,) = torch.autograd.grad(surrogate, logits)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_misleading_heuristic_loses_its_weight(seed: int) -> None:
    # One step, three arms: the heuristic pays for the wrong one.
    torch.manual_seed(seed)
    reward = AlignmentReward((0.0, 1.0, 2.0), 0.9)
    optimizer = torch.optim.Adam(reward.parameters(), lr=0.05)
    logits = torch.zeros(1, 3, requires_grad=True)
    inner = torch.optim.SGD([logits], lr=0.5)
    for _ in range(150):
        for _ in range(5):
            actions = torch.distributions.Categorical(logits=logits.detach()).sample((256,))
            log_probs = chain(logits, actions)
            gains = reward(PRIMARY.float()[actions], HEURISTIC.float()[actions]).detach()
            gains = gains - 0.3 * log_probs.detach()
            loss = -((gains - gains.mean()) * log_probs).mean()
            inner.zero_grad()
            loss.backward()
            inner.step()
        actions = torch.distributions.Categorical(logits=logits.detach()).sample((512,))
        data = Trajectories(PRIMARY.float()[actions], HEURISTIC.float()[actions], torch.ones(512, 1))
        outer_step(
            reward, optimizer, chain(logits, actions), data, [logits], discount=0.9, entropy=0.3, damping=0.05
        )
    assert reward.weights[2].item() < 1.0
    assert torch.softmax(logits.detach(), -1)[0, 0].item() > 0.6


def test_a_price_on_the_discount_lowers_it() -> None:
    torch.manual_seed(0)
    reward = AlignmentReward(discount=0.9)
    optimizer = torch.optim.SGD(reward.parameters(), lr=1.0)
    logits = torch.zeros(2, 3, requires_grad=True)
    actions = torch.randint(0, 3, (64, 2))
    nothing = torch.zeros(64, 2)
    data = Trajectories(nothing, nothing, torch.ones(64, 2))
    found = outer_step(
        reward,
        optimizer,
        chain(logits, actions),
        data,
        [logits],
        discount=0.9,
        entropy=0.1,
        discount_price=1.0,
        damping=0.1,
    )
    assert found[1].item() == pytest.approx(-0.9 * 0.1, abs=1e-6)
    assert reward.discount.item() < 0.9


def test_what_cannot_be_done() -> None:
    with pytest.raises(UsageError, match="there are three"):
        AlignmentReward((1.0, 2.0))
    with pytest.raises(UsageError, match="strictly between"):
        AlignmentReward(discount=1.0)
    with pytest.raises(UsageError, match="must be positive"):
        bandit_gradient(terms=0)
    with pytest.raises(UsageError, match="neumann"):
        bandit_gradient(solver="guess")
    with pytest.raises(NonFiniteError, match="lower the rate"):
        bandit_gradient(rate=1e200, terms=9)
