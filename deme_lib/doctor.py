"""What would stop a run, or make it fail late, asked before it starts.

Each check is a function of the parameters that yields findings; none writes into the store.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import datasets
import psutil
import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, try_to_load_from_cache
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from deme_lib import classifier, data, idx, metrics, models, recipes
from deme_lib.parameters import Parameters
from deme_lib.store import Recipe, Store, StoreError

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


def examine(p: Parameters) -> Iterator[Finding]:
    """Every check of an experiment, in order; one that fails itself is a problem."""
    for about, check in CHECKS.items():
        try:
            for status, found, *remedy in check(p):
                yield Finding(status, about, found, *remedy)
        except Exception as error:  # a doctor reports whatever goes wrong
            yield Finding(PROBLEM, about, f"{type(error).__name__}: {error}")


def _python(p: Parameters):
    wanted, found = metadata.metadata("deme")["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield OK, found
    else:
        yield PROBLEM, found, f"install Python {wanted}, delete .venv and run make again"


def _packages(p: Parameters):
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


def _device(p: Parameters):
    try:
        yield OK, f"{models.accelerator(p.device).device}, torch {torch.__version__}"
    except models.ModelError as error:
        yield PROBLEM, str(error)


def _disk(p: Parameters):
    root = Store(p.runs_dir).root
    there = next(folder for folder in root.parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield PROBLEM, f"cannot write to {there}", "set runs_dir to a folder that you may write to"
        return
    free, need = shutil.disk_usage(there).free, _bytes_needed(p)
    if need is None:
        yield OK, f"{_mib(free)} free; the need is known once the data and the model are here"
    else:
        status = OK if free > 2 * need else WARNING if free > need else PROBLEM
        found = f"{_mib(free)} free in {there}, about {_mib(need)} needed"
        yield (status, found) if status == OK else (status, found, "free some space")


def _bytes_needed(p: Parameters) -> int | None:
    """A rough count of what is still to be stored: models, images and Inception's features."""
    store = Store(p.runs_dir)
    shape, model = _shape(p, store), _model_bytes(p, store)
    if shape is None or model is None:
        return None
    pixels, total = math.prod(shape), 4 * model  # the checkpoint: weights, EMA and two moments
    for recipe in recipes.everything(p).values():
        if not store.holds(recipe):
            total += _bytes_of(recipe, p, pixels, model)
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
    if store.holds(recipes.data(p)):
        return tuple(store.load(recipes.data(p)).results["shape"])
    return data.digits().images.shape[1:] if p.dataset == "digits" else None


def _model_bytes(p: Parameters, store: Store) -> int | None:
    folder = data.local_folder(p.pretrained)
    if store.holds(recipes.baseline(p)):
        folder = store.folder(recipes.baseline(p)) / "pipeline"
    if folder is not None:
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    shape = _shape(p, store)
    if p.pretrained or shape is None:
        return None
    unet = models.new_unet(shape[0], shape[-1], p.model_channels, p.layers_per_block, 0)
    return 4 * unet.num_parameters()


def _memory(p: Parameters):
    free = psutil.virtual_memory().available
    if free >> 20 >= LEAST_MEMORY_MIB:
        yield OK, f"{_mib(free)} free"
    else:
        remedy = "close other programs, or run one job at a time (CORES=1)"
        yield WARNING, f"{_mib(free)} free, a process takes about {LEAST_MEMORY_MIB} MiB", remedy


def _dataset(p: Parameters):
    if p.dataset == "digits" or Store(p.runs_dir).holds(recipes.data(p)):
        yield OK, f"{p.dataset}, here already"
    elif folder := data.local_folder(p.dataset):
        yield _local_dataset(folder)
    else:
        cached = Path(datasets.config.HF_DATASETS_CACHE, p.dataset.replace("/", "___")).is_dir()
        ask = partial(HfApi().dataset_info, p.dataset, timeout=NETWORK_TIMEOUT_S)
        yield _reachable(f"huggingface.co/datasets/{p.dataset}", cached, ask, "dataset")


