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


def test_sums_by_image_make_the_mean_of_a_range(noise):
    fixed, _ = noise
    errors, own = ERRORS, range(250, 700)
    sums, counts = fixed.by_image(errors, own)
    inside = [i for i in range(120) if fixed.timesteps[i] in own]
    for image in range(40):
        mine = [errors[i].item() for i in inside if fixed.image[i] == image]
        assert counts[image] == len(mine) and sums[image].item() == pytest.approx(sum(mine))
    assert (sums.sum() / counts.sum()).item() == pytest.approx(fixed.mean_in(errors, own))


def test_the_standard_error_is_clustered(noise):
    """Where all draws of an image err alike, only images count: the spread of image means."""
    fixed, _ = noise
    per_image = ERRORS[:40]
    everywhere = fixed.standard_error_in(per_image[fixed.image], range(1000))
    assert everywhere == pytest.approx(per_image.double().std().item() / 40**0.5)
