"""Run folders: creation, metrics that survive kills and resumption, configuration round trips."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from saferl.errors import CheckpointError, SaferlError, UsageError
from saferl.experiment.config import CostLimit, cost_limits, from_json, parse_cost_limit, to_json
from saferl.experiment.metrics import MetricsWriter, read_metrics
from saferl.experiment.run import Run, read_config
from saferl.experiment.seeding import choose_device, derive_seed


def test_a_run_starts_only_in_an_empty_folder(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a" / "run", {"algorithm": "ppo", "config": {}})
    run.close()
    assert read_config(tmp_path / "a" / "run")["versions"]["torch"] == torch.__version__
    with pytest.raises(UsageError, match="--resume"):
        Run.create(tmp_path / "a" / "run", {"algorithm": "ppo", "config": {}})


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_config(tmp_path)


def test_metrics_gain_columns_and_keep_rows(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(10, {"train/return": 1.5})
    writer.write(20, {"train/return": 0.1, "train/cost": 3.0})
    writer.write(30, {"train/cost": 1 / 3})
    writer.close()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 10, "train/return": 1.5},
        {"step": 20, "train/return": 0.1, "train/cost": 3.0},
        {"step": 30, "train/cost": 1 / 3},
    ]


def test_resumption_drops_later_and_torn_rows(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (10, 20, 30):
        writer.write(step, {"a": step / 10, "b": 0.0})
    writer.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("40,4")  # killed in the middle of a line
    again = MetricsWriter(tmp_path, resume_step=20, tensorboard=False)
    again.write(30, {"a": 9.0, "b": 1.0})
    again.close()
    assert [(r["step"], r["a"]) for r in read_metrics(tmp_path / "metrics.csv")] == [
        (10, 1.0),
        (20, 2.0),
        (30, 9.0),
    ]


def test_tensorboard_has_the_same_names(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path)
    writer.write(10, {"train/return": 1.5, "constraint/cost/multiplier": 0.25})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/return", "constraint/cost/multiplier"}
    assert events.Scalars("constraint/cost/multiplier")[0].value == 0.25


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(10, {"a": 1.0})

    class Full:
        def write(self, _: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(SaferlError, match="No space left on device"):
        writer.write(20, {"a": 2.0})


def test_other_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("x,y\n1,2\n")
    with pytest.raises(SaferlError, match="not a table of metrics"):
        read_metrics(tmp_path / "metrics.csv")


@dataclass(frozen=True, kw_only=True)
class Example:
    sizes: tuple[int, ...] = (64, 64)
    limit: CostLimit = 25.0
    maximum: float | None = None
    name: str = "x"


@pytest.mark.parametrize("config", [Example(), Example(sizes=(), limit={"a": 1.0}, maximum=2.0, name="y")])
def test_configurations_round_trip(config: Example) -> None:
    import json

    assert from_json(Example, json.loads(json.dumps(to_json(config)))) == config


def test_unknown_hyperparameters_are_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'sizes'"):
        from_json(Example, {"size": [1]})


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("25", {"cost": 25.0}),
        ("hazards=10,vases_contact=5", {"hazards": 10.0, "vases_contact": 5.0}),
        ("0", {"cost": 0.0}),
    ],
)
def test_cost_limits_are_read(text: str, limits: dict[str, float]) -> None:
    assert cost_limits(parse_cost_limit(text)) == limits


@pytest.mark.parametrize("bad", [-1.0, float("nan"), {"hazards": -2.0}])
def test_negative_limits_are_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="zero or more"):
        cost_limits(bad)


@pytest.mark.parametrize("bad", ["abc", "a=b", "=,"])
def test_unreadable_limits_are_refused(bad: str) -> None:
    with pytest.raises(UsageError, match="neither a number"):
        parse_cost_limit(bad)


def test_seeds_of_components_differ_and_repeat() -> None:
    seeds = {derive_seed(s, c) for s in range(20) for c in range(5)}
    assert len(seeds) == 100
    assert derive_seed(3, 1) == derive_seed(3, 1)


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="unknown device"):
        choose_device("banana")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="use --device cpu"):
            choose_device("cuda")
