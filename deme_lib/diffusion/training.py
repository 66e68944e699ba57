"""Decoupled finetuning (paper Sec. 3.2): ``decouple``, one ``finetune`` run, its ``draw``.

A run is a generator of steps, resumable to the bit: data, timesteps and noise of a step are drawn
from (purpose, step), and a checkpoint is one safetensors file, replaced atomically, that holds
weights, EMA, AdamW's moments, the scaler, the position and the history of losses.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from diffusers import DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel
from diffusers.training_utils import EMAModel
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from deme_lib.diffusion import models
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.randomness import generator, seed_of
from deme_lib.errors import Explained
from deme_lib.method.merging import check_untied
from deme_lib.method.objectives import UncertaintyWeighting, deme_loss, snr_weights, squared_error
from deme_lib.method.projection import plain_or_projected
from deme_lib.method.timesteps import draw_timesteps, split_timesteps

UNCERTAINTY = "uncertainty"
LOG_VARIANCE_RATE = 1e-2  # ours: at the model's own rate the weights would hardly leave 1

LEAST_SCALE = 1e-3  # fp16 skips a step whose gradients overflow, halves its scale and goes on

Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class TrainingError(Explained, RuntimeError):
    """Training went wrong in a way that more steps will not mend."""


class ArgumentError(Explained, ValueError):
    """What was handed over cannot be trained with: said before anything is trained."""


@pydantic.dataclasses.dataclass(
    frozen=True, config={"arbitrary_types_allowed": True, "allow_inf_nan": False}
)
class TrainingSpec:
    """Everything a run depends on, besides the model, the images and the teacher.

    Attributes:
        purpose: names the stream of random draws, such as (seed, "expert", 2).
        own_range: timesteps to train on (Eq. 3); all of [0, T) for controls.
        probability: p of Eq. 6.
        consistency_weight: weight of Eq. 4; used where a teacher is given.
        loss_weighting: of the denoising loss: "none", a name that ``objectives.snr_weights`` knows,
            or "uncertainty", which learns a weight for each of ``n_tasks`` ranges.
        ema_warmup: let diffusers' EMA start short, for training from scratch. Without, runs of
            any length average over the same horizon, 1 / (1 - ema_decay) steps.
        final_learning_rate: reached by a cosine after 80 % of the steps, then held. Equal to
            ``learning_rate`` for a constant rate.
        precision: of autocast, "no", "bf16" or "fp16"; weights and EMA are float32.

    Raises:
        ValueError: a value is of another type, or out of its range.
    """

    steps: Count
    purpose: tuple[int | str, ...]
    own_range: range
    learning_rate: NotNegative
    final_learning_rate: NotNegative
    batch_size: Count
    probability: Annotated[float, Field(ge=0, le=1)] = 0.0
    consistency_weight: NotNegative = 1.0
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    weight_decay: NotNegative = 1e-2
    clip_norm: Positive = 1.0
    ema_decay: Decay = 0.999
    ema_warmup: bool = False
    precision: Literal["no", "bf16", "fp16"] = "no"
    loss_weighting: str = "none"
    min_snr_gamma: Positive = 5.0
    p2_gamma: NotNegative = 1.0
    n_tasks: Count = 1

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        progress = min(1.0, step / max(1, 0.8 * self.steps))
        share = (1 + math.cos(math.pi * progress)) / 2
        return self.final_learning_rate + share * (self.learning_rate - self.final_learning_rate)


@dataclass(frozen=True)
class Step:
    """What one optimiser step reports; ``step`` counts from 1."""

    step: int
    loss: float


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to the float32 in [-1, 1] that denoisers see."""
    return images.float() / 127.5 - 1


def noise_schedule(scheduler: SchedulerMixin) -> DDPMScheduler:
    """DDPM's scheduler with a sampler's betas: some samplers' own ``add_noise`` is not Eq. 1."""
    if not hasattr(scheduler, "alphas_cumprod"):
        kind = type(scheduler).__name__
        raise models.ModelError(f"{kind}'s noise is not DDPM's (Eq. 1): {models.WANTED}")
    ddpm = isinstance(scheduler, DDPMScheduler)
    return scheduler if ddpm else DDPMScheduler.from_config(scheduler.config)


