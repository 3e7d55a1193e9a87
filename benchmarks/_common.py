"""What the benchmark scripts share: the machine's description, result files, and runs that can be resumed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor, cores and the versions that matter, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "gymnasium", "mujoco"))
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"


def command_line() -> str:
    """The command that produced a result; paths of the machine are left out."""
    words = ["ORACLE_PYTHON" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def save(name: str, result: Mapping[str, Any], table: str) -> None:
    """Write `results/NAME.json` and the Markdown that RESULTS.md shows."""
    RESULTS.mkdir(exist_ok=True)
    full = {"command": command_line(), "machine": machine(), **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(full, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(f"{table.rstrip()}\n\n`{command_line()}`, {machine()}.\n")
    print(table)


def finished_step(run: Path) -> int:
    """Step of a run's newest checkpoint, 0 if there is none."""
    from saferl.experiment.checkpoint import list_checkpoints, step_of

    found = list_checkpoints(run / "checkpoints")
    return step_of(found[-1]) if found else 0


def train(run: Path, algorithm: str, options: Sequence[str], total_steps: int) -> None:
    """Bring a run to `total_steps`: start it, go on with it, or leave it alone if it is done."""
    if finished_step(run) >= total_steps:
        return
    saferl = [sys.executable, "-m", "saferl", "train"]
    if (run / "config.json").exists():
        words = ["--resume", str(run), "--total-steps", str(total_steps)]
    else:
        words = [algorithm, "--run", str(run), "--total-steps", str(total_steps), *options]
    subprocess.run([*saferl, *words, "--quiet"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
