"""CDT: sums to go, windows, causality, network and losses in NumPy, acting, learning, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from scipy.special import erf

from saferl.agents.offline import cdt
from saferl.agents.offline.cdt import CDT, Config, Windows, augment, best_return, fit_front, to_go
from saferl.agents.offline.engine import Batch, Context
from saferl.envs.datasets import OfflineDataset, write_dsrl
from saferl.errors import UsageError
from saferl.experiment.evaluate import evaluate
from saferl.experiment.run import Run
from saferl.nn.sequence_policy import SequenceModel, SequencePolicy
from saferl.policies import Policy, Stateful, load_policy

S, A = 3, 2
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (S,), np.float32)
ACTIONS = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))
SMALL = {
    "dataset": "none",
    "env": "none",
    "width": 16,
    "layers": 2,
    "heads": 2,
    "context": 4,
    "batch_size": 8,
    "dropout": 0.0,
    "augmentation": 0.0,
}


def dataset(rewards: list[list[float]], costs: list[list[float]], trailing: int = 0) -> OfflineDataset:
    """Episodes with the given rewards and costs; row numbers stand in the observations."""
    lengths = [len(r) for r in rewards]
    rows = sum(lengths) + trailing
    timeouts = np.zeros(rows, bool)
    timeouts[np.cumsum(lengths, dtype=int) - 1] = True
    observations = np.tile(np.arange(rows, dtype=np.float32)[:, None], (1, S))
    pad = [0.0] * trailing
    return OfflineDataset(
        observations=observations,
        next_observations=observations + 1,
        actions=np.random.default_rng(0).uniform(-0.9, 0.9, (rows, A)),
        rewards=np.array([x for r in rewards for x in r] + pad),
        costs=np.array([x for c in costs for x in c] + pad),
        terminals=np.zeros(rows, bool),
        timeouts=timeouts,
    )


TWO = dataset([[1, 2, 3], [10, 20, 30, 40, 50]], [[1, 0, 2], [0, 0, 0.4, 0, 3]], trailing=2)


def learner(data: OfflineDataset = TWO, dtype: torch.dtype = torch.float32, **options: Any) -> CDT:
    config = Config(**{**SMALL, **options})
    scale = config.reward_scale
    batch = Batch(
        torch.as_tensor(data.observations),
        torch.as_tensor(data.actions),
        torch.as_tensor(data.rewards) * scale,
        torch.as_tensor(data.costs),
        torch.as_tensor(~(data.terminals | data.timeouts)).float(),
        torch.as_tensor(data.next_observations),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        generator = torch.Generator().manual_seed(1)
        made = CDT(config, Context(OBSERVATIONS, ACTIONS, torch.device("cpu"), generator, 5, data, batch))
    finally:
        torch.set_default_dtype(torch.float32)
    made._flat.values.data += 0.2 * torch.randn_like(made._flat.values)
    return made


# --- data -------------------------------------------------------------------------------------------------


def test_sums_to_go_are_exact() -> None:
    np.testing.assert_array_equal(to_go(TWO.rewards, TWO), [6, 5, 3, 150, 140, 120, 90, 50, 0, 0])
    expected = [3, 2, 2, 3.4, 3.4, 3.4, 3, 3, 0, 0]
    np.testing.assert_allclose(to_go(TWO.costs, TWO), expected, atol=1e-6)
    made = learner(cost_limit=5.0)
    np.testing.assert_allclose(made.returns[:3], [0.6, 0.5, 0.3], atol=1e-6)  # scaled by 0.1


def test_a_window_is_a_piece_of_one_episode() -> None:
    made = learner(cost_limit=5.0)
    found = made.windows(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 4]))
    np.testing.assert_array_equal(found.observations[..., 0], [[1, 2, 2, 2], [3, 4, 5, 6], [7, 7, 7, 7]])
    np.testing.assert_array_equal(found.valid, [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    np.testing.assert_array_equal(found.times, [[1, 2, 2, 2], [0, 1, 2, 3], [4, 4, 4, 4]])
    np.testing.assert_array_equal(found.costs, [[0, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(found.returns[1], [15, 14, 12, 9], rtol=1e-6)
    np.testing.assert_allclose(found.costs_to_go[0, :2], [2, 2])
    torch.testing.assert_close(found.actions[1], torch.as_tensor(TWO.actions[3:7]))


def test_drawn_windows_never_cross_episodes_and_start_everywhere() -> None:
    made = learner(cost_limit=5.0, batch_size=4_000)
    drawn = made.draw()
    rows = drawn.observations[..., 0]
    assert rows.max() < 8, "the trailing fragment belongs to no episode"
    episode = (rows >= 3).long()
    assert (episode == episode[:, :1]).all()
    steps = rows[:, 1:] - rows[:, :-1]
    assert (steps[drawn.valid[:, 1:]] == 1).all()
    # Episode weights 67 and 66.6 of cost 3 and 3.4; uniform within.
    counts = torch.bincount(rows[:, 0].long(), minlength=8) / 4_000
    np.testing.assert_allclose(counts[:3], np.full(3, 67 / 133.6 / 3), atol=0.03)
    np.testing.assert_allclose(counts[3:], np.full(5, 66.6 / 133.6 / 5), atol=0.03)


def test_episodes_are_drawn_in_proportion_to_what_they_leave_of_the_top() -> None:
    data = dataset([[1.0]] * 4, [[0.0], [35.0], [70.0], [100.0]])
    np.testing.assert_allclose(learner(data).weights, [2 / 3, 1 / 3, 0, 0], rtol=1e-6)
    # A limit of 80 sees what costs as much: the top is twice the limit.
    np.testing.assert_allclose(
        learner(data, cost_limit=80.0).weights, np.array([160, 125, 90, 60]) / 435, rtol=1e-6
    )
    np.testing.assert_allclose(learner(data, cost_top=140.0).weights, np.array([140, 105, 70, 40]) / 355)
    with pytest.raises(UsageError, match="cost-top"):
        learner(dataset([[1.0]], [[80.0]]), target_return=1.0)


def test_the_return_asked_for_is_the_best_within_the_limit() -> None:
    data = dataset([[1.0], [3.0], [9.0]], [[0.0], [10.0], [11.0]])
    assert best_return(data, 10.0) == 3.0
    assert learner(data).policy.target_return == 3.0
    assert learner(data, cost_limit=11.0).policy.target_return == 9.0
    assert learner(data, target_return=5.0).policy.target_return == 5.0
    with pytest.raises(UsageError, match="target-return"):
        learner(dataset([[1.0]], [[12.0]]))


# --- augmentation -----------------------------------------------------------------------------------------


def test_the_front_of_a_parabola_is_found_below_its_noise() -> None:
    rng = np.random.default_rng(0)
    costs = rng.uniform(0, 10, 4_000)
    returns = (10 * costs - 0.5 * costs**2) - rng.exponential(4.0, 4_000)
    front, (low, high) = fit_front(costs, returns)
    grid = np.linspace(0.5, 9, 20)
    np.testing.assert_allclose(front(grid), 10 * grid - 0.5 * grid**2, atol=2.5)
    assert low < 0.5
    assert high > 8
    # Outliers high above, alone in their cells, change nothing much.
    with_outliers, _ = fit_front(np.append(costs, [1.0, 4.0]), np.append(returns, [90.0, 95.0]))
    assert np.abs(with_outliers(grid) - front(grid)).max() < 3


@pytest.mark.parametrize(
    ("costs", "returns", "degree"),
    [
        ([5.0], [2.0], 0),
        ([1.0, 1.0, 1.0], [2.0, 3.0, 1.0], 0),
        ([0.0, 1.0, 2.0], [3.0, 3.0, 3.0], 0),
        ([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0], 1),
        ([0.0, 10.0], [0.0, 1e-3], 1),
    ],
)
def test_small_and_degenerate_fronts(costs: list[float], returns: list[float], degree: int) -> None:
    front, _ = fit_front(np.array(costs), np.array(returns))
    assert front.degree() == degree
    chosen, new_costs, new_returns = augment(np.array(costs), np.array(returns), 5, np.random.default_rng(0))
    assert (np.array(costs)[chosen] <= new_costs).all()
    assert (new_returns <= max(returns) + 1e-12).all()


def test_relabelled_episodes_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    costs, returns = rng.uniform(0, 30, 60), rng.uniform(0, 500, 60)
    chosen, new_costs, new_returns = augment(costs, returns, 12, np.random.default_rng(2))
    np.testing.assert_allclose(new_costs, np.linspace(costs.min(), costs.max(), 12))
    front, (low, high) = fit_front(costs, returns)
    for i, c, r in zip(chosen, new_costs, new_returns, strict=True):
        assert min(front(np.clip(c, low, high)), returns.max()) <= r <= returns.max()
        best = min(
            (k for k in range(60) if costs[k] <= c),
            key=lambda k: ((costs[k] - c) / np.ptp(costs)) ** 2 + ((returns[k] - r) / np.ptp(returns)) ** 2,
        )
        assert i == best


def test_a_relabelled_episode_is_its_original_shifted() -> None:
    data = dataset([[1, 1], [2, 2], [4, 4], [3, 3]], [[0, 0], [1, 1], [3, 3], [5, 5]])
    made = learner(data, cost_limit=9.0, augmentation=1.0)
    chosen, costs, returns = augment(
        data.episode_costs, data.episode_returns, 4, np.random.default_rng(cdt.derive_seed(0, 2))
    )
    assert len(made.weights) == 8
    window = made.windows(torch.arange(4, 8), torch.zeros(4, dtype=torch.int64))
    np.testing.assert_allclose(window.costs_to_go[:, 0], costs, rtol=1e-6)
    np.testing.assert_allclose(window.returns[:, 0], 0.1 * returns, rtol=1e-5)
    original = made.windows(torch.as_tensor(chosen), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(window.observations, original.observations)
    torch.testing.assert_close(window.returns.diff(), original.returns.diff())
    np.testing.assert_allclose(
        made.weights, np.append(70 - data.episode_costs, 70 - costs) / made.weights.new_tensor(
            np.append(70 - data.episode_costs, 70 - costs)
        ).sum().item(), rtol=1e-5,
    )  # fmt: skip


# --- the transformer --------------------------------------------------------------------------------------


def inputs(size: int = 3, steps: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(5)
    floats = {
        "returns": rng.normal(size=(size, steps)),
        "costs": rng.normal(size=(size, steps)),
        "observations": rng.normal(size=(size, steps, S)),
        "actions": rng.uniform(-1, 1, (size, steps, A)),
    }
    parts = {name: torch.as_tensor(x, dtype=dtype) for name, x in floats.items()}
    return {**parts, "times": torch.arange(steps).expand(size, steps)}


def model(dtype: torch.dtype = torch.float64) -> SequenceModel:
    torch.manual_seed(2)
    made = SequenceModel(S, A, width=16, layers=2, heads=4, times=8, dropout=0.1).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def numpy_model(net: SequenceModel, data: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The transformer in NumPy, one window and one head at a time."""

    def linear(layer: Any, x: np.ndarray) -> np.ndarray:
        result: np.ndarray = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        return result

    def norm(layer: Any, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        result: np.ndarray = scaled * layer.weight.detach().numpy() + layer.bias.detach().numpy()
        return result

    values = {name: x.numpy() for name, x in data.items()}
    parameters, logits = [], []
    for b in range(len(values["returns"])):
        tokens = []
        for k in range(values["returns"].shape[1]):
            time = net.times.weight.detach().numpy()[values["times"][b, k]]
            for layer, x in (
                (net.returns, values["returns"][b, k : k + 1]),
                (net.costs, values["costs"][b, k : k + 1]),
                (net.observations, values["observations"][b, k]),
                (net.actions, values["actions"][b, k]),
            ):
                tokens.append(linear(layer, x) + time)
        x = norm(net.first_norm, np.stack(tokens))
        length, width = x.shape
        for block in net.blocks:
            both: Any = block
            q, k, v = np.split(linear(both.inputs, norm(both.attention_norm, x)), 3, axis=1)
            size = width // both.heads
            heads = []
            for h in range(both.heads):
                part = slice(h * size, (h + 1) * size)
                scores = q[:, part] @ k[:, part].T / math.sqrt(size)
                scores[np.triu_indices(length, 1)] = -np.inf
                chances = np.exp(scores - scores.max(1, keepdims=True))
                heads.append(chances / chances.sum(1, keepdims=True) @ v[:, part])
            x = x + linear(both.outputs, np.concatenate(heads, axis=1))
            hidden = linear(both.perceptron[0], norm(both.norm, x))
            hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
            x = x + linear(both.perceptron[2], hidden)
        x = norm(net.last_norm, x)
        mean, spread = np.split(linear(net.action_head, x[2::4]), 2, axis=1)
        parameters.append(np.concatenate([mean, -5 + 3.5 * (1 + np.tanh(spread))], axis=1))
        logits.append(linear(net.cost_head, x[3::4]))
    return np.stack(parameters), np.stack(logits)


def test_the_transformer_is_its_equations() -> None:
    net, data = model(), inputs()
    expected = numpy_model(net, data)
    for found, want in zip(net(**data), expected, strict=True):
        np.testing.assert_allclose(found.detach(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["returns", "costs", "observations", "actions"])
@pytest.mark.parametrize("masked", [False, True])
def test_nothing_sees_what_comes_later(name: str, masked: bool) -> None:
    net, data = model(), inputs()
    valid = torch.ones(3, 4, dtype=torch.bool) if masked else None
    before = net(**data, valid=valid)
    changed = {**data, name: data[name].clone()}
    changed[name][:, 2] += 1
    after = net(**changed, valid=valid)
    same = [(x[:, :2] == y[:, :2]).all() for x, y in zip(before, after, strict=True)]
    assert all(same)
    # At the step itself an action is seen by the cost alone, all else by both; later steps see everything.
    assert bool((before[0][:, 2] == after[0][:, 2]).all()) == (name == "actions")
    assert (before[1][:, 2] != after[1][:, 2]).all()
    assert (before[0][:, 3] != after[0][:, 3]).all()


def test_padding_is_not_seen() -> None:
    net, data = model(), inputs(steps=6)
    whole = net(**{name: x[:, 2:] for name, x in data.items()})
    valid = torch.tensor([False, False, True, True, True, True]).expand(3, 6)
    found = net(**data, valid=valid)
    noisy = {name: x.clone() for name, x in data.items()}
    for name in ("returns", "costs", "observations", "actions"):
        noisy[name][:, :2] = 1e3
    for x, y, z in zip(whole, found, net(**noisy, valid=valid), strict=True):
        torch.testing.assert_close(y[:, 2:], x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(z[:, 2:], x, rtol=1e-9, atol=1e-9)
        assert torch.isfinite(z).all()


# --- losses -----------------------------------------------------------------------------------------------


def windows64(made: CDT) -> Windows:
    rng = np.random.default_rng(7)
    valid = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]], bool)
    data = inputs()
    return Windows(
        data["returns"],
        10 * data["costs"],
        data["observations"],
        data["actions"],
        data["times"],
        torch.as_tensor(rng.integers(0, 2, (3, 4))),
        torch.as_tensor(valid),
    )


