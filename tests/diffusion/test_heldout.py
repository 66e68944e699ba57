"""Errors on fixed noise, counted by image."""

import pytest
import torch
from diffusers import DDPMScheduler

from deme_lib.diffusion.heldout import FixedNoise
from deme_lib.diffusion.randomness import generator
from deme_lib.diffusion.training import to_model_range

SCHEDULER = DDPMScheduler(1000)
ERRORS = torch.rand(120, generator=generator("errors"))


@pytest.fixture
def noise():
    images = torch.randint(0, 256, (40, 1, 2, 2), generator=generator("images")).to(torch.uint8)
    return FixedNoise(images, SCHEDULER, draws=3, seed=0), images


def test_timesteps_are_spread_evenly_and_all_is_a_function_of_the_seed(noise):
    fixed, images = noise
    again, other = (FixedNoise(images, SCHEDULER, 3, seed) for seed in (0, 1))
    assert fixed.timesteps.sort().values.tolist() == [i * 1000 // 120 for i in range(120)]
    assert torch.equal(fixed.noisy, again.noisy) and torch.equal(fixed.timesteps, again.timesteps)
    assert not torch.equal(fixed.noise, other.noise)


def test_errors_and_means_are_those_of_one_draw_at_a_time(tiny_unet):
    images = torch.randint(0, 256, (6, 1, 8, 8), generator=generator("images")).to(torch.uint8)
    unet, fixed = tiny_unet(), FixedNoise(images, SCHEDULER, draws=4, seed=0)
    with torch.no_grad():
        expected = [
            (unet(x[None], t).sample - e).square().mean()
            for x, t, e in zip(fixed.noisy, fixed.timesteps, fixed.noise, strict=True)
        ]
    found = fixed.errors(unet)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)
    assert fixed.loss(unet) == pytest.approx(found.mean().item())
    inside = [e for e, t in zip(found.tolist(), fixed.timesteps.tolist(), strict=True) if t < 300]
    assert fixed.mean_in(found, range(300)) == pytest.approx(sum(inside) / len(inside))


def test_every_draw_knows_its_image(noise):
    fixed, images = noise
    a = SCHEDULER.alphas_cumprod[fixed.timesteps].view(-1, 1, 1, 1)
    clean = (fixed.noisy - (1 - a).sqrt() * fixed.noise) / a.sqrt()
    expected = to_model_range(images)[fixed.image]
    torch.testing.assert_close(clean * a.sqrt(), expected * a.sqrt(), rtol=1e-4, atol=1e-5)


def test_the_standard_error_is_clustered(noise):
    """Where all draws of an image err alike, only images count: the spread of image means."""
    fixed, _ = noise
    per_image = ERRORS[:40]
    everywhere = fixed.standard_error_in(per_image[fixed.image], range(1000))
    assert everywhere == pytest.approx(per_image.double().std().item() / 40**0.5)
