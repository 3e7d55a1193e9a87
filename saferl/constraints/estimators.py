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
    if hasattr(values, "detach"):  # a tensor, without importing torch; NumPy knows no bfloat16
        values = values.detach().cpu().double()
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

    @property
    def costs(self) -> list[float]:
        """The costs that the estimate rests on."""
        return list(self._costs)

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

    @property
    def costs(self) -> list[float]:
        """The costs that the estimate rests on, oldest first."""
        return list(self._costs)

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

        m <- decay m + (1 - decay) mean(costs),    likewise q of costs^2
        std = sqrt((q - m^2) / (1 - sum w^2)),     count = floor(1 / sum w^2)

    Both start at the first batch's own averages (no bias towards 0). w are the weights that the average
    gives to single costs, so `count` is Kish's effective sample size and not the number ever seen: a
    bound on the average does not shrink for ever. SAFE smooths its KL with decay 0.9.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"the decay is {decay:g}; it must be at least 0 and less than 1.")
        self.decay = decay
        self._mean = 0.0
        self._square = 0.0
        self._weights = 0.0  # sum of squared weights; 0 as long as nothing was seen

    def update(self, costs: Costs, mask: Costs | None = None) -> None:
        vector = as_costs(costs, mask)
        if not len(vector):
            return
        decay = self.decay if self._weights else 0.0
        self._mean = decay * self._mean + (1 - decay) * float(vector.mean())
        self._square = decay * self._square + (1 - decay) * float((vector**2).mean())
        self._weights = decay**2 * self._weights + (1 - decay) ** 2 / len(vector)

    def estimate(self) -> Estimate | None:
        if not self._weights:
            return None
        count = int(1 / self._weights + 1e-9)  # the inverse of 1 / 49 is a little less than 49
        variance = max(0.0, self._square - self._mean**2)
        std = math.sqrt(variance / (1 - self._weights)) if count > 1 else 0.0
        return Estimate(self._mean, std, count, self._mean)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "square": self._square, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean, self._square = float(state["mean"]), float(state["square"])
        self._weights = float(state["weights"])


class UpperBoundEstimator:
    """A pessimistic estimate while training: an upper confidence bound instead of the mean.

    Method "student_t" is the mean + kappa std of HC-RLHF's reference code (its runs use c1 = 4, c2 = 2),

        kappa = c1 t_{1-delta, n-1} / sqrt(n) + c2 t_{1-delta, n_s-1} / sqrt(n_s),   delta = 1 - confidence

    with n the costs behind the inner estimate and n_s = `test_size` the planned size of the held-out
    safety set (left out when None); c1 = 1 without a test size is the one-sided Student-t bound. Other
    methods bound the costs that a `BatchEstimator` or `WindowEstimator` holds, by `upper_bound`.

    Args:
        inner: the estimator bounded.
        confidence: 1 - delta of each term.
        method: see `saferl.constraints.bounds`.
        c1: factor of the estimate's own uncertainty.
        c2: factor of the coming test's uncertainty.
        test_size: costs that the safety test will see.
        lower: least possible cost, for hoeffding and empirical_bernstein.
        upper: largest possible cost, likewise.

    Raises:
        UsageError: an argument is impossible, or belongs to another method.
    """

    def __init__(
        self,
        inner: Estimator,
        confidence: float = 0.9,
        method: bounds.Method = "student_t",
        *,
        c1: float = 1.0,
        c2: float = 1.0,
        test_size: int | None = None,
        lower: float | None = None,
        upper: float | None = None,
    ) -> None:
        bounds.check_confidence(confidence)
        bounds.check_method(method, lower, upper)
        if not min(c1, c2) >= 0 or (test_size is not None and test_size < 2):
            raise UsageError("c1 and c2 must be zero or more, and the test size at least 2 costs.")
        if method != "student_t" and not hasattr(inner, "costs"):
            raise UsageError(
                f"{method} needs the costs themselves, which {type(inner).__name__} does not keep; use a "
                "WindowEstimator, or student_t."
            )
        if method != "student_t" and (c1 != 1 or test_size is not None):
            raise UsageError(f"c1, c2 and test_size belong to student_t; leave them out for {method}.")
        self.inner = inner
        self.confidence = confidence
        self.method: bounds.Method = method
        self.lower, self.upper = lower, upper
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
        """None also where the bound is infinite, as of a single cost: the multiplier then stays."""
        inner = self.inner.estimate()
        if inner is None:
            return None
        if self.method == "student_t":
            bound = inner.mean + self.kappa(inner.count) * inner.std if inner.count > 1 else math.inf
        else:
            costs = self.inner.costs  # type: ignore[attr-defined]  # checked in __init__
            bound = float(
                bounds.upper_bound(costs, self.confidence, self.method, lower=self.lower, upper=self.upper)
            )
        return Estimate(inner.mean, inner.std, inner.count, bound) if math.isfinite(bound) else None

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
