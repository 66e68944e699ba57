"""Records to tables: reads the folder that the evaluation wrote; needs no weights, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

ABLATIONS = {1: "remove decoupling", 2: "replace merging by an ensemble"}


DISTANCES = ["fid", "fid_second", "pixel", "kid"]
"""Distances compared in pairs; lower is better for each."""


COMPARED = [*DISTANCES, "inception_score"]
"""Everything compared in pairs; of the inception score, higher is better."""


MEASURES = [*COMPARED, "precision", "recall"]
"""Everything measured on an arm's images."""


COLUMNS = {
    "metrics": "arm training_seed seed n features steps fid fid_second pixel kid inception_score "
    "precision recall",
    "arms": "arm training_seed title ablation1 ablation2 parameters calls_per_image "
    "training_steps search_losses search_images weights test_loss",
    "losses": "arm bin_start bin_stop loss",
    "neighbours": "arm n q05 q25 median q75 q95",
    "search": "search weights loss fid chosen",
    "history": "run step learning_rate held_out_loss",
    "gradients": "model draw n timestep1 timestep2 cosine",
    "activations": "range block dimension n count q05 q25 median q75 q95 share share_at_random",
    "landscape": "range start stop a b loss",
    "task_vectors": "range block q05 q25 median q75 q95",
    "plane": "w1 w2 loss expert1 expert2",
}
"""Record -> the columns it must have."""


@dataclass(frozen=True)
class Records:
    """Everything one experiment recorded: a field per file, columns as in ``COLUMNS``.

    ``metrics`` and ``arms`` are of every training seed, all else is of the first one.
    """

    metrics: pd.DataFrame
    arms: pd.DataFrame
    losses: pd.DataFrame
    neighbours: pd.DataFrame
    search: pd.DataFrame
    history: pd.DataFrame
    gradients: pd.DataFrame
    activations: pd.DataFrame
    landscape: pd.DataFrame
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
    def training_seeds(self) -> list[int]:
        """In ascending order."""
        return sorted(self.metrics["training_seed"].unique().tolist())

    @property
    def sampling_seeds(self) -> list[int]:
        """In ascending order."""
        return sorted(self.metrics["seed"].unique().tolist())

    @property
    def scope(self) -> str:
        """What a verdict holds for, as said after it."""
        return scope(self.metrics)

    @property
    def of_first(self) -> str:
        """Said of what was recorded for one of several training seeds; nothing where one is all."""
        return f" (training seed {self.training_seeds[0]})" if len(self.training_seeds) > 1 else ""

    @property
    def titles(self) -> dict[str, str]:
        """Arm -> title as printed; "DeMe merged" says where its weights come from."""
        titles = dict(zip(self.arms["arm"], self.arms["title"], strict=True))
        source = self.parameters["merge_weights"]
        word = {"search": "searched", "uniform": "uniform"}.get(str(source), "weights given")
        return {arm: f"{t} ({word})" if arm == "merged" else t for arm, t in titles.items()}

    def arms_of(self, number: int) -> list[str]:
        """Names of the arms of an ablation, in the order of the table."""
        return list(self.arms.loc[self.arms[f"ablation{number}"] == 1, "arm"].unique())


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
    training, sampling = (sorted(metrics[c].unique().tolist()) for c in ("training_seed", "seed"))
    pairs = [list(pair) for pair in product(training, sampling)]
    for arm, names in arms.groupby("arm"):
        rows = metrics.loc[metrics["arm"] == arm, ["training_seed", "seed"]]
        if sorted(rows.to_numpy().tolist()) != pairs:
            raise ValueError(
                f"metrics.csv: {arm} needs exactly one row per training seed {training} "
                f"and sampling seed {sampling}"
            )
        if sorted(names["training_seed"]) != training:
            raise ValueError(f"arms.csv: {arm} needs exactly one row per training seed {training}")


