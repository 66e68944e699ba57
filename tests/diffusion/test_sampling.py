"""Sampling by diffusers' schedulers, with noise that belongs to the image and not to the batch."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from torch import nn

from deme_lib.diffusion import metrics, models, sampling
from deme_lib.diffusion.data import fashion8, shipped_pretrained
from deme_lib.diffusion.heldout import FixedNoise
from deme_lib.diffusion.models import ModelError
from deme_lib.diffusion.randomness import generator, seed_of
from deme_lib.diffusion.sampling import SamplingError, sample, sampling_scheduler, to_uint8
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


OWN_NOISE = {"use_clipped_model_output": True}
PIPELINES = {
    "ddim": ({"timestep_spacing": "trailing"}, OWN_NOISE),
    "ddim-diffusers": ({}, {}),
    "ddim-unclipped": ({"timestep_spacing": "trailing", "clip_sample": False}, {}),
}


@pytest.mark.parametrize("sampler", PIPELINES)
def test_ddim_equals_diffusers_pipeline(tiny_unet, sampler):
    """The pipeline draws image i from a generator of its own, so it starts from the same noise."""
    unet, (given, called) = tiny_unet(), PIPELINES[sampler]
    pipeline = DDIMPipeline(unet, DDIMScheduler(1000, **given))
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        batch_size=5,
        generator=[torch.Generator().manual_seed(seed_of(*PURPOSE, i)) for i in range(5)],
        num_inference_steps=4,
        output_type="np",
        **called,
    ).images
    expected = torch.from_numpy((found * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    difference = sampled(unet, sampler=sampler).int() - expected.int()
    assert difference.abs().max() <= 1
    assert (difference == 0).float().mean() > 0.99


@pytest.mark.parametrize("clips", [True, False])
def test_dpm_solver_is_diffusers_own(tiny_unet, clips):
    """Thresholding at the largest pixel, but not above 1, is clipping; two batches start anew."""
    unet, limits = tiny_unet(), {"dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
    solver = diffusers.DPMSolverMultistepScheduler(
        1000, use_lu_lambdas=True, thresholding=clips, **limits
    )
    solver.set_timesteps(7)
    x = torch.stack([torch.randn(1, 8, 8, generator=generator(*PURPOSE, i)) for i in range(5)])
    for t in solver.timesteps:
        x = solver.step(unet(x, t).sample, t, x).prev_sample
    found = sample(
        unet, DDPMScheduler(1000, clip_sample=clips), 5, steps=7, purpose=PURPOSE, batch_size=3
    )
    assert (found.int() - to_uint8(x).int()).abs().max() <= 1


def fids(sampler, steps, n=500):
    """FID to test images of fashion8's first pretrained model, on the same noise for all steps."""
    pipeline = models.load_pipeline(shipped_pretrained("fashion8", 0) / "pipeline")
    real = metrics.extract(torch.from_numpy(fashion8()["test"].images), "fashion8-a")
    made = {
        k: sample(pipeline.unet, pipeline.scheduler, n, steps=k, sampler=sampler) for k in steps
    }
    return [metrics.frechet(metrics.extract(x, "fashion8-a"), real) for x in made.values()]


def test_twenty_steps_of_dpm_solver_are_nearly_as_good_as_two_hundred():
    """Of a trained model; n = 500 (presets take 5,000)."""
    few, more, most = fids("dpm-solver", (20, 50, 200))
    assert most < 1.05 * more and few < 1.1 * most


def test_more_steps_make_ddim_better_and_diffusers_setting_of_it_worse():
    few, more = fids("ddim", (20, 60))
    assert more < few
    few, more = fids("ddim-diffusers", (20, 60))
    assert more > few


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


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
@pytest.mark.parametrize("schedule", ["sigmoid", "squaredcos_cap_v2"])
def test_any_schedule_of_betas_is_kept(schedule, sampler):
    """DDIM of diffusers knows no sigmoid."""
    scheduler = DDPMScheduler(1000, beta_schedule=schedule)
    found = sampling_scheduler(scheduler, sampler, 20)
    torch.testing.assert_close(found.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("sampler", sampling.SAMPLERS[:2])
@pytest.mark.parametrize("total", [100, 2000])
def test_sampling_begins_at_the_last_timestep_of_a_schedule_of_any_length(total, sampler):
    """Given in place of by name: diffusers calls such arguments defaults, and would drop them."""
    scheduler = DDPMScheduler(total, beta_end=0.01, steps_offset=1, timestep_spacing="leading")
    for steps in (1, 7, 60, 100):
        found = sampling_scheduler(scheduler, sampler, steps).timesteps
        assert found[0] == total - 1 and found[-1] >= 0 and len(found) == steps


@pytest.mark.parametrize("sampler", sampling.SAMPLERS[:2])
def test_a_last_timestep_without_signal_is_sampled_where_it_can_be(tiny_unet, sampler):
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert sample(tiny_unet(), DDPMScheduler(**zero), 2, steps=3, sampler=sampler).float().std() > 1
    with pytest.raises(ModelError, match="all is noise"):
        sample(tiny_unet(), DDPMScheduler(rescale_betas_zero_snr=True), 1, steps=2, sampler=sampler)


def test_clipping_is_as_the_model_s_scheduler_says():
    found = sampling_scheduler(DDPMScheduler(clip_sample_range=2.0), "ddim", 4)
    assert found.config.clip_sample_range == 2
    with pytest.raises(SamplingError, match=r"clips to 1, not to 2\.0: take sampler='ddim'"):
        sampling_scheduler(DDPMScheduler(clip_sample_range=2.0), "dpm-solver", 4)
    dynamic = DDPMScheduler(thresholding=True, sample_max_value=3.0)
    for sampler in sampling.SAMPLERS[:2]:
        found = sampling_scheduler(dynamic, sampler, 4).config
        assert (found.dynamic_thresholding_ratio, found.sample_max_value) == (0.995, 3.0)


def test_a_sampler_that_does_not_fit_is_refused(tiny_unet):
    with pytest.raises(SamplingError, match=r"FlowMatch.* no schedule of betas.*own pipeline"):
        sample(tiny_unet(), diffusers.FlowMatchEulerDiscreteScheduler(), 1, steps=2)
    for steps in (0, 1001):
        with pytest.raises(SamplingError, match=f"{steps} steps: give 1 to 1000"):
            sampled(tiny_unet(), steps=steps)
    with pytest.raises(SamplingError, match=r"463 steps .* fewer"):
        sampled(tiny_unet(), steps=463, sampler="ddim")
    with pytest.raises(SamplingError, match="batch_size=-5: give 1 or more"):
        sampled(tiny_unet(), batch_size=-5)
    with pytest.raises(SamplingError, match="choose one of dpm-solver, ddim"):
        sampled(tiny_unet(), sampler="euler")


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
