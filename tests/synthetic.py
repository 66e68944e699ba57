"""Records of an experiment that never ran: all arms, every file, numbers drawn from a seed."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from deme_lib.experiment import arms as known
from deme_lib.experiment.arms import SEARCHES, present, search_of

ARMS = {arm.name: arm for arm in present("none")}

FID = dict(
    zip(
        ARMS,
        (0.57, 0.44, 0.48, 0.45, 0.52, 0.47, 0.50, 0.51, 0.46, 0.62, 0.49, 0.53, 0.55),
        strict=True,
    )
)
QUANTILES = ["q05", "q25", "median", "q75", "q95"]


def write(
    folder: Path,
    *,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    training_seeds: tuple[int, ...] = (0,),
    n_ranges: int = 4,
    channels: int = 1,
    second: bool = True,
    history: bool = True,
    points: int = 15,
    bins: int = 20,
    merge: str | list[float] = "search",
    weights: list[float] | None = None,
    fid: dict[str, float] | None = None,
) -> Path:
    """Write the records of a synthetic experiment; ``fid`` overrides means of single arms.

    ``weights`` are the merge's; ``merge`` is the parameter merge_weights.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    merged = weights or [0.25, 0.0, 0.55, 0.4][:n_ranges]
    held = {"merged": merged, "output_merge": merged, "all_scaled": [0.8], "soup": [0.3] * n_ranges}
    held["averaged"] = [1 / n_ranges] * n_ranges
    tables = {
        "metrics": _metrics(rng, {**FID, **(fid or {})}, training_seeds, seeds, second),
        "arms": _arms(held, n_ranges, merge, training_seeds),
        "losses": _losses(rng, bins),
        "neighbours": _neighbours(rng),
        "search": _search(rng, n_ranges),
        "history": _history(rng, n_ranges, history),
        "gradients": _gradients(rng, bins),
        "activations": _activations(rng, n_ranges),
        "landscape": _landscape(n_ranges),
        "task_vectors": _task_vectors(rng, n_ranges),
        "plane": _plane(points),
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    for name, value in _dicts(training_seeds, seeds, n_ranges, second, merge).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    size = (16, channels, 8, 8)
    images = {a: rng.integers(0, 256, size).astype(np.uint8) for a in (*ARMS, "real")}
    save_file(images, folder / "samples.safetensors")
    return folder


def _metrics(rng, fid, training_seeds, seeds, second) -> pd.DataFrame:
    common = {s: rng.normal(0, 0.06) for s in seeds}  # shared by the arms: the same noise
    trained = {(arm, t): 0.02 * t + rng.normal(0, 0.01) for arm in ARMS for t in training_seeds[1:]}
    rows = []
    for arm in ARMS:
        for t, s in product(training_seeds, seeds):
            value = fid[arm] + common[s] + trained.get((arm, t), 0) + rng.normal(0, 0.015)
            rows.append(
                {
                    "arm": arm,
                    "training_seed": t,
                    "seed": s,
                    "n": 2000,
                    "features": "digits-a",
                    "steps": 20,
                }
                | {"fid": value, "fid_second": 0.8 * value if second else np.nan}
                | {"pixel": 0.3 * value + 0.02, "inception_score": 9 + rng.normal(0, 0.05)}
                | {"kid": value / 500, "precision": 0.8 + rng.normal(0, 0.01), "recall": 0.7}
            )
    return pd.DataFrame(rows)


def _arms(held, n_ranges, merge, training_seeds) -> pd.DataFrame:
    rows = []
    for arm in ARMS.values():
        calls = 20 * n_ranges if arm.combine == "outputs" else 20
        parameters = 160_000 * (n_ranges if arm.combine in ("outputs", "routed") else 1)
        searched = search_of(arm, merge) is not None
        rows.append(
            {"arm": arm.name, "title": arm.title, "ablation1": int(1 in arm.ablations)}
            | {
                "ablation2": int(2 in arm.ablations),
                "parameters": parameters,
                "calls_per_image": calls,
            }
            | {"training_steps": 0 if arm.members == "none" else 1000 * n_ranges}
            | {"search_losses": 150 * searched, "search_images": 18000 * searched}
            | {"weights": json.dumps(w) if (w := held.get(arm.name)) else "", "test_loss": 0.077}
        )
    return pd.concat([pd.DataFrame(rows).assign(training_seed=t) for t in training_seeds])


def _losses(rng, bins) -> pd.DataFrame:
    edges = np.linspace(0, 1000, bins + 1).astype(int)
    rows = [
        {"arm": arm, "bin_start": a, "bin_stop": b}
        | {"loss": 0.3 * np.exp(-a / 150) * (FID[arm] / 0.57) ** 0.1 * rng.uniform(0.99, 1.01)}
        for arm in ARMS
        for a, b in pairwise(edges)
    ]
    return pd.DataFrame(rows)


def _neighbours(rng) -> pd.DataFrame:
    names = ["test", *ARMS]
    values = [np.sort(rng.normal(2.1, 0.02) + np.array([-0.9, -0.3, 0, 0.3, 0.8])) for _ in names]
    table = pd.DataFrame(values, columns=QUANTILES)
    return pd.DataFrame({"arm": names, "n": [300, *[2000] * len(ARMS)]}).join(table)


def _search(rng, n_ranges) -> pd.DataFrame:
    rows = []
    for name in SEARCHES:
        for i in range(30):
            w = [0.0] * n_ranges if i == 0 else rng.uniform(0, 1.5, n_ranges).round(2).tolist()
            loss = 0.0765 + 0.01 * np.square(w).mean() - 0.008 * np.mean(w)
            fid = 0.5 + 30 * (loss - 0.075) + rng.normal(0, 0.02) if i < 12 else np.nan
            rows.append({"search": name, "weights": json.dumps(w), "loss": loss, "fid": fid})
    table = pd.DataFrame(rows)
    best = table.groupby("search")["fid"].idxmin()
    return table.assign(chosen=table.index.isin(best).astype(int))


def _history(rng, n_ranges, baseline) -> pd.DataFrame:
    rows, names = [], [f"expert-{i + 1}of{n_ranges}" for i in range(n_ranges)]
    names += ["all-plain", "all-same", *(f"soup-{i + 1}of{n_ranges}" for i in range(n_ranges))]
    for step in range(500, 8001, 500) if baseline else ():
        rate = max(2e-4, 1e-3 * 0.5 * (1 + np.cos(np.pi * min(step / 6400, 1))))
        rows.append(("baseline", step, rate, 0.0765 + 0.4 * np.exp(-step / 900)))
    for name in names:
        drop = rng.uniform(0.0005, 0.0015)
        for step in range(0, 4001 if name.startswith("all") else 1001, 200):
            rows.append((name, step, 2e-4, 0.0765 - drop * (1 - np.exp(-step / 800))))
    return pd.DataFrame(rows, columns=["run", "step", "learning_rate", "held_out_loss"])


def _gradients(rng, bins) -> pd.DataFrame:
    t = ((np.arange(bins) + 0.5) * 1000 / bins).astype(int)
    rows = [
        (model, draw, 256, a, b, _cosine(rng, a, b))
        for model in ("pretrained", "merged")
        for draw in range(5)
        for a in t
        for b in t
    ]
    return pd.DataFrame(rows, columns=["model", "draw", "n", "timestep1", "timestep2", "cosine"])


def _cosine(rng, a, b) -> float:
    return 1.0 if a == b else np.exp(-abs(a - b) / 200) * rng.uniform(0.6, 1) - 0.05


def _activations(rng, n_ranges) -> pd.DataFrame:
    rows = []
    for k in range(1, n_ranges + 1):
        for block in ("down 1", "down 2", "mid", "up 1", "up 2"):
            for dimension, size in (("channel", 16), ("spatial", 64)):
                scale = rng.uniform(0.01, 0.02) * (2 if size == 16 else 1)
                spread = dict(zip(QUANTILES, scale * np.array([0.1, 0.5, 1, 1.7, 3]), strict=True))
                shares = {"share": 10 * scale, "share_at_random": 3 * scale}
                row = {"range": k, "block": block, "dimension": dimension, "n": 300, "count": size}
                rows.append(row | spread | shares)
    return pd.DataFrame(rows)


def _landscape(n_ranges) -> pd.DataFrame:
    """Bowls: of all timesteps around the centre, of the ranges beside it."""
    grid, rows = np.linspace(-0.2, 0.2, 9).round(6), []
    for k in range(n_ranges + 1):
        start, stop = ((k - 1) * 1000 // n_ranges, k * 1000 // n_ranges) if k else (0, 1000)
        for a in grid:
            for b in grid:
                loss = 0.08 + 10 ** (k - 1) * ((a - 0.05 * (k % 3)) ** 2 + b**2)
                rows.append([k, start, stop, a, b, loss])
    return pd.DataFrame(rows, columns=["range", "start", "stop", "a", "b", "loss"])


def _task_vectors(rng, n_ranges) -> pd.DataFrame:
    rows = []
    for k in range(1, n_ranges + 1):
        for block in ("conv_in", "time_embedding", "down", "mid", "up", "conv_out", "projection"):
            scale = 0.01 * rng.uniform(0.5, 2) / k
            rows.append([k, block, *(scale * np.array([-1.6, -0.7, 0, 0.7, 1.6]))])
    return pd.DataFrame(rows, columns=["range", "block", *QUANTILES])


def _plane(points) -> pd.DataFrame:
    grid = np.linspace(-0.2, 1.2, points)
    rows = [
        (a, b, 0.0765 + 0.004 * ((a - 0.5) ** 2 + (b - 0.3) ** 2 + 0.5 * a * b))
        for a in grid
        for b in grid
    ]
    return pd.DataFrame(rows, columns=["w1", "w2", "loss"]).assign(expert1=1, expert2=4)


def _dicts(training_seeds, seeds, n_ranges, second, merge) -> dict[str, dict]:
    parameters = {
        "dataset": "digits", "n_ranges": n_ranges, "merge_weights": merge, "confidence": 0.95,
        "seeds": list(training_seeds), "second_features": "digits-b" if second else "",
        "features": "digits-a", "sampling_seeds": list(seeds),
        "primary_decoupling": ["merged - all_scaled"],
        "primary_merging": ["merged - averaged", "merged - routed"], "loss_draws": 8,
        "num_train_timesteps": 1000, "test_images": 300, "search_images": 297,
        "search_samples": 1500, "pretrained": "",
    }  # fmt: skip
    halves = {"features": "digits-a", "n_half": 8000, "repeats": 8}
    ranking = [{"steps": s, "fid": 2 / s, "fid_second": 1.6 / s} for s in (5, 10, 20)]
    return {
        "real": {"inception_score": 9.7, "fid_halves": 0.26, "pixel_halves": 0.09}
        | {"kid_halves": -0.0003, "n_halves": 600, "n": 1200, "features": "digits-a"},
        "acceptance": {"halves": {**halves, "relative_difference_rms": 0.062}, "ranking": ranking}
        | {"same_ranking": True if second else None, "accepted": True},
        "run": {"experiment": "synthetic", "parameters": parameters, "commit": "", "versions": {}}
        | {"device": "cpu", "cpu_threads": 1},
    }


def write_sweep(
    folder: Path,
    name: str = "techniques",
    arms: tuple[str, ...] = ("routed", "merged"),
    beside: tuple[str, ...] = ("pretrained",),
    cells: dict[str, float | None] | None = None,
    fid: dict[str, float] | None = None,
    against: str | None = None,
) -> Path:
    """Write the records of a sweep into ``folder/sweeps``.

    ``cells`` gives the paper's number of each; ``fid`` overrides means of single cells; cells are
    compared with ``against``, by default the first.
    """
    rng = np.random.default_rng(1)
    cells = cells or {"N=1, none": 4.40, "N=1, CL": None, "N=8, PS": 4.32, "N=8, PS + CL": 4.27}
    rows = [("base", arm, FID[arm]) for arm in beside]
    for cell in cells:
        rows += [(cell, arm, (fid or {}).get(cell, rng.uniform(0.4, 0.6))) for arm in arms]
    common = rng.normal(0, 0.06, 5)
    metrics = [
        {"cell": cell, "arm": arm, "training_seed": 0, "seed": s, "n": 2000, "steps": 20}
        | {"features": "digits-a", "fid": mean + common[s] + rng.normal(0, 0.01)}
        for cell, arm, mean in rows
        for s in range(5)
    ]
    found = {"weights": [0.3, 0.5], "search_losses": 151, "search_images": 18000}
    none = {"weights": None, "search_losses": 0, "search_images": 0}
    results = {arm: found if arm == "merged" else none for arm in arms}
    document = {
        "sweep": name, "title": f"the sweep {name}", "axis": f"the axis of {name}",
        "base": "params/digits.yaml", "against": [against or next(iter(cells))], "note": "A note.",
        "arms": {arm: known.ARMS[arm].title for arm in arms},
        "beside": {arm: ARMS[arm].title for arm in beside},
        "cells": [
            {"cell": cell, "set": {}, "training_steps": 8000, "paper": paper, "results": results}
            for cell, paper in cells.items()
        ],
        "parameters": {
            "dataset": "digits", "confidence": 0.95, "n_ranges": 4, "finetune_steps": 1000
        },
    }  # fmt: skip
    (folder / "sweeps").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(metrics).to_csv(folder / "sweeps" / f"{name}.csv", index=False)
    (folder / "sweeps" / f"{name}.json").write_text(json.dumps(document))
    return folder
