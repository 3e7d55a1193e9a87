"""The trust-region family: exact gradients and Fisher products, accepted steps, the family's identities."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from saferl.advantages import centre, standardise
from saferl.agents.online import cpo, crpo, pcpo, rcpo, trpo, trpo_lag, trpo_pid
from saferl.agents.online.engine import Context, Episodes, Rollout
from saferl.agents.online.second_order import SecondOrderUpdate
from saferl.errors import UsageError
from saferl.nn.models import Actor, ActorCritic

OBSERVATIONS = spaces.Box(-1, 1, (5,), np.float32)
BOX = spaces.Box(-1, 1, (3,), np.float32)
CONSTRAINED = {
    "trpo_lag": trpo_lag,
    "trpo_pid": trpo_pid,
    "rcpo": rcpo,
    "cpo": cpo,
    "pcpo": pcpo,
    "crpo": crpo,
}


def make(space: spaces.Space[Any] = BOX, costs: int = 1, **settings: Any) -> Context:
    torch.manual_seed(1)
    actor = Actor(OBSERVATIONS, space, hidden_sizes=(8, 8), **settings)
    model = ActorCritic(actor, costs, hidden_sizes=(8, 8))
    names = tuple("abc"[:costs]) if costs > 1 else ("cost",)
    return Context(model, names, torch.Generator().manual_seed(0), None)  # type: ignore[arg-type]


def rollout_of(
    context: Context, size: int = 200, cost: float = 50.0, lengths: float = 100.0, **changes: Tensor
) -> Rollout:
    """A rollout of the context's policy; the first action coordinate earns, the second costs."""
    torch.manual_seed(2)
    actor = context.model.actor
    features = torch.randn(size, 5)
    with torch.no_grad():
        parameters = actor.distribution_parameters(features)
        actions = actor.distribution.sample(parameters, torch.Generator().manual_seed(3))
        log_probs = actor.distribution.log_prob(parameters, actions)
    count = len(context.cost_names)
    episodes = Episodes(
        np.zeros(4), np.full(4, lengths), {name: np.full(4, cost) for name in (*context.cost_names, "cost")}
    )
    values: dict[str, Any] = {
        "features": features,
        "actions": actions,
        "log_probs": log_probs,
        "parameters": parameters,
        "advantages": actions[:, 0] + 0.1 * torch.randn(size),
        "cost_advantages": {
            name: actions[:, (k + 1) % actions.shape[1]] + actions[:, 0]
            for k, name in enumerate(context.cost_names)
        },
        "targets": torch.randn(size, 1 + count),
        "episodes": episodes,
    }
    return Rollout(**{**values, **changes})


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def own_parameters(context: Context) -> list[Tensor]:
    actor = context.model.actor
    return [*actor.network.parameters(), *actor.distribution.parameters()]


def kl_and_gain(context: Context, rollout: Rollout, advantages: Tensor) -> tuple[float, float]:
    actor = context.model.actor
    with torch.no_grad():
        parameters = actor.distribution_parameters(rollout.features)
        ratio = (actor.distribution.log_prob(parameters, rollout.actions) - rollout.log_probs).exp()
        kl = actor.distribution.kl(rollout.parameters, parameters).mean()
        return float(kl), float(((ratio - 1) * advantages).mean())


@pytest.mark.parametrize("space", [BOX, spaces.Discrete(4), spaces.MultiDiscrete([2, 3])])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gradient_and_fisher_product_are_those_of_autograd(space: spaces.Space[Any], activation: str) -> None:
    context = make(space, activation=activation)
    rollout = rollout_of(context, cost_advantages={})
    update = SecondOrderUpdate(trpo.Config(), context)
    actor, parameters = context.model.actor, own_parameters(context)

    new = actor.distribution_parameters(rollout.features)
    ratio = (actor.distribution.log_prob(new, rollout.actions) - rollout.log_probs).exp()
    wanted = flat(torch.autograd.grad((ratio * rollout.advantages).mean(), parameters, retain_graph=True))
    torch.testing.assert_close(update.gradient(rollout, rollout.advantages), wanted, rtol=1e-4, atol=1e-6)

    # The mean KL divergence is summed over action dimensions: its Hessian is the trust region's metric.
    kl = actor.distribution.kl(new.detach(), new).mean()
    slopes = flat(torch.autograd.grad(kl, parameters, create_graph=True))
    update.linearise(rollout)
    for _ in range(3):
        v = torch.randn_like(wanted)
        hessian = flat(torch.autograd.grad(slopes @ v, parameters, retain_graph=True))
        torch.testing.assert_close(update.product(v), hessian + 0.1 * v, rtol=1e-4, atol=1e-5)


