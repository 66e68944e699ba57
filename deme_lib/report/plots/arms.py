"""Figures of the arms: what they score and make, how they were trained, what losses it led to."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deme_lib.experiment.arms import ARMS
from deme_lib.report import intervals, tables
from deme_lib.report.formats import decimals, interval, number
from deme_lib.report.intervals import ABLATIONS
from deme_lib.report.plots.style import (
    STYLES,
    boxes,
    captioned,
    grid,
    legend,
    style,
    subplots,
    symlog_if_wide,
)
from deme_lib.report.records import BASE, Records

FAMILIES = {"soup": "soup", "plain": "plain_routed", "deme": "deme_routed"}
FAMILIES |= {"all-plain": "all_plain", "all-same": "all_same", "soup-same": "soup_same"}
"""Family of finetuning runs -> the arm whose colour it has."""
MEAN = {"ms": 9, "capsize": 4, "lw": 2}


def main(records: Records) -> Figure:
    """Both ablations: FID of every arm minus the pretrained model's, paired by unit."""
    panels = _panels(records)
    primary = intervals.comparisons(records).query("kind == 'primary'")
    primary["text"] = [
        f"{records.titles[row.a]} − {records.titles[row.b]}: "
        f"{interval(row.effect, row.low, row.high)} ({100 * row.level:.4g} %), {row.verdict}"
        for row in primary.itertuples()
    ]
    said = [primary.loc[primary["ablation"] == n, "text"].tolist() for n in ABLATIONS]
    title = "What each part of DeMe does to FID, against the pretrained model"
    return _differences(records, panels, said, title)


def _panels(records: Records) -> dict[str, list[str]]:
    """Heading -> arms of each ablation."""
    return {f"Ablation {n}: {x}": intervals.headline(records, n) for n, x in ABLATIONS.items()}


def controls(records: Records) -> Figure:
    """Every arm at the EMA horizon of all, for what ``main`` leaves out."""
    panels = {"All arms": [arm for arm in records.titles if "@" not in arm]}
    return _differences(records, panels, [[]], "Every arm, against the pretrained model")


def _differences(
    records: Records, panels: dict[str, list[str]], said: list[list[str]], title: str
) -> Figure:
    """A panel of arms per heading, under what is said of it."""
    table = tables.table(records).fillna({"difference": 0}).set_index("arm")
    fid, floor = records.by_unit["fid"][BASE], records.floor("fid")
    heights = [len(names) + 1.5 for names in panels.values()]
    size = (9, 1.9 + 0.36 * sum(heights) + 0.2 * sum(map(len, said)))
    figure, axes = subplots(len(panels), 1, size, height_ratios=heights, sharex=True)
    for ax, (heading, names), lines in zip(axes.flat, panels.items(), said, strict=True):
        _arms(ax, table.loc[names], fid[names].sub(fid["pretrained"], axis=0))
        place = {"xycoords": ("figure fraction", "axes fraction"), "textcoords": "offset points"}
        ax.annotate("\n".join(lines), (0.01, 1), (0, 6), fontsize=9, **place)
        ax.annotate(heading, (0.01, 1), (0, 10 + 11 * len(lines)), weight="bold", **place)
    drawn = table.loc[[arm for names in panels.values() for arm in names], "difference"]
    scale = symlog_if_wide("x", axes.flat[0], drawn)
    _floor(axes.flat, floor - fid["pretrained"].mean())
    mean = f"mean, {100 * records.parameters['confidence']:g} % t interval"
    ax.plot([], [], "s-", color="0.3", lw=2, ms=9, label=mean)
    ax.plot([], [], ".", color="0.3", label=f"one {intervals.UNITS[records.unit]}")
    what = f"FID minus the pretrained model's{scale}"
    at_the_floor = floor >= fid["pretrained"].mean()  # where lower is no better
    ax.set_xlabel(what if at_the_floor else f"← better      {what}      worse →")
    legend(figure, axes.flat, 2, title=title, title_fontproperties={"weight": "bold", "size": 13})
    return captioned(figure, tables.setting(records))


