"""Figures of models and their training; Fig. 1a, 6a and 6b of the paper."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.interpolate import RegularGridInterpolator

from deme_lib.plots.style import (
    COLOURS,
    LEGEND,
    STYLES,
    by_ablation,
    captioned,
    empty,
    label,
    subplots,
    title_of,
    unknown_style,
)


def history(df: pd.DataFrame, caption: str = "") -> Figure:
    """Held-out loss of pretraining with its learning rate, and of the finetuning runs after it."""
    df = df.dropna(subset=["held_out_loss"])
    figure, axes = subplots(1, 2, (10, 4.2))
    left, right = axes.flat
    baseline, finetuned = df[df["run"] == "baseline"], df[df["run"] != "baseline"]
    left.set(title="pretraining", xlabel="step", ylabel="held-out loss")
    right.set(title="finetuning from the pretrained model", xlabel="step")
    if baseline.empty:
        empty(left, "no history: the pretrained model was loaded")
    else:
        trained = baseline[baseline["step"] > 0]  # the loss of random weights dwarfs the rest
        left.plot(trained["step"], trained["held_out_loss"], "o-", color=COLOURS[0], ms=4)
        rate = left.twinx()
        rate.plot(baseline["step"], baseline["learning_rate"], "--", color=COLOURS[1])
        rate.set_ylabel("learning rate (dashed)", color=COLOURS[1])
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.set_ylim(bottom=0)
        last = baseline["held_out_loss"].iloc[-1]
        right.axhline(last, color=STYLES["pretrained"][0], lw=1, label="end of pretraining")
    if finetuned.empty:
        empty(right, "no finetuning run")
        return captioned(figure, caption)
    for run, part in finetuned.groupby("run", sort=False):
        right.plot(part["step"], part["held_out_loss"], ms=4, label=run, **_run_style(run))
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return captioned(figure, caption)


def _run_style(run: str) -> dict:
    """The colour of the arm a run serves; markers and lines tell its siblings apart."""
    arms = {"expert": "routed", "all-plain": "all_plain", "all-same": "all_same", "soup": "soup"}
    colour = next(
        (STYLES[arm][0] for name, arm in arms.items() if run.startswith(name)), COLOURS[7]
    )
    number = re.search(r"\d+", run)
    i = int(number[0]) - 1 if number else 0
    return {"color": colour, "marker": "os^vDPX*"[i % 8], "ls": ("-", "--", ":", "-.")[i % 4]}


def loss_per_timestep(df: pd.DataFrame, caption: str = "") -> Figure:
    """Denoising loss of every arm over the pretrained model's, per bin of timesteps."""
    table = df.assign(t=(df["bin_start"] + df["bin_stop"]) / 2)
    table = table.pivot(index="t", columns="arm", values="loss")
    if "pretrained" not in table:
        raise ValueError("losses are shown relative to the arm 'pretrained', which has no rows")
    ratio = table.div(table["pretrained"], axis=0)
    panels = by_ablation(df["arm"].unique())
    figure, axes = subplots(1, len(panels), (max(5 * len(panels), 7), 5.4), sharey=True)
    for ax, (title, arms) in zip(axes.flat, panels.items(), strict=True):
        for i, arm in enumerate(arms):
            colour, marker, line = STYLES.get(arm, unknown_style(i))
            ax.plot(
                ratio.index,
                ratio[arm],
                color=colour,
                marker=marker,
                ls=line,
                ms=5,
                label=title_of(arm),
            )
        ax.set(title=title, xlabel="timestep t")
        ax.legend(loc="upper center", bbox_to_anchor=(0.48, -0.14), **LEGEND)
    axes.flat[0].set_ylabel("loss / pretrained model's loss\n(below 1: better)")
    return captioned(figure, f"{caption}{_shares(df[df['arm'] == 'pretrained'])}")


def _shares(part: pd.DataFrame) -> str:
    """Where one arm's loss over uniform t lies; nothing where bins straddle a quarter of T."""
    end = part["bin_stop"].max()
    if not {end / 4, 3 * end / 4} <= set(part["bin_start"]):
        return ""
    total = part["loss"] * (part["bin_stop"] - part["bin_start"])  # bins hold means
    low = total[part["bin_stop"] <= end / 4].sum() / total.sum()
    high = total[part["bin_start"] >= 3 * end / 4].sum() / total.sum()
    return (
        f". Of the pretrained model's total loss, {low:.1%} lies in t below {end / 4:g} (T/4) "
        f"and {high:.1%} in t from {3 * end / 4:g} (3T/4) on."
    )


