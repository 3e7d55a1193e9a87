"""Standardised rewards and distances between them: canonicalise, normalise, compare (STARC, Definition 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from saferl.errors import UsageError
from saferl.starc.canonical import Canonicalizer
from saferl.starc.tabular import Floats, TabularMDP

__all__ = [
    "NORMS",
    "Metric",
    "Norm",
    "distance_matrix",
    "metric_between",
    "norm_of",
    "standardize",
    "starc_distance",
]

Norm: TypeAlias = float | str | None
"""1, 2, numpy.inf, or "w1", "w2", "winf" with transitions weighted by T; None for no normalisation."""

Metric: TypeAlias = float | str
"""A norm of the difference, or "angle" in radians."""

NORMS: tuple[float | str, ...] = (1, 2, np.inf, "w1", "w2", "winf")
_NAMES = {"1": 1, "2": 2, "inf": np.inf}


def norm_of(form: Floats, norm: float | str, mdp: TabularMDP) -> float:
    """The norm of a form (S, A, S'), or (S, A, 1) for one that does not depend on s'.

    Weighted norms are (sum T |c|^p)^(1/p) and, for infinity, max T |c|. Raises `UsageError` for an unknown
    norm.
    """
    power, weighted = _parsed(norm)
    size = np.abs(form)
    successors = mdp.num_states if form.shape[2] == 1 else 1
    if weighted:
        if form.shape[2] == 1:
            # sum over s' of T is 1; the largest T of a row is what counts for infinity.
            if power == np.inf:
                likeliest = mdp.flat.max(axis=1)
                likeliest = likeliest.toarray() if mdp.is_sparse else likeliest
                return float((size[:, :, 0].ravel() * np.asarray(likeliest).ravel()).max())
            return float((size**power).sum() ** (1 / power))
        weights = mdp.transitions
        if power == np.inf:
            return float((weights * size).max())
        return float((weights * size**power).sum() ** (1 / power))
    if power == np.inf:
        return float(size.max())
    return float((successors * (size**power).sum()) ** (1 / power))


def standardize(form: Floats, norm: Norm, mdp: TabularMDP) -> Floats:
    """c / n(c), or c where that is 0 or no norm is given."""
    length = 0.0 if norm is None else norm_of(form, norm, mdp)
    return form / length if length > 0 else form


def metric_between(first: Floats, second: Floats, metric: Metric, mdp: TabularMDP, norm: Norm = 2) -> float:
    """m(x, y) of two standardised forms.

    For the angle the norm must be 2 or "w2"; the angle with a trivial reward is pi / 2. Raises `UsageError`
    for unknown names.
    """
    if metric != "angle":
        return norm_of(first - second, metric, mdp)
    if norm not in (2, "2", "w2"):
        raise UsageError(f'the angle needs the norm 2 or "w2", not {norm!r}.')
    lengths = norm_of(first, norm, mdp), norm_of(second, norm, mdp)
    if lengths == (0, 0):
        return 0.0
    if 0 in lengths:
        return float(np.pi / 2)
    first, second = first / lengths[0], second / lengths[1]
    # Twice the arctangent of half chord over half sum: exact where the cosine is flat.
    chord, together = norm_of(first - second, norm, mdp), norm_of(first + second, norm, mdp)
    return float(2 * np.arctan2(chord, together))


def distance_matrix(
    rewards: Sequence[Any],
    mdp: TabularMDP,
    canonicalization: str | Canonicalizer = "val",
    norm: Norm = 2,
    metric: Metric = 2,
) -> Floats:
    """STARC distances (K, K) between K rewards.

    Args:
        rewards: arrays that `TabularMDP.reward` takes.
        mdp: the process.
        canonicalization: a name, or a prepared `Canonicalizer` of the same process.
        norm: n.
        metric: m.

    Raises:
        UsageError: a name is unknown or a reward does not fit.
    """
    if norm is not None:
        _parsed(norm)
    if metric != "angle":
        _parsed(metric)
    elif norm not in (2, "2", "w2"):
        raise UsageError(f'the angle needs the norm 2 or "w2", not {norm!r}.')
    canonical = (
        canonicalization
        if isinstance(canonicalization, Canonicalizer)
        else Canonicalizer(mdp, canonicalization)
    )
    if canonical.mdp is not mdp:
        raise UsageError("the canonicalizer was prepared for another process.")
    forms = [standardize(canonical(reward), norm, mdp) for reward in rewards]
    found = np.zeros((len(forms), len(forms)))
    for i in range(len(forms)):
        for j in range(i):
            found[i, j] = found[j, i] = metric_between(forms[i], forms[j], metric, mdp, norm)
    return found


def starc_distance(
    r1: Any,
    r2: Any,
    mdp: TabularMDP,
    canonicalization: str | Canonicalizer = "val",
    norm: Norm = 2,
    metric: Metric = 2,
) -> float:
    """How differently two rewards order the policies of a process: 0 alike, 2 opposite for norms n = m.

    m(c(R1) / n(c(R1)), c(R2) / n(c(R2))), where a form of norm 0 stays. Arguments and errors are those of
    `distance_matrix`. Distances under different names, processes or discounts do not compare.
    """
    return float(distance_matrix([r1, r2], mdp, canonicalization, norm, metric)[0, 1])


def _parsed(norm: float | str) -> tuple[float, bool]:
    """Power and whether transitions are weighted."""
    name = norm.removeprefix("w") if isinstance(norm, str) else norm
    power = _NAMES.get(name) if isinstance(name, str) else name
    if power not in (1, 2, np.inf):
        raise UsageError(f'there is no norm {norm!r}; norms are 1, 2, inf, "w1", "w2" and "winf".')
    return float(power), isinstance(norm, str) and norm.startswith("w")
