"""An arm's images, losses and metrics, and the search of merge weights."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deme_lib.diffusion import metrics, models
from deme_lib.diffusion.merged import Merger
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.sampling import SamplingError, sample, sampling_scheduler
from deme_lib.diffusion.search import search_weights
from deme_lib.experiment.stages import (
    fixed_noise,
    members_of,
    pipeline_of,
    reference_of,
    scored,
    table,
)
from deme_lib.experiment.store import Job
from deme_lib.method.timesteps import split_timesteps

SHARD = 5000  # images that are held, and kept in a file, at a time


def denoiser_of(
    baseline: Path,
    members: list[Path],
    ranges: list[list[int]],
    combine: Callable[..., nn.Module],
    weights: list[float] | Path | None,
) -> tuple[nn.Module, DDPMScheduler, list[float] | None]:
    """An arm's denoiser, on the CPU, its noise schedule, and its merge weights, as given or in a
    search's folder."""
    if isinstance(weights, Path):
        weights = json.loads((weights / "weights.json").read_text())
    given = {} if weights is None else {"weights": weights}
    pipeline, own = pipeline_of(baseline), [range(*bounds) for bounds in ranges]
    denoiser = combine(pipeline.unet.eval(), members_of(members), own, **given).eval()
    return denoiser, pipeline.scheduler, weights


def images(
    job: Job,
    *,
    data: Path,
    seed: int,
    sampling_seeds: list[int],
    samples: int,
    sampler: str,
    sampling_steps: int,
    loss_draws: int,
    loss_bins: int,
    **arm: Any,
) -> None:
    """Images of every sampling seed, test losses and cost of the denoiser that ``arm`` makes."""
    model, scheduler, weights = denoiser_of(**arm)
    model, device = model.to(job.device), job.device
    with bar(samples * len(sampling_seeds), job.out.parent.name, "image") as progress:
        for stream, first in itertools.product(sampling_seeds, range(0, samples, SHARD)):
            path = job.work / f"seed{stream}-{first}.safetensors"
            count = min(SHARD, samples - first)
            if path.is_file():  # by an earlier run, that was killed
                progress.update(count)
                continue
            found = sample(
                model,
                scheduler,
                count,
                steps=sampling_steps,
                purpose=("evaluation", seed, stream, 1),
                sampler=sampler,
                batch_size=job.on.sampling_batch,
                device=device,
                on_batch=progress.update,
                first=first,
            )
            save_file({"images": found}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    noise = fixed_noise(data, "test", scheduler, draws=loss_draws)
    errors = noise.errors(model, device)
    bins = split_timesteps(loss_bins, scheduler.config.num_train_timesteps)
    losses = [(own.start, own.stop, noise.mean_in(errors, own)) for own in bins]
    table(job, "losses", losses, ["bin_start", "bin_stop", "loss"])
    row = {"parameters": sum(t.numel() for t in model.parameters())}
    row |= {"calls_per_image": sampling_steps * _unets_run(model, device)}
    table(job, "arms", [row | {"weights": weights}])
    for path in job.work.glob("*.safetensors"):  # `work` keeps them until all is done
        shutil.copy(path, job.out)


@torch.inference_mode()
def _unets_run(model: nn.Module, device: torch.device) -> int:
    """How many UNets one call of a denoiser runs."""
    calls = []
    unets = [module for module in model.modules() if isinstance(module, UNet2DModel)]
    hooks = [unet.register_forward_hook(lambda *_: calls.append(1)) for unet in unets]
    model(torch.zeros(1, *models.shape_of(model), device=device), 0)
    for hook in hooks:
        hook.remove()
    return len(calls)


def read_images(images: Path, stream: int) -> Iterator[Tensor]:
    """uint8 images of a sampling seed, a part [n, C, H, W] at a time."""
    paths = images.glob(f"seed{stream}-*.safetensors")
    for path in sorted(paths, key=lambda path: int(path.stem.partition("-")[2])):
        yield load_file(path)["images"]


def scores(
    job: Job,
    *,
    images: Path,
    reference: Path,
    features: list[str],
    inception_weights: str,
    sampling_seeds: list[int],
    sampler: str,
    sampling_steps: int,
    fid_reference: str,
    **scoring: int,
) -> None:
    """FID, KID, IS, precision and recall of an arm's images, for every sampling seed."""
    cuda, rows = job.device.type == "cuda", []
    real = {role: reference_of(reference, role, features[0]) for role in ("train", "test")}
    for stream in sampling_seeds:
        found = {}
        for name in (*features, metrics.PIXELS):
            parts = read_images(images, stream)
            parts = [metrics.extract(part, name, inception_weights, cuda) for part in parts]
            found[name] = metrics.Features.joined(parts)
        main = found[features[0]]
        row = {"seed": stream, "n": len(main), "features": features[0], "sampler": sampler}
        row |= {"steps": sampling_steps, "reference": fid_reference}
        row |= scored(found, reference, fid_reference, **scoring)
        row["fid_train"] = metrics.frechet(main, real["train"])
        precision, recall = metrics.precision_recall(main, real[fid_reference])
        rows.append(row | {"precision": precision, "recall": recall})
    columns = "seed n features sampler steps reference fid fid_second fid_train pixel kid "
    table(job, "metrics", rows, f"{columns}inception_score precision recall".split())


def search(
    job: Job,
    *,
    data: Path,
    reference: Path,
    baseline: Path,
    members: list[Path],
    features: list[str],
    inception_weights: str,
    seed: int,
    sampler: str,
    sampling_steps: int,
    search_low: float,
    search_high: float,
    search_trials: int,
    search_samples: int,
) -> None:
    """Merge weights by FID to the search images, on noise that no reported number uses."""
    device, pipeline = job.device, pipeline_of(baseline)
    sampling_scheduler(pipeline.scheduler, sampler, sampling_steps)  # below, only weights may fail
    merger = Merger(pipeline.unet.to(device), [m.to(device) for m in members_of(members)])
    model = merger.merged([0.0] * len(members))  # each try is written into it
    real = reference_of(reference, "search", features[0])

    def fid(weights: Sequence[float]) -> float:
        progress.update(1)
        try:
            found = sample(
                merger.merged(weights, into=model),
                pipeline.scheduler,
                search_samples,
                steps=sampling_steps,
                purpose=("search", seed),
                sampler=sampler,
                batch_size=job.on.sampling_batch,
                device=device,
            )
        except SamplingError:  # these weights make no images
            return math.inf
        cuda = device.type == "cuda"
        return metrics.frechet(metrics.extract(found, features[0], inception_weights, cuda), real)

    with bar(search_trials, "search", "merge") as progress:
        limits = {"low": search_low, "high": search_high, "seed": seed}
        tried = search_weights(len(members), fid, trials=search_trials, **limits)
    best = min(range(len(tried)), key=lambda k: tried[k][1])
    rows = [(k, list(weights), value, int(k == best)) for k, (weights, value) in enumerate(tried)]
    table(job, "search", rows, ["trial", "weights", "fid", "chosen"])
    (job.out / "weights.json").write_text(json.dumps(list(tried[best][0])))


def merged(job: Job, **arm: Any) -> None:
    """An arm's single model as a diffusers pipeline."""
    unet, scheduler, _ = denoiser_of(**arm)
    models.save_pipeline(unet, scheduler, job.out / "pipeline")
