"""Runs safety-gymnasium 1.0.0 (written for Python 3.8 to 3.10, MuJoCo 2.3, NumPy 1) on today's packages.

`load` imports the package's modules under a copy of the package that runs its `builder` and its tasks but
not its `__init__` (which registers vision and multi-agent tasks and needs gymnasium 0.28). The copy is
private: it is taken out of `sys.modules` again, so that `import safety_gymnasium` means to everybody else
what it did before, and no file of the installed package is touched. All changes made to the copy are the
`_patch_...` functions below; each says what it mends.

Layouts are the original's bit for bit, and so are observations, rewards and costs up to what MuJoCo itself
changed since 2.3.3. Where the model or the state can express the old meaning, it is restored here. What
remains (seen with MuJoCo 4.0.0 over 40 steps of every task, see tests/envs/test_safety_gym.py):

* RK4 integrates free bodies to a higher order: Ant, Racecar and Humanoid differ by 1e-6 a step at first,
  much more once the Ant's feet hit the ground. The others agree to 1e-12, until chaos separates them.
* Contacts of convex bodies (box, cylinder, mesh) are found differently: a Racecar pushing a gremlin can stay
  in touch with it a few steps longer.
* A rounding decides whether the Car's wheels, which just touch the ground, start in contact with it; about
  one seed in ten differs, visibly in the accelerometer alone.

Source: safety-gymnasium 1.0.0 (Apache-2.0), https://github.com/PKU-Alignment/safety-gymnasium.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from saferl.errors import MissingPackageError

__all__ = ["load", "make", "textures"]

_PACKAGE = "safety_gymnasium"
_INSTALL = "pip install --no-deps safety-gymnasium==1.0.0"
_lock = threading.Lock()
_keep_textures = contextvars.ContextVar("keep_textures", default=False)


@contextlib.contextmanager
def textures(keep: bool) -> Iterator[None]:
    """While this is open, worlds are compiled with their textures (`keep`) or without.

    Textures are seen by cameras alone, and six PNG files of the sky take most of the time of a reset.
    """
    token = _keep_textures.set(keep)
    try:
        yield
    finally:
        _keep_textures.reset(token)


def make(task_id: str, **kwargs: Any) -> Any:
    """Build the package's own environment for `task_id`, for example "SafetyPointGoal1-v0".

    It has the package's interface (six values a step), without any wrapper. `kwargs` go to its
    constructor. Raises MissingPackageError when the package or one of its needs is not installed.
    """
    name, _, version = task_id.partition("-")
    if name.endswith("Velocity"):
        robot = name.removeprefix("Safety").removesuffix("Velocity")
        build = load().velocity[robot, version]
        with _no_deprecations():
            return build(**kwargs)
    config = {"agent_name": _robot(task_id), **kwargs.pop("config", {})}
    return load().builder.Builder(task_id=task_id, config=config, **kwargs)


@contextlib.contextmanager
def _no_deprecations() -> Iterator[None]:
    """While this is open, MuJoCo neither prints nor logs that a part of Gymnasium's XML is deprecated."""
    import mujoco

    others = mujoco.get_mju_user_warning()

    def warn(message: str) -> None:
        if "deprecated" not in message:
            (others or print)(message)

    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(others)


def _robot(task_id: str) -> str:
    name = task_id.removeprefix("Safety")
    return next(robot for robot in ("Point", "Car", "Racecar", "Doggo", "Ant") if name.startswith(robot))


@functools.cache
def load() -> types.SimpleNamespace:
    """Return the package's patched modules: `builder`, and `velocity`, a class by (robot, version)."""
    spec = importlib.util.find_spec(_PACKAGE) if _PACKAGE not in sys.modules else None
    spec = spec or getattr(sys.modules.get(_PACKAGE), "__spec__", None)
    if spec is None or spec.submodule_search_locations is None:
        raise MissingPackageError(f"safety-gymnasium is not installed; run: {_INSTALL}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.version("safety-gymnasium")
        if installed != "1.0.0":
            raise MissingPackageError(f"safety-gymnasium {installed} is not what was tested; run: {_INSTALL}")
    package = types.ModuleType(_PACKAGE)
    package.__path__ = list(spec.submodule_search_locations)
    package.__file__ = spec.origin  # its modules find their XML and PNG files beside it
    try:
        with _lock, _private(package):
            return _import()
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"safety-gymnasium needs {error.name!r}, which is missing; run: pip install 'saferl[control]'"
        ) from error


@contextlib.contextmanager
def _private(package: types.ModuleType) -> Iterator[None]:
    """Let `package` stand for safety_gymnasium while this is open, then put back what was there."""

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


