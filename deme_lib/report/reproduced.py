"""Do two runs of one experiment agree? Processors round differently, mistakes move further."""

import json
from pathlib import Path

import pandas as pd

from deme_lib.report import records
from deme_lib.report.records import Records, RecordsError

TOLERANCE = {"FID": 1.2e-4, "IS": 4.5e-4}
"""How far a mean over the seeds may move. From repeats of an experiment with every initial weight
moved by one rounding, and with two threads instead of one: ten times the largest move. A processor
without AVX-512 moved mean FIDs by 5e-6."""

MEASURES = {"FID": "fid", "IS": "inception_score"}
SAMPLING = ["training_seed", "row", "seed", "n", "features", "steps", "reference"]


def compare(committed: Records, other: Records, seeds: list[int] | None = None) -> pd.DataFrame:
    """How far each row's mean FID and IS moved: columns kind, row, moved, allowed.

    Args:
        seeds: the training seeds to compare; without it, those in common.

    Raises:
        RecordsError: parameters, rows, sampling or merge weights differ, or a seed is not in both.
    """
    common = set(committed.training_seeds) & set(other.training_seeds)
    seeds = sorted(common) if seeds is None else seeds
    if not seeds or not set(seeds) <= common:
        held = f"{committed.training_seeds} and {other.training_seeds}"
        raise RecordsError(f"no such training seeds in both, which hold {held}: {seeds}")
    if odd := _unequal(committed, other, seeds):
        raise RecordsError(f"not the same experiment: {', '.join(odd)}")
    moves = []
    for kind, measure in MEASURES.items():
        before, after = (
            found.of(measure).loc[seeds].mean(skipna=False) for found in (committed, other)
        )
        moved = (after - before).abs().rename("moved").rename_axis("row").reset_index()
        moves.append(moved.assign(kind=kind, allowed=TOLERANCE[kind]))
    return pd.concat(moves, ignore_index=True)


def _unequal(committed: Records, other: Records, seeds: list[int]) -> list[str]:
    """What should be equal for the numbers to be, and is not."""
    mine, theirs = committed.parameters, other.parameters
    names = (mine.keys() | theirs.keys()) - {"seeds"}
    odd = [f"parameter {name}" for name in sorted(names) if mine.get(name) != theirs.get(name)]
    sampled, weights = set(), {}
    for found in (committed, other):
        rows = found.metrics[found.metrics["training_seed"].isin(seeds)]
        sampled ^= set(rows[SAMPLING].itertuples(index=False, name=None))
        for r in found.arms[found.arms["training_seed"].isin(seeds)].itertuples():
            known = [] if pd.isna(r.weights) else [round(w, 6) for w in json.loads(r.weights)]
            weights.setdefault((r.training_seed, r.row), []).append(known)
    odd += [f"images of {row}, training seed {seed}" for seed, row, *_ in sorted(sampled)]
    return odd + [
        f"weights of {row}, training seed {seed}: {found[0]} before, {found[1:]} now"
        for (seed, row), found in weights.items()
        if len(found) == 2 and found[0] != found[1]
    ]


def verdict(committed: Path, other: Path, seeds: list[int] | None = None) -> int:
    """Print whether the numbers of two folders of records agree; 0 where they do."""
    try:
        moves = compare(records.read(committed), records.read(other), seeds)
    except RecordsError as error:
        print(f"not reproduced: {error}")
        return 1
    far = moves[~(moves["moved"] <= moves["allowed"])]  # also what is no number
    for m in far.itertuples():
        print(f"not reproduced: {m.kind} of {m.row} moved {m.moved:.2g} of {m.allowed:.2g} allowed")
    if len(far):
        return 1
    worst = moves.loc[(moves["moved"] / moves["allowed"]).idxmax()]
    print(
        f"reproduced: largest move {worst['moved']:.2g} of {worst['allowed']:.2g} allowed "
        f"({worst['kind']} of {worst['row']}; {len(moves)} numbers)"
    )
    return 0
