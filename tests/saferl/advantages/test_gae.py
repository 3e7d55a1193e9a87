"""GAE: the worked example, a slow twin, and invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saferl.advantages import centre, gae, next_values, standardise


def reference(
    rewards: Tensor,
    values: Tensor,
    following: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    rate: float,
    lam: float,
) -> Tensor:
    """One environment, one stream, one step at a time, straight from the definition."""
    advantages, running = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        future = 0.0 if terminated[t] else rate * float(following[t])
        running = (
            float(rewards[t])
            + future
            - float(values[t])
            + (0.0 if terminated[t] or truncated[t] else rate * lam * running)
        )
        advantages[t] = running
    return torch.tensor(advantages, dtype=torch.float64)


def no(t: int, n: int = 1) -> Tensor:
    return torch.zeros(t, n, dtype=torch.bool)


def test_worked_example() -> None:
    values = torch.tensor([[0.5], [0.4], [0.3]])
    following = next_values(values, torch.tensor([0.2]), torch.zeros(3, 1), no(3))
    advantages, targets = gae(
        torch.tensor([[1.0], [0.0], [2.0]]), values, following, no(3), no(3), discount=0.9, gae_lambda=0.8
    )
    torch.testing.assert_close(advantages[:, 0], torch.tensor([1.740992, 1.2236, 1.88]))
    torch.testing.assert_close(targets[:, 0], torch.tensor([2.240992, 1.6236, 2.18]))


def test_worked_example_of_the_language_side() -> None:
    values = torch.tensor([[0.2], [0.4], [0.6]], dtype=torch.float64)
    ends = torch.tensor([[False], [False], [True]])
    following = next_values(
        values, torch.tensor([9.0], dtype=torch.float64), torch.zeros(3, 1).double(), no(3)
    )
    rewards = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
    advantages, _ = gae(rewards, values, following, ends, no(3), discount=1.0, gae_lambda=0.95)
    torch.testing.assert_close(advantages[:, 0], torch.tensor([0.751, 0.58, 0.4], dtype=torch.float64))


def problem(seed: int, t: int, n: int, k: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    terminated = torch.rand(t, n, generator=g) < 0.15
    truncated = torch.rand(t, n, generator=g) < 0.15
    values, finals = (torch.randn(t, n, k, generator=g, dtype=torch.float64) for _ in range(2))
    last = torch.randn(n, k, generator=g, dtype=torch.float64)
    return {
        "rewards": torch.randn(t, n, k, generator=g, dtype=torch.float64),
        "values": values,
        "next_values": next_values(values, last, finals, truncated),
        "terminated": terminated,
        "truncated": truncated,
    }


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 4), st.integers(1, 3))
def test_agrees_with_the_slow_twin_per_environment_and_stream(seed: int, t: int, n: int, k: int) -> None:
    data = problem(seed, t, n, k)
    rates, lambdas = torch.linspace(0.5, 1.0, k), torch.linspace(1.0, 0.0, k)
    advantages, targets = gae(**data, discount=rates, gae_lambda=lambdas)
    for i in range(n):
        for s in range(k):
            expected = reference(
                data["rewards"][:, i, s],
                data["values"][:, i, s],
                data["next_values"][:, i, s],
                data["terminated"][:, i],
                data["truncated"][:, i],
                float(rates[s]),
                float(lambdas[s]),
            )
            torch.testing.assert_close(advantages[:, i, s], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(targets, advantages + data["values"])


def test_truncation_bootstraps_from_the_final_observation_and_termination_does_not() -> None:
    values, rewards = torch.zeros(2, 2), torch.zeros(2, 2)
    terminated = torch.tensor([[True, False], [False, False]])
    truncated = torch.tensor([[False, True], [False, False]])
    finals = torch.full((2, 2), 7.0)
    following = next_values(values, torch.zeros(2), finals, truncated)
    advantages, _ = gae(rewards, values, following, terminated, truncated, discount=0.5, gae_lambda=1.0)
    assert advantages.tolist() == [[0.0, 3.5], [0.0, 0.0]]


def test_nan_beyond_a_terminal_state_does_not_leak() -> None:
    following = torch.full((3, 1), float("nan"))
    following[0] = 1.0
    ends = torch.tensor([[False], [True], [True]])
    advantages, _ = gae(
        torch.ones(3, 1), torch.zeros(3, 1), following, ends, no(3), discount=0.9, gae_lambda=0.9
    )
    assert torch.isfinite(advantages).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(5)))
def test_environments_may_be_permuted_and_batched(seed: int, order: list[int]) -> None:
    data = problem(seed, 33, 5, 2)
    whole, _ = gae(**data, discount=0.97, gae_lambda=0.9)
    permuted, _ = gae(**{name: x[:, order] for name, x in data.items()}, discount=0.97, gae_lambda=0.9)
    assert torch.equal(permuted, whole[:, order])
    for i in range(5):
        single, _ = gae(**{name: x[:, i : i + 1] for name, x in data.items()}, discount=0.97, gae_lambda=0.9)
        torch.testing.assert_close(single, whole[:, i : i + 1], rtol=1e-12, atol=1e-12)


def test_lambda_one_is_monte_carlo_and_lambda_zero_is_one_step() -> None:
    data = problem(0, 20, 3, 1)
    data["terminated"][-1] = True
    data["truncated"][:] = False
    data["next_values"] = next_values(data["values"], data["values"][0], data["values"], data["truncated"])
    one, targets = gae(**data, discount=0.9, gae_lambda=1.0)
    running = torch.zeros(3, 1, dtype=torch.float64)
    for t in reversed(range(20)):
        running = data["rewards"][t] + 0.9 * running * (~data["terminated"][t])[:, None]
        torch.testing.assert_close(targets[t], running)
    zero, _ = gae(**data, discount=0.9, gae_lambda=0.0)
    alive = (~data["terminated"])[..., None]
    torch.testing.assert_close(zero, data["rewards"] + 0.9 * alive * data["next_values"] - data["values"])
    assert not torch.equal(one, zero)


def test_shapes_are_checked() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="one shape"):
        gae(x, torch.zeros(3, 1), x, no(3, 2), no(3, 2), discount=0.9, gae_lambda=0.9)
    with pytest.raises(ValueError, match=r"\(T, N\)"):
        gae(x, x, x, no(3, 1), no(3, 2), discount=0.9, gae_lambda=0.9)


def test_silent_mistakes_are_refused() -> None:
    x, whole = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="floating-point"):  # a discount of 0.9 would become 0
        gae(whole, whole, whole, no(3, 2), no(3, 2), discount=0.9, gae_lambda=0.9)
    with pytest.raises(ValueError, match="discount has shape"):  # two streams' rates on two environments
        gae(x, x, x, no(3, 2), no(3, 2), discount=[0.9, 0.5], gae_lambda=0.9)
    streams = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="gae_lambda has shape"):
        gae(streams, streams, streams, no(3, 2), no(3, 2), discount=0.9, gae_lambda=[0.9, 0.5])


def test_ends_may_be_zeros_and_ones() -> None:
    data = problem(3, 12, 2, 1)
    expected, _ = gae(**data, discount=0.9, gae_lambda=0.9)
    data["terminated"], data["truncated"] = data["terminated"].float(), data["truncated"].to(torch.uint8)
    assert torch.equal(gae(**data, discount=0.9, gae_lambda=0.9)[0], expected)


@pytest.mark.parametrize("value", [0.1, 1000.1, -3.3])
@pytest.mark.parametrize("count", [1, 3, 7, 1000, 2049])
def test_equal_advantages_standardise_to_zero(value: float, count: int) -> None:
    """Although their mean is a rounding error away from them."""
    a = torch.full((count,), value)
    assert standardise(a).abs().max() < 1e-3
    assert standardise(a, torch.ones(count, dtype=torch.bool)).abs().max() < 1e-3


def test_standardise_and_centre() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 6.0])
    torch.testing.assert_close(standardise(a), (a - 3) / a.std(unbiased=False))
    torch.testing.assert_close(centre(a), a - 3)
    assert standardise(torch.tensor([5.0])).tolist() == [0.0]
    mask = torch.tensor([True, True, True, False])
    torch.testing.assert_close(centre(a, mask), torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(standardise(a, mask)[:3], standardise(a[:3]))
    assert standardise(a, mask)[3] == 0
    assert torch.equal(centre(a + 10), centre(a))
