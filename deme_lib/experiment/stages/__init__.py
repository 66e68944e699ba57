"""How each artefact is made: plain functions whose keyword arguments are their key.

``out`` is the folder to write, ``work`` one that outlives a killed process, ``on`` the machine.
Folders of other artefacts arrive as paths. A stage whose results change gets a
``stage.version = 2`` below it.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from torch import Tensor

from deme_lib.diffusion import metrics, models
from deme_lib.diffusion.heldout import FixedNoise

FIXED_NOISE_SEEDS = {"search": 0, "train": 0, "test": 1}
"""Weights are never searched on the noise of a reported loss."""


def images_of(data: Path, role: str) -> Tensor:
    """uint8 images [n, C, H, W] of a role: train, search or test."""
    with safe_open(data / "images.safetensors", "pt") as file:
        return file.get_tensor(role)


def reference_of(reference: Path, role: str, features: str) -> metrics.Features:
    """Stored features of a role's real images."""
    with safe_open(reference / "features.safetensors", "pt") as file:
        found = [file.get_tensor(f"{role}.{features}.{kind}") for kind in ("values", "logits")]
    return metrics.Features(*found)


def pipeline_of(baseline: Path) -> DDPMPipeline:
    """The pretrained model."""
    return models.load_pipeline(baseline / "pipeline")


def members_of(members: Sequence[Path]) -> list[UNet2DModel]:
    """Finetuned copies, in order."""
    return [models.load_unet(folder / "unet") for folder in members]


def fixed_noise(
    data: Path, role: str, scheduler: DDPMScheduler, count: int | None = None, draws: int = 1
) -> FixedNoise:
    """The first ``count`` images of a role under as many fixed draws each."""
    images = images_of(data, role)[:count]
    return FixedNoise(images, scheduler, draws, FIXED_NOISE_SEEDS[role])


def table(out: Path, name: str, rows: list, columns: Sequence[str] | None = None) -> None:
    """Write ``rows``, as pandas takes them, as a record, ``<name>.csv``."""
    pd.DataFrame(rows, columns=columns).to_csv(out / f"{name}.csv", index=False)
