"""The planar engine: the specification's golden values, the real package's numbers, and the contract.

A Point's trajectories are chaotic: a rounding error grows up to fourfold a substep. So the engine is held to
the original in three ways: from the same state, one step at a time; over short trajectories, as long as twins
that start 1e-12 away stay close; and bit for bit where nothing chaotic enters (layouts and goals).
"""

from __future__ import annotations

import functools
import math

import gymnasium as gym
import mujoco
import numba
import numpy as np
import pytest

from saferl.envs import make_vec
from saferl.envs.safety_gym.original import SafetyGymEnv
from saferl.envs.safety_gym.planar import equations as eq
from saferl.envs.safety_gym.planar import kernels
from saferl.envs.safety_gym.planar.env import PlanarVectorEnv
from saferl.envs.safety_gym.planar.tasks import TASKS
from saferl.errors import SaferlError, UsageError

GOAL1 = "SafetyPointGoal1-v0"
GOALS = ("SafetyPointGoal0-v0", GOAL1)
VASE = TASKS[GOAL1].vase


@functools.cache
def original(task_id):
    """The real task; `reset` rebuilds its world, so tests can share it."""
    return SafetyGymEnv(task_id)


def layout(env):
    """Places (things, 2) of the original's layout in the planar engine's order."""
    places = env._task.world_info.layout
    return np.array([places[thing.name] for thing in TASKS[env.task_id].things])


def pose(env):
    """The original's x, y, heading, vx, vy, turning rate in the world's frame."""
    task = env._task
    start = task.world_info.world_config_dict["agent_rot"]
    sin, cos = math.sin(start), math.cos(start)
    vx, vy, rate = task.data.qvel[:3]
    x, y = task.agent.pos[:2]
    return np.array([x, y, start + task.data.qpos[2], cos * vx - sin * vy, sin * vx + cos * vy, rate])


def put(env, target):
    """Put the original's robot at `target` (x, y), at rest; its slides move in the frame it starts in."""
    task = env._task
    start = task.world_info.world_config_dict["agent_rot"]
    dx, dy = np.asarray(target) - task.world_info.reset_layout["agent"]
    task.data.qpos[:2] = (
        math.cos(start) * dx + math.sin(start) * dy,
        math.cos(start) * dy - math.sin(start) * dx,
    )
    task.data.qvel[:3] = 0.0


def change(env, row=0, **places):
    """Change a planar environment's row through get_state and set_state."""
    state = env.get_state()
    for name, value in places.items():
        if name == "at":
            state["state"][row, :2] = value
            state["state"][row, 3:6] = 0.0
        elif name == "heading":
            state["state"][row, kernels.HEADING] = value
        else:
            state["places"][row, [thing.name for thing in env.task.things].index(name)] = value
    env.set_state(state)


def actions_of(rng, *shape):
    """Random actions, a third of them beyond the box and half of them driving on."""
    actions = rng.uniform(-1.5, 1.5, (*shape, 2))
    actions[..., 0] = np.where(rng.random(shape) < 0.5, np.abs(actions[..., 0]), actions[..., 0])
    return actions


