"""Images and metrics of an arm."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deme_lib.diffusion import analysis, metrics, sampling
from deme_lib.diffusion.progress import bar
from deme_lib.experiment.stages.combine import denoiser
from deme_lib.experiment.stages.job import Job
from deme_lib.method.ensembles import WeightedEnsemble
from deme_lib.method.timesteps import split_timesteps


def make_images(job: Job) -> dict[str, Any]:
    model, weights = denoiser(job)
    model, device = model.to(job.device), job.device
    scheduler = job.pipeline.scheduler
    tensors = {}
    with bar(job["samples"] * len(job["sampling_seeds"]), job.label, "image") as progress:
        for seed in job["sampling_seeds"]:
            tensors[f"seed{seed}"] = sampling.sample(
                model,
                scheduler,
                job["samples"],
                steps=job["sampling_steps"],
                purpose=("evaluation", seed),
                spacing=job["timestep_spacing"],
                batch_size=job.batch,
                device=device,
                on_batch=progress.update,
            )
    save_file(tensors, job.folder / "images.safetensors")
    bins = split_timesteps(job["loss_bins"], scheduler.config.num_train_timesteps)
    noise = job.fixed_noise("test", scheduler)
    errors = noise.errors(model, device)
    members = len(model.members) if isinstance(model, WeightedEnsemble) else 1
    return {
        "weights": weights,
        "test_loss": errors.double().mean().item(),
        "losses": [
            {"bin_start": b.start, "bin_stop": b.stop, "loss": noise.mean_in(errors, b)}
            for b in bins
        ],
        "parameters": sum(t.numel() for t in model.parameters()),
        "calls_per_image": members * job["sampling_steps"],
    }


def make_metrics(job: Job) -> dict[str, Any]:
    found = load_file(job.inputs["images"].path / "images.safetensors")
    rows = []
    for seed in job["sampling_seeds"]:
        images = found[f"seed{seed}"]
        rows.append({"seed": seed, **_all_metrics(job, images)})
    train, generated = job.images("train"), torch.cat(list(found.values()))
    distances = metrics.nearest_distances(generated, train, job.device)
    test = metrics.nearest_distances(job.images("test"), train, job.device)
    return {
        "rows": rows,
        "neighbours": {"n": len(distances), **analysis.quantiles(distances)},
        "test_neighbours": {"n": len(test), **analysis.quantiles(test)},
    }


def _all_metrics(job: Job, images: torch.Tensor) -> dict[str, Any]:
    """FID and pixel distance to train, KID to test, IS, precision and recall."""
    main = job.extract(images, job["features"])
    train = job.reference("train", job["features"])
    test = job.reference("test", job["features"])
    second = None
    if job["second_features"]:
        second = metrics.frechet(
            job.extract(images, job["second_features"]),
            job.reference("train", job["second_features"]),
        )
    precision, recall = metrics.precision_recall(main, train)
    return {
        "n": len(images),
        "features": job["features"],
        "steps": job["sampling_steps"],
        "fid": metrics.frechet(main, train),
        "fid_second": second,
        "pixel": metrics.frechet(
            job.extract(images, metrics.PIXELS), job.reference("train", metrics.PIXELS)
        ),
        "inception_score": metrics.inception_score(main, job["is_splits"]),
        "kid": metrics.kid(main, test, job["kid_subset_size"], job["kid_subsets"]),
        "precision": precision,
        "recall": recall,
    }
