"""`saferl evaluate --video`: what is written, when, and one sentence for whatever cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from PIL import Image

from saferl.agents import LEARNERS, Learner
from saferl.cli import main, video
from saferl.envs import make_vec
from saferl.envs.safety_gym.planar.draw import HEIGHT, WIDTH
from saferl.errors import MissingPackageError, SaferlError, UsageError

STEPS = 24
PAINTED = "saferl-test/Painted-v0"
SMALL = [
    "--total-steps",
    "200",
    "--steps-per-iteration",
    "200",
    "--num-envs",
    "2",
    "--epochs",
    "1",
    "--quiet",
]

Saferl = Callable[..., tuple[int, str, str]]


class Painted(gym.Env[np.ndarray, np.ndarray]):
    """Frames with odd sides whose brightness is the step; a reward of 2 and a cost of 0.5 a step."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, fault: str = "") -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.render_mode, self.fault, self.steps = render_mode, fault, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.fault == "step" and self.steps == 10:
            raise RuntimeError("the simulator fell over")
        return np.full(2, self.steps, np.float32), 2.0, self.steps == STEPS, False, {"cost": 0.5}

    def render(self) -> Any:
        if self.fault == "render":
            raise RuntimeError("no context")
        if self.fault == "shape":
            return np.zeros((5, 5), np.uint8)
        return np.full((45, 31, 3), 10 * self.steps, np.uint8)


if PAINTED not in gym.registry:
    gym.register(PAINTED, entry_point=Painted, max_episode_steps=100)


class Idle:
    """Acts by ones, and calls `spy` before every action."""

    def __init__(self, size: int = 1, spy: Callable[[], None] = lambda: None) -> None:
        self.size, self.spy = size, spy

    def act(self, obs: Any, *, deterministic: bool = False) -> np.ndarray:
        self.spy()
        return np.ones((len(obs), self.size), np.float32)


class Short(VectorWrapper[Any, Any, Any, Any, Any]):
    """Cuts the episode off."""

    taken = 0

    def step(self, actions: Any) -> Any:
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        self.taken += 1
        return obs, rewards, terminated, truncated | (self.taken >= STEPS), info


def painted(**kwargs: Any) -> Callable[[], VectorEnv]:
    return lambda: make_vec(PAINTED, 1, render_mode="rgb_array", **kwargs)


def gif_frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as film:
        frames = []
        for index in range(film.n_frames):  # type: ignore[attr-defined]
            film.seek(index)
            frames.append(np.asarray(film.convert("RGB")))
        return frames


def mp4_frames(path: Path) -> tuple[list[np.ndarray], float]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return [np.frombuffer(raw, np.uint8).reshape(height, width, 3) for raw in reader], meta["fps"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "ppo-lag", "--env", PAINTED, *SMALL, "--run", str(folder)]) == 0
    return folder


# --- what is written ----------------------------------------------------------------------------------


def test_mp4_has_a_frame_a_step(tmp_path: Path) -> None:
    path = tmp_path / "a:b.mp4"
    episode = video.record(path, painted(), Idle(), quiet=True)
    assert episode == video.Episode(STEPS, 2.0 * STEPS, 0.5 * STEPS, True)
    frames, fps = mp4_frames(path)
    assert fps == 10
    assert len(frames) == STEPS
    assert frames[0].shape == (46, 32, 3)  # the codec wants even sides
    brightness = [frame.mean() for frame in frames]
    np.testing.assert_allclose(brightness, 10.0 * np.arange(STEPS), atol=6)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_gif_skips_frames_and_keeps_the_speed(tmp_path: Path) -> None:
    path = tmp_path / "film.GIF"
    video.record(path, painted(), Idle(), quiet=True)
    frames = gif_frames(path)
    assert len(frames) == STEPS
    assert frames[3].shape == (45, 31, 3)
    assert [int(frame.mean()) for frame in frames] == [10 * k for k in range(STEPS)]
    with Image.open(path) as film:
        assert film.info["duration"] == 100
        assert film.info["loop"] == 0


def test_planar_episode(tmp_path: Path) -> None:
    path = tmp_path / "film.gif"
    episode = video.record(
        path, lambda: Short(video.open_env("SafetyPointGoal1-v0")), Idle(2), seed=3, quiet=True
    )
    frames = gif_frames(path)
    assert episode.steps == STEPS
    assert len(frames) == STEPS // 3  # 50 steps a second, at most 20 frames
    with Image.open(path) as film:
        assert film.info["duration"] == 60
    assert frames[0].shape == (HEIGHT, WIDTH, 3)
    assert len({frame.tobytes() for frame in frames}) == len(frames)
    blue = [(np.abs(frame.astype(int) - (37, 99, 235)).sum(axis=2) < 40).sum() for frame in frames]
    assert min(blue) > 100
    # The same seed: the same layout and numbers as in an evaluation.
    env = make_vec("SafetyPointGoal1-v0", 1)
    env.reset(seed=3)
    total = sum(env.step(np.ones((1, 2)))[1][0] for _ in range(STEPS))
    assert episode.episode_return == total


