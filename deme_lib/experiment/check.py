"""What would stop a run, asked before it starts. Nothing is made, nothing in the store changes.

A check looks at one thing and returns what it found, or raises what the run would raise. Data and
models of a hub are fetched by the first job, which says within a minute what is wrong with them.
"""

import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from deme_lib.diffusion import data, metrics, models
from deme_lib.errors import Explained
from deme_lib.experiment import processes, recipes
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.stages.prepare import check_split
from deme_lib.experiment.store import Recipe, Store
from deme_lib.experiment.sweeps import Plan

LEAST_ROOM = 2**30  # bytes: models and checkpoints of small experiments


class CheckError(Explained, RuntimeError):
    """Something would stop a run."""


def examine(plan: Plan) -> Iterator[tuple[str, bool, str]]:
    """Of everything that a file asks for: what it is about, whether it stops a run, what it is."""
    every = {repr(p.pick(*LOOKED_AT)): p for _, p in plan.values()}.values()
    asked = [(about, check, p) for about, check in CHECKS.items() for p in every]
    asked += [("disk", _disk, plan), *(("artefacts", _artefact, x) for x in plan.values())]
    told = {""}
    for about, check, item in asked:
        try:
            problem, found = False, check(item)
        except Explained as error:
            problem, found = True, str(error)
        except Exception as error:  # whatever else would go wrong
            problem, found = True, f"{type(error).__name__}: {error}"
        if found not in told:
            told.add(found)
            yield about, problem, found


def _device(p: Parameters) -> str:
    processes.check(p)
    if p.batch_size < p.processes:
        raise CheckError(f"processes={p.processes} is above batch_size={p.batch_size}: lower it")
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
    train = _train_images(p)
    return f"{p.dataset}, images {train[0]}" if train else f"{p.dataset} is left to the first job"


def _train_images(p: Parameters) -> tuple[tuple[int, ...], str] | None:
    """Shape and hash of the train images; None where they would have to be fetched."""
    here = p.dataset in data.BUILT_IN or data.is_local(p.dataset) or data.is_lost(p.dataset)
    return _split(*p.pick(*SPLIT).values()) if here else None


@cache
def _split(*arguments) -> tuple[tuple[int, ...], str]:
    train = data.split(*arguments)["train"].images
    return train.shape[1:], data.content_hash(train)


def _pretrained(p: Parameters) -> str:
    source, train = p.pretrained, _train_images(p)
    if source == recipes.SHIPPED:
        folder = data.shipped_pretrained(source, p.seed)
        if train:
            models.check_card(folder, train[1], p.seed)
        source = str(folder / "pipeline")
    if not source and train:
        models.new_unet(train[0], p.model_channels, p.layers_per_block, p.seed, p.attention)
    if not (data.is_local(source) or data.is_lost(source)):
        return f"{source or 'training it'} is left to the first job"
    pipeline = models.load_pipeline(source)
    shape = train[0] if train else models.shape_of(pipeline.unet)
    models.check_pipeline(pipeline, p.num_train_timesteps, shape)
    return f"{source} loads"


def _features(p: Parameters) -> str:
    """Whether classifiers fit the train images, as far as they are here, and Inception is."""
    train, names = _train_images(p), [n for n in (p.features, p.second_features) if n]
    for name in names:
        if name != metrics.INCEPTION and train:
            check_split(name, train[1])
    if metrics.INCEPTION in names:
        one = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        metrics.extract(one, metrics.INCEPTION, p.inception_weights)
    return ", ".join(names)


def _artefact(entry: tuple[Recipe, Parameters]) -> str:
    """Only damage is told."""
    recipe, p = entry
    store = Store(p.runs_dir)
    if store.holds(recipe):
        store.load(recipe)
    return ""


CHECKS = {
    "device": _device,
    "dataset": _dataset,
    "pretrained": _pretrained,
    "features": _features,
}
SPLIT = ("dataset", "train_images", "search_images", "test_images", "split_seed", "image_size")
LOOKED_AT = (*SPLIT, "device", "processes", "pretrained", "seed", "num_train_timesteps")
LOOKED_AT += ("features", "second_features", "inception_weights", "batch_size")
LOOKED_AT += ("model_channels", "layers_per_block", "attention")