def _local_dataset(folder: Path) -> tuple[str, ...]:
    if not idx.is_folder(folder):
        return OK, f"{folder}, {datasets.load_dataset_builder(str(folder)).dataset_name}"
    try:
        counts = [f"{len(idx.load(folder, part)[1])} {part}" for part in idx.FILES]
    except idx.IdxError as error:
        return PROBLEM, str(error), f"copy the four files of Fashion-MNIST to {folder} again"
    return OK, f"{folder}, Fashion-MNIST's files: {' and '.join(counts)} images"


def _pretrained(p: Parameters):
    if not p.pretrained:
        yield OK, "trained here"
    elif Store(p.runs_dir).holds(recipes.baseline(p)):
        yield OK, f"{p.pretrained}, here already"
    elif folder := data.local_folder(p.pretrained):
        models.load_pipeline(folder)
        yield OK, f"{folder} loads"
    else:
        cached = isinstance(try_to_load_from_cache(p.pretrained, "model_index.json"), str)
        ask = partial(HfApi().model_info, p.pretrained, timeout=NETWORK_TIMEOUT_S)
        yield _reachable(f"huggingface.co/{p.pretrained}", cached, ask, "pretrained")


def _features(p: Parameters):
    for name in sorted({p.features, p.second_features} - {"", metrics.INCEPTION}):
        card = classifier.card_of(name)
        same = (card["dataset"] == "digits") == (p.dataset == "digits")
        if same and (card["split_seed"], card["train_images"]) == (p.split_seed, p.train_images):
            yield OK, f"{name} fits the data"
        else:
            found = f"{name} was trained on {card['train_images']} images of {card['dataset']}"
            yield PROBLEM, found, "set features to inception and second_features to ''"
    if metrics.INCEPTION not in (p.features, p.second_features):
        return
    if p.inception_weights:
        one = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        metrics.extract(one, metrics.INCEPTION, p.inception_weights)
        yield OK, f"Inception's weights: {p.inception_weights}"
    else:
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name).is_file()
        request = urllib.request.Request(URL_INCEPTION_V3, method="HEAD")
        ask = partial(urllib.request.urlopen, request, timeout=NETWORK_TIMEOUT_S)
        yield _reachable(URL_INCEPTION_V3, cached, ask, "inception_weights")


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


def _locks(p: Parameters):
    held = [f.stem for f in sorted(Store(p.runs_dir).root.glob(".locks/*.lock")) if _is_held(f)]
    if held:
        yield WARNING, f"being made now: {', '.join(held)}", "other runs that need them wait"
    else:
        yield OK, "no other process makes anything here"


def _is_held(path: Path) -> bool:
    """A lock file without a holder is harmless: the lock is the operating system's."""
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _interrupted(p: Parameters):
    ours = {recipe.name for recipe in recipes.everything(p).values()}
    left = sorted(Store(p.runs_dir).root.glob(".partial/*"))
    if resumable := [folder.name for folder in left if folder.name in ours]:
        yield OK, f"goes on where it stopped: {', '.join(resumable)}"
    if foreign := [folder for folder in left if folder.name not in ours]:
        found = f"begun under other parameters: {', '.join(folder.name for folder in foreign)}"
        yield WARNING, found, f"delete them in {foreign[0].parent} if you will not go on"
    if not left:
        yield OK, "nothing was left half made"


def _artefacts(p: Parameters):
    store, every = Store(p.runs_dir), recipes.everything(p).values()
    stored = [recipe for recipe in every if store.holds(recipe)]
    whole = 0
    for recipe in stored:
        try:
            store.load(recipe)
            whole += 1
        except StoreError as error:
            yield PROBLEM, str(error)
    yield OK, f"{whole} of {len(every)} stored and whole"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


CHECKS = {
    "python": _python,
    "packages": _packages,
    "device": _device,
    "disk": _disk,
    "memory": _memory,
    "dataset": _dataset,
    "pretrained": _pretrained,
    "features": _features,
    "locks": _locks,
    "interrupted": _interrupted,
    "artefacts": _artefacts,
}
