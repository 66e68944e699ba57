"""What the figures of the paper look at."""

import itertools
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel

from deme_lib.diffusion import analysis, models
from deme_lib.diffusion.merged import Merger
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.randomness import generator, seed_of
from deme_lib.experiment.stages import (
    device_of,
    fixed_noise,
    images_of,
    members_of,
    pipeline_of,
    table,
)
from deme_lib.experiment.store import Machine
from deme_lib.method.timesteps import split_timesteps

GRADIENT_IMAGES = 256
GRADIENT_DRAWS = 5  # of noise, averaged
ACTIVATION_IMAGES = 1000
RANDOM_STEPS = 3
LANDSCAPE_RADIUS = 0.25  # of each filter's norm: the loss on digits doubles about there


def gradients(
    out: Path,
    work: Path,
    on: Machine,
    *,
    data: Path,
    model: str,
    pipeline: Path,
    seed: int,
    gradient_bins: int,
) -> None:
    """Fig. 1a, of the ``model`` in a folder's pipeline."""
    found, device = models.load_pipeline(pipeline / "pipeline"), device_of(on)
    unet = found.unet.eval().to(device)
    bins = split_timesteps(gradient_bins, found.scheduler.config.num_train_timesteps)
    timesteps = [(b.start + b.stop - 1) // 2 for b in bins]
    images, rows = images_of(data, "train")[:GRADIENT_IMAGES], []
    with bar(GRADIENT_DRAWS, f"gradients of {model}", "draw") as progress:
        for draw in range(GRADIENT_DRAWS):
            of_draw = seed_of(seed, "draw", draw) % 2**32
            cosines = analysis.gradient_similarity(
                unet, found.scheduler, images, timesteps, of_draw, device
            )
            rows += [
                {"model": model, "draw": draw, "n": len(images)}
                | {"timestep1": a, "timestep2": b, "cosine": cosines[i, j]}
                for (i, a), (j, b) in itertools.product(enumerate(timesteps), repeat=2)
            ]
            progress.update(1)
    table(out, "gradients", rows)


def activations(
    out: Path,
    work: Path,
    on: Machine,
    *,
    data: Path,
    baseline: Path,
    members: list[Path],
    ranges: list[list[int]],
    seed: int,
) -> None:
    """Fig. 2, of every expert, beside random weight changes as long as its task vector."""
    pipeline, device, experts = pipeline_of(baseline), device_of(on), members_of(members)
    images, base = images_of(data, "train")[:ACTIVATION_IMAGES], pipeline.unet.eval()
    vectors, rows = Merger(base, experts).vectors, []
    with bar(len(experts) * (1 + RANDOM_STEPS), "activations", "model") as progress:

        def differences(model: UNet2DModel, own: range) -> list[dict]:
            progress.update(1)
            return analysis.activation_differences(
                base, model.eval(), pipeline.scheduler, images, own, seed, device
            )

        for k, (expert, own, vector) in enumerate(zip(experts, ranges, vectors, strict=True)):
            norm = sum(t.square().sum().item() for t in vector.values()) ** 0.5
            steps = [generator(seed, "random step", k, i + 1) for i in range(RANDOM_STEPS)]
            random = [differences(analysis.random_step(base, norm, g), range(*own)) for g in steps]
            for i, row in enumerate(differences(expert, range(*own))):
                share = sum(found[i]["share"] for found in random) / RANDOM_STEPS
                rows.append({"range": k + 1, "n": len(images), **row, "share_at_random": share})
    table(out, "activations", rows)


def landscape(
    out: Path,
    work: Path,
    on: Machine,
    *,
    data: Path,
    baseline: Path,
    ranges: list[list[int]],
    seed: int,
    plane_points: int,
    loss_images: int,
) -> None:
    """Fig. 4: held-out loss around the pretrained weights, for all timesteps and per range."""
    pipeline, points = pipeline_of(baseline), plane_points
    noise = fixed_noise(data, "search", pipeline.scheduler, loss_images)
    with bar(points**2, "landscape", "point") as progress:
        rows = analysis.landscape(
            pipeline.unet.eval(),
            noise,
            [range(*own) for own in ranges],
            LANDSCAPE_RADIUS,
            points,
            seed,
            device_of(on),
            lambda: progress.update(1),
        )
    table(out, "landscape", rows)


def task_vectors(
    out: Path, work: Path, on: Machine, *, baseline: Path, members: list[Path]
) -> None:
    """Fig. 6b, and the norms and cosines of the experts' task vectors."""
    vectors = Merger(pipeline_of(baseline).unet, members_of(members)).vectors
    flat = torch.stack([torch.cat([t.flatten() for t in v.values()]) for v in vectors])
    unit, rows, names = flat / flat.norm(dim=1, keepdim=True), [], range(1, len(vectors) + 1)
    for k, vector in zip(names, vectors, strict=True):
        parts = analysis.task_vector_quantiles(vector)
        rows += [{"range": k, "block": block, **values} for block, values in parts.items()]
    table(out, "task_vectors", rows)
    cosines = zip(names, flat.norm(dim=1).tolist(), (unit @ unit.T).tolist(), strict=True)
    table(
        out,
        "cosines",
        [
            {"range": k, "norm": norm} | {f"cosine{j}": c for j, c in zip(names, row, strict=True)}
            for k, norm, row in cosines
        ],
    )


def plane(
    out: Path,
    work: Path,
    on: Machine,
    *,
    data: Path,
    baseline: Path,
    members: list[Path],
    plane_points: int,
    loss_images: int,
) -> None:
    """Fig. 6a: held-out loss over the weights of the first and the last expert."""
    pipeline, device = pipeline_of(baseline), device_of(on)
    merger = Merger(pipeline.unet.to(device), [m.to(device) for m in members_of(members)])
    model = merger.merged([0.0] * len(members))  # each point is written into it
    noise = fixed_noise(data, "search", pipeline.scheduler, loss_images)
    axis = np.linspace(-0.2, 1.2, plane_points).round(6).tolist()
    last, points = len(members) - 1, []
    with bar(len(axis) ** 2, "plane", "point") as progress:
        for w1, w2 in itertools.product(axis, axis):
            weights = [0.0] * len(members)
            weights[0] += w1
            weights[last] += w2
            loss = noise.loss(merger.merged(weights, into=model), device)
            place = {"w1": w1, "w2": w2, "expert1": 1, "expert2": last + 1}
            points.append({**place, "loss": loss})
            progress.update(1)
    table(out, "plane", points)
