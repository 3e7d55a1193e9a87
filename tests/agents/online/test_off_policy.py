"""The off-policy engine: what is stored, how it is drawn, what a checkpoint restores, what stops a run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

import saferl.envs
from saferl.agents.online import replay, sac, sac_lag, sac_pid, td3, td3_lag, td3_pid
from saferl.agents.online.off_policy import Context, train_off_policy
from saferl.agents.online.off_policy_learner import OffPolicyLearner
from saferl.agents.online.replay import Batch, ReplayBuffer
from saferl.errors import CheckpointError, NonFiniteError, UsageError
from saferl.experiment import journal
from saferl.experiment.checkpoint import list_checkpoints, load_latest
from saferl.experiment.config import to_json
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run
from saferl.nn.models import Actor
from saferl.policies.run import load_run_policy

MODULES = {
    "sac": sac,
    "sac-lag": sac_lag,
    "sac-pid": sac_pid,
    "td3": td3,
    "td3-lag": td3_lag,
    "td3-pid": td3_pid,
}
SMALL: dict[str, Any] = {
    "env": "SpeedLimit-v0",
    "num_envs": 4,
    "total_steps": 1000,
    "steps_per_iteration": 200,
    "learning_starts": 200,
    "updates_per_step": 0.1,
    "batch_size": 16,
    "hidden_sizes": (16,),
    "checkpoint_interval": 0.0,
}


class DictBox(gym.Env[dict[str, Any], np.ndarray]):
    """Dict observations, a two-dimensional box of unequal bounds, episodes of eight steps."""

    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            {"kind": spaces.Discrete(3), "position": spaces.Box(-9, 9, (2,), np.float64)}
        )
        self.action_space = spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 10.0]), dtype=np.float64)

    def _observe(self) -> dict[str, Any]:
        return {"kind": np.int64(self.np_random.integers(3)), "position": self.np_random.uniform(-1, 1, 2)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.steps += 1
        return self._observe(), float(action[1]), self.steps == 8, False, {"cost": float(action[0] > 0)}


if "saferl-test/DictBox-v0" not in gym.registry:
    gym.register("saferl-test/DictBox-v0", entry_point=DictBox)


def config_of(name: str, **changes: Any) -> Any:
    values = {**SMALL, **changes}
    if name not in ("sac", "td3"):
        values = {"cost_limit": {"speed": 5.0}, "multiplier_warmup": 300, **values}
    return MODULES[name].Config(**values)


def start(name: str, folder: Path, **changes: Any) -> tuple[Any, Run]:
    config = config_of(name, **changes)
    return config, Run.create(folder, {"algorithm": name, "config": to_json(config)}, quiet=True)


def train(name: str, folder: Path, **changes: Any) -> Actor:
    config, run = start(name, folder, **changes)
    try:
        return MODULES[name].train(config, run)
    finally:
        run.close()


def resume(name: str, folder: Path, **changes: Any) -> Actor:
    run = Run.open(folder, quiet=True)
    try:
        return MODULES[name].train(config_of(name, **changes), run)
    finally:
        run.close()


def record(folder: Path) -> tuple[Any, ...]:
    """Everything of a run that must not depend on interruptions."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    rows = read_metrics(folder / "metrics.csv")
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    state = load_latest(folder / "checkpoints")[0]["training"]
    files = {path.name: path.read_bytes() for path in sorted((folder / "replay").iterdir())}
    parts = [(newest / f"{part}.safetensors").read_bytes() for part in ("policy", "training")]
    return newest.name, *parts, rows, state["replay"], state["algorithm"].get("constraints"), files


# --- what is stored ---------------------------------------------------------------------------------


