"""A replay buffer on the learner's device, which a run carries from process to process.

Transitions are rows of one preallocated float32 table, so that a batch is a single gather. A ring: row i goes
to place i mod capacity. Rows are also appended to a journal on disk (see `saferl.experiment.journal`), which
makes a resumed run's buffer equal to the uninterrupted one's without writing it anew at each checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saferl.errors import NonFiniteError, UsageError
from saferl.experiment.journal import RowJournal


@dataclass
class Batch:
    """B transitions drawn uniformly with replacement; views of one table of floats."""

    features: Tensor
    """Encoded observations before normalisation (B, D)."""
    actions: Tensor
    """Actions in [-1, 1] (B, A)."""
    signals: Tensor
    """Reward and constrained costs of the step (B, 1 + K)."""
    terminated: Tensor
    """1 where the episode ended in a terminal state, 0 elsewhere, truncation included (B,)."""
    next_features: Tensor
    """Encoded observations after the step, those before a reset where the episode ended (B, D)."""


class ReplayBuffer:
    """The latest `capacity` transitions.

    Args:
        capacity: transitions kept.
        feature_size: D.
        action_size: A.
        signal_names: what the signals are called in messages, the reward's name first.
        device: where the table lies.
        directory: of the journal.

    Raises:
        UsageError: the table does not fit into the device's memory.
    """

    def __init__(
        self,
        capacity: int,
        feature_size: int,
        action_size: int,
        signal_names: tuple[str, ...],
        device: torch.device,
        directory: Path,
    ) -> None:
        self.capacity = capacity
        self.signal_names = signal_names
        self._widths = (feature_size, action_size, len(signal_names), 1, feature_size)
        columns = sum(self._widths)
        try:
            self.table = torch.empty(capacity, columns, device=device)
        except RuntimeError as error:  # torch's own message, and CUDA's out-of-memory error is one
            raise UsageError(
                f"a replay buffer of {capacity:,} transitions needs {capacity * columns * 4 / 2**30:.1f} GiB "
                f"on {device}, which are not free; lower the buffer size."
            ) from error
        self.rows = 0
        """Transitions added so far."""
        self._journal = RowJournal(directory, columns)
        self._checkpointed: int | None = None

    def __len__(self) -> int:
        return min(self.rows, self.capacity)

    def add(
        self, features: Tensor, actions: Tensor, signals: Tensor, terminated: Tensor, next_features: Tensor
    ) -> None:
        """Store N transitions, shapes as in `Batch`.

        Raises:
            NonFiniteError: an observation, the reward or a cost is NaN or infinite; nothing is stored.
        """
        rows = torch.cat([features, actions, signals, terminated[:, None], next_features], dim=1)
        if not bool(torch.isfinite(rows).all()):
            self._refuse(actions, signals, next_features)
        n = len(rows)
        if self.rows + n - self._journal.rows > self.capacity:
            self._flush()  # before the ring overwrites what is not yet on disk
        start = self.rows % self.capacity
        head = min(n, self.capacity - start)
        self.table[start : start + head] = rows[:head]
        self.table[: n - head] = rows[head:]
        self.rows += n

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """Draw a batch, uniformly and with replacement."""
        index = torch.randint(len(self), (size,), generator=generator, device=self.table.device)
        return self.batch(index)

    def batch(self, index: Tensor) -> Batch:
        """The transitions at places `index` (B,) of the table."""
        features, actions, signals, terminated, next_features = self.table[index].split(self._widths, dim=1)
        return Batch(features, actions, signals, terminated[:, 0], next_features)

    def _refuse(self, actions: Tensor, signals: Tensor, next_features: Tensor) -> None:
        # The action first: whatever follows from one that is not finite is not finite either.
        advice = ": lower the learning rate or scale the rewards"
        named = [("an action", actions), ("an observation", next_features)]
        named += [(name, signals[:, k : k + 1]) for k, name in enumerate(self.signal_names)]
        for label, values in named:
            bad = ~torch.isfinite(values).all(1)
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                raise NonFiniteError(
                    f"{label} of environment {row} is not finite{advice if values is actions else ''}"
                )
        raise NonFiniteError("the first observation of an episode is not finite")

    # --- checkpoints --------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Append to the journal what it does not hold yet."""
        start, count = self._journal.rows % self.capacity, self.rows - self._journal.rows
        head = min(count, self.capacity - start)
        self._journal.append(self.table[start : start + head].cpu().numpy())
        self._journal.append(self.table[: count - head].cpu().numpy())

    def state_dict(self) -> dict[str, Any]:
        """Write new transitions to the journal and describe it, as JSON values."""
        self._flush()
        return self._journal.state_dict()

    def sync(self) -> None:
        """Make what `state_dict` described safe; call it before the checkpoint is written."""
        self._journal.sync()

    def checkpointed(self, state: Mapping[str, Any]) -> None:
        """Drop what neither the checkpoint of `state`, now written, nor the one before it needs."""
        if self._checkpointed is not None:
            self._journal.discard_before(self._checkpointed - self.capacity)
        self._checkpointed = int(state["rows"])

    def restart(self) -> None:
        """Remove the journal of a run that was killed before its first checkpoint."""
        self._journal.clear()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read back what `state_dict` described.

        Raises:
            CheckpointError: see `RowJournal.restore`.
        """
        self.rows = int(state["rows"])
        for first, rows in self._journal.restore(state, self.rows - self.capacity):
            start = first % self.capacity
            head = min(len(rows), self.capacity - start)
            values = torch.tensor(rows)
            self.table[start : start + head] = values[:head].to(self.table.device)
            self.table[: len(rows) - head] = values[head:].to(self.table.device)
        self._checkpointed = self.rows

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()
