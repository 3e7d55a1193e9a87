"""The policy of a saferl run, rebuilt from JSON and safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from saferl.errors import CheckpointError
from saferl.experiment.checkpoint import load_checkpoint, load_latest
from saferl.experiment.run import read_config
from saferl.nn.diffusion_policy import DiffusionPolicy
from saferl.nn.driving import DrivingPolicy
from saferl.nn.models import Actor
from saferl.nn.plan_policy import PlanPolicy
from saferl.nn.proposal_policy import ProposalPolicy
from saferl.nn.sequence_policy import SequencePolicy

RunPolicy: TypeAlias = Actor | DiffusionPolicy | DrivingPolicy | PlanPolicy | ProposalPolicy | SequencePolicy
"""What a saferl run's policy can be."""

_KINDS: dict[str, type[RunPolicy]] = {
    "actor": Actor,
    "diffusion": DiffusionPolicy,
    "driving": DrivingPolicy,
    "planner": PlanPolicy,
    "proposal": ProposalPolicy,
    "sequence": SequencePolicy,
}


def load_run_policy(path: Path, device: str = "cpu") -> RunPolicy:
    """Load the newest intact checkpoint of a run, or a given `step_...` folder, for acting.

    The policy is in evaluation mode: its observation statistics are frozen.

    Raises:
        UsageError: the folder is neither a run nor a checkpoint.
        CheckpointError: there is no checkpoint, or all are damaged.
    """
    if (path / "state.json").exists():
        checkpoint = load_checkpoint(path, only=("policy",))
    else:
        read_config(path)
        checkpoint, faults = load_latest(path / "checkpoints", only=("policy",))
        for fault in faults:
            print(f"warning: {fault}")
    try:
        policy = checkpoint["policy"]
        kind = policy["description"]["kind"]
        if kind not in _KINDS:
            raise CheckpointError(f"{path} holds a policy of kind {kind!r}, which this version cannot load.")
        actor = _KINDS[kind].from_description(policy["description"])
        actor.load_state_dict(policy["weights"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the policy in {path} does not fit its description ({error}).") from error
    return actor.to(device).eval()
