"""Figures of training and of the losses it leads to."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deme_lib.experiment.arms import ARMS
from deme_lib.report import intervals
from deme_lib.report.plots.style import STYLES, captioned, grid, legend, style, subplots
from deme_lib.report.records import Records

FAMILIES = {"soup": "soup", "plain": "plain_routed", "deme": "deme_routed"}
FAMILIES |= {"all-plain": "all_plain", "all-same": "all_same", "soup-same": "soup_same"}
"""Family of finetuning runs -> the arm whose colour it has."""


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
    for run, part in finetuned.groupby("run", sort=False):
        family = re.sub(r"-\d+of\d+$", "", run)
        colour = STYLES[FAMILIES.get(family, "reweighted")][0]
        right.plot(part["step"], part["held_out_loss"], color=colour, label=family)
    right.axhline(baseline["held_out_loss"].iloc[-1], color=STYLES["pretrained"][0], lw=1, zorder=0)
    right.set(title="finetuning (grey line: the pretrained model)", xlabel="step")
    right.set_ylabel("held-out loss")
    legend(figure, axes.flat, 6)
    return captioned(figure, caption)


def loss_per_timestep(df: pd.DataFrame, panels: dict[str, list[str]], caption: str = "") -> Figure:
    """Denoising loss of every arm over the pretrained model's, per bin of timesteps.

    Args:
        df: losses; of several training seeds, their means are shown.
        panels: title -> arms.
    """
    df = df.assign(t=(df["bin_start"] + df["bin_stop"]) / 2)
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
            large = {"ms": 9, "capsize": 4, "lw": 2, "ls": "", **style(row.model)}
            half = 50 * (row.high - row.low)
            ax.errorbar(x - 0.1, 100 * row.relative, half, label=ARMS[row.model].title, **large)
        ax.axhline(0, color=STYLES["all_plain"][0], lw=1.2, zorder=0)
        ax.set(title=f"range {k}: [{row.start}, {row.stop})", xticks=[], xlim=(-0.4, len(models)))
    axes[0].set_ylabel(
        f"test loss minus that of\n{ARMS['all_plain'].title}, %\n(below 0: better; scales differ)"
    )
    legend(figure, axes, len(models))
    return captioned(figure, caption)
