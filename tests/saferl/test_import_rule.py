"""Imports point one way: primitives <- envs <- agents <- command line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Which packages of ours each layer may import (by longest matching prefix of the module's name).
LAYERS = {"saferl.cli": 3, "saferl.agents": 2, "saferl.envs": 1, "saferl": 0}


def layer_of(module: str) -> int:
    return next(
        rank for prefix, rank in LAYERS.items() if module == prefix or module.startswith(prefix + ".")
    )


def sources() -> list[tuple[str, Path]]:
    found = []
    for tree, prefix in (("saferl", "saferl"), ("envs", "saferl.envs"), ("agents", "saferl.agents")):
        for path in sorted((ROOT / tree).rglob("*.py")):
            inside = path.relative_to(ROOT / tree)
            if tree == "saferl" and inside.parts[0] in {"envs", "agents"}:
                continue  # the symbolic links
            parts = [prefix, *inside.with_suffix("").parts]
            found.append((".".join(p for p in parts if p != "__init__"), path))
    return found


def imported(path: Path) -> set[str]:
    """Every module of ours that a file imports, at any depth of nesting; relative imports are refused."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "saferl"}


@pytest.mark.parametrize(("module", "path"), sources(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_one_way(module: str, path: Path) -> None:
    # saferl.experiment.report and the like are layer 0; __main__ belongs to the command line.
    rank = 3 if module == "saferl.__main__" else layer_of(module)
    too_high = [name for name in imported(path) if layer_of(name) > rank]
    assert not too_high, f"{module} may not import {too_high}"


def test_the_rule_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from saferl.agents import LEARNERS\n")
    assert [name for name in imported(bad) if layer_of(name) > 0] == ["saferl.agents.LEARNERS"]


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import saferl", ["torch", "numpy", "mujoco", "transformers", "gymnasium", "matplotlib"]),
        ("import saferl.constraints", ["mujoco", "transformers", "scipy.stats", "matplotlib", "gymnasium"]),
        ("import saferl.envs", ["mujoco", "safety_gymnasium", "torch", "transformers", "matplotlib"]),
        ("import saferl.cli", ["torch", "numpy", "tyro", "rich"]),
        ("from saferl.agents import LEARNERS", ["torch", "mujoco", "transformers"]),
        ("import saferl.agents.online.ppo_lag", ["mujoco", "transformers", "matplotlib", "scipy.stats"]),
    ],
)
def test_imports_stay_light(statement: str, forbidden: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
