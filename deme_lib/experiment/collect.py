"""From stored artefacts to records: every stage's own small CSV files, copied together.

``figures/<experiment>/records/seed-<k>/`` is written whole when one training seed is done. A seed
that is there is not made again, so records may outlive the folder that they were computed in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import load_file, save_file

from deme_lib.experiment import parameters, recipes, sweeps
from deme_lib.experiment.arms import BASE, arm_of, search_of
from deme_lib.experiment.schema import Parameters
from deme_lib.experiment.store import Artefact, Recipe, provenance

SAMPLES_SHOWN = 16


def collect(p: Parameters) -> Path:
    """Make whatever is missing, then write the records of every training seed not yet there.

    Returns:
        The folder of the experiment; its records are in ``records/seed-<k>/``.

    Raises:
        ParameterError: records of other parameters are there.
    """
    from deme_lib.experiment.stages import make_all

    out = parameters.folder_of(p)
    for q in p.per_seed():
        first = q.seed == p.seed
        if not parameters.is_recorded(out, q):
            recipes_wanted = recipes.everything(q, looks=first)
            made = make_all(list(recipes_wanted.values()), q)
            frames = _frames(recipes_wanted.values(), made)
            frames["arms"] = _described(frames["arms"], q, made)
            _write(out, q, frames, made, first)
    return out


def collect_sweep(sweep: sweeps.Sweep, **overrides: Any) -> Path:
    """``collect`` for a sweep: the same records with a column ``cell``.

    Args:
        overrides: of the base's parameters, such as ``figures_dir``.
    """
    from deme_lib.experiment.stages import make_all

    base, cells = parameters.load(sweep.base, **overrides), sweep.experiments()
    out = parameters.folder_of(base) / "sweeps" / sweeps.folder_name(sweep)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.json").write_text(json.dumps(sweeps.document(sweep), indent=1) + "\n")
    for seed in base.seeds:
        q = base.model_copy(update={"seeds": [seed]})
        if parameters.is_recorded(out, q):
            continue
        frames: dict[str, list[pd.DataFrame]] = {}
        for cell, arms in {BASE: sweep.beside, **dict.fromkeys(cells, sweep.arms)}.items():
            of = cells.get(cell, base).model_copy(update={"seeds": [seed]})
            wanted = [recipes.metrics(of, arm_of(a, of.further_ema_decays)) for a in arms]
            found = recipes.upstream_first(recipes.floor(of), *wanted)
            made = make_all(list(found.values()), of)
            judged = {k: v for k, v in _frames(found.values(), made).items() if k in SWEPT}
            judged["arms"] = _described(judged["arms"], of, made)
            if cell != BASE:
                judged.pop("floor")
            for name, frame in judged.items():
                frame.insert(0, "cell", cell)
                frames.setdefault(name, []).append(frame)
        _write(out, q, {name: pd.concat(parts) for name, parts in frames.items()}, {}, False)
    return out


SWEPT = ("metrics", "arms", "floor", "timing")


def _frames(wanted: Any, made: Mapping[str, Artefact]) -> dict[str, pd.DataFrame]:
    """Every stage's CSV files by name, and what each artefact took."""
    parts: dict[str, list[pd.DataFrame]] = {}
    timing = []
    for recipe in wanted:
        artefact = made[recipe.label]
        for path in sorted(artefact.path.glob("*.csv")):
            parts.setdefault(path.stem, []).append(pd.read_csv(path))
        timing.append(_timing(recipe, artefact))
    frames = {name: pd.concat(found, ignore_index=True) for name, found in parts.items()}
    return frames | {"timing": pd.DataFrame(timing)}


def _timing(recipe: Recipe, artefact: Artefact) -> dict[str, Any]:
    record = artefact.record
    names = ("seconds", "core_seconds", "process_peak_memory_mib", "device")
    work = {"training_steps": recipe.training_steps, "denoiser_calls": recipe.denoiser_calls}
    return {"artefact": recipe.label, **{n: record.get(n) for n in names}, **work}


def _described(arms: pd.DataFrame, q: Parameters, made: Mapping[str, Artefact]) -> pd.DataFrame:
    """The arms with their titles, ablations, training steps and what was spent on a search."""
    rows = []
    for row in arms.to_dict("records"):
        arm = arm_of(row["arm"], q.further_ema_decays)
        name = search_of(arm, q.merge_weights)
        search = made[f"search-{name}"].results if name else {"losses": 0, "images": 0}
        title = arm.title + (", searched" if name and arm.weights == "preset" else "")
        rows.append(
            {**row, "title": title}
            | {f"ablation{n}": int(n in arm.ablations) for n in (1, 2)}
            | {"training_steps": sum(r.training_steps for r in recipes.finetuned(q, arm.members))}
            | {"search_losses": search["losses"], "search_images": search["images"]}
        )
    return pd.DataFrame(rows)


def _write(
    out: Path,
    q: Parameters,
    frames: Mapping[str, pd.DataFrame],
    made: Mapping[str, Artefact],
    first: bool,
) -> None:
    """The folder of one training seed, whole or not at all."""
    final = out / "records" / f"seed-{q.seed}"
    folder = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, frame in frames.items():
        if first or name not in ("history", "neighbours"):
            frame = frame.copy()
            frame.insert(0, "training_seed", q.seed)
            frame.to_csv(folder / f"{name}.csv", index=False)
    run = {"experiment": q.experiment, "parameters": q.model_dump(), "cpu_threads": q.threads}
    run |= {"device": ", ".join(sorted(set(frames["timing"]["device"]))), **provenance()}
    (folder / "run.json").write_text(json.dumps(run, indent=1, sort_keys=True) + "\n")
    if first:
        acceptance = json.dumps(made["acceptance"].results, indent=1, sort_keys=True) + "\n"
        (folder / "acceptance.json").write_text(acceptance)
        save_file(_samples(q, made), folder / "samples.safetensors")
    os.rename(folder, final)


def _samples(q: Parameters, made: Mapping[str, Artefact]) -> dict[str, Any]:
    """The first images of every arm, and of the training data."""
    shown = {}
    for name in q.arms:
        made_of = made[recipes.images(q, arm_of(name, q.further_ema_decays)).label]
        images = load_file(made_of.path / "images.safetensors")
        shown[name] = images[f"seed{q.sampling_seeds[0]}"][:SAMPLES_SHOWN].copy()
    real = load_file(made["data"].path / "images.safetensors")["train"]
    return shown | {"real": real[: min(map(len, shown.values()))].copy()}
