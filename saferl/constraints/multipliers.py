"""Multipliers: from a cost and its limit to the price lambda >= 0 of violating it.

All of them take plain numbers, `update(cost, limit)`, and keep their state as JSON values, so that the
same object serves an agent's episode costs and a language model's response costs. J is the cost and
d the limit below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from saferl.errors import UsageError


class Multiplier(Protocol):
    """A price that follows a constraint's violation."""

    @property
    def value(self) -> float:
        """The current multiplier, at least 0."""
        ...

    def update(self, cost: float, limit: float) -> float:
        """Move along the violation cost - limit and return the new value."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values; a round trip reproduces the next update bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        ...


def _check(cost: float, limit: float) -> float:
    violation = cost - limit
    if not math.isfinite(violation):
        raise UsageError(f"the multiplier was given cost {cost} and limit {limit}; both must be finite.")
    return violation


def _check_init(init: float, maximum: float | None) -> None:
    top = math.inf if maximum is None else maximum
    if not 0 <= init <= top or math.isinf(init):
        raise UsageError(
            f"the initial multiplier is {init:g}; it must be finite, at least 0 and at most {top:g}."
        )


def _check_rate(lr: float) -> None:
    if not 0 < lr < math.inf:
        raise UsageError(f"the multiplier's learning rate is {lr:g}; it must be positive and finite.")


def _clip(value: float, maximum: float | None) -> float:
    return max(0.0, value if maximum is None else min(value, maximum))


class _Stateful:
    """State as attributes named in `_state`, all JSON values."""

    _state: tuple[str, ...] = ("value",)
    value: float

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._state:
            setattr(self, name, state[name])


class _Adam:
    """torch.optim.Adam on one number (betas 0.9 and 0.999, eps 1e-8), in the same order of operations."""

    def __init__(self) -> None:
        self.first, self.second, self.count = 0.0, 0.0, 0

    def step(self, gradient: float, lr: float) -> float:
        """The change of the parameter for a descent step."""
        self.count += 1
        self.first += (gradient - self.first) * (1 - 0.9)
        self.second = self.second * 0.999 + (1 - 0.999) * gradient * gradient
        denominator = math.sqrt(self.second) / math.sqrt(1 - 0.999**self.count) + 1e-8
        return -(lr / (1 - 0.9**self.count)) * (self.first / denominator)


class _AdamStateful(_Stateful):
    """Adds Adam's moments to the state, as `_moments`."""

    _adam: _Adam

    @property
    def _moments(self) -> list[float]:
        return [self._adam.first, self._adam.second, self._adam.count]

    @_moments.setter
    def _moments(self, moments: list[float]) -> None:
        self._adam.first, self._adam.second = float(moments[0]), float(moments[1])
        self._adam.count = int(moments[2])


class AdditiveMultiplier(_AdamStateful):
    """lambda <- clip(lambda + step, 0, maximum): gradient ascent on the Lagrangian.

    With "sgd" the step is lr (J - d), projected gradient ascent. With "adam", the default of OmniSafe and
    Safe-Policy-Optimization, it is Adam's: the first step is +-lr whatever the size of the violation, and
    after safe updates the momentum can hold the multiplier at 0 although the cost is above the limit.

    Args:
        lr: step size.
        init: initial multiplier.
        maximum: upper bound, None for none (FOCOPS and CUP use 2).
        optimizer: "adam" or "sgd".
    """

    _state = ("value", "_moments")

    def __init__(
        self,
        lr: float = 0.035,
        init: float = 0.001,
        maximum: float | None = None,
        optimizer: Literal["adam", "sgd"] = "adam",
    ) -> None:
        _check_rate(lr)
        _check_init(init, maximum)
        if optimizer not in ("adam", "sgd"):
            raise UsageError(f"the multiplier's optimizer is {optimizer!r}; it must be 'adam' or 'sgd'.")
        self.lr, self.maximum, self.optimizer = lr, maximum, optimizer
        self.value = float(init)
        self._adam = _Adam()

    def update(self, cost: float, limit: float) -> float:
        violation = _check(cost, limit)
        step = self._adam.step(-violation, self.lr) if self.optimizer == "adam" else self.lr * violation
        self.value = _clip(self.value + step, self.maximum)
        return self.value


class SoftplusMultiplier(_AdamStateful):
    """lambda = log(1 + e^p), p moved by Adam on the loss -p (J - d): safety-starter-agents' parameter.

    The loss has no sigmoid factor ("param loss" of that code). Ray, Achiam and Amodei 2019.
    """

    _state = ("_parameter", "_moments")

    def __init__(self, lr: float = 0.05, init: float = 1.0) -> None:
        _check_rate(lr)
        if not 0 < init < math.inf:
            raise UsageError(
                f"the initial multiplier is {init:g}; a softplus is positive and finite, so it must be too."
            )
        self.lr = lr
        self._parameter = init + math.log(-math.expm1(-init))  # log(e^init - 1) without overflow
        self._adam = _Adam()

    @property
    def value(self) -> float:  # type: ignore[override]
        """log(1 + e^p), without overflow for large p."""
        return max(self._parameter, 0.0) + math.log1p(math.exp(-abs(self._parameter)))

    @property
    def parameter(self) -> float:
        """The unconstrained p."""
        return self._parameter

    def update(self, cost: float, limit: float) -> float:
        self._parameter += self._adam.step(-_check(cost, limit), self.lr)
        return self.value


