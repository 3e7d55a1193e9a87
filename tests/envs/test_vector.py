"""The vector contract: costs at every step, final observations, seeds, and workers that fail or vanish."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from saferl.envs import ProcessVectorEnv, SerialVectorEnv, make_vec, resolve_id
from saferl.envs.vector import StatefulVectorEnv
from saferl.errors import SaferlError, UsageError

SPACES = {
    "box": spaces.Box(-100, 100, (2,), np.float64),
    "discrete": spaces.Discrete(1000),
    "dict": spaces.Dict(
        image=spaces.Box(0, 255, (2, 3), np.uint8),
        inner=spaces.Dict(a=spaces.Discrete(500), b=spaces.Box(-100, 100, (), np.float32)),
    ),
    "tuple": spaces.Tuple((spaces.Box(-100, 100, (1,), np.float32), spaces.MultiBinary(3))),
}
ACTIONS = {
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "discrete": spaces.Discrete(4),
    "multi": spaces.MultiDiscrete([3, 5]),
}


class Counter(gym.Env):
    """Counts its steps; its episodes last `seed % 3 + 3` steps, the cost of a step is its number."""

    def __init__(self, kind="box", actions="box", costs="both", fail_at=None):
        self.observation_space, self.action_space = SPACES[kind], ACTIONS[actions]
        self.kind, self.costs, self.fail_at = kind, costs, fail_at
        self.metadata = {"render_modes": ["rgb_array"]}
        if costs == "both":
            self.metadata["cost_names"] = ("first", "second")
        self.last, self.count, self.closed = 3, 0, False

    def _observe(self):
        n = self.count
        return {
            "box": np.array([n, self.last], np.float64),
            "discrete": np.int64(n),
            "dict": {
                "image": np.full((2, 3), n, np.uint8),
                "inner": {"a": 10 * n, "b": np.float32(n / 2)},
            },
            "tuple": (np.array([n], np.float32), np.array([n % 2, 1, 0], np.int8)),
        }[self.kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.last = seed % 3 + 3
        self.count = 0
        return self._observe(), {"resets": 1, "options": str(options)}

    def step(self, action):
        self.count += 1
        if self.fail_at == self.count:
            raise ValueError(f"no step {self.count}")
        cost = float(self.count)
        info = {"count": self.count}
        if self.costs in ("both", "one"):
            info["cost"] = cost
        if self.costs == "both":
            info["costs"] = {"first": cost, "second": -cost}
        if self.costs == "undeclared part":
            self.metadata["cost_names"] = ("first",)
            info["costs"] = {"other": 1.0}
        return self._observe(), float(np.sum(action)), False, self.count >= self.last, info

    def render(self):
        return np.full((2, 2, 3), self.count, np.uint8)


def make_serial(n=4, **kwargs):
    return SerialVectorEnv([lambda: Counter(**kwargs)] * n)


def make_process(n=4, processes=2, **kwargs):
    return ProcessVectorEnv([lambda: Counter(**kwargs)] * n, processes)


def assert_trees_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_trees_equal(a[key], b[key])
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_trees_equal(x, y)
    else:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(params=["serial", "process"])
def make(request):
    made = []

    def build(*args, **kwargs):
        made.append((make_serial if request.param == "serial" else make_process)(*args, **kwargs))
        return made[-1]

    yield build
    for env in made:
        env.close()


def test_contract_of_a_step(make):
    env = make(4)
    assert isinstance(env, VectorEnv)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert env.metadata["cost_names"] == ("first", "second")
    obs, info = env.reset(seed=0)  # episodes of 3, 4, 5, 3 steps
    np.testing.assert_array_equal(obs, [[0, 3], [0, 4], [0, 5], [0, 3]])
    assert info["resets"].tolist() == [1] * 4
    actions = np.arange(8, dtype=np.float32).reshape(4, 2)
    for step in (1, 2):
        obs, rewards, terminations, truncations, info = env.step(actions)
        assert rewards.dtype == np.float64
        assert rewards.tolist() == [1, 5, 9, 13]
        assert terminations.dtype == truncations.dtype == np.bool_
        assert not truncations.any()
        assert info["cost"].dtype == np.float64
        assert info["cost"].tolist() == [step] * 4
        assert "final_obs" not in info
        assert info["count"].tolist() == [step] * 4
    obs, _, terminations, truncations, info = env.step(actions)
    assert truncations.tolist() == [True, False, False, True]
    assert not terminations.any()
    # the finishing step's cost, the reset's observation, and what the episode ended with
    assert info["cost"].tolist() == [3, 3, 3, 3]
    assert info["costs"]["second"].tolist() == [-3, -3, -3, -3]
    assert list(info["costs"]) == ["first", "second"]
    np.testing.assert_array_equal(obs, [[0, 3], [3, 4], [3, 5], [0, 3]])
    np.testing.assert_array_equal(info["final_obs"], [[3, 3], [3, 4], [3, 5], [3, 3]])
    assert info["_final_obs"].tolist() == [True, False, False, True]
    assert info["final_info"]["count"].tolist() == [3, 0, 0, 3]
    assert info["final_info"]["_count"].tolist() == [True, False, False, True]
    assert info["_resets"].tolist() == [True, False, False, True]
    obs, _, _, truncations, info = env.step(actions)
    assert truncations.tolist() == [False, True, False, False]
    assert info["cost"].tolist() == [1, 4, 4, 1]


def test_results_belong_to_the_caller(make):
    env = make(2)
    obs, _ = env.reset(seed=0)
    first = env.step(np.zeros((2, 2)))
    kept = [first[0].copy(), first[1].copy(), first[4]["cost"].copy()]
    env.step(np.ones((2, 2)))
    np.testing.assert_array_equal(obs, [[0, 3], [0, 4]])
    for a, b in zip([first[0], first[1], first[4]["cost"]], kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("actions", ACTIONS)
def test_serial_equals_process_for_every_space(kind, actions):
    serial = make_serial(5, kind=kind, actions=actions)
    process = make_process(5, 2, kind=kind, actions=actions)
    assert serial.observation_space == process.observation_space
    assert serial.action_space == process.action_space
    assert serial.metadata == process.metadata
    for (a, ai), (b, bi) in [(serial.reset(seed=7), process.reset(seed=7))]:
        assert_trees_equal(a, b)
        assert serial.observation_space.contains(a)
        assert_trees_equal(ai, bi)
    serial.action_space.seed(0)
    for _ in range(12):
        action = serial.action_space.sample()
        for a, b in zip(serial.step(action), process.step(action), strict=True):
            assert_trees_equal(a, b)
    process.close()


def test_final_observations_have_the_batched_structure(make):
    env = make(3, kind="dict", actions="discrete")
    env.reset(seed=0)
    for _ in range(3):
        obs, _, _, _, info = env.step(np.zeros(3, np.int64))
    assert info["_final_obs"].tolist() == [True, False, False]
    assert info["final_obs"]["inner"]["a"].tolist() == [30, 30, 30]
    assert obs["inner"]["a"].tolist() == [0, 30, 30]
    assert info["final_obs"]["image"].shape == (3, 2, 3)


@pytest.mark.parametrize(("costs", "expected"), [("one", 1.0), ("none", 0.0)])
def test_environments_without_parts_or_without_cost(make, costs, expected):
    env = make(2, costs=costs)
    assert env.metadata["cost_names"] == ("cost",)
    env.reset(seed=0)
    info = env.step(np.zeros((2, 2)))[4]
    assert info["cost"].tolist() == [expected] * 2
    assert info["costs"].keys() == {"cost"}
    assert info["costs"]["cost"].tolist() == [expected] * 2


def test_an_environment_of_gymnasium_has_no_cost():
    env = make_vec("CartPole-v1", 2)
    env.reset(seed=0)
    info = env.step(np.array([0, 1]))[4]
    assert info["cost"].tolist() == [0, 0]
    assert env.spec.id == "CartPole-v1"


def test_seeds(make):
    env = make(3)
    assert env.reset(seed=1)[0][:, 1].tolist() == [4, 5, 3]
    assert env.reset(seed=[2, 2, None])[0][:, 1].tolist() == [5, 5, 3]
    assert env.reset(options={"x": 1})[1]["options"][0] == "{'x': 1}"
    with pytest.raises(UsageError, match="got 2 seeds for 3 environments"):
        env.reset(seed=[1, 2])
    with pytest.raises(UsageError, match="negative"):
        env.reset(seed=-5)


def test_a_masked_reset_restarts_the_selected_environments_alone(make):
    env = make(4)
    env.reset(seed=0)  # episodes of 3, 4, 5, 3 steps
    env.step(np.zeros((4, 2)))
    mask = np.array([False, True, True, False])
    options = {"reset_mask": mask, "x": 1}
    obs, info = env.reset(seed=2, options=options)
    np.testing.assert_array_equal(obs, [[1, 3], [0, 3], [0, 4], [1, 3]])  # seeds 3 and 4 for those selected
    assert info["_resets"].tolist() == mask.tolist()
    assert info["options"][1] == "{'x': 1}"
    assert options.keys() == {"reset_mask", "x"}
    obs = env.step(np.zeros((4, 2)))[0]
    np.testing.assert_array_equal(obs[:, 0], [2, 1, 1, 2])
    assert env.step(np.zeros((4, 2)))[3].tolist() == [True, False, False, True]
    unchanged, _ = env.reset(options={"reset_mask": np.zeros(4, bool)})
    np.testing.assert_array_equal(unchanged[:, 0], [0, 2, 2, 0])
    with pytest.raises(UsageError, match="give 4 booleans"):
        env.reset(options={"reset_mask": [1, 0, 0, 1]})


def test_wrong_actions_are_refused_and_harmless(make):
    env = make(2)
    env.reset(seed=0)
    with pytest.raises(UsageError, match=r"actions have shape \(2,\); this environment takes \(2, 2\)"):
        env.step(np.zeros(2))
    assert env.step(np.zeros((2, 2)))[4]["cost"].tolist() == [1, 1]
    discrete = make(2, actions="discrete")
    discrete.reset(seed=0)
    with pytest.raises(TypeError):
        discrete.step(np.array([0.5, 0.5]))


def test_call_get_attr_and_render(make):
    env = make(3)
    env.reset(seed=0)
    env.step(np.zeros((3, 2)))
    assert env.get_attr("count") == (1, 1, 1)
    assert [frame[0, 0, 0] for frame in env.render()] == [1, 1, 1]


def test_a_failing_environment_raises_its_own_error(make):
    env = make(4, fail_at=2)
    env.reset(seed=0)
    env.step(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="no step 2") as caught:
        env.step(np.zeros((4, 2)))
    if isinstance(env, ProcessVectorEnv):
        assert "in the worker process" in caught.value.__notes__[0]
        assert "no step 2" in caught.value.__notes__[0]
        assert env.closed
        assert all(not worker.is_alive() for worker in env._workers)
        with pytest.raises(SaferlError, match="closed"):
            env.step(np.zeros((4, 2)))


def test_a_declared_cost_that_is_missing_is_told():
    env = make_serial(1, costs="undeclared part")
    env.reset(seed=0)
    env._block.cost_names = ("first",)
    with pytest.raises(SaferlError, match="declares the cost 'first'"):
        env.step(np.zeros((1, 2)))


class _Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_cross_the_pipe_keeps_its_message():
    class Broken(Counter):
        def step(self, action):
            raise _Unpicklable(1, 2)

    env = ProcessVectorEnv([Broken], 1)
    env.reset(seed=0)
    with pytest.raises(SaferlError, match="_Unpicklable: 1 and 2"):
        env.step(np.zeros((1, 2)))


def test_a_worker_that_cannot_build_its_environment():
    def build():
        if os.getpid() != parent:
            raise RuntimeError("no licence here")
        return Counter()

    parent = os.getpid()
    with pytest.raises(RuntimeError, match="no licence here"):
        ProcessVectorEnv([build, build], 2)


def _step_thrice(env):
    for _ in range(3):
        env.step(np.zeros((4, 2)))


def test_a_killed_worker_is_told():
    env = make_process(4, 2)
    env.reset(seed=0)
    os.kill(env._workers[1].pid, signal.SIGKILL)
    with pytest.raises(SaferlError, match=r"environments 2 to 3 ended with exit code -9"):
        _step_thrice(env)
    assert env.closed


def test_workers_end_with_close():
    env = make_process(4, 2)
    env.reset(seed=0)
    start = time.monotonic()
    env.close()
    env.close()
    assert time.monotonic() - start < 4
    assert [worker.exitcode for worker in env._workers] == [0, 0]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path, how):
    """Killed, interrupted (the whole group, as a terminal does) or terminated while it steps."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            from saferl.envs import make_vec
            if __name__ == "__main__":
                env = make_vec("SpeedLimit-v0", 4, processes=2)
                env.reset(seed=0)
                env.action_space.seed(0)
                print(*[worker.pid for worker in env._workers], flush=True)
                while True:
                    env.step(env.action_space.sample())
            """
        )
    )
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.3)
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)
    else:
        parent.send_signal(how)
    try:
        _, stderr = parent.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(parent.pid, signal.SIGKILL)
        raise
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in stderr
        assert stderr.count("Traceback") == 1  # the workers stay silent


def test_numbers_of_environments_and_processes():
    with pytest.raises(UsageError, match="num_envs is 0; ask for at least one environment"):
        make_vec("SpeedLimit-v0", 0)
    with pytest.raises(UsageError, match="processes is -1"):
        make_vec("SpeedLimit-v0", 2, processes=-1)
    with pytest.raises(UsageError, match="processes is 0"):
        ProcessVectorEnv([Counter], 0)
    with contextlib.closing(make_vec("SpeedLimit-v0", 2, processes=7)) as env:
        assert len(env._workers) == 2


def test_names():
    assert resolve_id("SpeedLimit-v0") == resolve_id("saferl/SpeedLimit-v0") == "saferl/SpeedLimit-v0"
    assert resolve_id("CartPole-v1") == "CartPole-v1"
    with pytest.raises(
        UsageError, match="unknown environment 'SafetyPointGaol1-v0'; did you mean 'SafetyPoi"
    ):
        make_vec("SafetyPointGaol1-v0", 1)
    with pytest.raises(UsageError, match="did you mean 'CartPole-v"):
        make_vec("CartPoel-v1", 1)
    with pytest.raises(UsageError, match="unknown backend 'orginal'; did you mean 'original'"):
        make_vec("SpeedLimit-v0", 1, backend="orginal")
    with pytest.raises(UsageError, match="no_such_module"):
        make_vec("no_such_module:Env-v0", 1)


def test_differing_spaces_are_refused():
    with pytest.raises(UsageError, match="must have equal spaces"):
        SerialVectorEnv([Counter, lambda: Counter(actions="discrete")])
    with pytest.raises(UsageError, match="must have equal spaces"):
        ProcessVectorEnv([Counter, lambda: Counter(actions="discrete")], 2)

    class Words(Counter):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Text(5)

    with pytest.raises(UsageError, match="Text spaces cannot be batched"):
        SerialVectorEnv([Words])


def test_only_some_environments_store_their_state(make):
    assert not isinstance(make(1), StatefulVectorEnv)
    assert isinstance(make_vec("SpeedLimit-v0", 1), StatefulVectorEnv)


def test_importing_the_package_is_light():
    code = (
        "import sys, saferl.envs; "
        "print([m for m in ('mujoco', 'safety_gymnasium', 'torch', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
