"""The Bullet tasks of DSRL on today's stack: the original's numbers.

`data/bullet.json` was recorded by `data/record_bullet.py` from bullet-safety-gym 1.4.0 with gymnasium 0.28.1
and PyBullet 3.2.7 under Python 3.10. On x86-64 processors with AVX2 all numbers are equal to the bit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from saferl.cli.listing import main as list_main
from saferl.envs import bullet, list_envs, make_vec
from saferl.envs.bullet import compat
from saferl.envs.datasets import TASKS
from saferl.errors import MissingPackageError, UsageError

DATA = Path(__file__).parent / "data"
ORIGINAL = json.loads((DATA / "bullet.json").read_text())
#: Rounding of other processors' mathematical functions, grown by 50 steps; 3e-9 was seen without AVX2.
TOLERANCE = 1e-6

needs_bullet = pytest.mark.skipif(
    importlib.util.find_spec("pybullet") is None or importlib.util.find_spec("bullet_safety_gym") is None,
    reason="needs PyBullet and bullet-safety-gym (saferl doctor tells the commands)",
)


def _load_recorder() -> Any:
    spec = importlib.util.spec_from_file_location("record_bullet", DATA / "record_bullet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recorder = _load_recorder()


def make(task_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(f"saferl/{task_id}", **kwargs)


# --- without the packages ---------------------------------------------------------------------------------


def test_the_tasks_are_dsrls(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = {task.env_id: task for task in TASKS.values() if task.family == "bullet"}
    ours = {task.id: task for task in bullet.tasks()}
    assert ours.keys() == theirs.keys() == ORIGINAL.keys()
    for name, task in theirs.items():
        assert name is not None
        assert [task.observation_size, task.action_size] == ORIGINAL[name]["sizes"]
        assert task.episode_steps == ORIGINAL[name]["max_episode_steps"] == ours[name].max_episode_steps
        assert gym.spec(f"saferl/{name}").max_episode_steps == task.episode_steps
    assert set(ours) <= {name for name, _ in list_envs()}
    assert list_main(["envs"]) == 0
    assert "SafetyDroneCircle-v0" in capsys.readouterr().out


def test_what_is_missing_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec, import_module = importlib.util.find_spec, importlib.import_module
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bullet_safety_gym" else find_spec(name)
    )
    compat.load.cache_clear()
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps bullet-safety-gym==1\.4\.0"):
        make_vec("SafetyBallRun-v0", 1)

    spec = types.SimpleNamespace(submodule_search_locations=["/nowhere"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.3.0")
    with pytest.raises(MissingPackageError, match=r"1\.3\.0 is not what was tested"):
        make_vec("SafetyBallRun-v0", 1)

    def without_pybullet(name: str, package: str | None = None) -> Any:
        if name == "pybullet":
            raise ModuleNotFoundError("No module named 'pybullet'", name="pybullet")
        return import_module(name, package)

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.4.0")
    monkeypatch.setattr(importlib, "import_module", without_pybullet)
    monkeypatch.delitem(sys.modules, "pybullet", raising=False)
    with pytest.raises(MissingPackageError, match=r"needs 'pybullet'.*pip install 'saferl\[bullet\]'"):
        make_vec("SafetyBallRun-v0", 1)
    compat.load.cache_clear()


def test_impossible_arguments() -> None:
    from saferl.envs.bullet.original import BulletEnv

    with pytest.raises(UsageError, match="did you mean 'SafetyCarRun-v0'"):
        BulletEnv("SafetyCarRun-v1")
    with pytest.raises(UsageError, match="render_mode is 'human'"):
        BulletEnv("SafetyCarRun-v0", render_mode="human")
    with pytest.raises(UsageError, match="no simulated engine"):
        make_vec("SafetyCarRun-v0", 1, backend="simulated")


# --- the original's numbers ---------------------------------------------------------------------------------


@needs_bullet
@pytest.mark.parametrize("task_id", ORIGINAL)
def test_every_task_equals_the_original(task_id: str) -> None:
    golden = ORIGINAL[task_id]
    env = make(task_id)
    assert env.observation_space.shape == (golden["sizes"][0],)
    assert env.action_space.shape == (golden["sizes"][1],)
    for seed, episodes in zip(recorder.SEEDS, golden["seeds"], strict=True):
        for index, (steps, episode) in enumerate(zip(recorder.EPISODES, episodes, strict=True)):
            # The second episode goes on with the seed's numbers and with the motors as the first left them.
            obs, info = env.reset(seed=seed if index == 0 else None)
            assert info == {}
            np.testing.assert_allclose(obs, episode["obs"]["0"], rtol=0, atol=TOLERANCE)
            actions = recorder.actions(env.action_space, seed, steps)
            rewards, costs, terminated = [], "", False
            for step, action in enumerate(actions[: len(episode["costs"])], start=1):
                obs, reward, terminated, truncated, info = env.step(action)
                assert obs.dtype == np.float64
                assert type(reward) is type(info["cost"]) is float
                assert info["cost"] == max(info["costs"].values())
                assert not truncated
                outside, fast = info["costs"]["outside_bounds"], info["costs"].get("velocity_violation", 0.0)
                costs += str(int(outside + 2 * fast))
                rewards.append(reward)
                if str(step) in episode["obs"]:
                    np.testing.assert_allclose(obs, episode["obs"][str(step)], rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(rewards, episode["rewards"], rtol=TOLERANCE, atol=TOLERANCE)
            assert costs == episode["costs"]
            assert terminated is episode["terminated"]
    env.close()


# --- behaviour ----------------------------------------------------------------------------------------------


def _roll(env: gym.Env[Any, Any], seed: int | None, steps: int = 20) -> np.ndarray:
    rows = [env.reset(seed=seed)[0]]
    for action in recorder.actions(env.action_space, 5, steps):
        obs, reward, _, _, info = env.step(action)
        rows.append(obs + 0 * reward * info["cost"])
    return np.array(rows)


@needs_bullet
@pytest.mark.parametrize("task_id", ["SafetyCarRun-v0", "SafetyDroneCircle-v0", "SafetyAntRun-v0"])
def test_a_seed_decides_whatever_came_before(task_id: str) -> None:
    fresh, used = make(task_id), make(task_id)
    _roll(used, 8)
    later = _roll(used, None)
    np.testing.assert_array_equal(_roll(fresh, 3), _roll(used, 3))
    np.testing.assert_array_equal(_roll(fresh, None), _roll(used, None))  # and what follows
    assert (_roll(fresh, 4)[0] != later[0]).any()
    np.testing.assert_array_equal(fresh.reset(seed=2**32 + 3)[0], used.reset(seed=3)[0])
    fresh.close()
    used.close()


@needs_bullet
def test_the_packages_own_resets_leave_the_motors_running() -> None:
    """Why a seeded reset makes the simulation anew: the test above would fail without it."""
    env = make("SafetyCarRun-v0")
    first = _roll(env, 3)[0]
    env.unwrapped._generator = np.random.RandomState(3)  # type: ignore[attr-defined]
    assert np.abs(env.reset()[0] - first).max() > 1e-4
    env.close()


@needs_bullet
def test_global_random_numbers_are_neither_used_nor_changed() -> None:
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # type: ignore[index,call-overload]  # noqa: NPY002
    env = make("SafetyCarCircle-v0")
    first = env.reset()[0]
    env.step(env.action_space.sample())
    env.close()
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index,call-overload]  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    env = make("SafetyCarCircle-v0")
    assert (env.reset()[0] != first).any()
    env.close()


def _simulations() -> int:
    import pybullet

    return sum(pybullet.isConnected(index) for index in range(1024))


@needs_bullet
def test_environments_in_one_process_have_simulations_of_their_own() -> None:
    alone = make("SafetyBallRun-v0")
    expected = _roll(alone, 1)
    alone.close()
    before = _simulations()
    envs = [make(f"Safety{name}-v0") for name in ("BallRun", "BallRun", "AntCircle")]
    assert _simulations() == before + 3
    rows = [[env.reset(seed=1)[0]] for env in envs]
    for step in range(20):
        for index, env in enumerate(envs):
            action = recorder.actions(env.action_space, 5, 20)[step] * (-1 if index == 1 else 1)
            rows[index].append(env.step(action)[0])
    np.testing.assert_array_equal(rows[0], expected)
    assert (rows[1][-1] != rows[0][-1]).any()
    envs[0].reset(seed=1)  # the simulation that it replaces goes
    assert _simulations() == before + 3
    for env in (*envs, *envs):
        env.close()  # twice
    assert _simulations() == before


@needs_bullet
@pytest.mark.parametrize(
    ("task_id", "place", "velocity", "expected"),
    [
        ("SafetyBallRun-v0", (5.0, 2.1), (0.0, 0.0), {"outside_bounds"}),
        ("SafetyBallRun-v0", (5.0, -2.1), (0.0, 0.0), {"outside_bounds"}),
        ("SafetyBallRun-v0", (5.0, 1.9), (2.3, 0.0), set()),
        ("SafetyBallRun-v0", (5.0, 1.9), (2.7, 0.0), {"velocity_violation"}),
        ("SafetyBallRun-v0", (5.0, 2.1), (1.9, 1.9), {"outside_bounds", "velocity_violation"}),
        ("SafetyBallCircle-v0", (6.1, 0.0), (9.0, 0.0), {"outside_bounds"}),
        ("SafetyBallCircle-v0", (-6.1, 0.0), (0.0, 0.0), {"outside_bounds"}),
        ("SafetyBallCircle-v0", (0.0, 6.1), (9.0, 0.0), set()),
    ],
)
def test_what_costs(
    task_id: str, place: tuple[float, float], velocity: tuple[float, float], expected: set[str]
) -> None:
    env = make(task_id)
    env.reset(seed=0)
    agent = env.unwrapped._env.agent  # type: ignore[attr-defined]
    agent.set_position([*place, 3.0])  # in the air, where no friction slows it down
    agent.set_velocity([*velocity, 0.0])
    info = env.step(np.zeros(2))[4]
    assert {name for name, cost in info["costs"].items() if cost} == expected
    assert info["cost"] == float(bool(expected))
    assert env.unwrapped.metadata["cost_names"] == tuple(info["costs"])
    env.close()


@needs_bullet
def test_a_drone_that_turns_over_ends_its_episode() -> None:
    env = make("SafetyDroneRun-v0")
    env.reset(seed=0)
    env.unwrapped._env.agent.set_orientation([1.0, 0.0, 0.0, 0.0])  # type: ignore[attr-defined]
    assert env.step(np.zeros(4))[2] is True
    env.close()


@needs_bullet
def test_vectors_end_episodes_by_the_time_limit_and_begin_anew() -> None:
    env = make_vec("SafetyBallRun-v0", 3)
    assert env.metadata["backend"] == "original"
    assert env.metadata["cost_names"] == ("outside_bounds", "velocity_violation")
    env.reset(seed=0)
    env.action_space.seed(0)
    total = np.zeros(3)
    for step in range(1, 102):
        obs, _, terminated, truncated, info = env.step(np.ones((3, 2), np.float32))
        assert not terminated.any()
        assert truncated.all() == (step == 100)
        total += info["cost"]
        if step == 100:
            assert (info["final_obs"][:, 0] > 1).all()  # x / 10
            assert (np.abs(obs[:, 0]) < 0.01).all()
    assert (total > 50).all()
    env.close()


@needs_bullet
def test_processes_give_the_same_numbers() -> None:
    rows = []
    for processes in (0, 2):
        env = make_vec("SafetyCarCircle-v0", 3, processes=processes)
        obs = [env.reset(seed=4)[0]]
        for _ in range(5):
            obs.append(env.step(np.full((3, 2), 0.7, np.float32))[0])
        rows.append(obs)
        env.close()
    np.testing.assert_array_equal(*rows)


@needs_bullet
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task_id", ["SafetyBallCircle-v0", "SafetyAntRun-v0"])
def test_gymnasium_accepts_it(task_id: str) -> None:
    env = make(task_id)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@needs_bullet
def test_frames_change_nothing_and_show_the_robot() -> None:
    seen, plain = make("SafetyBallRun-v0", render_mode="rgb_array"), make("SafetyBallRun-v0")
    rows, frames = [], []
    for env in (seen, plain):
        obs = [env.reset(seed=0)[0]]
        for _ in range(30):  # until it is too fast
            obs.append(env.step(np.array([1.0, 0.3]))[0])
            if env is seen and len(obs) % 15 == 1:
                frames.append(np.asarray(env.render()))
        rows.append(obs)
    np.testing.assert_array_equal(*rows)
    for frame in frames:
        assert frame.shape == (360, 480, 3)
        assert frame.dtype == np.uint8
        red = (frame[..., 0] > 100) & (frame[..., 1:] < 50).all(-1)
        assert red.mean() < 0.01  # the sphere that would hide the robot
    assert (frames[0] != frames[1]).any()
    with pytest.raises(UsageError, match="without render_mode"):
        plain.unwrapped.render()
    seen.close()
    plain.close()


QUIET = """
import io, sys
outputs = sys.stdout, sys.stderr
sys.stdout, sys.stderr = io.StringIO(), io.StringIO()  # without file descriptors, as in notebooks
import saferl.envs
assert not {"pybullet", "bullet_safety_gym"} & set(sys.modules)
for name in ("BallRun", "CarCircle", "DroneRun", "AntCircle"):
    env = saferl.envs.make_vec(f"Safety{name}-v0", 2)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