def test_losses_are_the_equations() -> None:
    made = learner(dtype=torch.float64, cost_limit=5.0)
    batch = windows64(made)
    parameters, logits = numpy_model(made.policy.model, {**inputs(), "costs": batch.costs_to_go / 5})
    mean, log_std = np.split(parameters, 2, axis=-1)
    valid, actions, costs = batch.valid.numpy(), batch.actions.numpy(), batch.costs.numpy()
    density = -0.5 * ((actions - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    entropy = log_std + 0.5 * np.log(2 * np.pi * np.e)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    surprise = -np.log(np.take_along_axis(chances, costs[..., None], -1)[..., 0])
    expected = [-density[valid].mean(), entropy[valid].mean(), surprise[valid].mean()]
    found = [x.item() for x in made.losses(batch)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)

    # What is padded, in the data that losses see, changes nothing.
    noisy = Windows(*(x.clone() for x in batch))
    for part in (noisy.returns, noisy.costs_to_go, noisy.observations, noisy.actions):
        part[~batch.valid] = 50.0
    noisy.costs[~batch.valid] = 0
    np.testing.assert_allclose([x.item() for x in made.losses(noisy)], expected, rtol=1e-9)


def test_gradients_by_central_differences() -> None:
    made = learner(dtype=torch.float64, cost_limit=5.0)
    batch = windows64(made)

    def loss() -> torch.Tensor:
        surprise, entropy, cost = made.losses(batch)
        return surprise - 0.1 * entropy + 0.02 * cost

    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), made._flat.parameters)])
    for seed in range(3):
        direction = torch.randn(
            gradient.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        values, step = made._flat.values.data, 1e-6
        values += step * direction
        above = loss().item()
        values -= 2 * step * direction
        below = loss().item()
        values += step * direction
        slope = (above - below) / (2 * step)
        assert slope == pytest.approx((gradient @ direction).item(), rel=1e-5)


def test_a_step_of_both_optimisers() -> None:
    made, other = (learner(cost_limit=5.0, warmup_steps=4, weight_decay=0.1) for _ in range(2))
    batch = made.draw()
    surprise, entropy, cost = other.losses(batch)
    loss = surprise - 0.1 * entropy + 0.02 * cost
    twin = [p.detach().clone().requires_grad_() for p in other._flat.parameters]
    for copy, g in zip(twin, torch.autograd.grad(loss, other._flat.parameters), strict=True):
        copy.grad = g
    torch.nn.utils.clip_grad_norm_(twin, 0.25)
    torch.optim.AdamW(twin, lr=1e-4 / 4, weight_decay=0.1).step()
    found = made.update(batch)
    for a, b in zip(made._flat.parameters, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert found["policy/temperature"].item() == pytest.approx(0.1)
    # Adam's first step is the learning rate against the gradient's sign.
    sign = math.copysign(1, entropy.item() + 1)
    assert made.log_temperature.item() == pytest.approx(math.log(0.1) - 1e-4 * sign, abs=1e-6)
    rates = []
    for _ in range(4):
        made.update(batch)
        rates.append(made.optimizers["model"].param_groups[0]["lr"])
    np.testing.assert_allclose(rates, [0.5e-4, 0.75e-4, 1e-4, 1e-4])


# --- acting -----------------------------------------------------------------------------------------------


def policy(**options: Any) -> SequencePolicy:
    torch.manual_seed(4)
    settings = {"width": 16, "layers": 2, "heads": 2, "context": 3, "episode_steps": 6, **options}
    made = SequencePolicy(OBSERVATIONS, ACTIONS, target_return=20.0, target_cost=2.5, **settings).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return made


@torch.no_grad()
def fresh(made: SequencePolicy, past: list[tuple[np.ndarray, np.ndarray, float, float]]) -> np.ndarray:
    """The last action from the whole past of one environment: observations, actions, rewards, costs.

    Actions are in [-1, 1]; the reward and cost of a step are those after it.
    """
    left_return, left_cost, rows = 20.0, 2.5, []
    for t, (obs, action, reward, cost) in enumerate(past):
        rows.append((left_return * 0.1, left_cost, obs, action, min(t, 5)))
        left_return, left_cost = left_return - reward, max(left_cost - cost, 0)
    rows = rows[-3:]
    columns = [torch.as_tensor(np.array(x))[None] for x in zip(*rows, strict=True)]
    parts = [x.float() for x in columns[:4]]
    parameters, _ = made(*parts, columns[4])
    mean = parameters[0, -1, :A].clamp(-1, 1).numpy()
    result: np.ndarray = mean * [1, 2] + [0, 2]  # the box is [-1, 1] x [0, 4]
    return result


def test_the_batched_history_is_a_fresh_look_at_each_environments_past() -> None:
    made, rng, n = policy(), np.random.default_rng(3), 4
    assert isinstance(made, Policy)
    assert isinstance(made, Stateful)
    made.begin(n)
    past: list[list[tuple[np.ndarray, np.ndarray, float, float]]] = [[] for _ in range(n)]
    for _ in range(9):
        obs = rng.normal(size=(n, S)).astype(np.float32)
        actions = made.act(obs, deterministic=True)
        rewards, costs, ended = rng.normal(size=n), rng.uniform(size=n), rng.uniform(size=n) < 0.25
        for i in range(n):
            past[i].append((obs[i], np.zeros(A), rewards[i], costs[i]))
            np.testing.assert_allclose(actions[i], fresh(made, past[i]), atol=1e-5)
            past[i][-1] = (obs[i], (actions[i] - [0, 2]) / [1, 2], rewards[i], costs[i])
        made.observe(rewards, costs, ended)
        past = [[] if over else before for before, over in zip(past, ended, strict=True)]
    assert any(len(before) > 3 for before in past), "no history was longer than the context"


def test_targets_are_read_when_an_episode_starts() -> None:
    made = policy()
    obs = np.ones((2, S), np.float32)
    made.begin(2)
    low = made.act(obs, deterministic=True)
    made.target_cost = 60.0
    np.testing.assert_array_equal(made.act(obs, deterministic=True), low)  # the episode goes on as it was
    made.observe([1, 1], [0, 0], [False, True])
    later = made.act(obs, deterministic=True)
    made.begin(2)
    high = made.act(obs, deterministic=True)
    assert np.abs(high - low).max() > 1e-4
    np.testing.assert_allclose(later[1], high[1], atol=1e-6)
    assert made.describe()["target_cost"] == 60.0


def test_acting_without_begin_starts_anew() -> None:
    made, other = policy(), policy()
    obs = np.random.default_rng(0).normal(size=(3, S)).astype(np.float32)
    other.begin(3)
    expected = other.act(obs, deterministic=True)
    np.testing.assert_array_equal(made.act(obs, deterministic=True), expected)
    # Without `observe` every call is a first step, also of another number of environments.
    np.testing.assert_array_equal(made.act(obs, deterministic=True), expected)
    made.observe(np.ones(3), np.ones(3), np.zeros(3, bool))
    assert np.abs(made.act(obs, deterministic=True) - expected).max() > 1e-5
    np.testing.assert_allclose(made.act(obs[:2], deterministic=True), expected[:2], atol=1e-6)
    with pytest.raises(UsageError, match="not acted"):
        made.observe(np.ones(3), np.ones(3), np.zeros(3, bool))
    assert torch.is_tensor(made.act(torch.as_tensor(obs), deterministic=True))


def test_long_episodes_share_the_last_embedding() -> None:
    made = policy()
    made.begin(1)
    for _ in range(12):
        assert np.isfinite(made.act(np.zeros((1, S), np.float32))).all()
        made.observe([0.0], [0.0], [False])


def test_a_policy_is_rebuilt_from_its_description() -> None:
    made = policy()
    made.target_return, made.target_cost = 7.0, 1.0
    again = SequencePolicy.from_description(made.describe()).eval()
    again.load_state_dict(made.state_dict())
    assert (again.target_return, again.target_cost) == (7.0, 1.0)
    obs = np.random.default_rng(0).normal(size=(5, S)).astype(np.float32)
    for one in (made, again):
        one.begin(5)
        one.seed(3)
    sampled = made.act(obs)
    np.testing.assert_array_equal(sampled, again.act(obs))
    assert (sampled >= ACTIONS.low).all()
    assert (sampled <= ACTIONS.high).all()
    assert np.abs(sampled - made.act(obs)).max() > 0, "samples differ"


# --- runs -------------------------------------------------------------------------------------------------

STEPS = 8


class Choice:
    """Half of [-1, 1] is safe; the other pays more and costs 1 a step. N environments, STEPS steps."""

    metadata: dict[str, Any] = {}  # noqa: RUF012  # as Gymnasium declares it

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.steps = 0
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        return np.full((self.num_envs, 1), self.steps / STEPS, np.float32)

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        risky = actions[:, 0] > 0
        self.steps = (self.steps + 1) % STEPS
        over = np.full(self.num_envs, self.steps == 0)
        costs = risky.astype(float)
        return self._observe(), 0.5 + 0.5 * risky, over & False, over, {"cost": costs}


def two_behaviours(seed: int, episodes: int = 200) -> OfflineDataset:
    """Safe and costly episodes of `Choice`; an episode's luck is added to its rewards, so that a return
    alone does not tell which it is.
    """
    rng = np.random.default_rng(seed)
    risky = np.repeat(rng.integers(0, 2, episodes), STEPS)
    luck = np.repeat(rng.uniform(-0.5, 0.5, episodes), STEPS)
    rows, times = episodes * STEPS, np.tile(np.arange(STEPS), episodes)
    actions = (risky - 0.5 + rng.normal(0, 0.1, rows)).clip(-1, 1)
    return OfflineDataset(
        observations=times[:, None] / STEPS,
        next_observations=((times + 1) % STEPS)[:, None] / STEPS,
        actions=actions[:, None],
        rewards=0.5 + 0.5 * risky + luck,
        costs=risky,
        terminals=np.zeros(rows, bool),
        timeouts=times == STEPS - 1,
    )


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> None:
    space = spaces.Box(-1, 1, (1,), np.float32)
    monkeypatch.setattr(
        "saferl.agents.offline.engine._spaces", lambda env: (spaces.Box(0, 1, (1,), np.float32), space, STEPS)
    )


def trained(folder: Path, data: OfflineDataset, **options: Any) -> SequencePolicy:
    file = folder.with_suffix(".hdf5")
    write_dsrl(file, data)
    settings = {
        "total_steps": 150,
        "batch_size": 64,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "context": 4,
        "lr": 3e-3,
        "warmup_steps": 20,
        "cost_limit": 4.0,
        "log_interval": 50,
        "checkpoint_interval": 0,
    }
    config = Config(dataset=str(file), env="Choice-v0", **{**settings, **options})
    stored = {"algorithm": "cdt", "config": {"dataset": str(file)}}
    run = Run.open(folder, quiet=True) if folder.exists() else Run.create(folder, stored, quiet=True)
    try:
        result: Any = cdt.train(config, run)
    finally:
        run.close()
    return result


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.usefixtures("choice")
def test_the_budget_decides_what_is_imitated(seed: int, tmp_path: Path) -> None:
    made = trained(tmp_path / "run", two_behaviours(seed), seed=seed, target_return=6.0)
    env: Any = Choice(6)
    costs = {}
    for made.target_cost in (0.0, float(STEPS)):
        costs[made.target_cost] = evaluate(made, env, 6).costs["cost"].mean()
    assert costs[0.0] < 1
    assert costs[STEPS] > STEPS - 1


@pytest.mark.usefixtures("choice")
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    data = two_behaviours(0)
    small = {"dropout": 0.1, "log_interval": 5}
    whole = trained(tmp_path / "whole", data, total_steps=20, **small)
    trained(tmp_path / "parts", data, total_steps=10, **small)
    parts = trained(tmp_path / "parts", data, total_steps=20, **small)
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)

    loaded: Any = load_policy(tmp_path / "parts")
    assert isinstance(loaded, SequencePolicy)
    obs = np.random.default_rng(0).uniform(size=(3, 1)).astype(np.float32)
    for one in (loaded, whole):
        one.begin(3)
    for _ in range(3):
        np.testing.assert_array_equal(loaded.act(obs, deterministic=True), whole.act(obs, deterministic=True))
        for one in (loaded, whole):
            one.observe(np.ones(3), np.ones(3), np.zeros(3, bool))


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context"),
        ({"cost_limit": -1.0}, "cost limit"),
        ({"reward_scale": 0.0}, "reward_scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"cost_top": 10.0}, "cost_top"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(**{**SMALL, **options})


def test_what_cannot_be_learned_from() -> None:
    with pytest.raises(UsageError, match="whole episode"):
        learner(dataset([], [], trailing=3), target_return=1.0)
    with pytest.raises(UsageError, match="heads"):
        learner(width=15)


def test_published_defaults() -> None:
    config = Config(dataset="none", env="none")
    assert (config.layers, config.heads, config.width, config.context, config.dropout) == (3, 8, 128, 10, 0.1)
    assert (config.batch_size, config.lr, config.weight_decay, config.max_grad_norm) == (
        2048,
        1e-4,
        1e-4,
        0.25,
    )
    assert (config.warmup_steps, config.cost_weight, config.total_steps) == (500, 0.02, 100_000)
    assert (config.reward_scale, config.augmentation, config.temperature_init) == (0.1, 0.2, 0.1)
