"""A conditional variational autoencoder of the data's actions (Kingma and Welling 2014; Sohn et al. 2015).

    encoder  (s, a) -> mu, log sigma        decoder  (s, z) -> a in [-1, 1]        z ~ N(mu, sigma^2)
    loss     mean (a_hat - a)^2 + 1/2 mean -1/2 (1 + log sigma^2 - mu^2 - sigma^2)

both means over the batch and the dimensions. Batch-constrained learners act on what it generates. Sizes,
clamping and the factor 1/2 are those of BCQ's authors (Fujimoto et al. 2019) as OSRL has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saferl.nn.networks import mlp

__all__ = ["ActionVAE", "divergence_from_prior"]


class ActionVAE(nn.Module):
    """Generates actions like the data's.

    Args:
        observation_size: S.
        action_size: A; actions lie in [-1, 1].
        hidden_size: width of the two hidden layers of encoder and decoder.
        latent_size: Z; 2 A when left out.
    """

    def __init__(
        self, observation_size: int, action_size: int, hidden_size: int = 400, latent_size: int | None = None
    ) -> None:
        super().__init__()
        self.latent_size = 2 * action_size if latent_size is None else latent_size
        widths = (hidden_size, hidden_size)
        self.encoder = mlp(observation_size + action_size, widths, 2 * self.latent_size, "relu")
        self.decoder = mlp(observation_size + self.latent_size, widths, action_size, "relu")

    def encode(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma (..., Z), log sigma within [-4, 15], of (..., S) and (..., A)."""
        mean, log_std = self.encoder(torch.cat([observations, actions], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(-4.0, 15.0)

    def decode(self, observations: Tensor, latents: Tensor) -> Tensor:
        """Actions (..., A) in [-1, 1] of observations (..., S) and latents (..., Z)."""
        return self.decode_unsquashed(observations, latents).tanh()

    def decode_unsquashed(self, observations: Tensor, latents: Tensor) -> Tensor:
        """What `decode` takes the tanh of."""
        outputs: Tensor = self.decoder(torch.cat([observations, latents], dim=-1))
        return outputs

    def prior(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (..., Z) from the prior, clamped to [-1/2, 1/2] as BCQ does."""
        shape = (*observations.shape[:-1], self.latent_size)
        latents = torch.randn(
            shape, generator=generator, device=observations.device, dtype=observations.dtype
        )
        return latents.clamp(-0.5, 0.5)

    def sample(self, observations: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Actions (..., A) of latents from `prior`."""
        return self.decode(observations, self.prior(observations, generator))

    def loss(self, observations: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scalar loss of a batch (B, S), (B, A)."""
        mean, log_std = self.encode(observations, actions)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        rebuilt = self.decode(observations, mean + log_std.exp() * noise)
        return (rebuilt - actions).square().mean() + 0.5 * divergence_from_prior(mean, log_std).mean()


def divergence_from_prior(mean: Tensor, log_std: Tensor) -> Tensor:
    """-1/2 (1 + log sigma^2 - mu^2 - sigma^2), the divergence KL(N(mu, sigma^2) | N(0, 1)), elementwise."""
    return -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp())
