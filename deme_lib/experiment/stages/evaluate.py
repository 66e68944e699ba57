"""The gate, and an arm's images and metrics."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deme_lib.diffusion import analysis, metrics
from deme_lib.diffusion.progress import bar
from deme_lib.experiment.stages.combine import denoiser
from deme_lib.experiment.stages.job import Job
from deme_lib.method.ensembles import RoutedEnsemble
from deme_lib.method.timesteps import split_timesteps

NEIGHBOURS = 1000  # images of an arm whose nearest training images are looked for


def make_gate(job: Job) -> None:
    """Where can decoupling help? Test loss per range, paired with the all-timestep model's."""
    scheduler, ranges = job.pipeline.scheduler, job.ranges()
    noise = job.test_noisy(scheduler)
    models = {
        "pretrained": job.pipeline.unet,
        "all_plain": job.members("all_plain")[0],
        "plain_routed": RoutedEnsemble(job.members("plain"), ranges),
        "deme_routed": RoutedEnsemble(job.members("deme"), ranges),
    }
    errors = {
        name: noise.errors(model.eval().to(job.device), job.device)
        for name, model in models.items()
    }
    rows, images = [], len(job.images("test"))
    for name, found in errors.items():
        for k, own in enumerate(ranges, start=1):
            difference = found - errors["all_plain"]
            rows.append(
                {"model": name, "range": k, "start": own.start, "stop": own.stop}
                | {"loss": noise.mean_in(found, own), "difference": noise.mean_in(difference, own)}
                | {"se": noise.standard_error_in(difference, own), "images": images}
            )
    job.table("gate", rows)


def make_images(job: Job) -> dict[str, Any]:
    model, weights = denoiser(job)
    model, scheduler, tensors = model.to(job.device), job.pipeline.scheduler, {}
    with bar(job["samples"] * len(job["sampling_seeds"]), job.label, "image") as progress:
        for seed in job["sampling_seeds"]:
            stream = ("evaluation", job["seed"], seed, 1)
            images = job.sample(model, job["samples"], *stream, on_batch=progress.update)
            tensors[f"seed{seed}"] = images
    save_file(tensors, job.folder / "images.safetensors")
    bins = split_timesteps(job["loss_bins"], scheduler.config.num_train_timesteps)
    noise = job.test_noisy(scheduler)
    errors = noise.errors(model, job.device)
    job.table(
        "losses",
        [
            {"arm": job["arm"], "bin_start": own.start, "bin_stop": own.stop}
            | {"loss": noise.mean_in(errors, own)}
            for own in bins
        ],
    )
    members = len(model.members) if job["combine"] == "outputs" else 1
    row = {
        "arm": job["arm"],
        "parameters": sum(t.numel() for t in model.parameters()),
        "calls_per_image": members * job["sampling_steps"],
        "weights": weights or None,
        "test_loss": errors.double().mean().item(),
    }
    job.table("arms", [row])
    return {"weights": weights}


def make_metrics(job: Job) -> None:
    images = load_file(job.inputs["images"].path / "images.safetensors")
    rows, kept = [], {}
    for seed in job["sampling_seeds"]:
        row, kept[f"seed{seed}"] = _score(job, images[f"seed{seed}"])
        rows.append({"arm": job["arm"], "seed": seed, **row})
    job.table("metrics", rows)
    save_file(kept, job.folder / "features.safetensors")
    train = job.images("train")
    shown = {job["arm"]: next(iter(images.values()))[:NEIGHBOURS]}
    if job["arm"] == "pretrained":
        shown["test"] = job.images("test")[:NEIGHBOURS]
    distances = {name: metrics.nearest_distances(found, train) for name, found in shown.items()}
    job.table(
        "neighbours",
        [{"arm": a, "n": len(d), **analysis.quantiles(d)} for a, d in distances.items()],
    )


def _score(job: Job, images: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
    """All metrics of one stream's images, and their features, extracted once."""
    role, main = job["fid_reference"], job.extract(images, job["features"])
    test, train = (job.reference(r, job["features"]) for r in ("test", "train"))
    reference = test if role == "test" else train
    precision, recall = metrics.precision_recall(main, reference)
    row = {
        "n": len(images),
        "features": job["features"],
        "steps": job["sampling_steps"],
        "reference": role,
        "fid": metrics.frechet(main, reference),
        "fid_second": job.fid(images, job["second_features"], role),
        "fid_train": metrics.frechet(main, train),
        "pixel": job.fid(images, metrics.PIXELS, role),
        "kid": metrics.kid(main, test, job["kid_subset_size"], job["kid_subsets"]),
        "inception_score": metrics.inception_score(main, job["is_splits"]),
        "precision": precision,
        "recall": recall,
    }
    return row, main.values.float()
