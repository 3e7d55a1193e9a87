"""Exact STARC metrics: worked numbers, the properties of the definition, edge cases, sparse against dense."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from saferl.errors import UsageError
from saferl.starc import (
    CANONICALIZATIONS,
    NORMS,
    Canonicalizer,
    TabularMDP,
    average_regret,
    distance_matrix,
    norm_of,
    optimal_policy,
    policy_return,
    policy_values,
    regret,
    regret_bound,
    soundness_constant,
    standardize,
    starc_distance,
    worst_case_regret,
)

STARC = ("val", "minimal", "minimal-2", "minimal-1", "minimal-inf")
LINEAR = ("val", "minimal", "minimal-2", "val-potential", "minimal-potential", "epic", "dard", "none")


def switch() -> tuple[TabularMDP, np.ndarray, np.ndarray]:
    """Two states; action 0 stays, action 1 switches; 1 for switching from 0, and from 1."""
    transitions = np.zeros((2, 2, 2))
    transitions[0, 0, 0] = transitions[0, 1, 1] = transitions[1, 0, 1] = transitions[1, 1, 0] = 1
    first, second = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    first[0, 1, 1], second[1, 1, 0] = 1, 1
    return TabularMDP(transitions, 0.9), first, second


def random_mdp(
    seed: int, size: int | None = None, actions: int | None = None, discount: float | None = None
) -> TabularMDP:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 9)) if size is None else size
    actions = int(rng.integers(2, 5)) if actions is None else actions
    transitions = rng.dirichlet(np.full(size, 0.5), (size, actions))
    return TabularMDP(transitions, rng.choice([0, 0.5, 0.9, 0.99]) if discount is None else discount)


def random_reward(rng: np.random.Generator, mdp: TabularMDP) -> np.ndarray:
    return rng.normal(size=(mdp.num_states, mdp.num_actions, mdp.num_states))


def shaping(rng: np.random.Generator, mdp: TabularMDP) -> np.ndarray:
    potential = 10 * rng.normal(size=mdp.num_states)
    return np.asarray(mdp.discount * potential[None, None] - potential[:, None, None])


def redistribution(rng: np.random.Generator, mdp: TabularMDP) -> np.ndarray:
    noise = random_reward(rng, mdp)
    means = np.einsum("sat,sat->sa", noise, mdp.transitions)
    return np.asarray(noise - means[:, :, None])


# --- worked numbers --------------------------------------------------------------------------------------


def test_worked_forms() -> None:
    mdp, reward, _ = switch()
    np.testing.assert_allclose(policy_values(mdp, reward, mdp.uniform_policy()), [2.75, 2.25])
    val = Canonicalizer(mdp)(reward)
    np.testing.assert_allclose(val[:, :, 0], [[-0.275, 0.275], [-0.225, 0.225]], atol=1e-12)
    for norm, value in ((1, 2.0), (2, 0.7106335202), (np.inf, 0.275), ("w1", 1.0), ("w2", 0.5024937811)):
        assert norm_of(val, norm, mdp) == pytest.approx(value, abs=1e-9)
    forms = {
        "val-potential": [[[-0.275, -0.725], [-0.275, 0.275]], [[0.225, -0.225], [0.225, -0.225]]],
        "epic": [[[-0.1375, -0.3625], [-0.1375, 0.6375]], [[0.1125, -0.1125], [0.1125, -0.1125]]],
        "dard": [[[-0.05, -0.5], [-0.05, 0.5]], [[0, 0], [0, 0]]],
    }
    for name, form in forms.items():
        np.testing.assert_allclose(Canonicalizer(mdp, name)(reward), form, atol=1e-12)
    minimal = Canonicalizer(mdp, "minimal")(reward)[:, :, 0]
    np.testing.assert_allclose(minimal, [[-0.276243, 0.251381], [-0.223757, 0.248619]], atol=1e-6)


def test_worked_distances() -> None:
    mdp, first, second = switch()
    by_two = {
        "val": 0.199007,
        "minimal": 0.148250,
        "val-potential": 1.380492,
        "epic": 1.266803,
        "dard": 1.414214,
        "none": 1.414214,
    }
    for name, value in by_two.items():
        assert starc_distance(first, second, mdp, name) == pytest.approx(value, abs=1e-6)
    assert starc_distance(first, second, mdp, "val", 1, 1) == pytest.approx(0.2)
    assert starc_distance(first, second, mdp, "minimal", 1, 1) == pytest.approx(0.110497, abs=1e-6)


def test_worked_invariances() -> None:
    mdp, reward, _ = switch()
    potential = np.array([3.0, -1.0])
    shaped = reward + 0.9 * potential[None, None] - potential[:, None, None]
    for name in CANONICALIZATIONS:
        expected = (1.676477, 0, 1.083460) if name == "none" else (0, 0, 0)
        for other, value in zip((shaped, 7 * reward, reward + 5), expected, strict=True):
            assert starc_distance(reward, other, mdp, name) == pytest.approx(value, abs=1e-6)
    impossible = reward.copy()
    impossible[0, 0, 1] = 100
    found = {name: starc_distance(reward, impossible, mdp, name) for name in CANONICALIZATIONS}
    assert found["val"] == found["minimal"] == 0
    assert found["val-potential"] == pytest.approx(1.864104, abs=1e-6)
    assert found["epic"] == pytest.approx(1.783429, abs=1e-6)
    assert found["dard"] == pytest.approx(1.994943, abs=1e-6)


def test_a_reversal_that_impossible_transitions_hide() -> None:
    mdp, reward, _ = switch()
    large = np.zeros((2, 2, 2))
    large[0, 0, 1] = 100
    found = {n: starc_distance(large + reward, large - reward, mdp, n) for n in CANONICALIZATIONS}
    assert all(found[name] == pytest.approx(2.0) for name in STARC)
    assert found["epic"] == pytest.approx(0.0160478, abs=1e-7)
    assert found["dard"] == pytest.approx(0.0028077, abs=1e-7)
    assert found["val-potential"] == pytest.approx(0.0131057, abs=1e-7)


def test_arms_ranked_alike_need_not_be_equivalent() -> None:
    bandit = TabularMDP(np.ones((1, 3, 1)), 0.0)
    first, second = np.array([[0.0, 1, 2]]), np.array([[0.0, 1, 3]])
    assert starc_distance(first, second, bandit) == pytest.approx(0.189839, abs=1e-6)
    mixed = np.array([[0.5, 0, 0.5]])
    assert policy_return(bandit, first, mixed) == pytest.approx(policy_return(bandit, first, [1]))
    assert policy_return(bandit, second, mixed) > policy_return(bandit, second, [1]) + 0.4


def test_without_a_future_val_is_the_mean_less_that_over_actions() -> None:
    mdp = random_mdp(3, discount=0.0)
    reward = random_reward(np.random.default_rng(0), mdp)
    means = np.einsum("sat,sat->sa", reward, mdp.transitions)
    expected = means - means.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(Canonicalizer(mdp)(reward)[:, :, 0], expected, atol=1e-12)


# --- properties ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_properties_of_canonical_forms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mdp = random_mdp(seed)
    x, y = random_reward(rng, mdp), random_reward(rng, mdp)
    shaped, moved = x + shaping(rng, mdp), x + redistribution(rng, mdp)
    for name in CANONICALIZATIONS:
        canonical = Canonicalizer(mdp, name)
        form = canonical(x)
        if name in LINEAR:
            np.testing.assert_allclose(canonical(2 * x - 3 * y), 2 * form - 3 * canonical(y), atol=1e-8)
        if name not in ("dard", "minimal-1", "minimal-inf"):
            np.testing.assert_allclose(canonical(form), form, atol=1e-8)
        if name != "none":
            assert np.abs(canonical(shaped) - form).max() < 1e-7
        if name in STARC:
            assert np.abs(canonical(moved) - form).max() < 1e-7
    policy = rng.dirichlet(np.ones(mdp.num_actions), mdp.num_states)
    advantages = Canonicalizer(mdp, "val", policy=policy)(x)[:, :, 0]
    np.testing.assert_allclose((policy * advantages).sum(axis=1), 0, atol=1e-8)
    # The form is of the same class: returns differ by one number for all policies.
    for other in (mdp.uniform_policy(), rng.dirichlet(np.ones(mdp.num_actions), mdp.num_states)):
        change = policy_return(mdp, advantages, other) - policy_return(mdp, x, other)
        assert change == pytest.approx(-policy_return(mdp, x, policy), abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_properties_of_distances(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mdp = random_mdp(seed)
    rewards = [random_reward(rng, mdp) for _ in range(3)]
    for name in CANONICALIZATIONS:
        for norm in NORMS:
            found = distance_matrix([*rewards, 3 * rewards[0], -rewards[0]], mdp, name, norm, norm)
            np.testing.assert_allclose(found, found.T)
            np.testing.assert_allclose(np.diag(found), 0, atol=1e-12)
            assert found[0, 1] <= found[0, 2] + found[2, 1] + 1e-9
            assert (found <= 2 + 1e-9).all()
            assert found[0, 3] < 1e-7
            assert found[0, 4] == pytest.approx(2)
        angle = starc_distance(rewards[0], rewards[1], mdp, name, 2, "angle")
        chord = starc_distance(rewards[0], rewards[1], mdp, name)
        assert chord == pytest.approx(2 * np.sin(angle / 2), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_minimal_form_is_least_of_its_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mdp = random_mdp(seed, size=4, actions=2)
    reward = random_reward(rng, mdp)
    for name, norm in (("minimal", "w2"), ("minimal-2", 2), ("minimal-1", 1), ("minimal-inf", np.inf)):
        least = norm_of(Canonicalizer(mdp, name)(reward), norm, mdp)
        for other in STARC:
            assert least <= norm_of(Canonicalizer(mdp, other)(reward), norm, mdp) + 1e-7
        candidate = reward + shaping(rng, mdp) / 10 + redistribution(rng, mdp)
        assert least <= norm_of(candidate, norm, mdp) + 1e-7


def test_forms_that_are_not_invariant_to_redistribution() -> None:
    rng = np.random.default_rng(0)
    mdp = random_mdp(1, size=4, actions=2, discount=0.9)
    reward = random_reward(rng, mdp)
    moved = reward + redistribution(rng, mdp)
    for name in CANONICALIZATIONS:
        assert (starc_distance(reward, moved, mdp, name) < 1e-7) == (name in STARC)
    dard = Canonicalizer(mdp, "dard")
    assert np.abs(dard(dard(reward)) - dard(reward)).max() > 0.01, "it is not idempotent"


def test_equal_orders_have_distance_zero_and_zero_has_equal_orders() -> None:
    rng = np.random.default_rng(5)
    mdp = random_mdp(5, size=3, actions=2, discount=0.9)
    x = random_reward(rng, mdp)
    y = 4 * (x + shaping(rng, mdp)) + redistribution(rng, mdp)
    assert starc_distance(x, y, mdp) < 1e-9
    policies = list(itertools.product(range(2), repeat=3))
    returns = [[policy_return(mdp, r, np.array(p)) for p in policies] for r in (x, y)]
    np.testing.assert_array_equal(np.argsort(returns[0]), np.argsort(returns[1]))


def test_trivial_rewards() -> None:
    rng = np.random.default_rng(2)
    mdp = random_mdp(2, discount=0.9)
    reward = random_reward(rng, mdp)
    trivial = [np.zeros(()), np.full((), 7.0), shaping(rng, mdp), 1e6 * redistribution(rng, mdp)]
    for nothing in trivial:
        assert not Canonicalizer(mdp)(nothing).any()
        assert starc_distance(nothing, 0.0, mdp) == 0
        assert starc_distance(nothing, reward, mdp) == pytest.approx(1)
        assert starc_distance(nothing, reward, mdp, metric="angle") == pytest.approx(np.pi / 2)
        assert regret(nothing, reward, mdp) == worst_case_regret(nothing, reward, mdp) == 0
    assert starc_distance(reward, 1e-14 * reward, mdp) < 1e-9, "small is not trivial"


def test_a_cost_of_growing_weight() -> None:
    rng = np.random.default_rng(3)
    mdp = random_mdp(3, size=8, actions=3, discount=0.9)
    reward, cost = random_reward(rng, mdp), random_reward(rng, mdp)
    weights = [0, 0.1, 0.5, 1, 2, 5, 10, 100]
    found = [starc_distance(reward, reward - w * cost, mdp) for w in weights]
    assert found[0] == 0
    assert np.all(np.diff(found) > 0)
    assert found[-1] == pytest.approx(starc_distance(reward, -cost, mdp), abs=0.02)


# --- regret ----------------------------------------------------------------------------------------------


def test_optimal_policies_by_enumeration() -> None:
    rng = np.random.default_rng(4)
    mdp = random_mdp(4, size=4, actions=2, discount=0.8)
    reward = random_reward(rng, mdp)
    returns = [policy_return(mdp, reward, np.array(p)) for p in itertools.product(range(2), repeat=4)]
    actions, values = optimal_policy(mdp, reward)
    assert mdp.initial @ values == pytest.approx(max(returns))
    assert policy_return(mdp, reward, actions) == pytest.approx(max(returns))
    _, least = optimal_policy(mdp, reward, lowest=True)
    assert mdp.initial @ least == pytest.approx(min(returns))
    assert regret(reward, reward, mdp) == pytest.approx(0, abs=1e-12)
    assert regret(reward, -reward, mdp) == pytest.approx(1)
    assert average_regret(reward, -reward, mdp) == pytest.approx(1)


def test_regret_takes_the_worst_of_equally_good_policies() -> None:
    bandit = TabularMDP(np.ones((1, 3, 1)), 0.5)
    meant, optimised = np.array([[1.0, 0.25, 0.0]]), np.array([[1.0, 1.0, 0.0]])
    assert regret(meant, optimised, bandit) == pytest.approx(0.75)
    assert regret(optimised, meant, bandit) == 0
    # Half the first arm and half the last are as good for the second reward's eyes as ...
    assert worst_case_regret(meant, optimised, bandit) == pytest.approx(0.75)


def test_worst_case_regret_against_a_dense_search() -> None:
    rng = np.random.default_rng(7)
    bandit = TabularMDP(np.ones((1, 3, 1)), 0.0)
    x, y = rng.normal(size=(1, 3)), rng.normal(size=(1, 3))
    grid = np.array([p for p in itertools.product(np.linspace(0, 1, 41), repeat=3) if abs(sum(p) - 1) < 1e-9])
    jx, jy = grid @ x[0], grid @ y[0]
    losses = jx[:, None] - jx[None, :]
    searched = np.where(jy[None, :] >= jy[:, None] - 1e-12, losses, -np.inf).max() / np.ptp(x)
    found = worst_case_regret(x, y, bandit)
    assert searched <= found + 1e-9
    assert found == pytest.approx(searched, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_soundness(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mdp = random_mdp(seed, size=4, actions=2, discount=0.8)
    mix = rng.random() * 0.2
    x = random_reward(rng, mdp)
    y = x + mix * random_reward(rng, mdp)
    worst = worst_case_regret(x, y, mdp)
    assert regret(x, y, mdp) <= worst + 1e-9
    for norm in (1, 2, np.inf, "w1", "w2"):
        constant = soundness_constant(mdp, norm)
        assert worst <= constant * starc_distance(x, y, mdp, "val", norm, norm)
        assert worst <= regret_bound(x, y, mdp, norm) + 1e-9


def test_the_constants_worked_values() -> None:
    mdp = random_mdp(0, size=4, actions=2, discount=0.8)
    assert soundness_constant(mdp, np.inf) == pytest.approx(40)
    assert soundness_constant(mdp, 2) == pytest.approx(113.137, abs=1e-3)
    never = TabularMDP(np.ones((1, 2, 1)), 0.5)
    assert soundness_constant(never, np.inf) == pytest.approx(4)
    start = TabularMDP(mdp.transitions, 0.8, [1, 0, 0, 0])
    assert soundness_constant(start) == np.inf
    with pytest.raises(UsageError, match="norms 1, 2, inf"):
        soundness_constant(mdp, "winf")


# --- sparse dynamics -------------------------------------------------------------------------------------


def sparse_mdp(size: int, actions: int, successors: int, discount: float, seed: int = 0) -> TabularMDP:
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(size * actions), successors)
    columns = rng.integers(0, size, rows.size)
    weights = rng.dirichlet(np.ones(successors), size * actions).ravel()
    flat = sparse.csr_array((weights, (rows, columns)), (size * actions, size))
    return TabularMDP(flat, discount)


@pytest.mark.parametrize("discount", [0.0, 0.9, 0.999])
def test_sparse_is_dense(discount: float) -> None:
    rng = np.random.default_rng(1)
    thin = sparse_mdp(60, 3, 4, discount)
    dense = TabularMDP(thin.transitions, discount)
    assert thin.is_sparse
    assert not dense.is_sparse
    rewards = [random_reward(rng, dense), random_reward(rng, dense), rng.normal(size=(60, 3))]
    rewards.append(rewards[0] + shaping(rng, dense))
    flat = sparse.csr_array(rewards[0].reshape(180, 60))
    for name in CANONICALIZATIONS:
        if name in ("minimal-1", "minimal-inf") and discount > 0.99:
            continue
        np.testing.assert_allclose(
            distance_matrix(rewards, thin, name), distance_matrix(rewards, dense, name), atol=1e-6
        )
        canonical = Canonicalizer(thin, name)
        np.testing.assert_allclose(canonical(flat), canonical(rewards[0]), atol=1e-12)
        if name in ("val", "minimal"):
            assert canonical.residual < 1e-11
    for norm in NORMS:
        form = Canonicalizer(dense)(rewards[0])
        assert norm_of(form, norm, thin) == pytest.approx(norm_of(form, norm, dense))
    assert regret(rewards[0], rewards[1], thin) == pytest.approx(regret(rewards[0], rewards[1], dense))


def test_sparse_arrays_of_three_dimensions() -> None:
    table = random_mdp(6, size=5, actions=2, discount=0.9).transitions
    whole = TabularMDP(sparse.coo_array(table), 0.9)
    np.testing.assert_allclose(whole.transitions, table)
    reward = np.random.default_rng(0).normal(size=table.shape)
    np.testing.assert_allclose(Canonicalizer(whole)(sparse.coo_array(reward)), Canonicalizer(whole)(reward))


def test_many_states() -> None:
    mdp = sparse_mdp(20_000, 4, 10, 0.99)
    rng = np.random.default_rng(0)
    reward = rng.normal(size=(20_000, 4))
    potential = rng.normal(size=20_000)
    shaped = reward + 0.99 * mdp.ahead(potential) - potential[:, None]
    canonical = Canonicalizer(mdp)
    assert starc_distance(reward, shaped, mdp, canonical) < 1e-9
    assert canonical.residual < 1e-12
    assert starc_distance(reward, -reward, mdp, canonical) == pytest.approx(2)
    with pytest.raises(UsageError, match="take val or minimal"):
        starc_distance(reward, shaped, mdp, "epic")


# --- rewards in other shapes, and what is refused -----------------------------------------------------------


def test_shapes_of_rewards() -> None:
    mdp = random_mdp(8, size=5, actions=3, discount=0.9)
    rng = np.random.default_rng(0)
    by_state, by_action = rng.normal(size=5), rng.normal(size=(5, 3))
    for short, whole in (
        (by_state, np.broadcast_to(by_state[:, None, None], (5, 3, 5))),
        (by_action, np.broadcast_to(by_action[:, :, None], (5, 3, 5))),
        (by_state[None, None], np.broadcast_to(by_state[None, None], (5, 3, 5))),
        (2.0, np.full((5, 3, 5), 2.0)),
    ):
        for name in CANONICALIZATIONS:
            np.testing.assert_allclose(
                Canonicalizer(mdp, name)(short), Canonicalizer(mdp, name)(whole), atol=1e-9
            )
    # R(s') is R(s) but for shaping and a factor.
    assert starc_distance(by_state, by_state[None, None], mdp) < 1e-9


def test_no_normalisation_and_prepared_forms() -> None:
    mdp, first, second = switch()
    canonical = Canonicalizer(mdp)
    plain = starc_distance(first, 3 * first, mdp, canonical, None, 2)
    assert plain == pytest.approx(2 * 0.7106335202)
    assert norm_of(standardize(canonical(second), 1, mdp), 1, mdp) == pytest.approx(1)


GOOD = np.full((2, 2, 2), 0.5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TabularMDP(GOOD, 1.0), "the discount is 1"),
        (lambda: TabularMDP(GOOD, -0.1), "the discount is -0.1"),
        (lambda: TabularMDP(GOOD, np.nan), "the discount is nan"),
        (lambda: TabularMDP(0.9 * GOOD, 0.9), "from state 0 under action 0 .* sums to 0.9"),
        (lambda: TabularMDP(np.add(GOOD, [[[0, 0], [-1, 1]]]), 0.9), "state 0 under action 1 .* negative"),
        (lambda: TabularMDP(GOOD * np.nan, 0.9), "not finite"),
        (lambda: TabularMDP(np.ones((2, 2)), 0.9), r"shape \(2, 2\)"),
        (lambda: TabularMDP("x", 0.9), "no array of numbers"),
        (lambda: TabularMDP(sparse.csr_array(np.eye(3)[:2]), 0.9), r"must be \(S \* A, S'\)"),
        (lambda: TabularMDP(GOOD, 0.9, [1.0]), "2 non-negative numbers"),
        (lambda: TabularMDP(GOOD, 0.9, [0.2, 0.2]), "sums to 0.4"),
        (lambda: Canonicalizer(TabularMDP(GOOD, 0.9), "vall"), "did you mean 'val'"),
        (lambda: Canonicalizer(TabularMDP(GOOD, 0.9), "epic", policy=[0, 0]), "epic takes no policy"),
        (lambda: Canonicalizer(TabularMDP(GOOD, 0.9), policy=[0, 2]), "not one of 0 to 1"),
        (lambda: Canonicalizer(TabularMDP(GOOD, 0.9), policy=GOOD[0] + 1), "distributions over"),
        (lambda: Canonicalizer(TabularMDP(GOOD, 0.9), "epic", state_distribution=[1, 1]), "sums to 2"),
        (lambda: starc_distance(np.ones((3, 2)), 1, TabularMDP(GOOD, 0.9)), "does not fit 2 states"),
        (lambda: starc_distance([np.nan, 1], 1, TabularMDP(GOOD, 0.9)), "not finite"),
        (lambda: starc_distance([["a"]], 1, TabularMDP(GOOD, 0.9)), "no array of numbers"),
        (lambda: starc_distance(1, 1, TabularMDP(GOOD, 0.9), norm=3), "no norm 3"),
        (lambda: starc_distance(1, 1, TabularMDP(GOOD, 0.9), metric="w3"), "no norm 'w3'"),
        (lambda: starc_distance(1, 1, TabularMDP(GOOD, 0.9), norm=1, metric="angle"), "needs the norm 2"),
        (
            lambda: starc_distance(1, 1, TabularMDP(GOOD, 0.9), Canonicalizer(TabularMDP(GOOD, 0.5))),
            "another process",
        ),
    ],
)
def test_what_cannot_be_compared(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        make()
    assert "\n" not in str(caught.value)
