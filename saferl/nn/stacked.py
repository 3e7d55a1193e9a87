"""Several small networks of one shape, evaluated and differentiated side by side without autograd.

The gradient step of an actor with its critics is a few matrix products of 64 columns: on a CPU the
bookkeeping around them (autograd's graph, fresh buffers, one small kernel a network and layer) and a slow
tanh take three quarters of the time. Here the S networks share one batched product a layer, buffers are
reused, and tanh is NumPy's vectorised one. The module's own parameters become views of the stack's storage,
so everything else (checkpoints, acting, other code's autograd) sees the same weights as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["StackedMLPs"]


class StackedMLPs:
    """S networks as `saferl.nn.networks.mlp` builds them, equal but for the width of their last layer.

    `parameters` and `gradients` are (S, P): a row a network, with the weights and biases of its layers one
    after the other (the last layer padded with zeros to the widest, which stay zero), then `extras`.

    Args:
        networks: Linear-activation-...-Linear each, with equal inputs, hidden sizes and activation.
        extras: further parameters of the first network, e.g. a log standard deviation, at the end of its row.

    Raises:
        ValueError: the networks' shapes differ.
    """

    parameters: Tensor
    gradients: Tensor

    def __init__(self, networks: Sequence[nn.Sequential], extras: Sequence[nn.Parameter] = ()) -> None:
        layers = [[module for module in network if isinstance(module, nn.Linear)] for network in networks]
        shapes = {tuple(layer.in_features for layer in stack) for stack in layers}
        if len(shapes) != 1:
            raise ValueError(f"these networks differ in shape: {sorted(shapes)}.")
        self.outputs = tuple(stack[-1].out_features for stack in layers)
        width = max(self.outputs)
        sizes = [(layer.out_features, layer.in_features) for layer in layers[0]]
        sizes[-1] = (width, sizes[-1][1])
        total = sum(rows * columns + rows for rows, columns in sizes)
        tail = sum(extra.numel() for extra in extras)
        like = layers[0][0].weight
        self.parameters = torch.zeros(len(layers), total + tail, device=like.device)
        self.gradients = torch.zeros_like(self.parameters)
        self._sizes, self._last = sizes, 0
        self._weights, self._biases = _views(self.parameters, sizes)
        self._weight_gradients, self._bias_gradients = _views(self.gradients, sizes)
        with torch.no_grad():
            for s, stack in enumerate(layers):
                for layer, weights, biases in zip(stack, self._weights, self._biases, strict=True):
                    rows = layer.out_features
                    _move(layer.weight, weights[s, :rows])
                    _move(layer.bias, biases[s, 0, :rows])
            self._extra_gradients = []
            start = total
            for extra in extras:
                end = start + extra.numel()
                _move(extra, self.parameters[0, start:end].view_as(extra))
                self._extra_gradients.append(self.gradients[0, start:end].view_as(extra))
                start = end
        self._hidden = [rows for rows, _ in sizes[:-1]]
        activations = [module for module in networks[0] if not isinstance(module, nn.Linear)]
        self._activation = _Activation(activations[0]) if activations else None
        self._workspaces: dict[tuple[int, int], _Workspace] = {}

    def forward(self, features: Tensor, index: Tensor | None = None, count: int | None = None) -> Tensor:
        """Outputs (S, B, O) at the rows `index` (B,) of `features` (N, D), or at all of them.

        O is the widest last layer; a narrower network's further columns are zero. With `count` only the
        first so many networks are evaluated. The result and what `backward` needs live in buffers that the
        next call of the same shape overwrites.
        """
        count = len(self.parameters) if count is None else count
        size = len(features) if index is None else len(index)
        space = self._workspace(count, size, features)
        self._last = size
        if index is None:
            space.inputs[0] = features
        else:
            torch.index_select(features, 0, index, out=space.gathered)
            space.inputs[0] = space.gathered
        with torch.no_grad():
            # The first layer's input is the same for all networks: a view with stride 0.
            space.inputs[0] = space.inputs[0].expand(count, *space.inputs[0].shape)
            for i, out in enumerate(space.outputs):
                weights = self._weights[i][:count].transpose(1, 2)
                torch.baddbmm(self._biases[i][:count], space.inputs[i], weights, out=out)
                if i + 1 < len(space.outputs):
                    space.inputs[i + 1] = self._activate(out, space, i)
        return space.outputs[-1]

    def backward(self, output_gradients: Tensor, extra_gradients: Sequence[Tensor] = ()) -> None:
        """Fill `gradients` from those with respect to the last `forward`'s outputs (S, B, O).

        Columns beyond a network's own outputs must be zero. `extra_gradients` are those of the extras.
        """
        space = self._workspaces[len(self.parameters), output_gradients.shape[1]]
        upstream = output_gradients
        with torch.no_grad():
            for i in reversed(range(len(self._weights))):
                self._weight_gradients[i].copy_(torch.bmm(upstream.transpose(1, 2), space.inputs[i]))
                self._bias_gradients[i].copy_(upstream.sum(1, keepdim=True))
                if i > 0:
                    torch.bmm(upstream, self._weights[i], out=space.slopes[i - 1])
                    upstream = self._differentiate(space.slopes[i - 1], space, i - 1)
            for view, gradient in zip(self._extra_gradients, extra_gradients, strict=True):
                view.copy_(gradient)

    def push(self, tangent: Tensor) -> Tensor:
        """Derivative (S, B, O) of the last `forward`'s outputs along `tangent` (S, P): a Jacobian product.

        `backward` is its transpose's. Both are for the same point and all S networks.
        """
        space = self._workspaces[len(self.parameters), self._last]
        weights, biases = _views(tangent, self._sizes)
        with torch.no_grad():
            moved: Tensor | None = None
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                change = torch.baddbmm(bias, space.inputs[i], weight.transpose(1, 2))
                if moved is not None:
                    change.baddbmm_(moved, self._weights[i].transpose(1, 2))
                if i + 1 < len(weights):
                    moved = self._differentiate(change, space, i)
        return change

    def clip_gradients(self, max_norm: float) -> None:
        """Scale every network's gradient down to a norm of at most `max_norm`, each on its own."""
        norms = torch.linalg.vector_norm(self.gradients, dim=1, keepdim=True)
        self.gradients.mul_((max_norm / (norms + 1e-6)).clamp_(max=1.0))

    # --- buffers and the activation -----------------------------------------------------------------

    def _workspace(self, count: int, size: int, features: Tensor) -> _Workspace:
        key = count, size
        if key not in self._workspaces:
            if len(self._workspaces) > 5:  # mini-batches and evaluations, each with a shorter last one
                self._workspaces.clear()
            widths = [*self._hidden, max(self.outputs)]
            self._workspaces[key] = _Workspace(count, size, features.shape[1], widths, features)
        return self._workspaces[key]

    def _activate(self, out: Tensor, space: _Workspace, layer: int) -> Tensor:
        assert self._activation is not None
        if space.arrays is not None and self._activation.is_tanh:
            np.tanh(space.arrays[layer], out=space.arrays[layer])
            return out
        return self._activation.forward(out, space, layer)

    def _differentiate(self, upstream: Tensor, space: _Workspace, layer: int) -> Tensor:
        assert self._activation is not None
        if self._activation.is_tanh:
            values = space.inputs[layer + 1]
            torch.ops.aten.tanh_backward.grad_input(upstream, values, grad_input=upstream)
            return upstream
        return self._activation.backward(upstream, space, layer)


