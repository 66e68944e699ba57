"""The paper's own figures: 1a, 2, 4, 6a and 6b."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.interpolate import interpn

from deme_lib.report.plots.style import (
    COLOURS,
    GREY,
    WHITE,
    boxes,
    captioned,
    legend,
    shades,
    subplots,
)

STAR = {"marker": "*", "ls": "", "color": COLOURS[3], "mec": "white", "clip_on": False, "zorder": 5}
LEVELS = (1.2, 2, 5, 20, 100, 500)
"""Lines of equal loss, over the pretrained model's."""


def gradient_similarity(
    df: pd.DataFrame, caption: str = "", num_train_timesteps: int = 1000
) -> Figure:
    """Fig. 1a: cosines of the gradients at two timesteps, as a map (the mean over noise draws) and
    as histograms (all draws), of all pairs and of those in the first quarter of [0, T)."""
    maps = {
        model: part.pivot_table(index="timestep2", columns="timestep1", values="cosine")
        for model, part in df.groupby("model", sort=False)
    }
    apart = np.concatenate(
        [table.to_numpy()[~np.eye(len(table), dtype=bool)] for table in maps.values()]
    )
    reach, pairs = np.abs(apart).max(), df[df["timestep1"] < df["timestep2"]]
    figure, axes = subplots(len(maps), 2, 0.5 + 3.6 * len(maps), width_ratios=[1.2, 1])
    for (model, table), (left, right) in zip(maps.items(), axes, strict=True):
        look = {"cmap": "vlag", "vmin": -reach, "vmax": reach}
        drawn = left.pcolormesh(table.columns, table.index, table, **look)
        scale = f"cosine; off the diagonal\n{apart.min():.2f} to {apart.max():.2f}"
        figure.colorbar(drawn, ax=left, label=scale.replace("-", "−"))
        left.set(title=f"{model} model", xlabel="timestep", ylabel="timestep", box_aspect=1)
        mine = pairs[pairs["model"] == model]
        for stop, colour in ((num_train_timesteps, GREY), (num_train_timesteps / 4, COLOURS[0])):
            inside = mine.loc[mine["timestep2"] < stop, "cosine"]
            label = f"t in [0, {stop:g}), mean {inside.mean():.2f}"
            bars = {"stat": "probability", "binwidth": 0.1, "binrange": (-1, 1), "alpha": 0.35}
            sns.histplot(inside, ax=right, color=colour, label=label, element="step", **bars)
        right.set(xlabel="cosine of two different timesteps", ylabel="share of pairs")
        right.set_xlim(min(-0.1, mine["cosine"].min()), 1)
        right.set_ylim(0, 1.3 * right.get_ylim()[1])
        right.legend(loc="upper left", frameon=False, fontsize=9.5)
    return captioned(figure, caption)


