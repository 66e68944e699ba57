"""How long missing artefacts will take, from a few timed steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from deme_lib.diffusion import models
from deme_lib.diffusion.training import Training, TrainingSpec
from deme_lib.experiment import recipes
from deme_lib.experiment.parameters import Parameters
from deme_lib.experiment.store import Recipe, Store

LONGEST_S = 2 * 3600.0
TIMED_STEPS = 3


class TooLongError(RuntimeError):
    """The estimate exceeds two hours and nobody allowed it."""


def announce(missing: Sequence[Recipe], store: Store, p: Parameters) -> None:
    """Print what will be made, why, and for how long; stop above two hours unless allowed."""
    if not missing:
        return
    steps = sum(r.training_steps for r in missing)
    calls = sum(r.denoiser_calls for r in missing)
    step_s, call_s = _timings(store, p) if steps + calls else (0.0, 0.0)
    seconds = steps * step_s + calls * call_s
    work = "seconds of work"
    if steps + calls:
        work = (
            f"{steps:,} optimiser steps of {1e3 * step_s:.0f} ms and {calls:,} denoiser calls of "
            f"{1e3 * call_s:.2f} ms: about {_readable(seconds)} in one process"
        )
    labels = ", ".join(recipe.label for recipe in missing)
    print(f"not in {store.root}, so made now: {labels}\n{work}", flush=True)
    if seconds > LONGEST_S and not p.allow_long:
        raise TooLongError(
            f"about {_readable(seconds)} is more than {_readable(LONGEST_S)}: set allow_long to "
            "true to go on; `make reproduce` makes such parts side by side"
        )


def _timings(store: Store, p: Parameters) -> tuple[float, float]:
    """Seconds of one optimiser step (with teacher) and of one image through the denoiser."""
    baseline = recipes.baseline(p)
    if store.holds(baseline):
        pipeline = models.load_pipeline(store.load(baseline).path / "pipeline")
        unet, scheduler = pipeline.unet, pipeline.scheduler
    elif p.pretrained:
        pipeline = models.load_pipeline(p.pretrained)
        unet, scheduler = pipeline.unet, pipeline.scheduler
    else:
        channels, size, _ = store.load(recipes.data(p)).results["shape"]
        unet = models.new_unet(
            channels, size, p.model_channels, p.layers_per_block, p.seed, attention=p.attention
        )
        scheduler = models.new_scheduler(p.num_train_timesteps)
    images = torch.zeros(p.batch_size, *models.shape_of(unet), dtype=torch.uint8)
    spec = TrainingSpec(
        steps=TIMED_STEPS + 1,
        purpose=(0, "timing"),
        own_range=range(scheduler.config.num_train_timesteps),
        learning_rate=0.0,
        final_learning_rate=0.0,
        batch_size=p.batch_size,
        precision=p.precision,
    )
    run = iter(Training(unet, scheduler, images, spec, teacher=None, device=p.device))
    next(run)
    started = time.perf_counter()
    for _ in run:
        pass
    step = (time.perf_counter() - started) / TIMED_STEPS
    return 1.25 * step, _call_time(unet, p.sampling_batch)


def _call_time(unet: torch.nn.Module, batch: int) -> float:
    x = torch.zeros(batch, *models.shape_of(unet), device=unet.device)
    with torch.inference_mode():
        unet(x, 0)
        started = time.perf_counter()
        for _ in range(TIMED_STEPS):
            unet(x, 0).sample.sum().item()
    return (time.perf_counter() - started) / TIMED_STEPS / batch


def _readable(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
