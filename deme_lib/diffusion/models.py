"""Denoisers and pipelines, the diffusers way: build, load, save, check."""

import json
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from torch import nn

from deme_lib.diffusion.data import local_folder
from deme_lib.diffusion.randomness import seed_of
from deme_lib.errors import Explained
from deme_lib.method.ensembles import check_no_adapters
from deme_lib.method.projection import model_class

INDEX = "model_index.json"  # of a diffusers pipeline
HALF = "diffusion_pytorch_model.fp16.safetensors"  # weights, where they are saved in 16 bits alone

disable_progress_bar()


class ModelError(Explained, RuntimeError):
    """A pretrained model cannot be had, or is not one that DeMe applies to."""


def device_of(device: str = "auto") -> torch.device:
    """``cpu``, ``cuda``, or ``auto``: CUDA where it is there. ModelError: neither, or no CUDA."""
    if device not in ("auto", "cpu", "cuda"):
        raise ModelError(f"device={device}: set device to auto, cpu or cuda")
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ModelError("device=cuda, but torch sees no CUDA device; set device to auto or cpu")
    return torch.device("cuda" if cuda and device != "cpu" else "cpu")


class OwnAccelerator:
    """accelerate's view of a device and a precision ("no", "bf16" or "fp16"), used in ``with``.

    Outside, the process-wide state of accelerate is the caller's, whose own Accelerator stays.
    """

    def __init__(self, device: str, precision: str):
        self._states, self.accelerator = ({}, {}, {}), None
        with self:
            cpu = device_of(device).type == "cpu"
            self.accelerator = Accelerator(cpu=cpu, mixed_precision=precision)

    def __enter__(self) -> Accelerator:
        self._swap()
        return self.accelerator

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        kinds = AcceleratorState, PartialState, GradientState
        theirs = tuple(kind._shared_state for kind in kinds)
        for kind, state in zip(kinds, self._states, strict=True):
            kind._shared_state = state
        self._states = theirs


def new_unet(
    shape: tuple[int, int, int],
    block_channels: list[int],
    layers_per_block: int,
    seed: int,
    attention: bool = False,
) -> UNet2DModel:
    """A small UNet2DModel for images of ``shape`` (C, H, W), its weights a function of ``seed``.

    ``attention`` is at the lowest resolution, on the way down, in the middle and up.
    """
    channels, height, width = shape
    others = len(block_channels) - 1  # every block but the last halves the image
    lowest = "Attn" if attention else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        return UNet2DModel(
            sample_size=(height, width),
            in_channels=channels,
            out_channels=channels,
            layers_per_block=layers_per_block,
            block_out_channels=tuple(block_channels),
            down_block_types=("DownBlock2D",) * others + (f"{lowest}DownBlock2D",),
            up_block_types=(f"{lowest}UpBlock2D",) + ("UpBlock2D",) * others,
            norm_num_groups=8,
            add_attention=attention,
        )


def new_scheduler(num_train_timesteps: int) -> DDPMScheduler:
    """The linear-beta schedule of Ho et al. 2020, stretched to T timesteps of equal total noise.

    With T = 1000 these are diffusers' defaults, beta from 1e-4 to 0.02.
    """
    stretch = 1000 / num_train_timesteps
    betas = {"beta_start": min(1e-4 * stretch, 0.999), "beta_end": min(0.02 * stretch, 0.999)}
    return DDPMScheduler(num_train_timesteps=num_train_timesteps, **betas)


def load_pipeline(source: str | Path) -> DiffusionPipeline:
    """A pipeline from a folder or a hub id, in float32.

    Of a UNet, stock or projected, and a scheduler alone a ``DDPMPipeline`` of ``noise_schedule``.

    Raises:
        ModelError: it cannot be reached or read, or its noise is of another kind.
    """
    source, folder = str(source), local_folder(str(source))
    try:
        index = folder / INDEX if folder else Path(hf_hub_download(source, INDEX))
        index = json.loads(index.read_text())
        parts = {name for name, entry in index.items() if isinstance(entry, list) and entry[0]}
        folder = folder or Path(DiffusionPipeline.download(source))
        if parts != {"unet", "scheduler"}:
            return DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        unet, scheduler = (  # the oldest pipelines keep all beside model_index.json
            folder / part if (folder / part).is_dir() else folder for part in ("unet", "scheduler")
        )
        config = DDPMScheduler.load_config(scheduler)
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        return DDPMPipeline(load_unet(unet), noise_schedule(scheduler))
    except ModelError:
        raise
    except Exception as error:  # diffusers and its HTTP client raise dozens of types
        taken = "" if folder else "there is no such folder, and as a hub id "
        raise ModelError(
            f"{source}: {taken}it cannot be loaded ({type(error).__name__}: {str(error)[:200]}): "
            "save or copy a whole pipeline to a folder, or with a network take a hub id, and name "
            "it in the parameter `pretrained`"
        ) from error


