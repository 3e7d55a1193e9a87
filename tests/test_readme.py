"""Every command and every example of README.md runs as it is written there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def environment() -> dict[str, str]:
    """The caller's environment, with the interpreter's own scripts first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1"}


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands(tmp_path: Path) -> None:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("saferl ")]
    assert len(commands) >= 6
    for line in commands:
        run(shlex.split(line), tmp_path)
    assert (tmp_path / "runs" / "first" / "report" / "index.html").exists()


def test_limits_by_name(tmp_path: Path) -> None:
    options = re.search(r"`(--env \S+ --cost-limit \S+)`", README)
    assert options is not None
    short = ["--total-steps", "40", "--num-envs", "2", "--epochs", "1", "--run", "run"]
    run(["saferl", "train", "ppo-lag", *options.group(1).split(), *short], tmp_path)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["config"]["cost_limit"] == {"hazards": 10.0, "vases_contact": 5.0}


@pytest.mark.parametrize("block", blocks("python"), ids=range(len(blocks("python"))))
def test_the_python_examples(block: str, tmp_path: Path) -> None:
    run([sys.executable, "-c", block], tmp_path)


def test_the_evaluation_of_the_sb3_example(tmp_path: Path) -> None:
    (example,) = [b for b in blocks("python") if "stable_baselines3" in b]
    run([sys.executable, "-c", example], tmp_path)
    command = re.search(r"saferl evaluate speed_limit\.zip --env \S+", example)
    assert command is not None
    assert "speed" in run(
        [*shlex.split(command.group()), "--episodes", "3", "--cost-limit", "speed=25"], tmp_path
    )


@pytest.mark.skipif(not (ROOT / ".venv" / ".installed").exists(), reason="`make install` was not run here")
def test_make_demo(tmp_path: Path) -> None:
    """The demonstration, cut short."""
    options = "DEMO_OPTIONS=--total-steps 2000 --steps-per-iteration 1000 --num-envs 2"
    out = run(
        ["make", "-C", str(ROOT), "--no-print-directory", "demo", f"DEMO_RUN={tmp_path / 'demo'}", options],
        ROOT,
    )
    assert (tmp_path / "demo" / "report" / "index.html").exists()
    assert "report:" in out


def test_numbers_in_the_results_come_from_committed_files() -> None:
    """RESULTS.md shows exactly what the scripts wrote beside it."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    shown = re.findall(r"<!-- begin (\w+) -->\n(.*?)\n<!-- end \1 -->", results, re.DOTALL)
    assert shown
    for name, text in shown:
        assert text.strip() == (ROOT / "benchmarks" / "results" / f"{name}.md").read_text().strip(), name
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).exists(), picture
