"""One training run of any denoiser: Eq. 2 to 6, resumable to the bit.

A run is a generator of steps: data, timesteps and noise of a step are drawn from (purpose, step),
and a checkpoint is one safetensors file, replaced atomically, that holds what is trained, its EMA,
learnt weights of the loss, AdamW's moments, the scaler, the position and the history of losses.
"""

import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import EMAModel
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from deme_lib.diffusion import denoisers, lora, models
from deme_lib.diffusion.denoisers import Conditioning, Predict, Schedule, to_model_range
from deme_lib.diffusion.randomness import generator, seed_of
from deme_lib.errors import Explained
from deme_lib.method import objectives
from deme_lib.method.ensembles import RoutedEnsemble, adapter_layers
from deme_lib.method.merging import check_untied
from deme_lib.method.projection import plain_or_projected
from deme_lib.method.timesteps import draw_timesteps, split_timesteps

UNCERTAINTY, NASH, BALANCED, DISTILLED = "uncertainty", "nash", "balanced", "distilled"
LEARNT = {UNCERTAINTY: objectives.UncertaintyWeighting, NASH: objectives.NashWeighting}
LOG_VARIANCE_RATE = 1e-2  # ours: at the model's own rate the weights would hardly leave 1
NASH_EVERY = 25  # steps, as in ANT's code
LEAST_SCALE = 1e-3  # fp16 skips a step whose gradients overflow, halves its scale and goes on

Weighting = Literal[
    "none", "snr+1", "trun-snr", "min-snr", "p2", "uncertainty", "nash", "balanced", "distilled"
]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class TrainingError(Explained, RuntimeError):
    """Training went wrong in a way that more steps will not mend."""


@pydantic.dataclasses.dataclass(
    frozen=True, config={"arbitrary_types_allowed": True, "allow_inf_nan": False}
)
class TrainingSpec:
    """Everything a run depends on, besides the model, the data and the teacher.

    Attributes:
        purpose: names the stream of random draws, such as (seed, "expert", 2).
        own_range: timesteps to train on (Eq. 3); all of [0, T) for controls.
        probability: p of Eq. 6.
        drop: probability that the null rows stand in for a sample's conditions.
        consistency_weight: weight of Eq. 4; used where a teacher is given.
        loss_weighting: of the denoising loss: "uncertainty" and "nash" learn a weight for each of
            ``n_tasks`` ranges, "balanced" goes by the pretrained model's ``range_losses``,
            "distilled" has only the teacher learnt from, the others, which are of models of noise,
            go by ``objectives.snr_weights``.
        ema_warmup: let diffusers' EMA start short, for training from scratch. Without it averages
            over 1 / (1 - ema_decay) steps.
        final_learning_rate: reached by a cosine. Equal to ``learning_rate`` for a constant rate.
        held: share of the steps, at the end, in which it is held.
        precision: of autocast; what is trained and its EMA are float32.
    """

    steps: PositiveInt
    purpose: tuple[int | str, ...]
    own_range: range
    learning_rate: NonNegativeFloat
    final_learning_rate: NonNegativeFloat
    batch_size: PositiveInt
    held: Share = 0.0
    probability: Share = 0.0
    drop: Share = 0.0
    consistency_weight: NonNegativeFloat = 1.0
    adam_beta1: Decay = 0.9
    adam_beta2: Decay = 0.999
    weight_decay: NonNegativeFloat = 1e-2
    clip_norm: PositiveFloat = 1.0
    ema_decay: Decay = 0.999
    ema_warmup: bool = False
    precision: Literal["no", "bf16", "fp16"] = "no"
    loss_weighting: Weighting = "none"
    min_snr_gamma: PositiveFloat = 5.0
    p2_gamma: NonNegativeFloat = 1.0
    n_tasks: PositiveInt = 1
    range_losses: tuple[float, ...] = ()

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        progress = min(1.0, step / max(1, (1 - self.held) * self.steps))
        share = (1 + math.cos(math.pi * progress)) / 2
        return self.final_learning_rate + share * (self.learning_rate - self.final_learning_rate)


class Step(NamedTuple):
    """What one optimiser step reports; ``step`` counts from 1."""

    step: int
    loss: float


