"""Paired differences between arms, their t intervals, and what they say in words.

Every interval here covers sampling noise alone: there is one training seed, so a verdict holds
"for these weights" and says nothing about training again.
"""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pandas as pd
import scipy.stats

from deme_lib import tables

IN_PLACE_ONLY = ("merged_uniform", "averaged")
"""Both combine the experts at 1 / N, one in weights, one in outputs: only the place differs."""


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
    """(a, b, kind, level) of an ablation: primaries first, Bonferroni-corrected over them.

    A pair that is primary in the other ablation is listed there only.
    """
    arms, confidence = records.arms_of(number), records.parameters["confidence"]
    primary = _primary(records, number)
    others = [(a, "pretrained") for a in arms] + [("merged", b) for b in arms]
    others.append(IN_PLACE_ONLY)
    seen, chosen = {frozenset(p) for n in tables.ABLATIONS for p in _primary(records, n)}, []
    for a, b in others:
        if a != b and {a, b} <= set(arms) and frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            chosen.append((a, b, "exploratory", confidence))
    level = 1 - (1 - confidence) / max(len(primary), 1)
    return [(a, b, "primary", level) for a, b in primary] + chosen


def _primary(records: tables.Records, number: int) -> list[tuple[str, str]]:
    """The pairs that the parameters name as primary for an ablation."""
    names = {1: "primary_decoupling", 2: "primary_merging"}[number]
    arms = records.arms_of(number)
    pairs = [tuple(text.split(" - ")) for text in records.parameters[names]]
    for pair in pairs:
        if len(pair) != 2 or not set(pair) <= set(arms):
            raise ValueError(f'{names}: {" - ".join(pair)!r} is not "arm - arm" of {arms}')
    return pairs


def paired(records: tables.Records, number: int) -> pd.DataFrame:
    """Differences ``a - b`` paired over sampling seeds, a row per comparison.

    Each measure has its mean difference and, as ``<measure>_halfwidth``, its t interval at
    ``level``; the verdict reads FID. Negative: a is better, but for the inception score.
    """
    rows = []
    for a, b, kind, level in comparisons(records, number):
        row = {"ablation": number, "a": a, "b": b, "kind": kind, "level": level}
        for measure in tables.COMPARED:
            d = differences(records, a, b, measure)
            row[measure], row[f"{measure}_halfwidth"] = paired_interval(d, level)
        mean, half = row["fid"], row["fid_halfwidth"]
        words = in_words(records.titles[a], records.titles[b], mean, half)
        words += "" if kind == "primary" else ", uncorrected"
        rows.append({**row, "outcome": outcome_of(mean, half), "verdict": words})
    return pd.DataFrame(rows)


def outcome_of(mean: float, halfwidth: float) -> str:
    """What the interval ``mean ± halfwidth`` of ``a - b`` in a distance says of a."""
    if abs(mean) <= halfwidth:
        return "no difference"
    return "better" if mean < 0 else "worse"


def in_words(a: str, b: str, mean: float, halfwidth: float) -> str:
    """The outcome as a clause that says no more than the interval does."""
    outcome = outcome_of(mean, halfwidth)
    if mean == halfwidth == 0:
        return "the same numbers for every seed"
    if outcome == "no difference":
        return f"no difference in FID found (half-width {halfwidth:.2g})"
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
        *_merging_kept(records, table),
        f"Lowest mean FID of the table: {best['title']}, {best['fid_mean']:.3f} (not a test).",
        *_weights(records, list(dict.fromkeys([*primary["a"], *primary["b"], "merged"]))),
        f"The intervals are over {seeds} sampling seeds of one training seed. "
        f"They {tables.COVERS}.",
    ]
    return " ".join(sentences)


def in_short(records: tables.Records) -> str:
    """One sentence an ablation: who was compared, and the outcome in FID."""
    sentences = []
    for number in tables.ABLATIONS:
        table = paired(records, number)
        soup = (table["a"] == "merged") & (table["b"] == "soup")
        rows = table[(table["kind"] == "primary") | soup]
        outcomes = [
            f"{records.titles[row['a']]} against {records.titles[row['b']]}: {row['outcome']}"
            + ("" if row["kind"] == "primary" else " (exploratory)")
            for _, row in rows.iterrows()
        ]
        sentences.append(f"Ablation {number}: {'; '.join(outcomes)}.")
    return f"**In short**, by FID and for these weights. {' '.join(sentences)}"


