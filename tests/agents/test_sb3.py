"""Stable-Baselines3 under constraints: exact rewards, live multipliers, unchanged algorithms, learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from saferl.constraints import AdditiveMultiplier, Constraint, ConstraintSet
from saferl.envs import make_vec
from saferl.envs.toy import optimal_return
from saferl.errors import CheckpointError, UsageError

pytest.importorskip("stable_baselines3")
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from saferl.agents.sb3 import (
    LagrangianCallback,
    LagrangianReplayBuffer,
    LagrangianVecEnv,
    SB3VecEnv,
    constrained,
    load_constrained,
)

torch.set_num_threads(1)


class Walk(gym.Env[Any, Any]):
    """Random observations; reward and costs follow from the action; ends at 7 steps or, late, at random."""

    def __init__(self, action_space: spaces.Space[Any] | None = None, dictionary: bool = False) -> None:
        box = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.dictionary = dictionary
        self.observation_space = spaces.Dict({"a": box, "b": box}) if dictionary else box
        self.action_space = action_space or box
        self.steps = 0

    def _observe(self) -> Any:
        draw = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return {"a": draw[0], "b": draw[1]} if self.dictionary else draw[0]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        size = float(np.sum(np.square(action)))
        info = {"cost": size, "costs": {"energy": size, "time": 1.0}}
        terminated = bool(self.steps >= 4 and self.np_random.uniform() < 0.3)
        return self._observe(), 1.0 - size / 3, terminated, self.steps >= 7, info


def walks(n: int, **kwargs: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: Walk(**kwargs)] * n)


def limit(name: str, value: float, start: float = 0.0, lr: float = 0.01) -> Constraint:
    return Constraint(name, value, multiplier=AdditiveMultiplier(lr=lr, init=start, optimizer="sgd"))


def slack(*names: str) -> ConstraintSet:
    """Constraints that never bind, so that the multipliers stay at 0."""
    return ConstraintSet([limit(name, 1e9) for name in names])


# --- the reward ------------------------------------------------------------------------------------------


def test_reward_is_the_lagrangian_and_info_keeps_the_parts() -> None:
    constraints = ConstraintSet([limit("energy", 1.0, start=0.5), limit("time", 2.0, start=0.25)])
    env, raw = LagrangianVecEnv(walks(3), constraints), walks(3)
    env.seed(0)
    raw.seed(0)
    np.testing.assert_array_equal(env.reset(), raw.reset())
    rng = np.random.default_rng(0)
    returns, energies, ended = np.zeros(3), np.zeros(3), 0
    for _ in range(30):
        actions = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
        obs, rewards, dones, infos = env.step(actions)
        obs_raw, rewards_raw, dones_raw, infos_raw = raw.step(actions)
        np.testing.assert_array_equal(obs, obs_raw)
        np.testing.assert_array_equal(dones, dones_raw)
        energy = np.array([info["costs"]["energy"] for info in infos_raw])
        np.testing.assert_allclose(rewards, (rewards_raw - 0.5 * energy - 0.25) / 1.75, rtol=1e-6)
        assert rewards.dtype == rewards_raw.dtype
        returns += rewards_raw
        energies += energy
        for i, (info, info_raw) in enumerate(zip(infos, infos_raw, strict=True)):
            assert info["raw_reward"] == rewards_raw[i]
            assert info["costs"] == info_raw["costs"]
            assert ("constraint_episode" in info) == dones[i]
            if dones[i]:
                episode = info["constraint_episode"]
                assert episode["return"] == pytest.approx(returns[i], rel=1e-6)
                assert episode["cost"] == pytest.approx(energies[i])
                assert episode["costs"]["energy"] == pytest.approx(energies[i])
                assert episode["costs"]["time"] == episode["length"]
                assert info["TimeLimit.truncated"] == info_raw["TimeLimit.truncated"]
                returns[i] = energies[i] = 0.0
                ended += 1
    assert ended >= 9


def test_norm_is_passed_on_and_the_plain_cost_has_the_name_cost() -> None:
    constraints = ConstraintSet([limit("cost", 1.0, start=2.0)])
    env = LagrangianVecEnv(walks(1), constraints, norm="none")
    env.reset()
    action = np.array([[0.5, -1.0]], np.float32)
    _, rewards, _, _ = env.step(action)
    assert rewards[0] == pytest.approx(1 - 1.25 / 3 - 2 * 1.25, rel=1e-6)


def test_a_missing_cost_is_named() -> None:
    env = LagrangianVecEnv(walks(1), slack("hazard"))
    env.reset()
    with pytest.raises(UsageError, match=r"'hazard'.*cost, energy, time"):
        env.step(np.zeros((1, 2), np.float32))
    env = LagrangianVecEnv(DummyVecEnv([lambda: gym.make("CartPole-v1")]), slack("cost"))
    env.reset()
    with pytest.raises(UsageError, match='info\\["cost"\\]'):
        env.step(np.zeros(1, np.int64))


# --- algorithms stay what they are -----------------------------------------------------------------------

SMALL = {"seed": 3, "device": "cpu"}
OFF = {**SMALL, "learning_starts": 20, "buffer_size": 64, "batch_size": 16}
VANILLA: dict[str, tuple[Any, str, int, dict[str, Any], dict[str, Any]]] = {
    "ppo": (PPO, "MlpPolicy", 2, {**SMALL, "n_steps": 32, "batch_size": 16, "n_epochs": 2}, {}),
    "sac": (SAC, "MlpPolicy", 2, OFF, {}),
    "sac-nstep": (SAC, "MlpPolicy", 1, {**OFF, "n_steps": 3, "gamma": 0.9}, {}),
    "sac-dict": (SAC, "MultiInputPolicy", 2, OFF, {"dictionary": True}),
    "td3": (TD3, "MlpPolicy", 1, OFF, {}),
    "dqn": (DQN, "MlpPolicy", 2, {**OFF, "train_freq": 1}, {"action_space": spaces.Discrete(3)}),
}


@pytest.mark.parametrize("case", VANILLA)
def test_without_multipliers_it_is_the_algorithm_bit_for_bit(case: str) -> None:
    algorithm, policy, n, kwargs, env_kwargs = VANILLA[case]
    plain = algorithm(policy, walks(n, **env_kwargs), **kwargs).learn(160)
    model, callback = constrained(
        algorithm, policy, walks(n, **env_kwargs), slack("energy", "time"), update_every=2, **kwargs
    )
    model.learn(160, callback=callback)
    assert plain._n_updates == model._n_updates > 0
    weights, expected = model.policy.state_dict(), plain.policy.state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_a_multiplier_changes_what_is_learned() -> None:
    plain = SAC("MlpPolicy", walks(2), **OFF).learn(160)
    constraints = ConstraintSet([limit("energy", 0.0, start=1.0)])
    model, callback = constrained(SAC, "MlpPolicy", walks(2), constraints, **OFF)
    model.learn(160, callback=callback)
    weights = model.policy.state_dict()
    assert not all(torch.equal(weights[key], value) for key, value in plain.policy.state_dict().items())


# --- the replay buffer -----------------------------------------------------------------------------------


def filled_buffer(constraints: ConstraintSet, steps: int, size: int = 40) -> LagrangianReplayBuffer:
    env = LagrangianVecEnv(walks(2), constraints)
    env.seed(1)
    buffer = LagrangianReplayBuffer(size, env.observation_space, env.action_space, "cpu", n_envs=2)
    buffer.bind(constraints)
    obs, rng = env.reset(), np.random.default_rng(2)
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (2, 2)).astype(np.float32)
        after, rewards, dones, infos = env.step(actions)
        buffer.add(obs, after, actions, rewards, dones, infos)
        obs = after
    return buffer


@pytest.mark.parametrize("steps", [7, 20, 33])  # partly filled, just full, wrapped around
def test_the_buffer_serves_the_live_multiplier(steps: int) -> None:
    constraints = ConstraintSet([limit("energy", 1.0, start=0.5), limit("time", 2.0)])
    buffer = filled_buffer(constraints, steps)
    size = buffer.size()
    assert size == min(steps, 20)
    energy = np.square(buffer.actions[:size]).sum(-1)
    raw = 1 - energy / 3
    np.testing.assert_allclose(buffer.raw_rewards[:size], raw, rtol=1e-6)
    np.testing.assert_allclose(buffer.rewards[:size], (raw - 0.5 * energy) / 1.5, rtol=1e-5)
    constraints.observe({"energy": np.array([51.0]), "time": np.array([32.0])})
    constraints.update()
    first, second = constraints.multipliers["energy"], constraints.multipliers["time"]
    assert (first, second) == (pytest.approx(1.0), pytest.approx(0.3))
    batch = buffer.sample(200)
    energy = batch.actions.square().sum(-1, keepdim=True)
    expected = (1 - energy / 3 - first * energy - second) / (1 + first + second)
    torch.testing.assert_close(batch.rewards, expected, rtol=1e-5, atol=1e-6)
    assert np.all(buffer.rewards[size:] == 0.0)


def test_buffer_and_wrapper_give_the_same_reward_to_the_last_bit() -> None:
    constraints = ConstraintSet([limit("energy", 1.0, start=0.37)])
    env = LagrangianVecEnv(walks(2), constraints)
    buffer = LagrangianReplayBuffer(10, env.observation_space, env.action_space, "cpu", n_envs=2)
    buffer.bind(constraints)
    obs = env.reset()
    after, rewards, dones, infos = env.step(np.full((2, 2), 0.3, np.float32))
    buffer.add(obs, after, np.zeros((2, 2)), np.full(2, 99.0), dones, infos)
    np.testing.assert_array_equal(buffer.rewards[0], rewards)


def test_buffers_are_saved_without_the_constraints(tmp_path: Path) -> None:
    constraints = ConstraintSet([limit("energy", 1.0, start=0.5)])
    model, callback = constrained(SAC, "MlpPolicy", walks(2), constraints, **OFF)
    model.learn(60, callback=callback)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    other, _ = constrained(SAC, "MlpPolicy", walks(2), constraints, **OFF)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(UsageError, match="LagrangianCallback"):
        other.replay_buffer.sample(4)
    other.replay_buffer.bind(constraints)
    other.replay_buffer.sample(4)
    np.testing.assert_array_equal(other.replay_buffer.rewards, model.replay_buffer.rewards)
    with pytest.raises(UsageError, match="empty buffer"):
        other.replay_buffer.bind(slack("time"))


# --- the callback ----------------------------------------------------------------------------------------


class Record(Logger):
    """Keeps every value ever recorded."""

    def __init__(self) -> None:
        super().__init__(None, [])
        self.seen: dict[str, list[float]] = {}

    def record(self, key: str, value: Any, exclude: Any = None) -> None:
        self.seen.setdefault(key, []).append(value)
        super().record(key, value, exclude)


def test_on_policy_updates_once_a_rollout_and_logs_raw_episodes() -> None:
    constraints = ConstraintSet([limit("energy", 1.0), limit("time", 3.0)])
    model, callback = constrained(
        PPO, "MlpPolicy", walks(4), constraints, n_steps=16, batch_size=64, n_epochs=1, **SMALL
    )
    logger = Record()
    model.set_logger(logger)
    model.learn(64 * 5, callback=callback)
    assert len(logger.seen["train/return"]) == 5
    assert len(logger.seen["train/cost"]) == 5
    time = logger.seen["constraint/time/mean"]
    assert all(4 <= value <= 7 for value in time)
    # sgd, lr 0.01, limit 3: the multiplier is the sum of what exceeded the limit
    assert constraints.multipliers["time"] == pytest.approx(0.01 * sum(value - 3 for value in time), rel=1e-3)
    assert logger.seen["rollout/ep_rew_mean"]  # raw returns, without a Monitor


def test_no_episode_no_update() -> None:
    constraints = ConstraintSet([limit("time", 0.0)])
    model, callback = constrained(
        PPO, "MlpPolicy", walks(2), constraints, n_steps=2, batch_size=4, n_epochs=1, **SMALL
    )
    model.learn(4, callback=callback)
    assert constraints.multipliers["time"] == 0.0


@pytest.mark.parametrize("update_every", [1, 5])
def test_off_policy_updates_by_episodes(update_every: int) -> None:
    constraints = ConstraintSet([limit("time", 3.0)])
    model, callback = constrained(
        SAC, "MlpPolicy", walks(1), constraints, update_every=update_every, **{**OFF, "learning_starts": 1000}
    )
    logger = Record()
    model.set_logger(logger)
    model.learn(200, callback=callback)
    assert len(logger.seen["train/cost"]) == model._episode_num // update_every
    assert constraints.multipliers["time"] > 0


def test_misuse_is_named() -> None:
    constraints = slack("energy")
    plain = SAC("MlpPolicy", LagrangianVecEnv(walks(1), constraints), **OFF)
    with pytest.raises(UsageError, match="stale multipliers"):
        plain.learn(4, callback=LagrangianCallback(constraints))
    ppo = PPO("MlpPolicy", walks(1), n_steps=8, batch_size=8, **SMALL)
    with pytest.raises(UsageError, match="LagrangianVecEnv"):
        ppo.learn(4, callback=LagrangianCallback(constraints))
    model, _ = constrained(PPO, "MlpPolicy", walks(1), constraints, n_steps=8, batch_size=8, **SMALL)
    with pytest.raises(UsageError, match="same ConstraintSet"):
        model.learn(4, callback=LagrangianCallback(slack("energy")))
    with pytest.raises(UsageError, match="update_every"):
        LagrangianCallback(constraints, update_every=0)
    with pytest.raises(UsageError, match="no environment"):
        constrained(PPO, "MlpPolicy", 3, constraints)
    lonely = LagrangianReplayBuffer(4, Walk().observation_space, Walk().action_space, "cpu")
    with pytest.raises(UsageError, match="LagrangianCallback"):
        lonely.sample(1)


def test_vec_normalize_may_stand_around_it() -> None:
    constraints = ConstraintSet([limit("energy", 0.5, lr=0.1)])
    env = VecNormalize(LagrangianVecEnv(walks(2), constraints))
    model = SAC("MlpPolicy", env, replay_buffer_class=LagrangianReplayBuffer, **OFF)
    model.learn(120, callback=LagrangianCallback(constraints, update_every=3))
    assert constraints.multipliers["energy"] > 0
    buffer = model.replay_buffer
    energy = buffer.costs["energy"][: buffer.size()]
    np.testing.assert_allclose(buffer.raw_rewards[: buffer.size()], 1 - energy / 3, rtol=1e-5)


def test_save_and_continue(tmp_path: Path) -> None:
    def fresh() -> ConstraintSet:
        return ConstraintSet([limit("energy", 0.5), limit("time", 3.0)])

    kwargs = {**SMALL, "n_steps": 32, "batch_size": 32, "n_epochs": 1}
    model, callback = constrained(PPO, "MlpPolicy", walks(2), fresh(), **kwargs)
    callback.save_path = tmp_path / "run.v1"  # a dot in the name is no suffix
    model.learn(128, callback=callback)
    constraints = fresh()
    again, callback = load_constrained(PPO, tmp_path / "run.v1", walks(2), constraints, device="cpu")
    assert constraints.multipliers == model.get_env().constraints.multipliers
    assert constraints.multipliers["time"] > 0
    assert again.num_timesteps == model.num_timesteps
    again.learn(128, callback=callback, reset_num_timesteps=False)
    assert constraints.multipliers["time"] > model.get_env().constraints.multipliers["time"]
    load_constrained(PPO, tmp_path / "run.v1.zip", walks(2), fresh(), device="cpu")
    (tmp_path / "run.v1.constraints.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"constraints\.json"):
        load_constrained(PPO, tmp_path / "run.v1", walks(2), fresh(), device="cpu")
    with pytest.raises(CheckpointError, match=r"none\.zip"):
        load_constrained(PPO, tmp_path / "none", walks(2), fresh(), device="cpu")


def test_off_policy_continues_with_an_empty_buffer(tmp_path: Path) -> None:
    constraints = ConstraintSet([limit("time", 3.0)])
    model, callback = constrained(SAC, "MlpPolicy", walks(2), constraints, update_every=2, **OFF)
    model.learn(60, callback=callback)
    callback.save(tmp_path / "sac")
    reached = constraints.multipliers["time"]
    constraints = ConstraintSet([limit("time", 3.0)])
    model, callback = load_constrained(SAC, tmp_path / "sac", walks(2), constraints, device="cpu")
    model.learn(60, callback=callback, reset_num_timesteps=False)
    assert isinstance(model.replay_buffer, LagrangianReplayBuffer)
    assert constraints.multipliers["time"] > reached > 0


# --- vector environments ---------------------------------------------------------------------------------


def assert_same_observations(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    else:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("engine", ["native", "serial", "gymnasium", "gymnasium-dict"])
def test_vector_environment_equals_stable_baselines_own(engine: str) -> None:
    toy = engine in ("native", "serial")
    dictionary = engine == "gymnasium-dict"
    if toy:
        vector = make_vec("saferl/SpeedLimit-v0", 3, backend="auto" if engine == "native" else "original")
        reference = DummyVecEnv([lambda: gym.make("saferl/SpeedLimit-v0")] * 3)
    else:
        vector = SyncVectorEnv(
            [lambda: Walk(dictionary=dictionary)] * 3, autoreset_mode=AutoresetMode.SAME_STEP
        )
        reference = walks(3, dictionary=dictionary)
    env = SB3VecEnv(vector)
    assert env.observation_space == reference.observation_space
    assert env.action_space == reference.action_space
    env.seed(5)
    reference.seed(5)
    assert_same_observations(env.reset(), reference.reset())
    rng = np.random.default_rng(0)
    ends = set()
    for step in range(230):
        actions = rng.uniform(-0.5, 1.0, (3, *env.action_space.shape)).astype(np.float32)
        if step >= 120:
            actions[0] = -1.0  # SpeedLimit: stalls, which terminates
        obs, rewards, dones, infos = env.step(actions)
        obs_r, rewards_r, dones_r, infos_r = reference.step(actions)
        assert_same_observations(obs, obs_r)
        np.testing.assert_array_equal(rewards, rewards_r)
        assert rewards.dtype == rewards_r.dtype
        np.testing.assert_array_equal(dones, dones_r)
        for i in range(3):
            assert ("terminal_observation" in infos[i]) == dones[i]
            if toy or not dones[i]:
                assert infos[i]["cost"] == infos_r[i]["cost"]
                assert infos[i]["costs"] == infos_r[i]["costs"]
            if dones[i]:
                assert_same_observations(infos[i]["terminal_observation"], infos_r[i]["terminal_observation"])
                assert infos[i]["TimeLimit.truncated"] == infos_r[i]["TimeLimit.truncated"]
                ends.add(infos[i]["TimeLimit.truncated"])
    assert ends == {True, False}
    assert env.get_attr("num_envs") == [3, 3, 3]
    env.close()


def test_unsuitable_vector_environments_are_named() -> None:
    with pytest.raises(UsageError, match="SAME_STEP"):
        SB3VecEnv(SyncVectorEnv([Walk]))


# --- learning --------------------------------------------------------------------------------------------

LIMIT = 25.0


def evaluate(model: Any, episodes: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start speeds, returns and speed costs of deterministic episodes, each of shape (episodes,)."""
    env = make_vec("saferl/SpeedLimit-v0", episodes)
    obs, _ = env.reset(seed=1000)
    start, returns, costs = obs[:, 0], np.zeros(episodes), np.zeros(episodes)
    for _ in range(100):
        obs, rewards, _, _, info = env.step(model.predict(obs, deterministic=True)[0])
        returns += rewards
        costs += info["costs"]["speed"]
    return start, returns, costs


