"""The pretrained model and its finetuned copies."""

import json
import shutil
from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler, UNet2DModel

from deme_lib.diffusion import models, training
from deme_lib.diffusion.cuts import training_ranges
from deme_lib.diffusion.data import shipped_pretrained
from deme_lib.diffusion.heldout import FixedNoise
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.training import Training, TrainingSpec
from deme_lib.experiment.recipes import ADAM, SHIPPED
from deme_lib.experiment.stages.job import Job
from deme_lib.experiment.store import CHECKPOINT, HISTORY, WORKING, read_json, write_text
from deme_lib.method.projection import projection_share

LOOKS = {"pretraining": 16, "finetuning": 4}  # at the losses, over a run as long as an expert's
SNAPSHOTS = (4, 2)  # pretraining leaves models at 1/4 and 1/2 of its steps, to judge the metric


def load_baseline(job: Job) -> None:
    """A shipped model of this training seed with its snapshots and history, or a user's own."""
    source = job["pretrained"]
    data = job.inputs["data"].results
    if source == SHIPPED:
        folder = shipped_pretrained(source, job["seed"])
        models.check_card(folder, data["train_hash"], job["seed"])
        beside = shutil.ignore_patterns("pipeline", "card.json")
        shutil.copytree(folder, job.folder, ignore=beside, dirs_exist_ok=True)
        source = str(folder / "pipeline")
    pipeline = models.load_pipeline(source)
    models.check_pipeline(pipeline, job["num_train_timesteps"], tuple(data["shape"]))
    models.save_pipeline(pipeline.unet, pipeline.scheduler, job.folder / "pipeline")
    if not (job.folder / "history.csv").is_file():
        losses = _losses(job, _noisy(job, pipeline.scheduler), pipeline.unet.eval())
        job.table("history", [{"run": "baseline", "step": 0, "learning_rate": 0.0, **losses}])


def pretraining(job: Job) -> Training:
    """A run from scratch."""
    unet = models.new_unet(
        tuple(job.images("train").shape[1:]),
        job["model_channels"],
        job["layers_per_block"],
        job["seed"],
        attention=job["attention"],
    )
    scheduler = models.new_scheduler(job["num_train_timesteps"])
    every_timestep = range(job["num_train_timesteps"])
    spec = _spec(job, job["pretrain_steps"], every_timestep, job["pretrain_lr"], ema_warmup=True)
    return Training(unet, scheduler, job.images("train"), spec, **_execution(job))


def train_baseline(job: Job) -> None:
    """A model from scratch, with snapshots along the way."""
    run = pretraining(job)
    snapshots = {job["pretrain_steps"] // d: f"snapshot-{d}" for d in SNAPSHOTS}
    _follow(job, run, snapshots, LOOKS["pretraining"])
    models.save_pipeline(run.ema_unet(), run.scheduler, job.folder / "pipeline")


def finetuning(job: Job) -> Training:
    """A run from the pretrained model, on its range of timesteps or on all."""
    pipeline = job.pipeline
    ranges = training_ranges(job["range_cut"], job["n_ranges"], pipeline.scheduler)
    spec = _spec(job, job["steps"], ranges[job["range_index"]], job["finetune_lr"])
    return training.finetune(
        pipeline.unet,
        pipeline.scheduler,
        job.images("train"),
        spec,
        channel_projection=job["channel_projection"],
        **_execution(job),
    )


def finetune(job: Job) -> dict[str, float]:
    """A finetuned copy of the pretrained model, and copies along the way."""
    run, count = finetuning(job), job["checkpoints"]
    along = {job["steps"] * k // count: f"checkpoint-{k}" for k in range(1, count + 1)}
    _follow(job, run, along if count > 1 else {}, LOOKS["finetuning"] * count)
    trained = run.ema_unet()
    trained.save_pretrained(job.folder / "unet")
    for decay in job["further_ema_decays"]:
        run.ema_unet(decay).save_pretrained(job.folder / f"ema-{decay:g}")
    return {"projection_share": projection_share(trained)}


def _spec(
    job: Job, steps: int, own_range: range, learning_rate: float, ema_warmup: bool = False
) -> TrainingSpec:
    extra = ("probability", "consistency_weight", "loss_weighting", "min_snr_gamma", "p2_gamma")
    return TrainingSpec(
        steps=steps,
        purpose=(job["seed"], job.parameters.get("purpose", job.label)),
        own_range=own_range,
        learning_rate=learning_rate,
        final_learning_rate=job["finetune_lr"],
        precision=job["precision"],
        ema_warmup=ema_warmup,
        further_ema_decays=tuple(job.parameters.get("further_ema_decays", ())),
        **{name: job[name] for name in ADAM},
        **{name: job[name] for name in (*extra, "n_tasks") if name in job.parameters},
    )


def _noisy(job: Job, scheduler: DDPMScheduler) -> dict[str, FixedNoise]:
    """Held-out and training images, under the same kind of fixed noise."""
    columns = {"held_out_loss": "search", "train_loss": "train"}
    return {column: job.few_noisy(scheduler, role) for column, role in columns.items()}


def _losses(job: Job, noisy: Mapping[str, FixedNoise], unet: UNet2DModel) -> dict[str, float]:
    unet = unet.to(job.device)
    return {column: noise.loss(unet, job.device) for column, noise in noisy.items()}


def _execution(job: Job) -> dict[str, Any]:
    """Where a run computes and keeps its checkpoints."""
    return {
        "device": job.device.type,
        "checkpoint": job.folder / CHECKPOINT,
        "checkpoint_every": job.checkpoint_every,
    }


def _follow(job: Job, run: Training, snapshots: Mapping[int, str], looks: int) -> None:
    """Train to the end; keep losses of the EMA weights along the way, and some of the weights."""
    spec, kept = run.spec, job.folder / HISTORY
    every = max(1, spec.steps // looks)
    found = read_json(kept, list) if kept.is_file() else []
    history = [point for point in found if point["step"] <= run.position]
    noisy = _noisy(job, run.scheduler)

    def look(step: int) -> None:
        """Also after a resumption: a run may be killed between a checkpoint and its look."""
        is_due = step % every == 0 or step in (spec.steps, *snapshots)
        if not is_due or step in [point["step"] for point in history]:
            return
        ema = run.ema_unet()
        if step in snapshots:
            ema.save_pretrained(job.folder / WORKING / snapshots[step])
        rate = spec.learning_rate_at(max(0, step - 1))
        point = {"run": job.label, "step": step, "learning_rate": rate}
        history.append(point | _losses(job, noisy, ema))
        write_text(kept, json.dumps(history))

    look(run.position)
    with bar(spec.steps, job.label, "step", done=run.position) as progress:
        for step in run:
            progress.update(1)
            look(step.step)
    for name in snapshots.values():  # kept there, so that an interrupted run has them too
        shutil.copytree(job.folder / WORKING / name, job.folder / name)
    job.table("history", history)
