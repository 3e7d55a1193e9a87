"""Distributions agree with torch.distributions; actions land in the environment's space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as reference

from saferl.errors import UsageError
from saferl.nn import CategoricalActions, GaussianActions, action_distribution


def gaussian(a: int = 3) -> GaussianActions:
    return GaussianActions(spaces.Box(-2.0, 4.0, (a,), np.float32), log_std_init=-0.3)


def test_gaussian_agrees_with_torch() -> None:
    torch.manual_seed(0)
    d = gaussian()
    d.log_std.data = torch.randn(3)
    p, q = d.parameters_of(torch.randn(7, 3)), d.parameters_of(torch.randn(7, 3)) + 0.1
    actions = torch.randn(7, 3)

    def twin(parameters: torch.Tensor) -> reference.Independent:
        mean, log_std = parameters.chunk(2, -1)
        return reference.Independent(reference.Normal(mean, log_std.exp()), 1)

    torch.testing.assert_close(d.log_prob(p, actions), twin(p).log_prob(actions))
    torch.testing.assert_close(d.entropy(p), twin(p).entropy())
    torch.testing.assert_close(d.kl(p, q), reference.kl_divergence(twin(p), twin(q)))
    assert torch.equal(d.mode(p), p[:, :3])


def test_gaussian_samples_have_the_stated_moments() -> None:
    d = gaussian(1)
    parameters = torch.tensor([[0.5, -1.0]]).expand(200_000, 2)
    samples = d.sample(parameters, torch.Generator().manual_seed(1))
    assert samples.mean().item() == pytest.approx(0.5, abs=5e-3)
    assert samples.std().item() == pytest.approx(float(np.exp(-1.0)), rel=1e-2)


def test_box_map_is_affine_and_clipped_and_leaves_open_dimensions_alone() -> None:
    box = spaces.Box(
        np.array([-2.0, -np.inf], np.float32), np.array([4.0, np.inf], np.float32), dtype=np.float32
    )
    d = GaussianActions(box)
    got = d.to_env(torch.tensor([[-1.0, 9.0], [0.0, -9.0], [1.0, 0.5], [7.0, 0.0]]))
    torch.testing.assert_close(got, torch.tensor([[-2.0, 9.0], [1.0, -9.0], [4.0, 0.5], [4.0, 0.0]]))


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(4, start=2), spaces.MultiDiscrete([2, 3, 4]), spaces.MultiDiscrete([[2, 3], [4, 5]])],
)
def test_categorical_agrees_with_torch(space: spaces.Space) -> None:
    torch.manual_seed(0)
    d = action_distribution(space)
    assert isinstance(d, CategoricalActions)
    p, q = d.parameters_of(torch.randn(6, d.network_size)), d.parameters_of(torch.randn(6, d.network_size))
    actions = d.sample(p, torch.Generator().manual_seed(0))
    log_prob, entropy, kl = torch.zeros(6), torch.zeros(6), torch.zeros(6)
    for i, (a, b) in enumerate(zip(p.split(d.sizes, -1), q.split(d.sizes, -1), strict=True)):
        one, two = reference.Categorical(logits=a), reference.Categorical(logits=b)
        log_prob += one.log_prob(actions[:, i])
        entropy += one.entropy()
        kl += reference.kl_divergence(one, two)
    torch.testing.assert_close(d.log_prob(p, actions), log_prob)
    torch.testing.assert_close(d.entropy(p), entropy)
    torch.testing.assert_close(d.kl(p, q), kl)
    for row in d.to_env(actions).numpy():
        assert space.contains(np.int64(row) if isinstance(space, spaces.Discrete) else row)


def test_categorical_samples_follow_the_probabilities() -> None:
    d = CategoricalActions(spaces.Discrete(3))
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    samples = (
        d.sample(probabilities.log().expand(100_000, 3), torch.Generator().manual_seed(3)).long().flatten()
    )
    torch.testing.assert_close(torch.bincount(samples) / 100_000, probabilities, atol=6e-3, rtol=0)


def test_other_spaces_are_refused_in_a_sentence() -> None:
    with pytest.raises(UsageError, match="MultiBinary are not supported"):
        action_distribution(spaces.MultiBinary(3))
