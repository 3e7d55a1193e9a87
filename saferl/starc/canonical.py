"""Canonical forms of rewards: what is left when that which cannot change the order of policies is removed.

Two rewards order all policies of a process alike exactly if they differ by potential shaping
gamma Phi(s') - Phi(s), by a redistribution over s' that keeps E[R(s, a, S')], and by a positive factor
(Skalse et al., "STARC: A General Framework For Quantifying Differences Between Reward Functions", 2024;
arXiv 2309.15257, Definitions 1 and 2; the equivalence itself is Skalse and Abate 2023, unverified). A STARC
canonicalisation is linear and maps two rewards to one form exactly if they differ by the first two:

=================  ============================================================  ======
val                E[R + gamma V(S') - V(s)], V the value of a reference policy  STARC
minimal            the least E|c|^2, S' weighted by the dynamics, of its class   STARC
minimal-2          the least |c|_2 of its class                                  STARC
minimal-1          the least |c|_1 of its class                                  note 1
minimal-inf        the least |c|_inf of its class                                note 1
val-potential      R + gamma V(s') - V(s)                                        note 2
minimal-potential  the least |c|_2 that shaping reaches                          note 2
epic               Gleave et al. 2021 (arXiv 2006.13900)                         note 2
dard               Wulfe et al. 2022                                             note 2
none               R itself                                                      note 2
=================  ============================================================  ======

Note 1: invariant, but not linear, since the least is not unique; the linear programme is given a
representative that depends on the class alone, so that equal classes get equal forms.
Note 2: no STARC canonicalisation. All but none are invariant to shaping; none is to redistribution, so that
rewards on impossible transitions enter.

The form of val is the advantage function of the reference policy.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg, optimize, sparse
from scipy.sparse import linalg as sparse_linalg

from saferl.errors import NonFiniteError, UsageError, unknown_name
from saferl.starc.tabular import Floats, PolicySolver, TabularMDP, is_sparse

__all__ = ["CANONICALIZATIONS", "Canonicalization", "Canonicalizer"]

Canonicalization = Literal[
    "val",
    "minimal",
    "minimal-2",
    "minimal-1",
    "minimal-inf",
    "val-potential",
    "minimal-potential",
    "epic",
    "dard",
    "none",
]
"""Names of the canonicalisations."""

CANONICALIZATIONS: tuple[str, ...] = get_args(Canonicalization)

_TRIVIAL = 1e-12
"""Entries this far below the reward's values are rounding, not reward."""


