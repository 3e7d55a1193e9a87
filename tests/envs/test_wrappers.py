"""Saute and EarlyTermination: what the policy sees, what it is paid, who is reset, and that nothing leaks."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from saferl.constraints import CostBudget, discounted_limit
from saferl.envs import SerialVectorEnv, StatefulVectorEnv, make_vec
from saferl.envs.toy import SpeedLimitVectorEnv
from saferl.envs.wrappers import EarlyTermination, Saute
from saferl.errors import UsageError

D1000 = 15.8076  # discounted_limit(25, 0.999, 1000)


class Scripted(VectorEnv):
    """Costs by a table (T, N) and a second cost of twice as much; episodes are cut after `horizon` steps.

    The observation counts the steps of the episode; the reward is 10 times the environment's number plus 1.
    With `device` everything is a torch tensor, as of an engine on an accelerator.
    """

    def __init__(
        self, costs: Any, horizon: int = 1000, device: str | None = None, stall: bool = False
    ) -> None:
        self.table = np.atleast_2d(np.asarray(costs, float).T).T
        self.num_envs = n = self.table.shape[1]
        self.horizon, self.stall = horizon, stall
        self.single_observation_space = spaces.Box(-1e3, 1e3, (1,), np.float32)
        self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "cost_names": ("single", "double")}
        self.clock, self.count, self.resets = 0, np.zeros(n, int), []
        if device is not None:
            self.torch_device = torch.device(device)

    def _out(self, values: Any) -> Any:
        return torch.as_tensor(np.array(values)) if hasattr(self, "torch_device") else np.array(values)

    def _observe(self) -> Any:
        return self._out(self.count[:, None].astype(np.float32))

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        mask = np.ones(self.num_envs, bool)
        if options is not None:
            given_mask = options["reset_mask"]
            assert isinstance(given_mask, torch.Tensor) == hasattr(self, "torch_device")
            mask = np.asarray(given_mask)
            self.resets.append(mask.tolist())
        self.count[mask] = 0
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        cost = self.table[self.clock]
        self.clock += 1
        self.count += 1
        ended = self.count >= self.horizon
        obs = self._observe()
        reward = 10.0 * np.arange(self.num_envs) + 1
        terminated, truncated = (ended, ended & False) if self.stall else (ended & False, ended)
        info = {
            "cost": self._out(cost),
            "costs": {"single": self._out(cost), "double": self._out(2 * cost)},
        }
        if ended.any():
            info |= {"final_obs": obs, "_final_obs": self._out(ended)}
            self.count[ended] = 0
            obs = self._observe()
        return obs, self._out(reward), self._out(terminated), self._out(truncated), info


def play(env: VectorEnv, steps: int) -> list[tuple[Any, ...]]:
    env.reset(seed=0)
    return [env.step(np.zeros((env.num_envs, 1), np.float32)) for _ in range(steps)]


# --- Saute ------------------------------------------------------------------------------------------------


def test_worked_numbers_of_the_budget() -> None:
    assert discounted_limit(25, 0.999, 1000) == pytest.approx(D1000, abs=5e-5)
    env = Saute(Scripted([0, 1, 1, 0, 5]), {"cost": 25.0}, horizon=1000)
    seen = [obs[0, 1] for obs, *_ in play(env, 5)]
    np.testing.assert_allclose(seen, [1.001001, 0.938679, 0.876295, 0.877172, 0.561430], atol=2e-6)


def test_a_budget_of_25_lasts_for_15_costly_steps() -> None:
    env = Saute(Scripted(np.ones(20)), {"cost": 25.0}, horizon=1000, unsafe_reward=-0.2)
    rewards = [step[1][0] for step in play(env, 20)]
    assert rewards == [1.0] * 15 + [-0.2] * 5


def test_without_discount_the_budget_is_the_share_left() -> None:
    costs = np.random.default_rng(0).uniform(0, 2, 30)
    env = Saute(Scripted(costs), {"cost": 25.0}, discount=1.0)  # and no horizon is needed
    left = [step[0][0, 1] for step in play(env, 30)]
    np.testing.assert_allclose(left, 1 - np.cumsum(costs) / 25, rtol=1e-6, atol=1e-6)


@given(z=st.floats(0, 5), extra=st.floats(0, 5), discount=st.floats(0.5, 1))
def test_a_budget_does_not_grow_when_more_is_spent_than_it_gains(
    z: float, extra: float, discount: float
) -> None:
    budget = CostBudget(25.0, discount, 100)
    cost = budget.allowance * (1 - discount) * z + extra
    assert budget.spend(z, cost) <= z + 1e-9


def test_the_final_observation_shows_the_finished_episodes_budget() -> None:
    env = Saute(Scripted(np.full((7, 2), [1.0, 2.0]), horizon=3), {"cost": 10.0}, discount=1.0)
    steps = play(env, 7)
    obs, _, _, truncated, info = steps[2]
    assert truncated.all()
    np.testing.assert_allclose(info["final_obs"], [[3, 0.7], [3, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(obs, [[0, 1], [0, 1]])
    np.testing.assert_allclose(steps[3][0], [[1, 0.9], [1, 0.8]], rtol=1e-6)
    assert "final_obs" not in steps[3][4]


def test_rewards_as_paid_and_as_they_were_and_costs_untouched() -> None:
    env = Saute(Scripted([[1, 0], [1, 0], [1, 0]]), {"cost": 2.0}, discount=1.0, unsafe_reward=-5.0)
    steps = play(env, 3)
    assert [s[1].tolist() for s in steps] == [[1, 11], [-5, 11], [-5, 11]]
    assert [s[4]["unwrapped_reward"].tolist() for s in steps] == [[1, 11]] * 3
    assert [s[4]["cost"].tolist() for s in steps] == [[1, 0]] * 3
    assert steps[0][1].dtype == np.float64


def test_several_limits_have_a_budget_each_and_any_makes_unsafe() -> None:
    limits = {"double": 5.0, "cost": 10.0}
    steps = play(Saute(Scripted([1, 1, 1]), limits, discount=1.0, unsafe_reward=0.0), 3)
    np.testing.assert_allclose([s[0][0, 1:] for s in steps], [[0.6, 0.9], [0.2, 0.8], [-0.2, 0.7]], rtol=1e-6)
    assert [s[1][0] for s in steps] == [1, 1, 0]


def test_the_horizon_is_the_environments_own() -> None:
    env = Saute(make_vec("SpeedLimit-v0", 2), {"cost": 25.0}, discount=0.99)
    assert env.budgets["cost"].allowance == pytest.approx(discounted_limit(25, 0.99, 100))
    assert Saute(env.env, {"cost": 25.0}, horizon=7).budgets["cost"].horizon == 7
    with pytest.raises(UsageError, match="give the horizon"):
        Saute(SpeedLimitVectorEnv(2), {"cost": 25.0})


def test_impossible_budgets_are_told() -> None:
    env = make_vec("SpeedLimit-v0", 2)
    with pytest.raises(UsageError, match="did you mean 'speed'"):
        Saute(env, {"sped": 1.0})
    with pytest.raises(UsageError, match="must be positive"):
        Saute(env, {"cost": 0.0})
    with pytest.raises(UsageError, match="start budget"):
        Saute(env, {"cost": 1.0}, start=0.0)


class _Shown(gym.Env):
    def __init__(self, space: spaces.Space) -> None:
        self.observation_space, self.action_space = space, spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(0)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 1.0, False, True, {"cost": 1.0}


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.Box(-1, 1, (3,), np.float64), "Box(4,) float64"),
        (spaces.Box(0, 9, (3,), np.uint8), "Box(4,) float32"),
        (spaces.Box(0, 1, (2, 2), np.float32), "Tuple(Box, Box)"),
        (spaces.Discrete(3), "Tuple(Discrete, Box)"),
        (spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2))), "Tuple(Discrete, MultiBinary, Box)"),
        (spaces.Dict(z=spaces.Discrete(3), a=spaces.Box(0, 1, (1,), np.float32)), "Dict(z, a, budget)"),
    ],
)
def test_observations_of_every_kind_are_augmented(space: spaces.Space, expected: str) -> None:
    env = Saute(SerialVectorEnv([lambda: _Shown(space)] * 3), {"cost": 4.0}, discount=1.0)
    shown = env.single_observation_space
    match shown:
        case spaces.Box():
            text = f"Box{shown.shape} {shown.dtype}"
        case spaces.Tuple():
            text = f"Tuple({', '.join(type(s).__name__ for s in shown.spaces)})"
        case spaces.Dict():
            text = f"Dict({', '.join(shown.spaces)})"
    assert sorted(text) == sorted(expected)  # Gymnasium orders a Dict's keys
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    obs, *_, info = env.step(np.zeros(3, int))
    for batch, left in ((obs, 1.0), (info["final_obs"], 0.75)):
        assert env.observation_space.contains(batch)
        budget = (
            batch["budget"] if isinstance(batch, dict) else batch[-1] if isinstance(batch, tuple) else batch
        )
        assert (budget[:, -1] == left).all()


def test_an_observation_named_budget_is_not_overwritten() -> None:
    space = spaces.Dict(budget=spaces.Discrete(2))
    with pytest.raises(UsageError, match="already have an entry 'budget'"):
        Saute(SerialVectorEnv([lambda: _Shown(space)]), {"cost": 4.0}, discount=1.0)


def test_a_moved_start_holds_for_the_episodes_that_begin_afterwards() -> None:
    env = Saute(Scripted(np.ones((6, 2)), horizon=3), {"cost": 10.0}, discount=1.0, start=0.5)
    env.reset()
    env.step(np.zeros((2, 1)))
    env.start["cost"] = 0.8
    assert env.left["cost"].tolist() == pytest.approx([0.4, 0.4])
    env.step(np.zeros((2, 1)))
    *_, info = env.step(np.zeros((2, 1)))
    np.testing.assert_allclose(info["final_obs"][:, 1], 0.2, rtol=1e-6)
    assert env.left["cost"].tolist() == [0.8, 0.8]


def test_a_reset_of_some_fills_their_budgets_alone() -> None:
    env = Saute(Scripted(np.ones((6, 3))), {"cost": 10.0}, discount=1.0)
    env.reset()
    env.step(np.zeros((3, 1)))
    obs, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_allclose(obs, [[1, 0.9], [0, 1], [1, 0.9]], rtol=1e-6)


# --- EarlyTermination -------------------------------------------------------------------------------------


def test_only_who_exceeds_the_limit_is_ended_and_unpaid() -> None:
    costs = np.array([[1, 0, 2], [1, 0, 2], [1, 0, 2], [1, 0, 2]])
    inner = Scripted(costs)
    env = EarlyTermination(inner, {"cost": 3.0})
    steps = play(env, 4)
    assert [s[2].tolist() for s in steps] == [
        [False] * 3,
        [False, False, True],
        [False] * 3,
        [True, False, True],
    ]
    assert not any(s[3].any() for s in steps)
    assert steps[1][1].tolist() == [1, 11, 0]
    assert steps[1][4]["unwrapped_reward"].tolist() == [1, 11, 21]
    assert steps[1][4]["cost"].tolist() == [1, 0, 2]
    assert steps[1][4]["final_obs"].tolist() == [[2], [2], [2]]
    assert steps[1][4]["_final_obs"].tolist() == [False, False, True]
    assert steps[1][0].tolist() == [[2], [2], [0]]
    assert inner.resets == [[False, False, True], [True, False, True]]
    assert env.spent["cost"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("stall", [False, True])
def test_nothing_leaks_into_the_episode_after_an_end_of_any_kind(stall: bool) -> None:
    """A counter that outlived a time-out would end the second episode at its first step."""
    env = EarlyTermination(Scripted(np.ones((8, 2)), horizon=3, stall=stall), {"cost": 3.0})
    steps = play(env, 8)
    assert env.env.resets == []
    assert [bool(s[2].any() | s[3].any()) for s in steps] == [False, False, True] * 2 + [False, False]


def test_exceeding_at_the_time_limit_is_a_termination_with_one_reset() -> None:
    inner = Scripted(np.ones((4, 2)) * [1, 2], horizon=3)
    obs, rewards, terminated, truncated, info = play(EarlyTermination(inner, {"cost": 5.0}), 3)[-1]
    assert terminated.tolist() == [False, True]
    assert truncated.tolist() == [True, False]
    assert rewards.tolist() == [1, 0]
    assert inner.resets == []
    assert info["_final_obs"].all()
    assert info["final_obs"].tolist() == [[3], [3]]
    assert obs.tolist() == [[0], [0]]


def test_any_of_several_limits_ends_the_episode() -> None:
    steps = play(EarlyTermination(Scripted([1, 1, 1]), {"cost": 100.0, "double": 3.0}), 3)
    assert [bool(s[2][0]) for s in steps] == [False, True, False]


@pytest.mark.parametrize("wrapper", [Saute, EarlyTermination])
@pytest.mark.parametrize("processes", [None, 0, 2])
def test_n_environments_are_n_single_runs(wrapper: Any, processes: int | None) -> None:
    """With the batched engine, with single environments in this process, and in workers."""

    def make(n: int) -> VectorEnv:
        if processes is None:
            return wrapper(make_vec("SpeedLimit-v0", n), {"cost": 4.0, "throttle": 20.0})
        env = make_vec("SpeedLimit-v0", n, backend="original", processes=processes)
        return wrapper(env, {"cost": 4.0, "throttle": 20.0})

    many, alone = make(3), [make(1) for _ in range(3)]
    obs, _ = many.reset(seed=5)
    np.testing.assert_array_equal(obs, np.concatenate([e.reset(seed=5 + i)[0] for i, e in enumerate(alone)]))
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(250):
        actions = rng.uniform(-0.5, 1.3, (3, 1)).astype(np.float32)
        obs, *rest, info = many.step(actions)
        ends += int((rest[1] | rest[2]).sum())
        for i, env in enumerate(alone):
            one_obs, *one_rest, one_info = env.step(actions[i : i + 1])
            np.testing.assert_array_equal(one_obs[0], obs[i])
            assert [x[0] for x in one_rest] == [x[i] for x in rest]
            assert one_info["unwrapped_reward"][0] == info["unwrapped_reward"][i]
            if one_rest[1][0] or one_rest[2][0]:
                np.testing.assert_array_equal(one_info["final_obs"][0], info["final_obs"][i])
    assert ends > 5
    for env in (many, *alone):
        env.close()


def test_the_environments_that_go_on_do_not_notice() -> None:
    """Beside a car that is stopped again and again, another drives as it would alone."""
    env = EarlyTermination(make_vec("SpeedLimit-v0", 2), {"cost": 1.0})
    plain = make_vec("SpeedLimit-v0", 1)
    env.reset(seed=[1, 2])
    plain.reset(seed=2)
    for _ in range(220):
        obs, _, terminated, _, _ = env.step(np.array([[1.0], [0.02]]))
        expected = plain.step(np.array([[0.02]]))[0]
        np.testing.assert_array_equal(obs[1], expected[0])
        assert not terminated[1]


# --- what both have in common ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [Saute, EarlyTermination])
def test_the_state_restores_the_future_bit_for_bit(wrapper: Any) -> None:
    env = wrapper(make_vec("SpeedLimit-v0", 4), {"cost": 4.0})
    assert isinstance(env, StatefulVectorEnv)
    env.reset(seed=3)
    actions = np.random.default_rng(1).uniform(-0.5, 1.3, (200, 4, 1)).astype(np.float32)
    for action in actions[:57]:
        env.step(action)
    if wrapper is Saute:
        env.start["cost"] = 0.7
    # As a checkpoint gives it back: arrays as tensors, and nothing shared with the environment.
    state = copy.deepcopy(env.get_state())
    state["account"] = {name: torch.as_tensor(values) for name, values in state["account"].items()}
    expected = [env.step(action) for action in actions[57:]]
    other = wrapper(make_vec("SpeedLimit-v0", 4), {"cost": 4.0})
    other.reset(seed=9)
    other.set_state(state)
    for action, (obs, rewards, terminated, truncated, _) in zip(actions[57:], expected, strict=True):
        got = other.step(action)
        for a, b in zip(got[:4], (obs, rewards, terminated, truncated), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(UsageError, match="use the same names"):
        wrapper(make_vec("SpeedLimit-v0", 4), {"speed": 4.0}).set_state(state)


@pytest.mark.parametrize("wrapper", [Saute, EarlyTermination])
def test_an_environment_without_state_stays_without(wrapper: Any) -> None:
    env = wrapper(make_vec("SpeedLimit-v0", 2, backend="original"), {"cost": 4.0})
    assert not hasattr(env, "get_state")
    assert not isinstance(env, StatefulVectorEnv)
    assert env.metadata["cost_names"] == ("speed", "throttle")
    assert env.spec.id == "saferl/SpeedLimit-v0"


@pytest.mark.parametrize("wrapper", [Saute, EarlyTermination])
def test_tensors_stay_tensors_with_the_same_numbers(wrapper: Any) -> None:
    costs = np.random.default_rng(2).uniform(0, 1, (40, 3))
    options = {"horizon": 1000} if wrapper is Saute else {}
    arrays = wrapper(Scripted(costs, horizon=7), {"cost": 3.0, "double": 5.0}, **options)
    tensors = wrapper(Scripted(costs, horizon=7, device="cpu"), {"cost": 3.0, "double": 5.0}, **options)
    assert tensors.torch_device == torch.device("cpu")
    for a, b in zip(play(arrays, 40), play(tensors, 40), strict=True):
        for x, y in zip(a[:4], b[:4], strict=True):
            assert isinstance(y, torch.Tensor)
            np.testing.assert_array_equal(x, y.numpy())
        assert a[4].keys() == b[4].keys()
        for name in ("final_obs", "_final_obs", "reward"):
            if name in a[4]:
                np.testing.assert_array_equal(a[4][name], b[4][name].numpy())


def test_wrappers_can_be_stacked() -> None:
    env = EarlyTermination(
        Saute(Scripted(np.ones((6, 2)) * [1, 2]), {"cost": 4.0}, discount=1.0, unsafe_reward=-1.0),
        {"cost": 4.0},
    )
    steps = play(env, 3)
    assert [s[1].tolist() for s in steps] == [[1, 11], [1, -1], [1, 0]]
    assert [s[4]["unwrapped_reward"].tolist() for s in steps] == [[1, 11]] * 3
    np.testing.assert_allclose(steps[2][0], [[3, 0.25], [0, 1]])
    np.testing.assert_allclose(steps[2][4]["final_obs"], [[3, 0.25], [3, -0.5]])
