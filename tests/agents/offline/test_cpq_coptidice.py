"""CPQ and COptiDICE against their equations in float64 NumPy, and that a tighter limit costs less."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import tensor

from saferl.agents.offline import coptidice, cpq
from saferl.agents.offline.coptidice import COptiDICE, divergence, ratio_of_slope
from saferl.agents.offline.cpq import CPQ
from saferl.agents.offline.engine import Batch, Context
from saferl.envs.datasets import OfflineDataset, write_dsrl
from saferl.errors import UsageError
from saferl.experiment.config import to_json
from saferl.experiment.run import Run
from saferl.policies import load_policy

S, A, B, K = 3, 2, 16, 4


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


def dataset(observations: np.ndarray) -> OfflineDataset:
    n = len(observations)
    ends = np.zeros(n, bool)
    ends[3::4] = True
    return OfflineDataset(
        observations=observations,
        next_observations=observations,
        actions=np.zeros((n, A)),
        rewards=np.zeros(n),
        costs=np.zeros(n),
        terminals=np.zeros(n, bool),
        timeouts=ends,
    )


def learner(module: Any, kind: type[Any], **options: Any) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        box = spaces.Box(-np.inf, np.inf, (S,), np.float32)
        act = spaces.Box(-1, 1, (A,), np.float32)
        data = batch()
        context = Context(
            box,
            act,
            torch.device("cpu"),
            torch.Generator().manual_seed(1),
            10,
            dataset(data.observations.numpy()),
            data,
        )
        config = module.Config(dataset="none", env="none", hidden_sizes=(8, 8), cost_limit=3.0, **options)
        made = kind(config, context)
    finally:
        torch.set_default_dtype(torch.float32)
    for flat in made._flat.values():
        flat.values.data += 0.1 * torch.randn_like(flat.values)
    return made


def stack(networks: Any, inputs: np.ndarray) -> np.ndarray:
    outputs = []
    for k in range(len(networks)):
        x = inputs
        for layer, (w, b) in enumerate(zip(networks.weights, networks.biases, strict=True)):
            x = x @ w[k].detach().numpy() + b[k].detach().numpy()
            x = np.maximum(x, 0) if layer + 1 < len(networks.weights) else x
        outputs.append(x[:, 0])
    return np.stack(outputs)


LIMIT = 3 * (1 - 0.99**10) / 0.01 / 10


# --- CPQ -------------------------------------------------------------------------------------------------


def test_cpqs_critics_are_their_equations() -> None:
    made, data = learner(cpq, CPQ, vae_size=8), batch()
    assert made.limit == pytest.approx(LIMIT)
    made.limit = 0.05  # so that it decides
    s, a, r, c, m, after = (x.numpy() for x in data)
    following = np.random.default_rng(5).uniform(-1, 1, (B, A))
    slow = stack(made.slow_critics, np.concatenate([after, following], 1))
    q, q_c = slow[:2].min(0), slow[2:].max(0)
    safe = q_c <= 0.05
    assert 0 < safe.sum() < B
    y, y_c = r + 0.99 * m * safe * q, c + 0.99 * m * q_c
    errors = stack(made.critics, np.concatenate([s, a], 1)) - np.stack([y, y, y_c, y_c])
    got = made.squared_errors(data, torch.as_tensor(following))
    assert got.item() == pytest.approx((errors**2).mean(1).sum(), rel=1e-9)


def test_cpqs_unknown_actions() -> None:
    made, data = learner(cpq, CPQ, vae_size=8, samples=K), batch()
    actions = np.random.default_rng(5).uniform(-1, 1, (B, K, A))
    observations = data.observations[:, None].expand(-1, K, -1)
    pairs = np.concatenate([observations.numpy(), actions], -1).reshape(B * K, -1)
    x = pairs
    linear = [n for n in made.vae.encoder.modules() if isinstance(n, torch.nn.Linear)]
    for k, n in enumerate(linear):
        x = x @ n.weight.detach().numpy().T + n.bias.detach().numpy()
        x = np.maximum(x, 0) if k + 1 < len(linear) else x
    mean, log_std = x[:, : 2 * A], np.clip(x[:, 2 * A :], -4, 15)
    kl = (-0.5 * (1 + 2 * log_std - mean**2 - np.exp(2 * log_std))).mean(1)
    unknown = kl >= np.quantile(kl, 0.75)
    expected = (unknown * stack(made.critics, pairs)[2:].max(0)).mean()
    got = made.unknown_cost(observations, torch.as_tensor(actions))
    assert got.item() == pytest.approx(expected, rel=1e-9)
    assert got.requires_grad


def test_cpqs_alpha_rises_while_unknown_actions_look_cheap() -> None:
    made = learner(cpq, CPQ, vae_size=8)
    gap = 1.5 * made.limit - made.update(batch())["value/unknown_cost"].item()
    assert made.log_alpha.item() == pytest.approx(1e-4 * gap, rel=1e-9)
    made.critics.biases[-1].data[2:] += 1e3
    before = made.log_alpha.item()
    made.update(batch())
    assert made.log_alpha.item() < before


def test_cpqs_policy_learns_nothing_from_unsafe_actions() -> None:
    made = learner(cpq, CPQ, vae_size=8)
    made.critics.biases[-1].data[2:] += 1e3
    before = made._flat["policy"].values.detach().clone()
    metrics = made.update(batch())
    assert metrics["policy/safe"].item() == 0
    assert torch.equal(made._flat["policy"].values, before)


# --- COptiDICE -------------------------------------------------------------------------------------------


def test_the_divergences_worked_values() -> None:
    np.testing.assert_allclose(divergence(tensor([0.5, 1.0, 2.0, 0.0])), [0.153426, 0, 0.5, 1], atol=1e-6)
    np.testing.assert_allclose(ratio_of_slope(tensor([-1.0, 0.0, 2.0])), [0.367879, 1, 3], atol=1e-6)
    w = torch.linspace(0.05, 4, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(divergence(w).sum(), w)
    np.testing.assert_allclose(ratio_of_slope(slope), w.detach(), rtol=1e-9)


def test_coptidices_losses_are_their_equations() -> None:
    made, data = learner(coptidice, COptiDICE), batch()
    assert made.limit == pytest.approx(0.01 * LIMIT)
    s, _, r, c, m, after = (x.numpy() for x in data)
    firsts = np.random.default_rng(5).normal(size=(B, S))
    lam, tau, alpha = made.multiplier.value, made.temperature.value, 0.5
    assert lam == pytest.approx(1)
    (nu_0, chi_0), (nu, chi), (nu_1, chi_1) = (stack(made.potentials, x) for x in (firsts, s, after))
    e = r - lam * c + 0.99 * m * nu_1 - nu
    y = e / alpha
    w = np.maximum(np.where(y < 0, np.exp(np.minimum(y, 0)), y + 1), 0)
    f = np.where(w < 1, w * (np.log(w) - 1) + 1, 0.5 * (w - 1) ** 2)
    nu_loss = 0.01 * nu_0.mean() + (w * e - alpha * f).mean()
    ell = 0.01 * chi_0 + w * (c + 0.99 * m * chi_1 - chi)
    chi_loss = tau * math.log(np.exp(ell / tau).mean())
    p = np.exp(ell / tau) / np.exp(ell / tau).sum()
    losses, ratios, weights = made.potential_losses(data, torch.as_tensor(firsts))
    np.testing.assert_allclose(losses.detach(), [nu_loss, chi_loss], rtol=1e-9)
    np.testing.assert_allclose(ratios, w, rtol=1e-9)
    np.testing.assert_allclose(weights, p, rtol=1e-9)
    # The gradient is that of the whole: w is the maximum, so that it has no part in it.
    flat = made._flat["potentials"]
    gradient = torch.cat([g.reshape(2, -1) for g in torch.autograd.grad(losses.sum(), flat.parameters)], 1)
    direction = torch.randn_like(gradient)
    start, ends = flat.values.data.clone(), []
    for sign in (1, -1):
        flat.values.data.copy_(start + sign * 1e-6 * direction)
        moved, *_ = made.potential_losses(data, torch.as_tensor(firsts))
        nu_only = moved[0].item()
        # chi's loss takes w as given: hold it at what it was.
        flat.values.data[0] = start[0]
        ends.append(nu_only + made.potential_losses(data, torch.as_tensor(firsts))[0][1].item())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_coptidices_starts_are_those_of_episodes() -> None:
    made = learner(coptidice, COptiDICE)
    np.testing.assert_array_equal(made.firsts, batch().observations[::4])


def test_coptidices_multipliers_answer() -> None:
    made = learner(coptidice, COptiDICE, multiplier_lr=0.1)
    data = batch()
    pays = torch.ones(B, dtype=torch.float64)
    made.update(data._replace(rewards=pays, costs=0.3 * pays))
    assert made.multiplier.value > 1, "costs are above the limit"
    made = learner(coptidice, COptiDICE, multiplier_lr=0.1, bound=10.0)
    made.update(data._replace(costs=torch.zeros(B, dtype=torch.float64)))
    assert made.multiplier.value < 1
    assert made.temperature.value < 1, "the bound is not used up"


def test_coptidices_policy_loss_is_weighted_likelihood() -> None:
    made, data = learner(coptidice, COptiDICE, noise=0.0), batch()
    w = torch.linspace(0, 2, B, dtype=torch.float64)
    parameters = made.policy.distribution_parameters(data.observations)
    expected = -(w * made.policy.distribution.log_prob(parameters, data.actions)).mean()
    assert made.policy_loss(data, w).item() == pytest.approx(expected.item(), rel=1e-9)


# --- both ------------------------------------------------------------------------------------------------


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


SHORT: dict[str, dict[str, Any]] = {
    "cpq": {
        "total_steps": 600,
        "vae_size": 32,
        "discount": 0.8,
        "polyak": 0.05,
        "reward_scale": 1.0,
        "actor_lr": 2e-4,  # well behind the critics, as published
        "critic_lr": 4e-3,
        "fear": 0.25,  # uniform actions: none is unlike the data
    },
    "coptidice": {
        "total_steps": 800,
        "discount": 0.8,
        "reward_scale": 1.0,
        "lr": 2e-3,
        "multiplier_lr": 1e-2,
        "noise": 0.0,
    },
}
# CPQ needs a limit that its first policy keeps, and stops where its actions look unsafe (see its docstring).
TIGHT = {"cpq": 3.0, "coptidice": 1.0}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("module", "name"), [(cpq, "cpq"), (coptidice, "coptidice")])
def test_a_tighter_limit_holds_it_back(module: Any, name: str, tmp_path: Path, seed: int) -> None:
    file = recorded(tmp_path / "data.hdf5", seed)
    reached = {}
    for limit in (TIGHT[name], 1e6):
        # Limits count the environment's 300 steps, the data's episodes have 10.
        config = module.Config(
            dataset=str(file),
            env="PointRobot-v0",
            cost_limit=30 * limit,
            batch_size=128,
            hidden_sizes=(32, 32),
            seed=seed,
            **SHORT[name],
        )
        run = Run.create(tmp_path / f"{limit}", {"algorithm": name, "config": to_json(config)}, quiet=True)
        module.train(config, run)
        run.close()
        obs = np.random.default_rng(9).normal(size=(500, 11)).astype(np.float32)
        reached[limit] = float(load_policy(tmp_path / f"{limit}").act(obs, deterministic=True)[:, 0].mean())
    assert reached[1e6] > 0.4, "without a limit it takes what pays"
    assert reached[TIGHT[name]] < reached[1e6] - 0.3


@pytest.mark.parametrize(("module", "name"), [(cpq, "cpq"), (coptidice, "coptidice")])
def test_it_resumes_to_the_same_bits(module: Any, name: str, tmp_path: Path) -> None:
    file = recorded(tmp_path / "data.hdf5", 0)
    weights = []
    for folder, stops in (("whole", (20,)), ("parts", (10, 20))):
        for stop in stops:
            config = module.Config(
                dataset=str(file),
                env="PointRobot-v0",
                total_steps=stop,
                batch_size=16,
                hidden_sizes=(8,),
                log_interval=5,
            )
            if stop == stops[0]:
                stored = {"algorithm": name, "config": to_json(config)}
                run = Run.create(tmp_path / folder, stored, quiet=True)
            else:
                run = Run.open(tmp_path / folder, quiet=True)
            policy: Any = module.train(config, run)
            run.close()
        weights.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.equal(*weights)
    obs = np.ones((2, 11), np.float32)
    again = load_policy(tmp_path / "whole").act(obs, deterministic=True)
    np.testing.assert_array_equal(again, policy.act(obs, deterministic=True))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (cpq, {"cost_limit": -1}, "cost limit"),
        (cpq, {"percentile": 2}, "percentile"),
        (cpq, {"samples": 0}, "samples"),
        (coptidice, {"alpha": 0}, "alpha"),
        (coptidice, {"noise": -1}, "noise"),
    ],
)
def test_impossible_settings(module: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        module.Config(dataset="none", env="none", **options)
