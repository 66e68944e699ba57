"""Whether the metric can be believed, asked before any arm is judged."""

from typing import Any

import pandas as pd

from deme_lib.diffusion import metrics, models
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
    main, rows = {}, []
    with bar(sum(counts.values()), job.label, "image") as progress:
        for share, path in unets.items():
            unet, stream = models.load_unet(path).eval().to(job.device), (job["seed"], "acceptance")
            parts = job.parts(unet, counts[share], *stream, on_batch=progress.update)
            found = job.extract_all(parts, job["features"], job["second_features"])
            main[share], role = found[job["features"]], job["fid_reference"]
            few = {name: features[: job["samples"]] for name, features in found.items()}
            row = {"share_of_steps": share, "n": job["samples"]}
            row["fid"] = job.distance(few, job["features"], role)
            row["fid_second"] = job.distance(few, job["second_features"], role)
            rows.append(row)
    ranking = pd.DataFrame(rows)
    same = None
    if job["second_features"] and len(ranking) > 1:
        same = bool((ranking["fid"].rank() == ranking["fid_second"].rank()).all())
    reference = job.reference(role, job["features"])
    difference = metrics.halves_difference(main["1"], reference, repeats=HALVINGS, seed=0)
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
