"""The table of an experiment: a row per arm (of a cell), real images on top."""

import pandas as pd

from deme_lib.report import intervals
from deme_lib.report.formats import UNKNOWN, decimals, markdown, plus_minus
from deme_lib.report.records import MEASURES, Records, label

COSTS = ["parameters", "calls_per_image", "training_steps"]
PAPER = "the paper's FID (CIFAR10: not comparable)"


def table(records: Records) -> pd.DataFrame:
    """Plain numbers by row; first "real", what fresh real images score, where that is known.

    Measures, test loss and costs are means over training seeds, ``fid_sd`` is the standard
    deviation over them, ``difference`` FID minus the base's with its uncorrected t interval
    [low, high], ``paper`` the paper's FID where the parameter ``cells`` has one.
    """
    p, fid, arms = records.parameters, records.of("fid"), records.arms.groupby("row")
    d = fid.drop(columns=records.base).sub(fid[records.base], axis=0)
    ends = pd.DataFrame({row: intervals.t_interval(d[row], p["confidence"]) for row in d})
    ends = ends.reindex(range(3))  # also of the base alone
    given = [(cell["cell"], cell.get("paper") or {}) for cell in p["cells"]]
    papers = {label(cell, arm): fid for cell, of in given for arm, fid in of.items()}
    rows = pd.DataFrame({"title": records.titles})
    rows[MEASURES] = pd.DataFrame({m: records.of(m).mean(skipna=False) for m in MEASURES})
    rows["fid_sd"] = fid.std()
    rows["difference"], rows["low"], rows["high"] = d.mean(skipna=False), ends.loc[0], ends.loc[1]
    rows["test_loss"] = records.of("test_loss").mean(skipna=False)
    rows[COSTS] = arms[COSTS].mean()
    rows["weights"] = arms["weights"].agg(lambda x: "; ".join(x.dropna().unique()))
    rows["paper"] = pd.Series(papers, dtype=float)
    real = {"title": "real images, the floor"} | {m: records.floor_of(m) for m in MEASURES}
    parts = [rows] if pd.isna(real["fid"]) else [pd.DataFrame(real, ["real"]), rows]
    return pd.concat(parts)[list(rows)].rename_axis("row")


def printed(records: Records) -> pd.DataFrame:
    """The table as strings, without columns in which nothing is known."""
    rows = table(records)
    half = (rows["high"] - rows["low"]) / 2
    columns = {
        "arm": rows["title"],
        "FID ↓": rows["fid"].map(decimals),
        f"difference to {records.titles[records.base]}": [
            *map(plus_minus, rows["difference"], half)
        ],
        "IS ↑": rows["inception_score"].map(decimals),
        "test loss ↓": rows["test_loss"].map(lambda x: decimals(x, 5)),
        "parameters held": rows["parameters"].map(lambda x: decimals(x, 0)),
        "calls an image": rows["calls_per_image"].map(lambda x: decimals(x, 0)),
        "training steps": rows["training_steps"].map(lambda x: decimals(x, 0)),
        PAPER: rows["paper"].map(lambda x: decimals(x, 2)),
    }
    shown = pd.DataFrame(columns)
    return shown.loc[:, (shown != UNKNOWN).any()]


def markdown_of(records: Records) -> str:
    """``printed`` as markdown."""
    return markdown(printed(records))


def readme(records: Records) -> str:
    """The README's table as markdown, real images and at most nine arms, with its caption."""
    shown = printed(records).drop(columns="training steps").head(10)
    return f"{markdown(shown)}\n\n{caption(records)}"


def setting(records: Records) -> str:
    """Data, n, features, reference, sampler and seeds of every FID."""
    m, streams = records.metrics.iloc[0], sorted(records.metrics["seed"].unique())
    return (
        f"{records.parameters['dataset']}: n = {m['n']:,} images an arm and training, "
        f"{m['features']} features, FID to {m['reference']} images, {sampler(records)}, "
        f"{seeds('training', records.training_seeds)}, {seeds('sampling', streams)}"
    )


NAMES = {"dpm-solver": "DPM-Solver++", "ddim": "DDIM"}
NAMES |= {"ddim-diffusers": "DDIM as in diffusers", "ddim-unclipped": "DDIM unclipped"}
"""Samplers as printed."""


def sampler(records: Records) -> str:
    """The sampler of every image and its steps; that of a cell stands in its name."""
    used = records.metrics[["sampler", "steps"]].drop_duplicates()
    if len(used) > 1:
        return "samplers and steps as named"
    ((name, steps),) = used.itertuples(index=False)
    return f"{NAMES[name]}, {steps} steps"


def seeds(kind: str, found: list[int]) -> str:
    """Seeds in words: "training seeds 0 to 7"; "" of none."""
    if not found:
        return ""
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{kind} seeds {found[0]} to {found[-1]}"
    return f"{kind} seed{'s' * (len(found) > 1)} {', '.join(map(str, found))}"


def caption(records: Records) -> str:
    """The setting, and what ± is."""
    level = f"{100 * records.parameters['confidence']:g} %"
    return f"{setting(records)}; ±: half the {level} t interval over training seeds, uncorrected."


def compared_markdown(records: Records) -> str:
    """The comparisons as markdown, and what they were judged by."""
    found, share = intervals.comparisons(records), 100 * records.parameters["margin"]
    judged = seeds("training", intervals.confirming(records)) if len(found) else ""
    half = (found["high"] - found["low"]) / 2
    columns = {
        "a − b": found["a"] + " − " + found["b"],
        "ablation": found["ablation"].map(str),
        "kind": found["kind"],
        "measure": found["measure"],
        "effect ± half its interval": [*map(plus_minus, found["effect"], half)],
        "trainings": found["n_units"].map(str),
        "level": found["level"].map(lambda x: f"{100 * x:.4g} %"),
        "verdict": found["verdict"],
    }
    return f"{markdown(pd.DataFrame(columns))}\n\n" + (
        f"{setting(records)}; t intervals over training seeds. Verdicts of the primary ones, "
        f"Holm-corrected, on {judged or 'no training seed yet'}. Margins: FID "
        f"{decimals(intervals.margin(records), 4)}, IS "
        f"{decimals(intervals.margin(records, 'inception_score'), 4)}, {share:g} % of what the "
        "pretrained model lacks to real images."
    )
