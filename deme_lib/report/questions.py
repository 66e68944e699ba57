"""The questions that the paper leaves open, answered from records: a table and a sentence each.

Every answer is read off intervals. Where one contains 0, nothing is said but that no difference was
found: an interval that wide could not have seen a smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from deme_lib.report import comparisons, sweep_tables, tables

SWEEPS = {"ranges": "N", "probability": "p", "cuts": "how ranges are cut"}
"""Sweep -> what it varies."""


@dataclass(frozen=True)
class Answer:
    """A question, the rows that answer it as printed (may be none), and what they say."""

    question: str
    table: pd.DataFrame
    text: str


def answers(records: tables.Records, sweeps: Path) -> list[Answer]:
    """One for each question, in the paper notes' order.

    Args:
        sweeps: folder of the sweeps' records; what is not there was not run.
    """
    return [
        _finetuning(records),
        _beaten(
            records,
            "Does merging N timestep experts beat merging N all-timestep finetunes that differ "
            "only in their random draws (a soup)?",
            [("merged", "soup"), ("merged_uniform", "soup_uniform")],
        ),
        _beaten(
            records,
            "Does the merge beat the routed and the averaged ensemble, outside sampling noise?",
            [("merged", "routed"), ("merged", "averaged")],
        ),
        _searched(records),
        _beaten(
            records,
            "Is it more than shrinkage: does the merge beat one task vector alone, scaled?",
            [("merged", "one_scaled"), ("merged", "best_single")],
        ),
        _conflict(records),
        _costs(records),
        _choices(Path(sweeps)),
    ]


def _finetuning(records: tables.Records) -> Answer:
    """The first pair decides: equal training, and a search on both sides."""
    pairs = [("merged", "all_scaled"), ("merged", "all_same")]
    pairs += [("all_same", "pretrained"), ("all_plain", "pretrained")]
    rows = [comparisons.between(records, a, b) for a, b in pairs]
    beyond, gain = rows[0]["outcome"], rows[2]["outcome"]
    lead = {"better": "not all of it", "worse": "the merge is worse than it"}.get(beyond)
    if lead is None and gain == "better":
        lead = "not decided: the control gains too, and no further gain of the merge was found"
    text = _sentence(records, lead or "not decided", rows)
    if beyond == comparisons.NONE_FOUND:
        text += _allowed(records, rows[0])
    return Answer(
        "Does finetuning on all timesteps with the same number of steps, learning rate, EMA and "
        "consistency loss explain the gain?",
        _table(records, rows),
        text,
    )


def _allowed(records: tables.Records, row: dict) -> str:
    """How much of the merge's gain the interval of the deciding pair leaves to merging."""
    gain = -comparisons.differences(records, "merged", "pretrained", "fid").mean()
    if gain <= 0:
        return ""
    ends = [-(row["fid"] + sign * row["fid_halfwidth"]) / gain for sign in (1, -1)]
    low, high = (f"{round(100 * share)} %".replace("-", "−") for share in ends)
    pair = f"{records.titles[row['a']]} − {records.titles[row['b']]}"
    return (
        f" The interval of {pair} allows a further gain from {low} to {high} of the merge's whole "
        f"gain over the pretrained model (the mean, {gain:.2g})."
    )


def _beaten(
    records: tables.Records, question: str, pairs: list[tuple[str, str]], where: str = ""
) -> Answer:
    """Whether every first arm beats its second."""
    rows = [comparisons.between(records, a, b) for a, b in pairs]
    lead = _lead({row["outcome"] for row in rows})
    return Answer(question, _table(records, rows), _sentence(records, lead, rows, where))


def _searched(records: tables.Records) -> Answer:
    question = (
        "Do searched weights beat uniform 1/N when images of other noise are scored than those "
        "searched on?"
    )
    if (weights := records.parameters["merge_weights"]) != "search":
        text = f"Not answered by this run: its weights were not searched (merge_weights: {weights})"
        return Answer(question, pd.DataFrame(), f"{text}.")
    return _beaten(
        records, question, [("merged", "merged_uniform")], " on noise that no search saw"
    )


def _lead(outcomes: set[str]) -> str:
    """The answer to "is it better?" that outcomes of several comparisons have in common."""
    if len(outcomes) == 1:
        return {
            "better": "yes",
            "worse": "no, it is worse",
            comparisons.NONE_FOUND: "not decided",
        }[outcomes.pop()]
    if "worse" not in outcomes:
        return "in part"
    return "it depends on the comparison" if "better" in outcomes else "no"


def _sentence(records: tables.Records, lead: str, rows: list[dict], where: str = "") -> str:
    outcomes = "; ".join(comparisons.against(records, row) for row in rows)
    return f"By FID{where} and {records.scope}, {lead}. {outcomes}."


def _table(records: tables.Records, rows: list[dict]) -> pd.DataFrame:
    second = records.parameters["second_features"]
    measures = {"fid": "FID"} | ({"fid_second": f"FID ({second})"} if second else {})
    measures["pixel"] = "pixel distance"
    return pd.DataFrame(
        {
            "a − b": f"{records.titles[row['a']]} − {records.titles[row['b']]}",
            "kind": row["kind"],
            "level": f"{100 * row['level']:.4g} %",
            **{name: _signed(row[k], row[f"{k}_halfwidth"]) for k, name in measures.items()},
            "verdict": row["verdict"],
        }
        for row in rows
    )


def _signed(mean: float, halfwidth: float) -> str:
    return tables.plus_minus(mean, halfwidth, signed=True)


