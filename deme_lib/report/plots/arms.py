"""Figures of the arms: what they score and cost, the losses behind it, what they make."""

import re
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from deme_lib.report import intervals, tables
from deme_lib.report.formats import decimals
from deme_lib.report.plots import style
from deme_lib.report.plots.style import GREY, captioned, legend, subplots, symlog
from deme_lib.report.records import Records

ABLATIONS = {1: "Ablation 1: remove decoupling", 2: "Ablation 2: replace merging"}
FAMILIES = {
    "soup": ("members of the soup", "soup"),
    "plain": ("plain experts", "plain_routed"),
    "deme": ("DeMe experts", "deme_routed"),
    "all-plain": ("one model, all timesteps", "all_plain"),
    "all-balanced": ("one model, balanced loss", "balanced"),
    "all-distilled": ("one model, distilled", "distilled"),
}
"""Finetuning runs -> their title, and the arm whose colour they have."""
SHOWN = ("pretrained", "all_plain", "plain_routed", "deme_routed", "deme_merged", "averaged")
"""The arms that ``samples`` shows first."""
DIFFER = ("deme_merged", "pretrained")
"""The two arms whose images ``samples`` subtracts."""


def _bars(records: Records) -> str:
    return f"{100 * records.parameters['confidence']:g} % t interval"


def _seeds(
    ax: plt.Axes, at: float, d: pd.Series, level: float, row: str, beside: float, **options
) -> None:
    """The mean of differences d [U] with its t interval, and ``beside`` it a point per seed.

    Along x, at a height; with ``upright=True`` along y.
    """
    upright = options.pop("upright", False)
    low, high, _ = intervals.t_interval(d, level)
    mean, look = d.mean(), {"lw": 2.5, **style.of(row), **options}
    points, place = [d, np.full(len(d), at + beside)], [mean, at]
    ends = {"yerr" if upright else "xerr": [[mean - low], [high - mean]]}
    flip = -1 if upright else 1
    ax.plot(*points[::flip], "o", color=look["color"], ms=4, mew=0, alpha=0.6)
    ax.errorbar(*place[::flip], **ends, **look)


MEASURES = {"fid": "FID", "inception_score": "IS"}
BETTER = {"fid": "← better      worse →", "inception_score": "← worse      better →"}


def _every_row(ax: plt.Axes, records: Records, measure: str) -> None:
    """A measure of every row minus the base's."""
    values, base, titles = records.of(measure), records.base, records.titles
    d = values.sub(values[base], axis=0)
    for y, row in enumerate(titles):
        if row == base:
            ax.plot(0, y, **style.of(base))
        else:
            _seeds(ax, y, d[row], records.parameters["confidence"], row, beside=0.27)
    ax.axvline(0, color=GREY, lw=1, zorder=0)
    ax.set_yticks(range(len(titles)), titles.values())
    ax.set_ylim(len(titles) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="0.92")
    ax.locator_params(axis="x", nbins=4)
    sizes, scale = d.mean().abs().drop(base), BETTER[measure]
    if sizes.max() > 40 * sizes.median() > 0:  # one row would squeeze all others to a point
        symlog(ax.xaxis, 10 ** np.ceil(np.log10(sizes.median())), ticks=(1,))
        scale += "\nsymmetric log scale"
    what = f"{MEASURES[measure]} minus that of {titles[base]}"
    ax.set_xlabel(f"{what} ({decimals(values[base].mean())})\n{scale}")


def main(records: Records) -> Figure:
    """Above FID, below IS. Left, of every arm minus the base's; right, the named comparisons."""
    found = intervals.comparisons(records).query("kind == 'primary'")
    pairs = found[found["measure"] == "fid"]
    height = 1 + 0.42 * max(len(records.titles) + 1, len(pairs) + pairs["ablation"].nunique())
    shown = [m for m in MEASURES if records.of(m).notna().all(axis=None)]
    size = (len(shown), 2 if len(found) else 1, 1 + height * len(shown))
    figure, axes = subplots(*size, sharex="row")
    for row, measure in zip(axes, shown, strict=True):
        _every_row(row[0], records, measure)
        if len(found):
            _compared(row[1], records, found[found["measure"] == measure], measure)
    said = f"Points: training seeds; bars: mean and {_bars(records)}"
    if len(found):
        judged = tables.seeds("training", intervals.confirming(records))
        right = f"right in colour {judged}, Holm-corrected, in grey all"
        said += f"; {right if judged else 'no training that gives verdicts is recorded yet'}"
    return captioned(figure, f"{said}. {tables.setting(records)}")


