"""The doctor: rows for what is missing, old or broken, and an exit status that follows."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from saferl.cli import doctor
from saferl.cli.doctor import Check, Requirement
from saferl.errors import UsageError

TORCH = Requirement("torch", "2.6")
PYGAME = Requirement("pygame", "2.5", "control")

Versions = Callable[[dict[str, str | None]], None]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Versions:
    """Give packages another version, or None to take them away; others stay as they are."""
    real_version, real_spec = importlib.metadata.version, importlib.util.find_spec

    def pretend(wanted: dict[str, str | None]) -> None:
        def version(name: str) -> str:
            found = wanted[name] if name in wanted else real_version(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        def find_spec(name: str, package: str | None = None) -> Any:
            absent = {key.replace("-", "_") for key, value in wanted.items() if value is None}
            return None if name in absent else real_spec(name, package)

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return pretend


class FakeProbe:
    """Answers without a process."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self._answers = list(answers)

    def answers(self) -> list[dict[str, Any]]:
        return self._answers

    def answer(self) -> dict[str, Any]:
        return self._answers[-1]


def test_a_missing_requirement_is_told_with_its_command(versions: Versions) -> None:
    versions({"torch": None, "pygame": None})
    row = doctor.check_package(TORCH, {})
    assert (row.state, row.required, row.mend) == ("missing", True, 'pip install "torch>=2.6"')
    row = doctor.check_package(PYGAME, {})
    assert (row.state, row.required, row.mend) == ("missing", False, 'pip install "saferl[control]"')


def test_an_old_requirement_is_a_problem(versions: Versions) -> None:
    versions({"torch": "2.5.9"})
    row = doctor.check_package(TORCH, {})
    assert row.state == "problem"
    assert "2.5.9 is too old" in row.detail
    assert row.mend == 'pip install "torch>=2.6"'


@pytest.mark.parametrize("version", ["2.6", "2.6.0", "2.10.1+cu130", "3.0rc1", "2.13.0.dev1"])
def test_a_new_enough_requirement_is_ok(versions: Versions, version: str) -> None:
    versions({"torch": version})
    assert doctor.check_package(TORCH, {"detail": "no CUDA"}).detail == f"{version}, no CUDA"
    assert doctor.check_package(TORCH, {}).state == "ok"


def test_versions_are_padded_before_they_are_compared(versions: Versions) -> None:
    versions({"pyyaml": "6"})
    assert doctor.check_package(Requirement("pyyaml", "6.0"), {}).state == "ok"
    assert doctor.check_package(Requirement("pyyaml"), {}).state == "ok"


def test_what_does_not_load_is_a_problem(versions: Versions) -> None:
    versions({"torch": "2.13.0+cpu"})
    row = doctor.check_package(TORCH, {"error": "ImportError: libfoo.so"})
    assert row.state == "problem"
    assert "libfoo.so" in row.detail
    assert row.mend == "pip install --force-reinstall torch==2.13.0"


