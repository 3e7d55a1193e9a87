"""Acting by what an autoencoder of the data's actions proposes, shifted a little, and critics that choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from saferl.nn.distributions import action_distribution
from saferl.nn.networks import mlp
from saferl.nn.spaces import ObservationEncoder, space_from_json, space_to_json
from saferl.nn.twin_critics import TwinCritics
from saferl.nn.variational import ActionVAE

__all__ = ["Perturbation", "ProposalPolicy"]


class Perturbation(nn.Module):
    """a -> clip(a + phi tanh(f(s, a)), -1, 1): moves an action by at most phi. Fujimoto et al. 2019.

    Args:
        observation_size: S.
        action_size: A.
        hidden_sizes: widths of f, whose hidden layers are tanh.
        scale: phi.
    """

    def __init__(
        self, observation_size: int, action_size: int, hidden_sizes: Sequence[int], scale: float
    ) -> None:
        super().__init__()
        self.scale = scale
        self.network = mlp(observation_size + action_size, hidden_sizes, action_size, "tanh")

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Actions (..., A) at observations (..., S)."""
        shift: Tensor = self.network(torch.cat([observations, actions], dim=-1)).tanh()
        return (actions + self.scale * shift).clamp(-1.0, 1.0)


class ProposalPolicy(nn.Module):
    """N proposals like the data's, each shifted, and of them the one with the largest Q - lambda Q_C.

    Q and Q_C are the least of their ensembles. With N = 1 no critic is asked. The policy protocol.

    Args:
        observation_space: any space that `ObservationEncoder` takes.
        action_space: a bounded box.
        hidden_sizes: widths of the perturbation and of the critics.
        vae_hidden_size: see `ActionVAE`.
        members: networks of each of the critics' four ensembles.
        scale: largest shift of an action, where actions span [-1, 1].
        candidates: N.

    Raises:
        UsageError: the actions fill no bounded box.
    """

    price: Tensor
    """lambda, a scalar that is stored with the weights."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        hidden_sizes: Sequence[int] = (256, 256),
        vae_hidden_size: int = 400,
        members: int = 2,
        scale: float = 0.05,
        candidates: int = 10,
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self.settings: dict[str, Any] = {
            "hidden_sizes": list(hidden_sizes),
            "vae_hidden_size": vae_hidden_size,
            "members": members,
            "scale": scale,
            "candidates": candidates,
        }
        self.candidates = candidates
        self.encoder = ObservationEncoder(observation_space)
        self.box = action_distribution(action_space, head="deterministic")
        size, actions = self.encoder.size, self.box.action_size
        self.vae = ActionVAE(size, actions, vae_hidden_size)
        self.perturbation = Perturbation(size, actions, hidden_sizes, scale)
        self.critics = TwinCritics(size + actions, hidden_sizes, members)
        self.register_buffer("price", torch.zeros(()))
        self._generator: torch.Generator | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.price.device

    def seed(self, seed: int) -> None:
        """Make the actions of `act` reproducible."""
        self._generator = torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def choose(self, features: Tensor, candidates: Tensor) -> Tensor:
        """The best (B, A) of candidates (B, N, A) in [-1, 1] at encoded observations (B, D)."""
        size, n, _ = candidates.shape
        if n == 1:
            return candidates[:, 0]
        q, q_c = self.critics.least(features.repeat_interleave(n, dim=0), candidates.flatten(0, 1))
        best = (q - self.price * q_c).view(size, n).argmax(1)
        return candidates[torch.arange(size, device=best.device), best]

    @torch.no_grad()
    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Actions for a batch of observations: arrays in, array out; tensors in, tensor on the device out.

        The policy has no mode: `deterministic` changes nothing, `seed` makes it reproducible.
        """
        features = self.encoder(obs, self.device).float()
        repeated = features.repeat_interleave(self.candidates, dim=0)
        candidates = self.perturbation(repeated, self.vae.sample(repeated, self._generator))
        chosen = self.choose(features, candidates.view(len(features), self.candidates, -1))
        actions = self.box.to_env(chosen)
        leaf = obs
        while isinstance(leaf, dict | tuple):
            leaf = next(iter(leaf.values())) if isinstance(leaf, dict) else leaf[0]
        return actions if isinstance(leaf, Tensor) else actions.cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """All that `from_description` needs to rebuild the module, as JSON values."""
        return {
            "kind": "proposal",
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            **self.settings,
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> ProposalPolicy:
        """Rebuild a policy (with fresh weights) from `describe`'s answer."""
        settings = {
            k: v for k, v in description.items() if k not in {"kind", "observation_space", "action_space"}
        }
        return cls(
            space_from_json(description["observation_space"]),
            space_from_json(description["action_space"]),
            **settings,
        )
