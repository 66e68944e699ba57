"""The paper's own figures: 1a, 2, 4, 6a and 6b."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.interpolate import interpn

from deme_lib.report.plots import style
from deme_lib.report.plots.style import COLOURS, GREY, boxes, captioned, legend, subplots

STAR = {"marker": "*", "ls": "", "color": COLOURS[3], "mec": "white", "clip_on": False, "zorder": 5}
LEVELS = (1.2, 2, 5, 20, 100, 500)
"""Lines of equal loss, over the pretrained model's."""


def gradient_similarity(
    df: pd.DataFrame, caption: str = "", num_train_timesteps: int = 1000
) -> Figure:
    """Fig. 1a: cosines of the gradients at two timesteps, as a map (the mean over noise draws) and
    as histograms (all draws), of all pairs and of those in the first quarter of [0, T)."""
    models = df.groupby("model", sort=False)
    figure, axes = subplots(len(models), 2, 0.5 + 3.6 * len(models), width_ratios=[1.2, 1])
    for (model, part), (left, right) in zip(models, axes, strict=True):
        table = part.pivot_table(index="timestep2", columns="timestep1", values="cosine")
        look = {"cmap": "vlag", "vmin": -1, "vmax": 1}
        drawn = left.pcolormesh(table.columns, table.index, table, **look)
        figure.colorbar(drawn, ax=left, label="cosine")
        left.set(title=f"{model} model", xlabel="timestep", ylabel="timestep", box_aspect=1)
        pairs = part[part["timestep1"] < part["timestep2"]]
        for stop, colour in ((num_train_timesteps, GREY), (num_train_timesteps / 4, COLOURS[0])):
            inside = pairs.loc[pairs["timestep2"] < stop, "cosine"]
            label = f"t in [0, {stop:g}), mean {inside.mean():.2f}"
            bars = {"stat": "probability", "binwidth": 0.1, "binrange": (-1, 1), "alpha": 0.35}
            sns.histplot(inside, ax=right, color=colour, label=label, element="step", **bars)
        right.set(xlabel="cosine of two different timesteps", ylabel="share of pairs")
        right.set_xlim(-1, 1)
        right.legend(loc="upper left", frameon=False, fontsize=9.5)
    return captioned(figure, caption)


def activations(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 2: how far finetuning moves a block's channel means and position means.

    Boxes: quartiles, whiskers: 5 to 95 %; black: of random weight changes as long.
    """
    figure, axes = subplots(2, 2, 6.2, sharex=True, sharey="row")
    df, look = _by_range(df)
    titles = {"channel": "means of channels", "spatial": "means of positions"}
    for (dimension, title), (top, bottom) in zip(titles.items(), axes.T, strict=True):
        part = df[df["dimension"] == dimension]
        boxes(part, y="value", ax=top, **look)
        sns.barplot(part, y="share", ax=bottom, saturation=1, **look)
        random = {"palette": "dark:black", "marker": "_", "s": 9, "linewidth": 2, "dodge": True}
        random |= {"jitter": False, "legend": False, "ax": bottom}
        sns.stripplot(part, y="share_at_random", **look | random)
        bottom.plot([], [], "k_", ms=9, mew=2, label="random change of weights, as long")
        top.set_title(title)
        bottom.set_xlabel("")
    axes[0, 0].set(ylabel="|mean difference| /\nrms of the activation", ylim=(0, None))
    axes[1, 0].set_ylabel("share of the difference's\nvariance explained")
    legend(figure, 5)
    return captioned(figure, caption)


def _by_range(df: pd.DataFrame) -> tuple[pd.DataFrame, dict]:
    """With named ranges and broken names of blocks, and how seaborn groups by both."""
    look = {"x": "block", "hue": "range", "palette": style.shades(df["range"].nunique())}
    ranges, blocks = df["range"].map("range {}".format), df["block"].str.replace("_", "\n")
    return df.assign(range=ranges, block=blocks), look


def task_vectors(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6b: values of the task vectors per block and range: quartiles, and 5 to 95 %."""
    figure, axes = subplots(1, 1, 4.6)
    ax, (df, look) = axes[0, 0], _by_range(df)
    boxes(df, y="value", ax=ax, **look)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.set(xlabel="", ylabel="value of the task vector")
    legend(figure, 8)
    return captioned(figure, caption)


def landscape(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 4: the loss around the pretrained weights over the loss there, for all timesteps and
    for each range, along two filter-normalised random directions (Li et al. 2018).

    At 1 every filter has changed by its own norm. All panels have one colour scale.
    """
    panels = df.groupby(["range", "start", "stop"])
    ratios = {
        f"range {k}: [{start}, {stop})" if k else "all timesteps": _over_centre(part, "b", "a")
        for (k, start, stop), part in panels
    }
    most = max(2, *(ratio.max(axis=None) for ratio in ratios.values()))
    ticks, rows = [level for level in LEVELS if level < most], -(-len(ratios) // 3)
    figure, axes = subplots(rows, 3, 1.1 + 2.6 * rows, layout="compressed")
    for ax, (title, ratio) in zip(axes.flat, ratios.items(), strict=False):
        look = {"norm": LogNorm(1, most), "extend": "min", "cmap": "viridis_r"}
        drawn = ax.contourf(ratio.columns, ratio.index, ratio, np.geomspace(1, most, 40), **look)
        lines = ax.contour(ratio.columns, ratio.index, ratio, ticks, colors="white", linewidths=0.8)
        ax.plot(0, 0, "o", color="none", mec="black", mew=1.6, ms=10, label="pretrained")
        ax.plot(*ratio.stack().idxmin()[::-1], ms=9, label="minimum of the grid", **STAR)
        ax.set_title(title, fontsize=10.5)
        ax.set(xlabel="first random direction", ylabel="second", box_aspect=1)
    bar = figure.colorbar(drawn, ax=axes, label="loss / loss of pretrained (log scale)", shrink=0.8)
    bar.add_lines(lines)
    bar.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])
    for ax in axes.flat[len(ratios) :]:
        ax.remove()
    legend(figure, 2)
    return captioned(figure, caption)


def _over_centre(df: pd.DataFrame, index: str, columns: str) -> pd.DataFrame:
    """Losses on a grid over the loss at (0, 0), where no step of the grid needs to be."""
    grid = df.pivot(index=index, columns=columns, values="loss")
    return grid / interpn((grid.index, grid.columns), grid.to_numpy(), [[0, 0]])[0]


def plane(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6a: held-out loss, not FID, over the plane of two task vectors, minus the pretrained
    model's."""
    change = 100 * (_over_centre(df, "w2", "w1") - 1)
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
        look = {"textcoords": "offset points", "ha": "center", "fontsize": 10, "bbox": style.WHITE}
        ax.annotate(name, place, (0, 9), **look)
    label = f"minimum of the grid, {change.min(axis=None):.2f} %".replace("-", "−")
    ax.plot(*change.stack().idxmin()[::-1], ms=18, label=label, **STAR)
    ax.set(xlabel=f"weight of expert {first}'s task vector", box_aspect=1)
    ax.set_ylabel(f"weight of expert {second}'s task vector")
    legend(figure, 1)
    return captioned(figure, caption)
