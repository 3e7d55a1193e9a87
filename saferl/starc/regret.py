"""What it costs to optimise one reward when another is meant: exact returns, regrets and their bounds.

A regret here is a share of the meant reward's range, (J(pi*) - J(pi)) / (J(pi*) - J(worst)), between 0 and 1;
it is 0 where the meant reward is trivial.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, sparse

from saferl.errors import NonFiniteError, UsageError
from saferl.starc.distance import Norm, starc_distance
from saferl.starc.tabular import Floats, PolicySolver, TabularMDP

__all__ = [
    "average_regret",
    "optimal_policy",
    "policy_return",
    "policy_values",
    "regret",
    "regret_bound",
    "soundness_constant",
    "worst_case_regret",
]

_TIE = 1e-9
"""Advantages this small, relative to the largest value, are ties."""


def policy_values(mdp: TabularMDP, reward: Any, policy: ArrayLike) -> Floats:
    """V (S,) of a policy (S, A), or actions (S,). Raises `UsageError` if one does not fit."""
    table = mdp.policy(policy)
    return PolicySolver(mdp, table).solve((table * mdp.expected(reward)).sum(axis=1))


def policy_return(mdp: TabularMDP, reward: Any, policy: ArrayLike) -> float:
    """J, the expected discounted return from the initial distribution. Raises as `policy_values` does."""
    return float(mdp.initial @ policy_values(mdp, reward, policy))


def optimal_policy(
    mdp: TabularMDP, reward: Any, *, lowest: bool = False, allowed: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.intp], Floats]:
    """Actions (S,) of the greatest return and their values (S,), by policy iteration.

    Args:
        mdp: the process.
        reward: see `TabularMDP.reward`.
        lowest: seek the least return instead.
        allowed: actions (S, A) to choose among; all when left out.

    Raises:
        UsageError: the reward does not fit, or a state has no allowed action.
    """
    means = mdp.expected(reward) * (-1 if lowest else 1)
    every = np.ones(means.shape, bool) if allowed is None else allowed
    if not every.any(axis=1).all():
        raise UsageError("a state has no allowed action.")
    states = np.arange(mdp.num_states)
    actions = np.where(every, means, -np.inf).argmax(axis=1)
    while True:
        values = PolicySolver(mdp, np.eye(mdp.num_actions)[actions]).solve(means[states, actions])
        ahead = np.where(every, means + mdp.discount * mdp.ahead(values), -np.inf)
        better = ahead.argmax(axis=1)
        gain = ahead[states, better] - ahead[states, actions]
        changed = gain > 1e-11 * (1 + np.abs(values).max())
        if not changed.any():
            return actions, -values if lowest else values
        actions = np.where(changed, better, actions)


def regret(meant: Any, optimised: Any, mdp: TabularMDP) -> float:
    """Share of the range of `meant` that the worst of the policies optimal for `optimised` loses.

    Optimal is meant in every state, reachable or not. Raises `UsageError` if a reward does not fit.
    """
    _, best = optimal_policy(mdp, meant)
    _, least = optimal_policy(mdp, meant, lowest=True)
    span = float(mdp.initial @ (best - least))
    if _trivial(span, mdp, meant):
        return 0.0
    means = mdp.expected(optimised)
    _, values = optimal_policy(mdp, optimised)
    advantages = means + mdp.discount * mdp.ahead(values) - values[:, None]
    ties = advantages >= -_TIE * max(np.abs(values).max(), np.abs(means).max(), 1e-300)
    _, got = optimal_policy(mdp, meant, lowest=True, allowed=ties)
    return float(np.clip(mdp.initial @ (best - got) / span, 0.0, 1.0))


def average_regret(r1: Any, r2: Any, mdp: TabularMDP) -> float:
    """Mean of `regret` in both directions, as in STARC's experiment. Raises as `regret` does."""
    return (regret(r1, r2, mdp) + regret(r2, r1, mdp)) / 2


def worst_case_regret(r1: Any, r2: Any, mdp: TabularMDP) -> float:
    """max (J1(pi1) - J1(pi2)) / range(J1) over policies with J2(pi2) >= J2(pi1).

    What STARC's soundness bounds: the most of R1 that a step which R2 does not call worse can lose. Exact, by
    a linear programme over the occupancies of both policies; not symmetric. Raises `UsageError` if a reward
    does not fit.
    """
    _, best = optimal_policy(mdp, r1)
    _, least = optimal_policy(mdp, r1, lowest=True)
    span = float(mdp.initial @ (best - least))
    if _trivial(span, mdp, r1):
        return 0.0
    rows = mdp.num_states * mdp.num_actions
    states = np.repeat(np.arange(mdp.num_states), mdp.num_actions)
    leaving = sparse.csr_array((np.ones(rows), (states, np.arange(rows))), (mdp.num_states, rows))
    flow = (leaving - mdp.discount * sparse.csr_array(mdp.flat).T).tocsr()
    first, second = mdp.expected(r1).ravel(), mdp.expected(r2).ravel()
    first = first / max(np.abs(first).max(), 1e-300)
    second = second / max(np.abs(second).max(), 1e-300)
    start = (1 - mdp.discount) * mdp.initial
    solve: Any = optimize.linprog
    found = solve(
        np.concatenate([-first, first]),
        A_ub=sparse.csr_array(np.concatenate([second, -second])[None]),
        b_ub=[0.0],
        A_eq=sparse.block_diag([flow, flow], format="csr"),
        b_eq=np.concatenate([start, start]),
        method="highs",
    )
    if not found.success:
        raise NonFiniteError(f"the linear programme of the regret failed ({found.message}).")
    lost = -found.fun / (1 - mdp.discount) * np.abs(mdp.expected(r1)).max()
    return float(np.clip(lost / span, 0.0, 1.0))


def soundness_constant(mdp: TabularMDP, norm: Norm = 2) -> float:
    """U with worst_case_regret <= U d for distances d by val and n = m = `norm`.

    2 (S A)^(1/p) / ((1 - gamma) min mu), infinite where a state is never first: since |J_x - J_y| is at most
    |x - y|_inf / (1 - gamma), and acting greedily for or against the advantages gains at least
    min mu |c(R1)|_inf. Ours; STARC proves that some U exists (its form there is unverified). Loose.

    Raises:
        UsageError: the norm is not 1, 2, inf, "w1" or "w2".
    """
    powers: dict[Norm, float] = {1: 1.0, 2: 2.0, np.inf: np.inf, "w1": 1.0, "w2": 2.0}
    if norm not in powers:
        raise UsageError(f'the constant is known for the norms 1, 2, inf, "w1" and "w2", not {norm!r}.')
    least = float(mdp.initial.min())
    if least == 0:
        return float("inf")
    entries = mdp.num_states * mdp.num_actions
    return float(2 * entries ** (1 / powers[norm]) / ((1 - mdp.discount) * least))


def regret_bound(r1: Any, r2: Any, mdp: TabularMDP, norm: Norm = 2) -> float:
    """What `worst_case_regret` is at most: min(1, U d) with `soundness_constant` and the distance by val."""
    distance = starc_distance(r1, r2, mdp, "val", norm, norm if norm is not None else 2)
    return min(1.0, soundness_constant(mdp, norm) * distance) if distance > 0 else 0.0


def _trivial(span: float, mdp: TabularMDP, reward: Any) -> bool:
    scale = float(mdp.expected(abs(mdp.reward(reward))).max(initial=0.0)) / (1 - mdp.discount)
    return span <= 1e-11 * scale
