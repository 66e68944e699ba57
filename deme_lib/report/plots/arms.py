"""Figures of the arms: what they score and cost, the losses behind it, what they make."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deme_lib.report import intervals, tables
from deme_lib.report.formats import decimals
from deme_lib.report.intervals import CONTROL, PRIMARY, t_interval
from deme_lib.report.plots.style import (
    GREY,
    STYLES,
    WHITE,
    captioned,
    legend,
    style,
    subplots,
    symlog,
)
from deme_lib.report.records import Records

ABLATIONS = {1: "Ablation 1: remove decoupling", 2: "Ablation 2: replace merging"}
FAMILIES = {
    "all_plain": ("all_plain", "one model, all timesteps"),
    "soup": ("soup", "members of the soup"),
    "plain": ("plain_routed", "plain experts"),
    "deme": ("deme_routed", "DeMe experts"),
    "all_same": ("all_same", "one model, DeMe's techniques"),
    "soup_same": ("soup_same", "members of the soup, DeMe's techniques"),
}
"""Name of finetuning runs -> the arm whose colour they have, and their title."""
SHOWN = ("pretrained", "all_plain", "plain_routed", "deme_routed", "deme_merged", "averaged")
"""The arms that ``samples`` shows first."""
DIFFER = ("deme_merged", "pretrained")
"""The two arms whose images ``samples`` subtracts."""


def _row(ax: plt.Axes, y: float, d: np.ndarray, level: float, row: str) -> None:
    """The mean of differences d [U] with its t interval, and below them a point per seed."""
    low, high, _ = t_interval(d, level)
    mean, look = np.mean(d), style(row)
    ax.plot(d, np.full(len(d), y + 0.27), "o", color=look["color"], ms=4, mew=0, alpha=0.6)
    ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], lw=2.5, **look)


def _every_row(ax: plt.Axes, records: Records) -> None:
    """FID of every row minus the base's."""
    fid, titles = records.of("fid"), records.titles
    d = fid.sub(fid[records.base], axis=0)
    for y, row in enumerate(titles):
        if row != records.base:
            _row(ax, y, d[row].to_numpy(), records.parameters["confidence"], row)
    ax.plot(0, list(titles).index(records.base), **style(records.base))
    ax.axvline(0, color=GREY, lw=1, zorder=0)
    ax.set_yticks(range(len(titles)), titles.values())
    ax.set_ylim(len(titles) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="0.92")
    sizes = d.mean().abs()[lambda x: x > 0]
    scale = "← better      worse →"
    if sizes.max() > 40 * sizes.median():  # one row would squeeze all others to a point
        symlog(ax, "x", 2 * sizes.median(), (d.min(axis=None), d.max(axis=None)))
        scale += ", symmetric log scale"
    mean = decimals(fid[records.base].mean())
    ax.set_xlabel(f"FID minus that of {titles[records.base]} ({mean})\n{scale}")


def main(records: Records) -> Figure:
    """Left, FID of every arm minus the base's; right, the named comparisons and their verdicts."""
    found = intervals.comparisons(records).query("kind == 'primary'")
    height = 2 + 0.5 * max(len(records.titles), len(found) + found["ablation"].nunique())
    figure, axes = subplots(1, 2, height, sharex=True)
    left, right = axes.flat
    _every_row(left, records)
    margin, fid, titles = intervals.margin(records), records.of("fid"), records.titles
    right.axvspan(-margin, margin, color="0.92", lw=0, zorder=0)
    right.axvline(0, color=GREY, lw=1, zorder=0)
    y, beside = 0, {"transform": right.get_yaxis_transform(), "va": "center"}
    for ablation, rows in found.groupby("ablation"):
        right.text(0, y, ABLATIONS[ablation], weight="bold", fontsize=10.5, **beside)
        for c in rows.itertuples():
            y += 1
            _row(right, y, (fid[c.a] - fid[c.b]).to_numpy(), c.level, c.a)
            right.text(
                0, y - 0.36, f"{titles[c.a]} − {titles[c.b]}", fontsize=9.5, bbox=WHITE, **beside
            )
            right.text(1.03, y, c.verdict.replace(", ", ",\n"), fontsize=10, **beside)
        y += 1
    right.set_yticks([])
    right.spines["left"].set_visible(False)
    right.set_ylim(y - 0.4, -0.6)
    right.set_xlabel(f"difference in FID\ngrey: the margin, ±{decimals(margin)}")
    level = f"{100 * records.parameters['confidence']:g} %"
    said = f"Points: training seeds; bars: mean and {level} t interval, right Holm-corrected. "
    return captioned(figure, said + tables.setting(records))


def cells(records: Records) -> Figure:
    """FID of every row of an experiment with several cells, minus the base's."""
    figure, axes = subplots(1, 1, 1.7 + 0.42 * len(records.titles))
    _every_row(axes[0, 0], records)
    return captioned(figure, tables.setting(records))


