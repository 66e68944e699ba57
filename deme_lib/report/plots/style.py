"""One look for every figure: a colour and marker per arm, one caption line, legends."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from deme_lib.report.records import QUANTILES

COLOURS = sns.color_palette("colorblind").as_hex()

STYLES = {
    "pretrained": ("#6e6e6e", "o"),
    "all_plain": (COLOURS[1], "s"),
    "soup": (COLOURS[4], "v"),
    "plain_routed": (COLOURS[2], "^"),
    "deme_routed": (COLOURS[9], "<"),
    "deme_merged": (COLOURS[0], "*"),
    "averaged": (COLOURS[3], "P"),
    "plain_merged": (COLOURS[2], "X"),
    "all_same": (COLOURS[5], "D"),
    "soup_same": (COLOURS[6], "p"),
    "all_checkpoints": (COLOURS[8], "h"),
    "merged_searched": (COLOURS[0], "d"),
    "soup_searched": (COLOURS[4], ">"),
    "all_scaled": (COLOURS[1], "d"),
    "one_scaled": (COLOURS[9], "8"),
    "reweighted": ("black", "H"),
}
"""Arm -> (colour, marker)."""


def style(arm: str) -> dict:
    """Colour and marker of an arm, at any EMA horizon ("soup@0.98")."""
    return dict(zip(("color", "marker"), STYLES[arm.partition("@")[0]], strict=True))


def subplots(rows: int, columns: int, inches: tuple, **options) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns]."""
    plain = {"axes.formatter.useoffset": False}
    sns.set_theme(style="ticks", context="notebook", font_scale=0.9, rc=plain)
    options = {"layout": "constrained", **options}
    return plt.subplots(rows, columns, figsize=inches, squeeze=False, **options)


def grid(panels: int, most: int, inches: tuple) -> tuple[Figure, np.ndarray]:
    """A figure of that many axes [panels], at most so many a row, each of a size."""
    columns = min(most, panels)
    rows = -(-panels // columns)
    size = (max(inches[0] * columns, 6), 0.9 + inches[1] * rows)
    figure, axes = subplots(rows, columns, size)
    for ax in axes.flat[panels:]:
        ax.remove()
    return figure, axes.flat[:panels]


def captioned(figure: Figure, caption: str) -> Figure:
    """One small line under the figure, shrunk to its width."""
    size = min(9.0, 128 * figure.get_figwidth() / max(len(caption), 1))
    figure.supxlabel(caption, fontsize=size, color="0.3", x=0.01, ha="left")
    return figure


def legend(figure: Figure, axes: np.ndarray, columns: int, **options) -> None:
    """One legend above the figure for what any of its axes labels, instead of their own."""
    found = {}
    for ax in axes:
        if ax.get_legend():
            ax.get_legend().remove()
        found |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    options |= {"loc": "outside upper center", "ncols": columns, "frameon": False, "fontsize": 9}
    figure.legend(found.values(), found.keys(), **options)


def boxes(df: pd.DataFrame, **options) -> plt.Axes:
    """A box per row, from its recorded quantiles: quartiles, whiskers from 5 to 95 %."""
    names = [c for c in df if c not in QUANTILES]
    look = {"whis": (0, 100), "showfliers": False, "linewidth": 0.8, **options}
    return sns.boxplot(df.melt(names, QUANTILES), **look)


def symlog_if_wide(axis: str, ax: plt.Axes, differences: pd.Series) -> str:
    """A symmetric logarithmic axis where one arm would squeeze all others to a point."""
    sizes = differences.abs()
    sizes = sizes[sizes > 0]
    if sizes.empty or sizes.max() <= 40 * sizes.median():
        return ""
    getattr(ax, f"set_{axis}scale")("symlog", linthresh=2 * sizes.median())
    ax.autoscale(axis=axis)
    return ", symmetric log scale"
