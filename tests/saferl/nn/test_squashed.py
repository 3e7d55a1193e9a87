"""SAC's and TD3's action distributions: densities against torch's, moments against samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as reference

from saferl.errors import UsageError
from saferl.nn import DeterministicActions, SquashedGaussianActions
from saferl.nn.models import Actor

BOX = spaces.Box(-2.0, 4.0, (3,), np.float32)
OBSERVATIONS = spaces.Box(-1.0, 1.0, (4,), np.float32)


def twin(parameters: torch.Tensor) -> reference.Distribution:
    mean, log_std = parameters.chunk(2, -1)
    normal = reference.Normal(mean, log_std.exp())
    return reference.Independent(
        reference.TransformedDistribution(normal, [reference.TanhTransform(cache_size=1)]), 1
    )


def test_densities_and_gradients_agree_with_torch() -> None:
    torch.manual_seed(0)
    d = SquashedGaussianActions(BOX)
    outputs = torch.randn(64, 6, dtype=torch.float64, requires_grad=True)
    parameters = d.parameters_of(outputs)
    actions, log_probs = d.sample_with_log_prob(parameters, torch.Generator().manual_seed(3))
    torch.testing.assert_close(log_probs, d.log_prob(parameters, actions), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        d.log_prob(parameters, actions.detach()), twin(parameters).log_prob(actions.detach())
    )

    noise = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mean, log_std = parameters.chunk(2, -1)
    before = mean + log_std.exp() * noise
    naive = reference.Normal(mean, log_std.exp()).log_prob(before) - torch.log(1 - before.tanh() ** 2)
    torch.testing.assert_close(log_probs, naive.sum(-1))
    ours = torch.autograd.grad((log_probs * 1.7 + actions.sum(-1)).sum(), outputs, retain_graph=True)[0]
    theirs = torch.autograd.grad((naive.sum(-1) * 1.7 + before.tanh().sum(-1)).sum(), outputs)[0]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mean", [-40.0, -12.0, 9.0, 100.0])
def test_saturated_actions_keep_a_finite_density_with_gradient(mean: float) -> None:
    """log(1 - tanh(u)^2) of the naive formula is -inf from |u| = 9 on in single precision."""
    d = SquashedGaussianActions(spaces.Box(-1.0, 1.0, (1,), np.float32))
    outputs = torch.tensor([[mean, -1.0]], requires_grad=True)
    actions, log_probs = d.sample_with_log_prob(d.parameters_of(outputs), torch.Generator().manual_seed(0))
    assert actions.abs() <= 1
    (gradient,) = torch.autograd.grad(log_probs.sum(), outputs)
    assert torch.isfinite(log_probs).all()
    assert torch.isfinite(gradient).all()
    # d log pi / d mean = 2 tanh(u): the price of saturation has not vanished.
    assert gradient[0, 0].item() == pytest.approx(math.copysign(2.0, mean), rel=1e-3)
    assert torch.isfinite(
        d.log_prob(d.parameters_of(outputs), torch.tensor([[math.copysign(1.0, mean)]]))
    ).all()


def test_entropy_divergence_and_moments_agree_with_samples() -> None:
    d = SquashedGaussianActions(BOX)
    p = torch.tensor([[0.3, -1.0, 2.0, 0.2, -1.0, -0.5]], dtype=torch.float64)
    q = torch.tensor([[0.0, -0.5, 1.5, 0.0, -0.5, -0.7]], dtype=torch.float64)
    many = p.expand(200_000, 6)
    actions = d.sample(many, torch.Generator().manual_seed(1))
    log_probs = d.log_prob(many, actions)
    assert d.entropy(p).item() == pytest.approx(-log_probs.mean().item(), abs=0.02)
    divergence = (log_probs - d.log_prob(q.expand_as(many), actions)).mean().item()
    assert d.kl(p, q).item() == pytest.approx(divergence, abs=0.02)
    torch.testing.assert_close(d.mode(p), p[:, :3].tanh())
    torch.testing.assert_close(actions.median(0).values[None], d.mode(p), rtol=0, atol=0.01)
    np.testing.assert_allclose(d.to_env(torch.tensor([[-1.0, 0.0, 1.0]])), [[-2.0, 1.0, 4.0]])


def test_the_deviation_is_bounded() -> None:
    d = SquashedGaussianActions(BOX)
    parameters = d.parameters_of(torch.tensor([[0.0, 0.0, 0.0, -90.0, 1.0, 90.0]]))
    assert parameters[0, 3:].tolist() == [-20.0, 1.0, 2.0]


def test_deterministic_actions_add_clipped_noise_of_the_stated_size() -> None:
    d = DeterministicActions(BOX, noise=0.1)
    parameters = d.parameters_of(torch.tensor([[0.0, 5.0, -0.5]]).expand(100_000, 3))
    torch.testing.assert_close(d.mode(parameters)[0], torch.tensor([0.0, 5.0, -0.5]).tanh())
    samples = d.sample(parameters, torch.Generator().manual_seed(0))
    assert samples.abs().max() <= 1
    assert (samples[:, 1] == 1).float().mean() == pytest.approx(0.5, abs=0.01)
    assert samples[:, 0].std().item() == pytest.approx(0.1, rel=0.02)
    silent = DeterministicActions(BOX, noise=0.0)
    parameters = silent.parameters_of(torch.randn(5, 3))
    assert torch.equal(silent.sample(parameters, None), silent.mode(parameters))
    with pytest.raises(UsageError, match="noise must be 0 or more"):
        DeterministicActions(BOX, noise=-0.1)


@pytest.mark.parametrize("head", ["squashed", "deterministic"])
def test_spaces_that_a_squashed_policy_cannot_fill_are_refused(head: str) -> None:
    with pytest.raises(UsageError, match=r"continuous \(Box\) actions, not Discrete; use an on-policy"):
        Actor(OBSERVATIONS, spaces.Discrete(3), head=head)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no finite bounds"):
        Actor(OBSERVATIONS, spaces.Box(-np.inf, np.inf, (2,)), head=head)  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["squashed", "deterministic"])
def test_a_described_actor_is_rebuilt(head: str) -> None:
    actor = Actor(OBSERVATIONS, BOX, head=head, exploration_noise=0.3, activation="relu")  # type: ignore[arg-type]
    again = Actor.from_description(actor.describe())
    again.load_state_dict(actor.state_dict())
    observations = np.random.default_rng(0).uniform(-1, 1, (6, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        actor.act(observations, deterministic=True), again.act(observations, deterministic=True)
    )
    actor.seed(4)
    again.seed(4)
    drawn = actor.act(observations)
    np.testing.assert_array_equal(drawn, again.act(observations))
    assert all(BOX.contains(row) for row in drawn)
    assert not np.allclose(drawn, actor.act(observations, deterministic=True))


def test_plain_actors_are_described_as_before() -> None:
    assert set(Actor(OBSERVATIONS, BOX).describe()) == {
        "kind",
        "observation_space",
        "action_space",
        "hidden_sizes",
        "activation",
        "normalise_observations",
        "log_std_init",
    }
