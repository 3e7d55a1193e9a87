"""One function that opens a policy of any supported origin."""

from __future__ import annotations

from pathlib import Path

import torch

from saferl.errors import CheckpointError, UsageError
from saferl.policies.protocol import Policy

TORCHSCRIPT_SUFFIXES = (".pt", ".ts", ".torchscript")
PICKLE_SUFFIXES = (".pkl", ".pickle", ".pth", ".joblib", ".ckpt", ".bin")


def load_policy(
    path: str | Path, *, device: str | torch.device = "cpu", vec_normalize: str | Path | None = None
) -> Policy:
    """Open a saferl run, a Stable-Baselines3 zip or a TorchScript file as a `Policy`.

    No code from the file is executed: a run holds safetensors and JSON; of a Stable-Baselines3 zip only
    plain data is read (`saferl.policies.sb3_zip`); a TorchScript program is checked before it is loaded
    (`saferl.policies.torchscript`).

    Args:
        path: a run directory, a `.zip` written by Stable-Baselines3 (the suffix may be left out, as
            Stable-Baselines3 allows), or a `.pt`, `.ts` or `.torchscript` file.
        device: where the policy's weights live.
        vec_normalize: the file written by `VecNormalize.save`, for a Stable-Baselines3 policy trained on
            normalised observations; its statistics stay frozen.

    Raises:
        CheckpointError: the file is missing, damaged, or could execute code.
        UsageError: the kind of file or the device is unknown, or `vec_normalize` is given for another kind.
        MissingPackageError: stable-baselines3 is needed and not installed.
    """
    path = Path(path)
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {str(device)!r} cannot be used here; try 'cpu'.") from error
    if not path.exists() and not path.suffix and path.with_suffix(".zip").is_file():
        path = path.with_suffix(".zip")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a saferl run, a .zip or a TorchScript file.")
    suffix = path.suffix.lower()
    if vec_normalize is not None and suffix != ".zip":
        raise UsageError(
            "vec_normalize belongs to Stable-Baselines3 zips; a saferl run and a TorchScript file normalise "
            "their own observations."
        )
    if path.is_dir():
        from saferl.policies.run import load_run_policy

        return load_run_policy(path, str(device))
    if suffix == ".zip":
        from saferl.policies.sb3_zip import load_sb3_zip

        return load_sb3_zip(path, device=device, vec_normalize=vec_normalize)
    if suffix in TORCHSCRIPT_SUFFIXES:
        from saferl.policies.torchscript import load_torchscript

        return load_torchscript(path, device=device)
    if suffix == ".pt2":
        raise CheckpointError(
            f"{path} is a torch.export program, whose loader unpickles parts of the file and could execute "
            "code; save the policy as TorchScript instead: torch.jit.trace(policy, obs).save('policy.pt')."
        )
    if suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} looks like a Python pickle, which can execute code when opened; give a saferl run, a "
            "Stable-Baselines3 .zip or a TorchScript .pt file."
        )
    raise UsageError(
        f"{path} is of no kind known as a policy; give a saferl run directory, a Stable-Baselines3 .zip or a "
        f"TorchScript file ({', '.join(TORCHSCRIPT_SUFFIXES)})."
    )
