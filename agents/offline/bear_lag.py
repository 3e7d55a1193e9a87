"""BEAR-Lag: Q-learning by a policy held to the data's support, on the Lagrangian.

Kumar, Fu, Tucker and Levine 2019, "Stabilizing Off-Policy Q-Learning via Bootstrapping Error Reduction", with
the cost critics and the PID controller (Stooke, Achiam and Abbeel 2020) that OSRL gave it (Liu et al. 2023).
With m = 0 at the end of an episode (a time limit counts as an end), gamma the discount, G an autoencoder of
the data's actions (`saferl.nn.variational.ActionVAE`) and averages over a batch:

    Q, Q_C  E (Q_i - y)^2,   y = r + gamma m max_k [w min_i Q'_i(s', a_k) + (1 - w) max_i Q'_i(s', a_k)],
            and the same with costs; a_k ~ pi'(.|s'), k = 1 .. 10
    pi      min E -min_i Q_i(s, a) + alpha (MMD - eps) + lambda (min_i Q_C,i(s, a) - d),   a ~ pi(.|s)
    MMD     sqrt(E k(x, x') + E k(y, y') - 2 E k(x, y) + 1e-6),   k(x, y) = exp(-|x - y|^2 / (2 sigma)),
            between ten actions x of G and ten y of pi in the same state, all before their tanh
    alpha   log alpha <- clip(log alpha + lr alpha (E MMD - eps), -5, 5), from alpha = 1
    lambda  PID on the mean of min_i Q_C,i(s, a) against d = `saferl.constraints.discounted_limit`

i runs over two, each the least of an ensemble of `members` networks; Q' and pi' are slow copies; a is the
first of the y. The kernel's width is sigma itself, not its square. Equations, order and hyperparameters are
those of OSRL's code. As in BCQ-Lag, the cost's target is the largest of ten actions (cautious), what the
policy sees the least of the critics (hopeful). Departures:

- cost targets stop at the end of an episode, as the reward's do; OSRL forgets the mask, which counts costs
  after the end;
- reward's and cost's targets share their ten actions;
- alpha moves by the MMD that the policy's step has just used, where OSRL draws the actions anew.

The policy acts by the tanh of its mean, as in OSRL (the paper chooses among ten samples by Q).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saferl.agents.offline.engine import Batch, Context, OfflineConfig, train_offline
from saferl.agents.online.engine import at_least
from saferl.constraints import PIDMultiplier, discounted_limit
from saferl.errors import UsageError, unknown_name
from saferl.experiment.run import Run
from saferl.nn.flat import FlatParameters
from saferl.nn.models import Actor
from saferl.nn.twin_critics import TwinCritics
from saferl.nn.variational import ActionVAE

__all__ = ["BEARLag", "Config", "Kernel", "mmd", "train"]

Kernel = Literal["gaussian", "laplacian"]
"""exp(-|x - y|^2 / (2 sigma)), or exp(-|x - y|_1 / (2 sigma))."""


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Hyperparameters; defaults are OSRL's base configuration."""

    total_steps: int = 300_000
    """Gradient steps in all."""
    batch_size: int = 512
    """Transitions a gradient step."""
    cost_limit: float = 10.0
    """Largest mean cost of an episode."""
    reward_scale: float | None = 0.1
    """Factor of the rewards; None takes longest episode over the range of returns."""
    lr: float = 1e-3
    """Adam's learning rate for all networks, and the step size of log alpha."""
    polyak: float = 0.005
    """Share of the critics and the policy that moves into their slow copies at every step."""
    samples: int = 10
    """Actions a state: those a target takes the largest value over, and those the MMD compares."""
    min_weight: float = 0.75
    """Weight w of the smaller critic in a target; 1 - w is the larger's."""
    members: int = 2
    """Networks of each of the four ensembles: two of the reward, two of the cost."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the critics and of the policy."""
    vae_hidden_size: int = 400
    """Width of the autoencoder's layers."""
    mmd_threshold: float = 0.05
    """MMD from the data's actions that alpha steers to, eps."""
    kernel: Kernel = "gaussian"
    """The MMD's kernel: gaussian or laplacian."""
    kernel_width: float = 50.0
    """sigma."""
    kp: float = 0.1
    """Proportional gain of the multiplier."""
    ki: float = 0.003
    """Integral gain."""
    kd: float = 0.001
    """Derivative gain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("cost limit", self.cost_limit, 0)
        at_least("mmd threshold", self.mmd_threshold, 0)
        at_least("hidden sizes", min(self.hidden_sizes, default=1), 1)
        for name in ("samples", "members", "vae_hidden_size"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in ("lr", "reward_scale", "kernel_width"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value:g}; it must be positive.")
        if self.kernel not in ("gaussian", "laplacian"):
            raise unknown_name("kernel", self.kernel, ("gaussian", "laplacian"))
        if not 0 < self.polyak <= 1:
            raise UsageError(f"polyak is {self.polyak:g}; it must be above 0 and at most 1.")
        if not 0 <= self.min_weight <= 1:
            raise UsageError(f"min_weight is {self.min_weight:g}; it must lie between 0 and 1.")
        if not min(self.kp, self.ki, self.kd) >= 0:
            raise UsageError("the gains kp, ki and kd must be zero or more.")


def mmd(x: Tensor, y: Tensor, width: float, kernel: Kernel = "gaussian") -> Tensor:
    """Maximum mean discrepancy (B,) between sets x (B, N, A) and y (B, M, A), at least 1e-3.

    Gretton et al. 2012, the biased estimate: a set's kernel with itself counts its diagonal.
    """

    def mean_kernel(one: Tensor, other: Tensor) -> Tensor:
        gaps = one[:, :, None] - other[:, None]
        distances = gaps.square().sum(-1) if kernel == "gaussian" else gaps.abs().sum(-1)
        # Kernels less 1, which cancels below: near 1 the difference of kernels would lose its digits.
        return torch.expm1(distances / (-2 * width)).mean((1, 2))

    squared = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    return (squared.clamp(min=0) + 1e-6).sqrt()


class BEARLag:
    """Autoencoder, critics as one stack, policy, slow copies of the last two, alpha and the multiplier."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.generator = context.generator
        self.limit = discounted_limit(config.cost_limit, config.discount, context.episode_steps)
        self.multiplier = PIDMultiplier(
            config.kp,
            config.ki,
            config.kd,
            ema_p=0.0,
            ema_d=0.0,
            delay=1,
            init=0.0,
            derivative="violation",
            one_sided=True,
        )
        self.policy = Actor(
            context.observation_space,
            context.action_space,
            hidden_sizes=config.hidden_sizes,
            activation="relu",
            normalise_observations=False,
            head="squashed",
        ).to(context.device)
        size, actions = self.policy.encoder.size, self.policy.distribution.action_size
        self.vae = ActionVAE(size, actions, config.vae_hidden_size).to(context.device)
        self.critics = TwinCritics(size + actions, config.hidden_sizes, config.members).to(context.device)
        self.networks = nn.ModuleDict({"policy": self.policy, "vae": self.vae, "critics": self.critics})
        self.slow_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.slow_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = torch.zeros((), device=context.device)
        self._flat = {
            "vae": FlatParameters(self.vae.parameters()),
            "critics": FlatParameters(self.critics.parameters(), stacked=True),
            "policy": FlatParameters(self.policy.parameters()),
        }
        self._slow = {
            "critics": FlatParameters(self.slow_critics.parameters(), stacked=True),
            "policy": FlatParameters(self.slow_policy.parameters()),
        }
        self.optimizers = {
            name: torch.optim.Adam([flat.values], lr=config.lr, fused=True)
            for name, flat in self._flat.items()
        }

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the autoencoder, of the critics and of the policy, in this order; then alpha's."""
        vae_loss = self.vae.loss(batch.observations, batch.actions, self.generator)
        self._step("vae", vae_loss)
        next_actions = self.draw_actions(self.slow_policy, batch.next_observations).tanh()
        critic_loss = self.critic_loss(batch, next_actions)
        self._step("critics", critic_loss)
        drawn = self.draw_actions(self.policy, batch.observations)
        gaps = self.gaps(self.propose(batch.observations), drawn)
        q, q_c = self.critics.least(batch.observations, drawn[:, 0].tanh())
        self.multiplier.update(float(q_c.detach().mean()), self.limit)
        policy_loss = self.policy_loss(q, q_c, gaps)
        self._step("policy", policy_loss)
        self.move_alpha(gaps.detach())
        for name, slow in self._slow.items():
            slow.follow(self._flat[name], self.config.polyak)
        return {
            "loss/vae": vae_loss.detach(),
            "loss/critic": critic_loss.detach(),
            "loss/policy": policy_loss.detach(),
            "value/reward": q.detach().mean(),
            "value/cost": q_c.detach().mean(),
            "policy/mmd": gaps.detach().mean(),
            "policy/alpha": self.log_alpha.exp(),
            "constraint/cost/multiplier": torch.tensor(self.multiplier.value),
        }

    def draw_actions(self, policy: Actor, observations: Tensor) -> Tensor:
        """K of the policy's actions (B, K, A) before their tanh, with its gradient, at (B, S)."""
        mean, log_std = policy.distribution_parameters(observations)[:, None].chunk(2, dim=-1)
        noise = torch.randn(
            (len(mean), self.config.samples, mean.shape[-1]),
            generator=self.generator,
            device=mean.device,
            dtype=mean.dtype,
        )
        return mean + log_std.exp() * noise

    @torch.no_grad()
    def propose(self, observations: Tensor) -> Tensor:
        """K actions of the autoencoder (B, K, A) before their tanh, at (B, S); as `ActionVAE.sample`."""
        size, samples = len(observations), self.config.samples
        latents = torch.randn(
            (size, samples, self.vae.latent_size),
            generator=self.generator,
            device=observations.device,
            dtype=observations.dtype,
        ).clamp_(-0.5, 0.5)
        repeated = observations[:, None].expand(-1, samples, -1)
        actions: Tensor = self.vae.decoder(torch.cat([repeated, latents], dim=-1))
        return actions

    def gaps(self, proposed: Tensor, drawn: Tensor) -> Tensor:
        """MMD (B,) between actions (B, K, A) of the autoencoder and of the policy, before their tanh."""
        return mmd(proposed, drawn, self.config.kernel_width, self.config.kernel)

    def critic_loss(self, batch: Batch, next_actions: Tensor) -> Tensor:
        """Squared errors, summed over all critics, for a_k (B, K, A)."""
        targets = self.slow_critics.targets(
            batch.next_observations,
            next_actions,
            torch.stack([batch.rewards, batch.costs]),
            self.config.discount * batch.masks,
            self.config.min_weight,
        )
        return self.critics.loss(batch.observations, batch.actions, targets)

    def policy_loss(self, q: Tensor, q_c: Tensor, gaps: Tensor) -> Tensor:
        """E -Q + alpha (MMD - eps) + lambda (Q_C - d) for Q, Q_C and MMD (B,)."""
        support = self.log_alpha.exp() * (gaps - self.config.mmd_threshold)
        return (self.multiplier.value * (q_c - self.limit) + support - q).mean()

    def move_alpha(self, gaps: Tensor) -> None:
        """One step of log alpha on MMD (B,)."""
        step = self.config.lr * self.log_alpha.exp() * (gaps.mean() - self.config.mmd_threshold)
        self.log_alpha = (self.log_alpha + step).clamp(-5.0, 5.0)

    def _step(self, name: str, loss: Tensor) -> None:
        flat = self._flat[name]
        flat.set_gradients(torch.autograd.grad(loss, flat.parameters), math.inf)
        self.optimizers[name].step()

    def state_dict(self) -> dict[str, Any]:
        """Autoencoder, critics, slow copies, optimisers, alpha and multiplier."""
        return {
            **{name: part.state_dict() for name, part in self._stored().items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "log_alpha": self.log_alpha,
            "multiplier": self.multiplier.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        for name, part in self._stored().items():
            part.load_state_dict(state[name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.log_alpha = state["log_alpha"].to(self.log_alpha)
        self.multiplier.load_state_dict(state["multiplier"])

    def _stored(self) -> dict[str, nn.Module]:
        return {
            "vae": self.vae,
            "critics": self.critics,
            "slow_policy": self.slow_policy,
            "slow_critics": self.slow_critics,
        }


def train(config: Config, run: Run) -> nn.Module:
    """Train BEAR-Lag; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(
        config, run, lambda context: BEARLag(config, context), reward_scale=config.reward_scale
    )
