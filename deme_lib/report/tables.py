"""The table of an experiment: a row per arm (of a cell), real images on top."""

import pandas as pd

from deme_lib.report import intervals
from deme_lib.report.formats import UNKNOWN, decimals, interval, markdown, plus_minus
from deme_lib.report.records import MEASURES, Records, label

COSTS = ["parameters", "calls_per_image", "training_steps"]
PAPER = "the paper's FID (CIFAR10: not comparable)"
FLOOR = "real images, the floor"


def table(records: Records) -> pd.DataFrame:
    """Plain numbers by row; first "real", what fresh real images score, where that is known.

    Measures, test loss and costs are means over training seeds, ``fid_sd`` is the standard
    deviation over them, ``difference`` FID minus the base's with its uncorrected t interval
    [low, high], ``paper`` the paper's FID where the parameter ``cells`` has one.
    """
    rows = pd.DataFrame({"title": pd.Series(records.titles)})
    for measure in MEASURES:
        rows[measure] = records.of(measure).mean(skipna=False)
    fid = records.of("fid")
    rows.insert(2, "fid_sd", fid.std())
    d = fid.drop(columns=records.base).sub(fid[records.base], axis=0)
    ends = {row: intervals.t_interval(d[row], records.parameters["confidence"]) for row in d}
    rows["difference"] = d.mean(skipna=False)
    rows["low"] = pd.Series({row: low for row, (low, _, _) in ends.items()}, dtype=float)
    rows["high"] = pd.Series({row: high for row, (_, high, _) in ends.items()}, dtype=float)
    rows["test_loss"] = records.losses.groupby("row")["loss"].mean()
    rows[COSTS] = records.arms.groupby("row")[COSTS].mean()
    rows["weights"] = records.arms.groupby("row")["weights"].agg(
        lambda x: "; ".join(x.dropna().unique())
    )
    papers = {
        label(cell["cell"], arm): fid
        for cell in records.parameters["cells"]
        for arm, fid in (cell.get("paper") or {}).items()
    }
    rows["paper"] = pd.Series(papers, dtype=float)
    real = pd.DataFrame({"title": FLOOR} | {m: records.floor_of(m) for m in MEASURES}, ["real"])
    known = not pd.isna(records.floor_of("fid"))
    return pd.concat([real, rows] if known else [rows])[list(rows)].rename_axis("row")


def printed(records: Records) -> pd.DataFrame:
    """The table as strings, without columns in which nothing is known."""
    rows = table(records)
    half = (rows["high"] - rows["low"]) / 2
    columns = {
        "arm": rows["title"],
        "FID ↓": rows["fid"].map(decimals),
        f"difference to {records.titles[records.base]}": list(
            map(plus_minus, rows["difference"], half)
        ),
        "IS ↑": rows["inception_score"].map(decimals),
        "test loss ↓": rows["test_loss"].map(lambda x: decimals(x, 5)),
        "parameters held": rows["parameters"].map(lambda x: decimals(x, 0)),
        "calls an image": rows["calls_per_image"].map(lambda x: decimals(x, 0)),
        "training steps": rows["training_steps"].map(lambda x: decimals(x, 0)),
        PAPER: rows["paper"].map(lambda x: decimals(x, 2)),
    }
    shown = pd.DataFrame(columns)
    return shown.loc[:, (shown != UNKNOWN).any()]


def readme(records: Records) -> str:
    """The README's table as markdown, of at most nine arms, and its caption."""
    shown = printed(records).drop(columns=["test loss ↓", "training steps"]).head(10)
    return f"{markdown(shown)}\n\n{caption(records)}"


def setting(records: Records) -> str:
    """Data, n, features, reference, sampler and seeds of every FID."""
    m, seeds = records.metrics.iloc[0], records.training_seeds
    streams = sorted(records.metrics["seed"].unique())
    return (
        f"{records.parameters['dataset']}: n = {m['n']:,} images an arm and training, "
        f"{m['features']} features, FID to {m['reference']} images, {m['steps']} sampler steps, "
        f"{named('training seed', seeds)}, {named('sampling seed', streams)}"
    )


def named(kind: str, seeds: list[int]) -> str:
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{kind}s {seeds[0]} to {seeds[-1]}"
    return f"{kind}{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"


def caption(records: Records) -> str:
    """The setting, and what ± is."""
    level = f"{100 * records.parameters['confidence']:g} %"
    return f"{setting(records)}; ±: half the {level} t interval over training seeds, uncorrected."


def compared(records: Records) -> str:
    """The comparisons as markdown, and what they were judged by."""
    found = intervals.comparisons(records)
    columns = {
        "a − b": found["a"] + " − " + found["b"],
        "ablation": found["ablation"].map(str),
        "kind": found["kind"],
        "measure": found["measure"],
        "effect [interval]": list(map(interval, found["effect"], found["low"], found["high"])),
        "level": found["level"].map(lambda x: f"{100 * x:.4g} %"),
        "verdict": found["verdict"],
    }
    said = f"{setting(records)}; t intervals over training seeds, the primary ones Holm-corrected"
    share = f"{100 * records.parameters['margin']:g} %"
    said += f"; margin of FID {decimals(intervals.margin(records), 4)}: {share} of what "
    said += f"{records.titles[records.base]} has above real images."
    return f"{markdown(pd.DataFrame(columns))}\n\n{said}"