def learn(
    algorithm: Any, constraints: ConstraintSet, seed: int, off_policy_steps: int = 24_000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    common: dict[str, Any] = {"seed": seed, "device": "cpu", "policy_kwargs": {"net_arch": [32, 32]}}
    if algorithm is PPO:
        common |= {"n_steps": 200, "batch_size": 400, "learning_rate": 1e-3, "num_envs": 16}
        steps = 100_000
    else:
        common |= {"learning_rate": 2e-3, "batch_size": 128, "gamma": 0.97, "learning_starts": 800}
        common |= {
            "train_freq": 4,
            "gradient_steps": 4,
            "buffer_size": 50_000,
            "num_envs": 8,
            "update_every": 8,
        }
        steps = off_policy_steps
    model, callback = constrained(algorithm, "MlpPolicy", "saferl/SpeedLimit-v0", constraints, **common)
    model.learn(steps, callback=callback)
    return evaluate(model)


@pytest.mark.parametrize(("algorithm", "seed"), [(PPO, 0), (PPO, 1), (SAC, 0)])
def test_keeps_the_limit_and_drives_well_under_it(algorithm: Any, seed: int) -> None:
    lr = 0.0005 if algorithm is PPO else 0.002
    start, returns, costs = learn(algorithm, ConstraintSet([limit("speed", LIMIT, lr=lr)]), seed)
    assert costs.mean() <= 1.3 * LIMIT
    assert returns.mean() >= 0.95 * optimal_return(start, costs.mean()).mean()
    assert returns.mean() >= 9.0


@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_the_same_algorithm_without_constraint_breaks_the_limit(algorithm: Any) -> None:
    _, returns, costs = learn(algorithm, slack("speed"), 0, off_policy_steps=12_000)
    assert costs.mean() > 2 * LIMIT
    assert returns.mean() > 15
