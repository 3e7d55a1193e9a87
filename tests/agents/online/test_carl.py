"""CaRL's PPO: its formulas by hand, processes that together do what one does, resumption, and learning."""

from __future__ import annotations

import json
import os
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

from saferl.agents.online import carl, carl_lag
from saferl.agents.online.carl import Config
from saferl.agents.online.large_batch import learning_rate, value_loss
from saferl.errors import UsageError
from saferl.experiment.checkpoint import load_latest
from saferl.experiment.config import to_json
from saferl.experiment.run import Run
from saferl.nn.driving import DrivingCritic, batch_of
from saferl.policies import load_policy

DRIVING = "RouteDriving-v0?privileged=true&maps=1&routes=8&route_length=80&time_limit=10"


class Picture(gym.Env):  # type: ignore[type-arg]
    """A picture that is bright on the side to steer to; the critic is told which it is."""

    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            {
                "bev": spaces.Box(0, 255, (1, 25, 25), np.uint8),
                "measurements": spaces.Box(-1, 1, (1,), np.float32),
                "value_measurements": spaces.Box(-1, 1, (1,), np.float32),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def _obs(self) -> dict[str, np.ndarray]:
        picture = np.zeros((1, 25, 25), np.uint8)
        picture[:, :, 13:] = 255 * (self.side > 0)
        picture[:, :, :12] = 255 * (self.side < 0)
        side = np.array([self.side], np.float32)
        return {"bev": picture, "measurements": np.zeros(1, np.float32), "value_measurements": side}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.side, self.left = float(self.np_random.choice([-1.0, 1.0])), 4
        return self._obs(), {}

    def step(self, action: np.ndarray) -> Any:
        self.left -= 1
        reward = float(self.side * action[0])
        self.side = float(self.np_random.choice([-1.0, 1.0]))
        return self._obs(), reward, self.left == 0, False, {"cost": float(action[0] > 0.5)}


class Numbers(Picture):
    """The same without a picture: the side alone."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)

    def _obs(self) -> Any:
        return np.array([self.side], np.float32)


class Constant(gym.Env):  # type: ignore[type-arg]
    """A reward of 1 whatever is done, cut off after 5 steps; nothing tells the time."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = 5
        return np.ones(1, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.left -= 1
        return np.ones(1, np.float32), 1.0, False, self.left == 0, {"cost": 0.0}


for _name, _env in (("Picture-v0", Picture), ("Numbers-v0", Numbers), ("Constant-v0", Constant)):
    if _name not in gym.registry:
        gym.register(_name, entry_point=_env)


def run_of(directory: Path, config: Config, name: str = "carl") -> Run:
    return Run.create(directory, {"algorithm": name, "config": to_json(config)}, quiet=True)


def small(**changes: Any) -> Config:
    options: dict[str, Any] = {
        "env": DRIVING,
        "num_envs": 4,
        "steps": 16,
        "total_steps": 192,
        "checkpoint_interval": 0,
    }
    return Config(**{**options, **changes})


def weights(directory: Path) -> list[torch.Tensor]:
    return [p.detach() for p in load_policy(directory).parameters()]  # type: ignore[union-attr]


def test_the_published_schedule() -> None:
    updates = 4577
    assert Config().iterations == 4578
    assert Config().batch == 65_536
    assert learning_rate(2.5e-4, 0, updates) == pytest.approx(2.500546e-4, rel=1e-6)
    assert learning_rate(2.5e-4, 1, updates) == 2.5e-4
    assert learning_rate(2.5e-4, 4576, updates) == pytest.approx(1.09e-7, rel=0.01)


def test_the_value_loss_by_hand() -> None:
    values, old = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.95, 2.0])
    targets = torch.tensor([1.0, 2.0, 0.0])
    # Clipped values: 0.6, 1.0, 1.9; the worse of the two squares counts, halved.
    assert value_loss(values, old, targets, 0.1).tolist() == pytest.approx([0.08, 0.5, 1.805])
    assert value_loss(values, old, targets, None).tolist() == pytest.approx([0.0, 0.5, 0.5])


def test_parts_of_a_mini_batch_add_up(tmp_path: Path) -> None:
    """Gradient accumulation changes nothing but rounding."""
    found = []
    for k, micro in enumerate((None, 5)):
        config = small(micro_batch=micro, total_steps=128)
        carl.train(config, run_of(tmp_path / str(k), config))
        found.append(weights(tmp_path / str(k)))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def command(*words: str, processes: int = 1) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "saferl", *words]
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
    ]
    return [*start, str(29_500 + os.getpid() % 900), "-m", "--", "saferl", *words]


def call(*words: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words, processes=processes), capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


OPTIONS = ("--env", DRIVING, "--num-envs", "4", "--steps", "16", "--checkpoint-interval", "0", "--quiet")


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """Over two dozen gradient steps: later a rounding moves a sample over the edge of the clip, or a car over
    the edge of a cell of the map, and runs part."""
    for processes in (1, 2):
        directory = str(tmp_path / str(processes))
        done = call(
            "train", "carl", *OPTIONS, "--total-steps", "128", "--run", directory, processes=processes
        )
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) < 2e-6
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("1", "2")]
    assert len(rows[0]) == len(rows[1]), "one process writes"
    # Resumed, two processes reach what one reaches without a stop.
    done = call("train", "--resume", str(tmp_path / "2"), "--total-steps", "256", "--quiet", processes=2)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 128" in done.stdout
    assert "fresh" not in done.stdout