def _comparison(records: tables.Records, row: pd.Series, m: int) -> str:
    level = f"{100 * row['level']:.4g} % paired t interval"
    level += f", Bonferroni over {m}" if m > 1 else ""
    text = f"Primary, {_measured(records, row, level)}."
    second = {"fid_second": records.parameters["second_features"], "pixel": "pixels"}
    checks = [
        f"{name} {tables.plus_minus(row[k], row[f'{k}_halfwidth'], signed=True)}, "
        f"{outcome_of(row[k], row[f'{k}_halfwidth'])}"
        for k, name in second.items()
        if not np.isnan(row[k])
    ]
    return f"{text} By {'; by '.join(checks)}." if checks else text


def _measured(records: tables.Records, row: pd.Series, level: str) -> str:
    fid = tables.plus_minus(row["fid"], row["fid_halfwidth"], signed=True)
    names = f"{records.titles[row['a']]} − {records.titles[row['b']]}"
    return f"{names}: FID {fid} ({level}): {row['verdict']}"


def _merging_kept(records: tables.Records, table: pd.DataFrame) -> list[str]:
    """Where ablation 1 only lists merged − soup as exploratory, a sentence that reads it."""
    found = table.query("a == 'merged' and b == 'soup' and kind == 'exploratory'")
    if found.empty:
        return []
    row = found.iloc[0]
    level = f"{100 * row['level']:.4g} % paired t interval, exploratory"
    return [
        "A single model over all timesteps lacks decoupling and the averaging of copies at once; "
        f"with merging kept but ranges removed, {_measured(records, row, level)}."
    ]


def metric(records: tables.Records) -> str:
    """A paragraph: whether FID was accepted, its noise at the tables' n, and the classifiers."""
    a, same = records.acceptance, {True: "the same way", False: "differently"}
    halves, differ = a["halves"], 100 * a["halves"]["relative_difference_rms"]
    text = (
        f"**The metric** was {'accepted' if a['accepted'] else 'not accepted'}: FIDs of two halves "
        f"({halves['n_half']:,} images each, {halves['features']}, {halves['repeats']} repeats) "
        f"of the pretrained model's images differ by {differ:.2g} "
        "% (root mean square; 10 % are allowed)"
    )
    if a["same_ranking"] is not None:
        snapshots = f"{len(a['ranking'])} snapshots of pretraining"
        text += f", and both feature spaces rank {snapshots} {same[a['same_ranking']]}"
    fids = records.metrics.query("arm == 'pretrained'")["fid"].to_numpy(dtype=float)
    n = records.metrics["n"].iloc[0]
    noise = (
        f"At the n of the tables (n = {n:,}) two sampling seeds of the pretrained model differ by "
        f"{100 * seed_difference(fids):.2g} % (rms), so only differences on the same noise are "
        "compared."
    )
    return " ".join([f"{text}.", noise, *_classifiers(records)])


def seed_difference(values: np.ndarray) -> float:
    """Root mean square of ``|a - b| / mean(a, b)`` over all pairs of [S] values, S >= 2."""
    relative = [2 * (a - b) / (a + b) for a, b in combinations(values, 2)]
    return float(np.sqrt(np.mean(np.square(relative))))


def _classifiers(records: tables.Records) -> list[str]:
    """How the two feature spaces rank the arms; nothing where there is only one."""
    means = records.metrics.groupby("arm")[["fid", "fid_second"]].mean()
    if means["fid_second"].isna().any():
        return []
    first, second = (records.parameters[k] for k in ("features", "second_features"))
    lowest = [records.titles[means[k].idxmin()] for k in means]
    rank = f"{scipy.stats.spearmanr(means)[0]:.2f}".replace("-", "−")
    return [
        f"Over the {len(means)} arms, mean FID by {first} and by {second} have Spearman rank "
        f"correlation {rank}; the "
        f'lowest mean is of "{lowest[0]}" by {first} and of "{lowest[1]}" by {second}.'
    ]


def copying(records: tables.Records) -> str:
    """A paragraph: are generated images nearer to the training images than test images are?"""
    table = records.neighbours.set_index("arm")
    test, arms = table.loc["test"], table.drop("test")
    medians, closer = arms["median"], int((arms["median"] < test["median"]).sum())
    who = {0: "of no arm", len(arms): f"of all {len(arms)} arms"}
    sizes = " or ".join(f"{n:,}" for n in sorted(arms["n"].unique()))
    return (
        "**Copying.** The median distance to the nearest training image is "
        f"{medians.min():.3f} to {medians.max():.3f} over the arms (n = {sizes} each) and "
        f"{test['median']:.3f} for test images (n = {int(test['n']):,}): by this median the "
        f"generated images {who.get(closer, f'of {closer} of {len(arms)} arms')} lie closer to "
        "the training images than test images do."
    )


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