def _compared(ax: plt.Axes, records: Records, found: pd.DataFrame, measure: str) -> None:
    """Comparisons by ablation, each with its verdict at the right, over the margin."""
    margin, values = intervals.margin(records, measure), records.of(measure)
    titles, judged = records.titles, intervals.confirming(records)
    ax.axvspan(-margin, margin, color="0.92", lw=0, zorder=0)
    ax.axvline(0, color=GREY, lw=1, zorder=0)
    y, place = 0, {"transform": ax.get_yaxis_transform(), "va": "center"}
    for ablation, rows in found.groupby("ablation"):
        ax.text(0, y, ABLATIONS[ablation], weight="bold", fontsize=10.5, **place)
        for c in rows.itertuples():
            y += 1
            d, level = values[c.a] - values[c.b], records.parameters["confidence"]
            if len(judged) < len(d):
                plain = {"color": GREY, "ms": 5, "lw": 1.5}
                _seeds(ax, y + 0.27, d, level, c.a, beside=0, **plain)
            if judged:
                _seeds(ax, y, d[judged], c.level, c.a, beside=0.14)
            said, look = f"{titles[c.a]} − {titles[c.b]}", {"bbox": style.WHITE, **place}
            ax.text(0, y - 0.36, said, fontsize=9.5, **look)
            ax.text(1.03, y, c.verdict.replace(", ", ",\n"), fontsize=9.5, **place)
        y += 1
    ax.set(yticks=[], ylim=(y - 0.4, -0.6))
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(f"difference in {MEASURES[measure]}\nband: the margin, ±{decimals(margin)}")


def cells(records: Records) -> Figure:
    """FID of every row of an experiment with several cells, minus the base's."""
    figure, axes = subplots(1, 1, 1.7 + 0.42 * len(records.titles))
    _every_row(axes[0, 0], records, "fid")
    said = f"Points: training seeds; bars: mean and {_bars(records)}. "
    return captioned(figure, said + tables.setting(records))


def samplers(records: Records) -> Figure:
    """FID of every arm against the sampler's steps; of records with several samplers."""
    named = records.metrics.assign(sampler=records.metrics["sampler"].map(tables.NAMES))
    named = named.rename(columns={"fid": "FID"})
    arms = dict(zip(records.arms["arm"], records.arms["title"], strict=True))
    figure, axes = subplots(1, len(arms), 3.6, sharey=True)
    for ax, (arm, title) in zip(axes.flat, arms.items(), strict=True):
        of = named[named["arm"] == arm]
        look = {"hue": "sampler", "style": "sampler", "markers": True, "dashes": False}
        look |= {"errorbar": ("pi", 100), "err_style": "bars", "err_kws": {"lw": 1}}
        sns.lineplot(of, x="steps", y="FID", ax=ax, **look)
        ax.axhline(
            records.floor_of("fid"), color=GREY, lw=1, ls=":", label="real images, the floor"
        )
        ax.set_title(title, fontsize=10)
        ax.set(xscale="log", yscale="log", xticks=(steps := of["steps"].unique()))
        ax.set_xticklabels(steps)
        ax.set_yticks(ticks := [0.1, 0.2, 0.3, 0.5], ticks)
        ax.minorticks_off()
    legend(figure, 5)
    return captioned(figure, f"Means and ranges over training seeds. {tables.setting(records)}")


def ladder(gains: pd.DataFrame, records: Records) -> Figure:
    """What ``intervals.ladder`` gives, FID and IS, against the parameters of one model.

    Args:
        records: of one of the experiments, for titles and level.
    """
    titles = records.titles
    figure, axes = subplots(1, len(intervals.JUDGED), 4.4, sharey=True)
    for ax, (measure, of) in zip(axes.flat, gains.groupby("measure", sort=False), strict=True):
        pairs = of.groupby(["a", "b"], sort=False)
        for i, ((a, b), d) in enumerate(pairs):
            ends = 100 * np.stack([d["effect"] - d["low"], d["high"] - d["effect"]])
            against = "" if b == intervals.CONTROL else f", against {titles[b]}"
            look = {"label": titles[a] + against, **style.of(a)}
            x = d["parameters"] * 1.05 ** (i - (len(pairs) - 1) / 2)
            ax.errorbar(x, 100 * d["effect"], yerr=ends, lw=1.5, **look)
        ax.axhline(0, color=GREY, lw=1, zorder=0)
        ax.set(xscale="log", xlabel="parameters of one model")
        ax.set_xticks(ticks := sorted({*of["parameters"]}), [f"{x:,}" for x in ticks])
        ax.set_xticks([], minor=True)
        ax.set_title(MEASURES[measure], fontsize=11)
    what = "gain, % of what the pretrained model"
    axes[0, 0].set_ylabel(f"{what}\nlacks to real images (above 0: better)")
    legend(figure, 2)
    sizes = gains.drop_duplicates("experiment").itertuples()
    of = ", ".join(f"{s.experiment} ({s.n_units} trainings, {s.parameters:,})" for s in sizes)
    said = f"Against {titles[intervals.CONTROL]}, where nothing else is said. "
    said += f"Mean and {_bars(records)} over training seeds, uncorrected: {of}."
    return captioned(figure, said)


