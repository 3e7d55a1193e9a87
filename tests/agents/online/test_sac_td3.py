"""SAC and TD3 gradient steps: against Stable-Baselines3, against numbers by hand, and their multipliers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from saferl.agents.online import sac, sac_lag, sac_pid, td3, td3_lag, td3_pid
from saferl.agents.online.engine import Episodes
from saferl.agents.online.off_policy import Context
from saferl.agents.online.off_policy_learner import OffPolicyLearner
from saferl.agents.online.replay import Batch
from saferl.experiment.checkpoint import load_latest
from saferl.experiment.config import to_json
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run

D, A, B = 5, 2, 32
OBSERVATIONS = spaces.Box(-1.0, 1.0, (D,), np.float32)
ACTIONS = spaces.Box(-2.0, 3.0, (A,), np.float32)
CLASSES: dict[str, tuple[Any, Any]] = {
    "sac": (sac, sac.SAC),
    "td3": (td3, td3.TD3),
    "sac-lag": (sac_lag, sac_lag.SACLag),
    "td3-lag": (td3_lag, td3_lag.TD3Lag),
    "sac-pid": (sac_pid, sac_pid.SACPID),
    "td3-pid": (td3_pid, td3_pid.TD3PID),
}


def build(name: str, costs: dict[str, float] | None = None, **changes: Any) -> Any:
    module, made = CLASSES[name]
    if costs:
        changes["cost_limit"] = costs
    config = module.Config(**{"hidden_sizes": (16, 16), "batch_size": B, **changes})
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(0)
    return made(config, Context(OBSERVATIONS, ACTIONS, tuple(costs or ()), torch.device("cpu"), generator))


def draw(num_costs: int = 0, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Batch(
        features=normal(B, D),
        actions=normal(B, A).tanh(),
        signals=normal(B, 1 + num_costs).abs(),
        terminated=(normal(B) > 0.5).float(),
        next_features=normal(B, D),
    )


def episodes(**costs: list[float]) -> Episodes:
    arrays = {name: np.array(values) for name, values in costs.items()}
    count = len(next(iter(arrays.values())))
    return Episodes(returns=np.zeros(count), lengths=np.ones(count), costs=arrays)


NONE = episodes(cost=[], a=[], b=[])


# --- against Stable-Baselines3 ------------------------------------------------------------------------


class Blank(gym.Env[np.ndarray, np.ndarray]):
    """Spaces for a Stable-Baselines3 model that never acts."""

    observation_space, action_space = OBSERVATIONS, ACTIONS


def linear(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@torch.no_grad()
def copy_critics(batched: Any, singles: Any) -> None:
    for s, single in enumerate(singles):
        for i, layer in enumerate(linear(single)):
            layer.weight.copy_(batched.weights[i][s].T)
            layer.bias.copy_(batched.biases[i][s, 0])


def assert_same_critics(batched: Any, singles: Any) -> None:
    """To 3 % of Adam's step of 3e-4: its first steps are a gradient's sign, even where that is rounding."""
    for s, single in enumerate(singles):
        for i, layer in enumerate(linear(single)):
            torch.testing.assert_close(batched.weights[i][s].T, layer.weight, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(batched.biases[i][s, 0], layer.bias, rtol=1e-5, atol=1e-5)


def replayed(model: Any, batch: Batch) -> None:
    """Let a Stable-Baselines3 model draw this batch."""
    data = SimpleNamespace(
        observations=batch.features,
        actions=batch.actions,
        rewards=batch.signals[:, :1],
        dones=batch.terminated[:, None],
        next_observations=batch.next_features,
        discounts=None,
    )
    model.replay_buffer = SimpleNamespace(sample=lambda *_, **__: data)


def logger() -> Any:
    from stable_baselines3.common.logger import Logger

    return Logger(None, [])


@pytest.mark.parametrize("auto_alpha", [False, True])
def test_a_sac_step_is_that_of_stable_baselines3(auto_alpha: bool) -> None:
    from stable_baselines3 import SAC

    learner = build("sac", policy_delay=1, alpha=0.37, auto_alpha=auto_alpha, max_grad_norm=1e9)
    model = SAC(
        "MlpPolicy",
        Blank(),
        ent_coef="auto_0.37" if auto_alpha else 0.37,
        policy_kwargs={"net_arch": [16, 16]},
        device="cpu",
    )
    model.actor.action_dist.epsilon = 0.0  # its guard against log 0, which ours does not need
    torch_layers = [*linear(model.actor.latent_pi), model.actor.mu, model.actor.log_std]
    with torch.no_grad():
        ours = linear(learner.actor.network)
        for theirs, layer in zip(torch_layers, [*ours[:-1], None, None], strict=True):
            if layer is not None:
                theirs.load_state_dict(layer.state_dict())
        for k, theirs in enumerate((model.actor.mu, model.actor.log_std)):
            theirs.weight.copy_(ours[-1].weight[A * k : A * (k + 1)])
            theirs.bias.copy_(ours[-1].bias[A * k : A * (k + 1)])
    copy_critics(learner.critics, model.critic.q_networks)
    copy_critics(learner.target_critics, model.critic_target.q_networks)
    model.set_logger(logger())

    # Stable-Baselines3 draws the noise of the policy's step first, then that of the targets.
    next_values, objective = learner.next_values, learner.objective
    noise_seed = 0

    def second_draw(features: Tensor) -> Tensor:
        learner.generator.manual_seed(noise_seed)
        torch.randn(B, A, generator=learner.generator)
        return next_values(features)

    def first_draw(features: Tensor) -> tuple[Tensor, Tensor]:
        learner.generator.manual_seed(noise_seed)
        return objective(features)

    learner.next_values, learner.objective = second_draw, first_draw
    for noise_seed in range(3):
        batch = draw(seed=noise_seed)
        critic_loss = learner.critic_loss(batch).item()
        replayed(model, batch)
        torch.manual_seed(noise_seed)
        model.train(1, B)
        learner.update(batch)
        values = model.logger.name_to_value
        assert critic_loss == pytest.approx(2 * values["train/critic_loss"], rel=1e-5, abs=1e-6)
        metrics = learner.end_iteration(NONE, 0)
        assert metrics["loss/policy"] == pytest.approx(values["train/actor_loss"], rel=1e-5, abs=1e-6)
        assert metrics["policy/alpha"] == pytest.approx(values["train/ent_coef"], rel=1e-5)
        assert_same_critics(learner.critics, model.critic.q_networks)
        assert_same_critics(learner.target_critics, model.critic_target.q_networks)
        theirs = torch.cat([model.actor.mu.weight, model.actor.log_std.weight])
        torch.testing.assert_close(linear(learner.actor.network)[-1].weight, theirs, rtol=1e-5, atol=1e-5)
        if auto_alpha:
            torch.testing.assert_close(learner.log_alpha, model.log_ent_coef, rtol=1e-5, atol=1e-6)


def test_a_td3_step_is_that_of_stable_baselines3() -> None:
    from stable_baselines3 import TD3

    learner = build("td3", actor_lr=3e-4, max_grad_norm=1e9)
    model = TD3("MlpPolicy", Blank(), learning_rate=3e-4, policy_kwargs={"net_arch": [16, 16]}, device="cpu")
    for target, source in (
        (model.actor, learner.actor.network),
        (model.actor_target, learner.target_network),
    ):
        for theirs, ours in zip(linear(target), linear(source), strict=True):
            theirs.load_state_dict(ours.state_dict())
    copy_critics(learner.critics, model.critic.q_networks)
    copy_critics(learner.target_critics, model.critic_target.q_networks)
    model.set_logger(logger())
    for step in range(4):  # the policy moves at the second and the fourth
        batch = draw(seed=step)
        learner.generator.manual_seed(step)
        critic_loss = learner.critic_loss(batch).item()
        replayed(model, batch)
        torch.manual_seed(step)
        model.train(1, B)
        learner.generator.manual_seed(step)
        learner.update(batch)
        values = model.logger.name_to_value
        metrics = learner.end_iteration(NONE, 0)
        assert critic_loss == pytest.approx(values["train/critic_loss"], rel=1e-5, abs=1e-6)
        assert ("loss/policy" in metrics) == (step % 2 == 1)
        if step % 2:
            assert metrics["loss/policy"] == pytest.approx(values["train/actor_loss"], rel=1e-5, abs=1e-6)
        assert_same_critics(learner.critics, model.critic.q_networks)
        assert_same_critics(learner.target_critics, model.critic_target.q_networks)
        for theirs, ours in (
            (model.actor, learner.actor.network),
            (model.actor_target, learner.target_network),
        ):
            for a, b in zip(linear(theirs), linear(ours), strict=True):
                torch.testing.assert_close(a.weight, b.weight, rtol=1e-5, atol=1e-5)


# --- targets and losses by hand -----------------------------------------------------------------------


def constant(learner: OffPolicyLearner, values: list[float], *, targets: bool) -> None:
    """Make critics answer given constants."""
    critics = learner.target_critics if targets else learner.critics
    with torch.no_grad():
        critics.weights[-1].zero_()
        critics.biases[-1].copy_(torch.tensor(values)[:, None, None])


@pytest.mark.parametrize("name", ["sac-lag", "td3-lag"])
def test_targets_by_hand(name: str) -> None:
    """min of the twins for the reward, each cost its own critic, nothing beyond a terminal state."""
    learner = build(name, {"a": 1.0, "b": 1.0}, discount=0.9, cost_discount=0.5)
    constant(learner, [4.0, 3.0, 10.0, 20.0], targets=True)
    batch = draw(2)
    batch.signals[:] = torch.tensor([1.0, 2.0, 3.0])
    batch.terminated[:] = 0.0
    batch.terminated[:5] = 1.0
    entropy = torch.zeros(B)
    if name == "sac-lag":
        learner.generator.manual_seed(1)
        entropy = -0.2 * learner.act(batch.next_features)[1].detach()
    learner.generator.manual_seed(1)
    reward, a, b = learner.targets(batch)
    torch.testing.assert_close(reward[5:], 1 + 0.9 * (3 + entropy[5:]))
    assert (reward[:5] == 1).all()
    assert a.tolist() == [2.0] * 5 + [2 + 0.5 * 10] * (B - 5)
    assert b.tolist() == [3.0] * 5 + [3 + 0.5 * 20] * (B - 5)


def test_a_costs_target_holds_no_entropy() -> None:
    """FSRL adds the entropy bonus to the cost's target, which makes random actions look safe."""
    batch = draw(1)
    targets = []
    for alpha in (0.0, 50.0):
        learner = build("sac-lag", {"cost": 1.0}, alpha=alpha)
        learner.generator.manual_seed(1)
        targets.append(learner.targets(batch))
    assert torch.equal(targets[0][1], targets[1][1])
    assert not torch.allclose(targets[0][0], targets[1][0])


