"""STARC distances between reward models, from the scores of sampled responses.

A reward model r(x, y) of prompts x and responses y is the reward of a contextual bandit: the prompt is the
state, the response the action, and the episode ends after it. Shaping then is any offset b(x), so that two
reward models rank all policies alike exactly if r2 = a r1 + b(x) with a > 0. With the policy that sampled the
responses for reference, val is the score less its mean over the prompt's responses, which is also the
baseline of GRPO. Under n = m = L2 over the sample,

    d = sqrt(2 - 2 rho),        rho the correlation of the scores within prompts, pooled over prompts,

0 for the same order of policies, sqrt(2) for unrelated ones, 2 for opposite ones. Both forms are centred by
the same responses, so that rho needs no correction for small groups; norms do, and have it.

The plain correlation of two reward models is dominated by what a prompt adds to all its responses, which no
policy can change. Division by each prompt's standard deviation is no remedy: prompts whose scale differs
weigh differently in what a policy earns. Whether d is 0 does not depend on the sampler, as long as it gives
every response a chance, but the size of d does; name the sampler wherever d is reported. A small d between
two cost models does not carry a limit over, which neither offsets nor factors preserve.

Under a policy tilted by exp(beta r1), the mean of r2 changes with beta by the covariance within prompts: on
the policy's own samples, more of r1 still brings more of r2 while d < sqrt(2), and less beyond. The distance
between proxy and gold on the current policy's samples is thus an alarm for reward hacking. This and the form
for reward models are ours, derived from the definitions of STARC (arXiv 2309.15257, Definitions 1 to 3).

Scores come in one of two layouts: (X, K), K responses for each of X prompts; or flat (N,) beside prompt ids
(N,), any number of responses a prompt, in any order. Every response counts alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from torch import Tensor

from saferl.errors import UsageError
from saferl.starc.tabular import Floats

__all__ = [
    "RewardModel",
    "RewardModelComparison",
    "bandit_distance",
    "best_of_n_regret",
    "canonical_scores",
    "compare_reward_models",
    "pearson_distance",
    "score_responses",
]

RewardModel: TypeAlias = Callable[[Any, Any], Any]
"""(prompts, responses), n of each, to scores (n,): an array, a tensor or numbers."""

_ROUNDING = 1e-12
"""Canonical scores this far below the largest score are rounding, not reward."""
_FEW = 30
"""Prompts below which a percentile interval is noticeably too narrow."""
_FAINT = 1e-3
"""Spread within prompts, as a share of the largest score, that half precision rounds away."""


@dataclass(frozen=True)
class RewardModelComparison:
    """Distances between R reward models, and how far to trust them.

    Attributes:
        names: of the reward models (R,).
        sampler: the policy that the responses are from.
        distances: (R, R); 1 from a trivial reward, 0 between two.
        low: lower end of the interval (R, R).
        high: upper end.
        angles: between the canonical forms (R, R), radians; pi / 2 from a trivial reward, 0 between two.
        norms: root mean square (R,) of a canonical form in the scores' unit, with the correction
            sqrt(K / (K - 1)) for centring by K samples: the standard deviation within prompts.
        trivial: reward models (R,) that score all responses to a prompt alike, to rounding.
        prompts: X.
        responses: N.
        cautions: sentences on what makes the answer unsure; empty where nothing does.
    """

    names: tuple[str, ...]
    sampler: str
    distances: Floats
    low: Floats
    high: Floats
    angles: Floats
    norms: Floats
    trivial: NDArray[np.bool_]
    prompts: int
    responses: int
    cautions: list[str]


def compare_reward_models(
    rewards: Mapping[str, RewardModel | ArrayLike],
    sampler: str,
    *,
    prompts: Sequence[Any] | NDArray[Any] | None = None,
    responses: Sequence[Any] | NDArray[Any] | None = None,
    prompt_ids: ArrayLike | None = None,
    batch_size: int = 256,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> RewardModelComparison:
    """STARC distances between reward models, with percentile intervals bootstrapped over prompts.

    Args:
        rewards: by name, functions or scores, (X, K) or (N,).
        sampler: name of the policy that the responses were sampled from.
        prompts: what functions are given first, (N,): the prompt of each response.
        responses: what they are given second (N,).
        prompt_ids: id (N,) of each response's prompt, integers or strings; needed for (N,).
        batch_size: responses that a function scores at a time.
        resamples: bootstrap samples of the interval.
        confidence: its level.
        seed: of the bootstrap.

    Raises:
        UsageError: scores are not finite or their shapes differ, no prompt has two responses, or an option
            is out of range.
    """
    if len(rewards) < 2:
        raise UsageError("a comparison needs at least two reward models.")
    if not sampler:
        raise UsageError("name the policy that sampled the responses; distances depend on it.")
    if not 0 < confidence < 1 or resamples < 20:
        raise UsageError("the confidence must lie between 0 and 1, with at least 20 resamples.")
    scores = {}
    for name, reward in rewards.items():
        if callable(reward):
            if prompts is None or responses is None:
                raise UsageError(f"reward model {name!r} is a function; give the prompts and responses.")
            scores[name] = score_responses(reward, prompts, responses, batch_size)
        else:
            scores[name] = _numbers(reward, f"reward model {name!r}")
    groups = _Groups.of(scores, prompt_ids)
    if not groups.counts.max() > 1:
        raise UsageError("every prompt has one response, which says nothing; give several to each.")
    forms = np.stack([groups.canonical(column) for column in scores.values()])
    sums = _PromptSums.of(forms, groups)
    distances = sums.distances(np.ones(groups.size))
    rng = np.random.default_rng(seed)
    drawn = np.stack(
        [
            sums.distances(np.bincount(rng.integers(groups.size, size=groups.size), minlength=groups.size))
            for _ in range(resamples)
        ]
    )
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    trivial = np.asarray(~forms.any(axis=1))
    norms = np.sqrt((forms**2).sum(axis=1) / (groups.counts - 1).sum())
    angles = 2 * np.arcsin(np.minimum(distances / 2, 1))
    angles[trivial[:, None] != trivial] = np.pi / 2
    return RewardModelComparison(
        names=tuple(scores),
        sampler=sampler,
        distances=distances,
        low=np.minimum(low, distances),
        high=np.maximum(high, distances),
        angles=angles,
        norms=norms,
        trivial=trivial,
        prompts=groups.size,
        responses=int(groups.counts.sum()),
        cautions=_cautions(scores, norms, trivial, groups),
    )


def bandit_distance(first: ArrayLike, second: ArrayLike, prompt_ids: ArrayLike | None = None) -> float:
    """STARC distance between two reward models by their scores, (X, K) or (N,) with prompt ids (N,).

    Raises:
        UsageError: scores are not finite or their shapes do not fit.
    """
    scores = {"first": _numbers(first, "the first reward"), "second": _numbers(second, "the second reward")}
    groups = _Groups.of(scores, prompt_ids)
    forms = np.stack([groups.canonical(column) for column in scores.values()])
    return float(_PromptSums.of(forms, groups).distances(np.ones(groups.size))[0, 1])


def canonical_scores(scores: ArrayLike, prompt_ids: ArrayLike | None = None) -> Floats:
    """Scores less the mean over their prompt's responses, in the layout given; 0 everywhere if trivial.

    The val canonicalisation of a bandit, and GRPO's advantage before its division by the group's standard
    deviation. A prompt's only response gets 0.

    Raises:
        UsageError: scores are not finite or the shape does not fit.
    """
    array = _numbers(scores, "the reward")
    groups = _Groups.of({"reward": array}, prompt_ids)
    form = np.empty(array.size)
    form[groups.order] = groups.canonical(array)
    return form.reshape(array.shape)


def pearson_distance(first: ArrayLike, second: ArrayLike) -> float:
    """sqrt((1 - rho) / 2) of the plain correlation over all responses, between 0 and 1; for contrast only.

    EPIC's distance (Gleave et al. 2021, arXiv 2006.13900) without its canonicalisation. It counts what a
    prompt adds to all its responses, so that it is neither small only for rewards that rank policies alike
    nor large only for others. A constant reward is taken as uncorrelated, and as equal to another constant.

    Raises:
        UsageError: scores are not finite or their shapes differ.
    """
    scores = {"first": _numbers(first, "the first reward"), "second": _numbers(second, "the second reward")}
    whole = np.zeros(scores["first"].size, int)
    groups = _Groups.of({name: array.ravel() for name, array in scores.items()}, whole)
    forms = np.stack([groups.canonical(array) for array in scores.values()])
    if (~forms.any(axis=1)).sum() == 1:
        return float(np.sqrt(0.5))
    return float(_PromptSums.of(forms, groups).distances(np.ones(1))[0, 1] / 2)


def best_of_n_regret(
    meant: ArrayLike, proxy: ArrayLike, n: int, prompt_ids: ArrayLike | None = None
) -> float:
    """Share of best-of-n's gain in the meant reward that is lost when the proxy selects.

        sum_x (B(x) - P(x)) / sum_x (B(x) - M(x))

    B(x) is the expected meant reward of the response that the meant reward picks among n, P(x) of the one
    that the proxy picks, and M(x) of one response without selection. 0: nothing is lost; 1: the proxy gains
    nothing; above 1: it selects worse than chance. Sums over prompts keep prompts that leave little to gain
    from dominating, and the share has the invariances of the distance: an offset for each prompt and a
    positive factor. 0 for a trivial meant reward. Where both rewards are jointly normal within prompts, it is
    1 - rho = d^2 / 2 for every n (ours); other laws depart from it, above all heavy-tailed errors at large n.

    Expectations are exact, over all subsets of n of a prompt's K responses (the j-th lowest is the best of
    C(j - 1, n - 1) of the C(K, n) subsets); tied responses are picked with equal chance.

    Args:
        meant: scores of the meant reward, (X, K) or (N,).
        proxy: scores of the proxy, of the same shape.
        n: responses to choose among, at least 2 and at most the smallest group.
        prompt_ids: id (N,) of each response's prompt; needed for (N,).

    Raises:
        UsageError: scores are not finite or their shapes do not fit, or n is out of range.
    """
    scores = {"meant": _numbers(meant, "the meant reward"), "proxy": _numbers(proxy, "the proxy")}
    groups = _Groups.of(scores, prompt_ids)
    if not 2 <= n <= groups.counts.min():
        raise UsageError(
            f"n is {n}; it must lie between 2 and the {groups.counts.min()} responses of a prompt."
        )
    form = groups.canonical(scores["meant"])
    best = form @ _chosen(form, n, groups)
    # The canonical meant reward has mean 0 in every prompt, so that M is 0.
    if best <= 0:
        return 0.0
    got = form @ _chosen(scores["proxy"].ravel()[groups.order], n, groups)
    return max(0.0, float((best - got) / best))


def score_responses(
    reward: RewardModel,
    prompts: Sequence[Any] | NDArray[Any],
    responses: Sequence[Any] | NDArray[Any],
    batch_size: int = 256,
) -> Floats:
    """Scores (N,) of N responses, each with its prompt, in batches of at most `batch_size`.

    Raises:
        UsageError: there are not as many prompts as responses, or none, the batch size is not positive, or
            the function gives another shape or a number that is not finite.
    """
    count = len(responses)
    if len(prompts) != count or count == 0:
        raise UsageError(f"there are {len(prompts):,} prompts for {count:,} responses; give one for each.")
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}; it must be at least 1.")
    scores = np.empty(count)
    for start in range(0, count, batch_size):
        end = min(start + batch_size, count)
        part = _numbers(reward(prompts[start:end], responses[start:end]), "the reward model")
        if part.shape not in ((end - start,), (end - start, 1)):
            raise UsageError(
                f"the reward model gives shape {part.shape} for {end - start} responses; "
                "it must give one number for each."
            )
        scores[start:end] = part.ravel()
    return scores


# --- groups of responses ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Groups:
    """Responses ordered by prompt."""

    order: NDArray[np.intp]
    """Flat indices (N,) of the responses, prompt after prompt."""
    starts: NDArray[np.intp]
    """Where each prompt begins (X,)."""
    counts: NDArray[np.intp]
    """Its responses (X,)."""

    @property
    def size(self) -> int:
        return len(self.counts)

    @classmethod
    def of(cls, scores: Mapping[str, Floats], prompt_ids: ArrayLike | None) -> _Groups:
        """The groups of scores, whose shapes must agree."""
        shapes = {name: array.shape for name, array in scores.items()}
        first, shape = next(iter(shapes.items()))
        for name, other in shapes.items():
            if other != shape:
                raise UsageError(
                    f"the scores of {name!r} have shape {other} and those of {first!r} {shape}; "
                    "all must score the same responses."
                )
        if prompt_ids is None:
            if len(shape) != 2 or 0 in shape:
                raise UsageError(
                    f"the scores have shape {shape}; give (X, K), or (N,) together with prompt ids."
                )
            prompts, each = shape
            counts = np.full(prompts, each)
            return cls(np.arange(prompts * each), each * np.arange(prompts), counts)
        ids = np.asarray(prompt_ids)
        if len(shape) != 1 or ids.shape != shape or 0 in shape:
            raise UsageError(
                f"the prompt ids have shape {ids.shape} and the scores {shape}; both must be (N,), N > 0."
            )
        if ids.dtype.kind not in "iuUS":
            raise UsageError(f"prompt ids must be integers or strings, not {ids.dtype}.")
        _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
        return cls(np.argsort(inverse, kind="stable"), np.cumsum(counts) - counts, counts)

    def canonical(self, scores: Floats) -> Floats:
        """Centred scores (N,), ordered by prompt; exactly 0 where they are rounding."""
        column = scores.ravel()[self.order]
        # Less the first of its group: equal scores then give 0 exactly, whatever their size.
        form = column - np.repeat(column[self.starts], self.counts)
        form -= np.repeat(self.sum(form) / self.counts, self.counts)
        if np.abs(form).max() <= _ROUNDING * np.abs(column).max():
            return np.zeros_like(form)
        return form

    def sum(self, values: Floats) -> Floats:
        """Sums (X,) over the prompts' responses of values (N,) ordered by prompt."""
        return np.asarray(np.add.reduceat(values, self.starts))


