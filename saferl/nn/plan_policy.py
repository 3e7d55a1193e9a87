"""Diffusion over plans of H steps, and the policy that acts by the first action of the best plan.

A plan is x (H, A + S), rows (a_t, s_t), actions and observations each in [-1, 1]; its first observation is
always the true one. Forward process, with alpha_bar the running product of alpha = 1 - beta:

    x_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) eps,        eps ~ N(0, I),  t = 0 ... T-1

on the cosine schedule of Nichol and Dhariwal 2021. The network answers with x itself (Janner et al. 2022).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import ArrayLike
from torch import Tensor, nn

from saferl.errors import UsageError
from saferl.nn.batched import BatchedMLPs
from saferl.nn.distributions import action_distribution
from saferl.nn.mish import Mish
from saferl.nn.spaces import ObservationEncoder, space_from_json, space_to_json

__all__ = ["CosineSchedule", "PlanPolicy", "PlanValues", "TemporalUNet", "choose_plan", "overspend_weight"]

_TIME_FEATURES = 32


class CosineSchedule(nn.Module):
    """Noise levels with alpha_bar(u) = cos^2((u + 0.008) / 1.008 pi / 2) at u = (t + 1) / T, over that at 0.

    All attributes are float32 tensors (T,), computed in float64 and not stored in checkpoints. `variances`
    are those of x_{t-1} given x_t and x; its mean is `x_shares` x + `noisy_shares` x_t. beta is at most
    0.999.
    """

    alpha_bars: Tensor
    variances: Tensor
    x_shares: Tensor
    noisy_shares: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        levels = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - levels[1:] / levels[:-1], 0.999)
        after = np.cumprod(1 - betas)
        before = np.concatenate([[1.0], after[:-1]])
        for name, values in (
            ("alpha_bars", after),
            ("variances", betas * (1 - before) / (1 - after)),
            ("x_shares", np.sqrt(before) * betas / (1 - after)),
            ("noisy_shares", np.sqrt(1 - betas) * (1 - before) / (1 - after)),
        ):
            self.register_buffer(name, torch.from_numpy(values).float(), persistent=False)

    def __len__(self) -> int:
        return len(self.alpha_bars)

    def add_noise(self, plans: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x_t of plans (B, H, D) with noise (B, H, D) at the steps t (B,)."""
        kept = self.alpha_bars[steps][:, None, None]
        return kept.sqrt() * plans + (1 - kept).sqrt() * noise


def time_features(steps: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines (B, size) of steps (B,), of wavelengths from 2 pi to 20,000 pi."""
    half = size // 2
    rates = torch.exp(-math.log(10_000) / max(half - 1, 1) * torch.arange(half, device=steps.device))
    angles = steps[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)


class TemporalUNet(nn.Module):
    """Denoised plans of noisy ones: convolutions along time, at ever half the resolution and back.

    Args:
        size: D, entries of a plan's row.
        width: channels at full resolution, a multiple of 8.
        multipliers: channels of every level in units of `width`; the plan's length must be a multiple of
            2^(levels - 1).
    """

    def __init__(self, size: int, *, width: int = 32, multipliers: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), Mish(), nn.Linear(4 * width, width))
        channels = [size, *(width * m for m in multipliers)]
        levels = list(pairwise(channels))
        self.down = nn.ModuleList(_Pair(low, high, width) for low, high in levels)
        self.shrink = nn.ModuleList(nn.Conv1d(high, high, 3, 2, 1) for _, high in levels[:-1])
        last = channels[-1]
        self.middle = _Pair(last, last, width)
        self.up = nn.ModuleList(_Pair(2 * high, low, width) for low, high in reversed(levels[1:]))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(low, low, 4, 2, 1) for low, _ in reversed(levels[1:]))
        first = channels[1]
        self.head = nn.Sequential(*_convolution(first, first), nn.Conv1d(first, size, 1))

    def forward(self, plans: Tensor, steps: Tensor) -> Tensor:
        """x (B, H, D) of x_t (B, H, D) at steps t (B,)."""
        time = self.time(time_features(steps, self.width, plans.dtype))
        x, kept = plans.transpose(1, 2), []
        for i, block in enumerate(self.down):
            x = block(x, time)
            kept.append(x)
            if i < len(self.shrink):
                x = self.shrink[i](x)
        x = self.middle(x, time)
        for block, grow in zip(self.up, self.grow, strict=True):
            x = grow(block(torch.cat([x, kept.pop()], dim=1), time))
        answer: Tensor = self.head(x).transpose(1, 2)
        return answer


def _convolution(low: int, high: int) -> tuple[nn.Module, ...]:
    return nn.Conv1d(low, high, 5, padding=2), nn.GroupNorm(8, high), Mish()


class _Residual(nn.Module):
    """Two convolutions with the time's features between, added to the input."""

    def __init__(self, low: int, high: int, time_size: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_convolution(low, high))
        self.time = nn.Sequential(Mish(), nn.Linear(time_size, high))
        self.second = nn.Sequential(*_convolution(high, high))
        self.shortcut = nn.Conv1d(low, high, 1) if low != high else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x) + self.time(time)[:, :, None]) + self.shortcut(x)
        return y


