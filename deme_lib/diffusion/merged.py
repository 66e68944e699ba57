"""Merging models (paper Eq. 8): in memory for many weights, or from folders for large models.

A merged model has the wider of the base's and the experts' types. Adapters are ``lora``'s.
"""

import copy
import inspect
import json
import os
import shutil
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.init import dirac_

from deme_lib.diffusion import lora
from deme_lib.diffusion.models import INDEX, ModelError
from deme_lib.method import merging
from deme_lib.method.projection import ProjectedUNet2DModel, is_projection, plain_or_projected

STOCK, PROJECTED = "UNet2DModel", ProjectedUNet2DModel.__name__
PARTS = "unet", "transformer", "transformer_2"  # a pipeline's denoisers
PIECE = 2**18  # numbers of a tensor that are added up at a time, so that they stay in the cache


class Merger:
    """Merges one family of copies with any weights, computing task vectors once.

    Args:
        base: the pretrained model; where the experts have projections it gets identity ones.
        experts: finetuned copies of it.

    Raises:
        KeyError, ValueError: an expert is of another architecture, or weights are tied.
        ModelError: there are adapters, whose A and B are no weights to add up.
    """

    def __init__(self, base: nn.Module, experts: Sequence[nn.Module]):
        if any(map(lora.has_adapters, (base, *experts))):
            raise ModelError("there are adapters: merge_experts takes experts that all have one")
        merging.check_untied(base)
        projected = any(isinstance(expert, ProjectedUNet2DModel) for expert in experts)
        self.base = plain_or_projected(base, projected)
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
        KeyError, ValueError, ModelError: as ``Merger`` and ``lora.merge_adapters``, or a model is
            wrapped by peft.
    """
    if any(hasattr(model, "get_base_model") for model in (base, *experts)):
        raise ModelError("a PeftModel wraps the model: give its .get_base_model(), adapter and all")
    if all(isinstance(e, nn.Module) and not lora.has_adapters(e) for e in experts):
        return Merger(base, experts).merged(weights)
    for model in filter(lora.has_adapters, experts):
        lora.check_frozen(base, model)
    return lora.attached(base, lora.merge_adapters(experts, weights), "merged")


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
    is not read. ``out`` is there when all of it is.

    Args:
        dtype: of floating tensors; None takes the widest of the base's and the experts'.

    Raises:
        ModelError: a folder has no readable model, settings differ, ``out`` is there, or what is
            merged has NaN or infinity.
        KeyError, ValueError: tensors or weights do not fit.
    """
    base, experts, out = Path(base), [Path(expert) for expert in experts], Path(out)
    merging.check_weights(weights, len(experts))
    lora.check_new(out)
    if all(map(_is_adapter, experts)):
        state = lora.merge_adapters(experts, weights)
        state = {name: _finite(tensor.to(dtype or tensor.dtype)) for name, tensor in state.items()}
        with _made_whole(out) as folder:
            lora.save_adapter(state, folder, lora._read(experts[0])[2])
        return
    (home, settings, files), *others = map(_open, (base, *experts))
    start, *tuned = (ChainMap(*shards.values()) for shards in (files, *(o[2] for o in others)))
    projected = (settings["_class_name"], others[0][1]["_class_name"]) == (STOCK, PROJECTED)
    if projected:
        settings["_class_name"] = PROJECTED
        start |= {n: dirac_(torch.empty_like(t)) for n, t in tuned[0].items() if is_projection(n)}
    for (folder, found, _), state in zip(others, tuned, strict=True):
        if differ := sorted(k for k in settings | found if settings.get(k) != found.get(k)):
            told = ", ".join(f"{k} {settings.get(k)} and {found.get(k)}" for k in differ[:5])
            raise ModelError(f"{home} and {folder} differ: {told}; take copies of one model")
        merging.check_same(start, state)
    with _made_whole(out) as folder:
        _copy_the_rest(base, home, folder, projected)
        target, size = folder / home.relative_to(base), 0
        for file, shard in files.items():
            merged = {n: _sum([s[n] for s in (start, *tuned)], weights, dtype) for n in shard}
            save_file(merged, target / file, {"format": "pt"})
            size += sum(tensor.nbytes for tensor in merged.values())
            del merged  # before the next file's is made
        if len(files) > 1:
            places = {name: file for file, shard in files.items() for name in shard}
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (target / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))


