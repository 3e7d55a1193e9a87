"""One episode as a film: `check` refuses what cannot be written or drawn, `record` plays and writes it.

An `.mp4` is written by ffmpeg (package imageio-ffmpeg) with a frame a step, a `.gif` by Pillow with fewer.
Both run as fast as the environment's `render_fps` says.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from saferl.errors import MissingPackageError, SaferlError, UsageError

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv
    from PIL import Image

    from saferl.experiment.evaluate import Acts

__all__ = ["SUFFIXES", "Episode", "check", "open_env", "record"]

SUFFIXES = (".mp4", ".gif")

_FPS = 30.0  # of an environment that does not say
_SIDE = 512  # of the original's pictures, px
_ENDLESS_STEPS = 10_000  # recorded of an episode without a time limit
_GIF_FPS = 20.0  # more, and viewers slow the picture down
_GIF_FRAMES = 500  # at most, since all are held in memory until the file is written
_MP4_CRF = 20  # quality: 0 is lossless, 51 the worst; text stays sharp
_INSTALL = "pip install imageio-ffmpeg"


@dataclass(frozen=True)
class Episode:
    """What was recorded."""

    steps: int
    episode_return: float
    """Undiscounted sum of the rewards."""
    cost: float
    """Undiscounted sum of the costs."""
    finished: bool
    """False where an episode without a time limit was cut off."""


def open_env(env_id: str, backend: str = "auto") -> VectorEnv:
    """Make one environment that draws itself: `render_mode="rgb_array"`, (height, width, 3) uint8.

    The planar engine draws its own tasks; whatever "auto" steps with an engine that draws nothing is computed
    and drawn by the original.

    Raises:
        UsageError: the environment or the backend draws nothing.
        MissingPackageError: the environment's package is not installed.
        SaferlError: its rendering cannot be loaded.
    """
    import gymnasium as gym
    from gymnasium.envs.registration import load_env_creator

    from saferl.envs import make_vec, resolve_id, safety_gym

    if backend == "simulated":
        raise UsageError("the simulated engine draws nothing; add --backend original, or leave out --video.")
    spec = gym.spec(resolve_id(env_id))
    creator: Any = spec.entry_point
    if isinstance(creator, str):
        with _drawing():
            creator = load_env_creator(creator)
    metadata = getattr(creator, "metadata", None)  # a function that makes environments has none
    if metadata is not None and "rgb_array" not in metadata.get("render_modes", ()):
        raise UsageError(f"{env_id} has no picture (no render mode 'rgb_array'); leave out --video.")
    task_id = spec.id.removeprefix("saferl/")
    options: dict[str, Any] = {}
    if task_id in {task.id for task in safety_gym.tasks()} and (
        backend == "original" or task_id not in safety_gym.PLANAR
    ):
        # The original's own picture is small and, of the navigation tasks, what the robot sees.
        options = {"width": _SIDE, "height": _SIDE}
        if "Velocity" not in task_id:
            options["camera_name"] = "track"
    with _drawing():
        return make_vec(env_id, 1, backend=backend, render_mode="rgb_array", **options)


def check(path: Path, make: Callable[[], VectorEnv]) -> None:
    """Find out whether an episode can be recorded, before anything long is computed.

    Args:
        path: the file to be written.
        make: as `record` takes it.

    Raises:
        UsageError: the name does not end in .mp4 or .gif, or its folder does not exist.
        MissingPackageError: an .mp4 is asked for without imageio-ffmpeg.
        SaferlError: the folder is not writable, or no frame can be drawn; and whatever `make` raises.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"the video {path} is neither .mp4 nor .gif; give it one of these endings.")
    if path.is_dir():
        raise UsageError(f"the video {path} is a folder; name a file.")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} of the video does not exist; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise SaferlError(f"the folder {path.parent} of the video is not writable; choose another.")
    if path.suffix.lower() == ".mp4":
        _find_ffmpeg()
    with contextlib.closing(make()) as env:
        env.reset(seed=0)
        _frame(env)


