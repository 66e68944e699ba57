"""The loss on held-out images, under timesteps and noise that are the same for every model."""

import torch
from diffusers import DDPMScheduler
from torch import nn

from deme_lib.diffusion.randomness import generator
from deme_lib.diffusion.training import to_model_range
from deme_lib.method.objectives import squared_error

BATCH = 500  # of images up to 32x32


def batch_of(most: int, images: torch.Tensor) -> int:
    """``most`` images up to 32x32; of larger ones fewer, so that memory stays the same."""
    return max(1, most * 32**2 // max(32**2, images[0, 0].numel()))


class FixedNoise:
    """Noisy versions of images, the same for every model that is asked about them.

    Args:
        images: uint8 [n, C, H, W].
        draws: (timestep, noise) pairs an image; the timesteps are spread evenly over [0, T).

    Attributes:
        timesteps: [n * draws] int64.
        image: [n * draws] int64, the image in [0, n) of each draw.
    """

    def __init__(self, images: torch.Tensor, scheduler: DDPMScheduler, draws: int, seed: int):
        g, total = generator(seed, "fixed noise"), len(images) * draws
        num_train_timesteps = scheduler.config.num_train_timesteps
        spread = torch.arange(total) * num_train_timesteps // total
        self.timesteps = spread[torch.randperm(total, generator=g)]
        self.image = torch.arange(len(images)).repeat(draws)
        clean = to_model_range(images).repeat(draws, 1, 1, 1)
        self.noise = torch.randn(clean.shape, generator=g)
        self.noisy = scheduler.add_noise(clean, self.noise, self.timesteps)

    @torch.inference_mode()
    def errors(self, denoiser: nn.Module, device: torch.device | str = "cpu") -> torch.Tensor:
        """Squared error per draw (Eq. 2), float32 [n * draws]."""
        batch, draws = batch_of(BATCH, self.noisy), (self.noisy, self.timesteps, self.noise)
        found = []
        for start in range(0, len(self.noisy), batch):
            x, t, e = (some[start : start + batch].to(device) for some in draws)
            found.append(squared_error(denoiser(x, t, return_dict=False)[0], e).cpu())
        return torch.cat(found)

    def loss(self, denoiser: nn.Module, device: torch.device | str = "cpu") -> float:
        """Mean denoising loss over all draws."""
        return self.errors(denoiser, device).double().mean().item()

    def mean_in(self, errors: torch.Tensor, timesteps: range) -> float:
        """Mean of ``errors`` [n * draws] over the draws whose timestep lies in a range."""
        inside = (self.timesteps >= timesteps.start) & (self.timesteps < timesteps.stop)
        return errors[inside].double().mean().item()