def _import() -> types.SimpleNamespace:
    def module(name: str) -> types.ModuleType:
        return importlib.import_module(f"{_PACKAGE}.{name}")

    _patch_dataclass_defaults(module("assets.color"))
    builder = module("builder")
    _patch_agents(module("bases.base_agent"))
    _patch_gremlins(module("assets.mocaps.gremlins"))
    _patch_layouts(module("utils.random_generator"))
    _patch_seeding(builder)
    _patch_viewer(module("bases.underlying"))
    _patch_world(module("world"))
    velocity = {}
    for robot, stem in _VELOCITY_MODULES.items():
        for version in ("v0", "v1"):
            tasks = module(f"tasks.safe_velocity.safety_{stem}_velocity_{version}")
            velocity[robot, version] = getattr(tasks, f"Safety{robot}VelocityEnv")
        _patch_velocity(velocity[robot, "v0"])  # the base class of "v1"
    return types.SimpleNamespace(builder=builder, velocity=velocity)


_VELOCITY_MODULES = {
    "Ant": "ant",
    "HalfCheetah": "half_cheetah",
    "Hopper": "hopper",
    "Humanoid": "humanoid",
    "Swimmer": "swimmer",
    "Walker2d": "walker2d",
}


class _HashableArray(np.ndarray):
    __hash__ = object.__hash__  # type: ignore[assignment]


def _patch_dataclass_defaults(color: Any) -> None:
    """Python 3.11 refuses unhashable dataclass defaults, which it takes for mutable: the colours are such."""
    for name, value in color.COLOR.items():
        color.COLOR[name] = value.view(_HashableArray)


def _patch_agents(base_agent: Any) -> None:
    """Mend what MuJoCo 3 and NumPy 2 no longer accept in the robots' base class."""
    agent_class = base_agent.BaseAgent
    init_sensors, build_actions = agent_class._init_jnt_sensors, agent_class._build_action_space

    def init_jnt_sensors(self: Any) -> None:
        # It looks joints up by one-element arrays; MuJoCo 3 takes integers only.
        model = self.engine.model
        self.engine.model = _ScalarIds(model)
        try:
            init_sensors(self)
        finally:
            self.engine.model = model

    def build_action_space(self: Any) -> Any:
        # Its float32 bounds make Gymnasium 1.x compare them with float64's largest number: a warning.
        with np.errstate(over="ignore"):
            return build_actions(self)

    agent_class._init_jnt_sensors = init_jnt_sensors
    agent_class._build_action_space = build_action_space
    # It converts the sensors of single joints, one-element arrays, by float(); NumPy 2 phases that out.
    base_agent.float = lambda value: np.asarray(value).item()


class _ScalarIds:
    """A model whose `jnt` takes an array of one id as well."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def jnt(self, joint_id: Any) -> Any:
        return self._model.jnt(int(np.asarray(joint_id).item()))


def _patch_layouts(random_generator: Any) -> None:
    """Sample layouts without NumPy's overhead on pairs of numbers: the same draws, tests and bits.

    Crowded tasks (Button) reject thousands of places a reset, which took half a second.
    """
    generator_class = random_generator.RandomGenerator
    sample_any_layout = generator_class.sample_layout

    def sample_layout(self: Any) -> bool:
        if any(areas is not None and len(areas) > 1 for areas, _ in self.placements.values()):
            return bool(sample_any_layout(self))  # also chooses among areas
        uniform, margin = self.random_generator.uniform, self.placements_margin
        placed: list[tuple[float, float, float]] = []
        for areas, keepout in self.placements.values():
            area = self.placements_extents if areas is None else areas[0]
            xmin, ymin, xmax, ymax = self.constrain_placement(area, keepout)
            for _ in range(100):
                x, y = uniform(xmin, xmax), uniform(ymin, ymax)
                for other_x, other_y, other_keepout in placed:
                    dx, dy = x - other_x, y - other_y
                    if math.sqrt(dx * dx + dy * dy) < other_keepout + margin + keepout:
                        break
                else:
                    placed.append((x, y, keepout))
                    break
            else:
                return False
        self.layout = {name: np.array(at[:2]) for name, at in zip(self.placements, placed, strict=True)}
        return True

    generator_class.sample_layout = sample_layout


def _patch_gremlins(gremlins: Any) -> None:
    """Compute the gremlins' common target once a physics step; `np.r_` took a third of Button's time."""

    def move(self: Any) -> None:
        phase = float(self.engine.data.time)
        target = np.array([np.sin(phase) * self.travel, np.cos(phase) * self.travel, self.size])
        for index in range(self.num):
            self.set_mocap_pos(f"gremlin{index}mocap", target)

    gremlins.Gremlins.move = move


def _patch_seeding(builder: Any) -> None:
    """An environment without a seed drew one from NumPy's global generator; leave that to its owner."""
    set_seed = builder.Builder.set_seed

    def set_seed_from_system(self: Any, seed: int | None = None) -> None:
        set_seed(self, int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed)

    builder.Builder.set_seed = set_seed_from_system