def _ranges(ax: plt.Axes, n: int, t: int) -> None:
    """Every second of N equal ranges of [0, T) shaded, all numbered."""
    for k in range(n):
        if k % 2:
            ax.axvspan(k * t / n, (k + 1) * t / n, color="0.95", lw=0, zorder=0)
        name = f"range {k + 1}" if n <= 4 else str(k + 1)
        place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        ax.text((k + 0.5) * t / n, 0.015, name, fontsize=9.5, color="0.35", **place)
    ax.set_xlim(0, t)


def loss_per_timestep(records: Records) -> Figure:
    """Test loss of every arm relative to the base's, per bin of timesteps, means over seeds.

    The second ablation shows the arms of its comparisons, the first all others, and theirs that
    are compared elsewhere too.
    """
    p, base = records.parameters, records.base
    df = records.losses.assign(t=lambda x: (x["bin_start"] + x["bin_stop"]) / 2)
    losses = df.pivot_table(index="t", columns="row", values="loss")
    relative = 100 * (losses.div(losses[base], axis=0) - 1)
    first, second, tried = (
        {row for pair in intervals.pairs(records, name) for row in pair}
        for name in (*PRIMARY.values(), "exploratory")
    )
    panels = {1: set(records.titles) - (second - first - tried), 2: second | {base}}
    figure, axes = subplots(1, 2, 4.9, sharey=True)
    for ax, (ablation, rows) in zip(axes.flat, panels.items(), strict=True):
        _ranges(ax, p["n_ranges"], p["num_train_timesteps"])
        shown = [row for row in records.titles if row in rows]
        for i, row in enumerate(shown):
            look = {"label": records.titles[row], "lw": 1.8, **style(row)}
            look["markevery"] = (i % 3, 3)  # so that equal lines both show
            ax.plot(relative.index, relative[row], **look)
        ax.set_title(ABLATIONS[ablation], fontsize=11)
        ax.set_xlabel("timestep t (noise grows to the right)")
    axes[0, 0].set_ylabel(f"test loss minus that of\n{records.titles[base]}, % (below 0: better)")
    legend(figure, axes.flat, 3)
    return captioned(figure, _tested(records))


def _tested(records: Records) -> str:
    p, seeds = records.parameters, tables.named("training seed", records.training_seeds)
    return f"{p['dataset']}: n = {p['test_images']:,} test images, {seeds}."


