"""DDIM sampling in which the noise of an image depends on (purpose, index) alone."""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from deme_lib.diffusion.denoisers import Denoiser
from deme_lib.diffusion.models import shape_of
from deme_lib.diffusion.randomness import generator
from deme_lib.errors import Explained


class SamplingError(Explained, RuntimeError):
    """A model makes no images, or a schedule has no such timestep."""


def initial_noise(indices: range, shape: tuple[int, ...], *purpose: int | str) -> torch.Tensor:
    """Standard normal float32 [len(indices), *shape], one generator an image."""
    return torch.stack([torch.randn(shape, generator=generator(*purpose, i)) for i in indices])


def ddim_scheduler(scheduler: DDPMScheduler, steps: int, spacing: str) -> DDIMScheduler:
    """diffusers' DDIM scheduler (eta = 0) on the betas of a DDPM one, whatever their schedule.

    Args:
        spacing: ``leading``, ``trailing`` or ``linspace``; it moves FID, so it is recorded.

    Raises:
        SamplingError: it has no betas, or no such timesteps.
    """
    config = dict(scheduler.config)
    if not hasattr(scheduler, "betas") or config.get("use_flow_sigmas"):
        raise SamplingError(
            f"{type(scheduler).__name__} is no DDPM schedule of betas, which is sampled here: "
            "sample such a model by its own pipeline"
        )
    if steps < 1:
        raise SamplingError(f"{steps} steps: give 1 or more")
    config.pop("_use_default_values", None)  # from_config drops what is named there, given or not
    config |= {"trained_betas": scheduler.betas.tolist(), "rescale_betas_zero_snr": False}
    ddim = DDIMScheduler.from_config(config, timestep_spacing=spacing)
    ddim.set_timesteps(steps)
    first, end = ddim.timesteps.max(), ddim.config.num_train_timesteps
    if first >= end:
        raise SamplingError(
            f"{steps} steps with steps_offset={ddim.config.steps_offset} of the scheduler's config "
            f"begin at timestep {first} of [0, {end}): take fewer, or `trailing`"
        )
    return ddim


@torch.inference_mode()
def sample(
    denoiser: nn.Module,
    scheduler: DDPMScheduler,
    count: int,
    *,
    steps: int,
    purpose: tuple[int | str, ...] = ("sample", 0),
    spacing: str = "leading",
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], object] = lambda done: None,
    first: int = 0,
) -> torch.Tensor:
    """Images first..first+count-1 of the stream ``purpose``, such as ("evaluation", seed).

    Args:
        denoiser: a ``UNet2DModel`` or an ensemble, already on ``device``; it samples in
            evaluation mode, in its own type.
        scheduler: its config holds but for ``timestep_spacing``, in whose place ``spacing`` is
            taken, so that models are compared alike.
        on_batch: told the number of images of each finished batch.

    Returns:
        uint8 [count, C, H, W].

    Raises:
        SamplingError: an image is not finite, or the schedule has no such timesteps.
    """
    ddim, shape = ddim_scheduler(scheduler, steps, spacing), shape_of(denoiser)
    indices, images = range(first, first + count), torch.zeros(count, *shape, dtype=torch.uint8)
    predict, modes = Denoiser(denoiser), {m: m.training for m in denoiser.modules()}
    denoiser.eval()
    try:
        for start in range(0, count, batch_size):
            mine = slice(start, start + batch_size)
            x = initial_noise(indices[mine], shape, *purpose).to(device)
            for t in ddim.timesteps:
                x = ddim.step(predict(x, t), t, x).prev_sample
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
