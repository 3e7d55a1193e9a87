"""FISOR against its equations in float64 NumPy: losses, weights, gradients, the order of a step, acting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from saferl.agents.offline.engine import Batch, Context
from saferl.agents.offline.fisor import FISOR, Config
from saferl.errors import UsageError
from saferl.feasibility import feasibility_weights
from saferl.nn.diffusion_policy import DiffusionPolicy

S, A, B = 4, 2, 32
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (S,), np.float32)
ACTIONS = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))
NO_DATA: tuple[Any, Any] = (None, None)
SMALL = {"dataset": "none", "env": "none", "width": 16, "blocks": 2, "hidden_sizes": (16, 16)}


def learner(dtype: torch.dtype = torch.float64, **options) -> FISOR:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    config = Config(**{**SMALL, "batch_size": B, "critic_batch_size": B // 2, "dropout": 0.0, **options})
    torch.set_default_dtype(dtype)
    try:
        context = Context(
            OBSERVATIONS, ACTIONS, torch.device("cpu"), torch.Generator().manual_seed(1), 10, *NO_DATA
        )
        made = FISOR(config, context)
    finally:
        torch.set_default_dtype(torch.float32)
    for flat in (made._critics, made._slow_critics, made._values, made._predictor):
        flat.values.data += 0.1 * torch.randn_like(flat.values)
    return made


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    rng = np.random.default_rng(3)
    parts = (
        rng.normal(size=(B, S)),
        rng.uniform(-1, 1, (B, A)),
        rng.normal(size=B),
        rng.integers(0, 2, B),
        rng.integers(0, 2, B),
        rng.normal(size=(B, S)),
    )
    return Batch(*(torch.as_tensor(x, dtype=dtype) for x in parts))


def stack(networks, inputs: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """ReLU networks (count, B) in NumPy."""
    outputs = []
    for k in range(len(networks)):
        hidden = inputs
        for layer, (w, b) in enumerate(zip(networks.weights, networks.biases, strict=True)):
            hidden = hidden @ w[k].detach().numpy() + b[k].detach().numpy()
            if layer + 1 < len(networks.weights):
                hidden = np.maximum(hidden, 0)
        outputs.append(hidden[:, 0])
    return np.stack(outputs)


def mish(x: np.ndarray) -> np.ndarray:
    return x * np.tanh(np.log1p(np.exp(x)))


def predict(net, observations: np.ndarray, x: np.ndarray, steps: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    def linear(layer, value: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
        result: np.ndarray = value @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        return result

    angles = 2 * np.pi * steps[:, None] * net.frequencies.detach().numpy().T
    time = linear(net.time[2], mish(linear(net.time[0], np.concatenate([np.cos(angles), np.sin(angles)], 1))))
    hidden = linear(net.first, np.concatenate([x, observations, time], 1))
    for block in net.blocks:
        centred = hidden - hidden.mean(1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
        normed = normed * block.norm.weight.detach().numpy() + block.norm.bias.detach().numpy()
        hidden = hidden + linear(block.narrow, mish(linear(block.wide, normed)))
    return linear(net.last, mish(hidden))


def test_losses_and_weights_are_the_equations() -> None:
    made, data = learner(), batch()
    s, a, r, c, m, s2 = (x.numpy() for x in data)
    slow = stack(made.policy.critics, np.concatenate([s, a], 1))
    q, q_h = np.minimum(slow[0], slow[1]), np.maximum(slow[2], slow[3])
    found = made._slow_values(data)
    np.testing.assert_allclose(found[0], q, rtol=1e-9)
    np.testing.assert_allclose(found[1], q_h, rtol=1e-9)

    v, v_h = stack(made.values, s)
    u, u_h = q - v, q_h - v_h
    expected = [
        (np.where(u > 0, 0.9, 0.1) * u**2).mean(),
        (np.where(u_h < 0, 0.9, 0.1) * u_h**2).mean(),
    ]
    np.testing.assert_allclose(made.value_losses(data, *found).detach(), expected, rtol=1e-9)

    next_v, next_h = stack(made.values, s2)
    h = np.where(c > 0, 25.0, -1.0)
    y_h = m * (0.01 * h + 0.99 * np.maximum(h, next_h)) + (1 - m) * h
    y = r + 0.99 * m * next_v
    fast = stack(made.critics, np.concatenate([s, a], 1))
    expected = [((fast[:2] - y) ** 2).mean(1).sum(), ((fast[2:] - y_h) ** 2).mean(1).sum()]
    np.testing.assert_allclose(made.critic_losses(data).detach(), expected, rtol=1e-9)

    feasible = (v_h <= 0) & (q_h <= 0)
    weights = np.where(v_h > 0, np.clip(np.exp(5 * (v_h - q_h)), 0, 150), 0)
    weights = weights + np.where(feasible, np.clip(np.exp(3 * (q - v)), 0, 100), 0)
    assert feasible.any()
    assert (v_h > 0).any()
    assert (weights == 0).any()
    assert (weights > 0).any()
    as_tensors = (torch.as_tensor(x) for x in (v_h, q_h, q - v))
    np.testing.assert_allclose(feasibility_weights(*as_tensors), weights, rtol=1e-9)

    steps, noise = np.arange(B) % 5, np.random.default_rng(5).normal(size=(B, A))
    i = np.arange(1, 6)
    kept = np.exp(np.cumsum(-0.1 / 5 - 0.5 * 9.9 * (2 * i - 1) / 25))[steps][:, None]
    eps = predict(made.predictor, s, np.sqrt(kept) * a + np.sqrt(1 - kept) * noise, steps)
    expected_loss = (weights * ((eps - noise) ** 2).sum(1)).mean()
    loss = made.policy_loss(data, torch.as_tensor(weights), torch.as_tensor(steps), torch.as_tensor(noise))
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)


def test_gradients_are_those_of_the_losses() -> None:
    """Central differences along random directions, in float64."""
    made, data = learner(), batch()
    q, q_h = made._slow_values(data)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(5, (B,), generator=generator)
    noise = torch.randn(B, A, generator=generator, dtype=torch.float64)
    weights = torch.rand(B, generator=generator, dtype=torch.float64)
    losses = {
        "values": (lambda: made.value_losses(data, q, q_h).sum(), made._values),
        "critics": (lambda: made.critic_losses(data).sum(), made._critics),
        "predictor": (lambda: made.policy_loss(data, weights, steps, noise), made._predictor),
    }
    for loss, flat in losses.values():
        flat.set_gradients(torch.autograd.grad(loss(), flat.parameters), math.inf)
        gradient = flat.values.grad
        assert gradient is not None
        start = flat.values.data.clone()
        for _ in range(5):
            direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
            ends = []
            for sign in (1, -1):
                flat.values.data.copy_(start + sign * 1e-6 * direction)
                ends.append(loss().item())
            flat.values.data.copy_(start)
            slope = (ends[0] - ends[1]) / 2e-6
            assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-6)


def test_the_ablation_sums_costs_against_the_discounted_limit() -> None:
    made, data = learner(critic="qc", cost_limit=3.0), batch()
    # l (1 - gamma^L) / (1 - gamma) / L with l = 3, gamma = 0.99 and the learner's L = 10.
    limit = 3 * (1 - 0.99**10) / 0.01 / 10
    assert made.risk_limit == made.policy.risk_limit == pytest.approx(limit)
    pairs = np.concatenate([data.observations, data.actions], 1)
    after = stack(made.values, data.next_observations.numpy())
    q = stack(made.critics, pairs)
    risk = data.costs.numpy() + 0.99 * data.masks.numpy() * after[1]
    expected = ((q[2:] - risk) ** 2).mean(1).sum()
    assert made.critic_losses(data)[1].item() == pytest.approx(expected, rel=1e-6)

    seen = []
    made._policy_step = lambda _, weights, rows: seen.append(weights) or weights.sum()  # type: ignore[assignment,func-returns-value]
    v_h = torch.from_numpy(stack(made.values, data.observations.numpy())[1])
    made.update(data)
    slow = learner(critic="qc", cost_limit=3.0)
    q, q_h = slow._slow_values(data)
    v = slow.values(data.observations)[0, :, 0]
    torch.testing.assert_close(seen[0], feasibility_weights(v_h - limit, q_h - limit, q - v).detach())


def test_data_whose_costs_are_constraint_values() -> None:
    made, data = learner(cost_scale=None), batch()
    data = data._replace(costs=torch.linspace(-2, 1, B, dtype=torch.float64))
    after = stack(made.values, data.next_observations.numpy())[1]
    h, m = data.costs.numpy(), data.masks.numpy()
    y = m * (0.01 * h + 0.99 * np.maximum(h, after)) + (1 - m) * h
    q = stack(made.critics, np.concatenate([data.observations, data.actions], 1))
    expected = ((q[2:] - y) ** 2).mean(1).sum()
    assert made.critic_losses(data)[1].item() == pytest.approx(expected, rel=1e-6)


def test_rows_of_no_weight_change_nothing() -> None:
    made, other = learner(), learner()
    data = batch()
    weights = torch.rand(B, dtype=torch.float64)
    weights[::3] = 0
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(5, (B,), generator=generator)
    # The step draws its noise in float32, the default.
    noise = torch.randn((B, A), generator=generator)
    loss = made._policy_step(data, weights, slice(None))
    expected = other.policy_loss(data, weights, steps, noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (made._policy_step(data, torch.zeros_like(weights), slice(None))).item() == 0


def test_a_step_in_its_order() -> None:
    """The policy learns from the critics of before; Q's target sees the fresh V; slow copies follow."""
    made, reference, data = learner(), learner(), batch()
    before = made._slow_critics.values.clone()
    made.update(data)
    part = Batch(*(x[: B // 2] for x in data))
    q, q_h = reference._slow_values(part)
    reference._step("values", reference.value_losses(part, q, q_h).sum(), reference._values)
    torch.testing.assert_close(made._values.values, reference._values.values)
    reference._step("critics", reference.critic_losses(part).sum(), reference._critics)
    torch.testing.assert_close(made._critics.values, reference._critics.values)
    torch.testing.assert_close(made._slow_critics.values, 0.995 * before + 0.005 * made._critics.values)
    assert made.policy_steps == 2


def test_the_learning_rate_falls_along_a_cosine() -> None:
    made, data = learner(policy_lr_steps=4), batch()
    rates = []
    for _ in range(3):
        made.update(data)
        rates.append(made.optimizers["predictor"].param_groups[0]["lr"])
    # The last of the two steps taken: after 1, 3 and 5 steps of 4.
    np.testing.assert_allclose(rates, [3e-4 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 3, 4)])


def test_critics_judge_pessimistically_and_the_choice_follows_them() -> None:
    policy = DiffusionPolicy(
        OBSERVATIONS, ACTIONS, width=16, blocks=1, hidden_sizes=(16,), candidates=7
    ).eval()
    policy.seed(0)
    features = torch.randn(3, S)
    candidates = policy.propose(features)
    assert candidates.shape == (3, 7, A)
    assert candidates.abs().max() <= 1
    values, risks = policy.judge(features, candidates)
    for b in range(3):
        for n in range(7):
            out = policy.critics(torch.cat([features[b], candidates[b, n]])[None])[:, 0, 0]
            assert values[b, n].item() == pytest.approx(out[:2].min().item(), abs=1e-6)
            assert risks[b, n].item() == pytest.approx(out[2:].max().item(), abs=1e-6)
    policy.seed(0)
    actions = policy.act(features.numpy())
    chosen = candidates[torch.arange(3), risks.argmin(1)].numpy()
    np.testing.assert_allclose(actions, chosen * [1, 2] + [0, 2], atol=1e-5)  # the box is [-1, 1] x [0, 4]
    policy.seed(0)
    assert torch.is_tensor(policy.act(features))


def test_a_policy_is_rebuilt_from_its_description() -> None:
    policy = DiffusionPolicy(
        OBSERVATIONS, ACTIONS, width=16, blocks=1, hidden_sizes=(16,), extraction="feasible-first"
    )
    again = DiffusionPolicy.from_description(policy.describe())
    again.load_state_dict(policy.state_dict())
    obs = np.zeros((2, S), np.float32)
    for one in (policy.eval(), again.eval()):
        one.seed(3)
    np.testing.assert_array_equal(policy.act(obs), again.act(obs))
    assert again.extraction == "feasible-first"


def test_candidates_by_a_fast_sampler() -> None:
    pytest.importorskip("diffusers")
    policy = DiffusionPolicy(OBSERVATIONS, ACTIONS, width=16, blocks=1, hidden_sizes=(16,)).eval()
    features, passes = torch.randn(3, S), []
    policy.predictor.last.register_forward_hook(lambda *_: passes.append(1))
    policy.propose(features)
    assert len(passes) == 5
    policy.use_sampler("dpm-solver++", 2)
    policy.seed(0)
    drawn = policy.propose(features)
    assert len(passes) == 7
    assert drawn.abs().max() <= 1
    assert drawn.std(1).min() > 0, "candidates differ by their first noise"
    again = DiffusionPolicy.from_description(policy.describe()).eval()
    again.load_state_dict(policy.state_dict())
    again.seed(0)
    assert torch.equal(again.propose(features), drawn)
    with pytest.raises(UsageError, match="ddpm makes 5 passes"):
        policy.use_sampler("ddpm", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7}, "even"),
        ({"critic_batch_size": 64, "batch_size": 32}, "hold"),
        ({"extraction": "best"}, "extraction"),
        ({"expectile": 1.0}, "expectile"),
        ({"cost_scale": 0}, "cost_scale"),
        ({"critic": "hq"}, "critic"),
        ({"discount": 1.0}, "discount"),
    ],
)
def test_impossible_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(**{**SMALL, **options})  # type: ignore[arg-type]


def test_the_published_sizes() -> None:
    config = Config(dataset="none", env="none")
    space = spaces.Box(-1, 1, (60,), np.float32)
    act = spaces.Box(-1, 1, (2,), np.float32)
    made = FISOR(config, Context(space, act, torch.device("cpu"), torch.Generator(), 1000, *NO_DATA))
    assert sum(p.numel() for p in made.networks.parameters()) == 2_144_552