def equal(first, second):
    """Whether two results of `step` have the same bits."""
    for a, b in zip(first[:4], second[:4], strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[4].keys() == second[4].keys()
    for name, value in first[4].items():
        if isinstance(value, dict):
            assert value.keys() == second[4][name].keys()
            for part in value:
                np.testing.assert_array_equal(value[part], second[4][name][part])
        else:
            np.testing.assert_array_equal(value, second[4][name])


# --- the specification's numbers --------------------------------------------------------------------------


def test_point_goal_in_numbers():
    env = PlanarVectorEnv(GOAL1, 2)
    obs, info = env.reset(seed=0)
    assert info == {}
    state = env.get_state()
    places = [
        *((0.107390, 0.473417), (0.407825, -0.692186)),
        *((0.770154, 0.076283), (0.179638, 1.123575), (-1.132465, -1.089979), (-1.266623, 0.878116)),
        *((0.734334, 0.976832), (1.263552, 0.789779), (-1.007756, 0.369391), (-0.941547, 1.173926)),
        (0.058990, -0.230413),
    ]
    np.testing.assert_allclose(state["places"][0], places, atol=6e-7)
    np.testing.assert_allclose(state["state"][0, :3], (0.107390, 0.473417, 1.662252), atol=6e-7)
    np.testing.assert_allclose(
        state["places"][1, :2], [(-0.182552, 0.484714), (-0.205112, -1.075611)], atol=6e-7
    )
    assert state["state"][1, kernels.HEADING] == pytest.approx(1.808146, abs=6e-7)
    sensors = [0, 0, 9.81, 0, 0, 0, 0, 0, 0, -0.49791, 0.045664, 0]
    goal, vases = np.zeros(16), np.zeros(16)
    goal[7:10] = 0.353581, 0.598767, 0.245186
    vases[6:9] = 0.311843, 0.764836, 0.452994
    hazards = [0.379473, 0.42439, 0.579553, 0.624183, 0.626671, 0.314882, 0.334881, 0.019999]
    hazards += [0, 0.451095, 0.742453, 0.331892, 0.600445, 0.731985, 0.402474, 0.781947]
    np.testing.assert_allclose(obs[0], [*sensors, *goal, *hazards, *vases], atol=1e-6)
    for expected in (-0.00054356, -0.00166197, -0.00273532, -0.00377710, -0.00477503):
        obs, rewards, terminated, truncated, info = env.step(np.array([[1.0, 0.5]] * 2))
        assert rewards[0] == pytest.approx(expected, abs=1e-8)
        assert info["cost"][0] == info["costs"]["hazards"][0] == 0.0
        assert not (terminated | truncated | info["goal_met"]).any()
    after = [2.455283, 17.899983, 9.81, 0.261856, -0.049555, 0, 0, 0, 1.893428, -0.48743, 0.111409, 0]
    np.testing.assert_allclose(obs[0, :12], after, atol=2e-6)
    np.testing.assert_allclose(env.get_state()["state"][0, :2], (0.10784037, 0.48746016), atol=1e-8)


def test_sizes_and_spaces():
    sizes = {"Goal0": 28, "Goal1": 60, "Circle0": 28, "Circle1": 28, "Circle2": 28, "Run0": 12}
    assert {f"SafetyPoint{name}-v0" for name in sizes} == set(TASKS)
    for name, size in sizes.items():
        task_id = f"SafetyPoint{name}-v0"
        env, real = PlanarVectorEnv(task_id, 3), original(task_id)
        assert env.single_observation_space.shape == real.observation_space.shape == (size,)
        assert env.single_action_space == real.action_space
        assert env.metadata["cost_names"] == real.metadata["cost_names"]
        obs, _ = env.reset(seed=0)
        assert env.observation_space.contains(obs)


def test_the_dynamics_solve_the_equations_of_motion():
    """The closed form against the 3 x 3 system of the specification, for floats and for arrays."""
    rng = np.random.default_rng(0)
    vx, vy, w, angle, force, torque = rng.uniform(-1, 1, (6, 20)) * [[1], [1], [4], [3], [0.015], [0.015]]
    m, k, inertia = 0.005188790204786391, 0.005188790204786391 * 0.01927231513576232, 2.8421827485812233e-05
    sin, cos = np.sin(angle), np.cos(angle)
    for h in (0.002, 0.0):
        batch = np.stack(eq.accelerations(vx, vy, w, sin, cos, force, torque, h), 1)
        for i in range(20):
            matrix = [
                [m + 0.01 * h, 0, -k * sin[i]],
                [0, m + 0.01 * h, k * cos[i]],
                [-k * sin[i], k * cos[i], inertia + 0.005 * h],
            ]
            push = force[i] + k * w[i] ** 2
            right = [push * cos[i] - 0.01 * vx[i], push * sin[i] - 0.01 * vy[i], torque[i] - 0.005 * w[i]]
            np.testing.assert_allclose(batch[i], np.linalg.solve(matrix, right), rtol=1e-10)
            single = eq.accelerations(vx[i], vy[i], w[i], sin[i], cos[i], force[i], torque[i], h)
            np.testing.assert_allclose(batch[i], single, rtol=1e-12)


def test_the_turning_rate_is_a_staircase():
    """Specification 6.2: with the unstable servo the mean turning rate is not proportional to the action."""
    wanted = {0.05: 0.0, 0.1: 0.033, 0.2: 0.49, 0.3: 0.78, 0.5: 1.35, 0.7: 2.07, 1.0: 2.998}
    env = PlanarVectorEnv("SafetyPointRun0-v0", len(wanted))
    env.reset(seed=0)
    actions = np.stack([np.zeros(len(wanted)), list(wanted)], 1)
    for _ in range(50):
        env.step(actions)
    before = env.get_state()["state"][:, kernels.HEADING]
    for _ in range(400):
        env.step(actions)
    rates = (env.get_state()["state"][:, kernels.HEADING] - before) / (400 * eq.CONTROL_SECONDS)
    np.testing.assert_allclose(rates, list(wanted.values()), atol=0.02)


def test_driving_ahead_saturates_at_a_twentieth():
    env = PlanarVectorEnv("SafetyPointRun0-v0", 3)
    env.reset(seed=[0, 0, 0])
    for _ in range(400):
        obs, *_ = env.step(np.array([[0.05, 0.0], [1.0, 0.0], [7.0, 0.0]]))
    np.testing.assert_array_equal(obs[0], obs[1])
    np.testing.assert_array_equal(obs[0], obs[2])
    # F / damping = 1.5 m/s, a little off ahead because the heading chatters.
    assert np.hypot(obs[0, 3], obs[0, 4]) == pytest.approx(1.5, abs=0.02)


# --- the real package -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", TASKS)
def test_every_step_from_the_originals_state(task_id):
    """80 steps of eight episodes; before each, the planar robot is put where the original's is."""
    real, env, task = original(task_id), PlanarVectorEnv(task_id), TASKS[task_id]
    costs = 0.0
    for seed in range(8):
        real.reset(seed=seed)
        env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        turn = rng.uniform(-1, 1)
        for step in range(80):
            mujoco.mj_forward(real._task.model, real._task.data)
            state = env.get_state()
            state["state"][0, :6] = pose(real)
            if task.kind == "goal":
                state["state"][0, kernels.LAST] = real._task.last_dist_goal
            if task.vase:
                state["places"][0, task.vase] = vase_before = real._task.data.body("vase0").xpos[:2].copy()
            if step == 60:  # where something costs
                target = {"circle": (1.2, 0.3), "run": (0.6, 12.0), "goal": state["places"][0, -2]}[task.kind]
                put(real, target)
                state["state"][0, :2], state["state"][0, 3:6] = target, 0.0
            env.set_state(state)
            action = np.array([rng.uniform(0, 0.1), turn + rng.uniform(-0.3, 0.3)])
            obs, reward, terminated, truncated, info = real.step(action)
            mine, rewards, ended, cut, told = env.step(action[None])
            seen = len(obs)
            if task.vase and (real._task.data.body("vase0").xpos[:2] != vase_before).any():
                seen -= 16
            np.testing.assert_allclose(mine[0, :seen], obs[:seen], rtol=0, atol=1e-8)
            assert rewards[0] == pytest.approx(reward, abs=1e-9)
            assert told["cost"][0] == info["cost"]
            assert {name: cost[0] for name, cost in told["costs"].items()} == info["costs"]
            assert (ended[0], cut[0]) == (terminated, truncated) == (False, False)
            if task.kind == "goal":
                assert told["goal_met"][0] == info["goal_met"]
            costs += info["cost"]
    assert costs > 0 or task.cost_name == "cost"


@pytest.mark.parametrize("task_id", TASKS)
def test_short_trajectories(task_id):
    """50 seeds x 8 steps. Where four twins that start 1e-12 away have not left yet, nor has the original."""
    real, num, steps = original(task_id), 50, 8
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, num, 2))

    def run(heading=0.0, rate=0.0):
        env = PlanarVectorEnv(task_id, num)
        first, _ = env.reset(seed=0)
        state = env.get_state()
        state["state"][:, kernels.HEADING] += heading
        state["state"][:, kernels.RATE] += rate
        env.set_state(state)
        results = [env.step(a) for a in actions]
        costs = np.stack([info["cost"] for *_, info in results])
        return first, np.stack([obs for obs, *_ in results]), np.stack([r for _, r, *_ in results]), costs

    first, observations, rewards, costs = run()
    twins = [run(sign * 1e-12, rate * 1e-12)[1] for sign in (-1, 1) for rate in (-1, 1)]
    distance = np.maximum.reduce([np.abs(observations - twin).max(2) for twin in twins])
    calm = np.maximum.accumulate(distance) < 1e-9
    errors = np.zeros((steps, num))
    for seed in range(num):
        obs, _ = real.reset(seed=seed)
        np.testing.assert_allclose(first[seed], obs, rtol=0, atol=1e-13)
        for step in range(steps):
            obs, reward, _, _, info = real.step(actions[step, seed])
            errors[step, seed] = np.abs(observations[step, seed] - obs).max()
            assert costs[step, seed] == info["cost"]
            assert rewards[step, seed] == pytest.approx(reward, abs=1e-8 if calm[step, seed] else 1e-5)
    assert calm.mean() > 0.5
    assert errors[calm].max() < 1e-8
    assert (errors < 1e-8).mean() > 0.85


