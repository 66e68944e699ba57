"""LoRA experts: paper Eq. 8 on adapters, whose task vectors are tau_i = s_i B_i A_i, s_i a scaling.

sum_i w_i tau_i is one adapter, the A_i stacked and the w_i s_i B_i side by side, of rank sum_i r_i.
peft's ``add_weighted_adapter(combination_type="linear")`` adds up A's and B's apart: not Eq. 8.
An adapter here is a state dict of scaling 1, as diffusers takes one, of ``MODULE.lora_A.weight``
[r, in, ...] and ``MODULE.lora_B.weight`` [out, r, ...]. peft is the extra ``lora``.
"""

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from deme_lib.diffusion.models import ModelError
from deme_lib.method.merging import State, check_weights, wide

Source = str | Path | nn.Module | State
DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
METADATA, CONFIG = "lora_adapter_metadata", "adapter_config.json"  # where each keeps its settings
PREFIXES = "base_model.model.", "unet.", "transformer.", "transformer_2."  # peft's, pipelines'
A, B = ".lora_A.weight", ".lora_B.weight"


def merge_adapters(experts: Sequence[Source], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Eq. 8 exactly, as one adapter, whose ranks are the sums of the experts'.

    These are what ``adapter_state`` takes, of one model, of any ranks, scalings and targets.
    """
    check_weights(weights, len(experts))
    states, merged = [adapter_state(expert) for expert in experts], {}
    for a in dict.fromkeys(name for state in states for name in state if name.endswith(A)):
        b = a.removesuffix(A) + B
        own = [(s[a], s[b], w) for s, w in zip(states, weights, strict=True) if a in s]
        if len({(down.shape[1:], len(up)) for down, up, _ in own}) > 1:
            raise ValueError(f"{a} differs in more than its rank: take experts of one model")
        merged[a] = torch.cat([down for down, _, _ in own])
        merged[b] = torch.cat([_times(up, weight) for _, up, weight in own], 1)
    return merged


def adapter_state(source: Source, name: str = "") -> dict[str, torch.Tensor]:
    """An adapter, with its scaling (alpha / r, of rsLoRA alpha / sqrt(r)) multiplied into B.

    Of a model that is the scaling in use: ``set_adapters("default", 0.25)`` is a quarter of it.

    Args:
        source: the file or folder that diffusers or peft saved it to, a model that has it, or a
            state dict, of scaling 1.
        name: which of a model's adapters, where it has several.

    Raises:
        OSError, ModelError: there is none, or more than A's and B's: DoRA, biases, modules.
    """
    tensors, settings, prefix = read_adapter(source, name)
    odd = [key for key in tensors if not key.endswith((A, B))] + [k for k in settings if "." in k]
    if odd or not tensors:
        raise ModelError(
            f"no adapter of plain LoRA, it has {odd[:5]}: save one of lora_A and lora_B of one "
            "model alone, with diffusers or peft"
        )
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    for module in [key.removesuffix(B) for key in state if key.endswith(B)]:
        rank = len(state[module + A])
        patterns = (settings.get("alpha_pattern") or {}).items()
        fits = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module))
        alpha = next(fits, settings.get("lora_alpha", rank))
        root = math.sqrt(rank) if settings.get("use_rslora") else rank
        scaling = settings.get("scaling", {}).get(prefix + module, alpha / root)
        state[module + B] = _times(state[module + B], scaling)
    return state


def read_adapter(source: Source, name: str = "") -> tuple[State, dict, str]:
    """An adapter's tensors, its settings as peft names them, and the prefix of its tensors."""
    settings = {}
    if isinstance(source, nn.Module):
        from peft import get_peft_model_state_dict

        known = getattr(source, "peft_config", {})
        if len(chosen := [n for n in known if name in ("", n)]) != 1:
            raise ModelError(f"the model's adapters are {sorted(known)}, not {name!r}: name one")
        tensors = get_peft_model_state_dict(source, adapter_name=chosen[0])
        layers = {n: m for n, m in source.named_modules() if chosen[0] in getattr(m, "lora_A", ())}
        settings["scaling"] = {name: layer.scaling[chosen[0]] for name, layer in layers.items()}
    elif isinstance(source, Mapping):
        tensors = source
    else:
        path = file_of(Path(source))
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        if (config := path.with_name(CONFIG)).is_file():
            settings = json.loads(config.read_text())
    prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), "")
    return tensors, {key.removeprefix(prefix): value for key, value in settings.items()}, prefix


def save_adapter(state: State, folder: Path, prefix: str = "") -> None:
    """Save an adapter of scaling 1.

    Args:
        prefix: "unet." or "transformer." for a pipeline's ``load_lora_weights``; "" for a model's
            ``load_lora_adapter(folder, prefix=None, use_safetensors=True)``; "base_model.model."
            for ``peft.PeftModel.from_pretrained(model, folder)``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings, file = _settings(state), folder / DIFFUSERS
    if prefix == PREFIXES[0]:
        (folder / CONFIG).write_text(json.dumps(settings, indent=2))
        file = folder / PEFT
    told = json.dumps({prefix + key: value for key, value in settings.items()})
    tensors = {prefix + key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, file, {"format": "pt", METADATA: told})


def attached(base: nn.Module, state: State) -> nn.Module:
    """A copy of ``base`` whose one adapter is this, ``merged``, in float32 or wider."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    model, name = copy.deepcopy(base), "merged"
    recurse_remove_peft_layers(model)
    vars(model).pop("peft_config", None)
    inject_adapter_in_model(LoraConfig(**_settings(state)), model, name, state_dict=state)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = parameter.data.to(wide(*state.values()))
    if odd := set_peft_model_state_dict(model, state, name).unexpected_keys:
        raise ValueError(f"the adapter is of another model, which has {odd[0]}")
    model._hf_peft_config_loaded = True  # what diffusers' models look at
    return model.eval()


def file_of(source: Path) -> Path:
    """An adapter's file, or the one in its folder."""
    places = (source, source / DIFFUSERS, source / PEFT)
    return next((place for place in places if place.is_file()), places[1])


def has_adapters(model: object) -> bool:
    return bool(getattr(model, "peft_config", None))


def _settings(state: State) -> dict:
    """What peft is to know of an adapter of scaling 1, whose modules it names in full."""
    ranks = {re.escape(key.removesuffix(A)): len(t) for key, t in state.items() if key.endswith(A)}
    r = max(ranks.values())
    others = {f"^{module}": rank for module, rank in ranks.items() if rank != r}
    patterns = {"target_modules": "|".join(ranks), "rank_pattern": others, "alpha_pattern": others}
    return {"peft_type": "LORA", "r": r, "lora_alpha": r, **patterns}


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The product, rounded once to the tensor's type."""
    return (tensor.to(wide(tensor)) * factor).to(tensor.dtype)