class LogMultiplier(_Stateful):
    """lambda <- lambda exp(lr lambda (J - d)), clipped to [minimum, maximum]: Safe RLHF and HC-RLHF.

    SGD on nu = log lambda with loss -(J - d) e^nu (Dai et al. 2023, trainer of the reference code). It can
    neither reach 0 nor leave it, regains slowly what slack took, and blows up in finite time under a lasting
    violation: give a maximum (5 in Safe RLHF's runs).

    Args:
        lr: step size on log lambda.
        init: initial multiplier, positive.
        minimum: lower bound, None for none.
        maximum: upper bound, None for none (the value still stays finite).
    """

    _state = ("_log",)

    def __init__(
        self, lr: float = 0.1, init: float = 1.0, minimum: float | None = None, maximum: float | None = None
    ) -> None:
        _check_rate(lr)
        if minimum is not None and not minimum > 0:
            raise UsageError(f"the least multiplier is {minimum:g}; in log space it must be positive.")
        low, high = minimum or 0.0, math.inf if maximum is None else maximum
        if not 0 < init < math.inf or not low <= init <= high:
            raise UsageError(
                f"the initial multiplier is {init:g}; it must be positive and within its bounds."
            )
        self.lr = lr
        # exp of +-700 stays a positive, finite double.
        self._low = -700.0 if minimum is None else max(-700.0, math.log(minimum))
        self._high = 700.0 if maximum is None else min(700.0, math.log(maximum))
        self._maximum = maximum
        self._minimum = minimum
        self._log = math.log(init)

    @property
    def value(self) -> float:  # type: ignore[override]
        """e^nu; a bound that is reached is returned exactly."""
        value = math.exp(self._log)
        if self._maximum is not None and (self._log >= self._high or value > self._maximum):
            return self._maximum
        if self._minimum is not None and (self._log <= self._low or value < self._minimum):
            return self._minimum
        return value

    def update(self, cost: float, limit: float) -> float:
        # In this order an overflow is infinite and is clipped; lr lambda first could give inf * 0.
        step = self.lr * _check(cost, limit) * self.value
        self._log = min(max(self._log + step, self._low), self._high)
        return self.value


class PIDMultiplier(_Stateful):
    """PID control of the multiplier (Stooke, Achiam and Abbeel 2020), by OmniSafe's recursion.

        delta = J - d
        I <- max(0, I + ki delta)                       (clipped to [0, 1] for norm "convex")
        P <- ema_p P + (1 - ema_p) delta
        C <- ema_d C + (1 - ema_d) x,                   x = J, or delta for derivative "violation"
        D = max(0, C - C[`delay` updates ago])
        lambda = max(0, kp P + I + kd D)                (at most 1 for "convex", `maximum` for "none")

    P and C start at 0 and the delay line holds a single 0, so D kicks at the start. The value before the
    first update is `init` (0 in OmniSafe, which always updates first). With derivative "violation", no
    smoothing and delay 1 this is FSRL's controller.

    Args:
        kp: proportional gain.
        ki: integral gain.
        kd: derivative gain.
        ema_p: smoothing of P.
        ema_d: smoothing of the derivative's input.
        delay: updates over which the difference is taken.
        init: initial integral term.
        maximum: cap on lambda, applied for norm "none" alone, as in OmniSafe.
        norm: how `scalarise` will combine advantages.
        derivative: what D differentiates.
        one_sided: take max(0, P) for P in lambda, as OSRL does, so that a kept limit lowers it by I alone.
    """

    _state = ("value", "_integral", "_proportional", "_smoothed", "_history")

    def __init__(
        self,
        kp: float = 0.1,
        ki: float = 0.01,
        kd: float = 0.01,
        ema_p: float = 0.95,
        ema_d: float = 0.95,
        delay: int = 10,
        init: float = 0.001,
        maximum: float = 100.0,
        norm: Literal["sum", "convex", "none"] = "sum",
        derivative: Literal["cost", "violation"] = "cost",
        one_sided: bool = False,
    ) -> None:
        if norm not in ("sum", "convex", "none"):
            raise UsageError(f"unknown norm {norm!r}; use none, sum or convex.")
        if derivative not in ("cost", "violation"):
            raise UsageError(f"unknown derivative {derivative!r}; use cost or violation.")
        _check_init(init, {"sum": None, "convex": 1.0, "none": maximum}[norm])
        if not min(kp, ki, kd) >= 0:
            raise UsageError("the gains kp, ki and kd must be zero or more.")
        if not (0 <= ema_p < 1 and 0 <= ema_d < 1):
            raise UsageError("the smoothing factors ema_p and ema_d must be at least 0 and less than 1.")
        if delay < 1:
            raise UsageError(f"the delay is {delay}; the derivative needs at least 1 update.")
        self.kp, self.ki, self.kd = kp, ki, kd
        self.ema_p, self.ema_d, self.delay = ema_p, ema_d, delay
        self.maximum, self.norm, self.derivative = maximum, norm, derivative
        self.one_sided = one_sided
        self.value = float(init)
        self._integral = float(init)
        self._proportional = 0.0
        self._smoothed = 0.0
        self._history: list[float] = [0.0]

    def update(self, cost: float, limit: float) -> float:
        delta = _check(cost, limit)
        integral = max(0.0, self._integral + self.ki * delta)
        self._integral = min(integral, 1.0) if self.norm == "convex" else integral
        self._proportional = self.ema_p * self._proportional + (1 - self.ema_p) * delta
        source = cost if self.derivative == "cost" else delta
        self._smoothed = self.ema_d * self._smoothed + (1 - self.ema_d) * source
        difference = max(0.0, self._smoothed - self._history[0])
        proportional = max(0.0, self._proportional) if self.one_sided else self._proportional
        value = max(0.0, self.kp * proportional + self._integral + self.kd * difference)
        if self.norm == "convex":
            value = min(value, 1.0)
        elif self.norm == "none":
            value = min(value, self.maximum)
        self._history = [*self._history, self._smoothed][-self.delay :]
        self.value = value
        return value

    @property
    def terms(self) -> dict[str, float]:
        """The integral, the smoothed violation and the smoothed cost after the last update."""
        return {"integral": self._integral, "proportional": self._proportional, "smoothed": self._smoothed}