def test_processes_must_share_evenly_and_others_refuse(tmp_path: Path) -> None:
    words = ("train", "carl", *OPTIONS[:2], "--num-envs", "3", "--run", str(tmp_path / "a"), "--quiet")
    done = call(*words, processes=2)
    assert done.returncode != 0
    assert "take a multiple of 2" in done.stderr
    words = ("train", "ppo", "--env", "SpeedLimit-v0", "--run", str(tmp_path / "b"), "--quiet")
    done = call(*words, processes=2)
    assert done.returncode != 0
    assert "start it without torchrun" in done.stderr


@pytest.mark.parametrize("module", [carl, carl_lag])
def test_a_resumed_run_reaches_the_same_bits(tmp_path: Path, module: Any) -> None:
    limits = {"cost_limit": {"collision": 0.1, "red_light": 0.1}} if module is carl_lag else {}
    config = module.Config(**{**to_dict(small()), **limits})
    whole = run_of(tmp_path / "whole", config)
    module.train(config, whole)
    short = module.Config(**{**to_dict(small()), **limits, "anneal_lr": True})
    directory = tmp_path / "parts"

    class Stop(Exception):
        pass

    run = run_of(directory, short)
    save = run.save

    def save_and_stop(step: int, parts: Any) -> Path:
        path = save(step, parts)
        if step >= 64:
            raise Stop
        return path

    run.save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        module.train(short, run)
    module.train(short, Run.open(directory, quiet=True))
    for a, b in zip(weights(tmp_path / "whole"), weights(directory), strict=True):
        assert torch.equal(a, b)


def to_dict(config: Config) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def test_it_learns_from_pictures(tmp_path: Path) -> None:
    """Steering to the bright side: about 0 untrained, 1 at best."""
    config = Config(
        env="Picture-v0", num_envs=8, steps=64, total_steps=8192, lr=2e-3, minibatches=4, epochs=4,
        value_clip=None,
        clip=0.2,
    )  # fmt: skip
    policy = carl.train(config, run_of(tmp_path / "run", config))
    env = Picture()
    rewards = []
    obs, _ = env.reset(seed=0)
    for _ in range(200):
        batch = {name: value[None] for name, value in obs.items()}
        obs, reward, over, _, _ = env.step(policy.act(batch, deterministic=True)[0])
        rewards.append(reward)
        if over:
            obs, _ = env.reset()
    assert np.mean(rewards) > 0.6


def test_limits_hold_back_what_gates_would(tmp_path: Path) -> None:
    """A cost on steering right: free of charge the policy does, with a limit hardly."""
    costs = {}
    for name, limit in (("free", 1e6), ("limited", 0.2)):
        config = carl_lag.Config(
            env="Numbers-v0", num_envs=8, steps=64, total_steps=16_384, lr=2e-3, epochs=4, value_clip=None,
            clip=0.2, cost_limit=limit, multiplier_lr=0.2, cost_window=32,
        )  # fmt: skip
        policy = carl_lag.train(config, run_of(tmp_path / name, config, "carl-lag"))
        obs, _ = (env := Numbers()).reset(seed=1)
        paid = []
        for _ in range(200):
            obs, _, over, _, info = env.step(policy.act(obs[None])[0])
            paid.append(info["cost"])
            if over:
                obs, _ = env.reset()
        costs[name] = 4 * float(np.mean(paid))
    assert costs["free"] > 1.0
    assert costs["limited"] < 0.5 * costs["free"]


def test_truncation_may_count(tmp_path: Path) -> None:
    """A reward of 1 that is cut off after 5 steps: worth 10 at discount 0.9 if what would follow counts, else
    what is left, 2.5 on average."""
    values = {}
    for bootstrap in (False, True):
        config = Config(
            env="Constant-v0", num_envs=4, steps=50, total_steps=8000, truncation_bootstrap=bootstrap,
            lr=3e-3, anneal_lr=False, value_clip=None, epochs=6, discount=0.9,
        )  # fmt: skip
        directory = tmp_path / str(bootstrap)
        policy = carl.train(config, run_of(directory, config))
        critic = DrivingCritic(policy)
        checkpoint, _ = load_latest(directory / "checkpoints")
        critic.load_state_dict(checkpoint["training"]["critic"])
        batch = batch_of(policy.observation_space, np.ones((1, 1), np.float32), "cpu")
        values[bootstrap] = float(critic(policy.features(batch), batch).detach())
    left = [sum(0.9**j for j in range(n)) for n in range(1, 6)]
    assert values[False] == pytest.approx(np.mean(left), abs=0.6)
    assert values[True] == pytest.approx(10.0, abs=1.0)


def test_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = call("train", "carl", *OPTIONS, "--total-steps", "128", "--run", str(run))
    assert done.returncode == 0, done.stderr
    done = call("evaluate", str(run), "--episodes", "2", "--quiet", "--video", str(tmp_path / "drive.gif"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "drive.gif").stat().st_size > 10_000, done.stderr
    assert json.loads((run / "evaluation.json").read_text())


def test_control_c_keeps_the_last_iteration(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(
        "train",
        "carl",
        *OPTIONS[:-3],
        "--checkpoint-interval",
        "1e9",
        "--total-steps",
        "1000000",
        "--run",
        str(run),
        "--quiet",
    )
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.csv"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "is saved" in errors
    assert "--resume" in errors
    assert load_policy(run) is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps must be 1"),
        ({"precision": "float8"}, "precision"),
        ({"micro_batch": 0}, "micro batch"),
        ({"discount": 1.5}, "discount"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        Config(**changes)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    config = small(precision="bfloat16", total_steps=64)
    policy = carl.train(config, run_of(tmp_path / "run", config))
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in policy.parameters())