class _Pair(nn.Module):
    """Two residual blocks at one resolution."""

    def __init__(self, low: int, high: int, time_size: int) -> None:
        super().__init__()
        self.one, self.two = _Residual(low, high, time_size), _Residual(high, high, time_size)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x, time), time)
        return y


class PlanValues(nn.Module):
    """Two perceptrons side by side: return and cost that follow from a noisy plan's start.

    Both in units of `spread` around `centre`, tensors (2,), which are the training data's.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, plan_size: int, hidden_sizes: tuple[int, ...]) -> None:
        super().__init__()
        # Smooth, since plans move along its gradient.
        self.networks = BatchedMLPs(2, plan_size + _TIME_FEATURES, hidden_sizes, activation="silu")
        self.register_buffer("centre", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))

    def forward(self, plans: Tensor, steps: Tensor) -> Tensor:
        """Standardised (2, B): return, cost, of x_t (B, H, D) at steps t (B,)."""
        time = time_features(steps, _TIME_FEATURES, plans.dtype)
        answer: Tensor = self.networks(torch.cat([plans.flatten(1), time], dim=1))[..., 0]
        return answer

    def unscaled(self, values: Tensor) -> Tensor:
        """Standardised values (2, B) in the environment's units."""
        return values * self.spread[:, None] + self.centre[:, None]


def overspend_weight(costs: Tensor, budgets: Tensor, weight: float = 5.0) -> Tensor:
    """w (B,) = weight exp(clip((J - b) / b, 0, 1)) where J > b, else 0, of costs J and budgets b (B,).

    A budget of 0 or less, which the formula leaves open, has the largest weight, that of a vanishing one.
    """
    excess = (costs - budgets) / budgets.clamp(min=torch.finfo(budgets.dtype).tiny)
    return weight * excess.clamp(0.0, 1.0).exp() * (costs > budgets)


def choose_plan(returns: Tensor, costs: Tensor, budgets: Tensor) -> Tensor:
    """Number (N,) of the plan, of P, with the largest return within the budget, else with the least cost.

    Returns and costs are (N, P), budgets (N,).
    """
    within = costs <= budgets[:, None]
    best = returns.masked_fill(~within, -torch.inf).argmax(1)
    return torch.where(within.any(1), best, costs.argmin(1))


