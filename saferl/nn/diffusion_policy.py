"""Acting with a diffusion model of the data's actions and critics that choose among its samples."""

from __future__ import annotations

from typing import Any, Literal

import torch
from gymnasium import spaces
from torch import Tensor, nn

from saferl.errors import UsageError
from saferl.feasibility import feasible_first, least_risk
from saferl.nn.batched import BatchedMLPs
from saferl.nn.diffusion import (
    NoisePredictor,
    Sampler,
    VPSchedule,
    fast_scheduler,
    sample_ddpm,
    sample_with,
)
from saferl.nn.distributions import action_distribution
from saferl.nn.spaces import ObservationEncoder, space_from_json, space_to_json

__all__ = ["DiffusionPolicy", "Extraction", "critics", "xavier_"]

Extraction = Literal["least-risk", "feasible-first"]
"""Which of the sampled candidates is executed; see `saferl.feasibility`."""


class DiffusionPolicy(nn.Module):
    """N candidates from a denoising network, the one that the critics prefer: the policy protocol.

    The critics are a stack of four, two of the reward and two of the risk; candidates are judged by the
    smaller reward and the larger risk of each pair.

    Args:
        observation_space: any space that `ObservationEncoder` takes.
        action_space: a bounded box.
        width: of the denoising network; see `NoisePredictor`.
        blocks: of the denoising network.
        hidden_sizes: widths of the critics.
        diffusion_steps: T.
        candidates: N.
        extraction: how one is chosen.
        dropout: of the denoising network, in training.
        risk_limit: largest risk that is feasible.
        sampler: how candidates are drawn; all but ddpm need the diffusers package.
        passes: passes of the network that a fast sampler makes; T when left out. DDPM always makes T.

    Raises:
        UsageError: the actions fill no bounded box, diffusers is missing, or DDPM is asked for other passes.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        width: int = 256,
        blocks: int = 3,
        hidden_sizes: tuple[int, ...] = (256, 256),
        diffusion_steps: int = 5,
        candidates: int = 16,
        extraction: Extraction = "least-risk",
        dropout: float = 0.1,
        risk_limit: float = 0.0,
        sampler: Sampler = "ddpm",
        passes: int | None = None,
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self.settings: dict[str, Any] = {
            "width": width,
            "blocks": blocks,
            "hidden_sizes": list(hidden_sizes),
            "diffusion_steps": diffusion_steps,
            "candidates": candidates,
            "extraction": extraction,
            "dropout": dropout,
            "risk_limit": risk_limit,
        }
        self.candidates = candidates
        self.extraction = extraction
        self.risk_limit = risk_limit
        self.encoder = ObservationEncoder(observation_space)
        self.box = action_distribution(action_space, head="deterministic")
        self.schedule = VPSchedule(diffusion_steps)
        self.predictor = NoisePredictor(
            self.encoder.size, self.box.action_size, width=width, blocks=blocks, dropout=dropout
        )
        self.critics = critics(4, self.encoder.size + self.box.action_size, hidden_sizes)
        self._generator: torch.Generator | None = None
        self.use_sampler(sampler, passes)

    def use_sampler(self, sampler: Sampler, passes: int | None = None) -> None:
        """Draw candidates in another way from now on; no network changes. Raises as the constructor does."""
        steps = len(self.schedule)
        if sampler == "ddpm" and passes not in (None, steps):
            raise UsageError(f"ddpm makes {steps} passes, one a noise level; for fewer take ddim.")
        self.passes = steps if passes is None else passes
        self._scheduler = None if sampler == "ddpm" else fast_scheduler(self.schedule, sampler, self.passes)
        self.settings.update(sampler=sampler, passes=passes)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.predictor.frequencies.device

    def seed(self, seed: int) -> None:
        """Make the actions of `act` reproducible."""
        self._generator = torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def propose(self, features: Tensor) -> Tensor:
        """Candidates (B, N, A) in [-1, 1] for encoded observations (B, D).

        What the network makes of observations and of time is computed once for all candidates and steps.
        """
        size, n = len(features), self.candidates
        observed = self.predictor.embed_observations(features).repeat_interleave(n, dim=0)
        times = self.predictor.embed_times(torch.arange(len(self.schedule), device=features.device))

        def predict(x: Tensor, steps: Tensor) -> Tensor:
            return self.predictor.trunk(observed, times[steps[:1]], x)

        shape = (size * n, self.box.action_size)
        if self._scheduler is None:
            drawn = sample_ddpm(predict, self.schedule, shape, generator=self._generator)
        else:
            drawn = sample_with(
                self._scheduler, self.passes, predict, self.schedule, shape, generator=self._generator
            )
        return drawn.view(size, n, -1)

    @torch.no_grad()
    def judge(self, features: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Reward values, and risks above the limit, (B, N) of candidates (B, N, A) at features (B, D)."""
        size, n, _ = candidates.shape
        pairs = torch.cat([features[:, None].expand(size, n, -1), candidates], dim=-1)
        values = self.critics(pairs.flatten(0, 1))[..., 0].view(4, size, n)
        return values[:2].amin(0), values[2:].amax(0) - self.risk_limit

    @torch.no_grad()
    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Actions for a batch of observations: arrays in, array out; tensors in, tensor on the device out.

        The policy has no mode: `deterministic` changes nothing, `seed` makes it reproducible.
        """
        features = self.encoder(obs, self.device).float()
        candidates = self.propose(features)
        values, risks = self.judge(features, candidates)
        best = least_risk(risks) if self.extraction == "least-risk" else feasible_first(risks, values)
        actions = self.box.to_env(candidates[torch.arange(len(best), device=best.device), best])
        leaf = obs
        while isinstance(leaf, dict | tuple):
            leaf = next(iter(leaf.values())) if isinstance(leaf, dict) else leaf[0]
        return actions if isinstance(leaf, Tensor) else actions.cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """All that `from_description` needs to rebuild the module, as JSON values."""
        return {
            "kind": "diffusion",
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            **self.settings,
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> DiffusionPolicy:
        """Rebuild a policy (with fresh weights) from `describe`'s answer."""
        settings = {
            k: v for k, v in description.items() if k not in {"kind", "observation_space", "action_space"}
        }
        settings["hidden_sizes"] = tuple(settings["hidden_sizes"])
        return cls(
            space_from_json(description["observation_space"]),
            space_from_json(description["action_space"]),
            **settings,
        )


def critics(count: int, input_size: int, hidden_sizes: tuple[int, ...]) -> BatchedMLPs:
    """ReLU networks with Xavier-uniform weights and zero biases, as FISOR's critics start."""
    return xavier_(BatchedMLPs(count, input_size, hidden_sizes))


@torch.no_grad()
def xavier_(networks: BatchedMLPs) -> BatchedMLPs:
    """Draw every network's weights Xavier-uniform and set the biases to zero, in place."""
    for weights, biases in zip(networks.weights, networks.biases, strict=True):
        for weight in weights:
            nn.init.xavier_uniform_(weight)
        biases.zero_()
    return networks
