"""The constants of the 38 tasks, how they are found, and scores."""

from __future__ import annotations

import re

import gymnasium as gym
import numpy as np
import pytest

from saferl.envs import make_vec, resolve_id
from saferl.envs.datasets.tasks import TASKS, density_preset, find_task, normalised_score
from saferl.errors import UsageError


def test_there_are_38_tasks_of_three_families() -> None:
    families = [task.family for task in TASKS.values()]
    assert len(TASKS) == 38
    assert [families.count(name) for name in ("bullet", "safety-gymnasium", "metadrive")] == [8, 21, 9]
    for task in TASKS.values():
        assert task.cost_limits == ((20, 40, 80) if task.family == "safety-gymnasium" else (10, 20, 40))
        assert task.min_episode_reward < task.max_episode_reward
        assert 0 <= task.min_episode_cost < task.max_episode_cost


def test_the_file_names_hold_76093_episodes_and_about_the_largest_cost() -> None:
    numbers = {key: task.file_name.removesuffix(".hdf5").split("-")[-2:] for key, task in TASKS.items()}
    assert sum(int(episodes) for _, episodes in numbers.values()) == 76_093
    assert all(TASKS[key].episodes == int(episodes) for key, (_, episodes) in numbers.items())
    for key, (cost, _) in numbers.items():
        # a few differ from the largest cost in the data, most in MetaDrive
        assert int(cost) == pytest.approx(TASKS[key].max_episode_cost, rel=0.08), key


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("CarRun", "CarRun"),
        ("OfflineCarRun-v0", "CarRun"),
        ("OfflinePointGoal1Gymnasium-v0", "PointGoal1"),
        ("SafetyPointGoal1-v0", "PointGoal1"),
        ("saferl/SafetyPointGoal1-v0", "PointGoal1"),
        ("SafetyHalfCheetahVelocity-v1", "HalfCheetahVelocity"),
        ("OfflineHalfCheetahVelocityGymnasium-v1", "HalfCheetahVelocity"),
        ("OfflineMetadrive-easysparse-v0", "easysparse"),
        ("SafetyCarCircle-v0-100-1450.hdf5", "CarCircle"),
        ("SafetyCarCircle1Gymnasium-v0-250-1271.hdf5", "CarCircle1"),
        ("SafeMetaDrive-hardmean-v0-85-1000.hdf5", "hardmean"),
    ],
)
def test_a_task_has_many_names(name: str, key: str) -> None:
    assert find_task(name).key == key


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PointGoal", "did you mean 'PointGoal"),
        ("pointgoal1", "did you mean 'PointGoal1'"),
        ("OfflineCarRun-v1", "did you mean 'OfflineCarRun-v0'"),
        ("SafetyPointGoal3-v0", "did you mean 'SafetyPointGoal"),
        ("SafetyCarRun-v0-40-650.hdf5", "did you mean 'SafetyCarRun-v0-40-651.hdf5'"),
        ("nothing like it", "known: "),
    ],
)
def test_an_unknown_task_is_told_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(hint)):
        find_task(name)


def test_our_environments_have_the_tasks_sizes() -> None:
    for task in TASKS.values():
        if task.env_id is None:
            assert task.family == "metadrive"
            continue
        assert gym.spec(resolve_id(task.env_id)).max_episode_steps == task.episode_steps, task.key
    for key in ("PointGoal1", "PointCircle2"):  # the others need MuJoCo
        env = make_vec(TASKS[key].env_id or "", 1)
        assert env.single_observation_space.shape == (TASKS[key].observation_size,)
        assert env.single_action_space.shape == (TASKS[key].action_size,)
        env.close()


def test_worked_scores() -> None:
    reward, cost = normalised_score("PointGoal1", 20, 25, 10)
    assert (reward, cost) == (pytest.approx(0.664957, abs=5e-7), 2.5)
    reward, cost = normalised_score(TASKS["BallRun"], 500, 8, 20)
    assert (reward, cost) == (pytest.approx(0.364044, abs=5e-7), pytest.approx(0.4))
    assert normalised_score("BallRun", 0, [0, 3], 0)[1].tolist() == [1.0, 4.0]


def test_scores_of_arrays_equal_those_one_by_one() -> None:
    rng = np.random.default_rng(0)
    returns, costs = rng.normal(size=(7, 3)), rng.uniform(0, 50, (7, 3))
    limits = np.array([0.0, 20.0, 80.0])
    rewards, normalised = normalised_score("AntRun", returns, costs, limits)
    assert rewards.shape == normalised.shape == (7, 3)
    for i, j in np.ndindex(7, 3):
        one = normalised_score("AntRun", returns[i, j], costs[i, j], limits[j])
        assert (rewards[i, j], normalised[i, j]) == (one[0], one[1])


@pytest.mark.parametrize("limit", [-1, float("nan"), [10, -2]])
def test_an_impossible_limit_is_refused(limit: object) -> None:
    with pytest.raises(UsageError, match="zero or more"):
        normalised_score("AntRun", 1, 1, limit)  # type: ignore[arg-type]


def test_the_factors_of_rewards_from_the_constants() -> None:
    """Episode steps over the range of returns: what learners scale rewards by."""
    worked = {
        "HalfCheetahVelocity": 0.356992,
        "PointGoal1": 33.267735,
        "BallRun": 0.0768577,
        "AntCircle": 1.085325,
        "CarRun": 0.540006,
    }
    for key, factor in worked.items():
        task = TASKS[key]
        scale = task.episode_steps / (task.max_episode_reward - task.min_episode_reward)
        assert scale == pytest.approx(factor, rel=2e-6)


def test_density_presets() -> None:
    preset = density_preset("PointGoal2", 0.25)
    assert (preset.cost_bins, preset.return_bins, preset.max_per_cell, preset.min_per_cell) == (10, 6, 14, 2)
    assert density_preset("OfflineMetadrive-easydense-v0", 0.75).max_per_cell == 30
    assert sum(bool(task.densities) for task in TASKS.values()) == 30
    with pytest.raises(UsageError, match=r"CarRun has no preset for density 0.25; it has 0.5, 0.75"):
        density_preset("CarRun", 0.25)
    with pytest.raises(UsageError, match="give the grid's numbers"):
        density_preset("AntVelocity", 0.5)


def test_the_constants_are_the_packages() -> None:
    infos = pytest.importorskip("dsrl.infos")
    for key, task in TASKS.items():
        assert infos.DATASET_URLS[key].rsplit("/", 1)[1] == task.file_name
        assert infos.DEFAULT_MAX_EPISODE_STEPS[key] == task.episode_steps
        assert infos.MAX_EPISODE_REWARD[key] == task.max_episode_reward
        assert infos.MIN_EPISODE_REWARD[key] == task.min_episode_reward
        assert infos.MAX_EPISODE_COST[key] == task.max_episode_cost
        assert infos.MIN_EPISODE_COST[key] == task.min_episode_cost
    ours = {
        f"{task.dsrl_id}_density{density:g}": {
            "cbins": grid.cost_bins,
            "rbins": grid.return_bins,
            "max_npb": grid.max_per_cell,
            "min_npb": grid.min_per_cell,
        }
        for task in TASKS.values()
        for density, grid in task.densities.items()
    }
    assert ours == infos.DENSITY_CFG
