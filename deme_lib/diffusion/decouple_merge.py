"""Decouple, then merge, on models of your own: the method without the experiment around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from diffusers import DDPMPipeline, UNet2DModel

from deme_lib.diffusion.models import check_pipeline
from deme_lib.diffusion.training import Training, TrainingSpec
from deme_lib.method.merging import merge, task_vector
from deme_lib.method.projection import is_projection, plain_or_projected
from deme_lib.method.timesteps import split_timesteps


def decouple(
    pipeline: DDPMPipeline,
    images: torch.Tensor,
    *,
    n_ranges: int = 4,
    steps: int,
    learning_rate: float,
    probability: float = 0.3,
    consistency_weight: float = 1.0,
    channel_projection: bool = True,
    batch_size: int = 64,
    ema_decay: float | None = None,
    precision: str = "no",
    seed: int = 0,
    device: str = "auto",
    on_step: Callable[[int, int, float], object] = lambda expert, step, loss: None,
) -> list[UNet2DModel]:
    """Finetune one copy of the pipeline's UNet per range of timesteps (Eq. 3 to 6, Sec. 3.2).

    Args:
        pipeline: its UNet predicts noise; it is left as it was.
        images: uint8 [n, C, H, W] of the UNet's channels and size.
        steps: optimiser steps of each expert.
        ema_decay: of the EMA that each expert is returned with; by default it averages over the
            last fifth of the steps, 1 / (1 - ema_decay) = steps / 5.
        on_step: told (expert, step, loss) after every step, for a bar or a log.

    Returns:
        N experts on the CPU, with EMA weights.

    Raises:
        ModelError: the images do not fit the UNet, or it does not predict noise.
        ValueError: the images are no uint8 batch, or N does not fit T.
        TrainingError: a loss became infinite or nan.
    """
    num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"images must be uint8 [n, C, H, W], not {images.dtype} {tuple(images.shape)}"
        )
    check_pipeline(pipeline, num_train_timesteps, tuple(images.shape[1:]))
    if ema_decay is None:
        ema_decay = max(0.0, 1 - 5 / max(1, steps))
    experts = []
    for k, own_range in enumerate(split_timesteps(n_ranges, num_train_timesteps)):
        spec = TrainingSpec(
            steps=steps,
            purpose=(seed, "expert", k),
            own_range=own_range,
            learning_rate=learning_rate,
            final_learning_rate=learning_rate,
            batch_size=batch_size,
            probability=probability,
            consistency_weight=consistency_weight,
            ema_decay=ema_decay,
            precision=precision,
        )
        unet = plain_or_projected(copy.deepcopy(pipeline.unet), channel_projection)
        teacher = copy.deepcopy(pipeline.unet) if consistency_weight > 0 else None
        run = Training(unet, pipeline.scheduler, images, spec, teacher, device)
        for step in run:
            on_step(k, step.step, step.loss)
        experts.append(run.ema_unet())
    return experts


class Merger:
    """Merges one family of copies with any weights (Eq. 8), computing task vectors once.

    Args:
        base: the pretrained UNet; where the experts have projections it gets identity ones.
        experts: finetuned copies of it.

    Raises:
        KeyError, ValueError: an expert is of another architecture.
    """

    def __init__(self, base: UNet2DModel, experts: Sequence[UNet2DModel]):
        if not experts:
            raise ValueError("there is nothing to merge: give at least one expert")
        projected = any(is_projection(name) for name in experts[0].state_dict())
        self.base = plain_or_projected(base, projected).eval()
        self.start = self.base.state_dict()
        self.vectors = [task_vector(self.start, expert.state_dict()) for expert in experts]

    def merged(self, weights: Sequence[float]) -> UNet2DModel:
        """A new model, theta + sum_i w_i tau_i."""
        unet = copy.deepcopy(self.base)
        unet.load_state_dict(merge(self.start, self.vectors, weights))
        return unet.eval()


def merge_experts(
    base: UNet2DModel, experts: Sequence[UNet2DModel], weights: Sequence[float]
) -> UNet2DModel:
    """Eq. 8 on models: see ``Merger``, which is quicker for many weights."""
    return Merger(base, experts).merged(weights)
