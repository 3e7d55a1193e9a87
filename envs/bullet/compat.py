"""Runs bullet-safety-gym 1.4.0 (written for gymnasium 0.28) on today's packages.

`load` imports the package's modules under a copy of the package that does not run its `__init__` (which
registers ids with gymnasium). The copy is private: it is taken out of `sys.modules` again, so that
`import bullet_safety_gym` means to everybody else what it did before, and no file of the installed package is
touched. All changes made to the copy are the `_patch_...` functions below; each says what it mends.

Observations, rewards and costs are the original's bit for bit (see tests/envs/test_bullet.py).

Source: bullet-safety-gym 1.4.0 (MIT), https://github.com/liuzuxin/Bullet-Safety-Gym.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from saferl.envs.bullet import Task
from saferl.errors import MissingPackageError

__all__ = ["draws_from", "load", "make"]

_PACKAGE = "bullet_safety_gym"
_VERSION = "1.4.0"
_INSTALL = f"pip install --no-deps bullet-safety-gym=={_VERSION}"
_lock = threading.Lock()
_generator: contextvars.ContextVar[np.random.RandomState] = contextvars.ContextVar("generator")
_load_visuals = contextvars.ContextVar("load_visuals", default=True)


@contextlib.contextmanager
def draws_from(generator: np.random.RandomState) -> Iterator[None]:
    """While this is open, the package draws its random numbers from `generator`, not from NumPy's own."""
    token = _generator.set(generator)
    try:
        yield
    finally:
        _generator.reset(token)


def make(task: Task, *, visuals: bool) -> Any:
    """Build the package's own environment in a simulation of its own; call it inside `draws_from`.

    Args:
        task: which one.
        visuals: load what cameras alone see. That is most of the time that making a Drone or a Car takes,
            and nothing of it is felt by the physics.

    Raises MissingPackageError when the package or PyBullet is not installed.
    """
    builder = load()
    token = _load_visuals.set(visuals)
    try:
        with np.errstate(over="ignore"):  # Gymnasium compares float32 bounds with float64's largest number
            return builder.EnvironmentBuilder(
                agent=task.agent, task=task.task, obstacles={}, world={"name": task.world}
            )
    finally:
        _load_visuals.reset(token)


@functools.cache
def load() -> Any:
    """Return the package's patched module `builder`."""
    spec = importlib.util.find_spec(_PACKAGE) if _PACKAGE not in sys.modules else None
    spec = spec or getattr(sys.modules.get(_PACKAGE), "__spec__", None)
    if spec is None or spec.submodule_search_locations is None:
        raise MissingPackageError(f"bullet-safety-gym is not installed; run: {_INSTALL}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.version("bullet-safety-gym")
        if installed != _VERSION:
            raise MissingPackageError(
                f"bullet-safety-gym {installed} is not what was tested; run: {_INSTALL}"
            )
    package = types.ModuleType(_PACKAGE)
    package.__path__ = list(spec.submodule_search_locations)
    try:
        _import_pybullet()
        with _lock, _private(package):
            return _import()
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"bullet-safety-gym needs {error.name!r}, which is missing; run: pip install 'saferl[bullet]'"
        ) from error


def _import_pybullet() -> None:
    """Import PyBullet without the line that it prints from C about its date of build."""
    if "pybullet" in sys.modules:
        return
    try:
        kept = os.dup(2)
    except OSError:  # closed: nothing is seen anyway
        importlib.import_module("pybullet")
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 (a file descriptor is what it is for)
            os.dup2(nowhere.fileno(), 2)
        importlib.import_module("pybullet")
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _private(package: types.ModuleType) -> Iterator[None]:
    """Let `package` stand for bullet_safety_gym while this is open, then put back what was there."""

    def take_out() -> dict[str, types.ModuleType]:
        names = [name for name in sys.modules if name == _PACKAGE or name.startswith(_PACKAGE + ".")]
        return {name: sys.modules.pop(name) for name in names}

    others = take_out()
    sys.modules[_PACKAGE] = package
    try:
        yield
    finally:
        take_out()
        sys.modules.update(others)


def _import() -> Any:
    def module(name: str) -> types.ModuleType:
        return importlib.import_module(f"{_PACKAGE}.envs.{name}")

    # The builder hides messages of this import by way of the file descriptor of `sys.stderr`, which notebooks
    # and test runners do not have; there are none any more.
    with open(os.open(os.devnull, os.O_WRONLY), "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        builder = module("builder")
    for name in ("bases", "agents", "tasks", "worlds"):
        _patch_random_numbers(module(name))
    _patch_client(builder)
    return builder


class _Draws:
    """What stands for `numpy.random`: the generator of the environment that is being made or reset."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_generator.get(), name)


def _patch_random_numbers(module: Any) -> None:
    """Resets drew from NumPy's global generator, so that no seed of the environment's own decided them."""
    numpy = types.ModuleType("numpy")
    numpy.__dict__.update(np.__dict__)
    numpy.random = _Draws()  # type: ignore[attr-defined]
    module.np = numpy


def _patch_client(builder: Any) -> None:
    """Start simulations silently, and load bodies without what is only seen, unless it is wanted.

    Meshes take most of the time of making an environment: 0.7 s for a Drone, 0.3 s for a Car.
    """
    import pybullet
    from pybullet_utils.bullet_client import BulletClient

    # This hid PyBullet's messages by way of the file descriptor of `sys.stdout`, which not everybody has.
    builder.RedirectStream = lambda stream: contextlib.nullcontext()

    class Client(BulletClient):
        def __init__(self, connection_mode: int) -> None:
            # Not the base class's: it gives PyBullet options, if empty ones, which that prints.
            self._shapes: dict[Any, Any] = {}
            self._pid = os.getpid()
            self._client = pybullet.connect(connection_mode)

        def loadURDF(self, *args: Any, flags: int = 0, **kwargs: Any) -> int:
            if not _load_visuals.get():
                flags |= pybullet.URDF_IGNORE_VISUAL_SHAPES
            body: int = pybullet.loadURDF(*args, flags=flags, physicsClientId=self._client, **kwargs)
            return body

    builder.bullet_client = types.SimpleNamespace(BulletClient=Client)
