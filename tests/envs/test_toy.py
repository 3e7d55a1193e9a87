"""SpeedLimit: N environments are N singles, the state restores, and the stated optimum is attained."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import saferl.envs
from saferl.envs import StatefulVectorEnv, make_vec
from saferl.envs.toy import DT, EPISODE_STEPS, SpeedLimitEnv, SpeedLimitVectorEnv, optimal_return
from saferl.errors import UsageError


def test_a_vector_equals_separate_environments():
    vector = SpeedLimitVectorEnv(5)
    singles = [gym.make("saferl/SpeedLimit-v0") for _ in range(5)]
    obs, _ = vector.reset(seed=11)
    single_obs = [env.reset(seed=11 + i)[0] for i, env in enumerate(singles)]
    np.testing.assert_array_equal(obs, np.stack(single_obs))
    rng = np.random.default_rng(0)
    stalls = cuts = 0
    for _ in range(350):
        actions = rng.uniform(-1.3, 1.2, (5, 1)).astype(np.float32)
        obs, rewards, terminations, truncations, info = vector.step(actions)
        for i, env in enumerate(singles):
            one, reward, terminated, truncated, one_info = env.step(actions[i])
            assert (reward, terminated, truncated) == (rewards[i], terminations[i], truncations[i])
            assert one_info["cost"] == info["cost"][i]
            assert one_info["costs"] == {name: values[i] for name, values in info["costs"].items()}
            if terminated or truncated:
                assert info["_final_obs"][i]
                np.testing.assert_array_equal(one, info["final_obs"][i])
                stalls, cuts = stalls + terminated, cuts + truncated
                one, _ = env.reset()
            np.testing.assert_array_equal(one, obs[i])
    assert stalls > 0
    assert cuts > 0


def test_serial_and_process_backends_equal_the_native_one():
    envs = [make_vec("SpeedLimit-v0", 3), make_vec("SpeedLimit-v0", 3, backend="original")]
    assert type(envs[0]) is SpeedLimitVectorEnv
    assert type(envs[1]) is saferl.envs.SerialVectorEnv
    first, second = (env.reset(seed=4)[0] for env in envs)
    np.testing.assert_array_equal(first, second)
    rng = np.random.default_rng(1)
    for _ in range(120):
        actions = rng.uniform(-1, 1, (3, 1)).astype(np.float32)
        a, b = (env.step(actions) for env in envs)
        for x, y in zip(a[:4], b[:4], strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        np.testing.assert_array_equal(a[4]["cost"], b[4]["cost"])
        assert a[4].keys() == b[4].keys()


def test_the_state_restores_the_future_bit_for_bit():
    env = SpeedLimitVectorEnv(4)
    assert isinstance(env, StatefulVectorEnv)
    env.reset(seed=3)
    rng = np.random.default_rng(2)
    actions = rng.uniform(-1, 1, (300, 4, 1)).astype(np.float32)
    for action in actions[:70]:
        env.step(action)
    state = env.get_state()
    # through JSON, as a checkpoint stores it
    stored = {k: v if isinstance(v, np.ndarray) else json.loads(json.dumps(v)) for k, v in state.items()}
    expected = [env.step(action) for action in actions[70:]]
    other = SpeedLimitVectorEnv(4)
    other.set_state(stored)
    for action, (obs, rewards, terminations, truncations, info) in zip(actions[70:], expected, strict=True):
        got = other.step(action)
        np.testing.assert_array_equal(got[0], obs)
        np.testing.assert_array_equal(got[1], rewards)
        np.testing.assert_array_equal(got[2], terminations)
        np.testing.assert_array_equal(got[3], truncations)
        np.testing.assert_array_equal(got[4]["cost"], info["cost"])
    with pytest.raises(UsageError, match="stored state has 4 environments, this one 2"):
        SpeedLimitVectorEnv(2).set_state(state)


@pytest.mark.parametrize("limit", [0.0, 7.0, 25.0, 1e9])
def test_the_stated_optimum_is_attained_and_not_exceeded(limit):
    """Full throttle to the limit, then spend the allowance: the scripted driver returns the bound."""
    env = SpeedLimitVectorEnv(6)
    obs, _ = env.reset(seed=0)
    start = env.get_state()["speed"]
    spent, total = np.zeros(6), np.zeros(6)
    for step in range(EPISODE_STEPS):
        speed = env.get_state()["speed"]
        # the fastest next speed whose excess the rest of the allowance covers
        target = np.minimum(1.0 + np.maximum(0.0, limit - spent), 2.0)
        actions = np.clip((target - speed) / DT, -1, 1)[:, None]
        obs, rewards, terminations, truncations, info = env.step(actions)
        spent += info["costs"]["speed"]
        total += rewards
        assert not terminations.any()
        assert truncations.all() == (step == EPISODE_STEPS - 1)
    # Slowing down again takes a few steps; what they cost beyond the allowance is counted as allowance.
    assert (spent <= limit + 5).all()
    bounds = np.array([float(optimal_return(v, s)) for v, s in zip(start, spent, strict=True)])
    np.testing.assert_allclose(total, bounds, atol=1e-9)
    assert info["final_obs"][0, 1] == 0.0
    assert obs[0, 1] == 1.0


def test_worked_examples_of_the_optimum():
    # v0 = .5: .6 .7 .8 .9 (sum 3.0, 1.0 short of the limit), then 1.0 1.1 ... 1.9 (14.5), then 86 x 2.0
    assert float(optimal_return(0.5, 0.0)) == pytest.approx(0.1 * (100 - 1.0))
    assert float(optimal_return(0.5, 25.0)) == pytest.approx(9.9 + 2.5)
    assert float(optimal_return(0.5)) == pytest.approx(0.1 * (3.0 + 14.5 + 2 * 86))
    grid = optimal_return(np.linspace(0.3, 0.7, 1001), 0.0)
    assert grid.shape == (1001,)
    assert abs(grid.mean() - 9.9) < 0.01
    with pytest.raises(UsageError, match="cost_limit is -1"):
        optimal_return(0.5, -1)


def test_random_drivers_never_exceed_the_bound():
    env = SpeedLimitVectorEnv(64)
    env.reset(seed=5)
    start = env.get_state()["speed"]
    rng = np.random.default_rng(5)
    bias = rng.uniform(-0.1, 1.0, (64, 1))
    alive, total, spent = np.ones(64, bool), np.zeros(64), np.zeros(64)
    for _ in range(EPISODE_STEPS):
        _, rewards, terminations, truncations, info = env.step(
            np.clip(bias + rng.normal(0, 1, (64, 1)), -1, 1)
        )
        total += rewards * alive
        spent += info["cost"] * alive
        alive &= ~(terminations | truncations)
    bounds = np.array([float(optimal_return(v, s)) for v, s in zip(start, spent, strict=True)])
    assert (total <= bounds + 1e-9).all()
    assert spent.max() > 50
    assert spent.min() < 1


def test_gymnasium_and_stable_baselines3_accept_it():
    check_env(gym.make("saferl/SpeedLimit-v0").unwrapped)
    check_env_sb3(SpeedLimitEnv())
    vector = gym.make_vec("saferl/SpeedLimit-v0", 3)
    assert isinstance(vector.unwrapped, SpeedLimitVectorEnv)
    assert gym.spec("saferl/SpeedLimit-v0").max_episode_steps == EPISODE_STEPS


def test_wrong_shapes_and_numbers_are_told():
    env = SpeedLimitVectorEnv(2)
    env.reset(seed=0)
    with pytest.raises(UsageError, match=r"shape \(2,\); this environment takes \(2, 1\)"):
        env.step(np.zeros(2))
    with pytest.raises(UsageError, match="num_envs is 0; ask for at least one environment"):
        SpeedLimitVectorEnv(0)
    with pytest.raises(UsageError, match="not 50"):
        SpeedLimitVectorEnv(2, max_episode_steps=50)


def test_a_masked_reset_restarts_the_selected_cars_alone():
    env, other = SpeedLimitVectorEnv(4), SpeedLimitVectorEnv(4)
    for each in (env, other):
        each.reset(seed=3)
        for _ in range(5):
            before = each.step(np.ones((4, 1)))[0]
    mask = np.array([True, False, True, False])
    obs, _ = env.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(obs[~mask], before[~mask])
    np.testing.assert_array_equal(obs[mask, 1:], [[1, 0], [1, 0]])
    full, _ = other.reset()  # the same generators go on
    np.testing.assert_array_equal(obs[mask], full[mask])
    seeded, _ = env.reset(seed=3, options={"reset_mask": ~mask})
    np.testing.assert_array_equal(seeded[mask], obs[mask])
    np.testing.assert_array_equal(seeded[~mask], SpeedLimitVectorEnv(4).reset(seed=3)[0][~mask])
    again, _ = env.reset(seed=3, options={"reset_mask": torch.as_tensor(~mask)})
    np.testing.assert_array_equal(again, seeded)
    with pytest.raises(UsageError, match=r"reset_mask has shape \(2,\) and type bool; give 4 booleans"):
        env.reset(options={"reset_mask": np.array([True, False])})
