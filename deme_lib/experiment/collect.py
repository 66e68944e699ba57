"""From stored artefacts to records: the stages' own CSV files, one a kind for all training seeds.

``figures/<experiment>/records/`` gains the rows of a training seed when all of it is made. Which
seeds count stands in ``run.json``, written last. A folder elsewhere (``runs/figures``) starts as a
copy of the committed one. A recorded seed is not made again unless ``again`` names it.
"""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import save

from deme_lib import ROOT
from deme_lib.experiment import graph, parameters
from deme_lib.experiment.arms import DEFAULT, label
from deme_lib.experiment.parameters import ParameterError
from deme_lib.experiment.schema import ANALYSIS, Parameters
from deme_lib.experiment.stages import images_of
from deme_lib.experiment.stages.judge import read_images
from deme_lib.experiment.store import Artefact, locked, make

COMMITTED = ROOT / "figures"
SAMPLES_SHOWN = 16


def folder_of(p: Parameters) -> Path:
    """Where records, tables and figures of an experiment go."""
    return ROOT / p.figures_dir / parameters.folder_name(p)


def collect(p: Parameters) -> Path:
    """Make whatever is missing, and add the records of every training seed not yet there.

    Returns:
        The folder of the experiment; its records are in ``records/``.

    Raises:
        ParameterError: records of other parameters are there.
    """
    out = folder_of(p)
    with locked(ROOT / p.runs_dir / "store", f"records-{out.name}"):
        records, run = out / "records", _read_run(out / "records")
        committed = _committed(p)
        if committed and _read_run(committed)["trainings"].keys() - run["trainings"].keys():
            copy = out.with_name(f"{out.name}.tmp")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(committed, copy / "records")
            if out.is_dir():  # kept, since it may hold what the committed folder does not
                os.rename(out, out.with_name(f"{out.name}.before-{time.time_ns()}"))
            os.rename(copy, out)
            run = _read_run(records)
        wanted = missing(p)
        if run["trainings"] and run["parameters"] != json.loads(json.dumps(p.results())):
            _replace(records / "run.json", _as_json(run | {"parameters": p.results()}))
        for q in wanted:
            _record(records, q, looked_at=p.looks_at(q.seed))
    return out


def missing(p: Parameters) -> list[Parameters]:
    """The training seeds, each as an experiment, that ``collect`` has to make.

    Those that no record has, that ``again`` names, or that were recorded from other artefacts:
    an arm's function or an own data set has changed since.
    """
    records, committed = folder_of(p) / "records", _committed(p)
    if odd := _differing(records, p):
        raise ParameterError(
            f"{records} was recorded with other {', '.join(odd)}: delete that folder to record it "
            "anew, or give the experiment another name"
        )
    there = _read_run(committed)["trainings"] if committed else {}
    there |= _read_run(records)["trainings"]

    def current(q: Parameters) -> bool:
        known = there.get(str(q.seed))
        return known is not None and known.get("artefacts") in (None, _digest(q))

    return [q for q in p.per_seed() if q.seed in p.again or not current(q)]


def _digest(q: Parameters) -> str:
    """A hash of the names of all artefacts that a training seed's rows come from."""
    names = sorted(a.name for made in graph.jobs(q, looked_at=False).values() for a in made)
    return hashlib.sha256("".join(names).encode()).hexdigest()[:12]


def _committed(p: Parameters) -> Path | None:
    """Committed records of the experiment's name, if they are of these very parameters."""
    records = COMMITTED / p.experiment / "records"
    return None if not records.is_dir() or _differing(records, p) else records


def _differing(records: Path, p: Parameters) -> list[str]:
    """Parameters that records were measured with otherwise."""
    there = _read_run(records).get("parameters")
    now = {k: v for k, v in p.results().items() if k not in ANALYSIS}
    return sorted(k for k in now if there and there.get(k) != json.loads(json.dumps(now[k])))


