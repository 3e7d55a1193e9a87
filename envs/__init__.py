"""Environments and data sets: one function, `make_vec`, for every id.

Importing this package registers the ids with Gymnasium ("saferl/SafetyPointGoal1-v0", ...) and nothing
more: MuJoCo, safety-gymnasium, PyBullet and torch are imported when an environment that needs them is made.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import VectorEnv

from saferl.envs import bullet, safety_gym
from saferl.envs.vector import ProcessVectorEnv, SerialVectorEnv, StatefulVectorEnv, check_num_envs
from saferl.errors import MissingPackageError, UsageError, unknown_name

__all__ = [
    "BACKENDS",
    "ProcessVectorEnv",
    "SerialVectorEnv",
    "StatefulVectorEnv",
    "list_envs",
    "make_vec",
    "resolve_id",
    "runs_on_devices",
    "split_options",
]

#: Who steps the environments. "auto" is the fastest engine that is exact in rewards and costs: "planar"
#: (closed form, Safety-Gymnasium's contact-free Point tasks), else "simulated" (batched MuJoCo, all its other
#: tasks), else the native vector environment of the id, else "original", the environment's own package.
BACKENDS = ("auto", "planar", "simulated", "original")

_PREFIX = "saferl/"
_PLANAR_KWARGS = {"threads", "render_mode"}
_SIMULATED_KWARGS = frozenset({"threads", "exact"})
_METADRIVE = (
    "MetaDrive's tasks are not available: DSRL's data (261 observations) come from a fork of "
    "metadrive-simulator 0.2.6 that only its repository has and that needs the old gym, and the released "
    "package has 259; to use the fork, wrap it as a Gymnasium environment and name that as 'module:ID'"
)
_SUMMARIES: dict[str, str] = {}
_ON_DEVICES = {*safety_gym.PLANAR, "RouteDriving-v0"}
"""What is stepped on a torch device as well."""


def _register(name: str, summary: str, **spec: Any) -> None:
    _SUMMARIES[name] = summary
    if _PREFIX + name not in gym.registry:
        gym.register(_PREFIX + name, **spec)


_register(
    "SpeedLimit-v0",
    "toy: a car on a straight road with a speed limit, its optimum known; batched",
    entry_point="saferl.envs.toy:SpeedLimitEnv",
    vector_entry_point="saferl.envs.toy:SpeedLimitVectorEnv",
    max_episode_steps=100,
)
_register(
    "PointRobot-v0",
    "toy: a unicycle between two hazards, its feasible region computable; batched",
    entry_point="saferl.envs.point_robot:PointRobotEnv",
    vector_entry_point="saferl.envs.point_robot:PointRobotVectorEnv",
    max_episode_steps=300,
)
_register(
    "RouteDriving-v0",
    "driving: routes among traffic, lights and people, CARLA's and nuPlan's scores; batched",
    entry_point="saferl.envs.driving.env:RouteDrivingEnv",
    vector_entry_point="saferl.envs.driving.env:RouteDrivingVectorEnv",
)
for _task in safety_gym.tasks():
    _register(
        _task.id,
        _task.summary,
        entry_point="saferl.envs.safety_gym.original:SafetyGymEnv",
        kwargs={"task_id": _task.id},
        max_episode_steps=_task.max_episode_steps,
    )
for _bullet in bullet.tasks():
    _register(
        _bullet.id,
        _bullet.summary,
        entry_point="saferl.envs.bullet.original:BulletEnv",
        kwargs={"task_id": _bullet.id},
        max_episode_steps=_bullet.max_episode_steps,
    )
for _road, _steps, _what in (
    ("racetrack", 1000, "a lap of a two-lane racetrack with other cars"),
    ("intersection", 300, "a crossing without lights, among cross traffic"),
    ("merge", 600, "a motorway that a car merges into"),
    ("straight", 600, "800 m of a motorway with 20 cars"),
):
    _register(
        f"Highway{_road.title()}-v0",
        f"highway-env: {_what}; CARLA's and nuPlan's scores",
        entry_point="saferl.envs.driving.highway:HighwayDrivingEnv",
        kwargs={"task": _road},
        max_episode_steps=_steps,
    )


def list_envs() -> list[tuple[str, str]]:
    """Return the ids of this package with a line each, "family: what it is", for `saferl list envs`."""
    return list(_SUMMARIES.items())


def split_options(env_id: str) -> tuple[str, dict[str, Any]]:
    """Return an id without its options, and the options: "ID?name=value&name=value".

    Values are JSON where they can be read as such, else words. Raises UsageError for one without a "=".
    """
    name, mark, rest = env_id.partition("?")
    options: dict[str, Any] = {}
    for part in rest.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"{part!r} in {env_id!r} is no option; write ID?name=value&name=value.")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return name, options


def resolve_id(env_id: str) -> str:
    """Return the id under which Gymnasium knows `env_id`.

    `env_id` is one of `list_envs`, with or without "saferl/", or any id registered with Gymnasium;
    "module:Name-v0" imports the module first. Options are left out (see `split_options`). Raises UsageError,
    naming the nearest id, when unknown.
    """
    env_id, _ = split_options(env_id)
    module, colon, name = env_id.rpartition(":")
    if colon:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"the environment {env_id!r} needs the module {module!r}: {error}; install it or mend the id"
            ) from error
    if _PREFIX + name in gym.registry:
        return _PREFIX + name
    if name in gym.registry:
        return name
    if re.match(r"(safe|offline)metadrive", name, re.IGNORECASE):
        raise UsageError(_METADRIVE)
    others = [known for known in gym.registry if not known.startswith(_PREFIX)]
    raise unknown_name("environment", name.removeprefix(_PREFIX), [*_SUMMARIES, *others])


def runs_on_devices(env_id: str, *, backend: str = "auto", processes: int = 0) -> bool:
    """Whether `make_vec` can step `env_id` on a torch device; raises UsageError for an unknown id."""
    spec = gym.spec(resolve_id(env_id))
    native = spec.namespace == "saferl" and spec.id.removeprefix(_PREFIX) in _ON_DEVICES
    return native and backend in ("auto", "planar") and not processes


def make_vec(
    env_id: str,
    num_envs: int,
    *,
    backend: str = "auto",
    processes: int = 0,
    device: str = "cpu",
    **kwargs: Any,
) -> VectorEnv:
    """Make `num_envs` environments that are stepped together and report costs (see `saferl.envs.vector`).

    Args:
        env_id: an id as `resolve_id` takes it, maybe with options for the environment's constructor,
            "RouteDriving-v0?reward=roach&vehicles=12".
        num_envs: number of environments, at least 1.
        backend: one of `BACKENDS`.
        processes: 0 steps them in this process; more spreads single environments over that many workers
            (never more than environments).
        device: "cpu", or a torch device such as "cuda" for environments that run there and whose `step`
            takes and returns tensors; the planar engine's tasks do (see `runs_on_devices`).
        **kwargs: go to the environment's constructor, e.g. `render_mode="rgb_array"`.

    `metadata["backend"]` of the result names the engine that was chosen.

    Raises UsageError for an unknown id or backend or an impossible number, MissingPackageError, with the
    command that mends it, when the environment's package is not installed.
    """
    check_num_envs(num_envs)
    env_id, options = split_options(env_id)
    kwargs = {**options, **kwargs}
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if processes < 0:
        raise UsageError(f"processes is {processes}; 0 means this process, more means worker processes")
    spec = gym.spec(resolve_id(env_id))
    if device.partition(":")[0] != "cpu":
        planar = spec.id.removeprefix(_PREFIX) in safety_gym.PLANAR
        if (kwargs and planar) or not runs_on_devices(env_id, backend=backend, processes=processes):
            raise UsageError(
                f"{env_id} with these arguments cannot be stepped on {device}; use device='cpu', or one of "
                f"{', '.join(sorted(safety_gym.PLANAR))} with no other arguments, or RouteDriving-v0"
            )
        kwargs = {**kwargs, "device": device}
    creator = None if processes else _engine(spec, backend, kwargs)
    if creator is not None:
        try:
            env: VectorEnv = creator(num_envs=num_envs, **kwargs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise UsageError(f"{env_id} has no such option: {error}.") from error
        env.spec = spec
        env.metadata = {"backend": "native", **env.metadata}
        return env
    if backend in ("planar", "simulated"):
        if processes:
            raise UsageError(f"the {backend} engine steps all in this process; set processes to 0")
        raise UsageError(
            f"{env_id} with these arguments has no {backend} engine; use backend 'auto', which takes the "
            "fastest there is, or 'original'"
        )
    env_fns = [functools.partial(_make, spec, kwargs)] * num_envs
    env = ProcessVectorEnv(env_fns, processes) if processes else SerialVectorEnv(env_fns)
    env.metadata = {**env.metadata, "backend": "original"}
    return env


def _engine(spec: EnvSpec, backend: str, kwargs: Mapping[str, Any]) -> Callable[..., VectorEnv] | None:
    """The maker of the batched engine that `backend` means for `spec`, None for single environments."""
    if backend == "original" or spec.namespace != "saferl":
        # Other packages' native vectors know nothing of costs and reset in their own way.
        return None
    if spec.vector_entry_point is not None:
        native = spec.vector_entry_point
        return load_env_creator(native) if isinstance(native, str) else native  # type: ignore[return-value]
    task_id = spec.id.removeprefix(_PREFIX)
    if "device" in kwargs:
        from saferl.envs.safety_gym.planar.torch_env import PlanarTorchVectorEnv

        return functools.partial(PlanarTorchVectorEnv, task_id)
    # Cameras and other observations are the original's alone; the planar engine draws a view of its own.
    drawn = kwargs.get("render_mode") in (None, "rgb_array")
    if backend != "simulated" and task_id in safety_gym.PLANAR and drawn and kwargs.keys() <= _PLANAR_KWARGS:
        from saferl.envs.safety_gym.planar.env import PlanarVectorEnv

        return functools.partial(PlanarVectorEnv, task_id)
    if backend != "planar" and task_id in safety_gym.SIMULATED and kwargs.keys() <= _SIMULATED_KWARGS:
        from saferl.envs.safety_gym.simulated import SimulatedVectorEnv

        return functools.partial(SimulatedVectorEnv, task_id)
    return None


def _make(spec: EnvSpec, kwargs: dict[str, Any]) -> gym.Env:
    try:
        return gym.make(spec, disable_env_checker=True, **kwargs)
    except gym.error.DependencyNotInstalled as error:
        raise MissingPackageError(str(error)) from error
