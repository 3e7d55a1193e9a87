"""The stack against autograd on the very same modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from saferl.nn.networks import ACTIVATIONS, mlp
from saferl.nn.stacked import StackedMLPs


def build(activation: str, hidden: tuple[int, ...] = (7, 5)) -> tuple[list[nn.Sequential], nn.Parameter]:
    torch.manual_seed(0)
    return [mlp(4, hidden, out, activation) for out in (3, 1, 1)], nn.Parameter(torch.randn(3))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("hidden", [(7, 5), (6,), ()])
def test_outputs_and_gradients_are_those_of_autograd(activation: str, hidden: tuple[int, ...]) -> None:
    networks, extra = build(activation, hidden)
    references, reference_extra = copy.deepcopy(networks), copy.deepcopy(extra)
    stack = StackedMLPs(networks, [extra])
    features, index = torch.randn(20, 4), torch.tensor([3, 1, 19, 3, 0])

    outputs = stack.forward(features, index)
    expected = [network(features[index]) for network in references]
    for s, wanted in enumerate(expected):
        torch.testing.assert_close(outputs[s, :, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-6)
    assert (outputs[1:, :, 1:] == 0).all()

    slopes = torch.zeros_like(outputs)
    slopes[0] = torch.randn(5, 3)
    slopes[1:, :, 0] = torch.randn(2, 5)
    stack.backward(slopes, [torch.ones(3)])
    total = sum((out * slopes[s, :, : out.shape[1]]).sum() for s, out in enumerate(expected))
    (total + reference_extra.sum()).backward()
    # Reading the gradient through an optimiser step of size one compares every parameter in its place.
    stack.parameters.sub_(stack.gradients)
    for network, reference in zip(networks, references, strict=True):
        for parameter, wanted in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(parameter.data, wanted.data - wanted.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(extra.data, reference_extra.data - 1)


def test_padding_stays_zero_and_networks_are_clipped_apart() -> None:
    networks, extra = build("tanh")
    stack = StackedMLPs(networks, [extra])
    features = torch.randn(6, 4)
    slopes = torch.zeros_like(stack.forward(features))
    slopes[0], slopes[1, :, 0] = 1.0, 100.0
    stack.backward(slopes, [torch.zeros(3)])
    assert stack.gradients[2].abs().sum() == 0
    before = stack.gradients.clone()
    stack.clip_gradients(1.0)
    for s in (0, 1):
        norm = before[s].norm()
        torch.testing.assert_close(stack.gradients[s], before[s] / max(1.0, float(norm + 1e-6)))
    assert (stack.forward(features)[1:, :, 1:] == 0).all()


def test_modules_and_stack_share_their_weights_both_ways() -> None:
    networks, extra = build("tanh")
    stack = StackedMLPs(networks, [extra])
    features = torch.randn(6, 4)
    for network in networks:
        network.load_state_dict({name: value + 1 for name, value in network.state_dict().items()})
    torch.testing.assert_close(stack.forward(features)[0], networks[0](features))
    torch.testing.assert_close(stack.forward(features, count=1)[0], networks[0](features))
    stack.parameters.mul_(0.5)
    torch.testing.assert_close(stack.forward(features)[1, :, :1], networks[1](features))


def test_networks_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        StackedMLPs([mlp(4, (7,), 1), mlp(4, (8,), 1)])