@pytest.mark.parametrize("task_id", TASKS)
def test_layouts_are_the_originals_bit_for_bit(task_id):
    real, env = original(task_id), PlanarVectorEnv(task_id, 40)
    seeds = [*range(36), 2**31, 2**32 - 1, 2**32 + 5, 12345678901]
    env.reset(seed=seeds)
    state = env.get_state()
    for row, seed in enumerate(seeds):
        real.reset(seed=seed)
        np.testing.assert_array_equal(state["places"][row], layout(real))
        world = real._task.world_info.world_config_dict
        assert state["state"][row, kernels.HEADING] == world["agent_rot"]
        np.testing.assert_array_equal(state["state"][row, :2], layout(real)[0])
    np.testing.assert_array_equal(state["places"][38], state["places"][5])


@pytest.mark.parametrize(
    "task_id", ["SafetyPointGoal0-v0", GOAL1, "SafetyPointCircle2-v0", "SafetyPointRun0-v0"]
)
def test_layouts_after_autoresets_are_the_originals(task_id):
    """Zero actions keep a robot at rest: two whole episodes without chaos."""
    real, env = original(task_id), PlanarVectorEnv(task_id)
    real.reset(seed=3)
    env.reset(seed=3)
    horizon = TASKS[task_id].max_episode_steps
    zeros = np.zeros((1, 2))
    for _ in range(2):
        for step in range(horizon):
            obs, _, terminated, truncated, info = env.step(zeros)
            assert truncated[0] == (step + 1 == horizon)
            assert not terminated[0]
            _, reward, _, cut, _ = real.step(zeros[0])
        assert cut
        assert reward == pytest.approx(0.0, abs=1e-9)
        expected, _ = real.reset()
        np.testing.assert_array_equal(env.get_state()["places"][0], layout(real))
        np.testing.assert_allclose(obs[0], expected, rtol=0, atol=1e-13)
        assert (info["final_obs"] != obs).any()


