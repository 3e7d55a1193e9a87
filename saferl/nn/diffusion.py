"""A small diffusion model of actions: noise schedule, denoising network, samplers.

Forward process, t = 0 ... T-1, with alpha_bar the running product of alpha = 1 - beta:

    x_t = sqrt(alpha_bar_t) a + sqrt(1 - alpha_bar_t) eps,        eps ~ N(0, I)

The network predicts eps from x_t, the observation and t (Ho et al. 2020); the schedule is the variance
preserving one of Song et al. 2021 in T steps, as Diffusion-QL, IDQL and FISOR use it (FISOR's code).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from saferl.errors import UsageError, unknown_name
from saferl.nn.dropout import Dropout
from saferl.nn.mish import Mish, mish

__all__ = [
    "NoisePredictor",
    "Sampler",
    "VPSchedule",
    "ddpm_scheduler",
    "fast_scheduler",
    "noise_prediction_loss",
    "sample_ddpm",
    "sample_with",
]

Sampler = Literal["ddpm", "ddim", "dpm-solver++"]
"""DDPM as published; DDIM and DPM-Solver++, deterministic given the first noise, in fewer passes."""

Noise = Callable[[Tensor, Tensor], Tensor]
"""eps(x, t): noise in x (B, A) at the steps t (B,)."""


class VPSchedule(nn.Module):
    """Variance-preserving noise in T steps; all attributes are float32 tensors (T,).

        alpha_i = exp(-b_min / T - (b_max - b_min) (2 i - 1) / (2 T^2)),        i = 1 ... T

    so that alpha_bar_T = exp(-b_min - (b_max - b_min) / 2) for every T. Computed in float64. Not stored in
    checkpoints: it follows from T. Raises `ValueError` unless T >= 1.
    """

    alphas: Tensor
    betas: Tensor
    alpha_bars: Tensor

    def __init__(self, steps: int, b_min: float = 0.1, b_max: float = 10.0) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"the number of diffusion steps is {steps}; it must be at least 1.")
        i = np.arange(1, steps + 1)
        log_alphas = -b_min / steps - 0.5 * (b_max - b_min) * (2 * i - 1) / steps**2
        for name, values in (
            ("alphas", np.exp(log_alphas)),
            ("betas", -np.expm1(log_alphas)),
            ("alpha_bars", np.exp(np.cumsum(log_alphas))),
        ):
            self.register_buffer(name, torch.from_numpy(values).float(), persistent=False)

    def __len__(self) -> int:
        return len(self.betas)

    def add_noise(self, actions: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """x_t of actions (B, A) with noise (B, A) at the steps t (B,)."""
        kept = self.alpha_bars[steps][:, None]
        return kept.sqrt() * actions + (1 - kept).sqrt() * noise

    def denoised_mean(self, x: Tensor, noise: Tensor, step: int) -> Tensor:
        """Mean (x_t - beta eps / sqrt(1 - alpha_bar)) / sqrt(alpha) of x_{t-1}, all (B, A)."""
        beta, alpha, alpha_bar = self.betas[step], self.alphas[step], self.alpha_bars[step]
        return (x - beta / (1 - alpha_bar).sqrt() * noise) / alpha.sqrt()


def noise_prediction_loss(
    predicted: Tensor, noise: Tensor, weights: Tensor, rows: int | None = None
) -> Tensor:
    """1 / B sum_b w_b |eps_hat_b - eps_b|^2, summed over an action's dimensions: (B, A), (B, A) and (B,).

    `rows` counts the batch where rows of weight 0 were left out of it, be it all of them.
    """
    errors = (predicted - noise).square().sum(-1)
    return (weights * errors).sum() / (len(weights) if rows is None else rows)


@torch.no_grad()
def sample_ddpm(
    predict: Noise,
    schedule: VPSchedule,
    shape: tuple[int, int],
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Actions (B, A) in [-1, 1] from the reverse process, from t = T-1 to 0.

        x <- clip(mean(x, t) + [t > 0] sqrt(beta_t) temperature z, -1, 1),        z ~ N(0, I)

    Every step is clipped, x itself and not the action it points at (FISOR's `clip_sampler`).
    """
    device = schedule.betas.device
    x = torch.randn(shape, generator=generator, device=device)
    for step in reversed(range(len(schedule))):
        steps = torch.full(shape[:1], step, device=device)
        x = schedule.denoised_mean(x, predict(x, steps), step)
        if step > 0:
            z = torch.randn(shape, generator=generator, device=device)
            x = x + schedule.betas[step].sqrt() * temperature * z
        x = x.clamp(-1.0, 1.0)
    return x


def ddpm_scheduler(schedule: VPSchedule) -> Any:
    """The schedule as a `diffusers.DDPMScheduler`, whose steps are those of `sample_ddpm` before it clips.

    Its named schedules cannot express this one and its default variance is another. Raises `UsageError`
    where diffusers is not installed.
    """
    return _diffusers().DDPMScheduler(
        num_train_timesteps=len(schedule),
        trained_betas=schedule.betas.tolist(),
        variance_type="fixed_large",
        clip_sample=False,
    )


