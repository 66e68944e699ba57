"""Records to tables: reads the folder that the evaluation wrote; needs no weights, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

ABLATIONS = {1: "remove decoupling", 2: "replace merging by an ensemble"}


DISTANCES = ["fid", "fid_second", "pixel", "kid"]
"""Distances compared in pairs; lower is better for each."""


COMPARED = [*DISTANCES, "inception_score"]
"""Everything compared in pairs; of the inception score, higher is better."""


COVERS = "cover sampling noise only: not training, the search, the data split or the classifier"
"""What spreads and intervals over sampling seeds cover, as said wherever one is printed."""


COLUMNS = {
    "metrics": "arm seed n features steps fid fid_second pixel kid inception_score "
    "precision recall",
    "arms": "arm title ablation1 ablation2 parameters calls_per_image training_steps "
    "search_losses search_images weights test_loss",
    "losses": "arm bin_start bin_stop loss",
    "neighbours": "arm n q05 q25 median q75 q95",
    "search": "search weights loss fid chosen",
    "history": "run step learning_rate held_out_loss",
    "gradients": "model draw n timestep1 timestep2 cosine",
    "activations": "range block dimension n count q05 q25 median q75 q95 share share_by_chance",
    "landscape": "range start stop a b loss",
    "task_vectors": "range block q05 q25 median q75 q95",
    "plane": "w1 w2 loss expert1 expert2",
}
"""Record -> the columns it must have."""


@dataclass(frozen=True)
class Records:
    """Everything one experiment recorded: a field per file, columns as in ``COLUMNS``."""

    metrics: pd.DataFrame
    arms: pd.DataFrame
    losses: pd.DataFrame
    neighbours: pd.DataFrame
    search: pd.DataFrame
    history: pd.DataFrame
    gradients: pd.DataFrame
    activations: pd.DataFrame
    landscape: pd.DataFrame
    task_vectors: pd.DataFrame
    plane: pd.DataFrame
    real: dict
    acceptance: dict
    run: dict
    samples: dict[str, np.ndarray]  # arm -> [16, C, H, W] uint8; also "real"

    @property
    def parameters(self) -> dict:
        """The parameters of the experiment."""
        return self.run["parameters"]

    @property
    def titles(self) -> dict[str, str]:
        """Arm -> title as printed; "DeMe merged" says where its weights come from."""
        titles = dict(zip(self.arms["arm"], self.arms["title"], strict=True))
        source = self.parameters["merge_weights"]
        word = {"search": "searched", "uniform": "uniform"}.get(str(source), "weights given")
        return {arm: f"{t} ({word})" if arm == "merged" else t for arm, t in titles.items()}

    def arms_of(self, number: int) -> list[str]:
        """Names of the arms of an ablation, in the order of the table."""
        return list(self.arms.loc[self.arms[f"ablation{number}"] == 1, "arm"])


def read(records: Path) -> Records:
    """Read a folder of records.

    Raises:
        FileNotFoundError: a record is missing; says which, and what to run.
        ValueError: a record lacks a column, or its arms cannot be compared.
    """
    records = Path(records)
    frames = {name: _read_csv(records, name) for name in COLUMNS}
    dicts = {
        name: json.loads(_existing(records, f"{name}.json").read_text())
        for name in ("real", "acceptance", "run")
    }
    samples = load_file(_existing(records, "samples.safetensors"))
    _check_comparable(frames["metrics"], frames["arms"])
    return Records(**frames, **dicts, samples=samples)


def _existing(records: Path, name: str) -> Path:
    if not (records / name).is_file():
        raise FileNotFoundError(
            f"no record {records / name}; it is written by\n"
            "  papermill notebooks/05_evaluation.ipynb runs/05_evaluation.ipynb "
            "-f params/<experiment>.yaml"
        )
    return records / name


def _read_csv(records: Path, name: str) -> pd.DataFrame:
    path = _existing(records, f"{name}.csv")
    frame = pd.read_csv(path)
    if missing := [c for c in COLUMNS[name].split() if c not in frame]:
        raise ValueError(f"{path} lacks the columns {missing}")
    return frame


def _check_comparable(metrics: pd.DataFrame, arms: pd.DataFrame) -> None:
    """Distances are compared at one n, one feature space, one sampler, and the same noise."""
    for column in ("n", "features", "steps"):
        if metrics[column].nunique() != 1:
            found = metrics[column].unique().tolist()
            raise ValueError(f"metrics.csv mixes {column} {found}: such rows are not comparable")
    seeds = set(metrics["seed"])
    for arm in arms["arm"]:
        if sorted(metrics.loc[metrics["arm"] == arm, "seed"]) != sorted(seeds):
            raise ValueError(f"metrics.csv: {arm} needs exactly one row per seed {sorted(seeds)}")


def setting(records: Records) -> str:
    """One line: data, n, features, sampler, seeds."""
    m = records.metrics.iloc[0]
    seeds = sorted(records.metrics["seed"].unique().tolist())
    return (
        f"{records.parameters['dataset']}: n = {m['n']:,} images per arm and sampling seed, "
        f"features {m['features']}, DDIM {m['steps']} steps, "
        f"{len(seeds)} sampling seeds ({', '.join(map(str, seeds))}), one training seed"
    )


def caption(records: Records) -> str:
    """What the numbers of an ablation table are."""
    classes = "IS is of this classifier's classes (at most 10). "
    if records.metrics["features"].iloc[0] == "inception":
        classes = ""
    return (
        f"{setting(records)}: all numbers are for these weights. FID and pixel "
        "distance, precision and recall are to the training images, KID to the test images, the "
        "loss is on test images; FID, pixel distance and KID are mean ± sd, IS, precision and "
        "recall are means. ± sd is over sampling seeds and shared between arms (same noise): "
        f"compare arms by the paired differences, not by it. Both {COVERS}. "
        "KID is unbiased and may be negative; of real images it compares two halves of the "
        f"training images. {classes}"
        "Training steps count from the pretrained model. The row of real images compares two "
        f"halves at n = {records.real['n_halves']:,}; distances at another n are not comparable. "
        f"The IS in that row is of all {records.real['n']:,} training images, which the "
        "classifier knows."
    )


def ablation(records: Records, number: int) -> pd.DataFrame:
    """The table of ablation 1 or 2: a row per arm and a last one for real images, plain numbers.

    ``*_mean`` and ``*_sd`` (ddof 1) are over sampling seeds; KID as it is, not times 1000.
    """
    measures = [*COMPARED, "precision", "recall"]
    by_arm = records.metrics.groupby("arm")
    table = records.arms.set_index("arm").loc[records.arms_of(number)]
    table = table.drop(columns=["ablation1", "ablation2"]).assign(n=by_arm["n"].first())
    table["title"] = pd.Series(records.titles)
    for measure in measures:
        table[f"{measure}_mean"] = by_arm[measure].mean()
        table[f"{measure}_sd"] = by_arm[measure].std(ddof=1)
    real = records.real
    halves = {f"{m}_mean": real.get(f"{m}_halves") for m in ("fid", "pixel", "kid")}
    last = {
        "title": f"real images, halves (n = {real['n_halves']:,}, not comparable)",
        "n": real["n_halves"],
        **halves,
    }
    last["inception_score_mean"] = real["inception_score"]
    rows = [*table.reset_index().to_dict("records"), {"arm": "real", **last}]
    counts = ["n", "parameters", "training_steps", "search_losses", "search_images"]
    return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64"))


def plus_minus(mean: float, spread: float, signed: bool = False) -> str:
    """``mean ± spread`` with the spread's first two digits; a true minus sign."""
    digits = 3
    if spread > 0:
        digits = int(np.clip(1 - np.floor(np.log10(spread)), 0, 8))
    sign = "+" if signed else ""
    return f"{mean:{sign}.{digits}f} ± {spread:.{digits}f}".replace("-", "−")


def number(x: float) -> str:
    """Three decimals below 10 and two above; a dash where nothing is known."""
    return "–" if pd.isna(x) else f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}"


def flatness(history: pd.DataFrame) -> str:
    """How the held-out loss of pretraining ended, in words: last quarter and minimum."""
    run = history[history["run"] == "baseline"]
    if len(run) < 5:
        return "the pretrained model was loaded: its training is not ours to judge"
    last = run.iloc[-1]
    before = run[run["step"] <= 0.75 * last["step"]].iloc[-1]
    lowest = run.loc[run["held_out_loss"].idxmin()]
    change, since = (last["held_out_loss"] / x["held_out_loss"] - 1 for x in (before, lowest))
    return (
        f"held-out loss {before['held_out_loss']:.5f} after {before['step']:,} steps and "
        f"{last['held_out_loss']:.5f} after {last['step']:,}: {change:+.2%} over the last quarter; "
        f"minimum {lowest['held_out_loss']:.5f} after {lowest['step']:,} steps, {since:+.2%} from "
        "it to the end"
    )
