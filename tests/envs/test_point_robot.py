"""PointRobot: the worked example, N environments are N singles, the state restores, who can escape."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from saferl.envs import StatefulVectorEnv, make_vec
from saferl.envs.point_robot import (
    GOAL,
    HAZARDS,
    START,
    PointRobotEnv,
    PointRobotVectorEnv,
    advance,
    constraint,
    escapes,
)
from saferl.errors import UsageError


def test_the_worked_example():
    env = PointRobotVectorEnv(2)
    obs, _ = env.reset()
    expected = [-1.8, 0, 2, 0.707107, 0.707107, 2.505993, 0.282166, -0.959366, 1.843909, 0.997054, -0.076696]
    np.testing.assert_allclose(obs, [expected] * 2, atol=1e-6)
    assert constraint(START) == pytest.approx(-1.0439089, abs=1e-7)
    _, rewards, *_, info = env.step(np.zeros((2, 2)))
    np.testing.assert_allclose(env.states[0], [-1.7292893, 0.0707107, 2, np.pi / 4], atol=1e-7)
    np.testing.assert_allclose(rewards, 0.0959477, atol=1e-7)
    assert info["cost"].tolist() == [0, 0]


def test_a_vector_equals_separate_environments():
    vector = PointRobotVectorEnv(4, random_start=True)
    singles = [gym.make("saferl/PointRobot-v0", random_start=True) for _ in range(4)]
    obs, _ = vector.reset(seed=5)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(env.reset(seed=5 + i)[0], obs[i])
    rng = np.random.default_rng(0)
    ends = costly = 0
    for _ in range(400):
        actions = rng.uniform(-1.5, 1.5, (4, 2))
        obs, rewards, terminations, truncations, info = vector.step(actions)
        for i, env in enumerate(singles):
            one, reward, terminated, truncated, one_info = env.step(actions[i])
            assert (reward, terminated, truncated) == (rewards[i], terminations[i], truncations[i])
            assert (one_info["cost"], one_info["constraint"]) == (info["cost"][i], info["constraint"][i])
            costly += one_info["cost"] > 0
            if terminated or truncated:
                ends += 1
                np.testing.assert_array_equal(one, info["final_obs"][i])
                one, _ = env.reset()
            np.testing.assert_array_equal(one, obs[i])
    assert ends > 4
    assert costly > 0


def test_the_end_of_an_episode():
    env = PointRobotVectorEnv(3)
    env.reset()
    state = env.get_state()
    state["states"] = np.array([[*(GOAL - [0.35, 0]), 1.5, 0], [2.99, -1, 1, 0], [*HAZARDS[0], 0, 0]])
    state["steps"][2] = 299
    env.set_state(state)
    _, rewards, terminations, truncations, info = env.step(np.zeros((3, 2)))
    assert terminations.tolist() == [True, True, False]
    assert truncations.tolist() == [False, False, True]
    assert rewards[0] == pytest.approx(1.075)
    assert info["cost"].tolist() == [0, 0, 1]
    assert info["constraint"][2] == pytest.approx(0.8)
    assert np.isfinite(info["final_obs"]).all()
    np.testing.assert_array_equal(env.states, [START] * 3)


def test_the_state_restores():
    env = make_vec("PointRobot-v0", 3, random_start=True)
    assert isinstance(env, StatefulVectorEnv)
    env.reset(seed=1)
    other = PointRobotVectorEnv(3, random_start=True)
    other.reset(seed=9)
    other.set_state(env.get_state())
    rng = np.random.default_rng(1)
    for _ in range(310):
        actions = rng.uniform(-1, 1, (3, 2))
        for a, b in zip(env.step(actions)[:4], other.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(UsageError, match="3 environments, this one 2"):
        PointRobotVectorEnv(2).set_state(env.get_state())


def test_feasibility_is_what_the_manoeuvre_does():
    rng = np.random.default_rng(2)
    states = rng.uniform([-3, -3, -0.2, -4], [3, 3, 2, 4], (2000, 4))
    found = escapes(states)
    for state, escaped in zip(states[:300], found, strict=False):
        assert escaped == _escapes_one(state)
    assert 0.3 < found.mean() < 0.95
    assert (constraint(states[found]) <= 0).all()
    assert escapes(START)
    assert not escapes(advance(START, [0, 0]))
    assert not escapes([-1.5, 0, 2, np.pi / 4])
    assert escapes(states.reshape(40, 50, 4)).shape == (40, 50)


def _escapes_one(state):
    for hazard in HAZARDS:
        x, y, v, theta = state
        offset = hazard - [x, y]
        if np.linalg.norm(offset) <= 0.8:
            return False
        heading = np.sign(v) * np.array([np.cos(theta), np.sin(theta)])
        along, across = heading @ offset, heading[0] * offset[1] - heading[1] * offset[0]
        if along <= 0 or abs(across) > 0.8:
            continue
        moving = np.array(state)
        while moving[2] > 0:
            moving = advance(moving, [-1, -1 if across >= 0 else 1])
            if np.linalg.norm(hazard - moving[:2]) <= 0.8:
                return False
    return True


def test_it_is_a_gymnasium_environment():
    check_env(PointRobotEnv(), skip_render_check=True)
    assert make_vec("PointRobot-v0", 2).metadata["backend"] == "native"
    with pytest.raises(UsageError, match=r"\(2, 2\)"):
        PointRobotVectorEnv(2).step(np.zeros((2, 1)))
    with pytest.raises(UsageError, match="300 steps"):
        PointRobotVectorEnv(2, max_episode_steps=10)
