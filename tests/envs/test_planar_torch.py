"""The planar engine in array code: the compiled engine's numbers on a torch device, and no waiting for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import saferl.envs
from saferl.agents.online import engine, ppo
from saferl.envs import make_vec, runs_on_devices
from saferl.envs.safety_gym.planar import torch_env as module
from saferl.envs.safety_gym.planar.env import PlanarVectorEnv
from saferl.envs.safety_gym.planar.tasks import TASKS
from saferl.envs.safety_gym.planar.torch_env import PlanarTorchVectorEnv
from saferl.errors import SaferlError, UsageError
from saferl.experiment.checkpoint import list_checkpoints
from saferl.experiment.config import to_json
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run

GOAL1 = "SafetyPointGoal1-v0"
GOALS = ("SafetyPointGoal0-v0", GOAL1)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
#: Where it runs, and whether steps may wait for the device: "queued" is CUDA's way on the CPU.
PLACES = ("cpu", "queued", pytest.param("cuda", marks=CUDA))
#: A GPU's sines differ in their last bit, which a single control step can multiply by 1e7.
CLOSE = {"cpu": 1e-10, "queued": 1e-10, "cuda": 1e-7}


def make(task_id, num_envs=1, place="cpu"):
    env = PlanarTorchVectorEnv(task_id, num_envs, device="cpu" if place == "queued" else place)
    if place == "queued":
        env._waits = False
    return env


def arrays(result):
    """A step's result as arrays, the nested costs by name."""
    obs, rewards, terminated, truncated, info = result
    flat = {name: value for name, value in info.items() if name != "costs"}
    flat |= {f"costs/{name}": value for name, value in info["costs"].items()}
    flat |= {"obs": obs, "rewards": rewards, "terminated": terminated, "truncated": truncated}
    return {name: value.cpu().numpy() if isinstance(value, Tensor) else value for name, value in flat.items()}