def _arms(ax: plt.Axes, rows: pd.DataFrame, d: pd.DataFrame) -> None:
    """A line per arm: its units as dots, its mean with the t interval, its FID at the right."""
    places, half = range(len(rows)), tables.half(rows)
    for y, arm in enumerate(rows.index):
        ax.plot(d[arm], np.full(len(d), y + 0.32), ".", color=style(arm)["color"], alpha=0.6, ms=6)
        ax.errorbar(rows.loc[arm, "difference"], y, xerr=half[arm], **MEAN, **style(arm))
    ax.axvline(0, color=STYLES["pretrained"][0], lw=1, zorder=0)
    ax.set_yticks(places, rows["title"])
    ax.set_ylim(len(rows) - 0.4, -1)
    ax.grid(axis="x", color="0.92")
    ax.tick_params(labelbottom=True)
    right = ax.secondary_yaxis("right")
    right.set_yticks(places, [f"FID {decimals(x)}" for x in rows["fid_mean"]])
    right.tick_params(length=0)


def _floor(axes: np.ndarray, at: float) -> None:
    """A line where fresh real images would be, or an arrow to where it lies outside."""
    low, high = axes[0].get_xlim()
    near, text = low - (high - low) / 2 < at, f"floor, real images: {number(at)}"
    for ax in axes:
        if near:
            ax.axvline(at, color="black", ls="--", lw=1.2, zorder=0)
        if not np.isnan(at):
            where, shown = (at, f" {text} ") if near else (low, f" ← {text}")
            side = "left" if where < (low + high) / 2 else "right"
            ax.text(where, -0.6, shown, va="center", ha=side, fontsize=9, color="0.3")
    if not near:
        axes[0].set_xlim(low, high)


