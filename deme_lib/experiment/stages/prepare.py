"""Images and their features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from deme_lib.diffusion import classifier, data, metrics
from deme_lib.experiment.stages.job import Job


def make_data(job: Job) -> dict[str, Any]:
    sizes = ("train_images", "search_images", "test_images")
    roles = data.split(
        job["dataset"], *(job[name] for name in sizes), job["split_seed"], job["image_size"]
    )
    tensors = {role: torch.from_numpy(part.images) for role, part in roles.items()}
    save_file(tensors, job.folder / "images.safetensors")
    return {
        "shape": list(tensors["train"].shape[1:]),
        "labels": {role: np.bincount(part.labels).tolist() for role, part in roles.items()},
    }


def make_reference(job: Job) -> dict[str, Any]:
    for name in {job["features"], job["second_features"]} - {"", metrics.INCEPTION}:
        _check_split(name, job.images("train"))
    tensors = {}
    for role in ("train", "test"):
        for name in {job["features"], job["second_features"], metrics.PIXELS} - {""}:
            found = job.extract(job.images(role), name)
            tensors[f"{role}.{name}.values"] = found.values
            tensors[f"{role}.{name}.logits"] = found.logits
    save_file(tensors, job.folder / "features.safetensors")
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


def _check_split(name: str, train_images: torch.Tensor) -> None:
    """A classifier must not have trained on images that are test images here."""
    try:
        card = classifier.card_of(name)
    except ValueError as error:
        raise metrics.MetricError(str(error)) from error
    if data.content_hash(train_images.numpy()) != card["train_hash"]:
        raise metrics.MetricError(
            f"the classifier {name} was trained on {card['train_images']} images of "
            f"{card['dataset']} (split_seed {card['split_seed']}), not on this split: set features "
            "to inception and second_features to ''"
        )
