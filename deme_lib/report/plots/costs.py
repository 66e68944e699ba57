"""What an arm costs against what it scores."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deme_lib.report import comparisons, tables
from deme_lib.report.plots.style import (
    LEGEND,
    STYLES,
    captioned,
    shared_legend,
    subplots,
    unknown_style,
)


def cost(records: tables.Records) -> Figure:
    """FID against what an arm costs: parameters held, denoiser calls, training steps.

    Bars are t intervals of an arm's paired differences from the pretrained model.
    """
    table = tables.every_arm(records)
    level = records.parameters["confidence"]
    table["halfwidth"] = [_halfwidth(records, arm, level) for arm in table["arm"]]
    costs = {
        "parameters": "parameters held",
        "calls_per_image": "denoiser calls per image",
        "training_steps": "training steps after pretraining",
    }
    figure, axes = subplots(1, 3, (10, 5.2), sharey=True)
    for ax, (column, label) in zip(axes.flat, costs.items(), strict=True):
        _cost_panel(ax, table, column)
        ax.set_xlabel(label)
    axes.flat[0].set_ylabel(
        f"mean FID (lower is better); bars: {100 * level:g} % paired t\n"
        "interval of the difference from pretrained",
        fontsize=10,
    )
    if table["fid_mean"].max() > 10 * table["fid_mean"].min():
        axes.flat[0].set_yscale("log")
    handles, labels = shared_legend(axes)
    order = [labels.index(title) for title in table["title"]]
    handles = [handles[i] for i in order]
    figure.legend(handles, table["title"], loc="outside upper center", **{**LEGEND, "ncols": 4})
    note = "Costs in ascending order, not to scale; equal ones side by side. "
    note += f"The bars (uncorrected) {tables.covers(records)}. "
    return captioned(figure, f"{note}{tables.setting(records)}.")


def _halfwidth(records: tables.Records, arm: str, level: float) -> float:
    """Of the paired interval against the pretrained model; 0 for that model itself."""
    d = comparisons.differences(records, arm, "pretrained", "fid")
    return comparisons.paired_interval(d, level)[1]


def _cost_panel(ax: plt.Axes, table: pd.DataFrame, column: str) -> None:
    """One column of points per distinct cost."""
    groups = list(table.groupby(column, sort=True))
    for x, (_, group) in enumerate(groups):
        places = x + 0.8 * (np.arange(1, len(group) + 1) / (len(group) + 1) - 0.5)
        for i, (at, (_, row)) in enumerate(zip(places, group.iterrows(), strict=True)):
            colour, marker, _ = STYLES.get(row["arm"], unknown_style(i))
            style = {"color": colour, "marker": marker, "ls": "", "ms": 8, "lw": 1}
            style |= {"capsize": 2, "label": row["title"]}
            ax.errorbar(at, row["fid_mean"], row["halfwidth"], **style)
        if x:
            ax.axvline(x - 0.5, color="0.9", lw=1)
    labels = [f"{cost:,.0f}" for cost, _ in groups]
    ax.set_xticks(range(len(groups)), labels, rotation=25 if len(groups) > 3 else 0)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.tick_params(axis="x", length=0)
