"""The actor of all agents, which is also the policy that a checkpoint stores, and the on-policy critics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from saferl.nn.distributions import Head, action_distribution
from saferl.nn.networks import mlp
from saferl.nn.normalise import RunningNormaliser
from saferl.nn.spaces import ObservationEncoder, space_from_json, space_to_json

Batch = TypeVar("Batch", np.ndarray, Tensor)


class Actor(nn.Module):
    """Observation normaliser, policy network and action distribution: all that acting needs.

    `act` implements the policy protocol: batched observations in, batched environment actions out.

    Args:
        observation_space: any space that `ObservationEncoder` takes.
        action_space: see `action_distribution`.
        hidden_sizes: widths of the policy network.
        activation: see `saferl.nn.networks.ACTIVATIONS`.
        normalise_observations: standardise observations by running moments.
        log_std_init: of a plain Gaussian.
        head: "plain" for on-policy agents, "squashed" for SAC, "deterministic" for TD3.
        exploration_noise: of a deterministic head.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        normalise_observations: bool = True,
        log_std_init: float = 0.0,
        head: Head = "plain",
        exploration_noise: float = 0.1,
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self.settings: dict[str, Any] = {
            "hidden_sizes": list(hidden_sizes),
            "activation": activation,
            "normalise_observations": normalise_observations,
            "log_std_init": log_std_init,
        }
        if head != "plain":
            self.settings |= {"head": head, "exploration_noise": exploration_noise}
        self.encoder = ObservationEncoder(observation_space)
        self.normaliser = RunningNormaliser(self.encoder.size) if normalise_observations else None
        self.distribution = action_distribution(
            action_space, log_std_init, head=head, exploration_noise=exploration_noise
        )
        self.network = mlp(self.encoder.size, hidden_sizes, self.distribution.network_size, activation)
        self._generator: torch.Generator | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.network.parameters()).device

    def encode(self, observations: Any, *, update: bool = False) -> Tensor:
        """Raw batched observations to the normalised float32 features (B, D) that the networks read.

        `update` first merges the batch into the normaliser (only in training mode).
        """
        features = self.encoder(observations, self.device)
        if update and self.normaliser is not None:
            self.normaliser.update(features)
        return self.normalise(features)

    def normalise(self, features: Tensor) -> Tensor:
        """Encoded observations (B, D), such as a replay buffer keeps, to what the networks read."""
        if self.normaliser is None:
            return features.float()
        normalised: Tensor = self.normaliser(features)
        return normalised

    def distribution_parameters(self, features: Tensor) -> Tensor:
        """Parameters (..., P) of the action distribution at features (..., D)."""
        return self.distribution.parameters_of(self.network(features))

    def seed(self, seed: int) -> None:
        """Make the stochastic actions of `act` reproducible."""
        self._generator = torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Actions for a batch of observations: arrays in, array out; tensors in, tensor on the device out."""
        parameters = self.distribution_parameters(self.encode(obs))
        if deterministic:
            actions = self.distribution.mode(parameters)
        else:
            actions = self.distribution.sample(parameters, self._generator)
        mapped = self.distribution.to_env(actions)
        leaf = obs
        while isinstance(leaf, dict | tuple):
            leaf = next(iter(leaf.values())) if isinstance(leaf, dict) else leaf[0]
        return mapped if isinstance(leaf, Tensor) else mapped.cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """All that `from_description` needs to rebuild the module, as JSON values."""
        return {
            "kind": "actor",
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            **self.settings,
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Actor:
        """Rebuild an actor (with fresh weights) from `describe`'s answer."""
        settings = {
            k: v for k, v in description.items() if k not in {"kind", "observation_space", "action_space"}
        }
        return cls(
            space_from_json(description["observation_space"]),
            space_from_json(description["action_space"]),
            **settings,
        )


class ActorCritic(nn.Module):
    """An actor and one value network for the reward and for every cost, none shared.

    Separate 64-64 tanh networks are the published set-up of Safety-Gymnasium's agents.

    Args:
        actor: the policy.
        num_costs: cost streams K; `values` then has 1 + K columns, the reward's first.
        hidden_sizes: widths of every value network.
        activation: see `saferl.nn.networks.ACTIVATIONS`.
    """

    def __init__(
        self,
        actor: Actor,
        num_costs: int,
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        self.actor = actor
        self.critics = nn.ModuleList(
            mlp(actor.encoder.size, hidden_sizes, 1, activation) for _ in range(1 + num_costs)
        )

    def values(self, features: Tensor) -> Tensor:
        """State values (..., 1 + K) at features (..., D): reward first, then the costs in order."""
        return torch.cat([critic(features) for critic in self.critics], dim=-1)
