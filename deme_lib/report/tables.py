"""The table of an experiment or a sweep: a row per arm (of a cell), real images on top."""

import json

import numpy as np
import pandas as pd

from deme_lib.report import intervals
from deme_lib.report.formats import UNKNOWN, decimals, interval, percent, plus_minus
from deme_lib.report.records import BASE, MEASURES, Records

COSTS = ["calls_per_image", "parameters", "training_steps", "search_losses", "search_images"]
PAPER = "the paper's FID (CIFAR10: not comparable)"


def table(records: Records) -> pd.DataFrame:
    """Plain numbers; first the floor, what fresh real images score.

    ``*_mean`` and ``*_sd`` are over the units of the intervals, ``excess`` is FID minus the floor,
    ``difference`` FID minus the pretrained model's with its uncorrected t interval at
    ``confidence``. Test loss and costs are means over training seeds.
    """
    real = {"cell": BASE, "arm": "real", "title": "real images, the floor"}
    real |= {f"{measure}_mean": records.floor(measure) for measure in MEASURES}
    rows = [real, *(_row(records, cell, arm) for cell, arm in records.rows)]
    found = pd.DataFrame(rows)
    found.insert(3, "excess", found["fid_mean"] - records.floor("fid"))
    if records.sweep:
        papers = {cell["cell"]: cell.get("paper") for cell in records.sweep["cells"]}
        return found.assign(paper=found["cell"].map(papers).astype(float))
    return found.drop(columns="cell")


def _row(records: Records, cell: str, arm: str) -> dict:
    known = records.arms[(records.arms["cell"] == cell) & (records.arms["arm"] == arm)]
    row = {"cell": cell, "arm": arm, "title": known["title"].iloc[0]}
    fid = records.by_unit["fid"]
    d = (fid[(cell, arm)] - fid[(BASE, "pretrained")]).to_numpy()
    if (cell, arm) != (BASE, "pretrained"):
        low, high, _ = intervals.t_interval(d, records.parameters["confidence"])
        row |= {"difference": d.mean(), "difference_low": low, "difference_high": high}
    for measure in MEASURES:
        values = records.by_unit[measure][(cell, arm)]
        row |= {f"{measure}_mean": values.mean(), f"{measure}_sd": values.std(ddof=1)}
    row["test_loss"] = known["test_loss"].mean()
    row |= {cost: known[cost].mean() for cost in COSTS}
    row["weights"] = "; ".join(known["weights"].dropna().drop_duplicates())
    return row | {f"ablation{n}": known[f"ablation{n}"].iloc[0] for n in intervals.ABLATIONS}


def half(rows: pd.DataFrame) -> pd.Series:
    """Half the width of the interval of ``difference``."""
    return (rows["difference_high"] - rows["difference_low"]) / 2


def printed(records: Records) -> pd.DataFrame:
    """The table as strings, without other EMA horizons and columns in which nothing is known."""
    rows = table(records)
    if not records.sweep:
        rows = rows[~rows["arm"].str.contains("@")]
    columns = {"arm": rows["title"]}
    if records.sweep:
        columns = {records.sweep["axis"]: rows["cell"].replace(BASE, "the base"), **columns}
    columns |= {
        "FID ↓": rows["fid_mean"].map(decimals),
        "excess over the floor": rows["excess"].map(decimals),
        "difference to pretrained": list(map(plus_minus, rows["difference"], half(rows))),
        "IS ↑": rows["inception_score_mean"].map(decimals),
        "test loss ↓": rows["test_loss"].map(lambda x: decimals(x, 5)),
    }
    if records.sweep:
        columns["weights"] = rows["weights"].map(_weights)
        columns[PAPER] = rows["paper"].map(lambda x: decimals(x, 2))
    else:
        columns["calls"] = rows["calls_per_image"].map(lambda x: decimals(x, 0))
        columns["parameters"] = rows["parameters"].map(lambda x: decimals(x, 0))
    shown = pd.DataFrame(columns)
    if np.isnan(rows["fid_mean"].iloc[0]):
        shown = shown.iloc[1:]
    return shown.loc[:, (shown != UNKNOWN).any()]


def _weights(text: str | float) -> str:
    """One training seed's weights; those of several are in the CSV."""
    if pd.isna(text) or not text or ";" in text:
        return UNKNOWN
    weights = json.loads(text)
    return ", ".join(f"{w:.3g}" for w in weights) if any(weights) else "all 0: no merge"


def setting(records: Records) -> str:
    """One line: data, n, features, reference, sampler, seeds."""
    m = records.metrics.iloc[0]
    reference = {"train": "training"}.get(m["reference"], m["reference"])
    seeds = {"training": records.training_seeds, "sampling": records.sampling_seeds}
    named = ", ".join(
        f"{kind} seed{'s' * (len(known) > 1)} {' '.join(map(str, known))}"
        for kind, known in seeds.items()
    )
    return (
        f"{records.parameters['dataset']}: n = {m['n']:,} an arm and seed, {m['features']} "
        f"features, FID to {reference} images, DDIM {m['steps']} steps; {named}"
    )


def caption(records: Records) -> str:
    """The setting, and what the intervals are over."""
    unit, level = intervals.UNITS[records.unit], 100 * records.parameters["confidence"]
    return f"{setting(records)}; {level:g} % t intervals over {unit}s"


def note(records: Records) -> str:
    """What the floor is where it could not be measured, and what a sweep's author says."""
    extrapolated = (records.frames["floor"]["extrapolated"] == 1).any()
    said = "the floor is extrapolated, c (1/n + 1/m)" if extrapolated else ""
    own = " ".join(records.sweep.get("note", "").split())
    return ". ".join(part for part in (said, own) if part)


def compared(found: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``comparisons.csv`` as printed."""
    columns = {
        "a − b": found["a"] + " − " + found["b"],
        "ablation": found["ablation"].map(str),
        "kind": found["kind"],
        "measure": found["measure"],
        "effect [interval]": list(map(interval, found["effect"], found["low"], found["high"])),
        "level": found["level"].map(lambda x: f"{100 * x:.4g} %"),
        "share of the excess": found["share"].map(percent),
        "verdict": found["verdict"],
    }
    shown = pd.DataFrame(columns)
    said = [c for c in ("ablation", "kind", "measure", "level") if shown[c].nunique() < 2]
    said += ["share of the excess"] if found["share"].isna().all() else []
    return shown.drop(columns=said)
