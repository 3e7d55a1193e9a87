"""Policy-gradient losses against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from saferl.losses import clipped_surrogate, value_loss


def test_clipped_surrogate_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    # min(rho A, clip A): 1.2, -1.5, 0.5, -0.8
    loss, diagnostics = clipped_surrogate(ratio.log(), torch.zeros(4), advantages, 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert diagnostics["clip_fraction"].item() == 1.0
    assert diagnostics["ratio"].item() == pytest.approx(1.0)


def test_gradient_vanishes_only_where_the_clip_binds() -> None:
    log_probs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    loss, _ = clipped_surrogate(log_probs, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    # d(-rho A / 4)/d log rho = -rho A / 4 where the unclipped term is the smaller one
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.5 / 4, -0.5 / 4, 0.0]))


def test_a_column_beside_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log_probs \(4, 1\)"):
        clipped_surrogate(torch.zeros(4, 1), torch.zeros(4), torch.zeros(4), 0.2)
    with pytest.raises(ValueError, match="one shape"):
        value_loss(torch.zeros(4, 1), torch.zeros(4))


def test_value_loss_sums_streams() -> None:
    values, targets = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.zeros(2, 2)
    assert value_loss(values, targets).item() == pytest.approx((1 + 9) / 2 + 4 / 2)
