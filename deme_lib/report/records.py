"""Records to DataFrames: one reader for an experiment and for a sweep; no weights, no torch.

``records/`` has a folder per training seed, ``seed-<k>/``. A sweep's rows also name their ``cell``;
those of an experiment are given the cell of a sweep's base, so that both are one kind of table.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from deme_lib.experiment.arms import BASE
from deme_lib.experiment.schema import EXECUTION

QUANTILES = ("q05", "q25", "median", "q75", "q95")
COLUMNS = {
    "metrics": "arm seed n features steps fid reference fid_second fid_train pixel kid "
    "inception_score precision recall",
    "arms": "arm title ablation1 ablation2 parameters calls_per_image training_steps "
    "search_losses search_images weights test_loss",
    "losses": "arm bin_start bin_stop loss",
    "gate": "model range start stop loss difference se images",
    "floor": "draw n fid extrapolated",
    "history": "run step learning_rate held_out_loss train_loss",
    "gradients": "model draw n timestep1 timestep2 cosine",
    "activations": f"range block dimension n count {' '.join(QUANTILES)} share share_at_random",
    "landscape": "range start stop a b loss",
    "task_vectors": f"range block {' '.join(QUANTILES)}",
    "plane": "w1 w2 loss expert1 expert2",
    "neighbours": f"arm n {' '.join(QUANTILES)}",
    "search": "search weights loss fid se chosen",
}
"""Record -> the columns it has beside ``training_seed`` (and a sweep's ``cell``).

``floor`` has those of ``metrics`` too that could be measured on fresh real images.
"""

MEASURES = ["fid", "inception_score", "fid_second", "fid_train", "pixel", "kid"]
MEASURES += ["precision", "recall"]
REQUIRED = ("metrics.csv", "arms.csv", "run.json")
FREE = EXECUTION | {"seeds"}
"""Parameters in which the runs behind one table may differ."""


@dataclass(frozen=True)
class Records:
    """What an experiment or a sweep recorded: a DataFrame per CSV, empty where it is absent."""

    name: str
    frames: dict[str, pd.DataFrame]
    run: dict
    sweep: dict  # sweep.json; empty for an experiment
    samples: dict[str, np.ndarray]  # arm -> [16, C, H, W] uint8; also "real"

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name not in COLUMNS:
            raise AttributeError(name)
        return self.frames[name]

    @property
    def parameters(self) -> dict:
        return self.run["parameters"]

    @property
    def training_seeds(self) -> list[int]:
        return sorted(self.metrics["training_seed"].unique().tolist())

    @property
    def sampling_seeds(self) -> list[int]:
        return sorted(self.metrics["seed"].unique().tolist())

    @property
    def unit(self) -> str:
        """The column whose values intervals are over."""
        return "training_seed" if len(self.training_seeds) > 1 else "seed"

    @cached_property
    def by_unit(self) -> dict[str, pd.DataFrame]:
        """Measure -> [units, (cell, arm)], averaged within each unit."""
        grouped = self.metrics.groupby([self.unit, "cell", "arm"])[MEASURES].mean()
        return {name: grouped[name].unstack(["cell", "arm"]) for name in MEASURES}

    @property
    def titles(self) -> dict[str, str]:
        return dict(zip(self.arms["arm"], self.arms["title"], strict=True))

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(cell, arm) in the order of the table."""
        return list(self.arms[["cell", "arm"]].drop_duplicates().itertuples(index=False, name=None))

    def arms_of(self, ablation: int) -> list[str]:
        return list(self.arms.loc[self.arms[f"ablation{ablation}"] == 1, "arm"].unique())

    def floor(self, measure: str) -> float:
        """What fresh real images score, on average over draws; NaN where that is not known."""
        floor = self.frames["floor"]
        return float(floor[measure].mean()) if measure in floor else np.nan


def label(cell: str, arm: str) -> str:
    """A row's name: its arm, in a sweep's cell "cell / arm"."""
    return arm if cell == BASE else f"{cell} / {arm}"


def read(folder: Path) -> Records:
    """Read ``records/`` of an experiment, or of a sweep (then ``sweep.json`` lies beside it).

    Raises:
        FileNotFoundError: no training seed, or one of its files, is there.
        ValueError: a column is missing, or rows of the table cannot be compared.
    """
    seeds = sorted(folder.glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-")))
    for path in [seed / name for seed in seeds for name in REQUIRED] or [folder / "seed-*"]:
        if not path.is_file():
            remedy = "`make reproduce PARAMS=params/<experiment>.yaml` (a sweep: `make sweep`)"
            raise FileNotFoundError(f"no record {path}; {remedy} writes it")
    frames = {name: _frame(seeds, name) for name in COLUMNS}
    runs = [json.loads((seed / "run.json").read_text()) for seed in seeds]
    sweep = folder.parent / "sweep.json"
    samples = seeds[0] / "samples.safetensors"
    found = Records(
        name=folder.parent.name if sweep.is_file() else runs[0]["experiment"],
        frames=frames,
        run=_one_run(folder, runs),
        sweep=json.loads(sweep.read_text()) if sweep.is_file() else {},
        samples=load_file(samples) if samples.is_file() else {},
    )
    _check_comparable(folder, found)
    return found


def _frame(seeds: list[Path], name: str) -> pd.DataFrame:
    """One kind of record of all training seeds that have it."""
    columns = ["training_seed", *COLUMNS[name].split()]
    paths = [seed / f"{name}.csv" for seed in seeds]
    parts = [_read_csv(path, columns) for path in paths if path.is_file()]
    return pd.concat(parts or [pd.DataFrame(columns=[*columns, "cell"])], ignore_index=True)


def _read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype={"cell": str}, keep_default_na=False, na_values=[""])
    if missing := [c for c in columns if c not in frame]:
        raise ValueError(f"{path} lacks the columns {missing}")
    if (odd := set(frame["training_seed"])) - {int(path.parent.name.removeprefix("seed-"))}:
        raise ValueError(f"{path} holds training seeds {sorted(odd)}")
    return frame if "cell" in frame else frame.assign(cell=BASE)


def unequal(a: dict, b: dict) -> list[str]:
    """The names of parameters that differ and should not."""
    return sorted(k for k in (a.keys() | b.keys()) - FREE if a.get(k) != b.get(k))


def _one_run(folder: Path, runs: list[dict]) -> dict:
    """The first run's record with the seeds of all, which otherwise have equal parameters."""
    first = runs[0]["parameters"]
    for run in runs[1:]:
        if odd := unequal(first, run["parameters"]):
            raise ValueError(f"{folder}: training seeds were run with unequal {', '.join(odd)}")
    seeds = [seed for run in runs for seed in run["parameters"]["seeds"]]
    return {**runs[0], "parameters": {**first, "seeds": seeds}}


def _check_comparable(folder: Path, found: Records) -> None:
    """Every arm on the same noise, though a sweep's file may have changed between seeds."""
    metrics, path = found.metrics, folder / "seed-*" / "metrics.csv"
    streams = [list(x) for x in product(found.training_seeds, found.sampling_seeds)]
    for cell, arm in [(BASE, "pretrained"), *found.rows]:
        mine = metrics[(metrics["cell"] == cell) & (metrics["arm"] == arm)]
        if sorted(mine[["training_seed", "seed"]].to_numpy().tolist()) != streams:
            raise ValueError(
                f"{path}: {label(cell, arm)} needs exactly one row per training seed "
                f"{found.training_seeds} and sampling seed {found.sampling_seeds}"
            )
