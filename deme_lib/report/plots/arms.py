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

from deme_lib.experiment.arms import SEARCHES
from deme_lib.report import comparisons, tables
from deme_lib.report.plots.style import (
    COLOURS,
    STYLES,
    captioned,
    empty,
    shared_legend,
    subplots,
    title_of,
    unknown_style,
)


def main(records: tables.Records) -> Figure:
    """Both ablations: FID of every arm minus the pretrained model's, paired by seeds."""
    counts = [len(records.arms_of(n)) for n in tables.ABLATIONS]
    size, ratios = (10, 3.0 + 0.34 * sum(counts)), [c + 1.4 for c in counts]
    figure, axes = subplots(len(counts), 1, size, height_ratios=ratios, sharex=True)
    for number, ax in zip(tables.ABLATIONS, axes.flat, strict=True):
        _ablation_panel(ax, records, number)
        _panel_title(ax, records, number)
    _symlog_if_wide(axes.flat[0], records)
    scale = ", symmetric log scale" if axes.flat[0].get_xscale() == "symlog" else ""
    what = f"FID minus the pretrained model's{scale}"
    axes.flat[-1].set_xlabel(f"← better      {what}      worse →")
    level = f"{100 * records.parameters['confidence']:g} %"
    several = len(records.training_seeds) > 1
    dots = "sampling seeds, a row per training seed" if several else "sampling seeds"
    trained = "" if several else "The intervals are of one training seed. "
    note = (
        f"Dots: {dots}; symbols: mean with {level} paired t interval (uncorrected; the "
        "primary comparisons, printed above each panel, are corrected); dotted: DeMe merged. "
        "Overlap of two bars is no test of their difference. "
        f"{trained}{'The intervals' if several else 'They'} {tables.covers(records)}. "
    )
    return captioned(figure, note + tables.setting(records) + ".")


def _ablation_panel(ax: plt.Axes, records: tables.Records, number: int) -> None:
    arms, rows = records.arms_of(number), tables.ablation(records, number).iloc[:-1]
    for y, arm in enumerate(arms):
        d = comparisons.differences(records, arm, "pretrained", "fid")
        mean, half = comparisons.paired_interval(d, records.parameters["confidence"])
        colour, marker, _ = STYLES.get(arm, unknown_style(y))
        for row, by_seed in enumerate(d):
            at = np.full(by_seed.size, y + 0.26 + 0.3 * row / len(d))
            ax.plot(by_seed, at, ".", color=colour, alpha=0.6, ms=5)
        ax.errorbar(mean, y, xerr=half, color=colour, marker=marker, ms=9, capsize=4, lw=2)
        if arm == "merged":
            ax.axvline(mean, color=colour, lw=1.2, ls=":", zorder=0)
    ax.axvline(0, color=STYLES["pretrained"][0], lw=1, zorder=0)
    ax.set_yticks(range(len(arms)), [records.titles[arm] for arm in arms])
    ax.set_ylim(len(arms) - 0.4, -1.1)
    pairs = comparisons.comparisons(records, number)
    compared = {arm for a, b, kind, _ in pairs if kind == "primary" for arm in (a, b)}
    for arm, label in zip(arms, ax.get_yticklabels(), strict=True):
        label.set_weight("bold" if arm in compared else "normal")
    ax.grid(axis="x", color="0.92")
    ax.tick_params(labelbottom=True)
    right = ax.twinx()
    right.set_ylim(ax.get_ylim())
    fids = zip(rows["fid_mean"], rows["fid_sd"], strict=True)
    right.set_yticks(
        range(len(arms)), [f"{tables.number(m)} ± {tables.number(s)}" for m, s in fids]
    )
    right.tick_params(length=0)
    header = {"transform": ax.get_yaxis_transform(), "va": "center", "color": "0.3"}
    ax.text(1.012, -0.8, "FID ± sd", fontsize=10, **header)


def _panel_title(ax: plt.Axes, records: tables.Records, number: int) -> None:
    paired, lines = comparisons.paired(records, number), []
    for _, row in paired[paired["kind"] == "primary"].iterrows():
        names = f"{records.titles[row['a']]} − {records.titles[row['b']]}"
        difference = tables.plus_minus(row["fid"], row["fid_halfwidth"], signed=True)
        decided = row["outcome"] in ("better", "worse")
        said = f"{row['outcome']} {records.scope}" if decided else row["outcome"]
        lines.append(f"{names}: {difference} ({100 * row['level']:.4g} %), {said}")
    ax.text(0, 1.02, "\n".join(lines), transform=ax.transAxes, va="bottom", fontsize=9)
    heading = f"Ablation {number}: {tables.ABLATIONS[number]}"
    ax.set_title(heading, loc="left", weight="bold", pad=8 + 13 * len(lines))


