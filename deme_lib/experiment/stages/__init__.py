"""How each artefact is made. A stage reads its recipe's parameters and inputs, nothing else.

``make`` is the one way in: it loads what is stored, makes what is not, and says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deme_lib.diffusion import models
from deme_lib.experiment.parameters import Parameters
from deme_lib.experiment.stages import calibrate, combine, evaluate, look, prepare, train
from deme_lib.experiment.stages.estimate import announce
from deme_lib.experiment.stages.job import Job
from deme_lib.experiment.store import Artefact, Recipe, Store, explained

STAGES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "data": prepare.make_data,
    "reference": prepare.make_reference,
    "load_baseline": train.load_baseline,
    "train_baseline": train.train_baseline,
    "finetune": train.finetune,
    "search": combine.make_search,
    "merged": combine.make_merged,
    "images": evaluate.make_images,
    "metrics": evaluate.make_metrics,
    "acceptance": calibrate.make_acceptance,
    "gradients": look.make_gradients,
    "task_vectors": look.make_task_vectors,
    "range_losses": look.make_range_losses,
    "plane": look.make_plane,
    "activations": look.make_activations,
    "landscape": look.make_landscape,
}


def make(recipe: Recipe, p: Parameters) -> Artefact:
    """Load an artefact, or make it and everything it needs, after saying what and how long.

    Raises:
        TooLongError: the estimate exceeds two hours and ``allow_long`` is false.
    """
    stored = Store(p.runs_dir).holds(recipe)
    artefact = make_all([recipe], p)[recipe.label]
    if stored:
        print(f"{recipe.name}: loaded, made {artefact.record['made']} by {_commit(artefact)}")
    return artefact


def make_all(wanted: Sequence[Recipe], p: Parameters) -> dict[str, Artefact]:
    """``make`` for several recipes under one estimate; the artefacts by label."""
    store = Store(p.runs_dir)
    missing = {r.label: r for recipe in wanted for r in store.missing(recipe)}
    if missing:
        torch.set_num_threads(p.usable_threads)
        if "data" in missing:
            _build(missing.pop("data"), store, p)
        with explained("an estimate of the time", store.root):
            announce(list(missing.values()), store, p)
    return {recipe.label: _build(recipe, store, p) for recipe in wanted}


def _build(recipe: Recipe, store: Store, p: Parameters) -> Artefact:
    if store.holds(recipe):
        return store.load(recipe)
    inputs = {role: _build(upstream, store, p) for role, upstream in recipe.inputs.items()}
    device = models.accelerator(p.device).device

    def run(folder: Path) -> dict[str, Any]:
        torch.set_num_threads(p.usable_threads)
        job = Job(
            recipe.parameters,
            recipe.locations,
            inputs,
            folder,
            recipe.label,
            device,
            p.sampling_batch,
            p.checkpoint_every,
        )
        return STAGES[recipe.stage](job)

    return store.make(recipe, run, str(device))


def _commit(artefact: Artefact) -> str:
    record = artefact.record
    return f"commit {record['commit']}{' with local changes' if record['dirty'] else ''}"
