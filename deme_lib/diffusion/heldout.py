"""The loss on held-out images, under timesteps and noise that are the same for every model."""

import torch
from diffusers import DDPMScheduler
from torch import nn

from deme_lib.diffusion.denoisers import Denoiser, to_model_range
from deme_lib.diffusion.randomness import generator
from deme_lib.method.objectives import squared_error

BATCH = 500  # of images up to 32x32


def batch_of(most: int, images: torch.Tensor) -> int:
    """``most`` images up to 3x32x32; of larger ones fewer, so that memory stays the same."""
    return max(1, most * 32**2 // max(32**2, images[0, 0].numel(), images[0].numel() // 3))


class FixedNoise:
    """Noisy versions of images, the same for every model of noise that is asked about them.

    Args:
        images: uint8 [n, C, H, W] or float latents [n, ...].
        draws: (timestep, noise) pairs an image; the timesteps are spread evenly over [0, T).

    Attributes:
        timesteps: [n * draws] int64.
    """

    def __init__(self, images: torch.Tensor, scheduler: DDPMScheduler, draws: int, seed: int):
        g, total = generator(seed, "fixed noise"), len(images) * draws
        spread = torch.arange(total) * scheduler.config.num_train_timesteps // total
        self.timesteps = spread[torch.randperm(total, generator=g)]
        clean = to_model_range(images).repeat(draws, *(1,) * (images.ndim - 1))
        self.noise = torch.randn(clean.shape, generator=g)
        self.noisy = scheduler.add_noise(clean, self.noise, self.timesteps)

    @torch.inference_mode()
    def errors(self, model: nn.Module, device: torch.device | str = "cpu") -> torch.Tensor:
        """Squared error per draw (Eq. 2), float32 [n * draws]."""
        batch, denoiser = batch_of(BATCH, self.noisy), Denoiser(model)
        parts = (some.split(batch) for some in (self.noisy, self.timesteps, self.noise))
        moved = ((some.to(device) for some in part) for part in zip(*parts, strict=True))
        found = [squared_error(denoiser(x, t), noise).cpu() for x, t, noise in moved]
        return torch.cat(found)

    def loss(self, denoiser: nn.Module, device: torch.device | str = "cpu") -> float:
        """Mean denoising loss over all draws."""
        return self.errors(denoiser, device).double().mean().item()

    def mean_in(self, errors: torch.Tensor, timesteps: range) -> float:
        """Mean of ``errors`` [n * draws] over the draws whose timestep lies in a range."""
        inside = (self.timesteps >= timesteps.start) & (self.timesteps < timesteps.stop)
        return errors[inside].double().mean().item()
