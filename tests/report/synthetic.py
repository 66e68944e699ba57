"""Records of an experiment that never ran: every arm and file, numbers drawn from a seed."""

import json
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from deme_lib import ROOT
from deme_lib.experiment.arms import arm_of

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
    **{f"{arm}@0": 0.39 for arm in ("all_plain", "soup", "plain_routed", "deme_merged")},
    **{f"{arm}@0.98": 0.38 for arm in ("all_plain", "soup", "plain_routed", "deme_merged")},
}
"""Every arm of the long evidence."""

FLOOR = 0.038
TWO = ("pretrained", "deme_routed", "deme_merged", "averaged", "merged_searched")
LOOKS = ("history", "gradients", "activations", "landscape", "task_vectors", "plane", "neighbours")
"""Records of the first training seed; those of ``fashion8`` are taken."""
SEVERAL = ("soup", "deme_merged", "plain_merged", "soup_same", "all_checkpoints")
CHOSEN = {"merged_searched": [0.5, 0.1, 0.3, 1.0], "soup_searched": [0.3] * 4, "all_scaled": [0.7]}


def write(
    folder: Path,
    *,
    training_seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7),
    seeds: tuple[int, ...] = (0, 1),
    fid: dict[str, float] = FID,
    n_ranges: int = 4,
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
            tables |= {"floor": _floor(rng), "search": _search()}
        if optional and seed == training_seeds[0]:
            tables |= {name: _committed(name, n_ranges) for name in LOOKS}
        _save(folder / f"seed-{seed}", tables, seeds, n_ranges)
    if optional:
        first, shape = folder / f"seed-{training_seeds[0]}", (16, channels, 8, 8)
        images = {arm: rng.integers(0, 256, shape, dtype=np.uint8) for arm in (*fid, "real")}
        save_file(images, first / "samples.safetensors")
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
        weights = [1 / n_ranges] * n_ranges if arm in SEVERAL else [1.0]
        weights = json.dumps(CHOSEN.get(arm, weights)) if "@" not in arm and many == 1 else ""
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


def _search() -> pd.DataFrame:
    """No merge, 1/N and the choice, whose score is luckier by 0.02; one scored by loss alone."""
    rows = []
    of = {"merge": "deme_merged", "soup": "soup", "scale": "all_plain"}
    for (name, plain), arm in zip(of.items(), CHOSEN, strict=True):
        n = len(CHOSEN[arm])
        for i, w in enumerate(([0.0] * n, [1 / n] * n, CHOSEN[arm], [1.5] * n)):
            fid = LONG[("pretrained", plain, arm)[i]] + 0.03 - 0.02 * (i == 2) if i < 3 else np.nan
            row = {"search": name, "weights": json.dumps(w), "loss": 0.0487 - 0.001 * i}
            rows.append(row | {"fid": fid, "se": 0.01, "chosen": int(i == 2)})
    return pd.DataFrame(rows)


def _committed(name, n_ranges) -> pd.DataFrame:
    found = pd.read_csv(ROOT / "figures" / "fashion8" / "records" / "seed-0" / f"{name}.csv")
    return found[found["range"] <= n_ranges] if "range" in found else found
