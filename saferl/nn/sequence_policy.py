"""A causal transformer over (return-to-go, cost-to-go, state, action), and the policy that acts by it."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from saferl.errors import UsageError
from saferl.nn.distributions import action_distribution
from saferl.nn.dropout import Dropout
from saferl.nn.spaces import ObservationEncoder, space_from_json, space_to_json

__all__ = ["SequenceModel", "SequencePolicy"]

_LOG_STD = (-5.0, 2.0)


class SequenceModel(nn.Module):
    """What a window of K steps says of the actions and of the costs.

    Every step has four tokens, (R, C, s, a), each an affine map of the number or vector plus a learned
    embedding of the time step; a token attends to itself and to those before it. The action's Gaussian is
    read off the state's token, the chance that the step costs anything off the action's.

    Args:
        observation_size: S.
        action_size: A.
        width: of the tokens, a multiple of `heads`.
        layers: of attention, each followed by a perceptron of four times the width (pre-norm, GELU).
        heads: of attention.
        times: number of time steps that have an embedding.
        dropout: of embeddings, attention and residuals, in training.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        width: int = 128,
        layers: int = 3,
        heads: int = 8,
        times: int = 1_000,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"the width {width} is no multiple of the {heads} heads; choose one that is.")
        self.times = nn.Embedding(times, width)
        self.returns = nn.Linear(1, width)
        self.costs = nn.Linear(1, width)
        self.observations = nn.Linear(observation_size, width)
        self.actions = nn.Linear(action_size, width)
        self.first_norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width)
        self.action_head = nn.Linear(width, 2 * action_size)
        self.cost_head = nn.Linear(width, 2)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, _Block):
                nn.init.xavier_uniform_(module.inputs.weight)  # as torch's attention starts

    def forward(
        self,
        returns: Tensor,
        costs: Tensor,
        observations: Tensor,
        actions: Tensor,
        times: Tensor,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gaussians of the actions and log-odds of a cost at every step of a window.

        Args:
            returns: (B, K), what is still to be earned, scaled.
            costs: (B, K), what may still be paid, scaled.
            observations: (B, K, S).
            actions: (B, K, A); the one of a step is seen by later steps and by its own cost alone.
            times: (B, K) integers, the step within the episode.
            valid: (B, K), False where a step is padding, which no other step then sees; None where there
                is none before a step of interest, since later ones are hidden anyhow.

        Returns:
            mean and log standard deviation side by side (B, K, 2 A), and the logits (B, K, 2) of no cost
            and of some.
        """
        size, steps = times.shape
        tokens = torch.stack(
            [
                self.returns(returns[..., None]),
                self.costs(costs[..., None]),
                self.observations(observations),
                self.actions(actions),
            ],
            dim=2,
        )
        tokens = (tokens + self.times(times)[:, :, None]).view(size, 4 * steps, -1)
        mask = None
        if valid is not None:
            causal = torch.ones(4 * steps, 4 * steps, dtype=torch.bool, device=valid.device).tril()
            itself = torch.eye(4 * steps, dtype=torch.bool, device=valid.device)
            # A padded token sees itself, or its softmax would be over nothing.
            mask = (causal & valid.repeat_interleave(4, dim=1)[:, None] | itself)[:, None]
        hidden = self.dropout(self.first_norm(tokens))
        for block in self.blocks:
            hidden = block(hidden, mask)
        hidden = self.last_norm(hidden).view(size, steps, 4, -1)
        mean, spread = self.action_head(hidden[:, :, 2]).chunk(2, dim=-1)
        low, high = _LOG_STD
        log_std = low + 0.5 * (high - low) * (1 + spread.tanh())
        return torch.cat([mean, log_std], dim=-1), self.cost_head(hidden[:, :, 3])


class _Block(nn.Module):
    """Attention, then a perceptron, each on normalised inputs and added to them."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width)
        self.outputs = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), Dropout(dropout)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        size, length, width = x.shape
        inputs = self.inputs(self.attention_norm(x)).view(size, length, 3, self.heads, width // self.heads)
        query, key, value = inputs.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.rate if self.training else 0.0,
            is_causal=mask is None,
        )
        x = x + self.dropout(self.outputs(attended.transpose(1, 2).reshape(size, length, width)))
        y: Tensor = x + self.perceptron(self.norm(x))
        return y


