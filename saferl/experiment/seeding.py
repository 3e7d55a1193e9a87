"""Seeds and threads, set explicitly and in one place."""

from __future__ import annotations

import numpy as np
import torch

from saferl.errors import UsageError


def derive_seed(seed: int, *path: int) -> int:
    """An independent seed for a component: the same (seed, path) always gives the same answer."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint32)[0])


def choose_device(name: str) -> torch.device:
    """The torch device; `UsageError` when CUDA is asked for and absent, or the name is unknown."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; use cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("CUDA was asked for but torch sees no GPU; use --device cpu.")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(f"{name} was asked for but torch sees {torch.cuda.device_count()} GPU(s).")
    return device