@pytest.mark.parametrize("task_id", GOALS)
def test_goals_reached_are_followed_by_the_originals_goals(task_id):
    real, env = original(task_id), PlanarVectorEnv(task_id)
    for seed in range(10):
        real.reset(seed=seed)
        env.reset(seed=seed)
        for round_ in range(4):
            goal = layout(real)[1]
            put(real, goal)
            change(env, at=goal)
            for step in range(1 + 2 * round_):  # the draws of other steps lie between
                obs, reward, _, _, info = real.step(np.zeros(2))
                mine, rewards, terminated, _, told = env.step(np.zeros((1, 2)))
                assert told["goal_met"][0] == info["goal_met"] == (step == 0)
                assert rewards[0] == pytest.approx(reward, abs=1e-9)
                assert told["cost"][0] == info["cost"]
                assert not terminated[0]
            places, expected = env.get_state()["places"][0], layout(real)
            np.testing.assert_array_equal(places[1:], expected[1:])
            np.testing.assert_allclose(places[0], expected[0], rtol=0, atol=1e-12)
            np.testing.assert_allclose(mine[0], obs, rtol=0, atol=1e-9)


def test_a_scripted_driver_does_as_well_as_the_original():
    """Ten official episodes of this driver return 19.4 +- 1.3 and cost 29.1."""
    env = PlanarVectorEnv(GOAL1, 100)
    env.reset(seed=0)
    returns, costs = np.zeros(100), np.zeros(100)
    for _ in range(1000):
        state = env.get_state()
        dx, dy = (state["places"][:, 1] - state["state"][:, :2]).T
        error = np.arctan2(dy, dx) - state["state"][:, kernels.HEADING]
        error = np.arctan2(np.sin(error), np.cos(error))
        drive = np.where(np.abs(error) < 1.2, 0.04 * np.cos(error), 0.0)
        _, rewards, _, truncated, info = env.step(np.stack([drive, np.clip(2 * error, -1, 1)], 1))
        returns += rewards
        costs += info["cost"]
    assert truncated.all()
    assert returns.mean() == pytest.approx(19.6, abs=0.8)
    assert 24 < costs.mean() < 60


# --- random numbers ---------------------------------------------------------------------------------------


@numba.njit
def _draws(key, cursor, low, high, out):
    for i in range(len(out)):
        if i % 3 == 2:
            kernels._skip(key, cursor, 0)
        else:
            out[i] = kernels._uniform(key, cursor, 0, low, high)


@pytest.mark.parametrize("seed", [0, 1, 5489, 2**31, 2**32 - 1])
def test_the_twister_is_numpys(seed):
    """Three thousand doubles are nearly ten refills."""
    key, cursor, out = np.zeros(624, np.uint32), np.array([624]), np.zeros(3000)
    kernels.seed_row(key, seed)
    reference = np.random.RandomState(seed)
    np.testing.assert_array_equal(key, reference.get_state()[1])
    _draws(key, cursor, -0.7, 1.3, out)
    expected = [
        reference.binomial(10, 1.0) if i % 3 == 2 else reference.uniform(-0.7, 1.3) for i in range(3000)
    ]
    expected[2::3] = out[2::3]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(key, reference.get_state()[1])
    assert cursor[0] == reference.get_state()[2]


# --- lidars, costs, the vase ------------------------------------------------------------------------------


def lidar(x, y, reach=3.0, sin=0.0, cos=1.0):
    out = np.zeros(16)
    kernels._see(out, x, y, sin, cos, reach)
    return out


def test_a_lidar_in_numbers():
    expected = np.zeros(16)
    expected[[0, 15]] = 2 / 3
    np.testing.assert_allclose(lidar(1.0, 0.0), expected, atol=1e-15)
    expected = np.zeros(16)
    expected[[0, 1, 2]] = 1 / 3, 2 / 3, 1 / 3
    angle = math.radians(33.75)
    np.testing.assert_allclose(lidar(math.cos(angle), math.sin(angle)), expected, atol=1e-14)
    np.testing.assert_array_equal(lidar(3.0, 0.0), np.zeros(16))
    np.testing.assert_array_equal(lidar(0.0, 3.0 + 1e-12), np.zeros(16))
    assert lidar(0.0, 0.0)[0] == 1.0


@pytest.mark.parametrize("y", [-1e-300, -1e-20, -1e-17, -3e-16, -1e-15, -1e-12, -0.0, 0.0])
def test_a_lidar_is_continuous_where_the_circle_closes(y):
    """Just below 2 pi: adding 2 pi to a tiny negative angle gives 2 pi itself, a seventeenth bin."""
    expected = np.zeros(16)
    expected[[0, 15]] = 2 / 3
    np.testing.assert_allclose(lidar(1.0, y), expected, atol=1e-11)


