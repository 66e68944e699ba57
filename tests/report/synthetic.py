"""Records of an experiment that never ran: every arm and file, numbers drawn from a seed."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from deme_lib.experiment.arms import arm_of
from deme_lib.report.records import QUANTILES

FID = {
    "pretrained": 0.375,
    "all_plain": 0.370,
    "soup": 0.348,
    "plain_routed": 0.311,
    "deme_routed": 0.341,
    "deme_merged": 0.374,
    "averaged": 0.379,
}
"""Arm -> mean FID, as the pilot found them."""

LONG = {
    **FID,
    "plain_merged": 1.4,
    "all_same": 0.365,
    "soup_same": 0.350,
    "all_checkpoints": 0.352,
    "merged_searched": 0.360,
    "soup_searched": 0.347,
    "all_scaled": 0.368,
    "soup@0": 0.37,
    "soup@0.98": 0.355,
    "deme_merged@0": 0.39,
    "deme_merged@0.98": 0.38,
}
FLOOR = 0.038
TWO = ("pretrained", "deme_routed", "deme_merged", "averaged", "merged_searched")


def write(
    folder: Path,
    *,
    training_seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7),
    seeds: tuple[int, ...] = (0, 1),
    fid: dict[str, float] = FID,
    n_ranges: int = 4,
    points: int = 9,
    bins: int = 8,
    channels: int = 1,
    optional: bool = True,
) -> Path:
    """Write the records of a synthetic experiment, and return ``folder``.

    ``fid`` names the arms and their means; without ``optional`` only required files are written.
    """
    rng = np.random.default_rng(0)
    for seed in training_seeds:
        tables = {"metrics": metrics(rng, fid, seeds), "arms": arms(fid, n_ranges)}
        if optional:
            tables |= {"losses": _losses(rng, fid, bins), "gate": _gate(rng, n_ranges)}
            tables["floor"] = _floor(rng)
        if optional and seed == training_seeds[0]:
            tables |= _of_first(rng, fid, n_ranges, points, bins)
        _save(folder / f"seed-{seed}", tables, seeds, n_ranges)
    if optional:
        first, shape = folder / f"seed-{training_seeds[0]}", (16, channels, 8, 8)
        images = {arm: rng.integers(0, 256, shape, dtype=np.uint8) for arm in (*fid, "real")}
        save_file(images, first / "samples.safetensors")
        (first / "acceptance.json").write_text('{"real": {"inception_score": 4.08}}')
    return folder


def write_sweep(
    folder: Path,
    *,
    cells: dict[str, float | None] | None = None,
    arms_: tuple[str, ...] = ("deme_routed", "deme_merged"),
    against: tuple[str, ...] = ("all_plain",),
) -> Path:
    """Write ``folder/records/`` and ``folder/sweep.json``; ``cells`` has the paper's number."""
    rng, seeds = np.random.default_rng(1), (0, 1, 2, 3, 4)
    cells = cells or {"N=1, none": 4.40, "N=1, CL": None, "N=8, PS": 4.32, "N=8, PS + CL": 4.27}
    tables = {"metrics": [], "arms": []}
    named = {"base": ("pretrained", "all_plain")} | dict.fromkeys(cells, arms_)
    for cell, names in named.items():
        fid = {arm: FID[arm] for arm in names}
        tables["metrics"].append(metrics(rng, fid, seeds).assign(cell=cell))
        tables["arms"].append(arms(fid, 4).assign(cell=cell))
    tables = {name: pd.concat(parts) for name, parts in tables.items()}
    _save(folder / "records" / "seed-0", tables, seeds, 4)
    document = {"axis": "the axis", "note": "A note.", "against": against}
    document["cells"] = [{"cell": c, "paper": paper, "against": []} for c, paper in cells.items()]
    (folder / "sweep.json").write_text(json.dumps(document))
    return folder


def _save(out: Path, tables: dict[str, pd.DataFrame], seeds: tuple[int, ...], n_ranges: int):
    out.mkdir(parents=True)
    seed = int(out.name.removeprefix("seed-"))
    for name, table in tables.items():
        table.assign(training_seed=seed).to_csv(out / f"{name}.csv", index=False)
    (out / "run.json").write_text(json.dumps(run(seed, seeds, n_ranges)))