def gate(records: Records) -> Figure:
    """Test loss of every arm minus that of one model of all timesteps, in %, per range."""
    d, titles, n = 100 * intervals.gate(records), records.titles, records.parameters["n_ranges"]
    level, t = records.parameters["confidence"], records.parameters["num_train_timesteps"]
    figure, axes = subplots(1, 1, 5)
    ax = axes[0, 0]
    for i, row in enumerate(d):
        for k in range(n):
            x, values = k + (i + 0.5) * 0.84 / d.shape[1] - 0.44, d.xs(k + 1, level="range")[row]
            low, high, _ = t_interval(values, level)
            look = {"label": titles[row] if k == 0 else None, "lw": 2.5, **style(row)}
            mean = values.mean()
            ax.errorbar(x, mean, [[mean - low], [high - mean]], **look)
            points = {"color": look["color"], "ms": 3.5, "mew": 0, "alpha": 0.6}
            ax.plot(np.full(len(values), x + 0.055), values, "o", **points)
    symlog(ax, "y", 1, (d.min(axis=None), d.max(axis=None)))
    ax.axhline(0, color=STYLES[CONTROL][0], lw=1.5, zorder=1, label=titles[CONTROL])
    for k in range(1, n, 2):
        ax.axvspan(k - 0.5, k + 0.5, color="0.95", lw=0, zorder=0)
    edges = [-(-k * t // n) for k in range(n + 1)]
    ax.set_xticks(range(n), [f"range {k + 1}\n[{edges[k]}, {edges[k + 1]})" for k in range(n)])
    ax.set_xlim(-0.5, n - 0.5)
    ax.tick_params(axis="x", length=0)
    what = f"test loss minus that of\n{titles[CONTROL]}, %"
    ax.set_ylabel(f"{what}\n(below 0: better; symmetric log scale)")
    legend(figure, [ax], 3)
    said = f"Small: training seeds; large: mean and {100 * level:g} % t interval. "
    return captioned(figure, said + _tested(records))


def cost(records: Records) -> Figure:
    """FID minus the base's against parameters held and denoiser calls an image, as multiples."""
    df = tables.table(records).loc[list(records.titles)].fillna({"difference": 0})
    half, base = (df["high"] - df["low"]) / 2, df.loc[records.base]
    names = {"parameters": "parameters held", "calls_per_image": "denoiser calls an image"}
    figure, axes = subplots(1, 2, 4.8, sharey=True)
    for ax, (column, name) in zip(axes.flat, names.items(), strict=True):
        ax.axhline(0, color=GREY, lw=1, zorder=0)
        ax.grid(axis="y", color="0.92")
        multiples = df[column] / base[column]
        for _, group in multiples.groupby((np.log(multiples) / 0.1).round()):  # nearly equal ones
            for i, row in enumerate(group.index):
                x = group[row] * 1.06 ** (i - (len(group) - 1) / 2)
                look = {"label": df.loc[row, "title"], "lw": 2, **style(row)}
                ax.errorbar(x, df.loc[row, "difference"], half[row], **look)
        most = int(np.ceil(np.log2(multiples.max() / 1.2)))
        ax.set_xscale("log")
        ax.set_xlim(0.75, 1.4 * 2**most)
        ax.set_xticks([2**k for k in range(most + 1)], [f"{2**k}×" for k in range(most + 1)])
        ax.set_xticks([], minor=True)
        ax.set_xlabel(f"{name}\n1× = {decimals(base[column], 0)}")
    what = f"FID minus that of {base['title']} ({decimals(base['fid'])})"
    axes[0, 0].set_ylabel(f"{what}\n(below 0: better)")
    legend(figure, axes.flat, 3)
    level = f"{100 * records.parameters['confidence']:g} %"
    steps = " or ".join(f"{x:,.0f}" for x in sorted(set(df["training_steps"]) - {0}))
    said = (
        f"Each finetuned arm took {steps} optimiser steps in all. Arms of nearly equal cost stand "
    )
    said += f"side by side. Bars: {level} t interval, uncorrected. "
    return captioned(figure, said + tables.setting(records))


def samples(images: dict[str, np.ndarray], titles: dict[str, str], caption: str = "") -> Figure:
    """Eight images each of at most six arms, from the same noise; a difference; training images.

    Args:
        images: row -> [K, C, H, W] uint8; "real" is training data.
        titles: row -> title as printed.
    """
    order = [row for row in SHOWN if row in titles] + [row for row in titles if row not in SHOWN]
    rows = [(titles[row], images[row][:8]) for row in order if row in images][:6]
    if set(DIFFER) <= images.keys():
        a, b = (images[row][:8].astype(int) for row in DIFFER)
        gain = 2 ** int(np.log2(255 / max(1, np.quantile(abs(a - b), 0.99))))
        differ = np.minimum(gain * abs(a - b), 255).astype(np.uint8)
        rows.append((f"|{titles[DIFFER[0]]} −\n{titles[DIFFER[1]]}| × {gain}", differ))
    if "real" in images:
        rows.append(("training images", images["real"][:8]))
    sheet = np.stack([row for _, row in rows])  # [rows, 8, C, H, W]
    gap = [(0, max(1, sheet.shape[-1] // 12))] * 2
    sheet = np.pad(sheet, [(0, 0)] * 3 + gap, constant_values=255)
    r, k, c, h, w = sheet.shape
    sheet = sheet.transpose(0, 3, 1, 4, 2).reshape(r * h, k * w, c)
    figure, axes = subplots(1, 1, 0.4 + 6.9 * r * h / (k * w), layout="compressed")
    ax = axes[0, 0]
    ax.imshow(sheet.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set_yticks((np.arange(r) + 0.5) * h - 0.5, [name for name, _ in rows])
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return captioned(figure, caption)


def history(df: pd.DataFrame, caption: str = "") -> Figure:
    """Losses of pretraining, and of the finetuning runs after it, over all timesteps."""
    figure, axes = subplots(1, 2, 4.4)
    left, right = axes.flat
    baseline, finetuned = df[df["run"] == "baseline"], df[df["run"] != "baseline"]
    later = baseline[baseline["step"] > 0]  # random weights dwarf the rest
    left.plot(later["step"], later["train_loss"], lw=5, alpha=0.35, label="training images")
    left.plot(later["step"], later["held_out_loss"], ".-k", label="held-out images")
    left.set(title="pretraining", xlabel="step", ylabel="denoising loss")
    change = 100 * (finetuned["held_out_loss"] / baseline["held_out_loss"].iloc[-1] - 1)
    for (_, run), part in finetuned.groupby(["cell", "run"], sort=False):
        family = re.sub(r"[-_ ]\d+of\d+$", "", run).replace("-", "_")
        arm, title = FAMILIES.get(family, ("", family))
        look = {"color": style(arm)["color"], "label": title, "lw": 1.8}
        right.plot(part["step"], change[part.index], **look)
    right.axhline(0, color=GREY, lw=1, zorder=0)
    right.set(title="finetuning", xlabel="step")
    symlog(right, "y", 0.3, (change.min(), change.max()))
    right.set_ylabel("held-out loss minus that of the\npretrained model, % (symmetric log)")
    legend(figure, axes.flat, 3)
    return captioned(figure, caption)