def test_lidars_are_the_originals():
    """Its function on random offsets and on the bins' edges."""
    real = original(GOAL1)
    real.reset(seed=0)
    x, y, heading = pose(real)[:3]
    rng = np.random.default_rng(0)
    edges = heading + np.arange(16) * math.pi / 8 + 1e-9  # on an edge itself rounding decides
    angles = np.concatenate([rng.uniform(0, 2 * math.pi, 200), edges])
    ranges = rng.uniform(0, 3.3, len(angles))
    for angle, distance in zip(angles, ranges, strict=True):
        dx, dy = distance * math.cos(angle), distance * math.sin(angle)
        theirs = real._task._obs_lidar_pseudo([np.array([x + dx, y + dy])])
        mine = lidar(dx, dy, sin=math.sin(heading), cos=math.cos(heading))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)


def test_the_nearest_thing_is_seen():
    out = np.zeros(16)
    for distance in (2.0, 0.5, 1.0):
        kernels._see(out, distance, 0.01, 0.0, 1.0, 3.0)
    near = lidar(0.5, 0.01)
    assert out[0] == near[0]
    assert (out >= near).all()


@pytest.mark.parametrize(
    ("distance", "cost"), [(0.2, 0.0), (np.nextafter(0.2, 0), 1.0), (0.2 + 1e-12, 0.0), (0.0, 1.0)]
)
def test_a_hazard_costs_below_its_radius(distance, cost):
    """At rest at the origin, so that the distance is the hazard's x itself; on the radius nothing costs."""
    env = PlanarVectorEnv(GOAL1)
    env.reset(seed=0)
    state = env.get_state()
    state["places"][:] = 3.0
    state["places"][0, 5] = distance, 0.0
    state["state"][:] = 0.0
    env.set_state(state)
    assert env.step(np.zeros((1, 2)))[4]["cost"][0] == cost


@pytest.mark.parametrize(("distance", "met"), [(0.3, True), (np.nextafter(0.3, 1), False)])
def test_a_goal_is_met_on_its_radius(distance, met):
    env = PlanarVectorEnv("SafetyPointGoal0-v0")
    env.reset(seed=0)
    change(env, at=(0.0, 0.0), goal=(distance, 0.0))
    _, rewards, _, _, info = env.step(np.zeros((1, 2)))
    assert info["goal_met"][0] == met
    assert (rewards[0] > 0.9) == met
    assert ((env.get_state()["places"][0, 1] != (distance, 0.0)).all()) == met


@pytest.mark.parametrize(
    ("task", "place", "cost"),
    [
        ("Circle0", (2.0, 2.0), 0.0),
        ("Circle1", (1.125, 0.0), 0.0),
        ("Circle1", (-1.1251, 0.0), 1.0),
        ("Circle1", (0.1, 1.2), 0.0),
        ("Circle2", (0.1, -1.2), 1.0),
        ("Circle2", (1.125, -1.125), 0.0),
        ("Run0", (0.5, 3.0), 0.0),
        ("Run0", (-0.5001, 3.0), 1.0),
    ],
)
def test_boundaries_cost_beyond_them(task, place, cost):
    env = PlanarVectorEnv(f"SafetyPoint{task}-v0")
    env.reset(seed=0)
    change(env, at=place)
    info = env.step(np.zeros((1, 2)))[4]
    assert info["cost"][0] == cost
    assert info["costs"][env.task.cost_name][0] == cost


def test_rewards_of_goals_and_circles_are_clipped_but_not_runs():
    env = PlanarVectorEnv("SafetyPointGoal0-v0")
    env.reset(seed=0)
    change(env, at=(40.0, 0.0))
    assert env.step(np.zeros((1, 2)))[1][0] == -10.0
    run = PlanarVectorEnv("SafetyPointRun0-v0")
    run.reset(seed=0)
    change(run, at=(0.0, 10.0))
    assert run.step(np.zeros((1, 2)))[1][0] > 100.0


def test_a_vase_is_pushed_out_of_the_robot_and_slides_to_rest():
    env = PlanarVectorEnv(GOAL1)
    env.reset(seed=0)
    before = env.get_state()["places"][0].copy()
    env.step(np.array([[1.0, 0.0]]))
    np.testing.assert_array_equal(env.get_state()["places"][0], before)  # nothing touches it yet
    # Nose and body overlap a vase that stands ahead.
    change(env, at=(5.0, 5.0), heading=0.0, vase0=(5.22, 5.0))
    env.step(np.zeros((1, 2)))
    state = env.get_state()
    moved = state["places"][0, VASE]
    others = [j for j in range(len(before)) if j != VASE]
    np.testing.assert_array_equal(state["places"][0, others], before[others])
    speed = np.hypot(*state["state"][0, [kernels.VASE_VX, kernels.VASE_VY]])
    assert speed == pytest.approx(np.hypot(*(moved - (5.22, 5.0))) / eq.CONTROL_SECONDS)
    # Out of touch it comes to rest after v^2 / (2 mu g), steps included in which it stops.
    change(env, at=(9.0, 9.0))
    for _ in range(20):
        env.step(np.zeros((1, 2)))
    state = env.get_state()
    assert (state["state"][0, kernels.VASE_VX :] == 0.0).all()
    way = np.hypot(*(state["places"][0, VASE] - moved))
    assert way == pytest.approx(speed**2 / (2 * eq.GRAVITY), rel=1e-9)


