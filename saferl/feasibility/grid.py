"""Exact reachability on finite state spaces, in float64: the truth that learned regions are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "exact_safety_values",
    "expectile",
    "expectile_safety_values",
    "largest_feasible_region",
    "solve_on_grid",
]

Floats = NDArray[np.float64]


def largest_feasible_region(next_states: ArrayLike, safe: ArrayLike) -> NDArray[np.bool_]:
    """The states from which some policy stays in `safe` for ever.

    `next_states` (S, A) holds the index of the state that action a leads to from s, `safe` (S,) is true where
    the constraint holds. States are removed until each left has an action that stays: at most S rounds.
    Raises `ValueError` for an index that is no state.
    """
    following, region = _transitions(next_states), np.array(safe, bool)
    if region.shape != following.shape[:1]:
        raise ValueError(f"safe has shape {region.shape}, next_states {following.shape}; give one a state.")
    while True:
        kept = region & region[following].any(1)
        if (kept == region).all():
            return region
        region = kept


def exact_safety_values(
    next_states: ArrayLike, signals: ArrayLike, discount: float, *, tolerance: float = 1e-12
) -> tuple[Floats, Floats]:
    """V_h (S,) and Q_h (S, A) of the discounted safety operator, by value iteration to `tolerance`.

        Q_h(s, a) = (1 - gamma) h(s) + gamma max(h(s), V_h(s')),        V_h(s) = min_a Q_h(s, a)

    `signals` h (S,); discount 1 gives the undiscounted min-max value. Raises `ValueError` for a discount
    outside (0, 1] or an index that is no state.
    """
    return _iterate(next_states, signals, discount, tolerance, lambda q: q.min(1))


def expectile_safety_values(
    next_states: ArrayLike,
    signals: ArrayLike,
    discount: float,
    level: float,
    *,
    probabilities: ArrayLike | None = None,
    tolerance: float = 1e-12,
) -> tuple[Floats, Floats]:
    """What reverse expectile regression converges to with unlimited data and tables for networks.

    V_h(s) is the lower `level`-expectile of Q_h(s, a) over the data's actions, whose `probabilities` (S, A)
    or (A,) are uniform by default; 0.5 is their mean, level -> 1 the exact minimum. Returns V_h (S,) and
    Q_h (S, A). Raises `ValueError` like `exact_safety_values`, and for a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"the expectile is {level}; it must lie strictly between 0 and 1.")
    shape = _transitions(next_states).shape
    weights = np.full(shape, 1 / shape[1]) if probabilities is None else np.broadcast_to(probabilities, shape)
    return _iterate(next_states, signals, discount, tolerance, lambda q: expectile(q, 1 - level, weights))


def expectile(values: ArrayLike, level: float, probabilities: ArrayLike) -> Floats:
    """The `level`-expectile of each row: values and probabilities (S, A) -> (S,).

    It is the m with level E (x - m)_+ = (1 - level) E (m - x)_+. The derivative of the asymmetric square is
    piecewise linear in m, so m follows from sorting: with the k smallest values below m,
    m = weighted mean with weights (1 - level) p below and level p above.
    """
    x, p = np.asarray(values, np.float64), np.asarray(probabilities, np.float64)
    order = x.argsort(1)
    x, p = np.take_along_axis(x, order, 1), np.take_along_axis(np.broadcast_to(p, x.shape), order, 1)
    mass, sums = p.cumsum(1), (p * x).cumsum(1)
    total, weighted = mass[:, -1:], sums[:, -1:]
    # Each k gives a candidate; the right one lies between the k-th smallest value and the next.
    candidates = ((1 - level) * sums + level * (weighted - sums)) / (
        (1 - level) * mass + level * (total - mass)
    )
    upper = np.concatenate([x[:, 1:], np.full((len(x), 1), np.inf)], axis=1)
    distance = np.maximum(x - candidates, 0) + np.maximum(candidates - upper, 0)
    distance[~np.isfinite(distance)] = np.inf
    chosen = distance.argmin(1)
    result: Floats = candidates[np.arange(len(x)), chosen]
    return result


def _transitions(next_states: ArrayLike) -> NDArray[np.intp]:
    following = np.asarray(next_states, np.intp)
    if following.ndim != 2:
        raise ValueError(f"next_states has shape {following.shape}; give it (states, actions).")
    if following.size and (following.min() < 0 or following.max() >= len(following)):
        raise ValueError(f"next_states names a state outside 0 to {len(following) - 1}.")
    return following


def _iterate(
    next_states: ArrayLike,
    signals: ArrayLike,
    discount: float,
    tolerance: float,
    improve: Callable[[Floats], Floats],
) -> tuple[Floats, Floats]:
    """Apply the operator until no value moves by more than `tolerance`."""
    if not 0 < discount <= 1:
        raise ValueError(f"the discount is {discount}; it must lie in (0, 1].")
    following, h = _transitions(next_states), np.asarray(signals, np.float64)[:, None]
    if h.shape[0] != len(following):
        raise ValueError(f"there are {len(h)} signals and {len(following)} states; give one a state.")
    values = h[:, 0].copy()
    while True:
        q = (1 - discount) * h + discount * np.maximum(h, values[following])
        new = improve(q)
        if np.abs(new - values).max(initial=0.0) <= tolerance:
            return new, q
        values = new


def solve_on_grid(
    axes: Sequence[ArrayLike],
    advance: Callable[[Floats, Floats], Floats],
    actions: ArrayLike,
    signal: Callable[[Floats], Floats],
    *,
    ended: Callable[[Floats], NDArray[np.bool_]] | None = None,
    periodic: Sequence[int] = (),
    discount: float = 1.0,
    tolerance: float = 1e-6,
    max_sweeps: int = 10_000,
) -> Floats:
    """V_h on a grid over a continuous state space, by value iteration of the same operator.

    Between the grid's points values are interpolated linearly in every dimension, beyond its ends the end's
    value holds: exact in the limit of a fine grid and of all actions.

    Args:
        axes: D increasing, evenly spaced vectors of coordinates.
        advance: states (S, D) and one action (A,) to the next states (S, D).
        actions: (K, A), those that the minimum is taken over.
        signal: h (S,) of states (S, D).
        ended: whether an episode ends on arriving in states (S, D); what comes then does not count.
        periodic: axes that close on themselves, without their first coordinate repeated at the end.
        discount: 1 is the undiscounted min-max value.
        tolerance: largest change of a value in the last sweep.
        max_sweeps: give up after so many.

    Returns:
        values of shape (len(axes[0]), ..., len(axes[D - 1])).

    Raises:
        ValueError: an axis is not evenly spaced, or the discount lies outside (0, 1].
        RuntimeError: `max_sweeps` did not suffice.
    """
    if not 0 < discount <= 1:
        raise ValueError(f"the discount is {discount}; it must lie in (0, 1].")
    grids = [np.asarray(axis, np.float64) for axis in axes]
    for axis in grids:
        if len(axis) < 2 or not np.allclose(np.diff(axis), axis[1] - axis[0]) or axis[1] <= axis[0]:
            raise ValueError("every axis needs two or more increasing, evenly spaced coordinates.")
    shape = np.array([len(axis) for axis in grids])
    states = np.stack([x.ravel() for x in np.meshgrid(*grids, indexing="ij")], axis=1)
    loops = np.isin(np.arange(len(grids)), periodic)
    start = np.array([axis[0] for axis in grids])
    spacing = np.array([axis[1] - axis[0] for axis in grids])
    places = []
    for action in np.asarray(actions, np.float64):
        following = advance(states, action)
        place = (following - start) / spacing
        place = np.where(loops, place % shape, np.clip(place, 0, shape - 1)).astype(np.float32)
        if ended is not None:
            place[ended(following)] = np.nan
        places.append(place)
    from saferl.feasibility.sweep import sweep

    h = np.asarray(signal(states), np.float64)
    values, new = h.copy(), np.empty_like(h)
    table = np.stack(places)
    for _ in range(max_sweeps):
        change = sweep(values, new, h, table, shape, loops, discount)
        values, new = new, values
        if change <= tolerance:
            return values.reshape(shape)
    raise RuntimeError(f"the values still move by {change:.1e} after {max_sweeps} sweeps; allow more.")
