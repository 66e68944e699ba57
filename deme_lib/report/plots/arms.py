"""Figures of the arms: what they score and make, and how their weights were found."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from deme_lib.report import intervals, tables
from deme_lib.report.formats import decimals, interval, number
from deme_lib.report.plots.style import (
    COLOURS,
    STYLES,
    captioned,
    empty,
    grid,
    legend,
    style,
    subplots,
    symlog_if_wide,
    title_of,
)
from deme_lib.report.records import BASE, Records


def main(records: Records) -> Figure:
    """Both ablations: FID of every arm minus the pretrained model's, paired by unit."""
    table = tables.table(records).set_index("arm")
    fid = records.by_unit["fid"][BASE]
    d = fid.sub(fid["pretrained"], axis=0)
    compared = intervals.comparisons(records)
    primary = compared[compared["kind"] == "primary"]
    counts = [len(records.arms_of(n)) for n in intervals.ABLATIONS]
    size, ratios = (10, 3.2 + 0.36 * sum(counts)), [c + 1.4 for c in counts]
    figure, axes = subplots(len(counts), 1, size, height_ratios=ratios, sharex=True)
    for ablation, ax in zip(intervals.ABLATIONS, axes.flat, strict=True):
        _ablation_panel(ax, table.loc[records.arms_of(ablation)], d)
        _primaries(ax, primary[primary["ablation"] == ablation], ablation)
    scale = symlog_if_wide("x", axes.flat[0], table["difference"])
    _floor(axes.flat, records.floor("fid") - fid["pretrained"].mean())
    what = f"FID minus the pretrained model's{scale}"
    axes.flat[-1].set_xlabel(f"← better      {what}      worse →")
    return captioned(figure, f"{tables.caption(records)}; dots: {intervals.UNITS[records.unit]}")


def _ablation_panel(ax: plt.Axes, rows: pd.DataFrame, d: pd.DataFrame) -> None:
    """A line per arm: its units as dots, its mean with the t interval, its FID at the right."""
    for y, (arm, row) in enumerate(rows.iterrows()):
        look = style(arm, y)
        ax.plot(d[arm], np.full(len(d), y + 0.3), ".", color=look["color"], alpha=0.6, ms=6)
        mean = 0 if pd.isna(row["difference"]) else row["difference"]
        half = (row["difference_high"] - row["difference_low"]) / 2
        ax.errorbar(mean, y, xerr=half, ms=9, capsize=4, lw=2, **look)
    ax.axvline(0, color=STYLES["pretrained"][0], lw=1, zorder=0)
    ax.set_yticks(range(len(rows)), rows["title"])
    ax.set_ylim(len(rows) - 0.4, -0.8)
    ax.grid(axis="x", color="0.92")
    ax.tick_params(labelbottom=True)
    right = ax.twinx()
    right.set_ylim(ax.get_ylim())
    right.set_yticks(range(len(rows)), [f"FID {decimals(x)}" for x in rows["fid_mean"]])
    right.tick_params(length=0)


def _primaries(ax: plt.Axes, rows: pd.DataFrame, ablation: int) -> None:
    """Above the panel, the comparisons that were named before the run."""
    lines = [
        f"{row.a} − {row.b}: {interval(row.effect, row.low, row.high)} "
        f"({100 * row.level:.4g} %), {row.verdict}"
        for row in rows.itertuples()
    ]
    ax.text(0, 1.02, "\n".join(lines), transform=ax.transAxes, va="bottom", fontsize=9)
    heading = f"Ablation {ablation}: {intervals.ABLATIONS[ablation]}"
    ax.set_title(heading, loc="left", weight="bold", pad=8 + 13 * len(lines))


def _floor(axes: np.ndarray, at: float) -> None:
    """A line where fresh real images would be, or an arrow to where it lies outside."""
    low, high = axes[0].get_xlim()
    near = low - 0.5 * (high - low) < at < high
    for ax in axes:
        if near:
            ax.axvline(at, color="black", ls="--", lw=1.2, zorder=0)
        text = f"real images: {number(at)}" if near else f"← real images, at {number(at)}"
        where = at if near else low
        if not np.isnan(at):
            ax.text(where, -0.5, f" {text}", va="center", fontsize=9, color="0.3", clip_on=False)
    if not near:
        axes[0].set_xlim(low, high)


