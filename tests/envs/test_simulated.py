"""The batched MuJoCo engine against the original package on the same MuJoCo (see `compat`)."""

import copy
import importlib.util
import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from saferl.envs import StatefulVectorEnv, safety_gym
from saferl.envs.safety_gym import compat
from saferl.envs.safety_gym.simulated import SimulatedVectorEnv
from saferl.envs.vector import SerialVectorEnv
from saferl.errors import MissingPackageError, SaferlError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date.*:DeprecationWarning")


def make(name, num_envs=2, *, exact=True, threads=1, **kwargs):
    return SimulatedVectorEnv(f"Safety{name}", num_envs, exact=exact, threads=threads, **kwargs)


def make_serial(name, num_envs=2, max_episode_steps=None):
    spec = f"saferl/Safety{name}"
    kwargs = {"disable_env_checker": True, "max_episode_steps": max_episode_steps}
    return SerialVectorEnv([lambda: gym.make(spec, **kwargs)] * num_envs)


def assert_same_step(ours, original):
    """All that a step returns, bit for bit."""
    for a, b in zip(ours[:4], original[:4], strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    a, b = ours[4], original[4]
    assert a["cost"].dtype == np.float64
    np.testing.assert_array_equal(a["cost"], b["cost"])
    assert a["costs"].keys() == b["costs"].keys()
    for name, cost in b["costs"].items():
        np.testing.assert_array_equal(a["costs"][name], cost)
    assert ("final_obs" in a) == ("final_obs" in b)
    ended = np.zeros(len(a["cost"]), bool)
    if "final_obs" in a:
        ended = b["_final_obs"]
        np.testing.assert_array_equal(a["final_obs"], b["final_obs"])
        np.testing.assert_array_equal(a["_final_obs"], ended)
        for name, value in b["final_info"].items():
            np.testing.assert_array_equal(a["final_info"][name][ended], value[ended])
    for name, value in b.items():
        if name in {"cost", "costs"} or name.startswith(("final", "_")):
            continue
        # Where an episode ended, the serial environment has no entry of the step.
        assert a[name].shape == value.shape
        np.testing.assert_array_equal(a[name][~ended], value[~ended])


def assert_equal_to_the_original(name, steps, *, num_envs=2, act=None, seed=0, max_episode_steps=None):
    """Step both with the same actions; returns how often goals were met and every cost occurred."""
    ours = make(name, num_envs, max_episode_steps=max_episode_steps)
    original = make_serial(name, num_envs, max_episode_steps)
    assert ours.single_observation_space == original.single_observation_space
    assert ours.single_action_space == original.single_action_space
    assert ours.observation_space == original.observation_space
    assert ours.action_space == original.action_space
    for key in ("cost_names", "render_fps", "autoreset_mode"):
        assert ours.metadata[key] == original.metadata[key]
    obs, info = ours.reset(seed=seed)
    expected, _ = original.reset(seed=seed)
    assert info == {}
    assert obs.dtype == np.float64
    np.testing.assert_array_equal(obs, expected)
    rng = np.random.default_rng(seed)
    space = ours.single_action_space
    counts = dict.fromkeys((*ours.metadata["cost_names"], "goal_met", "ended"), 0)
    for _ in range(steps):
        if act is None:
            actions = rng.uniform(space.low, space.high, (num_envs, *space.shape)).astype(space.dtype)
        else:
            actions = np.stack([act(row) for row in obs])
        step = ours.step(actions)
        assert_same_step(step, original.step(actions))
        obs, info = step[0], step[4]
        for part, cost in info["costs"].items():
            counts[part] += int(cost.sum())
        counts["goal_met"] += int(info.get("goal_met", np.zeros(1)).sum())
        counts["ended"] += int((step[2] | step[3]).sum())
    ours.close()
    return counts


# --- the same bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("PointGoal2-v0", "PointButton2-v0", "PointPush1-v0", "PointCircle2-v0", "PointRun0-v0"),
        *("CarGoal1-v0", "CarButton1-v0", "CarPush2-v0", "CarCircle1-v0", "CarRun0-v0"),
        *("RacecarGoal1-v0", "RacecarButton2-v0", "RacecarPush0-v0", "RacecarCircle2-v0", "RacecarRun0-v0"),
        *("DoggoGoal2-v0", "DoggoButton0-v0", "DoggoPush1-v0", "DoggoCircle0-v0", "DoggoRun0-v0"),
        *("AntGoal0-v0", "AntButton1-v0", "AntPush2-v0", "AntCircle1-v0", "AntRun0-v0"),
    ],
)
def test_navigation_equals_the_original(name):
    assert_equal_to_the_original(name, 25)


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("robot", ["HalfCheetah", "Hopper", "Swimmer", "Walker2d", "Ant", "Humanoid"])
def test_velocity_equals_the_original(robot, version):
    counts = assert_equal_to_the_original(f"{robot}Velocity-{version}", 100)
    if robot in {"Hopper", "Walker2d", "Humanoid"}:
        assert counts["ended"] > 0
    if robot == "Swimmer":
        assert counts["velocity"] > 0