def draw(
    images: torch.Tensor, scheduler: DDPMScheduler, spec: TrainingSpec, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a step, counted from 0, is trained on: a function of ``spec.purpose`` and ``step``.

    Args:
        images: uint8 [n, C, H, W]; a batch is drawn with replacement.

    Returns:
        clean images x_0, noise eps and noisy images x_t, float32 [B, C, H, W], and their timesteps
        t, int64 [B], drawn by Eq. 6; all on the CPU.
    """
    g = generator(*spec.purpose, step)
    chosen = torch.randint(len(images), (spec.batch_size,), generator=g)
    t_max = scheduler.config.num_train_timesteps
    timesteps = draw_timesteps(spec.batch_size, spec.own_range, t_max, spec.probability, g)
    clean = to_model_range(images[chosen])
    noise = torch.randn(clean.shape, generator=g)
    return clean, noise, scheduler.add_noise(clean, noise, timesteps), timesteps


class Training:
    """A run over uint8 images [n, C, H, W]; iterate over it to train.

    Args:
        unet: trained in place, as float32; afterwards ask for ``ema_unet()``.
        teacher: frozen pretrained model of the consistency loss (Eq. 4), or None.
        checkpoint: file to resume from if it is there, and to write to.

    Attributes:
        position: steps taken.
        history: the caller's rows of JSON, such as losses on the way, as of the checkpoint. What
            belongs to the step of ``position`` may be missing after a resumption: look again.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        images: torch.Tensor,
        spec: TrainingSpec,
        teacher: UNet2DModel | None = None,
        device: str = "auto",
        checkpoint: Path | None = None,
        checkpoint_every: int = 1000,
    ):
        self.spec, self.images, self.scheduler = spec, images, noise_schedule(scheduler)
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        alphas = self.scheduler.alphas_cumprod
        if not spec.own_range or not 0 <= spec.own_range[0] <= spec.own_range[-1] < len(alphas):
            raise ArgumentError(f"{spec.own_range} leaves [0, {len(alphas)}): give another range")
        self.accelerator = models.accelerator(device, spec.precision)
        optimiser = torch.optim.AdamW(
            unet.float().parameters(),
            lr=spec.learning_rate,
            betas=(spec.adam_beta1, spec.adam_beta2),
            weight_decay=spec.weight_decay,
            fused=True,
        )
        self.uncertainty = None
        if spec.loss_weighting == UNCERTAINTY:
            ranges = split_timesteps(spec.n_tasks, len(alphas))
            self.uncertainty = UncertaintyWeighting(ranges).to(self.accelerator.device)
            learnt = {"params": self.uncertainty.parameters(), "weight_decay": 0.0}
            optimiser.add_param_group(learnt | {"lr": LOG_VARIANCE_RATE})
        else:
            weights = snr_weights(spec.loss_weighting, alphas, spec.min_snr_gamma, spec.p2_gamma)
            self.weights = weights.to(self.accelerator.device)
        self.unet, self.optimiser = self.accelerator.prepare(unet.train(), optimiser)
        self.parameters = list(self.unet.parameters())  # walking through the modules takes time
        least = 0.0 if spec.ema_warmup else spec.ema_decay
        self.ema = EMAModel(self.parameters, decay=spec.ema_decay, min_decay=least, foreach=True)
        self.drops = any(isinstance(m, nn.Dropout) and m.p for m in unet.modules())
        self.teacher = None
        if teacher is not None:
            self.teacher = teacher.float().eval().requires_grad_(False)
            self.teacher.to(self.accelerator.device)
        self.history: list[dict[str, Any]] = []
        self.position = 0
        if checkpoint is not None and checkpoint.is_file():
            self._restore()

    def __iter__(self) -> Iterator[Step]:
        while self.position < self.spec.steps:
            loss = self._step(self.position)
            self.position += 1
            if self.checkpoint is not None and self.position % self.checkpoint_every == 0:
                self._save()
            yield Step(self.position, loss)
        self._check_weights()

    def ema_unet(self) -> UNet2DModel:
        """A new model on the CPU holding the EMA weights, free of what accelerate wraps."""
        unet = _copy(self.unet)
        self.ema.copy_to(unet.parameters())
        return unet.eval()

    def _step(self, step: int) -> float:
        spec, device = self.spec, self.accelerator.device
        drawn = draw(self.images, self.scheduler, spec, step)[1:]
        noise, noisy, timesteps = (tensor.to(device) for tensor in drawn)
        self.optimiser.param_groups[0]["lr"] = spec.learning_rate_at(step)

        if self.drops:  # its masks too depend on the step alone
            torch.manual_seed(seed_of(*spec.purpose, "dropout", step))
        with self.accelerator.autocast():
            prediction = self.unet(noisy, timesteps, return_dict=False)[0]
            if self.teacher is not None:
                with torch.inference_mode():
                    target = self.teacher(noisy, timesteps, return_dict=False)[0]
        denoising = squared_error(prediction, noise)
        consistency = None if self.teacher is None else squared_error(prediction, target)
        weights = self.weights if self.uncertainty is None else self.uncertainty.weights()
        loss = deme_loss(denoising, consistency, spec.consistency_weight, weights[timesteps])
        if self.uncertainty is not None:
            loss = loss + self.uncertainty(denoising, timesteps)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters, spec.clip_norm)
        value, norm = torch.stack([loss.detach(), norm]).tolist()  # one wait for the device
        if not math.isfinite(value):
            raise self._error(f"the loss is {value}", step + 1)
        scaler = self.accelerator.scaler
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < LEAST_SCALE):
            raise self._error(f"the norm of the gradients is {norm}", step + 1)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.ema.step(self.parameters)
        return value

    def _error(self, what: str, step: int) -> TrainingError:
        own = self.spec.own_range
        return TrainingError(
            f"{'-'.join(map(str, self.spec.purpose))}: {what} at step {step} (timesteps "
            f"{own.start} to {own.stop - 1}). The last good checkpoint is kept. Lower the "
            "learning rate (finetune_lr, or pretrain_lr in pretraining), or set precision to 'no'"
        )

    def _check_weights(self) -> None:
        """Neither a checkpoint nor a result may hold weights that are not finite."""
        for weights in (*self.parameters, *self.ema.shadow_params):
            if not weights.isfinite().all():
                raise self._error("a weight is not finite", self.position)

    def _save(self) -> None:
        self._check_weights()
        moments, scaler = self.optimiser.state_dict()["state"], self.accelerator.scaler
        tensors = {f"unet.{k}": v for k, v in self.unet.state_dict().items()}
        tensors |= {f"ema.{i}": v for i, v in enumerate(self.ema.shadow_params)}
        tensors |= {f"adam.{i}.{k}": v for i, s in moments.items() for k, v in s.items()}
        if self.uncertainty is not None:
            tensors["uncertainty.log_variances"] = self.uncertainty.log_variances
        rest = {"position": self.position, "history": self.history}
        rest["scaler"] = scaler.state_dict() if scaler else {}
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
        contiguous = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        save_file(contiguous, temporary, {k: json.dumps(v) for k, v in rest.items()})
        os.replace(temporary, self.checkpoint)

    def _restore(self) -> None:
        def of(kind: str) -> dict[str, torch.Tensor]:
            return {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{kind}.")}

        try:
            with safe_open(self.checkpoint, "pt") as file:
                rest = {k: json.loads(v) for k, v in file.metadata().items()}
                tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
            self.position, self.history = rest["position"], rest["history"]
            self.unet.load_state_dict(of("unet"))
            if self.uncertainty is not None:
                self.uncertainty.load_state_dict(of("uncertainty"))
            device, shadows = self.accelerator.device, of("ema")
            self.ema.shadow_params = [shadows[str(i)].to(device) for i in range(len(shadows))]
            self.ema.optimization_step = self.position
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in of("adam").items():
                index, kind = name.split(".")
                moments.setdefault(int(index), {})[kind] = tensor
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
            if rest["scaler"]:
                self.accelerator.scaler.load_state_dict(rest["scaler"])
        except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"{self.checkpoint} is damaged or of another model ({reason}); delete it to start "
                "this run again"
            ) from error


