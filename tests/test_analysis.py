"""What the figures look at, against independent computations."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from deme_lib import analysis
from deme_lib.analysis import FixedNoise
from deme_lib.merging import task_vector
from deme_lib.projection import ProjectedUNet2DModel
from deme_lib.randomness import generator
from deme_lib.timesteps import split_timesteps
from deme_lib.training import to_model_range

SCHEDULER = DDPMScheduler(1000)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 1, 8, 8), generator=generator("images")).to(torch.uint8)


class Zero(nn.Module):
    def forward(self, sample, timestep, return_dict=True):
        return (torch.zeros_like(sample),)


# fixed noise


def test_fixed_noise_is_the_scheduler_s(images):
    noise = FixedNoise(images, SCHEDULER, draws=5, seed=0)
    clean = to_model_range(images).repeat(5, 1, 1, 1)
    a = SCHEDULER.alphas_cumprod[noise.timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noise.noisy, a.sqrt() * clean + (1 - a).sqrt() * noise.noise)


def test_errors_of_large_images_are_taken_few_at_a_time(images):
    seen = []

    class Watched(Zero):
        def forward(self, sample, timestep, return_dict=True):
            seen.append(len(sample))
            return super().forward(sample, timestep)

    large = images.repeat(1, 1, 32, 32)  # 256x256
    for pictures in (images, large):
        FixedNoise(pictures, SCHEDULER, draws=2, seed=0).errors(Watched())
    assert seen == [12, 7, 5]


@pytest.mark.parametrize("draws", [1, 7])
def test_fixed_noise_spreads_its_timesteps_evenly(images, draws):
    timesteps = FixedNoise(images, SCHEDULER, draws, seed=0).timesteps.sort().values
    total = 6 * draws
    assert timesteps.tolist() == [i * 1000 // total for i in range(total)]
    assert timesteps.dtype == torch.int64


def test_fixed_noise_is_a_function_of_its_seed(images):
    first, again, other = (FixedNoise(images, SCHEDULER, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(first.noisy, again.noisy) and torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.noise, other.noise)


def test_predicting_nothing_loses_the_noise(images):
    """E eps^2 = 1; and the loss is the mean over bins, weighted by their draws."""
    noise = FixedNoise(images, SCHEDULER, draws=200, seed=0)
    assert noise.loss(Zero()) == pytest.approx(noise.noise.square().mean().item())
    assert noise.loss(Zero()) == pytest.approx(1, abs=0.02)
    bins = split_timesteps(4, 1000)
    errors = noise.errors(Zero())
    assert np.mean([noise.mean_in(errors, b) for b in bins]) == pytest.approx(noise.loss(Zero()))
    inside = (noise.timesteps >= 250) & (noise.timesteps < 500)
    expected = noise.noise[inside].square().mean().item()
    assert noise.mean_in(errors, bins[1]) == pytest.approx(expected)


def test_errors_are_those_of_one_draw_at_a_time(images, tiny_unet):
    unet, noise = tiny_unet(), FixedNoise(images, SCHEDULER, draws=1, seed=0)
    with torch.no_grad():
        expected = [
            (unet(x[None], t).sample - e).square().mean()
            for x, t, e in zip(noise.noisy, noise.timesteps, noise.noise, strict=True)
        ]
    torch.testing.assert_close(noise.errors(unet), torch.stack(expected), rtol=1e-4, atol=1e-6)


# gradients


def similarity(unet, images, timesteps, seed=0):
    return analysis.gradient_similarity(unet, SCHEDULER, images, timesteps, seed)


def test_gradient_similarity_is_a_cosine(images, tiny_unet):
    unet = tiny_unet().requires_grad_(True)
    found = similarity(unet, images, [10, 500, 990, 500])
    np.testing.assert_allclose(np.diag(found), 1)
    np.testing.assert_array_equal(found, found.T)
    assert found[1, 3] == pytest.approx(1) and found[0, 2] < 0.999
    assert np.abs(found).max() <= 1 + 1e-12
    assert all(w.grad is None for w in unet.parameters())


def test_gradient_similarity_by_hand(images, tiny_unet):
    unet, gradients = tiny_unet().requires_grad_(True), []
    noise = torch.randn(6, 1, 8, 8, generator=generator(0, "gradients"))
    for t in (100, 800):
        a = SCHEDULER.alphas_cumprod[t]
        noisy = a.sqrt() * to_model_range(images) + (1 - a).sqrt() * noise
        unet.zero_grad()
        nn.functional.mse_loss(unet(noisy, t).sample, noise).backward()
        gradients.append(torch.cat([w.grad.flatten() for w in unet.parameters()]))
    expected = torch.cosine_similarity(*gradients, dim=0).item()
    assert similarity(unet, images, [100, 800])[0, 1] == pytest.approx(expected, abs=1e-4)


# quantiles


def test_quantiles_of_a_known_distribution():
    values = torch.arange(101)[torch.randperm(101, generator=generator("order"))]
    expected = {"q05": 5, "q25": 25, "median": 50, "q75": 75, "q95": 95}
    assert analysis.quantiles(values) == pytest.approx(expected)


def test_the_parts_of_a_task_vector_cover_it(tiny_unet):
    first, second = (ProjectedUNet2DModel.from_stock(tiny_unet(seed)) for seed in (0, 1))
    vector = task_vector(first.state_dict(), second.state_dict())
    found = analysis.task_vector_quantiles(vector)
    parts = {"conv_in", "time_embedding", "down", "mid", "up", "conv_out", "projection"}
    assert found.keys() == parts
    sizes = {part: 0 for part in parts}
    for name, tensor in vector.items():
        sizes[analysis._part(name)] += tensor.numel()
    assert sum(sizes.values()) == sum(w.numel() for w in first.parameters())
    assert min(sizes.values()) > 0
    for part in found.values():
        assert all(a <= b for a, b in itertools.pairwise(part.values()))


def test_each_part_has_its_own_quantiles(tiny_unet):
    unet = ProjectedUNet2DModel.from_stock(tiny_unet())
    places = {"conv_in": 1.0, "down": 2.0, "mid": 3.0, "up": 4.0, "projection": 5.0}
    vector = {
        name: torch.full_like(tensor, places.get(analysis._part(name), 0.0))
        for name, tensor in unet.state_dict().items()
    }
    found = analysis.task_vector_quantiles(vector)
    assert found["projection"]["median"] == 5 and found["mid"]["q05"] == 3
    assert analysis._part("up_blocks.0.projection.weight") == "projection"
    assert analysis._part("up_blocks.0.resnets.0.conv1.weight") == "up"
    assert analysis._part("conv_norm_out.bias") == analysis._part("conv_out.bias") == "conv_out"
