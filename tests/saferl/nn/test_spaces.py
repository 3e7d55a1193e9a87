"""Observations of every fixed-size space become vectors, as Gymnasium's own flattening has them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces import flatten
from gymnasium.vector.utils import concatenate, create_empty_array

from saferl.errors import UsageError
from saferl.nn import ObservationEncoder
from saferl.nn.spaces import space_from_json, space_to_json

SPACES = [
    spaces.Box(-1, 1, (3,), np.float32),
    spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    spaces.Box(0, 255, (2, 2, 1), np.uint8),
    spaces.Discrete(4, start=-1),
    spaces.MultiDiscrete([2, 3], start=[1, 0]),
    spaces.MultiBinary(3),
    spaces.Dict({"z": spaces.Box(-1, 1, (2,)), "a": spaces.Discrete(3)}),
    spaces.Tuple(
        [spaces.Discrete(2), spaces.Dict({"x": spaces.MultiBinary(2), "y": spaces.Box(0, 1, (1,))})]
    ),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_encoding_equals_gymnasiums_flatten(space: spaces.Space) -> None:
    space.seed(0)
    singles = [space.sample() for _ in range(5)]
    batch = concatenate(space, singles, create_empty_array(space, 5))
    encoder = ObservationEncoder(space)
    got = encoder(batch).numpy()
    assert got.shape == (5, encoder.size)
    np.testing.assert_allclose(got, np.stack([flatten(space, s) for s in singles]), rtol=1e-6)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_description_round_trips_through_json(space: spaces.Space) -> None:
    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space


def test_spaces_without_a_size_are_refused() -> None:
    with pytest.raises(UsageError, match="Text have no fixed size"):
        ObservationEncoder(spaces.Text(5))
