"""First-order learners, and TRPO in the same wrappers: equations, invariances, edge cases, resumed runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from saferl.agents.online import (
    cup,
    focops,
    ipo,
    p3o,
    ppo,
    ppo_early_terminated,
    ppo_saute,
    ppo_simmer,
    trpo,
    trpo_early_terminated,
    trpo_saute,
)
from saferl.agents.online.engine import Context, Episodes, Rollout
from saferl.agents.online.first_order import FirstOrderUpdate, Minibatch
from saferl.constraints import discounted_limit
from saferl.envs import make_vec
from saferl.errors import UsageError
from saferl.experiment.checkpoint import list_checkpoints, load_latest
from saferl.experiment.config import to_json
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run
from saferl.nn.models import Actor, ActorCritic

SMALL: dict[str, Any] = {
    "env": "SpeedLimit-v0",
    "num_envs": 4,
    "total_steps": 1600,
    "steps_per_iteration": 400,
    "epochs": 2,
    "hidden_sizes": (16,),
    "checkpoint_interval": 0.0,
}
PRICED = {"focops": focops, "cup": cup, "p3o": p3o, "ipo": ipo}
WRAPPED = {
    "ppo-saute": ppo_saute,
    "ppo-simmer": ppo_simmer,
    "ppo-early-terminated": ppo_early_terminated,
    "trpo-saute": trpo_saute,
    "trpo-early-terminated": trpo_early_terminated,
}
MODULES: dict[str, Any] = {**PRICED, **WRAPPED}
BASES: dict[str, Any] = {"ppo": ppo, "trpo": trpo}
BUDGETED = ("ppo-saute", "ppo-simmer", "trpo-saute")


def config_of(name: str, **changes: Any) -> Any:
    values = {**SMALL, **changes}
    if name.startswith("trpo"):
        values["critic_epochs"] = values.pop("epochs")
    return (BASES | MODULES)[name].Config(**values)


def train(name: str, folder: Path, **changes: Any) -> Any:
    config = config_of(name, **changes)
    run = Run.create(folder, {"algorithm": name, "config": to_json(config)}, quiet=True)
    try:
        return (BASES | MODULES)[name].train(config, run)
    finally:
        run.close()


def weights(folder: Path) -> tuple[bytes, bytes]:
    newest = list_checkpoints(folder / "checkpoints")[-1]
    return (newest / "policy.safetensors").read_bytes(), (newest / "training.safetensors").read_bytes()


def policy_weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_latest(folder / "checkpoints")[0]["policy"]["weights"]
    return found


BOX = spaces.Box(-1, 1, (2,), np.float32)


def context_of(costs: tuple[str, ...], actions: spaces.Space = BOX) -> Context:
    torch.manual_seed(0)
    actor = Actor(spaces.Box(-1, 1, (3,), np.float32), actions, hidden_sizes=(8,))
    model = ActorCritic(actor, len(costs), hidden_sizes=(8,))
    env = ppo_saute.saute(ppo_saute.Config(env="SpeedLimit-v0", cost_limit=dict.fromkeys(costs, 5.0)))(
        make_vec("SpeedLimit-v0", 2)
    )
    return Context(model, costs, torch.Generator().manual_seed(0), env)


def rollout_of(context: Context, size: int = 200, **costs: list[float]) -> Rollout:
    """Random data of the context's policy; `costs` are those of finished episodes."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(size, 3, generator=generator)
    distribution = context.model.actor.distribution
    with torch.no_grad():
        parameters = context.model.actor.distribution_parameters(features)
        actions = distribution.sample(parameters, generator)
        log_probs = distribution.log_prob(parameters, actions)
    names = context.cost_names
    finished = {name: np.array(costs.get(name, [])) for name in names}
    count = max(map(len, finished.values()), default=0)
    return Rollout(
        features=features,
        actions=actions,
        log_probs=log_probs,
        parameters=parameters,
        advantages=torch.randn(size, generator=generator),
        cost_advantages={name: torch.randn(size, generator=generator) + 0.3 for name in names},
        targets=torch.randn(size, 1 + len(names), generator=generator),
        episodes=Episodes(returns=np.zeros(count), lengths=np.ones(count), costs=finished),
    )


