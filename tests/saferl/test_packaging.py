"""The wheel holds `saferl/` alone, with environments and agents inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_holds_saferl_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".venv", ".git", "runs", "build", "dist", "*.egg-info", ".*_cache", "results"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"saferl"}
    for wanted in (
        "saferl/envs/__init__.py",
        "saferl/agents/online/ppo_lag.py",
        "saferl/py.typed",
        "saferl/cli/train.py",
    ):
        assert wanted in names
    # Every module of the three trees is inside.
    for tree, prefix in (("saferl", "saferl"), ("envs", "saferl/envs"), ("agents", "saferl/agents")):
        for path in (ROOT / tree).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / tree)}" in names
    assert wheel.stat().st_size < 2_000_000
