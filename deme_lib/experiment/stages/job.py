"""What a stage is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from deme_lib.diffusion import metrics, models
from deme_lib.diffusion.analysis import FixedNoise
from deme_lib.experiment.parameters import JOINED_LATER
from deme_lib.experiment.store import Artefact

FIXED_NOISE_SEEDS = {"search": 0, "test": 1}
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
        return {**JOINED_LATER, **self.parameters, **self.locations}[name]

    def images(self, role: str) -> torch.Tensor:
        """uint8 images [n, C, H, W] of a role."""
        return load_file(self.inputs["data"].path / "images.safetensors")[role]

    def reference(self, role: str, features: str) -> metrics.Features:
        """Stored features of the train or test images."""
        found = load_file(self.inputs["reference"].path / "features.safetensors")
        return metrics.Features(
            found[f"{role}.{features}.values"], found[f"{role}.{features}.logits"]
        )

    def extract(self, images: torch.Tensor, features: str) -> metrics.Features:
        """Features of uint8 images [n, C, H, W]."""
        cuda = self.device.type == "cuda"
        return metrics.extract(images, features, self["inception_weights"], cuda)

    @cached_property
    def pipeline(self) -> DDPMPipeline:
        """The pretrained model."""
        return models.load_pipeline(self.inputs["baseline"].path / "pipeline")

    def members(self) -> list[UNet2DModel]:
        """The family of finetuned copies, in order."""
        paths = [a.path for role, a in self.inputs.items() if role.startswith("member")]
        return [models.load_unet(path / "unet") for path in paths]

    def fixed_noise(self, role: str, scheduler: DDPMScheduler) -> FixedNoise:
        """Held-out images under noise that is the same for every model."""
        seed = FIXED_NOISE_SEEDS[role]
        return FixedNoise(self.images(role), scheduler, self["loss_draws"], seed)