def _read_run(records: Path) -> dict[str, Any]:
    path = records / "run.json"
    try:
        found = json.loads(path.read_text()) if path.is_file() else {"trainings": {}}
        return found | {"trainings": found["trainings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{path} is damaged ({error}): delete {records}") from error


def _made(q: Parameters, looked_at: bool) -> tuple[dict[str, pd.DataFrame], dict]:
    """Rows by kind as text, and where and with what they were made."""
    wanted = [artefact for found in graph.jobs(q, looked_at).values() for artefact in found]
    make(wanted)
    parts: dict[str, list[pd.DataFrame]] = {}

    def add(artefact: Artefact, **columns: Any) -> None:
        for path in sorted(artefact.folder.glob("*.csv")):
            frame = _read(path)
            columns = {"training_seed": q.seed, **columns}
            parts.setdefault(path.stem, []).append(frame.assign(**columns)[[*columns, *frame]])

    add(graph.floor(q))
    for (cell, name), (arm, of_cell) in q.rows().items():
        copies = graph.copies(of_cell, arm.family)
        add(graph.images(of_cell, arm), cell=cell, arm=name)
        taught_by = graph.taught_by(of_cell, arm.family)
        steps = sum(copy.arguments["steps"] for copy in taught_by + copies)
        parts["arms"][-1].insert(3, "title", arm.title)
        parts["arms"][-1].insert(6, "training_steps", steps)
        add(graph.scores(of_cell, arm), cell=cell, arm=name)
        if arm.weighted and of_cell.merge_weights == "search":
            add(graph.search(of_cell, arm.family), cell=cell)
        for copy in copies if looked_at else ():
            add(copy, cell=cell, run=copy.label)
    if looked_at:
        add(graph.baseline(q), cell=DEFAULT, run="baseline")
        for look in graph.looks(q):
            add(look)
    told = [json.loads(artefact.record.read_text()) for artefact in wanted]
    names = {"training_seed": q.seed, "artefact": "label", "seconds": "seconds", "device": "device"}
    parts["timing"] = [pd.DataFrame([{k: r.get(v, v) for k, v in names.items()} for r in told])]
    frames = {k: pd.concat(found).astype(str).drop_duplicates() for k, found in parts.items()}
    frames["floor"] = frames["floor"].drop(columns="training_seed")
    training = {k: told[-1][k] for k in ("commit", "dirty", "device", "versions")}
    training["artefacts"] = _digest(q)
    return frames, training


def _samples(q: Parameters) -> bytes:
    """The first images of every row, and of the training data, as safetensors."""
    shown = {
        label(cell, name): next(read_images(graph.images(of_cell, arm).folder, q.sampling_seeds[0]))
        for (cell, name), (arm, of_cell) in q.rows().items()
    }
    shown["real"] = images_of(graph.data(q).folder, "train")
    return save({name: found[:SAMPLES_SHOWN].numpy().copy() for name, found in shown.items()})


def _record(records: Path, q: Parameters, looked_at: bool) -> None:
    """Make a training seed and add its rows; it counts once ``run.json`` names it."""
    frames, training = _made(q, looked_at)
    records.mkdir(parents=True, exist_ok=True)
    run = _read_run(records)
    if run["trainings"].pop(str(q.seed), None):  # it does not count while it is written
        _replace(records / "run.json", _as_json(run))
    others = run["trainings"].keys()
    for kind, frame in frames.items():
        path = records / f"{kind}.csv"
        if path.is_file() and "training_seed" in frame:
            there = _read(path)
            frame = pd.concat([there[there["training_seed"].isin(others)], frame])
            frame = frame.sort_values("training_seed", key=lambda x: x.astype(int), kind="stable")
        _replace(path, frame.to_csv(index=False).encode())
    if looked_at and all(q.seed < int(seed) for seed in others):
        _replace(records / "samples.safetensors", _samples(q))
    trainings = sorted({**run["trainings"], str(q.seed): training}.items(), key=lambda x: int(x[0]))
    run = {"experiment": q.experiment, "parameters": q.results(), "trainings": dict(trainings)}
    _replace(records / "run.json", _as_json(run))


def _as_json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=1)}\n".encode()


def _read(path: Path) -> pd.DataFrame:
    """A CSV file as text, so that what is written again is what was read."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
