"""STARC distances from transitions alone: continuous states, rewards as functions or as columns.

Every reward goes through the same linear operator. With features psi(s) that hold a constant, chi(s, a) that
hold psi, and D = gamma (1 - done) psi(s') - psi(s), all over the same transitions,

    val         w solves psi' D w = -psi' r                        (LSTD: V of the policy that made the data)
    minimal     w minimises |P (r + D w)|, P the projection on chi
    c(s, a)  =  P (r + D w)

so that shaping by a potential in the span of psi drops out exactly, whatever the number of transitions, and
redistribution over s' averages out. Distances are those of n = m = L2 under the data's (s, a):

    d = sqrt(2 - 2 cos(c1, c2)),        0 same order of policies, sqrt(2) unrelated, 2 opposite.

Inner products are taken between forms of two halves of the episodes, each with an operator of its own: noise
that does not repeat then biases none (ours; the authors' code samples each reward apart, which makes noise
look like difference). Where a form is so noisy that the halves' hardly correlate, the forms of all data are
compared instead, with a caution: equal and opposite orders stay exact. Intervals are bootstrapped over blocks
of episodes.

A potential beyond the features' span remains as difference. Features are monomials, random ones, and, with
`network`, the last layer of a network that has learned the rewards' values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from saferl.errors import UsageError
from saferl.starc.features import Basis, Features, Transitions
from saferl.starc.tabular import Floats

__all__ = ["Comparison", "Features", "Reward", "Transitions", "compare", "evaluate_rewards"]

Reward: TypeAlias = Callable[[Any, Any, Any], ArrayLike] | ArrayLike
"""(observations, actions, next_observations) -> (N,), or the numbers (N,) themselves."""

_CHUNK = 1 << 15
_SINGULAR = 1e-13
"""Eigenvalues of the features' Gram matrix below this share of the largest are left out."""
_ROUNDING = 1e-11
"""Mean square of a canonical form, for rewards of largest entry 1, that is rounding."""
_SETTLED = 0.3
"""Correlation between halves from which inner products are taken between them."""


@dataclass(frozen=True)
class Comparison:
    """Distances between K rewards, and how far to trust them.

    Attributes:
        distances: (K, K); 1 from a trivial reward, 0 between two.
        low: lower end of the interval (K, K).
        high: upper end.
        trivial: rewards (K,) that all policies earn alike, to rounding.
        repeats: correlation (K,) of a reward's canonical form between the halves; near 1 for a form that the
            data settle.
        rank: features of (s, a) that the data tell apart.
        action_noise: share of the actions' variance that the state does not decide.
        transitions: N.
        cautions: sentences on what makes the answer unsure; empty where nothing does.
    """

    distances: Floats
    low: Floats
    high: Floats
    trivial: NDArray[np.bool_]
    repeats: Floats
    rank: int
    action_noise: float
    transitions: int
    cautions: list[str] = field(default_factory=list)


def compare(
    rewards: Sequence[Reward],
    transitions: Transitions,
    discount: float,
    *,
    canonicalization: Literal["val", "minimal"] = "val",
    features: Features | None = None,
    resamples: int = 100,
    confidence: float = 0.95,
    device: str | torch.device = "cpu",
) -> Comparison:
    """STARC distances between rewards, from the same transitions.

    Args:
        rewards: K functions or columns.
        transitions: steps of the policy that val takes for reference; any with varied actions will do.
        discount: gamma in [0, 1).
        canonicalization: "val" or "minimal".
        features: 128 random ones by default.
        resamples: bootstrap samples of the interval.
        confidence: its level.
        device: where the sums are formed.

    Raises:
        UsageError: a reward is not finite or of another length, or an option is out of range.
    """
    if not 0 <= discount < 1:
        raise UsageError(f"the discount is {discount:g}; it must be at least 0 and below 1.")
    if canonicalization not in ("val", "minimal"):
        raise UsageError(f"from samples there are val and minimal, not {canonicalization!r}.")
    if not 0 < confidence < 1 or resamples < 20:
        raise UsageError("the confidence must lie between 0 and 1, with at least 20 resamples.")
    if len(rewards) < 2:
        raise UsageError("a comparison needs at least two rewards.")
    features = Features() if features is None else features
    where = torch.device(device)
    columns = evaluate_rewards(rewards, transitions)
    scales = np.abs(columns).max(axis=0)
    scaled = columns / np.where(scales > 0, scales, 1)
    blocks = _blocks(transitions.episodes)
    basis = Basis(transitions, features, scaled, discount, where)
    raw = _RawSums.over(transitions, scaled, basis, blocks, discount, where)
    noise = _action_noise(raw, len(basis.action_mean))
    sums = _Sums.of(raw)
    halves = _halves(len(sums.count), np.random.default_rng(features.seed))
    forms = _Forms.of(sums, np.ones(len(sums.count)), halves, canonicalization)
    distances, trivial, repeats = _distances(forms)
    low, high = _interval(sums, halves, canonicalization, resamples, confidence, features.seed)
    result = Comparison(
        distances=distances,
        low=np.minimum(low, distances),
        high=np.maximum(high, distances),
        trivial=trivial,
        repeats=repeats,
        rank=sums.gram.shape[1],
        action_noise=noise,
        transitions=len(transitions),
    )
    result.cautions.extend(_cautions(result))
    return result