@dataclass(frozen=True)
class _PromptSums:
    """What distances under any weights of the prompts need."""

    squares: Floats
    """sum_y a^2 (X, R) of the forms, scaled to a largest entry of 1."""
    apart: Floats
    """sum_y (a_i - a_j)^2 (X, R (R - 1) / 2); not from inner products, whose rounding would be 1e-8 in d."""
    pairs: tuple[NDArray[np.intp], NDArray[np.intp]]

    @classmethod
    def of(cls, forms: Floats, groups: _Groups) -> _PromptSums:
        largest = np.abs(forms).max(axis=1, keepdims=True)
        unit = forms / np.where(largest > 0, largest, 1)
        squares = np.stack([groups.sum(form**2) for form in unit], axis=1)
        apart = [groups.sum((one - two) ** 2) for one, two in combinations(unit, 2)]
        return cls(squares, np.stack(apart, axis=1), np.triu_indices(len(forms), 1))

    def distances(self, weights: NDArray[Any]) -> Floats:
        """Distances (R, R) with each prompt counted `weights` (X,) times."""
        lengths = np.sqrt(weights @ self.squares)
        one, two = (lengths[index] for index in self.pairs)
        product = one * two
        # |a / |a| - b / |b||^2 |a| |b| = |a - b|^2 - (|a| - |b|)^2.
        chord = np.maximum(weights @ self.apart - (one - two) ** 2, 0)
        trivial = np.where(one == two, 0.0, 1.0)
        found = np.zeros((len(lengths), len(lengths)))
        values = np.where(product > 0, np.sqrt(chord / np.where(product > 0, product, 1)), trivial)
        found[self.pairs] = np.minimum(values, 2)
        return found + found.T