def record(
    path: Path,
    make: Callable[[], VectorEnv],
    policy: Acts,
    *,
    seed: int = 0,
    deterministic: bool = True,
    quiet: bool = False,
) -> Episode:
    """Play an episode and write it; nothing stands under `path` before the film is complete.

    The frame of the state that ends the episode is missing, because the environment has started the next
    episode by then. An episode without a time limit is cut off after 10,000 steps.

    Args:
        path: an .mp4 or .gif file; one that exists is replaced.
        make: makes one environment (`num_envs` 1) that gives frames from `render`, as `open_env` does; in
            SAME_STEP autoreset mode, with its cost in `info["cost"]`.
        policy: acts on batched observations; one that is `Stateful` is told what comes of its actions.
        seed: of the environment.
        deterministic: act by the mode of the policy.
        quiet: plain lines instead of a progress bar.

    Raises:
        SaferlError: a frame cannot be drawn or the file cannot be written; an earlier file is untouched.
        MissingPackageError: an .mp4 is asked for without imageio-ffmpeg.
    """
    from saferl.experiment.progress import Progress
    from saferl.policies.protocol import Stateful

    with contextlib.closing(make()) as env:
        horizon = getattr(env.spec, "max_episode_steps", None) or _ENDLESS_STEPS
        fps = float(env.metadata.get("render_fps") or _FPS)
        every = 1
        if path.suffix.lower() == ".gif":
            every = max(math.ceil(fps / _GIF_FPS), math.ceil(horizon / _GIF_FRAMES))
        steps, total, cost, ended = 0, 0.0, 0.0, False
        observations, _ = env.reset(seed=seed)
        memory = policy if isinstance(policy, Stateful) else None
        if memory is not None:
            memory.begin(1)
        with (
            Progress(f"recording {path}", horizon, quiet=quiet) as progress,
            _written(path) as temporary,
            contextlib.closing(_film(path, temporary, fps / every)) as film,
        ):
            while not ended and steps < horizon:
                if steps % every == 0:
                    film.add(_frame(env))
                actions = policy.act(observations, deterministic=deterministic)
                observations, reward, terminated, truncated, info = env.step(actions)
                steps += 1
                total += float(np.asarray(info.get("unwrapped_reward", reward))[0])
                cost += float(np.asarray(info["cost"])[0])
                ended = bool(np.asarray(terminated)[0] or np.asarray(truncated)[0])
                if memory is not None:
                    memory.observe(reward, info["cost"], [ended])
                progress.update(steps)
            film.finish()
    return Episode(steps, total, cost, ended)


# --- frames -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Turn whatever a rendering library raises into one sentence."""
    import gymnasium as gym

    try:
        yield
    except SaferlError:
        raise
    except gym.error.DependencyNotInstalled as error:
        raise MissingPackageError(_one_line(error)) from error
    except Exception as error:  # OpenGL libraries have their own classes, and fail while they are imported
        raise SaferlError(
            f"rendering failed ({_one_line(error)}); without a display, install EGL or OSMesa and set "
            "MUJOCO_GL=egl or MUJOCO_GL=osmesa in the environment"
        ) from error


def _frame(env: VectorEnv) -> NDArray[np.uint8]:
    """The picture of the only environment, (height, width, 3)."""
    with _drawing():
        frames = env.render()
    frame = np.asarray(frames[0] if frames else None)
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise SaferlError(
            f"the environment's render returned {frame.dtype} of shape {frame.shape}, not a picture "
            "(height, width, 3) uint8; leave out --video."
        )
    return np.ascontiguousarray(frame)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__


# --- files --------------------------------------------------------------------------------------------


