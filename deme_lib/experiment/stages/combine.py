"""Combining copies: an arm's denoiser, the search of its weights, the merged pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from deme_lib.diffusion import metrics, models, sampling, weight_search
from deme_lib.diffusion.cuts import routing_ranges
from deme_lib.diffusion.decouple_merge import Merger
from deme_lib.diffusion.progress import bar
from deme_lib.experiment.stages.job import Job
from deme_lib.method.ensembles import RoutedEnsemble, output_space_merge
from deme_lib.method.projection import projection_share


def weights_of(job: Job, members: int) -> list[float]:
    """An arm's weights: fixed, or what a search found."""
    rule = job["weights"]
    if isinstance(rule, list):
        return rule
    if rule == "one":
        return [1.0] * members
    if rule == "uniform":
        return [1 / members] * members
    found = job.inputs["search"].results
    return found["best_single" if rule == "best_single" else "weights"]


def denoiser(job: Job) -> tuple[nn.Module, list[float]]:
    """An arm's denoiser, on the CPU, and the weights it combines its members with."""
    base, members = job.pipeline.unet.eval(), job.members()
    weights = weights_of(job, len(members))
    if not members:
        return base, []
    if job["combine"] == "routed":
        ranges = routing_ranges(job["range_cut"], job["n_ranges"], job.pipeline.scheduler)
        return RoutedEnsemble(members, ranges), []
    if job["combine"] == "outputs":
        return output_space_merge(base, members, weights), weights
    return Merger(base, members).merged(weights), weights


def make_search(job: Job) -> dict[str, Any]:
    pipeline, device = job.pipeline, job.device
    merger = Merger(pipeline.unet, job.members())
    noise = job.fixed_noise("search", pipeline.scheduler)
    reference = job.reference("train", job["features"])
    dimensions = len(merger.vectors)
    space = weight_search.Space(
        dimensions, job["search_low"], job["search_high"], job["search_step"], job["single"]
    )
    tried = []

    def loss(weights) -> float:
        progress.update(1)
        tried.append(weights)
        return noise.loss(merger.merged(weights).to(device), device)

    def score(weights) -> float:
        images = sampling.sample(
            merger.merged(weights).to(device),
            pipeline.scheduler,
            job["search_samples"],
            steps=job["sampling_steps"],
            purpose=(job["seed"], "search"),
            spacing=job["timestep_spacing"],
            batch_size=job.batch,
            device=device,
        )
        progress.update(1)
        return metrics.frechet(job.extract(images, job["features"]), reference)

    tries = job["search_losses"] + 2 * job["search_candidates"]
    with bar(tries, job.label, "try") as progress:
        candidates = weight_search.search(
            space,
            job["search_strategy"],
            losses=job["search_losses"],
            images=job["search_candidates"],
            loss=loss,
            score=score,
            seed=job["seed"],
        )
    scored = [c for c in candidates if c.score is not None]
    one_hot = [c for c in scored if sorted(c.weights) == [0.0] * (dimensions - 1) + [1.0]]
    return {
        "weights": list(scored[0].weights),
        "best_single": list(one_hot[0].weights) if one_hot else None,
        "candidates": [
            {"weights": list(c.weights), "loss": c.loss, "fid": c.score} for c in candidates
        ],
        "losses": len(tried),
        "images": len(scored) * job["search_samples"],
    }


def make_merged(job: Job) -> dict[str, Any]:
    unet, weights = denoiser(job)
    models.save_pipeline(unet, job.pipeline.scheduler, job.folder / "pipeline")
    return {"weights": weights, "projection_share": projection_share(unet)}
