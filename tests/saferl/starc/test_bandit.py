"""Distances between reward models: worked numbers, invariances, ragged groups, best-of-n, what is refused."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saferl.constraints.scalarise import scalarise
from saferl.errors import UsageError
from saferl.rewards.par import centred_reward, par_reward
from saferl.starc import Canonicalizer, TabularMDP, distance_matrix, starc_distance
from saferl.starc.bandit import (
    RewardModelComparison,
    bandit_distance,
    best_of_n_regret,
    canonical_scores,
    compare_reward_models,
    pearson_distance,
    score_responses,
)

FIRST = np.array([[1.0, 2, 3], [10, 11, 12]])
SCALED = 2 * FIRST + [[5], [-7]]
HALF_TURNED = np.array([[3.0, 2, 1], [10, 11, 12]])


def scores(seed: int, prompts: int = 40, each: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Two rewards (X, K), related within prompts, with offsets for each prompt."""
    rng = np.random.default_rng(seed)
    first, noise = rng.normal(size=(2, prompts, each))
    return first + 3 * rng.normal(size=(prompts, 1)), first + noise


def ragged(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two rewards (N,) and shuffled ids (N,) of prompts with 2 to 7 responses."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(10 * np.arange(30), rng.integers(2, 8, 30)))
    first, noise = rng.normal(size=(2, len(ids)))
    return first + ids, first + noise, ids


# --- worked numbers --------------------------------------------------------------------------------------


def test_worked_example() -> None:
    np.testing.assert_array_equal(canonical_scores(FIRST), [[-1, 0, 1], [-1, 0, 1]])
    assert bandit_distance(FIRST, SCALED) == pytest.approx(0, abs=1e-12)
    assert (canonical_scores(FIRST) * canonical_scores(HALF_TURNED)).sum() == 0
    assert bandit_distance(FIRST, HALF_TURNED) == pytest.approx(1.414214, abs=1e-6)
    assert np.corrcoef(FIRST.ravel(), HALF_TURNED.ravel())[0, 1] == pytest.approx(0.968127, abs=1e-6)
    assert pearson_distance(FIRST, HALF_TURNED) == pytest.approx(0.126239, abs=1e-6)
    result = compare_reward_models({"a": FIRST, "b": SCALED, "c": HALF_TURNED, "d": -FIRST}, "uniform")
    assert result.angles[0] == pytest.approx([0, 0, np.pi / 2, np.pi], abs=1e-6)
    # Three responses each: the root mean square sqrt(2/3) times sqrt(3/2).
    assert result.norms == pytest.approx([1, 2, 1, 1])
    assert (result.prompts, result.responses, result.sampler) == (2, 6, "uniform")


def test_distance_is_that_of_the_pooled_correlation() -> None:
    first, second = scores(0)
    one, two = (score - score.mean(axis=1, keepdims=True) for score in (first, second))
    correlation = (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
    assert 0.5 < correlation < 0.9
    assert bandit_distance(first, second) == pytest.approx(np.sqrt(2 - 2 * correlation), abs=1e-12)


def test_agrees_with_the_tabular_metric_at_discount_0() -> None:
    # States that are prompts, every action a response: val under the uniform policy is the centring.
    first, second = scores(1, prompts=7, each=4)
    mdp = TabularMDP(np.random.default_rng(0).dirichlet(np.ones(7), (7, 4)), 0)
    np.testing.assert_allclose(Canonicalizer(mdp)(first)[:, :, 0], canonical_scores(first), atol=1e-12)
    assert bandit_distance(first, second) == pytest.approx(starc_distance(first, second, mdp), abs=1e-12)


# --- invariances -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), factor=st.floats(1e-3, 1e3), spread=st.floats(0, 1e3))
def test_invariant_to_offsets_of_prompts_and_positive_factors(
    seed: int, factor: float, spread: float
) -> None:
    first, second = scores(seed, prompts=8)
    offset = spread * np.random.default_rng(seed).normal(size=(8, 1))
    assert bandit_distance(first, factor * first + offset) < 1e-7
    assert bandit_distance(first, -factor * first + offset) == pytest.approx(2, abs=1e-7)
    plain = bandit_distance(first, second)
    assert bandit_distance(second, factor * first + offset) == pytest.approx(plain, abs=1e-7)
    regret = best_of_n_regret(first, second, 3)
    assert best_of_n_regret(factor * first + offset, second, 3) == pytest.approx(regret, abs=1e-7)


def test_equal_rewards_are_at_0_to_rounding() -> None:
    first, _ = scores(2, prompts=1_000)
    result = compare_reward_models({"a": first, "b": 0.3 * first + 1}, "base")
    assert result.distances[0, 1] < 1e-13
    assert result.high[0, 1] < 1e-13


def test_plain_correlation_counts_the_prompt() -> None:
    rng = np.random.default_rng(3)
    first, _ = scores(3)
    difficulty = 20 * rng.normal(size=(40, 1))
    # A reversed order that looks alike, and the same order that looks unrelated.
    assert pearson_distance(first + difficulty, difficulty - first) < 0.2
    assert bandit_distance(first + difficulty, difficulty - first) == pytest.approx(2)
    assert pearson_distance(first, first + difficulty) > 0.5
    assert bandit_distance(first, first + difficulty) < 1e-12


def test_division_by_the_deviation_of_each_prompt_changes_the_class() -> None:
    reward = np.array([[0.0, 1], [0, 10]])
    divided = reward / reward.std(axis=1, keepdims=True)
    assert bandit_distance(reward, divided) > 0.6
    # A policy that gives up the first prompt for the second is better only before the division.
    before, after = np.array([[0, 1], [0.5, 0.5]]), np.array([[1, 0], [0.25, 0.75]])
    assert (reward * after).sum() > (reward * before).sum()
    assert (divided * after).sum() < (divided * before).sum()


def test_canonical_form_is_the_group_relative_baseline() -> None:
    first, _ = scores(4)
    rewards = torch.as_tensor(first)
    own = rewards[:, None, :].expand(40, 6, 6)
    np.testing.assert_allclose(canonical_scores(first), centred_reward(rewards, own), atol=1e-12)

    def advantages(scores: np.ndarray) -> np.ndarray:
        return np.asarray((scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True))

    offset = np.random.default_rng(0).normal(size=(40, 1))
    np.testing.assert_allclose(advantages(first), advantages(3 * first + offset), atol=1e-9)
    # GRPO's advantages as well ignore a factor for each prompt, which the distance does not.
    factor = np.exp(np.random.default_rng(1).normal(size=(40, 1)))
    np.testing.assert_allclose(advantages(first), advantages(factor * first), atol=1e-9)
    assert bandit_distance(first, factor * first) > 0.3


def test_par_is_linear_for_small_rewards_only() -> None:
    first = canonical_scores(scores(5)[0])

    def distance(scale: float) -> float:
        rewards = torch.as_tensor(scale * first)
        return bandit_distance(first, np.asarray(par_reward(rewards, torch.zeros(40, 6, 1))))

    assert distance(1e-3) < 1e-5
    assert 1e-2 < distance(1) < distance(5)


def test_gold_peaks_where_the_distance_on_the_policys_samples_is_that_of_unrelated_rewards() -> None:
    # The proxy z ~ N(beta, 1), gold z - z^2 / 4, whose mean beta - (beta^2 + 1) / 4 is highest at beta = 2.
    z = np.random.default_rng(0).normal(size=(500, 200))
    before, peak, beyond = (
        bandit_distance(z + tilt, (z + tilt) * (1 - (z + tilt) / 4)) for tilt in (1, 2, 3)
    )
    assert before < 1 < 1.7 < beyond
    assert peak == pytest.approx(np.sqrt(2), abs=0.02)


# --- layouts ---------------------------------------------------------------------------------------------


def test_ragged_groups() -> None:
    first, second, ids = ragged(0)
    one, two = np.empty(len(ids)), np.empty(len(ids))
    for prompt in set(ids):
        rows = ids == prompt
        one[rows], two[rows] = first[rows] - first[rows].mean(), second[rows] - second[rows].mean()
    np.testing.assert_allclose(canonical_scores(first, ids), one, atol=1e-12)
    correlation = (one @ two) / np.sqrt((one @ one) * (two @ two))
    assert bandit_distance(first, second, ids) == pytest.approx(np.sqrt(2 - 2 * correlation))
    result = compare_reward_models({"a": first, "b": second}, "base", prompt_ids=ids)
    assert result.norms[0] == pytest.approx(np.sqrt(one @ one / (len(ids) - 30)))


def test_both_layouts_and_string_ids_agree() -> None:
    first, second = scores(6)
    mix = np.random.default_rng(0).permutation(first.size)
    ids = np.repeat(np.arange(40), 6)[mix]
    flat = first.ravel()[mix], second.ravel()[mix]
    whole = compare_reward_models({"a": first, "b": second}, "base")
    for names in (ids, [f"prompt {i:02d}" for i in ids]):
        split = compare_reward_models(dict(zip("ab", flat, strict=True)), "base", prompt_ids=names)
        for field in ("distances", "low", "high", "angles", "norms"):
            np.testing.assert_allclose(getattr(split, field), getattr(whole, field), atol=1e-7)
    assert best_of_n_regret(*flat, 3, ids) == pytest.approx(best_of_n_regret(first, second, 3))


def test_no_loop_over_prompts() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 500_000, 1_000_000)
    first, second = rng.normal(size=(2, len(ids)))
    began = time.process_time()
    bandit_distance(first, second, ids)
    assert time.process_time() - began < 5


# --- the comparison --------------------------------------------------------------------------------------


def test_intervals_cover_the_distance_of_the_population() -> None:
    expected = np.sqrt(2 - 2 / np.sqrt(2))
    covered, widths = 0, []
    for seed in range(40):
        first, second = scores(seed, prompts=60)
        result = compare_reward_models({"a": first, "b": second}, "base", seed=seed)
        covered += result.low[0, 1] <= expected <= result.high[0, 1]
        widths.append(result.high[0, 1] - result.low[0, 1])
    assert covered >= 33
    wide = compare_reward_models(dict(zip("ab", scores(0, prompts=960), strict=True)), "base")
    assert wide.high[0, 1] - wide.low[0, 1] == pytest.approx(np.mean(widths) / 4, rel=0.3)


def test_intervals_are_those_of_resampled_prompts() -> None:
    # Prompts of different scale, so that norms change with the sample.
    rng = np.random.default_rng(0)
    first, second = scores(13, prompts=20)
    second = first + second * np.exp(rng.normal(size=(20, 1)))
    result = compare_reward_models({"a": first, "b": second}, "base", resamples=50, confidence=0.8, seed=4)
    rng = np.random.default_rng(4)
    rows = [rng.integers(20, size=20) for _ in range(50)]
    drawn = [bandit_distance(first[picked], second[picked]) for picked in rows]
    np.testing.assert_allclose([result.low[0, 1], result.high[0, 1]], np.quantile(drawn, [0.1, 0.9]))


def test_matrix_is_a_pseudometric() -> None:
    rng = np.random.default_rng(0)
    columns = {str(index): rng.normal(size=(20, 4)) for index in range(6)}
    result = compare_reward_models(columns, "base", resamples=20)
    d = result.distances
    np.testing.assert_array_equal(d, d.T)
    np.testing.assert_array_equal(np.diag(d), 0)
    for i, j, k in itertools.permutations(range(6), 3):
        assert d[i, j] <= d[i, k] + d[k, j] + 1e-12
        assert result.angles[i, j] == pytest.approx(2 * np.arcsin(d[i, j] / 2))


def test_norms_do_not_depend_on_the_number_of_responses() -> None:
    for each in (2, 8):
        first, second = scores(7, prompts=20_000, each=each)
        result = compare_reward_models({"a": first, "b": second}, "base", resamples=20)
        assert result.norms == pytest.approx([1, np.sqrt(2)], rel=0.02)


def test_trivial_rewards() -> None:
    first, _ = scores(8)
    constant = np.repeat(np.random.default_rng(0).normal(size=(40, 1)), 6, axis=1)
    rounded = 0.1 + 0.2 * constant - 0.2 * (constant + 1e-16 * first)
    rewards = {
        "a": first,
        "zero": 0 * first,
        "constant": constant,
        "rounded": rounded,
        "small": 1e-200 * first,
    }
    result = compare_reward_models(rewards, "base", resamples=20)
    np.testing.assert_array_equal(result.trivial, [False, True, True, True, False])
    np.testing.assert_array_equal(result.distances[1:4, 1:4], 0)
    np.testing.assert_array_equal(result.distances[0, 1:4], 1)
    np.testing.assert_array_equal(result.low[0, 1:4], 1)
    assert result.distances[0, 4] < 1e-12
    assert result.angles[0, 1] == np.pi / 2
    assert result.angles[1, 2] == 0
    assert bandit_distance(first, constant) == 1
    assert pearson_distance(first, 0 * first) == pytest.approx(np.sqrt(0.5))
    assert pearson_distance(0 * first, 0 * first + 1) == 0
    assert best_of_n_regret(constant, first, 2) == 0
    assert best_of_n_regret(first, constant, 2) == pytest.approx(1)


def cautions(*rewards: np.ndarray, **options: Any) -> list[str]:
    named = {str(index): reward for index, reward in enumerate(rewards)}
    result: RewardModelComparison = compare_reward_models(named, "base", resamples=20, **options)
    return result.cautions


def test_cautions() -> None:
    first, second = scores(9)
    assert cautions(first, second) == []
    assert cautions(first, np.ones_like(first)) == []
    (few,) = cautions(first[:5], second[:5])
    assert "only 5 prompts" in few
    (faint,) = cautions(first, second + 1e5)
    assert "'1' varies within prompts by 1.4 beside scores of up to 1e+05" in faint
    ids = np.concatenate([np.repeat(np.arange(40), 6), [40, 41]])
    (single,) = cautions(np.append(first, [0, 1]), np.append(second, [1, 0]), prompt_ids=ids)
    assert "2 of 42 prompts have one response" in single


# --- functions -------------------------------------------------------------------------------------------


def test_functions_are_scored_in_batches() -> None:
    prompts = [f"{'ab'[i % 2]}" for i in range(10)]
    responses = ["x" * (i + 1) for i in range(10)]
    sizes = []

    def length(prompts: list[str], responses: list[str]) -> torch.Tensor:
        sizes.append(len(responses))
        return torch.tensor([len(r) for r in responses], dtype=torch.bfloat16)[:, None]

    def offset(prompts: list[str], responses: list[str]) -> list[float]:
        return [100 * (p == "a") + 2 * len(r) for p, r in zip(prompts, responses, strict=True)]

    np.testing.assert_array_equal(score_responses(length, prompts, responses, 4), np.arange(1, 11))
    assert sizes == [4, 4, 2]
    column = -np.arange(10.0)
    result = compare_reward_models(
        {"length": length, "offset": offset, "column": column},
        "base",
        prompts=prompts,
        responses=responses,
        prompt_ids=prompts,
    )
    assert result.distances[0] == pytest.approx([0, 0, 2], abs=1e-12)


# --- best of n -------------------------------------------------------------------------------------------


def enumerated(meant: np.ndarray, proxy: np.ndarray, n: int) -> float:
    """The share lost by going through all subsets."""
    lost, gain = 0.0, 0.0
    for one, two in zip(meant, proxy, strict=True):
        subsets = [list(s) for s in itertools.combinations(range(len(one)), n)]
        best = np.mean([one[s].max() for s in subsets])
        got = np.mean([one[s][two[s] == two[s].max()].mean() for s in subsets])
        lost, gain = lost + best - got, gain + best - one.mean()
    return lost / gain


@pytest.mark.parametrize("n", [2, 3, 6])
def test_best_of_n_against_all_subsets(n: int) -> None:
    meant, proxy = scores(10, prompts=5)
    assert best_of_n_regret(meant, proxy, n) == pytest.approx(enumerated(meant, proxy, n), abs=1e-12)
    tied = np.round(proxy)
    assert any(len(set(row)) < 6 for row in tied)
    assert best_of_n_regret(meant, tied, n) == pytest.approx(enumerated(meant, tied, n), abs=1e-12)


def test_best_of_n_limits() -> None:
    meant, proxy = scores(11)
    assert best_of_n_regret(meant, 5 * meant + 1, 4) == pytest.approx(0, abs=1e-12)
    # Of two, the reversed order picks the worse: as far below the mean as the better is above it.
    assert best_of_n_regret(meant, -meant, 2) == pytest.approx(2)
    assert 0 < best_of_n_regret(meant, proxy, 4) < 1
    large = np.random.default_rng(0).normal(size=(3, 5_000))
    assert best_of_n_regret(large, large, 64) == pytest.approx(0, abs=1e-9)
    assert best_of_n_regret(large, np.zeros_like(large), 64) == pytest.approx(1)


def test_best_of_n_of_normal_scores_is_half_the_squared_distance() -> None:
    meant, proxy = scores(12, prompts=400, each=64)
    half = bandit_distance(meant, proxy) ** 2 / 2
    assert [best_of_n_regret(meant, proxy, n) for n in (2, 8, 32)] == pytest.approx([half] * 3, abs=0.02)


def test_best_of_n_on_ragged_groups() -> None:
    first, second, ids = ragged(1)
    lists = [(first[ids == i], second[ids == i]) for i in sorted(set(ids))]
    lost = gain = 0.0
    for one, two in lists:
        pairs = list(itertools.combinations(range(len(one)), 2))
        best = np.mean([max(one[i], one[j]) for i, j in pairs])
        lost += best - np.mean([one[i] if two[i] > two[j] else one[j] for i, j in pairs])
        gain += best - one.mean()
    assert best_of_n_regret(first, second, 2, ids) == pytest.approx(lost / gain)


# --- the price of a penalty ------------------------------------------------------------------------------


def test_price_of_a_penalty() -> None:
    # R - lambda C turns from s(R) to s(-C) in their plane: angle and ratio of lengths say all.
    rng = np.random.default_rng(0)
    mdp = TabularMDP(rng.dirichlet(np.ones(8), (8, 3)), 0.9)
    canonical = Canonicalizer(mdp)
    reward, other = (canonical(rng.normal(size=(8, 3)))[:, :, 0] for _ in range(2))
    reward /= np.linalg.norm(reward)
    other -= (other * reward).sum() * reward
    other /= np.linalg.norm(other)
    cosine, ratio = 1 - 1.1987**2 / 2, 0.696013
    cost = -ratio * (cosine * reward + np.sqrt(1 - cosine**2) * other)
    # Shaping does not count.
    potential = rng.normal(size=8)
    cost = cost + 0.9 * mdp.ahead(potential) - potential[:, None]
    prices = [0, 0.1, 0.5, 1, 2, 5, 10, 100]
    rewards = [scalarise(reward, {"cost": cost}, {"cost": price}) for price in prices]
    found = distance_matrix([reward, *rewards, -cost], mdp)[0, 1:]
    expected = [0, 0.0654, 0.2942, 0.5038, 0.7463, 0.9899, 1.0907, 1.1876, 1.1987]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert (np.diff(found) > 0).all()


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bandit_distance([[1, np.nan]], [[1, 2]]), "the first reward gives 1 scores that are not"),
        (lambda: bandit_distance([[1, 2]], [[1, 2, 3]]), "all must score the same responses"),
        (lambda: bandit_distance([1, 2], [1, 2]), "give \\(X, K\\), or \\(N,\\) together with prompt ids"),
        (lambda: bandit_distance([1, 2], [1, 2], [0]), "the prompt ids have shape \\(1,\\)"),
        (lambda: bandit_distance([[1, 2]], [[1, 2]], [0, 0]), "both must be \\(N,\\)"),
        (lambda: bandit_distance([1, 2], [1, 2], [0.5, 0.5]), "must be integers or strings"),
        (lambda: bandit_distance([["a"]], [[1]]), "no array of numbers"),
        (lambda: canonical_scores(np.empty((0, 3))), "give \\(X, K\\)"),
        (lambda: best_of_n_regret(FIRST, FIRST, 1), "n is 1; it must lie between 2 and the 3"),
        (lambda: best_of_n_regret(FIRST, FIRST, 4), "n is 4; it must lie between 2 and the 3"),
        (lambda: compare_reward_models({"a": FIRST}, "base"), "at least two reward models"),
        (lambda: compare_reward_models({"a": FIRST, "b": FIRST}, ""), "name the policy"),
        (lambda: compare_reward_models({"a": FIRST, "b": FIRST}, "base", resamples=1), "at least 20"),
        (
            lambda: compare_reward_models({"a": FIRST, "b": lambda p, r: r}, "base"),
            "'b' is a function; give the",
        ),
        (lambda: compare_reward_models({"a": [[1], [2]], "b": [[2], [1]]}, "base"), "one response, which"),
        (lambda: score_responses(lambda p, r: [1.0], ["p"] * 2, ["r"] * 2), "one number for each"),
        (lambda: score_responses(lambda p, r: [np.inf], ["p"], ["r"]), "not finite"),
        (lambda: score_responses(lambda p, r: [1.0], ["p"], ["r"] * 2), "1 prompts for 2 responses"),
        (lambda: score_responses(lambda p, r: [1.0], ["p"], ["r"], 0), "batch size is 0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