class Scripted(VectorEnv):
    """Two environments with known rewards; the first is truncated at step 3, the second ends at step 2."""

    def __init__(self) -> None:
        self.num_envs = 2
        self.single_observation_space = spaces.Box(-100, 100, (1,), np.float64)
        self.single_action_space = spaces.Box(-4, 0, (1,), np.float32)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "cost_names": ("a", "b")}
        self.commands: list[np.ndarray] = []

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.clock = np.zeros(2, int)
        return self.clock[:, None].astype(float), {}

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.commands.append(np.array(actions))
        self.clock += 1
        reward = self.clock + np.array([0.0, 10.0])
        truncated = np.array([self.clock[0] == 3, False])
        terminated = np.array([False, self.clock[1] == 2])
        final = self.clock[:, None].astype(float) * 10
        ended = truncated | terminated
        self.clock[ended] = 0
        observations = np.where(ended[:, None], 0.0, final)
        info = {"cost": np.array([1.0, 2.0]), "costs": {"a": np.array([0.5, 1.0]), "b": reward * 0 + 3}}
        if ended.any():
            info |= {"final_obs": np.where(ended[:, None], final, observations), "_final_obs": ended}
        return observations, reward, terminated, truncated, info


class Recorder(OffPolicyLearner):
    """Keeps every batch and episode, learns nothing."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__(config, context, head="squashed")
        self.batches: list[Batch] = []
        self.episodes: list[Any] = []

    def update(self, batch: Batch) -> None:
        self.batches.append(batch)

    def end_iteration(self, episodes: Any, step: int) -> dict[str, float]:
        self.episodes.append((step, episodes))
        return {}

    def next_values(self, next_features: Any) -> Any: ...

    def objective(self, features: Any) -> Any: ...

    def after_policy_step(self) -> None: ...


def observe(tmp_path: Path, limits: dict[str, float] | None = None, **changes: Any) -> tuple[Recorder, Run]:
    config, run = start("sac", tmp_path / "run", **changes)
    made: list[Recorder] = []

    def build(context: Context) -> Recorder:
        made.append(Recorder(config, context))
        return made[0]

    train_off_policy(config, run, build, limits)
    run.close()
    return made[0], run


def stored(run: Run, columns: int) -> np.ndarray:
    payload = b"".join(p.read_bytes() for p in sorted((run.directory / "replay").iterdir()))
    return np.frombuffer(payload, "<f4").reshape(-1, columns)


def test_transitions_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated episode's next observation is its final one and is not marked as terminal."""
    env = Scripted()
    monkeypatch.setattr(saferl.envs, "make_vec", lambda *_, **__: env)
    sizes = {"num_envs": 2, "total_steps": 8, "steps_per_iteration": 8}
    learner, run = observe(tmp_path, {"b": 1.0, "cost": 1.0}, **sizes)
    rows = stored(run, 7)  # observation, action, reward, b, total cost, terminated, next observation
    one, two = rows[::2], rows[1::2]
    assert one[:, 0].tolist() == [0, 10, 20, 0]
    assert one[:, 6].tolist() == [10, 20, 30, 10]
    assert one[:, 5].tolist() == [0, 0, 0, 0]
    assert one[:, 2].tolist() == [1, 2, 3, 1]
    assert two[:, 0].tolist() == [0, 10, 0, 10]
    assert two[:, 6].tolist() == [10, 20, 10, 20]
    assert two[:, 5].tolist() == [0, 1, 0, 1]
    assert two[:, 2].tolist() == [11, 12, 11, 12]
    assert rows[:, 3].tolist() == [3.0] * 8
    assert rows[:, 4].tolist() == [1, 2] * 4
    # Stored actions lie in [-1, 1]; the environment's box is [-4, 0].
    np.testing.assert_allclose(np.concatenate(env.commands)[:, 0], rows[:, 1] * 2 - 2, rtol=1e-5, atol=1e-6)

    ((step, episodes),) = learner.episodes
    assert step == 8
    assert episodes.returns.tolist() == [23.0, 6.0, 23.0]
    assert episodes.lengths.tolist() == [2, 3, 2]
    assert episodes.costs["cost"].tolist() == [4.0, 3.0, 4.0]
    assert episodes.costs["b"].tolist() == [6.0, 9.0, 6.0]


def test_episodes_count_in_the_iteration_in_which_they_end(tmp_path: Path) -> None:
    learner, _ = observe(tmp_path, steps_per_iteration=120, total_steps=960)
    counts = {step: len(episodes) for step, episodes in learner.episodes}
    assert list(counts) == [120, 240, 360, 480, 600, 720, 840, 960]
    assert counts[120] == 0 or counts[120] < 4  # an episode lasts 100 steps of each of 4 environments
    assert sum(counts.values()) >= 8


