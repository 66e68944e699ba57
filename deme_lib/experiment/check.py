"""What would stop a run, asked before it starts. Nothing is made, nothing in the store changes.

A check looks at one thing and returns what it found, or raises what the run would raise.
"""

from __future__ import annotations

import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from deme_lib.diffusion import data, metrics, models
from deme_lib.errors import Explained
from deme_lib.experiment import recipes
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.stages.prepare import check_split
from deme_lib.experiment.store import CHECKPOINT, HISTORY, Recipe, Store, read_json
from deme_lib.experiment.sweeps import Plan

NETWORK_TIMEOUT_S = 5.0
LEAST_ROOM = 2**30  # bytes: models and checkpoints of small experiments


class CheckError(Explained, RuntimeError):
    """Something would stop a run."""


def examine(plan: Plan) -> Iterator[tuple[str, bool, str]]:
    """Of everything that a file asks for: what it is about, whether it stops a run, what it is."""
    for about, (items, check) in CHECKS.items():
        for item in items(plan):
            try:
                problem, found = False, check(item)
            except Explained as error:
                problem, found = True, str(error)
            except Exception as error:  # whatever else would go wrong
                problem, found = True, f"{type(error).__name__}: {error}"
            if found:
                yield about, problem, found


def _device(p: Parameters) -> str:
    return f"{models.accelerator(p.device).device}"


def _disk(plan: Plan) -> str:
    """Room for images (their size guessed where it is not set) and the right to write."""
    p = next(iter(plan.values()))[1]
    store = Store(p.runs_dir)
    there = next(filter(Path.exists, store.root.parents))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise CheckError(f"cannot write to {there}: set runs_dir to a folder that you may write to")
    of_arms = [q for r, q in plan.values() if r.stage == "images" and not store.holds(r)]
    images = sum(q.samples * len(q.sampling_seeds) for q in of_arms)
    images += p.train_images + p.search_images + p.test_images
    need, free = LEAST_ROOM + images * 3 * (p.image_size or 32) ** 2, shutil.disk_usage(there).free
    found = f"{free / 2**30:.1f} GiB free in {there}, about {need / 2**30:.1f} GiB needed"
    if free < need:
        raise CheckError(f"{found}: free some disk space, or set runs_dir to another disk")
    return found


def _dataset(p: Parameters) -> str:
    if real := _real_images(p):
        return f"{p.dataset}, images {tuple(real['shape'])}"
    if folder := data.local_folder(p.dataset):
        return f"{folder}, {datasets.load_dataset_builder(str(folder)).dataset_name}"
    cached = Path(datasets.config.HF_DATASETS_CACHE, p.dataset.replace("/", "___")).is_dir()
    where = f"huggingface.co/datasets/{p.dataset}"
    return _reachable(where, cached, HfApi().dataset_info, "dataset", p.dataset)


def _real_images(p: Parameters) -> dict[str, Any] | None:
    """Shape and hash of the train images: as stored, or of data that is here and quickly read."""
    store, recipe, folder = Store(p.runs_dir), recipes.data(p), data.local_folder(p.dataset)
    if store.holds(recipe):
        return store.check(recipe).results
    idx = folder is not None and data.holds_idx(folder)
    quick = idx or p.dataset in data.BUILT_IN or data.is_lost(p.dataset)
    return _split(*p.pick(*SPLIT).values()) if quick else None


@cache
def _split(*arguments) -> dict[str, Any]:
    train = data.split(*arguments)["train"].images
    return {"shape": train.shape[1:], "train_hash": data.content_hash(train)}


def _pretrained(p: Parameters) -> str:
    source, real = p.pretrained, _real_images(p)
    if not source or Store(p.runs_dir).holds(recipes.baseline(p)):
        return f"{source or 'trained here'}, of training seed {p.seed}"
    if source == recipes.SHIPPED:
        folder = data.shipped_pretrained(source, p.seed)
        if real:
            models.check_card(folder, real["train_hash"], p.seed)
        source = str(folder / "pipeline")
    if data.local_folder(source) or data.is_lost(source):
        pipeline = models.load_pipeline(source)
        shape = real["shape"] if real else models.shape_of(pipeline.unet)
        models.check_pipeline(pipeline, p.num_train_timesteps, tuple(shape))
        return f"{source} loads"
    cached = isinstance(try_to_load_from_cache(source, "model_index.json"), str)
    return _reachable(f"huggingface.co/{source}", cached, HfApi().model_info, "pretrained", source)


def _features(p: Parameters) -> str:
    """Whether classifiers fit the train images, as far as they are here, and Inception is."""
    real, names = _real_images(p), [n for n in (p.features, p.second_features) if n]
    for name in names:
        if name != metrics.INCEPTION and real:
            check_split(name, real["train_hash"])
    if metrics.INCEPTION not in names:
        return ", ".join(names)
    if p.inception_weights:
        one = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        metrics.extract(one, metrics.INCEPTION, p.inception_weights)
        return p.inception_weights
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name).is_file()
    ask = urllib.request.urlopen
    return _reachable(URL_INCEPTION_V3, cached, ask, "inception_weights", URL_INCEPTION_V3)


def _reachable(where: str, cached: bool, ask: Callable, parameter: str, about: str) -> str:
    """Whether a download is cached, or can be had: the network is asked once, with patience."""
    if cached:
        return f"{where}, in the cache"
    try:
        ask(about, timeout=NETWORK_TIMEOUT_S)
    except Exception as error:  # HTTP clients raise dozens of types
        raise CheckError(
            f"{where} is not in the cache and did not answer ({type(error).__name__}): connect to "
            f"the network, or name a local copy in {parameter}"
        ) from error
    return f"{where} can be reached; it is fetched when first needed"


def _artefact(entry: tuple[Recipe, Parameters]) -> str:
    """Only damage is told: of a stored artefact, or of what a run would resume from."""
    recipe, p = entry
    store = Store(p.runs_dir)
    if store.folder(recipe).exists():
        store.check(recipe)
    history, checkpoint = (store.partial(recipe) / name for name in (HISTORY, CHECKPOINT))
    if history.is_file():
        read_json(history)
    if checkpoint.is_file():
        try:
            safe_open(checkpoint, "pt").__enter__()
        except SafetensorError as error:
            raise CheckError(f"{checkpoint} is damaged ({error}): delete it") from error
    return ""


def _each(*names: str) -> Callable[[Plan], list[Parameters]]:
    """The plan's experiments, one for every choice of these parameters."""
    return lambda plan: list({repr(p.pick(*names)): p for _, p in plan.values()}.values())


SPLIT = ("dataset", "train_images", "search_images", "test_images", "split_seed", "image_size")
SCORING = ("features", "second_features", "inception_weights")
CHECKS: dict[str, tuple[Callable[[Plan], Any], Callable[[Any], str]]] = {
    "device": (_each("device"), _device),
    "disk": (lambda plan: [plan], _disk),
    "dataset": (_each(*SPLIT), _dataset),
    "pretrained": (_each("pretrained", "seed", "num_train_timesteps", *SPLIT), _pretrained),
    "features": (_each(*SCORING, *SPLIT), _features),
    "artefacts": (dict.values, _artefact),
}