def test_a_module_without_metadata_counts_as_there(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions({"torch": None})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    row = doctor.check_package(TORCH, {})
    assert (row.state, row.detail) == ("ok", "unknown version")


def test_requirements_come_from_the_package_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.6",
        "Rich",
        'stable-baselines3>=2.9; extra == "control"',
        "pyyaml>=6.0 ; extra == 'control'",
        'pytest>=8; extra == "test"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    found = list(doctor._requirements())
    assert found == [
        TORCH,
        Requirement("rich"),
        Requirement("stable-baselines3", "2.9", "control"),
        Requirement("pyyaml", "6.0", "control"),
    ]
    assert [r.module for r in found[2:]] == ["stable_baselines3", "yaml"]


def test_a_checkout_that_is_not_installed_is_told(versions: Versions) -> None:
    versions({"saferl": None})
    row = doctor.check_saferl()
    assert (row.state, row.required) == ("problem", True)
    assert "pip install -e ." in row.mend


@pytest.mark.parametrize("suite", [doctor.SAFETY_GYM, doctor.BULLET], ids=lambda suite: suite.name)
def test_suites_of_environments(versions: Versions, suite: doctor.Suite) -> None:
    mend = f"pip install --no-deps {suite.name}=={suite.version}"
    versions({suite.name: None})
    (row,) = doctor.check_suite(suite, None)
    assert (row.name, row.state, row.mend, row.required) == (suite.name, "missing", mend, False)
    versions({suite.name: "0.4.0"})
    (row,) = doctor.check_suite(suite, None)
    assert (row.state, row.mend) == ("problem", mend)
    versions({suite.name: suite.version})
    package, loads = doctor.check_suite(suite, FakeProbe({"make": 0.5, "reset": 0.012}))  # type: ignore[arg-type]
    assert (package.state, loads.state) == ("ok", "ok")
    assert loads.name == suite.environment
    assert "reset in 12 ms" in loads.detail
    package, loads = doctor.check_suite(suite, FakeProbe({"error": "ImportError: x"}))  # type: ignore[arg-type]
    assert (package.state, loads.state) == ("ok", "problem")
    assert loads.mend == f'pip install "saferl[{suite.extra}]" && {mend}'


def test_suites_are_what_the_environments_take() -> None:
    from saferl.envs.bullet import compat as bullet
    from saferl.envs.safety_gym import compat as safety_gym

    assert doctor.BULLET.mend == bullet._INSTALL
    assert doctor.SAFETY_GYM.mend == safety_gym._INSTALL


def test_an_environment_at_work() -> None:
    mend = 'pip install "saferl[driving]"'
    assert doctor.check_environment("HighwayRacetrack-v0", None, mend) == []
    (row,) = doctor.check_environment("HighwayRacetrack-v0", FakeProbe({"error": "x"}), mend)  # type: ignore[arg-type]
    assert (row.state, row.mend, row.required) == ("problem", mend, False)
    good = FakeProbe({"make": 0.5, "reset": 0.012})
    (row,) = doctor.check_environment("HighwayRacetrack-v0", good, mend)  # type: ignore[arg-type]
    assert (row.name, row.state, row.mend) == ("HighwayRacetrack-v0", "ok", "")


def test_highway_env_is_told_by_its_extra(versions: Versions) -> None:
    versions({"highway-env": None})
    row = doctor.check_package(Requirement("highway-env", "1.10.2", "driving"), {})
    assert (row.state, row.mend, row.required) == ("missing", 'pip install "saferl[driving]"', False)


def test_what_pip_cannot_bring_for_carla_and_nuplan_is_said(versions: Versions) -> None:
    versions({"carla": None, "nuplan-devkit": None, "nuplan": None})
    row = doctor.check_carla()
    assert (row.state, row.mend, row.required) == ("missing", "pip install carla==0.9.16", False)
    assert "the simulator is a download of its own" in row.detail
    row = doctor.check_nuplan()
    assert (row.state, row.mend, row.required) == ("missing", "", False)
    assert "pip cannot get it by name" in row.detail
    versions({"carla": "0.9.15", "nuplan-devkit": "1.2.0"})
    assert doctor.check_carla() == Check(
        "carla", "ok", "client 0.9.15; it needs a running simulator of that version"
    )
    assert doctor.check_nuplan().detail.startswith("1.2.0")


def test_adapters_name_the_same_ways_to_get_them() -> None:
    from saferl.envs.driving import carla, highway, nuplan

    assert doctor._INSTALL_CARLA == carla._INSTALL
    assert doctor._NUPLAN == nuplan._MISSING
    assert highway._INSTALL == "pip install 'saferl[driving]'"


def test_metadrive_is_told_as_by_the_environments() -> None:
    from saferl.envs import make_vec

    row = doctor.check_metadrive()
    assert (row.state, row.required) == ("missing", False)
    for name in ("OfflineMetadrive-easysparse-v0", "SafeMetaDrive-harddense-v0"):
        with pytest.raises(UsageError) as error:
            make_vec(name, 1)
        assert str(error.value) == row.detail


def test_rendering_names_the_backend_that_works() -> None:
    bad = {"error": "no display"}
    assert doctor.check_rendering({"": {}, "egl": bad}).state == "ok"
    row = doctor.check_rendering({"": bad, "egl": bad, "osmesa": {}})
    assert (row.state, row.mend) == ("problem", "export MUJOCO_GL=osmesa")
    row = doctor.check_rendering({"egl": bad, "osmesa": bad})
    assert row.state == "problem"
    assert "MUJOCO_GL=egl: no display" in row.detail
    assert row.mend


def test_little_memory_and_disk_are_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.check_memory().name == "memory"
    monkeypatch.setattr(doctor, "_available_memory", lambda: 2**28)
    assert doctor.check_memory().state == "problem"
    monkeypatch.setattr(doctor, "_available_memory", lambda: None)
    assert doctor.check_memory().state == "ok"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2**40}))
    assert doctor.check_disk(tmp_path).state == "ok"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 2**20}))
    assert doctor.check_disk(tmp_path).state == "problem"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "not writable" in doctor.check_disk(tmp_path).detail


