"""Trust-region steps of the policy and the fit of its critics, shared by TRPO and all that build on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saferl.advantages import centre, standardise
from saferl.agents.online.engine import Context, OnPolicyConfig, Rollout, at_least
from saferl.natural_gradient import Step, conjugate_gradient, trust_region_scale
from saferl.nn.stacked import StackedMLPs


@dataclass(frozen=True, kw_only=True)
class SecondOrderConfig(OnPolicyConfig):
    """Hyperparameters of the trust region; defaults are those of OmniSafe's second-order family."""

    target_kl: float = 0.01
    """Radius of the trust region: the mean KL(old || new), summed over action dimensions."""
    cg_iterations: int = 15
    """Iterations of conjugate gradients."""
    cg_damping: float = 0.1
    """Multiple of the identity added to the Fisher information."""
    fisher_stride: int = 1
    """Every so many samples one is used for the Fisher information."""
    backtrack_steps: int = 15
    """Steps of the line search."""
    backtrack_factor: float = 0.8
    """Factor by which each step of the line search is shorter."""
    critic_epochs: int = 10
    """Passes over the rollout for the value networks."""
    critic_batch_size: int = 128
    """Samples of a gradient step of the value networks."""
    critic_lr: float = 1e-3
    """Adam's learning rate for the value networks."""
    max_grad_norm: float = 40.0
    """Largest gradient norm of each value network."""
    critic_l2: float = 1e-3
    """Weight of the squared norm of the value networks' parameters in their loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cg_iterations", "fisher_stride", "backtrack_steps"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in ("critic_epochs", "critic_batch_size"):
            at_least(name.replace("_", " "), getattr(self, name), 1)
        for name in ("target_kl", "cg_damping", "backtrack_factor", "critic_lr", "critic_l2"):
            at_least(name.replace("_", " "), getattr(self, name), 0)
        at_least("max grad norm", self.max_grad_norm, 0)


@dataclass(frozen=True)
class Candidate:
    """The policy at one point of a line search."""

    ratio: Tensor
    """pi / pi_k of the samples (B,)."""
    kl: float
    """Mean KL(pi_k || pi)."""

    def gain(self, advantages: Tensor) -> float:
        """Change of the surrogate E[rho A] against the old policy, for advantages (B,)."""
        return float(((self.ratio - 1) * advantages).mean())


class SecondOrderUpdate:
    """The natural-gradient step of a policy and Adam on its value networks.

    Vectors are flat, (P,): the policy network's parameters, then the distribution's own.

    Args:
        config: see `SecondOrderConfig`.
        context: the model and the generator that shuffles.
    """

    def __init__(self, config: SecondOrderConfig, context: Context) -> None:
        self.config = config
        self.generator = context.generator
        actor = context.model.actor
        self.distribution = actor.distribution
        self.extras = [*actor.distribution.parameters()]
        self.policy = StackedMLPs([actor.network], self.extras)
        self.critics = StackedMLPs([*context.model.critics])
        weights = nn.Parameter(self.critics.parameters)
        weights.grad = self.critics.gradients
        # The gradient of l2 |w|^2 is 2 l2 w, which is what Adam's weight_decay adds to the gradient.
        self.optimizer = torch.optim.Adam(
            [weights], lr=config.critic_lr, weight_decay=2 * config.critic_l2, fused=True
        )
        self._product: Callable[[Tensor], Tensor] | None = None

    # --- gradients and Fisher products at the rollout's policy -----------------------------------------

    def gradient(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """Gradient (P,) of the surrogate E[rho A] at the rollout's policy, for advantages (B,)."""
        outputs = self.policy.forward(rollout.features)[0].detach().requires_grad_()
        log_probs = self.distribution.log_prob(self.distribution.parameters_of(outputs), rollout.actions)
        surrogate = ((log_probs - rollout.log_probs).exp() * advantages).mean()
        slope, *extra_slopes = torch.autograd.grad(surrogate, [outputs, *self.extras])
        self.policy.backward(slope[None], extra_slopes)
        return self.policy.gradients[0].clone()

    def linearise(self, rollout: Rollout) -> None:
        """Take the Fisher information at the rollout's policy, before any step is tried.

        H = J' M J + damping, J being the network's Jacobian and M the Hessian of the mean KL divergence in
        the network's outputs and the distribution's parameters: as the KL has no slope there, this is its
        Hessian in all parameters.
        """
        features = rollout.features[:: self.config.fisher_stride]
        outputs = self.policy.forward(features)[0].detach().clone().requires_grad_()
        parameters = self.distribution.parameters_of(outputs)
        kl = self.distribution.kl(parameters.detach(), parameters).mean()
        points = [outputs, *self.extras]
        slopes = torch.autograd.grad(kl, points, create_graph=True)
        sizes = [extra.numel() for extra in self.extras]

        def product(vector: Tensor) -> Tensor:
            moved = self.policy.push(vector[None])[0]
            tail = vector[len(vector) - sum(sizes) :].split(sizes) if sizes else ()
            tangents = [moved, *(part.view_as(e) for part, e in zip(tail, self.extras, strict=True))]
            image, *extra_images = torch.autograd.grad(slopes, points, tangents, retain_graph=True)
            self.policy.backward(image[None], extra_images)
            return self.policy.gradients[0] + self.config.cg_damping * vector

        self._product = product

    def product(self, vector: Tensor) -> Tensor:
        """H v for v (P,), at the policy that `linearise` saw."""
        assert self._product is not None
        return self._product(vector)

    def solve(self, vector: Tensor) -> Tensor:
        """H^-1 v for v (P,), by conjugate gradients."""
        return conjugate_gradient(self.product, vector, iterations=self.config.cg_iterations)

    # --- steps ------------------------------------------------------------------------------------------

    def natural_step(self, rollout: Rollout, advantages: Tensor) -> tuple[Tensor, float]:
        """The step (P,) to the border of the trust region along the natural gradient, and its expected gain.

        Zero where the surrogate is flat.
        """
        gradient = self.gradient(rollout, advantages)
        self.linearise(rollout)
        direction = self.solve(gradient)
        scale = trust_region_scale(float(direction @ self.product(direction)), self.config.target_kl)
        step = scale * direction
        return step, float(gradient @ step)

    def try_step(self, rollout: Rollout, step: Tensor) -> Candidate:
        """Move the policy by `step` (P,) from where it is, and look at it."""
        self.policy.parameters[0] += step
        with torch.no_grad():
            parameters = self.distribution.parameters_of(self.policy.forward(rollout.features)[0])
            log_probs = self.distribution.log_prob(parameters, rollout.actions)
            kl = float(self.distribution.kl(rollout.parameters, parameters).mean())
            return Candidate((log_probs - rollout.log_probs).exp(), kl)

    def line_search(
        self, rollout: Rollout, step: Tensor, accept: Callable[[Candidate], bool]
    ) -> dict[str, float]:
        """Shorten `step` (P,) until `accept` holds and leave the policy there, or else where it was.

        Returns the KL divergence and the share of the step that was taken (0: none was accepted).
        """
        start = self.policy.parameters[0].clone()
        share = 1.0
        for _ in range(self.config.backtrack_steps):
            candidate = self.try_step(rollout, share * step)
            if accept(candidate):
                return {"policy/kl": candidate.kl, "policy/step_share": share}
            self.policy.parameters[0] = start
            share *= self.config.backtrack_factor
        return {"policy/kl": 0.0, "policy/step_share": 0.0}

    def improve(self, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
        """TRPO's step: the longest share of the natural one that improves E[rho A] within the KL bound."""
        step, expected = self.natural_step(rollout, advantages)
        if not expected > 0:
            return {"policy/kl": 0.0, "policy/step_share": 0.0}
        return self.line_search(
            rollout,
            step,
            lambda candidate: candidate.kl <= self.config.target_kl and candidate.gain(advantages) > 0,
        )

    def constrained_step(
        self, rollout: Rollout, excess: Mapping[str, float], solver: Callable[..., Step]
    ) -> dict[str, float]:
        """The step that `solver` finds for the reward under linearised constraints, and its line search.

        Args:
            rollout: the iteration's data.
            excess: c_i by cost: how much the mean cost of a step exceeds what the limit allows.
            solver: `cpo_step` or `pcpo_step` of `saferl.natural_gradient`.

        The longest share is taken whose KL divergence is at most delta, whose cost surrogates rise by no more
        than max(-c_i, 0), and, unless a constraint is violated, whose reward surrogate does not fall.
        """
        delta = self.config.target_kl
        advantages = standardise(rollout.advantages)
        costs = {name: centre(rollout.cost_advantages[name]) for name in excess}
        gradients = [self.gradient(rollout, part) for part in (advantages, *costs.values())]
        self.linearise(rollout)
        directions = [self.solve(gradient) for gradient in gradients]
        # A few inner products decide the step: take them in double precision.
        rows = torch.stack(gradients).double() @ torch.stack(directions).double().T
        products = ((rows + rows.T) / 2).cpu().numpy()
        found = solver(float(products[0, 0]), products[0, 1:], products[1:, 1:], list(excess.values()), delta)
        step = found.alpha * directions[0]
        for beta, direction in zip(found.beta, directions[1:], strict=True):
            step = step - float(beta) * direction

        def accept(candidate: Candidate) -> bool:
            return (
                candidate.kl <= delta
                and all(candidate.gain(costs[name]) <= max(-c, 0.0) for name, c in excess.items())
                and (found.case <= 1 or candidate.gain(advantages) >= 0)
            )

        taken = self.line_search(rollout, step, accept) if bool(step.any()) else {}
        return {"policy/kl": 0.0, "policy/step_share": 0.0, "policy/case": float(found.case)} | taken

    def entropy(self, rollout: Rollout) -> dict[str, float]:
        """The policy's mean entropy now, as a metric."""
        with torch.no_grad():
            parameters = self.distribution.parameters_of(self.policy.forward(rollout.features)[0])
            return {"policy/entropy": float(self.distribution.entropy(parameters).mean())}

    # --- value networks ---------------------------------------------------------------------------------

    def fit_critics(self, rollout: Rollout) -> dict[str, float]:
        """Mini-batch epochs on the squared error of the values; returns its mean as a metric."""
        config, stack = self.config, self.critics
        size, device = len(rollout), rollout.features.device
        targets = rollout.targets.T.contiguous()
        total, steps = torch.zeros((), device=device), 0
        for _ in range(config.critic_epochs):
            order = torch.randperm(size, generator=self.generator, device=device)
            for index in order.split(config.critic_batch_size):
                errors = stack.forward(rollout.features, index)[..., 0] - targets[:, index]
                stack.backward((errors * (2 / len(index)))[..., None])
                stack.clip_gradients(config.max_grad_norm)
                self.optimizer.step()
                total += errors.square().mean(1).sum()
                steps += 1
        return {"loss/value": float(total / steps)}

    def state_dict(self) -> dict[str, Any]:
        """The critics' optimiser; the policy's step has no memory."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimiser."""
        self.optimizer.load_state_dict(dict(state["optimizer"]))
