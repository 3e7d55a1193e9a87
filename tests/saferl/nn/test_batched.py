"""Batched networks against single ones; flat parameters against torch's own clipping and averaging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from saferl.nn.batched import BatchedMLPs
from saferl.nn.flat import FlatParameters
from saferl.nn.networks import ACTIVATIONS, mlp


def pair(
    activation: str = "relu", hidden: tuple[int, ...] = (7, 5)
) -> tuple[BatchedMLPs, list[nn.Sequential]]:
    torch.manual_seed(0)
    singles = [mlp(4, hidden, 2, activation) for _ in range(3)]
    torch.manual_seed(0)
    return BatchedMLPs(3, 4, hidden, 2, activation), singles


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("hidden", [(7, 5), (6,), ()])
def test_outputs_and_gradients_are_those_of_single_networks(activation: str, hidden: tuple[int, ...]) -> None:
    batched, singles = pair(activation, hidden)
    x = torch.randn(6, 4, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    outputs, expected = batched(x), torch.stack([net(y) for net in singles])
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(batched(x, [2, 0]), expected[[2, 0]])
    outputs.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for s, net in enumerate(singles):
        layers = [layer for layer in net if isinstance(layer, nn.Linear)]
        for layer, weights, biases in zip(layers, batched.weights, batched.biases, strict=True):
            torch.testing.assert_close(weights.grad[s], layer.weight.grad.T)
            torch.testing.assert_close(biases.grad[s, 0], layer.bias.grad)


def test_a_network_more_leaves_the_weights_of_the_others() -> None:
    torch.manual_seed(0)
    two = BatchedMLPs(2, 4, (5,))
    torch.manual_seed(0)
    three = BatchedMLPs(3, 4, (5,))
    for a, b in zip(two.parameters(), three.parameters(), strict=True):
        assert torch.equal(a, b[:2])


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_each_network_of_a_stack_is_clipped_on_its_own(max_norm: float) -> None:
    batched, singles = pair()
    flat = FlatParameters(batched.parameters(), stacked=True)
    x = torch.randn(6, 4)
    optimizer = torch.optim.Adam([flat.values], lr=0.1)
    scales = torch.tensor([0.1, 1.0, 5.0])
    for _ in range(3):
        loss = (batched(x).square().mean((1, 2)) * scales).sum()
        flat.set_gradients(torch.autograd.grad(loss, flat.parameters), max_norm)
        optimizer.step()
    for s, net in enumerate(singles):
        reference = torch.optim.Adam(net.parameters(), lr=0.1)
        for _ in range(3):
            reference.zero_grad()
            (net(x).square().mean() * scales[s]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            reference.step()
        torch.testing.assert_close(batched(x)[s], net(x), rtol=1e-4, atol=1e-5)


def test_following_is_the_average_of_all_parameters() -> None:
    net = mlp(4, (5,), 2)
    target = mlp(4, (5,), 2)
    wanted = [
        0.9 * t.detach() + 0.1 * p.detach()
        for t, p in zip(target.parameters(), net.parameters(), strict=True)
    ]
    FlatParameters(target.parameters()).follow(FlatParameters(net.parameters()), 0.1)
    for parameter, value in zip(target.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_loading_a_state_keeps_the_views() -> None:
    net = mlp(4, (5,), 2)
    state = copy.deepcopy(net.state_dict())
    flat = FlatParameters(net.parameters())
    flat.values.data.zero_()
    net.load_state_dict(state)
    assert flat.values.abs().sum() > 0
    assert torch.equal(flat.values[0, :20].view(5, 4), state["0.weight"])
