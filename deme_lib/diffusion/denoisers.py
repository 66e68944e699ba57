"""Any diffusers denoiser in one view: how data become noisy, what is asked for, how it is called.

UNets (also class- and text-conditional), DiT and SD3 are called alike, by ``predict``. What is
called otherwise brings its own, such as SDXL, whose pooled embeddings are a dictionary, or Flux,
which takes t / 1000 and, for all images of a batch, places of the tokens (on its device)::

    def predict(model, x, t, conditioning):
        ids = {"img_ids": img_ids, "txt_ids": txt_ids}
        return model(x, timestep=t / 1000, return_dict=False, **ids, **conditioning)[0]
"""

from collections.abc import Callable, Mapping

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.peft_utils import set_adapter_layers
from torch import nn

from deme_lib.diffusion import lora
from deme_lib.diffusion.models import ModelError
from deme_lib.errors import Explained
from deme_lib.method.ensembles import adapter_layers

Conditioning = Mapping[str, torch.Tensor]
Predict = Callable[[nn.Module, torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
Schedule = DDPMScheduler | FlowMatchEulerDiscreteScheduler


class ArgumentError(Explained, ValueError):
    """What was handed over cannot be trained with: said before anything is trained."""


def predict(
    model: nn.Module, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """How diffusers' denoisers are called, with t [B] in [0, T) and rows [B, ...] of conditions."""
    return model(x, timestep=t, return_dict=False, **conditioning)[0]


class Denoiser(nn.Module):
    """A model called with tensors alone, in its own type; what it predicts is float32.

    ``names`` are those of the conditions that it is called with, in this order.
    """

    def __init__(self, model: nn.Module, predict: Predict = predict, names: tuple[str, ...] = ()):
        super().__init__()
        self.model, self.predict, self.names = model, predict, names
        self.dtype = getattr(model, "dtype", torch.float32)

    def forward(self, x: torch.Tensor, t: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        """The prediction for x [B, C, ...], of its shape: of a learned variance, which is not
        trained here, the first C of 2 C channels."""
        given = [v.to(self.dtype) if v.is_floating_point() else v for v in (x, *conditions)]
        rows = dict(zip(self.names, given[1:], strict=True))
        found = self.predict(self.model, given[0], t, rows)
        if found.shape == (len(x), 2 * x.shape[1], *x.shape[2:]):
            found = found[:, : x.shape[1]]
        if found.shape != x.shape:
            raise ModelError(
                f"the model gives {tuple(found.shape)} for data of {tuple(x.shape)}: give data of "
                "the shape that it predicts, or a predict= that returns it"
            )
        return found.float()


class WithoutAdapters(Denoiser):
    """What a model predicts without its adapters: Eq. 4's frozen teacher, and no second copy."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        set_adapter_layers(self.model, enabled=False)
        try:
            return super().forward(x, t, *conditions)
        finally:
            set_adapter_layers(self.model, enabled=True)


def check_adapter(model: nn.Module) -> str:
    """The name of the one adapter that a model trains, of LoRA's A and B alone."""
    layers = [x for x in adapter_layers(model) if not (x.disable_adapters or x.merged)]
    active = sorted({name for layer in layers for name in layer.active_adapters})
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    beside = [name for name in trained if ".lora_" not in name]
    adapters = sorted({name.split(".")[-2] for name in trained if name not in beside})
    if len(active) != 1 or adapters != active or beside:
        raise ArgumentError(
            f"one adapter is to be active and trained, alone: active are {active}, trained "
            f"{adapters}, beside them {beside[:2]}: see set_adapter and requires_grad_"
        )
    lora.adapter_state(model, active[0])
    return active[0]


def check_data(
    images: torch.Tensor, conditioning: Conditioning, null: Conditioning, drop: float
) -> None:
    """ArgumentError where data and conditions are not what is trained on, or do not fit."""
    for name, rows in {"images": images, **conditioning}.items():
        shape = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
        if isinstance(shape, str) or not shape or not 0 < len(rows) == len(images):
            raise ArgumentError(f"{name}: {shape}, give a torch.Tensor of a row for each image")
        if rows.is_floating_point() and not rows.isfinite().all():
            raise ArgumentError(f"{name} hold NaN or infinity: leave these rows out")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ArgumentError(f"images are {images.dtype}: give uint8 images, or float latents")
    wanted = {name: tuple(rows.shape[1:]) for name, rows in conditioning.items()}
    given = {name: tuple(row.shape) for name, row in null.items()}
    if not given.items() <= wanted.items() or (drop and not given):
        raise ArgumentError(
            f"null rows {given}, drop={drop}: give rows that stand in for dropped ones of {wanted}"
        )


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 in [-1, 1]; float latents, already scaled, as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def is_flow(schedule: Schedule) -> bool:
    """Whether t is continuous, and the model predicts the flow from data to noise."""
    return not isinstance(schedule, DDPMScheduler)


def add_noise(
    schedule: Schedule, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Eq. 1 at t [B]; of flow matching (1 - s) clean + s noise, s = t / T, without its shift."""
    if not is_flow(schedule):
        return schedule.add_noise(clean, noise, t)
    s = (t / schedule.config.num_train_timesteps).view(-1, *(1,) * (clean.ndim - 1))
    return (1 - s) * clean + s * noise


def target(
    schedule: Schedule, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """What the model is to predict: the noise, v (Salimans & Ho 2022), the data, or the flow."""
    if is_flow(schedule):
        return noise - clean
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(clean, noise, t)
    return clean if schedule.config.prediction_type == "sample" else noise
