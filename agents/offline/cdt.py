"""CDT: imitation of recorded episodes, conditioned on what they still earn and what they still cost.

Liu, Guo, Yao, Cen, Yu, Zhang and Zhao 2023, "Constrained Decision Transformer for Offline Safe Reinforcement
Learning". With R_t = sum_{k>=t} r_k and C_t = sum_{k>=t} c_k of whole episodes, a causal transformer reads
the tokens (R_t, C_t, s_t, a_t) of K steps and fits

    loss = mean [-log N(a_t; mu, sigma)] - T mean H(mu, sigma) + 0.02 mean CE(1[c_t > 0])
    T:     gradient descent on log T of T (mean H - H_target),    (mu, sigma) read off s_t, the CE's off a_t

with means over steps, log-densities and entropies also over the A action dimensions. To act, R_0 and C_0 are
set to what is wished for, and every reward and cost is taken off; see `saferl.nn.sequence_policy`.

Windows: an episode is drawn in proportion to max(0, C_top - C_0), its first step uniformly; what lies beyond
the episode's end is padding. Episodes are joined by relabelled ones ("augmentation"): a polynomial is fitted
to the Pareto front of the episodes' (cost, return), points above it are drawn, and the nearest episode that
costs no more is given each point's return and cost as its R_0 and C_0, all its R_t and C_t being shifted
alike. So a wish for more than is possible at a cost is answered by the best that is.

Equations, network and hyperparameters are those of the authors' code (OSRL); the paper's text is unverified.
Departures, most of them defects there:

* C_top is 70 or twice the limit, the greater, so that a limit of 80 sees episodes that cost as much (theirs
  is always 70). Episodes that cost far more than any budget asked for stay out, as there.
* The cost's token is of C in units of the limit. Theirs is of 50 - C: a layer norm follows, which takes away
  the size of a large number and with it much of what tells small budgets apart.
* The target entropy is -1 a dimension. Theirs is -A, held against a mean over dimensions.
* The Gaussian's log standard deviation is bounded to [-5, 2] (theirs is not), by a tanh.
* Costs are classified as any or none (theirs are cut to whole numbers, so that one of 0.4 is none), and that
  loss is a mean over true steps alone.
* What is left of the budget stops at 0 when it is overspent; the data know nothing below.
* Augmentation without numbers in the units of a task: the degree is the smallest (4 at most, and fewer than
  the front's points) with R^2 >= 0.99, so that no front is too small; points lie between the front and the
  data's largest return; distances are in shares of the data's ranges. A front through outliers is avoided as
  theirs: cells of a 10 x 50 grid with two episodes or fewer are left out, unless that leaves nothing. Theirs
  also thins cells of more than ten and spreads points that fall to one episode over its neighbours.

Left out are options that are off by default there: a token for the episode's cost, prediction of states,
sampling by the distance to the front, learning from the front alone (whose choice is overwritten there).

The published target returns are set by hand for every task, which is privileged knowledge. Here the return
asked for is, if not given, the best among the data's episodes that keep the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from saferl.agents.offline.engine import Context, OfflineConfig, train_offline
from saferl.agents.online.engine import at_least
from saferl.envs.datasets import OfflineDataset
from saferl.errors import UsageError
from saferl.experiment.run import Run
from saferl.experiment.seeding import derive_seed
from saferl.nn.flat import FlatParameters
from saferl.nn.sequence_policy import SequencePolicy

__all__ = ["CDT", "Config", "Windows", "augment", "best_return", "fit_front", "to_go", "train"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """CDT's hyperparameters; defaults are the published ones. The discount has no part in it."""

    total_steps: int = 100_000
    """Gradient steps in all."""
    batch_size: int = 2_048
    """Windows a gradient step."""
    cost_limit: float = 10.0
    """Budget of an episode that the policy is asked to keep."""
    target_return: float | None = None
    """Return that it is asked for; the best of the data's episodes that keep the limit when left out."""
    reward_scale: float = 0.1
    """Factor of the rewards."""
    cost_top: float | None = None
    """Episodes of this cost and more are never drawn; 70 or twice the limit, the greater, when left out."""
    augmentation: float = 0.2
    """Relabelled episodes, as a share of the data's."""
    context: int = 10
    """Steps a window."""
    width: int = 128
    """Of the tokens."""
    layers: int = 3
    """Of attention."""
    heads: int = 8
    """Of attention."""
    dropout: float = 0.1
    """Of embeddings, attention and residuals."""
    lr: float = 1e-4
    """AdamW's learning rate."""
    weight_decay: float = 1e-4
    """AdamW's."""
    warmup_steps: int = 500
    """Gradient steps over which the learning rate rises."""
    max_grad_norm: float = 0.25
    """Norm that the gradient is clipped to."""
    cost_weight: float = 0.02
    """Of the prediction of costs, in the loss."""
    temperature_init: float = 0.1
    """Weight of the entropy at first."""
    temperature_lr: float = 1e-4
    """Adam's learning rate for its logarithm."""
    target_entropy: float = -1.0
    """Of the actions, a dimension."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "width", "layers", "heads", "warmup_steps"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in ("cost_limit", "weight_decay", "cost_weight", "augmentation", "temperature_lr"):
            at_least(name.replace("_", " "), getattr(self, name), 0)
        for name in ("reward_scale", "lr", "max_grad_norm", "temperature_init"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name):g}; it must be positive.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"the dropout is {self.dropout:g}; it must lie in [0, 1).")
        if self.cost_top is not None and not self.cost_top > self.cost_limit:
            raise UsageError(
                f"cost_top is {self.cost_top:g} and the limit {self.cost_limit:g}; it must be greater, or no "
                "episode at the limit is learned from."
            )


class Windows(NamedTuple):
    """K steps of B episodes each; what follows an episode's end repeats its last step and is not valid."""

    returns: Tensor
    """(B, K) to go, scaled."""
    costs_to_go: Tensor
    """(B, K)"""
    observations: Tensor
    """(B, K, S)"""
    actions: Tensor
    """(B, K, A) in [-1, 1]."""
    times: Tensor
    """(B, K) step within the episode."""
    costs: Tensor
    """(B, K), 1 where the step costs anything, else 0."""
    valid: Tensor
    """(B, K)"""