def everything(rollout: Rollout, context: Context, shift: float = 0.0) -> Minibatch:
    """All samples as one mini-batch, under a policy moved by `shift`."""
    with torch.no_grad():
        parameters = rollout.parameters + shift
    distribution = context.model.actor.distribution
    index = torch.arange(len(rollout))
    return Minibatch(index, distribution.log_prob(parameters, rollout.actions), parameters)


# --- the equations ------------------------------------------------------------------------------------------


def test_focops_masks_each_sample_by_its_own_kl() -> None:
    """With KL of shape (B, 1) against ratios of shape (B,) the loss would be +0.019815 without an error."""
    kl, ratio = torch.tensor([0.01, 0.03, 0.005]), torch.tensor([1.1, 0.9, 1.2])
    advantages, old = torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3)
    loss = focops.focops_loss(ratio.log(), old, advantages, kl, 1.5, 0.02)
    assert loss.item() == pytest.approx(-0.372778, abs=1e-6)
    broadcast = (kl[:, None] - ratio * advantages / 1.5) * (kl[:, None] <= 0.02)
    assert broadcast.mean().item() == pytest.approx(0.019815, abs=1e-6)
    with pytest.raises(ValueError, match="must have one shape"):
        focops.focops_loss(ratio.log(), old, advantages, kl[:, None], 1.5, 0.02)


def test_focops_gives_no_gradient_to_masked_samples() -> None:
    kl = torch.tensor([0.01, 0.03], requires_grad=True)
    log_probs = torch.zeros(2, requires_grad=True)
    focops.focops_loss(log_probs, torch.zeros(2), torch.tensor([1.0, 1.0]), kl, 1.5, 0.02).backward()
    assert kl.grad is not None
    assert log_probs.grad is not None
    assert kl.grad.tolist() == pytest.approx([0.5, 0.0])
    assert log_probs.grad.tolist() == pytest.approx([-0.5 / 1.5, 0.0])