def cost(records: Records) -> Figure:
    """FID minus the base's against parameters held and denoiser calls an image, as multiples."""
    arms, fid, base = records.arms.drop_duplicates("row"), records.of("fid"), records.base
    names = {"parameters": "parameters held", "calls_per_image": "denoiser calls an image"}
    figure, axes = subplots(1, 2, 4.8, sharey=True)
    for ax, (column, name) in zip(axes.flat, names.items(), strict=True):
        costs = arms.set_index("row")[column]
        multiples = costs / costs[base]
        for _, group in multiples.groupby(multiples.round()):
            for i, (row, x) in enumerate(group.items()):
                aside = 1.06 ** (i - (len(group) - 1) / 2)
                look = {"upright": True, "beside": 0, "label": records.titles[row]}
                level = records.parameters["confidence"]
                _seeds(ax, x * aside, fid[row] - fid[base], level, row, **look)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}×")
        ax.set_xlabel(f"{name}\n1× = {decimals(costs[base], 0)}")
        ax.axhline(0, color=GREY, lw=1, zorder=0)
        ax.grid(axis="y", color="0.92")
    what = f"FID minus that of {records.titles[base]} ({decimals(fid[base].mean())})"
    axes[0, 0].set_ylabel(f"{what}\n(below 0: better)")
    legend(figure, 3)
    steps = " or ".join(f"{x:,}" for x in sorted(set(arms["training_steps"]) - {0}))
    said = f"{steps} optimiser steps in all for each finetuned arm; "
    said += f"arms of nearly equal cost stand side by side. Bars: {_bars(records)}. "
    return captioned(figure, said + tables.setting(records))


def loss_per_timestep(records: Records) -> Figure:
    """Test loss of every arm relative to pretrained, per bin of timesteps, means over seeds.

    The second panel has the arms of that ablation's comparisons, the first those of any other
    comparison and of none.
    """
    df = records.losses.assign(t=lambda x: (x["bin_start"] + x["bin_stop"]) / 2)
    losses = df.pivot_table(index="t", columns="row", values="loss")
    relative = 100 * (losses.div(losses["pretrained"], axis=0) - 1)
    named = ("primary_decoupling", "primary_merging", "exploratory")
    first, second, others = (set(sum(intervals.pairs(records, n), ())) for n in named)
    panels = {1: set(records.titles) - (second - first - others)}
    panels |= {2: second | {"pretrained"}} if second else {}
    figure, axes = subplots(1, len(panels), 4.9, sharey=True)
    for ax, (ablation, rows) in zip(axes.flat, panels.items(), strict=True):
        _ranges(ax, records)
        for i, row in enumerate(row for row in records.titles if row in rows):
            look = {"label": records.titles[row], "lw": 1.8, **style.of(row)}
            every = (i % 3, 3)  # so that equal lines both show
            ax.plot(relative.index, relative[row], markevery=every, **look)
        ax.set_title(ABLATIONS[ablation], fontsize=11)
    axes[0, 0].set_ylabel("test loss minus that of\npretrained, % (below 0: better)")
    legend(figure, 3)
    return captioned(figure, f"Means over training seeds. {_tested(records)}")


def _ranges(ax: plt.Axes, records: Records) -> None:
    """A timestep axis with every second of the N ranges shaded, all numbered."""
    n, t = records.parameters["n_ranges"], records.parameters["num_train_timesteps"]
    place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    for k in range(n):
        ax.axvspan(k * t / n, (k + 1) * t / n, color="0.95" if k % 2 else "white", lw=0, zorder=0)
        name = f"range {k + 1}" if n <= 4 else k + 1
        ax.text((k + 0.5) * t / n, 0.015, name, fontsize=9.5, color="0.35", **place)
    ax.set(xlim=(0, t), xlabel="timestep t (noise grows to the right)")


def _tested(records: Records) -> str:
    p = records.parameters
    seeds = tables.seeds("training", records.training_seeds)
    return f"{p['dataset']}: n = {p['test_images']:,} test images, {seeds}."


