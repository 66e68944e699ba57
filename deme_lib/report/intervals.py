"""Paired differences between rows: t intervals over training seeds, Holm's steps, verdicts."""

from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import t as student

from deme_lib.report.records import Records, RecordsError

PRIMARY = {1: "primary_decoupling", 2: "primary_merging"}
"""Ablation -> the parameter that names its comparisons."""

JUDGED = {"fid": -1, "inception_score": 1}
"""Measures in which primary comparisons get verdicts -> the sign of a difference for the better."""

BESIDE = ("fid_second", "pixel", "kid", "precision", "recall", "test_loss")
"""Further measures of the primary comparisons, estimated only."""

FEWEST = 5
"""Training seeds below which an interval is given and no verdict."""

CONTROL = "all_plain"
"""The model of all timesteps, to which ``gate`` compares."""


def t_interval(d: np.ndarray, level: float) -> tuple[float, float, float]:
    """(low, high, p) of the mean of independent differences d [U]; NaN of a single one."""
    d = np.asarray(d, dtype=float)
    if d.size < 2:
        return np.nan, np.nan, np.nan
    mean, se = d.mean(), d.std(ddof=1) / np.sqrt(d.size)
    half = student.ppf((1 + level) / 2, d.size - 1) * se
    p = float(mean == 0) if se == 0 else 2 * student.sf(abs(mean) / se, d.size - 1)
    return mean - half, mean + half, p


def holm(p: np.ndarray, alpha: float) -> np.ndarray:
    """The alpha at which each of m p values is judged.

    Holm (1979): the k-th smallest at alpha / (m - k + 1), while all before it were rejected. From
    the first that is not, all later ones stay at that step: they are not rejected there either,
    so an interval at 1 - alpha and a verdict never contradict each other.
    """
    alphas, left = np.empty(len(p)), len(p)
    for i in np.argsort(p):  # NaN comes last
        alphas[i] = alpha / max(left, 1)
        left -= bool(p[i] <= alphas[i])
    return alphas


def verdict(d: np.ndarray, level: float, margin: float) -> str:
    """What differences d [U] say of their mean, at ``level`` and against ±``margin`` (or NaN).

    "different", "different, below the margin", "equivalent" (two one-sided tests at 1 - level),
    "undecided", or "no verdict" of fewer than FEWEST.
    """
    if len(d) < FEWEST or np.isnan(d).any():
        return "no verdict"
    low, high, _ = t_interval(d, level)
    if low > 0 or high < 0:
        return "different, below the margin" if max(-low, high) < margin else "different"
    low, high, _ = t_interval(d, 2 * level - 1)
    return "equivalent" if max(-low, high) < margin else "undecided"


def family(differences: list[np.ndarray], level: float, margin: float) -> list[dict]:
    """Interval and verdict of each of some differences [U], Holm-corrected as one family."""
    p = np.array([t_interval(d, level)[2] for d in differences])
    rows = []
    for d, own in zip(differences, 1 - holm(p, 1 - level), strict=True):
        found = {"n_units": len(d), "effect": np.mean(d) if len(d) else np.nan, "level": own}
        found |= dict(zip(("low", "high", "p"), t_interval(d, own), strict=True))
        rows.append(found | {"verdict": verdict(d, own, margin)})
    return rows


def excess(records: Records, measure: str = "fid") -> float:
    """What the pretrained model lacks to real images, above 0; NaN if it lacks nothing."""
    lacks = records.floor_of(measure) - records.of(measure)["pretrained"].mean()
    found = JUDGED.get(measure, -1) * lacks
    return found if found > 0 else np.nan


def margin(records: Records, measure: str = "fid") -> float:
    """The parameter ``margin`` times the pretrained model's ``excess``."""
    return records.parameters["margin"] * excess(records, measure)


def comparisons(records: Records) -> pd.DataFrame:
    """A row per comparison "a - b" and measure: effect, interval, level, p, margin, verdict.

    Kind "primary": an ablation's named comparisons in a JUDGED measure, one Holm-corrected family,
    on the training seeds that confirm (``confirming``), where a difference is said to be better or
    worse. Kind "estimate": the same pairs in all measures on all trainings; "exploratory": others.
    Neither is corrected or gets a verdict.
    """
    rows, everyone = [], records.training_seeds
    for ablation, name in PRIMARY.items():
        named = pairs(records, name)
        for measure in JUDGED:
            rows += _rows(records, named, measure, "primary", ablation, confirming(records))
        for pair, measure in product(named, (*JUDGED, *BESIDE)):
            rows += _rows(records, [pair], measure, "estimate", ablation, everyone)
    for pair, measure in product(pairs(records, "exploratory"), (*JUDGED, "test_loss")):
        rows += _rows(records, [pair], measure, "exploratory", "", everyone)
    columns = "ablation kind a b measure n_units effect low high level p margin verdict"
    return pd.DataFrame(rows, columns=columns.split())


