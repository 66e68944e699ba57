"""Do two runs of one preset agree? Other processors round differently, mistakes move further."""

import json
from pathlib import Path

import pandas as pd

from deme_lib.report import records
from deme_lib.report.records import Records

TOLERANCE = {"FID": 1.2e-4, "IS": 4.5e-4}
"""How far a mean over all seeds may move. From repeats of the digits experiment with every initial
weight moved by one rounding, and with two threads instead of one: ten times the largest move. A
processor without AVX-512 moved mean FIDs by 5e-6."""


def numbers(found: Records, seeds: set[int]) -> dict[str, pd.Series]:
    """Kind of number -> mean over the training seeds, by arm."""
    held = found.metrics[found.metrics["training_seed"].isin(seeds)].groupby("arm")
    means = held[["fid", "inception_score"]].agg(lambda x: x.mean(skipna=False))
    return {"FID": means["fid"], "IS": means["inception_score"]}


def weights(found: Records, seeds: set[int]) -> dict[str, list]:
    """The weights of every arm, which are a search's choice where it had one."""
    arms = found.arms[found.arms["training_seed"].isin(seeds)].dropna(subset="weights")
    return {
        f"weights of {row.arm} (training seed {row.training_seed})": [
            round(w, 6) for w in json.loads(row.weights)
        ]
        for row in arms.itertuples()
    }


def compare(committed: Records, other: Records) -> tuple[pd.DataFrame, list[str]]:
    """Every move (kind, name, moved, allowed), and in words what should be equal and is not.

    Raises:
        ValueError: the runs have other parameters, arms or sampling, or no training seed in common.
    """
    seeds = set(committed.training_seeds) & set(other.training_seeds)
    if not seeds:
        raise ValueError(
            f"no training seed in common: {committed.training_seeds}, {other.training_seeds}"
        )
    odd = records.unequal(committed.parameters, other.parameters)
    columns = ["arm", "training_seed", "seed", "n", "features", "steps", "reference"]
    held = [
        sorted(x.metrics.loc[x.metrics["training_seed"].isin(seeds), columns].to_numpy().tolist())
        for x in (committed, other)
    ]
    if odd or held[0] != held[1]:
        raise ValueError(f"not the same experiment: {', '.join(odd) or 'other arms or seeds'}")
    before, after = numbers(committed, seeds), numbers(other, seeds)
    rows = [
        (kind, name, moved, TOLERANCE[kind])
        for kind in TOLERANCE
        for name, moved in (after[kind] - before[kind]).abs().items()
    ]
    mine, theirs = weights(committed, seeds), weights(other, seeds)
    unequal = [
        f"{name}: {mine.get(name)} before, {theirs.get(name)} now"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    return pd.DataFrame(rows, columns=["kind", "name", "moved", "allowed"]), unequal


def verdict(committed: Path, other: Path) -> int:
    """Print what was found; 0 where the numbers came back."""
    moves, unequal = compare(records.read(committed), records.read(other))
    far = moves[~(moves["moved"] <= moves["allowed"])]  # also what is no number
    for row in far.itertuples():
        moved = f"moved {row.moved:.2g} of {row.allowed:.2g} allowed"
        print(f"not reproduced: {row.kind} of {row.name} {moved}")
    for line in unequal:
        print(f"not reproduced: {line}")
    if len(far) or unequal:
        return 1
    worst = moves.loc[(moves["moved"] / moves["allowed"]).idxmax()]
    print(
        f"reproduced: largest move {worst['moved']:.2g} of {worst['allowed']:.2g} allowed "
        f"({worst['kind']} of {worst['name']}; {len(moves)} numbers, weights the same)"
    )
    return 0