def noise_schedule(
    scheduler: SchedulerMixin,
) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """What noises the data to train with a sampler of whatever kind: DDPM's of its betas, since
    some samplers' own ``add_noise`` is not Eq. 1, or a flow's."""
    config, kind = scheduler.config, type(scheduler).__name__
    asked = config.get("prediction_type")
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        return scheduler if flow else FlowMatchEulerDiscreteScheduler(config.num_train_timesteps)
    known = asked in ("epsilon", "v_prediction", "sample")
    if not (known and hasattr(scheduler, "alphas_cumprod")):
        raise ModelError(
            f"{kind} (prediction_type {asked}) says nothing of training: take a scheduler of betas "
            "that predicts epsilon, v_prediction or sample, or a FlowMatch one"
        )
    ddpm = isinstance(scheduler, DDPMScheduler)
    told = {k: v for k, v in config.items() if k != "_use_default_values"}  # else DDPM's defaults
    schedule = scheduler if ddpm else DDPMScheduler.from_config(told)
    if not torch.allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.float(), atol=1e-4):
        raise ModelError(f"{kind} noises otherwise than its betas: take one of trained_betas")
    if asked == "epsilon" and schedule.alphas_cumprod[-1] == 0:
        raise ModelError(
            f"{kind} has rescale_betas_zero_snr: True: at the last timestep all is noise, whose "
            "prediction says nothing of the image; take a model of v_prediction, or set it to False"
        )
    return schedule


def load_unet(folder: str | Path) -> ModelMixin:
    """A UNet, or any other diffusers model, from the folder it was saved to, in float32.

    Weights with NaN or infinity are refused: their images are black, and score like any others.
    """
    try:
        cls = model_class(json.loads((Path(folder) / "config.json").read_text()))
        names = [file.name for file in Path(folder).iterdir()]
        variant = "fp16" if HALF in names and SAFETENSORS_WEIGHTS_NAME not in names else None
        unet, keys = cls.from_pretrained(folder, variant=variant, output_loading_info=True)
        if wrong := keys["missing_keys"] + keys["unexpected_keys"]:
            raise ValueError(f"config.json and weights do not fit, such as in {wrong[0]}")
    except (ValueError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: {error}; save or copy a model there again") from error
    for key, weight in unet.state_dict().items():
        if not weight.isfinite().all():
            raise ModelError(f"{folder}: weights {key} hold NaN or infinity: take another model")
    unet.register_to_config(_name_or_path="")  # a path of this machine, else saved with the model
    return unet


def save_pipeline(unet: UNet2DModel, scheduler: DDPMScheduler, folder: str | Path) -> None:
    """Save as a diffusers pipeline; without projections ``DDPMPipeline`` loads it unaided."""
    if not isinstance(unet, UNet2DModel):
        raise ModelError(
            f"a {type(unet).__name__} cannot be saved as one pipeline: merge its members with "
            "merge_experts first, or save each of its .members"
        )
    check_no_adapters(unet)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)


def shape_of(denoiser: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that a UNet, or an ensemble of them, denoises."""
    size = denoiser.config.sample_size
    if size is None:
        raise ModelError("the UNet's sample_size is null: write the images' size into config.json")
    height, width = (size, size) if isinstance(size, int) else size
    return denoiser.config.in_channels, height, width


def check_card(folder: Path, train_hash: str, seed: int) -> None:
    """Refuse a shipped model of train images of another ``data.content_hash``, or another seed."""
    card = json.loads((folder / "card.json").read_text())
    if (card["train_hash"], card["seed"]) != (train_hash, seed):
        raise ModelError(
            f"{folder} was trained on {card['dataset']}, images {card['train_hash']}, with seed "
            f'{card["seed"]}, not on {train_hash} with seed {seed}: set `pretrained: ""` to '
            "train anew"
        )


def check_pipeline(
    pipeline: DiffusionPipeline, num_train_timesteps: int, image_shape: tuple[int, int, int]
) -> None:
    """Refuse, before any training starts, a pipeline that the experiment cannot use.

    ``decouple`` takes more: the experiment samples and compares unconditional images of pixels.
    """
    kind = type(pipeline).__name__
    if not (isinstance(pipeline, DDPMPipeline) and isinstance(pipeline.unet, UNet2DModel)):
        raise ModelError(
            f"the experiment cannot use this {kind}: take a pixel-space DDPM or DDIM pipeline of a "
            "UNet2DModel, such as google/ddpm-cifar10-32, or train with decouple"
        )
    unet, schedule = pipeline.unet, noise_schedule(pipeline.scheduler).config
    shape, channels = shape_of(unet), unet.config.in_channels
    timesteps, asked = schedule.num_train_timesteps, schedule.get("prediction_type", "flow")
    conditional = unet.config.class_embed_type or unet.config.num_class_embeds
    needed = [  # what, found, needed, what to do
        ("prediction_type", asked, "epsilon", "take a model that predicts noise"),
        ("timesteps", timesteps, num_train_timesteps, f"set num_train_timesteps to {timesteps}"),
        ("out_channels", unet.config.out_channels, channels, "take one of no learned variance"),
        ("classes", conditional, None, "take an unconditional one"),
        ("image shape", shape, image_shape, "take another model, or data of this shape"),
    ]
    for what, found, right, remedy in needed:
        if found != right:
            raise ModelError(f"the model's {what}: {found}, where {right} is needed: {remedy}")
