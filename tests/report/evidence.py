"""Records to test on: the committed ones of ``fashion8-full``, cut to what a test needs."""

import json
import shutil
from pathlib import Path

import pandas as pd

from deme_lib import ROOT
from deme_lib.experiment.arms import DEFAULT_ARMS
from deme_lib.report.records import REQUIRED

FULL = ROOT / "figures" / "fashion8-full" / "records"
ALL = tuple(pd.read_csv(FULL / "seed-0" / "arms.csv")["arm"])
SWEEPS = ROOT / "figures" / "digits" / "sweeps"


def write(
    folder: Path,
    training_seeds: tuple[int, ...] = (0, 1),
    seeds: tuple[int, ...] = (0, 1),
    arms: tuple[str, ...] = DEFAULT_ARMS,
    optional: bool = True,
) -> Path:
    """Write the records of some trainings under other seeds, and return ``folder``.

    Of sampling seeds all but the first repeat it with FIDs moved by 0.01 each. Without
    ``optional`` only required files are written.
    """
    for k, seed in enumerate(training_seeds):
        out = shutil.copytree(FULL / f"seed-{k}", folder / f"seed-{seed}")
        for path in sorted(out.iterdir()):
            if not optional and path.name not in REQUIRED:
                path.unlink()
            elif path.suffix == ".csv":
                change(path, lambda t, seed=seed: _cut(t.assign(training_seed=seed), arms, seeds))
        run = json.loads((out / "run.json").read_text())
        run["parameters"] |= {"seeds": [seed], "sampling_seeds": list(seeds)}
        (out / "run.json").write_text(json.dumps(run))
    return folder


def _cut(table: pd.DataFrame, arms: tuple[str, ...], seeds: tuple[int, ...]) -> pd.DataFrame:
    table = table[table["arm"].isin([*arms, "test"])] if "arm" in table else table
    if "precision" not in table:
        return table
    return pd.concat(table.assign(seed=s, fid=table["fid"] + i / 100) for i, s in enumerate(seeds))


def change(path: Path, how) -> None:
    """Write a table back as a function has it."""
    how(pd.read_csv(path)).to_csv(path, index=False)