def samples(images: dict[str, np.ndarray], titles: dict[str, str], caption: str = "") -> Figure:
    """A row of images per arm, from the same noise for every arm.

    Args:
        images: arm -> [K, C, H, W] uint8; "real" is training data.
        titles: arm -> title; gives the order of the rows too.
    """
    names = [a for a in (*titles, "real") if a in images]
    names += [a for a in images if a not in names]
    strips = [_strip(images[name]) for name in names]  # each [H + gap, K (W + gap), 3]
    height, width = strips[0].shape[:2]
    left, shown, below, above = 3.0, 6.9, 0.4, 0.12  # inches
    tall = shown * height * len(names) / width
    figure, axes = subplots(1, 1, (left + shown + 0.1, tall + below + above))
    figure.set_layout_engine("none")
    ax = axes.flat[0]
    wide, high = figure.get_size_inches()
    ax.set_position([left / wide, below / high, shown / wide, tall / high])
    ax.imshow(np.concatenate(strips), interpolation="nearest", aspect="auto")
    ax.set_xticks([])
    centres = [height * (i + 0.5) - 0.5 for i in range(len(names))]
    known = {"real": "training images", **titles}
    ax.set_yticks(centres, [known.get(name, f"{name} images") for name in names])
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    return captioned(figure, caption)


def _strip(images: np.ndarray) -> np.ndarray:
    gap = max(1, images.shape[-1] // 16)
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=255)
    row = np.concatenate([image.transpose(1, 2, 0) for image in padded], axis=1)
    return row if row.shape[2] == 3 else np.repeat(row[:, :, :1], 3, axis=2)


def search(df: pd.DataFrame, caption: str = "") -> Figure:
    """Held-out loss against FID ± se of the candidates that were scored by images, per search."""
    scored = df.dropna(subset=["fid"])
    names = list(scored["search"].unique()) or ["none"]
    figure, axes = grid(len(names), 2, (5, 3.3))
    for ax, name in zip(axes, names, strict=True):
        _search_panel(ax, scored[scored["search"] == name], name)
    legend(figure, axes, 3)
    return captioned(figure, caption)


def _search_panel(ax: plt.Axes, part: pd.DataFrame, title: str) -> None:
    if part.empty:
        empty(ax, "no candidate was scored by images")
        return
    base = np.array([not any(json.loads(w)) for w in part["weights"]])
    chosen = (part["chosen"] == 1).to_numpy()
    kinds = (
        (~base & ~chosen, {"fmt": "o", "color": COLOURS[0], "label": "candidate"}),
        (base & ~chosen, {"fmt": "s", "color": "0.4", "label": "all weights 0"}),
        (chosen, {"fmt": "*", "color": COLOURS[3], "ms": 13, "label": "chosen"}),
    )
    for rows, look in kinds:
        df = part[rows]
        ax.errorbar(df["loss"], df["fid"], df["se"].fillna(0), lw=1, capsize=2, **look)
    if min(part["loss"].nunique(), part["fid"].nunique()) > 2:
        title += f"\nrank correlation {spearmanr(part['loss'], part['fid'])[0]:.2f}"
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="held-out loss", ylabel="FID ± se, search noise")
    ax.ticklabel_format(useOffset=False)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def neighbours(df: pd.DataFrame, caption: str = "") -> Figure:
    """Distance to the nearest training image, per arm, against held-out images' own.

    Symbol: median, thick: quartiles, thin: 5 to 95 %. Copies would lie left of the test band.
    """
    test, arms = df[df["arm"] == "test"], df[df["arm"] != "test"]
    figure, axes = subplots(1, 1, (9, 1.8 + 0.32 * len(arms)))
    ax = axes.flat[0]
    for _, row in test.iterrows():
        ax.axvspan(row["q05"], row["q95"], color="0.94", zorder=0, label="test images, 5–95 %")
        ax.axvspan(row["q25"], row["q75"], color="0.86", zorder=0, label="test images, quartiles")
        ax.axvline(row["median"], color="0.4", ls="--", label="test images, median")
    for y, (_, row) in enumerate(arms.iterrows()):
        look = style(row["arm"], y)
        ax.plot([row["q05"], row["q95"]], [y, y], color=look["color"], lw=1.2)
        ax.plot([row["q25"], row["q75"]], [y, y], color=look["color"], lw=5, solid_capstyle="butt")
        ax.plot(row["median"], y, mec="black", ms=9, **look)
    ax.set_yticks(range(len(arms)), [title_of(arm) for arm in arms["arm"]])
    ax.invert_yaxis()
    ax.set_xlabel("Euclidean distance to the nearest training image, pixels in [−1, 1]")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return captioned(figure, caption)