def fast_scheduler(schedule: VPSchedule, sampler: Sampler, passes: int) -> Any:
    """DDIM (Song et al. 2021) or DPM-Solver++ of order 2 (Lu et al. 2022) in `passes` passes of the network.

    DDIM is DPM-Solver++ of order 1 (Lu et al. 2022, section 4); diffusers' own DDIM is exact only where
    `passes` divides T. Both are told the action that a pass points at, so that it can be clipped. Raises
    `UsageError` where diffusers is not installed or `passes` is not in 1 ... T.
    """
    if sampler not in get_args(Sampler):
        raise unknown_name("sampler", sampler, get_args(Sampler))
    if not 1 <= passes <= len(schedule):
        raise UsageError(f"{passes} passes of {sampler}: ask for 1 to {len(schedule)}, the noise levels.")
    return _diffusers().DPMSolverMultistepScheduler(
        num_train_timesteps=len(schedule),
        trained_betas=schedule.betas.tolist(),
        algorithm_type="dpmsolver++",
        solver_order=1 if sampler == "ddim" else 2,
        timestep_spacing="trailing",
        prediction_type="sample",
    )


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(
            "other samplers than ddpm need the diffusers package: pip install 'saferl[diffusion]'."
        ) from error
    return diffusers


@torch.no_grad()
def sample_with(
    scheduler: Any,
    passes: int,
    predict: Noise,
    schedule: VPSchedule,
    shape: tuple[int, int],
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Actions (B, A) in [-1, 1] by a scheduler of diffusers that was made for `schedule`.

    One that predicts noise (`ddpm_scheduler`) has x clipped after every pass; one that predicts the sample
    (`fast_scheduler`) has the action clipped that each pass points at,

        a = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t).
    """
    device = schedule.betas.device
    scheduler.set_timesteps(passes, device=device)
    x = torch.randn(shape, generator=generator, device=device)
    for step in scheduler.timesteps:
        output = predict(x, step.expand(shape[0]))
        if scheduler.config.prediction_type == "sample":
            kept = schedule.alpha_bars[step]
            output = ((x - (1 - kept).sqrt() * output) / kept.sqrt()).clamp(-1.0, 1.0)
            x = scheduler.step(output, step, x, generator=generator).prev_sample
        else:
            x = scheduler.step(output, step, x, generator=generator).prev_sample.clamp(-1.0, 1.0)
    return x.clamp(-1.0, 1.0)


class NoisePredictor(nn.Module):
    """eps(s, x, t): a residual network on noisy action, observation and embedded time.

    Time goes through learned Fourier features, cos and sin of 2 pi t W^T with W (F / 2, 1) drawn from
    N(0, 0.2^2), and two layers of 2 F. Then [x, s, time] goes through a layer of `width`, residual blocks

        h <- h + Linear(Mish(Linear(LayerNorm(Dropout(h)))))        with four times that width inside,

    Mish and a last layer. Weights are Xavier-uniform, in the blocks LeCun-normal, biases 0 (FISOR's code,
    after IDQL's; for the time layers' weights unverified).

    Args:
        observation_size: S.
        action_size: A.
        width: of the trunk.
        blocks: residual blocks.
        time_features: F, even.
        dropout: share of features dropped in training.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        width: int = 256,
        blocks: int = 3,
        time_features: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(0.2 * torch.randn(time_features // 2, 1))
        self.time = nn.Sequential(
            nn.Linear(time_features, 2 * time_features),
            Mish(),
            nn.Linear(2 * time_features, 2 * time_features),
        )
        self.first = nn.Linear(action_size + observation_size + 2 * time_features, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.last = nn.Linear(width, action_size)
        for layer in (self.time[0], self.time[2], self.first, self.last):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, observations: Tensor, x: Tensor, steps: Tensor) -> Tensor:
        """Noise (B, A) in x (B, A) at the steps (B,), given observations (B, S)."""
        return self.trunk(self.embed_observations(observations), self.embed_times(steps), x)

    def embed_times(self, steps: Tensor) -> Tensor:
        """The share of the steps t (B,) in the first layer's output (B, width)."""
        angles = 2 * math.pi * steps[:, None].to(self.frequencies) @ self.frequencies.T
        embedded: Tensor = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        return embedded @ self.first.weight[:, -embedded.shape[1] :].T

    def embed_observations(self, observations: Tensor) -> Tensor:
        """The observations' share of the first layer's output (B, width): one for all candidates and t."""
        actions = self.last.out_features
        weights = self.first.weight[:, actions : actions + observations.shape[-1]]
        return nn.functional.linear(observations, weights, self.first.bias)

    def trunk(self, observed: Tensor, timed: Tensor, x: Tensor) -> Tensor:
        """Noise (B, A) from the shares above and x (B, A); the two may have a single row for all."""
        hidden = observed + timed + x @ self.first.weight[:, : self.last.out_features].T
        for block in self.blocks:
            hidden = block(hidden)
        predicted: Tensor = self.last(mish(hidden))
        return predicted


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=1e-6)  # flax's epsilon
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        for layer in (self.wide, self.narrow):
            _lecun_normal(layer)

    def forward(self, x: Tensor) -> Tensor:
        hidden = mish(self.wide(self.norm(self.dropout(x))))
        return x + torch.as_tensor(self.narrow(hidden))


def _lecun_normal(layer: nn.Linear) -> None:
    """Truncated normal of variance 1 / fan_in, cut at two deviations of the uncut one, as flax draws it."""
    deviation = 1 / math.sqrt(layer.in_features) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    nn.init.zeros_(layer.bias)
