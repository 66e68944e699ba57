"""From stored artefacts to the records of a sweep: ``records/sweeps/<name>.{csv,json}``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DDPMScheduler

from deme_lib.diffusion.cuts import routing_ranges
from deme_lib.diffusion.sampling import ddim_scheduler
from deme_lib.experiment import parameters, recipes, records, sweeps
from deme_lib.experiment.arms import ARMS, BASE, search_of
from deme_lib.experiment.parameters import Parameters
from deme_lib.experiment.stages import make_all
from deme_lib.experiment.stages.estimate import announce
from deme_lib.experiment.store import Artefact, Store, write_text
from deme_lib.experiment.sweeps import Sweep
from deme_lib.method.timesteps import route


def collect(sweep: Sweep) -> Path:
    """Make whatever is missing, then write the records of a sweep.

    Returns:
        The folder of its figures; the records are in ``records/sweeps/`` there.
    """
    base = parameters.load(sweep.base)
    cells = sweep.experiments()
    _announce(sweep, base)
    made = {BASE: _make(base, sweep.beside)}
    made |= {cell: _make(p, sweep.arms) for cell, p in cells.items()}
    of = {BASE: base, **cells}
    frames = [
        records.metrics(found, of[cell].seed).assign(cell=cell) for cell, found in made.items()
    ]
    document = {
        **sweep.model_dump(include={"title", "axis", "base", "against", "note"}),
        "arms": {arm: ARMS[arm].title for arm in sweep.arms},
        "beside": {arm: ARMS[arm].title for arm in sweep.beside},
        "cells": [
            {
                **cell.model_dump(),
                **_ranges(cells[cell.cell]),
                **_cell(cells[cell.cell], made[cell.cell], sweep.arms),
            }
            for cell in sweep.cells
        ],
        "parameters": base.model_dump(),
    }
    out = _folder(sweep, base)
    folder = out / "records" / "sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.concat(frames)
    table.insert(0, "cell", table.pop("cell"))
    write_text(folder / f"{sweep.sweep}.csv", table.to_csv(index=False))
    text = json.dumps(document, indent=1) + "\n"
    write_text(folder / f"{sweep.sweep}.json", text)
    return out


def _folder(sweep: Sweep, base: Parameters) -> Path:
    """Figures of the base for a shipped sweep as it stands; a trial's go under runs."""
    shipped = parameters.PRESETS / "sweeps" / f"{sweep.sweep}.yaml"
    return records.figures_folder(base, shipped.is_file() and sweeps.load(shipped) == sweep)


def _announce(sweep: Sweep, base: Parameters) -> None:
    """One estimate for all cells, before the first is begun."""
    make_all([recipes.data(base)], base)
    store = Store(base.runs_dir)
    missing = {r.key: r for recipe, _ in sweep.wanted() for r in store.missing(recipe)}
    announce(list(missing.values()), store, base)


def _ranges(p: Parameters) -> dict[str, Any]:
    """How a cell cuts [0, T), and how many sampling steps fall into each range."""
    stored = Store(p.runs_dir).load(recipes.baseline(p))
    scheduler = DDPMScheduler.from_pretrained(stored.path / "pipeline", subfolder="scheduler")
    ranges = routing_ranges(p.range_cut, p.n_ranges, scheduler)
    steps = ddim_scheduler(scheduler, p.sampling_steps, p.timestep_spacing).timesteps
    calls = torch.bincount(route(steps, ranges), minlength=len(ranges)).tolist()
    return {"ranges": [[own.start, own.stop] for own in ranges], "sampling_steps": calls}


def _make(p: Parameters, arms: list[str]) -> dict[str, Artefact]:
    """Metrics, images and whatever an arm's record reads, by label."""
    wanted = []
    for arm in (ARMS[name] for name in arms):
        wanted += [recipes.metrics(p, arm), recipes.images(p, arm)]
        if name := search_of(arm, p.merge_weights):
            wanted.append(recipes.search(p, name))
        wanted += recipes.finetuned(p, arm.members)
    return make_all(wanted, p)


def _cell(p: Parameters, made: dict[str, Artefact], arms: list[str]) -> dict[str, Any]:
    """What a cell trained and searched."""
    results = {}
    for arm in (ARMS[name] for name in arms):
        name = search_of(arm, p.merge_weights)
        found = made[f"search-{name}"].results if name else {"losses": 0, "images": 0}
        members = [made[r.label].results for r in recipes.finetuned(p, arm.members)]
        results[arm.name] = {
            "weights": made[f"images-{arm.name}"].results["weights"],
            "search_losses": found["losses"],
            "search_images": found["images"],
            "task_weights": [m["task_weights"] for m in members if "task_weights" in m],
        }
    return {
        "training_steps": p.n_ranges * p.finetune_steps,
        "results": results,
    }
