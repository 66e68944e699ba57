"""Whether the metric can be believed, asked before any arm is judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from deme_lib.diffusion import metrics, models, sampling
from deme_lib.diffusion.progress import bar
from deme_lib.experiment.stages.job import Job
from deme_lib.experiment.stages.train import SNAPSHOTS

HALVINGS = 20
LARGEST_DIFFERENCE = 0.1  # of the Frechet distances of two halves of one model's images


def make_acceptance(job: Job) -> dict[str, Any]:
    """Two halves of one model's images; three lengths of pretraining under two classifiers."""
    baseline = job.inputs["baseline"].path
    unets = {f"1/{d}": baseline / f"snapshot-{d}" for d in SNAPSHOTS}
    unets = {k: path for k, path in unets.items() if path.is_dir()}
    unets["1"] = baseline / "pipeline" / "unet"
    counts = {k: job["acceptance_samples"] if k == "1" else job["samples"] for k in unets}
    features, rows = {}, []
    with bar(sum(counts.values()), job.label, "image") as progress:
        for share, path in unets.items():
            images = sampling.sample(
                models.load_unet(path).eval().to(job.device),
                job.pipeline.scheduler,
                counts[share],
                steps=job["sampling_steps"],
                purpose=(job["seed"], "acceptance"),
                spacing=job["timestep_spacing"],
                batch_size=job.batch,
                device=job.device,
                on_batch=progress.update,
            )
            features[share] = job.extract(images, job["features"])
            rows.append({"share_of_steps": share, "n": job["samples"], **_fids(job, images)})
    ranking = pd.DataFrame(rows)
    same = None
    if job["second_features"] and len(ranking) > 1:
        same = bool((ranking["fid"].rank() == ranking["fid_second"].rank()).all())
    reference = job.reference(job["fid_reference"], job["features"])
    difference = metrics.halves_difference(features["1"], reference, repeats=HALVINGS, seed=0)
    return {
        "halves": {
            "features": job["features"],
            "n_half": job["acceptance_samples"] // 2,
            "repeats": HALVINGS,
            "relative_difference_rms": difference,
        },
        "ranking": ranking.to_dict("records"),
        "same_ranking": same,
        "accepted": bool(difference <= LARGEST_DIFFERENCE and same is not False),
    }


def _fids(job: Job, images: torch.Tensor) -> dict[str, float]:
    """FID of the first ``samples`` images by both classifiers."""
    names = {"fid": job["features"], "fid_second": job["second_features"]}
    found = dict.fromkeys(names, np.nan)
    for column, name in names.items():
        if name:
            few = job.extract(images[: job["samples"]], name)
            found[column] = metrics.frechet(few, job.reference(job["fid_reference"], name))
    return found