class Batch(NamedTuple):
    """x_0, eps, x_t, t [B], what is to be predicted, and rows of conditions; of a step."""

    clean: torch.Tensor
    noise: torch.Tensor
    noisy: torch.Tensor
    timesteps: torch.Tensor  # int64, or float32 in flow matching
    target: torch.Tensor
    conditions: tuple[torch.Tensor, ...]


@torch.no_grad()  # neither encoders nor a VAE are trained here
def draw(
    images: torch.Tensor,
    schedule: Schedule,
    spec: TrainingSpec,
    step: int,
    conditioning: Conditioning | None = None,
    null: Conditioning | None = None,
) -> Batch:
    """A step's batch on the CPU, a function of ``spec.purpose`` and of ``step``, from 0.

    Args:
        images: uint8 [n, C, H, W] or float latents [n, ...]; a batch is drawn with replacement.
        conditioning: rows [n, ...] of each condition; ``null``: rows [...] in place of dropped
            ones, of all conditions of a sample at once.
    """
    g = generator(*spec.purpose, step)
    chosen = torch.randint(len(images), (spec.batch_size,), generator=g)
    t_max, flow = schedule.config.num_train_timesteps, denoisers.is_flow(schedule)
    t = draw_timesteps(spec.batch_size, spec.own_range, t_max, spec.probability, g, flow)
    clean = to_model_range(images[chosen])
    noise = torch.randn(clean.shape, generator=g)
    rows = {name: of_all[chosen] for name, of_all in (conditioning or {}).items()}
    if spec.drop:
        dropped = torch.rand(spec.batch_size, generator=g) < spec.drop
        for name, row in (null or {}).items():
            rows[name][dropped] = row.to(rows[name].dtype)
    noisy = denoisers.add_noise(schedule, clean, noise, t)
    asked = denoisers.target(schedule, clean, noise, t)
    return Batch(clean, noise, noisy, t, asked, tuple(rows.values()))