class PlanPolicy(nn.Module):
    """Acts by plans within what is left of a budget: `Policy` and `Stateful`.

    With b the budget left, J_r and J_c the values of a noisy plan x, sigma^2 the variance of its next step:

        t = T-1 ... 0:   `guides` times, if t >= `last_guided`:
                             x <- x + guidance sigma_t^2 grad (J_r - w J_c),    w = `overspend_weight`(J_c, b)
                         x <- a sample of x_{t-1} given x_t and the denoised plan, clipped to [-1, 1]

    with the gradients of standardised values and the first observation put back after every change. Of P
    plans `choose_plan` takes one. After a step of cost c the budget left is (b - c) / discount, in units of
    then, so that b_t = (B - sum_{k<t} discount^k c_k) / discount^t.

    `target_cost`, in the environment's units, may be set at any time; an episode goes by what it is when it
    starts. A caller that never calls `observe` gets the actions of first steps.

    Args:
        observation_space: any space that `ObservationEncoder` takes.
        action_space: a bounded box.
        horizon: H, a multiple of 2^(levels - 1).
        width, multipliers: see `TemporalUNet`.
        hidden_sizes: of the values.
        diffusion_steps: T.
        plans: P.
        guides, guidance, last_guided, cost_weight: of the equations; the last is w's factor.
        cost_discount: of the budget.
        target_cost: budget of an episode, B.

    Raises:
        UsageError: the actions fill no bounded box, or horizon or width does not fit the network.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        horizon: int = 32,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 4, 8),
        hidden_sizes: tuple[int, ...] = (256, 256),
        diffusion_steps: int = 20,
        plans: int = 64,
        guides: int = 2,
        guidance: float = 0.1,
        last_guided: int = 2,
        cost_weight: float = 5.0,
        cost_discount: float = 1.0,
        target_cost: float,
    ) -> None:
        super().__init__()
        multiple = 2 ** (len(multipliers) - 1)
        if horizon < 1 or horizon % multiple:
            raise UsageError(
                f"the horizon {horizon} is no multiple of {multiple}, which {len(multipliers)} levels of the "
                "network ask for; choose one, or fewer multipliers."
            )
        if width % 8:
            raise UsageError(f"the width {width} is no multiple of 8; choose one that is.")
        self.observation_space = observation_space
        self.action_space = action_space
        self.settings: dict[str, Any] = {
            "horizon": horizon,
            "width": width,
            "multipliers": multipliers,
            "hidden_sizes": hidden_sizes,
            "diffusion_steps": diffusion_steps,
            "plans": plans,
            "guides": guides,
            "guidance": guidance,
            "last_guided": last_guided,
            "cost_weight": cost_weight,
            "cost_discount": cost_discount,
        }
        self.horizon, self.plans = horizon, plans
        self.guides, self.guidance, self.last_guided = guides, guidance, last_guided
        self.cost_weight, self.cost_discount = cost_weight, cost_discount
        self.target_cost = target_cost
        self.encoder = ObservationEncoder(observation_space)
        self.box = action_distribution(action_space, head="deterministic")
        self.size = self.box.action_size + self.encoder.size
        self.register_buffer("low", -torch.ones(self.encoder.size))
        self.register_buffer("high", torch.ones(self.encoder.size))
        self.schedule = CosineSchedule(diffusion_steps)
        self.planner = TemporalUNet(self.size, width=width, multipliers=multipliers)
        self.values = PlanValues(horizon * self.size, hidden_sizes)
        self._generator: torch.Generator | None = None
        self._budgets: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.low.device

    def seed(self, seed: int) -> None:
        """Make `act` reproducible."""
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def scale(self, observations: Tensor) -> Tensor:
        """Observations (..., S) with the data's range as [-1, 1]; 0 where the data do not vary."""
        ranges = self.high - self.low
        varied = ranges > 0
        scaled = 2 * (observations - self.low) / torch.where(varied, ranges, 1.0) - 1
        return torch.where(varied, scaled, 0.0)

    def begin(self, num_envs: int) -> None:
        """Every one of `num_envs` environments starts an episode; see `saferl.policies.protocol.Stateful`."""
        self._budgets = torch.full((num_envs,), float(self.target_cost), device=self.device)

    @torch.no_grad()
    def observe(self, rewards: ArrayLike, costs: ArrayLike, ended: ArrayLike) -> None:
        """What the actions of the last `act` led to, arrays (N,); see `saferl.policies.protocol.Stateful`.

        Raises:
            UsageError: `act` was never called with N environments.
        """
        over = torch.as_tensor(ended, device=self.device).bool()
        budgets = self._budgets
        if budgets is None or len(budgets) != len(over):
            raise UsageError(
                f"the policy is told of {len(over)} environments that it has not acted in; call act first."
            )
        left = (budgets - torch.as_tensor(costs, device=self.device).to(budgets.dtype)) / self.cost_discount
        self._budgets = left.masked_fill(over, float(self.target_cost))

    def start(self, plans: Tensor, observations: Tensor) -> Tensor:
        """Plans (B, H, D) with scaled observations (B, S) as their first."""
        plans = plans.clone()
        plans[:, 0, self.box.action_size :] = observations
        return plans

    def guide(self, plans: Tensor, steps: Tensor, budgets: Tensor) -> Tensor:
        """grad (J_r - w J_c) (B, H, D) at noisy plans (B, H, D), steps t (B,), budgets (B,)."""
        with torch.enable_grad():
            plans = plans.detach().requires_grad_()
            values = self.values(plans, steps)
            costs = self.values.unscaled(values.detach())[1]
            weights = overspend_weight(costs, budgets, self.cost_weight)
            (gradient,) = torch.autograd.grad((values[0] - weights * values[1]).sum(), plans)
        return gradient

    @torch.no_grad()
    def sample(self, observations: Tensor, budgets: Tensor) -> Tensor:
        """One plan (B, H, D) for each of scaled observations (B, S) and budgets (B,)."""
        schedule, shape = self.schedule, (len(observations), self.horizon, self.size)

        def noise() -> Tensor:
            return torch.randn(
                shape, generator=self._generator, device=observations.device, dtype=observations.dtype
            )

        plans = self.start(noise(), observations)
        for step in reversed(range(len(schedule))):
            steps = torch.full(shape[:1], step, device=observations.device)
            variance = schedule.variances[step]
            for _ in range(self.guides if step >= self.last_guided else 0):
                gradient = self.guide(plans, steps, budgets)
                plans = self.start(plans + self.guidance * variance * gradient, observations)
            denoised = self.planner(plans, steps).clamp(-1.0, 1.0)
            plans = schedule.x_shares[step] * denoised + schedule.noisy_shares[step] * plans
            if step > 0:
                plans = plans + variance.sqrt() * noise()
            plans = self.start(plans, observations)
        return plans

    @torch.no_grad()
    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Actions for a batch of observations: arrays in, array out; tensors in, tensor on the device out.

        The policy has no mode: `deterministic` changes nothing, `seed` makes it reproducible. Every episode
        starts anew when the number of environments is another than before.
        """
        features = self.scale(self.encoder(obs, self.device).to(self.low.dtype))
        size = len(features)
        if self._budgets is None or len(self._budgets) != size or self._budgets.device != features.device:
            self.begin(size)
        assert self._budgets is not None
        budgets = self._budgets.to(features.dtype)
        drawn = self.sample(
            features.repeat_interleave(self.plans, dim=0), budgets.repeat_interleave(self.plans)
        )
        steps = torch.zeros(len(drawn), dtype=torch.int64, device=drawn.device)
        returns, costs = self.values.unscaled(self.values(drawn, steps)).view(2, size, self.plans)
        chosen = choose_plan(returns, costs, budgets)
        actions = drawn.view(size, self.plans, self.horizon, self.size)[
            torch.arange(size, device=drawn.device), chosen, 0, : self.box.action_size
        ]
        mapped = self.box.to_env(actions.clamp(-1.0, 1.0))
        leaf = obs
        while isinstance(leaf, dict | tuple):
            leaf = next(iter(leaf.values())) if isinstance(leaf, dict) else leaf[0]
        return mapped if isinstance(leaf, Tensor) else mapped.cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """All that `from_description` needs to rebuild the module, as JSON values."""
        return {
            "kind": "planner",
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            **{k: list(v) if isinstance(v, tuple) else v for k, v in self.settings.items()},
            "target_cost": float(self.target_cost),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> PlanPolicy:
        """Rebuild a policy (with fresh weights) from `describe`'s answer."""
        settings: dict[str, Any] = {
            k: tuple(v) if k in {"multipliers", "hidden_sizes"} else v
            for k, v in description.items()
            if k not in {"kind", "observation_space", "action_space"}
        }
        return cls(
            space_from_json(description["observation_space"]),
            space_from_json(description["action_space"]),
            **settings,
        )
