"""Decoupled finetuning (paper Sec. 3.2): ``decouple``, one ``finetune`` run, its ``draw``.

A run is a generator of steps, exactly resumable: data, timesteps and noise of a step are drawn from
(purpose, step), in every process of ``accelerate launch``, which takes its part of the batch; a
checkpoint is one safetensors file, replaced atomically, that holds weights, EMA, AdamW moments and
the position, of any number of processes.
"""

import copy
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from deme_lib.diffusion import models
from deme_lib.diffusion.randomness import generator, seed_of
from deme_lib.errors import Explained
from deme_lib.method.objectives import UncertaintyWeighting, deme_loss, snr_weights, squared_error
from deme_lib.method.projection import plain_or_projected
from deme_lib.method.timesteps import draw_timesteps, split_timesteps

UNCERTAINTY = "uncertainty"
LOG_VARIANCE_RATE = 1e-2  # ours: at the model's own rate the weights would hardly leave 1

MOST_SKIPPED = 50  # fp16 skips a step whose gradients overflow, lowers its scale and goes on


class TrainingError(Explained, RuntimeError):
    """Training went wrong in a way that more steps will not mend."""


@dataclass(frozen=True)
class TrainingSpec:
    """Everything a run depends on, besides the model, the images and the teacher.

    Attributes:
        purpose: names the stream of random draws, such as ("expert", 2).
        own_range: timesteps to train on (Eq. 3); all of [0, T) for controls.
        probability: p of Eq. 6.
        consistency_weight: weight of Eq. 4; used where a teacher is given.
        loss_weighting: of the denoising loss: "none", a name that ``objectives.snr_weights`` knows,
            or "uncertainty", which learns a weight for each of ``n_tasks`` ranges.
        ema_warmup: let diffusers' EMA start short, for training from scratch. Without, runs of
            any length average over the same horizon, 1 / (1 - ema_decay) steps.
        further_ema_decays: of more averages, kept beside the main one: ``ema_unet(decay)``.
        final_learning_rate: reached by a cosine after 80 % of the steps, then held. Equal to
            ``learning_rate`` for a constant rate.
    """

    steps: int
    purpose: tuple[int | str, ...]
    own_range: range
    learning_rate: float
    final_learning_rate: float
    batch_size: int
    probability: float = 0.0
    consistency_weight: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    ema_warmup: bool = False
    further_ema_decays: tuple[float, ...] = ()
    precision: str = "no"
    loss_weighting: str = "none"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    n_tasks: int = 1

    def __post_init__(self):
        allowed = {
            "steps": self.steps >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": 0 <= self.learning_rate < math.inf,
            "probability": 0 <= self.probability <= 1,
            "consistency_weight": 0 <= self.consistency_weight < math.inf,
            "ema_decay": 0 <= self.ema_decay < 1,
            "further_ema_decays": all(0 <= decay < 1 for decay in self.further_ema_decays),
        }
        for name, good in allowed.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: give another")

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
        unet: trained in place; afterwards ask for ``ema_unet()``.
        teacher: frozen pretrained model of the consistency loss (Eq. 4), or None.
        checkpoint: file to resume from if it is there, and to write to.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        images: torch.Tensor,
        spec: TrainingSpec,
        teacher: UNet2DModel | None = None,
        device: str = "auto",
        checkpoint: Path | None = None,
        checkpoint_every: int = 1000,
    ):
        self.spec, self.scheduler, self.checkpoint = spec, scheduler, checkpoint
        self.checkpoint_every = checkpoint_every
        self.images = images
        self.accelerator = models.accelerator(device, spec.precision)
        if spec.batch_size < self.accelerator.num_processes:
            raise TrainingError(
                f"batch_size={spec.batch_size} is too small for {self.accelerator.num_processes} "
                "processes, which share each batch: start fewer, or raise batch_size"
            )
        if spec.precision == "bf16" and self.accelerator.device.type == "cpu":
            _check_bf16()
        optimiser = torch.optim.AdamW(
            unet.parameters(),
            lr=spec.learning_rate,
            betas=(spec.adam_beta1, spec.adam_beta2),
            weight_decay=spec.weight_decay,
            fused=True,
        )
        alphas, self.uncertainty = scheduler.alphas_cumprod, None
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
        self.emas = {  # by decay, the main one first
            decay: EMAModel(
                self.parameters,
                decay=decay,
                min_decay=0.0 if spec.ema_warmup else decay,
                foreach=True,
            )
            for decay in (spec.ema_decay, *spec.further_ema_decays)
        }
        self.drops = any(isinstance(m, nn.Dropout) and m.p for m in unet.modules())
        self.teacher = None
        if teacher is not None:
            self.teacher = teacher.eval().requires_grad_(False).to(self.accelerator.device)
        self.position = self._skipped = 0
        if checkpoint is not None and checkpoint.is_file():
            self._restore()
        self._check_positions()

    def __iter__(self) -> Iterator[Step]:
        while self.position < self.spec.steps:
            loss = self._step(self.position)
            self.position += 1
            if self.checkpoint is not None and self.position % self.checkpoint_every == 0:
                self._save()
            yield Step(self.position, loss)
        self._check_weights()

    def ema_unet(self, decay: float | None = None) -> UNet2DModel:
        """A new model on the CPU holding the EMA weights, free of what accelerate wraps.

        Args:
            decay: one of ``further_ema_decays``; None for the main average.
        """
        trained = self.accelerator.unwrap_model(self.unet)
        unet = type(trained).from_config(trained.config)
        unet.load_state_dict(trained.state_dict())
        self.emas[self.spec.ema_decay if decay is None else decay].copy_to(unet.parameters())
        return unet.eval()

    def _step(self, step: int) -> float:
        spec, device, n = self.spec, self.accelerator.device, self.accelerator.num_processes
        drawn = draw(self.images, self.scheduler, spec, step)[1:]  # the same in every process
        mine = (tensor.tensor_split(n)[self.accelerator.process_index] for tensor in drawn)
        noise, noisy, timesteps = (tensor.to(device) for tensor in mine)
        self.optimiser.param_groups[0]["lr"] = spec.learning_rate_at(step)

        if self.drops:  # its masks too depend on the step alone, and on the process
            rank = self.accelerator.process_index
            torch.manual_seed(seed_of(*spec.purpose, "dropout", step, rank + 1))
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
        loss = loss * (len(noise) * n / spec.batch_size)  # the processes' mean is the batch's
        self.accelerator.backward(loss)
        if self.uncertainty is not None:  # the UNet's gradients are averaged by accelerate
            scales = self.uncertainty.log_variances
            scales.grad = self.accelerator.reduce(scales.grad, "mean")
        norm = self.accelerator.clip_grad_norm_(self.parameters, spec.clip_norm)
        loss = self.accelerator.reduce(loss.detach(), "mean")
        value, norm = torch.stack([loss, norm]).tolist()  # one wait for the device
        if not math.isfinite(value):
            raise self._error(f"the loss is {value}", step + 1)
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped > (MOST_SKIPPED if self.accelerator.scaler else 0):
            raise self._error(f"the norm of the gradients is {norm}", step + 1)
        self.optimiser.step()
        self.optimiser.zero_grad()
        for ema in self.emas.values():
            ema.step(self.parameters)
        return value

    def _error(self, what: str, step: int) -> TrainingError:
        own = self.spec.own_range
        return TrainingError(
            f"{'-'.join(map(str, self.spec.purpose))}: {what} at step {step} (timesteps "
            f"{own.start} to {own.stop - 1}). The last good checkpoint is kept. Lower the "
            "learning rate (finetune_lr, or pretrain_lr in pretraining), or set precision to 'no'"
        )

    def _check_positions(self) -> None:
        """Processes that read another state of the checkpoint would average unlike models."""
        position = torch.tensor([self.position], device=self.accelerator.device)
        found = set(self.accelerator.gather(position).tolist())
        if len(found) > 1:
            raise TrainingError(
                f"processes would go on from steps {sorted(found)} of {self.checkpoint}, which the "
                "file system shows to some of them late: run again in a minute"
            )

    def _check_weights(self) -> None:
        """Neither a checkpoint nor a result may hold weights that are not finite."""
        averages = (weights for ema in self.emas.values() for weights in ema.shadow_params)
        for weights in (*self.parameters, *averages):
            if not weights.isfinite().all():
                raise self._error("a weight is not finite", self.position)

    def _save(self) -> None:
        self._check_weights()
        if not self.accelerator.is_main_process:
            return
        unet, optimiser = self.accelerator.unwrap_model(self.unet), self.optimiser.state_dict()
        tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
        for k, ema in enumerate(self.emas.values()):
            tensors |= {f"ema.{k}.{i}": v for i, v in enumerate(ema.shadow_params)}
        tensors |= {f"adam.{i}.{k}": v for i, s in optimiser["state"].items() for k, v in s.items()}
        if self.uncertainty is not None:
            tensors["uncertainty.log_variances"] = self.uncertainty.log_variances
        scaler = self.accelerator.scaler
        metadata = {
            "position": str(self.position),
            "scaler": json.dumps(scaler.state_dict() if scaler else {}),
        }
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
        contiguous = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        save_file(contiguous, temporary, metadata)
        os.replace(temporary, self.checkpoint)

    def _restore(self) -> None:
        try:
            with safe_open(self.checkpoint, "pt") as file:
                metadata = file.metadata()
                tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
            self._take_up(metadata, tensors)
        except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainingError(
                f"{self.checkpoint} is damaged or of another model ({reason}); delete it to start "
                "this run again"
            ) from error

    def _take_up(self, metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        def of(kind: str) -> dict[str, torch.Tensor]:
            return {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{kind}.")}

        self.accelerator.unwrap_model(self.unet).load_state_dict(of("unet"))
        if self.uncertainty is not None:
            self.uncertainty.load_state_dict(of("uncertainty"))
        device, self.position = self.accelerator.device, int(metadata["position"])
        for k, ema in enumerate(self.emas.values()):
            shadows = [tensors[f"ema.{k}.{i}"] for i in range(len(ema.shadow_params))]
            ema.shadow_params = [shadow.to(device) for shadow in shadows]
            ema.optimization_step = self.position
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in of("adam").items():
            index, kind = name.split(".")
            moments.setdefault(int(index), {})[kind] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        if scale := json.loads(metadata["scaler"]):
            self.accelerator.scaler.load_state_dict(scale)


def _check_bf16() -> None:
    """Refuse an x86 processor that would emulate bfloat16, several times slower than float32."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and not torch.cpu._is_avx512_bf16_supported():  # where AMX is, this is too
        raise TrainingError(
            "precision=bf16, which this processor only emulates, more slowly than float32; set "
            "precision to 'no'"
        )


def finetune(
    pretrained: UNet2DModel,
    scheduler: DDPMScheduler,
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
    student = plain_or_projected(copy.deepcopy(pretrained), channel_projection)
    teacher = copy.deepcopy(pretrained) if spec.consistency_weight > 0 else None
    return Training(student, scheduler, images, spec, teacher, device, checkpoint, checkpoint_every)


def decouple(
    pipeline: DDPMPipeline,
    images: torch.Tensor,
    *,
    n_ranges: int = 4,
    steps: int,
    learning_rate: float,
    probability: float = 0.3,
    consistency_weight: float = 1.0,
    channel_projection: bool = True,
    batch_size: int = 64,
    ema_decay: float | None = None,
    precision: str = "no",
    seed: int = 0,
    device: str = "auto",
    on_step: Callable[[int, int, float], object] = lambda expert, step, loss: None,
) -> list[UNet2DModel]:
    """Finetune one copy of the pipeline's UNet per range of timesteps (Eq. 3 to 6, Sec. 3.2).

    Args:
        pipeline: its UNet predicts noise; it is left as it was.
        images: uint8 [n, C, H, W] of the UNet's channels and size.
        steps: optimiser steps of each expert.
        ema_decay: of the EMA that each expert is returned with; by default it averages over the
            last fifth of the steps, 1 / (1 - ema_decay) = steps / 5.
        on_step: told (expert, step, loss) after every step, for a bar or a log.

    Returns:
        N experts on the CPU, with EMA weights.

    Raises:
        ModelError: the images do not fit the UNet, or it does not predict noise.
        ValueError: the images are no uint8 batch, or N does not fit T.
        TrainingError: a loss became infinite or nan.
    """
    num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"images must be uint8 [n, C, H, W], not {images.dtype} {tuple(images.shape)}"
        )
    models.check_pipeline(pipeline, num_train_timesteps, tuple(images.shape[1:]))
    if ema_decay is None:
        ema_decay = max(0.0, 1 - 5 / max(1, steps))
    experts = []
    for k, own_range in enumerate(split_timesteps(n_ranges, num_train_timesteps)):
        spec = TrainingSpec(
            steps=steps,
            purpose=(seed, "expert", k),
            own_range=own_range,
            learning_rate=learning_rate,
            final_learning_rate=learning_rate,
            batch_size=batch_size,
            probability=probability,
            consistency_weight=consistency_weight,
            ema_decay=ema_decay,
            precision=precision,
        )
        run = finetune(
            pipeline.unet,
            pipeline.scheduler,
            images,
            spec,
            channel_projection=channel_projection,
            device=device,
        )
        for step in run:
            on_step(k, step.step, step.loss)
        experts.append(run.ema_unet())
    return experts