def _chosen(scores: Floats, n: int, groups: _Groups) -> Floats:
    """Chance (N,) of each response, ordered by prompt, to be the best of n by the scores (N,)."""
    prompt = np.repeat(np.arange(groups.size), groups.counts)
    ranked = np.lexsort((scores, prompt))
    values, position = scores[ranked], np.arange(len(scores))
    begins = np.ones(len(scores), bool)
    begins[1:] = (values[1:] != values[:-1]) | (prompt[1:] != prompt[:-1])
    first = np.flatnonzero(begins)
    block = np.cumsum(begins) - 1
    sizes = np.diff(np.append(first, len(scores)))
    below = position[first] - groups.starts[prompt[first]]
    total = groups.counts[prompt[first]]
    chance = (_all_among(below + sizes, total, n) - _all_among(below, total, n)) / sizes
    chosen = np.empty(len(scores))
    chosen[ranked] = chance[block]
    return chosen


def _all_among(lowest: NDArray[np.intp], total: NDArray[np.intp], n: int) -> Floats:
    """C(lowest, n) / C(total, n): the chance that n of `total` are all among the `lowest`."""
    some = np.maximum(lowest, n)
    logs = gammaln(some + 1) - gammaln(some - n + 1) - gammaln(total + 1) + gammaln(total - n + 1)
    return np.asarray(np.where(lowest >= n, np.exp(logs), 0.0))


