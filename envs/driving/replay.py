"""Recordings of drives: the seed and the actions, which say everything, and where the drive ended, as a
check.

recording = Recording.of(policy, seed=3, steps=600, options={"route_length": 200.0})
recording.save(path)
for moment in replay(Recording.load(path)):
    picture = draw(moment, 0)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saferl.envs.driving.env import RouteDrivingVectorEnv
from saferl.errors import UsageError

__all__ = ["Recording", "replay"]

_FORMAT = "saferl-drive-1"


@dataclass
class Recording:
    """One drive."""

    seed: int
    actions: list[list[float]]
    """(T, 2), every step's."""
    end: list[float]
    """x, y and heading (m, rad) after the last step."""
    episode: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `RouteDrivingVectorEnv`."""

    @classmethod
    def of(
        cls, policy: Any, *, seed: int, steps: int, episode: int = 0, options: dict[str, Any] | None = None
    ) -> Recording:
        """Drive one world with a policy until the drive ends, or for `steps` steps, and keep what it did."""
        env = _make(options or {})
        obs = _begin(env, seed, episode)
        actions: list[list[float]] = []
        end = [0.0, 0.0, 0.0]
        for _ in range(steps):
            action = np.asarray(policy.act(obs, deterministic=True), np.float32)
            actions.append([float(a) for a in action[0]])
            obs, _, terminated, truncated, _ = env.step(action)
            if terminated[0] or truncated[0]:
                break
            end = _place(env)
        else:
            return cls(seed, actions, end, episode, options or {})
        # The step that ends a drive begins the next: what counts is the place before it.
        actions.pop()
        return cls(seed, actions, end, episode, options or {})

    def save(self, path: Path | str) -> None:
        """Write it as JSON."""
        from saferl.experiment.checkpoint import write_atomically

        write_atomically(Path(path), json.dumps({"format": _FORMAT, **asdict(self)}))

    @classmethod
    def load(cls, path: Path | str) -> Recording:
        """Read it; raises UsageError, naming the file, for one that is no recording."""
        try:
            found = json.loads(Path(path).read_text())
            if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
                raise ValueError("its format is another")
            recording = cls(**found)
            if np.shape(recording.actions)[1:] != (2,) or len(recording.end) != 3:
                raise ValueError("its actions are not pairs")
        except OSError as error:
            raise UsageError(f"the recording {path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is no recording of a drive: {error}.") from error
        return recording


def replay(recording: Recording) -> Iterator[RouteDrivingVectorEnv]:
    """The environment after every step, for `frame`, `state` and `saferl.envs.driving.draw`.

    Raises UsageError, at the end, where the drive does not end where it did: the package drives differently.
    """
    env = _make(recording.options)
    _begin(env, recording.seed, recording.episode)
    for action in recording.actions:
        env.step(np.asarray([action], np.float32))
        yield env
    if recording.actions and _place(env) != recording.end:
        raise UsageError(
            f"the recording of seed {recording.seed} does not end where it did; it was made by another "
            "version of the package, or changed."
        )


def _make(options: dict[str, Any]) -> RouteDrivingVectorEnv:
    return RouteDrivingVectorEnv(1, **options)


def _begin(env: RouteDrivingVectorEnv, seed: int, episode: int) -> Any:
    obs, _ = env.reset(seed=seed)
    for _ in range(episode):
        obs, _ = env.reset()
    return obs


def _place(env: RouteDrivingVectorEnv) -> list[float]:
    frame = env.frame
    return [float(frame.x[0]), float(frame.y[0]), float(frame.heading[0])]
