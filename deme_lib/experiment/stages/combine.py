"""Combining copies: an arm's denoiser, the search of its weights, the merged pipeline."""

from typing import Any

import numpy as np
from torch import nn

from deme_lib.diffusion import models, weight_search
from deme_lib.diffusion.merged import Merger
from deme_lib.diffusion.progress import bar
from deme_lib.experiment.stages.job import Job
from deme_lib.method.ensembles import AveragedEnsemble, RoutedEnsemble


def denoiser(job: Job) -> tuple[nn.Module, list[float]]:
    """An arm's denoiser, on the CPU, and the weights it combines its members with."""
    base = job.pipeline.unet.eval()
    members = job.members(ema_decay=job["ema_decay"], checkpoints=job["checkpoints"])
    if not members:
        return base, []
    if job["combine"] == "routed":
        return RoutedEnsemble(members, job.ranges()), []
    if job["combine"] == "outputs":
        return AveragedEnsemble(members), []
    weights = job["weights"]
    if weights in ("one", "uniform"):
        weights = [1 / len(members)] * len(members)  # "one" is of families of one
    elif isinstance(weights, str):
        weights = job.inputs["search"].results["weights"]
    return Merger(base, members).merged(weights), weights


def make_search(job: Job) -> dict[str, Any]:
    pipeline, device = job.pipeline, job.device
    merger = Merger(pipeline.unet.to(device), job.members())
    model = merger.merged([0.0] * len(merger.vectors))  # each try is written into it
    noise = job.few_noisy(pipeline.scheduler)
    limits = (job[f"search_{name}"] for name in ("low", "high", "step"))
    space = weight_search.Space(len(merger.vectors), *limits, job["single"])
    losses = 0

    def loss(weights) -> float:
        nonlocal losses
        losses += 1
        progress.update(1)
        return noise.loss(merger.merged(weights, into=model), device)

    def score(weights) -> list[float]:
        """FID to the search images on every stream."""
        progress.update(1)
        merger.merged(weights, into=model)
        fids = []
        for stream in range(job["search_streams"]):
            images = job.sample(model, job["search_samples"], job["seed"], "search", stream + 1)
            found = job.extract_all([images], job["features"])
            fids.append(job.distance(found, job["features"], "search"))
        return fids

    with bar(job["search_losses"] + 2 * job["search_candidates"], job.label, "try") as progress:
        candidates = weight_search.search(
            space,
            losses=job["search_losses"],
            images=job["search_candidates"],
            loss=loss,
            score=score,
            seed=job["seed"],
        )
    chosen = weight_search.choose(candidates, space.plain())
    name = {"search": job.label.removeprefix("search-")}
    job.table("search", [name | _row(c) | {"chosen": int(c is chosen)} for c in candidates])
    scored = sum(c.scores is not None for c in candidates)
    return {
        "weights": list(chosen.weights),
        "losses": losses,
        "images": scored * job["search_samples"] * job["search_streams"],
    }


def _row(candidate: weight_search.Candidate) -> dict[str, Any]:
    scores = candidate.scores or []
    return {
        "weights": list(candidate.weights),
        "loss": candidate.loss,
        "fid": np.mean(scores) if scores else None,
        "se": np.std(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else None,
    }


def make_merged(job: Job) -> dict[str, Any]:
    unet, weights = denoiser(job)
    models.save_pipeline(unet, job.pipeline.scheduler, job.folder / "pipeline")
    return {"weights": weights}