@contextmanager
def _made_whole(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write to, which takes its place if all goes well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        yield folder
        os.replace(folder, out)


def _is_adapter(source: Path) -> bool:
    """Whether it is an adapter's file, or its folder with no model beside it."""
    model = any((source / name).exists() for name in ("config.json", *PARTS))
    return source.is_file() or (lora.is_adapter(source) and not model)


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.isfinite().all():
        raise ModelError(
            "merged weights hold NaN or infinity: take experts without, smaller merge weights, or "
            "a wider dtype"
        )
    return tensor


def _sum(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype | None
) -> torch.Tensor:
    """(1 - sum_i w_i) theta + sum_i w_i theta_i for one tensor; integers are theta's."""
    if not tensors[0].is_floating_point():
        return tensors[0].clone()
    merged = torch.empty(tensors[0].shape, dtype=dtype or merging.widest(*tensors))
    pieces = (tensor.reshape(-1).split(PIECE) for tensor in (merged, *tensors))
    for room, theta, *parts in zip(*pieces, strict=True):
        total = theta.to(merging.wide(*tensors)) * (1 - sum(weights))
        for weight, part in zip(weights, parts, strict=True):
            if weight:
                total.add_(part, alpha=weight)
        _finite(room.copy_(total))
    return merged


def _open(folder: Path) -> tuple[Path, dict, dict[str, dict[str, torch.Tensor]]]:
    """A denoiser's folder, its settings, defaults too, and its mapped weights file by file."""
    parts = [p for p in PARTS if (folder / p).is_dir()]
    home = folder.joinpath(*parts[:1])
    if len(parts) > 1 or not (home / "config.json").is_file():
        found = " and ".join(parts) or "no config.json"
        raise ModelError(f"{folder} has {found}: give the folder of one pipeline or model")
    settings = {"_class_name": ""} | json.loads((home / "config.json").read_text())
    cls = getattr(diffusers, settings["_class_name"], ProjectedUNet2DModel)
    defaults = {n: p.default for n, p in inspect.signature(cls.__init__).parameters.items()}
    settings = json.loads(json.dumps(defaults, default=str)) | settings  # older files lack some
    settings = {k: v for k, v in settings.items() if k[0] != "_" or k == "_class_name"}
    index, names = home / SAFE_WEIGHTS_INDEX_NAME, {SAFETENSORS_WEIGHTS_NAME}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    if missing := sorted(name for name in names if not (home / name).is_file()):
        raise ModelError(
            f"{home} lacks {missing[0]}, it has {sorted(p.name for p in home.glob('*'))}: load the "
            "model with diffusers (variant= where the files name one) and save it there again"
        )
    try:
        return home, settings, {name: load_file(home / name) for name in sorted(names)}
    except SafetensorError as error:
        raise ModelError(f"{home}: {error}; copy its weights there again") from error


def _copy_the_rest(base: Path, home: Path, out: Path, projected: bool) -> None:
    """Copy settings, and of a pipeline its other parts; name the class of added projections."""
    index = json.loads((base / INDEX).read_text()) if (base / INDEX).is_file() else {}

    def weights(folder: str, names: list[str]) -> list[str]:
        kept = index if Path(folder) == base else {}
        own = [n for n in names if n not in kept and (".index." in n or not n.endswith(".json"))]
        return own if Path(folder) in (base, home) else []

    shutil.copytree(base, out, ignore=weights, dirs_exist_ok=True)
    if projected:
        index["unet"] = [ProjectedUNet2DModel.__module__, PROJECTED]
        if (base / INDEX).is_file():
            (out / INDEX).write_text(json.dumps(index, indent=2))
        config = out / home.relative_to(base) / "config.json"
        settings = json.loads(config.read_text()) | {"_class_name": PROJECTED}
        config.write_text(json.dumps(settings, indent=2))
