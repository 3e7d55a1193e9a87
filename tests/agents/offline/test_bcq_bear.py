"""BCQ-Lag and BEAR-Lag against their equations in float64 NumPy, and that a tighter limit costs less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import tensor

from saferl.agents.offline import bcq_lag, bear_lag
from saferl.agents.offline.bcq_lag import BCQLag
from saferl.agents.offline.bear_lag import BEARLag, mmd
from saferl.agents.offline.engine import Batch, Context
from saferl.envs.datasets import OfflineDataset, write_dsrl
from saferl.errors import UsageError
from saferl.experiment.config import to_json
from saferl.experiment.run import Run
from saferl.policies import load_policy

S, A, B, K = 3, 2, 16, 4
NO_DATA: tuple[Any, Any] = (None, None)
LEARNERS = [(bcq_lag, BCQLag), (bear_lag, BEARLag)]


def learner(module: Any, kind: type[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        box = spaces.Box(-np.inf, np.inf, (S,), np.float32)
        act = spaces.Box(-1, 1, (A,), np.float32)
        context = Context(box, act, torch.device("cpu"), torch.Generator().manual_seed(1), 10, *NO_DATA)
        small = {"hidden_sizes": (8, 8), "vae_hidden_size": 8, "samples": K, "cost_limit": 3.0}
        made = kind(module.Config(dataset="none", env="none", **{**small, **options}), context)
    finally:
        torch.set_default_dtype(torch.float32)
    for flat in (*made._flat.values(), *made._slow.values()):
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


def test_worked_numbers() -> None:
    same = tensor([[[0.3], [0.7]]], dtype=torch.float64)
    assert mmd(same, same, 50.0).item() == pytest.approx(1e-3, rel=1e-6)
    x = tensor([[[0.0], [1.0]]], dtype=torch.float64)
    assert mmd(x, x + 2, 50.0).item() == pytest.approx(0.277976, abs=1e-6)


@pytest.mark.parametrize(("module", "kind"), LEARNERS)
def test_the_controllers_worked_steps(module: Any, kind: type[Any]) -> None:
    made = learner(module, kind)
    prices = [made.multiplier.update(cost, 1.0) for cost in (3.0, 2.0, 0.5, 0.5)]
    np.testing.assert_allclose(prices, [0.208, 0.109, 0.0075, 0.006], atol=1e-12)
    assert made.limit == pytest.approx(3 * (1 - 0.99**10) / 0.01 / 10)


@pytest.mark.parametrize(("module", "kind"), LEARNERS)
def test_critics_are_their_equations(module: Any, kind: type[Any]) -> None:
    made, data = learner(module, kind), batch()
    s, a, r, c, m, after = (x.numpy() for x in data)
    actions = np.random.default_rng(5).uniform(-1, 1, (B, K, A))
    best = np.full((2, B), -np.inf)
    for k in range(K):
        values = stack(made.slow_critics, np.concatenate([after, actions[:, k]], 1))
        for j in range(2):  # reward, cost
            one, other = values[4 * j : 4 * j + 2].min(0), values[4 * j + 2 : 4 * j + 4].min(0)
            best[j] = np.maximum(best[j], 0.75 * np.minimum(one, other) + 0.25 * np.maximum(one, other))
    y = np.stack([r + 0.99 * m * best[0], c + 0.99 * m * best[1]])
    got = made.slow_critics.targets(
        data.next_observations,
        torch.as_tensor(actions),
        torch.stack([data.rewards, data.costs]),
        0.99 * data.masks,
        0.75,
    )
    np.testing.assert_allclose(got, y, rtol=1e-9)
    errors = stack(made.critics, np.concatenate([s, a], 1)) - np.repeat(y, 4, axis=0)
    loss = made.critic_loss(data, torch.as_tensor(actions))
    assert loss.item() == pytest.approx((errors**2).mean(1).sum(), rel=1e-9)
    own = stack(made.critics, np.concatenate([s, a], 1))
    q, q_c = made.critics.least(data.observations, data.actions)
    np.testing.assert_allclose(q.detach(), own[:4].min(0), rtol=1e-9)
    np.testing.assert_allclose(q_c.detach(), own[4:].min(0), rtol=1e-9)


def test_losses_of_the_policies() -> None:
    q, q_c, gaps = (torch.linspace(k, k + 1, B, dtype=torch.float64) for k in range(3))
    bcq, bear = learner(bcq_lag, BCQLag), learner(bear_lag, BEARLag)
    bcq.multiplier.value = bear.multiplier.value = 0.7
    bear.log_alpha = tensor(0.3, dtype=torch.float64)
    price = 0.7 * (q_c.mean() - bcq.limit) - q.mean()
    assert bcq.policy_loss(q, q_c).item() == pytest.approx(price.item())
    support = np.exp(0.3) * (gaps.mean().item() - 0.05)
    assert bear.policy_loss(q, q_c, gaps).item() == pytest.approx(price.item() + support)


def test_proposals_are_shifted_a_little() -> None:
    made, data = learner(bcq_lag, BCQLag), batch()
    s, a = data.observations.numpy(), data.actions.numpy()
    x = np.concatenate([s, a], 1)
    for n in (n for n in made.perturbation.modules() if isinstance(n, torch.nn.Linear)):
        x = np.tanh(x @ n.weight.detach().numpy().T + n.bias.detach().numpy())
    shifted = made.perturbation(data.observations, data.actions).detach()
    np.testing.assert_allclose(shifted, np.clip(a + 0.05 * x, -1, 1), rtol=1e-9)


def test_the_policy_takes_the_best_candidate_at_the_price() -> None:
    policy = learner(bcq_lag, BCQLag).policy
    policy.price.fill_(2.0)
    data = batch()
    candidates = torch.as_tensor(np.random.default_rng(5).uniform(-1, 1, (B, K, A)))
    chosen = policy.choose(data.observations, candidates)
    for row in range(B):
        scores = []
        for k in range(K):
            pair = torch.cat([data.observations[row], candidates[row, k]])[None].numpy()
            values = stack(policy.critics, pair)[:, 0]
            scores.append(values[:4].min() - 2 * values[4:].min())
        assert torch.equal(chosen[row], candidates[row, int(np.argmax(scores))])


@pytest.mark.parametrize(("module", "kind"), LEARNERS)
def test_a_step_moves_what_it_should(module: Any, kind: type[Any]) -> None:
    made, data = learner(module, kind), batch()
    before = {name: flat.values.detach().clone() for name, flat in made._flat.items()}
    slow = {name: flat.values.detach().clone() for name, flat in made._slow.items()}
    metrics = made.update(data)
    for name, flat in made._flat.items():
        assert not torch.equal(flat.values, before[name]), name
    for name, flat in made._slow.items():
        expected = 0.995 * slow[name] + 0.005 * made._flat[name].values
        torch.testing.assert_close(flat.values.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    assert metrics["constraint/cost/multiplier"].item() == pytest.approx(made.multiplier.value)


def test_bear_raises_alpha_while_it_is_far_from_the_data() -> None:
    far = learner(bear_lag, BEARLag, mmd_threshold=1e-3)
    near = learner(bear_lag, BEARLag, mmd_threshold=2.0)
    discrepancy = far.update(batch())["policy/mmd"].item()
    near.update(batch())
    assert far.log_alpha.item() == pytest.approx(1e-3 * (discrepancy - 1e-3), rel=1e-6)
    assert near.log_alpha.item() < 0


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
@pytest.mark.parametrize(("module", "name"), [(bcq_lag, "bcq-lag"), (bear_lag, "bear-lag")])
def test_a_tighter_limit_costs_less(module: Any, name: str, tmp_path: Path, seed: int) -> None:
    file = recorded(tmp_path / "data.hdf5", seed)
    means = {}
    short = {
        "total_steps": 500,
        "batch_size": 128,
        "hidden_sizes": (32, 32),
        "vae_hidden_size": 32,
        "seed": seed,
    }
    short |= {"discount": 0.8, "polyak": 0.05, "lr": 2e-3, "reward_scale": 1.0, "ki": 0.03}
    if module is bcq_lag:
        short["phi"] = 1.0  # the data's actions are everywhere
    for limit in (1.0, 1e6):
        # Limits count the environment's 300 steps, the data's episodes have 10.
        config = module.Config(dataset=str(file), env="PointRobot-v0", cost_limit=30 * limit, **short)
        run = Run.create(tmp_path / f"{limit}", {"algorithm": name, "config": to_json(config)}, quiet=True)
        module.train(config, run)
        run.close()
        obs = np.random.default_rng(9).normal(size=(500, 11)).astype(np.float32)
        policy: Any = load_policy(tmp_path / f"{limit}")
        policy.seed(0)
        means[limit] = float((policy.act(obs)[:, 0] > 0).mean())
    assert means[1e6] > 0.7, "without a limit it takes what pays"
    assert means[1.0] < means[1e6] - 0.3


@pytest.mark.parametrize(("module", "name"), [(bcq_lag, "bcq-lag"), (bear_lag, "bear-lag")])
def test_it_resumes_to_the_same_bits(module: Any, name: str, tmp_path: Path) -> None:
    file = recorded(tmp_path / "data.hdf5", 0)
    weights = []
    small = {"batch_size": 16, "hidden_sizes": (8,), "vae_hidden_size": 8, "log_interval": 5}
    for folder, stops in (("whole", (20,)), ("parts", (10, 20))):
        for stop in stops:
            config = module.Config(dataset=str(file), env="PointRobot-v0", total_steps=stop, **small)
            if stop == stops[0]:
                stored = {"algorithm": name, "config": to_json(config)}
                run = Run.create(tmp_path / folder, stored, quiet=True)
            else:
                run = Run.open(tmp_path / folder, quiet=True)
            policy = module.train(config, run)
            run.close()
        weights.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.equal(*weights)
    one: Any = load_policy(tmp_path / "whole")
    obs = np.ones((2, 11), np.float32)
    one.seed(4)
    policy.seed(4)
    np.testing.assert_array_equal(one.act(obs), policy.act(obs))
    np.testing.assert_array_equal(one.act(obs, deterministic=True), policy.act(obs, deterministic=True))


@pytest.mark.parametrize("module", [bcq_lag, bear_lag])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost_limit": -1}, "cost limit"),
        ({"min_weight": 2}, "min_weight"),
        ({"samples": 0}, "samples"),
        ({"lr": 0}, "lr"),
    ],
)
def test_impossible_settings(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        module.Config(dataset="none", env="none", **options)
