"""`saferl doctor`: what is installed, what works, and the command that mends the rest.

The module itself needs nothing but the standard library. Whatever could hang or crash (importing a
compiled package, opening an OpenGL context) happens in processes of their own, side by side.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saferl.errors import UsageError

State = Literal["ok", "missing", "problem"]

_HIDDEN_EXTRAS = {"test", "dev"}
_MODULES = {"pyyaml": "yaml"}  # where the module is not named like the package
_METADRIVE = (
    "MetaDrive's tasks are not available: DSRL's data (261 observations) come from a fork of "
    "metadrive-simulator 0.2.6 that only its repository has and that needs the old gym, and the released "
    "package has 259; to use the fork, wrap it as a Gymnasium environment and name that as 'module:ID'"
)
_HIGHWAY = "HighwayRacetrack-v0"
_CARLA = (
    "not installed (adapter for the CARLA simulator); pip brings the Python client alone, which must be of "
    "the simulator's version: the simulator is a download of its own, from CARLA's releases, and needs a GPU"
)
_INSTALL_CARLA = "pip install carla==0.9.16"
_NUPLAN = (
    "not installed (adapter for nuPlan); pip cannot get it by name: clone motional/nuplan-devkit and run "
    "pip install -e nuplan-devkit, which leaves out what it imports; its requirements.txt pins numpy 1.23, "
    "which saferl cannot use: install those packages one by one; data and maps are a download of their own"
)
_MEND_RENDERING = "apt-get install -y libegl1 libgl1-mesa-dri && export MUJOCO_GL=egl"
_GIB = 2**30
_IMPORT_SECONDS, _PROBE_SECONDS = 60.0, 30.0  # far above what a healthy machine takes
_MARK = "saferl-doctor:"


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    state: State
    detail: str
    mend: str = ""
    """The command that mends it."""
    required: bool = False
    """saferl does not work without it."""


@dataclass(frozen=True)
class Requirement:
    """A dependency as the package's own metadata states it."""

    name: str
    least: str = ""
    extra: str = ""

    @property
    def module(self) -> str:
        return _MODULES.get(self.name, self.name.replace("-", "_"))

    @property
    def mend(self) -> str:
        if self.extra:
            return f'pip install "saferl[{self.extra}]"'
        return f'pip install "{self.name}>={self.least}"' if self.least else f"pip install {self.name}"


@dataclass(frozen=True)
class Suite:
    """A package of environments, installed without its own (outdated) dependencies."""

    name: str
    version: str
    """The one that is supported."""
    extra: str
    """saferl's extra with what it needs."""
    environment: str
    """One of its environments, to be tried."""

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def mend(self) -> str:
        return f"pip install --no-deps {self.name}=={self.version}"


SAFETY_GYM = Suite("safety-gymnasium", "1.0.0", "control", "SafetyPointGoal1-v0")
BULLET = Suite("bullet-safety-gym", "1.4.0", "bullet", "SafetyBallRun-v0")


def main(arguments: list[str]) -> int:
    """Print the table; the exit status is 1 if something that saferl requires is broken."""
    if arguments and arguments[0] in {"-h", "--help"}:
        print(
            "usage: saferl doctor\n\nTells what is installed, what is missing and the command that mends it."
        )
        return 0
    if arguments:
        raise UsageError(f"`saferl doctor` takes no further words, but got {arguments[0]!r}.")
    with _waiting():
        checks = run_checks()
    _print_table(checks)
    broken = [check.name for check in checks if check.required and check.state != "ok"]
    for mend in dict.fromkeys(check.mend for check in checks if check.mend):
        print(f"to mend {', '.join(check.name for check in checks if check.mend == mend)}:  {mend}")
    if broken:
        print(f"saferl cannot work before this is mended: {', '.join(broken)}")
        return 1
    print("all that saferl requires works")
    return 0