def setting(records: Records) -> str:
    """One line: data, n, features, sampler, seeds."""
    m, sampling, training = records.metrics.iloc[0], records.sampling_seeds, records.training_seeds
    trained = f"{len(training)} training seeds ({', '.join(map(str, training))})"
    return (
        f"{records.parameters['dataset']}: n = {m['n']:,} images per arm and sampling seed, "
        f"features {m['features']}, DDIM {m['steps']} steps, "
        f"{len(sampling)} sampling seeds ({', '.join(map(str, sampling))}), "
        + (trained if len(training) > 1 else "one training seed")
    )


def scope(metrics: pd.DataFrame) -> str:
    """What a verdict on rows of metrics holds for."""
    seeds = metrics["training_seed"].nunique()
    return "for these weights" if seeds == 1 else f"over {seeds} training seeds"


def covers(records: Records) -> str:
    """What spreads and intervals cover, as said wherever one is printed."""
    if len(records.training_seeds) == 1:
        left = "not training, the search, the data split or the classifier"
        return f"cover sampling noise only: {left}"
    given = "pretraining, " if records.parameters["pretrained"] else ""
    return (
        f"cover {_trained(records)}, the search and sampling noise: not {given}the data split or "
        "the classifier"
    )


def _trained(records: Records) -> str:
    """What several training seeds repeat: a model that was given is pretrained only once."""
    return "finetuning" if records.parameters["pretrained"] else "training"


def spread(records: Records) -> str:
    """Sentences: what the "mean ± sd" of an arm is over and covers, beside the paired intervals."""
    paired = "compare arms by the paired differences, not by it"
    training, sampling = len(records.training_seeds), len(records.sampling_seeds)
    if training == 1:
        shared = "± sd is over sampling seeds and shared between arms (same noise)"
        return f"{shared}: {paired}. Both {covers(records)}."
    return (
        f"± sd is over the {training} training seeds (of each one's mean over {sampling} sampling "
        f"seeds) and in part shared between arms (same pretrained model): {paired}. The sd covers "
        f"{_trained(records)} and the search alone, as training seeds share their sampling noise; "
        f"the paired intervals {covers(records)}."
    )


def caption(records: Records) -> str:
    """What the numbers of an ablation table are."""
    classes = "IS is of this classifier's classes (at most 10). "
    if records.metrics["features"].iloc[0] == "inception":
        classes = ""
    counted = "Test loss and search counts are means over training seeds. "
    one = len(records.training_seeds) == 1
    weights = ": all numbers are for these weights" if one else ""
    return (
        f"{setting(records)}{weights}. FID and pixel "
        "distance, precision and recall are to the training images, KID to the test images, the "
        "loss is on test images; FID, pixel distance and KID are mean ± sd, IS, precision and "
        f"recall are means. {spread(records)} "
        "KID is unbiased and may be negative; of real images it compares two halves of the "
        f"training images. {classes}"
        f"{'' if one else counted}"
        "Training steps count from the pretrained model. The row of real images compares two "
        f"halves at n = {records.real['n_halves']:,}; distances at another n are not comparable. "
        f"The IS in that row is of all {records.real['n']:,} training images, which the "
        "classifier knows."
    )


def ablation(records: Records, number: int) -> pd.DataFrame:
    """The table of ablation 1 or 2: a row per arm and a last one for real images, plain numbers.

    ``*_mean`` and ``*_sd`` (ddof 1) are over sampling seeds, or over training seeds (of each one's
    mean) where there are several; KID as it is, not times 1000.
    """
    by_arm = over_seeds(records.metrics, "arm").groupby("arm")
    table = _per_arm(records.arms).loc[records.arms_of(number)]
    table = table.assign(n=records.metrics["n"].iloc[0], title=pd.Series(records.titles))
    for measure in MEASURES:
        table[f"{measure}_mean"] = by_arm[measure].mean()
        table[f"{measure}_sd"] = by_arm[measure].std(ddof=1)
    real = records.real
    halves = {f"{m}_mean": real.get(f"{m}_halves") for m in ("fid", "pixel", "kid")}
    last = {
        "title": f"real images, halves (n = {real['n_halves']:,}, not comparable)",
        "n": real["n_halves"],
        **halves,
    }
    last["inception_score_mean"] = real["inception_score"]
    rows = [*table.reset_index().to_dict("records"), {"arm": "real", **last}]
    counts = ["n", "parameters", "training_steps", "search_losses", "search_images"]
    return pd.DataFrame(rows).astype(dict.fromkeys(counts, "Int64"))


