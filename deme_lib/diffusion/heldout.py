"""The loss on held-out images, under timesteps and noise that are the same for every model."""

import torch
from diffusers import SchedulerMixin
from torch import nn

from deme_lib.diffusion import denoisers
from deme_lib.diffusion.denoisers import Conditioning, Denoiser, Predict
from deme_lib.diffusion.models import noise_schedule
from deme_lib.diffusion.randomness import generator
from deme_lib.method.objectives import squared_error

BATCH = 500  # of images up to 32x32


def batch_of(most: int, images: torch.Tensor) -> int:
    """``most`` images up to 3x32x32; of larger ones fewer, so that memory stays the same."""
    return max(1, most * 32**2 // max(32**2, images[0, 0].numel(), images[0].numel() // 3))


class FixedNoise:
    """Noisy versions of images, the same for every model that is asked about them.

    Args:
        images: uint8 [n, C, H, W] or float latents [n, ...].
        draws: (timestep, noise) pairs an image; the timesteps are spread evenly over [0, T).
        conditioning, predict: see ``training.draw`` and ``denoisers``.

    Attributes:
        timesteps: [n * draws] int64, or float32 in flow matching.
        image: [n * draws] int64, the image in [0, n) of each draw.
    """

    def __init__(
        self,
        images: torch.Tensor,
        scheduler: SchedulerMixin,
        draws: int,
        seed: int,
        conditioning: Conditioning | None = None,
        predict: Predict = denoisers.predict,
    ):
        g, total = generator(seed, "fixed noise"), len(images) * draws
        schedule = noise_schedule(scheduler)
        spread = torch.arange(total) * schedule.config.num_train_timesteps
        spread = spread / total if denoisers.is_flow(schedule) else spread // total
        self.timesteps = spread[torch.randperm(total, generator=g)]
        self.image = torch.arange(len(images)).repeat(draws)
        clean = denoisers.to_model_range(images).repeat(draws, *(1,) * (images.ndim - 1))
        self.noise = torch.randn(clean.shape, generator=g)
        self.noisy = denoisers.add_noise(schedule, clean, self.noise, self.timesteps)
        self.target = denoisers.target(schedule, clean, self.noise, self.timesteps)
        self.conditioning, self.predict = dict(conditioning or {}), predict

    @torch.inference_mode()
    def errors(self, model: nn.Module, device: torch.device | str = "cpu") -> torch.Tensor:
        """Squared error per draw (Eq. 2), float32 [n * draws]."""
        batch, found = batch_of(BATCH, self.noisy), []
        denoiser = Denoiser(model, self.predict, tuple(self.conditioning))
        for start in range(0, len(self.noisy), batch):
            mine = slice(start, start + batch)
            rows = [of_all[self.image[mine]] for of_all in self.conditioning.values()]
            given = (self.target[mine], self.noisy[mine], self.timesteps[mine], *rows)
            asked, *given = (some.to(device) for some in given)
            found.append(squared_error(denoiser(*given), asked).cpu())
        return torch.cat(found)

    def loss(self, denoiser: nn.Module, device: torch.device | str = "cpu") -> float:
        """Mean denoising loss over all draws."""
        return self.errors(denoiser, device).double().mean().item()

    def mean_in(self, errors: torch.Tensor, timesteps: range) -> float:
        """Mean of ``errors`` [n * draws] over the draws whose timestep lies in a range."""
        inside = (self.timesteps >= timesteps.start) & (self.timesteps < timesteps.stop)
        return errors[inside].double().mean().item()