def _numbers(given: Any, what: str) -> Floats:
    """Finite numbers as a float64 array."""
    if isinstance(given, Tensor):
        given = given.detach().double().cpu().numpy()
    try:
        array = np.asarray(given, float)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} gives no array of numbers ({error}).") from error
    wrong = array.size - int(np.isfinite(array).sum())
    if wrong:
        raise UsageError(f"{what} gives {wrong:,} scores that are not finite, of {array.size:,}.")
    return array


def _cautions(
    scores: Mapping[str, Floats], norms: Floats, trivial: NDArray[np.bool_], groups: _Groups
) -> list[str]:
    single, several = int((groups.counts == 1).sum()), int((groups.counts > 1).sum())
    found = []
    if single:
        found.append(
            f"{single:,} of {groups.size:,} prompts have one response, which says nothing; sample several."
        )
    if several < _FEW:
        found.append(
            f"only {several} prompts have two responses or more; intervals from fewer than {_FEW} "
            "are too narrow."
        )
    for (name, column), norm, zero in zip(scores.items(), norms, trivial, strict=True):
        largest = float(np.abs(column).max())
        if not zero and norm < _FAINT * largest:
            found.append(
                f"reward model {name!r} varies within prompts by {norm:.2g} beside scores of up to "
                f"{largest:.2g}; rounding of the scores may count as difference."
            )
    return found