def run_checks() -> list[Check]:
    """Every check, in the order of the table."""
    requirements = list(_requirements())
    present = [r for r in requirements if _installed(r.name, r.module) is not None]
    imports = _Probe("probe_imports", [r.module for r in present])
    rendering = None
    environments = {
        suite: None
        if _installed(suite.name, suite.module) is None
        else _Probe("probe_environment", [suite.environment])
        for suite in (SAFETY_GYM, BULLET)
    }
    highway = None
    if any(r.name == "highway-env" for r in present):
        highway = _Probe("probe_environment", [_HIGHWAY])
    if any(r.name == "mujoco" for r in present):
        rendering = {name: _Probe("probe_rendering", [], MUJOCO_GL=name) for name in _gl_backends()}

    checks = [check_python(), check_platform(), check_cores(), check_memory(), check_disk(Path.cwd())]
    checks.append(check_saferl())
    imported = _import_answers(imports, [r.module for r in present])
    checks += [check_package(r, imported.get(r.module, {})) for r in requirements]
    for suite, probe in environments.items():
        checks += check_suite(suite, probe)
    if highway is not None:
        checks += check_environment(_HIGHWAY, highway, 'pip install "saferl[driving]"')
    checks += [check_carla(), check_nuplan(), check_metadrive()]
    if rendering is not None:
        checks.append(check_rendering({name: probe.answer() for name, probe in rendering.items()}))
    return checks


# --- checks ---------------------------------------------------------------------------------------


def check_python() -> Check:
    """The interpreter."""
    return Check("Python", "ok", f"{platform.python_version()} ({sys.executable})", required=True)


def check_platform() -> Check:
    """Operating system and processor."""
    return Check("platform", "ok", platform.platform())


def check_cores() -> Check:
    """Processor cores this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("CPU cores", "ok", f"{usable} usable")


def check_memory() -> Check:
    """Memory that is free, where the system tells."""
    available = _available_memory()
    if available is None:
        return Check("memory", "ok", "not told by this system")
    detail = f"{available / _GIB:.1f} GiB free"
    if available < _GIB:
        return Check("memory", "problem", f"{detail}; training needs about 1 GiB", "close other programs")
    return Check("memory", "ok", detail)


def check_disk(folder: Path) -> Check:
    """Space and permission to write in the folder where runs would go."""
    free = shutil.disk_usage(folder).free
    detail = f"{free / _GIB:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Check("disk", "problem", f"{folder} is not writable", "cd to a folder that you may write to")
    if free < _GIB:
        return Check("disk", "problem", detail, "free some space, or cd to another disk")
    return Check("disk", "ok", detail)


def check_saferl() -> Check:
    """The package itself: whether pip knows it, and so its dependencies."""
    try:
        return Check("saferl", "ok", importlib.metadata.version("saferl"), required=True)
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "saferl",
            "problem",
            "not installed, so that its dependencies cannot be told",
            "pip install -e . (in its source folder)",
            required=True,
        )


def check_package(requirement: Requirement, imported: dict[str, Any]) -> Check:
    """A dependency: there, new enough, and importable.

    Args:
        requirement: what saferl asks for.
        imported: the answer of `probe_imports` about it; an "error", or a "detail" to show.
    """
    name, required = requirement.name, not requirement.extra
    where = f" (extra {requirement.extra})" if requirement.extra else ""
    version = _installed(name, requirement.module)
    if version is None:
        return Check(name, "missing", f"not installed{where}", requirement.mend, required)
    if _older(version, requirement.least):
        detail = f"{version} is too old, {requirement.least} is the least"
        return Check(name, "problem", detail, f'pip install "{name}>={requirement.least}"', required)
    if "error" in imported:
        detail = f"{version} does not load: {imported['error']}"
        mend = f"pip install --force-reinstall {name}=={version.partition('+')[0]}"
        return Check(name, "problem", detail, mend, required)
    extra = f", {imported['detail']}" if "detail" in imported else ""
    return Check(name, "ok", f"{version}{extra}", required=required)


def check_suite(suite: Suite, probe: _Probe | None) -> list[Check]:
    """The package of a suite of environments, and one of them at work."""
    version = _installed(suite.name, suite.module)
    if version is None:
        return [Check(suite.name, "missing", "not installed (the original environments)", suite.mend)]
    if version not in (suite.version, "unknown version"):
        detail = f"{version}, but {suite.version} is the one supported"
        return [Check(suite.name, "problem", detail, suite.mend)]
    mend = f'pip install "saferl[{suite.extra}]" && {suite.mend}'
    return [Check(suite.name, "ok", version), *check_environment(suite.environment, probe, mend)]


def check_environment(name: str, probe: _Probe | None, mend: str) -> list[Check]:
    """An environment at work; nothing without a probe.

    Args:
        name: its id.
        probe: `probe_environment` of it.
        mend: the command that installs what it needs.
    """
    answer = {} if probe is None else probe.answer()
    if "error" in answer:
        return [Check(name, "problem", f"does not load: {answer['error']}", mend)]
    if not answer:
        return []
    detail = f"made in {answer['make']:.2f} s, reset in {1000 * answer['reset']:.0f} ms"
    return [Check(name, "ok", detail)]


def check_carla() -> Check:
    """CARLA's Python client; whether a simulator runs is not asked."""
    version = _installed("carla", "carla")
    if version is None:
        return Check("carla", "missing", _CARLA, _INSTALL_CARLA)
    return Check("carla", "ok", f"client {version}; it needs a running simulator of that version")


