"""Images, their features, and what real images score."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from deme_lib.diffusion import classifier, metrics
from deme_lib.diffusion import data as datasets
from deme_lib.experiment.stages import images_of, reference_of, scored, table
from deme_lib.experiment.store import Job

ROLES = ("train", "search", "test")
FLOOR_DRAWS = 20  # random draws of fresh real images


def data(job: Job, *, dataset: str, **sizes: int) -> None:
    """The three roles of the images, by ``data.split``."""
    roles = datasets.split(dataset, **sizes)
    tensors = {role: torch.from_numpy(part.images) for role, part in roles.items()}
    save_file(tensors, job.out / "images.safetensors")
    labels = {role: np.bincount(part.labels).tolist() for role, part in roles.items()}
    told = {"labels": labels, "train_hash": datasets.content_hash(roles["train"].images)}
    (job.out / "data.json").write_text(json.dumps(told))


def reference(job: Job, *, data: Path, features: list[str], inception_weights: str) -> None:
    """Features of the real images of every role."""
    train_hash = json.loads((data / "data.json").read_text())["train_hash"]
    for name in {*features} - {metrics.INCEPTION}:
        _check_split(name, train_hash)
    cuda, tensors = job.device.type == "cuda", {}
    for role in ROLES:
        images = images_of(data, role)
        for name in (*features, metrics.PIXELS):
            found = metrics.extract(images, name, inception_weights, cuda)
            tensors[f"{role}.{name}.values"] = found.values
            tensors[f"{role}.{name}.logits"] = found.logits
    save_file(tensors, job.out / "features.safetensors")


def _check_split(name: str, train_hash: str) -> None:
    """A classifier must not have trained on images that are test images here."""
    card = classifier.card_of(name)
    if train_hash != card["train_hash"]:
        raise metrics.MetricError(
            f"the classifier {name} was trained on {card['train_images']} images of "
            f"{card['dataset']} (split_seed {card['split_seed']}), not on this split: set features "
            "to inception and second_features to ''"
        )


def floor(
    job: Job,
    *,
    reference: Path,
    features: list[str],
    samples: int,
    fid_reference: str,
    **scoring: int,
) -> None:
    """Scores of fresh real images at the arms' n; none where there are not as many."""
    real = {name: reference_of(reference, "search", name) for name in (*features, metrics.PIXELS)}
    rows, count = [], len(real[features[0]])
    draws = metrics.fresh_draws(count, samples, FLOOR_DRAWS, seed=0) if count >= samples else []
    for draw, chosen in enumerate(draws):
        found = {name: of_all[chosen] for name, of_all in real.items()}
        row = scored(found, reference, fid_reference, **scoring)
        rows.append({"draw": draw, "n": samples, **row})
    columns = ["draw", "n", "fid", "fid_second", "pixel", "kid", "inception_score"]
    table(job, "floor", rows, columns)
