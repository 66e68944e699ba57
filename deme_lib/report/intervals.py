"""Paired differences between arms: t intervals over units, Holm's steps, equivalence, verdicts.

A unit is a training seed (the mean of its sampling seeds), or a sampling seed where only one
training seed was run; then an interval holds for these weights alone.
"""

from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import t as student

from deme_lib.experiment.arms import DEFAULT_ARMS
from deme_lib.report.records import BASE, Records, label

ABLATIONS = {1: "remove decoupling", 2: "replace merging by an ensemble"}
PRIMARY = {1: "primary_decoupling", 2: "primary_merging"}
SECONDARY = ("inception_score", "fid_second", "kid")
"""Measures of the primary comparisons beside FID."""

CONTROLS = (
    ("soup", "all_plain"),
    ("deme_routed", "all_plain"),
    ("deme_routed", "plain_routed"),
    ("plain_routed", "soup"),
    ("plain_routed", "all_same"),
    ("plain_routed", "all_checkpoints"),
    ("plain_routed", "soup_searched"),
    ("plain_routed", "all_scaled"),
    ("deme_routed", "all_same"),
    ("all_same", "all_plain"),
    ("soup_same", "soup"),
    ("all_checkpoints", "all_plain"),
    ("soup", "all_checkpoints"),
    ("merged_searched", "plain_routed"),
    ("merged_searched", "soup_searched"),
    ("merged_searched", "all_scaled"),
    ("soup_searched", "soup"),
    ("all_scaled", "all_plain"),
)
"""Exploratory pairs, beside every arm - pretrained, merged - every arm, and the primary ones at
other EMA horizons (``soup@0.98`` is the soup of copies with that EMA decay)."""

UNITS = {"training_seed": "training seed", "seed": "sampling seed"}
GATE = ["model", "range", "start", "stop"]
FEWEST = 5
"""Units below which an interval is given and no verdict."""


def t_interval(d: np.ndarray, level: float) -> tuple[float, float, float]:
    """(low, high, p) of the mean of independent differences d [U]; NaN of a single one."""
    d = np.asarray(d, dtype=float)
    if d.size < 2:
        return np.nan, np.nan, np.nan
    mean, se = d.mean(), d.std(ddof=1) / np.sqrt(d.size)
    half = student.ppf((1 + level) / 2, d.size - 1) * se
    p = 2 * student.sf(abs(mean) / se, d.size - 1) if se > 0 else float(mean == 0)
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
    """What differences d [U] say of their mean, at ``level`` and against ±``margin`` (or NaN)."""
    if len(d) < FEWEST:
        return "no verdict"
    low, high, _ = t_interval(d, level)
    if low > 0 or high < 0:
        return "different, below the margin" if max(-low, high) < margin else "different"
    low, high, _ = t_interval(d, 2 * level - 1)  # two one-sided tests at 1 - level
    return "equivalent" if max(-low, high) < margin else "undecided"


def family(differences: list[np.ndarray], level: float, margin: float) -> list[dict]:
    """Interval and verdict of each of some differences [U], Holm-corrected as one family."""
    p = np.array([t_interval(d, level)[2] for d in differences])
    rows = []
    for d, own in zip(differences, 1 - holm(p, 1 - level), strict=True):
        found = dict(zip(("low", "high", "p"), t_interval(d, own), strict=True))
        found |= {"n_units": len(d), "effect": np.mean(d), "level": own}
        rows.append(found | {"verdict": verdict(d, own, margin)})
    return rows


def gap(records: Records, measure: str) -> float:
    """How far the pretrained model is from real images: its excess; NaN where it is not."""
    pretrained = records.by_unit[measure][(BASE, "pretrained")].mean()
    sign = -1 if measure == "inception_score" else 1
    distance = sign * (pretrained - records.floor(measure))
    return distance if distance > 0 else np.nan


def comparisons(records: Records) -> pd.DataFrame:
    """A row per comparison ``a - b`` and measure, primaries first.

    ``relative`` is the effect over the mean of b, ``share`` over the pretrained model's excess;
    ``margin`` is that excess times the parameter of this name.
    """
    rows = _of_sweep(records) if records.sweep else _of_experiment(records)
    first = ["ablation", "a", "b", "kind", "measure", "units", "n_units", "effect", "level"]
    last = ["low", "high", "p", "relative", "share", "share_low", "share_high", "margin", "verdict"]
    return pd.DataFrame(rows, columns=first + last)


