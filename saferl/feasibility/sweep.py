"""The compiled sweep of `saferl.feasibility.solve_on_grid`, apart so that numba is imported only for it."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray


@numba.njit(cache=True, fastmath=False)
def sweep(
    values: NDArray[np.float64],
    new: NDArray[np.float64],
    h: NDArray[np.float64],
    places: NDArray[np.float32],
    shape: NDArray[np.int64],
    loops: NDArray[np.bool_],
    discount: float,
) -> float:
    """Write the operator's image of `values` (S,) into `new`; returns the largest change.

    `places` (K, S, D) are next states in units of the grid, NaN in the first dimension after an end.
    """
    dims = len(shape)
    strides = np.ones(dims, np.int64)
    for d in range(dims - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    low, high, share = np.empty(dims, np.int64), np.empty(dims, np.int64), np.empty(dims)
    change = 0.0
    for s in range(len(values)):
        best = np.inf
        for k in range(len(places)):
            if np.isnan(places[k, s, 0]):
                following = -np.inf
            else:
                for d in range(dims):
                    place = places[k, s, d]
                    cell = min(int(place), shape[d] - 1)
                    beyond = cell + 1
                    if beyond == shape[d]:
                        beyond = 0 if loops[d] else cell
                    low[d], high[d], share[d] = cell * strides[d], beyond * strides[d], place - cell
                following = 0.0
                for corner in range(1 << dims):
                    weight, index = 1.0, 0
                    for d in range(dims):
                        if corner >> d & 1:
                            weight *= share[d]
                            index += high[d]
                        else:
                            weight *= 1 - share[d]
                            index += low[d]
                    if weight > 0:
                        following += weight * values[index]
            # A terminal transition leaves h alone, as the operator's mask does.
            target = h[s] if following == -np.inf else (1 - discount) * h[s] + discount * max(h[s], following)
            best = min(best, target)
        change = max(change, abs(best - values[s]))
        new[s] = best
    return change