def evaluate_rewards(rewards: Sequence[Reward], transitions: Transitions) -> Floats:
    """Rewards (N, K) on the transitions.

    Raises:
        UsageError: a reward gives another shape or a number that is not finite.
    """
    columns = []
    for index, reward in enumerate(rewards):
        given = (
            reward(transitions.observations, transitions.actions, transitions.next_observations)
            if callable(reward)
            else reward
        )
        if isinstance(given, Tensor):
            given = given.detach().cpu().numpy()
        try:
            column = np.asarray(given, float)
        except (TypeError, ValueError) as error:
            raise UsageError(f"reward {index} gives no numbers ({error}).") from error
        if column.shape == (len(transitions), 1):
            column = column[:, 0]
        if column.shape != (len(transitions),):
            raise UsageError(
                f"reward {index} has shape {column.shape} for {len(transitions):,} transitions; "
                "it must give one number for each."
            )
        if not np.isfinite(column).all():
            row = int(np.flatnonzero(~np.isfinite(column))[0])
            raise UsageError(f"reward {index} is not finite at transition {row:,}.")
        columns.append(column)
    return np.stack(columns, axis=1)


# --- sums over the data ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RawSums:
    """All that the estimator needs of the data, for each of B blocks of episodes."""

    count: Tensor
    """Transitions (B,)."""
    gram: Tensor
    """chi' chi (B, G, G), which holds psi' psi in its first F rows and columns."""
    shaping: Tensor
    """chi' D (B, G, F)."""
    rewards: Tensor
    """chi' r (B, G, K)."""
    state_features: int
    """F."""

    @classmethod
    def over(
        cls,
        data: Transitions,
        rewards: Floats,
        basis: Basis,
        blocks: NDArray[np.intp],
        discount: float,
        device: torch.device,
    ) -> _RawSums:
        """One pass over the data, in chunks that do not cross blocks."""
        order = np.argsort(blocks, kind="stable")
        edges = np.searchsorted(blocks[order], np.arange(blocks.max() + 2))
        totals: list[tuple[Tensor, Tensor, Tensor]] = []
        states = 0
        assert data.terminations is not None
        for first, last in pairwise(edges):
            mine: list[Tensor] | None = None
            for start in range(first, last, _CHUNK):
                rows = order[start : min(start + _CHUNK, last)]
                psi, chi = basis.both(data.observations[rows], data.actions[rows])
                going = torch.as_tensor(~data.terminations[rows], device=device).double()[:, None]
                shaping = discount * going * basis.psi(data.next_observations[rows]) - psi
                values = torch.as_tensor(rewards[rows], device=device)
                states = psi.shape[1]
                parts = [chi.T @ chi, chi.T @ shaping, chi.T @ values]
                mine = parts if mine is None else [a + b for a, b in zip(mine, parts, strict=True)]
            assert mine is not None
            totals.append((mine[0], mine[1], mine[2]))
        gram, shaping, values = (torch.stack(parts) for parts in zip(*totals, strict=True))
        count = torch.as_tensor(np.diff(edges), dtype=torch.float64, device=device)
        return cls(count, gram, shaping, values, states)


