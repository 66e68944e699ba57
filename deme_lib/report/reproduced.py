"""Do two runs of one experiment agree? Processors round differently, mistakes move further."""

from pathlib import Path

from deme_lib.report.records import RecordsError, read

ALLOWED = {"FID": ("fid", 1.2e-4), "IS": ("inception_score", 4.5e-4)}
"""How far a mean over the seeds may move. From repeats of an earlier experiment with every initial
weight moved by one rounding, and with two threads instead of one: ten times the largest move. Of
today's, a processor with AVX-512 instead of AVX2 moved FIDs of seed 0 by 3.3e-6 at most."""


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
        moves += [(x, allowed, f"{kind} of {row}") for row, x in (after - before).abs().items()]
    far = [move for move in moves if not move[0] <= move[1]]  # also NaN, of a row in one of them
    for moved, allowed, what in far:
        print(f"not reproduced: {what} moved {moved:.2g} of {allowed:.2g} allowed")
    if not far:
        moved, allowed, what = max(moves, key=lambda move: move[0] / move[1])
        of = f"{what}; {len(moves)} numbers"
        print(f"reproduced: largest move {moved:.2g} of {allowed:.2g} allowed ({of})")
    return int(bool(far))
