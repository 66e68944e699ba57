"""Errors on fixed noise, counted by image."""

import pytest
import torch
from diffusers import DDPMScheduler

from deme_lib.diffusion.heldout import FixedNoise, batch_of

SCHEDULER = DDPMScheduler(1000)


@pytest.fixture
def fixed(images):
    return FixedNoise(images, SCHEDULER, draws=20, seed=0)


def test_timesteps_are_spread_evenly_and_all_is_a_function_of_the_seed(fixed, images):
    again, other = (FixedNoise(images, SCHEDULER, 20, seed) for seed in (0, 1))
    assert fixed.timesteps.sort().values.tolist() == [i * 1000 // 120 for i in range(120)]
    assert torch.equal(fixed.noisy, again.noisy) and torch.equal(fixed.timesteps, again.timesteps)
    assert not torch.equal(fixed.noise, other.noise)


def test_errors_by_hand_and_their_means(tiny_unet, fixed, images):
    unet = tiny_unet()
    found = fixed.errors(unet)
    a = SCHEDULER.alphas_cumprod[fixed.timesteps].view(-1, 1, 1, 1)
    clean = images.repeat(20, 1, 1, 1) / 127.5 - 1
    predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * fixed.noise, fixed.timesteps).sample
    expected = (predicted - fixed.noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert fixed.loss(unet) == pytest.approx(found.mean().item())
    inside = [e for e, t in zip(found.tolist(), fixed.timesteps.tolist(), strict=True) if t < 300]
    assert fixed.mean_in(found, range(300)) == pytest.approx(sum(inside) / len(inside))


@pytest.mark.parametrize(
    ("shape", "batch"),
    [((3, 32, 32), 500), ((1, 64, 64), 125), ((3, 64, 64), 125), ((4096, 64), 5)],
)
def test_batches_of_larger_data_are_smaller(shape, batch):
    assert batch_of(500, torch.empty(1, *shape, device="meta")) == batch