def check_nuplan() -> Check:
    """nuPlan's devkit, which no command installs beside saferl."""
    version = _installed("nuplan-devkit", "nuplan")
    if version is None:
        return Check("nuplan-devkit", "missing", _NUPLAN)
    return Check("nuplan-devkit", "ok", f"{version}; data and maps are not looked for")


def check_metadrive() -> Check:
    """The third family of DSRL's tasks, which nothing can install."""
    return Check("MetaDrive", "missing", _METADRIVE)


def check_rendering(answers: dict[str, dict[str, Any]]) -> Check:
    """MuJoCo's drawing without a screen.

    Args:
        answers: of `probe_rendering` by the value of MUJOCO_GL, the one in force first.
    """
    current = next(iter(answers))
    label = f"MUJOCO_GL={current}" if current else "MUJOCO_GL unset"
    if "error" not in answers[current]:
        return Check("offscreen rendering", "ok", f"works with {label}")
    works = [name for name, answer in answers.items() if "error" not in answer]
    if works:
        detail = f"fails with {label}, works with MUJOCO_GL={works[0]}"
        return Check("offscreen rendering", "problem", detail, f"export MUJOCO_GL={works[0]}")
    detail = f"no OpenGL context with {label}: {answers[current]['error']}"
    mend = _MEND_RENDERING if sys.platform == "linux" else "unset MUJOCO_GL, and run on a desktop session"
    return Check("offscreen rendering", "problem", detail, mend)


# --- what runs in a process of its own ------------------------------------------------------------


def probe_imports(names: Sequence[str]) -> None:
    """Import modules in turn, and tell before and after each, so that a crash names its culprit."""
    for name in names:
        _tell({"importing": name})
        try:
            module = importlib.import_module(name)
            answer = {"module": name}
            if name == "torch":
                answer["detail"] = _describe_torch(module)
        except BaseException as error:
            answer = {"module": name, "error": _one_line(error)}
        _tell(answer)


def probe_environment(names: Sequence[str]) -> None:
    """Make the original environment and reset it."""
    try:
        from saferl.envs import make_vec

        start = time.perf_counter()
        env = make_vec(names[0], 1, backend="original")
        made = time.perf_counter()
        env.reset(seed=0)
        reset = time.perf_counter()
        env.close()
        _tell({"make": made - start, "reset": reset - made})
    except Exception as error:
        _tell({"error": _one_line(error)})


def probe_rendering(names: Sequence[str]) -> None:
    """Draw a red ball with MuJoCo, and look whether anything is red."""
    try:
        import mujoco

        model = mujoco.MjModel.from_xml_string(
            "<mujoco><worldbody><light pos='0 0 3'/>"
            "<geom type='sphere' size='1' rgba='1 0 0 1'/></worldbody></mujoco>"
        )
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        renderer = mujoco.Renderer(model, 32, 32)
        renderer.update_scene(data)
        drawn = int(renderer.render()[..., 0].max()) > 0
        _tell({} if drawn else {"error": "the picture is empty"})
        sys.stdout.flush()
        os._exit(0)  # closing a context has been seen to crash, which is not the question here
    except Exception as error:
        _tell({"error": _one_line(error)})


def _describe_torch(torch: Any) -> str:
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / _GIB
        device = f"CUDA {torch.version.cuda}: {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
    elif torch.version.cuda:
        device = f"built for CUDA {torch.version.cuda}, but no device is visible"
    else:
        device = "no CUDA"
    return f"{device}, {threads} thread{'' if threads == 1 else 's'} by default"