class _Film(Protocol):
    """A file that grows by frames (height, width, 3) uint8; without `finish` it is worth nothing."""

    def add(self, frame: NDArray[np.uint8]) -> None: ...

    def finish(self) -> None:
        """Complete the file; SaferlError if it cannot be written."""

    def close(self) -> None:
        """Let go of whatever is still open."""


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it takes the place of `path` if all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        try:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise _not_written(path, error.strerror or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _not_written(path: Path, reason: str) -> SaferlError:
    return SaferlError(f"{path} could not be written ({reason}); free some space or choose another folder.")


def _film(path: Path, temporary: Path, fps: float) -> _Film:
    return (_Gif if path.suffix.lower() == ".gif" else _Mp4)(path, temporary, fps)


class _Gif:
    def __init__(self, path: Path, temporary: Path, fps: float) -> None:
        self._path, self._temporary = path, temporary
        # The format counts time in hundredths of a second.
        self._milliseconds = 10 * max(2, round(100 / fps))
        self._frames: list[Image.Image] = []

    def add(self, frame: NDArray[np.uint8]) -> None:
        from PIL import Image

        # The octree is four times faster than the default; dithering would flicker and fill the file.
        method, dither = Image.Quantize.FASTOCTREE, Image.Dither.NONE
        self._frames.append(Image.fromarray(frame).quantize(256, method=method, dither=dither))

    def finish(self) -> None:
        first, *others = self._frames
        try:
            first.save(
                self._temporary,
                format="GIF",
                save_all=True,
                append_images=others,
                duration=self._milliseconds,
                loop=0,
            )
        except OSError as error:
            raise _not_written(self._path, error.strerror or str(error)) from error

    def close(self) -> None:
        self._frames.clear()


class _Mp4:
    """Frames through a pipe to ffmpeg, whose exit status tells whether the file is whole."""

    def __init__(self, path: Path, temporary: Path, fps: float) -> None:
        self._path, self._temporary, self._fps = path, temporary, fps
        self._ffmpeg: subprocess.Popen[bytes] | None = None
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`

    def add(self, frame: NDArray[np.uint8]) -> None:
        # H.264 as every player reads it wants even sides.
        odd = (frame.shape[0] % 2, frame.shape[1] % 2)
        if any(odd):
            frame = np.pad(frame, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        if self._ffmpeg is None:
            self._ffmpeg = self._start(*frame.shape[:2])
        assert self._ffmpeg.stdin is not None
        try:
            self._ffmpeg.stdin.write(frame.tobytes())
        except OSError as error:
            self.finish()  # knows why
            raise _not_written(self._path, f"ffmpeg: {error}") from error

    def finish(self) -> None:
        assert self._ffmpeg is not None
        with contextlib.suppress(OSError):  # it is gone: its status is what counts
            self._ffmpeg.communicate()
        if self._ffmpeg.returncode:
            self._messages.seek(0)
            lines = self._messages.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1].strip().rstrip(".") if lines else f"exit status {self._ffmpeg.returncode}"
            raise _not_written(self._path, f"ffmpeg: {reason}")

    def close(self) -> None:
        if self._ffmpeg is not None and self._ffmpeg.poll() is None:
            self._ffmpeg.kill()
            with contextlib.suppress(OSError):
                self._ffmpeg.communicate()
        self._messages.close()

    def _start(self, height: int, width: int) -> subprocess.Popen[bytes]:
        command = [_find_ffmpeg(), "-y", "-v", "error"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self._fps:g}"]
        command += ["-i", "-", "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(_MP4_CRF)]
        command += ["-movflags", "+faststart"]  # it plays while it loads
        command += ["-f", "mp4", str(self._temporary.absolute())]  # else "a:b" would be a protocol
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
            start_new_session=True,  # Ctrl-C is for this process, which then ends it
        )


def _find_ffmpeg() -> str:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError as error:
        raise MissingPackageError(
            f"imageio-ffmpeg, which writes .mp4, is not installed; run: {_INSTALL} (a .gif needs nothing)"
        ) from error
    try:
        return str(get_ffmpeg_exe())
    except RuntimeError as error:
        raise MissingPackageError(
            f"imageio-ffmpeg finds no ffmpeg; run: {_INSTALL} --force-reinstall (a .gif needs nothing)"
        ) from error