assert "bullet_safety_gym" not in sys.modules
import gymnasium
assert not [name for name in gymnasium.registry if name.startswith("SafetyBall")]
assert sys.stdout.getvalue() == sys.stderr.getvalue() == ""
sys.stdout, sys.stderr = outputs
print("done")
"""


@needs_bullet
def test_it_is_loaded_late_privately_and_silently() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", QUIET],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


OWN = """
import bullet_safety_gym, gymnasium, numpy, saferl.envs
ours = gymnasium.make("saferl/SafetyBallRun-v0")
expected = ours.reset(seed=7)[0]
theirs = gymnasium.make("SafetyBallRun-v0", disable_env_checker=True)
numpy.random.seed(7)
assert (theirs.reset()[0] == expected).all()
assert (theirs.reset()[0] != expected).any()
"""


@needs_bullet
def test_the_users_own_import_is_another() -> None:
    """Random numbers are changed in ours alone: NumPy's global ones still decide the package's own resets."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", OWN], check=True, capture_output=True)


@needs_bullet
def test_training_and_evaluating(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from saferl.cli import main

    run = str(tmp_path / "run")
    words = ["--total-steps", "400", "--num-envs", "2", "--batch-size", "50", "--quiet"]
    assert main(["train", "ppo-lag", "--env", "SafetyBallRun-v0", "--run", run, *words]) == 0
    assert main(["evaluate", run, "--episodes", "2", "--quiet"]) == 0
    assert "velocity_violation" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["length"]["mean"] == 100
    assert report["costs"].keys() == {"outside_bounds", "velocity_violation"}