def _symlog_if_wide(ax: plt.Axes, records: tables.Records) -> None:
    """A symmetric logarithmic axis where one arm would squeeze all others to a point."""
    means = records.metrics.groupby("arm")["fid"].mean()
    sizes = (means - means["pretrained"]).abs().drop("pretrained")
    if sizes.max() > 15 * sizes.median() > 0:
        low, high = ax.get_xlim()
        ax.set_xscale("symlog", linthresh=2 * sizes.median())
        ax.set_xlim(2 * low if low < -sizes.median() else low, 2 * high)


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
    left, shown, below, above = 2.6, 6.9, 0.4, 0.12  # inches
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
    return captioned(figure, f"{caption}. Columns share their noise, except for training images.")


def _strip(images: np.ndarray) -> np.ndarray:
    gap = max(1, images.shape[-1] // 16)
    padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=255)
    row = np.concatenate([image.transpose(1, 2, 0) for image in padded], axis=1)
    return row if row.shape[2] == 3 else np.repeat(row[:, :, :1], 3, axis=2)


def search(df: pd.DataFrame, caption: str = "") -> Figure:
    """Held-out loss against FID of the candidates that were scored by images, per search."""
    scored = df.dropna(subset=["fid"])
    names = list(scored["search"].unique()) or ["none"]
    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    figure, axes = subplots(rows, columns, (max(4.5 * columns, 6), 0.8 + 3.1 * rows))
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        _search_panel(ax, scored[scored["search"] == name], SEARCHES.get(name, name))
    figure.legend(*shared_legend(axes), loc="outside upper center", ncols=3, frameon=False)
    return captioned(figure, caption)


def _search_panel(ax: plt.Axes, part: pd.DataFrame, title: str) -> None:
    if part.empty:
        empty(ax, "no candidate was scored by images")
        return
    base = part[[not any(json.loads(w)) for w in part["weights"]]]
    chosen = part[part["chosen"] == 1]
    ax.plot(part["loss"], part["fid"], "o", color=COLOURS[0], alpha=0.7, label="candidate")
    ax.plot(base["loss"], base["fid"], "s", color="0.4", label="all weights 0")
    ax.plot(
        chosen["loss"], chosen["fid"], "*", color=COLOURS[3], mec="black", ms=15, label="chosen"
    )
    if min(part["loss"].nunique(), part["fid"].nunique()) > 2:
        title += f"\nrank correlation {spearmanr(part['loss'], part['fid'])[0]:.2f}"
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="held-out loss", ylabel="FID to train images, search noise")
    ax.ticklabel_format(useOffset=False)
    ax.xaxis.set_major_locator(MaxNLocator(4))


def neighbours(df: pd.DataFrame, caption: str = "") -> Figure:
    """Distance to the nearest training image, per arm, against held-out images' own."""
    test, arms = df[df["arm"] == "test"], df[df["arm"] != "test"]
    figure, axes = subplots(1, 1, (9, 1.8 + 0.32 * len(arms)))
    ax = axes.flat[0]
    for _, row in test.iterrows():
        ax.axvspan(row["q05"], row["q95"], color="0.94", zorder=0, label="test images, 5–95 %")
        ax.axvspan(row["q25"], row["q75"], color="0.86", zorder=0, label="test images, quartiles")
        ax.axvline(row["median"], color="0.4", ls="--", label="test images, median")
    for y, (_, row) in enumerate(arms.iterrows()):
        colour, marker, _ = STYLES.get(row["arm"], unknown_style(y))
        ax.plot([row["q05"], row["q95"]], [y, y], color=colour, lw=1.2)
        ax.plot([row["q25"], row["q75"]], [y, y], color=colour, lw=5, solid_capstyle="butt")
        ax.plot(row["median"], y, marker, color=colour, mec="black", ms=9)
    ax.set_yticks(range(len(arms)), [title_of(arm) for arm in arms["arm"]])
    ax.invert_yaxis()
    ax.set_xlabel("Euclidean distance to the nearest training image, pixels in [−1, 1]")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    note = "Symbol: median, thick: quartiles, thin: 5–95 %. Copies would lie left of the test band"
    sizes = " or ".join(f"{n:,}" for n in sorted(arms["n"].unique()))
    return captioned(figure, f"{note}. n = {sizes} images per arm. {caption}")