def activations(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 2: how far finetuning moves a block's channel means and position means.

    Boxes: quartiles, whiskers: 5 to 95 %; black: of random weight changes as long.
    """
    figure, axes = subplots(2, 2, 6.2, sharex=True, sharey="row")
    df, look = _by_range(df)
    for dimension, (top, bottom) in zip(("channel", "spatial"), axes.T, strict=True):
        part = df[df["dimension"] == dimension]
        boxes(part, y="value", ax=top, **look)
        sns.barplot(part, y="share", ax=bottom, saturation=1, **look)
        random = {"palette": "dark:black", "marker": "_", "s": 9, "linewidth": 2, "dodge": True}
        random |= {"jitter": False, "legend": False, "ax": bottom}
        sns.stripplot(part, y="share_at_random", **look | random)
        bottom.plot([], [], "k_", ms=9, mew=2, label="random change of weights, as long")
        top.set_title("means of channels" if dimension == "channel" else "means of positions")
        bottom.set_xlabel("")
    axes[0, 0].set(ylabel="|mean difference| /\nrms of the activation", ylim=(0, None))
    axes[1, 0].set_ylabel("share of the difference's\nvariance explained")
    legend(figure, axes.flat, 5)
    return captioned(figure, caption)


def _by_range(df: pd.DataFrame) -> tuple[pd.DataFrame, dict]:
    """With named ranges and broken names of blocks, and how seaborn groups by both."""
    look = {"x": "block", "hue": "range", "palette": shades(df["range"].nunique())}
    named = {
        "range": df["range"].map("range {}".format),
        "block": df["block"].str.replace("_", "\n"),
    }
    return df.assign(**named), look


def task_vectors(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6b: values of the task vectors per block and range: quartiles, and 5 to 95 %."""
    figure, axes = subplots(1, 1, 4.6)
    ax, (df, look) = axes[0, 0], _by_range(df)
    boxes(df, y="value", ax=ax, **look)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.set(xlabel="", ylabel="value of the task vector")
    legend(figure, axes.flat, 8)
    return captioned(figure, caption)


def landscape(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 4: the loss around the pretrained weights over the loss there, for all timesteps and
    for each range, along two filter-normalised random directions (Li et al. 2018).

    At 1 every filter has changed by its own norm. All panels have one colour scale.
    """
    ratios = {}
    for place, part in df.groupby(["range", "start", "stop"]):
        ratios[place] = _over_centre(part.pivot(index="b", columns="a", values="loss"))
    most, columns = max(1.5, *(x.max(axis=None) for x in ratios.values())), min(3, len(ratios))
    rows = -(-len(ratios) // columns)
    figure, axes = subplots(rows, columns, 1.1 + 2.6 * rows, layout="compressed")
    ticks = [level for level in LEVELS if level < most]
    for ax, ((k, start, stop), ratio) in zip(axes.flat, ratios.items(), strict=False):
        a, b, look = ratio.columns, ratio.index, {"norm": LogNorm(1, most), "extend": "min"}
        drawn = ax.contourf(a, b, ratio, np.geomspace(1, most, 40), cmap="viridis_r", **look)
        inside = [level for level in ticks if level < ratio.max(axis=None)] or [most]
        lines = ax.contour(a, b, ratio, inside, colors="white", linewidths=0.8)
        border = min(ratio.iloc[[0, -1]].min(axis=None), ratio.iloc[:, [0, -1]].min(axis=None))
        ax.clabel(lines, [x for x in inside if x < border][-2:], fontsize=9, fmt="%g")
        ax.plot(0, 0, "o", color="none", mec="black", mew=1.6, ms=10, label="pretrained")
        ax.plot(*ratio.stack().idxmin()[::-1], ms=9, label="minimum of the grid", **STAR)
        ax.set_title(f"range {k}: [{start}, {stop})" if k else "all timesteps", fontsize=10.5)
        ax.set(xlabel="first random direction", ylabel="second", box_aspect=1)
    bar = figure.colorbar(drawn, ax=axes, label="loss / loss of pretrained (log scale)", shrink=0.8)
    bar.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])
    for ax in axes.flat[len(ratios) :]:
        ax.remove()
    legend(figure, axes.flat[:1], 2)
    return captioned(figure, caption)


def _over_centre(table: pd.DataFrame) -> pd.DataFrame:
    """Losses on a grid over the loss at (0, 0), where no step of the grid needs to be."""
    return table / interpn((table.index, table.columns), table.to_numpy(), [[0, 0]])[0]


def plane(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6a: held-out loss, not FID, over the plane of two task vectors, minus the pretrained
    model's."""
    change = 100 * (_over_centre(df.pivot(index="w2", columns="w1", values="loss")) - 1)
    w1, w2 = change.columns, change.index
    figure, axes = subplots(1, 1, 6.2)
    ax, steps = axes[0, 0], MaxNLocator(10, steps=[1, 2, 5, 10])
    filled = ax.contourf(w1, w2, change, locator=steps, cmap="viridis_r")
    ax.contour(w1, w2, change, filled.levels, colors="white", linewidths=0.5, linestyles="-")
    figure.colorbar(filled, ax=ax, label="held-out loss (not FID) minus the pretrained model's, %")
    first, second = df["expert1"].iloc[0], df["expert2"].iloc[0]
    names = {(0, 0): "pretrained", (1, 0): f"expert {first}", (0, 1): f"expert {second}"}
    for place, name in names.items():
        ax.plot(*place, "o", color="black", mec="white", ms=8)
        look = {"textcoords": "offset points", "ha": "center", "fontsize": 10, "bbox": WHITE}
        ax.annotate(name, place, (0, 9), **look)
    label = f"minimum of the grid, {change.min(axis=None):.2f} %".replace("-", "−")
    ax.plot(*change.stack().idxmin()[::-1], ms=18, label=label, **STAR)
    ax.set(xlabel=f"weight of expert {first}'s task vector", box_aspect=1)
    ax.set_ylabel(f"weight of expert {second}'s task vector")
    legend(figure, [ax], 1)
    return captioned(figure, caption)
