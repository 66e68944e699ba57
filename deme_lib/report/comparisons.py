"""Paired differences between arms, their t intervals, and what they say in words.

With one training seed every interval covers sampling noise alone: a verdict holds "for these
weights" and says nothing about training again. With several it covers training and the search too.
"""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pandas as pd
import scipy.stats

from deme_lib.experiment.arms import ARMS, search_of
from deme_lib.report import tables

IN_PLACE_ONLY = ("merged_uniform", "averaged")
"""Both combine the experts at 1 / N, one in weights, one in outputs: only the place differs."""

NONE_FOUND = "no difference found"
"""The outcome where an interval contains 0: it may have been too wide to see a difference."""


def paired_interval(differences: np.ndarray, level: float) -> tuple[float, float]:
    """Mean of paired differences and the half-width of its t interval.

    With one training seed (S = 1) this is the t interval over sampling seeds. With several, both
    are random and crossed, d_sk = mean + t_s + u_k + e_sk, with mean squares MS_T of training seeds
    and MS_K of sampling seeds (the two-way layout with one observation per cell; Searle, Casella
    and McCulloch, Variance Components, 1992, ch. 4). The variance of the mean,
    var(t) / S + var(u) / K + var(e) / (S K), is estimated by (MS_T + MS_K) / (S K). That is too
    large by var(e) / (S K): subtracting the interaction's mean square would make it unbiased, but
    may leave nothing, or a negative number, where seeds are few. A sum of mean squares has the
    degrees of freedom of Satterthwaite (1946):
    (MS_T + MS_K)^2 / (MS_T^2 / (S - 1) + MS_K^2 / (K - 1)).

    Args:
        differences: [S, K] or [K], one a - b per training seed and sampling seed; at least 2 of
            one of the two, and where the other is 1, the t interval is over those alone.
        level: confidence in (0, 1).
    """
    d = np.atleast_2d(np.asarray(differences, dtype=float))
    if d.size < 2:
        raise ValueError(f"a paired interval needs two sampling seeds, got {d.size}")
    means = [d.mean(axis=axis) for axis in (1, 0) if d.shape[1 - axis] > 1]  # by s, by k
    variances = np.array([m.var(ddof=1) / m.size for m in means])  # MS_T / (S K), MS_K / (S K)
    degrees = np.array([m.size - 1 for m in means])
    variance = variances.sum()
    if variance == 0:
        return float(d.mean()), 0.0
    quantile = scipy.stats.t.ppf((1 + level) / 2, variance**2 / (variances**2 / degrees).sum())
    return float(d.mean()), float(quantile * np.sqrt(variance))


def differences(records: tables.Records, a: str, b: str, measure: str) -> np.ndarray:
    """[S, K] ``a - b`` of a measure, by training seed and sampling seed in ascending order."""
    values = records.metrics.pivot(index="training_seed", columns=["arm", "seed"], values=measure)
    values = values.sort_index().sort_index(axis=1)
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
    """Differences ``a - b`` paired over seeds, a row per comparison.

    Each measure has its mean difference and, as ``<measure>_halfwidth``, its t interval at
    ``level``; the verdict reads FID. Negative: a is better, but for the inception score.
    """
    rows = [compare(records, *named) for named in comparisons(records, number)]
    return pd.DataFrame(rows).assign(ablation=number)[["ablation", *rows[0]]]


def compare(records: tables.Records, a: str, b: str, kind: str, level: float) -> dict:
    """A row of ``paired``."""
    row = {"a": a, "b": b, "kind": kind, "level": level}
    for measure in tables.COMPARED:
        d = differences(records, a, b, measure)
        row[measure], row[f"{measure}_halfwidth"] = paired_interval(d, level)
    mean, half = row["fid"], row["fid_halfwidth"]
    words = in_words(records.titles[a], records.titles[b], mean, half, records.scope)
    words += "" if kind == "primary" else ", uncorrected"
    return {**row, "outcome": outcome_of(mean, half), "verdict": words}


