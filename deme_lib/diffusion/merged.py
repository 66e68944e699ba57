"""Merging models (paper Eq. 8): in memory for many weights, or from folders for large models.

A merged model has the wider of the base's and the experts' types.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.init import dirac_

from deme_lib.diffusion.models import ModelError, save_pipeline
from deme_lib.method.merging import (
    check_same_architecture,
    check_same_integers,
    check_untied,
    merge,
    task_vector,
    wide,
    widest,
)
from deme_lib.method.projection import is_projection, plain_or_projected, unet_class

WEIGHTS = "diffusion_pytorch_model.safetensors"
PIECE = 2**18  # numbers of a tensor that are added up at a time, so that they stay in the cache


class Merger:
    """Merges one family of copies with any weights, computing task vectors once.

    Args:
        base: the pretrained UNet; where the experts have projections it gets identity ones.
        experts: finetuned copies of it.

    Raises:
        KeyError, ValueError: an expert is of another architecture, or weights are tied.
    """

    def __init__(self, base: UNet2DModel, experts: Sequence[UNet2DModel]):
        projected = any(is_projection(name) for name in _some(experts)[0].state_dict())
        check_untied(base)
        self.base = plain_or_projected(base, projected)
        self.start = self.base.state_dict()
        self.vectors = [task_vector(self.start, expert.state_dict()) for expert in experts]
        self.dtype = widest(*(w for model in (base, *experts) for w in model.parameters()))

    def merged(self, weights: Sequence[float], into: UNet2DModel | None = None) -> UNet2DModel:
        """theta + sum_i w_i tau_i: a new model, or one that this gave before, overwritten."""
        unet = into
        if unet is None:
            unet = nn.Module.to(copy.deepcopy(self.base), self.dtype).eval()  # diffusers' own warns
        merge(self.start, self.vectors, weights, out=unet.state_dict())
        return unet


def merge_experts(
    base: UNet2DModel, experts: Sequence[UNet2DModel], weights: Sequence[float]
) -> UNet2DModel:
    """Eq. 8 on models: see ``Merger``, which is quicker for many weights."""
    return Merger(base, experts).merged(weights)


def merge_folders(
    base: Path, experts: Sequence[Path], weights: Sequence[float], target: Path
) -> None:
    """Eq. 8 from folders to a pipeline, as (1 - sum_i w_i) theta + sum_i w_i theta_i.

    Files are mapped: memory holds the merged model, and of the others the part at hand.

    Args:
        base: folder of the pretrained pipeline.
        experts: folders that experts were saved to, ``expert.save_pretrained(folder)``.
        target: folder of the merged pipeline.

    Raises:
        ModelError: a folder has no safetensors, or only those of a variant.
        KeyError, ValueError: an expert is of another architecture, or weights do not fit.
    """
    config = UNet2DModel.load_config(_some(experts)[0])
    with torch.device("meta"):
        unet = unet_class(config).from_config(config)
    start, *tuned = map(_load, (base / "unet", *experts))
    start = {
        n: dirac_(torch.empty_like(t)) for n, t in tuned[0].items() if is_projection(n)
    } | start
    for state in tuned:
        check_same_architecture(start, state)
        check_same_integers(start, state)
    merged = {}
    for name, theta in start.items():
        states = [start, *tuned]
        merged[name] = torch.empty_like(theta, dtype=widest(*(s[name] for s in states)))
        n = max(1, theta.numel() // PIECE)  # views of about PIECE numbers each
        pieces = (torch.atleast_1d(s[name]).chunk(n) for s in (merged, *states))
        for out, kept, *parts in zip(*pieces, strict=True):
            if theta.is_floating_point():
                kept = kept.to(wide(out)) * (1 - sum(weights))
            merge({"": kept}, [{"": part} for part in parts], weights, out={"": out})
    unet.load_state_dict(merged, assign=True)
    save_pipeline(unet, DDPMScheduler.from_pretrained(base, subfolder="scheduler"), target)


def _load(folder: Path) -> dict[str, torch.Tensor]:
    """The mapped weights of a model's folder, in one file or in shards."""
    index = folder / f"{WEIGHTS}.index.json"
    shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else [WEIGHTS]
    if missing := [name for name in sorted(set(shards)) if not (folder / name).is_file()]:
        found = sorted(path.name for path in folder.glob("*"))
        raise ModelError(
            f"{folder} lacks {missing[0]}, it has {found}: load the model with diffusers (variant= "
            "where the files name one) and save it there with save_pretrained"
        )
    return {n: t for name in set(shards) for n, t in load_file(folder / name).items()}


def _some(experts: Sequence) -> Sequence:
    if not experts:
        raise ValueError("there is nothing to merge: give at least one expert")
    return experts
