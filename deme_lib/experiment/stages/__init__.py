"""How each artefact is made. A stage reads its recipe's parameters and inputs, nothing else.

``make`` is the one way in: it loads what is stored, makes what is not, and says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deme_lib.diffusion import models
from deme_lib.experiment.recipes import upstream_first
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.stages import calibrate, combine, evaluate, look, prepare, train
from deme_lib.experiment.stages.job import Job
from deme_lib.experiment.store import Artefact, Recipe, Store, rates

STAGES: dict[str, Callable[[Job], dict[str, Any] | None]] = {
    "data": prepare.make_data,
    "reference": prepare.make_reference,
    "floor": prepare.make_floor,
    "load_baseline": train.load_baseline,
    "train_baseline": train.train_baseline,
    "finetune": train.finetune,
    "acceptance": calibrate.make_acceptance,
    "gate": evaluate.make_gate,
    "search": combine.make_search,
    "merged": combine.make_merged,
    "images": evaluate.make_images,
    "metrics": evaluate.make_metrics,
    "gradients": look.make_gradients,
    "task_vectors": look.make_task_vectors,
    "range_losses": look.make_range_losses,
    "plane": look.make_plane,
    "activations": look.make_activations,
    "landscape": look.make_landscape,
}


def make(recipe: Recipe, p: Parameters) -> Artefact:
    """Load an artefact, or make it and everything it needs, after saying what and how long."""
    return make_all([recipe], p)[recipe.label]


def make_all(wanted: Sequence[Recipe], p: Parameters) -> dict[str, Artefact]:
    """``make`` for several recipes of one training seed; the artefacts by label."""
    store = Store(p.runs_dir)
    if missing := store.missing(*wanted):
        torch.set_num_threads(p.usable_threads)
        _announce(missing, store)
    known: dict[str, Artefact] = {}
    return {recipe.label: _build(recipe, store, p, known) for recipe in wanted}


def _announce(missing: Sequence[Recipe], store: Store) -> None:
    """Say what will be made, and for how long, by what earlier runs on this machine took."""
    steps = sum(r.training_steps for r in missing)
    calls = sum(r.denoiser_calls for r in missing)
    data = next(n for n, r in upstream_first(missing[-1]).items() if r.stage == "data")
    per_step, per_call = rates(store, data)
    minutes = (steps * per_step + calls * per_call) / 60
    print(
        f"made now: {', '.join(r.label for r in missing)} ({steps:,} optimiser steps, {calls:,} "
        f"denoiser calls: about {minutes:.0f} min in one process)",
        flush=True,
    )


def _build(recipe: Recipe, store: Store, p: Parameters, known: dict[str, Artefact]) -> Artefact:
    if recipe.name in known:
        return known[recipe.name]
    if store.holds(recipe):
        return known.setdefault(recipe.name, store.load(recipe))
    inputs = {role: _build(r, store, p, known) for role, r in recipe.inputs.items()}
    device = models.accelerator(p.device).device

    def run(folder: Path) -> dict[str, Any]:
        given = (recipe.parameters, recipe.locations, inputs, folder, recipe.label)
        job = Job(*given, device, p.sampling_batch, p.checkpoint_every)
        return STAGES[recipe.stage](job) or {}

    return known.setdefault(recipe.name, store.make(recipe, run, str(device)))
