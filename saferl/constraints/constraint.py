"""A constraint joins a limit, an estimator of the cost and a multiplier; several form a set.

The control agents and the language trainers call exactly these `observe` and `update`; only who supplies
the costs differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from saferl.constraints.estimators import BatchEstimator, Costs, Estimate, Estimator, UpperBoundEstimator
from saferl.constraints.multipliers import AdditiveMultiplier, Multiplier
from saferl.errors import UsageError, unknown_name


class Constraint:
    """E[C] <= limit, priced by a multiplier.

    Args:
        name: under which metrics are logged and costs are observed.
        limit: bound on the mean cost, in the cost's own units (undiscounted episode cost for agents).
        estimator: turns observed costs into an estimate; the last batch's mean by default.
        multiplier: follows the violation; `AdditiveMultiplier()` by default.
        warmup_updates: updates that leave the multiplier as it is, while the estimate settles.

    Raises:
        UsageError: the limit is not finite, or the number of warm-up updates is negative.
    """

    def __init__(
        self,
        name: str,
        limit: float,
        *,
        estimator: Estimator | None = None,
        multiplier: Multiplier | None = None,
        warmup_updates: int = 0,
    ) -> None:
        if not abs(limit) < float("inf"):
            raise UsageError(f"the limit of {name!r} is {limit}; it must be a finite number.")
        if warmup_updates < 0:
            raise UsageError(f"warmup_updates is {warmup_updates}; it must be zero or more.")
        self.name = name
        self.limit = float(limit)
        self.estimator: Estimator = BatchEstimator() if estimator is None else estimator
        self.multiplier: Multiplier = AdditiveMultiplier() if multiplier is None else multiplier
        self.warmup_updates = warmup_updates
        self._updates = 0

    @property
    def value(self) -> float:
        """The current multiplier, at least 0."""
        return self.multiplier.value

    @property
    def estimate(self) -> Estimate | None:
        """What is known of the cost, None before the first observation."""
        return self.estimator.estimate()

    @property
    def violation(self) -> float:
        """Estimate minus limit, positive when violated; 0 before the first observation."""
        estimate = self.estimate
        return 0.0 if estimate is None else estimate.value - self.limit

    def observe(self, costs: Costs, mask: Costs | None = None) -> None:
        """Take in costs of finished episodes or sequences, shape (B,), B >= 0."""
        self.estimator.update(costs, mask)

    def update(self) -> float:
        """Move the multiplier along the violation and return it.

        It stays as it is during warm-up and as long as nothing was ever observed; without new costs the
        last estimate counts again.
        """
        estimate = self.estimate
        if estimate is None:
            return self.value
        self._updates += 1
        if self._updates <= self.warmup_updates:
            return self.value
        return self.multiplier.update(estimate.value, self.limit)

    def metrics(self) -> dict[str, float]:
        """Scalars to log under `constraint/NAME/...`; `bound` where the estimate is an upper bound."""
        prefix = f"constraint/{self.name}"
        metrics = {f"{prefix}/limit": self.limit, f"{prefix}/multiplier": self.value}
        estimate = self.estimate
        if estimate is not None:
            metrics[f"{prefix}/mean"] = estimate.mean
            metrics[f"{prefix}/std"] = estimate.std
            metrics[f"{prefix}/violation"] = estimate.value - self.limit
            if isinstance(self.estimator, UpperBoundEstimator):
                metrics[f"{prefix}/bound"] = estimate.value
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {
            "estimator": self.estimator.state_dict(),
            "multiplier": self.multiplier.state_dict(),
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.estimator.load_state_dict(state["estimator"])
        self.multiplier.load_state_dict(state["multiplier"])
        self._updates = int(state["updates"])


class ConstraintSet:
    """Several constraints, observed and updated together; iterates over them in order.

    Raises `UsageError` when two share a name.
    """

    def __init__(self, constraints: Iterable[Constraint]) -> None:
        self._constraints: dict[str, Constraint] = {}
        for constraint in constraints:
            if constraint.name in self._constraints:
                raise UsageError(
                    f"two constraints are named {constraint.name!r}; give each a name of its own."
                )
            self._constraints[constraint.name] = constraint

    def __iter__(self) -> Iterator[Constraint]:
        return iter(self._constraints.values())

    def __len__(self) -> int:
        return len(self._constraints)

    def __getitem__(self, name: str) -> Constraint:
        if name not in self._constraints:
            raise unknown_name("constraint", name, self._constraints)
        return self._constraints[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(self._constraints)

    @property
    def multipliers(self) -> dict[str, float]:
        """Current multipliers by name."""
        return {c.name: c.value for c in self}

    @property
    def limits(self) -> dict[str, float]:
        """Limits by name."""
        return {c.name: c.limit for c in self}

    def observe(self, costs: Mapping[str, Costs]) -> None:
        """Take in costs by name, each (B,).

        Raises `UsageError` for a cost without a constraint or a constraint without its cost.
        """
        for name in costs:
            self[name]
        missing = [name for name in self._constraints if name not in costs]
        if missing:
            raise UsageError(
                f"no costs were given for the constraint {missing[0]!r}; pass an array, even if empty."
            )
        for name, values in costs.items():
            self._constraints[name].observe(values)

    def update(self) -> dict[str, float]:
        """Move every multiplier along its own violation; returns them by name."""
        return {c.name: c.update() for c in self}

    def metrics(self) -> dict[str, float]:
        """Scalars of all constraints."""
        return {name: value for c in self for name, value in c.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        """States by name, as JSON values."""
        return {c.name: c.state_dict() for c in self}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer; `UsageError` when the names differ."""
        if set(state) != set(self._constraints):
            raise UsageError(
                f"the stored constraints are {sorted(state)}, these are {sorted(self._constraints)}; "
                "use the same names."
            )
        for name, values in state.items():
            self._constraints[name].load_state_dict(values)