def gradient_similarity(
    df: pd.DataFrame, caption: str = "", num_train_timesteps: int = 1000
) -> Figure:
    """Fig. 1a: cosines of the gradients at two timesteps, as a map and as two histograms."""
    mirrored = df.rename(columns={"timestep1": "timestep2", "timestep2": "timestep1"})
    full = pd.concat([df, mirrored]).drop_duplicates(["timestep1", "timestep2"])
    table = full.pivot(index="timestep2", columns="timestep1", values="cosine")
    figure, axes = subplots(1, 2, (10, 4.6), width_ratios=[1.1, 1])
    left, right = axes.flat
    t = table.index.to_numpy()
    drawn = left.pcolormesh(t, t, table.to_numpy(), cmap="vlag", vmin=-1, vmax=1)
    figure.colorbar(drawn, ax=left, label="cosine")
    left.set(xlabel="timestep", ylabel="timestep", title="gradient similarity (paper: Fig. 1a)")
    pairs = full[full["timestep1"] < full["timestep2"]]
    bins = np.linspace(min(-0.1, pairs["cosine"].min()), 1, 23)
    for stop, colour in ((num_train_timesteps, COLOURS[7]), (num_train_timesteps / 4, COLOURS[0])):
        cosines = pairs.loc[pairs["timestep2"] < stop, "cosine"]
        label = f"t in [0, {stop:g}): {len(cosines)} pairs"
        if len(cosines):
            label += f", mean {cosines.mean():.2f}"
            weights = np.full(len(cosines), 1 / len(cosines))
            right.hist(cosines, bins, weights=weights, color=colour, alpha=0.6, label=label)
        else:
            right.plot([], [], "s", color=colour, alpha=0.6, label=label)
    right.set(xlabel="cosine of two different timesteps", ylabel="share of pairs")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return captioned(figure, f"{caption}. One noise draw.")


def task_vectors(df: pd.DataFrame, caption: str = "") -> Figure:
    """Fig. 6b: values of the task vectors per block and range, boxes from stored quantiles."""
    blocks, ranges = list(df["block"].unique()), sorted(df["range"].unique())
    colours = sns.color_palette("viridis", len(ranges))
    figure, axes = subplots(1, 1, (10, 4.6))
    ax, width = axes.flat[0], 0.8 / len(ranges)
    for i, (k, colour) in enumerate(zip(ranges, colours, strict=True)):
        part = df[df["range"] == k]
        boxes = [
            {
                "med": r["median"],
                "q1": r["q25"],
                "q3": r["q75"],
                "whislo": r["q05"],
                "whishi": r["q95"],
                "fliers": [],
            }
            for _, r in part.iterrows()
        ]
        at = [blocks.index(b) + (i - (len(ranges) - 1) / 2) * width for b in part["block"]]
        ax.bxp(
            boxes,
            positions=at,
            widths=0.85 * width,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": colour, "lw": 0.8},
            medianprops={"color": "white", "lw": 1.5},
            manage_ticks=False,
        )
        ax.fill_between([], [], color=colour, label=f"range {k} of {len(ranges)}")
    ax.axhline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_xticks(range(len(blocks)), blocks)
    ax.set_ylabel("value of the task vector")
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=min(len(ranges), 4),
        frameon=False,
        title="task vectors by block (paper: Fig. 6b)",
    )
    return captioned(figure, f"{caption}. Boxes: quartiles, whiskers: 5 % to 95 %; range 1: low t.")


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
        label(ax, x, y, name)
    row, column = np.unravel_index(ratio.argmin(), ratio.shape)
    ax.plot(w1[column], w2[row], "*", color=COLOURS[3], mec="white", ms=17)
    label(ax, w1[column], w2[row], f"minimum {ratio.min():.4f}", -18 if row else 8)
    ax.set(xlabel=f"$w_1$ (expert {first})", ylabel=f"$w_2$ (expert {second})")
    ax.set_title("held-out loss, not FID, over two task vectors (paper: Fig. 6a)")
    return captioned(figure, caption)


def _levels(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Evenly spaced levels around all values, and a format that tells them apart."""
    levels = MaxNLocator(12, steps=[1, 2, 5, 10]).tick_values(values.min(), values.max())
    decimals = max(0, -int(np.floor(np.log10(levels[1] - levels[0]) + 1e-9)))
    return levels, f"%.{decimals}f"