class SequencePolicy(nn.Module):
    """Acts by the last K steps and by what is left of a return and of a budget: `Policy` and `Stateful`.

    `target_return` and `target_cost`, in the environment's units, may be set at any time; an episode goes by
    what they are when it starts. What is left of the budget does not fall below 0, since no episode of the
    data has less to pay. A caller that never calls `observe` gets the actions of a first step.

    Args:
        observation_space: any space that `ObservationEncoder` takes.
        action_space: a bounded box.
        width, layers, heads, dropout: see `SequenceModel`.
        context: K.
        episode_steps: longest episode; steps beyond it share the last one's embedding.
        reward_scale: factor of rewards and returns.
        cost_unit: what costs-to-go are divided by before the network reads them.
        target_return: return asked for.
        target_cost: budget of an episode.

    Raises:
        UsageError: the actions fill no bounded box, or the width is no multiple of the heads.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        *,
        width: int = 128,
        layers: int = 3,
        heads: int = 8,
        dropout: float = 0.1,
        context: int = 10,
        episode_steps: int = 1_000,
        reward_scale: float = 0.1,
        cost_unit: float = 1.0,
        target_return: float,
        target_cost: float,
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self.settings: dict[str, Any] = {
            "width": width,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "context": context,
            "episode_steps": episode_steps,
            "reward_scale": reward_scale,
            "cost_unit": cost_unit,
        }
        self.context = context
        self.episode_steps = episode_steps
        self.reward_scale = reward_scale
        self.cost_unit = cost_unit
        self.target_return = target_return
        self.target_cost = target_cost
        self.encoder = ObservationEncoder(observation_space)
        # Its Gaussian is clipped to [-1, 1] when sampled; mean and deviation are the transformer's.
        self.box = action_distribution(action_space, head="deterministic")
        self.model = SequenceModel(
            self.encoder.size,
            self.box.action_size,
            width=width,
            layers=layers,
            heads=heads,
            times=episode_steps,
            dropout=dropout,
        )
        self._generator: torch.Generator | None = None
        self._history: _History | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.model.cost_head.weight.device

    def seed(self, seed: int) -> None:
        """Make the sampled actions of `act` reproducible."""
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def forward(
        self,
        returns: Tensor,
        costs: Tensor,
        observations: Tensor,
        actions: Tensor,
        times: Tensor,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`SequenceModel`'s answer, with costs-to-go (B, K) in the environment's units."""
        scaled = costs / self.cost_unit
        answer: tuple[Tensor, Tensor] = self.model(returns, scaled, observations, actions, times, valid)
        return answer

    def begin(self, num_envs: int) -> None:
        """Every one of `num_envs` environments starts an episode; see `saferl.policies.protocol.Stateful`."""
        weight = self.model.observations.weight
        sizes = {"observations": (self.encoder.size,), "actions": (self.box.action_size,)}
        empty = {
            name: torch.zeros((num_envs, self.context, *sizes.get(name, ())), dtype=weight.dtype)
            for name in ("returns", "costs", "observations", "actions")
        }
        self._history = _History(
            **{name: value.to(weight.device) for name, value in empty.items()},
            valid=torch.zeros((num_envs, self.context), dtype=torch.bool, device=weight.device),
            time=torch.zeros(num_envs, dtype=torch.int64, device=weight.device),
        )
        self._history.start(torch.ones(num_envs, dtype=torch.bool, device=weight.device), *self._targets())

    @torch.no_grad()
    def observe(self, rewards: ArrayLike, costs: ArrayLike, ended: ArrayLike) -> None:
        """What the actions of the last `act` led to, arrays (N,); see `saferl.policies.protocol.Stateful`.

        Raises:
            UsageError: `act` was never called with N environments.
        """
        over = torch.as_tensor(ended, device=self.device).bool()
        history = self._history
        if history is None or len(history.time) != len(over):
            raise UsageError(
                f"the policy is told of {len(over)} environments that it has not acted in; call act first."
            )
        paid, earned = (
            torch.as_tensor(x, device=self.device).to(history.returns.dtype) for x in (costs, rewards)
        )
        history.advance(earned * self.reward_scale, paid)
        history.start(over, *self._targets())

    def _targets(self) -> tuple[float, float]:
        return self.target_return * self.reward_scale, self.target_cost

    @torch.no_grad()
    def act(self, obs: Any, *, deterministic: bool = False) -> Any:
        """Actions for a batch of observations: arrays in, array out; tensors in, tensor on the device out.

        Every episode starts anew when the number of environments is another than before.
        """
        features = self.encoder(obs, self.device).to(self.model.observations.weight.dtype)
        history = self._history
        if history is None or len(history.time) != len(features) or history.time.device != features.device:
            self.begin(len(features))
            history = self._history
            assert history is not None
        history.observations[:, -1] = features
        history.actions[:, -1] = 0.0  # not yet chosen, and not seen by what chooses it
        parameters = self(*history.window(self.episode_steps))[0][:, -1]
        if deterministic:
            actions = self.box.mode(parameters).clamp(-1.0, 1.0)
        else:
            actions = self.box.sample(parameters, self._generator)
        history.actions[:, -1] = actions
        mapped = self.box.to_env(actions)
        leaf = obs
        while isinstance(leaf, dict | tuple):
            leaf = next(iter(leaf.values())) if isinstance(leaf, dict) else leaf[0]
        return mapped if isinstance(leaf, Tensor) else mapped.cpu().numpy()

    def describe(self) -> dict[str, Any]:
        """All that `from_description` needs to rebuild the module, as JSON values."""
        return {
            "kind": "sequence",
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            **self.settings,
            "target_return": float(self.target_return),
            "target_cost": float(self.target_cost),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> SequencePolicy:
        """Rebuild a policy (with fresh weights) from `describe`'s answer."""
        settings = {
            k: v for k, v in description.items() if k not in {"kind", "observation_space", "action_space"}
        }
        return cls(
            space_from_json(description["observation_space"]),
            space_from_json(description["action_space"]),
            **settings,
        )


class _History:
    """The last K steps of N environments, newest last; steps before the episode are not valid."""

    def __init__(
        self,
        *,
        returns: Tensor,
        costs: Tensor,
        observations: Tensor,
        actions: Tensor,
        valid: Tensor,
        time: Tensor,
    ) -> None:
        self.returns, self.costs = returns, costs
        self.observations, self.actions = observations, actions
        self.valid, self.time = valid, time

    def start(self, fresh: Tensor, target_return: float, target_cost: float) -> None:
        """Begin an episode in the environments of the mask (N,)."""
        self.valid &= ~fresh[:, None]
        self.valid[:, -1] = True
        self.returns[:, -1].masked_fill_(fresh, target_return)
        self.costs[:, -1].masked_fill_(fresh, target_cost)
        self.time.masked_fill_(fresh, 0)

    def advance(self, earned: Tensor, paid: Tensor) -> None:
        """Make room for the next step, whose targets are what is left of the newest one's; both (N,)."""
        left = self.returns[:, -1] - earned, (self.costs[:, -1] - paid).clamp(min=0.0)
        for part in (self.returns, self.costs, self.observations, self.actions, self.valid):
            part[:, :-1] = part[:, 1:].clone()
        self.returns[:, -1], self.costs[:, -1] = left
        self.time += 1

    def window(self, episode_steps: int) -> tuple[Tensor, ...]:
        """Arguments of `SequenceModel`, the costs in the environment's units."""
        context = self.returns.shape[1]
        back = torch.arange(context - 1, -1, -1, device=self.time.device)
        times = (self.time[:, None] - back).clamp(0, episode_steps - 1)
        return self.returns, self.costs, self.observations, self.actions, times, self.valid
