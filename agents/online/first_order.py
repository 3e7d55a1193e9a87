"""Mini-batch epochs of a first-order policy update, shared by PPO and all that build on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saferl.agents.online.engine import Context, OnPolicyConfig, Rollout, at_least
from saferl.losses import clipped_surrogate
from saferl.nn.models import ActorCritic
from saferl.nn.stacked import StackedMLPs

_CACHED_ROWS = 4096  # rows whose activations stay in a core's cache


@dataclass(frozen=True, kw_only=True)
class FirstOrderConfig(OnPolicyConfig):
    """Hyperparameters of the mini-batch update; defaults are those of OmniSafe's first-order family."""

    epochs: int = 40
    """Passes over the rollout, fewer when `target_kl` is exceeded."""
    batch_size: int = 64
    """Samples a gradient step."""
    target_kl: float = 0.02
    """Stop after the pass at whose end the mean KL(old || new) exceeds this."""
    actor_lr: float = 3e-4
    """Adam's learning rate for the policy, decayed linearly to zero over the run."""
    critic_lr: float = 3e-4
    """Adam's learning rate for the value networks."""
    clip: float = 0.2
    """Bound on the probability ratio's distance from 1."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 40.0
    """Largest gradient norm of each network."""
    critic_l2: float = 1e-3
    """Weight of the squared norm of the value networks' parameters in their loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in ("target_kl", "actor_lr", "critic_lr", "clip", "max_grad_norm", "critic_l2"):
            at_least(name.replace("_", " "), getattr(self, name), 0)


@dataclass
class Minibatch:
    """Samples of one gradient step, with the current policy's outputs."""

    index: Tensor
    """Positions in the rollout (M,)."""
    log_probs: Tensor
    """Of the current policy, with gradient (M,)."""
    parameters: Tensor
    """Of the current policy's distribution, with gradient (M, P)."""


def clipped_policy_loss(rollout: Rollout, advantages: Tensor, clip: float) -> Callable[[Minibatch], Tensor]:
    """PPO's clipped surrogate on given advantages (B,), as a function of a mini-batch."""

    def policy_loss(batch: Minibatch) -> Tensor:
        old_log_probs = rollout.log_probs[batch.index]
        return clipped_surrogate(batch.log_probs, old_log_probs, advantages[batch.index], clip)[0]

    return policy_loss


class FirstOrderUpdate:
    """Adam on a policy loss and on the value networks, over shuffled mini-batches.

    The networks are one stack (see `saferl.nn.stacked`): autograd sees only the policy loss as a function
    of the policy network's outputs.

    Args:
        config: see `FirstOrderConfig`.
        context: the model and the generator that shuffles.
    """

    def __init__(self, config: FirstOrderConfig, context: Context) -> None:
        self.config = config
        self.model: ActorCritic = context.model
        self.generator = context.generator
        actor = self.model.actor
        self.extras = [*actor.distribution.parameters()]
        self.stack = StackedMLPs([actor.network, *self.model.critics], self.extras)
        rows = self.stack.parameters, self.stack.gradients
        actor_row, critic_rows = (nn.Parameter(part) for part in (rows[0][:1], rows[0][1:]))
        actor_row.grad, critic_rows.grad = rows[1][:1], rows[1][1:]
        self._critic_rows = critic_rows
        # The gradient of l2 |w|^2 is 2 l2 w, which is what Adam's weight_decay adds to the gradient.
        self.optimizer = torch.optim.Adam(
            [
                {"params": [actor_row], "lr": config.actor_lr},
                {
                    "params": [critic_rows],
                    "lr": config.critic_lr,
                    "weight_decay": 2 * config.critic_l2,
                },
            ],
            fused=True,
        )

    def run(
        self,
        rollout: Rollout,
        policy_loss: Callable[[Minibatch], Tensor],
        progress: float,
        *,
        reference: Tensor | None = None,
        train_critics: bool = True,
    ) -> dict[str, float]:
        """Run the epochs; returns means of the losses, the final KL and the passes made.

        Args:
            rollout: the iteration's data.
            policy_loss: the loss to minimise on a mini-batch (a scalar with gradient).
            progress: share of the run that is done, for the learning-rate decay.
            reference: parameters (B, P) of the policy from which the stopping KL is measured; the behaviour
                policy's by default.
            train_critics: False leaves the value networks and their optimiser's state as they are.
        """
        config, stack = self.config, self.stack
        distribution = self.model.actor.distribution
        outputs = stack.outputs[0]
        self.optimizer.param_groups[0]["lr"] = config.actor_lr * (1 - progress)
        # Adam passes over parameters without gradient.
        self._critic_rows.grad = stack.gradients[1:] if train_critics else None
        reference = rollout.parameters if reference is None else reference
        size, device = len(rollout), rollout.features.device
        targets = rollout.targets.T.contiguous()
        sums = torch.zeros(2, device=device)
        steps = 0
        passes = 0
        kl = 0.0
        for _ in range(config.epochs):
            order = torch.randperm(size, generator=self.generator, device=device)
            for index in order.split(config.batch_size):
                predictions = stack.forward(rollout.features, index)
                policy_outputs = predictions[0, :, :outputs].detach().requires_grad_()
                parameters = distribution.parameters_of(policy_outputs)
                log_probs = distribution.log_prob(parameters, rollout.actions[index])
                loss = policy_loss(Minibatch(index, log_probs, parameters))
                if config.entropy_coef:
                    loss = loss - config.entropy_coef * distribution.entropy(parameters).mean()
                slope, *extra_slopes = torch.autograd.grad(loss, [policy_outputs, *self.extras])
                errors = predictions[1:, :, 0] - targets[:, index]
                slopes = torch.zeros_like(predictions)
                slopes[0, :, :outputs] = slope
                # The value loss is the squared error, averaged over samples and summed over networks.
                torch.mul(errors, 2 / len(index), out=slopes[1:, :, 0])
                stack.backward(slopes, extra_slopes)
                stack.clip_gradients(config.max_grad_norm)
                self.optimizer.step()
                sums += torch.stack([loss.detach(), errors.square().mean(1).sum()])
                steps += 1
            passes += 1
            with torch.no_grad():
                current = distribution.parameters_of(
                    torch.cat(
                        [
                            stack.forward(part, count=1)[0, :, :outputs].clone()
                            for part in rollout.features.split(_CACHED_ROWS)
                        ]
                    )
                )
                kl = float(distribution.kl(reference, current).mean())
            if kl > config.target_kl:
                break
        with torch.no_grad():
            entropy = float(distribution.entropy(current).mean())
        policy_mean, value_mean = (sums / steps).tolist()
        return {
            "loss/policy": policy_mean,
            "loss/value": value_mean,
            "policy/kl": kl,
            "policy/entropy": entropy,
            "policy/epochs": float(passes),
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimiser."""
        self.optimizer.load_state_dict(dict(state["optimizer"]))
