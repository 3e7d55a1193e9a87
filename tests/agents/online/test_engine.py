"""The on-policy engine: what a rollout holds, what a checkpoint restores, what stops a run."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

import saferl.envs
from saferl.agents import LEARNERS
from saferl.agents.online import ppo
from saferl.agents.online.engine import Context, OnPolicyConfig, Rollout, train_on_policy
from saferl.agents.online.second_order import SecondOrderConfig
from saferl.errors import NonFiniteError, UsageError
from saferl.experiment.checkpoint import list_checkpoints, load_latest
from saferl.experiment.config import to_json
from saferl.experiment.metrics import read_metrics
from saferl.experiment.run import Run
from saferl.nn.models import Actor
from saferl.policies.run import load_run_policy

SMALL = {
    "env": "SpeedLimit-v0",
    "num_envs": 4,
    "total_steps": 1600,
    "steps_per_iteration": 400,
    "epochs": 2,
    "hidden_sizes": (16,),
    "checkpoint_interval": 0.0,
}
MODULES: dict[str, Any] = {
    name: module
    for name, learner in LEARNERS.items()
    if issubclass((module := importlib.import_module(learner.module)).Config, OnPolicyConfig)
}
UNCONSTRAINED = ("ppo", "trpo")


def config_of(name: str, **changes: Any) -> Any:
    values = {**SMALL, **changes}
    if issubclass(MODULES[name].Config, SecondOrderConfig):
        values["critic_epochs"] = values.pop("epochs")
    if name not in UNCONSTRAINED:
        values.setdefault("cost_limit", {"speed": 5.0})
    return MODULES[name].Config(**values)


def train(name: str, folder: Path, **changes: Any) -> Actor:
    config = config_of(name, **changes)
    run = Run.create(folder, {"algorithm": name, "config": to_json(config)}, quiet=True)
    try:
        return MODULES[name].train(config, run)
    finally:
        run.close()


def weights(folder: Path) -> tuple[bytes, bytes]:
    newest = list_checkpoints(folder / "checkpoints")[-1]
    return (newest / "policy.safetensors").read_bytes(), (newest / "training.safetensors").read_bytes()


class Scripted(VectorEnv):
    """Two environments with known rewards; the first is truncated at step 3, the second ends at step 2."""

    def __init__(self) -> None:
        self.num_envs = 2
        self.single_observation_space = spaces.Box(-100, 100, (1,), np.float64)
        self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "cost_names": ("a", "b")}

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.clock = np.zeros(2, int)
        return self.clock[:, None].astype(float), {}

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
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


def test_rollout_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns, costs, final observations and GAE, on an environment small enough to check by hand."""
    monkeypatch.setattr(saferl.envs, "make_vec", lambda *_, **__: Scripted())
    seen: list[Rollout] = []
    contexts: list[Context] = []

    class Recorder:
        def __init__(self, context: Context) -> None:
            contexts.append(context)

        def update(self, rollout: Rollout, progress: float) -> dict[str, float]:
            seen.append(rollout)
            return {}

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    config = ppo.Config(
        **{**SMALL, "num_envs": 2, "steps_per_iteration": 8, "total_steps": 8},
        normalise_observations=False,
        discount=0.9,
        gae_lambda=0.8,
        cost_discount=0.5,
        cost_gae_lambda=0.25,
    )
    run = Run.create(tmp_path / "run", {"algorithm": "ppo", "config": {}}, quiet=True)
    train_on_policy(config, run, Recorder, {"b": 1.0, "cost": 1.0})
    (rollout,), (context,) = seen, contexts

    assert rollout.episodes.returns.tolist() == [11.0 + 12.0, 1.0 + 2.0 + 3.0, 11.0 + 12.0]
    assert rollout.episodes.lengths.tolist() == [2, 3, 2]
    assert rollout.episodes.costs["cost"].tolist() == [4.0, 3.0, 4.0]
    assert rollout.episodes.costs["b"].tolist() == [6.0, 9.0, 6.0]

    def value(x: float) -> np.ndarray:
        return context.model.values(torch.tensor([[x]])).detach().numpy()[0]

    # Environment 0: observations 0, 10, 20 | 0, then the rollout is cut with observation 10.
    observations = [0.0, 10.0, 20.0, 0.0]
    bootstrap = [10.0, 20.0, 30.0, 10.0]  # 30 is the final observation of the truncated episode
    ends = [False, False, True, False]
    rewards = [1.0, 2.0, 3.0, 1.0]
    for column, (rate, lam, stream) in enumerate(
        [(0.9, 0.8, rewards), (0.5, 0.25, [3.0] * 4), (0.5, 0.25, [1.0] * 4)]
    ):
        advantage, expected = 0.0, [0.0] * 4
        for t in reversed(range(4)):
            delta = stream[t] + rate * value(bootstrap[t])[column] - value(observations[t])[column]
            advantage = delta + (0.0 if ends[t] else rate * lam * advantage)
            expected[t] = advantage
        got = [rollout.advantages, rollout.cost_advantages["b"], rollout.cost_advantages["cost"]][column]
        np.testing.assert_allclose(got.reshape(4, 2)[:, 0].numpy(), expected, rtol=1e-5, atol=1e-5)
        targets = rollout.targets.reshape(4, 2, 3)[:, 0, column].numpy()
        np.testing.assert_allclose(
            targets,
            [e + value(o)[column] for e, o in zip(expected, observations, strict=True)],
            rtol=1e-5,
            atol=1e-5,
        )
    # Environment 1 terminates at its second step: nothing is bootstrapped there.
    np.testing.assert_allclose(
        rollout.advantages.reshape(4, 2)[1, 1].item(), 12.0 - value(10.0)[0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        rollout.log_probs, context.model.actor.distribution.log_prob(rollout.parameters, rollout.actions)
    )


@pytest.mark.parametrize("name", MODULES)
def test_training_repeats_to_the_bit_and_writes_its_record(name: str, tmp_path: Path) -> None:
    train(name, tmp_path / "one")
    train(name, tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    train(name, tmp_path / "other", seed=1)
    assert weights(tmp_path / "one") != weights(tmp_path / "other")
    rows = read_metrics(tmp_path / "one" / "metrics.csv")
    assert [row["step"] for row in rows] == [400, 800, 1200, 1600]
    expected = {"train/cost/speed", "train/cost/throttle"}
    expected |= {
        "train/return",
        "train/cost",
        "loss/value",
        "policy/kl",
        "time/steps_per_second",
    }
    if name not in UNCONSTRAINED:
        expected |= {f"constraint/speed/{x}" for x in ("mean", "limit", "violation")}
    if name in ("ppo-lag", "cppo-pid", "trpo-lag", "trpo-pid", "rcpo", "focops", "cup"):
        expected.add("constraint/speed/multiplier")
    assert expected <= set(rows[-1])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("normalise_rewards", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(name: str, normalise_rewards: bool, tmp_path: Path) -> None:
    options = {"normalise_rewards": normalise_rewards}
    train(name, tmp_path / "whole", **options)

    config = config_of(name, **options)
    folder = tmp_path / "broken"
    run = Run.create(folder, {"algorithm": name, "config": to_json(config)}, quiet=True)
    calls = 0
    original = run.log

    def stop_at_third(step: int, metrics: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        original(step, metrics)

    run.log = stop_at_third  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        MODULES[name].train(config, run)
    run.close()
    assert [c.name for c in list_checkpoints(folder / "checkpoints")][-1] == "step_00000800"

    run = Run.open(folder, quiet=True)
    MODULES[name].train(config, run)
    run.close()
    assert weights(folder) == weights(tmp_path / "whole")

    def rows(path: Path) -> list[dict[str, float]]:
        kept = read_metrics(path / "metrics.csv")
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in kept]

    assert rows(folder) == rows(tmp_path / "whole")


def test_an_interrupt_saves_the_last_iteration_even_between_checkpoints(tmp_path: Path) -> None:
    config = config_of("ppo", checkpoint_interval=1e9)
    run = Run.create(tmp_path / "run", {"algorithm": "ppo", "config": to_json(config)}, quiet=True)
    original, calls = run.log, []

    def interrupt(step: int, metrics: Any) -> None:
        original(step, metrics)
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt

    run.log = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ppo.train(config, run)
    assert load_latest(run.checkpoints)[0]["step"] == 800


def test_environments_without_state_resume_with_fresh_episodes_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("ppo", tmp_path / "run", env="saferl-test/Faulty-v0", total_steps=800)
    config = config_of("ppo", env="saferl-test/Faulty-v0", total_steps=1200)
    run = Run.open(tmp_path / "run", quiet=True)
    ppo.train(config, run)
    run.close()
    assert "fresh episodes" in capsys.readouterr().out
    assert load_latest(run.checkpoints)[0]["step"] == 1200


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("observation", "an observation of environment"),
        ("reward", "the reward of"),
        ("cost", "the cost 'cost' of"),
    ],
)
def test_nan_stops_with_the_step_and_keeps_the_checkpoint(fault: str, words: str, tmp_path: Path) -> None:
    changes = {"num_envs": 2, "steps_per_iteration": 20, "cost_limit": 1.0, "checkpoint_interval": 1e9}
    # 25 steps of each environment's life: the fault falls into the third iteration of ten steps each.
    with pytest.raises(NonFiniteError, match=words) as caught:
        train("ppo-lag", tmp_path / "run", env=f"saferl-test/Faulty-{fault}-v0", **changes)
    assert "is not finite at step 48" in str(caught.value) or "step 50" in str(caught.value)
    assert "checkpoint of step 40 is kept" in str(caught.value)
    checkpoint, _ = load_latest(tmp_path / "run" / "checkpoints")
    assert checkpoint["step"] == 40
    for tensor in checkpoint["policy"]["weights"].values():
        assert torch.isfinite(tensor).all()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="in the update after step"):
        train("ppo", tmp_path / "run", critic_lr=1e30)


