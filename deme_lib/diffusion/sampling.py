"""DDIM sampling in which the noise of an image depends on (seed, index) alone."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from deme_lib.diffusion.models import shape_of
from deme_lib.diffusion.randomness import generator


def initial_noise(indices: range, shape: tuple[int, ...], *purpose: int | str) -> torch.Tensor:
    """Standard normal float32 [len(indices), *shape], one generator an image."""
    return torch.stack([torch.randn(shape, generator=generator(*purpose, i)) for i in indices])


def ddim_scheduler(scheduler: DDPMScheduler, steps: int, spacing: str) -> DDIMScheduler:
    """diffusers' DDIM scheduler (eta = 0) on the noise schedule of a DDPM one.

    Args:
        spacing: ``leading``, ``trailing`` or ``linspace``; it moves FID, so it is recorded.
    """
    ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing=spacing)
    ddim.set_timesteps(steps)
    return ddim


@torch.inference_mode()
def sample(
    denoiser: nn.Module,
    scheduler: DDPMScheduler,
    count: int,
    *,
    steps: int,
    purpose: tuple[int | str, ...],
    spacing: str = "leading",
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], object] = lambda done: None,
    first: int = 0,
    shared: bool = False,
) -> torch.Tensor:
    """Images first..first+count-1 of the stream ``purpose``, such as ("evaluation", seed).

    Args:
        denoiser: a ``UNet2DModel`` or an ensemble, already on ``device``.
        on_batch: told the number of images of each finished batch.
        shared: have the processes of ``accelerate launch`` share the batches out; each must ask,
            and gets all images.

    Returns:
        uint8 [count, C, H, W].
    """
    ddim = ddim_scheduler(scheduler, steps, spacing)
    shape = shape_of(denoiser)
    me, n = (PartialState().process_index, PartialState().num_processes) if shared else (0, 1)
    indices, images = range(first, first + count), torch.zeros(count, *shape, dtype=torch.uint8)
    for start in range(0, count, batch_size)[me::n]:
        mine = slice(start, start + batch_size)
        x = initial_noise(indices[mine], shape, *purpose).to(device)
        for t in ddim.timesteps:
            x = ddim.step(denoiser(x, t, return_dict=False)[0], t, x).prev_sample
        images[mine] = to_uint8(x).cpu()
        on_batch(min(n * batch_size, count - start))
    return reduce(images.to(device), "sum").cpu() if n > 1 else images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [-1, 1] (clipped) to uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