def _conflict(records: tables.Records) -> Answer:
    """Cosines of gradients at timesteps of different ranges, merged minus pretrained by draw."""
    question = "Do gradients of different ranges conflict less after merging?"
    n, steps = records.parameters["n_ranges"], records.parameters["num_train_timesteps"]
    g = records.gradients
    pairs = g[g["timestep1"] * n // steps < g["timestep2"] * n // steps]  # each pair once
    by_draw = pairs.assign(negative=pairs["cosine"] < 0).groupby(["draw", "model"])
    means = by_draw[["cosine", "negative"]].mean().unstack("model").dropna()
    if len(means) < 2 or not {"pretrained", "merged"} <= set(pairs["model"]):
        needed = "cosines between different ranges, of both models, for two or more noise draws"
        return Answer(question, pd.DataFrame(), f"Not answered by these records: needs {needed}.")
    shown = {"cosine": "mean cosine", "negative": "share of negative pairs"}
    level = records.parameters["confidence"]
    rows, change = {"model": ["pretrained", "merged", "merged − pretrained"]}, {}
    for measure, name in shown.items():
        before, after = means[measure]["pretrained"], means[measure]["merged"]
        change[measure] = comparisons.paired_interval(after - before, level)
        rows[name] = [tables.plus_minus(x.mean(), x.std()) for x in (before, after)]
        rows[name].append(_signed(*change[measure]))
    lead = {"better": "more, not less", "worse": "yes, less"}.get(  # of a cosine, more is better
        comparisons.outcome_of(*change["cosine"]), "not decided, as no difference was found"
    )
    text = (
        f"By the mean cosine (1: no conflict) between the {n} equal ranges, {lead}: merged − "
        f"pretrained {_signed(*change['cosine'])} ({100 * level:g} % paired t interval over "
        f"{len(means)} noise draws{records.of_first}, exploratory; ± of a model is the sd over "
        "draws; nothing but the draw of noise is covered)."
    )
    return Answer(question, pd.DataFrame(rows), text)


def _costs(records: tables.Records) -> Answer:
    table = tables.every_arm(records)
    columns = {
        "training_steps": "training steps",
        "parameters": "parameters held",
        "calls_per_image": "denoiser calls per image",
        "search_losses": "search: losses tried",
        "search_images": "search: images made",
    }
    printed = {"arm": table["title"]}
    printed |= {name: table[column].map(tables.count) for column, name in columns.items()}
    by_arm = table.set_index("arm")
    steps = by_arm["training_steps"].drop("pretrained")
    relative = [_relative_cost(by_arm, arm) for arm in ("merged", "routed", "averaged")]
    text = (
        f"Finetuning takes {' to '.join(map(tables.count, sorted({steps.min(), steps.max()})))} "
        f"steps an arm; beside the pretrained model, {'; '.join(relative)}; a search makes up to "
        f"{tables.count(table['search_images'].max())} images."
    )
    question = (
        "What does each row cost: training steps, parameters held, denoiser calls per image, "
        "search samples?"
    )
    return Answer(question, pd.DataFrame(printed), text)


def _relative_cost(by_arm: pd.DataFrame, arm: str) -> str:
    row, base = by_arm.loc[arm], by_arm.loc["pretrained"]
    held, calls = (row[k] / base[k] for k in ("parameters", "calls_per_image"))
    return f"{row['title']} holds {held:.2f} times the parameters and calls the denoiser " + (
        "as often" if calls == 1 else f"{calls:.3g} times as often"
    )


def _choices(folder: Path) -> Answer:
    parts, said = [], []
    for name, what in SWEEPS.items():
        if not (folder / f"{name}.json").is_file():
            said.append(f"{what}: not run (`make sweep SWEEP=params/sweeps/{name}.yaml`).")
            continue
        sweep = sweep_tables.read(folder.parent, name)
        rows = sweep_tables.printed(sweep).rename(columns={sweep.document["axis"]: "cell"})
        parts.append(rows.iloc[len(sweep.document["beside"]) :].assign(sweep=what))
        said.append(f"{what}: {_against(sweep)}")
    table = pd.concat(parts).fillna("–") if parts else pd.DataFrame()
    if parts:
        table = table[["sweep", *table.columns.drop("sweep")]]
    question = "N, p, and how ranges are cut (uniform, equal log-SNR, overlapping, random)"
    return Answer(question, table, "\n".join(f"- {text}" for text in said))


def _against(sweep: sweep_tables.Sweep) -> str:
    """The cell of lowest FID, and which comparisons of the sweep find a difference."""
    means = {row: sweep.fid(*row).mean() for row in sweep.cell_rows}
    lowest = min(means, key=means.get)
    level = 1 - (1 - sweep.parameters["confidence"]) / len(sweep.changes)
    found = []
    for row, other in sweep.changes:
        outcome = comparisons.outcome_of(*sweep.compare(row, other, level))
        if outcome in ("better", "worse"):
            found.append(f"{sweep.label(row)} {outcome} than {sweep.label(other, row[1])}")
    return (
        f"lowest mean FID: {sweep.label(lowest)}, {tables.number(means[lowest])} (not a test); "
        f"{', '.join(found) or 'no difference found between a cell and what it is compared with'} "
        f"({100 * level:.4g} % paired t intervals, Bonferroni over {len(sweep.changes)}, "
        f"exploratory), {tables.scope(sweep.metrics)}. One run per cell: what differs between "
        "cells is also the luck of their training."
    )
