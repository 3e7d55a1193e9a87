"""The command line: what it prints, what it writes, and one clear sentence for every wrong use."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saferl.agents import LEARNERS
from saferl.cli import main
from saferl.experiment.checkpoint import list_checkpoints

SMALL = ["--env", "SpeedLimit-v0", "--total-steps", "800", "--steps-per-iteration", "400", "--num-envs", "4"]
SMALL += ["--epochs", "2", "--quiet"]
LAG = [*SMALL, "--cost-limit", "speed=5"]

Saferl = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "ppo-lag", *LAG, "--run", str(folder)]) == 0
    return folder


def test_help_is_fast_and_names_every_command() -> None:
    def seconds(*command: str) -> float:
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began

    # Against the bare interpreter in one run, since absolute times mean nothing on a shared machine.
    bare = min(seconds(sys.executable, "-c", "pass") for _ in range(5))
    helped = min(seconds(sys.executable, "-m", "saferl", "--help") for _ in range(5))
    assert helped < 5 * bare + 0.1
    text = subprocess.run([sys.executable, "-m", "saferl", "--help"], capture_output=True, text=True).stdout
    for command in ("train", "evaluate", "collect", "report", "list", "doctor"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE)


def test_every_hyperparameter_is_documented_with_its_default(saferl: Saferl) -> None:
    from saferl.agents.online.ppo_lag import Config

    status, out, _ = saferl("train", "ppo-lag", "--help")
    assert status == 0
    for field in Config.__dataclass_fields__.values():
        option = "--" + field.name.replace("_", "-")
        assert option in out or option.replace("--", "--no-") in out
    assert "Limit on the mean episode cost" in " ".join(out.replace("│", " ").split())
    assert "(default: 0.035)" in out
    assert "(default: 25)" in out


def test_train_evaluate_report(saferl: Saferl, run: Path, tmp_path: Path) -> None:
    assert json.loads((run / "config.json").read_text())["config"]["cost_limit"] == {"speed": 5.0}
    assert [c.name for c in list_checkpoints(run / "checkpoints")][-1] == "step_00000800"
    assert list(run.glob("events.out.tfevents.*"))

    status, out, _ = saferl("evaluate", run, "--episodes", "6", "--num-envs", "3", "--quiet")
    assert status == 0
    assert "speed" in out
    written = json.loads((run / "evaluation.json").read_text())
    assert written["episodes"] == 6
    assert written["limits"] == {"speed": 5.0}
    assert written["backend"] == "native"  # the engine that stepped, not the "auto" that chose it
    assert "native engine" in out
    assert written["step"] == 800
    assert 0 <= written["violation_rate"] <= 1
    assert saferl("evaluate", run, "--episodes", "2", "--cost-limit", "speed=7,throttle=3", "--quiet")[0] == 0
    assert json.loads((run / "evaluation.json").read_text())["limits"] == {"speed": 7.0, "throttle": 3.0}
    assert saferl("evaluate", run, "--episodes", "2", "--cost-limit", "7", "--quiet")[0] == 0
    assert json.loads((run / "evaluation.json").read_text())["limits"] == {"cost": 7.0}
    # The same seed gives the same numbers; the environment count does not change the seeds used.
    again = tmp_path / "again.json"
    assert saferl("evaluate", run, "--episodes", "6", "--num-envs", "3", "--quiet", "--output", again)[0] == 0
    assert json.loads(again.read_text())["return"] == written["return"]

    status, out, _ = saferl("report", run)
    assert status == 0
    page = (run / "report" / "index.html").read_text()
    assert "ppo-lag" in page
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_a_run_gets_a_folder_name_of_its_own(
    saferl: Saferl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = saferl("train", "ppo", *SMALL)
    assert status == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"ppo-SpeedLimit-v0-0-\d{8}-\d{6}", folder.name)
    assert f"saferl evaluate runs/{folder.name}" in out


def test_resume_goes_on_to_more_steps(saferl: Saferl, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert saferl("train", "ppo-lag", *LAG, "--run", folder)[0] == 0
    status, out, _ = saferl("train", "--resume", folder, "--total-steps", "1200", "--quiet")
    assert status == 0
    assert "resumed at step 800" in out
    assert list_checkpoints(folder / "checkpoints")[-1].name == "step_00001200"


def test_lists(saferl: Saferl) -> None:
    status, out, _ = saferl("list", "algos")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines()} == {*LEARNERS}
    status, out, _ = saferl("list", "envs")
    assert status == 0
    assert "SafetyPointGoal1-v0" in out
    assert "SafetyHalfCheetahVelocity-v1" in out


WRONG = [
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["train", "ppo-lagg", *SMALL], "unknown algorithm 'ppo-lagg'; did you mean 'ppo-lag'?"),
    (["train", "--env", "SpeedLimit-v0"], "name the algorithm first"),
    (["train", "ppo", *SMALL, "--env", "SafetyPointGaol1-v0"], "did you mean 'SafetyPointGoal1-v0'?"),
    (["train", "ppo", *SMALL, "--backend", "orignal"], "did you mean 'original'?"),
    (
        ["train", "ppo", *SMALL, "--totl-steps", "5"],
        "unknown option '--totl-steps'; did you mean --total-steps?",
    ),
    (["train", "ppo", *SMALL, "--seed", "x"], "see `saferl train ppo --help`"),
    (["train", "ppo", *SMALL, "--num-envs", "0"], "the number of environments is 0; ask for at least one."),
    (["train", "ppo-lag", *SMALL, "--cost-limit", "-3"], "the cost limit is -3; it must be zero or more"),
    (["train", "ppo-lag", *SMALL, "--cost-limit", "sped=3"], "unknown cost 'sped'; did you mean 'speed'?"),
    (["train", "ppo-lag", *SMALL, "--cost-limit", "abc"], "neither a number"),
    (["train", "ppo", *SMALL, "--activation", "tahn"], "unknown activation 'tahn'; did you mean 'tanh'?"),
    (["train", "ppo", *SMALL, "--batch-size", "0"], "batch size must be 1 or more, not 0."),
    (["train", "ppo", *SMALL, "--actor-lr", "-1"], "actor lr must be 0 or more, not -1."),
    (["train", "ppo", *SMALL, "--hidden-sizes", "16", "0"], "hidden sizes must be 1 or more, not 0."),
    (["train", "ppo-lag", *SMALL, "--multiplier-init", "-1"], "the initial multiplier is -1"),
    (["train", "cppo-pid", *SMALL, "--delay", "0"], "the delay is 0"),
    (["train", "ppo", *SMALL, "--device", "tpux"], "unknown device 'tpux'"),
    (["train", "ppo", *SMALL, "--preset", "cpu"], "`saferl train ppo` has no presets"),
    (["train", "fisor", "--preset", "cup"], "unknown preset 'cup'; did you mean 'cpu'?"),
    (["train", "--resume", "nowhere"], "nowhere is not a run"),
    (["train", "ppo", "--resume", "nowhere"], "leave it out: `saferl train --resume RUN`"),
    (["evaluate", "nowhere"], "nowhere"),
    (["evaluate"], "saferl evaluate --help"),
    (["report", "nowhere"], "nowhere is not a run"),
    (["list", "algo"], "did you mean 'algos'?"),
    (["list", "envs", "more"], "takes no further words"),
]


@pytest.mark.parametrize(
    ("words", "sentence"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_wrong_use_is_one_sentence_and_status_2(
    words: list[str], sentence: str, saferl: Saferl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = saferl(*words)
    assert status == 2
    assert err.startswith("saferl: ")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    left = list((tmp_path / "runs").iterdir()) if (tmp_path / "runs").exists() else []
    assert not left, "a refused run leaves no folder behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_and_absent(saferl: Saferl, tmp_path: Path) -> None:
    status, _, err = saferl("train", "ppo", *SMALL, "--device", "cuda", "--run", tmp_path / "run")
    assert status == 2
    assert "use --device cpu" in err
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_not_overwritten(saferl: Saferl, run: Path) -> None:
    before = (run / "metrics.csv").read_bytes()
    status, _, err = saferl("train", "ppo-lag", *LAG, "--run", run)
    assert status == 2
    assert f"saferl train --resume {run}" in err
    assert (run / "metrics.csv").read_bytes() == before


def test_failures_have_status_1(saferl: Saferl, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert saferl("train", "ppo", *SMALL, "--run", folder)[0] == 0
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        (checkpoint / "policy.safetensors").write_bytes(b"damaged")
    for words in (["evaluate", folder], ["train", "--resume", folder]):
        status, _, err = saferl(*words)
        assert status == 1
        assert "checksum" in err
        assert len(err.strip().splitlines()) == 1


def test_a_full_disk_is_one_sentence_and_keeps_the_run(
    saferl: Saferl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saferl.experiment import checkpoint

    folder = tmp_path / "run"
    whole, write = tmp_path / "whole", checkpoint._write
    assert saferl("train", "ppo", *SMALL, "--checkpoint-interval", "0", "--run", whole)[0] == 0

    def full(path: Path, payload: bytes) -> None:
        if "step_00000800" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, payload)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        status, _, err = saferl("train", "ppo", *SMALL, "--checkpoint-interval", "0", "--run", folder)
    assert status == 1
    assert "No space left on device" in err
    assert len(err.strip().splitlines()) == 1
    assert [c.name for c in list_checkpoints(folder / "checkpoints")] == ["step_00000400"]
    assert saferl("train", "--resume", folder, "--quiet")[0] == 0
    newest = [list_checkpoints(f / "checkpoints")[-1] / "policy.safetensors" for f in (folder, whole)]
    assert newest[0].read_bytes() == newest[1].read_bytes()


def test_nan_has_status_1_and_a_sentence(saferl: Saferl, tmp_path: Path) -> None:
    words = [*SMALL, "--env", "saferl-test/Faulty-reward-v0", "--run", tmp_path / "run"]
    status, _, err = saferl("train", "ppo", *words)
    assert status == 1
    assert re.search(r"the reward of environment \d is not finite at step \d+", err)


def test_a_policy_for_another_environment_is_refused(saferl: Saferl, run: Path) -> None:
    status, _, err = saferl("evaluate", run, "--env", "saferl-test/Faulty-v0")
    assert status == 1
    assert "observations of shape (3,)" in err


def test_stored_configuration_of_a_newer_version_is_explained(
    saferl: Saferl, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["clipp"] = 1
    (folder / "config.json").write_text(json.dumps(stored))
    status, _, err = saferl("train", "--resume", folder)
    assert status == 2
    assert "unknown hyperparameter 'clipp'; did you mean 'clip'?" in err


def test_damaged_data_leave_no_run(saferl: Saferl, tmp_path: Path) -> None:
    (tmp_path / "text.hdf5").write_text("not data")
    words = ["--dataset", str(tmp_path / "text.hdf5"), "--env", "SafetyPointGoal1-v0"]
    status, _, err = saferl("train", "bc-all", *words, "--run", str(tmp_path / "run"))
    assert status == 1
    assert "text.hdf5 is not an HDF5 file" in err
    assert not (tmp_path / "run").exists()
