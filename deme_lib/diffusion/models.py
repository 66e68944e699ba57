"""Denoisers and pipelines, the diffusers way: build, load, save, check."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils.logging import disable_progress_bar
from safetensors import SafetensorError
from torch import nn

from deme_lib.diffusion.data import is_lost, local_folder
from deme_lib.diffusion.randomness import seed_of
from deme_lib.method.projection import unet_class

disable_progress_bar()


class ModelError(RuntimeError):
    """A pretrained model cannot be had, or is not one that DeMe applies to."""


def accelerator(device: str = "auto", precision: str = "no") -> Accelerator:
    """accelerate's view of this process.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` (CUDA where it is there).
        precision: ``no``, ``bf16`` or ``fp16`` autocast.

    Raises:
        ModelError: CUDA is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device=cuda, but torch sees no CUDA device; set device to auto or cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision=precision
    )


def new_unet(
    channels: int,
    size: int,
    block_channels: list[int],
    layers_per_block: int,
    seed: int,
    roundings: int = 0,
    attention: bool = False,
) -> UNet2DModel:
    """A small UNet2DModel, its weights a function of ``seed``.

    Args:
        attention: self-attention at the lowest resolution, on the way down, in the middle and up.
        roundings: move every initial weight up by this many units in the last place, to measure
            how far results drift when only the rounding differs.
    """
    if size % 2 ** (len(block_channels) - 1):
        raise ModelError(
            f"images of {size} pixels cannot be halved {len(block_channels) - 1} times: give "
            "fewer model_channels"
        )
    lowest = "Attn" if attention else ""
    others = len(block_channels) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=layers_per_block,
            block_out_channels=tuple(block_channels),
            down_block_types=("DownBlock2D",) * others + (f"{lowest}DownBlock2D",),
            up_block_types=(f"{lowest}UpBlock2D",) + ("UpBlock2D",) * others,
            norm_num_groups=8,
            add_attention=attention,
        )
    with torch.no_grad():
        for parameter in unet.parameters():
            for _ in range(roundings):
                parameter.copy_(torch.nextafter(parameter, torch.tensor(torch.inf)))
    return unet


def new_scheduler(num_train_timesteps: int) -> DDPMScheduler:
    """The linear-beta schedule of Ho et al. 2020, stretched to T timesteps of equal total noise.

    With T = 1000 these are diffusers' defaults, beta from 1e-4 to 0.02.
    """
    stretch = 1000 / num_train_timesteps
    return DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=min(1e-4 * stretch, 0.999),
        beta_end=min(0.02 * stretch, 0.999),
    )


def load_pipeline(source: str | Path) -> DDPMPipeline:
    """A DDPM pipeline from a folder or a hub id, stock or projected.

    Raises:
        ModelError: it cannot be reached or read, or is no pipeline of a ``UNet2DModel``.
    """
    folder = local_folder(str(source))
    try:
        if is_lost(str(source)):
            raise ModelError(
                f"there is no folder {source}: name an existing diffusers folder, or a hub id, in "
                "the parameter `pretrained`"
            )
        if folder is not None and (code := sorted(folder.rglob("*.py"))):
            raise ModelError(f"{code[0]} is code, which no model of ours needs: delete it")
        if folder is None:
            return DDPMPipeline.from_pretrained(str(source))
        unet = folder / "unet"  # the oldest pipelines keep the UNet beside model_index.json
        unet = load_unet(unet if unet.is_dir() else folder)
        return DDPMPipeline.from_pretrained(folder, unet=unet)
    except ModelError:
        raise
    except Exception as error:  # diffusers and its HTTP client raise dozens of types
        reason = f"({type(error).__name__}: {str(error)[:200]})"
        if folder:
            raise ModelError(
                f"cannot load the folder {folder} {reason}: save or copy the pipeline there again"
            ) from error
        raise ModelError(
            f"cannot load the Hugging Face model {str(source)!r} {reason}. With a network, "
            f"huggingface.co/{source} is fetched by itself; without, copy that repository to a "
            "folder and name the folder in the parameter `pretrained`"
        ) from error


def load_unet(folder: str | Path) -> UNet2DModel:
    """A ``UNet2DModel`` or ``ProjectedUNet2DModel`` from the folder it was saved to."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise ModelError(
            f"{folder} holds no diffusers UNet (config.json is missing): copy it there"
        )
    try:
        unet = unet_class(json.loads(config.read_text())).from_pretrained(folder)
    except (ValueError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: {error}; save or copy a UNet there again") from error
    unet.register_to_config(_name_or_path="")  # a path of this machine, else saved with the model
    return unet


def save_pipeline(unet: UNet2DModel, scheduler: DDPMScheduler, folder: str | Path) -> None:
    """Save as a diffusers pipeline; without projections ``DDPMPipeline`` loads it unaided."""
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)


def shape_of(denoiser: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that a UNet, or an ensemble of them, denoises."""
    size = denoiser.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return denoiser.config.in_channels, height, width


def check_pipeline(
    pipeline: DDPMPipeline, num_train_timesteps: int, image_shape: tuple[int, ...]
) -> None:
    """Refuse, before any training starts, a pipeline that the experiment cannot use.

    Args:
        image_shape: (C, H, W) of the data set.

    Raises:
        ModelError: another prediction type, T, number of channels or image size.
    """
    kind = getattr(pipeline.scheduler.config, "prediction_type", "epsilon")
    if kind != "epsilon":
        raise ModelError(
            f"the scheduler predicts {kind}; DeMe's losses are on noise: take an epsilon model"
        )
    timesteps = pipeline.scheduler.config.num_train_timesteps
    if timesteps != num_train_timesteps:
        raise ModelError(
            f"the pretrained model has {timesteps} timesteps and num_train_timesteps is "
            f"{num_train_timesteps}: set num_train_timesteps to {timesteps}"
        )
    config = pipeline.unet.config
    if config.out_channels != config.in_channels:
        raise ModelError(
            f"the UNet has {config.in_channels} channels in and {config.out_channels} out (a "
            "learned variance?): take a model with as many out as in"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise ModelError("the UNet is class-conditional: take an unconditional one")
    model_shape = shape_of(pipeline.unet)
    if model_shape != tuple(image_shape):
        raise ModelError(
            f"the model makes images {model_shape}, the data set has {image_shape}: take a model "
            "or a data set of the other's shape"
        )
