"""Compare the metrics of two runs of one preset, within a measured spread.

    python .ci/compare.py figures/digits/records OTHER/records

Training amplifies rounding, so another machine gives other numbers. How far they move was measured
by repeating the run with every initial weight moved by one rounding, and with two threads instead
of one (.ci/spread/*.csv, metrics only). The largest deviation of those repeats from the committed
run, over all arms, times FACTOR, is the tolerance of a measure: of its mean over sampling seeds
per arm, and of its mean paired differences to the pretrained and to the merged model.
"""

import sys
from pathlib import Path

import pandas as pd

SPREAD = Path(__file__).parent / "spread"
MEASURES = ["fid", "fid_second", "pixel", "inception_score", "kid", "precision", "recall"]
FACTOR = 2.0


def numbers(path: Path) -> pd.DataFrame:
    """Means over sampling seeds: a row per arm, then the paired differences to two of them."""
    means = pd.read_csv(path).groupby("arm")[MEASURES].mean()
    differences = [
        (means - means.loc[other]).drop(index=other).rename(index=f"{{}} - {other}".format)
        for other in ("pretrained", "merged")
    ]
    return pd.concat([means, *differences])


def tolerances(committed: Path, spread: Path = SPREAD) -> pd.Series:
    """FACTOR times the largest deviation of the repeats, per measure."""
    repeats = sorted(spread.glob("*.csv"))
    if not repeats:
        raise FileNotFoundError(f"no repeats in {spread}: nothing was measured")
    base = numbers(committed)
    return FACTOR * pd.concat([(numbers(r) - base).abs().max() for r in repeats], axis=1).max(
        axis=1
    )


def setting(path: Path) -> list:
    """What must be equal for two runs to be comparable."""
    frame = pd.read_csv(path)
    return (
        frame[["arm", "seed", "n", "features", "steps"]]
        .sort_values(["arm", "seed"])
        .values.tolist()
    )


def compare(committed: Path, other: Path, spread: Path = SPREAD) -> pd.DataFrame:
    """Every number that moved further than its tolerance; empty where all is well."""
    if setting(committed) != setting(other):
        raise ValueError("the two runs differ in arms, seeds, n, features or steps")
    allowed = tolerances(committed, spread)
    moved = (numbers(other) - numbers(committed)).abs()
    print(pd.DataFrame({"largest move": moved.max(), "tolerance": allowed}).to_string())
    far = moved.where(moved > allowed).stack()
    return far[far.notna()].rename("moved by").to_frame()


def main() -> int:
    committed, other = (Path(folder) / "metrics.csv" for folder in sys.argv[1:3])
    far = compare(committed, other)
    if len(far):
        print(f"moved further than the measured spread allows:\n{far.to_string()}")
    return int(len(far) > 0)


if __name__ == "__main__":
    sys.exit(main())
