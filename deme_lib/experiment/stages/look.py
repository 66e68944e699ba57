"""What the figures of the paper look at."""

import itertools
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel

from deme_lib.diffusion import analysis
from deme_lib.diffusion.merged import Merger
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.randomness import generator, seed_of
from deme_lib.experiment.stages import fixed_noise, images_of, members_of, pipeline_of, table
from deme_lib.experiment.store import Job
from deme_lib.method.timesteps import split_timesteps

GRADIENT_IMAGES = 256
GRADIENT_DRAWS = 5  # of noise, averaged
ACTIVATION_IMAGES = 1000
RANDOM_STEPS = 3
LANDSCAPE_RADIUS = 0.25  # of each filter's norm: the loss on digits doubles about there


def gradients(
    job: Job, *, data: Path, model: str, pipeline: Path, seed: int, gradient_bins: int
) -> None:
    """Fig. 1a, of the ``model`` in a folder's pipeline."""
    found, device = pipeline_of(pipeline), job.device
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
            pairs, of_all = itertools.product(timesteps, repeat=2), (model, draw, len(images))
            rows += [(*of_all, *pair, c) for pair, c in zip(pairs, cosines.flat, strict=True)]
            progress.update(1)
    table(job, "gradients", rows, ["model", "draw", "n", "timestep1", "timestep2", "cosine"])


def activations(
    job: Job, *, data: Path, baseline: Path, members: list[Path], ranges: list[list[int]], seed: int
) -> None:
    """Fig. 2, of every expert, beside random weight changes as long as its task vector."""
    pipeline, experts = pipeline_of(baseline), members_of(members)
    base, device = pipeline.unet.eval(), job.device
    images = images_of(data, "train")[:ACTIVATION_IMAGES]
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
    table(job, "activations", rows)


def landscape(
    job: Job,
    *,
    data: Path,
    baseline: Path,
    ranges: list[list[int]],
    seed: int,
    plane_points: int,
    loss_images: int,
) -> None:
    """Fig. 4: held-out loss around the pretrained weights, for all timesteps and per range."""
    pipeline, rows = pipeline_of(baseline), []
    base, cut = pipeline.unet.to(job.device), [range(*own) for own in ranges]
    every = [range(cut[0].start, cut[-1].stop), *cut]  # range 0: all timesteps
    draws = [generator(seed, "landscape", i) for i in (1, 2)]
    directions = [analysis.filter_normalised(base.state_dict(), g) for g in draws]
    axis = np.linspace(-LANDSCAPE_RADIUS, LANDSCAPE_RADIUS, plane_points).round(6).tolist()
    noise = fixed_noise(data, "search", pipeline.scheduler, loss_images)
    with bar(len(axis) ** 2, "landscape", "point") as progress:
        for a, b, errors in analysis.over_plane(base, directions, axis, noise):
            progress.update(1)
            for k, r in enumerate(every):
                place = {"range": k, "start": r.start, "stop": r.stop, "a": a, "b": b}
                rows.append({**place, "loss": noise.mean_in(errors, r)})
    table(job, "landscape", rows)


def task_vectors(job: Job, *, baseline: Path, members: list[Path]) -> None:
    """Fig. 6b, and the norms and cosines of the experts' task vectors."""
    vectors = Merger(pipeline_of(baseline).unet, members_of(members)).vectors
    flat = torch.stack([torch.cat([t.flatten() for t in v.values()]) for v in vectors])
    unit, rows, names = flat / flat.norm(dim=1, keepdim=True), [], range(1, len(vectors) + 1)
    for k, vector in zip(names, vectors, strict=True):
        parts = analysis.task_vector_quantiles(vector)
        rows += [{"range": k, "block": block, **values} for block, values in parts.items()]
    table(job, "task_vectors", rows)
    cosines = torch.cat([flat.norm(dim=1, keepdim=True), unit @ unit.T], 1).tolist()
    rows = [(k, *row) for k, row in zip(names, cosines, strict=True)]
    table(job, "cosines", rows, ["range", "norm", *(f"cosine{k}" for k in names)])


def plane(
    job: Job,
    *,
    data: Path,
    baseline: Path,
    members: list[Path],
    plane_points: int,
    loss_images: int,
) -> None:
    """Fig. 6a: held-out loss over the weights of the first and the last expert."""
    pipeline, device = pipeline_of(baseline), job.device
    merger = Merger(pipeline.unet.to(device), [m.to(device) for m in members_of(members)])
    ends, rows = (merger.vectors[0], merger.vectors[-1]), []
    axis = np.linspace(-0.2, 1.2, plane_points).round(6).tolist()
    noise = fixed_noise(data, "search", pipeline.scheduler, loss_images)
    with bar(len(axis) ** 2, "plane", "point") as progress:
        for w1, w2, errors in analysis.over_plane(merger.base, ends, axis, noise):
            progress.update(1)
            place = {"w1": w1, "w2": w2, "expert1": 1, "expert2": len(members)}
            rows.append({**place, "loss": errors.double().mean().item()})
    table(job, "plane", rows)
