"""Figures of training and of the losses it leads to."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deme_lib.report import intervals
from deme_lib.report.plots.style import (
    COLOURS,
    STYLES,
    captioned,
    empty,
    grid,
    legend,
    style,
    subplots,
    title_of,
)
from deme_lib.report.records import Records


def history(df: pd.DataFrame, caption: str = "") -> Figure:
    """Losses of pretraining with its learning rate, and of the finetuning runs after it."""
    figure, axes = subplots(1, 2, (10.5, 4.2))
    left, right = axes.flat
    baseline, finetuned = df[df["run"] == "baseline"], df[df["run"] != "baseline"]
    left.set(title="pretraining", xlabel="step", ylabel="denoising loss")
    right.set(title="finetuning from the pretrained model", xlabel="step", ylabel="held-out loss")
    if baseline.empty:
        empty(left, "no history of the pretrained model")
    else:
        _pretraining(left, baseline[baseline["step"] > 0])  # random weights dwarf the rest
        last = baseline["held_out_loss"].dropna().iloc[-1]
        right.axhline(last, color=STYLES["pretrained"][0], lw=1, label="end of pretraining")
    for run, part in finetuned.dropna(subset=["held_out_loss"]).groupby("run", sort=False):
        right.plot(part["step"], part["held_out_loss"], ms=4, label=run, **_run_style(run))
    if finetuned.empty:
        empty(right, "no finetuning run")
    else:
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    return captioned(figure, caption)


def _pretraining(ax, df: pd.DataFrame) -> None:
    looks = {"train_loss": {"color": COLOURS[1], "lw": 5, "alpha": 0.5, "label": "train"}}
    looks |= {"held_out_loss": {"color": COLOURS[0], "marker": "o", "ms": 3, "label": "held-out"}}
    for name, look in looks.items():
        part = df.dropna(subset=[name]) if name in df else df.iloc[:0]
        if len(part):
            ax.plot(part["step"], part[name], **look)
    ax.legend(frameon=False)
    ax.set_yscale("log")
    rate = ax.twinx()
    rate.plot(df["step"], df["learning_rate"], "--", color="0.6")
    rate.set_ylabel("learning rate (dashed)")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_ylim(bottom=0)


def _run_style(run: str) -> dict:
    """A colour per family of runs; markers and lines tell its members apart."""
    families = {"all": 1, "soup": 4, "plain": 2, "expert": 0}
    number = re.search(r"\d+", run)
    i = int(number[0]) - 1 if number else 0
    colour = next((COLOURS[k] for name, k in families.items() if run.startswith(name)), "0.4")
    look = {"marker": "os^vDPX*"[i % 8], "ls": ("-", "--", ":", "-.")[i % 4]}
    return {"color": colour, **look}


def loss_per_timestep(
    df: pd.DataFrame, caption: str = "", panels: dict[str, list[str]] | None = None
) -> Figure:
    """Denoising loss of every arm over the pretrained model's, per bin of timesteps.

    Args:
        df: losses; of several training seeds, their means are shown.
        panels: title -> arms, for example one an ablation.
    """
    df = df.assign(t=(df["bin_start"] + df["bin_stop"]) / 2)
    table = df.pivot_table(index="t", columns="arm", values="loss", sort=False)
    if "pretrained" not in table:
        raise ValueError("losses are shown relative to the arm 'pretrained', which has no rows")
    ratio = table.div(table["pretrained"], axis=0)
    panels = panels or {"": list(ratio)}
    figure, axes = subplots(1, len(panels), (max(5 * len(panels), 7), 5.2), sharey=True)
    for ax, (title, arms) in zip(axes.flat, panels.items(), strict=True):
        for i, arm in enumerate(arms):
            ax.plot(ratio.index, ratio[arm], ms=5, label=title_of(arm), **style(arm, i))
        ax.set(title=title, xlabel="timestep t")
    axes.flat[0].set_ylabel("loss / pretrained model's loss\n(below 1: better)")
    legend(figure, axes.flat, 4)
    return captioned(figure, caption)


def gate(records: Records, caption: str = "") -> Figure:
    """Test loss in each range against the model of all timesteps, before any image is made.

    Small: training seeds, with the interval over images; large: their mean, with the t interval.
    """
    table, df = intervals.gate(records), records.gate
    models, ranges = list(table["model"].unique()), sorted(table["range"].unique())
    base = df[df["model"] == "all_plain"].set_index(["training_seed", "range"])["loss"]
    level = records.parameters["confidence"]
    figure, axes = grid(len(ranges), 4, (2.9, 3.6))
    for ax, k in zip(axes, ranges, strict=True):
        for x, model in enumerate(models):
            part = df[(df["model"] == model) & (df["range"] == k)]
            look = style(model, x)
            loss = base.reindex(part.set_index(["training_seed", "range"]).index).to_numpy()
            z = intervals.student.ppf((1 + level) / 2, part["images"] - 1)
            at = x + 0.12 + 0.3 * np.arange(len(part)) / max(len(part), 3)
            small = {"ms": 4, "lw": 0.9, "alpha": 0.6, "ls": "", **look}
            percent = 100 * part["difference"].to_numpy() / loss
            ax.errorbar(at, percent, 100 * z * part["se"].to_numpy() / loss, **small)
            row = table[(table["model"] == model) & (table["range"] == k)].iloc[0]
            half = 100 * (row["high"] - row["low"]) / 2
            large = {"ms": 9, "capsize": 4, "lw": 2, "ls": "", "label": title_of(model), **look}
            ax.errorbar(x - 0.12, 100 * row["relative"], half, **large)
        ax.axhline(0, color=STYLES["all_plain"][0], lw=1.2, zorder=0)
        ax.set(title=f"range {k}: [{row['start']}, {row['stop']})", xticks=[])
        ax.set_xlim(-0.5, len(models) - 0.3)
    axes[0].set_ylabel("test loss minus all plain's, %\n(below 0: better)")
    legend(figure, axes, len(models))
    return captioned(figure, caption)
