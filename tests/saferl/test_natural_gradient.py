"""Constrained natural-gradient steps against the worked examples, brute force and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from saferl.natural_gradient import conjugate_gradient, cpo_step, pcpo_step, trust_region_scale

DELTA = 0.01
G = np.array([1.0, 0.0])
B = np.array([0.6, 0.8])


def plane(step, b: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The step x for H = I."""
    result: np.ndarray = step.alpha * G - step.beta[0] * b
    return result


@pytest.mark.parametrize(
    ("c", "case", "cpo", "pcpo"),
    [
        (-1.0, 3, (0.141421, 0.0), (0.141421, 0.0)),
        (-0.05, 2, (0.135830, -0.039373), (0.120510, -0.027882)),
        (0.05, 1, (0.075830, -0.119373), (0.060510, -0.107882)),
        (0.5, 0, (-0.084853, -0.113137), None),
    ],
)
def test_worked_examples(
    c: float, case: int, cpo: tuple[float, float], pcpo: tuple[float, float] | None
) -> None:
    step = cpo_step(G @ G, G @ B, B @ B, c, DELTA)
    assert step.case == case
    x = plane(step, B)
    np.testing.assert_allclose(x, cpo, atol=1e-6)
    assert x @ x / 2 == pytest.approx(DELTA)
    if case in (1, 2):
        assert c + B @ x == pytest.approx(0.0, abs=1e-12)
    if pcpo is not None:
        np.testing.assert_allclose(plane(pcpo_step(G @ G, G @ B, B @ B, c, DELTA), B), pcpo, atol=1e-6)


def test_the_multipliers_of_the_worked_examples() -> None:
    """lambda = 1 / alpha and nu = beta / alpha, as they are tabulated."""
    for c, multiplier, price in ((-0.05, 6.047432, 0.297628), (0.05, 6.047432, 0.902372)):
        step = cpo_step(G @ G, G @ B, B @ B, c, DELTA)
        assert 1 / step.alpha == pytest.approx(multiplier, abs=1e-6)
        assert step.beta[0] / step.alpha == pytest.approx(price, abs=1e-6)


@pytest.mark.parametrize("c", [-0.05, 0.05])
def test_a_constraint_that_the_plain_step_keeps_changes_nothing(c: float) -> None:
    """Peers' transcription of the dual leaves the trust region here (|x|^2 / 2 = 0.0198)."""
    b = np.array([-0.6, 0.8])
    np.testing.assert_allclose(plane(cpo_step(1.0, G @ b, b @ b, c, DELTA), b), (0.141421, 0.0), atol=1e-6)


@pytest.mark.parametrize("c", [-0.05, 0.05])
def test_the_sign_of_r_matters(c: float) -> None:
    """With r's sign flipped the reward falls (c < 0) or the constraint is violated (c > 0)."""
    right = plane(cpo_step(1.0, G @ B, B @ B, c, DELTA), B)
    wrong = plane(cpo_step(1.0, -(G @ B), B @ B, c, DELTA), B)
    assert c + B @ right <= 1e-9
    assert G @ right > 0
    assert c + B @ wrong > 1e-3 or G @ wrong < G @ right - 1e-3