def test_a_crash_is_the_fault_of_the_module_that_was_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "falls.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "raises.py").write_text("raise ImportError('libfoo.so is absent\\nand more')\n")
    (tmp_path / "noisy.py").write_text("print('hello')\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = ["noisy", "raises", "falls", "json"]
    answers = doctor._import_answers(doctor._Probe("probe_imports", names), names)
    assert set(answers) == set(names)
    assert answers["raises"]["error"] == "ImportError: libfoo.so is absent"
    assert answers["falls"]["error"] == f"crashed ({signal.SIGSEGV.name})"
    assert "error" not in answers["noisy"]
    assert "error" not in answers["json"]


def test_a_probe_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_IMPORT_SECONDS", 2.0)
    answers = doctor._import_answers(doctor._Probe("probe_imports", ["sleeps"]), ["sleeps"])
    assert answers["sleeps"]["error"] == "no answer within 2 s"


def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checks: Sequence[Check]
) -> tuple[int, str]:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(doctor, "run_checks", lambda: list(checks))
    status = doctor.main([])
    return status, capsys.readouterr().out


def test_the_exit_status_is_that_of_what_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Check("torch", "ok", "2.13.0", required=True)
    mend = 'pip install "saferl[control]"'
    optional = [Check(name, "missing", "not installed", mend) for name in ("pygame", "xmltodict")]
    status, output = run_main(monkeypatch, capsys, [good, *optional])
    assert status == 0
    assert f"to mend pygame, xmltodict:  {mend}\n" in output  # on one line, to be copied
    assert "all that saferl requires works" in output

    bad = Check("numpy", "missing", "not installed", 'pip install "numpy>=2.0"', required=True)
    status, output = run_main(monkeypatch, capsys, [good, bad])
    assert status == 1
    assert "numpy" in output.splitlines()[-1]


def test_the_table_is_readable_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("rich.console", "rich.markup", "rich.table"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    status, output = run_main(monkeypatch, capsys, [Check("rich", "missing", "[red]x", required=True)])
    assert status == 1
    assert "missing  rich" in output


def test_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--fix"):
        doctor.main(["--fix"])
    assert doctor.main(["--help"]) == 0
    assert "usage: saferl doctor" in capsys.readouterr().out


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """What runs the tests has all that is required."""
    checks = {check.name: check for check in doctor.run_checks()}
    assert {name for name, check in checks.items() if check.required and check.state != "ok"} == set()
    assert "thread" in checks["torch"].detail
    assert {"Python", "CPU cores", "disk", "mujoco", "offscreen rendering"} <= set(checks)
