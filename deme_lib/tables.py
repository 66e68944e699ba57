"""Records to tables: the two ablations, their paired differences, and what they say in words.

Reads the folder of records that the evaluation wrote; draws nothing, needs no weights, no torch.
Every interval here covers sampling noise alone: there is one training seed, so a verdict holds
"for these weights" and says nothing about training again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
from safetensors.numpy import load_file

ABLATIONS = {1: "remove decoupling", 2: "replace merging by an ensemble"}
DISTANCES = ["fid", "fid_second", "pixel", "kid"]
"""Measures compared in pairs; lower is better for each."""

COLUMNS = {
    "metrics": "arm seed n features steps fid fid_second pixel kid inception_score "
    "precision recall",
    "arms": "arm title ablation1 ablation2 parameters calls_per_image training_steps "
    "search_losses search_images weights test_loss",
    "losses": "arm bin_start bin_stop loss",
    "neighbours": "arm n q05 q25 median q75 q95",
    "search": "search weights loss fid chosen",
    "history": "run step learning_rate held_out_loss",
    "gradients": "timestep1 timestep2 cosine",
    "task_vectors": "range block q05 q25 median q75 q95",
    "plane": "w1 w2 loss expert1 expert2",
}
"""Record -> the columns it must have."""


@dataclass(frozen=True)
class Records:
    """Everything one experiment recorded: a field per file, columns as in ``COLUMNS``."""

    metrics: pd.DataFrame
    arms: pd.DataFrame
    losses: pd.DataFrame
    neighbours: pd.DataFrame
    search: pd.DataFrame
    history: pd.DataFrame
    gradients: pd.DataFrame
    task_vectors: pd.DataFrame
    plane: pd.DataFrame
    real: dict
    acceptance: dict
    run: dict
    samples: dict[str, np.ndarray]  # arm -> [16, C, H, W] uint8; also "real"

    @property
    def parameters(self) -> dict:
        """The parameters of the experiment."""
        return self.run["parameters"]

    @property
    def titles(self) -> dict[str, str]:
        """Arm -> title as printed; "DeMe merged" says where its weights come from."""
        titles = dict(zip(self.arms["arm"], self.arms["title"], strict=True))
        source = self.parameters["merge_weights"]
        word = {"search": "searched", "uniform": "uniform"}.get(str(source), "weights given")
        return {arm: f"{t} ({word})" if arm == "merged" else t for arm, t in titles.items()}

    def arms_of(self, number: int) -> list[str]:
        """Names of the arms of an ablation, in the order of the table."""
        return list(self.arms.loc[self.arms[f"ablation{number}"] == 1, "arm"])


def read(records: Path) -> Records:
    """Read a folder of records.

    Raises:
        FileNotFoundError: a record is missing; says which, and what to run.
        ValueError: a record lacks a column, or its arms cannot be compared.
    """
    records = Path(records)
    frames = {name: _read_csv(records, name) for name in COLUMNS}
    dicts = {
        name: json.loads(_existing(records, f"{name}.json").read_text())
        for name in ("real", "acceptance", "run")
    }
    samples = load_file(_existing(records, "samples.safetensors"))
    _check_comparable(frames["metrics"], frames["arms"])
    return Records(**frames, **dicts, samples=samples)


def _existing(records: Path, name: str) -> Path:
    if not (records / name).is_file():
        raise FileNotFoundError(
            f"no record {records / name}; it is written by\n"
            "  papermill notebooks/05_evaluation.ipynb runs/05_evaluation.ipynb "
            "-f params/<experiment>.yaml"
        )
    return records / name


def _read_csv(records: Path, name: str) -> pd.DataFrame:
    path = _existing(records, f"{name}.csv")
    frame = pd.read_csv(path)
    if missing := [c for c in COLUMNS[name].split() if c not in frame]:
        raise ValueError(f"{path} lacks the columns {missing}")
    return frame


def _check_comparable(metrics: pd.DataFrame, arms: pd.DataFrame) -> None:
    """Distances are compared at one n, one feature space, one sampler, and the same noise."""
    for column in ("n", "features", "steps"):
        if metrics[column].nunique() != 1:
            found = metrics[column].unique().tolist()
            raise ValueError(f"metrics.csv mixes {column} {found}: such rows are not comparable")
    seeds = set(metrics["seed"])
    for arm in arms["arm"]:
        if sorted(metrics.loc[metrics["arm"] == arm, "seed"]) != sorted(seeds):
            raise ValueError(f"metrics.csv: {arm} needs exactly one row per seed {sorted(seeds)}")


def setting(records: Records) -> str:
    """One line: data, n, features, sampler, seeds."""
    m = records.metrics.iloc[0]
    seeds = sorted(records.metrics["seed"].unique().tolist())
    return (
        f"{records.parameters['dataset']}: n = {m['n']:,} images per arm and sampling seed, "
        f"features {m['features']}, DDIM {m['steps']} steps, "
        f"{len(seeds)} sampling seeds ({', '.join(map(str, seeds))}), one training seed"
    )


def caption(records: Records) -> str:
    """What the numbers of an ablation table are."""
    return (
        f"{setting(records)}: all numbers are for these weights. Distances are to the "
        "training images, lower is better; mean ± standard deviation over sampling seeds, the "
        "same noise for every arm. IS, KID, precision and recall are means over the seeds. "
        "Training steps count from the pretrained model. The row of real images compares two "
        f"halves at n = {records.real['n_halves']:,} ({records.real['features']}); distances at "
        "another n are not comparable."
    )


def ablation(records: Records, number: int) -> pd.DataFrame:
    """The table of ablation 1 or 2: a row per arm and a last one for real images, plain numbers.

    ``*_mean`` and ``*_sd`` (ddof 1) are over sampling seeds; KID as it is, not times 1000.
    """
    measures = [*DISTANCES, "inception_score", "precision", "recall"]
    by_arm = records.metrics.groupby("arm")
    table = records.arms.set_index("arm").loc[records.arms_of(number)]
    table = table.drop(columns=["ablation1", "ablation2"]).assign(n=by_arm["n"].first())
    table["title"] = pd.Series(records.titles)
    for measure in measures:
        table[f"{measure}_mean"] = by_arm[measure].mean()
        table[f"{measure}_sd"] = by_arm[measure].std(ddof=1)
    real = records.real
    halves = {f"{m}_mean": real.get(f"{m}_halves") for m in ("fid", "pixel", "kid")}
    last = {"title": "real images, halves", "n": real["n_halves"], **halves}
    last["inception_score_mean"] = real["inception_score"]
    rows = [*table.reset_index().to_dict("records"), {"arm": "real", **last}]
    counts = ["n", "parameters", "training_steps", "search_losses", "search_images"]
    return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64"))


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


def differences(records: Records, a: str, b: str, measure: str) -> np.ndarray:
    """[S] ``a - b`` of a measure, one per sampling seed in ascending order."""
    values = records.metrics.pivot(index="seed", columns="arm", values=measure)
    return (values[a] - values[b]).to_numpy(dtype=float)


def comparisons(records: Records, number: int) -> list[tuple[str, str, str, float]]:
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


def paired(records: Records, number: int) -> pd.DataFrame:
    """Differences ``a - b`` paired over sampling seeds, a row per comparison.

    Each measure has its mean difference and, as ``<measure>_halfwidth``, its t interval at
    ``level``; the verdict reads FID. Negative: a is better.
    """
    rows = []
    for a, b, kind, level in comparisons(records, number):
        row = {"ablation": number, "a": a, "b": b, "kind": kind, "level": level}
        for measure in DISTANCES:
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


def plus_minus(mean: float, spread: float, signed: bool = False) -> str:
    """``mean ± spread`` with the spread's first two digits; a true minus sign."""
    digits = 3
    if spread > 0:
        digits = int(np.clip(1 - np.floor(np.log10(spread)), 0, 8))
    sign = "+" if signed else ""
    return f"{mean:{sign}.{digits}f} ± {spread:.{digits}f}".replace("-", "−")


