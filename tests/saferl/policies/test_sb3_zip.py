"""Stable-Baselines3 zips: the same actions as Stable-Baselines3's own load, and nothing executed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from saferl.errors import CheckpointError, MissingPackageError, UsageError
from saferl.policies import Policy, load_policy

sb3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402

torch.set_num_threads(1)

BOX = spaces.Box(-2.0, 3.0, (3,), np.float32)
TORQUE = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 5.0], np.float32))
IMAGE = spaces.Box(0, 255, (3, 40, 40), np.uint8)
MIXED = spaces.Dict({"z": BOX, "camera": IMAGE, "mode": spaces.Discrete(3), "bits": spaces.MultiBinary(2)})


class Noise(gym.Env[Any, Any]):
    """Random observations and rewards for any spaces; episodes of 8 steps."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample(), float(self.np_random.normal()), False, self.steps >= 8, {}


def batch(space: spaces.Space[Any], n: int = 7) -> Any:
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}
    return np.stack(samples)


ON = {"n_steps": 16, "seed": 0, "device": "cpu"}
OFF = {"learning_starts": 10, "buffer_size": 100, "batch_size": 8, "seed": 0, "device": "cpu"}
SMALL_CNN = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 16}}
CASES: list[tuple[str, str, str, spaces.Space[Any], spaces.Space[Any], dict[str, Any]]] = [
    ("ppo", "PPO", "MlpPolicy", BOX, TORQUE, {**ON, "batch_size": 16}),
    ("ppo-sde", "PPO", "MlpPolicy", BOX, TORQUE, {**ON, "batch_size": 16, "use_sde": True}),
    ("ppo-one-hot", "PPO", "MlpPolicy", spaces.Discrete(5), spaces.Discrete(3), {**ON, "batch_size": 16}),
    (
        "ppo-multidiscrete", "PPO", "MlpPolicy",
        spaces.MultiDiscrete([3, 4]), spaces.MultiDiscrete([2, 5]), {**ON, "batch_size": 16},
    ),
    ("ppo-multibinary", "PPO", "MlpPolicy", BOX, spaces.MultiBinary(3), {**ON, "batch_size": 16}),
    ("ppo-dict", "PPO", "MultiInputPolicy", MIXED, TORQUE, {**ON, "batch_size": 16}),
    (
        "ppo-image", "PPO", "CnnPolicy", IMAGE, spaces.Discrete(3),
        {**ON, "batch_size": 16, "policy_kwargs": SMALL_CNN},
    ),
    (
        "a2c-kwargs", "A2C", "MlpPolicy", BOX, spaces.Discrete(4, start=0),
        {**ON, "policy_kwargs": {"activation_fn": torch.nn.ELU, "net_arch": {"pi": [8], "vf": [9, 7]},
                                 "optimizer_class": torch.optim.AdamW, "log_std_init": -1.0}},
    ),
    ("sac", "SAC", "MlpPolicy", BOX, TORQUE, OFF),
    ("sac-sde", "SAC", "MlpPolicy", BOX, TORQUE, {**OFF, "use_sde": True}),
    ("sac-dict", "SAC", "MultiInputPolicy", spaces.Dict({"b": BOX, "a": BOX}), TORQUE, OFF),
    ("sac-image", "SAC", "CnnPolicy", IMAGE, TORQUE, {**OFF, "policy_kwargs": SMALL_CNN}),
    ("td3", "TD3", "MlpPolicy", BOX, TORQUE, OFF),
    ("ddpg", "DDPG", "MlpPolicy", BOX, TORQUE, OFF),
    ("dqn", "DQN", "MlpPolicy", BOX, spaces.Discrete(4), OFF),
]  # fmt: skip


def train(
    algorithm: str, policy: str, obs: spaces.Space[Any], act: spaces.Space[Any], kwargs: dict[str, Any]
) -> Any:
    kwargs = {**kwargs, "policy_kwargs": dict(kwargs.get("policy_kwargs", {}))}
    return getattr(sb3, algorithm)(policy, Noise(obs, act), **kwargs).learn(20)


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ppo") / "model.zip"
    train("PPO", "MlpPolicy", BOX, TORQUE, {**ON, "batch_size": 16}).save(path)
    return path