def between(records: tables.Records, a: str, b: str) -> dict:
    """One comparison: at its ablation's level where it is primary there, else exploratory."""
    for number in tables.ABLATIONS:
        for x, y, kind, level in comparisons(records, number):
            if kind == "primary" and {x, y} == {a, b}:
                return compare(records, a, b, kind, level)
    return compare(records, a, b, "exploratory", records.parameters["confidence"])


def outcome_of(mean: float, halfwidth: float) -> str:
    """What the interval ``mean ± halfwidth`` of ``a - b`` in a distance says of a."""
    if abs(mean) <= halfwidth:
        return NONE_FOUND
    return "better" if mean < 0 else "worse"


def in_words(a: str, b: str, mean: float, halfwidth: float, scope: str) -> str:
    """The outcome as a clause that says no more than the interval does."""
    outcome = outcome_of(mean, halfwidth)
    if mean == halfwidth == 0:
        return "the same numbers for every seed"
    if outcome == NONE_FOUND:
        return f"no difference in FID found (half-width {halfwidth:.2g})"
    return f"{a} {outcome} than {b} {scope}"


def verdict(records: tables.Records, number: int) -> str:
    """A paragraph: the primary comparisons of an ablation and what limits them."""
    table, rows = paired(records, number), tables.ablation(records, number).iloc[:-1]
    primary = table[table["kind"] == "primary"]
    best = rows.loc[rows["fid_mean"].idxmin()]
    sentences = [
        f"**Ablation {number}, {tables.ABLATIONS[number]}.**",
        *(_comparison(records, row, len(primary)) for _, row in primary.iterrows()),
        *_merging_kept(records, table),
        *_place_only(records, table),
        f"Lowest mean FID of the table: {best['title']}, {best['fid_mean']:.3f} (not a test).",
        *_weights(records, list(dict.fromkeys([*primary["a"], *primary["b"], "merged"]))),
        f"The intervals are over {_seeds(records)}. They {tables.covers(records)}.",
    ]
    return " ".join(sentences)


def _seeds(records: tables.Records) -> str:
    sampling, training = len(records.sampling_seeds), len(records.training_seeds)
    trained = "of one training seed" if training == 1 else f"times {training} training seeds"
    return f"{sampling} sampling seeds {trained}"


def in_short(records: tables.Records) -> str:
    """One sentence an ablation: who was compared, and the outcome in FID."""
    sentences = []
    for number in tables.ABLATIONS:
        table = paired(records, number)
        soup = (table["a"] == "merged") & (table["b"] == "soup")
        rows = table[(table["kind"] == "primary") | soup]
        outcomes = [against(records, row) for _, row in rows.iterrows()]
        sentences.append(f"Ablation {number}: {'; '.join(outcomes)}.")
    return f"**In short**, by FID and {records.scope}. {' '.join(sentences)}"


def against(records: tables.Records, row: pd.Series | dict) -> str:
    """Who was compared, and the outcome, without numbers."""
    kind = "" if row["kind"] == "primary" else " (exploratory)"
    return f"{records.titles[row['a']]} against {records.titles[row['b']]}: {row['outcome']}{kind}"


def _comparison(records: tables.Records, row: pd.Series, m: int) -> str:
    level = f"{100 * row['level']:.4g} % paired t interval"
    level += f", Bonferroni over {m}" if m > 1 else ""
    return " ".join(
        [
            f"Primary, {_measured(records, row, level)}.",
            *_checks(records, row),
            *_test_loss(records, row),
            *_on_search_noise(records, row),
        ]
    )


def _checks(records: tables.Records, row: pd.Series) -> list[str]:
    """What every other distance finds."""
    second = records.parameters["second_features"]
    names = {"fid_second": (second, 1), "pixel": ("pixels", 1)}
    names["kid"] = ("KID × 1000, the only one to test images,", 1000)
    checks = []
    for measure, (name, scale) in names.items():
        mean, half = scale * row[measure], scale * row[f"{measure}_halfwidth"]
        if not np.isnan(mean):
            found = tables.plus_minus(mean, half, signed=True)
            checks.append(f"{name} {found}, {outcome_of(mean, half)}")
    return [f"By {'; by '.join(checks)}."] if checks else []


