"""ONI: an intrinsic reward that a judge of captions teaches while the agent trains.

Zheng, Henaff, Zhang, Grover and Amos 2024, "Online Intrinsic Rewards for Decision Making Agents from Large
Language Model Feedback" (arXiv 2410.23022); constants are those of its published code. Steps carry captions
of what happened. An annotator labels them in the background, newest first; a distiller turns labels into
r_int of any caption; and the learner gets

    r = c_ext r_ext + c_int r_int(caption) / N_ep(caption)^beta,

N_ep the times that the caption came up in the episode so far, this one included. Rewards are formed when the
learner learns, not when the agent acts, so that a label that arrives late counts for what is recorded.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from saferl.errors import SaferlError, UsageError

__all__ = [
    "Annotator",
    "CaptionNetwork",
    "ClassificationDistiller",
    "Distiller",
    "EpisodeCounts",
    "RankingDistiller",
    "RetrievalDistiller",
    "ThreadedAnnotator",
    "combined_rewards",
    "encode",
    "parse_label",
]

LENGTH = 256
"""Bytes of a caption that a network reads."""
GATE = 25_000
"""Labelled captions from which on a network's reward is used."""


# --- counting --------------------------------------------------------------------------------------------


class EpisodeCounts:
    """How often each caption came up in the current episode of N environments.

    Args:
        num_envs: N.
        captions: how many different ones there are at first; more make room.
    """

    def __init__(self, num_envs: int, captions: int = 1_024) -> None:
        self._counts = np.zeros((num_envs, captions), np.int32)

    def step(self, captions: NDArray[np.integer], ended: NDArray[np.bool_]) -> NDArray[np.int32]:
        """N_ep (N,) of the captions' ids (N,), this step included; counts start anew after an end (N,)."""
        if captions.max(initial=0) >= self._counts.shape[1]:
            room = np.zeros((len(self._counts), 2 * int(captions.max()) + 1), np.int32)
            room[:, : self._counts.shape[1]] = self._counts
            self._counts = room
        rows = np.arange(len(self._counts))
        self._counts[rows, captions] += 1
        found: NDArray[np.int32] = self._counts[rows, captions].copy()
        self._counts[ended] = 0
        return found


def combined_rewards(
    extrinsic: NDArray[np.floating],
    intrinsic: NDArray[np.floating],
    counts: NDArray[np.integer],
    *,
    extrinsic_weight: float = 0.1,
    intrinsic_weight: float = 0.4,
    exponent: float = 3.0,
) -> NDArray[np.float64]:
    """c_ext r_ext + c_int r_int / N_ep^beta, arrays of one shape.

    The defaults are the code's for dense scores; it takes 10 for c_ext where rewards are sparse, and 0 where
    there are none. Raises `UsageError` for a count below 1.
    """
    if (counts < 1).any():
        raise UsageError("a caption's count includes the present step and is at least 1.")
    scaled = intrinsic_weight * intrinsic / counts.astype(float) ** exponent
    return np.asarray(extrinsic_weight * extrinsic + scaled, float)


# --- labels ----------------------------------------------------------------------------------------------


class Annotator(Protocol):
    """Labels captions some time after they were handed in."""

    def submit(self, captions: Sequence[str]) -> None: ...

    def poll(self) -> dict[str, int]: ...


def parse_label(answer: str | int) -> int:
    """0 or 1 from a judge's answer: a number, or the opaque tags FOO for 1 and BAR for 0.

    An answer with neither tag, or with both, is 0, with a warning.
    """
    if isinstance(answer, int | np.integer):
        return int(answer != 0)
    tags = set(re.findall(r"\b(FOO|BAR)\b", answer))
    if len(tags) != 1:
        warnings.warn(
            f"the judge's answer {answer[:80]!r} holds no single tag; it counts as 0.", stacklevel=2
        )
        return 0
    return int(tags == {"FOO"})