def gate(records: Records) -> Figure:
    """Test loss of every arm minus that of one model of all timesteps, in %, per range.

    Of records whose ``intervals.gate`` is not empty.
    """
    d, titles, p = 100 * intervals.gate(records), records.titles, records.parameters
    figure, axes = subplots(1, 1, 5)
    ax, control = axes[0, 0], titles[intervals.CONTROL]
    width = p["num_train_timesteps"] / p["n_ranges"]
    _ranges(ax, records)
    for (k, of_range), (i, row) in product(d.groupby("range"), enumerate(d)):
        x = width * (k - 0.94 + 0.84 * (i + 0.5) / d.shape[1])
        look = {"upright": True, "beside": 0.055 * width, "label": titles[row]}
        _seeds(ax, x, of_range[row], p["confidence"], row, **look)
    symlog(ax.yaxis, 0.3)
    ax.margins(y=0.1)
    ax.axhline(0, lw=1.5, zorder=1, color=style.of(intervals.CONTROL)["color"], label=control)
    ax.set_ylabel(f"test loss minus that of\n{control}, %\n(below 0: better; symmetric log scale)")
    legend(figure, 3)
    said = f"Small: training seeds; large: mean and {_bars(records)}. "
    return captioned(figure, said + _tested(records))


def samples(images: dict[str, np.ndarray], titles: dict[str, str], caption: str = "") -> Figure:
    """Eight images each of at most six arms, from the same noise; a difference; training images.

    Args:
        images: row -> [K, C, H, W] uint8; "real" is training data.
        titles: row -> title as printed.
    """
    order = [row for row in (*SHOWN, *images) if row in images and row != "real"]
    rows = {titles[row]: images[row][:8] for row in list(dict.fromkeys(order))[:6]}
    if set(DIFFER) <= images.keys():
        a, b = (images[row][:8].astype(int) for row in DIFFER)
        gain = 2 ** int(np.log2(255 / max(1, np.quantile(abs(a - b), 0.99))))
        name = f"|{titles[DIFFER[0]]} −\n{titles[DIFFER[1]]}| × {gain}"
        rows[name] = np.minimum(gain * abs(a - b), 255).astype(np.uint8)
    if "real" in images:
        rows["training images"] = images["real"][:8]
    sheet = np.stack(list(rows.values()))  # [rows, 8, C, H, W]
    gap = [(0, max(1, sheet.shape[-1] // 12))] * 2
    sheet = np.pad(sheet, [(0, 0)] * 3 + gap, constant_values=255)
    r, k, c, h, w = sheet.shape
    figure, axes = subplots(1, 1, 0.4 + 6.9 * r * h / (k * w), layout="compressed")
    ax, sheet = axes[0, 0], sheet.transpose(0, 3, 1, 4, 2).reshape(r * h, k * w, c)
    ax.imshow(sheet.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set_yticks((np.arange(r) + 0.5) * h - 0.5, rows)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return captioned(figure, caption)


def history(df: pd.DataFrame, caption: str = "") -> Figure:
    """Losses of pretraining, where it is known, and of the finetuning runs, over all timesteps."""
    finetuned = df[df["run"] != "baseline"]
    later = df[(df["run"] == "baseline") & (df["step"] > 0)]  # random weights dwarf the rest
    figure, axes = subplots(1, 2 if len(later) else 1, 4.4)
    left, right = axes[0, 0], axes[0, -1]
    if len(later):
        left.plot(later["step"], later["train_loss"], lw=5, alpha=0.35, label="training images")
        left.plot(later["step"], later["held_out_loss"], ".-k", label="held-out images")
        left.set(title="pretraining", xlabel="step", ylabel="denoising loss")
    start = finetuned["step"] == 0  # pretrained weights
    before = finetuned.loc[start, "held_out_loss"].mean()
    finetuned = finetuned.assign(change=100 * (finetuned["held_out_loss"] / before - 1))
    for _, part in finetuned.groupby(start.cumsum()):
        family = re.sub(r"-\d+of\d+$", "", part["run"].iloc[0])
        title, arm = FAMILIES.get(family, (family, family.replace("-", "_")))
        look = {"color": style.of(arm)["color"], "label": title, "lw": 1.8}
        right.plot(part["step"], part["change"], **look)
    right.axhline(0, color=GREY, lw=1, zorder=0)
    right.set(title="finetuning", xlabel="step")
    symlog(right.yaxis, 0.1)
    right.set_ylabel("held-out loss minus that of the\npretrained model, % (symmetric log)")
    legend(figure, 3)
    return captioned(figure, caption)