def test_a_crash_of_the_simulator_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the simulator fell over"):
        train("ppo", tmp_path / "run", env="saferl-test/Faulty-crash-v0")


@pytest.mark.parametrize("env", ["saferl-test/DictDiscrete-v0", "saferl-test/MultiDiscrete-v0"])
def test_dict_observations_and_discrete_actions_are_learned(env: str, tmp_path: Path) -> None:
    """The shown arm pays 1 a step, eight steps: chance gives 2.7, the optimum 8."""
    train(
        "ppo",
        tmp_path / "run",
        env=env,
        total_steps=8000,
        steps_per_iteration=800,
        num_envs=8,
        epochs=8,
        actor_lr=5e-3,
        target_kl=0.05,
    )
    assert read_metrics(tmp_path / "run" / "metrics.csv")[-1]["train/return"] > 7


def test_several_limits_push_only_the_violated_multiplier(tmp_path: Path) -> None:
    train("ppo-lag", tmp_path / "run", cost_limit={"speed": 1e6, "throttle": 0.5}, multiplier_init=0.1)
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert last["constraint/throttle/violation"] > 0
    assert last["constraint/throttle/multiplier"] > 0.1
    assert last["constraint/speed/multiplier"] < 0.1


def test_a_zero_multiplier_is_ppo_to_the_bit(tmp_path: Path) -> None:
    """A limit that never binds leaves PPO-Lag's policy equal to PPO's."""
    train("ppo", tmp_path / "ppo")
    train("ppo-lag", tmp_path / "lag", cost_limit=1e9, multiplier_init=0.0)
    ours = load_latest(tmp_path / "lag" / "checkpoints")[0]["policy"]["weights"]
    theirs = load_latest(tmp_path / "ppo" / "checkpoints")[0]["policy"]["weights"]
    # The cost critic changes the seed's stream of initial weights only after the reward critic's.
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)


