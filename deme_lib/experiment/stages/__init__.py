"""How each artefact is made. A stage reads its recipe's parameters and inputs, nothing else.

``make`` is the one way in: it loads what is stored, makes what is not, and says which.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deme_lib.diffusion import models
from deme_lib.experiment import processes
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
    "plane": look.make_plane,
    "activations": look.make_activations,
    "landscape": look.make_landscape,
}

SHARED: dict[str, Callable[[Job], Iterable]] = {
    "train_baseline": train.pretraining,
    "finetune": train.finetuning,
    "images": evaluate.sampling,
}
"""Of stages that all processes of a job share: their long part, whose steps each must take."""


def make(recipe: Recipe, p: Parameters) -> Artefact:
    """Load an artefact, or make it and everything it needs, after saying what and how long."""
    return make_all([recipe], p)[recipe.label]


def make_all(wanted: Sequence[Recipe], p: Parameters) -> dict[str, Artefact]:
    """``make`` for several recipes of one training seed; the artefacts by label."""
    store = Store(p.runs_dir)
    if processes.count() > 1:
        models.accelerator(p.device)  # the processes meet
    elif p.processes > 1 and (
        shared := [r.name for r in store.missing(*wanted) if r.stage in SHARED]
    ):
        processes.launch(shared, p)
    if processes.rank() > 0:
        return _help(wanted, store, p)
    if missing := store.missing(*wanted):
        torch.set_num_threads(p.usable_threads)
        _announce(missing, store)
    known: dict[str, Artefact] = {}
    made = {recipe.label: _build(recipe, store, p, known) for recipe in wanted}
    processes.tell(None)
    return made


def _help(wanted: Sequence[Recipe], store: Store, p: Parameters) -> dict[str, Artefact]:
    """Take part in what the leading process shares, until it has all that is wanted."""
    torch.set_num_threads(p.usable_threads)
    known = upstream_first(*wanted)
    while name := processes.tell():
        recipe = known[name]
        inputs = {role: store.load(r) for role, r in recipe.inputs.items()}
        for _ in SHARED[recipe.stage](_job(recipe, inputs, store.partial(recipe), p)):
            pass
    return {recipe.label: store.load(recipe) for recipe in wanted}


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
    device = str(models.accelerator(p.device).device)

    def run(folder: Path) -> dict[str, Any]:
        if recipe.stage in SHARED:
            processes.tell(recipe.name)
        return STAGES[recipe.stage](_job(recipe, inputs, folder, p)) or {}

    return known.setdefault(recipe.name, store.make(recipe, run, device))


def _job(recipe: Recipe, inputs: Mapping[str, Artefact], folder: Path, p: Parameters) -> Job:
    device = models.accelerator(p.device).device
    given = (recipe.parameters, recipe.locations, inputs, folder, recipe.label)
    return Job(*given, device, p.sampling_batch, p.checkpoint_every)