def test_random_warm_up_draws_an_action_for_each_environment(tmp_path: Path) -> None:
    """One draw for all of them, of shape (1, A), would give every environment the same actions."""
    learner, run = observe(tmp_path, num_envs=50, total_steps=10_000, learning_starts=10_000)
    actions = stored(run, 9)[:, 3].reshape(-1, 50)
    assert len(np.unique(actions)) > 9_900
    assert abs(np.corrcoef(actions[:, 0], actions[:, 1])[0, 1]) < 0.25
    assert abs(actions.mean()) < 0.02
    assert actions.std() == pytest.approx(1 / np.sqrt(3), rel=0.02)
    assert not learner.batches


def test_the_policy_explores_once_learning_starts(tmp_path: Path) -> None:
    def narrow(learner: Recorder) -> None:
        with torch.no_grad():
            last = learner.actor.network[-1]
            last.weight.zero_()
            last.bias.copy_(torch.tensor([0.5, -20.0]))

    original = Recorder.__init__

    class Narrow(Recorder):
        def __init__(self, config: Any, context: Context) -> None:
            original(self, config, context)
            narrow(self)

    config, run = start("sac", tmp_path / "run", learning_starts=200, total_steps=400)
    train_off_policy(config, run, lambda context: Narrow(config, context))
    run.close()
    actions = stored(run, 9)[:, 3]
    assert actions[:200].std() > 0.5
    np.testing.assert_allclose(actions[200:], np.tanh(0.5), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"updates_per_step": 1.0}, 800),
        ({"updates_per_step": 0.3}, 240),
        ({"updates_per_step": 0.3, "update_interval": 100}, 240),
        ({"updates_per_step": 2.5, "num_envs": 7}, int((1001 - 200) * 2.5)),
        ({"updates_per_step": 0.0}, 0),
        ({"learning_starts": 2000}, 0),
        ({"learning_starts": 0, "updates_per_step": 0.1}, 100),
    ],
)
def test_gradient_steps_are_counted_exactly(changes: dict[str, Any], expected: int, tmp_path: Path) -> None:
    learner, _ = observe(tmp_path, **changes)
    assert len(learner.batches) == expected
    assert all(len(batch.terminated) == 16 for batch in learner.batches)


def test_observations_are_stored_raw_and_normalised_when_replayed(tmp_path: Path) -> None:
    trained = train("sac", tmp_path / "run", normalise_observations=True)
    config, run = start("sac", tmp_path / "other", normalise_observations=True)
    sac.train(config, run)
    run.close()
    assert trained.normaliser is not None
    assert trained.normaliser.count == 1000
    rows = stored(run, 9)
    np.testing.assert_allclose(trained.normaliser.mean, rows[:, :3].mean(0), rtol=1e-5)
    assert rows[:, 0].min() > 0  # speeds, not deviations from their mean


# --- the buffer -------------------------------------------------------------------------------------


def buffer(tmp_path: Path, capacity: int = 10) -> ReplayBuffer:
    return ReplayBuffer(
        capacity, 2, 1, ("the reward", "the cost 'x'"), torch.device("cpu"), tmp_path / "replay"
    )


def add(made: ReplayBuffer, first: int, count: int) -> None:
    column = torch.arange(first, first + count).float()[:, None]
    made.add(
        column.expand(-1, 2), column, torch.cat([column, -column], 1), column[:, 0] * 0, column.expand(-1, 2)
    )


def test_the_ring_keeps_the_latest(tmp_path: Path) -> None:
    made = buffer(tmp_path)
    for first in range(0, 24, 4):
        add(made, first, 4)
        kept = sorted(made.batch(torch.arange(len(made))).actions[:, 0].tolist())
        assert kept == list(range(max(0, first + 4 - 10), first + 4))
    batch = made.batch(torch.arange(10))
    assert torch.equal(batch.features, batch.actions.expand(-1, 2))
    assert torch.equal(batch.signals[:, 1], -batch.actions[:, 0])