def _of_experiment(records: Records) -> list[dict]:
    primaries = {number: _primaries(records, number) for number in ABLATIONS}
    seen = {frozenset(pair) for pairs in primaries.values() for pair in pairs}
    rows, every = [], set(records.titles)
    for number, pairs in primaries.items():
        rows += _rows(records, pairs, "fid", "primary", number)
        for pair, measure in product(pairs, SECONDARY):
            rows += _rows(records, [pair], measure, "secondary", number)
    horizons = {arm.partition("@")[2] for arm in every} - {""}
    for number in ABLATIONS:
        arms = records.arms_of(number)
        pairs = [(a, "pretrained") for a in arms] + [("deme_merged", b) for b in arms]
        pairs += [pair for pair in CONTROLS if set(pair) <= set(arms)]
        pairs += [(f"{a}@{h}", f"{b}@{h}") for h in sorted(horizons) for a, b in primaries[number]]
        for a, b in pairs:
            if a != b and {a, b} <= every and frozenset((a, b)) not in seen:
                seen.add(frozenset((a, b)))
                rows += _rows(records, [(a, b)], "fid", "exploratory", number)
    return rows


def headline(records: Records, number: int) -> list[str]:
    """An ablation's arms of the default experiment, and those that its primary pairs name."""
    named = {arm for pair in _primaries(records, number) for arm in pair}
    return [arm for arm in records.arms_of(number) if arm in named.union(DEFAULT_ARMS)]


def _primaries(records: Records, number: int) -> list[tuple[str, str]]:
    """The pairs that the parameters name as primary for an ablation."""
    return [tuple(pair.split(" - ")) for pair in records.parameters[PRIMARY[number]]]


def _of_sweep(records: Records) -> list[dict]:
    """Every cell's rows against the pretrained model, and against what the sweep file names."""
    against = {cell["cell"]: cell.get("against", []) for cell in records.sweep["cells"]}
    pairs, rows = {}, [label(*row) for row in records.rows]
    for cell, arm in records.rows:
        named = [*records.sweep["against"], *against[cell]] if cell != BASE else []
        others = [n if n in rows else f"{n} / {arm}" for n in ["pretrained", *named]]
        pairs |= {(label(cell, arm), o): None for o in others if o != label(cell, arm)}
    return [row for pair in pairs for row in _rows(records, [pair], "fid", "exploratory", "")]


def _rows(records: Records, pairs: list, measure: str, kind: str, ablation: int | str) -> list:
    """The rows of pairs that are one family."""
    values = records.by_unit[measure].copy()
    values.columns = [label(*row) for row in values.columns]
    if values[[x for pair in pairs for x in pair]].isna().any(axis=None):
        return []
    distance = gap(records, measure)
    margin = records.parameters["margin"] * distance
    d = [(values[a] - values[b]).to_numpy() for a, b in pairs]
    rows = family(d, records.parameters["confidence"], margin)
    for (a, b), row in zip(pairs, rows, strict=True):
        row |= {"ablation": ablation, "a": a, "b": b, "kind": kind, "measure": measure}
        row |= {"units": f"{UNITS[records.unit]}s", "margin": margin}
        row["relative"] = row["effect"] / values[b].mean()
        row |= {"share": row["effect"] / distance}
        row |= {f"share_{end}": row[end] / distance for end in ("low", "high")}
    return rows


def gate_by_seed(gate: pd.DataFrame, level: float) -> pd.DataFrame:
    """Rows of ``gate`` (records.COLUMNS) as shares of the loss of the model of all timesteps.

    ``relative`` is test loss minus that model's, ``half`` half of its interval over images, which
    are clusters: the draws of one image depend on each other (``se``).
    """
    found = gate[gate["model"] != "all_plain"]
    base = found["loss"] - found["difference"]
    z = student.ppf((1 + level) / 2, found["images"].to_numpy(int) - 1)
    return found.assign(relative=found["difference"] / base, half=z * found["se"] / base)


def gate(records: Records) -> pd.DataFrame:
    """The gate's mean over training seeds with its t interval; a row per model and range.

    With a single training seed the interval is the one over images.
    """
    rows, level = [], records.parameters["confidence"]
    for keys, part in gate_by_seed(records.gate, level).groupby(GATE, sort=False):
        mean, units, n = part["relative"].mean(), "training seeds", len(part)
        low, high, _ = t_interval(part["relative"], level)
        if n == 1:
            units, n, half = "images", part["images"].item(), part["half"].item()
            low, high = mean - half, mean + half
        rows.append((*keys, units, n, mean, low, high))
    return pd.DataFrame(rows, columns=[*GATE, "units", "n_units", "relative", "low", "high"])