@settings(max_examples=150, deadline=None)
@given(
    angle=st.floats(0.0, 2 * np.pi),
    length=st.floats(0.05, 3.0),
    c=st.floats(-0.4, 0.4),
)
def test_one_constraint_against_brute_force(angle: float, length: float, c: float) -> None:
    b = length * np.array([np.cos(angle), np.sin(angle)])
    x = plane(cpo_step(1.0, G @ b, b @ b, c, DELTA), b)
    turns = np.linspace(0, 2 * np.pi, 2001)
    radii = np.sqrt(2 * DELTA) * np.sqrt(np.linspace(0, 1, 60))
    points = (radii[:, None, None] * np.stack([np.cos(turns), np.sin(turns)], -1)).reshape(-1, 2)
    allowed = points[c + points @ b <= 0]
    assert x @ x / 2 <= DELTA * (1 + 1e-9)
    if len(allowed):
        assert c + b @ x <= 1e-9
        assert G @ x >= (allowed @ G).max() - 1e-9
    elif c - np.sqrt(2 * DELTA) * length > 0:  # truly infeasible: the largest decrease of the cost
        assert c + b @ x == pytest.approx((c + points @ b).min(), abs=1e-4)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_constraints_against_scipy(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    size = 5
    root = rng.normal(size=(size, size))
    h = root @ root.T + 0.1 * np.eye(size)
    inverse = np.linalg.inv(h)
    g, b, c = rng.normal(size=size), rng.normal(size=(size, count)), rng.normal(size=count) * 0.1
    step = cpo_step(g @ inverse @ g, g @ inverse @ b, b.T @ inverse @ b, c, DELTA)
    x = step.alpha * inverse @ g - inverse @ b @ step.beta
    limits = [
        {"type": "ineq", "fun": lambda x: -(c + b.T @ x), "jac": lambda x: -b.T},
        {"type": "ineq", "fun": lambda x: DELTA - x @ h @ x / 2, "jac": lambda x: -h @ x},
    ]
    found = minimize(
        lambda x: -g @ x,
        np.zeros(size),
        jac=lambda x: -g,
        constraints=limits,
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 1000},
    )
    feasible = (c + b.T @ found.x).max() < 1e-7 and found.x @ h @ found.x / 2 < DELTA + 1e-8
    assert x @ h @ x / 2 <= DELTA * (1 + 1e-6)
    if step.case == 0:
        assert not feasible
    else:
        assert (c + b.T @ x).max() <= 1e-6
        if feasible:
            assert g @ x >= g @ found.x - 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_pcpo_projects_onto_the_intersection(seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(4, 4))
    h = root @ root.T + 0.1 * np.eye(4)
    inverse = np.linalg.inv(h)
    g, b, c = rng.normal(size=4), rng.normal(size=(4, 2)), rng.normal(size=2) * 0.1
    step = pcpo_step(g @ inverse @ g, g @ inverse @ b, b.T @ inverse @ b, c, DELTA)
    x = step.alpha * inverse @ g - inverse @ b @ step.beta
    start = trust_region_scale(g @ inverse @ g, DELTA) * inverse @ g
    found = minimize(
        lambda x: (x - start) @ h @ (x - start) / 2,
        start,
        jac=lambda x: h @ (x - start),
        constraints={"type": "ineq", "fun": lambda x: -(c + b.T @ x), "jac": lambda x: -b.T},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    np.testing.assert_allclose(x, found.x, atol=1e-5)


def test_pcpo_takes_the_natural_gradient() -> None:
    """H = diag(1, 4), g = (1, 2): the step is (0.1, 0.05) with KL 0.01; the raw gradient's KL is 0.085."""
    h, g = np.diag([1.0, 4.0]), np.array([1.0, 2.0])
    direction = np.linalg.solve(h, g)
    step = pcpo_step(g @ direction, 0.0, 1.0, -1.0, DELTA)
    x = step.alpha * direction
    np.testing.assert_allclose(x, (0.1, 0.05))
    assert x @ h @ x / 2 == pytest.approx(0.01)
    raw = step.alpha * g
    assert raw @ h @ raw / 2 == pytest.approx(0.085)


@pytest.mark.parametrize("c", [-0.3, 0.0, 0.3])
@pytest.mark.parametrize("solve", [cpo_step, pcpo_step])
def test_a_cost_without_gradient_leaves_the_plain_step(c: float, solve) -> None:  # type: ignore[no-untyped-def]
    step = solve(1.0, 0.0, 0.0, c, DELTA)
    assert step.case == 4
    assert step.alpha == pytest.approx(np.sqrt(2 * DELTA))
    assert step.beta[0] == 0


@pytest.mark.parametrize("q", [0.0, -1e-9])
def test_a_flat_objective_takes_no_step_or_mends_the_constraint(q: float) -> None:
    assert cpo_step(q, 0.0, 1.0, -0.05, DELTA).alpha == 0
    mended = cpo_step(q, 0.0, 1.0, 0.05, DELTA)
    assert mended.alpha == 0
    assert mended.beta[0] == pytest.approx(0.05)
    assert trust_region_scale(q, DELTA) == 0


def test_no_constraint_is_the_plain_step() -> None:
    step = cpo_step(2.0, [], np.zeros((0, 0)), [], DELTA)
    assert step.alpha == pytest.approx(0.1)
    assert len(step.beta) == 0


def test_conjugate_gradient_solves_and_stops() -> None:
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64)
    h = root @ root.T + torch.eye(12)
    b = torch.randn(12, dtype=torch.float64)
    calls = []

    def product(v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return h @ v

    x = conjugate_gradient(product, b, iterations=40)
    torch.testing.assert_close(x, torch.linalg.solve(h, b), rtol=1e-3, atol=1e-4)
    assert len(calls) < 40
    assert (conjugate_gradient(product, torch.zeros(12, dtype=torch.float64)) == 0).all()