@pytest.mark.parametrize("rows", [3, 9, 10, 17, 24])
def test_a_stored_ring_is_the_same_after_a_restart(rows: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(journal, "_ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(replay, "RowJournal", lambda folder, columns: journal.RowJournal(folder, columns, 4))
    made = buffer(tmp_path)
    for first in range(rows):
        add(made, first, 1)
    state = made.state_dict()
    made.sync()
    made.checkpointed(state)
    again = buffer(tmp_path)
    again.load_state_dict(state)
    assert len(again) == len(made)
    assert torch.equal(again.table[: len(made)], made.table[: len(made)])
    for first in (rows, rows + 3):
        add(made, first, 3)
        add(again, first, 3)
    assert torch.equal(again.table[: len(made)], made.table[: len(made)])
    again.checkpointed(again.state_dict())
    chunks = [int(path.stem[-6:]) for path in (tmp_path / "replay").iterdir()]
    assert min(chunks) == max(0, rows - 10) // 4  # what the checkpoint before needs, and no more


def test_batches_are_drawn_uniformly_with_replacement(tmp_path: Path) -> None:
    made = buffer(tmp_path, capacity=100)
    add(made, 0, 40)
    drawn = made.sample(40_000, torch.Generator().manual_seed(0)).actions[:, 0].long()
    counts = torch.bincount(drawn, minlength=40)
    assert len(counts) == 40
    chi_square = ((counts - 1000.0) ** 2 / 1000).sum().item()
    assert chi_square < 80  # 39 degrees of freedom: mean 39, 99.99 % below 80


def test_a_buffer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs .* GiB on cpu, which are not free; lower the buffer size"):
        buffer(tmp_path, capacity=2**50)


# --- resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_training_repeats_to_the_bit_and_a_resumed_run_ends_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of an iteration, with a buffer that has already begun to overwrite."""
    monkeypatch.setattr(replay, "RowJournal", lambda folder, columns: journal.RowJournal(folder, columns, 70))
    options: dict[str, Any] = {"buffer_size": 330}
    if name == "sac-lag":
        options |= {"auto_alpha": True, "normalise_observations": True}
    train(name, tmp_path / "whole", **options)
    train(name, tmp_path / "again", **options)
    assert record(tmp_path / "again") == record(tmp_path / "whole")
    if name == "sac":
        train(name, tmp_path / "other", seed=1, **options)
        assert record(tmp_path / "other")[1] != record(tmp_path / "whole")[1]

    config, run = start(name, tmp_path / "broken", **options)
    calls, original = 0, OffPolicyLearner.update

    def stop_at_forty(self: OffPolicyLearner, batch: Batch) -> None:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(OffPolicyLearner, "update", stop_at_forty)
        with pytest.raises(KeyboardInterrupt):
            MODULES[name].train(config, run)
    run.close()
    assert list_checkpoints(tmp_path / "broken" / "checkpoints")[-1].name == "step_00000400"
    resume(name, tmp_path / "broken", **options)
    whole, broken = record(tmp_path / "whole"), record(tmp_path / "broken")
    assert broken[:-1] == whole[:-1]
    # The interrupted run keeps, for its older checkpoint, at most what that needs.
    assert whole[-1].items() <= broken[-1].items() or broken[-1].items() <= whole[-1].items()


def test_an_interrupt_saves_the_last_iteration_even_between_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = start("td3", tmp_path / "run", checkpoint_interval=1e9)
    original, steps = run.log, []

    def interrupt(step: int, metrics: Any) -> None:
        original(step, metrics)
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt

    run.log = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        td3.train(config, run)
    run.close()
    assert [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000400"]
    resume("td3", tmp_path / "run")
    train("td3", tmp_path / "whole")
    assert record(tmp_path / "run")[:-1] == record(tmp_path / "whole")[:-1]


def test_a_finished_run_is_trained_further_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    train("sac", tmp_path / "short", total_steps=600)
    resume("sac", tmp_path / "short")
    train("sac", tmp_path / "whole")
    assert record(tmp_path / "short") == record(tmp_path / "whole")


def test_kills_at_any_moment_change_nothing(tmp_path: Path) -> None:
    """SIGKILL while starting, collecting, learning, or writing a checkpoint."""
    options = {**SMALL, "total_steps": 2400, "buffer_size": 700, "steps_per_iteration": 40}
    script = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from saferl.agents.online import sac_lag\n"
        "from saferl.experiment.run import Run\n"
        f"config = sac_lag.Config(cost_limit={{'speed': 5.0}}, multiplier_warmup=300, **{options!r})\n"
        "folder = Path(sys.argv[1])\n"
        "if (folder / 'config.json').exists(): run = Run.open(folder, quiet=True)\n"
        "else: run = Run.create(folder, {'algorithm': 'sac-lag', 'config': {}}, quiet=True)\n"
        "sac_lag.train(config, run); run.close()\n"
    )

    def launch(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def steps_done(folder: Path) -> int:
        found = list_checkpoints(folder / "checkpoints")
        return int(found[-1].name[5:]) if found else 0

    chance = np.random.default_rng(0)
    for goal in (40, 1000):
        process = launch(tmp_path / "run")
        while process.poll() is None and steps_done(tmp_path / "run") < goal:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 1000 <= steps_done(tmp_path / "run") < 2400
    process = launch(tmp_path / "run")
    train("sac-lag", tmp_path / "whole", **options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert record(tmp_path / "run")[:-1] == record(tmp_path / "whole")[:-1]


def test_a_damaged_buffer_is_named_and_the_policy_still_loads(tmp_path: Path) -> None:
    train("sac", tmp_path / "run", total_steps=600)
    path = tmp_path / "run" / "replay" / "chunk_000000.bin"
    payload = bytearray(path.read_bytes())
    payload[100] ^= 1
    path.write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"chunk_000000.bin is damaged .* its policy still loads"):
        resume("sac", tmp_path / "run")
    load_run_policy(tmp_path / "run")


# --- the policy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sac", "td3"])
def test_the_loaded_policy_acts_as_the_trained_one(name: str, tmp_path: Path) -> None:
    trained = train(name, tmp_path / "run", normalise_observations=True)
    loaded = load_run_policy(tmp_path / "run")
    observations = np.random.default_rng(0).uniform(0, 2, (6, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        loaded.act(observations, deterministic=True), trained.act(observations, deterministic=True)
    )
    before = {k: v.clone() for k, v in loaded.state_dict().items()}
    loaded.act(observations + 100)
    assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["sac-lag", "td3-pid"])
def test_dict_observations_and_unequal_bounds(name: str, tmp_path: Path) -> None:
    env = "saferl-test/DictBox-v0"
    train(name, tmp_path / "run", env=env, cost_limit=1.0, total_steps=600)
    actions = load_run_policy(tmp_path / "run").act(
        {"kind": np.array([0, 2]), "position": np.zeros((2, 2))}, deterministic=True
    )
    assert actions.shape == (2, 2)
    assert (actions >= [-1, 0]).all()
    assert (actions <= [1, 10]).all()


def test_several_processes_collect(tmp_path: Path) -> None:
    train("sac", tmp_path / "run", env="saferl-test/DictBox-v0", processes=2, total_steps=400)
    assert read_metrics(tmp_path / "run" / "metrics.csv")[-1]["train/episode_length"] == 8


def test_metrics(tmp_path: Path) -> None:
    train("sac-lag", tmp_path / "run", cost_limit={"speed": 5.0, "throttle": 20.0})
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [200, 400, 600, 800, 1000]
    expected = {"train/return", "train/cost", "train/cost/speed", "train/cost/throttle", "loss/policy"}
    expected |= {"loss/value", "loss/value/speed", "loss/value/throttle", "value/reward", "value/speed"}
    expected |= {"policy/entropy", "policy/alpha", "time/steps_per_second", "train/episode_length"}
    expected |= {f"constraint/throttle/{x}" for x in ("mean", "limit", "violation", "multiplier")}
    assert expected <= set(rows[-1])
    assert "loss/policy" not in rows[0]  # nothing is learned in the warm-up


def test_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train("sac", tmp_path / "run", total_steps=400)
    assert torch.equal(torch.rand(3), expected)


# --- what stops a run -------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "words"), [("observation", "an observation"), ("reward", "the reward")])
def test_what_is_not_finite_never_reaches_the_buffer(fault: str, words: str, tmp_path: Path) -> None:
    sizes = {
        "num_envs": 2,
        "steps_per_iteration": 20,
        "learning_starts": 10,
        "env": f"saferl-test/Faulty-{fault}-v0",
    }
    with pytest.raises(
        NonFiniteError,
        match=rf"{words} of environment 0 is not finite, at step 48; the checkpoint of step 40",
    ):
        train("sac", tmp_path / "run", **sizes)
    checkpoint, _ = load_latest(tmp_path / "run" / "checkpoints")
    assert checkpoint["step"] == 40
    for tensor in checkpoint["policy"]["weights"].values():
        assert torch.isfinite(tensor).all()


def test_a_cost_that_is_not_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="the cost 'cost' of environment 0 is not finite, at step 24"):
        train("td3-lag", tmp_path / "run", num_envs=1, env="saferl-test/Faulty-cost-v0", cost_limit=1.0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"lower the learning rate.*checkpoint of step 200"):
        train("sac", tmp_path / "run", critic_lr=1e30)


def test_a_crash_of_the_simulator_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the simulator fell over"):
        train("sac", tmp_path / "run", env="saferl-test/Faulty-crash-v0")


@pytest.mark.parametrize("name", MODULES)
def test_discrete_actions_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"SAC and TD3 take continuous \(Box\) actions, not Discrete"):
        train(name, tmp_path / "run", env="saferl-test/DictDiscrete-v0", **_limit(name, "wrong"))


def _limit(name: str, cost: str) -> dict[str, Any]:
    return {} if name in ("sac", "td3") else {"cost_limit": {cost: 1.0}}


def test_unknown_costs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'speed'"):
        train("sac-lag", tmp_path / "run", cost_limit={"sped": 1.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_envs": 0}, "ask for at least one"),
        ({"total_steps": 0}, "total steps must be 1 or more"),
        ({"discount": 1.5}, "between 0 and 1"),
        ({"polyak": -0.1}, "between 0 and 1"),
        ({"policy_delay": 0}, "policy delay must be 1 or more"),
        ({"updates_per_step": -1.0}, "updates per step must be 0 or more"),
        ({"buffer_size": 3}, "cannot take one step of 4 environments"),
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"alpha": 0.0, "auto_alpha": True}, "start auto_alpha above 0"),
        ({"activation": "relo"}, "did you mean 'relu'"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_of("sac", **changes)
    with pytest.raises(UsageError, match="multiplier warmup must be 0 or more"):
        config_of("sac-lag", multiplier_warmup=-1)
    with pytest.raises(UsageError, match="policy noise must be 0 or more"):
        config_of("td3", policy_noise=-0.1)


@pytest.mark.parametrize("name", MODULES)
def test_published_defaults(name: str) -> None:
    config = MODULES[name].Config()
    assert (config.discount, config.cost_discount, config.polyak, config.batch_size) == (
        0.99,
        0.99,
        0.005,
        256,
    )
    assert (config.hidden_sizes, config.activation, config.policy_delay) == ((256, 256), "relu", 2)
    assert (config.total_steps, config.buffer_size, config.max_grad_norm) == (1_000_000, 1_000_000, 40.0)
    assert (config.steps_per_iteration, config.num_envs, config.updates_per_step) == (2_000, 1, 1.0)
    assert config.critic_lr == 3e-4
    assert config.actor_lr == (1e-4 if name.endswith("pid") else 3e-4)
    assert not config.normalise_observations
    if name.startswith("sac"):
        assert (config.alpha, config.auto_alpha, config.learning_starts) == (0.2, False, 10_000)
    else:
        noise = (config.exploration_noise, config.policy_noise, config.policy_noise_clip)
        assert noise == (0.1, 0.2, 0.5)
        assert config.learning_starts == 25_000
    if name not in ("sac", "td3"):
        assert (config.cost_limit, config.cost_window, config.multiplier_init) == (25.0, 10, 0.001)
        assert config.multiplier_warmup == 100 * 2_000
    if name.endswith("lag"):
        # OmniSafe's rate for each gradient step, times the gradient steps of an iteration.
        assert config.multiplier_lr == pytest.approx(2_000 * 1e-5)
    if name.endswith("pid"):
        assert config.ki == pytest.approx(2_000 * 1e-7)
        assert (config.kp, config.kd) == (1e-6, 1e-7)
