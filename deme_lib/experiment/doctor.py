"""What would stop a run, or make it fail late, asked before it starts.

Each check is a function of a file's plan, of a preset or of a sweep, that yields findings.
None changes the store; a lock file is only tried for a moment, to see whether it is held.
"""

from __future__ import annotations

import fcntl
import math
import os
import platform
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors.numpy import load_file
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from deme_lib.diffusion import classifier, data, idx, metrics, models
from deme_lib.experiment import recipes
from deme_lib.experiment.parameters import Parameters
from deme_lib.experiment.store import Recipe, Store, StoreError
from deme_lib.experiment.sweeps import Plan

OK, WARNING, PROBLEM = "ok", "warning", "problem"
NETWORK_TIMEOUT_S = 5.0
LEAST_MEMORY_MIB = 1500  # one process at work on a small model


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``remedy`` says what to do where the status is not ok."""

    status: str
    about: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return f"{self.status:8} {self.about:12} {self.found}{remedy}"


def examine(plan: Plan) -> Iterator[Finding]:
    """Every check of what a file asks for, in order; one that fails itself is a problem."""
    for about, check in CHECKS.items():
        try:
            for status, found, *remedy in check(plan):
                yield Finding(status, about, found, *remedy)
        except Exception as error:  # a doctor reports whatever goes wrong
            yield Finding(PROBLEM, about, f"{type(error).__name__}: {error}")


def _experiments(plan: Plan, *names: str) -> list[Parameters]:
    """The plan's experiments, one for every choice of these parameters."""
    found: dict[str, Parameters] = {}
    for _, p in plan.values():
        found.setdefault(repr(p.pick(*names)), p)
    return list(found.values())


def _stores(plan: Plan) -> Iterator[tuple[Store, Plan]]:
    """Every store that the plan writes to, with what belongs there."""
    for owner in _experiments(plan, "runs_dir"):
        entries = {n: e for n, e in plan.items() if e[1].runs_dir == owner.runs_dir}
        yield Store(owner.runs_dir), entries


