"""Images, their features, and what real images score."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from deme_lib.diffusion import classifier, metrics, models
from deme_lib.diffusion import data as datasets
from deme_lib.experiment.stages import images_of, reference_of, table
from deme_lib.experiment.store import Machine

ROLES = ("train", "search", "test")
FLOOR_DRAWS = 20  # random draws of fresh real images


def data(
    out: Path,
    work: Path,
    on: Machine,
    *,
    dataset: str,
    train_images: int,
    search_images: int,
    test_images: int,
    split_seed: int,
    image_size: int,
) -> None:
    """The three roles of the images."""
    sizes = (train_images, search_images, test_images)
    roles = datasets.split(dataset, *sizes, split_seed, image_size)
    tensors = {role: torch.from_numpy(part.images) for role, part in roles.items()}
    save_file(tensors, out / "images.safetensors")
    labels = {role: np.bincount(part.labels).tolist() for role, part in roles.items()}
    told = {"labels": labels, "train_hash": datasets.content_hash(roles["train"].images)}
    (out / "data.json").write_text(json.dumps(told))


def reference(
    out: Path, work: Path, on: Machine, *, data: Path, features: list[str], inception_weights: str
) -> None:
    """Features of the real images of every role."""
    train_hash = json.loads((data / "data.json").read_text())["train_hash"]
    for name in {*features} - {metrics.INCEPTION}:
        _check_split(name, train_hash)
    cuda, tensors = models.device_of(on.device).type == "cuda", {}
    for role in ROLES:
        images = images_of(data, role)
        for name in (*features, metrics.PIXELS):
            found = metrics.extract(images, name, inception_weights, cuda)
            tensors[f"{role}.{name}.values"] = found.values
            tensors[f"{role}.{name}.logits"] = found.logits
    save_file(tensors, out / "features.safetensors")


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
    out: Path,
    work: Path,
    on: Machine,
    *,
    reference: Path,
    features: list[str],
    samples: int,
    fid_reference: str,
    is_splits: int,
    kid_subset_size: int,
    kid_subsets: int,
) -> None:
    """Scores of fresh real images at the arms' n; none where there are not as many."""
    real = {name: reference_of(reference, "search", name) for name in (*features, metrics.PIXELS)}
    test = reference_of(reference, "test", features[0])
    spaces = dict(zip(("fid", "fid_second"), features, strict=False)) | {"pixel": metrics.PIXELS}
    rows, count = [], len(real[features[0]])
    draws = metrics.fresh_draws(count, samples, FLOOR_DRAWS, seed=0) if count >= samples else []
    for draw, chosen in enumerate(draws):
        row = {"draw": draw, "n": samples}
        for column, name in spaces.items():
            there = reference_of(reference, fid_reference, name)
            row[column] = metrics.frechet(real[name][chosen], there)
        main = real[features[0]][chosen]
        row["kid"] = metrics.kid(main, test, kid_subset_size, kid_subsets)
        rows.append(row | {"inception_score": metrics.inception_score(main, is_splits)})
    columns = ["draw", "n", "fid", "fid_second", "pixel", "kid", "inception_score"]
    table(out, "floor", rows, columns)