def _test_loss(records: tables.Records, row: pd.Series) -> list[str]:
    """Where the arm of lower mean FID has the higher test loss, a sentence that says so."""
    losses = records.arms.groupby("arm")["test_loss"].mean()
    low, high = (row["a"], row["b"]) if row["fid"] < 0 else (row["b"], row["a"])
    if row["fid"] == 0 or not losses[low] > losses[high]:
        return []
    return [
        f"Mean FID is lower for {records.titles[low]}, but test loss is lower for "
        f"{records.titles[high]}: {losses[high]:.5f} against {losses[low]:.5f} (no interval)."
    ]


def _on_search_noise(records: tables.Records, row: pd.Series) -> list[str]:
    """Where searches chose both arms, their FIDs there: does the difference keep its sign?"""
    a, b = (_search_fid(records, row[side]) for side in ("a", "b"))
    if a is None or b is None:
        return []
    product = (a - b) * row["fid"]
    sign = ", of the other sign" if product < 0 else ", of the same sign" if product > 0 else ""
    return [
        f"On the searches' own noise{records.of_first} (one stream, n = "
        f"{records.parameters['search_samples']:,}, on which the weights were chosen) the "
        f"difference of the chosen candidates' FIDs is {tables.signed(a - b)}{sign}: a "
        "further draw, biased for both arms, shown so that a disagreement in sign with the "
        "evaluation is seen."
    ]


def _search_fid(records: tables.Records, name: str) -> float | None:
    """FID by which a search chose this very arm; none for arms that only borrow its weights."""
    arm = ARMS[name]
    if arm.combine != "parameters" or arm.weights == "best_single":
        return None
    of_search = records.search["search"] == search_of(arm, records.parameters["merge_weights"])
    fids = records.search.loc[of_search & (records.search["chosen"] == 1), "fid"].dropna()
    return None if fids.empty else float(fids.iloc[0])


def _measured(records: tables.Records, row: pd.Series, level: str) -> str:
    fid = tables.plus_minus(row["fid"], row["fid_halfwidth"], signed=True)
    names = f"{records.titles[row['a']]} − {records.titles[row['b']]}"
    return f"{names}: FID {fid} ({level}): {row['verdict']}"


def _merging_kept(records: tables.Records, table: pd.DataFrame) -> list[str]:
    """Where ablation 1 only lists merged − soup as exploratory, a sentence that reads it."""
    said = (
        "A single model over all timesteps lacks decoupling and the averaging of copies at once; "
        "with merging kept but ranges removed"
    )
    return _exploratory(records, table, ("merged", "soup"), said)


def _place_only(records: tables.Records, table: pd.DataFrame) -> list[str]:
    """Where only the merge was searched, a sentence that reads both at 1 / N."""
    if records.parameters["merge_weights"] != "search":
        return []
    said = (
        f"The {records.titles['averaged']} had no search while {records.titles['merged']} had one; "
        "with weights 1/N and no search on both sides"
    )
    return _exploratory(records, table, IN_PLACE_ONLY, said)


def _exploratory(
    records: tables.Records, table: pd.DataFrame, pair: tuple[str, str], said: str
) -> list[str]:
    """A sentence on a pair; nothing where it is primary or of the other ablation."""
    found = table[[p == pair for p in zip(table["a"], table["b"], strict=True)]]
    found = found[found["kind"] == "exploratory"]
    if found.empty:
        return []
    row = found.iloc[0]
    level = f"{100 * row['level']:.4g} % paired t interval, exploratory"
    return [f"{said}, {_measured(records, row, level)}."]


