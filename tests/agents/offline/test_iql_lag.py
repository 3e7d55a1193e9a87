"""IQL-Lag against its equations in float64 NumPy, and that a tighter limit costs less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from saferl.agents.offline import iql_lag
from saferl.agents.offline.engine import Batch, Context
from saferl.agents.offline.iql_lag import Config, IQLLag
from saferl.envs.datasets import OfflineDataset, write_dsrl
from saferl.errors import UsageError
from saferl.experiment.config import to_json
from saferl.experiment.run import Run
from saferl.policies import load_policy

S, A, B = 3, 2, 24
NO_DATA: tuple[Any, Any] = (None, None)


def learner(**options: Any) -> IQLLag:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        box = spaces.Box(-np.inf, np.inf, (S,), np.float32)
        act = spaces.Box(-1, 1, (A,), np.float32)
        context = Context(box, act, torch.device("cpu"), torch.Generator().manual_seed(1), 10, *NO_DATA)
        config = Config(dataset="none", env="none", hidden_sizes=(8, 8), cost_limit=3.0, **options)
        made = IQLLag(config, context)
    finally:
        torch.set_default_dtype(torch.float32)
    for flat in (*made._flat.values(), made._slow):
        flat.values.data += 0.1 * torch.randn_like(flat.values)
    return made


def batch() -> Batch:
    rng = np.random.default_rng(3)
    parts = (
        rng.normal(size=(B, S)),
        rng.uniform(-0.9, 0.9, (B, A)),
        rng.normal(size=B),
        rng.integers(0, 2, B),
        rng.integers(0, 2, B),
        rng.normal(size=(B, S)),
    )
    return Batch(*(torch.as_tensor(x, dtype=torch.float64) for x in parts))


def stack(networks: Any, inputs: np.ndarray) -> np.ndarray:
    outputs = []
    for k in range(len(networks)):
        x = inputs
        for layer, (w, b) in enumerate(zip(networks.weights, networks.biases, strict=True)):
            x = x @ w[k].detach().numpy() + b[k].detach().numpy()
            x = np.maximum(x, 0) if layer + 1 < len(networks.weights) else x
        outputs.append(x[:, 0])
    return np.stack(outputs)


def test_losses_and_weights_are_the_equations() -> None:
    made, data = learner(), batch()
    made.multiplier.value = 0.5
    s, a, r, c, m, after = (x.numpy() for x in data)
    slow = stack(made.slow_critics, np.concatenate([s, a], 1))
    q, q_c = slow[:2].min(0), slow[2:].max(0)
    got = made.slow_values(data.observations, data.actions)
    np.testing.assert_allclose(got[0], q, rtol=1e-6)
    np.testing.assert_allclose(got[1], q_c, rtol=1e-6)

    v = stack(made.value, s)[0]
    u = q - v
    expected = (np.where(u > 0, 0.7, 0.3) * u**2).mean()
    assert made.value_loss(data, torch.as_tensor(q)).item() == pytest.approx(expected, rel=1e-6)

    own = np.linspace(-1, 1, B)
    w = np.minimum(np.exp(3 * ((q - v) - 0.5 * (q_c - own)) / 1.5), 100)
    weights = made.weights(torch.as_tensor(q - v), torch.as_tensor(q_c - own))
    np.testing.assert_allclose(weights, w, rtol=1e-6)
    assert made.weights(torch.tensor([50.0]), torch.tensor([0.0])).item() == 100

    x = s
    linear = [k for k in made.policy.network.modules() if isinstance(k, torch.nn.Linear)]
    for layer, k in enumerate(linear):
        x = x @ k.weight.detach().numpy().T + k.bias.detach().numpy()
        x = np.maximum(x, 0) if layer + 1 < len(linear) else x
    mean, log_std = x[:, :A], np.clip(x[:, A:], -20, 2)
    before = np.arctanh(a)
    log_prob = -0.5 * ((before - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    log_prob = (log_prob - np.log(1 - a**2)).sum(1)
    assert made.policy_loss(data, weights).item() == pytest.approx(-(w * log_prob).mean(), rel=1e-6)

    next_actions = np.random.default_rng(5).uniform(-1, 1, (B, A))
    next_cost = stack(made.slow_critics, np.concatenate([after, next_actions], 1))[2:].max(0)
    y = r + 0.99 * m * stack(made.value, after)[0]
    y_c = c + 0.99 * m * next_cost
    fast = stack(made.critics, np.concatenate([s, a], 1))
    expected = sum(((fast[k] - (y if k < 2 else y_c)) ** 2).mean() for k in range(4))
    assert made.critic_loss(data, torch.as_tensor(next_actions)).item() == pytest.approx(expected, rel=1e-6)


def test_the_multiplier_answers_to_the_estimate() -> None:
    made = learner()
    assert made.limit == pytest.approx(3 * (1 - 0.99**10) / 0.01 / 10)
    made.update(batch())
    first = made.multiplier.value
    made.slow_critics.biases[-1].data[2:] += 100
    made.update(batch())
    assert made.multiplier.value > first + 5
    made.slow_critics.biases[-1].data[2:] -= 1000
    for _ in range(3):
        made.update(batch())
    assert made.multiplier.value < 0.01


def test_the_controllers_worked_steps() -> None:
    made = learner()
    prices = [made.multiplier.update(cost, 1.0) for cost in (3.0, 2.0, 0.5, 0.5)]
    np.testing.assert_allclose(prices, [0.208, 0.109, 0.0075, 0.006], atol=1e-12)


def test_slow_copies_follow() -> None:
    made = learner()
    before = made._slow.values.clone()
    made.update(batch())
    torch.testing.assert_close(
        made._slow.values, 0.995 * before + 0.005 * made._flat["critics"].values, rtol=1e-9, atol=1e-9
    )


def recorded(path: Path, seed: int, steps: int = 10) -> Path:
    """Reward a, cost 1 for a > 0, actions uniform: what is forbidden is what pays."""
    rng = np.random.default_rng(seed)
    n = 200 * steps
    observations = rng.normal(size=(n, 11))
    actions = rng.uniform(-1, 1, (n, 2))
    ends = np.zeros(n, bool)
    ends[steps - 1 :: steps] = True
    write_dsrl(
        path,
        OfflineDataset(
            observations=observations,
            next_observations=np.roll(observations, -1, 0),
            actions=actions,
            rewards=actions[:, 0],
            costs=actions[:, 0] > 0,
            terminals=np.zeros(n, bool),
            timeouts=ends,
        ),
    )
    return path


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tighter_limit_costs_less(tmp_path: Path, seed: int) -> None:
    file = recorded(tmp_path / "data.hdf5", seed)
    shares = {}
    for limit in (1.0, 1e6):
        # Limits count the environment's 300 steps, the data's episodes have 10.
        short = {"total_steps": 800, "batch_size": 128, "hidden_sizes": (32, 32), "discount": 0.8}
        short |= {"lr": 2e-3, "polyak": 0.05, "reward_scale": 1.0}
        config = Config(dataset=str(file), env="PointRobot-v0", cost_limit=30 * limit, seed=seed, **short)
        run = Run.create(
            tmp_path / f"{limit}", {"algorithm": "iql-lag", "config": to_json(config)}, quiet=True
        )
        iql_lag.train(config, run)
        run.close()
        policy = load_policy(tmp_path / f"{limit}")
        obs = np.random.default_rng(9).normal(size=(500, 11)).astype(np.float32)
        shares[limit] = float((policy.act(obs, deterministic=True)[:, 0] > 0).mean())
    assert shares[1e6] > 0.95, "without a limit it takes what pays"
    assert shares[1.0] < 0.3


def test_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    file = recorded(tmp_path / "data.hdf5", 0)
    weights = []
    for name, stops in (("whole", (20,)), ("parts", (10, 20))):
        for stop in stops:
            config = Config(
                dataset=str(file),
                env="PointRobot-v0",
                total_steps=stop,
                batch_size=16,
                hidden_sizes=(8,),
                log_interval=5,
            )
            if stop == stops[0]:
                stored = {"algorithm": "iql-lag", "config": to_json(config)}
                run = Run.create(tmp_path / name, stored, quiet=True)
            else:
                run = Run.open(tmp_path / name, quiet=True)
            policy = iql_lag.train(config, run)
            run.close()
        weights.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost_limit": -1}, "cost limit"),
        ({"expectile": 1}, "expectile"),
        ({"temperature": 0}, "temperature"),
        ({"polyak": 2}, "polyak"),
        ({"reward_scale": 0}, "reward_scale"),
        ({"kp": -1}, "gains"),
        ({"hidden_sizes": (0,)}, "hidden sizes"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(dataset="none", env="none", **options)