def test_evaluate_records_after_the_table(saferl: Saferl, run: Path, tmp_path: Path) -> None:
    for name in ("film.mp4", "film.gif"):
        path = tmp_path / name
        path.write_bytes(b"an older film")
        status, out, err = saferl("evaluate", run, "--episodes", "2", "--quiet", "--video", path)
        assert (status, err) == (0, "")
        line = f"video: {path} (return 48.000, cost 12, {STEPS} steps)"
        assert out.index("evaluation:") < out.index(line)
        frames = mp4_frames(path)[0] if name.endswith("4") else gif_frames(path)
        assert len(frames) == STEPS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.gif", "film.mp4"]
    assert json.loads((run / "evaluation.json").read_text())["episodes"] == 2


def test_the_environment_is_wrapped_as_in_the_evaluation(
    saferl: Saferl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = LEARNERS.get("ppo-saute", Learner("saferl.agents.online.ppo_saute", ""))
    monkeypatch.setitem(LEARNERS, "ppo-saute", learner)
    folder, path = tmp_path / "run", tmp_path / "film.gif"
    words = ["--env", PAINTED, *SMALL, "--cost-limit", "1", "--unsafe-reward", "-1000", "--run", folder]
    assert saferl("train", "ppo-saute", *words)[0] == 0
    status, out, _ = saferl("evaluate", folder, "--episodes", "1", "--quiet", "--video", path)
    assert status == 0
    assert f"(return 48.000, cost 12, {STEPS} steps)" in out  # the environment's reward, not the wrapper's


# --- all or nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_nothing_half_done_has_the_final_name(name: str, tmp_path: Path) -> None:
    path, seen = tmp_path / name, []

    def spy() -> None:
        seen.append(path.exists())

    video.record(path, painted(), Idle(spy=spy), quiet=True)
    assert seen == [False] * STEPS
    whole = path.read_bytes()
    with pytest.raises(RuntimeError, match="fell over"):
        video.record(path, painted(fault="step"), Idle(), quiet=True)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.record(path, painted(), Idle(spy=interrupt), quiet=True)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_a_file_that_cannot_be_written_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        SaferlError, match=r"film\.(mp4|gif) could not be written \((ffmpeg: )?.+\); free some"
    ):
        video.record(tmp_path / "nowhere" / name, painted(), Idle(), quiet=True)


# --- refusals -----------------------------------------------------------------------------------------


def test_refusals_come_before_any_episode(
    saferl: Saferl, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.gif").mkdir()
    played: list[str] = []
    monkeypatch.setattr("saferl.experiment.evaluate.evaluate", lambda *a, **k: played.append("played"))
    other = ["--env", "SpeedLimit-v0"]
    for words, sentence, expected in [
        (["--video", tmp_path / "film.avi"], "film.avi is neither .mp4 nor .gif", 2),
        (["--video", tmp_path / "film"], "film is neither .mp4 nor .gif", 2),
        (["--video", tmp_path / "folder.gif"], "is a folder; name a file", 2),
        (["--video", tmp_path / "no" / "film.gif"], "does not exist; make it first", 2),
        ([*other, "--video", tmp_path / "film.gif"], "SpeedLimit-v0 has no picture", 2),
        (["--backend", "simulated", "--video", tmp_path / "film.gif"], "add --backend original", 2),
    ]:
        status, _, err = saferl("evaluate", run, "--quiet", *words)
        assert status == expected
        assert sentence in err
        assert len(err.strip().splitlines()) == 1
    assert not played
    assert [p.name for p in tmp_path.iterdir()] == ["folder.gif"]


def test_missing_ffmpeg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingPackageError, match="run: pip install imageio-ffmpeg"):
        video.check(tmp_path / "film.mp4", painted())
    video.check(tmp_path / "film.gif", painted())
    monkeypatch.undo()
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: (_ for _ in ()).throw(RuntimeError("none")))
    with pytest.raises(MissingPackageError, match="finds no ffmpeg; run: pip install"):
        video.check(tmp_path / "film.mp4", painted())


def test_environments_that_do_not_draw(tmp_path: Path) -> None:
    with pytest.raises(SaferlError, match=r"rendering failed \(no context\); .* set MUJOCO_GL=egl"):
        video.check(tmp_path / "film.gif", painted(fault="render"))
    with pytest.raises(SaferlError, match=r"returned uint8 of shape \(5, 5\), not a picture"):
        video.check(tmp_path / "film.gif", painted(fault="shape"))
    with pytest.raises(UsageError, match="has no picture"):
        video.open_env("saferl-test/Faulty-v0")
    with pytest.raises(UsageError, match="did you mean 'planar'"):
        video.open_env("SafetyPointGoal1-v0", "plannar")


def test_the_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Render one episode to this .mp4 or .gif file." in words