def run(seed: int, seeds: tuple[int, ...], n_ranges: int) -> dict:
    parameters = {
        "experiment": "synthetic", "dataset": "fashion8", "n_ranges": n_ranges, "margin": 0.05,
        "confidence": 0.95, "seeds": [seed], "sampling_seeds": list(seeds), "threads": 1,
        "num_train_timesteps": 1000, "test_images": 10000, "search_images": 10000,
        "loss_images": 2000,
        "features": "fashion8-a", "ema_decay": 0.995,
        "primary_decoupling": [
            "plain_routed - all_plain", "deme_merged - all_plain", "deme_merged - soup"
        ],
        "primary_merging": ["deme_merged - averaged", "deme_merged - deme_routed"],
    }  # fmt: skip
    return {"experiment": "synthetic", "parameters": parameters, "commit": "", "device": "cpu"}


def metrics(rng, fid: dict[str, float], seeds: tuple[int, ...]) -> pd.DataFrame:
    """Common noise of a training seed and of each stream, and an arm's own."""
    common, noise = rng.normal(0, 0.02), 0.004
    streams = {seed: common + rng.normal(0, 0.01) for seed in seeds}
    rows = []
    for arm, mean in fid.items():
        own = rng.normal(0, noise)
        for seed in seeds:
            value = mean + streams[seed] + own + rng.normal(0, noise / 2)
            row = {"arm": arm, "seed": seed, "n": 5000, "features": "fashion8-a", "steps": 20}
            row |= {"fid": value, "reference": "test", "fid_second": 0.8 * value}
            row |= {"fid_train": 1.01 * value, "pixel": 0.3 * value, "kid": value / 500}
            row |= {"inception_score": 3.9 - value + rng.normal(0, 0.01)}
            rows.append(row | {"precision": 0.8, "recall": 0.7})
    return pd.DataFrame(rows)


def arms(fid: dict[str, float], n_ranges: int) -> pd.DataFrame:
    rows = []
    for arm in fid:
        many = n_ranges if "routed" in arm or arm == "averaged" else 1
        row = {"arm": arm, "title": arm_of(arm, (0, 0.98)).title}
        row["ablation1"] = int(arm != "averaged" and "@" not in arm)
        row |= {"ablation2": int(arm in TWO), "parameters": 40_000 * many}
        row |= {"calls_per_image": 20 * (n_ranges if arm == "averaged" else 1)}
        row |= {"training_steps": 0 if arm == "pretrained" else 1000 * n_ranges}
        searched = int("searched" in arm)
        row |= {"search_losses": 50 * searched, "search_images": 9000 * searched}
        weights = json.dumps([1 / n_ranges] * n_ranges) if "merged" in arm or "soup" in arm else ""
        rows.append(row | {"weights": weights, "test_loss": 0.0487})
    return pd.DataFrame(rows)


def _losses(rng, fid, bins) -> pd.DataFrame:
    edges = np.linspace(0, 1000, bins + 1).astype(int)
    rows = [
        {"arm": arm, "bin_start": a, "bin_stop": b}
        | {"loss": 0.3 * np.exp(-a / 150) * (min(x, 0.5) / 0.375) ** 0.1 * rng.uniform(0.99, 1.01)}
        for arm, x in fid.items()
        for a, b in pairwise(edges)
    ]
    return pd.DataFrame(rows)


