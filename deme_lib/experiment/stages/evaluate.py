"""The gate, and an arm's images and metrics."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deme_lib.diffusion import analysis, metrics
from deme_lib.diffusion.progress import bar
from deme_lib.experiment import processes
from deme_lib.experiment.stages.combine import denoiser
from deme_lib.experiment.stages.job import SHARD, Job
from deme_lib.experiment.store import WORKING
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


def shards(folder: Path, samples: int) -> list[Path]:
    """The files that an arm's images are kept in, each with tensors ``seed<k>``, in order."""
    numbers = range(-(-samples // SHARD))
    return [folder / (f"images-{k}.safetensors" if k else "images.safetensors") for k in numbers]


def sampling(job: Job, model: nn.Module | None = None) -> Iterator[tuple[Path, dict]]:
    """An arm's images by the file to keep them in, without those that an earlier run kept."""
    model = denoiser(job)[0].to(job.device) if model is None else model
    seeds, samples = job["sampling_seeds"], job["samples"]
    with bar(samples * len(seeds), job.label, "image") as progress:
        for k, path in enumerate(shards(job.folder / WORKING, samples)):
            count, tensors = min(SHARD, samples - k * SHARD), {}
            if processes.tell("kept" if path.is_file() else None):  # the leader's word
                progress.update(count * len(seeds))
                continue
            for seed in seeds:
                how = {"first": k * SHARD, "shared": True, "on_batch": progress.update}
                stream = ("evaluation", job["seed"], seed, 1)
                tensors[f"seed{seed}"] = job.sample(model, count, *stream, **how)
            yield path, tensors


def make_images(job: Job) -> None:
    model, weights = denoiser(job)
    model, scheduler = model.to(job.device), job.pipeline.scheduler
    for path, tensors in sampling(job, model):
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary)
        os.replace(temporary, path)
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
    for path in shards(job.folder / WORKING, job["samples"]):
        shutil.copy(path, job.folder)  # kept there, so that an interrupted run has them too


def make_metrics(job: Job) -> None:
    rows, seeds = [], job["sampling_seeds"]
    files = shards(job.inputs["images"].path, job["samples"])
    for seed in seeds:
        images = (load_file(file)[f"seed{seed}"] for file in files)
        rows.append({"arm": job["arm"], "seed": seed, **_score(job, images)})
    job.table("metrics", rows)
    train = job.images("train")
    shown = {job["arm"]: load_file(files[0])[f"seed{seeds[0]}"][:NEIGHBOURS]}
    if job["arm"] == "pretrained":
        shown["test"] = job.images("test")[:NEIGHBOURS]
    distances = {name: metrics.nearest_distances(found, train) for name, found in shown.items()}
    job.table(
        "neighbours",
        [{"arm": a, "n": len(d), **analysis.quantiles(d)} for a, d in distances.items()],
    )


def _score(job: Job, images: Iterable[torch.Tensor]) -> dict[str, Any]:
    """All metrics of one stream's images, a part at a time."""
    role, second = job["fid_reference"], job["second_features"]
    found = job.extract_all(images, job["features"], second, metrics.PIXELS)
    main = found[job["features"]]
    test, train = (job.reference(r, job["features"]) for r in ("test", "train"))
    reference = test if role == "test" else train
    precision, recall = metrics.precision_recall(main, reference)
    return {
        "n": len(main),
        "features": job["features"],
        "steps": job["sampling_steps"],
        "reference": role,
        "fid": metrics.frechet(main, reference),
        "fid_second": job.distance(found, second, role),
        "fid_train": metrics.frechet(main, train),
        "pixel": job.distance(found, metrics.PIXELS, role),
        "kid": metrics.kid(main, test, job["kid_subset_size"], job["kid_subsets"]),
        "inception_score": metrics.inception_score(main, job["is_splits"]),
        "precision": precision,
        "recall": recall,
    }
