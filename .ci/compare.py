"""Compare the metrics of two runs of one preset, within a measured spread.

    python .ci/compare.py figures/digits/records OTHER/records

Another machine rounds differently, and training could amplify that. How far the numbers move was
measured by repeats (.ci/spread/, written by spread.py): every initial weight moved by one rounding,
and two threads instead of one (for the arms in its file). The largest deviation of the repeats from
the committed run, over all arms, times FACTOR, is the tolerance: one for each measure's means over
seeds, and one for its mean paired differences to the pretrained and to the merged model.
FACTOR is 10 because the repeats disturb little (one rounding at the start; the order of sums) where
another processor rounds every operation its own way. A search that ends with other weights moves
its arm further than that.
"""

import json
import sys
from pathlib import Path

import pandas as pd

SPREAD = Path(__file__).parent / "spread"
MEASURES = ["fid", "fid_second", "pixel", "inception_score", "kid", "precision", "recall"]
FACTOR = 10.0
MAY_DIFFER = {"runs_dir", "threads", "init_roundings", "device", "allow_long"}


def parameters(records: Path) -> dict:
    """Of a run; the one "seed" of runs before there were several is a list like theirs."""
    found = json.loads((records / "run.json").read_text())["parameters"]
    return {"seeds": [found.pop("seed")], **found} if "seed" in found else found


def metrics(records: Path) -> pd.DataFrame:
    """Of a run; where all are of its one training seed, the file may not say so."""
    frame = pd.read_csv(records / "metrics.csv")
    if "training_seed" in frame:
        return frame
    return frame.assign(training_seed=parameters(records)["seeds"][0])


def held_by(frame: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The rows of the arms and training seeds that another run holds."""
    for column in ("arm", "training_seed"):
        frame = frame[frame[column].isin(other[column])]
    return frame


def numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows (kind, comparison): means over seeds per arm, and paired differences to two arms."""
    means = frame.groupby("arm")[MEASURES].mean()
    parts = {"mean": means}
    for other in ("pretrained", "merged"):
        differences = (means - means.loc[other]).drop(index=other)
        parts[f"minus {other}"] = differences
    return pd.concat(parts, names=["kind", "arm"])


def moves(committed: Path, other: Path) -> pd.DataFrame:
    """How far each number moved; infinitely far where only one of the two is a number."""
    held = metrics(other)
    after, before = numbers(held), numbers(held_by(metrics(committed), held))
    moved = (after - before).abs()
    return moved.mask(before.isna() != after.isna(), float("inf"))


def tolerances(committed: Path, spread: Path = SPREAD) -> pd.DataFrame:
    """FACTOR times the largest deviation of the repeats, per kind of number and measure."""
    repeats = sorted(path.parent for path in spread.glob("*/metrics.csv"))
    if not repeats:
        raise FileNotFoundError(f"no repeats in {spread}: nothing was measured")
    for repeat in repeats:
        check_comparable(committed, repeat, repeat=True)
    worst = [moves(committed, repeat).groupby(level="kind").max() for repeat in repeats]
    return FACTOR * pd.concat(worst).groupby(level="kind").max()


def check_comparable(committed: Path, other: Path, repeat: bool = False) -> None:
    """Refuse runs of other parameters, arms, seeds or sizes.

    A repeat may hold fewer arms and training seeds, and may have been measured before a parameter
    joined: what one of the two does not know did not change what was run.
    """
    a, b = parameters(committed), parameters(other)
    names = (a.keys() & b.keys()) - {"seeds"} if repeat else a.keys() | b.keys()
    names -= MAY_DIFFER
    if odd := sorted(name for name in names if a.get(name) != b.get(name)):
        raise ValueError(f"{other} was run with other parameters: {', '.join(odd)}")
    first, second = metrics(committed), metrics(other)
    if repeat:
        first = held_by(first, second)
    columns = ["arm", "training_seed", "seed", "n", "features", "steps"]
    if sorted(first[columns].values.tolist()) != sorted(second[columns].values.tolist()):
        raise ValueError(f"{other} has other arms, seeds, n, features or steps")


def compare(committed: Path, other: Path, spread: Path = SPREAD) -> pd.DataFrame:
    """Every number that moved further than its tolerance; empty where all is well."""
    check_comparable(committed, other)
    allowed, moved = tolerances(committed, spread), moves(committed, other)
    largest = moved.groupby(level="kind").max()
    print(pd.concat({"largest move": largest, "tolerance": allowed}).to_string())
    limits = allowed.reindex(moved.index.get_level_values("kind")).set_axis(moved.index)
    both_unknown = moved.isna()
    return moved.where(~(moved <= limits) & ~both_unknown).stack().dropna().to_frame("moved by")


def main() -> int:
    far = compare(*(Path(folder) for folder in sys.argv[1:3]))
    if len(far):
        print(f"moved further than the measured spread allows:\n{far.to_string()}")
    return int(len(far) > 0)


if __name__ == "__main__":
    sys.exit(main())
