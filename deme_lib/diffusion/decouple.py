"""Decoupled finetuning (paper Sec. 3.2): an expert for every range of timesteps."""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from deme_lib.diffusion import denoisers, lora, models
from deme_lib.diffusion.denoisers import ArgumentError, Conditioning, Predict
from deme_lib.diffusion.progress import bar
from deme_lib.diffusion.training import TrainingSpec, finetune
from deme_lib.method.timesteps import split_timesteps


def decouple(
    pipeline: DiffusionPipeline,
    images: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    final_learning_rate: float = 0.0,
    n_ranges: int = 4,
    ranges: Sequence[int] | None = None,
    conditioning: Conditioning | None = None,
    null: Conditioning | None = None,
    drop: float = 0.0,
    probability: float = 0.3,
    consistency_weight: float = 1.0,
    channel_projection: bool | None = None,
    batch_size: int = 64,
    ema_decay: float | None = None,
    precision: str = "no",
    predict: Predict = denoisers.predict,
    seed: int = 0,
    device: str = "auto",
    cuda_graphs: bool = True,
    folder: Path | str | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> list[ModelMixin] | list[dict[str, torch.Tensor]]:
    """Finetune one copy of the pipeline's denoiser per range of timesteps (Eq. 3 to 6, Sec. 3.2).

    Its ``unet`` or ``transformer`` predicts noise, v, the data, or a flow, as its scheduler says.
    If it has an adapter, as after ``pipeline.unet.add_adapter(LoraConfig(...))``, an expert is an
    adapter, and the teacher of Eq. 4 the model without it: one copy in memory.

    Args:
        pipeline: left as it was. Of its scheduler the betas count, or that it is a flow's.
        images: uint8 [n, C, H, W]; or latents [n, ...], float, times the VAE's scaling factor.
        final_learning_rate: reached by a cosine; the paper's rate is constant.
        ranges: train only these of the N ranges, counted from 0, in this order; None: all.
        conditioning: what the denoiser is called with by name, [n, ...] each, such as
            ``encoder_hidden_states``.
        null: rows [...] in place of an image's conditions with probability ``drop``; conditions
            that are not named here are not dropped.
        channel_projection: None: on a ``UNet2DModel`` that has no adapter.
        ema_decay: of the EMA that an expert is; None: over a twentieth of the steps,
            1 / (1 - ema_decay) = steps / 20.
        predict, cuda_graphs: see ``denoisers`` and ``Training``.
        folder: where experts are kept, ``expert-0`` and so on, with a checkpoint of the one in
            work: the same call goes on where it was stopped, and ends the same to the bit.
            Adapters are files that ``pipeline.load_lora_weights`` takes.

    Returns:
        For each range, float32 on the CPU, a model or an adapter's state of scaling 1 (``lora``).

    Raises:
        ModelError: data and conditions do not fit the model, or its scheduler no training.
        ValueError: an argument is out of its range, N does not fit T, the adapter is not the one
            thing to train, or ``folder`` holds experts of other arguments.
        TrainingError: a loss became infinite or nan.
    """
    part = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    model, schedule = getattr(pipeline, part, None), models.noise_schedule(pipeline.scheduler)
    if not isinstance(model, ModelMixin):
        raise ArgumentError(f"the pipeline's {part} is {type(model).__name__}: give it one model")
    denoisers.check_data(images, conditioning or {}, null or {}, drop)
    spec = TrainingSpec(
        steps=steps,
        purpose=(seed, "expert"),
        own_range=range(schedule.config.num_train_timesteps),
        learning_rate=learning_rate,
        final_learning_rate=final_learning_rate,
        batch_size=batch_size,
        probability=probability,
        drop=drop,
        consistency_weight=consistency_weight,
        ema_decay=max(0.0, 1 - 20 / max(1, steps)) if ema_decay is None else ema_decay,
        precision=precision,
    )
    cut = split_timesteps(n_ranges, len(spec.own_range))
    wanted = range(n_ranges) if ranges is None else ranges
    if not wanted or not set(wanted) <= set(range(n_ranges)):
        raise ArgumentError(f"ranges={wanted}: give some of 0 to {n_ranges - 1}")
    adapted = lora.has_adapters(model)
    if not adapted and not any(p.requires_grad for p in model.parameters()):
        raise ArgumentError(
            "all is frozen: give the model an adapter, or call requires_grad_(True)"
        )
    if folder is not None:
        folder = Path(folder)
        noise = getattr(schedule, "alphas_cumprod", torch.tensor(len(spec.own_range)))
        _claim(
            folder,
            spec=asdict(spec) | {"own_range": n_ranges},
            channel_projection=channel_projection,
            model=_hash(model.state_dict()),
            settings=_settings(model),
            predict=_source(predict),
            noise_schedule=_hash({schedule.config.get("prediction_type", "flow"): noise}),
            images=_hash({"": images}),
            conditioning=_hash(conditioning or {}),
            null=_hash(null or {}),
        )

    experts = []
    for k in wanted:
        kept = folder and folder / f"expert-{k}"
        if kept and kept.is_dir():
            experts.append(lora.adapter_state(kept) if adapted else models.load_unet(kept))
            continue
        with _left_as_it_was(model) if adapted else nullcontext():
            run = finetune(
                model,
                schedule,
                images,
                replace(spec, purpose=(seed, "expert", k), own_range=cut[k]),
                channel_projection=channel_projection,
                device=device,
                checkpoint=kept and kept.with_suffix(".safetensors"),
                checkpoint_every=checkpoint_every,
                conditioning=conditioning,
                null=null,
                predict=predict,
                cuda_graphs=cuda_graphs,
            )
            label = f"expert {k}, t {cut[k].start} to {cut[k].stop - 1}"
            with bar(steps, label, "step", run.position, progress) as shown:
                for _ in run:
                    shown.update(1)
            experts.append(run.ema_unet())
        if kept:
            partial = kept.with_suffix(".tmp")
            if adapted:
                lora.save_adapter(experts[-1], partial, f"{part}.")
            else:
                experts[-1].save_pretrained(partial)
            os.replace(partial, kept)
            run.checkpoint.unlink(missing_ok=True)
    return experts


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Give back the adapter, its type and the device of a model that is trained in place."""
    held = [(p, p.data.clone()) for p in model.parameters() if p.requires_grad]
    device, modes = next(model.parameters()).device, {m: m.training for m in model.modules()}
    try:
        yield
    finally:
        model.to(device)
        for module, mode in modes.items():
            module.training = mode
        for parameter, values in held:
            parameter.data, parameter.grad = values, None


def _claim(folder: Path, **arguments: Any) -> None:
    """Note down what the experts of a folder depend on; refuse a folder that holds others."""
    note, told = folder / "arguments.json", json.dumps(arguments, indent=1)
    if note.is_file():
        if other := sorted(set(told.splitlines()) - set(note.read_text().splitlines())):
            raise ArgumentError(f"{note} is of another call, without {other}: give an empty folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = note.with_suffix(f".{os.getpid()}")  # another process may train another range
    partial.write_text(told)
    os.replace(partial, note)


def _source(predict: Predict) -> str:
    """Its name, and a hash of its source where Python knows that."""
    try:
        text = inspect.getsource(predict)
    except (OSError, TypeError):
        text = ""
    name = f"{predict.__module__}.{getattr(predict, '__qualname__', type(predict))}"
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _settings(model: ModelMixin) -> str:
    """A hash of its configuration and layers, its adapters' scalings, and of what is trained."""
    config = {name: value for name, value in model.config.items() if name[0] != "_"}
    scalings = {n: m.scaling for n, m in model.named_modules() if hasattr(m, "lora_A")}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    text = f"{model} {sorted(config.items())} {scalings} {trained}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
