"""Preference data with tree structure: responses that share prefixes, and what such pairs are worth.

Qiu et al. 2025, "Reward Generalization in RLHF: A Topological Perspective" (ACL 2025 Findings, arXiv
2402.10184): grow a tree of continuations for each prompt and compare its leaves, so that an annotator reads
only what follows the shared prefix. Written from the abstract and a summary; proofs and constants are
unverified.

The advantage the paper proves needs many trees, clustered responses and few labels. Coverage is the price:
`posterior_variance` shows that, in a plain hierarchical Gaussian reward, comparisons within one subtree leave
random pairs far less certain than independent comparisons do. Compare held-out accuracy at equal numbers of
labels before relying on trees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, TypeVar

import torch
from torch import Tensor

from saferl.errors import UsageError

__all__ = [
    "PreferencePair",
    "PrefixTreeSampler",
    "comparable_pairs",
    "hierarchical_covariance",
    "posterior_variance",
    "subtree_leaves",
]

Text = TypeVar("Text", str, tuple[int, ...])
"""A prompt, segment or response: a string, or a tuple of token ids."""

_Part = TypeVar("_Part", bound=Sized)


@dataclass(frozen=True)
class PreferencePair(Generic[Text]):
    """Two different responses to one prompt, which share `shared_prefix` and differ in what follows.

    `lca_depth` is the depth of their lowest common ancestor, the number of segments they share. Annotators
    read the suffixes; a reward model is trained on the full responses (better than on parts, in the paper).
    """

    prompt: Text
    shared_prefix: Text
    suffix_a: Text
    suffix_b: Text
    lca_depth: int

    @property
    def response_a(self) -> Text:
        """The first full response."""
        return self.shared_prefix + self.suffix_a

    @property
    def response_b(self) -> Text:
        """The second full response."""
        return self.shared_prefix + self.suffix_b


class PrefixTreeSampler(Generic[Text]):
    """Grows a tree of `branching`^`depth` responses for each prompt, and pairs its leaves.

    Args:
        generate: maps a list of (prompt, prefix) to one sampled segment each, of whatever length a segment
            has; it is called once for each depth, with the nodes of all trees together and each node repeated
            `branching` times. An empty segment ends a response, which is then not continued.
        depth: segments of a response; depth 1 gives independent responses, the usual "chain" data.
        branching: continuations of each node.
        max_pairs: most pairs a tree yields, None for all.

    Raises:
        UsageError: a number is out of range.
    """

    def __init__(
        self,
        generate: Callable[[list[tuple[Text, Text]]], Sequence[Text]],
        depth: int,
        branching: int,
        max_pairs: int | None = None,
    ) -> None:
        if depth < 1 or branching < 2:
            raise UsageError(
                f"the tree has depth {depth} and branching {branching}; they must be at least 1 and 2."
            )
        if max_pairs is not None and max_pairs < 1:
            raise UsageError(f"the cap is {max_pairs} pairs a tree; it must be at least 1.")
        self.generate: Callable[[list[tuple[Text, Text]]], Sequence[Text]] = generate
        self.depth, self.branching, self.max_pairs = depth, branching, max_pairs

    def leaves(self, prompts: Sequence[Text]) -> list[list[tuple[Text, ...]]]:
        """The different responses to each prompt, each as its segments from the root.

        Of leaves with one text the first is kept. Raises `UsageError` if `generate` returns a wrong number of
        segments.
        """
        # A node is (tree, its segments); finished nodes stay in place, so that leaves keep the tree's order.
        nodes: list[tuple[int, tuple[Text, ...]]] = [(tree, ()) for tree in range(len(prompts))]
        for level in range(self.depth):
            requests = [
                (prompts[tree], _join(prompts[tree], path))
                for tree, path in nodes
                if len(path) == level
                for _ in range(self.branching)
            ]
            if not requests:
                break
            produced = list(self.generate(requests))
            if len(produced) != len(requests):
                raise UsageError(
                    f"generate returned {len(produced)} segments for {len(requests)} prefixes; "
                    "it must return one each."
                )
            segments = iter(produced)
            grown: list[tuple[int, tuple[Text, ...]]] = []
            for node in nodes:
                if len(node[1]) < level:
                    grown.append(node)
                    continue
                grown += [_extended(node, next(segments)) for _ in range(self.branching)]
            nodes = grown
        different: list[dict[Text, tuple[Text, ...]]] = [{} for _ in prompts]
        for tree, path in nodes:
            different[tree].setdefault(_join(prompts[tree], path), path)
        return [list(tree.values()) for tree in different]

    def pairs(self, prompts: Sequence[Text], generator: torch.Generator) -> list[PreferencePair[Text]]:
        """Pairs of different leaves for each prompt in turn.

        With `max_pairs` they are drawn at random without replacement, as evenly over the depths of the lowest
        common ancestor as there are pairs. Raises as `leaves` does.
        """
        found = []
        for prompt, leaves in zip(prompts, self.leaves(prompts), strict=True):
            strata: dict[int, list[tuple[int, int]]] = {}
            for a, b in combinations(range(len(leaves)), 2):
                strata.setdefault(_shared(leaves[a], leaves[b]), []).append((a, b))
            for depth, (a, b) in _stratified(strata, self.max_pairs, generator):
                found.append(
                    PreferencePair(
                        prompt=prompt,
                        shared_prefix=_join(prompt, leaves[a][:depth]),
                        suffix_a=_join(prompt, leaves[a][depth:]),
                        suffix_b=_join(prompt, leaves[b][depth:]),
                        lca_depth=depth,
                    )
                )
        return found


def hierarchical_covariance(branching: int, variances: Sequence[float]) -> Tensor:
    """Prior covariance (L, L) of the rewards of a tree's leaves, L = branching^depth, in double precision.

    A leaf's reward is the sum of independent zero-mean Gaussian increments on its path, with variance
    `variances[l]` at level l from the root down; two leaves share those above their lowest common ancestor.
    Raises `UsageError` for no level, a negative variance, or branching below 1.
    """
    if branching < 1 or not variances or min(variances) < 0:
        raise UsageError(
            "the hierarchy must have branching of at least 1, at least one level, and no negative variance."
        )
    depth = len(variances)
    leaves = torch.arange(branching**depth)
    covariance = torch.zeros(len(leaves), len(leaves), dtype=torch.float64)
    for level, variance in enumerate(variances, start=1):
        ancestors = leaves // branching ** (depth - level)
        covariance += variance * (ancestors[:, None] == ancestors)
    return covariance


def subtree_leaves(branching: int, depth: int, kept: int, generator: torch.Generator) -> Tensor:
    """Leaves (kept^depth,) of a random subtree that keeps `kept` of the `branching` children of each node.

    Leaves are numbered as in `hierarchical_covariance`. Raises `UsageError` unless 1 <= kept <= branching and
    the depth is at least 1.
    """
    if not 1 <= kept <= branching or depth < 1:
        raise UsageError(
            f"the subtree keeps {kept} of {branching} children over depth {depth}; "
            "it must keep at least 1, at most all, over a depth of at least 1."
        )
    leaves = torch.zeros(1, dtype=torch.long)
    for _ in range(depth):
        order = torch.rand(len(leaves), branching, generator=generator).argsort(dim=1)[:, :kept]
        leaves = (leaves[:, None] * branching + order).flatten()
    return leaves


def comparable_pairs(leaves: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random pairs (count, 2) of two different entries of `leaves` (L,), drawn with replacement.

    Raises `UsageError` for fewer than 2 leaves.
    """
    if leaves.dim() != 1 or len(leaves) < 2:
        raise UsageError(f"the leaves have shape {tuple(leaves.shape)}; a pair needs at least two, as (L,).")
    first = torch.randint(len(leaves), (count,), generator=generator)
    step = torch.randint(1, len(leaves), (count,), generator=generator)
    return leaves[torch.stack([first, (first + step) % len(leaves)], dim=1)]