def test_a_push_beside_the_middle_turns_a_vase_and_one_through_it_does_not():
    env = PlanarVectorEnv(GOAL1, 3)
    env.reset(seed=0)
    state = env.get_state()
    state["state"][:, :3] = 5.0, 5.0, 0.0
    state["rotations"][:, VASE] = 0.0
    state["places"][:, VASE] = [(5.24, 5.0), (5.24, 5.05), (5.24, 4.95)]
    env.set_state(state)
    env.step(np.zeros((3, 2)))
    after = env.get_state()
    assert after["rotations"][0, VASE] == pytest.approx(0.0, abs=1e-12)
    # The nose meets the second below its middle, so that it turns anticlockwise; the third is its image.
    assert after["rotations"][1, VASE] > 1e-3
    assert after["rotations"][2, VASE] == pytest.approx(-after["rotations"][1, VASE], rel=1e-9)
    ways = after["places"][:, VASE] - state["places"][:, VASE]
    assert ways[0] == pytest.approx([0.01, 0.0], abs=1e-12)
    assert 0.0 < ways[1, 0] < 0.01
    assert ways[2] == pytest.approx([ways[1, 0], -ways[1, 1]], abs=1e-12)


def test_a_vase_is_pushed_about_as_far_as_the_originals():
    """Both robots start 0.4 m from the vase, face it and drive for nine tenths of a second."""
    real, env, ways = original(GOAL1), PlanarVectorEnv(GOAL1), []
    for seed in range(6):
        real.reset(seed=seed)
        env.reset(seed=seed)
        vase = real._task.data.body("vase0").xpos[:2].copy()
        heading = pose(real)[2]
        start = vase - 0.4 * np.array([math.cos(heading), math.sin(heading)])
        put(real, start)
        change(env, at=start)
        for _ in range(45):
            real.step(np.array([1.0, 0.0]))
            env.step(np.array([[1.0, 0.0]]))
        there = real._task.data.body("vase0").xpos[:2]
        ways.append((np.hypot(*(there - vase)), np.hypot(*(env.get_state()["places"][0, VASE] - vase))))
    theirs, mine = np.array(ways).T
    assert theirs.min() > 0.3
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=0.06)


def test_states_stored_before_vases_turned_are_taken():
    env, other = PlanarVectorEnv(GOAL1, 2), PlanarVectorEnv(GOAL1, 2)
    env.reset(seed=0)
    state = env.get_state()
    other.set_state({**state, "state": state["state"][:, : kernels.VASE_SPIN]})
    equal(env.step(np.ones((2, 2))), other.step(np.ones((2, 2))))


@pytest.mark.parametrize("angle", np.linspace(0, 2 * math.pi, 9))
def test_a_vase_never_stays_inside_the_robot(angle):
    env = PlanarVectorEnv(GOAL1)
    env.reset(seed=0)
    change(env, at=(5.0, 5.0), heading=angle, vase0=(5.3, 5.0))
    for _ in range(100):
        env.step(np.array([[1.0, 0.2]]))
        state = env.get_state()
        offset = state["places"][0, VASE] - state["state"][0, :2]
        turned = state["rotations"][0, VASE]
        local = np.abs(np.array(eq.to_ego(*offset, math.sin(turned), math.cos(turned))))
        # The nose, resolved last, may leave the body a little inside.
        assert np.hypot(*np.maximum(local - 0.1, 0.0)) > 0.1 - 0.02


# --- the contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", TASKS)
def test_many_environments_are_single_ones(task_id):
    many = PlanarVectorEnv(task_id, 5)
    single = [PlanarVectorEnv(task_id) for _ in range(5)]
    obs, _ = many.reset(seed=11)
    for row, env in enumerate(single):
        np.testing.assert_array_equal(env.reset(seed=11 + row)[0][0], obs[row])
    rng = np.random.default_rng(0)
    for _ in range(1100):
        actions = actions_of(rng, 5)
        result = many.step(actions)
        for row, env in enumerate(single):
            one = env.step(actions[row : row + 1])
            for a, b in zip(one[:4], result[:4], strict=True):
                np.testing.assert_array_equal(a[0], b[row])
            assert one[4]["cost"][0] == result[4]["cost"][row]


def test_threads_change_no_bit():
    one, two = PlanarVectorEnv(GOAL1, 1100, threads=1), PlanarVectorEnv(GOAL1, 1100, threads=2)
    assert (len(one._blocks), len(two._blocks)) == (1, 2)
    np.testing.assert_array_equal(one.reset(seed=0)[0], two.reset(seed=0)[0])
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = actions_of(rng, 1100)
        equal(one.step(actions), two.step(actions))
    for env in (one, two):  # to the end of the episodes
        state = env.get_state()
        state["steps"][:] = 998
        env.set_state(state)
    for _ in range(4):
        actions = actions_of(rng, 1100)
        equal(one.step(actions), two.step(actions))
    for name, value in one.get_state().items():
        np.testing.assert_array_equal(value, two.get_state()[name])
    two.close()


