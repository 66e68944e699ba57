"""The figure of a sweep: what every cell scores against the pretrained model."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from deme_lib.experiment.arms import BASE
from deme_lib.report.plots.style import STYLES, captioned, subplots, unknown_style


def sweep(df: pd.DataFrame, axis: str, caption: str = "") -> Figure:
    """FID minus the pretrained model's of every cell and arm; arms of the base as lines.

    Args:
        df: from ``sweep_tables.table``.
        axis: what differs between the cells.
    """
    base, cells = df[df["cell"] == BASE], df[df["cell"] != BASE]
    names, arms = list(cells["cell"].unique()), list(cells["arm"].unique())
    figure, axes = subplots(1, 1, (10, 5.2))
    ax = axes.flat[0]
    for i, row in enumerate(base.itertuples()):
        colour, _, line = STYLES.get(row.arm, unknown_style(i))
        mean = 0 if row.arm == "pretrained" else row.difference
        ax.axhline(mean, color=colour, ls=line, lw=1.5, zorder=1, label=f"{row.title} (the base)")
    for i, arm in enumerate(arms):
        rows = cells[cells["arm"] == arm]
        colour, marker, _ = STYLES.get(arm, unknown_style(i))
        at = np.array([names.index(c) for c in rows["cell"]]) + 0.16 * (i - (len(arms) - 1) / 2)
        style = {"color": colour, "marker": marker, "ms": 9, "capsize": 4, "lw": 2, "ls": ""}
        label = rows["title"].iloc[0]
        ax.errorbar(at, rows["difference"], rows["difference_halfwidth"], label=label, **style)
    long = sum(map(len, names)) > 60
    ax.set_xticks(range(len(names)), names)
    if long:
        plt.setp(ax.get_xticklabels(), rotation=25, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.5, len(names) - 0.5)
    _symlog_if_wide(ax, df["difference"].abs())
    scale = "; symmetric log scale" if ax.get_yscale() == "symlog" else ""
    ax.set(xlabel=axis, ylabel=f"FID minus the pretrained model's\n(below 0: better{scale})")
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return captioned(figure, f"{caption} Symbols: mean with paired t interval.")


def _symlog_if_wide(ax: plt.Axes, sizes: pd.Series) -> None:
    """A symmetric logarithmic axis where one cell would squeeze all others to a point."""
    if sizes.max() > 15 * sizes.median() > 0:
        ax.set_yscale("symlog", linthresh=2 * sizes.median())
        ax.autoscale(axis="y")