def every_arm(records: Records) -> pd.DataFrame:
    """The rows of both tables, but for real images: each arm once."""
    return pd.concat([ablation(records, n).iloc[:-1] for n in ABLATIONS]).drop_duplicates("arm")


def over_seeds(metrics: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows that a mean and sd are over, for each ``name``.

    Those of the sampling seeds, or of several training seeds each one's mean over sampling seeds.
    """
    if metrics["training_seed"].nunique() == 1:
        return metrics
    return metrics.groupby([name, "training_seed"], as_index=False)[MEASURES].mean()


def _per_arm(arms: pd.DataFrame) -> pd.DataFrame:
    """A row per arm: over training seeds the mean test loss and search counts, every weights."""
    by_arm = arms.groupby("arm", sort=False)
    found = by_arm.first().drop(columns=["training_seed", "ablation1", "ablation2"])
    for count in ("search_losses", "search_images"):
        found[count] = by_arm[count].mean().round()
    weights = by_arm["weights"].agg(lambda column: "; ".join(column.dropna()))
    return found.assign(weights=weights, test_loss=by_arm["test_loss"].mean())


def plus_minus(mean: float, spread: float, signed: bool = False) -> str:
    """``mean ± spread`` with the spread's first two digits; a true minus sign."""
    digits = 3
    if spread > 0:
        digits = int(np.clip(1 - np.floor(np.log10(spread)), 0, 8))
    sign = "+" if signed else ""
    return f"{mean:{sign}.{digits}f} ± {spread:.{digits}f}".replace("-", "−")


def differences(table: pd.DataFrame, name: str) -> list[str]:
    """A column of signed means ± half-widths; a dash where nothing is known."""
    pairs = zip(table[name], table[f"{name}_halfwidth"], strict=True)
    return ["–" if pd.isna(m) else plus_minus(m, h, signed=True) for m, h in pairs]


def signed(x: float) -> str:
    """Two digits with a sign; a true minus sign."""
    return f"{x:+.2g}".replace("-", "−")


def number(x: float) -> str:
    """Three decimals below 10 and two above; a dash where nothing is known."""
    return "–" if pd.isna(x) else f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}"


def count(x: float) -> str:
    """With commas; a dash where nothing is known."""
    if pd.isna(x):
        return "–"
    return f"{x:,.0f}" if np.isclose(x, round(x)) else f"{x:,.1f}"


def flatness(history: pd.DataFrame) -> str:
    """How the held-out loss of pretraining ended, in words: last quarter and minimum."""
    run = history[history["run"] == "baseline"]
    if len(run) < 5:
        return "the pretrained model was loaded: its training is not ours to judge"
    last = run.iloc[-1]
    before = run[run["step"] <= 0.75 * last["step"]].iloc[-1]
    lowest = run.loc[run["held_out_loss"].idxmin()]
    change, since = (last["held_out_loss"] / x["held_out_loss"] - 1 for x in (before, lowest))
    return (
        f"held-out loss {before['held_out_loss']:.5f} after {before['step']:,} steps and "
        f"{last['held_out_loss']:.5f} after {last['step']:,}: {change:+.2%} over the last quarter; "
        f"minimum {lowest['held_out_loss']:.5f} after {lowest['step']:,} steps, {since:+.2%} from "
        "it to the end"
    )