def sweep(records: Records) -> Figure:
    """FID minus the pretrained model's of every cell and arm; arms of the base as lines.

    Cells named by numbers are joined by lines.
    """
    df = tables.table(records).iloc[1:]
    base, cells = df[df["cell"] == BASE], df[df["cell"] != BASE]
    names, arms = list(cells["cell"].unique()), list(cells["arm"].unique())
    numeric = pd.to_numeric(pd.Series(names), errors="coerce").notna().all()
    figure, axes = subplots(1, 1, (10, 5.2))
    ax = axes.flat[0]
    for i, row in enumerate(base.fillna({"difference": 0}).itertuples()):
        look = {"color": style(row.arm, i)["color"], "lw": 1.5, "zorder": 1}
        ax.axhline(row.difference, ls="--", label=f"{row.title} (the base)", **look)
    for i, arm in enumerate(arms):
        rows = cells[cells["arm"] == arm].fillna({"difference": 0})
        at = np.array([names.index(c) for c in rows["cell"]]) + 0.1 * (i - (len(arms) - 1) / 2)
        half = (rows["difference_high"] - rows["difference_low"]) / 2
        look = {"ms": 9, "capsize": 4, "lw": 2, "ls": ":" if numeric else "", **style(arm, i)}
        ax.errorbar(at, rows["difference"], half, label=rows["title"].iloc[0], **look)
    ax.set_xticks(range(len(names)), names)
    if sum(map(len, names)) > 60:
        plt.setp(ax.get_xticklabels(), rotation=25, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.5, len(names) - 0.5)
    scale = symlog_if_wide("y", ax, df["difference"])
    ylabel = f"FID minus the pretrained model's\n(below 0: better{scale})"
    ax.set(xlabel=records.sweep["axis"], ylabel=ylabel)
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)
    legend(figure, [ax], 3)
    return captioned(figure, tables.caption(records))


def ema_horizon(records: Records) -> Figure:
    """FID minus the pretrained model's against the steps that an EMA averages over.

    Arms named "soup@0.98" are of an EMA decay of their own, all others of ``ema_decay``.
    """
    df = tables.table(records).iloc[1:]
    df[["base", "decay"]] = df["arm"].str.extract(r"([^@]+)@?(.*)").to_numpy()
    decay = df["decay"].replace("", str(records.parameters["ema_decay"])).astype(float)
    df = df.assign(steps=1 / (1 - decay)).sort_values("steps")
    figure, axes = subplots(1, 1, (8, 4.8))
    ax = axes.flat[0]
    arms = df.loc[df["decay"] != "", "base"].unique()
    for i, arm in enumerate(arms):
        rows = df[df["base"] == arm]
        half = (rows["difference_high"] - rows["difference_low"]) / 2
        at = rows["steps"] * 1.03 ** (i - (len(arms) - 1) / 2)
        label = records.titles.get(arm, arm)
        look = {"ms": 9, "capsize": 4, "lw": 1.5, "label": label, **style(arm, i)}
        ax.errorbar(at, rows["difference"], half, **look)
    ax.axhline(0, color=STYLES["pretrained"][0], lw=1, zorder=0)
    ax.set_xscale("log")
    ax.set(xlabel="steps that the EMA averages over, 1 / (1 − decay)")
    ax.set_ylabel("FID minus the pretrained model's\n(below 0: better)")
    legend(figure, [ax], 2)
    return captioned(figure, tables.caption(records))
