"""How each artefact is made: plain functions whose keyword arguments are their key.

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
from deme_lib.experiment.store import Job

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


def scored(
    found: dict[str, metrics.Features],
    reference: Path,
    fid_reference: str,
    is_splits: int,
    kid_subset_size: int,
    kid_subsets: int,
) -> dict[str, float]:
    """What images score whose features these are, by name; IS and KID by the first."""
    first, *_ = features = [name for name in found if name != metrics.PIXELS]
    spaces = dict(zip(("fid", "fid_second"), features, strict=False)) | {"pixel": metrics.PIXELS}
    row = {}
    for column, name in spaces.items():
        there = reference_of(reference, fid_reference, name)
        row[column] = metrics.frechet(found[name], there)
    test = reference_of(reference, "test", first)
    row["kid"] = metrics.kid(found[first], test, kid_subset_size, kid_subsets)
    return row | {"inception_score": metrics.inception_score(found[first], is_splits)}


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


def table(job: Job, name: str, rows: list, columns: Sequence[str] | None = None) -> None:
    """Write ``rows``, as pandas takes them, as a record, ``<name>.csv``."""
    pd.DataFrame(rows, columns=columns).to_csv(job.out / f"{name}.csv", index=False)
