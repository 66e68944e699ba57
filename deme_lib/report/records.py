"""Records to DataFrames: one reader, strict, without weights or torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from deme_lib.errors import Explained

DEFAULT = "default"
"""The cell of an experiment that has one cell, and of the pretrained model in any."""

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
"""CSVs that must be there, with one row per training seed, row of the table and these columns."""

MEASURES = COLUMNS["metrics"].split()[8:]


class RecordsError(Explained, ValueError):
    """Records that are missing, incomplete, or of another experiment."""


@dataclass(frozen=True)
class Records:
    """What an experiment recorded: a DataFrame per CSV (COLUMNS), empty where that is absent.

    ``metrics``, ``arms`` and ``losses`` also have the column ``row``, the name of a row of the
    table: "arm" in the cell "default", otherwise "cell / arm".
    """

    run: dict
    samples: dict[str, np.ndarray]  # row -> [16, C, H, W] uint8; also "real", training images
    metrics: pd.DataFrame
    arms: pd.DataFrame
    losses: pd.DataFrame
    floor: pd.DataFrame
    history: pd.DataFrame
    search: pd.DataFrame
    gradients: pd.DataFrame
    activations: pd.DataFrame
    landscape: pd.DataFrame
    task_vectors: pd.DataFrame
    plane: pd.DataFrame
    timing: pd.DataFrame

    @property
    def parameters(self) -> dict:
        return self.run["parameters"]

    @property
    def base(self) -> str:
        """The row to which every row's difference is taken."""
        return self.parameters["base"]

    @property
    def training_seeds(self) -> list[int]:
        return sorted(self.metrics["training_seed"].unique().tolist())

    @property
    def titles(self) -> dict[str, str]:
        """Row -> title as printed, in the order of the table."""
        first = self.arms.drop_duplicates("row")
        return {r.row: label(r.cell, r.title) for r in first.itertuples()}

    @property
    def single_cell(self) -> bool:
        return self.arms["cell"].nunique() == 1

    def of(self, measure: str) -> pd.DataFrame:
        """[training seeds, rows]: a measure, averaged over sampling seeds."""
        values = self.metrics.groupby(["training_seed", "row"])[measure]
        return values.agg(lambda x: x.mean(skipna=False)).unstack()[list(self.titles)]

    def floor_of(self, measure: str) -> float:
        """What fresh real images score, on average over draws; NaN where that is not known."""
        return float(self.floor[measure].mean()) if measure in self.floor else np.nan


def label(cell: str, arm: str) -> str:
    return arm if cell == DEFAULT else f"{cell} / {arm}"


def read(folder: Path) -> Records:
    """Read ``figures/<experiment>/records``.

    Raises:
        RecordsError: a file, a column or a row is missing, or one too many.
    """
    folder = Path(folder)
    frames = {name: _frame(folder / f"{name}.csv") for name in COLUMNS}
    run = json.loads(_there(folder / "run.json").read_text())
    samples = folder / "samples.safetensors"
    found = Records(run, load_file(samples) if samples.is_file() else {}, **frames)
    seeds = sorted(map(int, run["trainings"]))
    for name, keys in KEYS.items():
        _check_complete(folder / f"{name}.csv", frames[name], seeds, list(found.titles), keys)
    if found.base not in found.titles:
        raise RecordsError(
            f"{folder}: no row {found.base!r}, which the parameter `base` names; "
            f"there are {', '.join(found.titles)}"
        )
    return found


def _there(path: Path) -> Path:
    if not path.is_file():
        raise RecordsError(
            f"{path} is missing: run notebooks/05_evaluation.ipynb with the parameter file of "
            "this experiment, which collects it"
        )
    return path


def _frame(path: Path) -> pd.DataFrame:
    columns = COLUMNS[path.stem].split()
    if path.stem not in KEYS and not path.is_file():
        return pd.DataFrame(columns=columns)
    texts = {"cell": str, "weights": str}
    frame = pd.read_csv(_there(path), dtype=texts, keep_default_na=False, na_values=[""])
    if odd := sorted(set(columns) ^ set(frame)):
        raise RecordsError(
            f"{path}: {', '.join(odd)}: columns that are missing, or unknown; these are records "
            "of another version: collect them again"
        )
    if path.stem in KEYS:
        frame["row"] = [label(*x) for x in zip(frame["cell"], frame["arm"], strict=True)]
    return frame


def _check_complete(path: Path, frame: pd.DataFrame, seeds: list, rows: list, keys: list) -> None:
    """Exactly one row per training seed, row of the table, and value of every key."""
    wanted = pd.MultiIndex.from_product([seeds, rows, *(frame[key].unique() for key in keys)])
    found = pd.MultiIndex.from_frame(frame[["training_seed", "row", *keys]])
    odd = [*wanted.difference(found), *found.difference(wanted), *found[found.duplicated()]]
    if odd:
        raise RecordsError(
            f"{path}: needs exactly one row per {', '.join(['training seed, arm', *keys])}; "
            f"missing or too many: {', '.join(map(str, odd[:3]))}{' …' * (len(odd) > 3)}; "
            "collect the records again"
        )