def _drive_to(column):
    """A driver of Points that heads for what the lidar from `column` on sees."""
    centres = (np.arange(16) + 0.5) * np.pi / 8

    def act(obs):
        lidar = obs[column : column + 16]
        error = np.arctan2(lidar @ np.sin(centres), lidar @ np.cos(centres))
        return np.array([0.05 if abs(error) < 0.6 else 0.0, np.clip(2 * error, -1.0, 1.0)])

    return act


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [
        ("PointGoal2-v0", 12, {"hazards", "goal_met"}),
        ("PointButton1-v0", 28, {"buttons", "hazards", "gremlins", "goal_met"}),
        ("PointPush2-v0", 44, {"pillars"}),
    ],
)
def test_a_driver_who_meets_goals_and_obstacles_sees_the_same(name, column, expected):
    counts = assert_equal_to_the_original(name, 150, num_envs=3, act=_drive_to(column))
    assert {part for part in counts if counts[part]} >= expected


def test_vases_cost_the_same():
    counts = assert_equal_to_the_original("PointGoal2-v0", 120, num_envs=3, act=_drive_to(44))
    assert counts["vases_contact"] > 0
    assert counts["vases_velocity"] > 0


def test_episodes_go_on_with_the_same_random_numbers():
    for name in ("PointButton1-v0", "AntGoal1-v0", "HopperVelocity-v1"):
        counts = assert_equal_to_the_original(name, 30, max_episode_steps=7, seed=4)
        assert counts["ended"] >= 8
    counts = assert_equal_to_the_original("PointCircle1-v0", 501, num_envs=1)  # its own limit
    assert counts["ended"] == 1


def test_seeds_are_taken_modulo_two_to_the_32nd():
    ours, original = make("PointGoal1-v0", 1), make_serial("PointGoal1-v0", 1)
    np.testing.assert_array_equal(ours.reset(seed=[2**32 + 5])[0], original.reset(seed=[2**32 + 5])[0])


# --- leaving out what can touch nothing -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["PointGoal2-v0", "CarGoal1-v0", "PointButton1-v0", "CarPush1-v0"])
def test_left_out_bodies_change_little_over_ten_steps(name):
    exact, fast = make(name, 4), make(name, 4, exact=False)
    exact.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(4):
        fast.set_state(exact.get_state())
        for _ in range(10):
            actions = rng.uniform(-1, 1, (4, 2))
            a, b = exact.step(actions), fast.step(actions)
            np.testing.assert_allclose(b[0], a[0], rtol=0, atol=1e-8)
            np.testing.assert_allclose(b[1], a[1], rtol=0, atol=1e-8)
            np.testing.assert_array_equal(b[4]["cost"], a[4]["cost"])


