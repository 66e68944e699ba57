"""The paper's own figures: 1a, 2, 4, 6a and 6b."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.interpolate import interpn

from deme_lib.report.plots.style import COLOURS, boxes, captioned, grid, legend, subplots

WHITE = {"fc": "white", "alpha": 0.7, "ec": "none", "pad": 1}
BY_RANGE = {"x": "block", "hue": "range", "palette": "viridis"}


def gradient_similarity(
    df: pd.DataFrame, caption: str = "", num_train_timesteps: int = 1000
) -> Figure:
    """Fig. 1a: cosines of the gradients at two timesteps, as a map (the mean over noise draws) and
    as histograms (of all draws): of all pairs, and of those in the first quarter of [0, T)."""
    models = list(df["model"].unique())
    figure, axes = subplots(len(models), 2, (10, 0.4 + 4.3 * len(models)), width_ratios=[1.1, 1])
    for model, (left, right) in zip(models, axes, strict=True):
        mine = df[df["model"] == model]
        table = mine.pivot_table(index="timestep2", columns="timestep1", values="cosine")
        drawn = left.pcolormesh(table.columns, table.index, table, cmap="vlag", vmin=-1, vmax=1)
        figure.colorbar(drawn, ax=left, label="cosine")
        title = f"{model} model (paper: Fig. 1a)"
        left.set(title=title, xlabel="timestep", ylabel="timestep")
        for stop, colour in ((num_train_timesteps, "0.5"), (num_train_timesteps / 4, COLOURS[0])):
            pairs = mine[(mine["timestep1"] < mine["timestep2"]) & (mine["timestep2"] < stop)]
            label = f"t in [0, {stop:g}), mean {pairs['cosine'].mean():.2f}"
            bars = {"stat": "probability", "binwidth": 0.05, "binrange": (-1, 1), "ax": right}
            sns.histplot(pairs, x="cosine", label=label, color=colour, alpha=0.6, **bars)
        low = min(-0.1, mine["cosine"].min())
        xlabel = "cosine of two different timesteps"
        right.set(xlabel=xlabel, ylabel="share of pairs", xlim=(low, 1))
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return captioned(figure, caption)


def activations(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 2: how far finetuning moves a block's channel means and position means.

    Boxes: quartiles, whiskers: 5 to 95 %; black: of random weight changes as long.
    """
    figure, axes = subplots(2, 2, (10, 6.8), sharex=True, sharey="row")
    names = {"channel": "by channel", "spatial": "by position"}
    df = df.assign(range=df["range"].map("range {}".format))
    for (dimension, name), (top, bottom) in zip(names.items(), axes.T, strict=True):
        part = df[df["dimension"] == dimension]
        boxes(part, y="value", ax=top, **BY_RANGE)
        sns.barplot(part, y="share", ax=bottom, **BY_RANGE)
        random = {"palette": "dark:black", "marker": "_", "s": 10, "linewidth": 2, "dodge": True}
        random |= {"jitter": False, "legend": False, "ax": bottom}
        sns.stripplot(part, y="share_at_random", **BY_RANGE | random)
        top.set_title(f"{name} (paper: Fig. 2)")
        bottom.plot([], [], "k_", ms=10, mew=2, label="random weight changes as long")
        bottom.set_xlabel("")
    axes[0, 0].set(ylabel="|mean difference| /\nrms of the activation", ylim=(0, None))
    axes[1, 0].set_ylabel("share of the difference's\nvariance explained")
    legend(figure, axes.flat, 5)
    return captioned(figure, caption)


def task_vectors(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6b: values of the task vectors per block and range: quartiles, and 5 to 95 %."""
    figure, axes = subplots(1, 1, (10, 4.8))
    ax = axes.flat[0]
    boxes(df.assign(range=df["range"].map("range {}".format)), y="value", ax=ax, **BY_RANGE)
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    ax.set(xlabel="", ylabel="value of the task vector")
    ax.set_title("task vectors by block (paper: Fig. 6b)")
    legend(figure, axes.flat, 4)
    return captioned(figure, caption)


def landscape(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 4: the loss around the pretrained weights, for all timesteps and for each range.

    Along two filter-normalised random directions (Li et al. 2018): at 1 every filter has changed
    by its own norm. Lines: loss over the pretrained model's, every panel with its own levels.
    """
    figure, axes = grid(df["range"].nunique(), 3, (3.3, 3.4))
    for ax, (k, part) in zip(axes, df.groupby("range"), strict=True):
        table = part.pivot(index="b", columns="a", values="loss")
        ratio = (table / table.loc[0, 0]).to_numpy()
        ax.contourf(table.columns, table.index, np.log(ratio), 30, cmap="viridis_r")
        levels = MaxNLocator(6) if ratio.max() < 4 else LogLocator(subs=(1, 2, 5))
        look = {"locator": levels, "colors": "white", "linewidths": 0.7}
        ax.clabel(ax.contour(table.columns, table.index, ratio, **look), fontsize=8)
        ax.plot(0, 0, "o", color="none", mec="black", mew=1.5, ms=15, label="pretrained")
        lowest = part.loc[part["loss"].idxmin()]
        star = {"color": COLOURS[3], "mec": "white", "ms": 13, "label": "minimum of the grid"}
        ax.plot(lowest["a"], lowest["b"], "*", **star)
        where = f"range {k}: t in" if k else "all timesteps,"
        title = f"{where} [{lowest['start']:g}, {lowest['stop']:g})\nminimum {ratio.min():.4f}"
        ax.set_title(title, fontsize=10)
        ax.set(xlabel="first random direction", ylabel="second")
        ax.set_box_aspect(1)
    legend(figure, axes, 2, title="loss / pretrained model's, around its weights (paper: Fig. 4)")
    return captioned(figure, caption)


def plane(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6a: loss over the plane of two task vectors, relative to the pretrained model's."""
    table = df.pivot(index="w2", columns="w1", values="loss")
    w1, w2 = table.columns, table.index
    ratio = table / interpn((w2, w1), table.to_numpy(), [[0, 0]])[0]
    figure, axes = subplots(1, 1, (7.5, 6))
    ax = axes.flat[0]
    steps = MaxNLocator(10, steps=[1, 2, 5, 10])
    filled = ax.contourf(w1, w2, ratio, locator=steps, cmap="viridis_r")
    ax.contour(w1, w2, ratio, filled.levels, colors="white", linewidths=0.5)
    figure.colorbar(filled, ax=ax, label="held-out loss / pretrained model's (not FID)")
    first, second = df["expert1"].iloc[0], df["expert2"].iloc[0]
    names = {(0, 0): "pretrained", (1, 0): f"expert {first}", (0, 1): f"expert {second}"}
    for place, name in names.items():
        ax.plot(*place, "o", color="black", mec="white", ms=8)
        ax.annotate(name, place, (0, 8), textcoords="offset points", ha="center", bbox=WHITE)
    lowest = df.loc[df["loss"].idxmin()]
    ax.plot(lowest["w1"], lowest["w2"], "*", color=COLOURS[3], mec="white", ms=17, clip_on=False)
    ax.set(xlabel=f"$w_1$ (expert {first})", ylabel=f"$w_2$ (expert {second})")
    minimum = f"star: the grid's minimum, {ratio.min(axis=None):.4f}"
    ax.set_title(f"held-out loss, not FID, over two task vectors (paper: Fig. 6a)\n{minimum}")
    return captioned(figure, caption)
