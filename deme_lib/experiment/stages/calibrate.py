"""Whether the metric can be believed, asked before any arm is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from deme_lib.diffusion import metrics, models, sampling
from deme_lib.diffusion.progress import bar
from deme_lib.experiment.stages.job import Job
from deme_lib.experiment.stages.train import SNAPSHOTS

HALVINGS = 20
LARGEST_DIFFERENCE = 0.1  # of the Frechet distances of two halves of one model's images


def make_acceptance(job: Job) -> dict[str, Any]:
    """Two halves of one model's images; three lengths of pretraining under two classifiers."""
    pipeline, device = job.pipeline, job.device
    baseline = job.inputs["baseline"].path
    unets = {1: baseline / "pipeline" / "unet"}
    if not job["pretrained"]:
        unets = {d: baseline / f"snapshot-{d}" for d in SNAPSHOTS} | unets
    counts = {d: job["acceptance_samples"] if d == 1 else job["samples"] for d in unets}
    images = {}
    with bar(sum(counts.values()), job.label, "image") as progress:
        for divisor, path in unets.items():
            images[divisor] = sampling.sample(
                models.load_unet(path).eval().to(device),
                pipeline.scheduler,
                counts[divisor],
                steps=job["sampling_steps"],
                purpose=(job["seed"], "acceptance"),
                spacing=job["timestep_spacing"],
                batch_size=job.batch,
                device=device,
                on_batch=progress.update,
            )
    train = job.reference("train", job["features"])
    half = job["acceptance_samples"] // 2
    difference = metrics.halves_difference(
        job.extract(images[1], job["features"]), train, repeats=HALVINGS, seed=0
    )
    ranking = _ranking(job, images)
    same = None
    if job["second_features"] and len(ranking) > 1:
        orders = [np.argsort([row[k] for row in ranking]).tolist() for k in ("fid", "fid_second")]
        same = orders[0] == orders[1]
    return {
        "halves": {
            "features": job["features"],
            "n_half": half,
            "repeats": HALVINGS,
            "relative_difference_rms": difference,
        },
        "ranking": ranking,
        "same_ranking": same,
        "accepted": bool(difference <= LARGEST_DIFFERENCE and same is not False),
        "real": _real(job),
    }


def _ranking(job: Job, images: Mapping[int, torch.Tensor]) -> list[dict[str, Any]]:
    """FID of the first ``samples`` images of each pretraining length, by both classifiers."""
    rows = []
    for divisor, found in images.items():
        row: dict[str, Any] = {"steps": job["pretrain_steps"] // divisor, "fid_second": None}
        for column, name in (("fid", job["features"]), ("fid_second", job["second_features"])):
            if name:
                few = job.extract(found[: job["samples"]], name)
                row[column] = metrics.frechet(few, job.reference("train", name))
        rows.append(row)
    return rows


def _real(job: Job) -> dict[str, Any]:
    """IS of the real training images, and distances between two random halves of them."""
    features = job.reference("train", job["features"])
    pixels = job.reference("train", metrics.PIXELS)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(features)))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    size = min(job["kid_subset_size"], len(first))
    return {
        "features": job["features"],
        "n": len(features),
        "n_halves": len(first),
        "inception_score": metrics.inception_score(features, job["is_splits"]),
        "fid_halves": metrics.frechet(features[first], features[second]),
        "pixel_halves": metrics.frechet(pixels[first], pixels[second]),
        "kid_halves": metrics.kid(features[first], features[second], size, job["kid_subsets"]),
    }
