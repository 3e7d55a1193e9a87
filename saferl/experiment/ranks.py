"""Several processes that train one model: who this one is, and what they say to each other.

`torchrun` tells a process its rank in environment variables. Everything here also works in a single
process, without a process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from saferl.errors import UsageError

__all__ = ["Ranks", "process_rank", "world_size"]


def process_rank() -> int:
    """This process's number among those of `torchrun`, 0 alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes `torchrun` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """This process among W; `share` gives the part of N things that is its own.

    Args:
        device: where gradients live; decides between NCCL and Gloo.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = process_rank(), world_size()
        self.device = device

    @contextmanager
    def connected(self) -> Iterator[Ranks]:
        """Join the others while the block runs."""
        if self.size == 1 or torch.distributed.is_initialized():
            yield self
            return
        torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield self
        finally:
            torch.distributed.destroy_process_group()

    def share(self, count: int, what: str) -> slice:
        """The rows of `count` that are this process's. Raises UsageError unless they divide evenly."""
        if count % self.size:
            raise UsageError(
                f"{count} {what} cannot be shared by {self.size} processes evenly; take a multiple of "
                f"{self.size}."
            )
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def everyone(self, value: Any) -> list[Any]:
        """What each process says, by rank; known to all."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(said, value)
        return said

    def first(self, value: Any) -> Any:
        """What rank 0 says."""
        if self.size == 1:
            return value
        said = [value]
        torch.distributed.broadcast_object_list(said, 0)
        return said[0]
