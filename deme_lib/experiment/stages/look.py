"""What the figures look at."""

import itertools
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from deme_lib.diffusion import analysis, models
from deme_lib.diffusion.merged import Merger
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.randomness import generator, seed_of
from deme_lib.experiment.stages.job import Job
from deme_lib.method.timesteps import split_timesteps

GRADIENT_IMAGES = 256
GRADIENT_DRAWS = 5  # of noise, for the interval of a difference
ACTIVATION_IMAGES = 1000
RANDOM_STEPS = 3
LANDSCAPE_RADIUS = 0.25  # of each filter's norm: the loss on digits doubles about there


def make_gradients(job: Job) -> None:
    """Of the pretrained model, or of the merged one where that is an input (Fig. 1a)."""
    name = "merged" if "merged" in job.inputs else "pretrained"
    pipeline = models.load_pipeline(
        job.inputs["merged" if name == "merged" else "baseline"].path / "pipeline"
    )
    unet = pipeline.unet.eval().to(job.device)
    bins = split_timesteps(job["gradient_bins"], pipeline.scheduler.config.num_train_timesteps)
    timesteps = [(b.start + b.stop - 1) // 2 for b in bins]
    images, rows = job.images("train")[:GRADIENT_IMAGES], []
    with bar(GRADIENT_DRAWS, job.label, "draw") as progress:
        for draw in range(GRADIENT_DRAWS):
            seed = seed_of(job["seed"], "draw", draw) % 2**32
            cosines = analysis.gradient_similarity(
                unet, pipeline.scheduler, images, timesteps, seed, job.device
            )
            rows += [
                {"model": name, "draw": draw, "n": len(images)}
                | {"timestep1": a, "timestep2": b, "cosine": cosines[i, j]}
                for (i, a), (j, b) in itertools.product(enumerate(timesteps), repeat=2)
            ]
            progress.update(1)
    job.table("gradients", rows)


def make_activations(job: Job) -> None:
    """Of every expert, beside random weight changes as long as its task vector."""
    scheduler, members = job.pipeline.scheduler, job.members()
    ranges = job.ranges()
    images, base = job.images("train")[:ACTIVATION_IMAGES], job.pipeline.unet.eval()
    vectors = Merger(base, members).vectors
    rows = []
    with bar(len(members) * (1 + RANDOM_STEPS), job.label, "model") as progress:

        def differences(model: UNet2DModel, own: range) -> list[dict]:
            progress.update(1)
            return analysis.activation_differences(
                base, model.eval(), scheduler, images, own, job["seed"], job.device
            )

        for k, (expert, own, vector) in enumerate(zip(members, ranges, vectors, strict=True)):
            norm = sum(t.square().sum().item() for t in vector.values()) ** 0.5
            steps = [generator(job["seed"], "random step", k, i + 1) for i in range(RANDOM_STEPS)]
            random = [differences(analysis.random_step(base, norm, g), own) for g in steps]
            for i, row in enumerate(differences(expert, own)):
                share = sum(found[i]["share"] for found in random) / RANDOM_STEPS
                rows.append({"range": k + 1, "n": len(images), **row, "share_at_random": share})
    job.table("activations", rows)


def make_landscape(job: Job) -> None:
    scheduler, points = job.pipeline.scheduler, job["plane_points"] | 1  # odd: with the centre
    noise = job.few_noisy(scheduler)
    with bar(points**2, job.label, "point") as progress:
        rows = analysis.landscape(
            job.pipeline.unet.eval(),
            noise,
            job.ranges(),
            LANDSCAPE_RADIUS,
            points,
            job["seed"],
            job.device,
            lambda: progress.update(1),
        )
    job.table("landscape", rows)


def make_task_vectors(job: Job) -> dict[str, Any]:
    vectors = Merger(job.pipeline.unet, job.members()).vectors
    flat = torch.stack([torch.cat([t.flatten() for t in v.values()]) for v in vectors])
    unit = flat / flat.norm(dim=1, keepdim=True)
    rows = []
    for k, vector in enumerate(vectors, start=1):
        parts = analysis.task_vector_quantiles(vector)
        rows += [{"range": k, "block": block, **values} for block, values in parts.items()]
    job.table("task_vectors", rows)
    return {
        "norms": flat.norm(dim=1).tolist(),
        "cosines": (unit @ unit.T).tolist(),
    }


def make_plane(job: Job) -> None:
    pipeline, device = job.pipeline, job.device
    merger = Merger(pipeline.unet.to(device), job.members())
    model = merger.merged([0.0] * len(merger.vectors))  # each point is written into it
    noise = job.few_noisy(pipeline.scheduler)
    axis = np.linspace(-0.2, 1.2, job["plane_points"]).round(6).tolist()
    last, points = len(merger.vectors) - 1, []
    with bar(len(axis) ** 2, job.label, "point") as progress:
        for w1 in axis:
            for w2 in axis:
                weights = [0.0] * (last + 1)
                weights[0] += w1
                weights[last] += w2
                loss = noise.loss(merger.merged(weights, into=model), device)
                place = {"w1": w1, "w2": w2, "expert1": 1, "expert2": last + 1}
                points.append({**place, "loss": loss})
                progress.update(1)
    job.table("plane", points)
