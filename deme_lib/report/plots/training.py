"""Figures of training and of the losses it leads to."""

from __future__ import annotations

import re

import pandas as pd
from matplotlib.figure import Figure

from deme_lib.report.plots.style import (
    COLOURS,
    LEGEND,
    STYLES,
    by_ablation,
    captioned,
    empty,
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
