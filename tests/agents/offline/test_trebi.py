"""TREBI: schedule, budget and choice by hand, losses in NumPy, guidance, acting, learning, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from saferl.agents.offline import trebi
from saferl.agents.offline.engine import Batch, Context
from saferl.agents.offline.trebi import TREBI, Config, discounted_to_go
from saferl.envs.datasets import OfflineDataset, write_dsrl
from saferl.errors import UsageError
from saferl.experiment.evaluate import evaluate
from saferl.experiment.run import Run
from saferl.nn.plan_policy import CosineSchedule, PlanPolicy, TemporalUNet, choose_plan, overspend_weight
from saferl.policies import Policy, Stateful, load_policy

S, A = 3, 2
OBSERVATIONS = spaces.Box(-np.inf, np.inf, (S,), np.float32)
ACTIONS = spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32))
NETWORK: dict[str, Any] = {
    "horizon": 4,
    "width": 8,
    "multipliers": (1, 2),
    "hidden_sizes": (16,),
    "diffusion_steps": 5,
    "plans": 6,
}
SMALL: dict[str, Any] = {"dataset": "none", "env": "none", "batch_size": 8, **NETWORK}


def dataset(rewards: list[list[float]], costs: list[list[float]], trailing: int = 0) -> OfflineDataset:
    """Episodes with the given rewards and costs; row numbers stand in the first two observations."""
    lengths = [len(r) for r in rewards]
    rows = sum(lengths) + trailing
    timeouts = np.zeros(rows, bool)
    timeouts[np.cumsum(lengths, dtype=int) - 1] = True
    observations = np.tile(np.arange(rows, dtype=np.float32)[:, None], (1, S))
    observations[:, 2] = 5.0
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


TWO = dataset([[1, 2, 3], [10, 20, 30, 40, 50]], [[1, 0, 2], [0, 0, 0.5, 0, 3]], trailing=2)


def learner(data: OfflineDataset = TWO, dtype: torch.dtype = torch.float32, **options: Any) -> TREBI:
    config = Config(**{**SMALL, **options})
    columns = [data.observations, data.actions, data.rewards, data.costs]
    columns += [~(data.terminals | data.timeouts), data.next_observations]
    batch = Batch(*(torch.as_tensor(np.asarray(x)).to(dtype) for x in columns))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        generator = torch.Generator().manual_seed(1)
        return TREBI(config, Context(OBSERVATIONS, ACTIONS, torch.device("cpu"), generator, 5, data, batch))
    finally:
        torch.set_default_dtype(torch.float32)


# --- schedule, budget, choice -----------------------------------------------------------------------------


def test_the_schedule_is_the_cosine_one() -> None:
    made = CosineSchedule(20)
    u = np.arange(1, 21) / 20
    levels = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(made.alpha_bars[:-1], levels[:-1], rtol=1e-5)
    # The last alpha_bar would be 0 but for the bound on beta.
    assert made.alpha_bars[-1].item() == pytest.approx(1e-3 * levels[-2], rel=1e-4)
    assert (made.variances[0].item(), made.x_shares[0].item(), made.noisy_shares[0].item()) == (0, 1, 0)


def test_the_reverse_step_is_bayes_rule() -> None:
    # x_{t-1} = a x + s z, x_t = k x_{t-1} + b z': precision-weighted mean of what both say of x_{t-1}.
    made, t, x, noisy = CosineSchedule(20), 7, 0.4, -0.9
    before, after = made.alpha_bars[t - 1].item(), made.alpha_bars[t].item()
    k2 = after / before
    precision = 1 / (1 - before) + k2 / (1 - k2)
    mean = (before**0.5 * x / (1 - before) + k2**0.5 * noisy / (1 - k2)) / precision
    assert made.variances[t].item() == pytest.approx(1 / precision, rel=1e-5)
    assert (made.x_shares[t] * x + made.noisy_shares[t] * noisy).item() == pytest.approx(mean, rel=1e-5)


def test_the_weight_of_the_cost() -> None:
    found = overspend_weight(torch.tensor([12.0, 10, 9, 40, 1, 0, 1]), torch.tensor([10.0] * 4 + [0, 0, -2]))
    np.testing.assert_allclose(found, [6.107014, 0, 0, 13.591409, 13.591409, 0, 13.591409], rtol=1e-6)
    assert overspend_weight(torch.tensor([10.00001]), torch.tensor([10.0])).item() == pytest.approx(5, 1e-5)


def test_the_best_plan_within_the_budget_or_the_cheapest() -> None:
    returns = torch.tensor([[1.0, 5, 9], [1, 5, 9], [-3, -1, -2]])
    costs = torch.tensor([[2.0, 4, 6], [7, 6, 8], [5, 5.5, 5]])
    np.testing.assert_array_equal(choose_plan(returns, costs, torch.tensor([5.0, 5, 5])), [1, 1, 2])


def policy(**options: Any) -> PlanPolicy:
    torch.manual_seed(4)
    made = PlanPolicy(OBSERVATIONS, ACTIONS, target_cost=100.0, **{**NETWORK, **options}).eval()
    made.low.copy_(torch.tensor([-2.0, -2, 1]))
    made.high.copy_(torch.tensor([2.0, 6, 1]))
    return made


def budgets(made: PlanPolicy) -> np.ndarray:
    assert made._budgets is not None
    return made._budgets.numpy()


def test_the_budget_left() -> None:
    made = policy(cost_discount=0.997)
    made.begin(2)
    made.observe([0, 0], [3, 3], [False, True])
    made.observe([0, 0], [2, 0], [False, False])
    np.testing.assert_allclose(budgets(made), [95.578611, 100 / 0.997], rtol=1e-6)
    made.target_cost = 7.0
    made.observe([0, 0], [0, 0], [True, False])
    np.testing.assert_allclose(budgets(made), [7, 100 / 0.997**2], rtol=1e-6)
    with pytest.raises(UsageError, match="not acted"):
        made.observe(np.ones(3), np.ones(3), np.zeros(3, bool))
    plain = policy()
    plain.begin(1)
    plain.observe([0], [101.5], [False])
    np.testing.assert_allclose(budgets(plain), [-1.5])


# --- data and losses --------------------------------------------------------------------------------------


def test_discounted_sums_to_go() -> None:
    found = discounted_to_go(np.asarray(TWO.rewards, np.float64), TWO, 0.5)
    np.testing.assert_allclose(found, [2.75, 3.5, 3, 35.625, 51.25, 62.5, 65, 50, 0, 0])
    whole = discounted_to_go(np.asarray(TWO.costs, np.float64), TWO, 1.0)
    np.testing.assert_allclose(whole, [3, 2, 2, 3.5, 3.5, 3.5, 3, 3, 0, 0])


def test_a_window_is_a_piece_of_one_episode() -> None:
    made = learner(discount=0.5)
    found = made.windows(torch.tensor([1, 3, 7]))
    rows = np.array([[1, 2, 2, 2], [3, 4, 5, 6], [7, 7, 7, 7]])
    np.testing.assert_allclose(found.plans[..., :A], TWO.actions[rows], rtol=1e-6)
    np.testing.assert_allclose(found.plans[..., A], 2 * rows / 7 - 1, rtol=1e-6, atol=1e-6)
    assert (found.plans[..., A + 2] == 0).all(), "an observation that never varies"
    returns, costs = made.policy.values.unscaled(found.values)
    np.testing.assert_allclose(returns, [3.5, 35.625, 50], rtol=1e-5)
    np.testing.assert_allclose(costs, [2, 3.5, 3], rtol=1e-5)
    assert made.labels.mean(1).numpy() == pytest.approx([0, 0], abs=1e-6)
    assert made.labels.std(1, correction=0).numpy() == pytest.approx([1, 1], rel=1e-5)


def test_windows_start_anywhere_in_whole_episodes() -> None:
    drawn = learner(batch_size=4_000).draw()
    rows = ((drawn.plans[:, 0, A] + 1) * 3.5).round().long()
    np.testing.assert_allclose(torch.bincount(rows, minlength=8) / 4_000, np.full(8, 1 / 8), atol=0.02)


def test_losses_are_the_equations() -> None:
    made = learner(dtype=torch.float64)
    batch, rng = made.draw(), np.random.default_rng(0)
    noise, steps = rng.normal(size=batch.plans.shape), rng.integers(0, 5, len(batch.plans))
    plans = batch.plans.numpy()
    kept = made.policy.schedule.alpha_bars.numpy().astype(np.float64)[steps][:, None, None]
    noisy = np.sqrt(kept) * plans + np.sqrt(1 - kept) * noise
    noisy[:, 0, A:] = plans[:, 0, A:]
    t = torch.as_tensor(steps)
    answer = made.planner(torch.as_tensor(noisy), t).detach().numpy()
    errors = (answer - plans) ** 2
    errors[:, 0, :A] *= 10
    errors[:, 0, A:] = 0

    rates = np.exp(-np.log(10_000) * np.arange(16) / 15)
    time = np.concatenate([np.sin(steps[:, None] * rates), np.cos(steps[:, None] * rates)], 1)
    features = np.concatenate([noisy.reshape(len(noisy), -1), time], 1)
    squared = []
    (w1, w2), (b1, b2) = made.values.networks.weights, made.values.networks.biases
    for i in range(2):
        hidden = features @ w1[i].detach().numpy() + b1[i].detach().numpy()
        value = (hidden / (1 + np.exp(-hidden))) @ w2[i].detach().numpy() + b2[i].detach().numpy()
        squared.append(((value[:, 0] - batch.values[i].numpy()) ** 2).mean())
    plan_loss, value_losses = made.losses(batch, torch.as_tensor(noise), t)
    assert plan_loss.item() == pytest.approx(errors.mean(), rel=1e-6)
    np.testing.assert_allclose(value_losses.detach(), squared, rtol=1e-5)


def test_gradients_by_central_differences() -> None:
    made = learner(dtype=torch.float64)
    batch = made.draw()
    noise, steps = torch.randn(batch.plans.shape, dtype=torch.float64), torch.arange(8) % 5
    for which, name in enumerate(("planner", "values")):
        flat = made._flat[name]

        def loss(which: int = which) -> torch.Tensor:
            return made.losses(batch, noise, steps)[which].sum()

        gradients = torch.autograd.grad(loss(), flat.parameters)
        gradient = torch.cat([g.reshape(flat.rows, -1) for g in gradients], 1)
        values, direction, step = flat.values.data, torch.randn_like(gradient), 1e-6
        values += step * direction
        above = loss().item()
        values -= 2 * step * direction
        below = loss().item()
        values += step * direction
        slope = (above - below) / (2 * step)
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_a_step_moves_the_networks_and_a_share_of_what_acts() -> None:
    made = learner(polyak=0.25)
    before = {name: slow.values.detach().clone() for name, slow in made._slow.items()}
    made.update(made.draw())
    for name, flat in made._flat.items():
        moved = flat.values.detach() - before[name]
        assert moved.abs().max().item() == pytest.approx(2e-4, rel=1e-2)  # Adam's first step
        torch.testing.assert_close(made._slow[name].values.detach() - before[name], 0.25 * moved)


@pytest.mark.parametrize(("horizon", "multipliers"), [(1, (1,)), (6, (1, 3)), (32, (1, 2, 4, 8))])
def test_the_network_keeps_the_shape_and_sees_the_whole_plan(
    horizon: int, multipliers: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    net = TemporalUNet(5, width=16, multipliers=multipliers).double()  # two channels a group of the norm
    plans = torch.randn(2, horizon, 5, dtype=torch.float64, requires_grad=True)
    out = net(plans, torch.tensor([0, 3]))
    assert out.shape == plans.shape
    (gradient,) = torch.autograd.grad(out[0, 0].sum(), plans)
    assert gradient[0, -1].abs().sum() > 0
    assert gradient[1].abs().sum() == 0, "a plan sees no other"
    assert (net(plans, torch.tensor([4, 3]))[0] - out[0]).abs().max() > 1e-9


# --- planning ---------------------------------------------------------------------------------------------


def test_guidance_is_the_gradient_of_return_less_weighted_cost() -> None:
    made = policy().double()
    made.values.centre.copy_(torch.tensor([1.0, 10.0]))
    made.values.spread.copy_(torch.tensor([3.0, 2.0]))
    plans = torch.randn(4, 4, A + S, dtype=torch.float64)
    steps, left = torch.full((4,), 3), torch.tensor([5.0, 9.0, 100.0, -1.0], dtype=torch.float64)
    found = made.guide(plans, steps, left)
    value = made.values(plans, steps).detach()
    costs, limits = value[1].numpy() * 2 + 10, left.numpy()
    excess = (costs - limits) / np.maximum(limits, 1e-300)
    weights = np.where(costs > limits, 5 * np.exp(np.clip(excess, 0, 1)), 0)
    assert weights[2] == 0
    assert weights[3] == pytest.approx(5 * np.e)
    for i, j in ((0, 1), (3, 6), (1, 4)):
        nudge = torch.zeros_like(plans)
        nudge[:, i // 2, j % (A + S)] = 1e-6
        change = (made.values(plans + nudge, steps) - made.values(plans - nudge, steps)).detach() / 2e-6
        np.testing.assert_allclose(
            found[:, i // 2, j % (A + S)], change[0] - torch.as_tensor(weights) * change[1], atol=1e-7
        )


def test_plans_start_at_the_observation_and_stay_in_the_box() -> None:
    made = policy()
    made.seed(0)
    seen = torch.tensor([[0.5, -0.5, 0.0], [0.1, 0.2, 0.3]])
    plans = made.sample(seen, torch.tensor([1.0, 50.0]))
    torch.testing.assert_close(plans[:, 0, A:], seen)
    assert plans.abs().max() <= 1


def test_a_perfect_planner_ends_at_its_point() -> None:
    made = policy(guidance=0.0)
    target = torch.linspace(-0.8, 0.8, 4 * (A + S)).view(4, A + S)
    made.planner.forward = lambda plans, steps: target.expand_as(plans)  # type: ignore[method-assign]
    plans = made.sample(target[:1, A:].expand(3, S), torch.ones(3))
    torch.testing.assert_close(plans, target.expand(3, 4, A + S))


def test_each_environment_acts_by_its_own_budget() -> None:
    made = policy(plans=40)
    assert isinstance(made, Policy)
    assert isinstance(made, Stateful)

    def values(plans: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:  # both are the first action
        return torch.stack([plans[:, 0, 0], plans[:, 0, 0]])

    made.values.forward = values  # type: ignore[method-assign]
    asked = []

    def sample(observations: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
        asked.append(budgets)
        return 2 * torch.rand(len(budgets), 4, A + S, generator=made._generator) - 1

    made.sample = sample  # type: ignore[method-assign]
    made.target_cost = 0.4
    made.begin(3)
    made.observe([0, 0, 0], [0, 0.4, 9], [False] * 3)
    made.seed(1)
    first = made.act(np.ones((3, S), np.float32))[:, 0]
    torch.testing.assert_close(asked[0], torch.tensor([0.4, 0.0, -8.6]).repeat_interleave(40))
    assert 0.2 < first[0] <= 0.4
    assert -0.4 < first[1] <= 0.0
    assert first[2] < -0.6, "overspent: the cheapest of all"


def test_a_policy_is_rebuilt_from_its_description() -> None:
    made = policy(cost_discount=0.9)
    made.target_cost = 3.0
    again: Any = PlanPolicy.from_description(made.describe()).eval()
    again.load_state_dict(made.state_dict())
    obs = np.random.default_rng(0).normal(size=(5, S)).astype(np.float32)
    for one in (made, again):
        one.begin(5)
        one.observe(np.ones(5), np.ones(5), np.zeros(5, bool))
        one.seed(3)
    sampled = made.act(obs)
    np.testing.assert_array_equal(sampled, again.act(obs))
    assert (sampled >= ACTIONS.low).all()
    assert (sampled <= ACTIONS.high).all()
    assert np.abs(sampled - made.act(obs)).max() > 0, "plans differ"
    assert torch.is_tensor(made.act(torch.as_tensor(obs)))
    assert made.act(obs[:2]).shape == (2, A)


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
        return self._observe(), 0.5 + 0.5 * risky, over & False, over, {"cost": risky.astype(float)}


def two_behaviours(seed: int, episodes: int = 200) -> OfflineDataset:
    """Episodes of `Choice`, each safe or costly throughout."""
    rng = np.random.default_rng(seed)
    risky = np.repeat(rng.integers(0, 2, episodes), STEPS)
    rows, times = episodes * STEPS, np.tile(np.arange(STEPS), episodes)
    actions = (risky - 0.5 + rng.normal(0, 0.1, rows)).clip(-1, 1)
    return OfflineDataset(
        observations=times[:, None] / STEPS,
        next_observations=((times + 1) % STEPS)[:, None] / STEPS,
        actions=actions[:, None],
        rewards=0.5 + 0.5 * risky,
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


def trained(folder: Path, data: OfflineDataset, **options: Any) -> PlanPolicy:
    file = folder.with_suffix(".hdf5")
    write_dsrl(file, data)
    settings = {
        **NETWORK,
        "hidden_sizes": (64, 64),
        "width": 16,
        "diffusion_steps": 10,
        "plans": 16,
        "total_steps": 300,
        "batch_size": 64,
        "lr": 2e-3,
        "polyak": 0.02,
        "log_interval": 100,
        "checkpoint_interval": 0,
    }
    config = Config(dataset=str(file), env="Choice-v0", **{**settings, **options})
    stored = {"algorithm": "trebi", "config": {"dataset": str(file)}}
    run = Run.open(folder, quiet=True) if folder.exists() else Run.create(folder, stored, quiet=True)
    try:
        result: Any = trebi.train(config, run)
    finally:
        run.close()
    return result


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.usefixtures("choice")
def test_the_budget_decides_what_is_done(seed: int, tmp_path: Path) -> None:
    made = trained(tmp_path / "run", two_behaviours(seed), seed=seed)
    made.seed(0)
    env: Any = Choice(6)
    costs = {}
    for made.target_cost in (0.5, 2.0 * STEPS):
        costs[made.target_cost] = evaluate(made, env, 6).costs["cost"].mean()
    assert costs[0.5] < 1.5
    assert costs[2.0 * STEPS] > STEPS - 1.5

    # Without a choice between plans the guidance alone moves them.
    made.plans, made.target_cost = 1, 0.5
    means = []
    for made.guidance in (0.0, 1.0):
        means.append(evaluate(made, env, 24).costs["cost"].mean())
    assert means[1] < means[0] - 1.0


@pytest.mark.usefixtures("choice")
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    data = two_behaviours(0)
    whole = trained(tmp_path / "whole", data, total_steps=12, log_interval=3)
    trained(tmp_path / "parts", data, total_steps=6, log_interval=3)
    parts = trained(tmp_path / "parts", data, total_steps=12, log_interval=3)
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)

    loaded: Any = load_policy(tmp_path / "parts")
    assert isinstance(loaded, PlanPolicy)
    obs = np.random.default_rng(0).uniform(size=(3, 1)).astype(np.float32)
    for one in (loaded, whole):
        one.seed(5)
        one.begin(3)
    for _ in range(2):
        np.testing.assert_array_equal(loaded.act(obs), whole.act(obs))
        for one in (loaded, whole):
            one.observe(np.ones(3), np.ones(3), np.zeros(3, bool))


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plans": 0}, "plans"),
        ({"cost_limit": -1.0}, "cost limit"),
        ({"cost_discount": 1.1}, "cost_discount"),
        ({"multipliers": ()}, "multipliers"),
        ({"lr": 0.0}, "learning rate"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Config(**{**SMALL, **options})


def test_what_cannot_be_learned_from() -> None:
    with pytest.raises(UsageError, match="whole episode"):
        learner(dataset([], [], trailing=3))
    with pytest.raises(UsageError, match="multiple of 2"):
        learner(horizon=5)
    with pytest.raises(UsageError, match="multiple of 8"):
        learner(width=12)


def test_published_defaults() -> None:
    config = Config(dataset="none", env="none")
    assert (config.horizon, config.multipliers, config.diffusion_steps) == (32, (1, 2, 4, 8), 20)
    assert (config.plans, config.guides, config.guidance, config.last_guided) == (64, 2, 0.1, 2)
    assert (config.cost_weight, config.action_weight, config.lr) == (5.0, 10.0, 2e-4)
    assert (config.polyak, config.total_steps, config.discount) == (0.005, 1_000_000, 0.997)
