"""Feed-forward networks with the initialisation of the published constrained-RL agents."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def mlp(
    input_size: int, hidden_sizes: Sequence[int], output_size: int, activation: str = "tanh"
) -> nn.Sequential:
    """Build Linear-activation-...-Linear; weights are PyTorch's Kaiming-uniform (a = sqrt 5).

    That default is what OmniSafe and Safe-Policy-Optimization train with. Raises `KeyError` for an
    unknown activation.
    """
    layers: list[nn.Module] = []
    width = input_size
    for hidden in hidden_sizes:
        layers += [nn.Linear(width, hidden), ACTIVATIONS[activation]()]
        width = hidden
    layers.append(nn.Linear(width, output_size))
    return nn.Sequential(*layers)