class Canonicalizer:
    """Maps rewards of one process to their canonical forms; what can be prepared once is.

    Args:
        mdp: the process.
        canonicalization: one of `CANONICALIZATIONS`.
        policy: reference policy (S, A), or actions (S,), of val and val-potential; uniform when left out.
        state_distribution: D_S (S,) of epic; uniform when left out.
        action_distribution: D_A (A,) of epic and dard; uniform when left out.

    Attributes:
        residual: largest residual of the last linear solution, relative to the reward.

    Raises:
        UsageError: the name is unknown, a distribution is none, or an option does not belong to the name.
    """

    def __init__(
        self,
        mdp: TabularMDP,
        canonicalization: str = "val",
        *,
        policy: ArrayLike | None = None,
        state_distribution: ArrayLike | None = None,
        action_distribution: ArrayLike | None = None,
    ) -> None:
        if canonicalization not in CANONICALIZATIONS:
            raise unknown_name("canonicalization", canonicalization, CANONICALIZATIONS)
        given = {
            "policy": (policy, ("val", "val-potential")),
            "state_distribution": (state_distribution, ("epic",)),
            "action_distribution": (action_distribution, ("epic", "dard")),
        }
        for option, (value, where) in given.items():
            if value is not None and canonicalization not in where:
                raise UsageError(f"{canonicalization} takes no {option}; {' and '.join(where)} do.")
        self.mdp = mdp
        self.canonicalization = canonicalization
        self.residual = 0.0
        self._states = _distribution(state_distribution, mdp.num_states, "state distribution")
        self._actions = _distribution(action_distribution, mdp.num_actions, "action distribution")
        if canonicalization in ("val", "val-potential", "minimal-1", "minimal-inf"):
            self._policy = mdp.policy(policy)
            self._solver = PolicySolver(mdp, self._policy)
        if canonicalization == "minimal":
            self._least_squares = _LeastSquares(mdp, np.ones(mdp.num_states * mdp.num_actions))
        elif canonicalization == "minimal-2":
            self._spread = _row_squares(mdp)
            self._least_squares = _LeastSquares(mdp, 1 / np.sqrt(self._spread))

    def __call__(self, reward: Any) -> Floats:
        """The canonical form of a reward (see `TabularMDP.reward`).

        Returns:
            an array (S, A, S'), or (S, A, 1) where the form does not depend on s'. Entries that are
            rounding are exactly 0, so that the form of a trivial reward is 0.

        Raises:
            UsageError: the reward does not fit the process.
            NonFiniteError: a linear system did not converge.
        """
        name = self.canonicalization
        if name in ("val", "minimal", "minimal-2", "minimal-1", "minimal-inf"):
            array = self.mdp.reward(reward)
            means = self.mdp.expected(array)
            # What cancels in the mean over s' leaves rounding of its own size.
            scale = float(self.mdp.expected(abs(array)).max(initial=0.0))
            form = self._of_means(means)
        else:
            full = self._full(reward)
            scale = float(np.abs(full).max(initial=0.0))
            form = self._of_rewards(full)
        floor = max(_TRIVIAL, 10 * self.residual) * scale / (1 - self.mdp.discount)
        if np.abs(form).max(initial=0.0) <= floor:
            return np.zeros_like(form)
        return form

    def _of_means(self, means: Floats) -> Floats:
        """The form for expected rewards (S, A)."""
        name = self.canonicalization
        if name == "val":
            return self._advantages(means)[:, :, None]
        if name == "minimal":
            return self._residuals(means)[:, :, None]
        if name == "minimal-2":
            shape = (self.mdp.num_states, self.mdp.num_actions)
            share = (self._residuals(means) / self._spread.reshape(shape))[:, :, None]
            return np.asarray(share * self.mdp.transitions)
        # The form of val depends on the class alone; with scale and sign taken out, so does the programme's.
        start = self._advantages(means)
        scale = float(np.abs(start).max(initial=0.0))
        scale = float(np.copysign(scale, start.ravel() @ np.cos(np.arange(start.size))))
        if abs(scale) <= _TRIVIAL * np.abs(means).max(initial=0.0):
            return np.zeros((*means.shape, 1))
        form = (
            self._least_absolute(start / scale) if name == "minimal-1" else self._least_largest(start / scale)
        )
        return scale * form

    def _of_rewards(self, reward: Floats) -> Floats:
        """The form for rewards (S, A, S')."""
        mdp, discount = self.mdp, self.mdp.discount
        if self.canonicalization == "none":
            return reward
        if self.canonicalization == "val-potential":
            values = self._values(mdp.expected(reward))
            return np.asarray(reward + discount * values - values[:, None, None])
        if self.canonicalization == "minimal-potential":
            return self._shaped(reward, _minimal_potential(reward, discount))
        by_policy = np.einsum("a,sat->st", self._actions, reward)
        if self.canonicalization == "epic":
            # E R(s, A, S') of every state s; the last term, the same for all transitions, is its mean.
            means = by_policy @ self._states
            return np.asarray(self._shaped(reward, means) - discount * (self._states @ means))
        # dard: E R(s', A, S''), E R(s, A, S') and E R(S', A, S''), one action in all, S' and S'' from T.
        tables = mdp.transitions
        means = np.einsum("a,sat,sat->s", self._actions, tables, reward)
        across = np.zeros((mdp.num_states, mdp.num_states))
        for action, weight in enumerate(self._actions):
            table = tables[:, action]
            across += weight * (table @ reward[:, action] @ table.T)
        return np.asarray(self._shaped(reward, means) - discount * across[:, None, :])

    def _shaped(self, reward: Floats, potential: Floats) -> Floats:
        """R + gamma Phi(s') - Phi(s)."""
        return np.asarray(reward + self.mdp.discount * potential - potential[:, None, None])

    def _full(self, reward: Any) -> Floats:
        """The reward as (S, A, S')."""
        mdp = self.mdp
        shape = (mdp.num_states, mdp.num_actions, mdp.num_states)
        if 8 * np.prod(shape, dtype=float) > 4 * 2**30:
            raise UsageError(
                f"{self.canonicalization} needs rewards as an array (S, A, S'), too large for "
                f"{mdp.num_states:,} states; take val or minimal."
            )
        array = mdp.reward(reward)
        dense = array.toarray().reshape(shape) if is_sparse(array) else array
        return np.asarray(np.broadcast_to(dense, shape), float)

    # --- linear systems and programmes -------------------------------------------------------------------

    def _values(self, means: Floats) -> Floats:
        values = self._solver.solve((self._policy * means).sum(axis=1))
        self.residual = self._solver.residual
        return values

    def _advantages(self, means: Floats) -> Floats:
        """A(s, a) = E R + gamma E V(S') - V(s) (S, A)."""
        values = self._values(means)
        return np.asarray(means + self.mdp.discount * self.mdp.ahead(values) - values[:, None])

    def _residuals(self, means: Floats) -> Floats:
        """m + D Phi (S, A) at the least weighted squares."""
        potential = self._least_squares.solve(-means.ravel())
        self.residual = self._least_squares.residual
        return np.asarray(means + self.mdp.discount * self.mdp.ahead(potential) - potential[:, None])

    def _least_absolute(self, means: Floats) -> Floats:
        """The least |c|_1 (S, A, S'): all of a row's mean on its likeliest successor."""
        mdp = self.mdp
        flat = sparse.csr_array(mdp.flat)
        likeliest = np.asarray(flat.argmax(axis=1)).ravel()
        weights = 1 / np.asarray(flat.max(axis=1).toarray()).ravel()
        rows, system = means.size, _shaping_matrix(mdp)
        # |m + D Phi| <= u, weighted sum of u least.
        identity = sparse.eye_array(rows)
        bounds = sparse.block_array([[system, -identity], [-system, -identity]], format="csr")
        right = np.concatenate([-means.ravel(), means.ravel()])
        cost = np.concatenate([np.zeros(mdp.num_states), weights])
        potential = _programme(cost, bounds, right, mdp.num_states)
        form = np.zeros((rows, mdp.num_states))
        form[np.arange(rows), likeliest] = (means.ravel() + system @ potential) * weights
        return form.reshape(mdp.num_states, mdp.num_actions, mdp.num_states)

    def _least_largest(self, means: Floats) -> Floats:
        """The least |c|_inf (S, A, 1): a row's mean on all its successors."""
        mdp = self.mdp
        system = _shaping_matrix(mdp)
        column = sparse.csr_array(np.ones((means.size, 1)))
        bounds = sparse.block_array([[system, -column], [-system, -column]], format="csr")
        right = np.concatenate([-means.ravel(), means.ravel()])
        cost = np.concatenate([np.zeros(mdp.num_states), [1.0]])
        potential = _programme(cost, bounds, right, mdp.num_states)
        return np.asarray(means.ravel() + system @ potential).reshape(*means.shape, 1)


