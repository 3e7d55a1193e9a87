"""Trees of responses, the pairs they give, and what such pairs cost in coverage."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saferl.errors import UsageError
from saferl.rewards.preference_tree import (
    PrefixTreeSampler,
    comparable_pairs,
    hierarchical_covariance,
    posterior_variance,
    subtree_leaves,
)


class Writer:
    """Writes a different segment at every request, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, str]]] = []
        self.counter = itertools.count()

    def __call__(self, requests: list[tuple[str, str]]) -> list[str]:
        self.calls.append(requests)
        return [f"<{next(self.counter)}>" for _ in requests]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_call_a_depth_for_all_trees() -> None:
    write = Writer()
    leaves = PrefixTreeSampler(write, depth=3, branching=2).leaves(["p", "q", "r"])
    assert [len(tree) for tree in leaves] == [8, 8, 8]
    assert all(len(path) == 3 for tree in leaves for path in tree)
    assert [len(call) for call in write.calls] == [6, 12, 24]
    assert write.calls[0] == [("p", ""), ("p", ""), ("q", ""), ("q", ""), ("r", ""), ("r", "")]
    assert write.calls[1][:3] == [("p", "<0>"), ("p", "<0>"), ("p", "<1>")]
    assert write.calls[2][0] == ("p", "<0><6>")


def test_depths_of_the_lowest_common_ancestor() -> None:
    pairs = PrefixTreeSampler(Writer(), depth=3, branching=2).pairs(["p"], rng())
    assert Counter(pair.lca_depth for pair in pairs) == {2: 4, 1: 8, 0: 16}
    for pair in pairs:
        assert pair.prompt == "p"
        assert pair.shared_prefix.count("<") == pair.lca_depth
        assert pair.response_a == pair.shared_prefix + pair.suffix_a
        assert pair.response_b.startswith(pair.shared_prefix)
        assert pair.response_a != pair.response_b
        assert pair.suffix_a.split(">")[0] != pair.suffix_b.split(">")[0]


def test_a_chain_is_a_tree_of_depth_1() -> None:
    pairs = PrefixTreeSampler(Writer(), depth=1, branching=4).pairs(["p", "q"], rng())
    assert Counter(pair.prompt for pair in pairs) == {"p": 6, "q": 6}
    assert {(pair.shared_prefix, pair.lca_depth) for pair in pairs} == {("", 0)}


def test_identical_leaves_are_one() -> None:
    script = iter(["a", "a", "x", "y", "y", "z"])
    sampler = PrefixTreeSampler(lambda requests: [next(script) for _ in requests], depth=2, branching=2)
    pairs = sampler.pairs(["p"], rng())
    assert {pair.response_a for pair in pairs} | {pair.response_b for pair in pairs} == {"ax", "ay", "az"}
    # Equal siblings are one node: all leaves share the "a" that both wrote.
    assert [(pair.shared_prefix, pair.suffix_a, pair.suffix_b) for pair in pairs] == [
        ("a", "x", "y"),
        ("a", "x", "z"),
        ("a", "y", "z"),
    ]
    silent = PrefixTreeSampler(lambda requests: ["same"] * len(requests), depth=2, branching=3)
    assert silent.pairs(["p"], rng()) == []


def test_one_text_cut_in_two_ways_is_one_response() -> None:
    script = iter(["a", "ab", "bc", "d", "c", "d"])
    sampler = PrefixTreeSampler(lambda requests: [next(script) for _ in requests], depth=2, branching=2)
    assert sampler.leaves(["p"]) == [[("a", "bc"), ("a", "d"), ("ab", "d")]]


def test_an_empty_segment_ends_a_response() -> None:
    script = iter(["a", "", "b", "c", "d", "", "e", "f"])
    calls = []

    def generate(requests: list[tuple[str, str]]) -> list[str]:
        calls.append(len(requests))
        return [next(script) for _ in requests]

    sampler = PrefixTreeSampler(generate, depth=3, branching=2)
    assert sampler.leaves(["p"]) == [[("a", "b", "d"), ("a", "b"), ("a", "c", "e"), ("a", "c", "f"), ()]]
    assert calls == [2, 2, 4]
    nothing = PrefixTreeSampler(lambda requests: [""] * len(requests), depth=3, branching=2)
    assert nothing.leaves(["p"]) == [[()]]
    assert nothing.pairs([], rng()) == []


def test_token_ids_instead_of_strings() -> None:
    counter = itertools.count()

    def generate(requests: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[int, ...]]:
        assert all(prompt == (7, 8) for prompt, _ in requests)
        return [(next(counter), -1) for _ in requests]

    pairs = PrefixTreeSampler(generate, depth=2, branching=2).pairs([(7, 8)], rng())
    assert len(pairs) == 6
    assert [pair.shared_prefix for pair in pairs] == [()] * 4 + [(0, -1), (1, -1)]
    assert pairs[4].response_a == (0, -1, 2, -1)
    assert pairs[4].suffix_b == (3, -1)


@pytest.mark.parametrize(
    ("cap", "counts"),
    [
        (6, {0: 2, 1: 2, 2: 2}),
        (12, {0: 4, 1: 4, 2: 4}),
        (18, {0: 7, 1: 7, 2: 4}),
        (28, {0: 16, 1: 8, 2: 4}),
        (99, {0: 16, 1: 8, 2: 4}),
    ],
)
def test_the_cap_is_even_over_depths(cap: int, counts: dict[int, int]) -> None:
    pairs = PrefixTreeSampler(Writer(), 3, 2, max_pairs=cap).pairs(["p", "q"], rng())
    for prompt in ("p", "q"):
        own = [pair for pair in pairs if pair.prompt == prompt]
        assert Counter(pair.lca_depth for pair in own) == counts
        assert len({(pair.response_a, pair.response_b) for pair in own}) == len(own)


