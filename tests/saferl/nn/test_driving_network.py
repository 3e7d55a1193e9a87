"""CaRL's network has the published shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from saferl.errors import UsageError
from saferl.nn.driving import DrivingCritic, DrivingPolicy, batch_of

ACTION = spaces.Box(-1.0, 1.0, (2,), np.float32)


def numbers(size: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (size,), np.float32)


def space(channels: int, side: int, measured: int, told: int) -> spaces.Dict:
    named: dict[str, spaces.Space] = {"bev": spaces.Box(0, 255, (channels, side, side), np.uint8)}
    if measured:
        named["measurements"] = numbers(measured)
    if told:
        named["value_measurements"] = numbers(told)
    return spaces.Dict(named)


@pytest.mark.parametrize(
    ("channels", "measured", "told", "count"), [(10, 8, 10, 1_983_541), (9, 10, 4, 1_982_317)]
)
def test_the_published_numbers_of_parameters(channels: int, measured: int, told: int, count: int) -> None:
    policy = DrivingPolicy(space(channels, 256, measured, told), ACTION)
    critic = DrivingCritic(policy)
    assert sum(p.numel() for m in (policy, critic) for p in m.parameters()) == count
    if channels == 10:
        assert policy.picture is not None
        assert sum(p.numel() for p in policy.picture.parameters()) == 856_624
    convolution = policy.picture.layers[0]  # type: ignore[union-attr]
    assert (convolution.bias == 0.1).all()


@pytest.mark.parametrize("side", [23, 48, 64, 96, 192, 256])
def test_pictures_of_any_size(side: int) -> None:
    policy = DrivingPolicy(space(4, side, 3, 2), ACTION)
    critic = DrivingCritic(policy, 3)
    obs = {
        "bev": np.random.default_rng(0).integers(0, 255, (2, 4, side, side)).astype(np.uint8),
        "measurements": np.zeros((2, 3), np.float32),
        "value_measurements": np.ones((2, 2), np.float32),
    }
    batch = batch_of(policy.observation_space, obs, "cpu")
    features = policy.features(batch)
    assert features.shape == (2, 256)
    assert batch["bev"].dtype == torch.uint8
    assert critic(features, batch).shape == (2, 3)
    parameters = policy.parameters_at(features)
    assert parameters.shape == (2, 4)
    assert (parameters > 1).all()
    action = policy.act(obs)
    assert action.shape == (2, 2)
    assert (np.abs(action) <= 1).all()


def test_only_the_critic_is_told() -> None:
    policy = DrivingPolicy(space(2, 25, 0, 4), ACTION)
    critic = DrivingCritic(policy)
    obs = {"bev": np.zeros((1, 2, 25, 25), np.uint8), "value_measurements": np.zeros((1, 4), np.float32)}
    other = {**obs, "value_measurements": np.ones((1, 4), np.float32)}
    assert np.array_equal(policy.act(obs, deterministic=True), policy.act(other, deterministic=True))
    a, b = (batch_of(policy.observation_space, o, "cpu") for o in (obs, other))
    assert not torch.equal(critic(policy.features(a), a), critic(policy.features(b), b))


def test_vectors_and_descriptions() -> None:
    policy = DrivingPolicy(numbers(7), ACTION)
    again = DrivingPolicy.from_description(policy.describe())
    again.load_state_dict(policy.state_dict())
    obs = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    assert np.array_equal(policy.act(obs, deterministic=True), again.act(obs, deterministic=True))
    tensor = policy.act(torch.from_numpy(obs), deterministic=True)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), policy.act(obs, deterministic=True))
    policy.seed(1)
    first = policy.act(obs)
    policy.seed(1)
    assert np.array_equal(first, policy.act(obs))


def test_what_it_cannot_read() -> None:
    with pytest.raises(UsageError, match="22 pixels a side is too small"):
        DrivingPolicy(space(3, 22, 1, 0), ACTION)
    with pytest.raises(UsageError, match="channels, side, side"):
        DrivingPolicy(spaces.Dict({"bev": spaces.Box(0, 255, (3, 64, 32), np.uint8)}), ACTION)
    with pytest.raises(UsageError, match="takes boxes"):
        DrivingPolicy(spaces.Dict({"x": spaces.Discrete(3)}), ACTION)
    with pytest.raises(UsageError, match="nothing to look at"):
        DrivingPolicy(spaces.Dict({"value_measurements": numbers(3)}), ACTION)
