"""Scenarios written by hand: a map, a route and who is there, as JSON.

    {"lanes":      [{"points": [[0, 0], [120, 0]], "speed_limit": 13.9, "successors": [1]}, ...],
     "junctions":  [{"control": "signal", "greens": [12, 12], "polygon": [[x, y], ...]}],
     "crossings":  [{"start": [60, -6], "end": [60, 6]}],
     "routes":     [{"lanes": [0, 1, 2], "length": 200}],
     "vehicles":   [{"lane": 1, "arc": 30, "speed": 5}],
     "pedestrians": [{"crossing": 0, "wait": 2.0, "pace": 1.3}],
     "parked":     [{"x": 40, "y": -3.4, "heading": 0}]}

Lanes, junctions and crossings have the fields of `saferl.envs.driving.roads`. With "vehicles",
"pedestrians" or "parked" exactly those are there, and do not come back once gone; without, the world is
peopled at random. `RouteDriving-v0?scenarios=FILE` drives it, several files make a suite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.envs.driving.roads import Crossing, Junction, Lane, RoadBank, RoadNetwork
from saferl.errors import UsageError

__all__ = ["Cast", "Scenario", "load_scenarios", "read_scenario"]


@dataclass
class Scenario:
    """A map with its routes and, None for a random population, who is there."""

    network: RoadNetwork
    routes: list[list[int]]
    lengths: list[float]
    vehicles: list[dict[str, float]] | None = None
    pedestrians: list[dict[str, float]] | None = None
    parked: list[dict[str, float]] | None = None


def read_scenario(path: Path | str) -> Scenario:
    """Read a scenario file.

    Raises:
        UsageError: the file cannot be read, is not JSON, or an entry has a wrong field; the sentence names
            the file and the entry.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"the scenario {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"the scenario {path} is not JSON: {error}.") from error
    try:
        return _scenario(found)
    except UsageError as error:
        raise UsageError(f"the scenario {path}: {error}") from error


def _scenario(found: Any) -> Scenario:
    if not isinstance(found, Mapping):
        raise UsageError("the file holds no object; it starts with {.")
    known = {
        "name",
        "description",
        "lanes",
        "junctions",
        "crossings",
        "routes",
        "vehicles",
        "pedestrians",
        "parked",
    }
    for name in found:
        if name not in known:
            raise UsageError(f"{name!r} is no part of a scenario; there are {', '.join(sorted(known))}.")
    network = RoadNetwork(
        [_make(Lane, entry, f"lane {k}") for k, entry in enumerate(_list(found, "lanes"))],
        [_make(Junction, entry, f"junction {k}") for k, entry in enumerate(_list(found, "junctions"))],
        [_make(Crossing, entry, f"crossing {k}") for k, entry in enumerate(_list(found, "crossings"))],
    )
    network.check()
    entries = _list(found, "routes")
    if not entries:
        raise UsageError("it has no routes; give at least one.")
    routes, lengths = [], []
    for k, entry in enumerate(entries):
        lanes = entry.get("lanes") if isinstance(entry, Mapping) else None
        if not isinstance(lanes, list) or not lanes or not all(isinstance(n, int) for n in lanes):
            raise UsageError(f"route {k} needs 'lanes', a list of numbers.")
        if not all(0 <= n < len(network.lanes) for n in lanes):
            raise UsageError(f"route {k} names a lane that does not exist.")
        total = sum(network.lanes[n].length for n in lanes)
        routes.append(lanes)
        lengths.append(_number(entry, "length", f"route {k}", total - 2.0))
        if not 10.0 <= lengths[-1] <= total:
            raise UsageError(f"route {k} is {lengths[-1]:g} m long; its lanes allow 10 to {total:g} m.")
    scenario = Scenario(network, routes, lengths)
    for name in ("vehicles", "pedestrians", "parked"):
        if name in found:
            setattr(scenario, name, _people(found, name, network))
    return scenario


_FIELDS = {
    "vehicles": {"lane": None, "arc": None, "speed": 0.0, "eagerness": 1.0},
    "pedestrians": {"crossing": None, "wait": 0.0, "pace": 1.2, "bold": 0.0},
    "parked": {"x": None, "y": None, "heading": 0.0},
}


