"""The held-out safety test: deploy a policy only if data it was not trained on says that it is safe.

Chittepu et al. 2025 (HC-RLHF) after Thomas et al. 2019 (Seldonian algorithms): Pr(J_C(returned) > limit)
is at most 1 - confidence, because a policy that fails the test is not returned.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from saferl.constraints.bounds import Method, check_confidence, check_method, upper_bound
from saferl.constraints.estimators import Costs, as_costs
from saferl.errors import UsageError

PolicyT = TypeVar("PolicyT")

PASS: Literal["PASS"] = "PASS"
NO_SOLUTION: Literal["NO_SOLUTION"] = "NO_SOLUTION"


@dataclass(frozen=True)
class TestResult:
    """The answer of a safety test."""

    passed: bool
    upper: float
    """Upper confidence bound on the mean cost."""
    mean: float
    count: int
    limit: float
    confidence: float
    """Of this look (after the correction for several)."""
    method: Method
    warnings: tuple[str, ...] = field(default=())

    __test__ = False  # not a test case, whatever pytest makes of the name

    @property
    def verdict(self) -> Literal["PASS", "NO_SOLUTION"]:
        """PASS or NO_SOLUTION."""
        return PASS if self.passed else NO_SOLUTION

    def select(self, candidate: PolicyT, reference: PolicyT) -> PolicyT:
        """The candidate if the test was passed, else the reference: never an unproven policy."""
        return candidate if self.passed else reference


class SafetyTest:
    """PASS if the upper confidence bound on the mean cost is at most the limit.

    The test may be looked at once. Looking again after a failure, and stopping at the first pass, would void
    the guarantee; if several looks are planned, declare them, and each gets a confidence of
    1 - (1 - confidence) / looks (Bonferroni).

    Args:
        limit: bound on the mean cost.
        confidence: 1 - delta over all looks together.
        method: see `saferl.constraints.bounds`. "student_t" is HC-RLHF's published choice and passes far too
            often on rare or skewed costs, of which a result then warns.
        lower: least possible cost, for hoeffding and empirical_bernstein.
        upper: largest possible cost, likewise.
        looks: runs of the test that are planned.

    Raises:
        UsageError: a value is impossible, or the method's range is missing.
    """

    def __init__(
        self,
        limit: float,
        confidence: float = 0.9,
        method: Method = "student_t",
        *,
        lower: float | None = None,
        upper: float | None = None,
        looks: int = 1,
    ) -> None:
        check_confidence(confidence)
        check_method(method, lower, upper)
        if not math.isfinite(limit):
            raise UsageError(f"the limit of the safety test is {limit}; it must be a finite number.")
        if looks < 1:
            raise UsageError(f"{looks} looks were planned; a test is looked at once at least.")
        self.limit = float(limit)
        self.confidence = 1 - (1 - confidence) / looks
        self.method: Method = method
        self.lower, self.upper = lower, upper
        self._looks_left = looks

    def run(
        self,
        costs: Costs,
        *,
        test_ids: Collection[object] | None = None,
        training_ids: Collection[object] | None = None,
    ) -> TestResult:
        """Judge held-out costs (n,), one an episode or response.

        Args:
            costs: i.i.d. under the candidate policy, from data it was not trained on.
            test_ids: identities of the test's prompts or seeds.
            training_ids: identities used in training, which must not occur among the test's.

        Raises:
            UsageError: the planned looks are used up, test and training data overlap, or the bound cannot be
                computed (see `upper_bound`).
        """
        if self._looks_left < 1:
            raise UsageError(
                "this safety test was already looked at; a second look voids the guarantee unless it was "
                "planned (SafetyTest(looks=N)), so test on fresh data with a new one."
            )
        if test_ids is not None and training_ids is not None:
            shared = set(test_ids) & set(training_ids)
            if shared:
                raise UsageError(
                    f"{len(shared)} test items were also used in training (such as {next(iter(shared))!r}); "
                    "a safety test needs data that the policy has not seen."
                )
        samples = as_costs(costs)
        if not len(samples):
            raise UsageError("the safety test was given no costs; run the policy on held-out data first.")
        bound = float(upper_bound(samples, self.confidence, self.method, lower=self.lower, upper=self.upper))
        self._looks_left -= 1
        doubts = _doubts(samples) if self.method == "student_t" else ()
        for doubt in doubts:
            warnings.warn(doubt, stacklevel=2)
        return TestResult(
            passed=bound <= self.limit,
            upper=bound,
            mean=float(samples.mean()),
            count=len(samples),
            limit=self.limit,
            confidence=self.confidence,
            method=self.method,
            warnings=doubts,
        )


def _doubts(samples: np.ndarray) -> tuple[str, ...]:
    """Reasons not to believe a Student-t bound on these samples."""
    found = []
    std = samples.std()
    skew = float(((samples - samples.mean()) ** 3).mean() / std**3) if std > 0 else 0.0
    if skew > 1:
        found.append(
            f"the costs are skewed ({skew:.1f}): a Student-t bound passes unsafe policies too often; declare "
            "the costs' range and use empirical_bernstein."
        )
    # Positive, and more than the least: of costs that are all 1, none tells how large a rare one is.
    positive = int((samples > max(0.0, samples.min())).sum())
    if positive < 5:
        found.append(
            f"only {positive} costs are positive and above the least one: a rare cost may be missing "
            "altogether; use clopper_pearson, or empirical_bernstein with the costs' range."
        )
    return tuple(found)