def _minimiser(loss: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The categorical distribution that minimises a loss of log-probabilities, by LBFGS in float64."""
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(-1)


# One state, three actions, drawn as often as the behaviour policy (1/2, 1/3, 1/6) says.
OLD = torch.tensor([1 / 2, 1 / 3, 1 / 6], dtype=torch.float64)
DRAWN = torch.tensor([0, 0, 0, 1, 1, 2])
VALUE = torch.tensor([0.3, -0.8, 0.9], dtype=torch.float64)


def _kl(new: Tensor, old: Tensor) -> Tensor:
    return (new.exp() * (new - old)).sum().expand(len(DRAWN))


def test_focops_minimiser_is_the_closed_form_policy() -> None:
    """Without mask: pi = pi_k exp(A / lambda) / Z, the non-parametric optimum of the paper."""
    old = OLD.log()

    def loss(new: Tensor) -> Tensor:
        return focops.focops_loss(new[DRAWN], old[DRAWN], VALUE[DRAWN], _kl(new, old), 0.7, 1e9)

    expected = OLD * (VALUE / 0.7).exp()
    torch.testing.assert_close(_minimiser(loss, 3), expected / expected.sum(), rtol=1e-4, atol=1e-6)


def test_cup_projection_has_the_closed_form_minimiser() -> None:
    """pi = pi_k' exp(-w) / Z with the ratio relative to pi_k, since E_pi_k[rho w] = E_pi[w]."""
    old, improved = OLD.log(), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()

    def loss(new: Tensor) -> Tensor:
        return cup.projection_loss(new[DRAWN], old[DRAWN], VALUE[DRAWN], _kl(new, improved))

    expected = improved.exp() * (-VALUE).exp()
    torch.testing.assert_close(_minimiser(loss, 3), expected / expected.sum(), rtol=1e-4, atol=1e-6)


def test_cup_coefficient() -> None:
    assert cup.Config().cost_coefficient == pytest.approx(5.95)
    assert cup.Config(cost_discount=0.9, cost_gae_lambda=1.0).cost_coefficient == pytest.approx(1.0)
    with pytest.raises(UsageError, match="cost discount below 1"):
        cup.Config(cost_discount=1.0)


@pytest.mark.parametrize(("violation", "expected"), [(5.0, 1.4), (-3.0, 0.0), (0.0, 0.4)])
def test_p3o_penalty_has_the_papers_scale(violation: float, expected: float) -> None:
    """kappa 20, S = 0.02: without 1 - gamma a violation of 5 would give 100.4, whatever S."""
    surrogate = torch.tensor(0.02, requires_grad=True)
    penalty = p3o.exact_penalty(surrogate, violation, 0.99, 20.0)
    assert penalty.item() == pytest.approx(expected, abs=1e-6)
    penalty.backward()
    assert surrogate.grad is not None
    assert surrogate.grad.item() == (20.0 if expected else 0.0)


def test_p3o_cost_surrogate_is_clipped_pessimistically() -> None:
    context = context_of(("speed",))
    agent = p3o.P3O(p3o.Config(cost_limit={"speed": 4.0}), context)
    rollout = rollout_of(context, speed=[9.0])
    rollout.advantages = torch.zeros_like(rollout.advantages)
    agent.constraints.observe({"speed": [9.0]})
    batch = everything(rollout, context, shift=0.2)
    ratio = (batch.log_probs - rollout.log_probs).exp()
    costs = rollout.cost_advantages["speed"]
    costs = costs - costs.mean()
    surrogate = torch.maximum(ratio * costs, ratio.clamp(0.8, 1.2) * costs).mean()
    assert surrogate > -0.05
    loss = agent._policy_loss(rollout)(batch)
    torch.testing.assert_close(loss, 20 * (surrogate + 0.01 * 5), rtol=1e-4, atol=1e-5)


def test_p3o_surrogate_is_zero_on_every_minibatch_before_the_first_step() -> None:
    """Else the noise of 64 samples, through the convex penalty, would drive the cost far below its limit."""
    context = context_of(("speed",))
    agent = p3o.P3O(p3o.Config(cost_limit={"speed": 4.0}), context)
    rollout = rollout_of(context, speed=[3.0])
    agent.constraints.observe({"speed": [3.0]})
    rollout.advantages = torch.zeros_like(rollout.advantages)
    whole = everything(rollout, context)
    for index in torch.arange(len(rollout)).split(20):
        batch = Minibatch(index, whole.log_probs[index], whole.parameters[index])
        assert agent._policy_loss(rollout)(batch).item() == 0.0


@pytest.mark.parametrize(
    ("cost", "penalty"), [(0.0, 0.0004), (20.0, 0.002), (24.9, 0.1), (24.995, 1.0), (25.0, 1.0), (30.0, 1.0)]
)
def test_ipo_barrier(cost: float, penalty: float) -> None:
    assert ipo.BarrierMultiplier(0.01, 1.0).update(cost, 25.0) == pytest.approx(penalty)


def test_ipo_barrier_is_continuous_monotone_and_bounded() -> None:
    barrier = ipo.BarrierMultiplier(0.01, 1.0)
    values = [barrier.update(cost, 25.0) for cost in np.linspace(0, 50, 2001)]
    assert (np.diff(values) >= 0).all()
    assert max(values) == 1.0
    # Just beyond the slack kappa / penalty_max the slope still equals the cap.
    assert barrier.update(25 - 0.01 * (1 + 1e-9), 25.0) == pytest.approx(1.0)
    assert barrier.update(25 - 5e-324, 25.0) == 1.0


def test_simmer_controller() -> None:
    allowance = discounted_limit(25, 0.999, 1000)
    controller = ppo_simmer.BudgetController(ppo_simmer.Config(reference="budget"), 25.0, allowance)
    budgets = [controller.update(cost) for cost in (40.0, 40.0, 10.0)]
    np.testing.assert_allclose(budgets, [15.807590, 15.807541, 15.807516], atol=1e-6)
    again = ppo_simmer.BudgetController(ppo_simmer.Config(reference="budget"), 25.0, allowance)
    again.update(40.0)
    again.load_state_dict(controller.state_dict())
    assert again.update(33.0) == controller.update(33.0)


def test_simmer_schedule_rises_is_corrected_and_does_not_run_away() -> None:
    options: dict[str, Any] = {"start_budget": 0.2, "kp": 0.5, "ki": 0.0, "smoothing": 0.0, "max_change": 100}
    controller = ppo_simmer.BudgetController(ppo_simmer.Config(**options), 10.0, 10.0)
    assert controller.share == pytest.approx(0.2)
    assert controller.update(None, 0.25) == pytest.approx(6.0)  # nothing is known: the reference itself
    assert controller.update(6.0, 0.25) == pytest.approx(6.0)  # as it should cost
    assert controller.update(8.0, 0.25) == pytest.approx(5.0)  # too dear
    assert controller.update(4.0, 0.25) == pytest.approx(7.0)  # cheaper than allowed
    assert controller.update(10.0, 0.9) == pytest.approx(10.0)
    # A long violation ends at a budget above nothing, from which a safe policy comes back at once.
    for _ in range(50):
        least = controller.update(60.0, 1.0)
    assert least == pytest.approx(1e-6)
    assert controller.update(10.0, 1.0) == pytest.approx(10.0)
    stuck = ppo_simmer.BudgetController(ppo_simmer.Config(**options, reference="budget"), 10.0, 10.0)
    for _ in range(50):
        stuck.update(60.0)
    assert stuck.update(1.0) == pytest.approx(1e-6)


# --- invariances --------------------------------------------------------------------------------------------


def _loss(name: str, rollout: Rollout, context: Context) -> Callable[[Minibatch], Tensor]:
    config = MODULES[name].Config(cost_limit=dict.fromkeys(context.cost_names, 4.0))
    observed = {cost: [9.0] for cost in context.cost_names}
    prices = dict.fromkeys(context.cost_names, 0.7)
    if name == "focops":
        agent: Any = focops.FOCOPS(config, context)
        costs = {n: focops.standardise(a) for n, a in rollout.cost_advantages.items()}
        advantages = focops.scalarise(focops.standardise(rollout.advantages), costs, prices, norm="none")
        return agent._policy_loss(rollout, advantages)
    if name == "cup":
        return cup.CUP(config, context)._projection(rollout, rollout.parameters + 0.1, prices)
    if name == "p3o":
        agent = p3o.P3O(config, context)
        agent.constraints.observe(observed)
        return agent._policy_loss(rollout)
    advantages = ipo.lagrangian_advantages(rollout, prices)
    return ipo.clipped_policy_loss(rollout, advantages, config.clip)


@pytest.mark.parametrize("name", PRICED)
def test_a_constant_added_to_cost_advantages_changes_nothing(name: str) -> None:
    context = context_of(("speed", "throttle"))
    rollout = rollout_of(context)
    batch = everything(rollout, context, shift=0.05)
    before = _loss(name, rollout, context)(batch)
    rollout.cost_advantages = {n: a + 3.0 for n, a in rollout.cost_advantages.items()}
    torch.testing.assert_close(_loss(name, rollout, context)(batch), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PRICED)
def test_the_order_of_a_minibatch_does_not_matter(name: str) -> None:
    context = context_of(("speed", "throttle"))
    rollout = rollout_of(context)
    batch = everything(rollout, context, shift=0.05)
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(3))
    permuted = Minibatch(order, batch.log_probs[order], batch.parameters[order])
    loss = _loss(name, rollout, context)
    torch.testing.assert_close(loss(permuted), loss(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cup", {"cost_limit": 1e9, "target_kl": 0.02}),
        ("p3o", {"cost_limit": {"speed": 0.0, "throttle": 0.0}, "kappa": 0.0}),
        ("p3o", {"cost_limit": 1e9}),
        ("ppo-early-terminated", {"cost_limit": 1e9}),
        ("trpo-early-terminated", {"cost_limit": 1e9}),
    ],
)
def test_without_pressure_the_policy_is_the_unconstrained_one_to_the_bit(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """CUP: at nu = 0 stage 2 leaves stage 1's policy exactly as it is, Adam's momentum included."""
    train("trpo" if name.startswith("trpo") else "ppo", tmp_path / "base")
    train(name, tmp_path / "run", **changes)
    ours, theirs = policy_weights(tmp_path / "run"), policy_weights(tmp_path / "base")
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=0, msg=key)


