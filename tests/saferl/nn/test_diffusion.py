"""The schedule's table, the denoising step, the loss and the network, as published and worked by hand."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import tensor

from saferl.errors import UsageError
from saferl.nn.diffusion import (
    NoisePredictor,
    Sampler,
    VPSchedule,
    ddpm_scheduler,
    fast_scheduler,
    noise_prediction_loss,
    sample_ddpm,
    sample_with,
)


def test_the_schedule_in_five_steps() -> None:
    schedule = VPSchedule(5)
    np.testing.assert_allclose(
        schedule.alphas, [0.8041254417, 0.5411818066, 0.3642189796, 0.2451218120, 0.1649686208], atol=1e-7
    )
    np.testing.assert_allclose(
        schedule.alpha_bars, [0.8041254417, 0.4351780593, 0.1585001087, 0.0388518338, 0.0064093334], atol=1e-7
    )
    np.testing.assert_allclose(schedule.betas, 1 - schedule.alphas, atol=1e-7)
    for steps in (1, 3, 20, 1000):
        assert VPSchedule(steps).alpha_bars[-1].item() == pytest.approx(math.exp(-5.05), rel=1e-5)
    assert not VPSchedule(5).state_dict()
    with pytest.raises(ValueError, match="at least 1"):
        VPSchedule(0)


def test_noise_goes_in_and_out() -> None:
    schedule = VPSchedule(5)
    noisy = schedule.add_noise(torch.full((2, 1), 0.5), torch.ones(2, 1), tensor([0, 4]))
    np.testing.assert_allclose(noisy[:, 0], [0.8909423866, 1.0368193382], atol=1e-6)
    one, noise = torch.ones(1, 1), torch.full((1, 1), 0.3)
    assert schedule.denoised_mean(one, noise, 4).item() == pytest.approx(1.8433076539, abs=1e-5)
    assert schedule.denoised_mean(one, noise, 0).item() == pytest.approx(0.9670987286, abs=1e-6)


def test_a_perfect_model_of_one_action_samples_it() -> None:
    schedule, action = VPSchedule(5), tensor([[0.3, -0.7]])

    def predict(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        kept = schedule.alpha_bars[steps][:, None]
        return (x - kept.sqrt() * action) / (1 - kept).sqrt()

    first = sample_ddpm(predict, schedule, (64, 2), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(first, action.expand(64, 2), atol=1e-6)
    wild = sample_ddpm(lambda x, steps: 5 * x, schedule, (64, 2), generator=torch.Generator().manual_seed(0))
    assert wild.abs().max() <= 1
    again = sample_ddpm(lambda x, steps: 5 * x, schedule, (64, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(wild, again)


def test_the_last_step_adds_no_noise_and_temperature_scales_the_others() -> None:
    def nothing(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    draws = [
        sample_ddpm(
            nothing, VPSchedule(2), (4000, 1), generator=torch.Generator().manual_seed(1), temperature=t
        )
        for t in (0.0, 1.0)
    ]
    single = sample_ddpm(nothing, VPSchedule(1), (4, 1), generator=torch.Generator().manual_seed(2))
    start = torch.randn((4, 1), generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(single, (start / math.sqrt(math.exp(-5.05))).clamp(-1, 1), rtol=1e-5)
    assert not torch.allclose(draws[0], draws[1])


def test_the_weighted_loss() -> None:
    loss = noise_prediction_loss(tensor([[0.0, 0], [1, 1]]), tensor([[1.0, 0], [0, 2]]), tensor([2.0, 0.5]))
    assert loss.item() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("sizes", "number"), [((60, 2), 1_652_514), ((17, 6), 1_643_558), ((7, 2), 1_638_946)]
)
def test_the_networks_published_size(sizes: tuple[int, int], number: int) -> None:
    assert sum(p.numel() for p in NoisePredictor(*sizes).parameters()) == number


def test_the_network_is_what_its_layers_say() -> None:
    torch.manual_seed(0)
    net = NoisePredictor(3, 2).double()
    observations, x = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    steps = torch.arange(5)
    with torch.no_grad():
        net.frequencies.fill_(0.25)
    angles = 2 * math.pi * steps[:, None].double() * 0.25 * torch.ones(1, 32).double()
    assert angles[2].cos().tolist() == pytest.approx([-1] * 32)
    condition = net.time(torch.cat([angles.cos(), angles.sin()], 1))
    hidden = net.first(torch.cat([x, observations, condition], 1))
    for block in net.blocks:
        inner = block.narrow(torch.nn.functional.mish(block.wide(block.norm(hidden))))
        hidden = hidden + inner
    expected = net.last(hidden * torch.tanh(torch.nn.functional.softplus(hidden)))
    net.eval()
    torch.testing.assert_close(net(observations, x, steps), expected)
    assert net.train()(observations, x, steps).equal(net(observations, x, steps)) is False  # dropout


def test_initial_weights() -> None:
    torch.manual_seed(0)
    net = NoisePredictor(60, 2)
    assert net.frequencies.std().item() == pytest.approx(0.2, rel=0.4)
    block = net.blocks[0]
    assert block.wide.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert block.narrow.weight.std().item() == pytest.approx(1 / 32, rel=0.02)
    assert net.first.weight.abs().max().item() <= math.sqrt(6 / (190 + 256))
    assert not net.first.bias.any()


def test_ddpm_is_diffusers() -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    schedule, net = VPSchedule(5), NoisePredictor(3, 2, width=16, blocks=1).eval()
    observations = torch.randn(64, 3)

    def predict(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return net(observations, x, steps)

    ours = sample_ddpm(predict, schedule, (64, 2), generator=torch.Generator().manual_seed(1))
    theirs = sample_with(
        ddpm_scheduler(schedule),
        5,
        predict,
        schedule,
        (64, 2),
        generator=torch.Generator().manual_seed(1),
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    noise, steps = torch.randn(64, 2), torch.randint(5, (64,))
    np.testing.assert_allclose(
        schedule.add_noise(ours, noise, steps),
        ddpm_scheduler(schedule).add_noise(ours, noise, steps),
        atol=1e-6,
    )


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
@pytest.mark.parametrize("passes", [1, 2, 3, 4, 5])
def test_fast_samplers_are_exact_for_one_action(sampler: Sampler, passes: int) -> None:
    pytest.importorskip("diffusers")
    schedule, action = VPSchedule(5), tensor([[0.3, -0.7]])
    calls = 0

    def predict(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        kept = schedule.alpha_bars[steps][:, None]
        return (x - kept.sqrt() * action) / (1 - kept).sqrt()

    scheduler = fast_scheduler(schedule, sampler, passes)
    drawn = sample_with(scheduler, passes, predict, schedule, (8, 2))
    np.testing.assert_allclose(drawn, action.expand(8, 2), atol=1e-5)
    assert calls == passes


def test_ddim_is_the_solver_of_order_one() -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = VPSchedule(5)

    def predict(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flip(-1) * 2 + 0.3 * steps[:, None])

    reference = diffusers.DDIMScheduler(
        5,
        trained_betas=schedule.betas.tolist(),
        clip_sample=False,
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    drawn = [
        sample_with(scheduler, 5, predict, schedule, (64, 2), generator=torch.Generator().manual_seed(0))
        for scheduler in (fast_scheduler(schedule, "ddim", 5), reference)
    ]
    np.testing.assert_allclose(*drawn, atol=1e-5)
    assert drawn[0].std() > 0.1


def test_impossible_samplers() -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(UsageError, match="1 to 5"):
        fast_scheduler(VPSchedule(5), "ddim", 6)
    with pytest.raises(UsageError, match="sampler"):
        fast_scheduler(VPSchedule(5), "euler", 2)  # type: ignore[arg-type]


def test_missing_diffusers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"saferl\[diffusion\]"):
        fast_scheduler(VPSchedule(5), "ddim", 2)