def test_trpo_step_fills_the_trust_region_and_improves() -> None:
    context = make()
    rollout = rollout_of(context)
    algorithm = trpo.TRPO(trpo.Config(cg_damping=1e-3), context)
    metrics = algorithm.update(rollout, 0.0)
    kl, gain = kl_and_gain(context, rollout, standardise(rollout.advantages))
    assert metrics["policy/kl"] == pytest.approx(kl, rel=1e-3)
    assert 0.005 < kl <= 0.01
    assert gain > 0.05


def test_a_trust_region_twice_as_wide_in_kl() -> None:
    """delta bounds the KL summed over action dimensions, so the step grows as sqrt(delta) and no more."""
    steps = {}
    for delta in (0.001, 0.004):
        context = make()
        rollout = rollout_of(context)
        update = SecondOrderUpdate(trpo.Config(target_kl=delta), context)
        steps[delta], _ = update.natural_step(rollout, standardise(rollout.advantages))
    torch.testing.assert_close(steps[0.004], 2 * steps[0.001], rtol=1e-4, atol=1e-7)


def test_flat_surrogate_and_single_sample_leave_the_policy() -> None:
    for size in (1, 50):
        context = make()
        rollout = rollout_of(context, size, advantages=torch.zeros(size))
        before = flat(own_parameters(context)).clone()
        trpo.TRPO(trpo.Config(), context).update(rollout, 0.0)
        torch.testing.assert_close(flat(own_parameters(context)), before)


def test_a_rejected_line_search_restores_the_policy() -> None:
    context = make()
    rollout = rollout_of(context)
    update = SecondOrderUpdate(trpo.Config(), context)
    before = flat(own_parameters(context)).clone()
    step, _ = update.natural_step(rollout, rollout.advantages)
    assert update.line_search(rollout, step, lambda _: False)["policy/step_share"] == 0
    assert torch.equal(flat(own_parameters(context)), before)


@pytest.mark.parametrize("name", ["cpo", "pcpo"])
@pytest.mark.parametrize("cost", [-975.0, 26.0, 500.0])
def test_constrained_steps_are_accepted_within_their_bounds(name: str, cost: float) -> None:
    module = CONSTRAINED[name]
    context = make()
    rollout = rollout_of(context, cost=cost)
    config = module.Config(cg_damping=1e-3)
    algorithm = getattr(module, name.upper())(config, context)
    metrics = algorithm.update(rollout, 0.0)
    kl, rise = kl_and_gain(context, rollout, centre(rollout.cost_advantages["cost"]))
    _, gain = kl_and_gain(context, rollout, standardise(rollout.advantages))
    excess = (cost - 25) / 100
    assert metrics["policy/step_share"] > 0
    assert kl <= 0.01
    assert rise <= max(-excess, 0.0) + 1e-6
    if cost == -975.0:
        assert metrics["policy/case"] == 3
        assert gain > 0.05
    if cost == 500.0 and name == "cpo":
        assert metrics["policy/case"] == 0
        assert rise < -0.02


def test_cpo_measures_the_excess_in_the_units_of_the_surrogate() -> None:
    """A violation of 1 in an episode of 1000 steps is 0.001 a step: reachable, so not recovery."""
    cases = {}
    for lengths in (1.0, 1000.0):
        context = make()
        rollout = rollout_of(context, cost=26.0, lengths=lengths)
        cases[lengths] = cpo.CPO(cpo.Config(), context).update(rollout, 0.0)["policy/case"]
    assert cases == {1.0: 0.0, 1000.0: 1.0}


def test_a_limit_that_stays_exceeded_gains_a_margin() -> None:
    context = make()
    algorithm = cpo.CPO(cpo.Config(margin_lr=0.05, cost_window=4), context)
    margins = [
        algorithm.update(rollout_of(context, cost=cost), 0.0)["constraint/cost/margin"]
        for cost in (45.0, 45.0, 5.0, -100.0)
    ]
    assert margins == pytest.approx([1.0, 2.0, 1.0, 0.0])
    assert "constraint/cost/margin" not in cpo.CPO(cpo.Config(), make()).update(rollout_of(make()), 0.0)


