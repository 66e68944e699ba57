"""The paper's own figures: 1a, 2, 4, 6a and 6b."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.interpolate import RegularGridInterpolator

from deme_lib.report.plots.style import COLOURS, captioned, grid, legend, subplots


def gradient_similarity(
    df: pd.DataFrame, caption: str = "", num_train_timesteps: int = 1000
) -> Figure:
    """Fig. 1a: cosines of the gradients at two timesteps, as a map (the mean over noise draws) and
    as two histograms (of all draws)."""
    models = [m for m in ("pretrained", "merged") if m in set(df["model"])]
    figure, axes = subplots(len(models), 2, (10, 0.4 + 4.3 * len(models)), width_ratios=[1.1, 1])
    mirrored = df.rename(columns={"timestep1": "timestep2", "timestep2": "timestep1"})
    full = pd.concat([df, mirrored])
    full = full.drop_duplicates(["model", "draw", "timestep1", "timestep2"])
    pairs = full[full["timestep1"] < full["timestep2"]]
    bins = np.linspace(min(-0.1, pairs["cosine"].min()), 1, 23)
    for model, (left, right) in zip(models, axes, strict=True):
        _gradient_map(left, full[full["model"] == model])
        left.set_title(f"{model} model (paper: Fig. 1a)")
        part = pairs[pairs["model"] == model]
        for share, colour in ((1, COLOURS[7]), (4, COLOURS[0])):
            stop = num_train_timesteps / share
            _gradient_histogram(right, part[part["timestep2"] < stop], bins, stop, colour)
        right.set(xlabel="cosine of two different timesteps", ylabel="share of pairs")
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return captioned(figure, caption)


def _gradient_map(ax: plt.Axes, df: pd.DataFrame) -> None:
    table = df.pivot_table(index="timestep2", columns="timestep1", values="cosine")
    t = table.index.to_numpy()
    drawn = ax.pcolormesh(t, t, table.to_numpy(), cmap="vlag", vmin=-1, vmax=1)
    ax.figure.colorbar(drawn, ax=ax, label="cosine")
    ax.set(xlabel="timestep", ylabel="timestep")


def _gradient_histogram(ax: plt.Axes, df: pd.DataFrame, bins, stop: float, colour: str) -> None:
    cosines, draws = df["cosine"], max(1, df["draw"].nunique())
    label = f"t in [0, {stop:g}): {len(cosines) // draws} pairs"
    if cosines.empty:
        ax.plot([], [], "s", color=colour, alpha=0.6, label=label)
        return
    label += f", mean {cosines.mean():.2f}"
    weights = np.full(len(cosines), 1 / len(cosines))
    ax.hist(cosines, bins, weights=weights, color=colour, alpha=0.6, label=label)


def activations(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 2: how far finetuning moves a block's channel means and position means.

    Boxes: quartiles, whiskers: 5 to 95 %; black: of random weight changes as long.
    """
    blocks = list(df["block"].unique())
    figure, axes = subplots(2, 2, (10, 6.8), sharex=True, sharey="row")
    names = {"channel": "by channel", "spatial": "by position"}
    for (dimension, name), (top, bottom) in zip(names.items(), axes.T, strict=True):
        part = df[df["dimension"] == dimension]
        for at, rows, colour, width in _by_range(part, blocks):
            _boxes(top, rows, at, width, colour)
            bottom.bar(at, rows["share"], 0.85 * width, color=colour)
            bottom.hlines(rows["share_at_random"], at - width / 2, at + width / 2, color="black")
        top.set_title(f"{name} (paper: Fig. 2)")
        bottom.set_xticks(range(len(blocks)), blocks)
    axes[0, 0].set_ylabel("|mean difference| /\nrms of the activation")
    axes[1, 0].set_ylabel("share of the difference's\nvariance explained")
    axes[0, 0].set_ylim(bottom=0)
    _range_legend(figure, df)
    return captioned(figure, caption)


def task_vectors(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6b: values of the task vectors per block and range: quartiles, and 5 to 95 %."""
    blocks = list(df["block"].unique())
    figure, axes = subplots(1, 1, (10, 4.8))
    ax = axes.flat[0]
    for at, rows, colour, width in _by_range(df, blocks):
        _boxes(ax, rows, at, width, colour)
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xticks(range(len(blocks)), blocks)
    ax.set_ylabel("value of the task vector")
    ax.set_title("task vectors by block (paper: Fig. 6b)")
    _range_legend(figure, df)
    return captioned(figure, caption)


def _by_range(df: pd.DataFrame, blocks: list[str]):
    """(positions, rows, colour, width) per range: its place within every block's group."""
    ranges = sorted(df["range"].unique())
    colours, width = sns.color_palette("viridis", len(ranges)), 0.8 / len(ranges)
    for i, (k, colour) in enumerate(zip(ranges, colours, strict=True)):
        rows = df[df["range"] == k]
        centres = np.array([blocks.index(b) for b in rows["block"]])
        yield centres + (i - (len(ranges) - 1) / 2) * width, rows, colour, width


def _boxes(ax: plt.Axes, df: pd.DataFrame, at: np.ndarray, width: float, colour) -> None:
    names = {"median": "med", "q25": "q1", "q75": "q3", "q05": "whislo", "q95": "whishi"}
    ax.bxp(
        df.rename(columns=names)[list(names.values())].to_dict("records"),
        positions=at,
        widths=0.85 * width,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": colour, "lw": 0.8},
        medianprops={"color": "white", "lw": 1.5},
        manage_ticks=False,
    )


def _range_legend(figure: Figure, df: pd.DataFrame) -> None:
    n = df["range"].nunique()
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in sns.color_palette("viridis", n)]
    names = [f"range {k} of {n}" for k in range(1, n + 1)]
    names[0] += " (low t)"
    figure.legend(handles, names, loc="outside upper center", ncols=min(n, 4), frameon=False)