def _patch_viewer(underlying: Any) -> None:
    """Gymnasium 1.x's offscreen viewer wants to know its size, which the package sets in the model."""
    viewer_class = underlying.OffScreenViewer

    def make_viewer(model: Any, data: Any) -> Any:
        return viewer_class(model, data, model.vis.global_.offwidth, model.vis.global_.offheight)

    underlying.OffScreenViewer = make_viewer


def _patch_world(world: Any) -> None:
    """Mend and speed up the writing of a world's XML, which every reset does.

    The file of assets, slower to parse than a world without textures is to compile, is parsed once.
    """
    unparse = world.xmltodict.unparse

    def unparse_changed(xml: Any) -> str:
        _restore_racecar_inertia(xml["mujoco"]["worldbody"]["body"][0])
        if not _keep_textures.get():
            xml = _without_textures(xml)
        text: str = unparse(xml)
        return text

    world.xmltodict = types.SimpleNamespace(parse=world.xmltodict.parse, unparse=unparse_changed)
    load_yaml = world.yaml.load
    parsed: dict[str, Any] = {}

    def load_yaml_once(file: Any, Loader: Any) -> Any:
        if file.name not in parsed:
            parsed[file.name] = load_yaml(file, Loader=Loader)
        return parsed[file.name]  # its parts are placed in the XML and not changed there

    world.yaml = types.SimpleNamespace(load=load_yaml_once, FullLoader=world.yaml.FullLoader)

    rotation = world.rot2quat

    def unit_quaternion(theta: float) -> np.ndarray:
        # Newer MuJoCo leaves a norm that is off by rounding alone. The last bit decides whether a wheel
        # that just touches the ground starts in contact with it.
        w, x, y, z = rotation(theta)
        return np.array([w, x, y, z]) / math.sqrt(w * w + x * x + y * y + z * z)

    world.rot2quat = unit_quaternion

    build = world.World.build

    def build_with_stiff_gremlins(self: Any) -> None:
        build(self)
        # MuJoCo before 2.3.4 regularised the rotation of a weld, by mistake, as its translation: two
        # orders of magnitude stiffer. Gremlins, welded to their targets, bounce off accordingly.
        for name in self.mocaps:
            body = self.model.body(name.replace("mocap", "obj")).id
            self.model.body_invweight0[body, 1] = self.model.body_invweight0[body, 0]

    world.World.build = build_with_stiff_gremlins


def _without_textures(xml: dict[str, Any]) -> dict[str, Any]:
    asset = {**xml["mujoco"]["asset"], "texture": []}
    asset["material"] = [
        {key: value for key, value in material.items() if key != "@texture"} for material in asset["material"]
    ]
    return {"mujoco": {**xml["mujoco"], "asset": asset}}


def _restore_racecar_inertia(agent: dict[str, Any]) -> None:
    """State the inertia that MuJoCo 2.3.3 computed from the Racecar's chassis mesh.

    The mesh is not watertight and newer versions make its mass 38% larger.
    """
    frame = agent.get("body")
    if isinstance(frame, dict) and frame.get("@name") == "pos_change":
        chassis = next(body for body in frame["body"] if body["@name"] == "car_body")
        chassis["inertial"] = {
            "@mass": "0.017605537618291808",
            "@pos": "0.15557992747876107 -0.0003826658731145229 6.812385950941158e-10",
            "@quat": "0.001766899788279318 0.7071045736417905 -0.001766899788279318 0.7071045736417905",
            "@diaginertia": "0.0002706324171671688 0.0002385001307776043 4.125453652032671e-05",
        }


def _patch_velocity(env_class: Any) -> None:
    """Undo two changes of MuJoCo's meaning of the velocity tasks' models and states."""
    import mujoco

    build, set_state = env_class.__init__, env_class.set_state
    margins_add_up = tuple(int(part) for part in mujoco.__version__.split(".")[:2]) >= (3, 5)

    def build_with_old_margins(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        # The margin of a contact was the larger of the two geoms', which are equal in these models.
        if margins_add_up:
            self.model.geom_margin[:] /= 2

    def set_state_with_unit_quaternions(self: Any, qpos: np.ndarray, qvel: np.ndarray) -> None:
        set_state(self, qpos, qvel)
        # MuJoCo before 3.2 normalised them here; resets add noise to them and observe the result.
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)

    env_class.__init__ = build_with_old_margins
    env_class.set_state = set_state_with_unit_quaternions
