"""The winner's curse: what searched weights promise, and what evaluation finds."""

import pandas as pd

from deme_lib.experiment.arms import ARMS
from deme_lib.report.formats import interval, number
from deme_lib.report.intervals import t_interval
from deme_lib.report.records import Records

UNSEARCHED = {"merge": "deme_merged", "soup": "soup", "scale": "all_plain"}
"""Search -> the arm of the same copies whose weights are fixed."""


def table(records: Records) -> pd.DataFrame:
    """A row per arm whose weights a search chose, means over training seeds.

    ``kept``, ``none`` and ``other`` count seeds in which it chose the unsearched weights (1/N, or
    1 of a single model), all weights 0, or others. ``in_search`` and ``in_evaluation`` are its FID
    minus that of the unsearched weights, on the search's noise and on evaluation's; ``curse`` is
    the second minus the first, with its t interval: above 0 where the best of many noisy scores
    was taken. ``ranked`` counts seeds in which loss and FID of the candidates rank alike more than
    otherwise (rank correlation above 0).
    """
    fid = records.metrics.groupby(["arm", "training_seed"])["fid"].mean()
    weights = records.arms.set_index(["arm", "training_seed"])["weights"]
    scored = records.search.dropna(subset=["fid"])
    rows = []
    for search, before in UNSEARCHED.items():
        after = next(arm.name for arm in ARMS.values() if arm.weights == search)
        tried = scored[scored["search"] == search].set_index("training_seed")
        if tried.empty or not {before, after} <= set(fid.index.get_level_values("arm")):
            continue
        at = {seed: of.set_index("weights")["fid"] for seed, of in tried.groupby(level=0)}
        if any(weights[before][seed] not in scores for seed, scores in at.items()):
            continue  # weights from a parameter file, which the search did not score
        rank = [of[["loss", "fid"]].corr("spearman").iloc[0, 1] for _, of in tried.groupby(level=0)]
        score = pd.Series({s: at[s][weights[after][s]] - at[s][weights[before][s]] for s in at})
        curse = fid[after] - fid[before] - score
        low, high, _ = t_interval(curse, records.parameters["confidence"])
        kept = (weights[after] == weights[before]).sum()
        none = (~weights[after].str.contains("[1-9]")).sum()
        row = {"search": search, "arm": after, "title": ARMS[after].title, "trainings": len(curse)}
        row |= {"kept": kept, "none": none, "other": len(curse) - kept - none}
        row |= {"in_search": score.mean(), "in_evaluation": (fid[after] - fid[before]).mean()}
        row |= {"curse": curse.mean(), "low": low, "high": high}
        rows.append(row | {"ranked": sum(r > 0 for r in rank)})
    return pd.DataFrame(rows)


def printed(found: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``searches.csv`` as strings."""
    of = " of " + found["trainings"].map(str)
    columns = {
        "arm": found["title"],
        "kept the unsearched weights": found["kept"].map(str) + of,
        "chose all 0": found["none"].map(str) + of,
        "FID against them in the search": found["in_search"].map(number),
        "in evaluation": found["in_evaluation"].map(number),
        "evaluation − search": list(map(interval, found["curse"], found["low"], found["high"])),
        "loss ranks as FID": found["ranked"].map(str) + of,
    }
    return pd.DataFrame(columns)
