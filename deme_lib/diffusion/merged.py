"""Merging models (paper Eq. 8): in memory for many weights, or from folders for large models.

A merged model has the wider of the base's and the experts' types. Adapters are ``lora``'s.
"""

import copy
import inspect
import json
import os
import shutil
import tempfile
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.init import dirac_

from deme_lib.diffusion import lora
from deme_lib.diffusion.models import INDEX, ModelError
from deme_lib.method import merging, projection
from deme_lib.method.projection import ProjectedUNet2DModel, is_projection

STOCK, PROJECTED = "UNet2DModel", ProjectedUNet2DModel.__name__
PARTS = "unet", "transformer", "transformer_2"  # a pipeline's denoisers


class Merger:
    """Merges finetuned copies of ``base`` with any weights, computing task vectors once.

    Where the copies, which have no adapters, have projections, ``base`` gets identity ones.
    """

    def __init__(self, base: nn.Module, experts: Sequence[nn.Module]):
        merging.check_untied(base)
        projected = any(isinstance(expert, ProjectedUNet2DModel) for expert in experts)
        self.base = projection.plain_or_projected(base, projected)
        self.start = self.base.state_dict()
        self.vectors = [merging.task_vector(self.start, e.state_dict()) for e in experts]
        self.dtype = merging.widest(*(w for m in (base, *experts) for w in m.parameters()))

    def merged(self, weights: Sequence[float], into: nn.Module | None = None) -> nn.Module:
        """theta + sum_i w_i tau_i: a new model, or one that this gave before, overwritten."""
        model = into
        if model is None:
            model = nn.Module.to(copy.deepcopy(self.base), self.dtype).eval()  # diffusers' warns
        merging.merge(self.start, self.vectors, weights, out=model.state_dict())
        return model


def merge_experts(
    base: nn.Module, experts: Sequence[nn.Module | lora.Source], weights: Sequence[float]
) -> nn.Module:
    """Eq. 8 on models: see ``Merger``, which is quicker for many weights.

    Of adapters (models that have one, or what else ``lora.adapter_state`` takes) it is a copy of
    ``base`` with one adapter, ``merged``, in place of all that it has.

    Raises:
        KeyError, ValueError, ModelError: weights are tied, or architectures or numbers differ.
    """
    if all(isinstance(e, nn.Module) and not lora.has_adapters(e) for e in experts):
        return Merger(base, experts).merged(weights)
    return lora.attached(base, lora.merge_adapters(experts, weights))