def samples(images: dict[str, np.ndarray], titles: dict[str, str], caption: str = "") -> Figure:
    """A row of images per arm, from the same noise for every arm; last, training images.

    Args:
        images: arm -> [K, C, H, W] uint8; "real" is training data.
        titles: arm -> title; gives the order of the rows too.
    """
    titles = {**titles, "real": "training images"}
    names = [arm for arm in titles if arm in images]
    for arm in names[1:]:
        if np.array_equal(images[arm], images[names[0]]):  # weights of 0
            titles[arm] += f" (= {titles[names[0]]})"
    rows = np.stack([images[arm] for arm in names])  # [arms, K, C, H, W]
    gap = [(0, max(1, rows.shape[-1] // 16))] * 2
    rows = np.pad(rows, [(0, 0)] * 3 + gap, constant_values=255)
    a, k, c, h, w = rows.shape
    sheet = rows.transpose(0, 3, 1, 4, 2).reshape(a * h, k * w, c)
    figure, axes = subplots(1, 1, (10, 0.6 + 7 * a * h / (k * w)), layout="compressed")
    ax = axes.flat[0]
    ax.imshow(sheet.squeeze(), cmap="gray", interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks((np.arange(a) + 0.5) * h - 0.5, [titles[arm] for arm in names])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return captioned(figure, caption)


def neighbours(df: pd.DataFrame, caption: str = "") -> Figure:
    """Distance to the nearest training image, per arm, against held-out images' own.

    Boxes: quartiles, whiskers: 5 to 95 %. Copies would lie left of the test images' box.
    """
    df = df[~df["arm"].str.contains("@")]  # other EMA horizons
    df = df.sort_values("arm", key=lambda arm: arm != "test", kind="stable")
    titles = {arm: ARMS[arm].title if arm in ARMS else "test images" for arm in df["arm"]}
    colours = [style(arm)["color"] if arm in ARMS else "white" for arm in df["arm"]]
    figure, axes = subplots(1, 1, (9, 1.2 + 0.34 * len(df)))
    named = df.assign(arm=df["arm"].map(titles))
    ax = boxes(named, x="value", y="arm", hue="arm", palette=colours, ax=axes.flat[0])
    for median in df.loc[df["arm"] == "test", "median"]:
        ax.axvline(median, color="0.4", ls="--", zorder=9, label="median of test images")
    legend(figure, [ax], 1)
    ax.set(ylabel="", xlabel="Euclidean distance to the nearest training image, pixels in [−1, 1]")
    return captioned(figure, caption)


def sweep(records: Records) -> Figure:
    """FID minus the pretrained model's of every cell and arm; arms of the base as lines.

    Cells named by numbers are joined by lines.
    """
    df = tables.table(records).iloc[1:].fillna({"difference": 0})
    base, cells = df[df["cell"] == BASE], df[df["cell"] != BASE]
    names, arms = list(cells["cell"].unique()), list(cells["arm"].unique())
    numeric = pd.to_numeric(pd.Series(names), errors="coerce").notna().all()
    figure, axes = subplots(1, 1, (10, 5.2))
    ax = axes.flat[0]
    for row in base.itertuples():
        look = {"color": style(row.arm)["color"], "lw": 1.5, "zorder": 1}
        ax.axhline(row.difference, ls="--", label=f"{row.title} (the base)", **look)
    for i, arm in enumerate(arms):
        rows = cells[cells["arm"] == arm]
        at = rows["cell"].map(names.index) + 0.1 * (i - (len(arms) - 1) / 2)
        look = {"label": rows["title"].iloc[0], "ls": ":" if numeric else "", **MEAN, **style(arm)}
        ax.errorbar(at, rows["difference"], tables.half(rows), **look)
    ax.set_xticks(range(len(names)), names)
    if sum(map(len, names)) > 60:
        plt.setp(ax.get_xticklabels(), rotation=25, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.5, len(names) - 0.5)
    scale = symlog_if_wide("y", ax, df["difference"])
    ax.set_xlabel(records.sweep["axis"])
    ax.set_ylabel(f"FID minus the pretrained model's\n(below 0: better{scale})")
    ax.grid(axis="y", color="0.92")
    legend(figure, [ax], 3)
    return captioned(figure, tables.caption(records))


def ema_horizon(records: Records) -> Figure:
    """FID minus the pretrained model's against the steps that an EMA averages over.

    Arms named "soup@0.98" are of an EMA decay of their own, all others of ``ema_decay``; they
    stand a little apart so that none hides another.
    """
    df = tables.table(records).iloc[1:]
    df[["base", "decay"]] = df["arm"].str.split("@", expand=True)
    decay = df["decay"].fillna(records.parameters["ema_decay"]).astype(float)
    df = df.assign(steps=1 / (1 - decay)).sort_values("steps")
    figure, axes = subplots(1, 1, (9, 4.8))
    ax = axes.flat[0]
    for i, arm in enumerate(df.dropna(subset="decay")["base"].unique()):
        rows = df[df["base"] == arm]
        look = {"label": ARMS[arm].title, **MEAN, **style(arm)}
        ax.errorbar(rows["steps"] * 1.08**i, rows["difference"], tables.half(rows), **look)
    ax.axhline(0, color=STYLES["pretrained"][0], lw=1, zorder=0)
    ax.set(xscale="log", xlabel="EMA decay, and 1 / (1 − decay), the steps that it averages over")
    decays = decay.unique()
    ax.set_xticks(1 / (1 - decays), [f"{d:g}\n{1 / (1 - d):.0f}" for d in decays])
    ax.minorticks_off()
    ax.set_ylabel("FID minus the pretrained model's\n(below 0: better)")
    legend(figure, [ax], 2)
    return captioned(figure, tables.caption(records))


def history(df: pd.DataFrame, caption: str = "") -> Figure:
    """Losses of pretraining with its learning rate, and of the finetuning runs after it."""
    figure, axes = subplots(1, 2, (10, 4.2))
    left, right = axes.flat
    baseline, finetuned = df[df["run"] == "baseline"], df[df["run"] != "baseline"]
    later = baseline[baseline["step"] > 0]  # random weights dwarf the rest
    left.plot(later["step"], later["train_loss"], lw=5, alpha=0.4, label="training images")
    left.plot(later["step"], later["held_out_loss"], ".-k", label="held-out images")
    left.set(title="pretraining", xlabel="step", ylabel="denoising loss", yscale="log")
    rate = left.twinx()
    rate.plot(later["step"], later["learning_rate"], "--", color="0.6")
    rate.set(ylabel="learning rate (dashed)", ylim=(0, None))
    base = baseline["held_out_loss"].iloc[-1]
    for run, part in finetuned.groupby("run", sort=False):
        arm = FAMILIES.get(re.sub(r"-\d+of\d+$", "", run), "reweighted")
        look = {"color": STYLES[arm][0], "label": ARMS[arm].title.removesuffix(", routed")}
        right.plot(part["step"], 100 * (part["held_out_loss"] / base - 1), **look)
    right.axhline(0, color=STYLES["pretrained"][0], lw=1, zorder=0)
    right.set(title="finetuning: loss over all timesteps", xlabel="step")
    right.set_yscale("symlog", linthresh=1)
    right.set_ylabel("held-out loss minus the pretrained\nmodel's, % (symmetric log scale)")
    legend(figure, axes.flat, 4)
    return captioned(figure, caption)


def loss_per_timestep(records: Records, caption: str = "") -> Figure:
    """Denoising loss of every arm over the pretrained model's, per bin of timesteps.

    Of several training seeds, their means are shown.
    """
    panels = _panels(records)
    df = records.losses.assign(t=lambda x: (x["bin_start"] + x["bin_stop"]) / 2)
    table = df.pivot_table(index="t", columns="arm", values="loss")
    ratio = table.div(table["pretrained"], axis=0)
    figure, axes = subplots(1, len(panels), (10, 5), sharey=True)
    for ax, (title, arms) in zip(axes.flat, panels.items(), strict=True):
        for arm in arms:
            ax.plot(ratio.index, ratio[arm], ms=5, label=ARMS[arm].title, **style(arm))
        ax.set(title=title, xlabel="timestep t")
    axes.flat[0].set_ylabel("loss / pretrained model's loss\n(below 1: better)")
    legend(figure, axes.flat, 3)
    return captioned(figure, caption)


def gate(records: Records, caption: str = "") -> Figure:
    """Test loss in each range against the model of all timesteps, before any image is made.

    Small: training seeds, with the interval over images; large: their mean, with the t interval.
    """
    seeds = intervals.gate_by_seed(records.gate, records.parameters["confidence"])
    means = intervals.gate(records)
    models = list(means["model"].unique())
    figure, axes = grid(means["range"].nunique(), 4, (2.6, 3.4))
    for ax, (k, rows) in zip(axes, means.groupby("range"), strict=True):
        for x, row in enumerate(rows.itertuples()):
            part = seeds[(seeds["model"] == row.model) & (seeds["range"] == k)]
            small = {"ms": 4, "lw": 0.9, "alpha": 0.6, "ls": "", **style(row.model)}
            at = x + np.linspace(0.15, 0.5, len(part))
            ax.errorbar(at, 100 * part["relative"], 100 * part["half"], **small)
            large = {"ls": "", **MEAN, **style(row.model)}
            half = 50 * (row.high - row.low)
            ax.errorbar(x - 0.1, 100 * row.relative, half, label=ARMS[row.model].title, **large)
        ax.axhline(0, color=STYLES["all_plain"][0], lw=1.2, zorder=0)
        ax.set(title=f"range {k}: [{row.start}, {row.stop})", xticks=[], xlim=(-0.4, len(models)))
    axes[0].set_ylabel(
        f"test loss minus that of\n{ARMS['all_plain'].title}, %\n(below 0: better; scales differ)"
    )
    legend(figure, axes, len(models))
    return captioned(figure, caption)