def landscape(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 4: the loss around the pretrained weights, for all timesteps and for each range.

    Along two filter-normalised random directions (Li et al. 2018): at 1 every filter has changed
    by its own norm. Lines: loss over the pretrained model's, every panel with its own levels.
    """
    parts = [part for _, part in df.groupby("range")]
    figure, axes = grid(len(parts), 3, (3.3, 3.3), sharex=True, sharey=True)
    for ax, part in zip(axes, parts, strict=True):
        _landscape_panel(ax, part)
    legend(figure, axes, 2)
    return captioned(figure, caption)


def _landscape_panel(ax: plt.Axes, df: pd.DataFrame) -> None:
    table = df.pivot(index="b", columns="a", values="loss")
    a, b, loss = table.columns.to_numpy(), table.index.to_numpy(), table.to_numpy()
    ratio = loss / loss[len(b) // 2, len(a) // 2]
    if np.ptp(ratio) > 1e-9:
        levels, form = _levels(ratio, 7) if ratio.max() < 4 else _log_levels(ratio)
        ax.contourf(a, b, np.log(ratio), 30, cmap="viridis_r")
        lines = ax.contour(a, b, ratio, levels, colors="white", linewidths=0.7)
        ax.clabel(lines, fmt=form, fontsize=9)
    row, column = np.unravel_index(ratio.argmin(), ratio.shape)
    ax.plot(0, 0, "o", color="none", mec="black", mew=1.5, ms=15, label="pretrained")
    name = "minimum of the grid"
    ax.plot(a[column], b[row], "*", color=COLOURS[3], mec="white", ms=13, label=name)
    k, start, stop = df.iloc[0][["range", "start", "stop"]].astype(int)
    title = f"range {k}: t in [{start}, {stop})" if k else f"all timesteps, [{start}, {stop})"
    ax.set_title(f"{title}\nminimum {ratio.min():.4f}", fontsize=11)


def _log_levels(values: np.ndarray) -> tuple[np.ndarray, str]:
    return LogLocator(subs=(1, 2, 5)).tick_values(values.min(), values.max()), "%g"


def plane(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6a: loss over the plane of two task vectors, relative to the pretrained model's."""
    table = df.pivot(index="w2", columns="w1", values="loss")
    w1, w2, loss = table.columns.to_numpy(), table.index.to_numpy(), table.to_numpy()
    ratio = loss / RegularGridInterpolator((w2, w1), loss)([[0, 0]])[0]
    figure, axes = subplots(1, 1, (7.5, 6))
    ax = axes.flat[0]
    levels, form = _levels(ratio)
    if np.ptp(ratio) > 1e-9:
        filled = ax.contourf(w1, w2, ratio, levels, cmap="viridis_r")
        lines = ax.contour(w1, w2, ratio, levels[1:-1:2], colors="white", linewidths=0.7)
        ax.clabel(lines, fmt=form, fontsize=9)
    else:
        filled = ax.pcolormesh(w1, w2, ratio, cmap="viridis_r", shading="nearest")
    figure.colorbar(filled, ax=ax, format=form).set_label(
        "held-out loss / pretrained model's (held-out loss, not FID)"
    )
    first, second = df["expert1"].iloc[0], df["expert2"].iloc[0]
    names = {(0, 0): "pretrained", (1, 0): f"expert {first}", (0, 1): f"expert {second}"}
    for (x, y), name in names.items():
        ax.plot(x, y, "o", color="black", mec="white", ms=8)
        _label(ax, x, y, name)
    row, column = np.unravel_index(ratio.argmin(), ratio.shape)
    ax.plot(w1[column], w2[row], "*", color=COLOURS[3], mec="white", ms=17)
    _label(ax, w1[column], w2[row], f"minimum {ratio.min():.4f}", -18 if row else 8)
    ax.set(xlabel=f"$w_1$ (expert {first})", ylabel=f"$w_2$ (expert {second})")
    ax.set_title("held-out loss, not FID, over two task vectors (paper: Fig. 6a)")
    return captioned(figure, caption)


def _label(ax: plt.Axes, x: float, y: float, text: str, above: int = 8) -> None:
    """Text beside a point, on the side where there is room."""
    side = -1 if x > sum(ax.get_xlim()) / 2 else 1
    style = {"bbox": {"fc": "white", "alpha": 0.8, "ec": "none", "pad": 1}}
    style |= {"ha": "left" if side == 1 else "right", "textcoords": "offset points"}
    ax.annotate(text, (x, y), xytext=(8 * side, above), **style)


def _levels(values: np.ndarray, most: int = 12) -> tuple[np.ndarray, str]:
    """Evenly spaced levels around all values, and a format that tells them apart."""
    levels = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(values.min(), values.max())
    decimals = max(0, -int(np.floor(np.log10(levels[1] - levels[0]) + 1e-9)))
    return levels, f"%.{decimals}f"
