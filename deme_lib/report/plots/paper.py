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
LEVELS = [1.2, 2, 5, 20, 100, 500]


def gradient_similarity(
    df: pd.DataFrame, caption: str = "", num_train_timesteps: int = 1000
) -> Figure:
    """Fig. 1a: cosines of the gradients at two timesteps, as a map (the mean over noise draws) and
    as histograms (of all draws), of all pairs and of those in the first quarter of [0, T)."""
    models = list(df["model"].unique())
    figure, axes = subplots(len(models), 2, 0.5 + 3.6 * len(models), width_ratios=[1.2, 1])
    tables = {
        model: part.pivot_table(index="timestep2", columns="timestep1", values="cosine")
        for model, part in df.groupby("model", sort=False)
    }
    apart = np.concatenate([t.to_numpy()[~np.eye(len(t), dtype=bool)] for t in tables.values()])
    reach = np.abs(apart).max()  # the diagonal is 1
    for (model, table), (left, right) in zip(tables.items(), axes, strict=True):
        look = {"cmap": "vlag", "vmin": -reach, "vmax": reach}
        drawn = left.pcolormesh(table.columns, table.index, table, **look)
        scale = f"cosine; apart from the diagonal\n{apart.min():.2f} to {apart.max():.2f}"
        figure.colorbar(drawn, ax=left, label=scale)
        left.set(title=f"{model} model", xlabel="timestep", ylabel="timestep")
        left.set_box_aspect(1)
        pairs = df[(df["model"] == model) & (df["timestep1"] < df["timestep2"])]
        for stop, colour in ((num_train_timesteps, GREY), (num_train_timesteps / 4, COLOURS[0])):
            inside = pairs.loc[pairs["timestep2"] < stop, "cosine"]
            label = f"t below {stop:g}, mean {inside.mean():.2f}"
            bars = {"stat": "probability", "binwidth": 0.1, "binrange": (-1, 1), "ax": right}
            sns.histplot(inside, color=colour, label=label, element="step", alpha=0.35, **bars)
        right.set(xlabel="cosine of two different timesteps", ylabel="share of pairs")
        right.set_xlim(min(-0.1, pairs["cosine"].min()), 1)
        right.legend(loc="upper left", frameon=False, fontsize=9.5)
        right.set_ylim(0, 1.3 * right.get_ylim()[1])
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
    """With named ranges, and how seaborn groups by block and range."""
    palette = shades(df["range"].nunique())
    return df.assign(range=df["range"].map("range {}".format)), {
        "x": "block",
        "hue": "range",
        "palette": palette,
    }


def task_vectors(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6b: values of the task vectors per block and range: quartiles, and 5 to 95 %."""
    figure, axes = subplots(1, 1, 4.6)
    ax = axes[0, 0]
    df, look = _by_range(df.assign(block=df["block"].str.replace("_", "\n")))
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
    ratios = {k: p.pivot(index="b", columns="a", values="loss") for k, p in df.groupby("range")}
    ratios = {k: table / table.loc[0, 0] for k, table in ratios.items()}
    most, columns = max(table.max(axis=None) for table in ratios.values()), min(3, len(ratios))
    rows = -(-len(ratios) // columns)
    figure, axes = subplots(rows, columns, 1.1 + 2.6 * rows, layout="compressed")
    for ax, (k, ratio) in zip(axes.flat, ratios.items(), strict=False):
        a, b, colours = ratio.columns, ratio.index, np.geomspace(1, most, 40)
        look = {"norm": LogNorm(1, most), "cmap": "viridis_r", "extend": "min"}
        drawn = ax.contourf(a, b, ratio, colours, **look)
        ticks = [level for level in LEVELS if level < most]
        lines = ax.contour(a, b, ratio, ticks, colors="white", linewidths=0.8)
        border = (
            ratio.drop(index=b[1:-1]).min(axis=None),
            ratio.drop(columns=a[1:-1]).min(axis=None),
        )
        ax.clabel(lines, [x for x in ticks if x < min(border)][-3:], fontsize=9, fmt="%g")
        ax.plot(0, 0, "o", color="none", mec="black", mew=1.6, ms=14, label="pretrained")
        ax.plot(*ratio.stack().idxmin()[::-1], ms=12, label="minimum of the grid", **STAR)
        start, stop = df.loc[df["range"] == k, ["start", "stop"]].iloc[0]
        where = f"range {k}: [{start}, {stop})" if k else f"all timesteps: [0, {stop})"
        ax.set_title(where, fontsize=10.5)
        ax.set(xlabel="first random direction", ylabel="second", box_aspect=1)
    bar = figure.colorbar(drawn, ax=axes, label="loss / loss of pretrained (log scale)", shrink=0.8)
    for ax in axes.flat[len(ratios) :]:
        ax.remove()
    bar.set_ticks(ticks, labels=[f"{x:g}" for x in ticks])
    legend(figure, axes.flat[:1], 2)
    return captioned(figure, caption)


def plane(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6a: held-out loss, not FID, over the plane of two task vectors, relative to the
    pretrained model's."""
    table = df.pivot(index="w2", columns="w1", values="loss")
    w1, w2 = table.columns, table.index
    ratio = table / interpn((w2, w1), table.to_numpy(), [[0, 0]])[0]
    figure, axes = subplots(1, 1, 6.2)
    ax = axes[0, 0]
    steps = MaxNLocator(10, steps=[1, 2, 5, 10])
    filled = ax.contourf(w1, w2, 100 * (ratio - 1), locator=steps, cmap="viridis_r")
    ax.contour(
        w1, w2, 100 * (ratio - 1), filled.levels, colors="white", linewidths=0.5, linestyles="-"
    )
    figure.colorbar(filled, ax=ax, label="held-out loss (not FID) minus the pretrained model's, %")
    first, second = df["expert1"].iloc[0], df["expert2"].iloc[0]
    names = {(0, 0): "pretrained", (1, 0): f"expert {first}", (0, 1): f"expert {second}"}
    for place, name in names.items():
        ax.plot(*place, "o", color="black", mec="white", ms=8)
        ax.annotate(
            name, place, (0, 9), textcoords="offset points", ha="center", bbox=WHITE, fontsize=10
        )
    lowest = df.loc[df["loss"].idxmin()]
    label = f"minimum of the grid, {100 * (ratio.min(axis=None) - 1):.2f} %".replace("-", "−")
    ax.plot(lowest["w1"], lowest["w2"], ms=18, label=label, **STAR)
    ax.set(
        xlabel=f"weight of expert {first}'s task vector",
        ylabel=f"weight of expert {second}'s task vector",
    )
    ax.set_box_aspect(1)
    legend(figure, [ax], 1)
    return captioned(figure, caption)