@dataclass(frozen=True)
class _Sums:
    """The same with features that are orthonormal over all data: singular directions are gone."""

    count: Tensor
    """(B,)."""
    gram: Tensor
    """chi' chi (B, G, G)."""
    shaping: Tensor
    """chi' D (B, G, F)."""
    rewards: Tensor
    """chi' r (B, G, K)."""
    state_shaping: Tensor
    """psi' D (B, F, F)."""
    state_rewards: Tensor
    """psi' r (B, F, K)."""

    @classmethod
    def of(cls, raw: _RawSums) -> _Sums:
        """Rotate; the potentials' coordinates are those of the rotated psi."""
        first = raw.state_features
        pairs = _inverse_root(raw.gram.sum(0))
        states = _inverse_root(raw.gram.sum(0)[:first, :first])
        shaping = raw.shaping @ states
        return cls(
            raw.count,
            pairs.T @ raw.gram @ pairs,
            pairs.T @ shaping,
            pairs.T @ raw.rewards,
            states.T @ shaping[:, :first],
            states.T @ raw.rewards[:, :first],
        )

    def total(self, weights: Tensor) -> list[Tensor]:
        """Sums over blocks with weights (B,), in the order of the fields."""
        fields = (self.gram, self.shaping, self.rewards, self.state_shaping, self.state_rewards)
        flat = (torch.mv(x.flatten(1).T, weights).view(x.shape[1:]) for x in fields)
        return [weights @ self.count, *flat]


def _action_noise(sums: _RawSums, size: int) -> float:
    """Share of the actions' variance that psi does not explain."""
    first = sums.state_features
    gram = sums.gram.sum(0)
    count = sums.count.sum()
    own = gram[first : first + size, first : first + size].diagonal() / count
    inverse = _inverse_root(gram[:first, :first])
    along = inverse.T @ gram[:first, first : first + size]
    explained = (along.square().sum(0)) / count
    varied = own > 1e-12
    if not varied.any():
        return 0.0
    return float((1 - (explained / own)[varied]).clamp(0, 1).max())


