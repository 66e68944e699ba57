"""One look for every figure: a colour and marker per arm, one caption, one legend."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from deme_lib.report.records import QUANTILES

COLOURS = sns.color_palette("colorblind").as_hex()
GREY = "#6e6e6e"
WHITE = {"fc": "white", "alpha": 0.75, "ec": "none", "pad": 1.5}
WIDTH = 9
"""Inches of every figure: at the README's 830 pixels, 10 points are 13 pixels high."""

STYLES = {
    "pretrained": (GREY, "o"),
    "all_plain": (COLOURS[1], "s"),
    "soup": (COLOURS[4], "v"),
    "plain_routed": (COLOURS[2], "^"),
    "deme_routed": (COLOURS[9], "D"),
    "deme_merged": (COLOURS[0], "*"),
    "averaged": (COLOURS[3], "P"),
    "plain_merged": (COLOURS[2], "X"),
    "reweighted": ("black", "H"),
    "all_same": (COLOURS[5], "d"),
    "soup_same": (COLOURS[6], "p"),
}
"""Arm -> (colour, marker); an arm of one's own is black."""
SIZES = {"*": 12, "P": 9, "D": 7}


def style(row: str) -> dict:
    """Colour and marker of a row's arm, in any cell ("cell / arm")."""
    colour, marker = STYLES.get(row.split(" / ")[-1], ("black", "8"))
    return {"color": colour, "marker": marker, "ms": SIZES.get(marker, 8)}


def shades(n: int) -> list:
    """A colour per range, from t = 0 up."""
    return sns.color_palette("viridis", n + 2)[1:-1]


def subplots(rows: int, columns: int, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure of the README's width and its axes [rows, columns]."""
    plain = {"axes.formatter.useoffset": False, "axes.spines.top": False}
    plain |= {"axes.spines.right": False, "axes.edgecolor": "0.4", "axes.linewidth": 0.8}
    sns.set_theme(style="ticks", context="notebook", font_scale=0.88, rc=plain)
    options = {"layout": "constrained", **options}
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **options)
    if options["layout"]:
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure, axes


def captioned(figure: Figure, caption: str) -> Figure:
    """A small text under the figure, in lines of its width."""
    words, lines = caption.split(), [""]
    for word in words:
        lines = [*lines, ""] if len(lines[-1]) + len(word) > 120 else lines
        lines[-1] += f" {word}" if lines[-1] else word
    figure.supxlabel(
        "\n".join(lines), fontsize=9, color="0.35", x=0.012, ha="left", linespacing=1.3
    )
    return figure


def legend(figure: Figure, axes: np.ndarray, columns: int, **options) -> None:
    """One legend above the figure for what any of its axes labels, instead of their own."""
    found = {}
    for ax in axes:
        if ax.get_legend():
            ax.get_legend().remove()
        found |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    options = {"loc": "outside upper center", "ncols": columns, "frameon": False, **options}
    figure.legend(found.values(), found.keys(), fontsize=10, **options)


def boxes(df: pd.DataFrame, **options) -> plt.Axes:
    """A box per row, from its recorded quantiles: quartiles, whiskers from 5 to 95 %."""
    names = [c for c in df if c not in QUANTILES]
    look = {"whis": (0, 100), "showfliers": False, "linewidth": 0.8, "saturation": 1, **options}
    return sns.boxplot(df.melt(names, QUANTILES), **look)


def symlog(ax: plt.Axes, axis: str, linear: float, reach: tuple[float, float]) -> None:
    """A symmetric logarithmic axis whose labelled ticks are plain numbers within ``reach``."""
    getattr(ax, f"set_{axis}scale")("symlog", linthresh=linear, linscale=0.7)
    sizes = [s * 10.0**k for k in range(-6, 7) for s in (1, 3)]
    sizes = [s for s in sizes if s >= 0.99 * linear]
    ticks = [-s for s in sizes[::-1] if -s >= reach[0]] + [0] + [s for s in sizes if s <= reach[1]]
    side = getattr(ax, f"{axis}axis")
    side.set_ticks(ticks, [f"{x:g}".replace("-", "−") for x in ticks])
    side.set_ticks([], minor=True)
