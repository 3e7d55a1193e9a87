"""The autoencoder of actions: worked divergence, its loss in NumPy, and that it learns what it is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import tensor

from saferl.nn.variational import ActionVAE, divergence_from_prior


def test_the_worked_divergence() -> None:
    value = divergence_from_prior(tensor([0.5, -0.5]), tensor([1.0, 0.5]).log())
    assert value.mean().item() == pytest.approx(0.284074, abs=1e-6)
    normal = torch.distributions.Normal(tensor([0.5, -0.5]), tensor([1.0, 0.5]))
    prior = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    torch.testing.assert_close(value, torch.distributions.kl_divergence(normal, prior))


def test_the_loss_is_its_equation() -> None:
    torch.manual_seed(0)
    vae = ActionVAE(3, 2, hidden_size=8).double()
    s, a = torch.randn(5, 3).double(), torch.rand(5, 2).double() * 2 - 1

    def layers(net: torch.nn.Module, x: np.ndarray) -> np.ndarray:
        linear = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
        for k, m in enumerate(linear):
            x = x @ m.weight.detach().numpy().T + m.bias.detach().numpy()
            x = np.maximum(x, 0) if k + 1 < len(linear) else x
        return x

    code = layers(vae.encoder, np.concatenate([s, a], 1))
    mean, log_std = code[:, :4], np.clip(code[:, 4:], -4, 15)
    noise = torch.randn((5, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    rebuilt = np.tanh(layers(vae.decoder, np.concatenate([s, mean + np.exp(log_std) * noise], 1)))
    divergence = -0.5 * (1 + 2 * log_std - mean**2 - np.exp(2 * log_std))
    expected = ((rebuilt - a.numpy()) ** 2).mean() + 0.5 * divergence.mean()
    assert vae.loss(s, a, torch.Generator().manual_seed(1)).item() == pytest.approx(expected, rel=1e-12)


def test_it_generates_what_it_was_shown() -> None:
    torch.manual_seed(0)
    vae = ActionVAE(1, 1, hidden_size=32)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for _ in range(400):
        s = torch.rand(256, 1) * 2 - 1
        a = 0.5 * s + 0.2 * torch.randn_like(s).clamp(-1, 1)
        optimizer.zero_grad()
        vae.loss(s, a.clamp(-1, 1)).backward()
        optimizer.step()
    s = torch.linspace(-1, 1, 5)[:, None].expand(5, 1).repeat(200, 1)
    drawn = vae.sample(s, torch.Generator().manual_seed(0))
    again = vae.sample(s, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    assert drawn.abs().max() <= 1
    np.testing.assert_allclose(drawn.detach().view(200, 5).mean(0), 0.5 * np.linspace(-1, 1, 5), atol=0.1)