def _tell(answer: dict[str, Any]) -> None:
    print(_MARK + json.dumps(answer), flush=True)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Probe:
    """A function of this module that runs in another Python process.

    Args:
        function: its name; it takes a list of words.
        words: the list.
        environment: variables to set; an empty one is removed.
    """

    def __init__(self, function: str, words: Sequence[str], **environment: str) -> None:
        variables = {**os.environ, **environment}
        # The same packages as here, whatever the current folder holds.
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        variables = {name: value for name, value in variables.items() if value or name not in environment}
        code = f"from saferl.cli import doctor; doctor.{function}({list(words)!r})"
        self._limit = _IMPORT_SECONDS if function == "probe_imports" else _PROBE_SECONDS
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def answers(self) -> list[dict[str, Any]]:
        """What it told, and an "error" at the end if it was not able to finish."""
        try:
            output, errors = self._process.communicate(timeout=self._limit)
        except subprocess.TimeoutExpired:
            self._process.kill()
            output, errors = self._process.communicate()
            return [*_told(output), {"error": f"no answer within {self._limit:.0f} s"}]
        told = _told(output)
        status = self._process.returncode
        if status < 0:
            told.append({"error": f"crashed ({signal.Signals(-status).name})"})
        elif status > 0 or not told:
            last = errors.strip().splitlines()[-1:] or [f"exit status {status}"]
            told.append({"error": last[0]})
        return told

    def answer(self) -> dict[str, Any]:
        """The last thing it told."""
        return self.answers()[-1]


def _told(output: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(_MARK)) for line in output.splitlines() if line.startswith(_MARK)]


def _import_answers(probe: _Probe, modules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Answers by module; what stopped the process is the fault of the module that it was importing."""
    answers: dict[str, dict[str, Any]] = {}
    waiting = list(modules)
    while waiting:
        culprit = waiting[0]
        for answer in probe.answers():
            if "importing" in answer:
                culprit = answer["importing"]
            else:
                answers[answer.get("module", culprit)] = answer
        answers.setdefault(culprit, {"error": "no answer"})
        waiting = [name for name in waiting if name not in answers]
        if waiting:
            probe = _Probe("probe_imports", waiting)
    return answers


# --- facts ----------------------------------------------------------------------------------------


def _requirements() -> Iterator[Requirement]:
    """What saferl depends on, from its own metadata; nothing where it is not installed."""
    try:
        lines = importlib.metadata.requires("saferl") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        specifier, _, marker = line.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", specifier.strip())
        least = re.search(r">=\s*([0-9.]+)", specifier)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if name and not (extra and extra[1] in _HIDDEN_EXTRAS):
            yield Requirement(name[0].lower(), least[1] if least else "", extra[1] if extra else "")


def _installed(name: str, module: str) -> str | None:
    """A package's version, None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None if importlib.util.find_spec(module) is None else "unknown version"


def _older(version: str, least: str) -> bool:
    """Whether a version comes before another by their leading numbers; not if either has none."""
    found, wanted = (re.match(r"\d+(\.\d+)*", text) for text in (version, least))
    if not found or not wanted:
        return False
    numbers, bound = ([int(part) for part in match[0].split(".")] for match in (found, wanted))
    length = max(len(numbers), len(bound))
    return numbers + [0] * (length - len(numbers)) < bound + [0] * (length - len(bound))


def _gl_backends() -> list[str]:
    """Values of MUJOCO_GL to try: the one in force, then those that need no screen."""
    others = ["egl", "osmesa"] if sys.platform == "linux" else []
    return list(dict.fromkeys([os.environ.get("MUJOCO_GL", ""), *others]))


def _available_memory() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


# --- the table ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Show on a terminal that something is going on."""
    try:
        from rich.console import Console
    except ImportError:
        yield
        return
    with Console(stderr=True).status("looking at what is installed"):
        yield


def _print_table(checks: Sequence[Check]) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:  # one of the things this command is there to tell
        for check in checks:
            print(f"{check.state:<8} {check.name:<20} {check.detail}")
        return
    colours = {"ok": "green", "missing": "yellow", "problem": "red"}
    table = Table()
    table.add_column("", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        colour = "red" if check.required and check.state != "ok" else colours[check.state]
        table.add_row(check.name, f"[{colour}]{check.state}[/]", escape(check.detail))
    Console().print(table)