def _copy(unet: UNet2DModel) -> UNet2DModel:
    """A float32 copy on the CPU, unfrozen, free of hooks and of what accelerate wraps."""
    check_untied(unet)
    twin = type(unet).from_config(unet.config)
    twin.load_state_dict(unet.state_dict())
    return twin


def finetune(
    pretrained: UNet2DModel,
    scheduler: SchedulerMixin,
    images: torch.Tensor,
    spec: TrainingSpec,
    *,
    channel_projection: bool = True,
    device: str = "auto",
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
) -> Training:
    """A run that finetunes a copy of ``pretrained`` on one range of timesteps (Eq. 3 to 6).

    Iterate over it to train, then ask for its ``ema_unet()``; ``pretrained`` stays as it was.

    Args:
        images: uint8 [n, C, H, W].
        spec: a ``consistency_weight`` above 0 makes another copy the frozen teacher of Eq. 4.
        channel_projection: give the copy the projections of Sec. 3.2.
        checkpoint: file to resume from if it is there, and to write to.
    """
    student = plain_or_projected(_copy(pretrained), channel_projection)
    teacher = _copy(pretrained) if spec.consistency_weight > 0 else None
    return Training(student, scheduler, images, spec, teacher, device, checkpoint, checkpoint_every)


def decouple(
    pipeline: DDPMPipeline,
    images: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    n_ranges: int = 4,
    ranges: Sequence[int] | None = None,
    probability: float = 0.3,
    consistency_weight: float = 1.0,
    channel_projection: bool = True,
    batch_size: int = 64,
    ema_decay: float | None = None,
    precision: str = "no",
    seed: int = 0,
    device: str = "auto",
    folder: Path | str | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> list[UNet2DModel]:
    """Finetune one copy of the pipeline's UNet per range of timesteps (Eq. 3 to 6, Sec. 3.2).

    Args:
        pipeline: its UNet predicts noise; it is left as it was. Of its scheduler the betas count.
        images: uint8 [n, C, H, W] of the UNet's channels and size.
        steps: optimiser steps of each expert.
        n_ranges: N of Eq. 3.
        ranges: train only these of the N ranges, counted from 0, in this order; None: all.
        ema_decay: of the EMA that each expert is returned with; by default it averages over the
            last fifth of the steps, 1 / (1 - ema_decay) = steps / 5.
        folder: where experts are kept, ``expert-0`` and so on, with a checkpoint of the one in
            work: the same call goes on where it was stopped, and ends the same to the bit.
        checkpoint_every: steps between checkpoints.
        progress: show a bar with the time left for each expert.

    Returns:
        An expert for each range, float32 on the CPU, with EMA weights.

    Raises:
        ModelError: the images do not fit the UNet, it does not predict noise, or the noise of
            ``pipeline.scheduler`` is not DDPM's.
        ValueError: an argument is out of its range or of another type, N does not fit T, or
            ``folder`` holds experts of other arguments.
        TrainingError: a loss became infinite or nan.
    """
    shape = tuple(getattr(images, "shape", ()))
    tensor = isinstance(images, torch.Tensor) and images.dtype == torch.uint8
    if not tensor or len(shape) != 4 or not len(images):
        raise ArgumentError(
            "images must be a torch.Tensor, uint8 [n, C, H, W], as from load_images, not a "
            f"{type(images).__name__} of {getattr(images, 'dtype', 'objects')} {shape}"
        )
    schedule = noise_schedule(pipeline.scheduler)
    timesteps = len(schedule.alphas_cumprod)
    models.check_pipeline(pipeline, timesteps, tuple(images.shape[1:]))
    spec = TrainingSpec(
        steps=steps,
        purpose=(seed, "expert"),
        own_range=range(timesteps),
        learning_rate=learning_rate,
        final_learning_rate=learning_rate,
        batch_size=batch_size,
        probability=probability,
        consistency_weight=consistency_weight,
        ema_decay=0.0 if ema_decay is None else ema_decay,
        precision=precision,
    )
    if ema_decay is None:
        spec = replace(spec, ema_decay=max(0.0, 1 - 5 / steps))
    cut = split_timesteps(n_ranges, timesteps)
    wanted = list(range(n_ranges) if ranges is None else ranges)
    if any(k not in range(n_ranges) for k in wanted) or len(set(wanted)) < len(wanted):
        raise ArgumentError(f"ranges={wanted}: give each once, counted from 0 to {n_ranges - 1}")
    if folder is not None:
        arguments = asdict(spec) | {
            "own_range": None,
            "n_ranges": n_ranges,
            "channel_projection": channel_projection,
            "pretrained model": _hash(pipeline.unet.state_dict()),
            "noise schedule": _hash({"": schedule.alphas_cumprod}),
            "images": _hash({"": images}),
        }
        _claim(folder := Path(folder), arguments)

    experts = []
    for k in wanted:
        kept = folder and folder / f"expert-{k}"
        if kept and kept.is_dir():
            experts.append(models.load_unet(kept))
            continue
        run = finetune(
            pipeline.unet,
            schedule,
            images,
            replace(spec, purpose=(seed, "expert", k), own_range=cut[k]),
            channel_projection=channel_projection,
            device=device,
            checkpoint=kept and kept.with_suffix(".safetensors"),
            checkpoint_every=checkpoint_every,
        )
        label = f"expert {k}, t {cut[k].start} to {cut[k].stop - 1}"
        with bar(steps, label, "step", run.position) if progress else nullcontext() as shown:
            for _ in run:
                if shown is not None:
                    shown.update(1)
        experts.append(run.ema_unet())
        if kept:
            experts[-1].save_pretrained(partial := kept.with_suffix(".tmp"))
            os.replace(partial, kept)
            run.checkpoint.unlink(missing_ok=True)
    return experts


def _claim(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Note down what the experts of a folder depend on; refuse a folder that holds others."""
    note, given = folder / "arguments.json", json.loads(json.dumps(arguments))
    folder.mkdir(parents=True, exist_ok=True)
    if not note.is_file() and not any(folder.glob("expert-*")):
        partial = folder / f"arguments-{os.getpid()}.tmp"
        partial.write_text(json.dumps(given, indent=1))
        os.replace(partial, note)
    held = json.loads(note.read_text()) if note.is_file() else {}
    if other := [name for name, value in given.items() if held.get(name) != value]:
        raise ArgumentError(
            f"{folder} is of another call, with other {', '.join(other)}: give what its "
            f"{note.name} says, or an empty folder"
        )


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
