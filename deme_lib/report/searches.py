"""The winner's curse: what a search's scores promise, and what evaluation finds."""

from __future__ import annotations

import pandas as pd

from deme_lib.experiment.arms import ARMS, SEARCHES
from deme_lib.report.formats import decimals, interval, number
from deme_lib.report.intervals import t_interval
from deme_lib.report.records import Records


def table(records: Records) -> pd.DataFrame:
    """A row per search and arm whose weights it scored by images, means over training seeds.

    ``in_search`` and ``in_evaluation`` are FID minus that of weights 0, the pretrained model: what
    other images, another n and another reference do to both scores alike drops out. ``curse`` is
    the second minus the first, with its t interval: above 0 where the best of many noisy scores
    was taken, about 0 for weights that nothing chose. ``rank`` is the rank correlation of held-out
    loss and FID over the candidates scored by images.
    """
    by_search, by_seed = ["training_seed", "search"], ["training_seed", "arm"]
    scored = records.search.dropna(subset=["fid"])
    unmerged = scored[~scored["weights"].str.contains("[1-9]")].set_index(by_search)["fid"]
    scored = scored.join(unmerged.rename("unmerged"), on=by_search)
    rank = {
        name: part.groupby("training_seed")[["loss", "fid"]]
        .corr("spearman")["fid"]
        .xs("loss", level=1)
        for name, part in scored.groupby("search")
    }
    fid = records.metrics.groupby(by_seed)["fid"].mean()
    gains = fid.sub(fid.xs("pretrained", level="arm"), level="training_seed").rename(
        "in_evaluation"
    )
    arms = records.arms[records.arms["arm"].isin(ARMS)]
    arms = arms.assign(members=[ARMS[arm].members for arm in arms["arm"]])
    arms = arms[["training_seed", "arm", "title", "members", "weights"]].join(gains, on=by_seed)
    tried = scored.merge(arms, on=["training_seed", "weights"])
    tried = tried[tried["search"].map(SEARCHES) == tried["members"]]
    tried = tried.assign(in_search=tried["fid"] - tried["unmerged"])
    rows = []
    for (search, arm, title), part in tried.groupby(["search", "arm", "title"], sort=False):
        curse = part["in_evaluation"] - part["in_search"]
        low, high, _ = t_interval(curse, records.parameters["confidence"])
        row = {"search": search, "arm": arm, "title": title, "trainings": len(part)}
        row |= {"chosen": int(part["chosen"].sum())}
        row |= part[["in_search", "in_evaluation"]].mean().to_dict()
        row |= {"curse": curse.mean(), "low": low, "high": high, "rank": rank[search].mean()}
        rows.append(row)
    return pd.DataFrame(rows)


def printed(found: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``searches.csv`` as strings."""
    columns = {
        "search": found["search"],
        "arm": found["title"],
        "its weights chosen": found["chosen"].map("{} of ".format) + found["trainings"].map(str),
        "score in the search": found["in_search"].map(number),
        "in evaluation": found["in_evaluation"].map(number),
        "evaluation − search": list(map(interval, found["curse"], found["low"], found["high"])),
        "rank correlation of loss and FID": found["rank"].map(lambda x: decimals(x, 2)),
    }
    return pd.DataFrame(columns)