class AugmentedLagrangianMultiplier(_Stateful):
    """lambda <- clip(lambda + c g, 0, maximum), c <- min(c (1 + growth), max_penalty), g = J - d.

    Nocedal and Wright 2006, equation 17.65, as in safe-learning's penaliser. `penalty` is the term that the
    objective loses; the value after an update equals its slope at that violation.

    Args:
        penalty_coef: initial c.
        init: initial multiplier.
        growth: relative growth of c at each update.
        max_penalty: upper bound of c.
        maximum: upper bound of the multiplier.

    The bounds 100 and 1 are that code's constants; the initial c and its growth are ours.
    """

    _state = ("value", "penalty_coef")

    def __init__(
        self,
        penalty_coef: float = 1e-3,
        init: float = 0.0,
        growth: float = 1e-4,
        max_penalty: float = 1.0,
        maximum: float = 100.0,
    ) -> None:
        _check_init(init, maximum)
        if not penalty_coef > 0 or not growth >= 0:
            raise UsageError("the penalty coefficient must be positive and its growth zero or more.")
        self.value = float(init)
        self.penalty_coef = float(penalty_coef)
        self.growth, self.max_penalty, self.maximum = growth, max_penalty, maximum

    def penalty(self, violation: float) -> float:
        """psi(g) = lambda g + c g^2 / 2 where lambda + c g > 0, else -lambda^2 / (2 c); C^1 in g."""
        if self.value + self.penalty_coef * violation > 0:
            return self.value * violation + 0.5 * self.penalty_coef * violation**2
        return -(self.value**2) / (2 * self.penalty_coef)

    def update(self, cost: float, limit: float) -> float:
        self.value = _clip(self.value + self.penalty_coef * _check(cost, limit), self.maximum)
        grown = self.penalty_coef * (1 + self.growth)
        self.penalty_coef = max(self.penalty_coef, min(grown, self.max_penalty))
        return self.value


class ProportionalMultiplier(_Stateful):
    """coef <- coef (1 + clip(J / d - 1, -clip, clip) samples / horizon): the adaptive KL coefficient.

    Ziegler et al. 2019, as coded in OpenRLHF. The limit is the target and must be positive.

    Args:
        init: initial coefficient, positive.
        horizon: samples over which the coefficient adapts.
        clip: largest relative error acted on.
        samples: samples an update stands for.
    """

    def __init__(self, init: float, horizon: float, clip: float = 0.2, samples: float = 1.0) -> None:
        # samples * clip < horizon keeps the factor, and with it the coefficient, positive.
        if not (0 < init < math.inf and clip > 0 and samples > 0 and samples * clip < horizon):
            raise UsageError(
                "init, horizon, clip and samples must be positive, and samples * clip less than the horizon."
            )
        self.value = float(init)
        self.horizon, self.samples, self.clip = horizon, samples, clip

    def update(self, cost: float, limit: float) -> float:
        _check(cost, limit)
        if not limit > 0:
            raise UsageError(f"the target of a proportional multiplier is {limit:g}; it must be positive.")
        error = min(max(cost / limit - 1.0, -self.clip), self.clip)
        self.value *= 1.0 + error * self.samples / self.horizon
        return self.value


class FixedMultiplier(_Stateful):
    """A price that does not move: the penalty coefficient of reward shaping."""

    def __init__(self, value: float) -> None:
        _check_init(value, None)
        self.value = float(value)

    def update(self, cost: float, limit: float) -> float:
        _check(cost, limit)
        return self.value