def posterior_variance(
    covariance: Tensor, comparisons: Tensor, queries: Tensor, noise_variance: float = 1.0
) -> Tensor:
    """Variance of r(a) - r(b) for the `queries` (m, 2) after noisy comparisons (n, 2) of rewards; (m,).

    Rewards are Gaussian with the given prior covariance (L, L); a comparison observes the difference of its
    two rewards with Gaussian noise. What was observed does not matter, only which pairs were. Raises
    `UsageError` for shapes that do not fit and unless the noise variance is positive.
    """
    if not 0 < noise_variance < math.inf:
        raise UsageError(f"the noise variance is {noise_variance:g}; it must be positive and finite.")
    fits = covariance.dim() == 2 and covariance.shape[0] == covariance.shape[1]
    if not (fits and all(pairs.dim() == 2 and pairs.shape[1] == 2 for pairs in (comparisons, queries))):
        raise UsageError(
            f"the covariance has shape {tuple(covariance.shape)}, the comparisons {tuple(comparisons.shape)} "
            f"and the queries {tuple(queries.shape)}; they must be (L, L), (n, 2) and (m, 2)."
        )
    seen = covariance[comparisons[:, 0]] - covariance[comparisons[:, 1]]  # (n, L)
    observed = seen[:, comparisons[:, 0]] - seen[:, comparisons[:, 1]]
    observed = observed + noise_variance * torch.eye(len(comparisons), dtype=covariance.dtype)
    cross = seen[:, queries[:, 0]] - seen[:, queries[:, 1]]
    a, b = queries.unbind(1)
    prior = covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(observed), cross, upper=False)
    variance: Tensor = prior - whitened.square().sum(dim=0)
    return variance


def _extended(node: tuple[int, tuple[_Part, ...]], segment: _Part) -> tuple[int, tuple[_Part, ...]]:
    """The child of a node (tree, its segments); an empty segment adds nothing."""
    return (node[0], (*node[1], segment)) if len(segment) else node


def _join(like: Text, segments: Sequence[Text]) -> Text:
    joined = like[:0]
    for segment in segments:
        joined = joined + segment
    return joined


def _shared(a: Sequence[Text], b: Sequence[Text]) -> int:
    """The number of leading segments that two paths share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _stratified(
    strata: dict[int, list[tuple[int, int]]], cap: int | None, generator: torch.Generator
) -> list[tuple[int, tuple[int, int]]]:
    """All pairs with their stratum, or `cap` of them: one of each stratum in turn, shuffled within it."""
    everything = [(depth, pair) for depth in sorted(strata) for pair in strata[depth]]
    if cap is None or len(everything) <= cap:
        return everything
    ranked = []
    for depth in sorted(strata):
        order = torch.randperm(len(strata[depth]), generator=generator).tolist()
        ranked += [(rank, depth, strata[depth][i]) for rank, i in enumerate(order)]
    ranked.sort(key=lambda entry: entry[0])
    # The last round may be short of one pair a stratum; a fixed order there would favour shallow ones.
    last = ranked[cap - 1][0]
    full = [entry for entry in ranked if entry[0] < last]
    rest = [entry for entry in ranked if entry[0] == last]
    order = torch.randperm(len(rest), generator=generator).tolist()
    return [(depth, pair) for _, depth, pair in full + [rest[i] for i in order[: cap - len(full)]]]
