"""The fast Mish against torch's in float64: values, gradients, extremes, other shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saferl.nn.mish import Mish, mish


def test_worked_values() -> None:
    np.testing.assert_allclose(mish(torch.tensor([1.0, -1.0, 0.0])), [0.8650984, -0.3034015, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (33, 65), (2, 3, 5)])
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = (4 * torch.randn(shape)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    upstream = torch.randn(shape)
    ours, theirs = Mish()(x), torch.nn.functional.mish(exact)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    np.testing.assert_allclose(ours.detach(), theirs.detach(), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(x.grad, exact.grad, rtol=2e-6, atol=1e-6)
    assert torch.equal(mish(x.detach()), ours), "the same with and without a gradient"


def test_extremes() -> None:
    x = torch.tensor([-1e4, -200.0, -100.0, -88.0, 19.0, 21.0, 88.0, 100.0, 1e4], requires_grad=True)
    y = mish(x)
    y.sum().backward()
    exact = x.detach().double().requires_grad_()
    z = torch.nn.functional.mish(exact)
    z.sum().backward()
    np.testing.assert_allclose(y.detach(), z.detach(), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(x.grad, exact.grad, rtol=1e-6, atol=1e-30)
    assert mish(torch.tensor([float("nan")])).isnan().all()


def test_strided_and_double_inputs() -> None:
    x = torch.randn(6, 8).T
    np.testing.assert_allclose(mish(x), torch.nn.functional.mish(x), atol=1e-6)
    y = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mish, (y,))
    assert mish(torch.empty(0, 3)).shape == (0, 3)


def test_lengths_around_a_tile() -> None:
    for size in (1, 2_047, 2_048, 2_049, 10_000):
        x = torch.linspace(-30, 30, size)
        exact = torch.nn.functional.mish(x.double())
        np.testing.assert_allclose(mish(x), exact, rtol=1e-6, atol=1e-12)