@pytest.mark.parametrize("task_id", TASKS)
def test_episodes_end_and_start_again_in_the_same_step(task_id):
    task = TASKS[task_id]
    env = PlanarVectorEnv(task_id, 3)
    env.reset(seed=0)
    state = env.get_state()
    state["steps"] += [2, 0, 1]  # so that they end one after the other
    env.set_state(state)
    zeros, ends = np.zeros((3, 2)), []
    for step in range(task.max_episode_steps + 1):
        before = env.get_state()
        obs, _, terminated, truncated, info = env.step(zeros)
        assert not terminated.any()
        assert ("final_obs" in info) == ("_final_obs" in info) == truncated.any()
        if truncated.any():
            ends.append((step + 1, np.flatnonzero(truncated).tolist()))
            after = env.get_state()
            np.testing.assert_array_equal(info["_final_obs"], truncated)
            np.testing.assert_array_equal(info["final_obs"][~truncated], obs[~truncated])
            np.testing.assert_array_equal(
                info["final_obs"][truncated][:, 12:], before["observations"][truncated][:, 12:]
            )
            assert (after["places"][truncated] != before["places"][truncated]).any()
            np.testing.assert_array_equal(after["places"][~truncated], before["places"][~truncated])
            np.testing.assert_array_equal(after["steps"] == 0, truncated)
    last = task.max_episode_steps
    assert ends == [(last - 2, [0]), (last - 1, [2]), (last, [1])]


def test_a_goal_without_a_place_ends_the_episode():
    """10000 draws fail: as in the original, the episode is terminated, with the old goal in sight."""
    env = PlanarVectorEnv("SafetyPointGoal0-v0", 2)
    env.reset(seed=0)
    goal = env.get_state()["places"][0, 1]
    env._bounds[1] = [*goal, *goal]
    change(env, at=goal)
    _, rewards, terminated, truncated, info = env.step(np.zeros((2, 2)))
    assert terminated.tolist() == info["_final_obs"].tolist() == info["goal_met"].tolist() == [True, False]
    assert not truncated.any()
    assert rewards[0] > 0.9
    assert info["final_obs"][0, 12:].max() == 1.0
    after = env.get_state()
    assert after["steps"].tolist() == [0, 1]
    np.testing.assert_array_equal(after["places"][0, 1], goal)


def test_a_layout_that_cannot_be_found_is_told():
    env = PlanarVectorEnv("SafetyPointGoal0-v0", 2)
    env._keepouts[:] = 5.0
    with pytest.raises(SaferlError, match="no layout was found for environment 0"):
        env.reset(seed=0)


def test_a_mask_resets_its_rows_alone():
    env, other = PlanarVectorEnv(GOAL1, 4), PlanarVectorEnv(GOAL1, 4)
    env.reset(seed=0)
    other.reset(seed=0)
    for _ in range(5):
        obs, *_ = env.step(np.ones((4, 2)))
        other.step(np.ones((4, 2)))
    mask = np.array([False, True, False, True])
    before = env.get_state()
    again, _ = env.reset(options={"reset_mask": mask})
    other.reset()
    after, whole = env.get_state(), other.get_state()
    for name in before:
        if name != "task":
            np.testing.assert_array_equal(after[name][~mask], before[name][~mask])
            np.testing.assert_array_equal(after[name][mask], whole[name][mask])
    np.testing.assert_array_equal(again[~mask], obs[~mask])
    # A seed counts for the rows that are reset.
    env.reset(seed=[None, 1, 99, 7], options={"reset_mask": mask})
    seeded = env.get_state()
    other.reset(seed=[0, 1, 2, 7])
    np.testing.assert_array_equal(seeded["places"][mask], other.get_state()["places"][mask])
    np.testing.assert_array_equal(seeded["keys"][~mask], before["keys"][~mask])


@pytest.mark.parametrize("task_id", TASKS)
def test_a_stored_state_goes_on_with_the_same_bits(task_id):
    env, other = PlanarVectorEnv(task_id, 4), PlanarVectorEnv(task_id, 4)
    env.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(30):
        env.step(actions_of(rng, 4))
    state = env.get_state()
    kept = {name: np.array(value) for name, value in state.items()}
    actions = actions_of(rng, 1000, 4)
    first = [env.step(a) for a in actions]
    other.set_state(state)
    second = [other.step(a) for a in actions]
    for a, b in zip(first, second, strict=True):
        equal(a, b)
    for name, value in state.items():  # neither environment writes into what it gave or took
        np.testing.assert_array_equal(value, kept[name])