def metric(records: tables.Records) -> str:
    """A paragraph: whether FID was accepted, its noise at the tables' n, and the classifiers."""
    a, same = records.acceptance, {True: "the same way", False: "differently"}
    halves, differ = a["halves"], 100 * a["halves"]["relative_difference_rms"]
    text = (
        f"**The metric** was {'accepted' if a['accepted'] else 'not accepted'}: FIDs of two halves "
        f"({halves['n_half']:,} images each, {halves['features']}, {halves['repeats']} repeats) "
        f"of the pretrained model's images{records.of_first} differ by {differ:.2g} "
        "% (root mean square; 10 % are allowed)"
    )
    if a["same_ranking"] is not None:
        snapshots = f"{len(a['ranking'])} snapshots of pretraining"
        text += f", and both feature spaces rank {snapshots} {same[a['same_ranking']]}"
    pretrained = records.metrics.query("arm == 'pretrained'")
    fids = pretrained.pivot(index="training_seed", columns="seed", values="fid").to_numpy()
    n = records.metrics["n"].iloc[0]
    noise = (
        f"At the n of the tables (n = {n:,}) two sampling seeds of the pretrained model differ by "
        f"{100 * seed_difference(fids):.2g} % (rms), so only differences on the same noise are "
        "compared."
    )
    return " ".join([f"{text}.", *_not_shown(a), noise, *_classifiers(records)])


def _not_shown(acceptance: dict) -> list[str]:
    """What an acceptance leaves open, with the smallest difference that it did rank."""
    if not acceptance["accepted"]:
        return []
    if not acceptance["same_ranking"] or len(acceptance["ranking"]) < 2:
        return ["Agreement of halves does not show that arms are ranked rightly."]
    fids = sorted(row["fid"] for row in acceptance["ranking"])
    gap = f"{np.diff(fids).min():.2g}"
    return [
        f"Agreement of halves and of {len(fids)} training lengths, whose FIDs lie {gap} or more "
        "apart, does not show that arms which differ by less are ranked rightly."
    ]


def seed_difference(values: np.ndarray) -> float:
    """Root mean square of ``|a - b| / mean(a, b)`` over all pairs within rows of [S, K] values."""
    relative = [2 * (a - b) / (a + b) for row in values for a, b in combinations(row, 2)]
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
        f"**Copying.** The median distance to the nearest training image{records.of_first} is "
        f"{medians.min():.3f} to {medians.max():.3f} over the arms (n = {sizes} each) and "
        f"{test['median']:.3f} for test images (n = {int(test['n']):,}): by this median the "
        f"generated images {who.get(closer, f'of {closer} of {len(arms)} arms')} lie closer to "
        "the training images than test images do."
    )


def _weights(records: tables.Records, arms: list[str]) -> list[str]:
    """The weights behind the arms named, per training seed, and whether each merge is one."""
    known = records.arms.dropna(subset=["weights"]).sort_values("training_seed")
    listed = []
    for arm in arms:
        texts = [_tuple(w) for w in known.loc[known["arm"] == arm, "weights"]]
        if texts:
            texts = texts if len(set(texts)) > 1 else texts[:1]
            listed.append(f"{records.titles[arm]} {' / '.join(texts)}")
    if not listed:
        return []
    seeds = records.training_seeds
    which = f" (training seeds {' / '.join(map(str, seeds))})" if len(seeds) > 1 else ""
    return [f"Weights{which}: {'; '.join(listed)}.", *_no_merge(records, known)]


def _no_merge(records: tables.Records, known: pd.DataFrame) -> list[str]:
    """Where a merge has fewer than two experts in it, a sentence that says so."""
    merged = known[known["arm"] == "merged"]
    few = [np.count_nonzero(json.loads(w)) < 2 for w in merged["weights"]]
    seeds = ", ".join(map(str, merged.loc[few, "training_seed"]))
    if not seeds or records.parameters["n_ranges"] < 2:
        return []
    where = f" (training seed {seeds})" if len(records.training_seeds) > 1 else ""
    searched = records.parameters["merge_weights"] == "search"
    said = "the search chose no merge" if searched else "these weights are no merge"
    return [f"Fewer than two weights are not zero{where}: {said}."]


def _tuple(weights: str) -> str:
    return f"({', '.join(f'{x:g}' for x in json.loads(weights))})"
