"""Sampling: diffusers' DDIM, with noise that belongs to the image and not to the batch."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from deme_lib.diffusion.heldout import FixedNoise
from deme_lib.diffusion.randomness import seed_of
from deme_lib.diffusion.sampling import SamplingError, ddim_scheduler, sample, to_uint8
from deme_lib.diffusion.training import to_model_range

SCHEDULER = DDPMScheduler(1000)
PURPOSE = ("evaluation", 3)


class OptimalDenoiser(nn.Module):
    """The best possible noise prediction on a finite data set, in closed form.

    E[x0 | x_t] weights the images by softmax(-|x_t - sqrt(a) x0|^2 / 2(1 - a)); the noise follows
    from x_t = sqrt(a) x0 + sqrt(1 - a) eps.
    """

    def __init__(self, images, config):
        super().__init__()
        self.data, self.config = to_model_range(images), config

    def forward(self, sample, timestep, return_dict=True):
        assert not return_dict
        a = SCHEDULER.alphas_cumprod[torch.as_tensor(timestep)].expand(len(sample))
        a = a.double().view(-1, 1)
        x, data = sample.double().flatten(1), self.data.double().flatten(1)
        square = (x[:, None] - a[..., None].sqrt() * data[None]).square().sum(-1)
        mean = (-square / (2 * (1 - a))).softmax(1) @ data
        noise = (x - a.sqrt() * mean) / (1 - a).sqrt()
        return (noise.view_as(sample).float(),)


def sampled(denoiser, count=5, steps=4, purpose=PURPOSE, **options):
    return sample(denoiser, SCHEDULER, count, steps=steps, purpose=purpose, **options)


# seeds


def test_seeds_are_63_bit_and_differ_by_purpose():
    words = [("a", 0), ("a", 1), ("b", 0), (0, "a"), (1, "a"), ("a", "b"), ("b", "a"), (0, 1)]
    seeds = {seed_of(*w) for w in words}
    assert len(seeds) == len(words) and all(0 <= s < 2**63 for s in seeds)


# against diffusers


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_equals_diffusers_pipeline(tiny_unet, spacing):
    """The pipeline draws image i from a generator of its own, so it starts from the same noise."""
    unet = tiny_unet()
    pipeline = DDIMPipeline(unet, DDIMScheduler(1000, timestep_spacing=spacing))
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        batch_size=5,
        generator=[torch.Generator().manual_seed(seed_of(*PURPOSE, i)) for i in range(5)],
        num_inference_steps=4,
        output_type="np",
    ).images
    expected = torch.from_numpy((found * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    difference = sampled(unet, spacing=spacing).int() - expected.int()
    assert difference.abs().max() <= 1
    assert (difference == 0).float().mean() > 0.99


# images and batches


def test_an_image_does_not_depend_on_its_batch(tiny_unet):
    unet, told = tiny_unet(sample_size=(8, 16), in_channels=3, out_channels=3), []
    together = sampled(unet, count=7)
    assert together.shape == (7, 3, 8, 16) and together.dtype == torch.uint8
    apart = sampled(unet, count=7, batch_size=3, on_batch=told.append)
    later = sampled(unet, count=4, first=3)
    for found, same in ((apart, together), (later, together[3:])):
        assert (found.int() - same.int()).abs().max() <= 1
    assert told == [3, 3, 1]  # for a bar


def test_to_uint8_undoes_the_model_range_and_clips():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(values)), values)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


# the closed form


def test_the_optimal_denoiser_samples_the_data_set(images, tiny_unet):
    found = sampled(OptimalDenoiser(images, tiny_unet().config), count=12, steps=20).int()
    nearest = (found[:, None] - images[None].int()).abs().amax(dim=(2, 3, 4)).min(dim=1)
    assert nearest.values.max() <= 1
    assert len(nearest.indices.unique()) > 1


def test_no_denoiser_beats_the_optimal_one(images, tiny_unet):
    """Its expected loss is the least there is; on common draws the excess is an average of
    differences, so a model may only seem better by a few standard errors of that average."""
    noise = FixedNoise(images, SCHEDULER, draws=500, seed=0)
    best = noise.errors(OptimalDenoiser(images, None)).double()
    excess = noise.errors(tiny_unet()).double() - best
    assert excess.mean() > 4 * excess.std() / len(excess) ** 0.5


# schedules that are unlike


@pytest.mark.parametrize("schedule", ["sigmoid", "squaredcos_cap_v2"])
def test_any_schedule_of_betas_is_kept(schedule):
    """DDIM of diffusers knows no sigmoid."""
    scheduler = DDPMScheduler(1000, beta_schedule=schedule)
    ddim = ddim_scheduler(scheduler, 20, "leading")
    assert torch.equal(ddim.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("steps", [100, 2000])
def test_a_schedule_keeps_its_length(tiny_unet, steps):
    """Given in place of by name: diffusers calls such arguments defaults, and would drop them."""
    scheduler = DDPMScheduler(steps, beta_end=0.01)
    ddim = ddim_scheduler(scheduler, 20, "leading")
    assert ddim.timesteps[0] == steps - steps // 20 and len(ddim.alphas_cumprod) == steps
    assert sample(tiny_unet(), scheduler, 1, steps=2).shape == (1, 1, 8, 8)


def test_a_timestep_that_the_schedule_has_not_is_refused():
    offset = DDPMScheduler(1000, steps_offset=1)
    assert ddim_scheduler(offset, 50, "leading").timesteps[-1] == 1
    with pytest.raises(SamplingError, match=r"1000 steps with steps_offset=1 .* timestep 1000 of"):
        ddim_scheduler(offset, 1000, "leading")


def test_other_schedules_and_no_steps_are_refused(tiny_unet):
    with pytest.raises(SamplingError, match=r"FlowMatch.* no DDPM schedule.*own pipeline"):
        sample(tiny_unet(), FlowMatchEulerDiscreteScheduler(), 1, steps=2)
    with pytest.raises(SamplingError, match="0 steps: give 1"):
        sampled(tiny_unet(), steps=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_models_sample_in_their_type_without_dropout_or_a_learned_variance(tiny_unet, kind):
    unet = tiny_unet(dropout=0.5, out_channels=2).to(kind)
    expected = sampled(unet)
    unet.train().conv_in.eval()
    assert torch.equal(sampled(unet), expected)
    assert unet.training and unet.mid_block.training and not unet.conv_in.training


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_samples_that_are_not_finite_are_refused(tiny_unet, wrong):
    """They would be black images, which score like any others."""
    unet = tiny_unet()
    unet.conv_out.bias.fill_(wrong)
    with pytest.raises(SamplingError, match=r"pixels are NaN or infinite: .*weights"):
        sampled(unet)
