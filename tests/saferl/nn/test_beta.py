"""The Beta policy against worked numbers, torch.distributions and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy import stats

from saferl.errors import UsageError
from saferl.nn.beta import ROUNDS, BetaActions, beta_sample, roach_mode

BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_the_worked_numbers() -> None:
    policy = BetaActions(spaces.Box(-1.0, 1.0, (1,), np.float32))
    p = row(3.0, 2.0)
    assert float(policy.to_env(policy.mode(p).float())) == pytest.approx(0.2)
    assert float(2 * roach_mode(p) - 1) == pytest.approx(1 / 3)
    assert float(policy.log_prob(p, row(0.6))) == pytest.approx(0.5469646, abs=1e-6)
    assert float(policy.entropy(p)) == pytest.approx(-0.2349062, abs=1e-6)
    assert float(policy.kl(row(2.0, 2.0), p)) == pytest.approx(0.1401863, abs=1e-6)
    untrained = policy.parameters_of(torch.zeros(1, 2))
    assert untrained.tolist() == [[pytest.approx(1.693147)] * 2]
    assert float(policy.entropy(untrained)) == pytest.approx(-0.0774597, abs=1e-5)
    alpha = float(untrained[0, 0])
    assert 2 * (alpha**2 / ((2 * alpha) ** 2 * (2 * alpha + 1))) ** 0.5 == pytest.approx(0.4774755, abs=1e-5)


def test_densities_are_torchs() -> None:
    policy = BetaActions(BOX)
    generator = torch.Generator().manual_seed(0)
    p = 1 + 5 * torch.rand(200, 4, generator=generator, dtype=torch.float64)
    q = 1 + 5 * torch.rand(200, 4, generator=generator, dtype=torch.float64)
    x = torch.rand(200, 2, generator=generator, dtype=torch.float64)
    theirs = torch.distributions.Beta(*p.chunk(2, -1))
    others = torch.distributions.Beta(*q.chunk(2, -1))
    assert torch.allclose(policy.log_prob(p, x), theirs.log_prob(x).sum(-1))
    assert torch.allclose(policy.entropy(p), theirs.entropy().sum(-1))
    assert torch.allclose(policy.kl(p, q), torch.distributions.kl_divergence(theirs, others).sum(-1))
    assert torch.isfinite(policy.log_prob(p, torch.zeros_like(x))).all()
    assert torch.isfinite(policy.log_prob(p, torch.ones_like(x))).all()


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (1.693, 1.693), (5.0, 1.2), (40.0, 60.0)])
def test_draws_follow_the_distribution(alpha: float, beta: float) -> None:
    policy = BetaActions(spaces.Box(-1.0, 1.0, (1,), np.float32))
    draws = policy.sample(row(alpha, beta).expand(20_000, 2), torch.Generator().manual_seed(3))
    assert stats.kstest(draws[:, 0].numpy(), stats.beta(alpha, beta).cdf).pvalue > 1e-3


def test_rows_can_be_drawn_apart() -> None:
    policy = BetaActions(BOX)
    p = 1 + 3 * torch.rand(10, 4, generator=torch.Generator().manual_seed(1))
    noise = policy.noise(10, torch.Generator().manual_seed(2), torch.device("cpu"))
    together = policy.draw(p, noise)
    apart = torch.cat([policy.draw(p[k : k + 5], (noise[0][k : k + 5], noise[1][k : k + 5])) for k in (0, 5)])
    assert torch.equal(together, apart)


def test_a_draw_is_finite_when_every_attempt_is_refused() -> None:
    p = torch.full((3, 2), 2.0)
    noise = torch.full((3, 4, ROUNDS), -50.0), torch.zeros(3, 4, ROUNDS)
    assert beta_sample(p, p, *noise).tolist() == [[0.5, 0.5]] * 3


def test_actions_reach_the_box() -> None:
    policy = BetaActions(spaces.Box(np.float32([-2, 0]), np.float32([2, 5])))
    assert policy.to_env(torch.tensor([[0.0, 1.0], [0.5, 0.2]])).tolist() == [[-2.0, 5.0], [0.0, 1.0]]
    with pytest.raises(UsageError, match="finite bounds"):
        BetaActions(spaces.Box(-np.inf, np.inf, (2,)))
    with pytest.raises(UsageError, match="finite bounds"):
        BetaActions(spaces.Discrete(3))


def test_roachs_rule_at_the_edges() -> None:
    found = roach_mode(torch.tensor([[3.0, 2.0], [0.9, 2.0], [2.0, 0.9], [0.5, 0.7]]))
    assert found[:, 0].tolist() == pytest.approx([2 / 3, 0.0, 1.0, 0.5 / 1.2])