def test_a_point_keeps_its_bits_until_it_touches_something():
    ours, original = make("PointGoal2-v0", 3, exact=False), make_serial("PointGoal2-v0", 3)
    ours.reset(seed=0)
    original.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = rng.uniform(-1, 1, (3, 2))
        a, b = ours.step(actions), original.step(actions)
        np.testing.assert_array_equal(a[0][:, :44], b[0][:, :44])  # all but the vases
        np.testing.assert_allclose(a[0], b[0], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(a[1], b[1])


def test_things_are_left_out_and_stepped_again_when_the_robot_comes():
    env = make("PointGoal2-v0", 1, exact=False)
    env.reset(seed=0)
    engine = env.unwrapped._engine
    before = engine._view("moving_qpos", 10, 7).copy()
    for _ in range(3):
        env.step(np.zeros((1, 2)))
    assert (engine._view("fate", 10) > 0).all()  # on the table of a vase that settles
    moved = engine._view("moving_qpos", 10, 7) - before
    assert np.abs(moved[0, :, :2]).max() < 1e-12
    assert (moved[0, :, 2] < -1e-6).all()
    act, touched = _drive_to(44), 0
    obs = env.reset(seed=0)[0]
    for _ in range(150):
        obs, _, _, _, info = env.step(act(obs[0])[None])
        touched += int(info["costs"]["vases_contact"][0])
    assert touched > 0
    assert np.abs(engine._view("moving_qpos", 10, 7) - before)[0, :, :2].max() > 0.01


def test_what_is_left_out_costs_as_much_on_the_whole():
    """Two hundred steps towards buttons, around gremlins, from eight layouts."""
    totals = []
    for exact in (True, False):
        env = make("PointButton1-v0", 8, exact=exact)
        obs, act = env.reset(seed=0)[0], _drive_to(28)
        rewards = costs = 0.0
        for _ in range(200):
            obs, reward, _, _, info = env.step(np.stack([act(row) for row in obs]))
            rewards, costs = rewards + reward.sum(), costs + info["cost"].sum()
        totals.append((rewards, costs))
    (reward, cost), (fast_reward, fast_cost) = totals
    assert fast_reward == pytest.approx(reward, abs=3.0)
    assert fast_cost == pytest.approx(cost, rel=0.1)


# --- batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CarGoal2-v0", "AntRun0-v0", "SwimmerVelocity-v1"])
def test_many_environments_equal_single_ones_at_any_number_of_threads(name):
    envs = [make(name, 5, exact=False, threads=threads, max_episode_steps=6) for threads in (1, 2, 3)]
    singles = [make(name, 1, exact=False, max_episode_steps=6) for _ in range(5)]
    reset = [env.reset(seed=10)[0] for env in envs]
    alone = np.concatenate([env.reset(seed=10 + i)[0] for i, env in enumerate(singles)])
    for obs in reset:
        np.testing.assert_array_equal(obs, alone)
    rng = np.random.default_rng(0)
    space = envs[0].single_action_space
    for _ in range(14):
        actions = rng.uniform(space.low, space.high, (5, *space.shape)).astype(space.dtype)
        steps = [env.step(actions) for env in envs]
        for step in steps[1:]:
            assert_same_step(step, steps[0])
        for i, env in enumerate(singles):
            obs, reward, _, truncated, info = env.step(actions[i : i + 1])
            np.testing.assert_array_equal(obs[0], steps[0][0][i])
            assert reward[0] == steps[0][1][i]
            assert truncated[0] == steps[0][3][i]
            assert info["cost"][0] == steps[0][4]["cost"][i]
    for env in envs:
        env.close()


def test_the_contract_of_autoreset():
    env = make("PointGoal1-v0", 3, exact=False, max_episode_steps=4)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    env.reset(seed=0)
    for step in range(1, 9):
        obs, reward, terminated, truncated, info = env.step(np.zeros((3, 2)))
        assert obs.shape == (3, 60)
        assert reward.shape == terminated.shape == truncated.shape == info["goal_met"].shape == (3,)
        assert info["goal_met"].dtype == bool
        assert truncated.all() == (step % 4 == 0)
        assert not terminated.any()
        assert ("final_obs" in info) == (step % 4 == 0)
        if "final_obs" in info:
            assert info["_final_obs"].all()
            assert (info["final_obs"] != obs).any(axis=1).all()
            np.testing.assert_array_equal(info["final_info"]["goal_met"], info["goal_met"])
    # What is returned is the caller's own.
    kept = obs.copy()
    env.step(np.ones((3, 2)))
    np.testing.assert_array_equal(obs, kept)


@pytest.mark.parametrize("name", ["PointButton1-v0", "CarPush1-v0", "HopperVelocity-v1"])
def test_a_mask_resets_single_environments(name):
    env, other = make(name, 3), make(name, 3)
    env.reset(seed=0)
    other.reset(seed=0)
    actions = np.tile(env.single_action_space.high, (3, 1))
    for _ in range(3):
        obs = env.step(actions)[0]
        other.step(actions)
    masked, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(masked[[0, 2]], obs[[0, 2]])
    assert (masked[1] != obs[1]).any()
    # Its random numbers go on as an autoreset's would, and the others notice nothing.
    everyone, _ = other.reset()
    np.testing.assert_array_equal(masked[1], everyone[1])
    first = env.step(actions)
    np.testing.assert_array_equal(first[0][1], other.step(actions)[0][1])
    seeded, _ = env.reset(seed=7, options={"reset_mask": np.array([True, False, False])})
    np.testing.assert_array_equal(seeded[0], make(name, 1).reset(seed=7)[0][0])
    np.testing.assert_array_equal(seeded[1:], first[0][1:])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["PointGoal2-v0", "CarButton1-v0", "AntGoal1-v0", "HumanoidVelocity-v1"])
