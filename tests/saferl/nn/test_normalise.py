"""Running moments equal the moments of all the data, and evaluation does not move them."""

from __future__ import annotations

import torch

from saferl.nn import RunningNormaliser


def test_moments_equal_those_of_all_batches_together() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1000, 5, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1e3]) + 7
    normaliser = RunningNormaliser(5)
    for batch in data.split([1, 9, 90, 300, 600]):
        normaliser.update(batch)
    torch.testing.assert_close(normaliser.mean, data.double().mean(0))
    torch.testing.assert_close(normaliser.variance, data.double().var(0, unbiased=False))
    assert normaliser.count == 1000


def test_worked_example_with_floor_and_clip() -> None:
    normaliser = RunningNormaliser(3)
    normaliser.update(torch.tensor([[0.0, 5.0, 0.0], [2.0, 5.0, 0.0]]))
    # mean (1, 5, 0), deviation (1, 0 -> floor 0.01, 0 -> floor 0.01)
    got = normaliser(torch.tensor([[3.0, 5.02, 1.0]]))
    torch.testing.assert_close(got, torch.tensor([[2.0, 2.0, 5.0]]), atol=1e-4, rtol=0)
    assert got.dtype == torch.float32


def test_without_data_it_is_the_identity() -> None:
    torch.testing.assert_close(RunningNormaliser(2)(torch.tensor([[1.0, -2.0]])), torch.tensor([[1.0, -2.0]]))


def test_evaluation_freezes_the_moments() -> None:
    normaliser = RunningNormaliser(2)
    normaliser.update(torch.randn(10, 2))
    before = {k: v.clone() for k, v in normaliser.state_dict().items()}
    normaliser.eval()
    normaliser.update(torch.randn(10, 2) + 100)
    for key, value in normaliser.state_dict().items():
        assert torch.equal(value, before[key])


def test_scaling_alone_keeps_the_sign() -> None:
    normaliser = RunningNormaliser(1, centre=False)
    normaliser.update(torch.tensor([[10.0], [12.0]]))
    torch.testing.assert_close(normaliser(torch.tensor([[3.0]])), torch.tensor([[3.0]]))
