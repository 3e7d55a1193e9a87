"""The NumPy stand-in for an actor against the actor itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces

from saferl.nn.host import HostActor
from saferl.nn.models import Actor

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (2, 3), np.float64)
ACTIONS = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, np.inf], np.float32))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("hidden", [(8, 5), ()])
def test_same_features_moments_actions_and_commands(normalise: bool, hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    actor = Actor(
        OBSERVATIONS, ACTIONS, hidden_sizes=hidden, normalise_observations=normalise, log_std_init=0.3
    )
    twin = copy.deepcopy(actor)
    host = HostActor.of(actor)
    assert host is not None
    rng = np.random.default_rng(0)
    for size in (4, 1, 7):
        raw = rng.normal(3.0, 2.0, (size, 2, 3))
        draws = rng.standard_normal((size, 2)).astype(np.float32)
        features = host.encode(raw, update=True)
        wanted = twin.encode(raw, update=True)
        np.testing.assert_allclose(features, wanted, rtol=1e-5, atol=1e-6)
        actions, command = host.act(features, draws)
        with torch.no_grad():
            mean, log_std = twin.distribution_parameters(wanted).chunk(2, -1)
            reference = mean + log_std.exp() * torch.as_tensor(draws)
        np.testing.assert_allclose(actions, reference, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(command, twin.distribution.to_env(reference), rtol=1e-4, atol=1e-5)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(actor.state_dict()[name], value)


def test_moments_stay_in_evaluation_and_training_is_seen() -> None:
    actor = Actor(OBSERVATIONS, ACTIONS, hidden_sizes=(8,))
    host = HostActor.of(actor)
    assert host is not None
    actor.eval()
    host.encode(np.ones((4, 2, 3)), update=True)
    assert actor.normaliser is not None
    assert float(actor.normaliser.count) == 0
    zeros = np.zeros((1, 6), np.float32)
    before, _ = host.act(zeros, np.zeros((1, 2), np.float32))
    with torch.no_grad():
        for parameter in actor.network.parameters():
            parameter.add_(1.0)
    after, _ = host.act(zeros, np.zeros((1, 2), np.float32))
    assert (before != after).all()


def test_other_actors_are_left_to_torch() -> None:
    assert HostActor.of(Actor(OBSERVATIONS, ACTIONS, activation="relu")) is None
    assert HostActor.of(Actor(OBSERVATIONS, spaces.Discrete(3))) is None
    assert HostActor.of(Actor(spaces.Dict({"a": OBSERVATIONS}), ACTIONS)) is None