class CDT:
    """The transformer, its temperature, and the windows that it learns from."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config = config
        self.generator = context.generator
        data = context.data
        if not data.num_episodes:
            raise UsageError(f"{data.source} has no whole episode, whose return could be learned from.")
        top = max(70.0, 2 * config.cost_limit) if config.cost_top is None else config.cost_top
        target = config.target_return
        if target is None:
            target = best_return(data, config.cost_limit)
        self.policy = SequencePolicy(
            context.observation_space,
            context.action_space,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
            context=config.context,
            episode_steps=max(context.episode_steps, int(data.episode_lengths.max())),
            reward_scale=config.reward_scale,
            cost_unit=float(config.cost_limit) or 1.0,
            target_return=float(target),
            target_cost=float(config.cost_limit),
        ).to(context.device)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature_init), device=context.device)
        )
        self.networks = nn.ModuleList([self.policy, nn.ParameterList([self.log_temperature])])
        self._flat = FlatParameters(self.policy.model.parameters())
        self.optimizers = {
            "model": torch.optim.AdamW(
                [self._flat.values], lr=config.lr, weight_decay=config.weight_decay, fused=True
            ),
            "temperature": torch.optim.Adam([self.log_temperature], lr=config.temperature_lr),
        }
        self.steps = 0
        self._index(data, context, top)

    def _index(self, data: OfflineDataset, context: Context, top: float) -> None:
        """The episodes, recorded and relabelled: where they lie, how often drawn, by how much shifted."""
        episodes = np.arange(data.num_episodes)
        costs, returns = data.episode_costs, data.episode_returns
        count = int(self.config.augmentation * data.num_episodes)
        chosen, new_costs, new_returns = augment(
            costs, returns, count, np.random.default_rng(derive_seed(self.config.seed, 2))
        )
        episodes = np.concatenate([episodes, chosen])
        labels = np.concatenate([costs, new_costs]), np.concatenate([returns, new_returns])
        weights = np.maximum(0.0, top - labels[0])
        if not weights.any():
            raise UsageError(
                f"no episode of {data.source} costs less than {top:g} (the least is {costs.min():g}); raise "
                "--cost-top."
            )

        def on_device(array: NDArray[Any], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.as_tensor(array, dtype=dtype, device=context.device)

        self.starts = on_device(data.starts[episodes], torch.int64)
        self.lengths = on_device(data.episode_lengths[episodes], torch.int64)
        self.weights = on_device(weights / weights.sum())
        self.cost_shifts = on_device(labels[0] - costs[episodes])
        self.return_shifts = on_device((labels[1] - returns[episodes]) * self.config.reward_scale)
        self.transitions = context.transitions
        rewards = np.asarray(data.rewards, np.float64) * self.config.reward_scale
        self.returns = on_device(to_go(rewards, data))
        self.costs_to_go = on_device(to_go(np.asarray(data.costs, np.float64), data))

    def draw(self) -> Windows:
        """A batch of windows, by weight of their episodes and uniform within."""
        size, device = self.config.batch_size, self.starts.device
        drawn = torch.multinomial(self.weights, size, replacement=True, generator=self.generator)
        share = torch.rand(size, generator=self.generator, device=device)
        lengths = self.lengths[drawn]
        first = torch.minimum((share * lengths).long(), lengths - 1)
        return self.windows(drawn, first)

    def windows(self, episodes: Tensor, first: Tensor) -> Windows:
        """The windows (B, K) of episodes (B,) from their steps `first` (B,) on."""
        steps = first[:, None] + torch.arange(self.config.context, device=first.device)
        last = self.lengths[episodes, None] - 1
        times = torch.minimum(steps, last)
        rows = self.starts[episodes, None] + times
        data = self.transitions
        return Windows(
            self.returns[rows] + self.return_shifts[episodes, None],
            self.costs_to_go[rows] + self.cost_shifts[episodes, None],
            data.observations[rows],
            data.actions[rows],
            times,
            (data.costs[rows] > 0).long(),
            steps <= last,
        )

    def losses(self, batch: Windows) -> tuple[Tensor, Tensor, Tensor]:
        """Mean -log N(a) and entropy a dimension, and cross-entropy of the costs: three scalars."""
        # Padding follows the episode, so that causality hides it and no mask is needed.
        parameters, logits = self.policy(*batch[:5])
        box, size = self.policy.box, batch.actions.shape[-1]
        weights = batch.valid.to(parameters.dtype) / batch.valid.sum()
        log_probs = box.log_prob(parameters, batch.actions) / size
        entropy = box.entropy(parameters) / size
        errors = functional.cross_entropy(logits.flatten(0, 1), batch.costs.flatten(), reduction="none")
        return (
            -(log_probs * weights).sum(),
            (entropy * weights).sum(),
            (errors * weights.flatten()).sum(),
        )

    def update(self, batch: Windows) -> dict[str, Tensor]:
        """One step of the transformer, one of the temperature."""
        surprise, entropy, cost_loss = self.losses(batch)
        temperature = self.log_temperature.detach().exp()
        loss = surprise - temperature * entropy + self.config.cost_weight * cost_loss
        self.steps += 1
        for group in self.optimizers["model"].param_groups:
            group["lr"] = self.config.lr * min(self.steps / self.config.warmup_steps, 1.0)
        gradients = torch.autograd.grad(loss, self._flat.parameters)
        self._flat.set_gradients(gradients, self.config.max_grad_norm)
        self.optimizers["model"].step()
        # d/d(log T) of T (H - H_target)
        self.log_temperature.grad = temperature * (entropy.detach() - self.config.target_entropy)
        self.optimizers["temperature"].step()
        return {
            "loss/policy": surprise.detach(),
            "loss/cost": cost_loss.detach(),
            "policy/entropy": entropy.detach(),
            "policy/temperature": temperature,
        }

    def state_dict(self) -> dict[str, Any]:
        """Temperature, optimisers and the number of steps; the transformer is the policy's."""
        return {
            "log_temperature": self.log_temperature.detach(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s answer."""
        with torch.no_grad():
            self.log_temperature.copy_(state["log_temperature"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.steps = state["steps"]


def to_go(values: Floats, data: OfflineDataset) -> Floats:
    """Sum (N,) of values (N,) from each row to its episode's end; the trailing fragment's are 0."""
    lengths, rows = data.episode_lengths, data.ends[-1] + 1
    sums = np.concatenate([[0.0], np.cumsum(values[:rows])])
    answer = np.zeros(len(values))
    answer[:rows] = np.repeat(sums[data.ends + 1], lengths) - sums[:-1]
    return answer


def best_return(data: OfflineDataset, cost_limit: float) -> float:
    """The largest return of a whole episode that costs at most the limit; raises UsageError for none."""
    within = data.episode_costs <= cost_limit
    if not within.any():
        raise UsageError(
            f"no episode of {data.source} keeps the limit of {cost_limit:g} (the least cost is "
            f"{data.episode_costs.min():g}); say what return to ask for with --target-return."
        )
    return float(data.episode_returns[within].max())


def augment(
    costs: Floats, returns: Floats, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.intp], Floats, Floats]:
    """Episodes to relabel and their new costs and returns, each (count,), from those of all episodes (E,).

    New costs lie evenly between the data's extremes, returns uniformly between the Pareto front at that cost
    and the data's best; the episode is the nearest that costs no more.
    """
    if not count:
        return np.zeros(0, np.intp), np.zeros(0), np.zeros(0)
    front, (low, high) = fit_front(costs, returns)
    best = returns.max()
    new_costs = np.linspace(costs.min(), costs.max(), count)
    floor = np.minimum(front(new_costs.clip(low, high)), best)  # no polynomial holds beyond its points
    new_returns = rng.uniform(floor, best)
    gaps = (costs - new_costs[:, None]) / (np.ptp(costs) or 1.0)  # (count, E)
    heights = (returns - new_returns[:, None]) / (np.ptp(returns) or 1.0)
    distances = np.where(gaps > 0, np.inf, np.hypot(gaps, heights))
    return distances.argmin(1), new_costs, new_returns


def fit_front(costs: Floats, returns: Floats) -> tuple[Polynomial, tuple[float, float]]:
    """A polynomial return(cost) through the Pareto front of episodes (E,), and the costs it was fitted on.

    The front are the episodes of which none other costs no more and earns more. See the module on outliers
    and degrees.
    """
    cells = [
        np.minimum(((values - values.min()) / (np.ptp(values) or 1.0) * bins).astype(np.intp), bins - 1)
        for values, bins in ((costs, 10), (returns, 50))
    ]
    _, cell, sizes = np.unique(cells[0] * 50 + cells[1], return_inverse=True, return_counts=True)
    kept = sizes[cell] > 2
    if kept.any():
        costs, returns = costs[kept], returns[kept]
    order = np.lexsort((-returns, costs))
    costs, returns = costs[order], returns[order]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(returns)[:-1]])
    costs, returns = costs[returns > before], returns[returns > before]
    spread = np.square(returns - returns.mean()).sum()
    for degree in range(min(4, len(costs) - 1) + 1):
        front = Polynomial.fit(costs, returns, degree)
        if np.square(front(costs) - returns).sum() <= 0.01 * spread:
            break
    return front, (float(costs.min()), float(costs.max()))


def train(config: Config, run: Run) -> nn.Module:
    """Train CDT; see `saferl.agents.offline.engine.train_offline`."""
    return train_offline(config, run, lambda context: CDT(config, context), reward_scale=config.reward_scale)
