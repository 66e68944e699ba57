"""The pretrained model and its finetuned copies."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, UNet2DModel

from deme_lib.diffusion import models
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.training import BALANCED, Training, TrainingSpec
from deme_lib.diffusion.training import finetune as finetuned
from deme_lib.experiment.stages import fixed_noise, images_of, members_of, pipeline_of, table
from deme_lib.experiment.store import Job
from deme_lib.method.ensembles import RoutedEnsemble
from deme_lib.method.timesteps import split_timesteps

CHECKPOINT = "checkpoint.safetensors"
PRETRAINING_EMA = 0.995  # with diffusers' warm-up, so that it suits short runs too


def load_baseline(
    job: Job,
    *,
    data: Path,
    pretrained: str,
    seed: int,
    num_train_timesteps: int,
    loss_images: int,
) -> None:
    """A pretrained pipeline: a shipped one of this training seed with its history, or a user's."""
    folder = Path(pretrained)
    if (folder / "card.json").is_file():
        train_hash = json.loads((data / "data.json").read_text())["train_hash"]
        models.check_card(folder, train_hash, seed)
        (job.out / "history.csv").write_bytes((folder / "history.csv").read_bytes())
        pretrained = str(folder / "pipeline")
    pipeline = models.load_pipeline(pretrained)
    models.check_pipeline(pipeline, num_train_timesteps, tuple(images_of(data, "train").shape[1:]))
    models.save_pipeline(pipeline.unet, pipeline.scheduler, job.out / "pipeline")
    if not (job.out / "history.csv").is_file():
        losses = _losses(data, pipeline.scheduler, loss_images, job)(pipeline.unet.eval())
        table(job, "history", [{"step": 0, "learning_rate": 0.0, **losses}])


def train_baseline(
    job: Job,
    *,
    data: Path,
    seed: int,
    model_channels: list[int],
    layers_per_block: int,
    attention: bool,
    num_train_timesteps: int,
    pretrain_steps: int,
    pretrain_lr: float,
    finetune_lr: float,
    loss_images: int,
    **optimiser: Any,
) -> None:
    """A model from scratch, whose learning rate comes down to the finetuning rate."""
    images = images_of(data, "train")
    shape = tuple(images.shape[1:])
    unet = models.new_unet(shape, model_channels, layers_per_block, seed, attention=attention)
    spec = TrainingSpec(
        steps=pretrain_steps,
        purpose=(seed, "baseline"),
        own_range=range(num_train_timesteps),
        learning_rate=pretrain_lr,
        final_learning_rate=finetune_lr,
        held=0.2,
        ema_decay=PRETRAINING_EMA,
        ema_warmup=True,
        **optimiser,
    )
    how = (None, job.on.device, job.work / CHECKPOINT, job.on.checkpoint_every)
    run = Training(unet, models.new_scheduler(num_train_timesteps), images, spec, *how)
    _follow(run, job, _losses(data, run.scheduler, loss_images, job), looks=16)
    models.save_pipeline(run.ema_unet(), run.scheduler, job.out / "pipeline")


def finetune(
    job: Job,
    *,
    data: Path,
    baseline: Path,
    seed: int,
    purpose: str,
    steps: int,
    own_range: list[int],
    channel_projection: bool,
    finetune_lr: float,
    final_lr: float,
    ema_fraction: float,
    loss_images: int,
    teachers: Sequence[Path] = (),
    ranges: Sequence[list[int]] = (),
    **training: Any,
) -> None:
    """A finetuned copy of the pretrained model, on [start, stop) of ``own_range`` (Eq. 3 to 6).

    With ``teachers``, the experts of ``ranges``, it is taught by these and not by the noise.
    """
    pipeline = pipeline_of(baseline)
    if training.get("loss_weighting") == BALANCED:
        noise = fixed_noise(data, "search", pipeline.scheduler, loss_images)
        errors = noise.errors(pipeline.unet.eval().to(job.device), job.device)
        cut = split_timesteps(training["n_tasks"], pipeline.scheduler.config.num_train_timesteps)
        training["range_losses"] = tuple(noise.mean_in(errors, own) for own in cut)
    spec = TrainingSpec(
        steps=steps,
        purpose=(seed, purpose),
        own_range=range(*own_range),
        learning_rate=finetune_lr,
        final_learning_rate=final_lr,
        ema_decay=max(0.0, 1 - 1 / max(1.0, ema_fraction * steps)),
        **training,
    )
    run = finetuned(
        pipeline.unet,
        pipeline.scheduler,
        images_of(data, "train"),
        spec,
        channel_projection=channel_projection,
        teacher=RoutedEnsemble(members_of(teachers), ranges) if teachers else None,
        device=job.on.device,
        checkpoint=job.work / CHECKPOINT,
        checkpoint_every=job.on.checkpoint_every,
    )
    _follow(run, job, _losses(data, pipeline.scheduler, loss_images, job), looks=4)
    run.ema_unet().save_pretrained(job.out / "unet")


Losses = Callable[[UNet2DModel], dict[str, float]]


def _losses(data: Path, scheduler: DDPMScheduler, count: int, job: Job) -> Losses:
    """Losses on held-out and on training images, under the same kind of fixed noise."""
    columns, device = {"held_out_loss": "search", "train_loss": "train"}, job.device
    noisy = {c: fixed_noise(data, role, scheduler, count) for c, role in columns.items()}
    return lambda unet: {c: noise.loss(unet.to(device), device) for c, noise in noisy.items()}


def _follow(run: Training, job: Job, losses: Losses, looks: int) -> None:
    """Train to the end; write the losses of the EMA weights along the way."""
    steps = run.spec.steps
    every = max(1, steps // looks)

    def look(step: int) -> None:
        """Also after a resumption: a run may be killed between a checkpoint and its look."""
        known = [point["step"] for point in run.history]
        if (step % every == 0 or step == steps) and step not in known:
            rate = run.spec.learning_rate_at(max(0, step - 1))
            point = {"step": step, "learning_rate": rate}
            run.history.append(point | losses(run.ema_unet()))

    look(run.position)
    with bar(steps, job.out.parent.name, "step", done=run.position) as progress:
        for step in run:
            progress.update(1)
            look(step.step)
    table(job, "history", run.history)
