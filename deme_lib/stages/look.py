"""What the figures look at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from deme_lib import analysis
from deme_lib.decouple_merge import Merger
from deme_lib.progress import bar
from deme_lib.stages.job import Job
from deme_lib.timesteps import split_timesteps

GRADIENT_IMAGES = 256


def make_gradients(job: Job) -> dict[str, Any]:
    pipeline = job.pipeline
    bins = split_timesteps(job["gradient_bins"], pipeline.scheduler.config.num_train_timesteps)
    timesteps = [(b.start + b.stop - 1) // 2 for b in bins]
    images = job.images("train")[:GRADIENT_IMAGES]
    cosines = analysis.gradient_similarity(
        pipeline.unet.eval(), pipeline.scheduler, images, timesteps, job["seed"], job.device
    )
    return {"timesteps": timesteps, "cosines": cosines.tolist(), "n": len(images)}


def make_task_vectors(job: Job) -> dict[str, Any]:
    vectors = Merger(job.pipeline.unet, job.members()).vectors
    flat = torch.stack([torch.cat([t.flatten() for t in v.values()]) for v in vectors])
    unit = flat / flat.norm(dim=1, keepdim=True)
    return {
        "quantiles": [analysis.task_vector_quantiles(v) for v in vectors],
        "norms": flat.norm(dim=1).tolist(),
        "cosines": (unit @ unit.T).tolist(),
    }


def make_range_losses(job: Job) -> dict[str, Any]:
    scheduler = job.pipeline.scheduler
    ranges = split_timesteps(job["n_ranges"], scheduler.config.num_train_timesteps)
    noise = job.fixed_noise("search", scheduler)
    rows = []
    for label, model in zip(job["labels"], [job.pipeline.unet, *job.members()], strict=True):
        errors = noise.errors(model.eval().to(job.device), job.device)
        for k, own in enumerate(ranges, start=1):
            loss = noise.mean_in(errors, own)
            rows.append({"model": label, "range": k, "held_out_loss": loss})
    return {"losses": rows}


def make_plane(job: Job) -> dict[str, Any]:
    pipeline, device = job.pipeline, job.device
    merger = Merger(pipeline.unet, job.members())
    noise = job.fixed_noise("search", pipeline.scheduler)
    axis = np.linspace(-0.2, 1.2, job["plane_points"]).round(6).tolist()
    last, points = len(merger.vectors) - 1, []
    with bar(len(axis) ** 2, job.label, "point") as progress:
        for w1 in axis:
            for w2 in axis:
                weights = [0.0] * (last + 1)
                weights[0] += w1
                weights[last] += w2
                loss = noise.loss(merger.merged(weights).to(device), device)
                points.append({"w1": w1, "w2": w2, "loss": loss})
                progress.update(1)
    return {"points": points, "experts": [1, last + 1]}
