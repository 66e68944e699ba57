"""What a stage is given."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from torch import Tensor, nn

from deme_lib.diffusion import metrics, models, sampling
from deme_lib.diffusion.cuts import routing_ranges
from deme_lib.diffusion.heldout import FixedNoise
from deme_lib.experiment.store import Artefact

SHARD = 5000  # images of a stream that are held, and kept in a file, at a time
FIXED_NOISE_SEEDS = {"search": 0, "train": 0, "test": 1}
"""Weights are never searched on the noise of a reported loss."""


@dataclass
class Job:
    """What a stage is given: parameters, checked inputs, an empty or resumed folder, a device."""

    parameters: Mapping[str, Any]
    locations: Mapping[str, str]
    inputs: Mapping[str, Artefact]
    folder: Path
    label: str
    device: torch.device
    batch: int
    checkpoint_every: int

    def __getitem__(self, name: str) -> Any:
        return {**self.parameters, **self.locations}[name]

    def images(self, role: str) -> Tensor:
        """uint8 images [n, C, H, W] of a role."""
        with safe_open(self.inputs["data"].path / "images.safetensors", "pt") as file:
            return file.get_tensor(role)

    def reference(self, role: str, features: str) -> metrics.Features:
        """Stored features of a role's real images."""
        with safe_open(self.inputs["reference"].path / "features.safetensors", "pt") as file:
            found = [file.get_tensor(f"{role}.{features}.{kind}") for kind in ("values", "logits")]
        return metrics.Features(*found)

    def extract_all(self, images: Iterable[Tensor], *names: str) -> dict[str, metrics.Features]:
        """Several features of uint8 images that come in parts, of which one is held at a time."""
        how = self["inception_weights"], self.device.type == "cuda"
        parts = [{n: metrics.extract(part, n, *how) for n in names if n} for part in images]
        return {name: metrics.Features.joined([p[name] for p in parts]) for name in parts[0]}

    def distance(self, found: Mapping[str, metrics.Features], name: str, role: str) -> float:
        """Frechet distance of a role's images by the features called ``name``; empty: NaN."""
        return metrics.frechet(found[name], self.reference(role, name)) if name else math.nan

    @cached_property
    def pipeline(self) -> DDPMPipeline:
        """The pretrained model."""
        return models.load_pipeline(self.inputs["baseline"].path / "pipeline")

    def sample(self, denoiser: nn.Module, count: int, *purpose: int | str, **kwargs) -> Tensor:
        """uint8 images [count, C, H, W] of the stream ``purpose``, as the recipe samples."""
        return sampling.sample(
            denoiser,
            self.pipeline.scheduler,
            count,
            steps=self["sampling_steps"],
            purpose=purpose,
            spacing=self["timestep_spacing"],
            batch_size=self.batch,
            device=self.device,
            **kwargs,
        )

    def parts(self, denoiser: nn.Module, count: int, *purpose, **kwargs) -> Iterator[Tensor]:
        """``sample``, some images at a time."""
        for first in range(0, count, SHARD):
            few = min(SHARD, count - first)
            yield self.sample(denoiser, few, *purpose, first=first, **kwargs)

    def members(
        self, prefix: str = "member", ema_decay: float | None = None, checkpoints: bool = False
    ) -> list[UNet2DModel]:
        """A family of finetuned copies, in order: at the judged EMA decay, or at another.

        Args:
            checkpoints: the copies along the run of the family's only member instead.
        """
        paths = [a.path for role, a in self.inputs.items() if role.startswith(prefix)]
        copy = "unet" if ema_decay is None else f"ema-{ema_decay:g}"
        folders = [path / copy for path in paths]
        if checkpoints:
            count = len(list(paths[0].glob("checkpoint-*")))
            folders = [paths[0] / f"checkpoint-{k + 1}" for k in range(count)]
        return [models.load_unet(folder) for folder in folders]

    def ranges(self) -> list[range]:
        """The ranges that timesteps are routed to."""
        return routing_ranges(self["range_cut"], self["n_ranges"], self.pipeline.scheduler)

    def few_noisy(self, scheduler: DDPMScheduler, role: str = "search") -> FixedNoise:
        """The first ``loss_images`` of a role under one fixed draw each: curves and planes."""
        images = self.images(role)[: self["loss_images"]]
        return FixedNoise(images, scheduler, 1, FIXED_NOISE_SEEDS[role])

    def test_noisy(self, scheduler: DDPMScheduler) -> FixedNoise:
        """All test images under ``loss_draws`` fixed draws each: reported losses."""
        images, draws = self.images("test"), self["loss_draws"]
        return FixedNoise(images, scheduler, draws, FIXED_NOISE_SEEDS["test"])

    def table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write ``rows`` as a record, ``<name>.csv`` beside what else the stage makes."""
        pd.DataFrame(list(rows)).to_csv(self.folder / f"{name}.csv", index=False)