def _gate(rng, n_ranges) -> pd.DataFrame:
    gains = {"pretrained": 0.006, "all_plain": 0, "plain_routed": -0.01, "deme_routed": -0.004}
    rows = []
    for (model, gain), k in product(gains.items(), range(1, n_ranges + 1)):
        loss = 0.1575 * 0.2 ** (k - 1)
        d = gain * k**2 * loss * rng.normal(1, 0.1)
        row = {"model": model, "range": k, "start": (k - 1) * 1000 // n_ranges}
        row |= {"stop": k * 1000 // n_ranges, "loss": loss + d, "difference": d}
        rows.append(row | {"se": 0.001 * loss * bool(gain), "images": 2000})
    return pd.DataFrame(rows)


def _floor(rng) -> pd.DataFrame:
    rows = [
        {"draw": i, "n": 5000, "fid": FLOOR + rng.normal(0, 0.002), "fid_second": 0.03}
        | {"pixel": 0.01, "kid": 1e-5, "inception_score": 4.05, "extrapolated": 0}
        for i in range(2)
    ]
    return pd.DataFrame(rows)


def _of_first(rng, fid, n_ranges, points, bins) -> dict[str, pd.DataFrame]:
    """What only the first training seed records."""
    return {
        "neighbours": _neighbours(rng, fid),
        "search": _search(rng, n_ranges),
        "history": _history(rng, n_ranges),
        "gradients": _gradients(rng, bins),
        "activations": _activations(rng, n_ranges),
        "landscape": _landscape(n_ranges),
        "task_vectors": _task_vectors(rng, n_ranges),
        "plane": _plane(points),
    }


def _neighbours(rng, fid) -> pd.DataFrame:
    names = ["test", *fid]
    values = [np.sort(rng.normal(2.1, 0.02) + np.array([-0.9, -0.3, 0, 0.3, 0.8])) for _ in names]
    table = pd.DataFrame(values, columns=list(QUANTILES))
    return pd.DataFrame({"arm": names, "n": [10000, *[5000] * len(fid)]}).join(table)


def _search(rng, n_ranges) -> pd.DataFrame:
    rows = []
    for name, i in product(("merge", "soup"), range(30)):
        w = [0.0] * n_ranges if i == 0 else rng.uniform(0, 1.5, n_ranges).round(2).tolist()
        loss = 0.0487 + 0.01 * np.square(w).mean() - 0.008 * np.mean(w)
        fid = 0.35 + 30 * (loss - 0.0487) + rng.normal(0, 0.02) if i < 12 else np.nan
        row = {"search": name, "weights": json.dumps(w), "loss": loss, "fid": fid}
        rows.append(row | {"se": 0.01 if i < 12 else np.nan})
    table = pd.DataFrame(rows)
    best = table.groupby("search")["fid"].idxmin()
    return table.assign(chosen=table.index.isin(best).astype(int))


def _history(rng, n_ranges) -> pd.DataFrame:
    rows, names = [], ["all-plain"]
    names += [
        f"{x}-{i + 1}of{n_ranges}" for x in ("soup", "plain", "deme") for i in range(n_ranges)
    ]
    for step in range(500, 20001, 500):
        rate = max(2e-4, 2e-3 * 0.5 * (1 + np.cos(np.pi * min(step / 16000, 1))))
        loss = 0.0487 + 0.4 * np.exp(-step / 900)
        rows.append(("baseline", step, rate, loss, loss + 0.0006 * rng.normal(1, 0.2)))
    for name in names:
        drop = rng.uniform(0.0005, 0.0015)
        for step in range(0, 4001 if name.startswith("all") else 1001, 200):
            rows.append((name, step, 2e-4, 0.0487 - drop * (1 - np.exp(-step / 800)), np.nan))
    columns = ["run", "step", "learning_rate", "held_out_loss", "train_loss"]
    return pd.DataFrame(rows, columns=columns)


def _gradients(rng, bins) -> pd.DataFrame:
    t = ((np.arange(bins) + 0.5) * 1000 / bins).astype(int)
    rows = [
        (model, draw, 256, a, b, 1.0 if a == b else 0.8 * np.exp(-abs(a - b) / 200) - 0.05)
        for model, draw, a, b in product(("pretrained", "merged"), range(3), t, t)
    ]
    return pd.DataFrame(rows, columns=["model", "draw", "n", "timestep1", "timestep2", "cosine"])


def _activations(rng, n_ranges) -> pd.DataFrame:
    rows = []
    for k, block in product(range(1, n_ranges + 1), ("down 1", "down 2", "mid", "up 1", "up 2")):
        for dimension, size in (("channel", 16), ("spatial", 64)):
            scale = rng.uniform(0.01, 0.02) * (2 if size == 16 else 1)
            spread = dict(zip(QUANTILES, scale * np.array([0.1, 0.5, 1, 1.7, 3]), strict=True))
            row = {"range": k, "block": block, "dimension": dimension, "n": 300, "count": size}
            rows.append(row | spread | {"share": 10 * scale, "share_at_random": 3 * scale})
    return pd.DataFrame(rows)


def _landscape(n_ranges) -> pd.DataFrame:
    """Bowls: of all timesteps around the centre, of the ranges beside it."""
    grid = np.linspace(-0.2, 0.2, 9).round(6)
    rows = []
    for k, a, b in product(range(n_ranges + 1), grid, grid):
        start, stop = ((k - 1) * 1000 // n_ranges, k * 1000 // n_ranges) if k else (0, 1000)
        loss = 0.08 + 10.0 ** (k - 1) * ((a - 0.05 * (k % 3)) ** 2 + b**2)
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
        (a, b, 0.0487 + 0.004 * ((a - 0.5) ** 2 + (b - 0.3) ** 2 + 0.5 * a * b))
        for a, b in product(grid, grid)
    ]
    return pd.DataFrame(rows, columns=["w1", "w2", "loss"]).assign(expert1=1, expert2=4)
