"""Configurations as frozen dataclasses that round-trip through JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from saferl.errors import UsageError, unknown_name

ConfigT = TypeVar("ConfigT")

CostLimit = float | dict[str, float]
"""A limit on the mean episode cost: one number for the total cost, or one for every named cost."""


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values."""
    return dataclasses.asdict(config)


def from_json(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Rebuild a dataclass from `to_json`'s answer; an unknown or ill-typed field is a `UsageError`."""
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise unknown_name("hyperparameter", name, known)
        arguments[name] = _coerce(hints[name], value)
    built: ConfigT = cls(**arguments)
    return built


def _coerce(hint: Any, value: Any) -> Any:
    """JSON has no tuples: give them back where the field is one."""
    if isinstance(value, list):
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if any(typing.get_origin(option) is tuple for option in options):
            return tuple(value)
    return value


def cost_limits(limit: CostLimit) -> dict[str, float]:
    """Limits by name; a single number limits the total, named "cost".

    Raises:
        UsageError: a limit is negative or not a number.
    """
    limits = dict(limit) if isinstance(limit, Mapping) else {"cost": float(limit)}
    for name, value in limits.items():
        if not value >= 0:
            label = "the cost limit" if name == "cost" else f"the cost limit of {name!r}"
            raise UsageError(f"{label} is {value:g}; it must be zero or more (mean cost of an episode).")
    return limits


def parse_cost_limit(text: str) -> CostLimit:
    """Read "25" or "hazards=10,vases_contact=5" as typed on the command line."""
    try:
        if "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, value in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise UsageError(
            f"the cost limit {text!r} is neither a number nor a list such as hazards=10,vases_contact=5."
        ) from None
