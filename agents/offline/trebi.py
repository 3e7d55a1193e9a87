"""TREBI: plans drawn by diffusion, guided to what fits the cost budget that is left.

Lin et al. 2023, "Safe Offline Reinforcement Learning with Real-Time Budget Constraints". With x windows of
H steps (a, s) of recorded episodes, x_t the noisy ones (first observation kept clean) and t uniform, a
network f and two values are fitted,

    planner   mean m (f(x_t, t) - x)^2,       m = 10 for the first action, else 1
    values    mean (J_r(x_t, t) - R)^2,       R = sum_{k>=0} gamma^k r_k from the window's start to the end of
              mean (J_c(x_t, t) - C)^2,       its episode, C alike of costs

and averages of all (0.995) act: plans are sampled under the guidance of J_r and J_c and one within the budget
is chosen, see `saferl.nn.plan_policy.PlanPolicy`. The budget may be set at run time, for every episode.

Schedule, equations of guidance and choice, and hyperparameters are those of the authors' code; what is said
of normalisation and clipping follows Diffuser (Janner et al. 2022), on which it builds, and is unverified.
Departures:

* The values are two perceptrons on the whole window, side by side, because the guidance passes through them
  most often of all. They are trained along with the planner, on the same noise and for as long, where theirs
  have their own runs of 200,000 steps.
* Values and their gradients are in units of the data's standard deviations. Theirs are in the task's units,
  with a guidance scale set for every task by hand.
* Costs are not discounted unless asked for, so that the budget is one of an episode's cost; theirs have the
  rewards' discount (0.997, but 1 on Bullet tasks) and a budget of discounted cost.
* Windows that reach beyond an episode's end repeat its last step.
* A budget that is used up weighs the cost as one about to be (factor 5 e), where the formula has no value.
* A batch is 64 windows; theirs is 32, the gradients of two being summed. Their attention in the network for
  HalfCheetah is left out.

An action takes T passes of the planner, and almost twice as many through the values and back, for P plans.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saferl.agents.offline.engine import Context, OfflineConfig, train_offline
from saferl.agents.online.engine import at_least
from saferl.envs.datasets import OfflineDataset
from saferl.errors import UsageError
from saferl.experiment.run import Run
from saferl.nn.flat import FlatParameters
from saferl.nn.plan_policy import PlanPolicy

__all__ = ["TREBI", "Config", "Windows", "discounted_to_go", "train"]


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """TREBI's hyperparameters; defaults are those of its code for Safety-Gym tasks."""

    batch_size: int = 64
    """Windows a gradient step."""
    discount: float = 0.997
    """Discount of rewards."""
    cost_discount: float = 1.0
    """Discount of costs and of the budget, at most 1."""
    cost_limit: float = 10.0
    """Budget of an episode."""
    horizon: int = 32
    """Steps a plan, a multiple of 2^(number of multipliers - 1)."""
    width: int = 32
    """Channels of the planner at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    """Channels of every level of the planner, in units of the width."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of both values."""
    diffusion_steps: int = 20
    """Noise levels T."""
    plans: int = 64
    """Plans to choose from, for every action."""
    guides: int = 2
    """Steps along the values' gradient at each noise level."""
    guidance: float = 0.1
    """Length of those steps."""
    last_guided: int = 2
    """Lowest noise level with guidance."""
    cost_weight: float = 5.0
    """Weight of the cost's gradient just beyond the budget."""
    action_weight: float = 10.0
    """Weight of the first action in the planner's loss."""
    lr: float = 2e-4
    """Adam's learning rate for the planner and the values."""
    polyak: float = 0.005
    """Share of the networks that moves into those that act, at every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("horizon", "diffusion_steps", "plans"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in ("cost_limit", "guides", "guidance", "last_guided", "cost_weight", "action_weight"):
            at_least(name.replace("_", " "), getattr(self, name), 0)
        for name in ("multipliers", "hidden_sizes"):
            at_least(name.replace("_", " "), min(getattr(self, name), default=0), 1)
        if not self.lr > 0:
            raise UsageError(f"the learning rate is {self.lr:g}; it must be positive.")
        for name in ("cost_discount", "polyak"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name):g}; it must lie in (0, 1].")


class Windows(NamedTuple):
    """H steps of B episodes, and what follows from the first of them."""

    plans: Tensor
    """(B, H, A + S) actions and scaled observations, in [-1, 1]."""
    values: Tensor
    """(2, B) standardised: return and cost to the episode's end."""


