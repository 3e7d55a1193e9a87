"""saferl: constrained reinforcement learning for control agents and language policies."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import saferl` stays light."""
    if name == "load_policy":
        from saferl.policies import load_policy

        return load_policy
    raise AttributeError(f"module 'saferl' has no attribute {name!r}")