def test_focops_without_price_does_not_depend_on_the_costs(tmp_path: Path) -> None:
    train("focops", tmp_path / "one", cost_limit={"speed": 1e9})
    train("focops", tmp_path / "two", cost_limit={"throttle": 1e9})
    assert weights(tmp_path / "one")[0] == weights(tmp_path / "two")[0]


# --- CUP's second stage -------------------------------------------------------------------------------------


def test_the_stopping_kl_is_measured_from_the_given_policy() -> None:
    """From the behaviour policy a second stage would stop at once: the first has used up the distance."""
    context = context_of(())
    rollout = rollout_of(context)
    config = ppo.Config(epochs=5, target_kl=0.01, batch_size=50, actor_lr=1e-2)
    update = FirstOrderUpdate(config, context)

    def loss(batch: Minibatch) -> Tensor:
        return -(batch.log_probs * rollout.advantages[batch.index]).mean()

    assert update.run(rollout, loss, 0.0)["policy/kl"] > 0.01
    with torch.no_grad():
        here = context.model.actor.distribution_parameters(rollout.features)
    # At progress 1 the step size is 0, so only the yardstick differs.
    assert update.run(rollout, loss, 1.0)["policy/epochs"] == 1
    stayed = update.run(rollout, loss, 1.0, reference=here)
    assert stayed["policy/epochs"] == 5
    assert stayed["policy/kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_second_stage_leaves_the_critics_and_their_optimiser_alone() -> None:
    context = context_of(("speed",))
    rollout = rollout_of(context, speed=[9.0])
    agent = cup.CUP(cup.Config(cost_limit={"speed": 4.0}, epochs=2, batch_size=50), context)
    agent.epochs.run(rollout, lambda batch: batch.log_probs.mean(), 0.0)
    critics = [p.clone() for p in context.model.critics.parameters()]
    actor = [p.clone() for p in context.model.actor.network.parameters()]
    moments = [s["exp_avg"].clone() for s in agent.epochs.optimizer.state.values()]
    loss = agent._projection(rollout, rollout.parameters, {"speed": 0.5})
    agent.epochs.run(rollout, loss, 0.0, reference=rollout.parameters, train_critics=False)
    assert all(torch.equal(a, b) for a, b in zip(critics, context.model.critics.parameters(), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(actor, context.model.actor.network.parameters(), strict=True)
    )
    after = [s["exp_avg"] for s in agent.epochs.optimizer.state.values()]
    assert sum(torch.equal(a, b) for a, b in zip(moments, after, strict=True)) == 1
    # And the critics learn again afterwards.
    agent.epochs.run(rollout, lambda batch: batch.log_probs.mean(), 0.0)
    assert not any(
        torch.equal(a, b) for a, b in zip(critics, context.model.critics.parameters(), strict=True)
    )


def test_cup_projects_more_than_once_although_stage_one_used_up_its_distance() -> None:
    context = context_of(("speed",))
    rollout = rollout_of(context, size=400, speed=[4.5])
    config = cup.Config(
        cost_limit={"speed": 4.0}, epochs=8, batch_size=50, actor_lr=1e-3, target_kl=5e-4, multiplier_lr=0.001
    )
    metrics = cup.CUP(config, context).update(rollout, 0.0)
    assert metrics["policy/kl"] > config.target_kl
    assert metrics["policy/projection_epochs"] > 1


# --- edge cases ---------------------------------------------------------------------------------------------

CLASSES: dict[str, Any] = {
    "focops": focops.FOCOPS,
    "cup": cup.CUP,
    "p3o": p3o.P3O,
    "ipo": ipo.IPO,
    "ppo-saute": ppo_saute.PPOSaute,
    "ppo-simmer": ppo_simmer.PPOSimmer,
    "ppo-early-terminated": ppo_early_terminated.PPOEarlyTerminated,
    "trpo-saute": trpo_saute.TRPOSaute,
    "trpo-early-terminated": trpo_early_terminated.TRPOEarlyTerminated,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("actions", [BOX, spaces.MultiDiscrete([3, 2])])
def test_a_rollout_without_a_finished_episode_keeps_the_last_estimate(name: str, actions: Any) -> None:
    context = context_of(("speed", "throttle"), actions)
    limits = {"speed": 4.0, "throttle": 4.0}
    agent = CLASSES[name](config_of(name, cost_limit=limits), context)
    first = agent.update(rollout_of(context), 0.0)
    assert all(np.isfinite(list(first.values())))
    assert "constraint/speed/mean" not in first
    assert agent.constraints["speed"].multiplier.value in (
        0.0,
        20.0,
    )  # P3O's kappa, used once a cost is known
    agent.update(rollout_of(context, speed=[6.0, 8.0], throttle=[1.0, 1.0]), 0.0)
    last = agent.update(rollout_of(context), 0.0)
    assert all(np.isfinite(list(last.values())))
    assert (last["constraint/speed/mean"], last["constraint/throttle/mean"]) == (7.0, 1.0)


@pytest.mark.parametrize("name", MODULES)
def test_equal_advantages_and_a_single_sample_give_finite_updates(name: str) -> None:
    for size in (1, 3):
        context = context_of(("speed",))
        agent = CLASSES[name](config_of(name, cost_limit={"speed": 4.0}), context)
        rollout = rollout_of(context, size, speed=[9.0])
        rollout.advantages = torch.full((size,), 2.0)
        rollout.cost_advantages = {"speed": torch.full((size,), 0.1)}
        metrics = agent.update(rollout, 0.5)
        assert all(np.isfinite(list(metrics.values())))
        assert all(torch.isfinite(p).all() for p in context.model.parameters())


def test_only_the_violated_limit_is_priced(tmp_path: Path) -> None:
    for name in ("focops", "cup", "ipo"):
        train(name, tmp_path / name, cost_limit={"speed": 1e6, "throttle": 0.5})
        last = read_metrics(tmp_path / name / "metrics.csv")[-1]
        assert last["constraint/throttle/violation"] > 0
        assert last["constraint/throttle/multiplier"] > 0.1
        assert last["constraint/speed/multiplier"] < 1e-3


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("env", ["saferl-test/DictDiscrete-v0", "saferl-test/MultiDiscrete-v0"])
def test_dict_observations_discrete_actions_and_several_limits(name: str, env: str, tmp_path: Path) -> None:
    options = {"saute_discount": 1.0} if name in BUDGETED else {}
    limits = {"wrong": 2.0, "right": 6.0}
    actor = train(name, tmp_path / "run", env=env, cost_limit=limits, **options)
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert {"constraint/wrong/mean", "constraint/right/violation"} <= set(last)
    if name in BUDGETED:
        assert actor.observation_space["budget"].shape == (2,)


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("env", ["SpeedLimit-v0", "saferl-test/DictDiscrete-v0"])
def test_a_resumed_run_ends_with_the_same_bits(name: str, env: str, tmp_path: Path) -> None:
    """The second environment cannot store its state, so only what the learner itself keeps can agree."""
    limits = {"speed": 5.0, "throttle": 30.0} if env == "SpeedLimit-v0" else {"wrong": 4.0}
    options: dict[str, Any] = {"env": env, "cost_limit": limits}
    if name == "ppo-simmer":
        options |= {"start_budget": 0.3, "kp": 0.2, "smoothing": 0.5, "kd": 0.1, "ramp": 0.7}
    if name in BUDGETED:
        options["horizon"] = 100
    config = config_of(name, **options)
    folder = tmp_path / "broken"
    run = Run.create(folder, {"algorithm": name, "config": to_json(config)}, quiet=True)
    calls, original = [0], run.log

    def stop_at_third(step: int, metrics: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        original(step, metrics)

    run.log = stop_at_third  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        MODULES[name].train(config, run)
    run.close()
    stopped = load_latest(folder / "checkpoints")[0]["training"]["algorithm"]
    run = Run.open(folder, quiet=True)
    MODULES[name].train(config, run)
    run.close()
    if env == "SpeedLimit-v0":
        train(name, tmp_path / "whole", **options)
        assert weights(folder) == weights(tmp_path / "whole")
        rows = [
            [
                {k: v for k, v in row.items() if not k.startswith("time/")}
                for row in read_metrics(f / "metrics.csv")
            ]
            for f in (folder, tmp_path / "whole")
        ]
        assert rows[0] == rows[1]
    else:
        agent = CLASSES[name](config, _fresh(config, name))
        agent.load_state_dict(stopped)
        assert str(agent.state_dict()) == str(stopped)
        if name == "ppo-simmer":
            assert agent.env.start["wrong"] == stopped["controllers"]["wrong"]["budget"] / (
                agent.env.budgets["wrong"].allowance
            )


def _fresh(config: Any, name: str) -> Context:
    from saferl.experiment.config import cost_limits

    env = make_vec(config.env, config.num_envs)
    if hasattr(MODULES[name], "wrap"):
        env = MODULES[name].wrap(config)(env)
    actor = Actor(env.single_observation_space, env.single_action_space, hidden_sizes=config.hidden_sizes)
    names = tuple(cost_limits(config.cost_limit)) if name in PRICED else ()
    model = ActorCritic(actor, len(names), hidden_sizes=config.hidden_sizes)
    return Context(model, names, torch.Generator(), env)


# --- configurations -----------------------------------------------------------------------------------------

DEFAULTS: dict[str, dict[str, Any]] = {
    "focops": {"temperature": 1.5, "eta": 0.02, "target_kl": 0.02, "epochs": 40},
    "cup": {"target_kl": 0.01, "epochs": 40, "clip": 0.2},
    "p3o": {"kappa": 20.0, "epochs": 10},
    "ipo": {"kappa": 0.01, "penalty_max": 1.0, "epochs": 10},
    "ppo-saute": {"saute_discount": 0.999, "unsafe_reward": -1.0, "epochs": 40},
    "ppo-simmer": {"saute_discount": 0.999, "kp": 5e-4, "ki": 1e-5, "kd": 0.0, "smoothing": 0.995},
    "ppo-early-terminated": {"epochs": 40},
    "trpo-saute": {"saute_discount": 0.999, "unsafe_reward": -1.0, "target_kl": 0.01},
    "trpo-early-terminated": {"target_kl": 0.01},
}
AUTHORS_MULTIPLIER = {
    "multiplier_lr": 0.01,
    "multiplier_init": 0.0,
    "multiplier_max": 2.0,
    "multiplier_optimizer": "sgd",
}


@pytest.mark.parametrize("name", MODULES)
def test_published_defaults(name: str) -> None:
    config = MODULES[name].Config()
    expected = DEFAULTS[name] | (AUTHORS_MULTIPLIER if name in ("focops", "cup") else {})
    expected |= {"cost_limit": 25.0, "discount": 0.99}
    if not name.startswith("trpo"):
        expected |= {"batch_size": 64, "actor_lr": 3e-4}
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("focops", {"temperature": 0.0}, "temperature is 0; it must be positive"),
        ("focops", {"eta": -1.0}, "eta must be 0 or more"),
        ("p3o", {"kappa": -1.0}, "kappa must be 0 or more"),
        ("p3o", {"cost_discount": 1.0}, "use a cost discount below 1"),
        ("ipo", {"kappa": 0.0}, "kappa is 0; it must be positive"),
        ("ipo", {"penalty_max": float("inf")}, "penalty_max is inf"),
        ("ppo-saute", {"saute_discount": 0.0}, "saute_discount is 0"),
        ("ppo-saute", {"horizon": 0}, "the horizon is 0"),
        ("ppo-saute", {"cost_limit": {"speed": 0.0}}, "budget of the cost 'speed' is 0; it must be positive"),
        ("ppo-simmer", {"start_budget": 1.5}, "start_budget is 1.5"),
        ("ppo-simmer", {"smoothing": 1.0}, "smoothing is 1"),
        ("ppo-simmer", {"ramp": 2.0}, "ramp is 2"),
        ("ppo-simmer", {"reference": "bugdet"}, "did you mean 'budget'"),
        ("ppo-simmer", {"kp": -1.0}, "kp must be 0 or more"),
        ("ppo-early-terminated", {"cost_limit": -1.0}, "the cost limit is -1"),
    ],
)
def test_impossible_values_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MODULES[name].Config(**changes)


@pytest.mark.parametrize("name", MODULES)
def test_unknown_costs_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'speed'"):
        train(name, tmp_path / "run", cost_limit={"sped": 1.0})