def test_seeds():
    env = PlanarVectorEnv(GOAL1, 3)
    low, _ = env.reset(seed=[0, 1, 5])
    high, _ = env.reset(seed=[2**32, 2**32 + 1, 2**40 + 5])
    np.testing.assert_array_equal(low, high)
    following, _ = env.reset()
    assert (following != high).any(1).all()
    np.testing.assert_array_equal(env.reset(seed=4)[0][1], low[2])
    unseeded = [PlanarVectorEnv(GOAL1).reset()[0] for _ in range(2)]
    assert (unseeded[0] != unseeded[1]).any()
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    PlanarVectorEnv(GOAL1).reset()
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOAL1, 0), "num_envs is 0"),
        (("SafetyPointGoal2-v0", 1), "SafetyPointGoal1-v0"),
        ((GOAL1, 1, {"threads": -1}), "threads is -1"),
        ((GOAL1, 1, {"max_episode_steps": 10}), "has 1000 steps, not 10"),
    ],
)
def test_impossible_arguments(arguments, message):
    kwargs = arguments[2] if len(arguments) == 3 else {}
    with pytest.raises(UsageError, match=message):
        PlanarVectorEnv(*arguments[:2], **kwargs)


def test_impossible_calls():
    env = PlanarVectorEnv(GOAL1, 2)
    with pytest.raises(UsageError, match="reset"):
        env.step(np.zeros((2, 2)))
    env.reset(seed=0, options={"reset_mask": np.array([True, False])})
    with pytest.raises(UsageError, match="reset"):
        env.step(np.zeros((2, 2)))
    env.reset(seed=0)
    for shape in ((2,), (2, 3), (1, 2), (2, 2, 1)):
        with pytest.raises(UsageError, match=r"takes \(2, 2\)"):
            env.step(np.zeros(shape))
    for mask in (np.array([True]), np.array([0, 1]), [[True, False]]):
        with pytest.raises(UsageError, match="reset_mask"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(UsageError, match="got 3 seeds for 2"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(UsageError, match="negative"):
        env.reset(seed=-1)
    state = env.get_state()
    with pytest.raises(UsageError, match="2 environments"):
        PlanarVectorEnv(GOAL1, 3).set_state(state)
    goal0, circle0 = PlanarVectorEnv("SafetyPointGoal0-v0"), PlanarVectorEnv("SafetyPointCircle0-v0")
    goal0.reset(seed=0)
    with pytest.raises(UsageError, match="SafetyPointGoal0-v0"):
        circle0.set_state(goal0.get_state())


def test_actions_are_taken_as_they_come_and_left_alone():
    env, other = PlanarVectorEnv(GOAL1, 2), PlanarVectorEnv(GOAL1, 2)
    env.reset(seed=0)
    other.reset(seed=0)
    actions = np.array([[2.0, 0.25], [-0.5, -3.0]], np.float32)
    kept = actions.copy()
    equal(env.step(actions), other.step(np.asfortranarray(np.clip(actions, -1, 1), np.float64)))
    np.testing.assert_array_equal(actions, kept)
    equal(env.step([[0, 1], [1, 0]]), other.step(np.array([[0, 1], [1, 0]])))


def test_results_are_the_callers():
    """What a step returned is not written to by the next."""
    env = PlanarVectorEnv(GOAL1, 2)
    obs, _ = env.reset(seed=0)
    first = env.step(np.ones((2, 2)))
    kept = [obs.copy(), *(np.copy(x) for x in first[:4]), first[4]["cost"].copy()]
    env.step(np.ones((2, 2)))
    env.reset()
    for a, b in zip(kept, [obs, *first[:4], first[4]["cost"]], strict=True):
        np.testing.assert_array_equal(a, b)
    info = first[4]
    assert info["cost"] is not info["costs"]["hazards"]


@pytest.mark.parametrize("task_id", TASKS)
def test_make_vec_gives_it(task_id):
    env = make_vec(task_id, 2)
    assert isinstance(env, PlanarVectorEnv)
    assert env.metadata["backend"] == "planar"
    assert env.metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP
    assert env.spec.id == f"saferl/{task_id}"
    assert env.spec.max_episode_steps == env.task.max_episode_steps
    assert type(make_vec(task_id, 2, backend="original")).__name__ == "SerialVectorEnv"


def test_an_engine_that_cannot_step_the_task_is_refused():
    with pytest.raises(UsageError, match=r"SafetyCarGoal1-v0 .* has no planar engine; use backend 'auto'"):
        make_vec("SafetyCarGoal1-v0", 2, backend="planar")
    with pytest.raises(UsageError, match="set processes to 0"):
        make_vec(GOAL1, 2, backend="planar", processes=2)


def test_a_command_that_is_not_a_number_is_seen_and_stays_in_its_row():
    env, other = PlanarVectorEnv(GOAL1, 3), PlanarVectorEnv(GOAL1, 3)
    env.reset(seed=0)
    other.reset(seed=0)
    actions = np.ones((3, 2))
    actions[1, 0] = np.nan
    for _ in range(3):
        obs, rewards, *_ = env.step(actions)
        expected, paid, *_ = other.step(np.ones((3, 2)))
    assert np.isnan(obs[1]).any()
    assert np.isnan(rewards[1])
    np.testing.assert_array_equal(obs[[0, 2]], expected[[0, 2]])
    np.testing.assert_array_equal(rewards[[0, 2]], paid[[0, 2]])
