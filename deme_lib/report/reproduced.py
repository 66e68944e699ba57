"""Do two runs of one experiment agree? Processors round differently, mistakes move further."""

from pathlib import Path

import pandas as pd

from deme_lib.report.records import RecordsError, read

ALLOWED = {"FID": ("fid", 1.2e-4), "IS": ("inception_score", 4.5e-4)}
"""How far a mean over the seeds may move. From repeats of an experiment with every initial weight
moved by one rounding, and with two threads instead of one: ten times the largest move. A processor
without AVX-512 moved mean FIDs by 5e-6."""


def verdict(committed: Path, other: Path, seeds: list[int] | None = None) -> int:
    """Print how far mean FID and IS of every row moved between two folders of records.

    Args:
        seeds: the training seeds to compare; without it, those in common.

    Returns:
        0 where no number moved further than allowed, otherwise 1.

    Raises:
        RecordsError: parameters differ, or a seed is not in both.
    """
    runs = read(committed), read(other)
    common = set(runs[0].training_seeds) & set(runs[1].training_seeds)
    seeds = sorted(common) if seeds is None else seeds
    if not seeds or not set(seeds) <= common:
        raise RecordsError(f"no training seeds {seeds} in both: in common are {sorted(common)}")
    mine, theirs = (run.parameters for run in runs)
    names = {**mine, **theirs}.keys() - {"seeds"}
    if odd := sorted(name for name in names if mine.get(name) != theirs.get(name)):
        raise RecordsError(f"not the same experiment: other parameters {', '.join(odd)}")
    moves = []
    for kind, (measure, allowed) in ALLOWED.items():
        before, after = (run.of(measure).loc[seeds].mean() for run in runs)
        moved = (after - before).abs().rename_axis("row").reset_index(name="moved")
        moves.append(moved.assign(kind=kind, allowed=allowed))
    moves = pd.concat(moves, ignore_index=True)
    far = moves[~(moves["moved"] <= moves["allowed"])]  # also where a row is in one of them alone
    for m in far.itertuples():
        print(f"not reproduced: {m.kind} of {m.row} moved {m.moved:.2g} of {m.allowed:.2g} allowed")
    if far.empty:
        worst = moves.loc[(moves["moved"] / moves["allowed"]).idxmax()]
        allowed = f"{worst['moved']:.2g} of {worst['allowed']:.2g} allowed"
        of = f"{worst['kind']} of {worst['row']}; {len(moves)} numbers"
        print(f"reproduced: largest move {allowed} ({of})")
    return int(len(far) > 0)