def merge_folders(
    base: Path | str,
    experts: Sequence[Path | str],
    weights: Sequence[float],
    out: Path | str,
    dtype: torch.dtype | None = None,
) -> None:
    """Eq. 8 from folders to the new folder ``out``, for any diffusers model, which is not built.

    A folder is a model's, or a pipeline's: its ``unet`` or ``transformer`` is merged, other parts
    are the base's. Added up in float32 (float64 stays), as (1 - sum_i w_i) theta + sum_i w_i
    theta_i. Files are mapped; memory holds one of ``out``'s, which has the base's shards.
    Of adapters' folders or files it is one adapter, as ``lora.merge_adapters`` makes it; ``base``
    is not read.

    Args:
        dtype: of floating tensors; None takes the widest of the base's and the experts'.

    Raises:
        ModelError: a folder has no readable model, settings differ, or ``out`` is there.
        KeyError, ValueError: tensors or weights do not fit.
    """
    base, experts, out = Path(base), [Path(expert) for expert in experts], Path(out)
    merging.check_weights(weights, len(experts))
    if out.exists():
        raise ModelError(f"{out} is there already: name a new folder, nothing is overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        if all(map(_is_adapter, experts)):
            state = lora.merge_adapters(experts, weights)
            state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
            lora.save_adapter(state, partial, lora.read_adapter(experts[0])[2])
        else:
            _merge_models(base, experts, weights, partial, dtype)
        os.replace(partial, out)


def _merge_models(
    base: Path,
    experts: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    dtype: torch.dtype | None,
) -> None:
    home, *homes = map(_home, (base, *experts))
    config, *configs = map(_config, (home, *homes))
    files, *others = map(_weights, (home, *homes))
    start, *tuned = (ChainMap(*shards.values()) for shards in (files, *others))
    projected = (config["_class_name"], configs[0]["_class_name"]) == (STOCK, PROJECTED)
    if projected:  # the base's are the identity
        if len(files) > 1:  # whose index does not name them
            raise ModelError(f"{home} is in shards: save it in one file, for projections beside")
        config["_class_name"] = PROJECTED
        start |= {n: dirac_(torch.empty_like(t)) for n, t in tuned[0].items() if is_projection(n)}
    for folder, found, state in zip(homes, configs, tuned, strict=True):
        if differ := sorted(k for k in config | found if config.get(k) != found.get(k)):
            told = ", ".join(f"{k} {config.get(k)} and {found.get(k)}" for k in differ[:5])
            raise ModelError(f"{home} and {folder} differ: {told}; take copies of one model")
        merging.check_same(start, state)

    def no_settings(folder: str, names: list[str]) -> list[str]:  # beside the merged weights
        others = [n for n in names if not n.endswith(".json") and (Path(folder) / n).is_file()]
        return others if Path(folder) in (base, home) else []

    shutil.copytree(base, out, ignore=no_settings)
    target = out / home.relative_to(base)
    if projected:
        shutil.copy(homes[0] / "config.json", target)
        if (index := out / INDEX).is_file():
            parts = json.loads(index.read_text())
            parts["unet"] = [ProjectedUNet2DModel.__module__, PROJECTED]
            index.write_text(json.dumps(parts, indent=2))
    for file, shard in files.items():
        merged = {n: _sum([s[n] for s in (start, *tuned)], weights, dtype) for n in shard}
        save_file(merged, target / file, {"format": "pt"})
        del merged  # before the next file's is made


def _sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype | None
) -> torch.Tensor:
    """(1 - sum_i w_i) theta + sum_i w_i theta_i for one tensor; integers are theta's."""
    theta, *tuned = tensors
    if not theta.is_floating_point():
        return theta
    total = theta.to(merging.wide(*tensors)) * (1 - sum(weights))
    for weight, tensor in zip(weights, tuned, strict=True):
        if weight:
            total.add_(tensor, alpha=weight)
    return total.to(dtype or merging.widest(*tensors))


def _is_adapter(source: Path) -> bool:
    """Whether it is an adapter's file, or its folder with no model beside it."""
    model = any((source / name).exists() for name in ("config.json", *PARTS))
    return lora.file_of(source).is_file() and not model


def _home(folder: Path) -> Path:
    """Where the denoiser of a pipeline's or a model's folder is."""
    parts = [part for part in PARTS if (folder / part).is_dir()]
    if len(parts) > 1:
        raise ModelError(f"{folder} has {' and '.join(parts)}: give the folder of one of them")
    return folder.joinpath(*parts)


def _config(home: Path) -> dict:
    """A model's settings, with the defaults of those that older files lack."""
    config = json.loads((home / "config.json").read_text())
    parameters = inspect.signature(projection.model_class(config).__init__).parameters
    defaults = json.loads(json.dumps({n: p.default for n, p in parameters.items()}, default=str))
    return {k: v for k, v in (defaults | config).items() if k[0] != "_" or k == "_class_name"}


def _weights(home: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A model's mapped weights, file by file."""
    files = [home / SAFETENSORS_WEIGHTS_NAME]
    if not files[0].is_file():
        files = sorted(home.glob("diffusion_pytorch_model-*.safetensors"))  # shards
    if not files:
        raise ModelError(f"{home} has no {SAFETENSORS_WEIGHTS_NAME}: save the model there anew")
    try:
        return {file.name: load_file(file) for file in files}
    except SafetensorError as error:
        raise ModelError(f"{home}: {error}; copy its weights there again") from error
