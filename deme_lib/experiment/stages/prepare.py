"""Images, their features, and what real images score."""

from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from deme_lib.diffusion import classifier, data, metrics
from deme_lib.experiment.stages.job import Job

ROLES = ("train", "search", "test")
FLOOR_DRAWS = 20  # random draws of fresh real images, where there are more than one needs
HALVINGS = 50  # of real images, to extrapolate the floor from


def make_data(job: Job) -> dict[str, Any]:
    sizes = (job[f"{role}_images"] for role in ROLES)
    roles = data.split(job["dataset"], *sizes, job["split_seed"], job["image_size"])
    tensors = {role: torch.from_numpy(part.images) for role, part in roles.items()}
    save_file(tensors, job.folder / "images.safetensors")
    return {
        "shape": list(tensors["train"].shape[1:]),
        "train_hash": data.content_hash(roles["train"].images),
        "labels": {role: np.bincount(part.labels).tolist() for role, part in roles.items()},
    }


def make_reference(job: Job) -> None:
    names = [name for name in (job["features"], job["second_features"]) if name]
    for name in set(names) - {metrics.INCEPTION}:
        check_split(name, job.inputs["data"].results["train_hash"])
    tensors = {}
    for role in ROLES:
        found = job.extract_all([job.images(role)], *names, metrics.PIXELS)
        for name, features in found.items():
            tensors[f"{role}.{name}.values"] = features.values
            tensors[f"{role}.{name}.logits"] = features.logits
    save_file(tensors, job.folder / "features.safetensors")


def check_split(name: str, train_hash: str) -> None:
    """A classifier must not have trained on images that are test images here."""
    card = classifier.card_of(name)
    if train_hash != card["train_hash"]:
        raise metrics.MetricError(
            f"the classifier {name} was trained on {card['train_images']} images of "
            f"{card['dataset']} (split_seed {card['split_seed']}), not on this split: set features "
            "to inception and second_features to ''"
        )


def make_floor(job: Job) -> None:
    """Scores of fresh real images at the arms' n, or FIDs extrapolated where they are too few."""
    n, role, rows = job["samples"], job["fid_reference"], []
    names = {"fid": job["features"], "fid_second": job["second_features"], "pixel": metrics.PIXELS}
    names = {column: name for column, name in names.items() if name}
    count = len(job.images("search"))
    if count < n:
        row = {"draw": 0, "n": n, "extrapolated": 1}
        for column, name in names.items():
            real = job.reference(role, name)
            row[column] = metrics.extrapolated_floor(real, n, len(real), HALVINGS, seed=0)
        rows.append(row)
    draws = metrics.fresh_draws(count, n, FLOOR_DRAWS, seed=0) if count >= n else []
    for draw, chosen in enumerate(draws):
        found = {c: job.reference("search", name)[chosen] for c, name in names.items()}
        row = {c: metrics.frechet(found[c], job.reference(role, names[c])) for c in names}
        test = job.reference("test", job["features"])
        row["kid"] = metrics.kid(found["fid"], test, job["kid_subset_size"], job["kid_subsets"])
        row["inception_score"] = metrics.inception_score(found["fid"], job["is_splits"])
        rows.append({"draw": draw, "n": n, **row, "extrapolated": 0})
    job.table("floor", rows)