def test_unknown_costs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'speed'"):
        train("ppo-lag", tmp_path / "run", cost_limit={"sped": 1.0})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_envs": 0}, "ask for at least one"),
        ({"total_steps": 0}, "total steps must be 1 or more"),
        ({"discount": 1.5}, "between 0 and 1"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_of("ppo", **changes)


def test_the_loaded_policy_acts_as_the_trained_one_and_is_frozen(tmp_path: Path) -> None:
    trained = train("ppo", tmp_path / "run")
    loaded = load_run_policy(tmp_path / "run")
    observations = np.random.default_rng(0).uniform(0, 2, (6, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        loaded.act(observations, deterministic=True), trained.act(observations, deterministic=True)
    )
    before = {k: v.clone() for k, v in loaded.state_dict().items()}
    loaded.act(observations + 100)
    assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())
    assert loaded.normaliser is not None
    assert loaded.normaliser.count == 1600


def test_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train("ppo", tmp_path / "run", total_steps=400)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", MODULES)
def test_published_defaults(name: str) -> None:
    config = MODULES[name].Config()
    assert (config.discount, config.gae_lambda, config.max_grad_norm) == (0.99, 0.95, 40.0)
    if isinstance(config, SecondOrderConfig):
        assert (config.target_kl, config.cg_iterations, config.cg_damping) == (0.01, 15, 0.1)
        assert (config.critic_epochs, config.critic_batch_size, config.critic_lr) == (10, 128, 1e-3)
        steps = {"cpo": 20, "pcpo": 200}.get(name, 15)
        assert (config.fisher_stride, config.backtrack_steps, config.backtrack_factor) == (1, steps, 0.8)
    else:
        assert (config.clip, config.target_kl) == (0.2, 0.01 if name == "cup" else 0.02)
        epochs = 10 if name in ("p3o", "ipo") else 40
        assert (config.epochs, config.batch_size, config.actor_lr) == (epochs, 64, 3e-4)
    assert (config.total_steps, config.steps_per_iteration, config.hidden_sizes) == (
        10_000_000,
        20_000,
        (64, 64),
    )
    assert dataclasses.is_dataclass(config)
    if name == "ppo-lag":
        assert (config.multiplier_lr, config.multiplier_init, config.cost_limit) == (0.035, 0.001, 25.0)
    if name == "cppo-pid":
        assert (config.kp, config.ki, config.kd, config.delay) == (0.1, 0.01, 0.01, 10)
        assert (config.ema_p, config.ema_d, config.cost_limit) == (0.95, 0.95, 25.0)
