"""Dropout by sixteen bits: rate, scale, independence, gradients, determinism."""

from __future__ import annotations

import math

import pytest
import torch

from saferl.nn.dropout import Dropout, dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_scale_and_gradient(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1_001, 401, requires_grad=True)
    y = dropout(x, rate)
    y.sum().backward()
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - rate) < 4 * math.sqrt(rate * (1 - rate) / x.numel()) + 2**-16
    torch.testing.assert_close(y[y > 0].unique(), torch.tensor([1 / (1 - rate)]), rtol=2e-4, atol=0)
    assert torch.equal(x.grad, y.detach())


def test_entries_are_independent() -> None:
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(100_000, 8), 0.3) == 0).float()
    correlations = torch.corrcoef(dropped.T) - torch.eye(8)
    assert correlations.abs().max() < 4 / math.sqrt(100_000)


def test_seed_and_mode() -> None:
    x, layer = torch.randn(7, 5), Dropout(0.4)
    torch.manual_seed(3)
    one = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), one)
    assert not torch.equal(layer(x), one)
    assert layer.eval()(x) is x
    assert dropout(x, 0.0) is x
    assert not dropout(x, 1.0).any()
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert dropout(x.double(), 0.4).dtype == torch.float64