@pytest.mark.parametrize(
    ("algorithm", "policy", "obs", "act", "kwargs"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_acts_exactly_as_stable_baselines3(
    tmp_path: Path, algorithm: str, policy: str, obs: Any, act: Any, kwargs: dict[str, Any]
) -> None:
    model = train(algorithm, policy, obs, act, kwargs)
    model.save(tmp_path / "model.zip")
    loaded = load_policy(tmp_path / "model.zip")
    assert isinstance(loaded, Policy)
    assert loaded.observation_space == model.observation_space
    assert loaded.action_space == model.action_space
    observations = batch(model.observation_space)
    expected = model.predict(observations, deterministic=True)[0]
    actions = loaded.act(observations, deterministic=True)
    np.testing.assert_array_equal(actions, expected)
    assert actions.dtype == expected.dtype
    tensors = (
        {key: torch.as_tensor(value) for key, value in observations.items()}
        if isinstance(observations, dict)
        else torch.as_tensor(observations)
    )
    np.testing.assert_array_equal(loaded.act(tensors, deterministic=True).numpy(), expected)
    if not kwargs.get("use_sde") and algorithm != "DQN":
        torch.manual_seed(3)
        expected = model.predict(observations)[0]
        torch.manual_seed(3)
        np.testing.assert_array_equal(loaded.act(observations), expected)


def test_loading_leaves_the_random_generators_alone(ppo: Path) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_policy(ppo)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_the_suffix_may_be_left_out(ppo: Path) -> None:
    assert load_policy(ppo.with_suffix("")).action_space == TORQUE


def test_images_may_come_channel_last(tmp_path: Path) -> None:
    last = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    model = train(
        "PPO", "CnnPolicy", last, spaces.Discrete(3), {**ON, "batch_size": 16, "policy_kwargs": SMALL_CNN}
    )
    model.save(tmp_path / "m.zip")
    observations = batch(last)
    expected = model.predict(observations, deterministic=True)[0]
    loaded = load_policy(tmp_path / "m.zip")
    np.testing.assert_array_equal(loaded.act(observations, deterministic=True), expected)


@pytest.mark.parametrize(
    "space", [BOX, spaces.Dict({"a": BOX, "b": spaces.Discrete(2)})], ids=["box", "dict"]
)
def test_vec_normalize_equals_the_original(tmp_path: Path, space: spaces.Space[Any]) -> None:
    keys = ["a"] if isinstance(space, spaces.Dict) else None
    env = VecNormalize(DummyVecEnv([lambda: Noise(space, TORQUE)]), norm_obs_keys=keys, clip_obs=1.5)
    policy = "MultiInputPolicy" if keys else "MlpPolicy"
    model = sb3.PPO(policy, env, **ON, batch_size=16).learn(64)
    model.save(tmp_path / "m.zip")
    env.save(tmp_path / "stats.pkl")
    loaded = load_policy(tmp_path / "m.zip", vec_normalize=tmp_path / "stats.pkl")
    env.training = False
    observations = batch(space)
    expected = model.predict(env.normalize_obs(observations), deterministic=True)[0]
    for _ in range(2):  # acting changes no statistics
        np.testing.assert_array_equal(loaded.act(observations, deterministic=True), expected)
    raw = load_policy(tmp_path / "m.zip").act(observations, deterministic=True)
    assert not np.array_equal(raw, expected)


def test_statistics_of_another_environment_are_refused(tmp_path: Path, ppo: Path) -> None:
    other = VecNormalize(DummyVecEnv([lambda: Noise(spaces.Box(-1, 1, (5,), np.float32), TORQUE)]))
    other.save(tmp_path / "stats.pkl")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_policy(ppo, vec_normalize=tmp_path / "stats.pkl")


@pytest.mark.parametrize("kind", ["(3,)", "two axes too many", "mapping", "missing key"])
def test_wrong_observations_are_named(ppo: Path, tmp_path: Path, kind: str) -> None:
    policy = load_policy(ppo)
    bad: Any = {
        "(3,)": np.zeros(3),
        "two axes too many": np.zeros((2, 1, 3)),
        "mapping": {"a": np.zeros((2, 3))},
    }
    if kind == "missing key":
        train("PPO", "MultiInputPolicy", MIXED, TORQUE, {**ON, "batch_size": 16}).save(tmp_path / "d.zip")
        policy, bad = load_policy(tmp_path / "d.zip"), {kind: {"z": np.zeros((2, 3))}}
    with pytest.raises(UsageError):
        policy.act(bad[kind])


# --- hostile and damaged files ---------------------------------------------------------------------------


class Touch:
    """Unpickles into a call that creates a file."""

    def __init__(self, path: Path, function: Any = os.system) -> None:
        self.path, self.function = path, function

    def __reduce__(self) -> Any:
        return self.function, (f"touch {self.path}",)


def rewrite(source: Path, target: Path, **members: bytes | None) -> Path:
    """Copy a zip with some members replaced (`policy_pth` for policy.pth) or, for None, left out."""
    replaced = {name.replace("_pth", ".pth"): content for name, content in members.items()}
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = replaced.get(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def with_data(source: Path, target: Path, **entries: Any) -> Path:
    """Copy a zip with entries of `data` replaced; bytes count as a pickle, a type or None as JSON."""
    data = json.loads(zipfile.ZipFile(source).read("data"))
    for key, value in entries.items():
        if isinstance(value, bytes):
            value = {":type:": "x", ":serialized:": base64.b64encode(value).decode()}
        data[key] = value
    return rewrite(source, target, data=json.dumps(data).encode())


@pytest.mark.parametrize("entry", ["observation_space", "action_space", "policy_class", "policy_kwargs"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_runs_a_command_is_refused(
    ppo: Path, tmp_path: Path, entry: str, protocol: int
) -> None:
    mark = tmp_path / "mark"
    bad = with_data(ppo, tmp_path / "bad.zip", **{entry: pickle.dumps(Touch(mark), protocol)})
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        load_policy(bad)
    assert not mark.exists()
    with contextlib.suppress(Exception):
        sb3.PPO.load(bad, device="cpu")
    assert mark.exists()  # the same file does run under Stable-Baselines3's own load


@pytest.mark.parametrize(
    "payload",
    [
        b"cnumpy.testing._private.utils\nrunstring\n(S'import os'\n}tR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(cnumpy\ndtype\nS'name'\ntR.",
        b"cfunctools\npartial\n.",
        b"cstable_baselines3.common.save_util\nload_from_pkl\n(S'x.pkl'\ntR.",
        b"cgymnasium.spaces.box\nnp.load\n.",
        b"ctorch\nload\n(S'x.pth'\ntR.",
        b"ccollections\nOrderedDict.__init__.__globals__\n.",
    ],
    ids=lambda payload: payload.split(b"\n")[1].decode(),
)
def test_names_off_the_list_are_refused_and_named(ppo: Path, tmp_path: Path, payload: bytes) -> None:
    bad = with_data(ppo, tmp_path / "bad.zip", policy_kwargs=payload)
    with pytest.raises(CheckpointError, match=payload.split(b"\n")[1].decode()):
        load_policy(bad)


def test_listed_classes_cannot_be_called_or_altered(ppo: Path, tmp_path: Path) -> None:
    calls = b"cstable_baselines3.common.torch_layers\nNatureCNN\n(tR."
    build = b"cstable_baselines3.common.policies\nActorCriticPolicy\n}S'forward'\nI1\nsb."
    slots = b"cgymnasium.spaces.box\nBox\n(N}S'sample'\nI1\nstb."
    numpy = b"cnumpy._core.multiarray\nscalar\n(N}S'x'\nI1\nstb."
    builtin = b"ccollections\nOrderedDict\n(N}S'items'\nI1\nstb."
    forward, sample = sb3.ppo.MlpPolicy.forward, spaces.Box.sample
    rename = b"cstable_baselines3.common.policies\nActorCriticPolicy\n(lS'os.system'\nasb."
    for payload in (calls, build, slots, numpy, builtin, rename):
        with pytest.raises(CheckpointError):
            load_policy(with_data(ppo, tmp_path / "bad.zip", policy_kwargs=payload))
    assert sb3.ppo.MlpPolicy.forward is forward
    assert spaces.Box.sample is sample
    load_policy(ppo)  # the stand-ins themselves are unharmed


def test_object_arrays_and_wrong_values_are_refused(ppo: Path, tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {}
    cyclic["net_arch"] = [cyclic]
    objects = pickle.dumps({"net_arch": np.array([print], dtype=object)})
    for entries in (
        {"policy_kwargs": objects},
        {"policy_kwargs": pickle.dumps({"features_extractor_class": torch.nn.ReLU})},
        {"policy_kwargs": [1]},
        {"policy_kwargs": pickle.dumps(cyclic)},
        {"action_space": b"cgymnasium.spaces.dict\nDict\n(tR\x94}S'spaces'\n}S'a'\nh\x00sstb."},
        {"policy_kwargs": {"net_arch": [10**9]}},
        {"policy_kwargs": {"net_arch": [8]}},
        {"policy_kwargs": {"no_such": 1}},
        {"policy_class": pickle.dumps(torch.nn.ReLU)},
        {"policy_class": "MlpPolicy"},
        {"action_space": pickle.dumps(torch.nn.ReLU)},
        {"action_space": pickle.dumps(spaces.Text(3))},
        {"action_space": pickle.dumps(spaces.Discrete(10**12))},
        {"action_space": b"damaged"},
        {"action_space": {":serialized:": "no base64!"}},
    ):
        with pytest.raises(CheckpointError) as caught:
            load_policy(with_data(ppo, tmp_path / "bad.zip", **entries))
        assert "\n" not in str(caught.value), entries


def test_entries_that_are_not_needed_are_never_decoded(ppo: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bad = with_data(
        ppo, tmp_path / "bad.zip", clip_range=pickle.dumps(Touch(mark)), ep_info_buffer=b"damaged"
    )
    observations = batch(BOX)
    np.testing.assert_array_equal(
        load_policy(bad).act(observations, deterministic=True),
        load_policy(ppo).act(observations, deterministic=True),
    )
    assert not mark.exists()


def test_malicious_weights_are_refused(ppo: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"weight": Touch(mark)}, tmp_path / "evil.pth")
    for content in ((tmp_path / "evil.pth").read_bytes(), pickle.dumps(Touch(mark))):
        with pytest.raises(CheckpointError):
            load_policy(rewrite(ppo, tmp_path / "bad.zip", policy_pth=content))
    assert not mark.exists()


def test_a_malicious_normalizer_is_refused(ppo: Path, tmp_path: Path) -> None:
    mark, stats = tmp_path / "mark", tmp_path / "stats.pkl"
    stats.write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        load_policy(ppo, vec_normalize=stats)
    assert not mark.exists()
    stats.write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="VecNormalize"):
        load_policy(ppo, vec_normalize=stats)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_policy(ppo, vec_normalize=tmp_path / "none.pkl")


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pickle"])
def test_bare_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / f"policy{suffix}"
    path.write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(CheckpointError, match="pickle"):
        load_policy(path)
    assert not mark.exists()


def test_a_custom_policy_is_refused_with_advice(tmp_path: Path) -> None:
    class Custom(sb3.ppo.MlpPolicy):
        pass

    sb3.PPO(Custom, Noise(BOX, TORQUE), **ON, batch_size=16).save(tmp_path / "m.zip")
    with pytest.raises(CheckpointError, match=r"torch\.jit\.trace"):
        load_policy(tmp_path / "m.zip")
    kwargs = cloudpickle.dumps({"activation_fn": lambda: torch.nn.Tanh()})
    with pytest.raises(CheckpointError, match=r"torch\.jit\.trace"):
        load_policy(
            with_data(tmp_path / "m.zip", tmp_path / "k.zip", policy_kwargs=kwargs, policy_class=b"N.")
        )


def test_every_truncation_gives_one_sentence(ppo: Path, tmp_path: Path) -> None:
    whole, cut = ppo.read_bytes(), tmp_path / "cut.zip"
    for size in [0, 1, 30, *range(100, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.zip") as caught:
            load_policy(cut)
        assert "\n" not in str(caught.value)


def test_flipped_bytes_never_escape_as_another_error(ppo: Path, tmp_path: Path) -> None:
    rng, flipped = np.random.default_rng(0), tmp_path / "flipped.zip"
    data = zipfile.ZipFile(ppo).read("data").decode()
    entry = json.loads(data)["observation_space"][":serialized:"]
    raw = base64.b64decode(entry)
    sentences: list[str] = []
    for _ in range(300):
        damaged = bytearray(raw)
        for position in rng.integers(len(raw), size=2):
            damaged[position] = rng.integers(256)
        try:
            load_policy(with_data(ppo, flipped, observation_space=bytes(damaged)))
        except CheckpointError as error:
            sentences.append(str(error))
    assert len(sentences) > 100
    assert not any("\n" in sentence for sentence in sentences)


@pytest.mark.parametrize("member", ["data", "policy.pth"])
def test_missing_members_are_named(ppo: Path, tmp_path: Path, member: str) -> None:
    bad = rewrite(ppo, tmp_path / "bad.zip", **{member.replace(".pth", "_pth"): None})
    with pytest.raises(CheckpointError, match=member):
        load_policy(bad)


def test_bombs_and_foreign_descriptions_are_refused(
    ppo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in (b"[]", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(CheckpointError):
            load_policy(rewrite(ppo, tmp_path / "bad.zip", data=content))
    monkeypatch.setattr("saferl.policies.sb3_zip.MAX_DATA_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", b" " * 2**24)
        archive.writestr("policy.pth", b"")
    with pytest.raises(CheckpointError, match="unpacks to more than 1 MiB"):
        load_policy(tmp_path / "bomb.zip")


def test_a_missing_package_is_named(ppo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "stable_baselines3"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        load_policy(ppo)


def test_unknown_kinds_and_missing_files(tmp_path: Path, ppo: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_policy(tmp_path / "none.zip")
    (tmp_path / "policy.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="TorchScript"):
        load_policy(tmp_path / "policy.onnx")
    with pytest.raises(UsageError, match="device"):
        load_policy(ppo, device="nonsense")
    with pytest.raises(UsageError, match="vec_normalize"):
        load_policy(tmp_path, vec_normalize=tmp_path)