LADDER = (
    ("plain_routed", CONTROL),
    ("balanced", CONTROL),
    ("soup", CONTROL),
    ("last_expert", CONTROL),
    ("deme_merged", "averaged"),
)
"""Pairs whose differences are followed over sizes of models."""


def ladder(sizes: list[Records]) -> pd.DataFrame:
    """A row per experiment, LADDER's "a - b" and JUDGED measure: what comparing two arms gives.

    ``parameters`` are those of one model; effect and interval, uncorrected, on all trainings, are
    shares of ``excess``, which is taken as known, above 0 where a is better.

    Raises:
        RecordsError: an experiment lacks one of the arms.
    """
    rows = []
    for records, measure in product(sizes, JUDGED):
        if lacking := sorted({*sum(LADDER, ())} - {*records.titles}):
            raise RecordsError(f"{records.run['experiment']} lacks {', '.join(lacking)}")
        values, whole = records.of(measure), excess(records, measure)
        same = {"experiment": records.run["experiment"], "measure": measure}
        same["parameters"] = records.arms["parameters"].min()
        for a, b in LADDER:
            d = JUDGED[measure] * (values[a] - values[b]) / whole
            low, high, _ = t_interval(d, records.parameters["confidence"])
            found = {"n_units": len(d), "effect": d.mean(), "low": low, "high": high}
            rows.append({**same, "a": a, "b": b, **found})
    return pd.DataFrame(rows).sort_values("parameters", kind="stable")


def confirming(records: Records) -> list[int]:
    """The recorded training seeds on which verdicts are drawn: all where the parameter
    ``confirmation_seeds`` names none, as of an experiment whose seeds nobody looked at before."""
    named, there = records.parameters["confirmation_seeds"], records.training_seeds
    return [seed for seed in there if seed in named or not named]


def pairs(records: Records, name: str) -> list[tuple[str, str]]:
    """The pairs of rows that a parameter names, "row - row" each; of the default, those there."""
    named = [tuple(text.split(" - ")) for text in records.parameters[name]]
    return [pair for pair in named if set(pair) <= records.titles.keys()]


def _rows(
    records: Records, pairs: list, measure: str, kind: str, ablation: int | str, seeds: list[int]
) -> list:
    """The rows of pairs that are one family; none where the measure was not taken."""
    values, distance = records.of(measure), margin(records, measure)
    if values.isna().all(axis=None):
        return []
    d = [(values[a] - values[b])[seeds].to_numpy() for a, b in pairs]
    found = family(d, records.parameters["confidence"], distance)
    same = {"ablation": ablation, "kind": kind, "measure": measure, "margin": distance}
    for row in found:
        better = JUDGED.get(measure, -1) * row["effect"] > 0
        if row["verdict"].startswith("different"):
            row["verdict"] += " (better)" if better else " (worse)"
    if kind != "primary":
        same["verdict"] = ""
    rows = zip(pairs, found, strict=True)
    return [{"a": a, "b": b, **row, **same} for (a, b), row in rows]


def gate(records: Records) -> pd.DataFrame:
    """[(training_seed, range), rows]: test loss in each range over that of CONTROL, minus 1.

    Ranges are the N equal ones of [0, T) (Eq. 3), from 1. Empty where bins of timesteps do not
    nest in them, or without CONTROL.
    """
    n, t = records.parameters["n_ranges"], records.parameters["num_train_timesteps"]
    starts = [-(-k * t // n) for k in range(n)]
    losses = records.losses
    if CONTROL not in records.titles or not set(starts) <= set(losses["bin_start"]):
        return pd.DataFrame()
    k = np.searchsorted(starts, losses["bin_start"], side="right")
    means = losses.assign(range=k).groupby(["training_seed", "range", "row"])["loss"].mean()
    means = means.unstack()[list(records.titles)]
    return means.div(means[CONTROL], axis=0).drop(columns=CONTROL) - 1