class ThreadedAnnotator:
    """Asks a judge in a thread of its own, the newest captions first.

    Args:
        judge: captions -> one answer each (see `parse_label`): a function, or a call of a local model.
        batch_size: captions a call; 100 in the published runs.

    Raises:
        UsageError: the batch size is not positive.
    """

    def __init__(self, judge: Callable[[list[str]], Sequence[str | int]], batch_size: int = 100) -> None:
        if batch_size < 1:
            raise UsageError(f"the batch size is {batch_size}; it must be at least 1.")
        self._judge, self._batch_size = judge, batch_size
        self._pending: list[str] = []
        self._seen: set[str] = set()
        self._labels: dict[str, int] = {}
        self._error: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="annotator", daemon=True)
        self._thread.start()

    def submit(self, captions: Sequence[str]) -> None:
        """Hand in captions; each is asked about once."""
        with self._changed:
            fresh = [caption for caption in dict.fromkeys(captions) if caption not in self._seen]
            self._seen.update(fresh)
            self._pending.extend(fresh)
            self._changed.notify()

    def poll(self) -> dict[str, int]:
        """Labels that came in since the last call; never waits.

        Raises:
            SaferlError: the judge failed.
        """
        with self._changed:
            if self._error is not None:
                raise SaferlError(
                    f"the judge of captions failed: {type(self._error).__name__}: {self._error}"
                ) from self._error
            found, self._labels = self._labels, {}
            return found

    @property
    def waiting(self) -> int:
        """Captions that are not labelled yet, those in the judge's hands excepted."""
        with self._changed:
            return len(self._pending)

    def close(self) -> None:
        """Stop after the call in progress."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> ThreadedAnnotator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if self._closed:
                    return
                batch = self._pending[-self._batch_size :]
                del self._pending[-self._batch_size :]
            try:
                answers = list(self._judge(batch))
                if len(answers) != len(batch):
                    raise ValueError(f"{len(answers)} answers to {len(batch)} captions")
                labels = {
                    caption: parse_label(answer) for caption, answer in zip(batch, answers, strict=True)
                }
            except Exception as error:  # the judge is the user's
                with self._changed:
                    self._error = error
                return
            with self._changed:
                self._labels.update(labels)


# --- distillers ------------------------------------------------------------------------------------------


class Distiller(Protocol):
    """Turns labels into a reward for every caption."""

    def reward(self, captions: Sequence[str]) -> NDArray[np.float64]: ...


class RetrievalDistiller:
    """The label itself, and 0 for captions that have none yet."""

    def __init__(self) -> None:
        self.labels: dict[str, int] = {}

    def update(self, labels: dict[str, int]) -> None:
        """Take in an annotator's labels."""
        self.labels.update(labels)

    def unlabelled(self, captions: Sequence[str]) -> list[str]:
        """Those without a label, each once: what is to be handed in."""
        return [caption for caption in dict.fromkeys(captions) if caption not in self.labels]

    def reward(self, captions: Sequence[str]) -> NDArray[np.float64]:
        """Rewards (n,) of n captions."""
        return np.array([self.labels.get(caption, 0) for caption in captions], float)


def encode(captions: Sequence[str]) -> Tensor:
    """Captions as bytes (n, 256), cut or filled with 0."""
    rows = np.zeros((len(captions), LENGTH), np.uint8)
    for row, caption in zip(rows, captions, strict=True):
        coded = caption.encode()[:LENGTH]
        row[: len(coded)] = np.frombuffer(coded, np.uint8)
    return torch.from_numpy(rows)


