"""An arm's images, losses and metrics, and the search of merge weights."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deme_lib.diffusion import metrics, models
from deme_lib.diffusion.merged import Merger
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.sampling import SamplingError, sample
from deme_lib.diffusion.search import search_weights
from deme_lib.experiment.stages import fixed_noise, members_of, pipeline_of, reference_of, table
from deme_lib.experiment.store import Machine
from deme_lib.method.timesteps import split_timesteps

SHARD = 5000  # images that are held, and kept in a file, at a time


def denoiser_of(
    baseline: Path,
    members: list[Path],
    ranges: list[list[int]],
    combine: Callable[..., nn.Module],
    weights: list[float] | Path | None,
) -> tuple[nn.Module, list[float] | None]:
    """An arm's denoiser, on the CPU, and its merge weights, as given or in a search's folder."""
    if isinstance(weights, Path):
        weights = json.loads((weights / "weights.json").read_text())
    given = {} if weights is None else {"weights": weights}
    base, copies = pipeline_of(baseline).unet.eval(), members_of(members)
    return combine(base, copies, [range(*own) for own in ranges], **given).eval(), weights


def images(
    out: Path,
    work: Path,
    on: Machine,
    *,
    data: Path,
    baseline: Path,
    members: list[Path],
    ranges: list[list[int]],
    combine: Callable[..., nn.Module],
    weights: list[float] | Path | None,
    seed: int,
    sampling_seeds: list[int],
    samples: int,
    sampler: str,
    sampling_steps: int,
    loss_draws: int,
    loss_bins: int,
) -> None:
    """An arm's images of every sampling seed, its test losses and its cost."""
    device, scheduler = models.device_of(on.device), pipeline_of(baseline).scheduler
    model, weights = denoiser_of(baseline, members, ranges, combine, weights)
    model = model.to(device)
    with bar(samples * len(sampling_seeds), out.parent.name, "image") as progress:
        for stream, first in itertools.product(sampling_seeds, range(0, samples, SHARD)):
            path, count = work / f"seed{stream}-{first}.safetensors", min(SHARD, samples - first)
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
                batch_size=on.sampling_batch,
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
    table(out, "losses", losses, ["bin_start", "bin_stop", "loss"])
    row = {"parameters": sum(t.numel() for t in model.parameters())}
    row |= {"calls_per_image": sampling_steps * _unets_run(model, device)}
    table(out, "arms", [row | {"weights": weights}])
    for path in work.glob("*.safetensors"):  # `work` keeps them until all is done
        shutil.copy(path, out)


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
    out: Path,
    work: Path,
    on: Machine,
    *,
    images: Path,
    reference: Path,
    features: list[str],
    inception_weights: str,
    sampling_seeds: list[int],
    sampler: str,
    sampling_steps: int,
    fid_reference: str,
    is_splits: int,
    kid_subset_size: int,
    kid_subsets: int,
) -> None:
    """FID, KID, IS, precision and recall of an arm's images, for every sampling seed."""
    cuda, rows = models.device_of(on.device).type == "cuda", []
    names = (*features, metrics.PIXELS)
    for stream in sampling_seeds:
        parts = [
            [metrics.extract(part, name, inception_weights, cuda) for name in names]
            for part in read_images(images, stream)
        ]
        found = dict(
            zip(names, map(metrics.Features.joined, zip(*parts, strict=True)), strict=True)
        )
        distance = {
            name: metrics.frechet(found[name], reference_of(reference, fid_reference, name))
            for name in names
        }
        main = found[features[0]]
        real = {role: reference_of(reference, role, features[0]) for role in ("train", "test")}
        precision, recall = metrics.precision_recall(main, real[fid_reference])
        rows.append(
            {
                "seed": stream,
                "n": len(main),
                "features": features[0],
                "sampler": sampler,
                "steps": sampling_steps,
                "reference": fid_reference,
                "fid": distance[features[0]],
                "fid_second": distance[features[1]] if len(features) > 1 else None,
                "fid_train": metrics.frechet(main, real["train"]),
                "pixel": distance[metrics.PIXELS],
                "kid": metrics.kid(main, real["test"], kid_subset_size, kid_subsets),
                "inception_score": metrics.inception_score(main, is_splits),
                "precision": precision,
                "recall": recall,
            }
        )
    table(out, "metrics", rows)


def search(
    out: Path,
    work: Path,
    on: Machine,
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
    device, pipeline = models.device_of(on.device), pipeline_of(baseline)
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
                batch_size=on.sampling_batch,
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
    table(out, "search", rows, ["trial", "weights", "fid", "chosen"])
    (out / "weights.json").write_text(json.dumps(list(tried[best][0])))


def merged(
    out: Path,
    work: Path,
    on: Machine,
    *,
    baseline: Path,
    members: list[Path],
    ranges: list[list[int]],
    combine: Callable[..., nn.Module],
    weights: list[float] | Path | None,
) -> None:
    """An arm's single model as a diffusers pipeline."""
    unet, _ = denoiser_of(baseline, members, ranges, combine, weights)
    models.save_pipeline(unet, pipeline_of(baseline).scheduler, out / "pipeline")
