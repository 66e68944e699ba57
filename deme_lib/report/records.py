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
    "metrics": "training_seed cell arm seed n features sampler steps reference fid fid_second "
    "fid_train pixel kid inception_score precision recall",
    "arms": "training_seed cell arm title parameters calls_per_image training_steps weights",
    "losses": "training_seed cell arm bin_start bin_stop loss",
    "floor": "draw n fid fid_second pixel kid inception_score",
    "history": "training_seed cell run step learning_rate held_out_loss train_loss",
    "gradients": "training_seed model draw n timestep1 timestep2 cosine",
    "activations": "training_seed range n block dimension count "
    f"{' '.join(QUANTILES)} share share_at_random",
    "landscape": "training_seed range start stop a b loss",
    "task_vectors": f"training_seed range block {' '.join(QUANTILES)}",
    "plane": "training_seed w1 w2 expert1 expert2 loss",
}
"""CSV -> its columns. Others (timing, cosines, search) lie beside them and are not drawn."""

KEYS = {"metrics": ["seed"], "arms": [], "losses": ["bin_start"]}
"""CSV -> what it has one row of, for each training seed and row of the table."""

NEEDED = (*KEYS, "floor")
"""CSVs that must be there, as the other ones need not."""

MEASURES = COLUMNS["metrics"].split()[9:]


class RecordsError(Explained, ValueError):
    """Records that are missing, incomplete, or of another experiment."""


@dataclass(frozen=True)
class Records:
    """What an experiment recorded.

    ``metrics``, ``arms`` and ``losses`` also have the column ``row``, the name of a row of the
    table: "arm" in the cell "default", otherwise "cell / arm".
    """

    run: dict
    metrics: pd.DataFrame
    arms: pd.DataFrame
    losses: pd.DataFrame
    floor: pd.DataFrame
    looks: dict[str, pd.DataFrame]  # further CSVs that are there, of the first training seed
    samples: dict[str, np.ndarray]  # row -> [16, C, H, W] uint8; also "real", training images

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
        """[training seeds, rows]: a measure, averaged over sampling seeds, or "test_loss"."""
        loss = measure == "test_loss"
        frame, column = (self.losses, "loss") if loss else (self.metrics, measure)
        values = frame.groupby(["training_seed", "row"])[column]
        return values.mean().unstack()[list(self.titles)]

    def floor_of(self, measure: str) -> float:
        """What fresh real images score, on average over draws; NaN where that is not known."""
        return self.floor[measure].mean() if measure in self.floor else np.nan


def label(cell: str, name: str) -> str:
    return name if cell == "default" else f"{cell} / {name}"


def read(folder: Path) -> Records:
    """Read ``figures/<experiment>/records``: of the training seeds that run.json names.

    Raises:
        RecordsError: a file, a column or a row is missing, or one too many.
    """
    for name in ("run.json", *(f"{kind}.csv" for kind in NEEDED)):
        if not (folder / name).is_file():
            raise RecordsError(
                f"{folder / name} is missing: notebooks/05_evaluation.ipynb, run with the "
                "parameter file of the experiment, writes it"
            )
    try:
        run = json.loads((folder / "run.json").read_text())
    except ValueError as error:
        raise RecordsError(f"{folder / 'run.json'} is damaged ({error}): restore it") from error
    if not run["trainings"]:
        raise RecordsError(f"{folder / 'run.json'} names no training: collect them again")
    paths = {kind: folder / f"{kind}.csv" for kind in COLUMNS}
    frames = {kind: _frame(path, run) for kind, path in paths.items() if path.is_file()}
    needed = {kind: frames.pop(kind) for kind in NEEDED}
    first = min(map(int, run["trainings"]))
    looks = {kind: frame[frame["training_seed"] == first] for kind, frame in frames.items()}
    looks = {kind: frame for kind, frame in looks.items() if len(frame)}
    samples = folder / "samples.safetensors"
    images = load_file(samples) if samples.is_file() else {}
    found = Records(run, **needed, looks=looks, samples=images)
    for kind, keys in KEYS.items():
        frame, there = needed[kind], [found.training_seeds, list(found.titles)]
        wanted = pd.MultiIndex.from_product([*there, *(frame[key].unique() for key in keys)])
        have = pd.MultiIndex.from_frame(frame[["training_seed", "row", *keys]])
        if odd := [*wanted.difference(have), *have[have.duplicated()]]:
            raise RecordsError(
                f"{paths[kind]}: missing or there twice: {odd[:3]}; each training seed needs "
                f"one row per {', '.join(['arm', *keys])}: collect the records again"
            )
    return found


def _frame(path: Path, run: dict) -> pd.DataFrame:
    texts = {"cell": str, "weights": str}
    frame = pd.read_csv(path, dtype=texts, keep_default_na=False, na_values=[""])
    if odd := sorted(set(COLUMNS[path.stem].split()) ^ set(frame)):
        raise RecordsError(f"{path} lacks columns, or has unknown ones: {odd}; collect it again")
    if "arm" in frame:
        frame["row"] = [label(*x) for x in zip(frame["cell"], frame["arm"], strict=True)]
    if "training_seed" in frame:
        frame = frame[frame["training_seed"].astype(str).isin(run["trainings"])]
    return frame
