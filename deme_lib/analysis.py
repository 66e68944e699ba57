"""What the figures look at: losses per timestep, gradients, task vectors, the merge plane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from deme_lib.merging import State
from deme_lib.objectives import squared_error
from deme_lib.randomness import generator
from deme_lib.training import to_model_range

BATCH = 500  # of images up to 32x32; of larger ones fewer, so that memory stays the same
GRADIENT_BATCH = 64


class FixedNoise:
    """Noisy versions of images under timesteps and noise that are the same for every model.

    Args:
        images: uint8 [n, C, H, W].
        draws: (timestep, noise) pairs an image; the timesteps are spread evenly over [0, T).
    """

    def __init__(self, images: torch.Tensor, scheduler: DDPMScheduler, draws: int, seed: int):
        g, total = generator(seed, "fixed noise"), len(images) * draws
        num_train_timesteps = scheduler.config.num_train_timesteps
        spread = torch.arange(total) * num_train_timesteps // total
        self.timesteps = spread[torch.randperm(total, generator=g)]  # [n * draws] int64
        clean = to_model_range(images).repeat(draws, 1, 1, 1)
        self.noise = torch.randn(clean.shape, generator=g)
        self.noisy = scheduler.add_noise(clean, self.noise, self.timesteps)

    @torch.inference_mode()
    def errors(self, denoiser: nn.Module, device: torch.device | str = "cpu") -> torch.Tensor:
        """Squared error per draw (Eq. 2), float32 [n * draws]."""
        batch = _batch(BATCH, self.noisy)
        parts = zip(
            self.noisy.split(batch),
            self.timesteps.split(batch),
            self.noise.split(batch),
            strict=True,
        )
        return torch.cat(
            [
                squared_error(
                    denoiser(x.to(device), t.to(device), return_dict=False)[0], e.to(device)
                ).cpu()
                for x, t, e in parts
            ]
        )

    def loss(self, denoiser: nn.Module, device: torch.device | str = "cpu") -> float:
        """Mean denoising loss over all draws."""
        return self.errors(denoiser, device).double().mean().item()

    def mean_in(self, errors: torch.Tensor, timesteps: range) -> float:
        """Mean of ``errors`` over the draws whose timestep lies in a range."""
        inside = (self.timesteps >= timesteps.start) & (self.timesteps < timesteps.stop)
        return errors[inside].double().mean().item()


def _batch(most: int, images: torch.Tensor) -> int:
    return max(1, most * 32**2 // max(32**2, images[0, 0].numel()))


def gradient_similarity(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    timesteps: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Fig. 1a: cosine similarity between the gradients of the denoising loss at timesteps.

    The gradient at a timestep is the mean over all ``images`` (uint8 [n, C, H, W]) with the same
    noise at every timestep.

    Returns:
        [len(timesteps), len(timesteps)] float64 in [-1, 1].
    """
    clean = to_model_range(images)
    noise = torch.randn(clean.shape, generator=generator(seed, "gradients"))
    batch = _batch(GRADIENT_BATCH, clean)
    unet = unet.to(device)
    rows = []
    for t in timesteps:
        total = torch.zeros(sum(p.numel() for p in unet.parameters()), dtype=torch.float64)
        for x, e in zip(clean.split(batch), noise.split(batch), strict=True):
            timestep = torch.full((len(x),), int(t))
            noisy = scheduler.add_noise(x, e, timestep).to(device)
            prediction = unet(noisy, timestep.to(device), return_dict=False)[0]
            loss = squared_error(prediction, e.to(device)).sum()
            gradient = torch.autograd.grad(loss, list(unet.parameters()))
            total += torch.cat([g.flatten() for g in gradient]).double().cpu()
        rows.append(total / total.norm())
    stacked = torch.stack(rows)
    return (stacked @ stacked.T).numpy()


QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


def quantiles(values: torch.Tensor) -> dict[str, float]:
    """5, 25, 50, 75 and 95 % quantiles."""
    found = np.quantile(values.double().numpy(), list(QUANTILES.values()))
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def task_vector_quantiles(vector: State) -> dict[str, dict[str, float]]:
    """Fig. 6b: quantiles of a task vector's values per part of the UNet."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in vector.items():
        parts.setdefault(_part(name), []).append(tensor.flatten())
    return {part: quantiles(torch.cat(tensors)) for part, tensors in parts.items()}


def _part(name: str) -> str:
    if ".projection." in name:
        return "projection"
    first = name.split(".")[0]
    blocks = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
    return blocks.get(first, "conv_out" if first.startswith("conv_norm") else first)