def test_constraints_without_a_finished_episode_keep_the_last_estimate() -> None:
    context = make()
    algorithm = cpo.CPO(cpo.Config(), context)
    empty = Episodes(np.zeros(0), np.zeros(0), {"cost": np.zeros(0)})
    rollout = rollout_of(context)
    first = copy.copy(rollout)
    first.episodes = empty
    metrics = algorithm.update(first, 0.0)
    assert "constraint/cost/mean" not in metrics
    context = make()
    algorithm = cpo.CPO(cpo.Config(), context)
    algorithm.update(rollout_of(context), 0.0)
    later = rollout_of(context)
    later.episodes = empty
    assert algorithm.update(later, 0.0)["constraint/cost/mean"] == 50.0


@pytest.mark.parametrize("name", ["cpo", "pcpo"])
def test_a_cost_that_is_zero_everywhere_leaves_trpo(name: str) -> None:
    outcomes = []
    for module, algorithm in ((trpo, "TRPO"), (CONSTRAINED[name], name.upper())):
        context = make()
        rollout = rollout_of(context, cost=0.0, cost_advantages={"cost": torch.zeros(200)})
        getattr(module, algorithm)(module.Config(), context).update(rollout, 0.0)
        outcomes.append(flat(own_parameters(context)))
    torch.testing.assert_close(outcomes[0], outcomes[1])


def test_multiplier_zero_is_trpo_bit_for_bit() -> None:
    outcomes = []
    for build in (
        lambda c: trpo.TRPO(trpo.Config(), c),
        lambda c: trpo_lag.TRPOLag(trpo_lag.Config(multiplier_init=0.0, cost_limit=1e6), c),
    ):
        context = make()
        build(context).update(rollout_of(context), 0.0)
        outcomes.append(flat(own_parameters(context)))
    assert torch.equal(outcomes[0], outcomes[1])


def test_rcpo_takes_the_whole_natural_step() -> None:
    context, twin = make(), make()
    rollout = rollout_of(context)
    rcpo.RCPO(rcpo.Config(multiplier_init=0.0, cost_limit=1e6), context).update(rollout, 0.0)
    update = SecondOrderUpdate(trpo.Config(), twin)
    step, _ = update.natural_step(rollout_of(twin), standardise(rollout.advantages))
    torch.testing.assert_close(flat(own_parameters(context)), update.policy.parameters[0] + step)


@pytest.mark.parametrize(("cost", "on_cost"), [(26.9, 0.0), (27.1, 1.0)])
def test_crpo_switches_at_its_tolerance(cost: float, on_cost: float) -> None:
    context = make()
    rollout = rollout_of(context, cost=cost)
    assert crpo.CRPO(crpo.Config(), context).update(rollout, 0.0)["policy/cost_step"] == on_cost
    _, rise = kl_and_gain(context, rollout, centre(rollout.cost_advantages["cost"]))
    assert (rise < 0) == bool(on_cost)


@pytest.mark.parametrize("name", sorted(CONSTRAINED))
def test_two_limits(name: str) -> None:
    module = CONSTRAINED[name]
    context = make(costs=2)
    config = module.Config(cost_limit={"a": 25.0, "b": 1000.0})
    classes = {"trpo_lag": "TRPOLag", "trpo_pid": "TRPOPID"}
    algorithm = getattr(module, classes.get(name, name.upper()))(config, context)
    rollout = rollout_of(context)
    metrics = algorithm.update(rollout, 0.0)
    assert metrics["constraint/a/violation"] == 25.0
    assert metrics["constraint/b/violation"] == -950.0
    _, rise = kl_and_gain(context, rollout, centre(rollout.cost_advantages["a"]))
    if name in ("cpo", "pcpo", "crpo"):
        assert rise <= 1e-6


def test_critics_are_fitted() -> None:
    context = make()
    rollout = rollout_of(context)
    config = trpo.Config(critic_epochs=20, critic_batch_size=32, critic_lr=1e-2)
    algorithm = trpo.TRPO(config, context)
    losses = [algorithm.update(rollout, 0.0)["loss/value"] for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]


def test_impossible_settings_are_refused() -> None:
    for settings in ({"cg_iterations": 0}, {"target_kl": -1.0}, {"fisher_stride": 0}):
        with pytest.raises(UsageError):
            trpo.Config(**settings)
    with pytest.raises(UsageError):
        crpo.Config(tolerance=-1.0)
