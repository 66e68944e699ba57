"""Whether the paper's observations are seen in an experiment, each by a rule that it states."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from deme_lib.report.formats import decimals
from deme_lib.report.records import Records

ANSWERS = {True: "yes", False: "no", None: "not resolved"}


@dataclass(frozen=True)
class Observation:
    """What a figure of the paper says; ``seen`` is None where these records cannot tell."""

    figure: str
    paper: str
    seen: bool | None
    numbers: str
    rule: str


def table(records: Records) -> pd.DataFrame:
    """A row per figure of the paper whose record is there."""
    timesteps = records.parameters["num_train_timesteps"]
    rules = {
        "gradients": lambda df: gradients(df, timesteps),
        "activations": activations,
        "landscape": landscape,
        "plane": plane,
        "task_vectors": task_vectors,
    }
    found = [rule(records.frames[k]) for k, rule in rules.items() if len(records.frames[k])]
    rows = [(x.figure, x.paper, ANSWERS[x.seen], x.numbers, x.rule) for x in found]
    return pd.DataFrame(rows, columns=["figure", "paper says", "seen here?", "numbers", "seen if"])


def gradients(df: pd.DataFrame, num_train_timesteps: int) -> Observation:
    """Fig. 1a: do gradients of near timesteps agree more than those of distant ones?"""
    df = df[(df["model"] == "pretrained") & (df["timestep1"] != df["timestep2"])]
    near = (df["timestep1"] - df["timestep2"]).abs() < num_train_timesteps / 4
    close, far = df.loc[near, "cosine"], df.loc[~near, "cosine"]
    return Observation(
        "1a",
        "gradients of near timesteps agree, those of distant ones conflict",
        bool(far.mean() < min(close.mean(), 0)) if near.any() and not near.all() else None,
        f"mean cosine {decimals(close.mean(), 2)} of pairs less than T/4 apart, "
        f"{decimals(far.mean(), 2)} of the others ({(far < 0).mean():.0%} of these negative)",
        "the first mean lies above the second, and the second below 0",
    )


def activations(df: pd.DataFrame) -> Observation:
    """Fig. 2: does finetuning change channels rather than positions?"""
    wide = df.pivot(index=["range", "block"], columns="dimension")
    share, random = wide["share"]["channel"], wide["share_at_random"]["channel"]
    more = share > wide["share"]["spatial"]
    channels = more & (share > random)
    return Observation(
        "2",
        "finetuning changes activations by channel rather than by position",
        bool(channels.mean() > 0.5),
        f"channel means explain more of the change than position means in {more.sum()} of "
        f"{len(more)} pairs of a block and a range, in {channels.sum()} also more than they do of "
        "a random weight change as long",
        "both in more than half of the pairs",
    )


def landscape(df: pd.DataFrame) -> Observation:
    """Fig. 4: is the pretrained model nearer to the minimum of all timesteps than of a range's?"""
    distance = pd.Series({k: _to_minimum(part) for k, part in df.groupby("range")})
    every, single = distance[0], distance.drop(0)
    step = np.diff(np.unique(df["a"])).min()
    return Observation(
        "4",
        "the pretrained model is near the minimum of all timesteps, not of single ranges",
        None if distance.max() < step / 10 else bool((single > every).mean() > 0.5),
        f"distance to a fitted quadratic's minimum {every:.2g} for all timesteps, "
        f"{', '.join(f'{d:.2g}' for d in single)} in ranges 1 to {len(single)} (step {step:.2g})",
        "more than half of the ranges have theirs farther away; not resolved if all lie within a "
        "tenth of a step",
    )


def _to_minimum(df: pd.DataFrame) -> float:
    """Distance from the centre to the minimum of a quadratic through the nine points around it.

    Infinite where the quadratic has none.
    """
    steps = np.unique(df["a"])[len(np.unique(df["a"])) // 2 + np.array([-1, 0, 1])]
    near = df[df["a"].isin(steps) & df["b"].isin(steps)]
    a, b = near["a"].to_numpy(), near["b"].to_numpy()
    terms = np.stack([np.ones_like(a), a, b, a * a, a * b, b * b], axis=1)
    _, x, y, xx, xy, yy = np.linalg.lstsq(terms, near["loss"].to_numpy(), rcond=None)[0]
    curvature = np.array([[2 * xx, xy], [xy, 2 * yy]])
    if np.linalg.eigvalsh(curvature).min() <= 0:
        return np.inf
    return float(np.linalg.norm(np.linalg.solve(curvature, [-x, -y])))


def plane(df: pd.DataFrame) -> Observation:
    """Fig. 6a: has a merge of both experts a lower loss than either or none?"""
    lowest = df.loc[df["loss"].idxmin()]
    edge = max(lowest["w1"], lowest["w2"]) == df["w1"].max()
    return Observation(
        "6a",
        "a merge of both experts has the lowest loss",
        None if edge else bool(min(lowest["w1"], lowest["w2"]) > 0),
        f"the grid's minimum is at w1 = {lowest['w1']:.2g}, w2 = {lowest['w2']:.2g}"
        + (", on its edge" if edge else ""),
        "both are above 0; not resolved if the grid ends there",
    )


def task_vectors(df: pd.DataFrame) -> Observation:
    """Fig. 6b: are the task vectors of the later half of the timesteps larger?"""
    n = df["range"].max()
    spread = (df["q75"] - df["q25"]).groupby([df["block"], df["range"]]).mean().unstack()
    early, late = [k for k in spread if k <= n / 2], [k for k in spread if k - 1 >= n / 2]
    larger = spread[late].mean(axis=1) > spread[early].mean(axis=1)
    return Observation(
        "6b",
        "task vectors of the later half of the ranges are larger",
        bool(larger.mean() > 0.5) if early and late else None,
        f"quartiles farther apart in {larger.sum()} of {len(larger)} blocks",
        "in more than half of the blocks",
    )
