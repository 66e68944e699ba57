"""The pretrained model and its finetuned copies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler, UNet2DModel

from deme_lib.diffusion import models
from deme_lib.diffusion.cuts import training_ranges
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.training import Training, TrainingSpec
from deme_lib.experiment.recipes import ADAM
from deme_lib.experiment.stages.job import Job
from deme_lib.experiment.store import CHECKPOINT, HISTORY, write_text
from deme_lib.method.projection import plain_or_projected, projection_share
from deme_lib.method.timesteps import split_timesteps

HELD_OUT_POINTS = 16  # evaluations of the held-out loss over a run
SNAPSHOTS = (4, 2)  # pretraining leaves models at 1/4 and 1/2 of its steps, to judge the metric


def load_baseline(job: Job) -> dict[str, Any]:
    pipeline = models.load_pipeline(job["pretrained"])
    shape = tuple(job.images("train").shape[1:])
    models.check_pipeline(pipeline, job["num_train_timesteps"], shape)
    models.save_pipeline(pipeline.unet, pipeline.scheduler, job.folder / "pipeline")
    noise = job.fixed_noise("search", pipeline.scheduler)
    loss = noise.loss(pipeline.unet.eval().to(job.device), job.device)
    return {"history": [{"step": 0, "learning_rate": 0.0, "held_out_loss": loss}]}


def train_baseline(job: Job) -> dict[str, Any]:
    images = job.images("train")
    size = images.shape[-1]
    unet = models.new_unet(
        images.shape[1],
        size,
        job["model_channels"],
        job["layers_per_block"],
        job["seed"],
        job["init_roundings"],
        job["attention"],
    )
    scheduler = models.new_scheduler(job["num_train_timesteps"])
    every_timestep = range(job["num_train_timesteps"])
    spec = _spec(job, job["pretrain_steps"], every_timestep, job["pretrain_lr"], ema_warmup=True)
    snapshots = {job["pretrain_steps"] // d: f"snapshot-{d}" for d in SNAPSHOTS}
    run, history = _train(job, unet, scheduler, spec, snapshots=snapshots)
    models.save_pipeline(run.ema_unet(), scheduler, job.folder / "pipeline")
    return {"history": history}


def finetune(job: Job) -> dict[str, Any]:
    pipeline = job.pipeline
    teacher = pipeline.unet if job["consistency_weight"] > 0 else None
    unet = plain_or_projected(
        models.load_unet(job.inputs["baseline"].path / "pipeline" / "unet"),
        job["channel_projection"],
    )
    ranges = training_ranges(job["range_cut"], job["n_ranges"], pipeline.scheduler)
    spec = _spec(job, job["steps"], ranges[job["range_index"]], job["finetune_lr"])
    run, history = _train(job, unet, pipeline.scheduler, spec, teacher)
    trained = run.ema_unet()
    trained.save_pretrained(job.folder / "unet")
    results = {"history": history, "projection_share": projection_share(trained)}
    if run.uncertainty is not None:
        results["task_weights"] = [
            run.uncertainty.weights()[own.start].item()
            for own in split_timesteps(spec.n_tasks, pipeline.scheduler.config.num_train_timesteps)
        ]
    return results


def _spec(
    job: Job, steps: int, own_range: range, learning_rate: float, ema_warmup: bool = False
) -> TrainingSpec:
    weighting = ("loss_weighting", "min_snr_gamma", "p2_gamma", "n_tasks")
    extra = ("probability", "consistency_weight", *weighting)
    return TrainingSpec(
        steps=steps,
        purpose=(job["seed"], job.parameters.get("purpose", job.label)),
        own_range=own_range,
        learning_rate=learning_rate,
        final_learning_rate=job["finetune_lr"],
        precision=job["precision"],
        ema_warmup=ema_warmup,
        **{name: job[name] for name in ADAM},
        **{name: job[name] for name in extra if name in job.parameters},
    )


def _train(
    job: Job,
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    spec: TrainingSpec,
    teacher: UNet2DModel | None = None,
    snapshots: Mapping[int, str] | None = None,
) -> tuple[Training, list[dict[str, float]]]:
    """A run trained to its end, with the held-out loss of the EMA weights along the way."""
    snapshots = snapshots or {}
    checkpoint, kept = job.folder / CHECKPOINT, job.folder / HISTORY
    run = Training(
        unet,
        scheduler,
        job.images("train"),
        spec,
        teacher,
        job.device.type,
        checkpoint,
        job.checkpoint_every,
    )
    noise = job.fixed_noise("search", scheduler)
    every = max(1, spec.steps // HELD_OUT_POINTS)
    history = json.loads(kept.read_text()) if kept.is_file() else []
    history = [point for point in history if point["step"] <= run.position]

    def look(step: int) -> None:
        """Also after a resumption: a run may be killed between a checkpoint and its look."""
        is_due = step % every == 0 or step in (spec.steps, *snapshots)
        if not is_due or step in [point["step"] for point in history]:
            return
        ema = run.ema_unet()
        if step in snapshots:
            ema.save_pretrained(job.folder / snapshots[step])
        loss = noise.loss(ema.to(run.accelerator.device), run.accelerator.device)
        rate = spec.learning_rate_at(max(0, step - 1))
        history.append({"step": step, "learning_rate": rate, "held_out_loss": loss})
        write_text(kept, json.dumps(history))

    look(run.position)
    with bar(spec.steps, job.label, "step", done=run.position) as progress:
        for step in run:
            progress.update(1)
            look(step.step)
    return run, history
