"""Do two runs of one experiment agree? Processors round differently, mistakes move further."""

from pathlib import Path

import pandas as pd

from deme_lib.report import records
from deme_lib.report.records import Records, RecordsError

ALLOWED = {"FID": ("fid", 1.2e-4), "IS": ("inception_score", 4.5e-4)}
"""How far a mean over the seeds may move. From repeats of an experiment with every initial weight
moved by one rounding, and with two threads instead of one: ten times the largest move. A processor
without AVX-512 moved mean FIDs by 5e-6."""


def compare(committed: Records, other: Records, seeds: list[int] | None = None) -> pd.DataFrame:
    """How far each row's mean FID and IS moved: columns row, moved, kind, allowed.

    Args:
        seeds: the training seeds to compare; without it, those in common.

    Raises:
        RecordsError: parameters differ, or a seed is not in both.
    """
    common = set(committed.training_seeds) & set(other.training_seeds)
    seeds = sorted(common) if seeds is None else seeds
    if not seeds or not set(seeds) <= common:
        raise RecordsError(f"no training seeds {seeds} in both: in common are {sorted(common)}")
    mine, theirs = committed.parameters, other.parameters
    names = {**mine, **theirs}.keys() - {"seeds"}
    if odd := sorted(name for name in names if mine.get(name) != theirs.get(name)):
        raise RecordsError(f"not the same experiment: other parameters {', '.join(odd)}")
    moves = []
    for kind, (measure, allowed) in ALLOWED.items():
        before, after = (x.of(measure).loc[seeds].mean() for x in (committed, other))
        moved = (after - before).abs().rename_axis("row").reset_index(name="moved")
        moves.append(moved.assign(kind=kind, allowed=allowed))
    return pd.concat(moves, ignore_index=True)


def verdict(committed: Path, other: Path, seeds: list[int] | None = None) -> int:
    """Print whether the numbers of two folders of records agree; 0 where they do."""
    try:
        moves = compare(records.read(committed), records.read(other), seeds)
    except RecordsError as error:
        print(f"not reproduced: {error}")
        return 1
    far = moves[~(moves["moved"] <= moves["allowed"])]  # also where a row is in one of them alone
    for m in far.itertuples():
        print(f"not reproduced: {m.kind} of {m.row} moved {m.moved:.2g} of {m.allowed:.2g} allowed")
    if far.empty:
        worst = moves.loc[(moves["moved"] / moves["allowed"]).idxmax()]
        allowed = f"{worst['moved']:.2g} of {worst['allowed']:.2g} allowed"
        of = f"{worst['kind']} of {worst['row']}; {len(moves)} numbers"
        print(f"reproduced: largest move {allowed} ({of})")
    return int(len(far) > 0)