@pytest.mark.parametrize("name", ["sac-lag", "td3-lag"])
def test_the_policys_loss_by_hand(name: str) -> None:
    """(alpha log pi - min Q + sum lambda Q_C) / (1 + sum lambda); TD3 ascends the first critic."""
    learner = build(name, {"a": 1.0, "b": 1.0}, multiplier_init=0.0)
    constant(learner, [4.0, 3.0, 10.0, 20.0], targets=False)
    for name_of_cost, multiplier in (("a", 0.5), ("b", 2.0)):
        learner.constraints[name_of_cost].multiplier.value = multiplier
    features = draw().features
    learner.generator.manual_seed(1)
    loss = learner.policy_loss(features).item()
    if name == "sac-lag":
        learner.generator.manual_seed(1)
        entropy = -learner.act(features)[1].mean().item()
        wanted = (-0.2 * entropy - 3 + 0.5 * 10 + 2 * 20) / 3.5
    else:
        wanted = (-4 + 0.5 * 10 + 2 * 20) / 3.5
    assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["sac-lag", "td3-lag"])
def test_permuting_a_batch_changes_no_critic_loss(name: str) -> None:
    learner = (
        build(name, {"a": 1.0}, alpha=0.0) if name == "sac-lag" else build(name, {"a": 1.0}, policy_noise=0.0)
    )
    if name == "sac-lag":  # without noise: the sampled action is the mode
        with torch.no_grad():
            linear(learner.actor.network)[-1].weight[A:] = 0
            linear(learner.actor.network)[-1].bias[A:] = -60
    batch, order = draw(1), torch.randperm(B)
    shuffled = Batch(
        batch.features[order],
        batch.actions[order],
        batch.signals[order],
        batch.terminated[order],
        batch.next_features[order],
    )
    torch.testing.assert_close(
        learner.critic_loss(batch), learner.critic_loss(shuffled), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_the_policys_step_leaves_the_critics_and_follows_slowly(name: str) -> None:
    learner = build(name, policy_delay=2, polyak=0.25)
    start = [p.detach().clone() for p in learner.target_critics.parameters()]
    actor = [p.detach().clone() for p in learner.actor.network.parameters()]
    learner.update(draw())
    for before, after in zip(start, learner.target_critics.parameters(), strict=True):
        assert torch.equal(before, after)
    for before, after in zip(actor, learner.actor.network.parameters(), strict=True):
        assert torch.equal(before, after)
    learner.update(draw(seed=1))
    for before, target, source in zip(
        start, learner.target_critics.parameters(), learner.critics.parameters(), strict=True
    ):
        torch.testing.assert_close(target, 0.75 * before + 0.25 * source)
    assert any(not torch.equal(a, p) for a, p in zip(actor, learner.actor.network.parameters(), strict=True))


def test_target_smoothing_is_clipped() -> None:
    seen: list[Tensor] = []
    learner = build("td3", policy_noise=5.0, policy_noise_clip=0.25)
    critics = learner.target_critics
    learner.target_critics = lambda inputs: seen.append(inputs) or critics(inputs)
    batch = draw()
    learner.targets(batch)
    noise = seen[0][:, D:] - learner.target_network(batch.next_features).tanh()
    assert noise.abs().max() <= 0.25 + 1e-6
    assert (noise.abs() > 0.2).float().mean() > 0.5
    assert seen[0][:, D:].abs().max() <= 1


def test_a_large_gradient_is_clipped() -> None:
    """Adam hides the size of the gradient, so a tiny bound shows in its moments."""
    learner = build("sac", max_grad_norm=1e-3, policy_delay=1)
    learner.update(draw())
    for optimizer in (learner.critic_optimizer, learner.actor_optimizer):
        (state,) = optimizer.state.values()
        norms = state["exp_avg"].norm(dim=1) / 0.1
        assert (norms <= 1e-3 * 1.001).all()


def test_automatic_alpha_seeks_the_target_entropy() -> None:
    """Rewards are zero, so that only the entropy's weight moves the policy."""
    for target, grows in ((1.3, True), (-6.0, False)):
        learner = build(
            "sac", auto_alpha=True, target_entropy=target, critic_lr=3e-2, alpha=0.1, policy_delay=1
        )
        start = learner.alpha.item()
        for seed in range(20):
            batch = draw(seed=seed)
            batch.signals.zero_()
            learner.update(batch)
        assert (learner.alpha.item() > start) == grows


# --- multipliers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sac-lag", "td3-lag"])
def test_the_multiplier_moves_once_for_new_episodes_and_never_on_a_gradient_step(name: str) -> None:
    """OmniSafe moves it at every gradient step on a stale mean."""
    learner = build(name, {"cost": 25.0}, multiplier_warmup=0, multiplier_lr=0.035, policy_delay=1)
    values = []
    for cost in ([35.0], [], [30.0], [20.0], [24.0]):
        for seed in range(3):
            learner.update(draw(1, seed))
            assert learner.constraints.multipliers["cost"] == (values[-1] if values else 0.001)
        before = learner.constraints.multipliers["cost"]
        metrics = learner.end_iteration(episodes(cost=cost), 1000)
        if not cost:
            assert learner.constraints.multipliers["cost"] == before
        values.append(learner.constraints.multipliers["cost"])
        assert metrics["constraint/cost/multiplier"] == values[-1]
    # The windows' means are 35, 32.5, 28.33 and 27.25: Adam at 0.035 climbs.
    assert values[0] == pytest.approx(0.036)
    assert values[0] == values[1] < values[2] < values[3] < values[4]


def test_worked_numbers_of_adam_reach_the_multiplier() -> None:
    learner = build("sac-lag", {"cost": 25.0}, multiplier_warmup=0, multiplier_lr=0.035, cost_window=1)
    got = []
    for cost in (35.0, 30.0, 20.0, 24.0):
        learner.end_iteration(episodes(cost=[cost]), 1)
        got.append(learner.constraints.multipliers["cost"])
    np.testing.assert_allclose(got, [0.0360000, 0.0686263, 0.0825110, 0.0921894], atol=1e-7)


def test_worked_numbers_of_the_controller_reach_the_multiplier() -> None:
    gains = {"kp": 0.1, "ki": 0.01, "kd": 0.01, "ema_p": 0.95, "ema_d": 0.95, "delay": 10}
    learner = build("td3-pid", {"cost": 25.0}, multiplier_warmup=0, cost_window=1, **gains)
    got = []
    for cost in (35.0, 45.0, 15.0, 25.0):
        learner.end_iteration(episodes(cost=[cost]), 1)
        got.append(learner.constraints.multipliers["cost"])
    np.testing.assert_allclose(got, [0.1685, 0.487625, 0.33579375, 0.34155406], atol=1e-7)


@pytest.mark.parametrize("name", ["sac-lag", "td3-pid"])
def test_the_warm_up_leaves_the_multiplier_but_watches_the_cost(name: str) -> None:
    learner = build(name, {"cost": 25.0}, multiplier_warmup=1000)
    metrics = learner.end_iteration(episodes(cost=[90.0]), 1000)
    assert metrics["constraint/cost/multiplier"] == 0.001
    assert metrics["constraint/cost/mean"] == 90
    assert learner.end_iteration(episodes(cost=[90.0]), 1001)["constraint/cost/multiplier"] > 0.001


def test_a_published_gain_is_the_sum_over_an_iterations_gradient_steps() -> None:
    """2,000 moves of OmniSafe's controller on one mean, against one of ours."""
    from saferl.constraints import PIDMultiplier

    theirs = PIDMultiplier(kp=1e-6, ki=1e-7, kd=1e-7, ema_p=0.95, ema_d=0.95, delay=10)
    learner = build("sac-pid", {"cost": 25.0}, multiplier_warmup=0, cost_window=1)
    for cost in (65.0, 80.0, 20.0, 45.0):
        for _ in range(2_000):
            theirs.update(cost, 25.0)
        learner.end_iteration(episodes(cost=[cost]), 1)
        assert learner.constraints.multipliers["cost"] == pytest.approx(theirs.value, rel=1e-3)


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_a_zero_multiplier_is_the_unconstrained_learner(name: str, tmp_path: Path) -> None:
    """A limit that never binds leaves the policy's weights equal."""
    shared: dict[str, Any] = {
        "env": "SpeedLimit-v0",
        "num_envs": 4,
        "total_steps": 600,
        "steps_per_iteration": 200,
        "learning_starts": 200,
        "updates_per_step": 0.2,
        "hidden_sizes": (16, 16),
    }
    limit = {"cost_limit": {"speed": 1e9}, "multiplier_init": 0.0, "multiplier_warmup": 0}
    weights = []
    for algorithm, options in ((name, {}), (f"{name}-lag", limit)):
        module, _ = CLASSES[algorithm]
        config = module.Config(**shared, **options)
        run = Run.create(
            tmp_path / algorithm, {"algorithm": algorithm, "config": to_json(config)}, quiet=True
        )
        module.train(config, run)
        run.close()
        weights.append(load_latest(tmp_path / algorithm / "checkpoints")[0]["policy"]["weights"])
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["sac-lag", "td3-lag", "sac-pid", "td3-pid"])
def test_several_limits_push_only_the_violated_multiplier(name: str, tmp_path: Path) -> None:
    module, _ = CLASSES[name]
    config = module.Config(
        env="SpeedLimit-v0",
        num_envs=4,
        total_steps=1200,
        steps_per_iteration=400,
        learning_starts=400,
        updates_per_step=0.05,
        hidden_sizes=(16,),
        cost_limit={"speed": 1e6, "throttle": 0.5},
        multiplier_init=0.01,
        multiplier_warmup=0,
    )
    run = Run.create(tmp_path / "run", {"algorithm": name, "config": to_json(config)}, quiet=True)
    module.train(config, run)
    run.close()
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert last["constraint/throttle/violation"] > 0
    assert last["constraint/throttle/multiplier"] > 0.01
    assert last["constraint/speed/multiplier"] < 0.01
    assert {"loss/value/speed", "loss/value/throttle"} <= set(last)


def test_the_cost_is_priced_in_the_gradient() -> None:
    """With a cost critic that grows with the action, a large multiplier drives the policy's action down."""

    def learned(price: float, make: Callable[..., Any] = build) -> float:
        learner = make(
            "td3-lag", {"cost": 25.0}, multiplier_init=price, actor_lr=1e-2, policy_delay=1, polyak=0.0
        )
        with torch.no_grad():
            for weights, biases in zip(learner.critics.weights, learner.critics.biases, strict=True):
                weights.zero_()
                biases.fill_(1.0)
            # One path through the network: Q = action + constant, for the reward and for the cost.
            for i, weights in enumerate(learner.critics.weights):
                weights[:, D if i == 0 else 0, 0] = 1.0
        for seed in range(100):
            batch = draw(1, seed)
            loss = learner.policy_loss(batch.features)
            learner._step(learner.actor_optimizer, loss, learner._actor)
        with torch.no_grad():
            return learner.actor.network(draw().features).tanh()[:, 0].mean().item()

    assert learned(0.0) > 0.9
    assert learned(3.0) < -0.9