def number(x: float) -> str:
    """Three decimals below 10 and two above; a dash where nothing is known."""
    return "–" if pd.isna(x) else f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}"


def verdict(records: Records, number: int) -> str:
    """A paragraph: the primary comparisons of an ablation and what limits them."""
    table, rows = paired(records, number), ablation(records, number).iloc[:-1]
    primary = table[table["kind"] == "primary"]
    best = rows.loc[rows["fid_mean"].idxmin()]
    seeds = records.metrics["seed"].nunique()
    sentences = [
        f"**Ablation {number}, {ABLATIONS[number]}.**",
        *(_comparison(records, row, len(primary)) for _, row in primary.iterrows()),
        f"Lowest mean FID of the table: {best['title']}, {best['fid_mean']:.3f} (not a test).",
        *_weights(records, list(dict.fromkeys([*primary["a"], *primary["b"], "merged"]))),
        f"The intervals are over {seeds} sampling seeds of one training seed: they cover "
        "sampling noise and not the noise of training.",
    ]
    return " ".join(sentences)


def _comparison(records: Records, row: pd.Series, m: int) -> str:
    level = f"{100 * row['level']:.4g} % paired t interval"
    level += f", Bonferroni over {m}" if m > 1 else ""
    fid = plus_minus(row["fid"], row["fid_halfwidth"], signed=True)
    names = f"{records.titles[row['a']]} − {records.titles[row['b']]}"
    text = f"Primary, {names}: FID {fid} ({level}): {row['verdict']}."
    second = {"fid_second": records.parameters["second_features"], "pixel": "pixels"}
    checks = [
        f"{name} {plus_minus(row[k], row[f'{k}_halfwidth'], signed=True)}, "
        f"{_agreement(row['fid'], row[k])}"
        for k, name in second.items()
        if not np.isnan(row[k])
    ]
    return f"{text} By {'; by '.join(checks)}." if checks else text


def _agreement(fid: float, other: float) -> str:
    return "the same sign" if np.sign(fid) == np.sign(other) else "not the same sign"


def _weights(records: Records, arms: list[str]) -> list[str]:
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


def flatness(history: pd.DataFrame) -> str:
    """How much the held-out loss of pretraining still moved over its last quarter, in words."""
    run = history[history["run"] == "baseline"]
    if len(run) < 5:
        return "the pretrained model was loaded: its training is not ours to judge"
    last = run.iloc[-1]
    before = run[run["step"] <= 0.75 * last["step"]].iloc[-1]
    change = last["held_out_loss"] / before["held_out_loss"] - 1
    return (
        f"held-out loss {before['held_out_loss']:.5f} after {before['step']:,} steps and "
        f"{last['held_out_loss']:.5f} after {last['step']:,}: {change:+.2%} over the last quarter"
    )