def _people(found: Mapping[str, Any], name: str, network: RoadNetwork) -> list[dict[str, float]]:
    result = []
    for k, entry in enumerate(_list(found, name)):
        what = f"{name} {k}"
        if not isinstance(entry, Mapping):
            raise UsageError(f"{what} is no object.")
        for key in entry:
            if key not in _FIELDS[name]:
                raise UsageError(f"{what} has no field {key!r}; it has {', '.join(_FIELDS[name])}.")
        values = {key: _number(entry, key, what, default) for key, default in _FIELDS[name].items()}
        if name == "vehicles":
            lane = values["lane"]
            if lane not in range(len(network.lanes)):
                raise UsageError(f"{what} is on lane {lane:g}, which does not exist.")
            if not 0 <= values["arc"] <= network.lanes[int(lane)].length:
                raise UsageError(f"{what} is at {values['arc']:g} m, beyond its lane's end.")
        if name == "pedestrians" and values["crossing"] not in range(len(network.crossings)):
            raise UsageError(f"{what} is at crossing {values['crossing']:g}, which does not exist.")
        result.append(values)
    return result


def _list(found: Mapping[str, Any], name: str) -> list[Any]:
    value = found.get(name, [])
    if not isinstance(value, list):
        raise UsageError(f"'{name}' is no list.")
    return value


def _number(entry: Mapping[str, Any], key: str, what: str, default: float | None) -> float:
    value = entry.get(key, default)
    if value is None:
        raise UsageError(f"{what} needs {key!r}.")
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        raise UsageError(f"{what} has {key!r} = {value!r}, which is no finite number.")
    return float(value)


def _make(kind: type, entry: Any, what: str) -> Any:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{what} is no object.")
    names = [f.name for f in fields(kind)]
    for key in entry:
        if key not in names:
            raise UsageError(f"{what} has no field {key!r}; it can have {', '.join(names)}.")
    values = dict(entry)
    for key in ("polygon", "start", "end"):
        if values.get(key) is not None:
            values[key] = _pairs(values[key], f"{what}: {key!r}")
    if "points" in values:
        values["points"] = _pairs(values["points"], f"{what}: 'points'")
    if "greens" in values:
        values["greens"] = tuple(values["greens"])
    try:
        return kind(**values)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error
    except TypeError as error:
        raise UsageError(f"{what}: {error}.") from error


def _pairs(value: Any, what: str) -> Any:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} is not made of pairs of numbers.") from error
    if array.shape[-1:] != (2,) or not np.isfinite(array).all():
        raise UsageError(f"{what} is not made of pairs of finite numbers.")
    return tuple(array.tolist()) if array.ndim == 1 else array


@dataclass
class Cast:
    """Who is there at the start of each of M maps, (M, N, fields) with validity (M, N); None for chance."""

    vehicles: tuple[Tensor, Tensor] | None
    pedestrians: tuple[Tensor, Tensor] | None
    parked: tuple[Tensor, Tensor] | None

    def to(self, device: torch.device | str) -> Cast:
        """The same on `device`."""

        def move(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if pair is None else (pair[0].to(device), pair[1].to(device))

        return Cast(move(self.vehicles), move(self.pedestrians), move(self.parked))


def load_scenarios(paths: Sequence[Path | str]) -> tuple[RoadBank, Cast]:
    """Scenario files as a bank, a map each, and who is there.

    Raises UsageError for a file that is no scenario, and where some files name their vehicles (people, parked
    cars) and others do not.
    """
    if not paths:
        raise UsageError("no scenario files are given; name at least one.")
    scenarios = [read_scenario(path) for path in paths]
    bank = RoadBank.build(
        [s.network for s in scenarios], [s.routes for s in scenarios], [s.lengths for s in scenarios]
    )
    tables: dict[str, tuple[Tensor, Tensor] | None] = {}
    first = np.cumsum([0, *(len(s.network.lanes) for s in scenarios)])
    first_crossing = np.cumsum([0, *(len(s.network.crossings) for s in scenarios)])
    for name, columns in _FIELDS.items():
        lists = [getattr(s, name) for s in scenarios]
        if all(entries is None for entries in lists):
            tables[name] = None
            continue
        if any(entries is None for entries in lists):
            missing = next(str(p) for p, entries in zip(paths, lists, strict=True) if entries is None)
            raise UsageError(f"the scenario {missing} does not say its {name}, others do; let all or none.")
        most = max(1, *(len(entries) for entries in lists)) if len(lists) > 1 else max(1, len(lists[0]))
        values = np.zeros((len(lists), most, len(columns)))
        valid = np.zeros((len(lists), most), bool)
        for m, entries in enumerate(lists):
            for k, entry in enumerate(entries):
                values[m, k] = [entry[column] for column in columns]
                valid[m, k] = True
        if name == "vehicles":
            values[..., 0] += first[:-1, None]
        if name == "pedestrians":
            values[..., 0] += first_crossing[:-1, None]
        tables[name] = (torch.from_numpy(values), torch.from_numpy(valid))
    return bank, Cast(**tables)
