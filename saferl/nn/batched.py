"""Several small networks of one shape as one module: a batched product a layer serves them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saferl.nn.networks import ACTIVATIONS, mlp

__all__ = ["BatchedMLPs"]


class BatchedMLPs(nn.Module):
    """S networks as `saferl.nn.networks.mlp` builds them, evaluated together under autograd.

    Twin critics and one critic a cost then pay for one network's calls. The initial weights are those that
    `mlp` would draw for one network after the other, so a network more leaves the others' as they are.

    Args:
        count: networks S.
        input_size: features that all of them read.
        hidden_sizes: widths of every network.
        output_size: outputs of every network.
        activation: see `saferl.nn.networks.ACTIVATIONS`.
    """

    def __init__(
        self,
        count: int,
        input_size: int,
        hidden_sizes: Sequence[int],
        output_size: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        networks = [mlp(input_size, hidden_sizes, output_size, activation) for _ in range(count)]
        columns = zip(*([m for m in net if isinstance(m, nn.Linear)] for net in networks), strict=True)
        layers = list(columns)
        self.weights = nn.ParameterList(torch.stack([x.weight.detach().T for x in row]) for row in layers)
        self.biases = nn.ParameterList(torch.stack([x.bias.detach()[None] for x in row]) for row in layers)
        # The products are not needed for their gradient, so the activation may overwrite them.
        self.activation = nn.ReLU(inplace=True) if activation == "relu" else ACTIVATIONS[activation]()

    def __len__(self) -> int:
        return int(self.weights[0].shape[0])

    def forward(self, features: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Outputs (S, B, O) at features (B, D), shared by all networks; with `rows` of those alone."""
        hidden = features.expand(len(self) if rows is None else len(rows), *features.shape)
        last = len(self.weights) - 1
        for i, (weights, biases) in enumerate(zip(self.weights, self.biases, strict=True)):
            if rows is not None:
                weights, biases = weights[list(rows)], biases[list(rows)]
            hidden = torch.baddbmm(biases, hidden, weights)
            if i < last:
                hidden = self.activation(hidden)
        return hidden