def close(mine, expected, tolerance=1e-10):
    """Whether two results of `step` agree: what is counted exactly, what is measured closely."""
    mine, expected = arrays(mine), arrays(expected)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert mine[name].dtype == value.dtype
        if name in ("obs", "rewards", "final_obs"):
            np.testing.assert_allclose(mine[name], value, rtol=0, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(mine[name], value, err_msg=name)


def same_state(mine, expected, names=("places", "rotations", "keys", "cursor", "steps")):
    for name in names:
        np.testing.assert_array_equal(mine[name], expected[name], err_msg=name)


def step_both(env, other, actions):
    return env.step(torch.tensor(actions, device=env.torch_device)), other.step(actions)


# --- the same numbers as the compiled engine --------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("task_id", TASKS)
def test_short_trajectories(task_id, place):
    """From the compiled engine's state, eight steps at a time, twenty times; costs exactly."""
    env, other = make(task_id, 60, place), PlanarVectorEnv(task_id, 60)
    first, _ = other.reset(seed=3)
    np.testing.assert_array_equal(env.reset(seed=3)[0].cpu(), first)
    same_state(env.get_state(), other.get_state(), other.get_state())
    rng = np.random.default_rng(0)
    for _ in range(20):
        env.set_state(other.get_state())
        turn = rng.uniform(-1, 1, (60, 1))
        for _ in range(8):
            actions = np.concatenate([rng.uniform(-0.02, 0.1, (60, 1)), turn], 1)
            mine, expected = step_both(env, other, actions)
            # A rounding at the block's beginning may grow, in a few rows, before its end.
            difference = np.abs(mine[0].cpu().numpy() - expected[0]).max(1)
            assert np.quantile(difference, 0.9) < CLOSE[place]
            close(mine, expected, tolerance=1e6 * CLOSE[place])
        same_state(env.get_state(), other.get_state(), ("keys", "cursor", "steps"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("task_id", TASKS)
def test_from_the_same_state_a_step_is_the_same(task_id, place):
    """One step each from 150 states along a driven trajectory, hazards, walls and vases included."""
    env, other = make(task_id, 40, place), PlanarVectorEnv(task_id, 40)
    other.reset(seed=9)
    env.reset(seed=9)
    rng = np.random.default_rng(1)
    costs = 0.0
    for step in range(150):
        state = other.get_state()
        if step == 75:
            vase = TASKS[task_id].vase
            things = state["places"].shape[1]
            # Some robots go where it costs, some against the vase.
            state["state"][:20, :2] = (1.2, 0.4) if TASKS[task_id].kind == "circle" else (0.6, 0.4)
            if task_id == GOAL1:
                state["state"][:20, :2] = state["places"][:20, things - 2] + 0.05
                state["state"][20:, :2] = state["places"][20:, vase] + 0.12
            other.set_state(state)
        env.set_state(state)
        actions = rng.uniform(-1.5, 1.5, (40, 2))
        mine, expected = step_both(env, other, actions)
        close(mine, expected, CLOSE[place])
        after, theirs = env.get_state(), other.get_state()
        same_state(after, theirs, ("rotations", "keys", "cursor", "steps"))
        np.testing.assert_allclose(after["places"], theirs["places"], rtol=0, atol=CLOSE[place] / 10)
        # A vase's velocity is a way by the time of a step.
        np.testing.assert_allclose(after["state"], theirs["state"], rtol=0, atol=10 * CLOSE[place])
        costs += expected[4]["cost"].sum()
    assert costs > 0 or TASKS[task_id].cost_name == "cost"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("task_id", GOALS)
def test_goals_are_the_compiled_engines_bit_for_bit(task_id, place):
    """Robots are put into their goals; 25 goals in a row use up about a block of random numbers."""
    num = 50
    env, other = make(task_id, num, place), PlanarVectorEnv(task_id, num)
    env.reset(seed=100)
    other.reset(seed=100)
    rng = np.random.default_rng(0)
    for round_ in range(25):
        state = other.get_state()
        chosen = rng.random(num) < 0.7
        state["state"][chosen, :2] = state["places"][chosen, 1]
        state["state"][:, 3:6] = 0.0
        other.set_state(state)
        if place == "cpu" and round_ % 2:
            env.set_state(state)
        else:  # without a trip over the host: random numbers go on in the device's own window
            env._state.copy_(torch.tensor(state["state"].T))
        mine, expected = step_both(env, other, np.zeros((num, 2)))
        assert (expected[4]["goal_met"] >= chosen).all()
        close(mine, expected, 10 * CLOSE[place])
        np.testing.assert_array_equal(env._places.permute(2, 1, 0).cpu().numpy(), other.get_state()["places"])
    same_state(env.get_state(), other.get_state())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("task_id", [GOAL1, "SafetyPointCircle2-v0"])
def test_layouts_after_autoresets_are_the_compiled_engines(task_id, place):
    """Zero actions keep the robots at rest; the ends of two episodes, the environments out of step."""
    env, other = make(task_id, 6, place), PlanarVectorEnv(task_id, 6)
    other.reset(seed=0)
    env.reset(seed=0)
    ends = 0
    for _ in range(2):
        state = other.get_state()
        state["steps"] += TASKS[task_id].max_episode_steps - np.array([70, 70, 3, 70, 1, 30])
        other.set_state(state)
        env.set_state(state)
        for _ in range(70):
            mine, expected = step_both(env, other, np.zeros((6, 2)))
            close(mine, expected)
            ends += int(expected[3].sum())
        other.reset(options={"reset_mask": other.get_state()["steps"] > 0})
        env.reset(options={"reset_mask": env.get_state()["steps"] > 0})
    assert ends == 12
    same_state(env.get_state(), other.get_state())


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_the_twister_is_numpys(seed):
    reference = np.random.RandomState(seed)
    key = torch.tensor(reference.get_state()[1].view(np.int32))[None]
    for _ in range(4):
        key = module._next_block(key)
        expected = reference.uniform(size=312)
        np.testing.assert_array_equal(module._doubles(key)[0].numpy(), expected)
        np.testing.assert_array_equal(key[0].numpy().view(np.uint32), reference.get_state()[1])


@pytest.mark.parametrize("elements", [1, 4000, 2**24])
def test_the_search_in_chunks_finds_the_same_goals(elements, monkeypatch):
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    for place in ("cpu", "queued"):
        env, other = make(GOAL1, 40, place), PlanarVectorEnv(GOAL1, 40)
        assert env._chunk == max(1, min(156, elements // 400))
        env.reset(seed=0)
        other.reset(seed=0)
        for _ in range(6):
            state = other.get_state()
            state["state"][:, :2] = state["places"][:, 1]
            other.set_state(state)
            env.set_state(state)
            step_both(env, other, np.zeros((40, 2)))
            same_state(env.get_state(), other.get_state())


def crowd(env, row=0):
    """Leave room for the goal in a corner only, so that the next search of `row` is long; `env` has GOAL1."""
    state = env.get_state()
    at = np.linspace(-1.2, 1.2, 3)
    grid = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2)
    state["places"][row, 2:10] = grid[:8]
    state["places"][row, 10] = 9.0
    state["state"][row, :2] = state["places"][row, 1] = 0.0
    state["state"][row, 3:6] = 0.0
    return state


def test_a_long_search_goes_on_beyond_the_window():
    env, other = make(GOAL1, 3), PlanarVectorEnv(GOAL1, 3)
    keepouts = np.array(other._keepouts)
    keepouts[2:10] = 0.795  # what is free in the corner is about a thousandth of the area
    for engine_ in (env, other):
        engine_.reset(seed=2)
        engine_._keepouts[:] = keepouts
    distances = keepouts[env._others.numpy()] + 0.0 + keepouts[1]
    env._clearances = torch.tensor(distances)[None, :, None]
    state = crowd(other)
    env.set_state(state)
    other.set_state(state)
    mine, expected = step_both(env, other, np.zeros((3, 2)))
    assert expected[4]["goal_met"].tolist() == [True, False, False]
    assert not expected[2].any()
    after = other.get_state()
    assert (after["keys"][0] != state["keys"][0]).any()
    close(mine, expected)
    same_state(env.get_state(), after)


def test_a_goal_without_a_place_ends_the_episode_on_the_cpu():
    env, other = make("SafetyPointGoal0-v0", 2), PlanarVectorEnv("SafetyPointGoal0-v0", 2)
    for engine_ in (env, other):
        engine_.reset(seed=0)
        state = engine_.get_state()
        goal = state["places"][0, 1].copy()
        engine_._bounds[1] = [*goal, *goal]
        state["state"][0, :2] = goal
        engine_.set_state(state)
    mine, expected = step_both(env, other, np.zeros((2, 2)))
    assert expected[2].tolist() == [True, False]
    close(mine, expected)
    same_state(env.get_state(), other.get_state())


def test_where_nothing_may_wait_a_goal_without_a_place_takes_the_last():
    env = make("SafetyPointGoal0-v0", 2, "queued")
    env.reset(seed=0)
    state = env.get_state()
    goal = state["places"][0, 1].copy()
    state["state"][0, :2] = goal
    env._bounds[1] = [*goal, *goal]
    env.set_state(state)
    _, rewards, terminated, truncated, info = env.step(torch.zeros(2, 2))
    assert not (terminated | truncated).any()
    assert info["goal_met"].tolist() == [True, False]
    assert rewards[0] > 0.9
    after = env.get_state()
    np.testing.assert_array_equal(after["places"][0, 1], goal)
    assert after["steps"].tolist() == [1, 1]


# --- the contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_everything_is_a_tensor_on_the_device(place):
    env = make(GOAL1, 3, place)
    obs, info = env.reset(seed=0)
    assert info == {}
    assert obs.device == env.torch_device
    state = env.get_state()
    state["steps"][1] = 999
    env.set_state(state)
    obs, rewards, terminated, truncated, info = env.step(torch.zeros(3, 2, device=env.torch_device))
    assert (obs.shape, obs.dtype) == ((3, 60), torch.float64)
    for value, dtype in ((rewards, torch.float64), (terminated, torch.bool), (truncated, torch.bool)):
        assert (value.shape, value.dtype, value.device) == ((3,), dtype, env.torch_device)
    assert truncated.tolist() == info["_final_obs"].tolist() == [False, True, False]
    assert info.keys() == {"cost", "costs", "goal_met", "final_obs", "_final_obs"}
    for value in (info["cost"], info["costs"]["hazards"], info["goal_met"], info["final_obs"]):
        assert value.device == env.torch_device
    assert (info["final_obs"][1] != obs[1]).any()
    assert (info["final_obs"][0] == obs[0]).all()
    for name, value in env.get_state().items():
        assert name == "task" or isinstance(value, np.ndarray)


def test_states_go_to_and_fro():
    """A thousand steps that change the engine every hundred, and resume from stored states."""
    env, other = make(GOAL1, 8), PlanarVectorEnv(GOAL1, 8)
    env.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(3):
        for _ in range(100):
            env.step(torch.tensor(rng.uniform(-1, 1, (8, 2))))
        other.set_state(env.get_state())
        same_state(other.get_state(), env.get_state(), env.get_state())
        for _ in range(100):
            other.step(rng.uniform(-1, 1, (8, 2)))
        env.set_state(other.get_state())
        same_state(env.get_state(), other.get_state(), env.get_state())


@pytest.mark.parametrize("task_id", TASKS)
def test_a_stored_state_goes_on_with_the_same_bits(task_id):
    env, other = make(task_id, 4), make(task_id, 4)
    env.reset(seed=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(70):
        env.step(2 * torch.rand(4, 2, generator=generator) - 1)
    state = env.get_state()
    actions = 2 * torch.rand(150, 4, 2, generator=generator) - 1
    first = [arrays(env.step(a)) for a in actions]
    other.set_state(state)
    for expected, a in zip(first, actions, strict=True):
        mine = arrays(other.step(a))
        for name, value in expected.items():
            np.testing.assert_array_equal(mine[name], value)


@pytest.mark.parametrize("task_id", [GOAL1, "SafetyPointRun0-v0"])
def test_many_environments_are_single_ones(task_id):
    many, single = make(task_id, 3), [make(task_id) for _ in range(3)]
    obs, _ = many.reset(seed=4)
    for row, env in enumerate(single):
        np.testing.assert_array_equal(env.reset(seed=4 + row)[0][0], obs[row])
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        actions = torch.rand(3, 2, generator=generator, dtype=torch.float64)
        result = many.step(actions)
        for row, env in enumerate(single):
            # Vectorised sines of other widths may differ in their last bit.
            np.testing.assert_allclose(env.step(actions[row : row + 1])[0][0], result[0][row], atol=1e-5)
    for row, env in enumerate(single):
        same_state(
            {n: v[0] for n, v in env.get_state().items()}, {n: v[row] for n, v in many.get_state().items()}
        )


def test_a_mask_resets_its_rows_alone():
    env, other = make(GOAL1, 4), PlanarVectorEnv(GOAL1, 4)
    mask = np.array([False, True, False, True])
    for engine_ in (env, other):
        engine_.reset(seed=0)
        engine_.reset(options={"reset_mask": mask})
        obs, _ = engine_.reset(seed=[None, 1, 99, 2**32 + 7], options={"reset_mask": mask})
    np.testing.assert_array_equal(env.get_state()["observations"], obs)
    same_state(env.get_state(), other.get_state(), other.get_state())
    unchanged, _ = env.reset(options={"reset_mask": np.zeros(4, bool)})
    np.testing.assert_array_equal(unchanged, obs)


def test_results_are_the_callers():
    env = make(GOAL1, 2)
    obs, _ = env.reset(seed=0)
    actions = torch.ones(2, 2, requires_grad=True)
    first = env.step(actions)
    kept = [x.clone() for x in (obs, *first[:4], first[4]["cost"], first[4]["goal_met"])]
    env.step(actions)
    env.reset()
    for a, b in zip(kept, (obs, *first[:4], first[4]["cost"], first[4]["goal_met"]), strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad


def test_a_command_that_is_not_a_number_stays_in_its_row():
    for place in ("cpu", "queued"):
        env, other = make(GOAL1, 3, place), make(GOAL1, 3, place)
        env.reset(seed=0)
        other.reset(seed=0)
        actions = torch.ones(3, 2)
        spoilt = actions.clone()
        spoilt[1, 0] = torch.nan
        for _ in range(3):
            obs, rewards, *_ = env.step(spoilt)
            expected, *_ = other.step(actions)
        assert obs[1].isnan().any()
        assert rewards[1].isnan()
        assert torch.equal(obs[[0, 2]], expected[[0, 2]])


def test_impossible_arguments_and_calls():
    with pytest.raises(UsageError, match="SafetyPointGoal1-v0"):
        PlanarTorchVectorEnv("SafetyPointGoal2-v0", 1, device="cpu")
    with pytest.raises(UsageError, match="num_envs is 0"):
        PlanarTorchVectorEnv(GOAL1, 0, device="cpu")
    with pytest.raises(UsageError, match="not 10"):
        PlanarTorchVectorEnv(GOAL1, 1, device="cpu", max_episode_steps=10)
    with pytest.raises(UsageError, match="unknown device"):
        PlanarTorchVectorEnv(GOAL1, 1, device="toaster")
    with pytest.raises(UsageError, match="float64"):
        PlanarTorchVectorEnv(GOAL1, 1, device="meta")
    env = make(GOAL1, 2)
    with pytest.raises(UsageError, match="reset"):
        env.step(torch.zeros(2, 2))
    env.reset(seed=0)
    for shape in ((2,), (2, 3), (1, 2)):
        with pytest.raises(UsageError, match=r"takes \(2, 2\)"):
            env.step(torch.zeros(shape))
    with pytest.raises(UsageError, match="reset_mask"):
        env.reset(options={"reset_mask": [True]})
    with pytest.raises(UsageError, match="negative"):
        env.reset(seed=-1)
    with pytest.raises(UsageError, match="2 environments"):
        make(GOAL1, 3).set_state(env.get_state())
    with pytest.raises(UsageError, match="Circle0"):
        make("SafetyPointCircle0-v0", 2).set_state(env.get_state())
    env._keepouts[:] = 5.0
    with pytest.raises(SaferlError, match="no layout was found for environment 1"):
        env.reset(options={"reset_mask": np.array([False, True])})


def test_make_vec_takes_a_device(monkeypatch):
    assert isinstance(make_vec(GOAL1, 2, device="cpu"), PlanarVectorEnv)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="torch sees no GPU"):
            make_vec(GOAL1, 2, device="cuda")
        monkeypatch.setattr(module, "choose_device", lambda name: torch.device("cpu"))
    env = make_vec(GOAL1, 2, device="cuda")
    assert isinstance(env, PlanarTorchVectorEnv)
    assert env.metadata["backend"] == "planar torch"
    assert env.spec.id == f"saferl/{GOAL1}"
    for task, options in (
        ("SafetyCarGoal1-v0", {}),
        ("SpeedLimit-v0", {}),
        ("CartPole-v1", {}),
        (GOAL1, {"backend": "original"}),
        (GOAL1, {"processes": 2}),
        (GOAL1, {"threads": 2}),
    ):
        with pytest.raises(UsageError, match="cannot be stepped on cuda"):
            make_vec(task, 2, device="cuda", **options)
    assert runs_on_devices(GOAL1)
    assert not runs_on_devices("SafetyPointGoal2-v0")
    assert not runs_on_devices(GOAL1, backend="original")


# --- no waiting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", TASKS)
def test_a_step_reads_nothing_back(task_id, monkeypatch):
    """On torch's "meta" device tensors have no numbers: whatever needs one on the host raises."""
    monkeypatch.setattr(module, "_SHIFT_INTERVAL", 2)
    env = make(task_id, 5, "queued")
    env.reset(seed=0)
    for name, value in vars(env).items():
        if isinstance(value, Tensor):
            setattr(env, name, value.to("meta"))
    env.torch_device = torch.device("meta")
    for _ in range(3):
        obs, rewards, terminated, truncated, info = env.step(torch.zeros(5, 2, device="meta"))
    assert obs.shape == (5, env.task.observation_size)
    for value in (obs, rewards, terminated, truncated, info["cost"]):
        assert value.is_meta


@CUDA
@pytest.mark.parametrize("task_id", TASKS)
def test_a_step_does_not_wait_for_the_gpu(task_id):
    env = make(task_id, 256, "cuda")
    env.reset(seed=0)
    actions = torch.rand(256, 2, device=env.torch_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(module._SHIFT_INTERVAL + 2):
            env.step(actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- learning from it -------------------------------------------------------------------------------------


def config_of(**changes):
    values = {
        "env": "SafetyPointCircle1-v0",
        "num_envs": 8,
        "total_steps": 8 * 600,
        "steps_per_iteration": 8 * 150,
        "epochs": 2,
        "hidden_sizes": (16,),
        "checkpoint_interval": 0.0,
        **changes,
    }
    return ppo.Config(**values)


def train(config, folder):
    run = Run.create(folder, {"algorithm": "ppo", "config": to_json(config)}, quiet=True)
    try:
        ppo.train(config, run)
    finally:
        run.close()


def weights(folder: Path) -> tuple[bytes, bytes]:
    newest = list_checkpoints(folder / "checkpoints")[-1]
    return (newest / "policy.safetensors").read_bytes(), (newest / "training.safetensors").read_bytes()


def test_an_agent_learns_from_environments_on_a_device(tmp_path, monkeypatch):
    """The engine's device path: the same episodes are reported, and a resumed run ends with the same bits."""
    config = config_of()
    train(config, tmp_path / "host")
    monkeypatch.setattr(saferl.envs, "make_vec", lambda task_id, n, **_: make(task_id, n))
    train(config, tmp_path / "device")
    host, device = (read_metrics(tmp_path / name / "metrics.csv")[-1] for name in ("host", "device"))
    assert host.keys() == device.keys()
    assert device["train/episode_length"] == host["train/episode_length"] == 500.0
    assert device["train/cost"] * 8 == int(device["train/cost"] * 8) > 0
    assert device["train/cost/out_of_boundary"] == device["train/cost"]
    assert device["train/return"] == pytest.approx(host["train/return"], abs=2.0)

    run = Run.create(tmp_path / "broken", {"algorithm": "ppo", "config": to_json(config)}, quiet=True)
    log = run.log

    def stop_at_third(step, metrics):
        if step == 3 * config.steps_per_iteration:
            raise KeyboardInterrupt
        log(step, metrics)

    run.log = stop_at_third
    with pytest.raises(KeyboardInterrupt):
        ppo.train(config, run)
    run.close()
    run = Run.open(tmp_path / "broken", quiet=True)
    ppo.train(config, run)
    run.close()
    assert weights(tmp_path / "broken") == weights(tmp_path / "device")


def test_the_device_is_used_where_it_is_worth_it(tmp_path, monkeypatch):
    asked = []

    class Stop(Exception):
        pass

    def record(task_id, n, **options):
        asked.append(options.get("device", "cpu"))
        raise Stop

    monkeypatch.setattr(saferl.envs, "make_vec", record)
    monkeypatch.setattr(engine, "choose_device", torch.device)
    many = engine._DEVICE_ENVS
    cases = [
        ({"device": "cuda:0", "num_envs": many}, "cuda:0"),
        ({"device": "cuda", "num_envs": many - 1}, "cpu"),
        ({"device": "cpu", "num_envs": many}, "cpu"),
        ({"device": "cuda", "num_envs": many, "env": "SafetyCarGoal1-v0"}, "cpu"),
        ({"device": "cuda", "num_envs": many, "processes": 2}, "cpu"),
    ]
    for index, (changes, _) in enumerate(cases):
        with pytest.raises(Stop):
            train(config_of(**changes), tmp_path / str(index))
    assert asked == [expected for _, expected in cases]
