"""Markov decision processes as tables, dense or sparse, and the linear systems of their policies."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, sparse
from scipy.sparse import linalg as sparse_linalg

from saferl.errors import NonFiniteError, UsageError

__all__ = ["Floats", "PolicySolver", "TabularMDP", "is_sparse"]

Floats: TypeAlias = NDArray[np.float64]

_TOLERANCE = 1e-13
"""Relative residual that a sparse solution is refined to."""
_ROUNDS = 8


class TabularMDP:
    """States, actions, dynamics T, a discount and an initial distribution; no reward.

    Args:
        transitions: T(s' | s, a). An array (S, A, S'), a SciPy sparse array of that shape, or a SciPy sparse
            matrix (S * A, S') whose row s * A + a is T(. | s, a).
        discount: gamma in [0, 1).
        initial: distribution of the first state (S,); uniform when left out.

    Attributes:
        flat: the dynamics as a matrix (S * A, S'), dense or in sparse rows.

    Raises:
        UsageError: the shapes do not fit, a row is no distribution, or the discount is out of range.
    """

    def __init__(self, transitions: Any, discount: float, initial: ArrayLike | None = None) -> None:
        if not 0 <= discount < 1:
            raise UsageError(
                f"the discount is {discount:g}; it must be at least 0 and below 1, "
                "since values are sums over an endless future."
            )
        self.discount = float(discount)
        self.flat, self.num_states, self.num_actions = _flattened(transitions)
        self._check_rows()
        size = self.num_states
        start = np.full(size, 1 / size) if initial is None else np.asarray(initial, float)
        if start.shape != (size,) or not np.isfinite(start).all() or (start < 0).any():
            raise UsageError(f"the initial distribution must be {size} non-negative numbers, one a state.")
        if abs(start.sum() - 1) > 1e-6:
            raise UsageError(f"the initial distribution sums to {start.sum():.6g} instead of 1.")
        self.initial: Floats = start / start.sum()

    @property
    def is_sparse(self) -> bool:
        """Whether the dynamics are kept as a sparse matrix."""
        return is_sparse(self.flat)

    @property
    def transitions(self) -> Floats:
        """T as an array (S, A, S'). Raises `UsageError` if that is more than 4 GiB."""
        size, actions = self.num_states, self.num_actions
        if self.is_sparse and 8 * size * actions * size > 4 * 2**30:
            raise UsageError(
                f"{size:,} states and {actions} actions are too many for an array (S, A, S'); "
                "take a canonicalisation of the expected reward (val, minimal)."
            )
        dense = self.flat.toarray() if self.is_sparse else self.flat
        return np.asarray(dense).reshape(size, actions, size)

    def _check_rows(self) -> None:
        values = self.flat.data if self.is_sparse else self.flat
        if not np.isfinite(values).all():
            raise UsageError("the transitions hold a number that is not finite.")
        sums = np.asarray(self.flat.sum(axis=1)).ravel()
        least = np.asarray(self.flat.min(axis=1).toarray() if self.is_sparse else self.flat.min(axis=1))
        wrong = np.flatnonzero((np.abs(sums - 1) > 1e-6) | (least.ravel() < 0))
        if wrong.size:
            state, action = divmod(int(wrong[0]), self.num_actions)
            what = (
                "has a negative probability"
                if least.ravel()[wrong[0]] < 0
                else f"sums to {sums[wrong[0]]:.6g} instead of 1"
            )
            raise UsageError(
                f"the transitions from state {state} under action {action} are no distribution: "
                f"the row {what} ({wrong.size} such rows)."
            )

    # --- rewards ---------------------------------------------------------------------------------------

    def reward(self, reward: Any) -> Any:
        """A reward in the form of `expected`: an array broadcastable to (S, A, S'), or sparse (S * A, S').

        One number a state (S,) is R(s), a table (S, A) is R(s, a); else NumPy's broadcasting holds.

        Raises:
            UsageError: the shape does not fit or a number is not finite.
        """
        size, actions = self.num_states, self.num_actions
        if is_sparse(reward):
            flat = _flat_sparse(reward, f"the sparse reward has shape {reward.shape}")
            if flat.shape != (size * actions, size):
                raise UsageError(
                    f"the sparse reward has shape {reward.shape}; it must be {(size * actions, size)}."
                )
            _require_finite(flat.data)
            return flat
        try:
            array = np.asarray(reward, float)
        except (TypeError, ValueError) as error:
            raise UsageError(f"the reward is no array of numbers ({error}).") from error
        _require_finite(array)
        if array.shape == (size,):
            return array[:, None, None]
        if array.shape == (size, actions):
            return array[:, :, None]
        padded = array.reshape((1,) * (3 - array.ndim) + array.shape) if array.ndim <= 3 else array
        fits = array.ndim <= 3 and all(
            have in (1, want) for have, want in zip(padded.shape, (size, actions, size), strict=True)
        )
        if not fits:
            raise UsageError(
                f"the reward has shape {array.shape}, which does not fit {size} states and {actions} "
                f"actions; give (S, A, S') = {(size, actions, size)}, (S, A) or (S,)."
            )
        return padded

    def expected(self, reward: Any) -> Floats:
        """E[R(s, a, S')] (S, A), S' drawn from T(. | s, a); raises as `reward` does."""
        size, actions = self.num_states, self.num_actions
        reward = self.reward(reward)
        if is_sparse(reward):
            product = reward.multiply(self.flat)
            return np.asarray(product.sum(axis=1), float).reshape(size, actions)
        if reward.shape[2] == 1:
            return np.ascontiguousarray(np.broadcast_to(reward[:, :, 0], (size, actions)))
        if self.is_sparse:
            rows = self.flat.tocoo()
            state, action = np.divmod(rows.row, actions)
            whole = np.broadcast_to(reward, (size, actions, size))
            weighted = rows.data * whole[state, action, rows.col]
            return np.asarray(np.bincount(rows.row, weighted, size * actions), float).reshape(size, actions)
        full = np.broadcast_to(reward, (size, actions, size))
        return np.asarray(np.einsum("sat,sat->sa", full, self.flat.reshape(size, actions, size)))

    def ahead(self, values: Floats) -> Floats:
        """E[v(S')] (S, A) for values (S,)."""
        return np.asarray(self.flat @ values).reshape(self.num_states, self.num_actions)

    # --- policies --------------------------------------------------------------------------------------

    def uniform_policy(self) -> Floats:
        """The policy (S, A) that takes every action alike."""
        return np.full((self.num_states, self.num_actions), 1 / self.num_actions)

    def policy(self, policy: ArrayLike | None) -> Floats:
        """A policy (S, A), checked; uniform for None. Deterministic ones may be actions (S,)."""
        size, actions = self.num_states, self.num_actions
        if policy is None:
            return self.uniform_policy()
        table = np.asarray(policy)
        if table.shape == (size,) and np.issubdtype(table.dtype, np.integer):
            if table.min() < 0 or table.max() >= actions:
                raise UsageError(f"the policy names an action that is not one of 0 to {actions - 1}.")
            return np.asarray(np.eye(actions)[table])
        table = table.astype(float)
        if table.shape != (size, actions):
            raise UsageError(f"the policy has shape {table.shape}; it must be {(size, actions)}.")
        if not (np.isfinite(table).all() and (table >= 0).all() and np.allclose(table.sum(1), 1, atol=1e-6)):
            raise UsageError("the policy's rows must be distributions over the actions.")
        return table

    def under(self, policy: Floats) -> Any:
        """Dynamics (S, S') of a policy (S, A)."""
        size, actions = self.num_states, self.num_actions
        if not self.is_sparse:
            table = self.flat.reshape(size, actions, size)
            return np.matmul(policy[:, None, :], table)[:, 0]
        rows = np.repeat(np.arange(size), actions)
        choice = sparse.csr_array((policy.ravel(), (rows, np.arange(size * actions))), (size, size * actions))
        return (choice @ self.flat).tocsr()


class PolicySolver:
    """Values of one policy for any number of rewards: the system I - gamma P is prepared once.

    A dense system is factorised. A sparse one is solved by BiCGSTAB, preconditioned by its diagonal, and
    refined until the residual is rounding.

    Args:
        mdp: the process.
        policy: probabilities (S, A).

    Attributes:
        residual: largest residual of the last solution, relative to the right-hand side.
    """

    def __init__(self, mdp: TabularMDP, policy: Floats) -> None:
        self.residual = 0.0
        dynamics = mdp.under(policy)
        size = mdp.num_states
        if mdp.is_sparse:
            self._system = (sparse.eye_array(size, format="csr") - mdp.discount * dynamics).tocsr()
            self._inverse_diagonal = 1 / self._system.diagonal()
            self._factors = None
        else:
            self._system = np.eye(size) - mdp.discount * dynamics
            self._factors = linalg.lu_factor(self._system, check_finite=False)

    def solve(self, right: Floats) -> Floats:
        """v (S,) with (I - gamma P) v = right (S,).

        Raises:
            NonFiniteError: the iteration did not converge.
        """
        scale = float(np.abs(right).max(initial=0.0))
        if scale == 0:
            self.residual = 0.0
            return np.zeros_like(right)
        if self._factors is not None:
            values = np.asarray(linalg.lu_solve(self._factors, right, check_finite=False))
            self.residual = float(np.abs(right - self._system @ values).max()) / scale
            return values
        scaled = sparse_linalg.LinearOperator(
            self._system.shape, matvec=lambda x: self._inverse_diagonal * x, dtype=float
        )
        values = np.zeros_like(right)
        remainder = right
        for _ in range(_ROUNDS):
            step, _ = sparse_linalg.bicgstab(self._system, remainder, rtol=1e-8, maxiter=1_000, M=scaled)
            after = right - self._system @ (values + step)
            if not np.abs(after).max() < np.abs(remainder).max():
                break
            values, remainder = values + step, after
            if np.abs(remainder).max() <= _TOLERANCE * scale:
                break
        self.residual = float(np.abs(remainder).max()) / scale
        if not self.residual < 1e-8:
            raise NonFiniteError(
                f"the values of the policy did not converge (relative residual {self.residual:.1e}); "
                "is the discount within rounding of 1?"
            )
        return values


def is_sparse(array: Any) -> bool:
    """Whether it is one of SciPy's sparse arrays or matrices."""
    return bool(sparse.issparse(array))


def _flattened(transitions: Any) -> tuple[Any, int, int]:
    """(S * A, S') as float64, S and A."""
    if is_sparse(transitions):
        flat = _flat_sparse(transitions, f"the sparse transitions have shape {transitions.shape}")
        rows, size = flat.shape
        if size == 0 or rows == 0 or rows % size:
            raise UsageError(
                f"the sparse transitions have shape {transitions.shape}; they must be (S * A, S'), "
                "row s * A + a for state s and action a."
            )
        flat = sparse.csr_array(flat, dtype=float)
        flat.sum_duplicates()
        return flat, size, rows // size
    try:
        array = np.asarray(transitions, float)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the transitions are no array of numbers ({error}).") from error
    if array.ndim != 3 or array.shape[0] != array.shape[2] or 0 in array.shape:
        raise UsageError(f"the transitions have shape {array.shape}; they must be (S, A, S').")
    size, actions, _ = array.shape
    return array.reshape(size * actions, size), size, actions


def _flat_sparse(matrix: Any, what: str) -> Any:
    if matrix.ndim == 3:
        size, actions, after = matrix.shape
        return matrix.reshape((size * actions, after)).tocsr()
    if matrix.ndim != 2:
        raise UsageError(f"{what}; it must be (S, A, S') or (S * A, S').")
    return matrix.tocsr()


def _require_finite(values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise UsageError("the reward holds a number that is not finite.")
