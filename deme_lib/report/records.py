"""Records to DataFrames: one reader, strict, without weights or torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from deme_lib.errors import Explained

QUANTILES = ("q05", "q25", "median", "q75", "q95")
COLUMNS = {
    "metrics": "training_seed cell arm seed n features steps reference fid fid_second fid_train "
    "pixel kid inception_score precision recall",
    "arms": "training_seed cell arm title parameters calls_per_image training_steps weights",
    "losses": "training_seed cell arm bin_start bin_stop loss",
    "floor": "draw n fid fid_second pixel kid inception_score",
    "history": "training_seed cell run step learning_rate held_out_loss train_loss",
    "search": "training_seed cell trial weights fid chosen",
    "gradients": "training_seed model draw n timestep1 timestep2 cosine",
    "activations": "training_seed range n block dimension count "
    f"{' '.join(QUANTILES)} share share_at_random",
    "landscape": "training_seed range start stop a b loss",
    "task_vectors": f"training_seed range block {' '.join(QUANTILES)}",
    "plane": "training_seed w1 w2 expert1 expert2 loss",
    "timing": "training_seed artefact seconds device",
}
"""CSV -> its columns."""

KEYS = {"metrics": ["seed"], "arms": [], "losses": ["bin_start"]}
"""CSVs that must be there: one row per training seed, row of the table, and value of these."""

MEASURES = COLUMNS["metrics"].split()[8:]


class RecordsError(Explained, ValueError):
    """Records that are missing, incomplete, or of another experiment."""


@dataclass(frozen=True)
class Records:
    """What an experiment recorded; every CSV is an attribute (``records.metrics``), maybe empty.

    ``metrics``, ``arms`` and ``losses`` also have the column ``row``, the name of a row of the
    table: "arm" in the cell "default", otherwise "cell / arm".
    """

    run: dict
    frames: dict[str, pd.DataFrame]
    samples: dict[str, np.ndarray]  # row -> [16, C, H, W] uint8; also "real", training images

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name not in COLUMNS:
            raise AttributeError(name)
        return self.frames[name]

    @property
    def parameters(self) -> dict:
        return self.run["parameters"]

    @property
    def base(self) -> str:
        """The row to which every row's difference is taken."""
        return self.parameters["base"]

    @property
    def training_seeds(self) -> list[int]:
        return sorted(map(int, self.run["trainings"]))

    @property
    def titles(self) -> dict[str, str]:
        """Row -> title as printed, in the order of the table."""
        first = self.arms.drop_duplicates("row")
        return {r.row: label(r.cell, r.title) for r in first.itertuples()}

    def of(self, measure: str) -> pd.DataFrame:
        """[training seeds, rows]: a measure, averaged over sampling seeds."""
        values = self.metrics.groupby(["training_seed", "row"])[measure]
        return values.agg(lambda x: x.mean(skipna=False)).unstack()[list(self.titles)]

    def floor_of(self, measure: str) -> float:
        """What fresh real images score, on average over draws; NaN where that is not known."""
        return float(self.floor[measure].mean()) if measure in self.floor else np.nan


def label(cell: str, name: str) -> str:
    return name if cell == "default" else f"{cell} / {name}"


def read(folder: Path) -> Records:
    """Read ``figures/<experiment>/records``: of the training seeds that run.json names.

    Raises:
        RecordsError: a file, a column or a row is missing, or one too many.
    """
    run = json.loads(_there(folder / "run.json").read_text())
    frames = {name: _frame(folder / f"{name}.csv") for name in COLUMNS}
    for name, frame in frames.items():
        if "training_seed" in frame:
            counts = frame["training_seed"].astype(str).isin(run["trainings"])
            frames[name] = frame[counts].reset_index(drop=True)
    samples = folder / "samples.safetensors"
    found = Records(run, frames, load_file(samples) if samples.is_file() else {})
    for name, keys in KEYS.items():
        values = [
            found.training_seeds,
            list(found.titles),
            *(frames[name][k].unique() for k in keys),
        ]
        wanted = pd.MultiIndex.from_product(values)
        have = pd.MultiIndex.from_frame(frames[name][["training_seed", "row", *keys]])
        if odd := [*wanted.difference(have), *have[have.duplicated()]]:
            raise RecordsError(
                f"{folder / name}.csv: missing or there twice: {odd[:3]}; each training seed needs "
                f"one row per {', '.join(['arm', *keys])}: collect the records again"
            )
    if not {"pretrained", found.base} <= found.titles.keys():
        rows = ", ".join(found.titles)
        raise RecordsError(f"{folder} needs the rows pretrained and {found.base!r}; it has {rows}")
    return found


def _there(path: Path) -> Path:
    if not path.is_file():
        raise RecordsError(
            f"{path} is missing: notebooks/05_evaluation.ipynb, run with the parameter file of the "
            "experiment, writes it"
        )
    return path


def _frame(path: Path) -> pd.DataFrame:
    name, columns = path.stem, COLUMNS[path.stem].split()
    if name not in KEYS and not path.is_file():
        return pd.DataFrame(columns=columns)
    texts = {"cell": str, "weights": str}
    frame = pd.read_csv(_there(path), dtype=texts, keep_default_na=False, na_values=[""])
    if odd := sorted(set(columns) ^ set(frame)):
        raise RecordsError(f"{path} lacks columns, or has unknown ones: {odd}; collect it again")
    if name in KEYS:
        frame["row"] = [label(*x) for x in zip(frame["cell"], frame["arm"], strict=True)]
    return frame