class CaptionNetwork(nn.Module):
    """Byte embeddings, six convolutions, and three layers: the published code's reader of captions.

    Args:
        outputs: numbers a caption.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        layers: list[nn.Module] = []
        size = 32
        for kernel, pooled in ((7, True), (7, True), (3, False), (3, False), (3, False), (3, True)):
            layers += [nn.Conv1d(size, 64, kernel), nn.ReLU(), *([nn.MaxPool1d(3)] if pooled else [])]
            size = 64
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        flat = self.convolutions(torch.zeros(1, 32, LENGTH)).shape[1]
        self.head = nn.Sequential(
            nn.Linear(flat, 128),
            nn.ReLU(),
            nn.Linear(128, 512),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(512, outputs),
        )

    def forward(self, captions: Tensor) -> Tensor:
        """(n, outputs) of bytes (n, 256)."""
        result: Tensor = self.head(self.convolutions(self.embedding(captions.long()).mT))
        return result


class _NetworkDistiller:
    """What the two networks share: their optimiser, and captions read once."""

    def __init__(self, outputs: int, gate: int, batch_size: int, lr: float, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = CaptionNetwork(outputs)
        self.gate, self.batch_size = gate, batch_size
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=lr)
        self._generator = torch.Generator().manual_seed(seed)

    def _outputs(self, captions: Sequence[str]) -> Tensor:
        """(n, outputs), each different caption read once."""
        different, index = np.unique(np.asarray(captions, object), return_inverse=True)
        self.network.eval()
        with torch.no_grad():
            parts = [self.network(part) for part in encode(list(different)).split(1_024)]
        return torch.cat(parts)[torch.as_tensor(index)]

    def _step(self, loss: Tensor, largest: float | None = None) -> float:
        self._optimizer.zero_grad()
        loss.backward()
        if largest is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), largest)
        self._optimizer.step()
        return float(loss.detach())


class ClassificationDistiller(_NetworkDistiller):
    """1 where a network that learned the labels thinks a caption's chance of label 1 above a threshold.

    Args:
        threshold: of the chance.
        gate: labelled captions from which on the reward is not 0.
        batch_size: captions a gradient step.
        lr: Adam's learning rate.
        seed: of weights and batches.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        *,
        gate: int = GATE,
        batch_size: int = 256,
        lr: float = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__(2, gate, batch_size, lr, seed)
        self.threshold = threshold
        self._captions: list[str] = []
        self._labels: list[int] = []

    def update(self, labels: dict[str, int]) -> None:
        """Take in an annotator's labels."""
        self._captions += labels.keys()
        self._labels += labels.values()

    def learn(self) -> float | None:
        """One gradient step on labelled captions: its cross-entropy; None before the gate."""
        if len(self._labels) < self.gate or not self._labels:
            return None
        rows = torch.randint(len(self._labels), (self.batch_size,), generator=self._generator).tolist()
        self.network.train()
        logits = self.network(encode([self._captions[row] for row in rows]))
        return self._step(functional.cross_entropy(logits, torch.tensor([self._labels[row] for row in rows])))

    def reward(self, captions: Sequence[str]) -> NDArray[np.float64]:
        """Rewards (n,) of n captions."""
        if len(self._labels) < self.gate or not captions:
            return np.zeros(len(captions))
        chance = self._outputs(captions).softmax(dim=1)[:, 1]
        return (chance > self.threshold).double().numpy()


class RankingDistiller(_NetworkDistiller):
    """A score learned from which of two captions is preferred, standardised, and 0 below a threshold.

    The published code computes this and then feeds the raw score to the learner; here what is computed is
    used.

    Args:
        threshold: of the standardised score; -0.5 in the code.
        gate: labelled pairs from which on the reward is not 0.
        batch_size: pairs a gradient step.
        lr: Adam's learning rate.
        seed: of weights and batches.
    """

    def __init__(
        self,
        threshold: float = -0.5,
        *,
        gate: int = GATE,
        batch_size: int = 256,
        lr: float = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__(1, gate, batch_size, lr, seed)
        self.threshold = threshold
        self._pairs: list[tuple[str, str]] = []
        self._labels: list[float] = []
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    def update(self, labels: dict[tuple[str, str], float]) -> None:
        """Take in pairs with the chance that the first is preferred: 1, 0, or 0.5 for a tie.

        Raises:
            UsageError: a label lies outside [0, 1].
        """
        for label in labels.values():
            if not 0 <= label <= 1:
                raise UsageError(f"a pair's label is {label:g}; it must lie between 0 and 1.")
        self._pairs += labels.keys()
        self._labels += labels.values()

    def learn(self) -> float | None:
        """One gradient step: the Bradley-Terry loss of pairs; None before the gate."""
        if len(self._labels) < self.gate or not self._labels:
            return None
        rows = torch.randint(len(self._labels), (self.batch_size,), generator=self._generator).tolist()
        self.network.train()
        first, second = zip(*(self._pairs[row] for row in rows), strict=True)
        scores = self.network(encode([*first, *second]))[:, 0]
        targets = torch.tensor([self._labels[row] for row in rows])
        gaps = scores[: len(rows)] - scores[len(rows) :]
        loss = functional.binary_cross_entropy_with_logits(gaps, targets)
        return self._step(loss, largest=10.0)

    def reward(self, captions: Sequence[str]) -> NDArray[np.float64]:
        """Rewards (n,) of n captions, which also move the mean and the deviation."""
        if len(self._labels) < self.gate or not captions:
            return np.zeros(len(captions))
        scores = self._outputs(captions)[:, 0].double().numpy()
        total = self._count + len(scores)
        shift = scores.mean() - self._mean
        self._squares += float(np.square(scores - scores.mean()).sum())
        self._squares += shift**2 * self._count * len(scores) / total
        self._mean += shift * len(scores) / total
        self._count = total
        deviation = np.sqrt(self._squares / total)
        standard = (scores - self._mean) / (deviation if deviation > 0 else 1.0)
        return np.where(standard >= self.threshold, standard, 0.0)