def _python(plan: Plan):
    wanted, found = metadata.metadata("deme")["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield OK, found
    else:
        yield PROBLEM, found, f"install Python {wanted}, delete .venv and run make again"


def _packages(plan: Plan):
    wanted = [r for r in map(Requirement, metadata.requires("deme")) if r.marker is None]
    wrong = [line for line in map(_wrong, wanted) if line]
    if wrong:
        yield PROBLEM, ", ".join(wrong), "delete .venv/installed and run make again"
    else:
        yield OK, f"{len(wanted)} packages in the ranges of pyproject.toml"


def _wrong(wanted: Requirement) -> str:
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"{wanted.name} is missing"
    fits = wanted.specifier.contains(found, prereleases=True)
    return "" if fits else f"{wanted.name} is {found}, not {wanted.specifier}"


def _device(plan: Plan):
    for p in _experiments(plan, "device"):
        try:
            yield OK, f"{models.accelerator(p.device).device}, torch {torch.__version__}"
        except models.ModelError as error:
            yield PROBLEM, str(error)


def _disk(plan: Plan):
    for store, entries in _stores(plan):
        yield _room(store, entries)


def _room(store: Store, plan: Plan) -> tuple[str, ...]:
    there = next(folder for folder in store.root.parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return PROBLEM, f"cannot write to {there}", "set runs_dir to a folder that you may write to"
    free, need = shutil.disk_usage(there).free, _bytes_needed(store, plan)
    if need is None:
        return OK, f"{_mib(free)} free; the need is known once the data and the model are here"
    status = OK if free > 2 * need else WARNING if free > need else PROBLEM
    found = f"{_mib(free)} free in {there}, about {_mib(need)} needed"
    return (status, found) if status == OK else (status, found, "free some space")


def _bytes_needed(store: Store, plan: Plan) -> int | None:
    """A rough count of what is still to be stored: models, images and Inception's features."""
    experiments = {id(p): p for _, p in plan.values()}
    shapes = {key: _shape(p, store) for key, p in experiments.items()}
    sizes = {key: _model_bytes(p, shapes[key], store) for key, p in experiments.items()}
    if None in shapes.values() or None in sizes.values():
        return None
    total = 4 * max(sizes.values())  # the checkpoint: weights, EMA and two moments
    for recipe, p in plan.values():
        if not store.holds(recipe):
            total += _bytes_of(recipe, p, math.prod(shapes[id(p)]), sizes[id(p)])
    return total


def _bytes_of(recipe: Recipe, p: Parameters, pixels: int, model: int) -> int:
    if recipe.stage == "data":
        return pixels * (p.train_images + p.search_images + p.test_images)
    if recipe.stage == "images":
        return pixels * p.samples * len(p.sampling_seeds)
    if recipe.stage == "reference" and metrics.INCEPTION in (p.features, p.second_features):
        return 8 * (2048 + 1008) * (p.train_images + p.test_images)
    models_held = {"train_baseline": 3, "load_baseline": 1, "finetune": 1, "merged": 1}
    return model * models_held.get(recipe.stage, 0)


def _shape(p: Parameters, store: Store) -> tuple[int, ...] | None:
    """The images' shape: as stored, or as it will be; in colour where that cannot be told."""
    if store.holds(recipes.data(p)):
        return tuple(store.check(recipes.data(p)).results["shape"])
    folder = data.local_folder(p.dataset)
    grey = p.dataset == "digits" or (folder is not None and idx.is_folder(folder))
    if p.image_size:
        return 1 if grey else 3, p.image_size, p.image_size
    return data.digits().images.shape[1:] if p.dataset == "digits" else None


def _model_bytes(p: Parameters, shape: tuple[int, ...] | None, store: Store) -> int | None:
    folder = data.local_folder(p.pretrained)
    if store.holds(recipes.baseline(p)):
        folder = store.folder(recipes.baseline(p)) / "pipeline"
    if folder is not None:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    if p.pretrained or shape is None:
        return None
    return _new_model_bytes(shape, tuple(p.model_channels), p.layers_per_block, p.attention)


@cache
def _new_model_bytes(shape: tuple, channels: tuple, layers_per_block: int, attention: bool) -> int:
    with torch.device("meta"):  # counted, not allocated
        unet = models.new_unet(shape, list(channels), layers_per_block, 0, attention)
    return 4 * unet.num_parameters()


def _memory(plan: Plan):
    free = psutil.virtual_memory().available
    if free >> 20 >= LEAST_MEMORY_MIB:
        yield OK, f"{_mib(free)} free"
    else:
        remedy = "close other programs, or run one job at a time (CORES=1)"
        yield WARNING, f"{_mib(free)} free, a process takes about {LEAST_MEMORY_MIB} MiB", remedy


def _datasets(plan: Plan):
    for p in _experiments(plan, "dataset", "runs_dir"):
        yield _dataset(p)


def _dataset(p: Parameters) -> tuple[str, ...]:
    if p.dataset == "digits" or Store(p.runs_dir).holds(recipes.data(p)):
        return OK, f"{p.dataset}, here already"
    if folder := data.local_folder(p.dataset):
        return _local_dataset(folder)
    cached = Path(datasets.config.HF_DATASETS_CACHE, p.dataset.replace("/", "___")).is_dir()
    ask = partial(HfApi().dataset_info, p.dataset, timeout=NETWORK_TIMEOUT_S)
    return _reachable(f"huggingface.co/datasets/{p.dataset}", cached, ask, "dataset")


def _local_dataset(folder: Path) -> tuple[str, ...]:
    if not idx.is_folder(folder):
        return OK, f"{folder}, {datasets.load_dataset_builder(str(folder)).dataset_name}"
    try:
        counts = [f"{len(idx.load(folder, part)[1])} {part}" for part in idx.FILES]
    except idx.IdxError as error:
        return PROBLEM, str(error), f"copy the four files of Fashion-MNIST to {folder} again"
    return OK, f"{folder}, Fashion-MNIST's files: {' and '.join(counts)} images"


def _pretrained_models(plan: Plan):
    for p in _experiments(plan, "pretrained", "runs_dir"):
        yield _pretrained(p)


def _pretrained(p: Parameters) -> tuple[str, ...]:
    if not p.pretrained:
        return OK, "trained here"
    if Store(p.runs_dir).holds(recipes.baseline(p)):
        return OK, f"{p.pretrained}, here already"
    if folder := data.local_folder(p.pretrained):
        models.load_pipeline(folder)
        return OK, f"{folder} loads"
    cached = isinstance(try_to_load_from_cache(p.pretrained, "model_index.json"), str)
    ask = partial(HfApi().model_info, p.pretrained, timeout=NETWORK_TIMEOUT_S)
    return _reachable(f"huggingface.co/{p.pretrained}", cached, ask, "pretrained")


SPLIT = ("dataset", "train_images", "search_images", "test_images", "split_seed", "image_size")


def _features(plan: Plan):
    for p in _experiments(plan, "features", "second_features", "runs_dir", *SPLIT):
        for name in sorted({p.features, p.second_features} - {"", metrics.INCEPTION}):
            yield _fits(name, p)
    for p in _experiments(plan, "features", "second_features", "inception_weights"):
        if metrics.INCEPTION in (p.features, p.second_features):
            yield _inception(p)


def _fits(name: str, p: Parameters) -> tuple[str, ...]:
    """Whether a classifier trained on the train images, as far as they are here to compare."""
    card, images = classifier.card_of(name), _train_images(p)
    trained_on = f"{card['train_images']} images of {card['dataset']}"
    remedy = "set features to inception and second_features to ''"
    same = images is None or data.content_hash(images) == card["train_hash"]
    if not same or card["train_images"] != p.train_images:
        found = f"{name} was trained on {trained_on} (split_seed {card['split_seed']}), not on this"
        return PROBLEM, found, remedy
    if images is not None:
        return OK, f"{name} fits the data"
    found = f"{name} was trained on {trained_on}; whether on these shows once the data is here"
    likely = card["dataset"] != "digits" and card["split_seed"] == p.split_seed
    return (OK, found) if likely else (WARNING, found, f"if they are others, {remedy}")


def _train_images(p: Parameters) -> np.ndarray | None:
    """The train images [n, C, H, W], if they are stored or at hand."""
    store, recipe = Store(p.runs_dir), recipes.data(p)
    if store.holds(recipe):
        return load_file(store.check(recipe).path / "images.safetensors")["train"]
    if p.dataset != "digits":
        return None
    sizes = (p.train_images, p.search_images, p.test_images)
    return data.split(p.dataset, *sizes, p.split_seed, p.image_size)["train"].images


def _inception(p: Parameters) -> tuple[str, ...]:
    if p.inception_weights:
        one = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        metrics.extract(one, metrics.INCEPTION, p.inception_weights)
        return OK, f"Inception's weights: {p.inception_weights}"
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name).is_file()
    request = urllib.request.Request(URL_INCEPTION_V3, method="HEAD")
    ask = partial(urllib.request.urlopen, request, timeout=NETWORK_TIMEOUT_S)
    return _reachable(URL_INCEPTION_V3, cached, ask, "inception_weights")


def _reachable(where: str, cached: bool, ask, parameter: str) -> tuple[str, ...]:
    """Whether a download is cached, or can be had: the network is asked once, with patience."""
    if cached:
        return OK, f"{where}, in the cache"
    try:
        ask()
        return OK, f"{where} can be reached; it is fetched when first needed"
    except Exception as error:  # HTTP clients raise dozens of types
        found = f"{where} is not in the cache and did not answer ({type(error).__name__})"
        return PROBLEM, found, f"connect to the network, or name a local copy in {parameter}"


def _locks(plan: Plan):
    files = [f for store, _ in _stores(plan) for f in sorted(store.root.glob(".locks/*.lock"))]
    if held := [file.stem for file in files if _is_held(file)]:
        yield WARNING, f"being made now: {', '.join(held)}", "other runs that need them wait"
    else:
        yield OK, "no other process makes anything here"


def _is_held(path: Path) -> bool:
    """A lock file without a holder is harmless: the lock is the operating system's."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _interrupted(plan: Plan):
    left = [
        folder for store, _ in _stores(plan) for folder in sorted(store.root.glob(".partial/*"))
    ]
    if resumable := [folder.name for folder in left if folder.name in plan]:
        yield OK, f"goes on where it stopped: {', '.join(resumable)}"
    if foreign := [folder for folder in left if folder.name not in plan]:
        names = ", ".join(folder.name for folder in foreign)
        found = f"begun by another file or under other parameters: {names}"
        yield WARNING, found, f"delete them in {foreign[0].parent} if you will not go on"
    if not left:
        yield OK, "nothing was left half made"


def _artefacts(plan: Plan):
    whole = 0
    for recipe, p in plan.values():
        try:
            if Store(p.runs_dir).holds(recipe):
                Store(p.runs_dir).check(recipe)
                whole += 1
        except StoreError as error:
            yield PROBLEM, str(error)
    yield OK, f"{whole} of {len(plan)} stored and whole"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


CHECKS = {
    "python": _python,
    "packages": _packages,
    "device": _device,
    "disk": _disk,
    "memory": _memory,
    "dataset": _datasets,
    "pretrained": _pretrained_models,
    "features": _features,
    "locks": _locks,
    "interrupted": _interrupted,
    "artefacts": _artefacts,
}
