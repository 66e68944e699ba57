"""From stored artefacts to records: every stage's own small CSV files, copied together.

``figures/<experiment>/records/seed-<k>/`` is written whole when one training seed is done. A seed
that is there is not made again, so records may outlive the folder that they were computed in.
"""

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
from deme_lib.experiment.store import Artefact, Recipe, Store, locked, provenance, write_text

SAMPLES_SHOWN = 16
TIMING = ["artefact", "seconds", "core_seconds", "process_peak_memory_mib", "device"]
TIMING += ["training_steps", "denoiser_calls"]
SWEPT = ("metrics", "arms", "timing", "floor")  # the floor is the same in every cell


def collect(p: Parameters) -> Path:
    """Make whatever is missing, then write the records of every training seed not yet there.

    Returns:
        The folder of the experiment; its records are in ``records/seed-<k>/``.

    Raises:
        ParameterError: records of other parameters are there.
    """
    out = parameters.folder_of(p)
    for q in p.per_seed():
        first = q.seed == p.seed
        if not parameters.is_recorded(out, q):
            frames, made = _made(recipes.everything(q, looks=first), q)
            _write(out, q, frames, made if first else {})
    return out


def collect_sweep(sweep: sweeps.Sweep, **overrides: Any) -> Path:
    """``collect`` for a sweep: the same records with a column ``cell``.

    Args:
        overrides: of the base's parameters, such as ``figures_dir``.
    """
    found, base = sweep.parts(), parameters.load(sweep.base, **overrides)
    out = sweeps.folder_of(sweep, base)
    left = [q for q in base.per_seed() if not sweeps.is_recorded(sweep, out, q)]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "sweep.json", sweep.model_dump_json(indent=1) + "\n")
    for q in left:
        parts: dict[str, list[pd.DataFrame]] = {}
        for cell, (p, arms) in found.items():
            of = p.model_copy(update={"seeds": q.seeds})
            metrics = [recipes.metrics(of, arm_of(arm)) for arm in arms]
            frames, _ = _made(recipes.upstream_first(recipes.floor(of), *metrics), of)
            for name in SWEPT if cell == BASE else SWEPT[:-1]:
                frames[name].insert(0, "cell", cell)
                parts.setdefault(name, []).append(frames[name])
        _write(out, q, {name: pd.concat(rows) for name, rows in parts.items()}, {})
    return out


def _made(
    wanted: Mapping[str, Recipe], q: Parameters
) -> tuple[dict[str, pd.DataFrame], dict[str, Artefact]]:
    """Every stage's CSV files by name, and what each artefact took; the artefacts by label."""
    from deme_lib.experiment.stages import make_all

    made = make_all(list(wanted.values()), q)
    parts: dict[str, list[pd.DataFrame]] = {}
    for artefact in made.values():
        for path in sorted(artefact.path.glob("*.csv")):
            parts.setdefault(path.stem, []).append(pd.read_csv(path))
    frames = {name: pd.concat(found, ignore_index=True) for name, found in parts.items()}
    frames["arms"] = _described(frames["arms"], q, made)
    took = [{"artefact": label, **artefact.record} for label, artefact in made.items()]
    frames["timing"] = pd.DataFrame(took)[TIMING]
    return frames, made


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
    out: Path, q: Parameters, frames: Mapping[str, pd.DataFrame], made: Mapping[str, Artefact]
) -> None:
    """The folder of one training seed, whole or not at all; ``made`` of the first seed alone."""
    final = out / "records" / f"seed-{q.seed}"
    with locked(Store(q.runs_dir).root, f"records-{out.name}-{q.seed}"):
        if parameters.is_recorded(out, q):  # by another process, meanwhile
            return
        folder = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in frames.keys() - (() if made else ("history", "neighbours")):
            frame = frames[name].copy()
            frame.insert(0, "training_seed", q.seed)
            frame.to_csv(folder / f"{name}.csv", index=False)
        run = {"experiment": q.experiment, "parameters": q.model_dump()}
        run |= {"device": ", ".join(sorted(set(frames["timing"]["device"]))), **provenance()}
        _write_json(folder / "run.json", run)
        if made:
            _write_json(folder / "acceptance.json", made["acceptance"].results)
            save_file(_samples(q, made), folder / "samples.safetensors")
        os.rename(folder, final)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _samples(q: Parameters, made: Mapping[str, Artefact]) -> dict[str, Any]:
    """The first images of every arm, and of the training data."""
    shown = {}
    for name in q.arms:
        made_of = made[recipes.images(q, arm_of(name, q.further_ema_decays)).label]
        images = load_file(made_of.path / "images.safetensors")
        shown[name] = images[f"seed{q.sampling_seeds[0]}"][:SAMPLES_SHOWN].copy()
    real = load_file(made["data"].path / "images.safetensors")["train"]
    return shown | {"real": real[: min(map(len, shown.values()))].copy()}