def test_which_pairs_are_kept_is_random_and_reproducible() -> None:
    def drawn(seed: int, cap: int) -> list[tuple[str, str]]:
        pairs = PrefixTreeSampler(Writer(), 3, 2, max_pairs=cap).pairs(["p"], rng(seed))
        return [(pair.response_a, pair.response_b) for pair in pairs]

    assert drawn(3, 6) == drawn(3, 6)
    assert len({tuple(drawn(seed, 6)) for seed in range(20)}) > 10
    depths = Counter(
        PrefixTreeSampler(Writer(), 3, 2, max_pairs=1).pairs(["p"], rng(seed))[0].lca_depth
        for seed in range(90)
    )
    assert min(depths[depth] for depth in range(3)) > 10


@given(st.lists(st.sampled_from(["", "a", "b", "ab"]), min_size=14, max_size=14), st.integers(1, 30))
def test_every_prefix_is_shared_and_no_pair_is_of_equals(segments: list[str], cap: int) -> None:
    script = iter(segments)
    sampler = PrefixTreeSampler(lambda requests: [next(script) for _ in requests], 3, 2, max_pairs=cap)
    pairs = sampler.pairs(["p"], rng())
    assert len(pairs) <= cap
    for pair in pairs:
        assert pair.response_a != pair.response_b
        assert pair.response_a.startswith(pair.shared_prefix)
        assert pair.response_b.startswith(pair.shared_prefix)


def test_refusals() -> None:
    for depth, branching, cap in ((0, 2, None), (2, 1, None), (2, 2, 0)):
        with pytest.raises(UsageError):
            PrefixTreeSampler(Writer(), depth, branching, max_pairs=cap)
    with pytest.raises(UsageError, match="returned 1 segments for 2"):
        PrefixTreeSampler(lambda requests: ["a"], 1, 2).leaves(["p"])
    with pytest.raises(UsageError, match="hierarchy"):
        hierarchical_covariance(3, [])
    with pytest.raises(UsageError, match="keeps 4 of 3"):
        subtree_leaves(3, 2, 4, rng())
    with pytest.raises(UsageError, match="at least two"):
        comparable_pairs(torch.zeros(1), 3, rng())
    pair = torch.tensor([[0, 1]])
    with pytest.raises(UsageError, match="noise"):
        posterior_variance(torch.eye(2), pair, pair, 0.0)
    with pytest.raises(UsageError, match=r"\(n, 2\)"):
        posterior_variance(torch.eye(2), pair[0], pair)


def test_the_hierarchical_prior() -> None:
    covariance = hierarchical_covariance(2, [3.0, 1.0])
    assert covariance.tolist() == [[4, 3, 0, 0], [3, 4, 0, 0], [0, 0, 4, 3], [0, 0, 3, 4]]


def test_the_posterior_variance() -> None:
    # One comparison of two independent rewards of variance 1: 2 - 2^2 / (2 + 1).
    pair = torch.tensor([[0, 1]])
    identity = torch.eye(3, dtype=torch.float64)
    assert posterior_variance(identity, pair, pair).item() == pytest.approx(2 / 3)
    assert posterior_variance(identity, pair[:0], pair).item() == 2
    assert posterior_variance(identity, pair, torch.tensor([[0, 2]])).item() == pytest.approx(2 - 1 / 3)


def test_the_posterior_variance_against_the_precision_form() -> None:
    root = torch.randn(5, 5, generator=rng(), dtype=torch.float64)
    covariance = root @ root.T + torch.eye(5)
    comparisons, queries = (comparable_pairs(torch.arange(5), n, rng(n)) for n in (7, 4))
    assert (comparisons[:, 0] != comparisons[:, 1]).all()

    def differences(pairs: Tensor) -> Tensor:
        identity = torch.eye(5, dtype=torch.float64)
        return identity[pairs[:, 0]] - identity[pairs[:, 1]]

    seen, asked = differences(comparisons), differences(queries)
    posterior = torch.linalg.inv(torch.linalg.inv(covariance) + seen.T @ seen / 0.5)
    expected = (asked @ posterior @ asked.T).diagonal()
    assert posterior_variance(covariance, comparisons, queries, 0.5).tolist() == pytest.approx(
        expected.tolist()
    )


def test_a_subtree_has_its_shape() -> None:
    leaves = subtree_leaves(6, 4, 2, rng())
    assert len(set(leaves.tolist())) == 16
    assert len(set((leaves // 6).tolist())) == 8
    assert len(set((leaves // 216).tolist())) == 2
    assert leaves.max() < 1296
    assert sorted(subtree_leaves(3, 2, 3, rng()).tolist()) == list(range(9))


def test_one_subtree_leaves_more_uncertainty_than_independent_pairs() -> None:
    generator = rng()
    covariance = hierarchical_covariance(6, [1.0] * 4)
    everything = torch.arange(6**4)
    queries = comparable_pairs(everything, 500, generator)
    for count, least_ratio in ((50, 1.2), (200, 1.7)):
        independent = posterior_variance(covariance, comparable_pairs(everything, count, generator), queries)
        for kept in (2, 3):
            leaves = subtree_leaves(6, 4, kept, generator)
            tree = posterior_variance(covariance, comparable_pairs(leaves, count, generator), queries)
            assert tree.mean() > least_ratio * independent.mean()
            if (count, kept) == (200, 2):
                assert tree.mean().item() == pytest.approx(7.2, abs=0.2)
                assert independent.mean().item() == pytest.approx(3.5, abs=0.2)