class _LeastSquares:
    """argmin over x of |W (D x - b)|_2 for the shaping matrix D (S * A, S) and row weights W."""

    def __init__(self, mdp: TabularMDP, weights: Floats) -> None:
        self.residual = 0.0
        self._weights = weights
        self._system: Any
        system = _shaping_matrix(mdp) if mdp.is_sparse else _dense_shaping_matrix(mdp)
        if mdp.is_sparse:
            self._system = sparse.csr_array(sparse.diags_array(weights) @ system)
            self._normal = (self._system.T @ self._system).tocsr()
            self._factors = None
        else:
            self._system = weights[:, None] * system
            self._factors = linalg.qr(self._system, mode="economic", check_finite=False)

    def solve(self, right: Floats) -> Floats:
        right = self._weights * right
        if self._factors is not None:
            q, r = self._factors
            return np.asarray(linalg.solve_triangular(r, q.T @ right, check_finite=False), float)
        scale = float(np.abs(self._system.T @ right).max(initial=0.0))
        solution = np.zeros(self._system.shape[1])
        if scale == 0:
            self.residual = 0.0
            return solution
        diagonal = self._normal.diagonal()
        scaled = sparse_linalg.LinearOperator(
            self._normal.shape, matvec=lambda x: np.asarray(x) / diagonal, dtype=float
        )
        for _ in range(8):
            remainder = self._system.T @ (right - self._system @ solution)
            self.residual = float(np.abs(remainder).max()) / scale
            if self.residual <= 1e-12:
                break
            step, _ = sparse_linalg.cg(self._normal, remainder, rtol=1e-6, maxiter=5_000, M=scaled)
            solution = solution + step
        if not self.residual < 1e-6:
            raise NonFiniteError(
                f"the least squares did not converge (relative residual {self.residual:.1e}); "
                "is the discount within rounding of 1?"
            )
        return solution