class TREBI:
    """The planner and the two values, their averages, which act, and the windows that they learn from."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.generator = context.generator
        data = context.data
        if not data.num_episodes:
            raise UsageError(f"{data.source} has no whole episode, whose return could be learned from.")
        self.policy = PlanPolicy(
            context.observation_space,
            context.action_space,
            horizon=config.horizon,
            width=config.width,
            multipliers=config.multipliers,
            hidden_sizes=config.hidden_sizes,
            diffusion_steps=config.diffusion_steps,
            plans=config.plans,
            guides=config.guides,
            guidance=config.guidance,
            last_guided=config.last_guided,
            cost_weight=config.cost_weight,
            cost_discount=config.cost_discount,
            target_cost=float(config.cost_limit),
        ).to(context.device)
        """Averages of the networks: what acts."""
        self._index(data, context)
        self.planner = copy.deepcopy(self.policy.planner)
        self.values = copy.deepcopy(self.policy.values)
        self.networks = nn.ModuleDict({"planner": self.planner, "plan_values": self.values})
        self.policy.requires_grad_(False).eval()
        self._flat = {
            "planner": FlatParameters(self.planner.parameters()),
            "values": FlatParameters(self.values.parameters(), stacked=True),
        }
        self._slow = {
            "planner": FlatParameters(self.policy.planner.parameters()),
            "values": FlatParameters(self.policy.values.parameters(), stacked=True),
        }
        self.optimizers = {
            name: torch.optim.Adam([flat.values], lr=config.lr, fused=True)
            for name, flat in self._flat.items()
        }
        weights = torch.ones(config.horizon, self.policy.size, device=context.device)
        weights[0, : self.policy.box.action_size] = config.action_weight
        self.weights = weights

    def _index(self, data: OfflineDataset, context: Context) -> None:
        """Rows of whole episodes, the last row of each one's episode, and scales of all that is learned."""
        rows = int(data.ends[-1]) + 1
        lasts = np.repeat(data.ends, data.episode_lengths)
        labels = np.stack(
            [
                discounted_to_go(np.asarray(data.rewards, np.float64), data, self.config.discount),
                discounted_to_go(np.asarray(data.costs, np.float64), data, self.config.cost_discount),
            ]
        )[:, :rows]
        spread = labels.std(1)
        spread[spread == 0] = 1.0
        device = context.device
        self.lasts = torch.as_tensor(lasts, dtype=torch.int64, device=device)
        values, transitions = self.policy.values, context.transitions
        with torch.no_grad():
            values.centre.copy_(torch.as_tensor(labels.mean(1)))
            values.spread.copy_(torch.as_tensor(spread))
            standard = (labels - labels.mean(1, keepdims=True)) / spread[:, None]
            self.labels = torch.as_tensor(standard, device=device).to(values.centre.dtype)
            self.policy.low.copy_(transitions.observations[:rows].amin(0))
            self.policy.high.copy_(transitions.observations[:rows].amax(0))
            scaled = self.policy.scale(transitions.observations[:rows])
            self.steps = torch.cat([transitions.actions[:rows], scaled], dim=1)

    def draw(self) -> Windows:
        """A batch of windows, which start uniformly anywhere in whole episodes."""
        size, device = self.config.batch_size, self.lasts.device
        return self.windows(torch.randint(len(self.lasts), (size,), generator=self.generator, device=device))

    def windows(self, first: Tensor) -> Windows:
        """The windows that start at the rows `first` (B,)."""
        rows = first[:, None] + torch.arange(self.config.horizon, device=first.device)
        return Windows(self.steps[torch.minimum(rows, self.lasts[first, None])], self.labels[:, first])

    def losses(self, batch: Windows, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """The planner's loss (scalar) and the values' (2,), at noise (B, H, D) and steps t (B,)."""
        first = batch.plans[:, 0, self.policy.box.action_size :]
        noisy = self.policy.start(self.policy.schedule.add_noise(batch.plans, noise, steps), first)
        denoised = self.policy.start(self.planner(noisy, steps), first)
        errors = self.weights * (denoised - batch.plans).square()
        return errors.mean(), (self.values(noisy, steps) - batch.values).square().mean(1)

    def update(self, batch: Windows) -> dict[str, Tensor]:
        """One step of the planner and of both values."""
        plans, device = batch.plans, batch.plans.device
        noise = torch.randn(plans.shape, generator=self.generator, device=device)
        steps = torch.randint(
            self.config.diffusion_steps, (len(plans),), generator=self.generator, device=device
        )
        plan_loss, value_losses = self.losses(batch, noise, steps)
        for name, loss in (("planner", plan_loss), ("values", value_losses.sum())):
            flat = self._flat[name]
            flat.set_gradients(torch.autograd.grad(loss, flat.parameters), math.inf)
            self.optimizers[name].step()
            self._slow[name].follow(flat, self.config.polyak)
        return {
            "loss/planner": plan_loss.detach(),
            "loss/return": value_losses[0].detach(),
            "loss/cost": value_losses[1].detach(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Networks and optimisers; their averages are the policy's."""
        return {
            "networks": self.networks.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        self.networks.load_state_dict(state["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


def discounted_to_go(
    values: NDArray[np.float64], data: OfflineDataset, discount: float
) -> NDArray[np.float64]:
    """sum_{k>=t} discount^(k-t) values_k (N,) to the episode's end; the trailing fragment's are 0."""
    answer = np.zeros(len(values))
    for back in range(int(data.episode_lengths.max())):  # all episodes at once, from their ends
        rows = data.ends[data.episode_lengths > back] - back
        after = answer[rows + 1] if back else 0.0
        answer[rows] = values[rows] + discount * after
    return answer


def train(config: Config, run: Run) -> nn.Module:
    """Train TREBI; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(config, run, lambda context: TREBI(config, context), reward_scale=1.0)
