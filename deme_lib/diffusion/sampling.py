"""Sampling in which the noise of an image depends on (purpose, index) alone."""

from collections.abc import Callable

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
)
from torch import nn

from deme_lib.diffusion.denoisers import Denoiser
from deme_lib.diffusion.models import noise_schedule, shape_of
from deme_lib.diffusion.randomness import generator
from deme_lib.errors import Explained

SAMPLERS = ("dpm-solver", "ddim", "ddim-diffusers", "ddim-unclipped")


class SamplingError(Explained, RuntimeError):
    """A model makes no images, or a schedule has no such timestep."""


def sampling_scheduler(
    scheduler: SchedulerMixin, sampler: str, steps: int
) -> DPMSolverMultistepScheduler | DDIMScheduler:
    """diffusers' scheduler for a sampler, set to ``steps`` timesteps.

    They begin at the last one, but for ddim-diffusers.

    Of the model's own scheduler its betas, ``prediction_type``, and clipping or thresholding of the
    estimated image hold; how it spaces timesteps does not, so that models are compared alike.

    Args:
        scheduler: a model's, of betas, whatever their schedule.
        sampler: "dpm-solver", DPM-Solver++ of second order (Lu et al. 2022b) at equal steps in
            log-SNR; or "ddim" (Song et al. 2021, eta = 0) at equal steps in t. Both go on from the
            estimate that they clipped. Two distort, and are here to be measured: "ddim-diffusers",
            diffusers' default for models with ``clip_sample``, clips the estimate and goes on with
            the unclipped noise, at leading timesteps; "ddim-unclipped" never clips.

    Raises:
        ModelError: the schedule is none to train with, see ``noise_schedule``.
        SamplingError: an unknown sampler, a schedule without betas, too many steps for it, or a
            ``clip_sample_range`` that DPM-Solver++ lacks.
    """
    if sampler not in SAMPLERS:
        raise SamplingError(f"sampler={sampler!r}: choose one of {', '.join(SAMPLERS)}")
    schedule = noise_schedule(scheduler)
    if not isinstance(schedule, DDPMScheduler):
        raise SamplingError(
            f"{type(scheduler).__name__} is no schedule of betas, which is sampled here: sample "
            "such a model by its own pipeline"
        )
    config, end = dict(schedule.config), schedule.config.num_train_timesteps
    if not 1 <= steps <= end:
        raise SamplingError(f"{steps} steps: give 1 to {end}, as many timesteps as there are")
    config.pop("_use_default_values", None)  # from_config drops what is named there, given or not
    config |= {"trained_betas": schedule.betas.tolist(), "steps_offset": 0}
    config |= {"rescale_betas_zero_snr": bool(schedule.alphas_cumprod[-1] == 0)}
    if sampler == "dpm-solver":
        if config["clip_sample"] and not config["thresholding"]:
            if (limit := config.get("clip_sample_range", 1.0)) != 1:
                raise SamplingError(f"dpm-solver clips to 1, not to {limit}: take sampler='ddim'")
            config |= {"thresholding": True, "dynamic_thresholding_ratio": 1.0}
            config |= {"sample_max_value": 1.0}
        found = DPMSolverMultistepScheduler.from_config(config, use_lu_lambdas=True)
    else:
        spacing = "leading" if sampler == "ddim-diffusers" else "trailing"
        if sampler == "ddim-unclipped":
            config |= {"clip_sample": False, "thresholding": False}
        found = DDIMScheduler.from_config(config, timestep_spacing=spacing)
    found.set_timesteps(steps)
    if len(found.timesteps) != steps:
        raise SamplingError(f"{steps} steps cannot be spread over {end} timesteps: take fewer")
    return found


def _steps(found: SchedulerMixin, sampler: str) -> Callable[..., torch.Tensor]:
    """x_t to x of the next timestep, by a scheduler that starts a batch anew."""
    if isinstance(found, DPMSolverMultistepScheduler):
        found.set_timesteps(found.num_inference_steps)  # forget the last batch
        found.set_begin_index(0)  # timesteps near 0 may be there twice
        return lambda *given: found.step(*given).prev_sample
    own = sampler != "ddim-diffusers"
    return lambda *given: found.step(*given, use_clipped_model_output=own).prev_sample


@torch.inference_mode()
def sample(
    denoiser: nn.Module,
    scheduler: SchedulerMixin,
    count: int,
    *,
    steps: int,
    sampler: str = SAMPLERS[0],
    purpose: tuple[int | str, ...] = ("sample", 0),
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], object] = lambda done: None,
    first: int = 0,
) -> torch.Tensor:
    """Images first..first+count-1 of the stream ``purpose``, such as ("evaluation", seed).

    Args:
        denoiser: a ``UNet2DModel`` or an ensemble, already on ``device``; it samples in
            evaluation mode, in its own type.
        scheduler, sampler, steps: see ``sampling_scheduler``.
        on_batch: told the number of images of each finished batch.

    Returns:
        uint8 [count, C, H, W].

    Raises:
        ModelError, SamplingError: an image is not finite, or the sampler does not fit the schedule.
    """
    if min(count, batch_size) < 1:
        raise SamplingError(f"count={count}, batch_size={batch_size}: give 1 or more")
    chosen, shape = sampling_scheduler(scheduler, sampler, steps), shape_of(denoiser)
    indices, images = range(first, first + count), torch.zeros(count, *shape, dtype=torch.uint8)
    predict, modes = Denoiser(denoiser), {m: m.training for m in denoiser.modules()}
    denoiser.eval()
    try:
        for start in range(0, count, batch_size):
            mine = slice(start, start + batch_size)
            generators = [generator(*purpose, i) for i in indices[mine]]  # one an image
            x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
            step = _steps(chosen, sampler)
            for t in chosen.timesteps:
                x = step(predict(x, t), t, x)
            images[mine] = to_uint8(x).cpu()
            on_batch(min(batch_size, count - start))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [-1, 1] (clipped) to uint8; SamplingError: NaN or infinity."""
    if not images.isfinite().all():
        raise SamplingError(
            "some of the samples' pixels are NaN or infinite: look for merge weights that are too "
            "large, weights of the model that are not finite, or a timestep without signal"
        )
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