def test_the_stored_state_continues_to_the_same_bits(name, exact):
    env = make(name, 2, exact=exact, max_episode_steps=9)
    assert isinstance(env, StatefulVectorEnv)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    space = env.single_action_space
    actions = rng.uniform(space.low, space.high, (20, 2, *space.shape)).astype(space.dtype)
    for action in actions[:6]:
        env.step(action)
    state = env.get_state()
    kept = copy.deepcopy(state)
    json.dumps({key: value for key, value in state.items() if not isinstance(value, np.ndarray)})
    expected = [env.step(action) for action in actions[6:]]
    for key, value in kept.items():  # a copy
        np.testing.assert_array_equal(state[key], value)
    other = make(name, 2, exact=exact, max_episode_steps=9, threads=2)
    for target in (env, other):
        target.set_state(state)
        for action, step in zip(actions[6:], expected, strict=True):
            assert_same_step(target.step(action), step)


def test_an_unseeded_environment_draws_its_own_numbers():
    first, second = make("PointGoal0-v0", 2), make("PointGoal0-v0", 2)
    a, b = first.reset()[0], second.reset()[0]
    assert (a != b).any()
    assert (a[0] != a[1]).any()
    assert (make("SwimmerVelocity-v1").reset()[0] != make("SwimmerVelocity-v1").reset()[0]).any()


# --- arguments ----------------------------------------------------------------------------------------


def test_all_tasks_are_known():
    with pytest.raises(UsageError, match="SafetyPointGoal1-v0"):
        SimulatedVectorEnv("SafetyPointGoal1")
    for task in safety_gym.tasks():
        if "Ant" in task.id or "Humanoid" in task.id:
            continue  # slow to build, and covered above
        env = SimulatedVectorEnv(task.id, 1, threads=1)
        assert env.reset(seed=0)[0].shape == env.observation_space.shape
        env.close()


def test_impossible_arguments():
    with pytest.raises(UsageError, match="ask for at least one environment"):
        make("PointGoal0-v0", 0)
    with pytest.raises(UsageError, match="threads is -1"):
        make("PointGoal0-v0", threads=-1)
    with pytest.raises(UsageError, match="max_episode_steps is 0"):
        make("PointGoal0-v0", max_episode_steps=0)
    env = make("PointGoal0-v0")
    env.reset(seed=0)
    with pytest.raises(UsageError, match=r"actions have shape \(2, 3\)"):
        env.step(np.zeros((2, 3)))
    with pytest.raises(UsageError, match="got 1 seeds for 2 environments"):
        env.reset(seed=[1])
    with pytest.raises(UsageError, match=r"reset_mask has shape \(3,\)"):
        env.reset(options={"reset_mask": np.ones(3, bool)})
    fresh = make("PointGoal0-v0")
    fresh.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(UsageError, match="call reset before step"):
        fresh.step(np.zeros((2, 2)))
    with pytest.raises(UsageError, match="1 environments of SafetyPointGoal0-v0, this one 2"):
        env.set_state(make("PointGoal0-v0", 1).get_state())
    with pytest.raises(UsageError, match="2 environments of SafetyPointRun0-v0"):
        env.set_state(make("PointRun0-v0", 2).get_state())
    env.close()
    with pytest.raises(SaferlError, match="is closed"):
        env.step(np.zeros((2, 2)))


def test_a_missing_package_is_told(monkeypatch):
    from saferl.envs.safety_gym.simulated.world import world

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compat, "load", compat.load.__wrapped__)
    world.cache_clear()
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps safety-gymnasium==1\.0\.0$"):
        make("PointGoal0-v0")
