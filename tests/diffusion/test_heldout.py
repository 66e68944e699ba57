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
