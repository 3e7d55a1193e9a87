"""Checkpoints: exact round trips, atomicity, verification, and no code executed on load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saferl.errors import CheckpointError, SaferlError
from saferl.experiment import checkpoint
from saferl.experiment.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint


def tree() -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "policy": {"weights": model.state_dict(), "flag": True, "nothing": None, "text": "λ"},
        "training": {
            "optimizer": optimizer.state_dict(),
            "generator": torch.Generator().manual_seed(5).get_state(),
            "numpy": np.random.default_rng(3).bit_generator.state,
            "array": np.arange(6, dtype=np.uint64).reshape(2, 3),
            "scalar": np.float64(0.1),
            "zero_dimensional": np.array(2.5),
            "numbers": [1, 2.5, float("inf")],
            "empty": torch.zeros(0, 4),
        },
    }


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def test_round_trip_is_exact(tmp_path: Path) -> None:
    saved = tree()
    folder = save_checkpoint(tmp_path, 1000, saved)
    assert folder.name == "step_00001000"
    assert sorted(p.name for p in folder.iterdir()) == [
        "policy.safetensors",
        "state.json",
        "training.safetensors",
    ]
    loaded = load_checkpoint(folder)
    assert loaded.pop("step") == 1000
    assert_equal(saved, loaded)
    # Integer keys (optimiser state) and generators are usable as they come back.
    optimizer = torch.optim.Adam(torch.nn.Linear(3, 2).parameters(), lr=0.5)
    optimizer.load_state_dict(loaded["training"]["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.1
    torch.Generator().set_state(loaded["training"]["generator"])
    np.random.default_rng().bit_generator.state = loaded["training"]["numpy"]


def test_a_part_can_be_read_alone(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, tree())
    (folder / "training.safetensors").unlink()
    assert set(load_checkpoint(folder, only=("policy",))) == {"policy", "step"}


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (10, 200, 3000):
        save_checkpoint(tmp_path, step, {"policy": {"x": torch.ones(1)}})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000200", "step_00003000"]
    save_checkpoint(tmp_path, 3000, {"policy": {"x": torch.zeros(1)}})  # reached again by a resumed run
    assert load_latest(tmp_path)[0]["policy"]["x"].item() == 0


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save_checkpoint(tmp_path, 1, tree())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(checkpoint, "_write", full)
        elif failing == "fsync":
            patch.setattr(checkpoint.os, "fsync", full)
        else:
            patch.setattr(Path, "rename", full)
        with pytest.raises(SaferlError, match=r"No space left on device.*earlier checkpoints are intact"):
            save_checkpoint(tmp_path, 2, tree())
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    load_latest(tmp_path)


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(tmp_path: Path) -> None:
    (tmp_path / ".step_00000005.123.tmp").mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 6, tree())
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000006"]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "flip":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "remove":
        path.unlink()


@pytest.mark.parametrize("file", ["policy.safetensors", "training.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncate", "flip", "empty", "remove"])
def test_damage_is_named_and_an_earlier_checkpoint_serves(tmp_path: Path, file: str, how: str) -> None:
    save_checkpoint(tmp_path, 1, tree())
    folder = save_checkpoint(tmp_path, 2, tree())
    damage(folder / file, how)
    with pytest.raises(CheckpointError, match=str(folder)):
        load_checkpoint(folder)
    loaded, faults = load_latest(tmp_path)
    assert loaded["step"] == 1
    assert len(faults) == 1


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    damage(save_checkpoint(tmp_path, 1, tree()) / "policy.safetensors", "flip")
    with pytest.raises(CheckpointError, match="checksum"):
        load_latest(tmp_path)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_latest(tmp_path / "nowhere")


def test_fuzzed_state_never_gives_anything_but_our_error(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, tree())
    original = (folder / "state.json").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        (folder / "state.json").write_bytes(data)
        try:
            load_checkpoint(folder)
        except CheckpointError:
            refused += 1
    assert refused > 290  # the rest changed a byte into itself


def test_a_crafted_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, tree())
    flag = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {flag}",)

    for file in ("policy.safetensors", "state.json"):
        good = (folder / file).read_bytes()
        (folder / file).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)
        (folder / file).write_bytes(good)
    # Even one whose checksum was forged: safetensors has no code to run.
    payload = pickle.dumps(Evil())
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["policy"] = hashlib.sha256(payload).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "policy.safetensors").write_bytes(payload)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
    assert not flag.exists()


def test_unsupported_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a/b: set cannot be stored"):
        save_checkpoint(tmp_path, 1, {"policy": {"a": {"b": {1, 2}}}})
