"""Estimators: from the costs of finished episodes or sequences to the number a multiplier sees.

They take arrays of costs and know neither environment nor model: an agent feeds them episode costs, a
language trainer the cost model's score of every response.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from saferl.constraints import bounds
from saferl.errors import UsageError

Costs: TypeAlias = Any
"""One-dimensional costs: a list, a NumPy array or a torch tensor on any device."""


@dataclass(frozen=True)
class Estimate:
    """What is known of a mean cost."""

    mean: float
    std: float
    """Sample standard deviation (n - 1 in the denominator); 0 for a single cost."""
    count: int
    """Costs that the estimate rests on."""
    value: float
    """What the multiplier sees: the mean, or an upper bound on it."""


class Estimator(Protocol):
    """Keeps costs and answers with an estimate of their mean."""

    def update(self, costs: Costs, mask: Costs | None = None) -> None:
        """Take in costs of shape (B,); entries where `mask` is False are left out. B may be 0."""
        ...

    def estimate(self) -> Estimate | None:
        """The current estimate, None until a cost was seen."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        ...


def as_costs(costs: Costs, mask: Costs | None = None) -> np.ndarray:
    """Costs as a float64 vector without the masked entries.

    Raises `UsageError` unless costs (and mask) have one shape (B,) and every cost kept is finite.
    """
    vector = _to_numpy(costs).astype(np.float64)
    if vector.ndim != 1:
        raise UsageError(
            f"costs have shape {vector.shape}; pass one cost an episode or sequence, shape (B,)."
        )
    if mask is not None:
        keep = _to_numpy(mask).astype(bool)
        if keep.shape != vector.shape:
            raise UsageError(
                f"the mask has shape {keep.shape}, the costs {vector.shape}; they must be equal."
            )
        vector = vector[keep]
    if not np.isfinite(vector).all():
        raise UsageError("a cost is NaN or infinite; mask it out or mend what computes it.")
    return vector


def _to_numpy(values: Costs) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor, without importing torch
        values = values.detach().cpu()
    return np.asarray(values)


def _describe(costs: Sequence[float] | np.ndarray) -> Estimate | None:
    vector = np.asarray(costs, dtype=np.float64)
    if not len(vector):
        return None
    mean = float(vector.mean())
    std = float(vector.std(ddof=1)) if len(vector) > 1 else 0.0
    return Estimate(mean, std, len(vector), mean)


class BatchEstimator:
    """The mean of the last batch that was not empty: an update without finished episodes changes nothing."""

    def __init__(self) -> None:
        self._costs: list[float] = []

    def update(self, costs: Costs, mask: Costs | None = None) -> None:
        vector = as_costs(costs, mask)
        if len(vector):
            self._costs = vector.tolist()

    def estimate(self) -> Estimate | None:
        return _describe(self._costs)

    def state_dict(self) -> dict[str, Any]:
        return {"costs": self._costs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._costs = [float(c) for c in state["costs"]]


class WindowEstimator:
    """The mean of the last `size` costs.

    OmniSafe's agents use the last 100 episodes, Safe RLHF the last 128 responses. A long window delays
    the multiplier, which then oscillates.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UsageError(f"the cost window is {size}; it must hold at least one cost.")
        self.size = size
        self._costs: list[float] = []

    def update(self, costs: Costs, mask: Costs | None = None) -> None:
        self._costs = [*self._costs, *as_costs(costs, mask).tolist()][-self.size :]

    def estimate(self) -> Estimate | None:
        return _describe(self._costs)

    def state_dict(self) -> dict[str, Any]:
        return {"costs": self._costs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._costs = [float(c) for c in state["costs"]][-self.size :]


class EMAEstimator:
    """Exponential moving averages of the batch mean and of the batch's mean square.

    m <- decay m + (1 - decay) mean(costs), starting at the first batch's own mean (no bias towards 0);
    the standard deviation is that of the two averages, sqrt(E[c^2] - m^2). `count` is the number of
    costs ever seen. SAFE smooths its KL with decay 0.9.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"the decay is {decay:g}; it must be at least 0 and less than 1.")
        self.decay = decay
        self._mean = 0.0
        self._square = 0.0
        self._count = 0

    def update(self, costs: Costs, mask: Costs | None = None) -> None:
        vector = as_costs(costs, mask)
        if not len(vector):
            return
        decay = self.decay if self._count else 0.0
        self._mean = decay * self._mean + (1 - decay) * float(vector.mean())
        self._square = decay * self._square + (1 - decay) * float((vector**2).mean())
        self._count += len(vector)

    def estimate(self) -> Estimate | None:
        if not self._count:
            return None
        std = math.sqrt(max(0.0, self._square - self._mean**2))
        return Estimate(self._mean, std, self._count, self._mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "square": self._square, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean, self._square = float(state["mean"]), float(state["square"])
        self._count = int(state["count"])


class UpperBoundEstimator:
    """A pessimistic estimate while training: mean + kappa std instead of the mean (HC-RLHF).

    kappa = c1 t_{1-delta, n-1} / sqrt(n) + c2 t_{1-delta, n_s-1} / sqrt(n_s),    delta = 1 - confidence

    with n the costs behind the inner estimate and n_s = `test_size` the planned size of the held-out
    safety set (left out when None). With c1 = 1 and no test size this is the one-sided Student-t
    bound. Source: HC-RLHF's reference code; its runs use c1 = 4, c2 = 2.

    Args:
        inner: the estimator bounded.
        confidence: 1 - delta of each term.
        c1: factor of the estimate's own uncertainty.
        c2: factor of the coming test's uncertainty.
        test_size: costs that the safety test will see.
    """

    def __init__(
        self,
        inner: Estimator,
        confidence: float = 0.9,
        *,
        c1: float = 1.0,
        c2: float = 1.0,
        test_size: int | None = None,
    ) -> None:
        bounds.check_confidence(confidence)
        self.inner = inner
        self.confidence = confidence
        self.c1, self.c2, self.test_size = c1, c2, test_size

    def kappa(self, count: int) -> float:
        """The factor of the standard deviation; infinite for fewer than two costs."""
        total = self.c1 * bounds.student_t_factor(count, self.confidence)
        if self.test_size is not None:
            total += self.c2 * bounds.student_t_factor(self.test_size, self.confidence)
        return total

    def update(self, costs: Costs, mask: Costs | None = None) -> None:
        self.inner.update(costs, mask)

    def estimate(self) -> Estimate | None:
        """None until two costs were seen: a single one bounds nothing."""
        inner = self.inner.estimate()
        if inner is None or inner.count < 2:
            return None
        return Estimate(inner.mean, inner.std, inner.count, inner.mean + self.kappa(inner.count) * inner.std)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
