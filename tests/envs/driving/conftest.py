from __future__ import annotations

import numpy as np
import pytest
import torch

from saferl.envs.driving.roads import RoadBank, RoadNetwork, random_network, random_route


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def networks() -> list[RoadNetwork]:
    return [random_network(seed) for seed in range(3)]


@pytest.fixture(scope="session")
def bank(networks: list[RoadNetwork]) -> RoadBank:
    """Three random maps with twelve routes of 200 m each."""
    routes = [[random_route(n, np.random.default_rng(r), 200.0) for r in range(12)] for n in networks]
    return RoadBank.build(networks, routes, 200.0)
