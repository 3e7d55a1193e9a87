"""Preference as reward (PAR) and the reward shapers it was compared with, against reward hacking.

Fu et al. 2025, "Reward Shaping to Mitigate Reward Hacking in RLHF" (arXiv 2502.18770): a shaped reward should
be bounded, grow fast at first and slowly later, and depend on the reward in excess of a reference response's.
The definitions follow the published code of that paper.

`rewards` r has any shape (...); `references` (..., M) holds the scores of M responses of the SFT model to the
same prompts. Several shapers compose in the published order: ceiling, length penalty, centring, SgFc,
mean-std, clip, ceiling again, min-max, sigmoid or PAR, tanh, polynomial, LSC.

Within a group of responses to one prompt, GRPO subtracts the mean and divides by the standard deviation,
which undoes every positive affine map of the rewards. `centred_reward`, `RunningShaper.mean_std` and
`RunningShaper.min_max` therefore change nothing there beyond rounding; only the nonlinear shapers do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from saferl.errors import NonFiniteError, UsageError

__all__ = [
    "RunningShaper",
    "average_reward_models",
    "ceiling_reward",
    "centred_reward",
    "kl_regularised_optimum",
    "length_penalised_reward",
    "lsc_reward",
    "par_reward",
    "polynomial_reward",
    "regularised_preference_loss",
    "sgfc_reward",
    "sigmoid_reward",
    "tanh_reward",
]


def par_reward(rewards: Tensor, references: Tensor, k: float = 1.0) -> Tensor:
    """PAR: (1/M) sum_m sigmoid(k (r - r_ref^m)), the Bradley-Terry chance to beat the references.

    Lies in (0, 1), increases in r with a slope of at most k/4, and ignores an offset that the reward model
    adds to all responses of a prompt, but not its scale: k is the inverse temperature of the reward model.
    The paper samples 10 references and finds 1 as good. Shapes (...) and (..., M) -> (...); raises
    `UsageError` on other shapes and unless k > 0.
    """
    _check_positive("slope k", k)
    return torch.sigmoid(k * _excess(rewards, references)).mean(dim=-1)


def sgfc_reward(rewards: Tensor, references: Tensor, k: float = 3.0, offset: float = 3.0) -> Tensor:
    """SgFc, "slow growth, fast convergence": (1/M) sum_m sigmoid(k (r - offset - r_ref^m)).

    A control of the paper's second principle, flat where PAR is steep; offset 3 is the code's constant and
    k = 3 the value of the paper's figure. Shapes and errors as in `par_reward`.
    """
    return par_reward(rewards - offset, references, k)


def centred_reward(rewards: Tensor, references: Tensor) -> Tensor:
    """r - mean_m r_ref^m. No effect under GRPO. Shapes and errors as in `par_reward`."""
    return _excess(rewards, references).mean(dim=-1)


def sigmoid_reward(rewards: Tensor, k: float = 1.0) -> Tensor:
    """sigmoid(k r) without a reference: bounded, but saturated wherever scores lie far from 0."""
    _check_positive("slope k", k)
    return torch.sigmoid(k * rewards)


def tanh_reward(rewards: Tensor, references: Tensor) -> Tensor:
    """(1/M) sum_m tanh(r - r_ref^m). Shapes and errors as in `par_reward`."""
    return torch.tanh(_excess(rewards, references)).mean(dim=-1)


def polynomial_reward(rewards: Tensor, references: Tensor) -> Tensor:
    """(1/M) sum_m p(r - r_ref^m), p the polynomial of degree 5 nearest to the sigmoid on [-5, 5].

    Least squares on 100 equidistant points; p is 0 at and below -5 and 1 at and above 5. Fitted as published,
    p leaves [0, 1] and falls in part of the range, so that the shaped reward is not monotone. Shapes and
    errors as in `par_reward`.
    """
    excess = _excess(rewards, references)
    value = torch.zeros_like(excess)
    for coefficient in _sigmoid_polynomial():
        value = value * excess + coefficient
    value = torch.where(excess <= -5, 0.0, torch.where(excess >= 5, 1.0, value))
    return value.mean(dim=-1)


def lsc_reward(rewards: Tensor, references: Tensor, quantile: float = 0.85) -> Tensor:
    """LSC: log sigmoid(r - q), q the quantile of a normal law fitted to the references.

    The fit takes the references' mean and their sample standard deviation plus 1e-5; with one reference the
    deviation counts as 0, so that q is nearly that reference. Shapes and errors as in `par_reward`, and
    `UsageError` unless the quantile lies strictly between 0 and 1.
    """
    _check_references(rewards, references)
    if not 0 < quantile < 1:
        raise UsageError(f"the quantile is {quantile:g}; it must lie strictly between 0 and 1.")
    mean = references.mean(dim=-1)
    spread = references.std(dim=-1) if references.shape[-1] > 1 else torch.zeros_like(mean)
    deviate = torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)).item()
    return functional.logsigmoid(rewards - (mean + deviate * (spread + 1e-5)))


def ceiling_reward(rewards: Tensor, ceiling: float) -> Tensor:
    """min(r, ceiling); the paper tries ceilings of 3, 4 and 5."""
    return rewards.clamp(max=ceiling)


def length_penalised_reward(
    rewards: Tensor, lengths: Tensor, free_tokens: int = 300, per_token: float = 0.01
) -> Tensor:
    """r - per_token max(0, length - free_tokens), on by default in the published code.

    `lengths` are response lengths in tokens, of the rewards' shape; raises `UsageError` on another.
    """
    if lengths.shape != rewards.shape:
        raise UsageError(
            f"the rewards have shape {tuple(rewards.shape)} and the lengths {tuple(lengths.shape)}; "
            "they must be equal."
        )
    return rewards - per_token * (lengths - free_tokens).clamp(min=0)


class RunningShaper:
    """Shapers that depend on all rewards seen so far; each takes the batch in before it shapes it.

    Moments are population moments, merged batch by batch. Use one object for one shaper: two methods called
    on one batch would count it twice.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.low, self.high = math.inf, -math.inf
        self._squares = 0.0

    @property
    def std(self) -> float:
        """The population standard deviation, 0 before the second reward."""
        return math.sqrt(self._squares / self.count) if self.count > 1 else 0.0

    def mean_std(self, rewards: Tensor) -> Tensor:
        """(r - mu) / sigma, divided by 1 where sigma is 0. No effect under GRPO."""
        self._update(rewards)
        return (rewards - self.mean) / (self.std or 1.0)

    def clip(self, rewards: Tensor) -> Tensor:
        """r clipped to [mu - sigma, mu + sigma]."""
        self._update(rewards)
        return rewards.clamp(self.mean - self.std, self.mean + self.std)

    def min_max(self, rewards: Tensor) -> Tensor:
        """(r - min) / (max - min), and 0 while all rewards are equal. No effect under GRPO.

        The published code divides 0 by 0 there, as on a first batch of one reward.
        """
        self._update(rewards)
        return (rewards - self.low) / ((self.high - self.low) or 1.0)

    def state_dict(self) -> dict[str, float]:
        """The state as JSON values once a batch was seen."""
        return {
            "count": self.count,
            "mean": self.mean,
            "squares": self._squares,
            "low": self.low,
            "high": self.high,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore `state_dict`'s answer."""
        self.count, self.mean = int(state["count"]), state["mean"]
        self._squares, self.low, self.high = state["squares"], state["low"], state["high"]

    def _update(self, rewards: Tensor) -> None:
        if rewards.numel() == 0:
            raise UsageError("the batch of rewards is empty; running statistics need at least one.")
        batch = rewards.detach().double()
        if not bool(batch.isfinite().all()):
            raise NonFiniteError("a reward is not finite; it would spoil the running statistics for good.")
        # Exact on equal rewards, where a rounded mean would leave a tiny deviation to divide by.
        low, high = batch.min().item(), batch.max().item()
        mean = low if low == high else batch.mean().item()
        squares = (batch - mean).square().sum().item()
        total = self.count + batch.numel()
        step = mean - self.mean
        self._squares += squares + step**2 * self.count * batch.numel() / total
        self.mean += step * batch.numel() / total
        self.count = total
        self.low, self.high = min(self.low, low), max(self.high, high)


def regularised_preference_loss(chosen: Tensor, rejected: Tensor, coefficient: float = 0.005) -> Tensor:
    """Mean of -log sigmoid(r_c - r_r) + coefficient (r_c^2 + r_r^2), the "Reg" reward-model loss; a scalar.

    The second term fixes the offset that the Bradley-Terry loss leaves open and keeps scores small. Equal
    shapes; raises `UsageError` otherwise.
    """
    if chosen.shape != rejected.shape:
        raise UsageError(
            f"the chosen rewards have shape {tuple(chosen.shape)} and the rejected {tuple(rejected.shape)}; "
            "they must be equal."
        )
    penalty = coefficient * (chosen.square() + rejected.square())
    return (penalty - functional.logsigmoid(chosen - rejected)).mean()


def average_reward_models(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """WARM: the mean of each parameter over the state dicts of several reward models.

    The paper averages 5 models that share their pretraining and differ in seed, learning rate and amount of
    data. Tensors that are not floating (counters, index buffers) must agree and are copied. Raises
    `UsageError` for no model, and for models whose names, shapes or integer tensors differ.
    """
    if not states:
        raise UsageError("there is no reward model to average; give at least one state dict.")
    first = states[0]
    if any(state.keys() != first.keys() for state in states):
        raise UsageError("the reward models have different parameter names; average one architecture only.")
    merged = {}
    for name, value in first.items():
        if any(state[name].shape != value.shape for state in states):
            raise UsageError(f"the parameter {name!r} has different shapes in the reward models.")
        if value.is_floating_point():
            merged[name] = torch.stack([state[name] for state in states]).mean(dim=0)
        elif all(torch.equal(state[name], value) for state in states):
            merged[name] = value.clone()
        else:
            raise UsageError(f"the integer tensor {name!r} differs between the reward models.")
    return merged


def kl_regularised_optimum(shaper: Callable[[Tensor], Tensor], beta: float) -> float:
    """The mean mu >= 0 that maximises s(mu) - beta mu^2 / 2: how far a shaped reward drives a policy.

    A policy N(mu, 1) with KL penalty beta towards N(0, 1), whose reward is its own mean before shaping. The
    vanilla reward ends at 1/beta; a bounded shaper stays where its slope equals beta mu.

    Args:
        shaper: s, differentiable, from a scalar double tensor to one, concave on mu >= 0.
        beta: the KL coefficient, positive.

    Raises:
        UsageError: beta is not positive, or the shaped reward outgrows the penalty.
    """
    _check_positive("KL coefficient beta", beta)

    def ascent(mu: float) -> float:
        with torch.enable_grad():
            point = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(shaper(point), point)
        return slope.item() - beta * mu

    if ascent(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while ascent(high) > 0:
        low, high = high, 2 * high
        if high > 1e15:
            raise UsageError("the shaped reward outgrows the KL penalty; there is no optimum.")
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if ascent(middle) > 0 else (low, middle)
    return 0.5 * (low + high)


@functools.cache
def _sigmoid_polynomial() -> tuple[float, ...]:
    """Coefficients of the polynomial of `polynomial_reward`, highest degree first."""
    points = np.linspace(-5.0, 5.0, 100)
    return tuple(float(c) for c in np.polyfit(points, 1 / (1 + np.exp(-points)), 5))


def _excess(rewards: Tensor, references: Tensor) -> Tensor:
    """r - r_ref^m, (..., M)."""
    _check_references(rewards, references)
    return rewards.unsqueeze(-1) - references


def _check_references(rewards: Tensor, references: Tensor) -> None:
    if references.shape[:-1] != rewards.shape or references.dim() == 0 or references.shape[-1] == 0:
        raise UsageError(
            f"the references have shape {tuple(references.shape)}; rewards of shape {tuple(rewards.shape)} "
            "need that shape and one more axis, with at least one reference."
        )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"the {name} is {value:g}; it must be positive and finite.")