def _shaping_matrix(mdp: TabularMDP) -> Any:
    """D (S * A, S), sparse: D Phi = gamma E Phi(S') - Phi(s)."""
    rows = mdp.num_states * mdp.num_actions
    states = np.repeat(np.arange(mdp.num_states), mdp.num_actions)
    here = sparse.csr_array((np.ones(rows), (np.arange(rows), states)), (rows, mdp.num_states))
    return (mdp.discount * sparse.csr_array(mdp.flat) - here).tocsr()


def _dense_shaping_matrix(mdp: TabularMDP) -> Floats:
    system = np.asarray(mdp.discount * mdp.flat)
    rows = np.arange(len(system))
    system[rows, rows // mdp.num_actions] -= 1
    return system


def _row_squares(mdp: TabularMDP) -> Floats:
    """|T(. | s, a)|_2^2 (S * A,)."""
    squares = mdp.flat.multiply(mdp.flat) if mdp.is_sparse else mdp.flat**2
    return np.asarray(squares.sum(axis=1)).ravel()


def _minimal_potential(reward: Floats, discount: float) -> Floats:
    """argmin over Phi of the sum of (R + gamma Phi(s') - Phi(s))^2 over all (s, a, s').

    The normal equations are A [(1 + gamma^2) S I - 2 gamma 11^T] Phi = A S (means), so Phi is explicit.
    """
    size, actions, _ = reward.shape
    leaving, entering = reward.sum(axis=(1, 2)), reward.sum(axis=(0, 1))
    right = (leaving - discount * entering) / actions
    diagonal = (1 + discount**2) * size
    total = right.sum() / (diagonal - 2 * discount * size)
    return np.asarray((right + 2 * discount * total) / diagonal)


def _programme(cost: Floats, bounds: Any, right: Floats, states: int) -> Floats:
    """Phi (S,) at the least cost."""
    limits = [(None, None)] * states + [(0, None)] * (len(cost) - states)
    found = optimize.linprog(cost, A_ub=bounds, b_ub=right, bounds=limits, method="highs")
    if not found.success:
        raise NonFiniteError(f"the linear programme of the canonical form failed ({found.message}).")
    return np.asarray(found.x)[:states]


def _distribution(weights: ArrayLike | None, size: int, what: str) -> Floats:
    if weights is None:
        return np.full(size, 1 / size)
    array = np.asarray(weights, float)
    if array.shape != (size,) or not np.isfinite(array).all() or (array < 0).any():
        raise UsageError(f"the {what} must be {size} non-negative numbers.")
    if abs(array.sum() - 1) > 1e-6:
        raise UsageError(f"the {what} sums to {array.sum():.6g} instead of 1.")
    return np.asarray(array / array.sum())
