"""Paired differences between arms, their t intervals, and what they say in words.

Every interval here covers sampling noise alone: there is one training seed, so a verdict holds
"for these weights" and says nothing about training again.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import scipy.stats

from deme_lib import tables


def paired_interval(differences: np.ndarray, level: float) -> tuple[float, float]:
    """Mean of paired differences and the half-width of its t interval.

    Args:
        differences: [S], one a - b per sampling seed, S >= 2.
        level: confidence in (0, 1).
    """
    d = np.asarray(differences, dtype=float)
    if d.size < 2:
        raise ValueError(f"a paired interval needs two sampling seeds, got {d.size}")
    quantile = scipy.stats.t.ppf((1 + level) / 2, d.size - 1)
    return float(d.mean()), float(quantile * d.std(ddof=1) / np.sqrt(d.size))


def differences(records: tables.Records, a: str, b: str, measure: str) -> np.ndarray:
    """[S] ``a - b`` of a measure, one per sampling seed in ascending order."""
    values = records.metrics.pivot(index="seed", columns="arm", values=measure)
    return (values[a] - values[b]).to_numpy(dtype=float)


def comparisons(records: tables.Records, number: int) -> list[tuple[str, str, str, float]]:
    """(a, b, kind, level) of an ablation: primaries first, Bonferroni-corrected over them."""
    names = {1: "primary_decoupling", 2: "primary_merging"}[number]
    arms, confidence = records.arms_of(number), records.parameters["confidence"]
    primary = [tuple(text.split(" - ")) for text in records.parameters[names]]
    for pair in primary:
        if len(pair) != 2 or not set(pair) <= set(arms):
            raise ValueError(f'{names}: {" - ".join(pair)!r} is not "arm - arm" of {arms}')
    others = [(a, "pretrained") for a in arms] + [("merged", b) for b in arms]
    seen, chosen = {frozenset(p) for p in primary}, []
    for a, b in others:
        if a != b and {a, b} <= set(arms) and frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            chosen.append((a, b, "exploratory", confidence))
    level = 1 - (1 - confidence) / max(len(primary), 1)
    return [(a, b, "primary", level) for a, b in primary] + chosen


def paired(records: tables.Records, number: int) -> pd.DataFrame:
    """Differences ``a - b`` paired over sampling seeds, a row per comparison.

    Each measure has its mean difference and, as ``<measure>_halfwidth``, its t interval at
    ``level``; the verdict reads FID. Negative: a is better.
    """
    rows = []
    for a, b, kind, level in comparisons(records, number):
        row = {"ablation": number, "a": a, "b": b, "kind": kind, "level": level}
        for measure in tables.DISTANCES:
            d = differences(records, a, b, measure)
            row[measure], row[f"{measure}_halfwidth"] = paired_interval(d, level)
        mean, half = row["fid"], row["fid_halfwidth"]
        outcome, names = outcome_of(mean, half), (records.titles[a], records.titles[b])
        rows.append({**row, "outcome": outcome, "verdict": in_words(*names, mean, half)})
    return pd.DataFrame(rows)


def outcome_of(mean: float, halfwidth: float) -> str:
    """What the interval ``mean ± halfwidth`` of ``a - b`` in FID says of a, in a word or three."""
    if abs(mean) <= halfwidth:
        return "no difference found"
    return "better" if mean < 0 else "worse"


def in_words(a: str, b: str, mean: float, halfwidth: float) -> str:
    """The outcome as a clause that says no more than the interval does."""
    outcome = outcome_of(mean, halfwidth)
    if mean == halfwidth == 0:
        return "the same numbers for every seed"
    if outcome == "no difference found":
        return f"{outcome} (smallest visible: {halfwidth:.2g})"
    return f"{a} {outcome} than {b} for these weights"


def verdict(records: tables.Records, number: int) -> str:
    """A paragraph: the primary comparisons of an ablation and what limits them."""
    table, rows = paired(records, number), tables.ablation(records, number).iloc[:-1]
    primary = table[table["kind"] == "primary"]
    best = rows.loc[rows["fid_mean"].idxmin()]
    seeds = records.metrics["seed"].nunique()
    sentences = [
        f"**Ablation {number}, {tables.ABLATIONS[number]}.**",
        *(_comparison(records, row, len(primary)) for _, row in primary.iterrows()),
        f"Lowest mean FID of the table: {best['title']}, {best['fid_mean']:.3f} (not a test).",
        *_weights(records, list(dict.fromkeys([*primary["a"], *primary["b"], "merged"]))),
        f"The intervals are over {seeds} sampling seeds of one training seed: they cover "
        "sampling noise and not the noise of training.",
    ]
    return " ".join(sentences)


def _comparison(records: tables.Records, row: pd.Series, m: int) -> str:
    level = f"{100 * row['level']:.4g} % paired t interval"
    level += f", Bonferroni over {m}" if m > 1 else ""
    fid = tables.plus_minus(row["fid"], row["fid_halfwidth"], signed=True)
    names = f"{records.titles[row['a']]} − {records.titles[row['b']]}"
    text = f"Primary, {names}: FID {fid} ({level}): {row['verdict']}."
    second = {"fid_second": records.parameters["second_features"], "pixel": "pixels"}
    checks = [
        f"{name} {tables.plus_minus(row[k], row[f'{k}_halfwidth'], signed=True)}, "
        f"{_agreement(row['fid'], row[k])}"
        for k, name in second.items()
        if not np.isnan(row[k])
    ]
    return f"{text} By {'; by '.join(checks)}." if checks else text


def _agreement(fid: float, other: float) -> str:
    return "the same sign" if np.sign(fid) == np.sign(other) else "not the same sign"


def _weights(records: tables.Records, arms: list[str]) -> list[str]:
    """The weights behind the arms named, and whether the merge is one."""
    known = records.arms.set_index("arm")["weights"].dropna()
    weights = {a: json.loads(known[a]) for a in arms if a in known.index}
    if not weights:
        return []
    listed = [f"{records.titles[a]} ({', '.join(f'{x:g}' for x in w)})" for a, w in weights.items()]
    sentences = [f"Weights: {'; '.join(listed)}."]
    if "merged" in weights and np.count_nonzero(weights["merged"]) < 2:
        searched = records.parameters["merge_weights"] == "search"
        sentences.append(
            "Fewer than two weights are not zero: "
            + ("the search chose no merge." if searched else "these weights are no merge.")
        )
    return sentences