class _Activation:
    """Any elementwise activation: tanh by its own derivative, the others through autograd."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Callable[[Tensor], Tensor] = module
        self.is_tanh = isinstance(module, nn.Tanh)

    def forward(self, out: Tensor, space: _Workspace, layer: int) -> Tensor:
        if self.is_tanh:
            return torch.tanh_(out)
        space.before[layer] = out.detach().requires_grad_()
        with torch.enable_grad():
            space.after[layer] = self.module(space.before[layer])
        return space.after[layer].detach()

    def backward(self, upstream: Tensor, space: _Workspace, layer: int) -> Tensor:
        # Kept, since a Fisher product comes back to the same point again and again.
        return torch.autograd.grad(space.after[layer], space.before[layer], upstream, retain_graph=True)[0]


class _Workspace:
    """Buffers for one batch size."""

    def __init__(self, stack: int, size: int, inputs: int, widths: Sequence[int], like: Tensor) -> None:
        def buffer(*shape: int) -> Tensor:
            return torch.empty(*shape, device=like.device, dtype=torch.float32)

        self.gathered = buffer(size, inputs)
        self.outputs = [buffer(stack, size, width) for width in widths]
        self.slopes = [buffer(stack, size, width) for width in widths[:-1]]
        self.inputs: list[Tensor] = [self.gathered] * len(widths)
        self.before: list[Tensor] = [self.gathered] * len(widths)
        self.after: list[Tensor] = [self.gathered] * len(widths)
        on_cpu = like.device.type == "cpu"
        self.arrays = [out.numpy() for out in self.outputs] if on_cpu else None


def _views(flat: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights (S, out, in) and biases (S, 1, out) of every layer as views of rows of `flat`."""
    weights, biases, start = [], [], 0
    for rows, columns in sizes:
        weights.append(flat[:, start : start + rows * columns].unflatten(1, (rows, columns)))
        start += rows * columns
        biases.append(flat[:, start : start + rows].unflatten(1, (1, rows)))
        start += rows
    return weights, biases


def _move(parameter: Tensor, view: Tensor) -> None:
    """Copy a parameter's value into `view` and let it live there."""
    view.copy_(parameter)
    parameter.data = view