class Training:
    """A run over images or latents; iterate over it to train.

    Args:
        model: what of it has ``requires_grad`` is trained in place, as float32; afterwards ask
            for ``ema_unet()``.
        images, conditioning, null: see ``draw``; ``decouple`` checks them, once for all runs.
        teacher: of the consistency loss (Eq. 4), the pretrained model or another denoiser, which
            is frozen, or None; ``model`` itself stands for what it is without its adapters.
        checkpoint: file to resume from if it is there, and to write to.
        predict: calls a model, see ``denoisers``.
        cuda_graphs: on CUDA capture student and teacher, where neither adapters, dropout, gradient
            checkpointing, autocast, Nash nor routing forbid it. False for what cannot be captured,
            such as a ``predict`` that copies from the CPU.

    Attributes:
        position: steps taken.
        history: the caller's rows of JSON, such as losses on the way, as of the checkpoint; of the
            step of ``position`` they may be missing after a resumption.
    """

    def __init__(
        self,
        model: ModelMixin,
        scheduler: SchedulerMixin,
        images: torch.Tensor,
        spec: TrainingSpec,
        teacher: nn.Module | None = None,
        device: str = "auto",
        checkpoint: Path | None = None,
        checkpoint_every: int = 1000,
        *,
        conditioning: Conditioning | None = None,
        null: Conditioning | None = None,
        predict: Predict = denoisers.predict,
        cuda_graphs: bool = True,
    ):
        self.model, self.spec = model, spec
        self.scheduler = models.noise_schedule(scheduler)
        self.checkpoint, self.checkpoint_every = checkpoint, checkpoint_every
        if checkpoint_every < 1:
            raise denoisers.ArgumentError(f"checkpoint_every={checkpoint_every}: give 1 or more")
        self.data = images, conditioning or {}, null or {}
        t_max = self.scheduler.config.num_train_timesteps
        self.adapter = denoisers.check_adapter(model) if lora.has_adapters(model) else None
        self.accelerate = models.OwnAccelerator(device, spec.precision)
        device = self.device = self.accelerate.accelerator.device
        if spec.precision == "fp16" and device.type == "cpu":  # accelerate would leave it out
            raise denoisers.ArgumentError("fp16 trains on a GPU alone: set precision to bf16 or no")
        self.scaler = self.accelerate.accelerator.scaler  # None but for fp16
        model.to(device)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        adam = {"betas": (spec.adam_beta1, spec.adam_beta2), "weight_decay": spec.weight_decay}
        optimiser = torch.optim.AdamW(self.parameters, spec.learning_rate, fused=True, **adam)
        self.learnt, self.weights = None, torch.ones(t_max, device=device)
        if spec.loss_weighting in LEARNT:
            ranges = split_timesteps(spec.n_tasks, t_max)
            self.learnt = LEARNT[spec.loss_weighting](ranges).to(device)
            if own := [*self.learnt.parameters()]:
                group = {"params": own, "weight_decay": 0.0, "lr": LOG_VARIANCE_RATE}
                optimiser.add_param_group(group)
            few = spec.batch_size < 8 * spec.n_tasks or len(spec.own_range) < t_max
            if spec.loss_weighting == NASH and few:  # a batch must hold every range
                raise denoisers.ArgumentError(
                    f"loss_weighting={NASH!r} trains on all timesteps, by batches of "
                    f"{8 * spec.n_tasks} or more for n_tasks={spec.n_tasks}"
                )
        elif spec.loss_weighting == DISTILLED:
            if teacher is None or spec.consistency_weight == 0:
                raise denoisers.ArgumentError(
                    f"loss_weighting={DISTILLED!r} needs a teacher and a consistency_weight above 0"
                )
            self.weights = torch.zeros(t_max, device=device)
        elif spec.loss_weighting == BALANCED:
            ranges = split_timesteps(len(spec.range_losses), t_max)
            self.weights = objectives.balanced_weights(spec.range_losses, ranges).to(device)
        elif spec.loss_weighting != "none":
            if self.scheduler.config.get("prediction_type") != "epsilon":
                raise denoisers.ArgumentError(
                    f"loss_weighting={spec.loss_weighting!r} is of models of noise"
                )
            given = self.scheduler.alphas_cumprod, spec.min_snr_gamma, spec.p2_gamma
            self.weights = objectives.snr_weights(spec.loss_weighting, *given).to(device)
        with self.accelerate as accelerator:
            self.optimiser = accelerator.prepare(optimiser)
        least = 0.0 if spec.ema_warmup else spec.ema_decay
        self.ema = EMAModel(self.parameters, decay=spec.ema_decay, min_decay=least, foreach=True)
        self.drops = any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
        for module in model.train().modules():
            if isinstance(module, LabelEmbedding):
                module.eval()  # labels are dropped by ``draw`` alone, the same for the teacher
        if self.adapter:  # the teacher is the same model, of no dropout
            model.eval()
            for layer in adapter_layers(model):
                layer.lora_dropout.train()
        how = (predict, tuple(self.data[1]))
        self.student, self.teacher = denoisers.Denoiser(model, *how), None
        if teacher is model:
            self.teacher = denoisers.WithoutAdapters(model, *how)
        elif teacher is not None:
            if {*teacher.parameters()} & {*self.parameters}:
                raise denoisers.ArgumentError("the teacher holds what is trained: give a copy")
            teacher.float().eval().requires_grad_(False).to(device)
            self.teacher = denoisers.Denoiser(teacher, *how)
        self.history: list[dict[str, Any]] = []
        self.position = 0
        if checkpoint is not None and checkpoint.is_file():
            try:
                self._restore()
            except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise TrainingError(
                    f"{checkpoint} is damaged or of another model ({reason}); delete it to start "
                    "this run again"
                ) from error
        self._call_once(cuda_graphs)

    def __iter__(self) -> Iterator[Step]:
        while self.position < self.spec.steps:
            with self.accelerate:
                loss = self._step(self.position)
            self.position += 1
            if self.checkpoint is not None and self.position % self.checkpoint_every == 0:
                self._save()
            yield Step(self.position, loss)
        self._check_weights()

    def ema_unet(self) -> ModelMixin | dict[str, torch.Tensor]:
        """With EMA weights on the CPU a new model, or the adapter's state (``lora``), scaling 1."""
        if self.adapter:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
            state = lora.adapter_state(self.model, self.adapter)
            state = {name: tensor.cpu().clone() for name, tensor in state.items()}
            self.ema.restore(self.parameters)
            return state
        twin = _copy(self.model)
        pairs = zip(twin.parameters(), self.model.parameters(), strict=True)
        self.ema.copy_to(copied for copied, own in pairs if own.requires_grad)
        return twin.eval()

    def _step(self, step: int) -> float:
        spec, accelerator = self.spec, self.accelerate.accelerator
        noisy, t, asked, *conditions = self._drawn(step)
        self.optimiser.param_groups[0]["lr"] = spec.learning_rate_at(step)
        with accelerator.autocast():
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(noisy, t, *conditions)
            with self._fork():
                if self.drops:  # its masks too depend on the step alone
                    torch.manual_seed(seed_of(*spec.purpose, "dropout", step))
                prediction = self.student(noisy, t, *conditions)
        denoising, cell = objectives.squared_error(prediction, asked), t.long()
        consistency = None if self.teacher is None else objectives.squared_error(prediction, taught)
        if spec.loss_weighting == NASH and step % NASH_EVERY == 0:
            self._bargain(denoising, cell)
        weights = self.weights if self.learnt is None else self.learnt.weights()
        loss = objectives.deme_loss(denoising, consistency, spec.consistency_weight, weights[cell])
        if spec.loss_weighting == UNCERTAINTY:
            loss = loss + self.learnt(denoising, cell)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.parameters, spec.clip_norm)
        value, norm = torch.stack([loss.detach(), norm]).tolist()  # one wait for the device
        if not math.isfinite(value):
            raise self._error(f"the loss is {value}", step + 1)
        skipped = self.scaler is not None and self.scaler.get_scale() >= LEAST_SCALE
        if not (math.isfinite(norm) or skipped):
            raise self._error(f"the norm of the gradients is {norm}", step + 1)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.ema.step(self.parameters)
        return value

    def _bargain(self, denoising: torch.Tensor, cell: torch.Tensor) -> None:
        """New weights by Nash, where the batch has samples of every range."""
        owner = self.learnt.owner[cell]
        losses = [denoising[owner == k] for k in range(self.spec.n_tasks)]
        if not all(map(len, losses)):
            return
        scale = self.scaler.get_scale() if self.scaler else 1  # of which alpha is independent
        how = {"retain_graph": True, "materialize_grads": True}
        found = [torch.autograd.grad(scale * x.mean(), self.parameters, **how) for x in losses]
        rows = (torch.stack(of).flatten(1).double() for of in zip(*found, strict=True))
        self.learnt.bargain(sum(g @ g.T for g in rows))

    def _drawn(self, step: int) -> tuple[torch.Tensor, ...]:
        """x_t, t, the target and the conditions of a step, on the device."""
        images, *conditions = self.data
        batch = draw(images, self.scheduler, self.spec, step, *conditions)
        given = (batch.noisy, batch.timesteps, batch.target, *batch.conditions)
        return tuple(tensor.to(self.device) for tensor in given)

    def _fork(self) -> AbstractContextManager[None]:
        """Dropout's masks leave the caller's random numbers as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        return torch.random.fork_rng(devices, self.drops)

    def _call_once(self, cuda_graphs: bool) -> None:
        """Tell what does not fit before the first step, and capture what may be captured."""
        x, t, _, *conditions = self._drawn(0)
        try:
            with self.accelerate as own, torch.no_grad(), own.autocast(), self._fork():
                self.student(x[:1], t[:1], *(rows[:1] for rows in conditions))
        except Exception as error:  # whatever a model raises
            raise models.ModelError(
                f"the {type(self.model).__name__} fails on {tuple(x.shape[1:])} with conditions "
                f"{[*self.data[1]]}: {type(error).__name__}: {error}. Give what it takes, by "
                "conditioning= or predict=; UNets take images that their blocks can halve evenly"
            ) from error
        again = getattr(self.model, "is_gradient_checkpointing", False)
        forbidden = self.drops or again or self.adapter or self.spec.precision != "no"
        if x.is_cuda and cuda_graphs and not forbidden:  # one launch a call, not hundreds
            how = {"sample_args": (x, t, *conditions), "allow_unused_input": True}
            if self.spec.loss_weighting != NASH:  # which goes backward several times
                self.student = torch.cuda.make_graphed_callables(self.student, **how)
            if self.teacher is not None and not isinstance(self.teacher.model, RoutedEnsemble):
                self.teacher = torch.cuda.make_graphed_callables(self.teacher, **how)

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
        moments = self.optimiser.state_dict()["state"]
        tensors = {f"model.{k}": v for k, v in self.trained.items()}
        tensors |= {f"ema.{i}": v for i, v in enumerate(self.ema.shadow_params)}
        tensors |= {f"adam.{i}.{k}": v for i, s in moments.items() for k, v in s.items()}
        if self.learnt is not None:
            tensors |= {f"learnt.{k}": v for k, v in self.learnt.state_dict().items()}
        rest = {"position": self.position, "history": self.history}
        rest["scaler"] = self.scaler.state_dict() if self.scaler else {}
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
        contiguous = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        save_file(contiguous, temporary, {k: json.dumps(v) for k, v in rest.items()})
        os.replace(temporary, self.checkpoint)

    def _restore(self) -> None:
        def of(kind: str) -> dict[str, torch.Tensor]:
            return {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{kind}.")}

        with safe_open(self.checkpoint, "pt") as file:
            rest = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        if of("model").keys() != self.trained.keys():
            raise KeyError("it holds other weights")
        self.model.load_state_dict(of("model"), strict=False)
        if self.learnt is not None:
            self.learnt.load_state_dict(of("learnt"))
        self.position, self.history = rest["position"], rest["history"]
        shadows = of("ema")
        self.ema.shadow_params = [shadows[str(i)].to(self.device) for i in range(len(shadows))]
        self.ema.optimization_step = self.position
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in of("adam").items():
            index, kind = name.split(".")
            moments.setdefault(int(index), {})[kind] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        if rest["scaler"]:
            self.scaler.load_state_dict(rest["scaler"])


def _copy(model: ModelMixin, projected: bool | None = False) -> ModelMixin:
    """A float32 copy on the CPU, free of hooks, as much of it frozen; new projections are not."""
    check_untied(model)
    twin = type(model).from_config(model.config)
    twin.load_state_dict(model.state_dict())
    twin, own = plain_or_projected(twin, projected), dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name not in own or own[name].requires_grad)
    if getattr(model, "is_gradient_checkpointing", False):
        twin.enable_gradient_checkpointing()
    return twin


def finetune(
    pretrained: ModelMixin,
    scheduler: SchedulerMixin,
    images: torch.Tensor,
    spec: TrainingSpec,
    *,
    channel_projection: bool | None = None,
    teacher: nn.Module | None = None,
    **run: Any,
) -> Training:
    """A run that finetunes ``pretrained`` on one range of timesteps (Eq. 3 to 6).

    A copy is trained, and another the frozen teacher of Eq. 4 where its weight is above 0; if
    ``pretrained`` has an adapter, that is trained in place, and the teacher goes without, unless
    another is given.

    Args:
        channel_projection: give the copy the projections of Sec. 3.2; None: where they are
            defined, on a ``UNet2DModel`` without adapters.
        teacher: a denoiser to learn from in place of ``pretrained``, such as a routed ensemble;
            it becomes float32 and frozen, on the run's device.
        run: what else ``Training`` takes.
    """
    adapted = lora.has_adapters(pretrained)
    if channel_projection and adapted:
        raise denoisers.ArgumentError(
            "adapters and projections do not mix: set channel_projection=False"
        )
    if channel_projection is None and (adapted or not isinstance(pretrained, UNet2DModel)):
        warnings.warn(f"{type(pretrained).__name__}: no channel projections here", stacklevel=2)
    student = pretrained if adapted else _copy(pretrained, channel_projection)
    if teacher is None and spec.consistency_weight > 0 and spec.loss_weighting != DISTILLED:
        teacher = pretrained if adapted else _copy(pretrained)
    return Training(student, scheduler, images, spec, teacher, **run)
