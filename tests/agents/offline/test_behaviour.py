"""Behaviour cloning: whom it imitates, its loss, resumption, and that the choice of episodes shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from saferl.agents.offline import bc_all, bc_frontier, bc_safe
from saferl.agents.offline.bc_frontier import fit_front, frontier_episodes, pareto_front
from saferl.agents.offline.bc_safe import safe_episodes
from saferl.agents.offline.behaviour import BehaviourCloning
from saferl.agents.offline.engine import Batch, Context
from saferl.envs.datasets import OfflineDataset, write_dsrl
from saferl.envs.point_robot import PointRobotVectorEnv
from saferl.errors import UsageError
from saferl.experiment.config import to_json
from saferl.experiment.run import Run
from saferl.policies import load_policy

NO_DATA: tuple[Any, Any] = (None, None)


def episodes(costs: list[float], returns: list[float], trailing: int = 0) -> OfflineDataset:
    """Two steps each: cost and return in the first; the number of the episode is the observation."""
    n = 2 * len(costs) + trailing
    numbers = np.repeat(np.arange(len(costs) + 1.0), 2)[:n]
    rows = np.zeros((2, n))
    rows[0, : 2 * len(costs) : 2], rows[1, : 2 * len(costs) : 2] = costs, returns
    ends = np.zeros(n, bool)
    ends[1 : 2 * len(costs) : 2] = True
    return OfflineDataset(
        observations=numbers[:, None],
        next_observations=numbers[:, None],
        actions=np.zeros((n, 1)),
        rewards=rows[1],
        costs=rows[0],
        terminals=np.zeros(n, bool),
        timeouts=ends,
    )


def chosen(data: OfflineDataset) -> list[int]:
    return sorted({int(x) for x in data.observations[:, 0]})


def test_safe_episodes() -> None:
    data = episodes([0, 12, 10, 10.5], [1, 2, 3, 4], trailing=1)
    assert chosen(safe_episodes(data, 10)) == [0, 2]
    assert chosen(safe_episodes(data, 100)) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="cheapest costs 5"):
        safe_episodes(episodes([5, 6], [1, 1]), 4)
    with pytest.raises(UsageError, match="no whole episode"):
        safe_episodes(episodes([], [], trailing=1), 4)


def test_the_front() -> None:
    costs = np.array([0.0, 0.0, 5.0, 5.0, 10.0, 20.0])
    returns = np.array([1.0, 2.0, 1.5, 4.0, 6.0, 5.0])
    assert pareto_front(costs, returns).tolist() == [1, 3, 4]
    line = fit_front(costs, returns)  # 2 at 0, 4 at 5, 6 at 10
    np.testing.assert_allclose(line(np.array([0.0, 5.0, 20.0])), [2, 4, 10], atol=1e-9)
    bow = fit_front(np.arange(7.0), np.arange(7.0) * (14 - np.arange(7.0)))
    assert bow.degree() == 1, "a line explains nine tenths"
    sharp = fit_front(np.arange(7.0), np.array([0, 10, 14, 15, 15.5, 15.7, 15.8]))
    assert sharp.degree() == 2
    flat = fit_front(np.array([3.0, 3.0]), np.array([1.0, 1.0]))
    assert flat.degree() == 0
    assert flat(7.0) == pytest.approx(1)


def test_frontier_episodes() -> None:
    # The front is R = 2 + 0.4 C; the returns span 5, so that the band is 1.
    data = episodes([0, 0, 5, 5, 10, 7], [1, 2, 3.5, 4, 6, 2])
    assert chosen(frontier_episodes(data, 0.2)) == [0, 1, 2, 3, 4]
    assert chosen(frontier_episodes(data, 0.05)) == [1, 3, 4]
    assert chosen(frontier_episodes(episodes([3], [1]), 0.2)) == [0]
    # Beyond the front's last cost a parabola through it falls; a poor episode there stays out.
    front = [0, 10, 14, 15, 15.5, 15.7, 15.8]
    assert 7 not in chosen(frontier_episodes(episodes([*range(7), 12], [*front, 3]), 0.2))
    assert chosen(frontier_episodes(episodes([2, 2, 2], [1, 1, 1]), 0.2)) == [0, 1, 2]
    with pytest.raises(UsageError, match="no whole episode"):
        frontier_episodes(episodes([], [], trailing=2), 0.2)


def test_the_loss_is_its_equation() -> None:
    torch.manual_seed(0)
    config = bc_all.Config(dataset="none", env="none", hidden_sizes=(8, 8))
    box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    acts = spaces.Box(np.float32([-1, 0]), np.float32([1, 4]))
    made = BehaviourCloning(config, Context(box, acts, torch.device("cpu"), torch.Generator(), 10, *NO_DATA))
    s, a = torch.randn(16, 3), torch.rand(16, 2) * 2 - 1
    empty = torch.zeros(16)
    batch = Batch(s, a, empty, empty, empty, s)
    x = s.double().numpy()
    linear = [m for m in made.policy.network.modules() if isinstance(m, torch.nn.Linear)]
    for k, m in enumerate(linear):
        x = x @ m.weight.detach().double().numpy().T + m.bias.detach().double().numpy()
        x = np.maximum(x, 0) if k + 1 < len(linear) else np.tanh(x)
    assert made.loss(batch).item() == pytest.approx(((x - a.numpy()) ** 2).mean(), rel=1e-5)
    made.policy.eval()
    np.testing.assert_allclose(made.policy.act(s.numpy()), x * [1, 2] + [0, 2], atol=1e-5)
    before = made.loss(batch).item()
    for _ in range(50):
        made.update(batch)
    assert made.loss(batch).item() < before


def recorded(path: Path, seed: int) -> Path:
    """Robots that brake cost nothing, robots that speed up earn and cost: half of each."""
    rng = np.random.default_rng(seed)
    env = PointRobotVectorEnv(1)
    n, size = 60, env.single_observation_space.shape[0]
    observations = rng.normal(size=(20 * n, size))
    fast = np.repeat(np.arange(n) % 2, 20)
    ends = np.zeros(20 * n, bool)
    ends[19::20] = True
    data = OfflineDataset(
        observations=observations,
        next_observations=observations,
        actions=np.stack([np.where(fast, 0.9, -0.9), np.zeros(20 * n)], 1)
        + 0.05 * rng.normal(size=(20 * n, 2)),
        rewards=fast.astype(float),
        costs=fast.astype(float),
        terminals=np.zeros(20 * n, bool),
        timeouts=ends,
    )
    write_dsrl(path, data)
    return path


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_imitated_shows(tmp_path: Path, seed: int) -> None:
    file = recorded(tmp_path / "data.hdf5", seed)
    speeds = {}
    for name, module in (("all", bc_all), ("safe", bc_safe), ("frontier", bc_frontier)):
        short = {"total_steps": 200, "batch_size": 64, "hidden_sizes": (32,), "log_interval": 50}
        config = module.Config(dataset=str(file), env="PointRobot-v0", seed=seed, **short)
        run = Run.create(tmp_path / name, {"algorithm": f"bc-{name}", "config": to_json(config)}, quiet=True)
        module.train(config, run)
        run.close()
        obs = np.random.default_rng(9).normal(size=(200, 11)).astype(np.float32)
        speeds[name] = float(load_policy(tmp_path / name).act(obs)[:, 0].mean())
    assert speeds["safe"] < -0.7
    assert abs(speeds["all"]) < 0.4, "the mean of both"
    assert abs(speeds["frontier"]) < 0.4, "both lie on the front"


def test_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    file = recorded(tmp_path / "data.hdf5", 0)
    weights = []
    for name, stops in (("whole", (30,)), ("parts", (15, 30))):
        for stop in stops:
            config = bc_safe.Config(
                dataset=str(file), env="PointRobot-v0", total_steps=stop, batch_size=16, log_interval=5
            )
            if stop == stops[0]:
                stored = {"algorithm": "bc-safe", "config": to_json(config)}
                run = Run.create(tmp_path / name, stored, quiet=True)
            else:
                run = Run.open(tmp_path / name, quiet=True)
            policy = bc_safe.train(config, run)
            run.close()
        weights.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (bc_safe, {"cost_limit": -1}, "cost limit"),
        (bc_frontier, {"band": 0}, "band"),
        (bc_all, {"lr": 0}, "learning rate"),
        (bc_all, {"hidden_sizes": (0,)}, "hidden sizes"),
    ],
)
def test_impossible_settings(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        module.Config(dataset="none", env="none", **options)
