"""Whether the paper's observations are seen in an experiment, each by a rule that it states.

Every function turns the record behind a figure into a sentence for its caption: what the paper
says, whether that is seen, the numbers that decide it, and the rule.
"""

from __future__ import annotations

import numpy as np
import pandas as pd


def gradients(df: pd.DataFrame, num_train_timesteps: int) -> str:
    """Fig. 1a: do gradients of near timesteps agree more than those of distant ones?"""
    found = {m: _near_and_far(part, num_train_timesteps) for m, part in df.groupby("model")}
    near, far, _ = found["pretrained"]
    if np.isnan(near):
        return "The paper's observation (Fig. 1a) needs timesteps less than T/4 apart."
    numbers = "; ".join(
        f"{model} {a:.2f} of pairs less than T/4 apart and {b:.2f} of the others, "
        f"{share:.0%} of which are negative"
        for model, (a, b, share) in sorted(found.items(), reverse=True)
    )
    return _sentence(
        "Fig. 1a: gradients of near timesteps agree, those of distant ones conflict",
        far < min(near, 0),
        f"mean cosine, {numbers}",
        "if the pretrained model's first mean is above its second and the second below 0; all "
        "timesteps share their images and noise, which makes gradients agree, neighbours' most",
    )


def _near_and_far(df: pd.DataFrame, num_train_timesteps: int) -> tuple[float, float, float]:
    """Mean cosine of pairs less than T/4 apart, of the others, and the others' negative share."""
    apart = (df["timestep1"] - df["timestep2"]).abs()
    near = df.loc[(apart > 0) & (apart < num_train_timesteps / 4), "cosine"]
    far = df.loc[apart >= num_train_timesteps / 4, "cosine"]
    return near.mean(), far.mean(), (far < 0).mean()


def activations(df: pd.DataFrame) -> str:
    """Fig. 2: does finetuning change channels rather than positions?"""
    table = df.pivot(index=["range", "block"], columns="dimension")
    share, random = table["share"]["channel"], table["share_at_random"]["channel"]
    channels = (share > table["share"]["spatial"]) & (share > random)
    return _sentence(
        "Fig. 2: finetuning changes activations by channel rather than by position",
        channels.mean() > 0.5,
        f"in {channels.sum()} of {len(channels)} pairs of a block and a range channel means "
        "explain more of the difference than position means, and more than they do of a random "
        "weight change of the same length",
        "if in more than half of them",
    )


def landscape(df: pd.DataFrame) -> str:
    """Fig. 4: is the pretrained model nearer to the minimum of all timesteps than of a range's?"""
    distance = pd.Series({k: _to_minimum(part) for k, part in df.groupby("range")})
    every, single = distance[0], distance.drop(0)
    step = np.diff(np.unique(df["a"])).min()
    return _sentence(
        "Fig. 4: the pretrained model is near the minimum of all timesteps, not of single ranges",
        None if distance.max() < step / 10 else (single > every).mean() > 0.5,
        f"by a quadratic through the points around it, the minimum lies {every:.2g} from it for "
        f"all timesteps and {', '.join(f'{d:.2g}' for d in single)} in ranges 1 to {len(single)} "
        f"(the grid's step is {step:.2g})",
        "if more than half of the ranges have theirs farther away; not resolved if all lie within "
        "a tenth of a step",
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


def plane(df: pd.DataFrame) -> str:
    """Fig. 6a: has a merge of both experts a lower loss than either or none?"""
    lowest = df.loc[df["loss"].idxmin()]
    return _sentence(
        "Fig. 6a: a merge of both experts has the lowest loss",
        min(lowest["w1"], lowest["w2"]) > 0,
        f"the minimum of the grid is at $w_1$ = {lowest['w1']:.2g}, $w_2$ = {lowest['w2']:.2g}",
        "if both are above 0",
    )


def task_vectors(df: pd.DataFrame) -> str:
    """Fig. 6b: are the task vectors of the later half of the timesteps larger?"""
    n = df["range"].max()
    spread = (df["q75"] - df["q25"]).groupby([df["block"], df["range"]]).mean().unstack()
    early, late = [k for k in spread if k <= n / 2], [k for k in spread if k - 1 >= n / 2]
    if not early or not late:
        return "The paper's observation (Fig. 6b) is on ranges of each half of the timesteps."
    larger = spread[late].mean(axis=1) > spread[early].mean(axis=1)
    return _sentence(
        "Fig. 6b: task vectors of the later half of the ranges are larger",
        larger.mean() > 0.5,
        f"their quartiles lie farther apart there in {larger.sum()} of {len(larger)} blocks",
        "if in more than half of them",
    )


def _sentence(paper: str, seen: bool | None, numbers: str, rule: str) -> str:
    answer = "Not resolved" if seen is None else "Seen" if seen else "Not seen"
    return f"Paper, {paper}. {answer} here: {numbers} (seen {rule})."