def _blocks(episodes: NDArray[Any] | None) -> NDArray[np.intp]:
    """A block (N,) for each step: whole episodes, at most 64 blocks of about the same size."""
    assert episodes is not None
    _, first, inverse, counts = np.unique(
        episodes, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first, kind="stable")
    before = np.empty(len(counts), np.intp)
    before[order] = np.concatenate([[0], np.cumsum(counts[order])[:-1]])
    wanted = min(64, len(counts))
    raw = (before * wanted // len(episodes))[inverse]
    return np.unique(raw, return_inverse=True)[1].astype(np.intp)


def _halves(blocks: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which blocks (B,) are of the first half."""
    if blocks < 4:
        raise UsageError(
            f"the data hold {blocks} episodes; at least 4 are needed, to tell noise from reward."
        )
    chosen = np.zeros(blocks, bool)
    chosen[rng.permutation(blocks)[: blocks // 2]] = True
    return chosen


# --- the operator ----------------------------------------------------------------------------------------


def _inverse_root(gram: Tensor) -> Tensor:
    """W (G, rank) with W' gram W = I, over the directions that are not singular.

    Features are scaled to the same length first.
    """
    lengths = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(lengths > 0, 1 / lengths.clamp_min(1e-300), 0)
    values, vectors = torch.linalg.eigh(inverse[:, None] * gram * inverse)
    kept = values > _SINGULAR * values[-1]
    root: Tensor = inverse[:, None] * vectors[:, kept] / values[kept].sqrt()
    return root


@dataclass(frozen=True)
class _Forms:
    """Inner products (K, K) of canonical forms."""

    between: Floats
    """Of the first half's with the second half's."""
    first: Floats
    second: Floats
    whole: Floats
    """Of those of all data."""

    @classmethod
    def of(
        cls, sums: _Sums, weights: NDArray[Any], halves: NDArray[np.bool_], canonicalization: str
    ) -> _Forms:
        total = torch.as_tensor(weights, dtype=torch.float64, device=sums.gram.device)
        mine = torch.as_tensor(halves, device=total.device)
        parts = [sums.total(total * mine), sums.total(total * ~mine)]
        everything = [a + b for a, b in zip(*parts, strict=True)]
        first, second, whole = (_coefficients(part, canonicalization) for part in (*parts, everything))
        gram = everything[1] / everything[0]
        pairs = ((first, second), (first, first), (second, second), (whole, whole))
        return cls(*((a.T @ gram @ b).cpu().numpy() for a, b in pairs))


def _coefficients(sums: list[Tensor], canonicalization: str) -> Tensor:
    """b (G, K) with c = chi b."""
    _, gram, shaping, rewards, state_shaping, state_rewards = sums
    if canonicalization == "val":
        potential = _solve(-state_shaping, state_rewards)
    else:
        along = _solve(gram, shaping)
        potential = _solve(-shaping.T @ along, along.T @ rewards)
    return _solve(gram, rewards + shaping @ potential)


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """The solution, or that of least squares where a resample leaves the system singular."""
    found: Tensor
    found, info = torch.linalg.solve_ex(system, right)
    if info != 0 or not found.isfinite().all():
        found = torch.linalg.lstsq(system.cpu(), right.cpu(), driver="gelsd").solution.to(system.device)
    return found


def _distances(forms: _Forms) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Distances (K, K), trivial rewards (K,) and repeats (K,)."""
    squares, both = np.diag(forms.between), np.sqrt(np.diag(forms.first) * np.diag(forms.second))
    # Rewards were scaled to largest entry 1: a form this small is rounding.
    nothing = np.diag(forms.whole) <= _ROUNDING
    repeats = np.divide(squares, both, out=np.zeros_like(squares), where=(both > 0) & ~nothing)
    crossed = _cosines((forms.between + forms.between.T) / 2)
    shared = _cosines(forms.whole)
    settled = repeats >= _SETTLED
    cosines = np.where(settled[:, None] & settled, crossed, shared)
    distances = np.sqrt(2 - 2 * np.clip(cosines, -1, 1))
    distances[nothing] = 1
    distances[:, nothing] = 1
    distances[np.ix_(nothing, nothing)] = 0
    np.fill_diagonal(distances, 0)
    return distances, nothing, repeats


def _cosines(products: Floats) -> Floats:
    squares = np.diag(products)
    lengths = np.sqrt(np.where(squares > 0, squares, 1))
    return np.asarray(products / np.outer(lengths, lengths))


def _interval(
    sums: _Sums,
    halves: NDArray[np.bool_],
    canonicalization: str,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[Floats, Floats]:
    """Percentile interval; each half is resampled in itself, so that the halves stay independent."""
    rng = np.random.default_rng(seed + 1)
    found = []
    for _ in range(resamples):
        weights = np.zeros(len(halves))
        for chosen in (halves, ~halves):
            members = np.flatnonzero(chosen)
            np.add.at(weights, rng.choice(members, len(members)), 1.0)
        found.append(_distances(_Forms.of(sums, weights, halves, canonicalization))[0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.array(found), [tail, 1 - tail], axis=0)
    return low, high


def _cautions(result: Comparison) -> list[str]:
    said = []
    if result.action_noise < 0.01:
        said.append(
            f"the state decides {1 - result.action_noise:.1%} of the actions' variance in these data: "
            "what other actions would earn cannot be seen; record with more random actions."
        )
    if result.transitions < 20 * result.rank:
        said.append(
            f"{result.transitions:,} transitions are few for {result.rank} features; "
            "give more data or fewer features."
        )
    for index in np.flatnonzero(result.trivial):
        said.append(f"all policies earn reward {index} alike: it is constant, or shaping and no more.")
    for index in np.flatnonzero(~result.trivial & (result.repeats < _SETTLED)):
        said.append(
            f"reward {index}: by these {result.transitions:,} transitions its canonical form is mostly noise "
            f"(correlation {result.repeats[index]:.2f} between halves of the data), which moves distances "
            "between 0 and 2 towards the middle; give more data."
        )
    width = float((result.high - result.low).max())
    if width > 0.5:
        said.append(f"an interval is {width:.2f} wide; give more episodes.")
    return said
